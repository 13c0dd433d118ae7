// The softmax focal loss on CUDA: up to a warp a row, as many lanes as it has vectors.
//
// The first pass keeps the largest logit so far and the sum of the exponentials over it; the second
// one, for the gradient, finds the row in the L1 cache.
//
// Bytes moved, s = size of the logits: loss 1s, with gradient 2s; and a class index a row.
#pragma once

#include "../math/row_losses.h"
#include "focal_loss.cuh"

namespace focalops {

template <typename scalar_t_>
struct SoftmaxRows {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;

  const scalar_t* inputs;  // [num_rows, num_classes]
  Integers targets;
  int64_t num_rows;
  int num_classes;
  int64_t ignore_index;
  RowWeights<T> weights;
  int lanes;  // of a row, a power of two
};

// Where Vectorised, every row begins and ends at a multiple of 16 bytes.
template <bool WithGrad, bool Vectorised, typename scalar_t, typename T = compute_t<scalar_t>>
__global__ void __launch_bounds__(kThreads)
    softmax_focal_loss_kernel(SoftmaxRows<scalar_t> rows, SoftmaxFocalLoss<T> formula,
                              Normalizer<T> normalizer, scalar_t* grad, double* partials) {
  constexpr int N = Vectorised ? kVectorSize<scalar_t> : 1;
  const int groups = kThreads / rows.lanes;
  const int group = threadIdx.x / rows.lanes, lane = threadIdx.x % rows.lanes;
  const int stride = rows.lanes * N, num_classes = rows.num_classes;
  const T scale = gradient_scale<scalar_t>(normalizer.divisor());
  double sum = 0;
  for (int64_t first = int64_t{blockIdx.x} * groups; first < rows.num_rows;
       first += int64_t{gridDim.x} * groups) {
    const int64_t row = first + group;
    const bool exists = row < rows.num_rows;
    const int64_t target = exists ? rows.targets[row] : rows.ignore_index;
    const bool counts = target != rows.ignore_index;
    const scalar_t* inputs = rows.inputs + row * num_classes;

    T largest = -detail::largest(T()), others = 0;
    for (int i = lane * N; counts && i < num_classes; i += stride) {
      const auto logits = *reinterpret_cast<const Vector<scalar_t, N>*>(inputs + i);
      const T before = largest;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T x = static_cast<T>(logits.data[j]);
        largest = x > largest ? x : largest;
      }
      others *= detail::exp_nonpositive(before - largest);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T e = detail::exp_nonpositive(static_cast<T>(logits.data[j]) - largest);
        others += i + j == target ? T(0) : e;
      }
    }
    for (int offset = rows.lanes / 2; offset > 0; offset /= 2) {
      const T before = largest, of_other = __shfl_xor_sync(kFullWarp, largest, offset);
      largest = of_other > largest ? of_other : largest;
      others *= detail::exp_nonpositive(before - largest);
      others += __shfl_xor_sync(kFullWarp, others, offset);
    }

    typename SoftmaxFocalLoss<T>::Value value{0, 0, 0};
    T weight = 0;
    const bool is_class = counts && target >= 0 && target < num_classes;
    if (counts) {
      weight = is_class
                   ? rows.weights.weight_of(row) * rows.weights.class_weights.at(kPositive, target)
                   : quiet_nan<T>();
      value = formula.evaluate(is_class ? static_cast<T>(inputs[target]) - largest : T(0), others);
      sum += lane == 0 ? static_cast<double>(weight * value.loss) : 0.0;
    }
    if constexpr (WithGrad) {
      __syncwarp();  // every lane has read the true class's logit, which the gradient may replace
      scalar_t* row_grad = grad + row * num_classes;
      const T factor = scale * weight * value.grad_factor;
      for (int i = lane * N; exists && i < num_classes; i += stride) {
        Vector<scalar_t, N> vector = *reinterpret_cast<const Vector<scalar_t, N>*>(inputs + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const T x = counts ? static_cast<T>(vector.data[j]) - largest : T(0);
          vector.data[j] = static_cast<scalar_t>(factor * detail::exp_nonpositive(x));
        }
        if constexpr (Vectorised) {
          // An ordinary store here is split into scalar ones by nvcc 13 for sm_80 and sm_90.
          __stwb(reinterpret_cast<uint4*>(row_grad + i), reinterpret_cast<const uint4&>(vector));
        } else {
          row_grad[i] = vector.data[0];
        }
      }
      if (is_class &&
          lane == target / N % rows.lanes) {  // this lane has stored it as one of the others
        row_grad[target] = static_cast<scalar_t>(scale * weight * value.grad_true);
      }
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

// Does what launch_sum does.
template <typename scalar_t, typename T = compute_t<scalar_t>>
void launch_softmax_sum(const Tensor& inputs, SoftmaxRows<scalar_t> rows,
                        const SoftmaxFocalLoss<T>& formula, const std::optional<Tensor>& given,
                        double min_normalizer, const std::optional<Tensor>& grad,
                        const LaunchScope& scope, Tensor& loss) {
  const auto normalizer = normalizer_of<T>(given, min_normalizer);
  auto* out = grad.has_value() ? static_cast<scalar_t*>(grad->mutable_data_ptr()) : nullptr;
  const bool vectorised =
      rows.num_classes % kVectorSize<scalar_t> == 0 && is_aligned(rows.inputs) && is_aligned(out);
  const int vector_size = vectorised ? kVectorSize<scalar_t> : 1;
  rows.lanes = 1;
  while (rows.lanes < kWarpSize && rows.lanes * vector_size < rows.num_classes) {
    rows.lanes *= 2;
  }
  auto* kernel = out == nullptr ? (vectorised ? &softmax_focal_loss_kernel<false, true, scalar_t>
                                              : &softmax_focal_loss_kernel<false, false, scalar_t>)
                                : (vectorised ? &softmax_focal_loss_kernel<true, true, scalar_t>
                                              : &softmax_focal_loss_kernel<true, false, scalar_t>);
  const int64_t work = ceil_div(rows.num_rows, kThreads / rows.lanes);
  const int64_t grid = resident_grid(kernel, kThreads, 0, work, scope);
  Tensor partials = torch::stable::new_empty(inputs, {grid}, ScalarType::Double);
  auto* sums = static_cast<double*>(partials.mutable_data_ptr());
  launch(kernel, grid, kThreads, 0, scope.stream(), rows, formula, normalizer, out, sums);
  launch(&sum_partials_kernel<T>, 1, kThreads, 0, scope.stream(), sums, grid, normalizer,
         static_cast<T*>(loss.mutable_data_ptr()));
}

}  // namespace focalops
