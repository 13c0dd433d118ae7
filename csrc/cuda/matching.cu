// Anchor matching on CUDA: no matrix of IoUs; all images in two launches and one that clears the
// boxes' best IoUs.
//
// A thread has one anchor of one image, and a block the image's boxes in shared memory, a chunk at
// a time. Neighbouring anchors lie close together, so that most boxes miss the range of a warp's 32
// anchors as a whole: their IoU with each of them is 0. The lanes test 32 boxes at once against
// that range, and the warp visits those that pass in ascending order. The first pass writes the
// matches and, by integer maxima on the bits of the IoUs (which are >= 0), the best IoU of each
// box. The second gives each anchor whose IoU with some box is that box's best, to the bit, its own
// best box.
//
// 24 bytes an anchor and image: its coordinates, which later images and the second pass find in the
// L2 cache, and its match.
#include "../math/box.h"
#include "../rows.h"
#include "launch.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;
constexpr int kBoxChunk = 256;  // boxes in shared memory

// The bits of an IoU > 0 are ordered as the numbers are; 0 stands for all that is not greater.
template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = unsigned int;
};
template <>
struct BitsOf<double> {
  using type = unsigned long long;
};
template <typename T>
using Bits = typename BitsOf<T>::type;

template <typename T>
__device__ __forceinline__ Bits<T> positive_bits(T value) {
  Bits<T> bits = 0;
  if (value > 0) {
    memcpy(&bits, &value, sizeof bits);
  }
  return bits;
}

// The greatest of the warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max_of(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned int warp_max(unsigned int value) {
  return __reduce_max_sync(kFullWarp, value);
}
#endif

// int32 or int64 counts of boxes; none: every image has all of them.
struct Counts {
  const void* data;
  bool is_int64;
  int64_t stride;
  int64_t most;

  __device__ __forceinline__ int64_t operator[](int64_t image) const {
    if (data == nullptr) {
      return most;
    }
    const int64_t i = image * stride;
    const int64_t count =
        is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    return count < 0 ? 0 : count > most ? most : count;
  }
};

// The smallest box that holds the anchors of the warp, in every lane. A NaN is in no range.
template <typename T>
__device__ __forceinline__ Box<T> range_of_warp(const Box<T>& anchor, bool present) {
  const T infinity = static_cast<T>(__builtin_huge_valf());
  Box<T> range{infinity, infinity, -infinity, -infinity};
  if (present) {
    range = {min_of(anchor.x1, range.x1), min_of(anchor.y1, range.y1), max_of(anchor.x2, range.x2),
             max_of(anchor.y2, range.y2)};
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    range.x1 = min_of(range.x1, __shfl_xor_sync(kFullWarp, range.x1, offset));
    range.y1 = min_of(range.y1, __shfl_xor_sync(kFullWarp, range.y1, offset));
    range.x2 = max_of(range.x2, __shfl_xor_sync(kFullWarp, range.x2, offset));
    range.y2 = max_of(range.y2, __shfl_xor_sync(kFullWarp, range.y2, offset));
  }
  return range;
}

template <typename T, bool RestoreLowQuality>
__global__ void __launch_bounds__(kThreads)
    match_anchors_kernel(Rows<Box<T>, T> anchors,   // [A, 4]
                         Rows<Box<T>, T> gt_boxes,  // [B, M, 4]
                         Counts counts,             // [B]
                         int64_t num_anchors, int64_t tiles, T fg_iou_threshold, T bg_iou_threshold,
                         Bits<T>* best_of_boxes,  // [B, M], null: not wanted
                         int64_t* matches) {      // [B, A]
  __shared__ Box<T> boxes[kBoxChunk];
  __shared__ T areas[kBoxChunk];
  __shared__ Bits<T> best_bits[kBoxChunk];
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int64_t image = blockIdx.x / tiles;
  const int64_t i = (blockIdx.x - image * tiles) * kThreads + thread;
  const int64_t count = counts[image];

  const bool present = i < num_anchors;
  const Box<T> anchor = present ? anchors.load(0, i) : Box<T>{0, 0, 0, 0};
  const T anchor_area = area(anchor);
  const Box<T> range = range_of_warp(anchor, present);

  T best_iou = 0;
  int64_t best_box = 0;
  bool is_best = false;
  for (int64_t begin = 0; begin < count; begin += kBoxChunk) {
    const int n = count - begin < kBoxChunk ? static_cast<int>(count - begin) : kBoxChunk;
    Bits<T>* best_of_chunk =
        best_of_boxes == nullptr ? nullptr : best_of_boxes + image * counts.most + begin;
    if (thread < n) {
      const Box<T> box = gt_boxes.load(image, begin + thread);
      boxes[thread] = box;
      areas[thread] = area(box);
      best_bits[thread] = RestoreLowQuality ? best_of_chunk[thread] : 0;
    }
    __syncthreads();
    for (int group = 0; group < n; group += kWarpSize) {
      const int mine = group + lane;
      bool visit = mine < n && intersects(boxes[mine < n ? mine : 0], range);
      if constexpr (RestoreLowQuality) {
        visit = visit && best_bits[mine] > 0;
      }
      for (unsigned mask = __ballot_sync(kFullWarp, visit); mask != 0; mask &= mask - 1) {
        const int j = group + __ffs(mask) - 1;
        const T value = iou(anchor, boxes[j], anchor_area, areas[j]);
        if (value > best_iou) {
          best_iou = value;
          best_box = begin + j;
        }
        const Bits<T> bits = positive_bits(value);
        if constexpr (RestoreLowQuality) {
          is_best |= bits == best_bits[j];
        } else {
          const Bits<T> best_of_warp = warp_max(bits);
          if (lane == 0 && best_of_warp > 0) {
            atomicMax(&best_bits[j], best_of_warp);
          }
        }
      }
    }
    __syncthreads();
    if constexpr (!RestoreLowQuality) {
      if (best_of_chunk != nullptr && thread < n && best_bits[thread] > 0) {
        atomicMax(&best_of_chunk[thread], best_bits[thread]);
      }
    }
  }
  if (present) {
    int64_t* match = matches + image * num_anchors + i;
    if constexpr (RestoreLowQuality) {
      if (is_best) {
        *match = best_box;
      }
    } else {
      *match = count == 0 || best_iou < bg_iou_threshold ? -1
               : best_iou < fg_iou_threshold             ? -2
                                                         : best_box;
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

Tensor match_anchors_cuda(const Tensor& anchors_, const Tensor& gt_boxes_,
                          const std::optional<Tensor>& counts_, double fg_iou_threshold,
                          double bg_iou_threshold, bool allow_low_quality_matches) {
  check_match_anchors(anchors_, gt_boxes_, counts_, fg_iou_threshold, bg_iou_threshold);
  const LaunchScope scope(anchors_);
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_anchors = anchors.size(0);
  Tensor matches = torch::stable::new_empty(anchors, {num_images, num_anchors}, ScalarType::Long);
  if (matches.numel() == 0) {
    return matches;
  }
  Counts counts{nullptr, false, 0, max_boxes};
  if (counts_.has_value()) {
    counts.data = counts_->const_data_ptr();
    counts.is_int64 = counts_->scalar_type() == ScalarType::Long;
    counts.stride = counts_->stride(0);
  }
  const int64_t tiles = ceil_div(num_anchors, kThreads);
  dispatch_compute(anchors.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const Rows<Box<T>, T> anchor_rows(anchors, {0, 4}), box_rows(gt_boxes, {4 * max_boxes, 4});
    std::optional<Tensor> best;  // as wide as T, all bits 0
    if (allow_low_quality_matches) {
      best = torch::stable::new_zeros(anchors, {num_images, max_boxes});
    }
    auto* best_of_boxes =
        best.has_value() ? static_cast<Bits<T>*>(best->mutable_data_ptr()) : nullptr;
    auto* out = static_cast<int64_t*>(matches.mutable_data_ptr());
    const auto run = [&](auto* kernel) {
      launch(kernel, num_images * tiles, kThreads, 0, scope.stream(), anchor_rows, box_rows, counts,
             num_anchors, tiles, T(fg_iou_threshold), T(bg_iou_threshold), best_of_boxes, out);
    };
    run(&match_anchors_kernel<T, false>);
    if (allow_low_quality_matches) {
      run(&match_anchors_kernel<T, true>);
    }
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("match_anchors", TORCH_BOX(&match_anchors_cuda));
}

}  // namespace focalops
