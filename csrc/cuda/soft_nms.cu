// Soft-NMS on CUDA: a block an image, nothing waits for the host. Each round decays the scores
// beside the box that was kept last and finds the next best in the same pass; it ends with one
// barrier for all. An image reads its N boxes once a round, from cache: 24 bytes a box. The rounds
// depend on each other: latency is the limit, about N / 256 steps and two barriers a round.
#include <limits>

#include "../checks/nms.h"
#include "../math/nms.h"
#include "integers.cuh"
#include "launch.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;

// The better of two scored boxes: the higher score, then the lower index; one without an index (-1)
// is the worst.
template <typename T>
struct Scored {
  T score;
  int64_t index;

  __device__ __forceinline__ bool worse_than(const Scored& other) const {
    return other.index >= 0 &&
           (index < 0 || other.score > score || (other.score == score && other.index < index));
  }
};

template <typename T>
__device__ __forceinline__ Scored<T> best_of_warp(Scored<T> own) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Scored<T> other{__shfl_xor_sync(kFullWarp, own.score, offset),
                          __shfl_xor_sync(kFullWarp, own.index, offset)};
    own = own.worse_than(other) ? other : own;
  }
  return own;
}

// scores: [images, size], what they have become; a NaN: not to be kept any more.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    soft_nms_kernel(const T* all_boxes, const T* all_original, Integers labels, int64_t size,
                    ScoreDecay<T> decay, T score_threshold, int64_t max_detections, T* all_scores,
                    int64_t* all_indices, T* all_kept_scores, int64_t* num_kept) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ Scored<T> of_warps[kWarps];
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int64_t image = blockIdx.x, begin = image * size;
  const T* boxes = all_boxes + begin * 4;
  const T* original = all_original + begin;
  T* scores = all_scores + begin;
  int64_t* indices = all_indices + image * max_detections;
  T* kept_scores = all_kept_scores + image * max_detections;

  int64_t kept = -1, count = 0;  // kept: the last one
  Box<T> kept_box{};
  int64_t kept_label = 0;
  while (count < max_detections) {
    Scored<T> best{0, -1};
    for (int64_t i = thread; i < size; i += kThreads) {
      const Box<T> box = load_box(boxes + 4 * i);
      T score;
      if (kept < 0) {
        score = has_nan(box) ? std::numeric_limits<T>::quiet_NaN() : original[i];
        scores[i] = score;
      } else {
        score = scores[i];
        const T overlap = iou(kept_box, box);
        if (i == kept) {
          score = std::numeric_limits<T>::quiet_NaN();
          scores[i] = score;
        } else if (score == score && overlap > 0 && labels.at(begin + i, 0) == kept_label) {
          score = decay(score, overlap);
          scores[i] = score;
        }
      }
      const Scored<T> own{score, i};
      if (score > score_threshold && best.worse_than(own)) {
        best = own;
      }
    }
    best = best_of_warp(best);
    __syncthreads();  // the previous round's have been read
    if (lane == 0) {
      of_warps[warp] = best;
    }
    __syncthreads();
    best = best_of_warp(lane < kWarps ? of_warps[lane] : Scored<T>{0, -1});
    if (best.index < 0) {
      break;
    }
    kept = best.index;
    kept_box = load_box(boxes + 4 * kept);
    kept_label = labels.at(begin + kept, 0);
    if (thread == 0) {
      indices[count] = kept;
      kept_scores[count] = best.score;
    }
    ++count;
  }
  for (int64_t i = count + thread; i < max_detections; i += kThreads) {
    indices[i] = -1;
    kept_scores[i] = 0;
  }
  if (thread == 0) {
    num_kept[image] = count;
  }
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> soft_nms_cuda(const Tensor& boxes_, const Tensor& scores_,
                                                 const std::optional<Tensor>& labels_,
                                                 double iou_threshold, double sigma,
                                                 bool is_gaussian, double score_threshold,
                                                 int64_t max_detections) {
  check_decaying_nms("soft_nms", boxes_, scores_, labels_, sigma, max_detections);
  const LaunchScope scope(boxes_);
  const Tensor boxes = torch::stable::contiguous(boxes_);
  const Tensor scores = torch::stable::contiguous(scores_);
  std::optional<Tensor> labels_tensor;
  Integers labels{};
  if (labels_.has_value()) {
    labels_tensor = torch::stable::contiguous(*labels_);
    labels = {labels_tensor->const_data_ptr(), labels_tensor->scalar_type() == ScalarType::Long};
  }
  const int64_t images = boxes.size(0), size = boxes.size(1);
  Tensor indices = torch::stable::new_empty(boxes, {images, max_detections}, ScalarType::Long);
  Tensor kept_scores = torch::stable::new_empty(boxes, {images, max_detections});
  Tensor num_kept = torch::stable::new_empty(boxes, {images}, ScalarType::Long);
  Tensor decayed = torch::stable::new_empty(boxes, {images, size});
  if (images == 0) {
    return {indices, kept_scores, num_kept};
  }
  dispatch_compute(boxes.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    launch(&soft_nms_kernel<T>, images, kThreads, 0, scope.stream(),
           static_cast<const T*>(boxes.const_data_ptr()),
           static_cast<const T*>(scores.const_data_ptr()), labels, size,
           ScoreDecay<T>{round_down<T>(iou_threshold), static_cast<T>(sigma), is_gaussian},
           static_cast<T>(score_threshold), max_detections,
           static_cast<T*>(decayed.mutable_data_ptr()),
           static_cast<int64_t*>(indices.mutable_data_ptr()),
           static_cast<T*>(kept_scores.mutable_data_ptr()),
           static_cast<int64_t*>(num_kept.mutable_data_ptr()));
  });
  return {indices, kept_scores, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms_cuda)); }

}  // namespace focalops
