// The box loss of a head's levels on CUDA, where the head left them: one launch, no dense targets.
//
// The levels travel by value in a kernel parameter. Work is cut into items of one image of one
// level each, strided by the grid; the layout is the same for a whole item.
//   rows (channels_last)  a thread has one anchor; its 4 deltas are one access.
//   planes (contiguous)   a thread has a 16-byte vector of positions of one anchor, whose gradients
//                         it sets to 0 in all 4 planes; then it visits the foreground among them.
// Only foreground anchors have a loss, and only their deltas are read. Losses and IoUs of single
// anchors lie like the matches.
//
// Bytes moved: 8 an anchor and image, its match; and what is wanted of the gradient, and of 4 for
// each loss and IoU.
#include "../checks/dense_box_loss.h"
#include "../head_levels.h"
#include "../rows.h"
#include "focal_loss.cuh"
#include "head_items.cuh"

namespace focalops {
namespace {

template <typename scalar_t_>
struct Head {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;

  LossLevel levels[kMaxLevels];
  int num_levels;
  int64_t num_items;
  int anchors_of_position;
  int64_t rows;              // of an image
  Rows<Box<T>, T> anchors;   // [rows, 4]
  Rows<Box<T>, T> gt_boxes;  // [B, M, 4]
  int64_t max_boxes;
  const int64_t* matches;  // [B, rows]
  Normalizer<T> normalizer;
  T* losses;  // [B, rows]; null: not wanted
  T* iou;     // the same
};

// Of an anchor; that of one in the background is 0.
template <typename T>
struct Evaluated {
  T loss = 0;
  Deltas<T> grad{0, 0, 0, 0};  // of the loss by the deltas, times `scale`
  T iou = 0;                   // where it is wanted
};

template <typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ Evaluated<T> evaluate(const Head<scalar_t>& head, int64_t image,
                                                 int64_t row, int64_t match,
                                                 const Deltas<T>& deltas, T scale,
                                                 const Loss& formula) {
  if (match >= head.max_boxes) {
    const T nan = quiet_nan<T>();
    return {nan, {nan, nan, nan, nan}, nan};
  }
  const Box<T> anchor = head.anchors.load(0, row), gt_box = head.gt_boxes.load(image, match);
  const auto value = formula.evaluate(deltas, anchor, gt_box);
  return {value.loss,
          {scale * value.grad.x, scale * value.grad.y, scale * value.grad.w, scale * value.grad.h},
          head.iou != nullptr ? formula.overlap(deltas, anchor, gt_box) : T(0)};
}

// An anchor's own numbers, where they are wanted.
template <typename scalar_t, typename T = compute_t<scalar_t>>
__device__ __forceinline__ void store_row(const Head<scalar_t>& head, int64_t at,
                                          const Evaluated<T>& value) {
  if (head.losses != nullptr) {
    head.losses[at] = value.loss;
  }
  if (head.iou != nullptr) {
    head.iou[at] = value.iou;
  }
}

template <typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ T evaluate_row(const Head<scalar_t>& head, const LossLevel& level,
                                          int64_t image, int64_t part, T scale,
                                          const Loss& formula) {
  const int64_t rows = level.positions * head.anchors_of_position;
  const int64_t i = part * kThreads + threadIdx.x;
  if (i >= rows) {
    return 0;
  }
  const int64_t row = level.first_row + i, at = (image * rows + i) * 4;
  const int64_t match = head.matches[image * head.rows + row];
  Evaluated<T> value;
  if (match >= 0) {
    const scalar_t* from = static_cast<const scalar_t*>(level.data) + at;
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
  store_row(head, image * head.rows + row, value);
  return value.loss;
}

template <typename scalar_t, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ T evaluate_planes(const Head<scalar_t>& head, const LossLevel& level,
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
    Evaluated<T> value;
    if (match >= 0) {
      const scalar_t* from = static_cast<const scalar_t*>(level.data) + at + i;
      value = evaluate(head, image, row, match,
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
    store_row(head, image * head.rows + row, value);
  }
  return sum;
}

// Blocks a multiprocessor: as many as every architecture has without spills.
template <typename scalar_t, typename Loss>
constexpr int kBlocks = std::is_same_v<scalar_t, double> ? 1
                        : Loss::kIsL1                    ? 4
                        : Loss::kIou == IouKind::kPlain  ? 3
                                                         : 2;

// partials: a sum of losses for each block; null: not wanted
template <typename scalar_t, typename Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<scalar_t, Loss>)
    dense_box_loss_kernel(const __grid_constant__ Head<scalar_t> head, Loss formula,
                          double* partials) {
  double sum = 0;
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    const auto [l, image, part] = place_of_item(head, item);
    const LossLevel& level = head.levels[l];
    const auto divisor = head.normalizer.divisor(image);
    const auto scale = gradient_scale<scalar_t>(divisor);
    const auto item_sum = level.has_rows
                              ? evaluate_row(head, level, image, part, scale, formula)
                              : evaluate_planes(head, level, image, part, scale, formula);
    sum += static_cast<double>(item_sum) / divisor;
  }
  if (partials == nullptr) {
    return;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

// ---- host ---------------------------------------------------------------------------------------

// What the ops are given, in the form that the kernel reads.
struct Inputs {
  HeadShape shape;
  std::vector<HeadLevel> levels;
  Tensor anchors, gt_boxes, matches;  // contiguous

  Inputs(const HeadShape& shape, const std::vector<Tensor>& deltas, const Tensor& anchors,
         const Tensor& gt_boxes, const Tensor& matches)
      : shape(shape),
        levels(head_levels(deltas, shape)),
        anchors(torch::stable::contiguous(anchors)),
        gt_boxes(torch::stable::contiguous(gt_boxes)),
        matches(torch::stable::contiguous(matches)) {}

  std::vector<Tensor> new_gradients(bool are_wanted) const {
    std::vector<Tensor> grads;
    for (size_t l = 0; are_wanted && l < levels.size(); ++l) {
      grads.push_back(torch::stable::empty_like(levels[l].tensor));
    }
    return grads;
  }

  // (B, N), or empty
  Tensor new_row_numbers(bool are_wanted) const {
    return are_wanted ? torch::stable::new_empty(anchors, {shape.images, shape.rows})
                      : torch::stable::new_empty(anchors, {0});
  }
};

// `given` is the normalizer, contiguous; without gradients `grads` is empty.
template <typename scalar_t, typename T = compute_t<scalar_t>>
Head<scalar_t> make_head(const Inputs& inputs, const std::optional<Tensor>& given,
                         double min_normalizer, const std::vector<Tensor>& grads) {
  const HeadShape& shape = inputs.shape;
  const int64_t max_boxes = inputs.gt_boxes.size(1);
  Head<scalar_t> head{{},
                      0,
                      0,
                      static_cast<int>(shape.anchors),
                      shape.rows,
                      Rows<Box<T>, T>(inputs.anchors, {0, 4}),
                      Rows<Box<T>, T>(inputs.gt_boxes, {4 * max_boxes, 4}),
                      max_boxes,
                      static_cast<const int64_t*>(inputs.matches.const_data_ptr()),
                      normalizer_of<T>(given, min_normalizer),
                      nullptr,
                      nullptr};
  const auto items_of_image = [&](const HeadLevel& level, int64_t vectors_of_plane) {
    return ceil_div(shape.anchors * (level.has_rows ? level.positions : vectors_of_plane),
                    kThreads);
  };
  for (size_t l = 0; l < inputs.levels.size(); ++l) {
    append_level<scalar_t>(head, inputs.levels[l],
                           grads.empty() ? nullptr : grads[l].mutable_data_ptr(), shape.images,
                           items_of_image);
  }
  return head;
}

// Calls f with the tag of the dtype and the formula of the loss.
template <typename F>
void dispatch(const Inputs& inputs, const BoxLossOptions& options, const F& f) {
  dispatch_floating(inputs.levels[0].tensor.scalar_type(), [&](auto tag) {
    using T = compute_t<tag_t<decltype(tag)>>;
    const auto coder = box_coder<T>(options.weights, options.clip);
    dispatch_box_loss<T>(options.loss, coder, options.beta, options.eps,
                         [&](const auto& formula) { f(tag, formula); });
  });
}

template <typename scalar_t, typename Loss>
int64_t grid_of(const Head<scalar_t>& head, const Loss&, const LaunchScope& scope) {
  return resident_grid(&dense_box_loss_kernel<scalar_t, Loss>, kThreads, 0, head.num_items, scope);
}

template <typename scalar_t, typename Loss>
void launch_loss(const Head<scalar_t>& head, const Loss& formula, int64_t grid, double* partials,
                 const LaunchScope& scope) {
  launch(&dense_box_loss_kernel<scalar_t, Loss>, grid, kThreads, 0, scope.stream(), head, formula,
         partials);
}

std::tuple<Tensor, std::vector<Tensor>> dense_box_loss_cuda(
    const std::vector<Tensor>& deltas, const Tensor& anchors, const Tensor& gt_boxes,
    const Tensor& matches, int64_t loss, const std::vector<double>& weights, double clip,
    double beta, double eps, const std::optional<Tensor>& normalizer, double min_normalizer,
    bool compute_grad) {
  const BoxLossOptions options{loss, weights, clip, beta, eps};
  const HeadShape shape =
      check_dense_box_loss(deltas, anchors, gt_boxes, matches, options, normalizer);
  const LaunchScope scope(anchors);
  const Inputs inputs(shape, deltas, anchors, gt_boxes, matches);
  const auto given = contiguous(normalizer);
  const auto grads = inputs.new_gradients(compute_grad);
  Tensor total = torch::stable::new_empty(anchors, {});
  if (shape.images * shape.rows == 0) {
    return {torch::stable::zero_(total), grads};
  }
  dispatch(inputs, options, [&](auto tag, const auto& formula) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto head = make_head<scalar_t>(inputs, given, min_normalizer, grads);
    const int64_t grid = grid_of(head, formula, scope);
    Tensor partials = torch::stable::new_empty(total, {grid}, ScalarType::Double);
    auto* sums = data_of<double>(partials);
    launch_loss(head, formula, grid, sums, scope);
    launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(), sums, grid,
           Normalizer<T>{nullptr, T(1)}, data_of<T>(total));
  });
  return {total, grads};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_box_losses_cuda(
    const std::vector<Tensor>& deltas, const Tensor& anchors, const Tensor& gt_boxes,
    const Tensor& matches, int64_t loss, const std::vector<double>& weights, double clip,
    double beta, double eps, bool compute_grad, bool compute_iou) {
  const BoxLossOptions options{loss, weights, clip, beta, eps};
  const HeadShape shape = check_dense_box_losses(deltas, anchors, gt_boxes, matches, options);
  const LaunchScope scope(anchors);
  const Inputs inputs(shape, deltas, anchors, gt_boxes, matches);
  const auto grads = inputs.new_gradients(compute_grad);
  Tensor losses = inputs.new_row_numbers(options.has_loss());
  Tensor iou = inputs.new_row_numbers(compute_iou);
  if (shape.images * shape.rows == 0) {
    return {losses, iou, grads};
  }
  dispatch(inputs, options, [&](auto tag, const auto& formula) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    auto head = make_head<scalar_t>(inputs, std::nullopt, 1, grads);
    head.losses = options.has_loss() ? data_of<T>(losses) : nullptr;
    head.iou = compute_iou ? data_of<T>(iou) : nullptr;
    launch_loss(head, formula, grid_of(head, formula, scope), nullptr, scope);
  });
  return {losses, iou, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("dense_box_loss", TORCH_BOX(&dense_box_loss_cuda));
  m.impl("dense_box_losses", TORCH_BOX(&dense_box_losses_cuda));
}

}  // namespace focalops
