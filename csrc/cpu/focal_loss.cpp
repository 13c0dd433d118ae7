// Sigmoid focal loss on the CPU: one pass over the logits, vectorised over elements, parallel over
// chunks.
#include <cstring>

#include "../checks/focal_loss.h"
#include "focal_loss.h"

namespace focalops {
namespace {

template <bool WithGrad, typename T, typename Loss>
FOCALOPS_SIMD void evaluate_soft(const T* x, const T* t, T* loss, T* grad, int64_t n,
                                 Loss formula) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const LossAndGrad<T> value = formula.soft(x[i], t[i]);
    loss[i] = value.loss;
    if (WithGrad) {
      grad[i] = value.grad;
    }
  }
}

// Whether all lie in [0, 1], told by one comparison each: as unsigned numbers the bits of what does
// not are larger than those of 1. So are those of -0.
template <typename T>
FOCALOPS_SIMD bool all_in_unit_interval(const T* t, int64_t n) {
  using Bits = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
  const T one = 1;
  Bits bits_of_one, largest = 0;
  std::memcpy(&bits_of_one, &one, sizeof one);
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, t + i, sizeof bits);
    largest = bits > largest ? bits : largest;
  }
  return largest <= bits_of_one;
}

template <typename T, typename To>
FOCALOPS_SIMD void multiply_and_convert(const T* a, const To* b, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(a[i] * static_cast<T>(b[i]));
  }
}

template <typename scalar_t, typename target_t>
struct DenseTargets {
  using T = compute_t<scalar_t>;

  const char* op;
  const scalar_t* inputs;
  const target_t* targets;
  std::atomic<bool> are_targets{true};
  std::atomic<double> wrong{0};  // a target that is none

  template <bool WithGrad, typename Loss>
  void evaluate(int64_t begin, int64_t n, const Loss& formula, Block<T>& block) {
    const T* x = as_computed(inputs + begin, block.logits, n);
    const T* y = as_computed(targets + begin, block.targets, n);
    evaluate_soft<WithGrad>(x, y, block.loss, block.grad, n, formula);
    if (!all_in_unit_interval(y, n)) {
      const T* first = std::find_if_not(y, y + n, is_dense_target<T>);
      if (first != y + n) {
        wrong.store(*first, std::memory_order_relaxed);
        are_targets.store(false, std::memory_order_relaxed);
      }
    }
  }

  void finish() const {
    if (!are_targets.load()) {
      fail(op, ": dense targets must lie in [0, 1], got ", wrong.load());
    }
  }
};

// Calls f(scalar type tag, targets) with a DenseTargets or a ClassIndexTargets.
template <typename F>
void dispatch_targets(const char* op, const Tensor& inputs, const Tensor& targets,
                      int64_t ignore_index, F&& f) {
  dispatch_floating(inputs.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* logits = static_cast<const scalar_t*>(inputs.const_data_ptr());
    if (!targets_are_dense(inputs, targets)) {
      dispatch_index(targets.scalar_type(), [&](auto index_tag) {
        using index_t = tag_t<decltype(index_tag)>;
        ClassIndexTargets<scalar_t, index_t> classes{
            op, logits, static_cast<const index_t*>(targets.const_data_ptr()),
            inputs.size(inputs.dim() - 1), ignore_index};
        f(tag, classes);
      });
    } else if (targets.scalar_type() == inputs.scalar_type()) {
      DenseTargets<scalar_t, scalar_t> dense{
          op, logits, static_cast<const scalar_t*>(targets.const_data_ptr())};
      f(tag, dense);
    } else {
      DenseTargets<scalar_t, T> dense{op, logits, static_cast<const T*>(targets.const_data_ptr())};
      f(tag, dense);
    }
  });
}

Tensor sigmoid_focal_loss_cpu(const Tensor& inputs_, const Tensor& targets_, double alpha,
                              double gamma, std::optional<double> beta, int64_t ignore_index) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss(inputs_, targets_, params);
  const Tensor inputs = torch::stable::contiguous(inputs_),
               targets = torch::stable::contiguous(targets_);
  Tensor output = new_like(inputs);
  dispatch_targets(focal_loss_name(params), inputs, targets, ignore_index,
                   [&](auto tag, auto& evaluator) {
                     using scalar_t = tag_t<decltype(tag)>;
                     auto* out = static_cast<scalar_t*>(output.mutable_data_ptr());
                     dispatch_focal_loss<compute_t<scalar_t>>(params, [&](const auto& formula) {
                       for_each_block<false>(evaluator, inputs.numel(), formula,
                                             [&](int64_t begin, int64_t n, const auto& block) {
                                               convert(block.loss, out + begin, n);
                                             });
                     });
                   });
  return output;
}

Tensor sigmoid_focal_loss_backward_cpu(const Tensor& grad_output_, const Tensor& inputs_,
                                       const Tensor& targets_, double alpha, double gamma,
                                       std::optional<double> beta, int64_t ignore_index) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss_backward(grad_output_, inputs_, targets_, params);
  const Tensor inputs = torch::stable::contiguous(inputs_),
               targets = torch::stable::contiguous(targets_);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  Tensor grad_inputs = new_like(inputs);
  dispatch_targets(
      focal_loss_name(params), inputs, targets, ignore_index, [&](auto tag, auto& evaluator) {
        using scalar_t = tag_t<decltype(tag)>;
        const auto* upstream = static_cast<const scalar_t*>(grad_output.const_data_ptr());
        auto* out = static_cast<scalar_t*>(grad_inputs.mutable_data_ptr());
        dispatch_focal_loss<compute_t<scalar_t>>(params, [&](const auto& formula) {
          for_each_block<true>(evaluator, inputs.numel(), formula,
                               [&](int64_t begin, int64_t n, const auto& block) {
                                 multiply_and_convert(block.grad, upstream + begin, out + begin, n);
                               });
        });
      });
  return grad_inputs;
}

// Writes the gradient into `grad`, where there is one; it may be `inputs` itself.
Tensor focal_loss_sum(const Tensor& inputs, const Tensor& targets_, const FocalParams& params,
                      int64_t ignore_index, const std::optional<Tensor>& normalizer,
                      double min_normalizer, const std::optional<Tensor>& grad) {
  const Tensor targets = torch::stable::contiguous(targets_);
  Tensor loss = torch::stable::new_empty(inputs, {}, compute_dtype(inputs.scalar_type()));
  dispatch_targets(focal_loss_name(params), inputs, targets, ignore_index,
                   [&](auto tag, auto& evaluator) {
                     using scalar_t = tag_t<decltype(tag)>;
                     dispatch_focal_loss<compute_t<scalar_t>>(params, [&](const auto& formula) {
                       sum_losses<scalar_t>(evaluator, inputs.numel(), formula, normalizer,
                                            min_normalizer, grad, loss);
                     });
                   });
  return loss;
}

std::tuple<Tensor, Tensor> sigmoid_focal_loss_sum_cpu(const Tensor& inputs_, const Tensor& targets,
                                                      double alpha, double gamma,
                                                      std::optional<double> beta,
                                                      int64_t ignore_index,
                                                      const std::optional<Tensor>& normalizer,
                                                      double min_normalizer, bool compute_grad) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss_sum(inputs_, targets, params, normalizer);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  std::optional<Tensor> grad;
  if (compute_grad) {
    grad = new_like(inputs);
  }
  Tensor loss =
      focal_loss_sum(inputs, targets, params, ignore_index, normalizer, min_normalizer, grad);
  return {loss, compute_grad ? *grad : torch::stable::new_empty(inputs, {0})};
}

Tensor sigmoid_focal_loss_sum_inplace_cpu(const Tensor& inputs, const Tensor& targets, double alpha,
                                          double gamma, std::optional<double> beta,
                                          int64_t ignore_index,
                                          const std::optional<Tensor>& normalizer,
                                          double min_normalizer) {
  const FocalParams params{alpha, gamma, beta};
  check_focal_loss_sum(inputs, targets, params, normalizer);
  check_overwritten_rows(focal_loss_name(params), inputs);
  return focal_loss_sum(inputs, targets, params, ignore_index, normalizer, min_normalizer, inputs);
}

template <typename scalar_t, typename T>
FOCALOPS_SIMD void scale(scalar_t* data, T factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    data[i] = static_cast<scalar_t>(factor * static_cast<T>(data[i]));
  }
}

void scale_cpu(const Tensor& tensor, const Tensor& factors_) {
  check_scale(tensor, factors_);
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* factors = static_cast<const T*>(factors_.const_data_ptr());
    const int64_t size = tensor.numel() / std::max<int64_t>(factors_.numel(), 1);
    for (int64_t slice = 0; slice < factors_.numel(); ++slice) {
      const T factor = factors[slice];
      if (factor == 1) {
        continue;
      }
      auto* data = static_cast<scalar_t*>(tensor.mutable_data_ptr()) + slice * size;
      torch::stable::parallel_for(0, size, kChunk, [&](int64_t begin, int64_t end) {
        scale(data + begin, factor, end - begin);
      });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss_cpu));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward_cpu));
  m.impl("sigmoid_focal_loss_sum", TORCH_BOX(&sigmoid_focal_loss_sum_cpu));
  m.impl("_sigmoid_focal_loss_sum_", TORCH_BOX(&sigmoid_focal_loss_sum_inplace_cpu));
  m.impl("_scale_", TORCH_BOX(&scale_cpu));
}

}  // namespace focalops
