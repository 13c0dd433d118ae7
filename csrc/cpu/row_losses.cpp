// The losses of rows with a weight, a score or smoothed targets, on the CPU: one pass over the
// logits, as in focal_loss.cpp.
#include "focal_loss.h"
#include "softmax_focal_loss.h"

namespace focalops {
namespace {

Tensor row_loss(const Tensor& inputs, const Tensor& targets_, const std::optional<Tensor>& scores_,
                int64_t loss_id, const std::vector<double>& parameters,
                const std::optional<Tensor>& weight_, const std::optional<Tensor>& class_weight_,
                int64_t ignore_index, const std::optional<Tensor>& normalizer,
                double min_normalizer, const std::optional<Tensor>& grad) {
  const Tensor targets = torch::stable::contiguous(targets_);
  const auto scores = contiguous(scores_), weight = contiguous(weight_),
             class_weight = contiguous(class_weight_);
  Tensor loss = torch::stable::new_empty(inputs, {}, compute_dtype(inputs.scalar_type()));
  if (inputs.numel() == 0) {
    return torch::stable::zero_(loss);
  }
  const auto run = [&](auto scalar_tag, auto index_tag) {
    using scalar_t = tag_t<decltype(scalar_tag)>;
    using index_t = tag_t<decltype(index_tag)>;
    using T = compute_t<scalar_t>;
    ClassIndexTargets<scalar_t, index_t> rows{
        row_loss_name(loss_id),
        static_cast<const scalar_t*>(inputs.const_data_ptr()),
        static_cast<const index_t*>(targets.const_data_ptr()),
        inputs.size(inputs.dim() - 1),
        ignore_index,
        {data_of<T>(weight), data_of<T>(class_weight), data_of<T>(scores)}};
    if (static_cast<RowLoss>(loss_id) == RowLoss::softmax) {
      const SoftmaxFocalLoss<T> formula = softmax_focal_loss<T>(parameters);
      return sum_softmax_losses(rows, targets.numel(), formula, normalizer, min_normalizer, grad,
                                loss);
    }
    dispatch_row_loss<T>(static_cast<RowLoss>(loss_id), parameters, [&](const auto& formula) {
      sum_losses<scalar_t>(rows, inputs.numel(), formula, normalizer, min_normalizer, grad, loss);
    });
  };
  dispatch_floating(inputs.scalar_type(), [&](auto scalar_tag) {
    dispatch_index(targets.scalar_type(), [&](auto index_tag) { run(scalar_tag, index_tag); });
  });
  return loss;
}

std::tuple<Tensor, Tensor> row_loss_sum_cpu(
    const Tensor& inputs_, const Tensor& targets, const std::optional<Tensor>& scores,
    int64_t loss_id, const std::vector<double>& parameters, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& class_weight, int64_t ignore_index,
    const std::optional<Tensor>& normalizer, double min_normalizer, bool compute_grad) {
  check_row_loss(inputs_, targets, scores, loss_id, parameters, weight, class_weight, normalizer);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  std::optional<Tensor> grad;
  if (compute_grad) {
    grad = new_like(inputs);
  }
  Tensor loss = row_loss(inputs, targets, scores, loss_id, parameters, weight, class_weight,
                         ignore_index, normalizer, min_normalizer, grad);
  return {loss, compute_grad ? *grad : torch::stable::new_empty(inputs, {0})};
}

Tensor row_loss_sum_inplace_cpu(const Tensor& inputs, const Tensor& targets,
                                const std::optional<Tensor>& scores, int64_t loss_id,
                                const std::vector<double>& parameters,
                                const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                const std::optional<Tensor>& normalizer, double min_normalizer) {
  check_row_loss(inputs, targets, scores, loss_id, parameters, weight, class_weight, normalizer);
  check_overwritten(row_loss_name(loss_id), "inputs", inputs, false);
  return row_loss(inputs, targets, scores, loss_id, parameters, weight, class_weight, ignore_index,
                  normalizer, min_normalizer, inputs);
}

Tensor class_indices_cpu(const Tensor& targets_, int64_t loss_id, int64_t num_classes,
                         int64_t ignore_index) {
  check_class_indices(targets_, loss_id);
  Tensor targets = torch::stable::clone(targets_);
  const bool has_background = static_cast<RowLoss>(loss_id) != RowLoss::softmax;
  const int64_t last = has_background ? num_classes : num_classes - 1;
  const int64_t count = num_classes == 0 ? 0 : targets.numel();  // as the sum, which sees no logit
  InvalidIndex invalid;
  dispatch_index(targets.scalar_type(), [&](auto tag) {
    using index_t = tag_t<decltype(tag)>;
    const auto* data = static_cast<const index_t*>(targets.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      if ((data[i] < 0 || data[i] > last) && data[i] != ignore_index) {
        invalid.note(data[i]);
      }
    }
  });
  invalid.check(row_loss_name(loss_id), "class-index targets", last, ignore_index);
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("row_loss_sum", TORCH_BOX(&row_loss_sum_cpu));
  m.impl("_class_indices", TORCH_BOX(&class_indices_cpu));
  m.impl("_row_loss_sum_", TORCH_BOX(&row_loss_sum_inplace_cpu));
}

}  // namespace focalops
