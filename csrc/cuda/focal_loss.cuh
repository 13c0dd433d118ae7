// The focal loss kernels share this: the way from class indices to the losses and gradients of a
// 16-byte vector of logits, the kernel of contiguous logits, and the sum in a fixed order.
#pragma once

#include "../class_weights.h"
#include "../math/focal.h"
#include "../normalizer.h"
#include "integers.cuh"
#include "launch.cuh"

namespace focalops {

constexpr int kThreads = 256;
// Vectors in flight: 64 bytes a thread. float64 is bound by arithmetic, and its values take two
// registers each.
template <typename scalar_t>
constexpr int kUnroll = std::is_same_v<scalar_t, double> ? 1 : 4;

template <typename scalar_t>
constexpr int64_t kLogitsPerChunk = int64_t{kThreads} * kUnroll<scalar_t> * kVectorSize<scalar_t>;

template <typename T>
__device__ constexpr T quiet_nan() {
  return static_cast<T>(__builtin_nanf(""));
}

template <typename T, int N>
struct Values {
  T loss[N];
  T grad[N];
};

// A bit for each logit of a vector. All are 0 in most vectors: nothing but negatives. `foreground`
// has the logits of the rows that have a class.
struct ElementMasks {
  uint32_t positive = 0, ignored = 0, invalid = 0, foreground = 0;

  __device__ __forceinline__ ClassPart part_of(uint32_t bit) const {
    return positive & bit     ? kPositive
           : foreground & bit ? kNegativeOfForeground
                              : kNegativeOfBackground;
  }
};

// The bits first .. last of N.
template <int N>
__device__ __forceinline__ uint32_t bits_between(int first, int last) {
  return (last < N ? (1u << last) - 1 : ~0u) & ~(first > 0 ? (1u << first) - 1 : 0u);
}

// Makes the masks of N logits from `column` of `row` on; rows are K contiguous logits.
template <int N, typename Row>
__device__ __forceinline__ ElementMasks class_row_masks(const Integers& targets, Row row,
                                                        Row num_rows, int column, int num_classes,
                                                        int64_t ignore_index) {
  ElementMasks masks;
  for (int first = -column; first < N && row < num_rows; first += num_classes, ++row) {
    const int64_t target = targets[row];
    if (target >= 0 && target < num_classes && target != ignore_index) {
      const int at = first + static_cast<int>(target);
      masks.positive |= at >= 0 && at < N ? 1u << at : 0u;
      masks.foreground |= bits_between<N>(first, first + num_classes);
    } else if (target != num_classes || target == ignore_index) {
      (target == ignore_index ? masks.ignored : masks.invalid) |=
          bits_between<N>(first, first + num_classes);
    }
  }
  return masks;
}

template <typename scalar_t, int N, typename Loss, typename T = compute_t<scalar_t>>
__device__ __forceinline__ Values<T, N> evaluate_hard(const Vector<scalar_t, N>& logits,
                                                      const ElementMasks& masks,
                                                      const Loss& formula) {
  Values<T, N> values;
  if ((masks.positive | masks.ignored | masks.invalid) == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto value = formula.hard(static_cast<T>(logits.data[j]), formula.alpha.negative);
      values.loss[j] = value.loss;
      values.grad[j] = value.grad;
    }
    return values;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t bit = 1u << j;
    const T sign = masks.positive & bit ? T(-1) : T(1);
    const T s = masks.invalid & bit ? quiet_nan<T>() : sign * static_cast<T>(logits.data[j]);
    const T alpha_t = masks.positive & bit ? formula.alpha.positive : formula.alpha.negative;
    const auto value = formula.hard(s, alpha_t);
    values.loss[j] = masks.ignored & bit ? T(0) : value.loss;
    values.grad[j] = masks.ignored & bit ? T(0) : sign * value.grad;
  }
  return values;
}

// Rows may have these beside a class index; null where they have not.
template <typename T>
struct RowWeights {
  const T* weight;  // [rows]
  ClassWeights<T> class_weights;

  __device__ __forceinline__ T weight_of(int64_t row) const {
    return weight == nullptr ? T(1) : weight[row];
  }
  __device__ __forceinline__ T score_of(int64_t) const { return T(1); }
  __device__ __forceinline__ RowWeights from(int64_t row) const {
    return {weight == nullptr ? nullptr : weight + row, class_weights};
  }
};

// The quality losses also have the score of each row's object.
template <typename T>
struct RowExtras : RowWeights<T> {
  const T* scores;  // [rows]

  __device__ __forceinline__ T score_of(int64_t row) const {
    return scores == nullptr ? T(1) : scores[row];
  }
  __device__ __forceinline__ RowExtras from(int64_t row) const {
    return {RowWeights<T>::from(row), scores == nullptr ? nullptr : scores + row};
  }
};

// Does what evaluate_hard does, with the extras of N logits from `column` of `row` on. Most vectors
// are negatives of one row.
template <typename scalar_t, int N, typename Extras, typename Row, typename Loss,
          typename T = compute_t<scalar_t>>
__device__ __forceinline__ Values<T, N> evaluate_extras(const Vector<scalar_t, N>& logits,
                                                        const ElementMasks& masks,
                                                        const Extras& extras, Row row, Row num_rows,
                                                        int column, int num_classes,
                                                        const Loss& formula) {
  Values<T, N> values;
  if ((masks.positive | masks.ignored | masks.invalid) == 0 && column + N <= num_classes) {
    const T weight = extras.weight_of(row);
    const T* of_part = extras.class_weights.of(masks.part_of(1));
    T factors[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factors[j] = weight;
    }
    if (of_part != nullptr) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        factors[j] *= of_part[column + j];
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto value = of_class(formula, column + j).negative(static_cast<T>(logits.data[j]));
      values.loss[j] = factors[j] * value.loss;
      values.grad[j] = factors[j] * value.grad;
    }
    return values;
  }
#pragma unroll
  for (int j = 0; j < N; ++j, ++column) {
    if (column == num_classes) {
      column = 0;
      ++row;
    }
    const uint32_t bit = 1u << j;
    const T x = masks.invalid & bit ? quiet_nan<T>() : static_cast<T>(logits.data[j]);
    const auto& of_column = of_class(formula, column);
    LossAndGrad<T> value = of_column.negative(x);
    if (masks.positive & bit) {
      value = of_column.positive(x, extras.score_of(row));
    }
    const bool counts = !(masks.ignored & bit) && row < num_rows;
    const T factor =
        counts ? extras.weight_of(row) * extras.class_weights.at(masks.part_of(bit), column) : T(0);
    values.loss[j] = counts ? factor * value.loss : T(0);
    values.grad[j] = counts ? factor * value.grad : T(0);
  }
  return values;
}

// Rows of K logits, contiguous one after the other; Extras is void, RowWeights<T> or RowExtras<T>.
template <typename scalar_t_, typename Extras = void>
struct ClassIndexTargets {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;
  static constexpr int N = kVectorSize<scalar_t>;
  static constexpr int kBlocks = std::is_void_v<Extras> ? 3 : 2;

  Integers targets;
  int64_t num_rows;
  int num_classes;
  int64_t ignore_index;
  FastDivisor rows_of;
  std::conditional_t<std::is_void_v<Extras>, char, Extras> extras{};

  struct Chunk {
    int64_t row;
    uint32_t column;
  };

  __device__ __forceinline__ Chunk begin_chunk(int64_t begin) const {
    const int64_t row = begin / num_classes;
    return {row, static_cast<uint32_t>(begin - row * num_classes)};
  }

  // `offset` is the first logit's place in the chunk.
  template <typename Loss>
  __device__ __forceinline__ Values<T, N> evaluate(const Chunk& chunk, int64_t, int64_t,
                                                   uint32_t offset,
                                                   const Vector<scalar_t, N>& logits,
                                                   const Loss& formula) const {
    const uint32_t from_row = chunk.column + offset;
    const uint32_t rows = rows_of.divide(from_row);
    const int64_t row = chunk.row + rows;
    const uint32_t column = rows_of.remainder(from_row, rows);
    const auto masks =
        class_row_masks<N>(targets, row, num_rows, column, num_classes, ignore_index);
    if constexpr (std::is_void_v<Extras>) {
      return evaluate_hard(logits, masks, formula);
    } else {
      return evaluate_extras(logits, masks, extras, row, num_rows, static_cast<int>(column),
                             num_classes, formula);
    }
  }
};

// Adds up the losses of the elements i .. i + N of an array of `size`; nearly all vectors lie
// within it.
template <typename T, int N>
__device__ __forceinline__ T sum_losses(const Values<T, N>& values, int64_t i, int64_t size) {
  T sum = 0;
  if (i + N <= size) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum += values.loss[j];
    }
    return sum;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    sum += i + j < size ? values.loss[j] : T(0);
  }
  return sum;
}

template <typename scalar_t, typename T, int N>
__device__ __forceinline__ void store_gradient(scalar_t* grad, int64_t i, int64_t size,
                                               bool aligned, const Values<T, N>& values, T scale) {
  Vector<scalar_t, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    out.data[j] = static_cast<scalar_t>(scale * values.grad[j]);
  }
  store_vector(grad, i, size, aligned, out);
}

// One partial sum a block, added up by sum_partials_kernel: float32 within a chunk, float64 across
// chunks and blocks.
template <typename scalar_t, bool WithGrad>
struct SumLoss {
  using T = compute_t<scalar_t>;
  static constexpr int N = kVectorSize<scalar_t>;

  double* partials;
  scalar_t* grad_inputs;
  Normalizer<T> normalizer;
  double sum = 0;
  T scale = 1;  // of the gradient

  __device__ __forceinline__ void begin() {
    if constexpr (WithGrad) {
      scale = gradient_scale<scalar_t>(normalizer.divisor());
    }
  }

  __device__ __forceinline__ void take(const Values<T, N>& values, int64_t i, int64_t size) {
    sum += sum_losses(values, i, size);
    if constexpr (WithGrad) {
      store_gradient(grad_inputs, i, size, true, values, scale);
    }
  }

  __device__ __forceinline__ void finish() {
    const double block_total = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) {
      partials[blockIdx.x] = block_total;
    }
  }
};

// At least Targets::kBlocks blocks run on a multiprocessor: without a bound, ptxas settles on fewer
// registers and spills float64.
template <typename Loss, typename Targets, typename Sink>
__global__ void __launch_bounds__(kThreads, Targets::kBlocks)
    focal_loss_kernel(const typename Targets::scalar_t* inputs,  // [size]
                      int64_t size, bool aligned, Targets targets, Loss formula, Sink sink) {
  using scalar_t = typename Targets::scalar_t;
  constexpr int N = kVectorSize<scalar_t>;
  sink.begin();
  for (int64_t begin = blockIdx.x * kLogitsPerChunk<scalar_t>; begin < size;
       begin += gridDim.x * kLogitsPerChunk<scalar_t>) {
    const auto chunk = targets.begin_chunk(begin);
    Vector<scalar_t, N> logits[kUnroll<scalar_t>];
#pragma unroll
    for (int u = 0; u < kUnroll<scalar_t>; ++u) {
      logits[u] = load_vector<N>(inputs, begin + (u * kThreads + threadIdx.x) * N, size, aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<scalar_t>; ++u) {
      const uint32_t offset = (u * kThreads + threadIdx.x) * N;
      const int64_t i = begin + offset;
      if (i < size) {
        sink.take(targets.evaluate(chunk, i, size, offset, logits[u], formula), i, size);
      }
    }
  }
  sink.finish();
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const double* partials, int64_t count, Normalizer<T> normalizer, T* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += partials[i];
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    *loss = static_cast<T>(sum / normalizer.divisor());
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Targets, typename Loss, typename MakeSink>
void launch_focal_loss(const Tensor& inputs, const Targets& targets, const Loss& formula,
                       const LaunchScope& scope, const MakeSink& make_sink) {
  using scalar_t = typename Targets::scalar_t;
  const auto* logits = static_cast<const scalar_t*>(inputs.const_data_ptr());
  using Sink = decltype(make_sink(int64_t{}));
  auto* kernel = &focal_loss_kernel<Loss, Targets, Sink>;
  const int64_t chunks = ceil_div(inputs.numel(), kLogitsPerChunk<scalar_t>);
  const int64_t grid = resident_grid(kernel, kThreads, 0, chunks, scope);
  launch(kernel, grid, kThreads, 0, scope.stream(), logits, inputs.numel(), is_aligned(logits),
         targets, formula, make_sink(grid));
}

// The sum of the losses over the divisor, written to `loss`; the gradient goes to `grad`, where
// there is one. It may be `inputs` itself: each thread has read its logits before it writes there.
template <typename Targets, typename Loss>
void launch_sum(const Tensor& inputs, const Targets& targets, const Loss& formula,
                const std::optional<Tensor>& given, double min_normalizer,
                const std::optional<Tensor>& grad, const LaunchScope& scope, Tensor& loss) {
  using scalar_t = typename Targets::scalar_t;
  using T = compute_t<scalar_t>;
  const auto normalizer = normalizer_of<T>(given, min_normalizer);
  std::optional<Tensor> partials;
  int64_t count = 0;
  const auto new_partials = [&](int64_t grid) {
    count = grid;
    partials = torch::stable::new_empty(inputs, {grid}, ScalarType::Double);
    return static_cast<double*>(partials->mutable_data_ptr());
  };
  if (grad.has_value()) {
    auto* out = static_cast<scalar_t*>(grad->mutable_data_ptr());
    launch_focal_loss(inputs, targets, formula, scope, [&](int64_t grid) {
      return SumLoss<scalar_t, true>{new_partials(grid), out, normalizer};
    });
  } else {
    launch_focal_loss(inputs, targets, formula, scope, [&](int64_t grid) {
      return SumLoss<scalar_t, false>{new_partials(grid), nullptr, normalizer};
    });
  }
  launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(),
         static_cast<const double*>(partials->const_data_ptr()), count, normalizer,
         static_cast<T*>(loss.mutable_data_ptr()));
}

}  // namespace focalops
