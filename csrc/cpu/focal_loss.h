// What the focal losses share on the CPU: a block of logits in the L1 cache, evaluated as vectors.
//
// Class-index targets name one positive in a row of K. A block of logits is loaded into a buffer in
// which each positive, and each logit of an ignored row, is replaced by -inf, at which a negative
// has loss 0 and gradient 0; what is left is one formula for the whole block. The few positives are
// added one by one.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>

#include "../checks.h"
#include "../math/focal.h"
#include "memory.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kBlock = 1024;  // logits in the buffers of one thread; they stay in the L1 cache
constexpr int64_t kChunk =
    16 *
    kBlock;  // the unit of parallel work, and of the sum's order: it is the same on any machine

template <bool WithGrad, typename T, typename Loss>
FOCALOPS_SIMD void evaluate_negatives(const T* s, T* loss, T* grad, int64_t n, Loss formula) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const LossAndGrad<T> value = formula.hard(s[i], formula.alpha.negative);
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

template <typename T, typename To>
FOCALOPS_SIMD void scale_and_convert(const T* from, T scale, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(scale * from[i]);
  }
}

template <typename T>
struct Block {
  alignas(64) T logits[kBlock];
  alignas(64) T targets[kBlock];
  alignas(64) T loss[kBlock];
  alignas(64) T grad[kBlock];
};

template <typename T>
constexpr T kNoLoss = -std::numeric_limits<T>::infinity();

template <typename T>
struct Positive {
  int64_t at;  // in the block
  T logit;
};

template <bool WithGrad, typename T, typename Loss>
void evaluate_positives(const Positive<T>* positives, int64_t count, const Loss& formula,
                        Block<T>& block) {
  for (int64_t i = 0; i < count; ++i) {
    const auto [at, logit] = positives[i];
    const LossAndGrad<T> value = formula.hard(-logit, formula.alpha.positive);
    block.loss[at] = value.loss;
    if (WithGrad) {
      block.grad[at] = -value.grad;
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

// The logits begin .. begin + n of rows of K.
template <bool WithGrad, typename scalar_t, typename index_t, typename Loss,
          typename T = compute_t<scalar_t>>
void evaluate_rows(const scalar_t* inputs, const index_t* targets, int64_t num_classes,
                   int64_t ignore_index, int64_t begin, int64_t n, const Loss& formula,
                   Block<T>& block, InvalidIndex& invalid) {
  Positive<T> positives[kBlock];
  int64_t num_positives = 0;

  convert(inputs + begin, block.logits, n);
  const int64_t end = begin + n;
  for (int64_t row = begin / num_classes; row * num_classes < end; ++row) {
    const int64_t row_begin =
        row * num_classes - begin;  // in the block, negative where the row began before it
    const int64_t target = targets[row];
    if (target == ignore_index) {
      const int64_t row_end = std::min(row_begin + num_classes, n);
      std::fill(block.logits + std::max<int64_t>(row_begin, 0), block.logits + row_end, kNoLoss<T>);
    } else if (target >= 0 && target < num_classes) {
      const int64_t at = row_begin + target;
      if (at >= 0 && at < n) {
        positives[num_positives++] = {at, block.logits[at]};
        block.logits[at] = kNoLoss<T>;
      }
    } else if (target != num_classes) {
      invalid.note(target);
    }
  }
  evaluate_negatives<WithGrad>(block.logits, block.loss, block.grad, n, formula);
  evaluate_positives<WithGrad>(positives, num_positives, formula, block);
}

// By what the forward multiplies a gradient. A float16 gradient over a large normalizer is 0 before
// a loss scaler can help: the backward divides it instead.
template <typename scalar_t, typename T>
T gradient_scale(T divisor) {
  return std::is_same_v<scalar_t, Half> ? T(1) : 1 / divisor;
}

template <typename T>
T clamped_divisor(T given, T least) {
  return given < least ? least : given;  // a NaN stays
}

// Uninitialised, of the shape, layout and dtype of a dense tensor.
Tensor new_like(const Tensor& tensor) {
  return on_huge_pages(torch::stable::empty_like(tensor), tensor.element_size());
}

}  // namespace
}  // namespace focalops
