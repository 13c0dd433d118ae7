// Soft-NMS on the CPU: an image a thread. Each round takes the best box that is left, and decays
// the scores of its class: one vectorised pass for the decay, one for the next best.
#include <limits>
#include <vector>

#include "../checks/nms.h"
#include "../math/nms.h"
#include "simd.h"

namespace focalops {
namespace {

// What is left of an image's boxes.
template <typename T>
struct Remaining {
  std::vector<T> x1, y1, x2, y2, scores;  // a NaN score: not to be kept any more
  std::vector<int64_t> indices, labels;
};

// The box by value: behind a reference it could be what the loop writes.
template <typename T>
FOCALOPS_SIMD void overlaps(const T* x1, const T* y1, const T* x2, const T* y2, int64_t n,
                            Box<T> box, T* ious) {
  const T box_area = area(box);
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> other = {x1[i], y1[i], x2[i], y2[i]};
    ious[i] = iou(box, other, box_area, area(other));
  }
}

// boxes: [size, 4]; scores, labels: [size]; indices, kept_scores: [max_detections].
template <typename T, typename LabelOf>
int64_t soft_nms_of_image(const T* boxes, const T* scores, const LabelOf& label_of, int64_t size,
                          const ScoreDecay<T>& decay, T score_threshold, int64_t max_detections,
                          int64_t* indices, T* kept_scores) {
  Remaining<T> left;
  for (int64_t i = 0; i < size; ++i) {
    const Box<T> box = load_box(boxes + 4 * i);
    if (scores[i] > score_threshold && !has_nan(box)) {
      left.x1.push_back(box.x1);
      left.y1.push_back(box.y1);
      left.x2.push_back(box.x2);
      left.y2.push_back(box.y2);
      left.scores.push_back(scores[i]);
      left.indices.push_back(i);
      left.labels.push_back(label_of(i));
    }
  }
  const auto n = static_cast<int64_t>(left.scores.size());
  std::vector<T> ious(n);
  int64_t count = 0;
  for (; count < max_detections; ++count) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (left.scores[i] > (best < 0 ? score_threshold : left.scores[best])) {
        best = i;
      }
    }
    if (best < 0) {
      break;
    }
    indices[count] = left.indices[best];
    kept_scores[count] = left.scores[best];
    left.scores[best] = std::numeric_limits<T>::quiet_NaN();
    overlaps(left.x1.data(), left.y1.data(), left.x2.data(), left.y2.data(), n,
             Box<T>{left.x1[best], left.y1[best], left.x2[best], left.y2[best]}, ious.data());
    for (int64_t i = 0; i < n; ++i) {
      if (left.labels[i] == left.labels[best] && ious[i] > 0) {
        left.scores[i] = decay(left.scores[i], ious[i]);
      }
    }
  }
  std::fill(indices + count, indices + max_detections, -1);
  std::fill(kept_scores + count, kept_scores + max_detections, T(0));
  return count;
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_cpu(const Tensor& boxes_, const Tensor& scores_,
                                                const std::optional<Tensor>& labels_,
                                                double iou_threshold, double sigma,
                                                bool is_gaussian, double score_threshold,
                                                int64_t max_detections) {
  check_decaying_nms("soft_nms", boxes_, scores_, labels_, sigma, max_detections);
  const Tensor boxes = torch::stable::contiguous(boxes_);
  const Tensor scores = torch::stable::contiguous(scores_);
  const Tensor labels = labels_.has_value() ? torch::stable::contiguous(*labels_) : Tensor();
  const int64_t images = boxes.size(0), size = boxes.size(1);
  Tensor indices = torch::stable::new_empty(boxes, {images, max_detections}, ScalarType::Long);
  Tensor kept_scores = torch::stable::new_empty(boxes, {images, max_detections});
  Tensor num_kept = torch::stable::new_empty(boxes, {images}, ScalarType::Long);
  auto* counts = static_cast<int64_t*>(num_kept.mutable_data_ptr());
  const auto run = [&](auto tag, const auto& label_of) {
    using T = tag_t<decltype(tag)>;
    const ScoreDecay<T> decay{round_down<T>(iou_threshold), static_cast<T>(sigma), is_gaussian};
    torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
      for (int64_t image = first; image < last; ++image) {
        const auto label_in_image = [&](int64_t i) { return label_of(image * size + i); };
        counts[image] = soft_nms_of_image(
            static_cast<const T*>(boxes.const_data_ptr()) + image * size * 4,
            static_cast<const T*>(scores.const_data_ptr()) + image * size, label_in_image, size,
            decay, static_cast<T>(score_threshold), max_detections,
            static_cast<int64_t*>(indices.mutable_data_ptr()) + image * max_detections,
            static_cast<T*>(kept_scores.mutable_data_ptr()) + image * max_detections);
      }
    });
  };
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    if (!labels_.has_value()) {
      return run(tag, [](int64_t) { return int64_t{0}; });
    }
    dispatch_index(labels.scalar_type(), [&](auto index_tag) {
      const auto* data = static_cast<const tag_t<decltype(index_tag)>*>(labels.const_data_ptr());
      run(tag, [data](int64_t i) { return static_cast<int64_t>(data[i]); });
    });
  });
  return {indices, kept_scores, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms_cpu)); }

}  // namespace focalops
