// The focal loss of a head's levels on the CPU, where the head left them: one pass over the logits.
//
// Work is cut into pieces, each of one image of one level: the unit of parallel work, and of the
// sum's order. Rows (channels_last) are evaluated as in focal_loss.cpp. Of planes (contiguous) a
// piece is a stretch of one anchor's positions through all classes: its labels are read once and
// sorted by class, so that each plane finds its positives in turn.
#include <vector>

#include "../checks/dense_focal_loss.h"
#include "../head_levels.h"
#include "../math/row_losses.h"
#include "focal_loss.h"

namespace focalops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which pieces a level consists of.
struct Pieces {
  int64_t first;
  int64_t of_image;
  int64_t stretches;  // planes only: of how many pieces a plane consists
};

template <typename scalar_t, typename index_t>
struct Head {
  using T = compute_t<scalar_t>;

  HeadShape shape;
  const index_t* labels;  // [B, rows]
  RowExtras<T> extras;    // as the labels
  int64_t ignore_index;
  InvalidIndex invalid{};

  // Evaluates the piece `part` of an image and hands each block to consume(begin, n, block), begin
  // counted from the level's first logit.
  template <bool WithGrad, typename Loss, typename Consume>
  void evaluate(const HeadLevel& level, const Pieces& pieces, int64_t image, int64_t part,
                const Loss& formula, Block<T>& block, const Consume& consume) {
    const auto* logits = static_cast<const scalar_t*>(level.tensor.const_data_ptr());
    const int64_t first_row = image * shape.rows + level.first_row;
    const int64_t size = level.positions * shape.anchors * shape.classes;  // of an image
    if (level.has_rows) {
      const int64_t end = std::min((part + 1) * kChunk, size);
      for (int64_t begin = part * kChunk; begin < end; begin += kBlock) {
        const int64_t n = std::min(kBlock, end - begin);
        evaluate_rows<WithGrad>(logits + image * size, labels + first_row, extras.from(first_row),
                                shape.classes, ignore_index, begin, n, formula, block, invalid);
        consume(image * size + begin, n, block);
      }
      return;
    }
    const int64_t anchor = part / pieces.stretches, stretch = part % pieces.stretches;
    const int64_t begin = level.positions * stretch / pieces.stretches;
    const int64_t n = level.positions * (stretch + 1) / pieces.stretches - begin;
    const int64_t first_plane = (image * shape.anchors + anchor) * shape.classes;
    evaluate_planes<WithGrad>(logits, first_row + begin * shape.anchors + anchor,
                              first_plane * level.positions + begin, level.positions, n, formula,
                              block, consume);
  }

  // n positions from `begin` on, in each of the classes' planes; `row` is the first one's.
  template <bool WithGrad, typename Loss, typename Consume>
  void evaluate_planes(const scalar_t* logits, int64_t row, int64_t begin, int64_t plane_size,
                       int64_t n, const Loss& formula, Block<T>& block, const Consume& consume) {
    struct Labelled {
      int64_t label, at;
    } labelled[kBlock];
    int64_t num_labelled = 0, num_ignored = 0;
    Range ignored[kBlock];
    for (int64_t at = 0; at < n; ++at, row += shape.anchors) {
      const int64_t label = labels[row];
      block.weights[at] = extras.weight_of(row);
      if (label == ignore_index) {
        ignored[num_ignored++] = {at, at + 1};
      } else if (label >= 0 && label < shape.classes) {
        labelled[num_labelled++] = {label, at};
      } else if (label != shape.classes) {
        invalid.note(label);
      }
    }
    std::sort(labelled, labelled + num_labelled,
              [](const Labelled& a, const Labelled& b) { return a.label < b.label; });

    Positive<T> positives[kBlock];
    int64_t next = 0;
    for (int64_t k = 0; k < shape.classes; ++k, begin += plane_size) {
      const T* plane = as_computed(logits + begin, block.logits, n);
      int64_t num_positives = 0;
      for (; next < num_labelled && labelled[next].label == k; ++next) {
        positives[num_positives++] = {labelled[next].at, T(1)};
      }
      evaluate_negatives<WithGrad>(plane, block.loss, block.grad, n, formula);
      evaluate_positives<WithGrad>(plane, positives, num_positives, formula, block);
      if (extras.weighs()) {
        weigh<WithGrad>(block, extras.class_weight == nullptr ? T(1) : extras.class_weight[k], n);
      }
      clear<WithGrad>(ignored, num_ignored, block);
      consume(begin, n, block);
    }
  }
};

// Writes the gradients into `grads`, where there are any; they may be the logits themselves.
Tensor dense_focal_loss(const std::vector<HeadLevel>& levels, const HeadShape& shape,
                        const Tensor& labels_, const HeadLossOptions& options,
                        const std::optional<Tensor>& normalizer, double min_normalizer,
                        const std::vector<Tensor>& grads) {
  const bool compute_grad = !grads.empty();
  const Tensor labels = torch::stable::contiguous(labels_);
  const auto weight = contiguous(options.weight), class_weight = contiguous(options.class_weight);
  const Tensor& like = levels[0].tensor;
  Tensor loss = torch::stable::new_empty(like, {}, compute_dtype(like.scalar_type()));
  std::vector<Pieces> pieces;
  int64_t num_pieces = 0;
  for (const HeadLevel& level : levels) {
    const int64_t stretches = ceil_div(level.positions, kBlock);
    const int64_t chunks = ceil_div(level.positions * shape.anchors * shape.classes, kChunk);
    const int64_t of_image = level.has_rows ? chunks : shape.anchors * stretches;
    pieces.push_back({num_pieces, of_image, stretches});
    num_pieces += shape.images * of_image;
  }
  std::vector<double> sums(num_pieces);

  const auto run = [&](auto scalar_tag, auto index_tag) {
    using scalar_t = tag_t<decltype(scalar_tag)>;
    using index_t = tag_t<decltype(index_tag)>;
    using T = compute_t<scalar_t>;
    std::vector<T> divisors(shape.images, static_cast<T>(min_normalizer));
    if (normalizer.has_value()) {
      const Tensor given = torch::stable::contiguous(*normalizer);
      const auto* values = static_cast<const T*>(given.const_data_ptr());
      for (int64_t b = 0; b < shape.images; ++b) {
        divisors[b] = clamped_divisor(values[given.dim() == 1 ? b : 0], divisors[b]);
      }
    }
    Head<scalar_t, index_t> head{shape,
                                 static_cast<const index_t*>(labels.const_data_ptr()),
                                 {data_of<T>(weight), data_of<T>(class_weight)},
                                 options.ignore_index};
    const std::vector<double> parameters{options.alpha, options.gamma, options.label_smoothing};
    row_losses::Focal::dispatch<T>(parameters, [&](const auto& formula) {
      torch::stable::parallel_for(0, num_pieces, 1, [&](int64_t begin, int64_t end) {
        Block<T> block;
        size_t l = 0;
        for (int64_t piece = begin; piece < end; ++piece) {
          while (l + 1 < pieces.size() && piece >= pieces[l + 1].first) {
            ++l;
          }
          const int64_t image = (piece - pieces[l].first) / pieces[l].of_image;
          const int64_t part = (piece - pieces[l].first) % pieces[l].of_image;
          double sum = 0;
          if (compute_grad) {
            auto* grad = static_cast<scalar_t*>(grads[l].mutable_data_ptr());
            const T scale = gradient_scale<scalar_t>(divisors[image]);
            head.template evaluate<true>(levels[l], pieces[l], image, part, formula, block,
                                         [&](int64_t at, int64_t n, const auto& values) {
                                           sum += sum_of(values.loss, n);
                                           scale_and_convert(values.grad, scale, grad + at, n);
                                         });
          } else {
            head.template evaluate<false>(
                levels[l], pieces[l], image, part, formula, block,
                [&](int64_t, int64_t n, const auto& values) { sum += sum_of(values.loss, n); });
          }
          sums[piece] = sum / divisors[image];
        }
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
