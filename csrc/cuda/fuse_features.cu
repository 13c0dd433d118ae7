// A node of a BiFPN on CUDA, where its maps lie: a launch forward; backward one for the sum, one
// for each map that was resampled and one for the weights.
//
// A unit is the 16 bytes of a row that one access moves, and a thread has one at a time:
//   along channels  channels of a pixel (channels_last). What it was made of, one pixel of a
//                   smaller map or nine of a larger one, are units too.
//   along columns   columns of a plane (contiguous): N / 2 numbers of a smaller map, 2 N + 1 of
//                   each of three rows of a larger one.
// Where units do not fit into rows, or maps are not halves and doubles of each other, a unit is one
// number. A block strides by the grid, as digits of plane, row and unit with carry, so that counts
// are of 64 bits and nothing is divided.
//
// Bytes moved forward: each map once, and the output; threads that are neighbours share windows
// in the cache. Backward: the maps and the upstream gradient once and the gradient of each map;
// where maps were resampled also the gradient by the sum and a byte for each pooled number, which
// of the nine pixels of its window was the maximum, written once and read once. A pixel's
// gradient gathers what it went to: no atomics, and two runs give the same bits.
#include "fusion.cuh"

namespace focalops {
namespace {

// ---- kernels ------------------------------------------------------------------------------------

// Blocks a multiprocessor, at least. Without the number ptxas spills for the sake of more of them,
// and the gradient by the sum needs the most.
template <typename scalar_t>
constexpr int kBlocks = std::is_same_v<scalar_t, double> ? 1 : 3;
template <typename scalar_t>
constexpr int kGradientBlocks = std::is_same_v<scalar_t, double> ? 1 : 2;

template <typename scalar_t, int N, Along A>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    fuse_features_kernel(const __grid_constant__ Node<scalar_t> node, Walk walk,
                         FastDivisor units_of_pixel, scalar_t* output) {
  using T = compute_t<scalar_t>;
  __shared__ FusionWeights<T> fusion;
  prepare<scalar_t>(node.weighting, fusion);
  for (Place place = walk.first(); walk.has(place); walk.advance(place)) {
    const Position<A, N> position(units_of_pixel, place.unit);
    const int64_t at = number_of<scalar_t, N>(node, place);
    T sum[N] = {};
#pragma unroll 1
    for (int first = 0; first < node.count; first += kTogether) {
      Vector<scalar_t, N> units[kTogether];
      load_maps<A, N, false>(node, first, place, position.x, position.channel, at, units);
      add_terms<N>(fusion, node.count, first, units, sum);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum[j] = activated(node.activation, sum[j]);
    }
    store(output + at, vector_cast<scalar_t>(sum));
  }
}

// The gradient by the sum of the terms; from it that of each map of the output's size, and a
// block's sums of its products with each map.
template <typename scalar_t, int N, Along A>
__global__ void __launch_bounds__(kThreads, kGradientBlocks<scalar_t>) fusion_gradient_kernel(
    const __grid_constant__ Node<scalar_t> node, Walk walk, FastDivisor units_of_pixel,
    const scalar_t* upstream,
    compute_t<scalar_t>* grad_sum,  // null: every map is of the output's size
    double* partials) {             // [count, blocks]; null: no weights
  using T = compute_t<scalar_t>;
  __shared__ FusionWeights<T> fusion;
  __shared__ T products_of_block[kMaxFeatures * kThreads];
  T* products = products_of_block + threadIdx.x;  // the thread's own, kThreads apart
  for (int i = 0; i < node.count; ++i) {
    products[i * kThreads] = 0;
  }
  prepare<scalar_t>(node.weighting, fusion);
  const int pieces = (node.count + kTogether - 1) / kTogether;
  for (Place place = walk.first(); walk.has(place); walk.advance(place)) {
    const Position<A, N> position(units_of_pixel, place.unit);
    const int64_t at = number_of<scalar_t, N>(node, place);
    const auto from_above = load<N>(upstream + at);
    Vector<scalar_t, N> units[kTogether];
    T values[N] = {};  // the sum, then the gradient by it
#pragma unroll 1
    for (int step = 0; step < 2 * pieces; ++step) {
      const bool is_forward = step < pieces;
      const int first = (is_forward ? step : step - pieces) * kTogether;
      if (is_forward || pieces > 1) {
        load_maps<A, N, true>(node, first, place, position.x, position.channel, at, units);
      }
      if (is_forward) {
        add_terms<N>(fusion, node.count, first, units, values);
        if (step == pieces - 1) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            values[j] = static_cast<T>(from_above.data[j]) * derivative(node.activation, values[j]);
          }
          if (grad_sum != nullptr) {
            store(grad_sum + at, vector_cast<T>(values));
          }
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i < node.count) {
          T product = 0, grads[N];
#pragma unroll
          for (int j = 0; j < N; ++j) {
            product += values[j] * static_cast<T>(units[i].data[j]);
            grads[j] =
                weighted_gradient<scalar_t>(values[j], fusion.factor[first + i], fusion.divisor);
          }
          products[(first + i) * kThreads] += product;
          if (node.maps[first + i].resampling == Resampling::kNone) {
            store(node.maps[first + i].grad + at, vector_cast<scalar_t>(grads));
          }
        }
      }
    }
  }
  for (int i = 0; i < node.count && partials != nullptr; ++i) {
    const double sum = block_sum<kThreads>(static_cast<double>(products[i * kThreads]));
    if (threadIdx.x == 0) {
      partials[int64_t{i} * gridDim.x + blockIdx.x] = sum;
    }
  }
}

// What a unit of a smaller map went to: the sum over its children.
template <Along A, int N, typename scalar_t, typename T>
__device__ __forceinline__ void gather_children(const Node<scalar_t>& node,
                                                const Map<scalar_t>& map, const Place& place, int x,
                                                int channel, const T* grad_sum, T (&sum)[N]) {
  const int last_y = first_child(place.y + 1, map.height, node.height);
  for (int y = first_child(place.y, map.height, node.height); y < last_y; ++y) {
    const T* row = grad_sum + (place.plane * node.height + y) * node.width * node.pixel;
    if constexpr (A == Along::kColumns) {
      const auto values = load<2 * N>(row + 2 * x);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum[j] += values.data[2 * j] + values.data[2 * j + 1];
      }
    } else {
      const int last_x = first_child(x + 1, map.width, node.width);
      for (int child = first_child(x, map.width, node.width); child < last_x; ++child) {
        const auto values = load<N>(row + int64_t{child} * node.pixel + channel);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          sum[j] += values.data[j];
        }
      }
    }
  }
}

// What a unit of a larger map went to: the windows, one or two each way, of which it is the
// maximum.
template <Along A, int N, typename scalar_t, typename T>
__device__ __forceinline__ void gather_maxima(const Node<scalar_t>& node, const Map<scalar_t>& map,
                                              const Place& place, int x, int channel,
                                              const T* grad_sum, T (&sum)[N]) {
#pragma unroll
  for (int before_y = 1; before_y >= 0; --before_y) {
    const int y = (place.y + map.pad_y) / 2 - before_y, ky = place.y + map.pad_y - 2 * y;
    if (y < 0 || y >= node.height || ky > 2) {
      continue;
    }
    const int64_t row = (place.plane * node.height + y) * node.width * node.pixel;
    if constexpr (A == Along::kChannels) {
#pragma unroll
      for (int before_x = 1; before_x >= 0; --before_x) {
        const int window = (x + map.pad_x) / 2 - before_x, kx = x + map.pad_x - 2 * window;
        if (window < 0 || window >= node.width || kx > 2) {
          continue;
        }
        const int64_t at = row + int64_t{window} * node.pixel + channel;
        const auto values = load<N>(grad_sum + at);
        const auto places = load<N>(map.places + at);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          sum[j] += places.data[j] == 3 * ky + kx ? values.data[j] : T(0);
        }
      }
    } else {
      // Columns 2 j and 2 j + 1 are window j's in any case, and one of them also its neighbour's.
      constexpr int kHalf = N / 2;
      const int window = x / 2;
      const auto values = load<kHalf>(grad_sum + row + window);
      const auto places = load<kHalf>(map.places + row + window);
      const bool begins_before = map.pad_x != 0;
      const int other = begins_before ? window + kHalf : window - 1;
      const bool has_other = other >= 0 && other < node.width;
      const T beside = has_other ? grad_sum[row + other] : T(0);
      const int place_beside = has_other ? map.places[row + other] : 9;
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        const T own = values.data[j];
        const int at = places.data[j] - 3 * ky;
        if (begins_before) {
          const bool is_last = j == kHalf - 1;
          const int next = (is_last ? place_beside : places.data[is_last ? 0 : j + 1]) - 3 * ky;
          sum[2 * j] += at == 1 ? own : T(0);
          sum[2 * j + 1] += at == 2 ? own : T(0);
          sum[2 * j + 1] +=
              next == 0 ? (is_last ? beside : values.data[is_last ? 0 : j + 1]) : T(0);
        } else {
          const bool is_first = j == 0;
          const int previous =
              (is_first ? place_beside : places.data[is_first ? 0 : j - 1]) - 3 * ky;
          sum[2 * j] +=
              previous == 2 ? (is_first ? beside : values.data[is_first ? 0 : j - 1]) : T(0);
          sum[2 * j] += at == 0 ? own : T(0);
          sum[2 * j + 1] += at == 1 ? own : T(0);
        }
      }
    }
  }
}

// The gradient of map i, which was resampled.
template <typename scalar_t, int N, Along A>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    resampled_gradient_kernel(const __grid_constant__ Node<scalar_t> node, int i, Walk walk,
                              FastDivisor units_of_pixel, const compute_t<scalar_t>* grad_sum) {
  using T = compute_t<scalar_t>;
  __shared__ FusionWeights<T> fusion;
  prepare<scalar_t>(node.weighting, fusion);
  const Map<scalar_t>& map = node.maps[i];
  const T factor = fusion.factor[i], divisor = fusion.divisor;
  for (Place place = walk.first(); walk.has(place); walk.advance(place)) {
    const Position<A, N> position(units_of_pixel, place.unit);
    T sum[N] = {};
    if (map.resampling == Resampling::kUp) {
      gather_children<A>(node, map, place, position.x, position.channel, grad_sum, sum);
    } else {
      gather_maxima<A>(node, map, place, position.x, position.channel, grad_sum, sum);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum[j] = weighted_gradient<scalar_t>(sum[j], factor, divisor);
    }
    const int64_t row = (place.plane * map.height + place.y) * map.width * node.pixel;
    store(map.grad + row + int64_t{place.unit} * N, vector_cast<scalar_t>(sum));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    weights_gradient_kernel(Weighting<T> weighting, const double* partials, int64_t blocks,
                            T* grad) {
  __shared__ FusionWeights<T> fusion;
  __shared__ double totals[kMaxFeatures];
  for (int i = 0; i < weighting.count; ++i) {
    double sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
      sum += partials[i * blocks + block];
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) {
      totals[i] = sum;
    }
  }
  if (threadIdx.x == 0) {
    fusion_weights(weighting.mode, weighting.weights, weighting.count, weighting.eps, fusion);
    fusion_weights_gradient(weighting.mode, weighting.weights, weighting.count, weighting.eps,
                            fusion, totals, grad);
  }
}

// ---- host ---------------------------------------------------------------------------------------

void check_fits(const FusionNode& node) {
  for (const FusionMap& map : node.maps) {
    const int64_t limit = int64_t{1} << 30;
    if (map.height >= limit || map.width * node.pixel >= limit) {
      fail("fuse_features: features must have fewer than 2^30 rows, and numbers of a row, got ",
           shape_of(map.tensor));
    }
  }
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
Node<scalar_t> device_node(const FusionNode& from, const std::optional<Tensor>& weights,
                           int64_t mode, double eps, int64_t activation) {
  const int count = static_cast<int>(from.maps.size());
  Node<scalar_t> node{
      {},
      {data_of<T>(weights), static_cast<FusionMode>(mode), count, static_cast<T>(eps)},
      count,
      static_cast<int>(from.height),
      static_cast<int>(from.width),
      static_cast<int>(from.pixel),
      static_cast<FusionActivation>(activation)};
  for (int i = 0; i < count; ++i) {
    const FusionMap& map = from.maps[i];
    node.maps[i] = {static_cast<const scalar_t*>(map.tensor.const_data_ptr()),
                    nullptr,
                    nullptr,
                    static_cast<int>(map.height),
                    static_cast<int>(map.width),
                    map.resampling,
                    static_cast<int>(map.pad_y),
                    static_cast<int>(map.pad_x)};
  }
  return node;
}

// How long units are, and which way they go.
enum class Units { kNumbers, kChannels, kColumns };

// Of a map, where it is made of maps of those widths, or they of it.
template <typename scalar_t>
Units units_of(int pixel, int width, bool are_halves_and_doubles) {
  constexpr int N = kVectorSize<scalar_t>;
  return pixel % N == 0                                           ? Units::kChannels
         : pixel == 1 && width % N == 0 && are_halves_and_doubles ? Units::kColumns
                                                                  : Units::kNumbers;
}

template <typename scalar_t>
Units units_of_output(const Node<scalar_t>& node, const void* output) {
  bool are_aligned = is_aligned(output), are_halves_and_doubles = true;
  for (int i = 0; i < node.count; ++i) {
    const Map<scalar_t>& map = node.maps[i];
    are_aligned = are_aligned && is_aligned(map.data);
    are_halves_and_doubles = are_halves_and_doubles &&
                             (map.resampling == Resampling::kNone ||
                              (map.resampling == Resampling::kUp ? 2 * map.width == node.width
                                                                 : map.width == 2 * node.width));
  }
  return are_aligned ? units_of<scalar_t>(node.pixel, node.width, are_halves_and_doubles)
                     : Units::kNumbers;
}

template <typename scalar_t>
Units units_of_map(const Node<scalar_t>& node, const Map<scalar_t>& map) {
  const bool is_half_or_double =
      map.resampling == Resampling::kUp ? 2 * map.width == node.width : map.width == 2 * node.width;
  return units_of<scalar_t>(node.pixel, map.width, is_half_or_double);
}

// Calls f with the length of a unit and its way, as types.
template <typename scalar_t, typename F>
void dispatch_units(Units units, const F& f) {
  constexpr int N = kVectorSize<scalar_t>;
  using Channels = std::integral_constant<Along, Along::kChannels>;
  using Columns = std::integral_constant<Along, Along::kColumns>;
  switch (units) {
    case Units::kChannels:
      return f(std::integral_constant<int, N>{}, Channels{});
    case Units::kColumns:
      return f(std::integral_constant<int, N>{}, Columns{});
    default:
      return f(std::integral_constant<int, 1>{}, Channels{});
  }
}

// The grid of a kernel over a map, whose units are N numbers long.
struct Schedule {
  Walk walk;
  FastDivisor units_of_pixel;
  int64_t grid;

  template <typename Kernel>
  Schedule(Kernel* kernel, int64_t planes, int64_t height, int64_t width, int64_t pixel, int n,
           const LaunchScope& scope)
      : walk(planes, height, width * pixel / n),
        units_of_pixel(pixel >= n ? pixel / n : 1),
        grid(resident_grid(kernel, kThreads, 0, ceil_div(walk.size(), kThreads), scope)) {
    walk.stride_by(grid * kThreads);
  }
};

Tensor fuse_features_cuda(const std::vector<Tensor>& features,
                          const std::optional<Tensor>& weights_, int64_t mode, double eps,
                          int64_t activation, bool symmetric) {
  check_fuse_features(features, weights_, mode, activation);
  const LaunchScope scope(features[0]);
  const auto weights = contiguous(weights_);
  const FusionNode maps = fusion_node(features, symmetric);
  check_fits(maps);
  Tensor output = torch::stable::empty_like(maps.maps[0].tensor);
  if (maps.rows() == 0) {
    return output;
  }
  dispatch_floating(maps.dtype, [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    const auto node = device_node<scalar_t>(maps, weights, mode, eps, activation);
    auto* out = static_cast<scalar_t*>(output.mutable_data_ptr());
    dispatch_units<scalar_t>(units_of_output(node, out), [&](auto size, auto along) {
      constexpr int N = decltype(size)::value;
      auto* kernel = &fuse_features_kernel<scalar_t, N, decltype(along)::value>;
      const Schedule schedule(kernel, maps.planes, maps.height, maps.width, maps.pixel, N, scope);
      launch(kernel, schedule.grid, kThreads, 0, scope.stream(), node, schedule.walk,
             schedule.units_of_pixel, out);
    });
  });
  return output;
}

// What the backward writes for itself.
struct Scratch {
  std::optional<Tensor> grad_sum, partials;
  std::vector<Tensor> places;
};

template <typename scalar_t, typename T = compute_t<scalar_t>>
void launch_gradients(const FusionNode& maps, Node<scalar_t>& node, const Tensor& grad_output,
                      const Tensor& like, const LaunchScope& scope, Tensor& grad_weights) {
  Scratch scratch;
  const int64_t numel = maps.rows() * maps.row();
  T* grad_sum = nullptr;
  for (int i = 0; i < node.count; ++i) {
    if (node.maps[i].resampling == Resampling::kPool) {
      scratch.places.push_back(torch::stable::new_empty(like, {numel}, ScalarType::Byte));
      node.maps[i].places = data_of<uint8_t>(scratch.places.back());
    }
    if (node.maps[i].resampling != Resampling::kNone && grad_sum == nullptr) {
      scratch.grad_sum = torch::stable::new_empty(like, {numel}, grad_weights.scalar_type());
      grad_sum = data_of<T>(*scratch.grad_sum);
    }
  }
  const auto* upstream = static_cast<const scalar_t*>(grad_output.const_data_ptr());
  int64_t blocks = 0;
  double* partials = nullptr;
  if (numel > 0) {
    dispatch_units<scalar_t>(units_of_output(node, upstream), [&](auto size, auto along) {
      constexpr int N = decltype(size)::value;
      auto* kernel = &fusion_gradient_kernel<scalar_t, N, decltype(along)::value>;
      const Schedule schedule(kernel, maps.planes, maps.height, maps.width, maps.pixel, N, scope);
      blocks = schedule.grid;
      if (node.weighting.weights != nullptr) {
        scratch.partials =
            torch::stable::new_empty(like, {node.count * blocks}, ScalarType::Double);
        partials = data_of<double>(*scratch.partials);
      }
      launch(kernel, schedule.grid, kThreads, 0, scope.stream(), node, schedule.walk,
             schedule.units_of_pixel, upstream, grad_sum, partials);
    });
  }
  for (int i = 0; i < node.count && numel > 0; ++i) {
    const Map<scalar_t>& map = node.maps[i];
    if (map.resampling == Resampling::kNone) {
      continue;
    }
    dispatch_units<scalar_t>(units_of_map(node, map), [&](auto size, auto along) {
      constexpr int N = decltype(size)::value;
      auto* kernel = &resampled_gradient_kernel<scalar_t, N, decltype(along)::value>;
      const Schedule schedule(kernel, maps.planes, map.height, map.width, maps.pixel, N, scope);
      launch(kernel, schedule.grid, kThreads, 0, scope.stream(), node, i, schedule.walk,
             schedule.units_of_pixel, grad_sum);
    });
  }
  if (node.weighting.weights != nullptr) {
    launch(&weights_gradient_kernel<T>, 1, kThreads, 0, scope.stream(), node.weighting, partials,
           blocks, data_of<T>(grad_weights));
  }
}

std::tuple<std::vector<Tensor>, Tensor> fuse_features_backward_cuda(
    const Tensor& grad_output_, const std::vector<Tensor>& features,
    const std::optional<Tensor>& weights_, int64_t mode, double eps, int64_t activation,
    bool symmetric) {
  check_fuse_features_backward(grad_output_, features, weights_, mode, activation);
  const Tensor& first = features[0];
  const LaunchScope scope(first);
  const auto weights = contiguous(weights_);
  const FusionNode maps = fusion_node(features, symmetric);
  check_fits(maps);
  const Tensor grad_output = laid_out(grad_output_, maps.channels_last);
  std::vector<Tensor> grads;
  for (const FusionMap& map : maps.maps) {
    grads.push_back(torch::stable::empty_like(map.tensor));
  }
  const int64_t count = weights.has_value() ? static_cast<int64_t>(features.size()) : 0;
  Tensor grad_weights = torch::stable::new_empty(first, {count}, compute_dtype(maps.dtype));
  dispatch_floating(maps.dtype, [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    auto node = device_node<scalar_t>(maps, weights, mode, eps, activation);
    for (int i = 0; i < node.count; ++i) {
      node.maps[i].grad = data_of<scalar_t>(grads[i]);
    }
    launch_gradients(maps, node, grad_output, first, scope, grad_weights);
  });
  return {grads, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("fuse_features", TORCH_BOX(&fuse_features_cuda));
  m.impl("_fuse_features_backward", TORCH_BOX(&fuse_features_backward_cuda));
}

}  // namespace focalops
