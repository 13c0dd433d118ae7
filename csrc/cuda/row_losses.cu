// The losses of rows with a weight, a score or smoothed targets, on CUDA: the kernel of
// focal_loss.cu, in which every logit is evaluated as a negative and the one of the true class
// anew. The weights of the columns come from the L1 cache.
//
// Bytes moved, s = size of the logits: loss 1s, with gradient 2s; a class index, and what else
// there is of a row.
#include "../checks/row_losses.h"
#include "../math/row_losses.h"
#include "focal_loss.cuh"
#include "softmax_focal_loss.cuh"

namespace focalops {
namespace {

Tensor row_loss(const std::string& name, const Tensor& inputs, const Tensor& targets_,
                const std::optional<Tensor>& scores_, const std::vector<double>& parameters,
                const std::optional<Tensor>& weight_, const std::optional<Tensor>& class_weight_,
                int64_t ignore_index, const std::optional<Tensor>& normalizer,
                double min_normalizer, const std::optional<Tensor>& grad,
                const LaunchScope& scope) {
  const Tensor targets = torch::stable::contiguous(targets_);
  const auto scores = contiguous(scores_), weight = contiguous(weight_),
             class_weight = contiguous(class_weight_);
  Tensor loss = torch::stable::new_empty(inputs, {}, compute_dtype(inputs.scalar_type()));
  if (inputs.numel() == 0) {
    return torch::stable::zero_(loss);
  }
  const auto run = [&](auto member, auto tag) {
    using Loss = decltype(member);
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const int64_t num_classes = inputs.size(inputs.dim() - 1);
    if constexpr (Loss::kIsSoftmax) {
      const SoftmaxRows<scalar_t> rows{static_cast<const scalar_t*>(inputs.const_data_ptr()),
                                       Integers(targets),
                                       targets.numel(),
                                       static_cast<int>(num_classes),
                                       ignore_index,
                                       {data_of<T>(weight), class_weights_of<T>(class_weight)},
                                       kWarpSize};
      Loss::template dispatch<T>(parameters, [&](const auto& formula) {
        launch_softmax_sum(inputs, rows, formula, normalizer, min_normalizer, grad, scope, loss);
      });
    } else {
      const ClassIndexTargets<scalar_t, RowExtras<T>> rows{
          Integers(targets),
          targets.numel(),
          static_cast<int>(num_classes),
          ignore_index,
          FastDivisor(num_classes),
          {data_of<T>(weight), class_weights_of<T>(class_weight), data_of<T>(scores)}};
      Loss::template dispatch<T>(parameters, [&](const auto& formula) {
        launch_sum(inputs, rows, formula, normalizer, min_normalizer, grad, scope, loss);
      });
    }
  };
  with_row_loss("row_loss_sum", name, [&](auto member) {
    dispatch_floating(inputs.scalar_type(), [&](auto tag) { run(member, tag); });
  });
  return loss;
}

std::tuple<Tensor, Tensor> row_loss_sum_cuda(
    const Tensor& inputs_, const Tensor& targets, const std::optional<Tensor>& scores,
    const Name& name, const std::vector<double>& parameters, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& class_weight, int64_t ignore_index,
    const std::optional<Tensor>& normalizer, double min_normalizer, bool compute_grad) {
  check_row_loss(name, inputs_, targets, scores, parameters, weight, class_weight, normalizer);
  const LaunchScope scope(inputs_);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  std::optional<Tensor> grad;
  if (compute_grad) {
    grad = torch::stable::empty_like(inputs);
  }
  Tensor loss = row_loss(name, inputs, targets, scores, parameters, weight, class_weight,
                         ignore_index, normalizer, min_normalizer, grad, scope);
  return {loss, compute_grad ? *grad : torch::stable::new_empty(inputs, {0})};
}

Tensor row_loss_sum_inplace_cuda(const Tensor& inputs, const Tensor& targets,
                                 const std::optional<Tensor>& scores, const Name& name,
                                 const std::vector<double>& parameters,
                                 const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                 const std::optional<Tensor>& normalizer, double min_normalizer) {
  check_row_loss(name, inputs, targets, scores, parameters, weight, class_weight, normalizer);
  check_overwritten_rows(name.c_str(), inputs);
  return row_loss(name, inputs, targets, scores, parameters, weight, class_weight, ignore_index,
                  normalizer, min_normalizer, inputs, LaunchScope(inputs));
}

// The indices themselves are not looked at, which would stop the device.
Tensor class_indices_cuda(const Tensor& targets, const Name& loss, int64_t, int64_t) {
  check_class_indices(targets, loss);
  return torch::stable::clone(targets);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("row_loss_sum", TORCH_BOX(&row_loss_sum_cuda));
  m.impl("_class_indices", TORCH_BOX(&class_indices_cuda));
  m.impl("_row_loss_sum_", TORCH_BOX(&row_loss_sum_inplace_cuda));
}

}  // namespace focalops
