// The box loss of a head's levels on the CPU, where the head left them. Only foreground anchors
// have a loss: their deltas are all that is read; of the others the match is, and their gradient is
// 0.
//
// Work is cut into stretches of positions of one image of one level: the unit of parallel work, and
// of the sum's order.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks/dense_box_loss.h"
#include "../head_levels.h"
#include "../math/box_loss.h"
#include "../rows.h"
#include "memory.h"

namespace focalops {
namespace {

constexpr int64_t kStretch = 1024;  // positions

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::tuple<Tensor, std::vector<Tensor>> dense_box_loss_cpu(
    const std::vector<Tensor>& deltas, const Tensor& anchors_, const Tensor& gt_boxes_,
    const Tensor& matches_, int64_t kind, const std::vector<double>& weights, double clip,
    double beta, double eps, const std::optional<Tensor>& normalizer_, double min_normalizer,
    bool compute_grad) {
  const HeadShape shape =
      check_dense_box_loss(deltas, anchors_, gt_boxes_, matches_, kind, weights, beta, normalizer_);
  const auto levels = head_levels(deltas, shape);
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               matches = torch::stable::contiguous(matches_);
  const int64_t max_boxes = gt_boxes.size(1);
  Tensor loss = torch::stable::new_empty(anchors, {});
  std::vector<Tensor> grads;
  std::vector<int64_t> first_task{0};  // of each level, and their number
  for (const HeadLevel& level : levels) {
    if (compute_grad) {
      grads.push_back(
          on_huge_pages(torch::stable::empty_like(level.tensor), level.tensor.element_size()));
    }
    first_task.push_back(first_task.back() + shape.images * ceil_div(level.positions, kStretch));
  }
  std::vector<double> sums(first_task.back());
  std::atomic<int64_t> invalid{-1};

  dispatch_floating(deltas[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    std::vector<T> divisors(shape.images, static_cast<T>(min_normalizer));
    if (normalizer_.has_value()) {
      const Tensor normalizer = torch::stable::contiguous(*normalizer_);
      const auto* values = static_cast<const T*>(normalizer.const_data_ptr());
      for (int64_t b = 0; b < shape.images; ++b) {
        const T given = values[normalizer.dim() == 1 ? b : 0];
        divisors[b] = given < divisors[b] ? divisors[b] : given;  // a NaN stays
      }
    }
    const auto* anchor_data = static_cast<const T*>(anchors.const_data_ptr());
    const auto* box_data = static_cast<const T*>(gt_boxes.const_data_ptr());
    const auto* match_data = static_cast<const int64_t*>(matches.const_data_ptr());
    dispatch_box_loss<T>(kind, box_coder<T>(weights, clip), beta, eps, [&](const auto& formula) {
      torch::stable::parallel_for(0, first_task.back(), 1, [&](int64_t task, int64_t last) {
        size_t l = 0;
        for (; task < last; ++task) {
          while (task >= first_task[l + 1]) {
            ++l;
          }
          const HeadLevel& level = levels[l];
          const int64_t stretches = ceil_div(level.positions, kStretch);
          const int64_t image = (task - first_task[l]) / stretches;
          const int64_t first = (task - first_task[l]) % stretches * kStretch;
          const int64_t end = std::min(first + kStretch, level.positions);
          const T divisor = divisors[image];
          // A float16 gradient over a large normalizer would be 0: the backward divides it.
          const T scale = std::is_same_v<scalar_t, Half> ? T(1) : 1 / divisor;

          // Deltas of an anchor at a position: `step` apart.
          const int64_t step = level.has_rows ? 1 : level.positions;
          const auto at = [&](int64_t position, int64_t anchor) {
            const int64_t size = 4 * shape.anchors * level.positions;
            return image * size + (level.has_rows ? (position * shape.anchors + anchor) * 4
                                                  : anchor * 4 * level.positions + position);
          };
          const auto* data = static_cast<const scalar_t*>(level.tensor.const_data_ptr());
          scalar_t* grad =
              compute_grad ? static_cast<scalar_t*>(grads[l].mutable_data_ptr()) : nullptr;
          if (compute_grad && level.has_rows) {
            std::fill(grad + at(first, 0), grad + at(end, 0), scalar_t(0));
          } else if (compute_grad) {
            for (int64_t plane = 0; plane < 4 * shape.anchors; ++plane) {
              scalar_t* begin = grad + at(first, 0) + plane * level.positions;
              std::fill(begin, begin + (end - first), scalar_t(0));
            }
          }
          double sum = 0;
          const int64_t* match = match_data + image * shape.rows + level.first_row;
          for (int64_t row = first * shape.anchors; row < end * shape.anchors; ++row) {
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
            const auto value =
                formula.evaluate(given, load_box(anchor_data + 4 * (level.first_row + row)),
                                 load_box(box_data + 4 * (image * max_boxes + match[row])));
            sum += value.loss;
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
    double sum = 0;
    for (const double of_task : sums) {
      sum += of_task;
    }
    *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(sum);
  });
  if (invalid.load() >= 0) {
    fail("dense_box_loss: matches must be less than the number of boxes, ", max_boxes, ", got ",
         invalid.load());
  }
  return {loss, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("dense_box_loss", TORCH_BOX(&dense_box_loss_cpu));
}

}  // namespace focalops
