// What the focal loss kernels share: from class indices to the losses and gradients of a 16-byte
// vector of logits, and the sum in a fixed order.
#pragma once

#include "../math/focal.h"
#include "launch.cuh"

namespace focalops {

constexpr int kThreads = 256;
// Vectors in flight: 64 bytes a thread. float64 is bound by arithmetic, and its values take two
// registers each.
template <typename scalar_t>
constexpr int kUnroll = std::is_same_v<scalar_t, double> ? 1 : 4;

template <typename scalar_t>
constexpr int64_t kChunk = int64_t{kThreads} * kUnroll<scalar_t> * kVectorSize<scalar_t>;

template <typename T>
__device__ constexpr T quiet_nan() {
  return static_cast<T>(__builtin_nanf(""));
}

template <typename T, int N>
struct Values {
  T loss[N];
  T grad[N];
};

// int32 or int64, told apart at run time: a second set of kernels would save nothing.
struct Indices {
  const void* data;
  bool is_int64;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  __device__ __forceinline__ Indices from(int64_t i) const {
    return {static_cast<const char*>(data) + i * (is_int64 ? 8 : 4), is_int64};
  }
};

// A bit for each logit of a vector. All are 0 in most vectors: nothing but negatives.
struct ElementMasks {
  uint32_t positive = 0, ignored = 0, invalid = 0;
};

// Of N logits from `column` of `row` on; rows are K contiguous logits.
template <int N, typename Row>
__device__ __forceinline__ ElementMasks class_row_masks(const Indices& targets, Row row,
                                                        Row num_rows, int column, int num_classes,
                                                        int64_t ignore_index) {
  ElementMasks masks;
  for (int first = -column; first < N && row < num_rows; first += num_classes, ++row) {
    const int64_t target = targets[row];
    if (target >= 0 && target < num_classes && target != ignore_index) {
      const int at = first + static_cast<int>(target);
      masks.positive |= at >= 0 && at < N ? 1u << at : 0u;
    } else if (target != num_classes || target == ignore_index) {
      const int last = first + num_classes;
      const uint32_t mask =
          (last < N ? (1u << last) - 1 : ~0u) & ~(first > 0 ? (1u << first) - 1 : 0u);
      (target == ignore_index ? masks.ignored : masks.invalid) |= mask;
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

template <typename T>
struct Normalizer {
  const T* value;  // null: there is none
  T least;
  bool per_image = false;  // value is [B]

  __device__ __forceinline__ T divisor(int64_t image = 0) const {
    if (value == nullptr) {
      return least;
    }
    const T given = value[per_image ? image : 0];
    return given < least ? least : given;  // a NaN stays
  }
};

// By what the forward multiplies a gradient. A float16 gradient over a large normalizer is 0 before
// a loss scaler can help: the backward divides it instead.
template <typename scalar_t, typename T>
__device__ __forceinline__ T gradient_scale(T divisor) {
  return std::is_same_v<scalar_t, Half> ? T(1) : 1 / divisor;
}

// Of the elements i .. i + N of an array of `size`.
template <typename T, int N>
__device__ __forceinline__ T sum_losses(const Values<T, N>& values, int64_t i, int64_t size) {
  T sum = 0;
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

}  // namespace focalops
