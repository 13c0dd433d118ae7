// Anchor matching on CUDA: no matrix of IoUs; all images in two launches and one that clears the
// boxes' best IoUs.
//
// A thread has one anchor of one image, and a block the image's boxes in shared memory, a chunk at
// a time. Neighbouring anchors lie close together, so that most boxes miss the range of a warp's 32
// anchors as a whole: their IoU with each of them is 0. The lanes test 32 boxes at once against
// that range, and the warp visits those that pass in ascending order. The first pass writes the
// matches and, by integer maxima on the bits of the IoUs (which are >= 0), the best IoU of each
// box. The second gives each anchor whose IoU with some box is that box's best, to the bit, its own
// best box or, by another rule, the last such box. Where only the first of a box's best anchors
// counts, a pass finds it by an integer maximum, and a thread a box hands it over.
//
// Crowds go first: an anchor inside one becomes an empty box, which overlaps nothing. Boxes that
// are no objects are NaN in shared memory, and so never visited.
//
// 24 bytes an anchor and image: its coordinates, which later images and the second pass find in the
// L2 cache, and its match.
#include "../checks/matching.h"
#include "../matching.h"
#include "ground_truth.cuh"

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

enum class Pass { kMatch, kOwnBest, kLastBox, kFindFirstAnchor };

// A launch reads and writes these.
template <typename T>
struct Matching {
  Rows<Box<T>, T> anchors;   // [A, 4]
  Rows<Box<T>, T> gt_boxes;  // [B, M, 4]
  Counts counts;             // [B]
  const uint8_t* roles;      // [B, M], null: all are objects
  int64_t num_anchors, tiles;
  bool ignore_wrt_candidates;
  T fg_iou_threshold, bg_iou_threshold, crowd_threshold;
  Bits<T> least_best;                  // of a box that shares in low-quality matches
  Bits<T>* best_of_boxes;              // [B, M], null: not wanted
  unsigned long long* first_of_boxes;  // [B, M], ~index, 0: none
  int64_t* matches;                    // [B, A]
};

template <typename T, Pass pass>
__global__ void __launch_bounds__(kThreads)
    match_anchors_kernel(const __grid_constant__ Matching<T> m) {
  __shared__ Box<T> boxes[kBoxChunk];
  __shared__ T areas[kBoxChunk];
  __shared__ Bits<T> best_bits[kBoxChunk];
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int64_t image = blockIdx.x / m.tiles;
  const int64_t i = (blockIdx.x - image * m.tiles) * kThreads + thread;
  const int64_t count = m.counts[image];

  const bool present = i < m.num_anchors;
  Box<T> anchor = present ? m.anchors.load(0, i) : Box<T>{0, 0, 0, 0};
  T anchor_area = area(anchor);
  const Box<T> range = range_of_warp(anchor, present);

  bool ignored = false;
  for (int64_t begin = 0; m.roles != nullptr && begin < count; begin += kBoxChunk) {
    const int n = count - begin < kBoxChunk ? static_cast<int>(count - begin) : kBoxChunk;
    load_boxes(m.gt_boxes, m.roles, image, m.counts.most, begin, n, kCrowd, boxes);
    __syncthreads();
    for (int group = 0; group < n; group += kWarpSize) {
      const int mine = group + lane;
      const bool visit = mine < n && intersects(boxes[mine < n ? mine : 0], range);
      for (unsigned mask = __ballot_sync(kFullWarp, visit); mask != 0; mask &= mask - 1) {
        const int j = group + __ffs(mask) - 1;
        const T of = m.ignore_wrt_candidates ? anchor_area : area(boxes[j]);
        ignored |= share_inside(anchor, boxes[j], of) > m.crowd_threshold;
      }
    }
    __syncthreads();
  }
  if (ignored) {
    anchor = {0, 0, 0, 0};
    anchor_area = 0;
  }

  T best_iou = 0;
  int64_t best_box = m.roles == nullptr ? 0 : -1;
  int64_t claimed_by = -1;
  for (int64_t begin = 0; begin < count; begin += kBoxChunk) {
    const int n = count - begin < kBoxChunk ? static_cast<int>(count - begin) : kBoxChunk;
    const int64_t first = image * m.counts.most + begin;
    load_boxes(m.gt_boxes, m.roles, image, m.counts.most, begin, n, kObject, boxes);
    if (thread < n) {
      areas[thread] = area(boxes[thread]);
      best_bits[thread] = pass == Pass::kMatch ? 0 : m.best_of_boxes[first + thread];
    }
    __syncthreads();
    for (int j = 0; best_box < 0 && j < n; ++j) {  // the first object, which IoUs of 0 leave
      best_box = m.roles[first + j] == kObject ? begin + j : -1;
    }
    for (int group = 0; group < n; group += kWarpSize) {
      const int mine = group + lane;
      bool visit = mine < n && intersects(boxes[mine < n ? mine : 0], range);
      if constexpr (pass != Pass::kMatch) {
        visit = visit && best_bits[mine] >= m.least_best;
      }
      for (unsigned mask = __ballot_sync(kFullWarp, visit); mask != 0; mask &= mask - 1) {
        const int j = group + __ffs(mask) - 1;
        const T value = iou(anchor, boxes[j], anchor_area, areas[j]);
        if (value > best_iou) {
          best_iou = value;
          best_box = begin + j;
        }
        const Bits<T> bits = positive_bits(value);
        if constexpr (pass == Pass::kMatch) {
          const Bits<T> best_of_warp = warp_max(bits);
          if (lane == 0 && best_of_warp > 0) {
            atomicMax(&best_bits[j], best_of_warp);
          }
        } else if (bits == best_bits[j]) {
          claimed_by = begin + j;
          if constexpr (pass == Pass::kFindFirstAnchor) {
            atomicMax(&m.first_of_boxes[first + j], ~static_cast<unsigned long long>(i));
          }
        }
      }
    }
    __syncthreads();
    if constexpr (pass == Pass::kMatch) {
      if (m.best_of_boxes != nullptr && thread < n && best_bits[thread] > 0) {
        atomicMax(&m.best_of_boxes[first + thread], best_bits[thread]);
      }
    }
  }
  if (present) {
    int64_t* match = m.matches + image * m.num_anchors + i;
    if constexpr (pass == Pass::kMatch) {
      *match = ignored                                                       ? -2
               : count == 0 || best_box < 0 || best_iou < m.bg_iou_threshold ? -1
               : best_iou < m.fg_iou_threshold                               ? -2
                                                                             : best_box;
    } else if constexpr (pass != Pass::kFindFirstAnchor) {
      if (claimed_by >= 0) {
        *match = pass == Pass::kOwnBest ? best_box : claimed_by;
      }
    }
  }
}

// Each box has a thread; of boxes with the same first anchor the last gets it, or by another rule
// the first.
__global__ void __launch_bounds__(kThreads)
    assign_first_anchors_kernel(const unsigned long long* first_of_boxes,  // [B, M]
                                int64_t num_images, int64_t max_boxes, int64_t num_anchors,
                                bool first_box, int64_t* matches) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= num_images * max_boxes || first_of_boxes[k] == 0) {
    return;
  }
  const int64_t image = k / max_boxes;
  const int64_t begin = first_box ? image * max_boxes : k + 1;
  const int64_t end = first_box ? k : (image + 1) * max_boxes;
  for (int64_t other = begin; other < end; ++other) {
    if (first_of_boxes[other] == first_of_boxes[k]) {
      return;
    }
  }
  const auto anchor = static_cast<int64_t>(~first_of_boxes[k]);
  matches[image * num_anchors + anchor] = k - image * max_boxes;
}

// ---- host ---------------------------------------------------------------------------------------

// The bits that positive_bits() gives; at least those of the smallest number > 0.
template <typename T>
Bits<T> least_bits(T value) {
  Bits<T> bits = 1;
  if (value > 0) {
    std::memcpy(&bits, &value, sizeof bits);
  }
  return bits;
}

Tensor match_anchors_cuda(const Tensor& anchors_, const Tensor& gt_boxes_,
                          const std::optional<Tensor>& counts_, double fg_iou_threshold,
                          double bg_iou_threshold, int64_t low_quality, double min_pos_iou,
                          const std::optional<Tensor>& roles_, double crowd_threshold,
                          bool ignore_wrt_candidates) {
  check_match_anchors(
      anchors_, gt_boxes_, counts_, roles_,
      {fg_iou_threshold, bg_iou_threshold, low_quality, min_pos_iou, crowd_threshold});
  const LaunchScope scope(anchors_);
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_anchors = anchors.size(0);
  Tensor matches = torch::stable::new_empty(anchors, {num_images, num_anchors}, ScalarType::Long);
  if (matches.numel() == 0) {
    return matches;
  }
  const Counts counts{Integers(counts_), counts_.has_value() ? counts_->stride(0) : 0, max_boxes};
  std::optional<Tensor> roles;
  if (roles_.has_value()) {
    roles = torch::stable::contiguous(*roles_);
  }
  const auto rule = static_cast<LowQuality>(low_quality);
  const int64_t tiles = ceil_div(num_anchors, kThreads);
  dispatch_compute(anchors.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    std::optional<Tensor> best, first;  // best: as wide as T, all bits 0
    if (rule != LowQuality::kNone) {
      best = torch::stable::new_zeros(anchors, {num_images, max_boxes});
    }
    if (takes_first_anchor(rule)) {
      first = torch::stable::new_zeros(anchors, {num_images, max_boxes}, ScalarType::Long);
    }
    const Matching<T> matching{
        Rows<Box<T>, T>(anchors, {0, 4}),
        Rows<Box<T>, T>(gt_boxes, {4 * max_boxes, 4}),
        counts,
        roles.has_value() ? static_cast<const uint8_t*>(roles->const_data_ptr()) : nullptr,
        num_anchors,
        tiles,
        ignore_wrt_candidates,
        T(fg_iou_threshold),
        T(bg_iou_threshold),
        T(crowd_threshold),
        least_bits(T(min_pos_iou)),
        best.has_value() ? static_cast<Bits<T>*>(best->mutable_data_ptr()) : nullptr,
        first.has_value() ? static_cast<unsigned long long*>(first->mutable_data_ptr()) : nullptr,
        static_cast<int64_t*>(matches.mutable_data_ptr())};
    const auto run = [&](auto* kernel) {
      launch(kernel, num_images * tiles, kThreads, 0, scope.stream(), matching);
    };
    run(&match_anchors_kernel<T, Pass::kMatch>);
    if (rule == LowQuality::kOwnBest) {
      run(&match_anchors_kernel<T, Pass::kOwnBest>);
    } else if (rule == LowQuality::kLastBox) {
      run(&match_anchors_kernel<T, Pass::kLastBox>);
    } else if (takes_first_anchor(rule) && max_boxes > 0) {
      run(&match_anchors_kernel<T, Pass::kFindFirstAnchor>);
      launch(&assign_first_anchors_kernel, ceil_div(num_images * max_boxes, kThreads), kThreads, 0,
             scope.stream(), matching.first_of_boxes, num_images, max_boxes, num_anchors,
             rule == LowQuality::kFirstBoxFirstAnchor, matching.matches);
    }
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("match_anchors", TORCH_BOX(&match_anchors_cuda));
}

}  // namespace focalops
