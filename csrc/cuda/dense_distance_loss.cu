// The box loss of a head's levels of distances on CUDA, where the head left them: one launch, no
// decoded boxes but those of the foreground, no probabilities.
//
// The levels travel by value in a kernel parameter. Work is cut into items of kThreads positions of
// one image of one level each, strided by the grid; a thread has a position. The block sets the
// gradients of the item to 0, 16 bytes at a time: in rows (channels_last) they are one stretch of
// memory, in planes (contiguous) one of each plane. Then its threads visit their positions: only
// those of the foreground have a loss, and only their logits are read, twice, the second time from
// a cache.
//
// Bytes moved: 8 a position and image, its match; what is wanted of the gradient, and of 4 for the
// loss and the IoU; and of the foreground the logits.
#include "../checks/distances.h"
#include "../math/distances.h"
#include "head_items.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t_>
struct Head {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;

  LossLevel levels[kMaxLevels];
  int num_levels;
  int64_t num_items;
  T strides[kMaxLevels];
  int64_t rows;       // of an image: its positions
  const T* points;    // [rows, 2]
  const T* gt_boxes;  // [B, M, 4]
  int64_t max_boxes;
  const int64_t* matches;  // [B, rows]
  T* losses;               // [B, rows]
  T* iou;                  // the same; null: not wanted
};

// Sets n elements to 0, by all threads of the block.
template <typename scalar_t>
__device__ __forceinline__ void fill_zeros(scalar_t* array, int64_t n) {
  constexpr int N = kVectorSize<scalar_t>;
  Vector<scalar_t, N> zeros;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    zeros.data[j] = static_cast<scalar_t>(0.0f);
  }
  const bool aligned = is_aligned(array);
  for (int64_t i = threadIdx.x * N; i < n; i += kThreads * N) {
    store_vector(array, i, n, aligned, zeros);
  }
}

// Blocks a multiprocessor: as many as every architecture has without spills.
template <typename T>
constexpr int kBlocks = std::is_same_v<T, double> ? 1 : 2;

template <bool WithGrad, typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    dense_distance_loss_kernel(const __grid_constant__ Head<scalar_t> head, Loss formula) {
  const int bins = formula.bins, channels = 4 * bins;
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    const auto [l, image, part] = place_of_item(head, item);
    const LossLevel& level = head.levels[l];
    const int64_t size = level.positions, first = part * kThreads;
    const int64_t of_image = image * channels * size;
    scalar_t* grad = static_cast<scalar_t*>(level.grad);
    if constexpr (WithGrad) {
      const int64_t n = min(size - first, int64_t{kThreads});
      if (level.has_rows) {
        fill_zeros(grad + of_image + first * channels, n * channels);
      } else {
        for (int channel = 0; channel < channels; ++channel) {
          fill_zeros(grad + of_image + channel * size + first, n);
        }
      }
      __syncthreads();  // the foreground's gradients replace zeros
    }
    const int64_t position = first + threadIdx.x;
    if (position >= size) {
      continue;
    }
    const int64_t row = level.first_row + position, at = image * head.rows + row;
    const int64_t match = head.matches[at];
    typename Loss::Value value{0, 0};
    if (match >= 0) {
      const int64_t of_channel = level.has_rows ? 1 : size;
      const int64_t logit = of_image + (level.has_rows ? position * channels : position);
      const scalar_t* logits = static_cast<const scalar_t*>(level.data) + logit;
      const bool exists = match < head.max_boxes;
      const T nan = static_cast<T>(__builtin_nanf(""));
      const Box<T> gt_box = exists ? load_box(head.gt_boxes + 4 * (image * head.max_boxes + match))
                                   : Box<T>{nan, nan, nan, nan};
      value = formula.template evaluate<WithGrad>(
          head.points[2 * row], head.points[2 * row + 1], head.strides[l], gt_box,
          [&](int side, int bin) {
            return static_cast<T>(logits[(side * bins + bin) * of_channel]);
          },
          [&](int side, int bin, T value) {
            grad[logit + (side * bins + bin) * of_channel] = static_cast<scalar_t>(value);
          });
    }
    head.losses[at] = value.loss;
    if (head.iou != nullptr) {
      head.iou[at] = value.iou;
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_distance_losses_cuda(
    const std::vector<Tensor>& levels_, const Tensor& points_, const Tensor& gt_boxes_,
    const Tensor& matches_, const std::vector<double>& strides, int64_t bins, int64_t loss,
    double eps, double dfl_weight, bool compute_grad, bool compute_iou) {
  const HeadShape shape = check_dense_distance_losses(levels_, points_, gt_boxes_, matches_,
                                                      strides, bins, loss, dfl_weight);
  const LaunchScope scope(points_);
  const auto levels = head_levels(levels_, shape);
  const Tensor points = torch::stable::contiguous(points_);
  const Tensor gt_boxes = torch::stable::contiguous(gt_boxes_);
  const Tensor matches = torch::stable::contiguous(matches_);
  Tensor losses = torch::stable::new_empty(points, {shape.images, shape.rows});
  Tensor iou = compute_iou ? torch::stable::new_empty(points, {shape.images, shape.rows})
                           : torch::stable::new_empty(points, {0});
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(torch::stable::empty_like(levels[l].tensor));
  }
  if (losses.numel() == 0) {
    return {losses, iou, grads};
  }
  dispatch_floating(levels[0].tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    Head<scalar_t> head{{},
                        0,
                        0,
                        {},
                        shape.rows,
                        static_cast<const T*>(points.const_data_ptr()),
                        static_cast<const T*>(gt_boxes.const_data_ptr()),
                        gt_boxes.size(1),
                        static_cast<const int64_t*>(matches.const_data_ptr()),
                        data_of<T>(losses),
                        compute_iou ? data_of<T>(iou) : nullptr};
    const auto items_of_image = [](const HeadLevel& level, int64_t) {
      return ceil_div(level.positions, kThreads);
    };
    for (size_t l = 0; l < levels.size(); ++l) {
      head.strides[l] = static_cast<T>(strides[l]);
      append_level<scalar_t>(head, levels[l], compute_grad ? grads[l].mutable_data_ptr() : nullptr,
                             shape.images, items_of_image);
    }
    dispatch_distance_loss<T>(loss, eps, dfl_weight, bins, [&](const auto& formula) {
      using Loss = std::decay_t<decltype(formula)>;
      auto* kernel = compute_grad ? &dense_distance_loss_kernel<true, scalar_t, Loss>
                                  : &dense_distance_loss_kernel<false, scalar_t, Loss>;
      const int64_t grid = resident_grid(kernel, kThreads, 0, head.num_items, scope);
      launch(kernel, grid, kThreads, 0, scope.stream(), head, formula);
    });
  });
  return {losses, iou, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("dense_distance_losses", TORCH_BOX(&dense_distance_losses_cuda));
}

}  // namespace focalops
