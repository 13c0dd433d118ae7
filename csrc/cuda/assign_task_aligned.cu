// Task-aligned assignment on CUDA: no matrix of anchors and boxes; all images in four launches, or
// five, and three that clear.
//
// Points come in tiles of 32 consecutive ones, whose ranges the first launch finds. In the second a
// block has one box at a time: each lane tests a tile, and the warps visit those that the box
// meets, a lane a point, and keep the box's best anchors sorted over their lanes. These claim the
// anchors by integer maxima, which leave the same bits in any order. In the third an anchor has a
// thread, which settles the claims, and the last turns metrics into targets.
//
// 36 bytes an anchor and image: prediction, match, target and the greatest overlap with its box;
// the scores of the pairs, a sector each; points and ranges, which stay in the L2 cache.
#include "../checks/assign.h"
#include "assign.cuh"
#include "ground_truth.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;
constexpr int kBoxThreads = 128;
constexpr int kBoxWarps = kBoxThreads / kWarpSize;

struct Most {
  unsigned int metric, overlap;  // bits
};

// The launches read and write these.
struct Assignment {
  TaskAligned rule;
  int topk, final_topk;
  ClassScores scores;
  const float* points;              // [N, 2]
  Rows<Box<float>, float> pred;     // [B, N, 4]
  Rows<Box<float>, float> objects;  // [B, M, 4]
  const int64_t* labels;            // [B, M]
  const uint8_t* crowd;             // [B, M], null: none is
  Counts counts;
  int64_t num_images, num_points, tiles;
  Box<float>* ranges;  // [T], or [B, T] of predictions
  uint8_t* in_crowd;   // [B, N], null: none is
  Key* best;           // [B, N], overlap and box; then Settled
  Most* most;          // [B, M]
  int64_t* matches;    // [B, N], Claims before
  float* targets;      // [B, N], the metric before

  __device__ __forceinline__ Point<float> point(int64_t n) const {
    return {points[2 * n], points[2 * n + 1]};
  }
  __device__ __forceinline__ int64_t label(int64_t image, int64_t j) const {
    return labels[image * counts.most + j];
  }
  __device__ __forceinline__ bool is_crowd(int64_t image, int64_t j) const {
    return crowd != nullptr && crowd[image * counts.most + j] != 0;
  }
  __device__ __forceinline__ bool is_object(int64_t image, int64_t j) const {
    return j < counts[image] && !is_crowd(image, j) && scores.has(label(image, j));
  }
};

// What is left of an anchor whose claims are settled.
struct Settled {
  float overlap;
  unsigned int kept;  // among the box's best, where these count
};
static_assert(sizeof(Settled) == sizeof(Key) && sizeof(Claims) == sizeof(int64_t));

__device__ __forceinline__ unsigned int bits_of(float value) { return __float_as_uint(value); }

template <IouKind Kind>
__device__ __forceinline__ float overlap_of(const Box<float>& predicted, const Box<float>& object,
                                            const IouTerms<float>& terms) {
  const float value =
      task_overlap<Kind>().value(predicted, object, iou_terms<Kind>(predicted), terms);
  return value > 0 ? value : 0.0f;
}

// A warp has a tile of points, or of the predictions of an image; and, where there are crowds, an
// image's points.
__global__ void __launch_bounds__(kThreads)
    find_tile_ranges_kernel(const __grid_constant__ Assignment a, int64_t images,
                            bool predictions) {
  const int64_t tile = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t image = tile / a.tiles, n = (tile - image * a.tiles) * kWarpSize + lane;
  if (image >= images) {
    return;
  }
  const bool present = n < a.num_points;
  const Point<float> point = present ? a.point(n) : Point<float>{0, 0};
  const bool writes = predictions || image == 0;
  Box<float> box{point.x, point.y, point.x, point.y};
  if (predictions && present) {
    box = a.pred.load(image, n);
  }
  const Box<float> range = range_of_warp(box, present);
  if (lane == 0 && writes) {
    a.ranges[tile] = range;
  }
  if (a.in_crowd != nullptr && present) {
    bool inside = false;
    for (int64_t j = 0; j < a.counts[image]; ++j) {
      inside |= a.is_crowd(image, j) && is_inside(point, a.objects.load(image, j), 0.0f);
    }
    a.in_crowd[image * a.num_points + n] = inside;
  }
}

template <IouKind Kind>
__global__ void __launch_bounds__(kBoxThreads)
    claim_anchors_kernel(const __grid_constant__ Assignment a) {
  __shared__ Key keys[kBoxWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t slot = blockIdx.x; slot < a.num_images * a.counts.most; slot += gridDim.x) {
    const int64_t image = slot / a.counts.most, j = slot - image * a.counts.most;
    if (!a.is_object(image, j)) {
      continue;
    }
    const Box<float> object = a.objects.load(image, j), region = a.rule.region(object);
    const IouTerms<float> terms = iou_terms<Kind>(object);
    const int64_t label = a.label(image, j), first = image * a.num_points;
    const auto box_index = static_cast<uint32_t>(j);
    TopK top;
    const Box<float>* ranges = a.ranges + (a.rule.inside_last ? image * a.tiles : 0);
    for (int64_t begin = warp; begin < a.tiles; begin += kBoxWarps * kWarpSize) {
      for (unsigned mask = tiles_met(ranges, a.tiles, region, begin, kBoxWarps); mask != 0;
           mask &= mask - 1) {
        const int64_t n = (begin + int64_t{__ffs(mask) - 1} * kBoxWarps) * kWarpSize + lane;
        Key key = 0;
        if (n < a.num_points &&
            (a.rule.inside_last || is_inside(a.point(n), region, a.rule.margin)) &&
            !(a.in_crowd != nullptr && a.in_crowd[first + n])) {
          const float overlap = overlap_of<Kind>(a.pred.load(image, n), object, terms);
          if (overlap > 0) {
            if (a.rule.rivals == Rivals::kHolders) {
              atomicMax(a.best + first + n, Key{ranked(overlap, box_index)});
            }
            const float metric = a.rule.metric(a.scores.at(image, n, label), overlap);
            key = metric > 0 ? Key{ranked(metric, static_cast<uint32_t>(n))} : 0;
          }
        }
        top.offer(key, a.topk);
      }
    }
    if (warp > 0) {
      keys[warp][lane] = top.mine();
    }
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kBoxWarps; ++other) {
        top.merge(keys[other][kWarpSize - 1 - lane]);
      }
      const int64_t n = index_of(top.mine());
      if (lane < a.topk && top.mine() != 0 &&
          (!a.rule.inside_last || is_inside(a.point(n), region, a.rule.margin))) {
        const Claims mine = Claims::of(box_index, static_cast<uint32_t>(a.counts.most));
        auto* claims = reinterpret_cast<unsigned int*>(a.matches + first + n);
        atomicMax(claims, mine.last);
        atomicMax(claims + 1, mine.first);
        if (a.rule.rivals == Rivals::kTakers) {
          const float overlap = overlap_of<Kind>(a.pred.load(image, n), object, terms);
          atomicMax(a.best + first + n, Key{ranked(overlap, box_index)});
        }
      }
    }
    __syncthreads();
  }
}

// The box of the image that the prediction overlaps most, of equal ones the first; the warp's lanes
// together.
template <IouKind Kind>
__device__ __forceinline__ int64_t most_overlapped(const Assignment& a, int64_t image,
                                                   const Box<float>& predicted) {
  Key best = 0;
  for (int64_t j = threadIdx.x % kWarpSize; j < a.counts[image]; j += kWarpSize) {
    if (a.is_object(image, j)) {
      const Box<float> object = a.objects.load(image, j);
      const float overlap = overlap_of<Kind>(predicted, object, iou_terms<Kind>(object));
      const Key key = overlap > 0 ? Key{ranked(overlap, static_cast<uint32_t>(j))} : 0;
      best = key > best ? key : best;
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Key other = __shfl_xor_sync(kFullWarp, best, offset);
    best = other > best ? other : best;
  }
  return index_of(best);
}

// Of whole warps each has one image. Without the one block, the compiler spills for 12.0.
template <IouKind Kind>
__global__ void __launch_bounds__(kThreads, 1)
    settle_claims_kernel(const __grid_constant__ Assignment a) {
  const int64_t tile = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t image = tile / a.tiles, n = (tile - image * a.tiles) * kWarpSize + lane;
  if (image >= a.num_images) {
    return;
  }
  const bool present = n < a.num_points;
  const int64_t i = image * a.num_points + (present ? n : 0);
  const auto boxes = static_cast<uint32_t>(a.counts.most);
  Claims claims{0, 0};
  Box<float> predicted{0, 0, 0, 0};
  if (present) {
    const auto* of_anchor = reinterpret_cast<const uint2*>(a.matches) + i;
    claims = {of_anchor->x, of_anchor->y};
    predicted = a.pred.load(image, n);
  }
  int64_t match = claims.any() ? int64_t{claims.box()} : -1;
  const bool is_contested = claims.any() && !claims.alone(boxes);
  if (a.rule.rivals != Rivals::kAll) {
    match = is_contested ? index_of(a.best[i]) : match;
  } else {
    for (unsigned mask = __ballot_sync(kFullWarp, is_contested); mask != 0; mask &= mask - 1) {
      const int from = __ffs(mask) - 1;
      const int64_t winner = most_overlapped<Kind>(
          a, image,
          {__shfl_sync(kFullWarp, predicted.x1, from), __shfl_sync(kFullWarp, predicted.y1, from),
           __shfl_sync(kFullWarp, predicted.x2, from), __shfl_sync(kFullWarp, predicted.y2, from)});
      match = lane == from ? winner : match;
    }
  }
  if (!present) {
    return;
  }
  float overlap = 0, metric = 0;
  if (match >= 0) {
    const Box<float> object = a.objects.load(image, match);
    overlap = overlap_of<Kind>(predicted, object, iou_terms<Kind>(object));
    metric = a.rule.metric(a.scores.at(image, n, a.label(image, match)), overlap);
    if (a.final_topk == 0) {
      Most* most = a.most + image * a.counts.most + match;
      atomicMax(&most->metric, bits_of(metric));
      atomicMax(&most->overlap, bits_of(overlap));
    }
  } else if (a.in_crowd != nullptr && a.in_crowd[i]) {
    match = -2;
  }
  a.matches[i] = match;
  a.targets[i] = metric;
  if (a.final_topk > 0) {
    *reinterpret_cast<Settled*>(a.best + i) = {overlap, 0};
  }
}

// Of the anchors that a box has it keeps the best; a warp a box.
__global__ void __launch_bounds__(kThreads)
    keep_best_anchors_kernel(const __grid_constant__ Assignment a) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarpSize);
  for (int64_t slot = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
       slot < a.num_images * a.counts.most; slot += warps) {
    const int64_t image = slot / a.counts.most, j = slot - image * a.counts.most;
    if (!a.is_object(image, j)) {
      continue;
    }
    const int64_t first = image * a.num_points;
    TopK top;
    const Box<float> region = a.rule.region(a.objects.load(image, j));
    for (int64_t begin = 0; begin < a.tiles; begin += kWarpSize) {
      for (unsigned mask = tiles_met(a.ranges, a.tiles, region, begin, 1); mask != 0;
           mask &= mask - 1) {
        const int64_t n = (begin + __ffs(mask) - 1) * kWarpSize + lane;
        const bool is_own = n < a.num_points && a.matches[first + n] == j;
        top.offer(is_own ? Key{ranked(a.targets[first + n], static_cast<uint32_t>(n))} : 0,
                  a.final_topk);
      }
    }
    Most mine{0, 0};
    if (lane < a.final_topk && top.mine() != 0) {
      Settled* settled = reinterpret_cast<Settled*>(a.best + first + index_of(top.mine()));
      mine = {bits_of(value_of(top.mine())), bits_of(settled->overlap)};
      settled->kept = 1;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const unsigned int metric = __shfl_xor_sync(kFullWarp, mine.metric, offset);
      const unsigned int overlap = __shfl_xor_sync(kFullWarp, mine.overlap, offset);
      mine = {metric > mine.metric ? metric : mine.metric,
              overlap > mine.overlap ? overlap : mine.overlap};
    }
    if (lane == 0) {
      a.most[slot] = mine;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    find_targets_kernel(const __grid_constant__ Assignment a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.num_images * a.num_points) {
    return;
  }
  const int64_t match = a.matches[i];
  float target = 0;
  if (match >= 0) {
    if (a.final_topk > 0 && reinterpret_cast<const Settled*>(a.best + i)->kept == 0) {
      a.matches[i] = -1;
    } else {
      const Most most = a.most[i / a.num_points * a.counts.most + match];
      target =
          a.rule.target(a.targets[i], __uint_as_float(most.metric), __uint_as_float(most.overlap));
    }
  }
  a.targets[i] = target;
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> assign_task_aligned_cuda(
    const Tensor& pred_scores, const Tensor& pred_boxes_, const Tensor& points_,
    const Tensor& gt_boxes_, const Tensor& gt_labels_, const std::optional<Tensor>& counts_,
    const std::optional<Tensor>& crowd_, int64_t topk, double alpha, double beta, int64_t rule,
    int64_t overlap, double min_side, int64_t final_topk, double eps) {
  const TaskAlignedOptions options{topk, alpha, beta, rule, overlap, min_side, final_topk, eps};
  check_assign_task_aligned(pred_scores, pred_boxes_, points_, gt_boxes_, gt_labels_, counts_,
                            crowd_, options);
  const LaunchScope scope(points_);
  const Tensor points = torch::stable::contiguous(points_),
               pred_boxes = torch::stable::contiguous(pred_boxes_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               gt_labels = torch::stable::contiguous(gt_labels_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_points = points.size(0), tiles = ceil_div(num_points, kWarpSize);
  Tensor matches = torch::stable::new_zeros(points, {num_images, num_points}, ScalarType::Long);
  Tensor targets = torch::stable::new_empty(points, {num_images, num_points});
  if (matches.numel() == 0) {
    return {matches, targets};
  }
  const TaskAligned formula = options.formula();
  const int64_t range_images = formula.inside_last ? num_images : 1;
  Tensor ranges = torch::stable::new_empty(points, {range_images, tiles, 4});
  Tensor best = torch::stable::new_zeros(points, {num_images, num_points}, ScalarType::Long);
  Tensor most = torch::stable::new_zeros(points, {num_images, max_boxes}, ScalarType::Long);
  Tensor in_crowd = torch::stable::new_empty(
      points, {crowd.has_value() ? num_images : 0, num_points}, ScalarType::Byte);
  const Assignment all{formula,
                       static_cast<int>(topk),
                       static_cast<int>(final_topk),
                       ClassScores(pred_scores),
                       static_cast<const float*>(points.const_data_ptr()),
                       Rows<Box<float>, float>(pred_boxes, {4 * num_points, 4}),
                       Rows<Box<float>, float>(gt_boxes, {4 * max_boxes, 4}),
                       static_cast<const int64_t*>(gt_labels.const_data_ptr()),
                       data_of<uint8_t>(crowd),
                       {Integers(counts_), counts_.has_value() ? counts_->stride(0) : 0, max_boxes},
                       num_images,
                       num_points,
                       tiles,
                       static_cast<Box<float>*>(ranges.mutable_data_ptr()),
                       crowd.has_value() ? data_of<uint8_t>(in_crowd) : nullptr,
                       static_cast<Key*>(best.mutable_data_ptr()),
                       static_cast<Most*>(most.mutable_data_ptr()),
                       data_of<int64_t>(matches),
                       data_of<float>(targets)};
  const cudaStream_t stream = scope.stream();
  const int64_t images = crowd.has_value() ? num_images : range_images;
  launch(&find_tile_ranges_kernel, ceil_div(images * tiles * kWarpSize, kThreads), kThreads, 0,
         stream, all, images, formula.inside_last);
  dispatch_task_overlap(overlap, [&](auto kind) {
    constexpr IouKind Kind = decltype(kind)::value;
    if (max_boxes > 0) {
      const int64_t grid =
          resident_grid(&claim_anchors_kernel<Kind>, kBoxThreads, 0, num_images * max_boxes, scope);
      launch(&claim_anchors_kernel<Kind>, grid, kBoxThreads, 0, stream, all);
    }
    launch(&settle_claims_kernel<Kind>, ceil_div(num_images * tiles * kWarpSize, kThreads),
           kThreads, 0, stream, all);
  });
  if (final_topk > 0 && max_boxes > 0) {
    const int64_t work = ceil_div(num_images * max_boxes, kThreads / kWarpSize);
    launch(&keep_best_anchors_kernel,
           resident_grid(&keep_best_anchors_kernel, kThreads, 0, work, scope), kThreads, 0, stream,
           all);
  }
  launch(&find_targets_kernel, ceil_div(num_images * num_points, kThreads), kThreads, 0, stream,
         all);
  return {matches, targets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("assign_task_aligned", TORCH_BOX(&assign_task_aligned_cuda));
}

}  // namespace focalops
