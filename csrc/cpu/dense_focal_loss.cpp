// The focal loss of a head's levels on the CPU: the sum, one number a piece.
#include "../checks/dense_focal_loss.h"
#include "../math/row_losses.h"
#include "dense_head.h"

namespace focalops {
namespace {

// Writes the gradients into `grads`, where there are any; they may be the logits themselves.
Tensor dense_focal_loss(const std::vector<HeadLevel>& levels, const HeadShape& shape,
                        const Tensor& labels_, const HeadLossOptions& options,
                        const std::optional<Tensor>& normalizer_, double min_normalizer,
                        const std::vector<Tensor>& grads) {
  const bool compute_grad = !grads.empty();
  const Tensor labels = torch::stable::contiguous(labels_);
  const auto weight = contiguous(options.weight), class_weight = contiguous(options.class_weight),
             given = contiguous(normalizer_);
  const Tensor& like = levels[0].tensor;
  Tensor loss = torch::stable::new_empty(like, {}, compute_dtype(like.scalar_type()));
  const Cut cut(levels, shape, kLogitsPerChunk);
  std::vector<double> sums(cut.num_pieces);

  const auto run = [&](auto scalar_tag, auto index_tag) {
    using scalar_t = tag_t<decltype(scalar_tag)>;
    using index_t = tag_t<decltype(index_tag)>;
    using T = compute_t<scalar_t>;
    const auto normalizer = normalizer_of<T>(given, min_normalizer);
    DenseHead<scalar_t, index_t> head{levels,
                                      shape,
                                      cut,
                                      static_cast<const index_t*>(labels.const_data_ptr()),
                                      {data_of<T>(weight), class_weights_of<T>(class_weight)},
                                      options.ignore_index};
    const std::vector<double> parameters{options.alpha, options.gamma, options.label_smoothing};
    row_losses::Focal::dispatch<T>(parameters, [&](const auto& formula) {
      for_each_piece<T>(cut, [&](const Piece& piece, Block<T>& block) {
        const T divisor = normalizer.divisor(piece.image);
        double sum = 0;
        if (compute_grad) {
          auto* grad = static_cast<scalar_t*>(grads[piece.level].mutable_data_ptr());
          const T scale = gradient_scale<scalar_t>(divisor);
          head.template evaluate<true>(piece, formula, block,
                                       [&](int64_t begin, int64_t n, const auto& values) {
                                         sum += sum_of(values.loss, n);
                                         scale_and_convert(values.grad, scale, grad + begin, n);
                                       });
        } else {
          head.template evaluate<false>(
              piece, formula, block,
              [&](int64_t, int64_t n, const auto& values) { sum += sum_of(values.loss, n); });
        }
        sums[piece.number] = sum / divisor;
      });
    });
    head.invalid.check("dense_focal_loss", "labels", shape.classes, options.ignore_index);
    double sum = 0;
    for (const double piece_sum : sums) {
      sum += piece_sum;
    }
    *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(sum);
  };
  dispatch_floating(like.scalar_type(), [&](auto scalar_tag) {
    dispatch_index(labels.scalar_type(), [&](auto index_tag) { run(scalar_tag, index_tag); });
  });
  return loss;
}

std::tuple<Tensor, std::vector<Tensor>> dense_focal_loss_cpu(
    const std::vector<Tensor>& cls_logits, const Tensor& labels, double alpha, double gamma,
    double label_smoothing, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& class_weight, int64_t ignore_index,
    const std::optional<Tensor>& normalizer, double min_normalizer, bool compute_grad) {
  const HeadLossOptions options{alpha, gamma, label_smoothing, weight, class_weight, ignore_index};
  const HeadShape shape = check_dense_focal_loss(cls_logits, labels, options, normalizer);
  const auto levels = head_levels(cls_logits, shape);
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(new_like(levels[l].tensor));
  }
  Tensor loss = dense_focal_loss(levels, shape, labels, options, normalizer, min_normalizer, grads);
  return {loss, grads};
}

Tensor dense_focal_loss_inplace_cpu(const std::vector<Tensor>& cls_logits, const Tensor& labels,
                                    double alpha, double gamma, double label_smoothing,
                                    const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                    const std::optional<Tensor>& normalizer,
                                    double min_normalizer) {
  const HeadLossOptions options{alpha, gamma, label_smoothing, weight, class_weight, ignore_index};
  const HeadShape shape = check_dense_focal_loss(cls_logits, labels, options, normalizer);
  check_overwritten(cls_logits);
  return dense_focal_loss(head_levels(cls_logits, shape), shape, labels, options, normalizer,
                          min_normalizer, cls_logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("dense_focal_loss", TORCH_BOX(&dense_focal_loss_cpu));
  m.impl("_dense_focal_loss_", TORCH_BOX(&dense_focal_loss_inplace_cpu));
}

}  // namespace focalops
