// What a thread of fuse_features' kernels does with one unit of a row: its way over a map, access,
// and what a unit of the output is made of.
#pragma once

#include <limits>

#include "../fusion_node.h"
#include "launch.cuh"

namespace focalops {

constexpr int kThreads = 256;
// Maps whose numbers are on their way at the same time: as many as a node of a BiFPN has.
constexpr int kTogether = 3;

enum class Along { kChannels, kColumns };

// ---- access -------------------------------------------------------------------------------------

template <int Bytes>
using word_t = std::conditional_t<
    Bytes % 16 == 0, uint4,
    std::conditional_t<Bytes == 8, uint2,
                       std::conditional_t<Bytes == 4, uint32_t,
                                          std::conditional_t<Bytes == 2, uint16_t, uint8_t>>>>;

// N numbers that lie at a multiple of their size, or of 16 bytes.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  using Word = word_t<static_cast<int>(sizeof(T)) * N>;
  constexpr int kWords = static_cast<int>(sizeof(T) * N / sizeof(Word));
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    reinterpret_cast<Word*>(vector.data)[i] = reinterpret_cast<const Word*>(from)[i];
  }
  return vector;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& vector) {
  using Word = word_t<static_cast<int>(sizeof(T)) * N>;
  constexpr int kWords = static_cast<int>(sizeof(T) * N / sizeof(Word));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(vector.data)[i];
  }
}

template <typename To, int N, typename T>
__device__ __forceinline__ Vector<To, N> vector_cast(const T (&values)[N]) {
  Vector<To, N> vector;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    vector.data[j] = static_cast<To>(values[j]);
  }
  return vector;
}

// ---- the way over a map -------------------------------------------------------------------------

struct Place {
  int64_t plane;
  int y, unit;  // of the row
};

class Walk {
 public:
  Walk(int64_t planes, int64_t height, int64_t units)
      : planes_(planes),
        height_(static_cast<int>(height)),
        units_(static_cast<int>(units)),
        by_height_(height),
        by_units_(units) {}

  int64_t size() const { return planes_ * height_ * units_; }

  // Before the launch: how many threads the grid has.
  void stride_by(int64_t threads) {
    step_.unit = static_cast<int>(threads % units_);
    step_.y = static_cast<int>(threads / units_ % height_);
    step_.plane = threads / units_ / height_;
  }

  __device__ __forceinline__ Place first() const {
    const uint32_t thread =
        blockIdx.x * kThreads + threadIdx.x;  // a grid that is resident is small
    const uint32_t row = by_units_.divide(thread), plane = by_height_.divide(row);
    return {plane, static_cast<int>(by_height_.remainder(row, plane)),
            static_cast<int>(by_units_.remainder(thread, row))};
  }

  __device__ __forceinline__ bool has(const Place& at) const { return at.plane < planes_; }

  __device__ __forceinline__ void advance(Place& at) const {
    at.unit += step_.unit;
    const int next_row = at.unit >= units_;
    at.unit -= next_row ? units_ : 0;
    at.y += step_.y + next_row;
    const int next_plane = at.y >= height_;
    at.y -= next_plane ? height_ : 0;
    at.plane += step_.plane + next_plane;
  }

 private:
  int64_t planes_;
  int height_, units_;
  FastDivisor by_height_, by_units_;
  Place step_{0, 0, 0};
};

// ---- a node -------------------------------------------------------------------------------------

template <typename scalar_t>
struct Map {
  const scalar_t* data;
  scalar_t* grad;
  uint8_t* places;  // of the output's numbers; null: not pooled, or not wanted
  int height, width;
  Resampling resampling;
  int pad_y, pad_x;
};

template <typename T>
struct Weighting {
  const T* weights;
  FusionMode mode;
  int count;
  T eps;
};

template <typename scalar_t_>
struct Node {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;

  Map<scalar_t> maps[kMaxFeatures];
  Weighting<T> weighting;
  int count, height, width, pixel;
  FusionActivation activation;
};

// Halves are rounded in the end: their factor is the quotient, and nothing is left to divide by.
template <typename scalar_t>
constexpr bool kDivides = std::is_same_v<compute_t<scalar_t>, scalar_t>;

// The block's weights in shared memory. All threads must call it.
template <typename scalar_t, typename T = compute_t<scalar_t>>
__device__ __forceinline__ void prepare(const Weighting<T>& weighting, FusionWeights<T>& fusion) {
  if (threadIdx.x == 0) {
    fusion_weights(weighting.mode, weighting.weights, weighting.count, weighting.eps, fusion);
    for (int i = 0; i < weighting.count && !kDivides<scalar_t>; ++i) {
      fusion.factor[i] /= fusion.divisor;
    }
  }
  __syncthreads();
}

template <typename scalar_t, typename T>
__device__ __forceinline__ T weighted(T x, T factor, T divisor) {
  return kDivides<scalar_t> ? x * factor / divisor : x * factor;
}

template <typename scalar_t, typename T>
__device__ __forceinline__ T weighted_gradient(T grad, T factor, T divisor) {
  return kDivides<scalar_t> ? grad / divisor * factor : grad * factor;
}

template <typename T>
__device__ __forceinline__ T activated(FusionActivation activation, T x) {
  return activation == FusionActivation::kSilu    ? activate<FusionActivation::kSilu>(x)
         : activation == FusionActivation::kRelu6 ? activate<FusionActivation::kRelu6>(x)
                                                  : x;
}

template <typename T>
__device__ __forceinline__ T derivative(FusionActivation activation, T x) {
  return activation == FusionActivation::kSilu ? activation_derivative<FusionActivation::kSilu>(x)
         : activation == FusionActivation::kRelu6
             ? activation_derivative<FusionActivation::kRelu6>(x)
             : T(1);
}

// ---- resampling ---------------------------------------------------------------------------------

__device__ __forceinline__ bool is_half(int from, int to) { return from == (to + 1) / 2; }

// The row or column of `from` that number i of `to` is when it is upsampled: floor(i * from / to).
__device__ __forceinline__ int source_of(int i, int from, int to) {
  return is_half(from, to) ? i / 2 : static_cast<int>(int64_t{i} * from / to);
}

// The first row or column of `to` whose source is i, or would be.
__device__ __forceinline__ int first_child(int i, int from, int to) {
  if (is_half(from, to)) {
    return 2 * i < to ? 2 * i : to;
  }
  return static_cast<int>((int64_t{i} * to + from - 1) / from);
}

__device__ __forceinline__ int clamped(int i, int size) {
  return i < 0 ? 0 : i < size ? i : size - 1;
}

// The maxima of N windows, and which of the nine pixels, in row-major order, each of them was.
template <typename T, int N, bool WithPlaces>
struct Maxima {
  T largest[N];
  int place[N];

  __device__ __forceinline__ explicit Maxima(int first_place) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      largest[j] = -std::numeric_limits<T>::infinity();
      place[j] = first_place;
    }
  }

  // The larger, or a NaN, as torch's max_pool2d. A pixel outside the map stands for one of the
  // window, which changes no maximum but would change its place.
  __device__ __forceinline__ void take(int j, T value, int at, bool is_inside) {
    const bool takes = (value > largest[j] || value != value) && (!WithPlaces || is_inside);
    largest[j] = takes ? value : largest[j];
    place[j] = takes ? at : place[j];
  }
};

// A unit of the output made of a larger map; `plane` is the map's.
template <Along A, int N, bool WithPlaces, typename scalar_t>
__device__ __forceinline__ Vector<scalar_t, N> load_pooled(const Map<scalar_t>& map, int pixel,
                                                           const scalar_t* plane, int y, int x,
                                                           int channel, int64_t at) {
  using T = compute_t<scalar_t>;
  const int top = 2 * y - map.pad_y, left = 2 * x - map.pad_x;
  Maxima<T, N, WithPlaces> maxima((top < 0 ? 3 : 0) + (left < 0 && A == Along::kChannels ? 1 : 0));
  if (A == Along::kColumns && left < 0) {
    maxima.place[0] += 1;
  }
#pragma unroll 1  // three pixels on their way are enough, and nine take too many registers
  for (int ky = 0; ky < 3; ++ky) {
    const bool has_row = top + ky >= 0 && top + ky < map.height;
    const scalar_t* row = plane + int64_t{clamped(top + ky, map.height)} * map.width * pixel;
    if constexpr (A == Along::kChannels) {
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
        const bool is_inside = has_row && left + kx >= 0 && left + kx < map.width;
        const auto values = load<N>(row + int64_t{clamped(left + kx, map.width)} * pixel + channel);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          maxima.take(j, static_cast<T>(values.data[j]), 3 * ky + kx, is_inside);
        }
      }
    } else {
      // Pixels 2 j and 2 j + 1 are window j's in any case; with them goes the one before or behind.
      const auto values = load<2 * N>(row + 2 * x);
      const bool begins_before = map.pad_x != 0;
      const int other = begins_before ? 2 * x - 1 : 2 * (x + N);
      const bool has_other = other >= 0 && other < map.width;
      const scalar_t beside = row[clamped(other, map.width)];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const scalar_t before = j == 0 ? beside : values.data[j == 0 ? 0 : 2 * j - 1];
        const scalar_t behind = j == N - 1 ? beside : values.data[j == N - 1 ? 0 : 2 * j + 2];
        const scalar_t even = values.data[2 * j], odd = values.data[2 * j + 1];
        const bool has_before = has_row && (j > 0 || has_other);
        const bool has_behind = has_row && (j < N - 1 || has_other);
        maxima.take(j, static_cast<T>(begins_before ? before : even), 3 * ky,
                    begins_before ? has_before : has_row);
        maxima.take(j, static_cast<T>(begins_before ? even : odd), 3 * ky + 1, has_row);
        maxima.take(j, static_cast<T>(begins_before ? odd : behind), 3 * ky + 2,
                    begins_before ? has_row : has_behind);
      }
    }
  }
  if constexpr (WithPlaces) {
    store(map.places + at, vector_cast<uint8_t>(maxima.place));
  }
  return vector_cast<scalar_t>(maxima.largest);
}

// A unit of the output made of map i; number `at` of the output is its first.
template <Along A, int N, bool WithPlaces, typename scalar_t>
__device__ __forceinline__ Vector<scalar_t, N> load_resampled(const Node<scalar_t>& node, int i,
                                                              const Place& place, int x,
                                                              int channel, int64_t at) {
  const Map<scalar_t>& map = node.maps[i];
  if (map.resampling == Resampling::kNone) {
    return load<N>(map.data + at);
  }
  const scalar_t* plane = map.data + place.plane * map.height * map.width * node.pixel;
  if (map.resampling == Resampling::kPool) {
    return load_pooled<A, N, WithPlaces>(map, node.pixel, plane, place.y, x, channel, at);
  }
  const int64_t y = source_of(place.y, map.height, node.height);
  if constexpr (A == Along::kChannels) {
    return load<N>(plane + (y * map.width + source_of(x, map.width, node.width)) * node.pixel +
                   channel);
  } else {
    const auto values = load<N / 2>(plane + y * map.width + x / 2);
    Vector<scalar_t, N> twice;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      twice.data[j] = values.data[j / 2];
    }
    return twice;
  }
}

// Units of maps first .. first + kTogether, as far as there are any.
template <Along A, int N, bool WithPlaces, typename scalar_t>
__device__ __forceinline__ void load_maps(const Node<scalar_t>& node, int first, const Place& place,
                                          int x, int channel, int64_t at,
                                          Vector<scalar_t, N> (&units)[kTogether]) {
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    if (first + i < node.count) {
      units[i] = load_resampled<A, N, WithPlaces>(node, first + i, place, x, channel, at);
    }
  }
}

template <int N, typename scalar_t, typename T>
__device__ __forceinline__ void add_terms(const FusionWeights<T>& fusion, int count, int first,
                                          const Vector<scalar_t, N> (&units)[kTogether],
                                          T (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    if (first + i < count) {
      const T factor = fusion.factor[first + i];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T x = static_cast<T>(units[i].data[j]);
        const T term = weighted<scalar_t>(x, factor, fusion.divisor);
        sum[j] = first + i == 0 ? term : sum[j] + term;
      }
    }
  }
}

// Where in its row a unit begins.
template <Along A, int N>
struct Position {
  int x, channel;

  __device__ __forceinline__ Position(const FastDivisor& units_of_pixel, int unit) {
    if constexpr (A == Along::kChannels) {
      const uint32_t column = units_of_pixel.divide(unit);
      x = static_cast<int>(column);
      channel = static_cast<int>(units_of_pixel.remainder(unit, column)) * N;
    } else {
      x = unit * N;
      channel = 0;
    }
  }
};

template <typename scalar_t, int N>
__device__ __forceinline__ int64_t number_of(const Node<scalar_t>& node, const Place& place) {
  return (place.plane * node.height + place.y) * node.width * node.pixel + int64_t{place.unit} * N;
}

}  // namespace focalops
