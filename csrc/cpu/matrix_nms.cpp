// Matrix NMS on the CPU: an image a thread. The boxes of a class are taken in order of score, each
// compared with all better ones in one vectorised pass, which by then know their own greatest IoU.
#include <cmath>
#include <limits>
#include <vector>

#include "../checks/nms.h"
#include "../math/nms.h"
#include "order.h"
#include "simd.h"

namespace focalops {
namespace {

// The boxes of a class in order of score.
template <typename T>
struct ClassBoxes {
  std::vector<T> x1, y1, x2, y2, area;
  std::vector<T> beneath;  // their greatest IoU with a better one

  void append(const Box<T>& box) {
    x1.push_back(box.x1);
    y1.push_back(box.y1);
    x2.push_back(box.x2);
    y2.push_back(box.y2);
    area.push_back(focalops::area(box));
  }

  void clear() {
    for (auto* column : {&x1, &y1, &x2, &y2, &area, &beneath}) {
      column->clear();
    }
  }
};

template <typename T>
struct Met {
  T greatest_iou;
  T least_left;
};

// What box i meets in those before it.
template <typename T, typename Decay>
FOCALOPS_SIMD Met<T> meet(const ClassBoxes<T>& boxes, int64_t i, const Decay& decay) {
  const T *x1 = boxes.x1.data(), *y1 = boxes.y1.data(), *x2 = boxes.x2.data(),
          *y2 = boxes.y2.data(), *areas = boxes.area.data(), *beneath = boxes.beneath.data();
  const Box<T> own = {x1[i], y1[i], x2[i], y2[i]};
  const T own_area = areas[i];
  T greatest = 0, least = Decay::kLeftByNone;
#pragma omp simd reduction(max : greatest) reduction(min : least)
  for (int64_t j = 0; j < i; ++j) {
    const T overlap = iou(Box<T>{x1[j], y1[j], x2[j], y2[j]}, own, areas[j], own_area);
    const T positive = overlap > 0 ? overlap : T(0);
    const T left = decay.left_by(positive, beneath[j]);
    greatest = positive > greatest ? positive : greatest;
    least = left < least ? left : least;
  }
  return {greatest, least};
}

// boxes: [N, 4]; scores: [N]; order: the image's boxes class by class, begins: of each class.
// decayed: [size], what becomes of the scores of the image, which begins at `begin`.
template <typename T, typename IndexOf, typename Decay>
void decay_scores(const T* boxes, const T* scores, const std::vector<int64_t>& begins,
                  const IndexOf& index_of, const Decay& decay, int64_t begin,
                  std::vector<T>& decayed) {
  ClassBoxes<T> of_class;
  for (size_t c = 0; c + 1 < begins.size(); ++c) {
    of_class.clear();
    for (int64_t place = begins[c]; place < begins[c + 1]; ++place) {
      const int64_t index = index_of(place);
      const Box<T> box = load_box(boxes + 4 * index);
      if (has_nan(box)) {
        continue;
      }
      of_class.append(box);
      const Met<T> met = meet(of_class, static_cast<int64_t>(of_class.beneath.size()), decay);
      of_class.beneath.push_back(met.greatest_iou);
      decayed[index - begin] = mul(scores[index], decay.factor(met.least_left));
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> matrix_nms_cpu(const Tensor& boxes_, const Tensor& scores_,
                                                  const std::optional<Tensor>& labels_,
                                                  double sigma, bool is_gaussian,
                                                  double score_threshold, int64_t max_detections) {
  check_decaying_nms("matrix_nms", boxes_, scores_, labels_, sigma, max_detections);
  const Tensor boxes = torch::stable::contiguous(boxes_);
  const Tensor scores = torch::stable::contiguous(scores_);
  const Tensor labels = labels_.has_value() ? torch::stable::contiguous(*labels_) : Tensor();
  const int64_t images = boxes.size(0), size = boxes.size(1);
  Tensor indices = torch::stable::new_empty(boxes, {images, max_detections}, ScalarType::Long);
  Tensor kept_scores = torch::stable::new_empty(boxes, {images, max_detections});
  Tensor num_kept = torch::stable::new_empty(boxes, {images}, ScalarType::Long);
  auto* all_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* counts = static_cast<int64_t*>(num_kept.mutable_data_ptr());
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto* box_data = static_cast<const T*>(boxes.const_data_ptr());
    const auto* score_data = static_cast<const T*>(scores.const_data_ptr());
    auto* all_kept_scores = static_cast<T*>(kept_scores.mutable_data_ptr());
    const auto run_image = [&](int64_t image, const auto& decay) {
      const int64_t begin = image * size;
      const std::vector<Item> order = order_by_score(scores, begin, begin + size);
      std::vector<T> decayed(size, std::numeric_limits<T>::quiet_NaN());
      if (labels_.has_value()) {
        const std::vector<Item> grouped = group_by_class(order, labels);
        const auto index_of = [&](int64_t place) { return order[grouped[place].index].index; };
        decay_scores(box_data, score_data, class_begins(grouped), index_of, decay, begin, decayed);
      } else {
        const auto index_of = [&](int64_t place) { return order[place].index; };
        decay_scores(box_data, score_data, {0, static_cast<int64_t>(order.size())}, index_of, decay,
                     begin, decayed);
      }
      std::vector<Item> kept;
      for (int64_t i = 0; i < size; ++i) {
        if (decayed[i] > static_cast<T>(score_threshold)) {
          kept.push_back({descending_key(decayed[i]), i});
        }
      }
      radix_sort(kept);
      const int64_t count = std::min(static_cast<int64_t>(kept.size()), max_detections);
      int64_t* to = all_indices + image * max_detections;
      T* to_scores = all_kept_scores + image * max_detections;
      for (int64_t k = 0; k < max_detections; ++k) {
        to[k] = k < count ? kept[k].index : -1;
        to_scores[k] = k < count ? decayed[kept[k].index] : T(0);
      }
      counts[image] = count;
    };
    dispatch_matrix_decay<T>(is_gaussian, sigma, [&](const auto& decay) {
      torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; ++image) {
          run_image(image, decay);
        }
      });
    });
  });
  return {indices, kept_scores, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) { m.impl("matrix_nms", TORCH_BOX(&matrix_nms_cpu)); }

}  // namespace focalops
