// The losses of rows with a weight, a score or smoothed targets, on the CPU: one pass over the
// logits, as in focal_loss.cpp.
#include "../checks/row_losses.h"
#include "../math/row_losses.h"
#include "focal_loss.h"
#include "softmax_focal_loss.h"

namespace focalops {
namespace {

Tensor row_loss(const std::string& name, const Tensor& inputs, const Tensor& targets_,
                const std::optional<Tensor>& scores_, const std::vector<double>& parameters,
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
  const auto run = [&](auto member, auto scalar_tag, auto index_tag) {
    using Loss = decltype(member);
    using scalar_t = tag_t<decltype(scalar_tag)>;
    using index_t = tag_t<decltype(index_tag)>;
    using T = compute_t<scalar_t>;
    ClassIndexTargets<scalar_t, index_t> rows{
        Loss::kName,
        static_cast<const scalar_t*>(inputs.const_data_ptr()),
        static_cast<const index_t*>(targets.const_data_ptr()),
        inputs.size(inputs.dim() - 1),
        ignore_index,
        {data_of<T>(weight), class_weights_of<T>(class_weight), data_of<T>(scores)}};
    Loss::template dispatch<T>(parameters, [&](const auto& formula) {
      if constexpr (Loss::kIsSoftmax) {
        sum_softmax_losses(rows, targets.numel(), formula, normalizer, min_normalizer, grad, loss);
      } else {
        sum_losses<scalar_t>(rows, inputs.numel(), formula, normalizer, min_normalizer, grad, loss);
      }
    });
  };
  with_row_loss("row_loss_sum", name, [&](auto member) {
    dispatch_floating(inputs.scalar_type(), [&](auto scalar_tag) {
      dispatch_index(targets.scalar_type(),
                     [&](auto index_tag) { run(member, scalar_tag, index_tag); });
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor> row_loss_sum_cpu(
    const Tensor& inputs_, const Tensor& targets, const std::optional<Tensor>& scores,
    const Name& name, const std::vector<double>& parameters, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& class_weight, int64_t ignore_index,
    const std::optional<Tensor>& normalizer, double min_normalizer, bool compute_grad) {
  check_row_loss(name, inputs_, targets, scores, parameters, weight, class_weight, normalizer);
  const Tensor inputs = torch::stable::contiguous(inputs_);
  std::optional<Tensor> grad;
  if (compute_grad) {
    grad = new_like(inputs);
  }
  Tensor loss = row_loss(name, inputs, targets, scores, parameters, weight, class_weight,
                         ignore_index, normalizer, min_normalizer, grad);
  return {loss, compute_grad ? *grad : torch::stable::new_empty(inputs, {0})};
}

Tensor row_loss_sum_inplace_cpu(const Tensor& inputs, const Tensor& targets,
                                const std::optional<Tensor>& scores, const Name& name,
                                const std::vector<double>& parameters,
                                const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                const std::optional<Tensor>& normalizer, double min_normalizer) {
  check_row_loss(name, inputs, targets, scores, parameters, weight, class_weight, normalizer);
  check_overwritten_rows(name.c_str(), inputs);
  return row_loss(name, inputs, targets, scores, parameters, weight, class_weight, ignore_index,
                  normalizer, min_normalizer, inputs);
}

Tensor class_indices_cpu(const Tensor& targets_, const Name& loss, int64_t num_classes,
                         int64_t ignore_index) {
  const bool has_background = !check_class_indices(targets_, loss);
  Tensor targets = torch::stable::clone(targets_);
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
  invalid.check(loss.c_str(), "class-index targets", last, ignore_index);
  return targets;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("row_loss_sum", TORCH_BOX(&row_loss_sum_cpu));
  m.impl("_class_indices", TORCH_BOX(&class_indices_cpu));
  m.impl("_row_loss_sum_", TORCH_BOX(&row_loss_sum_inplace_cpu));
}

}  // namespace focalops
