// The focal losses share this on the CPU: a block of logits in the L1 cache, evaluated as vectors.
//
// Class-index targets name one positive in a row of K. A block of logits is loaded into a buffer
// and evaluated as if all were negatives, one formula for the whole block; then the few positives
// are evaluated one by one, and ignored rows set to 0.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../class_weights.h"
#include "../dtypes.h"
#include "../math/focal.h"
#include "../normalizer.h"
#include "memory.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kBlock = 1024;  // logits in the buffers of one thread; they stay in the L1 cache
// The unit of parallel work, and of the sum's order, which is the same on any machine.
constexpr int64_t kLogitsPerChunk = 16 * kBlock;

template <bool WithGrad, typename T, typename Loss>
FOCALOPS_SIMD void evaluate_negatives(const T* x, T* loss, T* grad, int64_t n, Loss formula,
                                      int64_t) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const LossAndGrad<T> value = formula.negative(x[i]);
    loss[i] = value.loss;
    if (WithGrad) {
      grad[i] = value.grad;
    }
  }
}

template <bool WithGrad, typename T>
void evaluate_negatives(const T* x, T* loss, T* grad, int64_t n,
                        const FocalLoss<T, kAnyGamma>& formula, int64_t column) {
  if (formula.gamma == T(1.5)) {
    const FocalLoss<T, kThreeHalves> known{formula.alpha, formula.gamma};
    return evaluate_negatives<WithGrad, T, FocalLoss<T, kThreeHalves>>(x, loss, grad, n, known,
                                                                       column);
  }
  evaluate_negatives<WithGrad, T, FocalLoss<T, kAnyGamma>>(x, loss, grad, n, formula, column);
}

// `column` is the first logit's in its row. The formula knows what follows the last class too:
// there the first one comes again. `omp simd` would make an array in memory of the classes'
// formulas.
template <bool WithGrad, typename T>
FOCALOPS_SIMD void evaluate_negatives(const T* x, T* loss, T* grad, int64_t n,
                                      FocalLossByClass<T> formula, int64_t column) {
  const T* gamma = formula.gamma + column;
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const FocalLoss<T, kAnyGamma> of_column{formula.alpha, gamma[i]};
    const LossAndGrad<T> value = of_column.negative(x[i]);
    loss[i] = value.loss;
    if (WithGrad) {
      grad[i] = value.grad;
    }
  }
}

template <typename T>
FOCALOPS_SIMD T sum_of(const T* values, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += values[i];
  }
  return sum;
}

template <typename From, typename To>
FOCALOPS_SIMD void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

// Returns the values as they are computed: those of half precision are converted into the buffer.
template <typename From, typename T>
const T* as_computed(const From* from, T* buffer, int64_t n) {
  if constexpr (std::is_same_v<From, T>) {
    return from;
  } else {
    convert(from, buffer, n);
    return buffer;
  }
}

template <typename T, typename To>
FOCALOPS_SIMD void scale_and_convert(const T* from, T scale, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(scale * from[i]);
  }
}

template <typename T>
FOCALOPS_SIMD void multiply(T* values, const T* factors, T factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    values[i] *= factors[i] * factor;
  }
}

template <typename T>
FOCALOPS_SIMD void multiply_to(T* out, const T* numbers, T factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = numbers[i] * factor;
  }
}

template <typename T>
struct Block {
  alignas(64) T logits[kBlock];   // where they are of half precision
  alignas(64) T targets[kBlock];  // likewise
  alignas(64) T weights[kBlock];
  alignas(64) T loss[kBlock];
  alignas(64) T grad[kBlock];
};

template <typename T>
struct Positive {
  int64_t at;  // in the block
  T score;
};

struct Range {
  int64_t begin, end;  // in the block
};

// Rows may have these beside a class index; null where they have not.
template <typename T>
struct RowExtras {
  const T* weight = nullptr;  // [rows]
  ClassWeights<T> class_weights{};
  const T* scores = nullptr;  // [rows]

  bool weighs() const { return weight != nullptr || class_weights.data != nullptr; }
  T weight_of(int64_t row) const { return weight == nullptr ? T(1) : weight[row]; }
  T score_of(int64_t row) const { return scores == nullptr ? T(1) : scores[row]; }

  RowExtras from(int64_t row) const {
    return {weight == nullptr ? nullptr : weight + row, class_weights,
            scores == nullptr ? nullptr : scores + row};
  }
};

template <bool WithGrad, typename T, typename Loss>
void evaluate_positives(const T* logits, const Positive<T>* positives, int64_t count,
                        const Loss& formula, int64_t column, Block<T>& block) {
  for (int64_t i = 0; i < count; ++i) {
    const auto [at, score] = positives[i];
    const LossAndGrad<T> value = of_class(formula, column + at).positive(logits[at], score);
    block.loss[at] = value.loss;
    if (WithGrad) {
      block.grad[at] = value.grad;
    }
  }
}

template <bool WithGrad, typename T>
void weigh(Block<T>& block, T factor, int64_t n) {
  multiply(block.loss, block.weights, factor, n);
  if (WithGrad) {
    multiply(block.grad, block.weights, factor, n);
  }
}

template <bool WithGrad, typename T>
void clear(const Range* ignored, int64_t count, Block<T>& block) {
  for (int64_t i = 0; i < count; ++i) {
    std::fill(block.loss + ignored[i].begin, block.loss + ignored[i].end, T(0));
    if (WithGrad) {
      std::fill(block.grad + ignored[i].begin, block.grad + ignored[i].end, T(0));
    }
  }
}

// Remembers one class index that is none, from any thread.
class InvalidIndex {
 public:
  void note(int64_t index) { index_.store(index, std::memory_order_relaxed); }

  void check(const char* op, const char* name, int64_t num_classes, int64_t ignore_index) const {
    const int64_t index = index_.load();
    if (index != kNone) {
      fail(op, ": ", name, " must lie in [0, ", num_classes, "] or equal ignore_index, ",
           ignore_index, ", got ", index);
    }
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::min();
  std::atomic<int64_t> index_{kNone};
};

// Evaluates the logits begin .. begin + n of rows of K.
template <bool WithGrad, typename scalar_t, typename index_t, typename Loss,
          typename T = compute_t<scalar_t>>
void evaluate_rows(const scalar_t* inputs, const index_t* targets, const RowExtras<T>& extras,
                   int64_t num_classes, int64_t ignore_index, int64_t begin, int64_t n,
                   const Loss& formula, Block<T>& block, InvalidIndex& invalid) {
  Positive<T> positives[kBlock];
  Range ignored[kBlock];
  int64_t num_positives = 0, num_ignored = 0;

  const T* logits = as_computed(inputs + begin, block.logits, n);
  const int64_t end = begin + n, first_row = begin / num_classes;
  const int64_t column = begin - first_row * num_classes;
  for (int64_t row = first_row; row * num_classes < end; ++row) {
    const int64_t row_begin =
        row * num_classes - begin;  // in the block, negative where the row began before it
    const Range range{std::max<int64_t>(row_begin, 0), std::min(row_begin + num_classes, n)};
    const int64_t target = targets[row];
    const bool is_class = target >= 0 && target < num_classes;
    if (extras.weighs()) {
      const T weight = extras.weight_of(row);
      const ClassPart part = is_class ? kNegativeOfForeground : kNegativeOfBackground;
      T* const weights = block.weights + range.begin;
      if (const T* of_part = extras.class_weights.of(part)) {
        const int64_t first = range.begin - row_begin;
        multiply_to(weights, of_part + first, weight, range.end - range.begin);
      } else {
        std::fill(weights, block.weights + range.end, weight);
      }
    }
    if (target == ignore_index) {
      ignored[num_ignored++] = range;
    } else if (is_class) {
      const int64_t at = row_begin + target;
      if (at >= 0 && at < n) {
        positives[num_positives++] = {at, extras.score_of(row)};
        block.weights[at] = extras.weight_of(row) * extras.class_weights.at(kPositive, target);
      }
    } else if (target != num_classes) {
      invalid.note(target);
    }
  }
  evaluate_negatives<WithGrad>(logits, block.loss, block.grad, n, formula, column);
  evaluate_positives<WithGrad>(logits, positives, num_positives, formula, column, block);
  if (extras.weighs()) {
    weigh<WithGrad>(block, T(1), n);
  }
  clear<WithGrad>(ignored, num_ignored, block);
}

// Class-index targets of contiguous rows, and their extras.
template <typename scalar_t, typename index_t>
struct ClassIndexTargets {
  using T = compute_t<scalar_t>;

  const char* op;
  const scalar_t* inputs;
  const index_t* targets;
  int64_t num_classes;
  int64_t ignore_index;
  RowExtras<T> extras{};
  InvalidIndex invalid{};

  template <bool WithGrad, typename Loss>
  void evaluate(int64_t begin, int64_t n, const Loss& formula, Block<T>& block) {
    evaluate_rows<WithGrad>(inputs, targets, extras, num_classes, ignore_index, begin, n, formula,
                            block, invalid);
  }

  void finish() const { invalid.check(op, "class-index targets", num_classes, ignore_index); }
};

// Evaluates the loss (and the gradient) of every logit and hands each block to consume(begin, n,
// block).
template <bool WithGrad, typename Targets, typename Loss, typename Consume>
void for_each_block(Targets& targets, int64_t numel, const Loss& formula, const Consume& consume) {
  using T = typename Targets::T;
  const int64_t num_chunks = (numel + kLogitsPerChunk - 1) / kLogitsPerChunk;
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    Block<T> block;
    const int64_t end = std::min(last_chunk * kLogitsPerChunk, numel);
    for (int64_t begin = first_chunk * kLogitsPerChunk; begin < end; begin += kBlock) {
      const int64_t n = std::min(kBlock, end - begin);
      targets.template evaluate<WithGrad>(begin, n, formula, block);
      consume(begin, n, block);
    }
  });
  targets.finish();
}

// The sum of the losses over the divisor, written to `loss`; the gradient goes to `grad`, where
// there is one; it may be the logits themselves.
template <typename scalar_t, typename Targets, typename Loss, typename T = compute_t<scalar_t>>
void sum_losses(Targets& targets, int64_t numel, const Loss& formula,
                const std::optional<Tensor>& normalizer, double min_normalizer,
                const std::optional<Tensor>& grad, Tensor& loss) {
  const T divisor = normalizer_of<T>(normalizer, min_normalizer).divisor();
  const T grad_scale = gradient_scale<scalar_t>(divisor);
  std::vector<double> block_sums((numel + kBlock - 1) / kBlock);
  if (grad.has_value()) {
    auto* out = static_cast<scalar_t*>(grad->mutable_data_ptr());
    for_each_block<true>(targets, numel, formula,
                         [&](int64_t begin, int64_t n, const Block<T>& block) {
                           block_sums[begin / kBlock] = sum_of(block.loss, n);
                           scale_and_convert(block.grad, grad_scale, out + begin, n);
                         });
  } else {
    for_each_block<false>(targets, numel, formula,
                          [&](int64_t begin, int64_t n, const Block<T>& block) {
                            block_sums[begin / kBlock] = sum_of(block.loss, n);
                          });
  }
  double sum = 0;
  for (const double block_sum : block_sums) {
    sum += block_sum;
  }
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(sum / divisor);
}

// Uninitialised, of the shape, layout and dtype of a dense tensor.
Tensor new_like(const Tensor& tensor) {
  return on_huge_pages(torch::stable::empty_like(tensor), tensor.element_size());
}

}  // namespace
}  // namespace focalops
