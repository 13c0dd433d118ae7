// The softmax focal loss on the CPU: a row at a time, which stays in the L1 cache for any usual
// number of classes, evaluated as a vector.
#pragma once

#include "../math/row_losses.h"
#include "focal_loss.h"

namespace focalops {
namespace {

template <typename T>
FOCALOPS_SIMD T largest_of(const T* x, int64_t n) {
  T largest = -detail::largest(T());
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    largest = x[i] > largest ? x[i] : largest;
  }
  return largest;
}

// Replaces x by exp(x - largest) and returns the sum.
template <typename T>
FOCALOPS_SIMD T exponentials(T* x, T largest, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = detail::exp_nonpositive(x[i] - largest);
    sum += x[i];
  }
  return sum;
}

// Does what sum_losses does, for class-index targets.
template <typename scalar_t, typename index_t, typename T = compute_t<scalar_t>>
void sum_softmax_losses(ClassIndexTargets<scalar_t, index_t>& rows, int64_t num_rows,
                        const SoftmaxFocalLoss<T>& formula, const std::optional<Tensor>& normalizer,
                        double min_normalizer, const std::optional<Tensor>& grad, Tensor& loss) {
  const int64_t num_classes = rows.num_classes;
  const T divisor = normalizer_of<T>(normalizer, min_normalizer).divisor();
  const T grad_scale = gradient_scale<scalar_t>(divisor);
  auto* out = grad.has_value() ? static_cast<scalar_t*>(grad->mutable_data_ptr()) : nullptr;
  const int64_t rows_of_chunk = std::max<int64_t>(kLogitsPerChunk / num_classes, 1);
  std::vector<double> sums((num_rows + rows_of_chunk - 1) / rows_of_chunk);

  torch::stable::parallel_for(0, sums.size(), 1, [&](int64_t first_chunk, int64_t last_chunk) {
    std::vector<T> x(num_classes);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      const int64_t end = std::min((chunk + 1) * rows_of_chunk, num_rows);
      for (int64_t row = chunk * rows_of_chunk; row < end; ++row) {
        scalar_t* row_grad = out == nullptr ? nullptr : out + row * num_classes;
        const int64_t target = rows.targets[row];
        const bool is_class = target >= 0 && target < num_classes;
        if (target == rows.ignore_index || !is_class) {
          if (target != rows.ignore_index) {
            rows.invalid.note(target);
          }
          if (row_grad != nullptr) {
            std::fill(row_grad, row_grad + num_classes, static_cast<scalar_t>(T(0)));
          }
          continue;
        }
        convert(rows.inputs + row * num_classes, x.data(), num_classes);
        const T largest = largest_of(x.data(), num_classes), true_logit = x[target];
        x[target] = -std::numeric_limits<T>::infinity();  // leaves the sum of the others
        const T others = exponentials(x.data(), largest, num_classes);
        const auto value = formula.evaluate(true_logit - largest, others);
        const T weight =
            rows.extras.weight_of(row) * rows.extras.class_weights.at(kPositive, target);
        sums[chunk] += weight * value.loss;
        if (row_grad != nullptr) {
          const T scale = weight * grad_scale;
          scale_and_convert(x.data(), scale * value.grad_factor, row_grad, num_classes);
          row_grad[target] = static_cast<scalar_t>(scale * value.grad_true);
        }
      }
    }
  });
  rows.invalid.check(rows.op, "class-index targets", num_classes - 1, rows.ignore_index);
  double sum = 0;
  for (const double chunk_sum : sums) {
    sum += chunk_sum;
  }
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(sum / divisor);
}

}  // namespace
}  // namespace focalops
