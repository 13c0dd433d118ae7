// The box loss of a head's levels of distances on the CPU, where the head left them. Only
// foreground anchors have a loss: their logits are all that is read; of the others the match is,
// and their gradient, loss and IoU are 0.
//
// Work is cut into stretches of positions of one image of one level.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../checks/distances.h"
#include "../head_levels.h"
#include "../math/distances.h"
#include "memory.h"

namespace focalops {
namespace {

constexpr int64_t kStretch = 1024;  // positions

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::tuple<Tensor, Tensor, std::vector<Tensor>> dense_distance_losses_cpu(
    const std::vector<Tensor>& levels_, const Tensor& points_, const Tensor& gt_boxes_,
    const Tensor& matches_, const std::vector<double>& strides, int64_t bins, int64_t loss,
    double eps, double dfl_weight, bool compute_grad, bool compute_iou) {
  const HeadShape shape = check_dense_distance_losses(levels_, points_, gt_boxes_, matches_,
                                                      strides, bins, loss, dfl_weight);
  const auto levels = head_levels(levels_, shape);
  const Tensor points = torch::stable::contiguous(points_);
  const Tensor gt_boxes = torch::stable::contiguous(gt_boxes_);
  const Tensor matches = torch::stable::contiguous(matches_);
  const int64_t max_boxes = gt_boxes.size(1);
  Tensor losses = torch::stable::new_empty(points, {shape.images, shape.rows});
  Tensor iou = compute_iou ? torch::stable::new_empty(points, {shape.images, shape.rows})
                           : torch::stable::new_empty(points, {0});
  std::vector<Tensor> grads;
  std::vector<int64_t> first_task{0};  // of each level, and their number
  for (const HeadLevel& level : levels) {
    if (compute_grad) {
      grads.push_back(
          on_huge_pages(torch::stable::empty_like(level.tensor), level.tensor.element_size()));
    }
    first_task.push_back(first_task.back() + shape.images * ceil_div(level.positions, kStretch));
  }
  std::atomic<int64_t> invalid{-1};

  dispatch_floating(levels[0].tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* point_data = static_cast<const T*>(points.const_data_ptr());
    const auto* box_data = static_cast<const T*>(gt_boxes.const_data_ptr());
    const auto* match_data = static_cast<const int64_t*>(matches.const_data_ptr());
    T* loss_data = data_of<T>(losses);
    T* iou_data = compute_iou ? data_of<T>(iou) : nullptr;
    dispatch_distance_loss<T>(loss, eps, dfl_weight, bins, [&](const auto& formula) {
      torch::stable::parallel_for(0, first_task.back(), 1, [&](int64_t task, int64_t last) {
        size_t l = 0;
        for (; task < last; ++task) {
          while (task >= first_task[l + 1]) {
            ++l;
          }
          const HeadLevel& level = levels[l];
          const int64_t stretches = ceil_div(level.positions, kStretch), channels = 4 * bins;
          const int64_t image = (task - first_task[l]) / stretches;
          const int64_t first = (task - first_task[l]) % stretches * kStretch;
          const int64_t end = std::min(first + kStretch, level.positions);
          const int64_t of_channel = level.has_rows ? 1 : level.positions;
          const int64_t of_position = level.has_rows ? channels : 1;
          const int64_t of_image = image * channels * level.positions;
          const auto* data = static_cast<const scalar_t*>(level.tensor.const_data_ptr());
          scalar_t* grad = compute_grad ? data_of<scalar_t>(grads[l]) : nullptr;
          if (compute_grad && level.has_rows) {
            std::fill_n(grad + of_image + first * channels, (end - first) * channels, scalar_t(0));
          } else if (compute_grad) {
            for (int64_t channel = 0; channel < channels; ++channel) {
              std::fill_n(grad + of_image + channel * level.positions + first, end - first,
                          scalar_t(0));
            }
          }
          for (int64_t position = first; position < end; ++position) {
            const int64_t row = level.first_row + position, at = image * shape.rows + row;
            typename std::decay_t<decltype(formula)>::Value value{0, 0};
            const int64_t match = match_data[at];
            if (match >= max_boxes) {
              invalid.store(match, std::memory_order_relaxed);
            } else if (match >= 0) {
              const int64_t logit = of_image + position * of_position;
              const auto place = [&](int side, int bin) {
                return logit + (side * bins + bin) * of_channel;
              };
              const auto load = [&](int side, int bin) {
                return static_cast<T>(data[place(side, bin)]);
              };
              const auto store = [&](int side, int bin, T value) {
                grad[place(side, bin)] = static_cast<scalar_t>(value);
              };
              const T x = point_data[2 * row], y = point_data[2 * row + 1];
              const T stride = static_cast<T>(strides[l]);
              const Box<T> gt_box = load_box(box_data + 4 * (image * max_boxes + match));
              value = compute_grad
                          ? formula.template evaluate<true>(x, y, stride, gt_box, load, store)
                          : formula.template evaluate<false>(x, y, stride, gt_box, load, store);
            }
            loss_data[at] = value.loss;
            if (iou_data != nullptr) {
              iou_data[at] = value.iou;
            }
          }
        }
      });
    });
  });
  if (invalid.load() >= 0) {
    fail("dense_box_loss: matches must be less than the number of boxes, ", max_boxes, ", got ",
         invalid.load());
  }
  return {losses, iou, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("dense_distance_losses", TORCH_BOX(&dense_distance_losses_cpu));
}

}  // namespace focalops
