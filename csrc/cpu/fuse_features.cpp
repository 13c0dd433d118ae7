// A node of a BiFPN on the CPU: one pass over the maps where they lie, by tiles that stay in the L1
// cache, in parallel.
//
// The backward computes the sum before the activation again, keeps the gradient by a term of it and
// which of the nine pixels of each window was the maximum, and then writes the gradient of a map
// that was resampled by looking up what a pixel went to.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "../fusion_node.h"
#include "memory.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kTile = 1024;    // numbers of a tile, about
constexpr int64_t kGrain = 16384;  // numbers of a piece of parallel work, about

// ---- vectors ------------------------------------------------------------------------------------

template <typename From, typename To>
FOCALOPS_SIMD void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

template <typename T>
FOCALOPS_SIMD void add_term(const T* x, T factor, T divisor, T* sum, int64_t n, bool is_first) {
  if (is_first) {
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = x[i] * factor / divisor;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      sum[i] += x[i] * factor / divisor;
    }
  }
}

template <FusionActivation Activation, typename T, typename To>
FOCALOPS_SIMD void activate_row(const T* x, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(activate<Activation>(x[i]));
  }
}

template <FusionActivation Activation, typename T, typename From>
FOCALOPS_SIMD void gradient_of_sum(const From* upstream, const T* x, T* grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = static_cast<T>(upstream[i]) * activation_derivative<Activation>(x[i]);
  }
}

template <typename T>
FOCALOPS_SIMD T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

template <typename T>
FOCALOPS_SIMD void add(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] += from[i];
  }
}

template <typename T>
FOCALOPS_SIMD void divide(const T* from, T divisor, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[i] / divisor;
  }
}

template <typename T, typename To>
FOCALOPS_SIMD void scale(const T* from, T factor, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(from[i] * factor);
  }
}

// ---- pairs of columns ---------------------------------------------------------------------------

// Of two vectors, one has each even element of a row and one each odd element.

template <typename From, typename To>
FOCALOPS_SIMD void split_pairs(const From* from, To* even, To* odd, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n / 2; ++i) {
    even[i] = static_cast<To>(from[2 * i]);
    odd[i] = static_cast<To>(from[2 * i + 1]);
  }
  if (n % 2 == 1) {
    even[n / 2] = static_cast<To>(from[n - 1]);
  }
}

template <typename T, typename To>
FOCALOPS_SIMD void scale_pairs(const T* even, const T* odd, T factor, To* to, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n / 2; ++i) {
    to[2 * i] = static_cast<To>(even[i] * factor);
    to[2 * i + 1] = static_cast<To>(odd[i] * factor);
  }
  if (n % 2 == 1) {
    to[n - 1] = static_cast<To>(even[n / 2] * factor);
  }
}

template <typename From, typename To>
FOCALOPS_SIMD void repeat_pairs(const From* from, To* to, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n / 2; ++i) {
    to[2 * i] = static_cast<To>(from[i]);
    to[2 * i + 1] = static_cast<To>(from[i]);
  }
  if (n % 2 == 1) {
    to[n - 1] = static_cast<To>(from[n / 2]);
  }
}

template <typename T>
FOCALOPS_SIMD void add_pairs(const T* from, T* to, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n / 2; ++i) {
    to[i] = from[2 * i] + from[2 * i + 1];
  }
  if (n % 2 == 1) {
    to[n / 2] = from[n - 1];
  }
}

// ---- windows ------------------------------------------------------------------------------------

// Where the nine pixels of windows of 3 x 3 begin, in row-major order: a pixel has a number for
// each of n windows.
template <typename T>
using Window = std::array<const T*, 9>;

// The largest, or a NaN, as torch's max_pool2d: of several NaNs and of equal numbers it does not
// matter which.
template <typename From, typename T>
FOCALOPS_SIMD void take_largest(const Window<From>& window, T* largest, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T result = static_cast<T>(window[0][i]);
    bool is_nan = result != result;
    for (size_t k = 1; k < window.size(); k += 2) {  // a comparison finds a NaN among two
      const T a = static_cast<T>(window[k][i]), b = static_cast<T>(window[k + 1][i]);
      const T larger = a > b ? a : b;
      result = larger > result ? larger : result;
      is_nan |= __builtin_isunordered(a, b);
    }
    largest[i] = is_nan ? std::numeric_limits<T>::quiet_NaN() : result;
  }
}

// The same, and which pixel it is: `first` where none is larger than -inf. Places are of the type
// of the numbers, so that one mask chooses both.
template <typename From, typename T>
FOCALOPS_SIMD void find_largest(const Window<From>& window, T first, T* largest, T* places,
                                int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T result = -std::numeric_limits<T>::infinity(), place = first;
    for (size_t k = 0; k < window.size(); ++k) {
      const T value = static_cast<T>(window[k][i]);
      const bool takes = value > result || value != value;
      result = takes ? value : result;
      place = takes ? static_cast<T>(k) : place;
    }
    largest[i] = result;
    places[i] = place;
  }
}

// A window that a pixel lies in, or a row of windows and the row of their pixels.
template <typename T>
struct Parent {
  const T* grad;
  const T* places;
  T place;  // of the pixel, or of the row's first
};

// The gradients of a row of pixels, in pairs of columns, by n windows each of the parents. Those of
// the columns that two windows share begin with that of window `shift` and the one before it.
template <size_t Count, typename T>
FOCALOPS_SIMD void sum_maxima(const Parent<T>* from, int64_t shift, T* shared, T* middle,
                              int64_t n) {
  std::array<Parent<T>, Count> parents;  // in registers: what is written may not change them
  std::copy_n(from, Count, parents.begin());
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T in_middle = 0, in_two = 0;
    for (const Parent<T>& parent : parents) {
      const T* grad = parent.grad + i;
      const T* places = parent.places + i;
      const T left = grad[shift], right = grad[shift - 1], own = grad[0];
      in_middle += places[0] == parent.place + 1 ? own : T(0);
      in_two += places[shift] == parent.place ? left : T(0);
      in_two += places[shift - 1] == parent.place + 2 ? right : T(0);
    }
    middle[i] = in_middle;
    shared[i] = in_two;
  }
}

// The gradient of a pixel of n numbers, by all windows that it lies in.
template <size_t Count, typename T, typename To>
FOCALOPS_SIMD void scale_maxima(const Parent<T>* from, T factor, To* to, int64_t n) {
  std::array<Parent<T>, Count> parents;
  std::copy_n(from, Count, parents.begin());
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T sum = 0;
    for (const Parent<T>& parent : parents) {
      const T value = parent.grad[i];
      sum += parent.places[i] == parent.place ? value : T(0);
    }
    to[i] = static_cast<To>(sum * factor);
  }
}

// ---- maps ---------------------------------------------------------------------------------------

template <typename T>
FusionWeights<T> weights_of(const std::optional<Tensor>& weights, int64_t mode, size_t count,
                            double eps) {
  FusionWeights<T> fusion;
  fusion_weights(static_cast<FusionMode>(mode), data_of<T>(weights), static_cast<int>(count),
                 static_cast<T>(eps), fusion);
  return fusion;
}

// What is resampled at a time is a unit: a row of contiguous maps, a pixel of channels_last ones.
// Units of the output follow each other in memory; some of them are a tile.
struct Tiles {
  int64_t length, units, units_of_row, units_of_tile;

  explicit Tiles(const FusionNode& node)
      : length(node.pixel == 1 ? node.width : node.pixel),
        units(node.pixel == 1 ? node.rows() : node.rows() * node.width),
        units_of_row(node.pixel == 1 ? 1 : node.width),
        units_of_tile(std::max<int64_t>(1, kTile / std::max<int64_t>(length, 1))) {}

  int64_t count() const { return (units + units_of_tile - 1) / units_of_tile; }
  int64_t numbers() const { return units_of_tile * length; }

  // Calls f(tile, first unit, unit past the last).
  template <typename F>
  void visit(int64_t tile, int64_t end, const F& f) const {
    for (; tile < end; ++tile) {
      f(tile, tile * units_of_tile, std::min((tile + 1) * units_of_tile, units));
    }
  }
};

// Brings a map to the output's size, for one thread.
template <typename scalar_t>
class Resampler {
 public:
  using T = compute_t<scalar_t>;

  Resampler(const FusionNode& node, const FusionMap& map)
      : node_(node),
        map_(map),
        tiles_(node),
        data_(static_cast<const scalar_t*>(map.tensor.const_data_ptr())) {
    if (map.resampling != Resampling::kNone || !std::is_same_v<T, scalar_t>) {
      values_.resize(tiles_.numbers());
    }
    if (map.resampling == Resampling::kUp && node.pixel == 1) {
      for (int64_t x = 0; x < node.width; ++x) {
        columns_.push_back(x * map.width / node.width);
      }
    }
    if (map.resampling == Resampling::kPool) {
      places_.resize(tiles_.numbers());
      nothing_.assign(node.pixel, static_cast<scalar_t>(-kInfinity));
      for (auto& row : rows_) {
        row.even.assign(node.width + 1, -kInfinity);
        row.odd.assign(node.width, -kInfinity);
      }
    }
  }

  // Units [begin, end) of a tile; `places`, where asked for and where the map is pooled, says which
  // of the 9 pixels of its window, in row-major order, each number is.
  const T* units(int64_t begin, int64_t end, uint8_t* places = nullptr) {
    const int64_t length = tiles_.length, n = (end - begin) * length;
    if (map_.resampling == Resampling::kNone) {
      if constexpr (std::is_same_v<T, scalar_t>) {
        return data_ + begin * length;
      } else {
        convert(data_ + begin * length, values_.data(), n);
        return values_.data();
      }
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / tiles_.units_of_row, x = unit % tiles_.units_of_row;
      const int64_t plane = row / node_.height, y = row % node_.height;
      const int64_t at = (unit - begin) * length;
      if (map_.resampling == Resampling::kUp) {
        upsample(plane * map_.height + y * map_.height / node_.height, x, values_.data() + at);
      } else {
        pool(plane, y, x, values_.data() + at, places == nullptr ? nullptr : places_.data() + at);
      }
    }
    if (places != nullptr) {
      convert(places_.data(), places, n);
    }
    return values_.data();
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  struct SplitRow {
    int64_t row = -1;
    std::vector<T> even, odd;  // columns of a row of windows
  };

  void upsample(int64_t row, int64_t x, T* out) const {
    const scalar_t* from = data_ + row * map_.width * node_.pixel;
    if (node_.pixel != 1) {
      convert(from + x * map_.width / node_.width * node_.pixel, out, node_.pixel);
    } else if ((node_.width + 1) / 2 == map_.width) {
      repeat_pairs(from, out, node_.width);
    } else {
      for (int64_t column = 0; column < node_.width; ++column) {
        out[column] = static_cast<T>(from[columns_[column]]);
      }
    }
  }

  void pool(int64_t plane, int64_t y, int64_t x, T* out, T* places) {
    const int64_t top = 2 * y - map_.pad_y, left = 2 * x - map_.pad_x;
    const int first_row = top < 0 ? 3 : 0;
    if (node_.pixel != 1) {
      const int first = first_row + (left < 0 ? 1 : 0);
      return take(window_of_pixels(plane, top, left), first, out, places);
    }
    take(window_of_rows(plane, top), first_row, out, places);
    if (places != nullptr && map_.pad_x == 1 && places[0] == first_row) {
      places[0] += 1;  // only padding lies there
    }
  }

  template <typename From>
  void take(const Window<From>& window, int first, T* out, T* places) {
    if (places == nullptr) {
      take_largest(window, out, tiles_.length);
    } else {
      find_largest(window, static_cast<T>(first), out, places, tiles_.length);
    }
  }

  Window<scalar_t> window_of_pixels(int64_t plane, int64_t top, int64_t left) const {
    Window<scalar_t> window;
    for (int64_t k = 0; k < 9; ++k) {
      const int64_t y = top + k / 3, x = left + k % 3;
      const bool is_inside = y >= 0 && y < map_.height && x >= 0 && x < map_.width;
      window[k] = is_inside ? data_ + ((plane * map_.height + y) * map_.width + x) * node_.pixel
                            : nothing_.data();
    }
    return window;
  }

  Window<T> window_of_rows(int64_t plane, int64_t top) {
    Window<T> window;
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t y = top + ky;
      const bool is_inside = y >= 0 && y < map_.height;
      const SplitRow& row = is_inside ? split(plane * map_.height + y) : rows_.back();
      window[3 * ky] = row.even.data();
      window[3 * ky + 1] = row.odd.data();
      window[3 * ky + 2] = row.even.data() + 1;
    }
    return window;
  }

  // A row of the map, which the next row of windows may read, too.
  const SplitRow& split(int64_t row) {
    SplitRow& result = rows_[row % 3];
    if (result.row != row) {
      result.row = row;
      T* even = result.even.data();
      T* odd = result.odd.data();
      split_pairs(data_ + row * map_.width, map_.pad_x == 1 ? odd : even,
                  map_.pad_x == 1 ? even + 1 : odd, map_.width);
    }
    return result;
  }

  const FusionNode& node_;
  const FusionMap& map_;
  Tiles tiles_;
  const scalar_t* data_;
  std::vector<T> values_, places_;
  std::vector<int64_t> columns_;   // of the map, for each of the output
  std::vector<scalar_t> nothing_;  // a pixel of padding
  std::array<SplitRow, 4> rows_;   // the last is padding
};

template <typename scalar_t>
std::vector<Resampler<scalar_t>> resamplers(const FusionNode& node) {
  std::vector<Resampler<scalar_t>> result;
  for (const FusionMap& map : node.maps) {
    result.emplace_back(node, map);
  }
  return result;
}

// Calls f(begin, end) for rows or tiles of `length` numbers.
template <typename F>
void in_parallel(int64_t count, int64_t length, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(length, 1));
  torch::stable::parallel_for(0, count, grain, f);
}

Tensor fuse_features_cpu(const std::vector<Tensor>& features, const std::optional<Tensor>& weights_,
                         int64_t mode, double eps, int64_t activation, bool symmetric) {
  check_fuse_features(features, weights_, mode, activation);
  const auto weights = contiguous(weights_);
  const FusionNode node = fusion_node(features, symmetric);
  const Tiles tiles(node);
  Tensor output = torch::stable::empty_like(node.maps[0].tensor);
  output = on_huge_pages(output, output.element_size());
  dispatch_floating(node.dtype, [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto fusion = weights_of<T>(weights, mode, features.size(), eps);
    auto* out = static_cast<scalar_t*>(output.mutable_data_ptr());
    dispatch_activation(activation, [&](auto activation_tag) {
      in_parallel(tiles.count(), tiles.numbers(), [&](int64_t first, int64_t last) {
        auto maps = resamplers<scalar_t>(node);
        std::vector<T> sum(tiles.numbers());
        tiles.visit(first, last, [&](int64_t, int64_t begin, int64_t end) {
          const int64_t n = (end - begin) * tiles.length;
          for (size_t i = 0; i < maps.size(); ++i) {
            add_term(maps[i].units(begin, end), fusion.factor[i], fusion.divisor, sum.data(), n,
                     i == 0);
          }
          activate_row<decltype(activation_tag)::value>(sum.data(), out + begin * tiles.length, n);
        });
      });
    });
  });
  return output;
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient by a term divided by its factor, and the places of the maxima.
template <typename T>
struct Upstream {
  const FusionNode& node;
  const T* grad;
  const uint8_t* places;  // of a map that is pooled
  T factor;
};

// Rows or columns of the output that source `i` of `from` goes to when it is upsampled.
int64_t first_child(int64_t i, int64_t from, int64_t to) { return (i * to + from - 1) / from; }

// Writes the gradients of rows of one map; for one thread.
template <typename scalar_t>
class GradientWriter {
 public:
  using T = compute_t<scalar_t>;

  GradientWriter(const Upstream<T>& up, const FusionMap& map, scalar_t* out)
      : up_(up), node_(up.node), map_(map), out_(out), first_(node_.row()), second_(first_.size()) {
    if (map.resampling == Resampling::kPool) {
      for (auto& row : places_) {
        row.places.assign(node_.row() + 2, T(-1));
      }
    }
  }

  void write(int64_t row) {
    const int64_t plane = row / map_.height, y = row % map_.height;
    scalar_t* out = out_ + row * map_.width * node_.pixel;
    if (map_.resampling == Resampling::kUp) {
      write_sums_of_children(plane, y, out);
    } else if (node_.pixel == 1) {
      write_maxima_of_row(plane, y, out);
    } else {
      write_maxima_of_pixels(plane, y, out);
    }
  }

 private:
  void write_sums_of_children(int64_t plane, int64_t y, scalar_t* out) {
    T* children = first_.data();
    T* sums = second_.data();
    std::fill_n(children, node_.row(), T(0));
    for (int64_t child = first_child(y, map_.height, node_.height);
         child < first_child(y + 1, map_.height, node_.height); ++child) {
      add(up_.grad + (plane * node_.height + child) * node_.row(), children, node_.row());
    }
    if (node_.pixel == 1 && (node_.width + 1) / 2 == map_.width) {
      add_pairs(children, sums, node_.width);
    } else {
      add_columns(children, sums);
    }
    scale(sums, up_.factor, out, map_.width * node_.pixel);
  }

  void add_columns(const T* children, T* sums) const {
    std::fill_n(sums, map_.width * node_.pixel, T(0));
    for (int64_t x = 0; x < map_.width; ++x) {
      for (int64_t child = first_child(x, map_.width, node_.width);
           child < first_child(x + 1, map_.width, node_.width); ++child) {
        add(children + child * node_.pixel, sums + x * node_.pixel, node_.pixel);
      }
    }
  }

  // The windows along one axis that pixel `i` lies in: [first, last].
  static std::array<int64_t, 2> windows_of(int64_t i, int64_t pad, int64_t size) {
    return {std::max<int64_t>((i + pad - 1) / 2, 0), std::min((i + pad) / 2, size - 1)};
  }

  void write_maxima_of_row(int64_t plane, int64_t y, scalar_t* out) {
    T* shared = first_.data();
    T* middle = second_.data();
    const auto [first, last] = windows_of(y, map_.pad_y, node_.height);
    std::array<Parent<T>, 2> parents;
    for (int64_t parent = first; parent <= last; ++parent) {
      const int64_t ky = y - (2 * parent - map_.pad_y), row = plane * node_.height + parent;
      parents[parent - first] = {up_.grad + row * node_.width, places_of(row),
                                 static_cast<T>(3 * ky)};
    }
    const auto sum = first == last ? sum_maxima<1, T> : sum_maxima<2, T>;
    sum(parents.data(), map_.pad_x, shared, middle, node_.width);
    scale_pairs(map_.pad_x == 1 ? middle : shared, map_.pad_x == 1 ? shared : middle, up_.factor,
                out, map_.width);
  }

  void write_maxima_of_pixels(int64_t plane, int64_t y, scalar_t* out) {
    const auto [top, bottom] = windows_of(y, map_.pad_y, node_.height);
    for (int64_t x = 0; x < map_.width; ++x, out += node_.pixel) {
      const auto [left, right] = windows_of(x, map_.pad_x, node_.width);
      std::array<Parent<T>, 4> parents;
      size_t count = 0;
      for (int64_t parent = top; parent <= bottom; ++parent) {
        const int64_t ky = y - (2 * parent - map_.pad_y), row = plane * node_.height + parent;
        // From right to left, as columns of a window are added.
        for (int64_t column = right; column >= left; --column) {
          const int64_t kx = x - (2 * column - map_.pad_x), at = column * node_.pixel;
          parents[count++] = {up_.grad + row * node_.row() + at, places_of(row) + at,
                              static_cast<T>(3 * ky + kx)};
        }
      }
      const auto write = count == 1   ? scale_maxima<1, T, scalar_t>
                         : count == 2 ? scale_maxima<2, T, scalar_t>
                                      : scale_maxima<4, T, scalar_t>;
      write(parents.data(), up_.factor, out, node_.pixel);
    }
  }

  // Those of a row of windows, which the next row of the map may look up, too.
  const T* places_of(int64_t row) {
    PlacesOfRow& result = places_[row % 2];
    if (result.row != row) {
      result.row = row;
      convert(up_.places + row * node_.row(), result.places.data() + 1, node_.row());
    }
    return result.places.data() + 1;
  }

  struct PlacesOfRow {
    int64_t row = -1;
    std::vector<T> places;  // between two that are none
  };

  const Upstream<T>& up_;
  const FusionNode& node_;
  const FusionMap& map_;
  scalar_t* out_;
  std::vector<T> first_, second_;
  std::array<PlacesOfRow, 2> places_;
};

template <typename scalar_t, typename T = compute_t<scalar_t>>
void write_gradient(const Upstream<T>& up, const FusionMap& map, scalar_t* out) {
  const int64_t length = map.width * up.node.pixel;
  const int64_t rows = length == 0 ? 0 : up.node.planes * map.height;
  in_parallel(rows, length, [&](int64_t row, int64_t end) {
    GradientWriter<scalar_t> writer(up, map, out);
    for (; row < end; ++row) {
      writer.write(row);
    }
  });
}

std::tuple<std::vector<Tensor>, Tensor> fuse_features_backward_cpu(
    const Tensor& grad_output_, const std::vector<Tensor>& features,
    const std::optional<Tensor>& weights_, int64_t mode, double eps, int64_t activation,
    bool symmetric) {
  check_fuse_features_backward(grad_output_, features, weights_, mode, activation);
  const auto weights = contiguous(weights_);
  const FusionNode node = fusion_node(features, symmetric);
  const Tensor grad_output = laid_out(grad_output_, node.channels_last);
  const size_t count = features.size();
  std::vector<Tensor> grads;
  for (const FusionMap& map : node.maps) {
    Tensor grad = torch::stable::empty_like(map.tensor);
    grads.push_back(on_huge_pages(grad, grad.element_size()));
  }
  const Tensor& first = features[0];
  const ScalarType computed = compute_dtype(node.dtype);
  Tensor grad_weights = torch::stable::new_empty(
      first, {weights.has_value() ? static_cast<int64_t>(count) : 0}, computed);
  const int64_t numel = node.rows() * node.row();
  // With a number before and one after, for reading beside a row.
  Tensor grad_term = torch::stable::new_empty(first, {numel + 2}, computed);
  grad_term = on_huge_pages(grad_term, grad_term.element_size());
  std::vector<Tensor> places;
  for (const FusionMap& map : node.maps) {
    const bool is_pooled = map.resampling == Resampling::kPool;
    places.push_back(torch::stable::new_empty(first, {is_pooled ? numel : 0}, ScalarType::Byte));
  }
  const Tiles tiles(node);
  std::vector<double> sums(tiles.count() * count);  // a tile's, by each factor
  dispatch_floating(node.dtype, [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto fusion = weights_of<T>(weights, mode, count, eps);
    const auto* upstream = static_cast<const scalar_t*>(grad_output.const_data_ptr());
    auto* grad = static_cast<T*>(grad_term.mutable_data_ptr()) + 1;
    std::vector<uint8_t*> place_data;
    std::vector<scalar_t*> grad_data;
    for (size_t i = 0; i < count; ++i) {
      place_data.push_back(node.maps[i].resampling == Resampling::kPool
                               ? static_cast<uint8_t*>(places[i].mutable_data_ptr())
                               : nullptr);
      grad_data.push_back(static_cast<scalar_t*>(grads[i].mutable_data_ptr()));
    }
    dispatch_activation(activation, [&](auto activation_tag) {
      in_parallel(tiles.count(), tiles.numbers(), [&](int64_t first_tile, int64_t last_tile) {
        auto maps = resamplers<scalar_t>(node);
        std::vector<const T*> terms(count);
        std::vector<T> sum(tiles.numbers()), grad_sum(sum.size());
        tiles.visit(first_tile, last_tile, [&](int64_t tile, int64_t begin, int64_t end) {
          const int64_t at = begin * tiles.length, n = (end - begin) * tiles.length;
          for (size_t i = 0; i < count; ++i) {
            terms[i] =
                maps[i].units(begin, end, place_data[i] == nullptr ? nullptr : place_data[i] + at);
            add_term(terms[i], fusion.factor[i], fusion.divisor, sum.data(), n, i == 0);
          }
          gradient_of_sum<decltype(activation_tag)::value>(upstream + at, sum.data(),
                                                           grad_sum.data(), n);
          divide(grad_sum.data(), fusion.divisor, grad + at, n);
          for (size_t i = 0; i < count; ++i) {
            sums[tile * count + i] = dot(grad_sum.data(), terms[i], n);
            if (node.maps[i].resampling == Resampling::kNone) {
              scale(grad + at, fusion.factor[i], grad_data[i] + at, n);
            }
          }
        });
      });
    });
    for (size_t i = 0; i < count; ++i) {
      if (node.maps[i].resampling != Resampling::kNone) {
        write_gradient(Upstream<T>{node, grad, place_data[i], fusion.factor[i]}, node.maps[i],
                       grad_data[i]);
      }
    }
    if (weights.has_value()) {
      std::array<double, kMaxFeatures> totals{};
      for (size_t i = 0; i < sums.size(); ++i) {
        totals[i % count] += sums[i];
      }
      fusion_weights_gradient(static_cast<FusionMode>(mode), data_of<T>(weights),
                              static_cast<int>(count), static_cast<T>(eps), fusion, totals.data(),
                              static_cast<T*>(grad_weights.mutable_data_ptr()));
    }
  });
  return {grads, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("fuse_features", TORCH_BOX(&fuse_features_cpu));
  m.impl("_fuse_features_backward", TORCH_BOX(&fuse_features_backward_cpu));
}

}  // namespace focalops
