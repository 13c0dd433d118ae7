// Matrix NMS on CUDA: every pair of an image's boxes at once, nothing waits for the host. Boxes are
// sorted by score; one launch finds the greatest IoU of each with a better one, the next what all
// better ones leave of its score; the best of these are sorted out. Arithmetic is the limit: a pair
// takes 47 instructions in the first and 52 (gaussian) or 68 (linear) in the second (float32,
// sm_90), and its boxes come from the first-level cache.
#include <limits>

#include "../checks/nms.h"
#include "../math/nms.h"
#include "integers.cuh"
#include "launch.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadsPerBox = 8;
constexpr int kBoxesPerBlock = kThreads / kThreadsPerBox;

// The boxes of a batch in order of score.
template <typename T>
struct SortedBatch {
  Box<T>* boxes;    // [images, size], a NaN where there is no score
  int64_t* labels;  // [images, size]
  int64_t size;     // of an image

  // Of a box at `begin + place` and a better one of its class; else 0.
  __device__ __forceinline__ T overlap(const Box<T>& own, T own_area, int64_t own_label,
                                       int64_t better) const {
    const Box<T> box = boxes[better];
    const T overlap = labels[better] == own_label ? iou(box, own, area(box), own_area) : T(0);
    return overlap > 0 ? overlap : T(0);
  }
};

// One thread a box.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sort_boxes_kernel(const T* boxes, const T* scores, const int64_t* order, Integers labels,
                      int64_t total, SortedBatch<T> sorted) {
  const int64_t place = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (place < total) {
    const int64_t i = place / sorted.size * sorted.size + order[place];
    Box<T> box = load_box(boxes + 4 * i);
    if (scores[i] != scores[i]) {
      box.x1 = std::numeric_limits<T>::quiet_NaN();
    }
    sorted.boxes[place] = box;
    sorted.labels[place] = labels.at(i, 0);
  }
}

// visit(better) for the places of the boxes that are better than the one at `place`, shared among
// its threads.
template <typename Visit>
__device__ __forceinline__ void for_each_better(int64_t place, int64_t size, const Visit& visit) {
  for (int64_t better = place / size * size + threadIdx.x % kThreadsPerBox; better < place;
       better += kThreadsPerBox) {
    visit(better);
  }
}

// 8 threads a box: its greatest IoU with a better one.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    greatest_iou_kernel(SortedBatch<T> sorted, int64_t total, T* beneath) {
  const int64_t place = int64_t{blockIdx.x} * kBoxesPerBlock + threadIdx.x / kThreadsPerBox;
  T greatest = 0;
  if (place < total) {
    const Box<T> own = sorted.boxes[place];
    const T own_area = area(own);
    const int64_t own_label = sorted.labels[place];
    for_each_better(place, sorted.size, [&](int64_t better) {
      greatest = max_of(greatest, sorted.overlap(own, own_area, own_label, better));
    });
  }
#pragma unroll
  for (int offset = kThreadsPerBox / 2; offset > 0; offset /= 2) {
    greatest = max_of(greatest, __shfl_xor_sync(kFullWarp, greatest, offset));
  }
  if (place < total && threadIdx.x % kThreadsPerBox == 0) {
    beneath[place] = greatest;
  }
}

// 8 threads a box: what becomes of its score, -inf where that is not above the threshold. By index
// in the image, so that the stable sort that follows puts the lower index first.
template <typename T, typename Decay>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    decay_kernel(SortedBatch<T> sorted, const T* scores, const int64_t* order, const T* beneath,
                 int64_t total, Decay decay, T score_threshold, T* decayed) {
  const int64_t place = int64_t{blockIdx.x} * kBoxesPerBlock + threadIdx.x / kThreadsPerBox;
  T least = Decay::kLeftByNone;
  Box<T> own{};
  if (place < total) {
    own = sorted.boxes[place];
    const T own_area = area(own);
    const int64_t own_label = sorted.labels[place];
    for_each_better(place, sorted.size, [&](int64_t better) {
      const T overlap = sorted.overlap(own, own_area, own_label, better);
      least = min_of(least, decay.left_by(overlap, beneath[better]));
    });
  }
#pragma unroll
  for (int offset = kThreadsPerBox / 2; offset > 0; offset /= 2) {
    least = min_of(least, __shfl_xor_sync(kFullWarp, least, offset));
  }
  if (place < total && threadIdx.x % kThreadsPerBox == 0) {
    const int64_t i = place / sorted.size * sorted.size + order[place];
    const T score = mul(scores[i], decay.factor(least));
    decayed[i] =
        !has_nan(own) && score > score_threshold ? score : -std::numeric_limits<T>::infinity();
  }
}

// One thread a detection. sorted_scores, order: [images, size]; num_kept: 0 before.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const T* sorted_scores, const int64_t* order, int64_t size, int64_t images,
                 int64_t max_detections, int64_t* indices, T* kept_scores, int64_t* num_kept) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= images * max_detections) {
    return;
  }
  const int64_t image = at / max_detections, k = at % max_detections;
  const auto is_kept = [&](int64_t place) {
    return place < size &&
           sorted_scores[image * size + place] > -std::numeric_limits<T>::infinity();
  };
  const bool keep = is_kept(k);
  indices[at] = keep ? order[image * size + k] : -1;
  kept_scores[at] = keep ? sorted_scores[image * size + k] : T(0);
  if (keep && (k + 1 == max_detections || !is_kept(k + 1))) {
    num_kept[image] = k + 1;
  }
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> matrix_nms_cuda(const Tensor& boxes_, const Tensor& scores_,
                                                   const std::optional<Tensor>& labels_,
                                                   double sigma, bool is_gaussian,
                                                   double score_threshold, int64_t max_detections) {
  check_decaying_nms("matrix_nms", boxes_, scores_, labels_, sigma, max_detections);
  const LaunchScope scope(boxes_);
  const Tensor boxes = torch::stable::contiguous(boxes_);
  const Tensor scores = torch::stable::contiguous(scores_);
  std::optional<Tensor> labels_tensor;
  Integers labels{};
  if (labels_.has_value()) {
    labels_tensor = torch::stable::contiguous(*labels_);
    labels = {labels_tensor->const_data_ptr(), labels_tensor->scalar_type() == ScalarType::Long};
  }
  const int64_t images = boxes.size(0), size = boxes.size(1), total = images * size;
  Tensor indices = torch::stable::new_empty(boxes, {images, max_detections}, ScalarType::Long);
  Tensor kept_scores = torch::stable::new_empty(boxes, {images, max_detections});
  Tensor num_kept = torch::stable::new_zeros(boxes, {images}, ScalarType::Long);
  Tensor decayed = torch::stable::new_empty(boxes, {images, size});
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto* score_data = static_cast<const T*>(scores.const_data_ptr());
    if (total > 0) {
      const Tensor order_tensor = std::get<1>(stable_sort_descending(scores));
      const auto* order = static_cast<const int64_t*>(order_tensor.const_data_ptr());
      Tensor sorted_boxes = torch::stable::new_empty(boxes, {total, 4});
      Tensor sorted_labels = torch::stable::new_empty(boxes, {total}, ScalarType::Long);
      Tensor beneath_tensor = torch::stable::new_empty(boxes, {total});
      auto* beneath = static_cast<T*>(beneath_tensor.mutable_data_ptr());
      const SortedBatch<T> sorted{static_cast<Box<T>*>(sorted_boxes.mutable_data_ptr()),
                                  static_cast<int64_t*>(sorted_labels.mutable_data_ptr()), size};
      launch(&sort_boxes_kernel<T>, ceil_div(total, kThreads), kThreads, 0, scope.stream(),
             static_cast<const T*>(boxes.const_data_ptr()), score_data, order, labels, total,
             sorted);
      const int64_t blocks = ceil_div(total, kBoxesPerBlock);
      launch(&greatest_iou_kernel<T>, blocks, kThreads, 0, scope.stream(), sorted, total, beneath);
      dispatch_matrix_decay<T>(is_gaussian, sigma, [&](const auto& decay) {
        using Decay = std::decay_t<decltype(decay)>;
        launch(&decay_kernel<T, Decay>, blocks, kThreads, 0, scope.stream(), sorted, score_data,
               order, beneath, total, decay, static_cast<T>(score_threshold),
               static_cast<T*>(decayed.mutable_data_ptr()));
      });
    }
    if (images * max_detections > 0) {
      const auto [best, order] = stable_sort_descending(decayed);
      launch(&write_kernel<T>, ceil_div(images * max_detections, kThreads), kThreads, 0,
             scope.stream(), static_cast<const T*>(best.const_data_ptr()),
             static_cast<const int64_t*>(order.const_data_ptr()), size, images, max_detections,
             static_cast<int64_t*>(indices.mutable_data_ptr()),
             static_cast<T*>(kept_scores.mutable_data_ptr()),
             static_cast<int64_t*>(num_kept.mutable_data_ptr()));
    }
  });
  return {indices, kept_scores, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) { m.impl("matrix_nms", TORCH_BOX(&matrix_nms_cuda)); }

}  // namespace focalops
