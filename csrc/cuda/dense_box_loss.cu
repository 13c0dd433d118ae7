// The box loss of a head's levels on CUDA, where the head left them: one launch, no dense targets.
//
// The levels travel by value in a kernel parameter. Work is cut into items of one image of one
// level each, strided by the grid; the layout is the same for a whole item.
//   rows (channels_last)  a thread has one anchor; its 4 deltas are one access.
//   planes (contiguous)   a thread has a 16-byte vector of positions of one anchor, whose gradients
//                         it sets to 0 in all 4 planes; then it visits the foreground among them.
// Only foreground anchors have a loss, and only their deltas are read.
//
// Bytes moved: 8 an anchor and image, its match; and the gradient, where one is wanted.
#include "../checks/dense_box_loss.h"
#include "../head_levels.h"
#include "../math/box_loss.h"
#include "../rows.h"
#include "focal_loss.cuh"

namespace focalops {
namespace {

constexpr int kMaxLevels = 8;

struct Level {
  const void* deltas;
  void* grad;  // null: not wanted
  int64_t positions;
  int64_t first_row;
  int64_t first_item;
  int64_t items_of_image;
  FastDivisor vectors_of_plane{1};
  bool has_rows;
};

template <typename scalar_t_>
struct Head {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;

  Level levels[kMaxLevels];
  int num_levels;
  int64_t num_items;
  int anchors_of_position;
  int64_t rows;              // of an image
  Rows<Box<T>, T> anchors;   // [rows, 4]
  Rows<Box<T>, T> gt_boxes;  // [B, M, 4]
  int64_t max_boxes;
  const int64_t* matches;  // [B, rows]
  Normalizer<T> normalizer;
};

// A foreground anchor's loss, and its gradient by the deltas times `scale`.
template <typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ BoxLossAndGrad<T> evaluate(const Head<scalar_t>& head, int64_t image,
                                                      int64_t row, int64_t match,
                                                      const Deltas<T>& deltas, T scale,
                                                      const Loss& formula) {
  if (match >= head.max_boxes) {
    const T nan = quiet_nan<T>();
    return {nan, {nan, nan, nan, nan}};
  }
  auto value =
      formula.evaluate(deltas, head.anchors.load(0, row), head.gt_boxes.load(image, match));
  value.grad = {scale * value.grad.x, scale * value.grad.y, scale * value.grad.w,
                scale * value.grad.h};
  return value;
}

template <typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ T evaluate_row(const Head<scalar_t>& head, const Level& level,
                                          int64_t image, int64_t part, T scale,
                                          const Loss& formula) {
  const int64_t rows = level.positions * head.anchors_of_position;
  const int64_t i = part * kThreads + threadIdx.x;
  if (i >= rows) {
    return 0;
  }
  const int64_t row = level.first_row + i, at = (image * rows + i) * 4;
  const int64_t match = head.matches[image * head.rows + row];
  BoxLossAndGrad<T> value{0, {0, 0, 0, 0}};
  if (match >= 0) {
    const scalar_t* from = static_cast<const scalar_t*>(level.deltas) + at;
    const auto deltas = load_vector<4>(from, 0, 4, false);
    value = evaluate(head, image, row, match,
                     Deltas<T>{static_cast<T>(deltas.data[0]), static_cast<T>(deltas.data[1]),
                               static_cast<T>(deltas.data[2]), static_cast<T>(deltas.data[3])},
                     scale, formula);
  }
  if (level.grad != nullptr) {
    reinterpret_cast<Deltas<scalar_t>*>(static_cast<scalar_t*>(level.grad) + at)[0] =
        deltas_cast<scalar_t>(value.grad);
  }
  return value.loss;
}

template <typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ T evaluate_planes(const Head<scalar_t>& head, const Level& level,
                                             int64_t image, int64_t part, T scale,
                                             const Loss& formula) {
  constexpr int N = kVectorSize<scalar_t>;
  const auto unit = static_cast<uint32_t>(part * kThreads + threadIdx.x);
  const uint32_t anchor = level.vectors_of_plane.divide(unit);
  if (anchor >= static_cast<uint32_t>(head.anchors_of_position)) {
    return 0;
  }
  const int64_t size = level.positions;
  const int64_t first = int64_t{level.vectors_of_plane.remainder(unit, anchor)} * N;
  const int64_t at = (image * head.anchors_of_position + anchor) * 4 * size;
  if (level.grad != nullptr) {
    Vector<scalar_t, N> zeros;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      zeros.data[j] = static_cast<scalar_t>(T(0));
    }
    for (int k = 0; k < 4; ++k) {
      auto* plane = static_cast<scalar_t*>(level.grad) + at + k * size;
      store_vector(plane, first, size, is_aligned(plane), zeros);
    }
  }
  T sum = 0;
#pragma unroll 1
  for (int64_t i = first; i < first + N && i < size; ++i) {
    const int64_t row = level.first_row + i * head.anchors_of_position + anchor;
    const int64_t match = head.matches[image * head.rows + row];
    if (match >= 0) {
      const scalar_t* from = static_cast<const scalar_t*>(level.deltas) + at + i;
      const auto value =
          evaluate(head, image, row, match,
                   Deltas<T>{static_cast<T>(from[0]), static_cast<T>(from[size]),
                             static_cast<T>(from[2 * size]), static_cast<T>(from[3 * size])},
                   scale, formula);
      sum += value.loss;
      if (level.grad != nullptr) {
        scalar_t* to = static_cast<scalar_t*>(level.grad) + at + i;
        to[0] = static_cast<scalar_t>(value.grad.x);
        to[size] = static_cast<scalar_t>(value.grad.y);
        to[2 * size] = static_cast<scalar_t>(value.grad.w);
        to[3 * size] = static_cast<scalar_t>(value.grad.h);
      }
    }
  }
  return sum;
}

// Blocks a multiprocessor. Without the number ptxas spills for the sake of more of them.
template <typename scalar_t>
constexpr int kBlocks = std::is_same_v<scalar_t, double> ? 1 : 2;

template <typename scalar_t, typename Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t>)
    dense_box_loss_kernel(const __grid_constant__ Head<scalar_t> head, Loss formula,
                          double* partials) {
  double sum = 0;
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    int l = 0;
    while (l + 1 < head.num_levels && item >= head.levels[l + 1].first_item) {
      ++l;
    }
    const Level& level = head.levels[l];
    const int64_t image = (item - level.first_item) / level.items_of_image;
    const int64_t part = item - level.first_item - image * level.items_of_image;
    const auto divisor = head.normalizer.divisor(image);
    const auto scale = gradient_scale<scalar_t>(divisor);
    const auto item_sum = level.has_rows
                              ? evaluate_row(head, level, image, part, scale, formula)
                              : evaluate_planes(head, level, image, part, scale, formula);
    sum += static_cast<double>(item_sum) / divisor;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename scalar_t, typename Loss>
auto* kernel_of(const Loss&) {
  return &dense_box_loss_kernel<scalar_t, Loss>;
}

std::tuple<Tensor, std::vector<Tensor>> dense_box_loss_cuda(
    const std::vector<Tensor>& deltas, const Tensor& anchors_, const Tensor& gt_boxes_,
    const Tensor& matches_, int64_t kind, const std::vector<double>& weights, double clip,
    double beta, double eps, const std::optional<Tensor>& normalizer_, double min_normalizer,
    bool compute_grad) {
  const HeadShape shape =
      check_dense_box_loss(deltas, anchors_, gt_boxes_, matches_, kind, weights, beta, normalizer_);
  const LaunchScope scope(anchors_);
  const auto levels = head_levels(deltas, shape);
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               matches = torch::stable::contiguous(matches_);
  Tensor loss = torch::stable::new_empty(anchors, {});
  std::vector<Tensor> grads;
  if (compute_grad) {
    for (const HeadLevel& level : levels) {
      grads.push_back(torch::stable::empty_like(level.tensor));
    }
  }
  if (shape.images * shape.rows == 0) {
    return {torch::stable::zero_(loss), grads};
  }
  std::optional<Tensor> given;  // held until the launch
  if (normalizer_.has_value()) {
    given = torch::stable::contiguous(*normalizer_);
  }
  dispatch_floating(deltas[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const int64_t max_boxes = gt_boxes.size(1);
    Head<scalar_t> head{
        {},
        static_cast<int>(levels.size()),
        0,
        static_cast<int>(shape.anchors),
        shape.rows,
        Rows<Box<T>, T>(anchors, {0, 4}),
        Rows<Box<T>, T>(gt_boxes, {4 * max_boxes, 4}),
        max_boxes,
        static_cast<const int64_t*>(matches.const_data_ptr()),
        {given.has_value() ? static_cast<const T*>(given->const_data_ptr()) : nullptr,
         static_cast<T>(min_normalizer), given.has_value() && given->dim() == 1}};
    for (size_t l = 0; l < levels.size(); ++l) {
      const HeadLevel& from = levels[l];
      Level& to = head.levels[l];
      to.deltas = from.tensor.const_data_ptr();
      to.grad = compute_grad ? grads[l].mutable_data_ptr() : nullptr;
      to.positions = from.positions;
      to.first_row = from.first_row;
      to.first_item = head.num_items;
      to.has_rows = from.has_rows;
      const int64_t vectors = ceil_div(from.positions, kVectorSize<scalar_t>);
      const int64_t units = shape.anchors * (from.has_rows ? from.positions : vectors);
      to.vectors_of_plane = FastDivisor(vectors > 0 ? vectors : 1);
      to.items_of_image = ceil_div(units, kThreads);
      head.num_items += shape.images * to.items_of_image;
    }
    dispatch_box_loss<T>(kind, box_coder<T>(weights, clip), beta, eps, [&](const auto& formula) {
      auto* kernel = kernel_of<scalar_t>(formula);
      const int64_t grid = resident_grid(kernel, kThreads, 0, head.num_items, scope);
      Tensor partials = torch::stable::new_empty(anchors, {grid}, ScalarType::Double);
      auto* sums = static_cast<double*>(partials.mutable_data_ptr());
      launch(kernel, grid, kThreads, 0, scope.stream(), head, formula, sums);
      launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(), sums, grid,
             Normalizer<T>{nullptr, T(1)}, static_cast<T*>(loss.mutable_data_ptr()));
    });
  });
  return {loss, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("dense_box_loss", TORCH_BOX(&dense_box_loss_cuda));
}

}  // namespace focalops
