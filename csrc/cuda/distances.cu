// Boxes from the distances, or the distributions of distances, of a head's levels on CUDA, where
// the head left them; and the distribution focal loss.
//
// decode_distances: one launch. The levels travel by value in a kernel parameter; work is cut into
// items of one image of one level each, strided by the grid. A thread has one side:
//   rows (channels_last)  of a position; its bins are neighbours, and neighbouring threads have
//                         neighbouring rows of bins and neighbouring coordinates.
//   planes (contiguous)   of a 16-byte vector of positions, and walks from plane to plane; 8
//                         threads have a cache line of a plane, the four sides are of one warp.
// Logits are added up as they come, so that each is read once whatever the number of bins. Bytes
// moved, s = size of the logits: s, and 16 a position and image for the boxes (32 in float64).
//
// Its gradient does the same, then reads the logits once more, which as a rule are in a cache
// still, and writes the gradient: 3 s, 2 s of it memory.
//
// distribution_focal_loss: up to a warp a row, as many lanes as it has vectors; for the gradient
// the row is found in the L1 cache. Bytes moved: loss s, with gradient 2 s; and a target and a loss
// a row.
#include <cfloat>

#include "../checks/distances.h"
#include "../math/distances.h"
#include "head_items.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;

// ---- decode_distances ---------------------------------------------------------------------------

constexpr int kVectorsOfWarp = kWarpSize / 4;  // of each side
constexpr int kVectorsOfBlock = kThreads / 4;
constexpr int kInFlight = 4;  // vectors of a thread

template <typename scalar_t_>
struct Head {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;

  LossLevel levels[kMaxLevels];
  int num_levels;
  int64_t num_items;
  T strides[kMaxLevels];
  int bins;
  int64_t rows;          // of an image: its positions
  const T* points;       // [rows, 2]
  const T* image_sizes;  // [B, 2]; null: no clipping
};

// A side of consecutive positions of an image of a level.
template <typename T>
struct Side {
  int side;
  T stride;
  ImageBounds<T> bounds;
  const T* points;  // of the first position, on the side's axis
  int64_t first;    // of its coordinates, in the boxes of all images; the next one is 4 further

  template <typename scalar_t>
  __device__ __forceinline__ Side(const Head<scalar_t>& head, int level, int64_t image,
                                  int64_t position, int side)
      : side(side),
        stride(head.strides[level]),
        bounds(bounds_of_side(head.image_sizes, image, side)) {
    const int64_t row = head.levels[level].first_row + position;
    points = head.points + 2 * row + side % 2;
    first = 4 * (image * head.rows + row) + side;
  }

  __device__ __forceinline__ void store(int j, T distance, T* boxes) const {
    boxes[first + 4 * j] = bounds.clip(coordinate_of_side(side, points[2 * j], stride, distance));
  }

  __device__ __forceinline__ T gradient(int j, T distance, const T* upstream) const {
    const T coordinate = coordinate_of_side(side, points[2 * j], stride, distance);
    return bounds.passes_gradient(coordinate)
               ? gradient_of_distance(side, stride, upstream[first + 4 * j])
               : T(0);
  }
};

// The row of bins of one thread: f(bin, vector) gets it by vectors.
template <typename scalar_t, typename F>
__device__ __forceinline__ void for_each_vector(const scalar_t* row, int bins, bool aligned,
                                                const F& f) {
  constexpr int N = kVectorSize<scalar_t>;
  for (int bin = 0; bin < bins; bin += N) {
    f(bin, load_vector<N>(row, bin, bins, aligned));
  }
}

// The planes of bins of one thread: f(bin, vector) gets a vector of positions.
template <typename scalar_t, typename F>
__device__ __forceinline__ void for_each_plane(const scalar_t* planes, int64_t size, int64_t i,
                                               int bins, const F& f) {
  constexpr int N = kVectorSize<scalar_t>;
  for (int first = 0; first < bins; first += kInFlight) {
    Vector<scalar_t, N> vectors[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u < bins) {
        const scalar_t* plane = planes + (first + u) * size;
        vectors[u] = load_vector<N>(plane, i, size, is_aligned(plane));
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u < bins) {
        f(first + u, vectors[u]);
      }
    }
  }
}

// Writes boxes, [B, rows, 4]; or of their gradient, upstream, that of the levels.
template <bool IsGradient, typename scalar_t, typename T = compute_t<scalar_t>>
__device__ __forceinline__ void evaluate_row(const Head<scalar_t>& head, int l, int64_t image,
                                             int64_t part, const T* upstream, T* boxes) {
  constexpr int N = kVectorSize<scalar_t>;
  const LossLevel& level = head.levels[l];
  const int64_t unit = part * kThreads + threadIdx.x;
  if (unit >= 4 * level.positions) {
    return;
  }
  const Side<T> side(head, l, image, unit / 4, static_cast<int>(unit % 4));
  const int64_t at = (image * 4 * level.positions + unit) * head.bins;
  const scalar_t* row = static_cast<const scalar_t*>(level.data) + at;
  const bool aligned = head.bins % N == 0 && is_aligned(level.data);
  Expectation<T> expectation;
  T distance;
  if (head.bins == 1) {
    distance = static_cast<T>(row[0]);
  } else {
    for_each_vector(row, head.bins, aligned, [&](int bin, const Vector<scalar_t, N>& logits) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (bin + j < head.bins) {
          expectation.add(static_cast<T>(logits.data[j]), static_cast<T>(bin + j));
        }
      }
    });
    distance = expectation.value();
  }
  if constexpr (!IsGradient) {
    side.store(0, distance, boxes);
  } else {
    scalar_t* grad = static_cast<scalar_t*>(level.grad) + at;
    const T of_distance = side.gradient(0, distance, upstream);
    if (head.bins == 1) {
      grad[0] = static_cast<scalar_t>(of_distance);
      return;
    }
    const T factor = of_distance / expectation.sum;
    for_each_vector(row, head.bins, aligned, [&](int bin, Vector<scalar_t, N> vector) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T e = detail::exp_nonpositive(static_cast<T>(vector.data[j]) - expectation.largest);
        vector.data[j] = static_cast<scalar_t>(factor * e * (static_cast<T>(bin + j) - distance));
      }
      store_vector(grad, bin, head.bins, aligned, vector);
    });
  }
}

template <bool IsGradient, typename scalar_t, typename T = compute_t<scalar_t>>
__device__ __forceinline__ void evaluate_planes(const Head<scalar_t>& head, int l, int64_t image,
                                                int64_t part, const T* upstream, T* boxes) {
  constexpr int N = kVectorSize<scalar_t>;
  const LossLevel& level = head.levels[l];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t i = (part * kVectorsOfBlock + warp * kVectorsOfWarp + lane % kVectorsOfWarp) * N;
  const int64_t size = level.positions;
  if (i >= size) {
    return;
  }
  const Side<T> side(head, l, image, i, lane / kVectorsOfWarp);
  const int64_t at = (image * 4 + side.side) * head.bins * size;
  const scalar_t* planes = static_cast<const scalar_t*>(level.data) + at;
  Expectation<T> expectations[N];
  T distances[N];
  for_each_plane(planes, size, i, head.bins, [&](int bin, const Vector<scalar_t, N>& logits) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      distances[j] = static_cast<T>(logits.data[j]);
      expectations[j].add(distances[j], static_cast<T>(bin));
    }
  });
  if (head.bins > 1) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      distances[j] = expectations[j].value();
    }
  }
  if constexpr (!IsGradient) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (i + j < size) {
        side.store(j, distances[j], boxes);
      }
    }
  } else {
    T factors[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factors[j] = i + j < size ? side.gradient(j, distances[j], upstream) : T(0);
      factors[j] /= head.bins > 1 ? expectations[j].sum : T(1);
    }
    scalar_t* grad = static_cast<scalar_t*>(level.grad) + at;
    for_each_plane(planes, size, i, head.bins, [&](int bin, Vector<scalar_t, N> vector) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T x = static_cast<T>(vector.data[j]);
        const T by_x = detail::exp_nonpositive(x - expectations[j].largest) *
                       (static_cast<T>(bin) - distances[j]);
        vector.data[j] = static_cast<scalar_t>(head.bins > 1 ? factors[j] * by_x : factors[j]);
      }
      scalar_t* plane = grad + bin * size;
      store_vector(plane, i, size, is_aligned(plane), vector);
    });
  }
}

// Of the gradient as many blocks as every architecture has without spills.
template <bool IsGradient, typename scalar_t, typename T = compute_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, IsGradient ? 2 : kMinBlocks<T>)
    decode_distances_kernel(const __grid_constant__ Head<scalar_t> head, const T* upstream,
                            T* boxes) {
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    const auto [l, image, part] = place_of_item(head, item);
    if (head.levels[l].has_rows) {
      evaluate_row<IsGradient>(head, l, image, part, upstream, boxes);
    } else {
      evaluate_planes<IsGradient>(head, l, image, part, upstream, boxes);
    }
  }
}

// What the ops are given, in the form that the kernel reads.
struct Inputs {
  HeadShape shape;
  std::vector<HeadLevel> levels;
  Tensor points;  // contiguous, as the sizes
  std::vector<double> strides;
  int64_t bins;
  std::optional<Tensor> image_sizes;

  Inputs(const HeadShape& shape, const std::vector<Tensor>& levels, const Tensor& points,
         const std::vector<double>& strides, int64_t bins, const std::optional<Tensor>& image_sizes)
      : shape(shape),
        levels(head_levels(levels, shape)),
        points(torch::stable::contiguous(points)),
        strides(strides),
        bins(bins),
        image_sizes(contiguous(image_sizes)) {}
};

// Without gradients `grads` is empty.
template <bool IsGradient, typename scalar_t, typename T>
void launch_decode(const Inputs& inputs, const std::vector<Tensor>& grads, const T* upstream,
                   T* boxes, const LaunchScope& scope) {
  Head<scalar_t> head{{},
                      0,
                      0,
                      {},
                      static_cast<int>(inputs.bins),
                      inputs.shape.rows,
                      static_cast<const T*>(inputs.points.const_data_ptr()),
                      data_of<T>(inputs.image_sizes)};
  const auto items_of_image = [](const HeadLevel& level, int64_t vectors) {
    return level.has_rows ? ceil_div(4 * level.positions, kThreads)
                          : ceil_div(vectors, kVectorsOfBlock);
  };
  for (size_t l = 0; l < inputs.levels.size(); ++l) {
    head.strides[l] = static_cast<T>(inputs.strides[l]);
    append_level<scalar_t>(head, inputs.levels[l],
                           IsGradient ? grads[l].mutable_data_ptr() : nullptr, inputs.shape.images,
                           items_of_image);
  }
  auto* kernel = &decode_distances_kernel<IsGradient, scalar_t>;
  const int64_t grid = resident_grid(kernel, kThreads, 0, head.num_items, scope);
  launch(kernel, grid, kThreads, 0, scope.stream(), head, upstream, boxes);
}

Tensor decode_distances_cuda(const std::vector<Tensor>& levels, const Tensor& points,
                             const std::vector<double>& strides, int64_t bins,
                             const std::optional<Tensor>& image_sizes) {
  const HeadShape shape = check_decode_distances(levels, points, strides, bins, image_sizes);
  const LaunchScope scope(points);
  const Inputs inputs(shape, levels, points, strides, bins, image_sizes);
  Tensor boxes = torch::stable::new_empty(points, {shape.images, shape.rows, 4});
  if (boxes.numel() == 0) {
    return boxes;
  }
  dispatch_floating(levels[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    launch_decode<false, scalar_t, T>(inputs, {}, nullptr, data_of<T>(boxes), scope);
  });
  return boxes;
}

std::vector<Tensor> decode_distances_backward_cuda(const Tensor& grad_output_,
                                                   const std::vector<Tensor>& levels,
                                                   const Tensor& points,
                                                   const std::vector<double>& strides, int64_t bins,
                                                   const std::optional<Tensor>& image_sizes) {
  const HeadShape shape =
      check_decode_distances_backward(grad_output_, levels, points, strides, bins, image_sizes);
  const LaunchScope scope(points);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  const Inputs inputs(shape, levels, points, strides, bins, image_sizes);
  std::vector<Tensor> grads;
  for (const HeadLevel& level : inputs.levels) {
    grads.push_back(torch::stable::empty_like(level.tensor));
  }
  if (grad_output.numel() == 0) {
    return grads;
  }
  dispatch_floating(levels[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    launch_decode<true, scalar_t, T>(
        inputs, grads, static_cast<const T*>(grad_output.const_data_ptr()), nullptr, scope);
  });
  return grads;
}

// ---- distribution_focal_loss --------------------------------------------------------------------

// Blocks a multiprocessor: as many as every architecture has without spills.
template <typename T>
constexpr int kLossBlocks = std::is_same_v<T, double> ? 2 : 4;

// Where Vectorised, every row begins and ends at a multiple of 16 bytes. lanes: of a row, a power
// of two. grad: null where it is not wanted.
template <typename scalar_t, bool Vectorised, typename T = compute_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, kLossBlocks<T>)
    distribution_focal_loss_kernel(const scalar_t* inputs,  // [num_rows, bins]
                                   const T* targets, int64_t num_rows, int bins, int lanes,
                                   T* losses, scalar_t* grad) {
  constexpr int N = Vectorised ? kVectorSize<scalar_t> : 1;
  const int rows_of_block = kThreads / lanes;
  const int lane = threadIdx.x % lanes, stride = lanes * N;
  for (int64_t first = int64_t{blockIdx.x} * rows_of_block; first < num_rows;
       first += int64_t{gridDim.x} * rows_of_block) {
    const int64_t row = first + threadIdx.x / lanes;
    const bool exists = row < num_rows;
    const scalar_t* logits = inputs + row * bins;

    T largest = -detail::largest(T()), sum = 0;
    for (int bin = lane * N; exists && bin < bins; bin += stride) {
      const auto vector = *reinterpret_cast<const Vector<scalar_t, N>*>(logits + bin);
      const T before = largest;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T x = static_cast<T>(vector.data[j]);
        largest = x > largest ? x : largest;
      }
      sum *= detail::exp_nonpositive(before - largest);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum += detail::exp_nonpositive(static_cast<T>(vector.data[j]) - largest);
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const T before = largest, of_other = __shfl_xor_sync(kFullWarp, largest, offset);
      largest = of_other > largest ? of_other : largest;
      sum *= detail::exp_nonpositive(before - largest);
      sum += __shfl_xor_sync(kFullWarp, sum, offset);
    }
    if (!exists) {
      continue;
    }
    const auto between = between_bins(targets[row], bins);
    if (lane == 0) {
      const T log_sum = logarithm(sum);
      losses[row] = between.loss(log_sum + (largest - static_cast<T>(logits[between.left])),
                                 log_sum + (largest - static_cast<T>(logits[between.left + 1])));
    }
    if (grad == nullptr) {
      continue;
    }
    const T per_sum = 1 / sum;
    for (int bin = lane * N; bin < bins; bin += stride) {
      auto vector = *reinterpret_cast<const Vector<scalar_t, N>*>(logits + bin);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T e = detail::exp_nonpositive(static_cast<T>(vector.data[j]) - largest);
        vector.data[j] = static_cast<scalar_t>(between.gradient(bin + j, per_sum * e));
      }
      if constexpr (Vectorised) {
        // An ordinary store here is split into scalar ones by nvcc 13 for sm_80 and sm_90.
        __stwb(reinterpret_cast<uint4*>(grad + row * bins + bin),
               reinterpret_cast<const uint4&>(vector));
      } else {
        grad[row * bins + bin] = vector.data[0];
      }
    }
  }
}

std::tuple<Tensor, Tensor> distribution_focal_loss_cuda(const Tensor& inputs_,
                                                        const Tensor& targets_, bool compute_grad) {
  const int64_t bins = check_distribution_focal_loss(inputs_, targets_);
  const LaunchScope scope(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  const Tensor targets = torch::stable::contiguous(targets_);
  Tensor losses = torch::stable::empty_like(targets);
  Tensor grad =
      compute_grad ? torch::stable::empty_like(inputs) : torch::stable::new_empty(inputs, {0});
  const int64_t num_rows = targets.numel();
  if (num_rows == 0) {
    return {losses, grad};
  }
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* logits = static_cast<const scalar_t*>(inputs.const_data_ptr());
    scalar_t* out = compute_grad ? data_of<scalar_t>(grad) : nullptr;
    const bool vectorised =
        bins % kVectorSize<scalar_t> == 0 && is_aligned(logits) && is_aligned(out);
    const int vector_size = vectorised ? kVectorSize<scalar_t> : 1;
    int lanes = 1;
    while (lanes < kWarpSize && lanes * vector_size < bins) {
      lanes *= 2;
    }
    auto* kernel = vectorised ? &distribution_focal_loss_kernel<scalar_t, true>
                              : &distribution_focal_loss_kernel<scalar_t, false>;
    const int64_t work = ceil_div(num_rows, kThreads / lanes);
    const int64_t grid = resident_grid(kernel, kThreads, 0, work, scope);
    launch(kernel, grid, kThreads, 0, scope.stream(), logits,
           static_cast<const T*>(targets.const_data_ptr()), num_rows, static_cast<int>(bins), lanes,
           data_of<T>(losses), out);
  });
  return {losses, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("decode_distances", TORCH_BOX(&decode_distances_cuda));
  m.impl("_decode_distances_backward", TORCH_BOX(&decode_distances_backward_cuda));
  m.impl("distribution_focal_loss", TORCH_BOX(&distribution_focal_loss_cuda));
}

}  // namespace focalops
