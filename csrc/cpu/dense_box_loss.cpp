// The box loss of a head's levels on the CPU, where the head left them. Only foreground anchors
// have a loss: their deltas are all that is read; of the others the match is, and their gradient,
// loss and IoU are 0.
//
// Work is cut into stretches of positions of one image of one level: the unit of parallel work, and
// of the sum's order.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks/dense_box_loss.h"
#include "../head_levels.h"
#include "../normalizer.h"
#include "../rows.h"
#include "memory.h"

namespace focalops {
namespace {

constexpr int64_t kStretch = 1024;  // positions

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Head {
  HeadShape shape;
  std::vector<HeadLevel> levels;
  Tensor anchors, gt_boxes, matches;  // contiguous

  Head(const HeadShape& shape, const std::vector<Tensor>& deltas, const Tensor& anchors,
       const Tensor& gt_boxes, const Tensor& matches)
      : shape(shape),
        levels(head_levels(deltas, shape)),
        anchors(torch::stable::contiguous(anchors)),
        gt_boxes(torch::stable::contiguous(gt_boxes)),
        matches(torch::stable::contiguous(matches)) {}
};

// What is written of each anchor; empty where it is not wanted.
struct Outputs {
  std::vector<Tensor> grads;  // one a level
  Tensor losses, iou;         // (B, N)

  Outputs(const Head& head, bool compute_grad, bool compute_losses, bool compute_iou)
      : losses(row_numbers(head, compute_losses)), iou(row_numbers(head, compute_iou)) {
    for (size_t l = 0; compute_grad && l < head.levels.size(); ++l) {
      const Tensor& level = head.levels[l].tensor;
      grads.push_back(on_huge_pages(torch::stable::empty_like(level), level.element_size()));
    }
  }

 private:
  static Tensor row_numbers(const Head& head, bool are_wanted) {
    return are_wanted ? torch::stable::new_empty(head.anchors, {head.shape.images, head.shape.rows})
                      : torch::stable::new_empty(head.anchors, {0});
  }
};

// Returns the sum over the images of their losses, each divided by its normalizer.
double evaluate_head(const Head& head, const BoxLossOptions& options,
                     const std::optional<Tensor>& normalizer, double min_normalizer,
                     Outputs& outputs) {
  const HeadShape& shape = head.shape;
  const auto given = contiguous(normalizer);
  const int64_t max_boxes = head.gt_boxes.size(1);
  const bool compute_grad = !outputs.grads.empty();
  std::vector<int64_t> first_task{0};  // of each level, and their number
  for (const HeadLevel& level : head.levels) {
    first_task.push_back(first_task.back() + shape.images * ceil_div(level.positions, kStretch));
  }
  std::vector<double> sums(first_task.back());
  std::atomic<int64_t> invalid{-1};

  dispatch_floating(head.levels[0].tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto divisors = normalizer_of<T>(given, min_normalizer);
    const auto* anchor_data = static_cast<const T*>(head.anchors.const_data_ptr());
    const auto* box_data = static_cast<const T*>(head.gt_boxes.const_data_ptr());
    const auto* match_data = static_cast<const int64_t*>(head.matches.const_data_ptr());
    T* losses = outputs.losses.numel() > 0 ? data_of<T>(outputs.losses) : nullptr;
    T* iou = outputs.iou.numel() > 0 ? data_of<T>(outputs.iou) : nullptr;
    const auto coder = box_coder<T>(options.weights, options.clip);
    dispatch_box_loss<T>(options.loss, coder, options.beta, options.eps, [&](const auto& formula) {
      torch::stable::parallel_for(0, first_task.back(), 1, [&](int64_t task, int64_t last) {
        size_t l = 0;
        for (; task < last; ++task) {
          while (task >= first_task[l + 1]) {
            ++l;
          }
          const HeadLevel& level = head.levels[l];
          const int64_t stretches = ceil_div(level.positions, kStretch);
          const int64_t image = (task - first_task[l]) / stretches;
          const int64_t first = (task - first_task[l]) % stretches * kStretch;
          const int64_t end = std::min(first + kStretch, level.positions);
          const T divisor = divisors.divisor(image);
          const T scale = gradient_scale<scalar_t>(divisor);

          // The 4 deltas of an anchor at a position are `step` apart.
          const int64_t step = level.has_rows ? 1 : level.positions;
          const auto at = [&](int64_t position, int64_t anchor) {
            const int64_t size = 4 * shape.anchors * level.positions;
            return image * size + (level.has_rows ? (position * shape.anchors + anchor) * 4
                                                  : anchor * 4 * level.positions + position);
          };
          const auto* data = static_cast<const scalar_t*>(level.tensor.const_data_ptr());
          scalar_t* grad = compute_grad ? data_of<scalar_t>(outputs.grads[l]) : nullptr;
          if (compute_grad && level.has_rows) {
            std::fill(grad + at(first, 0), grad + at(end, 0), scalar_t(0));
          } else if (compute_grad) {
            for (int64_t plane = 0; plane < 4 * shape.anchors; ++plane) {
              scalar_t* begin = grad + at(first, 0) + plane * level.positions;
              std::fill(begin, begin + (end - first), scalar_t(0));
            }
          }
          const int64_t first_row = first * shape.anchors, end_row = end * shape.anchors;
          const int64_t row_0 = image * shape.rows + level.first_row;
          for (T* of_rows : {losses, iou}) {
            if (of_rows != nullptr) {
              std::fill(of_rows + row_0 + first_row, of_rows + row_0 + end_row, T(0));
            }
          }
          double sum = 0;
          const int64_t* match = match_data + row_0;
          for (int64_t row = first_row; row < end_row; ++row) {
            if (match[row] < 0) {
              continue;
            }
            if (match[row] >= max_boxes) {
              invalid.store(match[row], std::memory_order_relaxed);
              continue;
            }
            const int64_t i = at(row / shape.anchors, row % shape.anchors);
            const Deltas<T> given{static_cast<T>(data[i]), static_cast<T>(data[i + step]),
                                  static_cast<T>(data[i + 2 * step]),
                                  static_cast<T>(data[i + 3 * step])};
            const Box<T> anchor = load_box(anchor_data + 4 * (level.first_row + row));
            const Box<T> gt_box = load_box(box_data + 4 * (image * max_boxes + match[row]));
            const auto value = formula.evaluate(given, anchor, gt_box);
            sum += value.loss;
            if (losses != nullptr) {
              losses[row_0 + row] = value.loss;
            }
            if (iou != nullptr) {
              iou[row_0 + row] = formula.overlap(given, anchor, gt_box);
            }
            if (compute_grad) {
              grad[i] = static_cast<scalar_t>(scale * value.grad.x);
              grad[i + step] = static_cast<scalar_t>(scale * value.grad.y);
              grad[i + 2 * step] = static_cast<scalar_t>(scale * value.grad.w);
              grad[i + 3 * step] = static_cast<scalar_t>(scale * value.grad.h);
            }
          }
          sums[task] = sum / divisor;
        }
      });
    });
  });
  if (invalid.load() >= 0) {
    fail(options.name(), ": matches must be less than the number of boxes, ", max_boxes, ", got ",
         invalid.load());
  }
  double sum = 0;
  for (const double of_task : sums) {
    sum += of_task;
  }
  return sum;
}

std::tuple<Tensor, std::vector<Tensor>> dense_box_loss_cpu(
    const std::vector<Tensor>& deltas, const Tensor& anchors, const Tensor& gt_boxes,
    const Tensor& matches, int64_t loss, const std::vector<double>& weights, double clip,
    double beta, double eps, const std::optional<Tensor>& normalizer, double min_normalizer,
    bool compute_grad) {
  const BoxLossOptions options{loss, weights, clip, beta, eps};
  const HeadShape shape =
      check_dense_box_loss(deltas, anchors, gt_boxes, matches, options, normalizer);
  const Head head(shape, deltas, anchors, gt_boxes, matches);
  Outputs outputs(head, compute_grad, false, false);
  const double sum = evaluate_head(head, options, normalizer, min_normalizer, outputs);
  Tensor total = torch::stable::new_empty(anchors, {});
  dispatch_compute(anchors.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    *data_of<T>(total) = static_cast<T>(sum);
  });
  return {total, outputs.grads};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_box_losses_cpu(
    const std::vector<Tensor>& deltas, const Tensor& anchors, const Tensor& gt_boxes,
    const Tensor& matches, int64_t loss, const std::vector<double>& weights, double clip,
    double beta, double eps, bool compute_grad, bool compute_iou) {
  const BoxLossOptions options{loss, weights, clip, beta, eps};
  const HeadShape shape = check_dense_box_losses(deltas, anchors, gt_boxes, matches, options);
  const Head head(shape, deltas, anchors, gt_boxes, matches);
  Outputs outputs(head, compute_grad, options.has_loss(), compute_iou);
  evaluate_head(head, options, std::nullopt, 1, outputs);
  return {outputs.losses, outputs.iou, outputs.grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("dense_box_loss", TORCH_BOX(&dense_box_loss_cpu));
  m.impl("dense_box_losses", TORCH_BOX(&dense_box_losses_cpu));
}

}  // namespace focalops
