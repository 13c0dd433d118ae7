// The focal loss of a head's levels on CUDA: one launch, of which each block adds up its items, and
// one that adds up the blocks (dense_head.cuh has what an item is).
//
// Bytes moved, s = size of the logits: loss 1s, with gradient 2s; and the labels.
#include "../checks/dense_focal_loss.h"
#include "../math/row_losses.h"
#include "dense_head.cuh"

namespace focalops {
namespace {

// How the classes of a plane's positions are divided among threads.
struct Slices {
  int64_t count;
  int classes;  // of a slice
  FastDivisor of_anchors{count};

  explicit Slices(int64_t num_classes)
      : count(ceil_div(num_classes, kClassesOfSlice)),
        classes(static_cast<int>(ceil_div(num_classes, count))) {}
};

// Evaluates a thread's share of item `part` of an image and returns the sum of its losses.
template <bool WithGrad, typename Head, typename Loss, typename T = typename Head::T>
__device__ __forceinline__ T sum_rows(const Head& head, const LossLevel& level, int64_t image,
                                      int64_t part, T scale, const Loss& formula) {
  using scalar_t = typename Head::scalar_t;
  const int64_t size = level.positions * head.anchors * head.classes;
  const int64_t begin = part * kLogitsPerChunk<scalar_t>;
  const int left = static_cast<int>(min(size - begin, kLogitsPerChunk<scalar_t>));
  T sum = 0;
  evaluate_rows(head, level, image, begin, left, WithGrad, scale, formula,
                [&](const auto& values, int i, int) { sum += sum_losses(values, i, left); });
  return sum;
}

template <bool WithGrad, typename Head, typename Loss, typename T = typename Head::T>
__device__ __forceinline__ T sum_planes(const Head& head, const Slices& slices,
                                        const LossLevel& level, int64_t image, int64_t part,
                                        T scale, const Loss& formula) {
  constexpr int N = kVectorSize<typename Head::scalar_t>;
  const auto unit = static_cast<uint32_t>(part * kThreads + threadIdx.x);
  const uint32_t slice_of_image = level.vectors_of_plane.divide(unit);
  const uint32_t anchor = slices.of_anchors.divide(slice_of_image);
  if (anchor >= static_cast<uint32_t>(head.anchors)) {
    return 0;
  }
  const int64_t i = int64_t{level.vectors_of_plane.remainder(unit, slice_of_image)} * N;
  const int begin = slices.of_anchors.remainder(slice_of_image, anchor) * slices.classes;
  const int end = min(begin + slices.classes, head.classes);
  const int64_t row = image * head.rows + level.first_row + i * head.anchors + anchor;
  T sum = 0;
  evaluate_planes(head, level, image, anchor, {i, row}, begin, end, WithGrad, scale, formula,
                  [&](const auto& values) { sum += sum_losses(values, i, level.positions); });
  return sum;
}

// Blocks a multiprocessor: the most at which nothing is spilled.
template <typename Head>
constexpr int kBlocks =
    sizeof(typename Head::scalar_t) == 4 && std::is_void_v<typename Head::Extras> ? 3 : 2;

template <bool WithGrad, typename Head, typename Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<Head>)
    dense_focal_loss_kernel(const __grid_constant__ Head head, const Slices slices, Loss formula,
                            double* partials) {
  double sum = 0;
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    const auto [l, image, part] = place_of_item(head, item);
    const LossLevel& level = head.levels[l];
    const auto divisor = head.normalizer.divisor(image);
    const auto scale = gradient_scale<typename Head::scalar_t>(divisor);
    const auto item_sum =
        level.has_rows ? sum_rows<WithGrad>(head, level, image, part, scale, formula)
                       : sum_planes<WithGrad>(head, slices, level, image, part, scale, formula);
    sum += static_cast<double>(item_sum) / divisor;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Writes the gradients into `grads`, where there are any; they may be the logits themselves: each
// thread has read its logits before it writes there.
Tensor dense_focal_loss(const std::vector<HeadLevel>& levels, const HeadShape& shape,
                        const Tensor& labels_, const HeadLossOptions& options,
                        const std::optional<Tensor>& normalizer_, double min_normalizer,
                        const std::vector<Tensor>& grads, const LaunchScope& scope) {
  const Tensor& like = levels[0].tensor;
  const Tensor labels = torch::stable::contiguous(labels_);
  const auto weight = contiguous(options.weight), class_weight = contiguous(options.class_weight),
             given = contiguous(normalizer_);  // held until the launch
  Tensor loss = torch::stable::new_empty(like, {}, compute_dtype(like.scalar_type()));
  if (shape.images * shape.rows * shape.classes == 0) {
    return torch::stable::zero_(loss);
  }
  const Slices slices(shape.classes);
  const auto run = [&](const auto& head, const auto& formula) {
    using Head = std::decay_t<decltype(head)>;
    using Loss = std::decay_t<decltype(formula)>;
    auto* kernel = grads.empty() ? &dense_focal_loss_kernel<false, Head, Loss>
                                 : &dense_focal_loss_kernel<true, Head, Loss>;
    const int64_t grid = resident_grid(kernel, kThreads, 0, head.num_items, scope);
    Tensor partials = torch::stable::new_empty(like, {grid}, ScalarType::Double);
    auto* sums = static_cast<double*>(partials.mutable_data_ptr());
    launch(kernel, grid, kThreads, 0, scope.stream(), head, slices, formula, sums);
    using T = typename Head::T;
    launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(), sums, grid,
           Normalizer<T>{nullptr, T(1)}, static_cast<T*>(loss.mutable_data_ptr()));
  };
  dispatch_floating(like.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto normalizer = normalizer_of<T>(given, min_normalizer);
    const auto items_of_image = [&](const HeadLevel& level, int64_t vectors_of_plane) {
      return level.has_rows ? ceil_div(level.positions * shape.anchors * shape.classes,
                                       kLogitsPerChunk<scalar_t>)
                            : ceil_div(vectors_of_plane * slices.count * shape.anchors, kThreads);
    };
    if (!weight.has_value() && !class_weight.has_value() && options.label_smoothing == 0) {
      const auto head = make_head<Head<scalar_t, void>>(levels, shape, labels, options.ignore_index,
                                                        normalizer, grads, items_of_image);
      return dispatch_focal_loss<T>(options.alpha, options.gamma,
                                    [&](const auto& formula) { run(head, formula); });
    }
    auto head = make_head<Head<scalar_t, RowWeights<T>>>(
        levels, shape, labels, options.ignore_index, normalizer, grads, items_of_image);
    head.extras = {data_of<T>(weight), class_weights_of<T>(class_weight)};
    row_losses::Focal::dispatch<T>({options.alpha, options.gamma, options.label_smoothing},
                                   [&](const auto& formula) { run(head, formula); });
  });
  return loss;
}

std::tuple<Tensor, std::vector<Tensor>> dense_focal_loss_cuda(
    const std::vector<Tensor>& cls_logits, const Tensor& labels, double alpha, double gamma,
    double label_smoothing, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& class_weight, int64_t ignore_index,
    const std::optional<Tensor>& normalizer, double min_normalizer, bool compute_grad) {
  const HeadLossOptions options{alpha, gamma, label_smoothing, weight, class_weight, ignore_index};
  const HeadShape shape = check_dense_focal_loss(cls_logits, labels, options, normalizer);
  const LaunchScope scope(cls_logits[0]);
  const auto levels = head_levels(cls_logits, shape);
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(torch::stable::empty_like(levels[l].tensor));
  }
  Tensor loss =
      dense_focal_loss(levels, shape, labels, options, normalizer, min_normalizer, grads, scope);
  return {loss, grads};
}

Tensor dense_focal_loss_inplace_cuda(const std::vector<Tensor>& cls_logits, const Tensor& labels,
                                     double alpha, double gamma, double label_smoothing,
                                     const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& class_weight,
                                     int64_t ignore_index, const std::optional<Tensor>& normalizer,
                                     double min_normalizer) {
  const HeadLossOptions options{alpha, gamma, label_smoothing, weight, class_weight, ignore_index};
  const HeadShape shape = check_dense_focal_loss(cls_logits, labels, options, normalizer);
  check_overwritten(cls_logits);
  const LaunchScope scope(cls_logits[0]);
  return dense_focal_loss(head_levels(cls_logits, shape), shape, labels, options, normalizer,
                          min_normalizer, cls_logits, scope);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("dense_focal_loss", TORCH_BOX(&dense_focal_loss_cuda));
  m.impl("_dense_focal_loss_", TORCH_BOX(&dense_focal_loss_inplace_cuda));
}

}  // namespace focalops
