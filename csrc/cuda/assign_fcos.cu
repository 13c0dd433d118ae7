// FCOS' assignment on CUDA: all images in one launch.
//
// A thread has one point of one image, and a block the image's boxes in shared memory, a chunk at
// a time. Neighbouring points lie close together, so that most boxes miss the range of a warp's 32
// points as a whole. The lanes test 32 boxes at once against that range, and the warp visits those
// that pass in ascending order.
//
// 16 bytes a point and image: its coordinates, which later images find in the L2 cache, and its
// match.
#include "../checks/assign.h"
#include "../math/assign.h"
#include "ground_truth.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;
constexpr int kBoxChunk = 256;  // boxes in shared memory

template <typename T>
struct Levels {
  int count;
  int64_t end[kMaxLevels];  // of the points of a level
  FcosLevel<T> of[kMaxLevels];

  // Without an index that the compiler does not know, for which it would need local memory.
  __device__ __forceinline__ FcosLevel<T> at(int64_t point) const {
    FcosLevel<T> level = of[0];
#pragma unroll
    for (int i = 1; i < static_cast<int>(kMaxLevels); ++i) {
      if (i < count && point >= end[i - 1]) {
        level = of[i];
      }
    }
    return level;
  }
};

// The launch reads and writes these.
template <typename T>
struct Fcos {
  const T* points;  // [N, 2]
  int64_t num_points, tiles;
  Levels<T> levels;
  Rows<Box<T>, T> gt_boxes;  // [B, M, 4]
  Counts counts;             // [B]
  const uint8_t* crowd;      // [B, M], null: none is
  int64_t* matches;          // [B, N]
};

template <typename Rule, typename T>
__global__ void __launch_bounds__(kThreads)
    assign_fcos_kernel(const __grid_constant__ Fcos<T> fcos) {
  __shared__ Box<T> boxes[kBoxChunk];
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int64_t image = blockIdx.x / fcos.tiles;
  const int64_t i = (blockIdx.x - image * fcos.tiles) * kThreads + thread;
  const int64_t count = fcos.counts[image];

  const bool present = i < fcos.num_points;
  const T nan = static_cast<T>(__builtin_nanf(""));
  const Point<T> point =
      present ? Point<T>{fcos.points[2 * i], fcos.points[2 * i + 1]} : Point<T>{nan, nan};
  const FcosLevel<T> level = fcos.levels.at(i);
  const Box<T> range = range_of_warp(Box<T>{point.x, point.y, point.x, point.y}, present);

  bool in_crowd = false;
  int64_t match = -1;
  T worth = -static_cast<T>(__builtin_huge_valf());
  for (int pass = fcos.crowd == nullptr; pass < 2; ++pass) {  // the crowds, the other boxes
    for (int64_t begin = 0; begin < count; begin += kBoxChunk) {
      const int n = count - begin < kBoxChunk ? static_cast<int>(count - begin) : kBoxChunk;
      load_boxes(fcos.gt_boxes, fcos.crowd, image, fcos.counts.most, begin, n,
                 pass == 0 ? kCrowd : kObject, boxes);
      __syncthreads();
      for (int group = 0; group < n; group += kWarpSize) {
        const int mine = group + lane;
        const bool visit = mine < n && intersects(boxes[mine < n ? mine : 0], range);
        for (unsigned mask = __ballot_sync(kFullWarp, visit); mask != 0; mask &= mask - 1) {
          const int j = group + __ffs(mask) - 1;
          if (pass == 0) {
            in_crowd |= is_inside(point, boxes[j], T(0));
          } else {
            const FcosBox<T> of = fcos_box<Rule>(boxes[j]);
            if (of.worth > worth && fcos_matches<Rule>(point, of, level)) {
              worth = of.worth;
              match = begin + j;
            }
          }
        }
      }
      __syncthreads();
    }
  }
  if (present) {
    fcos.matches[image * fcos.num_points + i] = in_crowd ? -2 : match;
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename T>
Levels<T> levels_of(const FcosOptions& options) {
  const std::vector<FcosLevel<T>> all = fcos_levels<T>(options);
  Levels<T> levels{static_cast<int>(all.size()), {}, {}};
  int64_t end = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    end += options.level_sizes[i];
    levels.end[i] = end;
    levels.of[i] = all[i];
  }
  return levels;
}

Tensor assign_fcos_cuda(const Tensor& points_, const Tensor& gt_boxes_,
                        const std::optional<Tensor>& counts_, const std::optional<Tensor>& crowd_,
                        const std::vector<int64_t>& level_sizes, const std::vector<double>& strides,
                        const std::vector<double>& least, const std::vector<double>& most,
                        double center_radius, int64_t rule) {
  const FcosOptions options{level_sizes, strides, least, most, center_radius, rule};
  check_assign_fcos(points_, gt_boxes_, counts_, crowd_, options);
  const LaunchScope scope(points_);
  const Tensor points = torch::stable::contiguous(points_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_points = points.size(0);
  Tensor matches = torch::stable::new_empty(points, {num_images, num_points}, ScalarType::Long);
  if (matches.numel() == 0) {
    return matches;
  }
  const int64_t tiles = ceil_div(num_points, kThreads);
  dispatch_compute(points.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const Fcos<T> fcos{static_cast<const T*>(points.const_data_ptr()),
                       num_points,
                       tiles,
                       levels_of<T>(options),
                       Rows<Box<T>, T>(gt_boxes, {4 * max_boxes, 4}),
                       {Integers(counts_), counts_.has_value() ? counts_->stride(0) : 0, max_boxes},
                       data_of<uint8_t>(crowd),
                       data_of<int64_t>(matches)};
    dispatch_fcos(options, [&](auto rule_tag) {
      launch(&assign_fcos_kernel<decltype(rule_tag), T>, num_images * tiles, kThreads, 0,
             scope.stream(), fcos);
    });
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("assign_fcos", TORCH_BOX(&assign_fcos_cuda));
}

}  // namespace focalops
