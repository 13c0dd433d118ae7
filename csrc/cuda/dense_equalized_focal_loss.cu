// The focal loss of a head's levels with a gamma of each class, and the sums of the gradients of
// each class, on CUDA: one launch, and two that add up the blocks (dense_head.cuh has what an item
// is).
//
// The gradients of a class are the work of many threads, whose sums meet in a fixed order. Each
// block has rows of sums of its own in global memory:
//   rows    an item is a chunk of whole rows in shared memory, whose columns groups of threads add
//           up, a row of sums a group. A row that is longer than a chunk is an item of its own,
//           chunk after chunk.
//   planes  a warp adds up its positions plane by plane; those that have the same slice of the
//           classes have a row of sums each. A lane keeps every 32nd class until there are 32.
//
// Bytes moved, s = size of the logits: 1s, with gradient 2s; the labels; 32 K an item.
#include "../checks/dense_equalized_focal_loss.h"
#include "dense_head.cuh"

namespace focalops {
namespace {

// A negative gradient raises its logit, a positive one lowers it. A NaN is in both sums.
template <typename T>
struct SignedSums {
  T raised = 0, lowered = 0;

  __device__ __forceinline__ void add(T grad) {
    raised += grad > 0 ? T(0) : -grad;
    lowered += grad < 0 ? T(0) : grad;
  }
};

// The sum over a warp, in all of its lanes.
template <typename T>
__device__ __forceinline__ T warp_sum_for_all(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// A block's sums: [rows, 2, K].
struct BlockSums {
  double* data;
  int rows;
  int num_classes;

  template <typename T>
  __device__ __forceinline__ void add(int row, int column, const SignedSums<T>& sums) const {
    double* at = data + int64_t{2} * row * num_classes + column;
    at[0] += sums.raised;
    at[num_classes] += sums.lowered;
  }
};

// Each of these returns the sum of the losses of what a thread evaluates.
template <typename Head, typename Loss, typename Cut, typename T = typename Head::T>
__device__ __forceinline__ T add_rows(const Head& head, const Cut& division, const LossLevel& level,
                                      int64_t image, int64_t part, T scale, const Loss& formula,
                                      T* shared, const BlockSums& sums) {
  using scalar_t = typename Head::scalar_t;
  constexpr int N = kVectorSize<scalar_t>;
  constexpr auto kChunk = static_cast<int>(kLogitsPerChunk<scalar_t>);
  const int64_t first_row = part * division.rows, begin = first_row * head.classes;
  const auto num_rows =
      static_cast<int>(min(division.rows, level.positions * head.anchors - first_row));
  const int num_logits = num_rows * head.classes;
  T loss = 0;
  for (int at = 0; at < num_logits; at += kChunk) {
    const int left = min(kChunk, num_logits - at);
    evaluate_rows(head, level, image, begin + at, left, level.grad != nullptr, scale, formula,
                  [&](const auto& values, int i, int) {
                    loss += sum_losses(values, i, left);
                    Vector<T, N> out;
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                      out.data[j] = values.grad[j];
                    }
                    *reinterpret_cast<Vector<T, N>*>(shared + i) = out;
                  });
    __syncthreads();
    const int columns = min(left, head.classes);
    for (int cell = static_cast<int>(threadIdx.x); cell < columns * sums.rows; cell += kThreads) {
      const int group = cell / columns, column = cell - group * columns;
      SignedSums<T> of_group;
      for (int row = group; row < num_rows; row += sums.rows) {
        of_group.add(shared[row * columns + column]);
      }
      sums.add(group, at + column, of_group);
    }
    __syncthreads();  // what comes next writes there
  }
  return loss;
}

template <typename Head, typename Loss, typename Cut, typename T = typename Head::T>
__device__ __forceinline__ T add_planes(const Head& head, const Cut& division,
                                        const LossLevel& level, int64_t image, int64_t part,
                                        T scale, const Loss& formula, const BlockSums& sums) {
  constexpr int N = kVectorSize<typename Head::scalar_t>;
  const int vectors = division.vectors();
  const int slice = static_cast<int>(threadIdx.x) / vectors;
  const int vector = static_cast<int>(threadIdx.x) % vectors;
  const int lane = vector % kWarpSize, warp = vector / kWarpSize;
  const auto unit = static_cast<uint32_t>(part * vectors + vector);
  uint32_t anchor = level.vectors_of_plane.divide(unit);
  int64_t i = int64_t{level.vectors_of_plane.remainder(unit, anchor)} * N;
  if (anchor >= static_cast<uint32_t>(head.anchors)) {  // no positions, but the warp's sums
    anchor = 0;
    i = level.positions;
  }
  const int64_t row = image * head.rows + level.first_row + i * head.anchors + anchor;
  const int begin = slice * division.classes_of_slice;
  const int end = min(begin + division.classes_of_slice, head.classes);
  T loss = 0;
  SignedSums<T> kept;
  int column = begin;
  evaluate_planes(head, level, image, anchor, {i, row}, begin, end, level.grad != nullptr, scale,
                  formula, [&](const auto& values) {
                    loss += sum_losses(values, i, level.positions);
                    SignedSums<T> of_plane;
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                      of_plane.add(i + j < level.positions ? values.grad[j] : T(0));
                    }
                    of_plane.lowered = warp_sum_for_all(of_plane.lowered);
                    if (__any_sync(kFullWarp, of_plane.raised != 0)) {  // few planes have positives
                      of_plane.raised = warp_sum_for_all(of_plane.raised);
                    }
                    const int at = (column - begin) % kWarpSize;
                    kept = lane == at ? of_plane : kept;
                    ++column;
                    if (at == kWarpSize - 1 || column == end) {
                      if (lane <= at) {
                        sums.add(warp, column - 1 - at + lane, kept);
                      }
                    }
                  });
  __syncthreads();
  return loss;
}

template <typename Head, typename T = typename Head::T>
__global__ void __launch_bounds__(kThreads, 2)
    dense_equalized_focal_loss_kernel(const __grid_constant__ Head head,
                                      const Division<typename Head::scalar_t> division,
                                      FocalLossByClass<T> formula, double* losses, BlockSums sums) {
  __shared__ __align__(16) T shared[kLogitsPerChunk<typename Head::scalar_t>];
  const int64_t size = int64_t{2} * sums.rows * sums.num_classes;
  sums.data += blockIdx.x * size;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    sums.data[i] = 0;
  }
  __syncthreads();
  double loss = 0;
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    const auto [l, image, part] = place_of_item(head, item);
    const LossLevel& level = head.levels[l];
    const T divisor = head.normalizer.divisor(image);
    const T scale = gradient_scale<typename Head::scalar_t>(divisor);
    const T of_item =
        level.has_rows ? add_rows(head, division, level, image, part, scale, formula, shared, sums)
                       : add_planes(head, division, level, image, part, scale, formula, sums);
    loss += static_cast<double>(of_item) / divisor;
  }
  loss = block_sum<kThreads>(loss);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = loss;
  }
}

constexpr int kColumnsOfBlock = 4;  // neighbours in memory, a sector of float64

// Of [rows, columns].
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const double* numbers, int64_t rows, int columns, double* sums) {
  __shared__ double of_warps[kThreads / kWarpSize][kColumnsOfBlock];
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int column = static_cast<int>(blockIdx.x) * kColumnsOfBlock + thread % kColumnsOfBlock;
  double sum = 0;
  if (column < columns) {
    for (int64_t row = thread / kColumnsOfBlock; row < rows; row += kThreads / kColumnsOfBlock) {
      sum += numbers[row * columns + column];
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset >= kColumnsOfBlock; offset /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, offset);
  }
  if (lane < kColumnsOfBlock) {
    of_warps[thread / kWarpSize][lane] = sum;
  }
  __syncthreads();
  if (thread < kColumnsOfBlock && column < columns) {
    double total = 0;
    for (const auto& of_warp : of_warps) {
      total += of_warp[thread];
    }
    sums[column] = total;
  }
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_equalized_focal_loss_cuda(
    const std::vector<Tensor>& cls_logits, const Tensor& labels_, const Tensor& gamma_,
    double alpha, const std::optional<Tensor>& weight_, const std::optional<Tensor>& class_weight_,
    int64_t ignore_index, const std::optional<Tensor>& normalizer_, double min_normalizer,
    bool compute_grad) {
  const HeadShape shape = check_dense_equalized_focal_loss(cls_logits, labels_, gamma_, alpha,
                                                           weight_, class_weight_, normalizer_);
  const LaunchScope scope(cls_logits[0]);
  const auto levels = head_levels(cls_logits, shape);
  const Tensor labels = torch::stable::contiguous(labels_);
  const Tensor gamma = torch::stable::contiguous(gamma_);
  const auto weight = contiguous(weight_), class_weight = contiguous(class_weight_),
             given = contiguous(normalizer_);  // held until the launch
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(torch::stable::empty_like(levels[l].tensor));
  }
  const Tensor& like = levels[0].tensor;
  Tensor loss = torch::stable::new_empty(like, {}, compute_dtype(like.scalar_type()));
  Tensor gradient_sums = torch::stable::new_empty(like, {2, gamma.size(0)}, ScalarType::Double);
  if (shape.images * shape.rows * shape.classes == 0) {
    return {torch::stable::zero_(loss), torch::stable::zero_(gradient_sums), grads};
  }
  dispatch_floating(like.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    using LevelsOf = Head<scalar_t, RowWeights<T>>;
    const Division<scalar_t> division(shape.classes);
    auto head = make_head<LevelsOf>(
        levels, shape, labels, ignore_index, normalizer_of<T>(given, min_normalizer), grads,
        [&](const HeadLevel& level, int64_t vectors_of_plane) {
          return level.has_rows ? ceil_div(level.positions * shape.anchors, division.rows)
                                : ceil_div(vectors_of_plane * shape.anchors, division.vectors());
        });
    head.extras = {data_of<T>(weight), class_weights_of<T>(class_weight)};
    const FocalLossByClass<T> formula{AlphaBalance<T>(alpha),
                                      static_cast<const T*>(gamma.const_data_ptr())};
    auto* kernel = &dense_equalized_focal_loss_kernel<LevelsOf>;
    const int64_t grid = resident_grid(kernel, kThreads, 0, head.num_items, scope);
    // At least as many rows of sums as warps that have the same slice: K < 32 slices.
    const auto rows = static_cast<int>(kThreads / shape.classes > 1 ? kThreads / shape.classes : 1);
    const auto columns = static_cast<int>(2 * shape.classes);
    Tensor losses = torch::stable::new_empty(like, {grid}, ScalarType::Double);
    Tensor of_blocks = torch::stable::new_empty(like, {grid, rows, columns}, ScalarType::Double);
    auto* sums = data_of<double>(of_blocks);
    launch(kernel, grid, kThreads, 0, scope.stream(), head, division, formula,
           data_of<double>(losses), BlockSums{sums, rows, static_cast<int>(shape.classes)});
    launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(), data_of<double>(losses), grid,
           Normalizer<T>{nullptr, T(1)}, data_of<T>(loss));
    launch(&sum_columns_kernel, ceil_div(columns, kColumnsOfBlock), kThreads, 0, scope.stream(),
           sums, grid * rows, columns, data_of<double>(gradient_sums));
  });
  return {loss, gradient_sums, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("dense_equalized_focal_loss", TORCH_BOX(&dense_equalized_focal_loss_cuda));
}

}  // namespace focalops
