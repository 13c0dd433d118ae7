// The focal loss of a head's levels on CUDA, where the head left them: one launch reads each logit
// once and, where a gradient is wanted, writes it once, in the same layout. No permute, no cat.
//
// The levels travel by value in a kernel parameter. Work is cut into items of one image of one
// level each, strided by the grid; the layout is the same for a whole item, so that no warp
// diverges over it.
//   rows (channels_last)  an item is a chunk of kThreads x kUnroll vectors, as in focal_loss.cu: a
//                         vector finds its row by one division and makes masks from the labels.
//   planes (contiguous)   a thread owns a 16-byte vector of positions of one anchor and walks a
//                         slice of the classes, from plane to plane; neighbouring threads have
//                         neighbouring positions. The labels of its positions stay in registers.
// Where an image's rows or a plane do not begin at a multiple of 16 bytes, their elements are
// accessed one by one.
//
// Bytes moved, s = size of the logits: loss 1s, with gradient 2s; and the labels.
#include "../checks/dense_focal_loss.h"
#include "../head_levels.h"
#include "../math/row_losses.h"
#include "focal_loss.cuh"

namespace focalops {
namespace {

constexpr int kMaxLevels = 8;
constexpr int64_t kClassesOfSlice = 16;

struct Level {
  const void* logits;
  void* grad;
  int64_t positions;
  int64_t first_row;
  int64_t first_item;
  int64_t items_of_image;
  FastDivisor vectors_of_plane{1};
  bool has_rows;
};

// Extras is void or RowWeights<T>.
template <typename scalar_t_, typename Extras_>
struct Head {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;
  using Extras = Extras_;

  Level levels[kMaxLevels];
  int num_levels;
  int64_t num_items;
  Indices labels;  // [B, rows]
  int64_t rows;
  int64_t ignore_index;
  int anchors;
  int classes;
  int classes_of_slice;
  FastDivisor rows_of;    // by classes
  FastDivisor slices_of;  // by the number of slices
  Normalizer<T> normalizer;
  std::conditional_t<std::is_void_v<Extras>, char, Extras> extras;  // as the labels
};

// Evaluates a thread's share of item `part` of an image and returns the sum of its losses.
template <bool WithGrad, typename Head, typename Loss, typename T = typename Head::T>
__device__ __forceinline__ T evaluate_rows(const Head& head, const Level& level, int64_t image,
                                           int64_t part, T scale, const Loss& formula) {
  using scalar_t = typename Head::scalar_t;
  constexpr int N = kVectorSize<scalar_t>;
  const int64_t rows = level.positions * head.anchors, size = rows * head.classes;
  const int64_t begin = part * kChunk<scalar_t>, first_row = begin / head.classes;
  const auto first_column = static_cast<uint32_t>(begin - first_row * head.classes);
  // From here on all is counted from the beginning of the chunk, in 32 bits.
  const int left = static_cast<int>(min(size - begin, kChunk<scalar_t>));
  const int rows_left = static_cast<int>(min(rows - first_row, kChunk<scalar_t>));
  const int64_t first_label = image * head.rows + level.first_row + first_row;
  const Indices labels = head.labels.from(first_label);
  const auto* logits = static_cast<const scalar_t*>(level.logits) + image * size + begin;
  const bool aligned = is_aligned(logits);

  Vector<scalar_t, N> vectors[kUnroll<scalar_t>];
#pragma unroll
  for (int u = 0; u < kUnroll<scalar_t>; ++u) {
    const int i = (u * kThreads + static_cast<int>(threadIdx.x)) * N;
    vectors[u] = load_vector<N>(logits, i, left, aligned);
  }
  T sum = 0;
#pragma unroll
  for (int u = 0; u < kUnroll<scalar_t>; ++u) {
    const int i = (u * kThreads + static_cast<int>(threadIdx.x)) * N;
    if (i < left) {
      const uint32_t from_row = first_column + i;
      const uint32_t row = head.rows_of.divide(from_row);
      const uint32_t column = head.rows_of.remainder(from_row, row);
      const auto masks = class_row_masks<N>(labels, static_cast<int>(row), rows_left, column,
                                            head.classes, head.ignore_index);
      Values<T, N> values;
      if constexpr (std::is_void_v<typename Head::Extras>) {
        values = evaluate_hard(vectors[u], masks, formula);
      } else {
        values =
            evaluate_extras(vectors[u], masks, head.extras.from(first_label), static_cast<int>(row),
                            rows_left, static_cast<int>(column), head.classes, formula);
      }
      sum += sum_losses(values, i, left);
      if constexpr (WithGrad) {
        auto* grad = static_cast<scalar_t*>(level.grad) + image * size + begin;
        store_gradient(grad, i, left, is_aligned(grad), values, scale);
      }
    }
  }
  return sum;
}

// Planes in flight: the labels take registers too, and the weights of 8 positions even more.
template <typename Head>
constexpr int kPlanes =
    sizeof(typename Head::scalar_t) == 8 ||
            (sizeof(typename Head::scalar_t) == 2 && !std::is_void_v<typename Head::Extras>)
        ? 1
        : 2;

// Positions of one plane, with the weights of their anchors and of the class.
template <typename scalar_t, int N, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ Values<T, N> evaluate_plane(const Vector<scalar_t, N>& logits,
                                                       const ElementMasks& masks,
                                                       const T (&weight)[N], T class_weight,
                                                       const Loss& formula) {
  Values<T, N> values;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t bit = 1u << j;
    const T x = masks.invalid & bit ? quiet_nan<T>() : static_cast<T>(logits.data[j]);
    LossAndGrad<T> value = formula.negative(x);
    if (masks.positive & bit) {
      value = formula.positive(x, T(1));
    }
    const T factor = weight[j] * class_weight;
    values.loss[j] = masks.ignored & bit ? T(0) : factor * value.loss;
    values.grad[j] = masks.ignored & bit ? T(0) : factor * value.grad;
  }
  return values;
}

template <bool WithGrad, typename Head, typename Loss, typename T = typename Head::T>
__device__ __forceinline__ T evaluate_planes(const Head& head, const Level& level, int64_t image,
                                             int64_t part, T scale, const Loss& formula) {
  using scalar_t = typename Head::scalar_t;
  using Extras = typename Head::Extras;
  constexpr int N = kVectorSize<scalar_t>;
  const auto unit = static_cast<uint32_t>(part * kThreads + threadIdx.x);
  const uint32_t slice_of_image = level.vectors_of_plane.divide(unit);
  const uint32_t anchor = head.slices_of.divide(slice_of_image);
  if (anchor >= static_cast<uint32_t>(head.anchors)) {
    return 0;
  }
  const int64_t size = level.positions;
  const int64_t i = int64_t{level.vectors_of_plane.remainder(unit, slice_of_image)} * N;
  const int begin = head.slices_of.remainder(slice_of_image, anchor) * head.classes_of_slice;
  const int end = min(begin + head.classes_of_slice, head.classes);

  int positive_class[N];
  ElementMasks row_masks;
  const int64_t row = image * head.rows + level.first_row + i * head.anchors + anchor;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    // What lies past the end of the plane is read as background and left out of the sum.
    const int64_t label = i + j < size ? head.labels[row + j * head.anchors] : head.classes;
    const bool is_class = label >= 0 && label < head.classes && label != head.ignore_index;
    positive_class[j] = is_class ? static_cast<int>(label) : -1;
    row_masks.ignored |= label == head.ignore_index ? 1u << j : 0u;
    row_masks.invalid |=
        !is_class && label != head.classes && label != head.ignore_index ? 1u << j : 0u;
  }

  T weight[N];
  if constexpr (!std::is_void_v<Extras>) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      weight[j] = i + j < size ? head.extras.weight_of(row + j * head.anchors) : T(0);
    }
  }

  T sum = 0;
  const int64_t first_plane = (image * head.anchors + anchor) * head.classes;
  const auto* logits = static_cast<const scalar_t*>(level.logits);
  for (int first = begin; first < end; first += kPlanes<Head>) {
    Vector<scalar_t, N> vectors[kPlanes<Head>];
#pragma unroll
    for (int u = 0; u < kPlanes<Head>; ++u) {
      if (first + u < end) {
        const auto* plane = logits + (first_plane + first + u) * size;
        vectors[u] = load_vector<N>(plane, i, size, is_aligned(plane));
      }
    }
#pragma unroll
    for (int u = 0; u < kPlanes<Head>; ++u) {
      if (first + u < end) {
        ElementMasks masks = row_masks;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          masks.positive |= positive_class[j] == first + u ? 1u << j : 0u;
        }
        Values<T, N> values;
        if constexpr (std::is_void_v<Extras>) {
          values = evaluate_hard(vectors[u], masks, formula);
        } else {
          values = evaluate_plane(vectors[u], masks, weight, head.extras.class_weight_of(first + u),
                                  formula);
        }
        sum += sum_losses(values, i, size);
        if constexpr (WithGrad) {
          auto* plane = static_cast<scalar_t*>(level.grad) + (first_plane + first + u) * size;
          store_gradient(plane, i, size, is_aligned(plane), values, scale);
        }
      }
    }
  }
  return sum;
}

// Blocks a multiprocessor: the most at which nothing is spilled.
template <typename Head>
constexpr int kBlocks =
    sizeof(typename Head::scalar_t) == 4 && std::is_void_v<typename Head::Extras> ? 3 : 2;

template <bool WithGrad, typename Head, typename Loss>
__global__ void __launch_bounds__(kThreads, kBlocks<Head>)
    dense_focal_loss_kernel(const __grid_constant__ Head head, Loss formula, double* partials) {
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
    const auto scale = gradient_scale<typename Head::scalar_t>(divisor);
    const auto item_sum = level.has_rows
                              ? evaluate_rows<WithGrad>(head, level, image, part, scale, formula)
                              : evaluate_planes<WithGrad>(head, level, image, part, scale, formula);
    sum += static_cast<double>(item_sum) / divisor;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Head>
Head make_head(const std::vector<HeadLevel>& levels, const HeadShape& shape, const Tensor& labels,
               int64_t ignore_index, const Normalizer<typename Head::T>& normalizer,
               const std::vector<Tensor>& grads) {
  using scalar_t = typename Head::scalar_t;
  const int64_t slices = ceil_div(shape.classes, kClassesOfSlice);
  Head head{{},
            static_cast<int>(levels.size()),
            0,
            {labels.const_data_ptr(), labels.scalar_type() == ScalarType::Long},
            shape.rows,
            ignore_index,
            static_cast<int>(shape.anchors),
            static_cast<int>(shape.classes),
            static_cast<int>(ceil_div(shape.classes, slices)),
            FastDivisor(shape.classes),
            FastDivisor(slices),
            normalizer,
            {}};
  for (size_t l = 0; l < levels.size(); ++l) {
    const HeadLevel& from = levels[l];
    Level& to = head.levels[l];
    to.logits = from.tensor.const_data_ptr();
    to.grad = grads.empty() ? nullptr : grads[l].mutable_data_ptr();
    to.positions = from.positions;
    to.first_row = from.first_row;
    to.first_item = head.num_items;
    to.has_rows = from.has_rows;
    if (from.has_rows) {
      to.items_of_image =
          ceil_div(from.positions * shape.anchors * shape.classes, kChunk<scalar_t>);
    } else {
      const int64_t vectors = ceil_div(from.positions, kVectorSize<scalar_t>);
      const int64_t units = vectors * slices * shape.anchors;
      to.vectors_of_plane = FastDivisor(vectors > 0 ? vectors : 1);
      to.items_of_image = ceil_div(units, kThreads);
    }
    head.num_items += shape.images * to.items_of_image;
  }
  return head;
}

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
  const auto run = [&](const auto& head, const auto& formula) {
    using Head = std::decay_t<decltype(head)>;
    using Loss = std::decay_t<decltype(formula)>;
    auto* kernel = grads.empty() ? &dense_focal_loss_kernel<false, Head, Loss>
                                 : &dense_focal_loss_kernel<true, Head, Loss>;
    const int64_t grid = resident_grid(kernel, kThreads, 0, head.num_items, scope);
    Tensor partials = torch::stable::new_empty(like, {grid}, ScalarType::Double);
    auto* sums = static_cast<double*>(partials.mutable_data_ptr());
    launch(kernel, grid, kThreads, 0, scope.stream(), head, formula, sums);
    using T = typename Head::T;
    launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(), sums, grid,
           Normalizer<T>{nullptr, T(1)}, static_cast<T*>(loss.mutable_data_ptr()));
  };
  dispatch_floating(like.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const Normalizer<T> normalizer{data_of<T>(given), static_cast<T>(min_normalizer),
                                   given.has_value() && given->dim() == 1};
    if (!weight.has_value() && !class_weight.has_value() && options.label_smoothing == 0) {
      const auto head = make_head<Head<scalar_t, void>>(levels, shape, labels, options.ignore_index,
                                                        normalizer, grads);
      return dispatch_focal_loss<T>(options.alpha, options.gamma,
                                    [&](const auto& formula) { run(head, formula); });
    }
    auto head = make_head<Head<scalar_t, RowWeights<T>>>(levels, shape, labels,
                                                         options.ignore_index, normalizer, grads);
    head.extras = {data_of<T>(weight), data_of<T>(class_weight)};
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
