// SimOTA on CUDA: no matrix of anchors and boxes; all images in three launches, and one that
// clears.
//
// Points come in tiles of 32 consecutive ones. In the first launch a warp has a tile of an image:
// each lane tests a box, the warp visits those that the tile meets, a lane a point, and then sums
// the classes of each anchor that takes part, a lane every 32nd. In the second a block has one box
// at a time: each lane tests a tile, and the warps visit those that the box meets, first for the
// greatest overlaps, then for the cheapest anchors, which they keep sorted over their lanes. These
// claim the anchors by integer maxima, which leave the same bits in any order. In the third a lane
// has an anchor, whose claims it settles; where there are several, the warp looks at the boxes.
//
// An anchor that takes part: its logits once, 36 bytes of prediction, match and overlap, and of
// each pair a sector of logits; the rest stays in the L2 cache. The claims lie where the matches
// will, the sums of the classes where the overlaps will.
#include "../checks/assign.h"
#include "assign.cuh"
#include "ground_truth.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;
constexpr int kBoxThreads = 128;
constexpr int kBoxWarps = kBoxThreads / kWarpSize;

static_assert(sizeof(Claims) == sizeof(int64_t));

// The launches read and write these.
template <SimotaRule Rule>
struct Assignment {
  Simota<Rule> rule;
  int candidates;
  ClassScores logits, objectness;
  const float* points;              // [N, 2]
  const float* strides;             // [N]
  Rows<Box<float>, float> pred;     // [B, N, 4]
  Rows<Box<float>, float> objects;  // [B, M, 4]
  const int64_t* labels;            // [B, M]
  const uint8_t* crowd;             // [B, M], null: none is
  Counts counts;
  int64_t num_images, num_points, tiles;
  Box<float>* ranges;       // [T], of points
  float* greatest;          // [T], of their strides
  Box<float>* predictions;  // [B, T], ranges of the anchors that take part
  int64_t* matches;         // [B, N], Claims before
  float* ious;              // [B, N], the sums of the classes before

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
    return j < counts[image] && !is_crowd(image, j) && logits.has(label(image, j));
  }
  __device__ __forceinline__ SimotaBox object(int64_t image, int64_t j) const {
    return simota_box(objects.load(image, j));
  }
  __device__ __forceinline__ float quality(int64_t image, int64_t n) const {
    return objectness.data == nullptr ? -1.0f : sigmoid_of(objectness.at(image, n, 0));
  }

  // by_cost() of a pair of the lot; 0 of the others.
  __device__ __forceinline__ Key key(int lot, int64_t image, int64_t n, const SimotaBox& box,
                                     int64_t label, float base, uint32_t index) const {
    const Point<float> at = point(n);
    const float stride = strides[n];
    const bool is_own = rule.owns(at, stride, box);
    if (lot == 0 && !is_own) {
      return 0;
    }
    const float overlap = simota_overlap(pred.load(image, n), box);
    if (!(overlap >= 0) || rule.lot(is_own, overlap) != lot) {
      return 0;
    }
    const float cost = rule.cost({base, logits.at(image, n, label), quality(image, n)}, overlap,
                                 rule.place(at, stride, box, is_own));
    return cost == cost ? Key{by_cost(cost, index)} : 0;
  }

  // Whether what is the worst of the lots so far leaves no room for later ones.
  __device__ __forceinline__ bool suffices(Key worst, int lot) const {
    return worst != 0 && cost_of(worst) < rule.floor(lot);
  }
};

// Here and below: without the one block, the compiler spills.
template <SimotaRule Rule>
__global__ void __launch_bounds__(kThreads, 1)
    weigh_anchors_kernel(const __grid_constant__ Assignment<Rule> a) {
  const int64_t tile = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t image = tile / a.tiles, first = (tile - image * a.tiles) * kWarpSize;
  const int64_t n = first + lane;
  if (image >= a.num_images) {
    return;
  }
  const bool present = n < a.num_points;
  const Point<float> point = present ? a.point(n) : Point<float>{0, 0};
  const float stride = present ? a.strides[n] : 0.0f;
  const Box<float> range = range_of_warp(Box<float>{point.x, point.y, point.x, point.y}, present);
  float greatest = max_of(stride, 0.0f);
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    greatest = max_of(greatest, __shfl_xor_sync(kFullWarp, greatest, offset));
  }
  bool admitted = false, in_crowd = false;
  for (int64_t begin = 0; begin < a.counts[image]; begin += kWarpSize) {
    const int64_t mine = begin + lane;
    bool meets = false;
    if (mine < a.counts[image]) {
      const SimotaBox box = a.object(image, mine);
      meets = a.is_object(image, mine) ? a.rule.may_admit(range, greatest, box)
                                       : a.is_crowd(image, mine) && intersects(range, box.box);
    }
    for (unsigned mask = __ballot_sync(kFullWarp, meets); mask != 0; mask &= mask - 1) {
      const int64_t j = begin + __ffs(mask) - 1;
      const SimotaBox box = a.object(image, j);
      if (a.is_crowd(image, j)) {
        in_crowd |= is_inside(point, box.box, 0.0f);
      } else {
        admitted |= a.rule.admits(point, stride, box);
      }
    }
  }
  admitted = admitted && present && !in_crowd;
  Box<float> predicted{0, 0, 0, 0};
  float quality = 0;
  if (admitted) {
    predicted = a.pred.load(image, n);
    quality = a.quality(image, n);
  }
  const Box<float> predictions = range_of_warp(predicted, admitted);
  if (lane == 0) {
    a.predictions[tile] = predictions;
    if (image == 0) {
      a.ranges[tile] = range;
      a.greatest[tile] = greatest;
    }
  }
  float base = in_crowd ? kInCrowd : kOutside;
  for (unsigned mask = __ballot_sync(kFullWarp, admitted); mask != 0; mask &= mask - 1) {
    const int from = __ffs(mask) - 1;
    const float of_anchor = __shfl_sync(kFullWarp, quality, from);
    float sum = 0;
    for (int64_t k = lane; k < a.logits.num_classes; k += kWarpSize) {
      sum =
          add(sum, a.rule.cost_of(a.rule.negative(a.logits.at(image, first + from, k), of_anchor)));
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      sum = add(sum, __shfl_xor_sync(kFullWarp, sum, offset));
    }
    base = lane == from ? sum : base;
  }
  if (present) {
    a.ious[image * a.num_points + n] = base;
  }
}

// The first warp gets the best of all, the others nothing.
__device__ __forceinline__ void merge_warps(Key (*keys)[kWarpSize], TopK& top) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (warp > 0) {
    keys[warp][lane] = top.mine();
    top = TopK();
  }
  __syncthreads();
  if (warp == 0) {
    for (int other = 1; other < kBoxWarps; ++other) {
      top.merge(keys[other][kWarpSize - 1 - lane]);
    }
  }
}

// The anchors whose pairs with the box are of the lot.
template <SimotaRule Rule>
__device__ __forceinline__ void offer_anchors(const Assignment<Rule>& a, int lot, int64_t image,
                                              int64_t j, const SimotaBox& box, int k,
                                              TopK& cheapest) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t label = a.label(image, j), first = image * a.num_points;
  for (int64_t begin = warp; begin < a.tiles; begin += kBoxWarps * kWarpSize) {
    const int64_t mine = begin + lane * kBoxWarps;
    bool meets = mine < a.tiles;
    if (lot == 0 && meets) {
      meets = a.rule.may_own(a.ranges[mine], a.greatest[mine], box);
    } else if (lot == 1 && meets) {
      meets = intersects(box.box, a.predictions[image * a.tiles + mine]);
    }
    for (unsigned mask = __ballot_sync(kFullWarp, meets); mask != 0; mask &= mask - 1) {
      const int64_t n = (begin + int64_t{__ffs(mask) - 1} * kBoxWarps) * kWarpSize + lane;
      Key key = 0;
      if (n < a.num_points) {
        const float base = a.ious[first + n];
        if (!(base < 0)) {
          key = a.key(lot, image, n, box, label, base, static_cast<uint32_t>(n));
        }
      }
      cheapest.offer(key, k);
    }
  }
}

template <SimotaRule Rule>
__global__ void __launch_bounds__(kBoxThreads, 1)
    claim_cheapest_kernel(const __grid_constant__ Assignment<Rule> a) {
  __shared__ Key keys[kBoxWarps][kWarpSize];
  __shared__ int number;
  __shared__ bool is_done;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t slot = blockIdx.x; slot < a.num_images * a.counts.most; slot += gridDim.x) {
    const int64_t image = slot / a.counts.most, j = slot - image * a.counts.most;
    if (!a.is_object(image, j)) {
      continue;
    }
    const SimotaBox box = a.object(image, j);
    const int64_t first = image * a.num_points;
    TopK most;
    for (int64_t begin = warp; begin < a.tiles; begin += kBoxWarps * kWarpSize) {
      for (unsigned mask =
               tiles_met(a.predictions + image * a.tiles, a.tiles, box.box, begin, kBoxWarps);
           mask != 0; mask &= mask - 1) {
        const int64_t n = (begin + int64_t{__ffs(mask) - 1} * kBoxWarps) * kWarpSize + lane;
        Key key = 0;
        if (n < a.num_points && !(a.ious[first + n] < 0)) {
          const float overlap = simota_overlap(a.pred.load(image, n), box);
          key = overlap > 0 ? Key{ranked(overlap, static_cast<uint32_t>(n))} : 0;
        }
        most.offer(key, a.candidates);
      }
    }
    merge_warps(keys, most);
    if (warp == 0) {
      float sum = 0;
      for (int i = 0; i < a.candidates; ++i) {
        sum = add(sum, value_of(__shfl_sync(kFullWarp, most.mine(), i)));
      }
      if (lane == 0) {
        number = Simota<Rule>::number(sum, a.candidates);
      }
    }
    __syncthreads();
    const int k = number;
    TopK cheapest;
    for (int lot = a.rule.kFirstLot; lot < a.rule.kLots; ++lot) {
      offer_anchors(a, lot, image, j, box, k, cheapest);
      merge_warps(keys, cheapest);
      if (warp == 0) {
        const Key worst = __shfl_sync(kFullWarp, cheapest.mine(), k - 1);
        if (lane == 0) {
          is_done = a.suffices(worst, lot);
        }
      }
      __syncthreads();
      if (is_done) {
        break;
      }
    }
    if (warp == 0 && lane < k && cheapest.mine() != 0) {
      const Claims mine =
          Claims::of(static_cast<uint32_t>(j), static_cast<uint32_t>(a.counts.most));
      auto* claims = reinterpret_cast<unsigned int*>(a.matches + first + index_of(cheapest.mine()));
      atomicMax(claims, mine.last);
      atomicMax(claims + 1, mine.first);
    }
    __syncthreads();
  }
}

// The cheapest of the image's boxes, of those whose pairs with the anchor are of the lot; the
// warp's lanes together.
template <SimotaRule Rule>
__device__ __forceinline__ Key cheapest_box(const Assignment<Rule>& a, int lot, int64_t image,
                                            int64_t n, float base) {
  Key best = 0;
  for (int64_t j = threadIdx.x % kWarpSize; j < a.counts[image]; j += kWarpSize) {
    if (a.is_object(image, j)) {
      const Key key = a.key(lot, image, n, a.object(image, j), a.label(image, j), base,
                            static_cast<uint32_t>(j));
      best = key > best ? key : best;
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Key other = __shfl_xor_sync(kFullWarp, best, offset);
    best = other > best ? other : best;
  }
  return best;
}

template <SimotaRule Rule>
__global__ void __launch_bounds__(kThreads, 1)
    settle_cheapest_kernel(const __grid_constant__ Assignment<Rule> a) {
  const int64_t tile = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t image = tile / a.tiles, first = (tile - image * a.tiles) * kWarpSize;
  const int64_t n = first + lane, i = image * a.num_points + n;
  if (image >= a.num_images) {
    return;
  }
  const bool present = n < a.num_points;
  Claims claims{0, 0};
  float base = kOutside;
  if (present) {
    const auto* of_anchor = reinterpret_cast<const uint2*>(a.matches) + i;
    claims = {of_anchor->x, of_anchor->y};
    base = a.ious[i];
  }
  int64_t match = claims.any() ? int64_t{claims.box()} : base == kInCrowd ? -2 : -1;
  const bool is_contested = claims.any() && !claims.alone(static_cast<uint32_t>(a.counts.most));
  for (unsigned mask = __ballot_sync(kFullWarp, is_contested); mask != 0; mask &= mask - 1) {
    const int from = __ffs(mask) - 1;
    const float of_anchor = __shfl_sync(kFullWarp, base, from);
    Key best = 0;
    for (int lot = a.rule.kFirstLot; lot < a.rule.kLots && !(lot > 0 && a.suffices(best, lot - 1));
         ++lot) {
      const Key key = cheapest_box(a, lot, image, first + from, of_anchor);
      best = key > best ? key : best;
    }
    match = lane == from ? index_of(best) : match;
  }
  if (present) {
    a.matches[i] = match;
    a.ious[i] = match >= 0 ? simota_overlap(a.pred.load(image, n), a.object(image, match)) : 0.0f;
  }
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> assign_simota_cuda(const Tensor& cls_logits, const Tensor& pred_boxes_,
                                              const Tensor& points_, const Tensor& strides_,
                                              const Tensor& gt_boxes_, const Tensor& gt_labels_,
                                              const std::optional<Tensor>& objectness,
                                              const std::optional<Tensor>& counts_,
                                              const std::optional<Tensor>& crowd_, int64_t rule,
                                              double center_radius, int64_t candidates) {
  const SimotaOptions options{rule, center_radius, candidates};
  check_assign_simota(cls_logits, pred_boxes_, points_, strides_, gt_boxes_, gt_labels_, objectness,
                      counts_, crowd_, options);
  const LaunchScope scope(points_);
  const Tensor points = torch::stable::contiguous(points_),
               strides = torch::stable::contiguous(strides_),
               pred_boxes = torch::stable::contiguous(pred_boxes_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               gt_labels = torch::stable::contiguous(gt_labels_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_points = points.size(0), tiles = ceil_div(num_points, kWarpSize);
  Tensor matches = torch::stable::new_zeros(points, {num_images, num_points}, ScalarType::Long);
  Tensor ious = torch::stable::new_empty(points, {num_images, num_points});
  if (matches.numel() == 0) {
    return {matches, ious};
  }
  Tensor ranges = torch::stable::new_empty(points, {tiles, 4});
  Tensor greatest = torch::stable::new_empty(points, {tiles});
  Tensor predictions = torch::stable::new_empty(points, {num_images, tiles, 4});
  dispatch_simota(options, [&](auto formula) {
    constexpr SimotaRule Rule = decltype(formula)::kRule;
    const Assignment<Rule> all{
        formula,
        static_cast<int>(candidates),
        ClassScores(cls_logits),
        objectness.has_value() ? ClassScores(*objectness) : ClassScores(),
        static_cast<const float*>(points.const_data_ptr()),
        static_cast<const float*>(strides.const_data_ptr()),
        Rows<Box<float>, float>(pred_boxes, {4 * num_points, 4}),
        Rows<Box<float>, float>(gt_boxes, {4 * max_boxes, 4}),
        static_cast<const int64_t*>(gt_labels.const_data_ptr()),
        data_of<uint8_t>(crowd),
        {Integers(counts_), counts_.has_value() ? counts_->stride(0) : 0, max_boxes},
        num_images,
        num_points,
        tiles,
        static_cast<Box<float>*>(ranges.mutable_data_ptr()),
        data_of<float>(greatest),
        static_cast<Box<float>*>(predictions.mutable_data_ptr()),
        data_of<int64_t>(matches),
        data_of<float>(ious)};
    const cudaStream_t stream = scope.stream();
    const int64_t of_tiles = ceil_div(num_images * tiles * kWarpSize, kThreads);
    launch(&weigh_anchors_kernel<Rule>, of_tiles, kThreads, 0, stream, all);
    if (max_boxes > 0) {
      const int64_t grid = resident_grid(&claim_cheapest_kernel<Rule>, kBoxThreads, 0,
                                         num_images * max_boxes, scope);
      launch(&claim_cheapest_kernel<Rule>, grid, kBoxThreads, 0, stream, all);
    }
    launch(&settle_cheapest_kernel<Rule>, of_tiles, kThreads, 0, stream, all);
  });
  return {matches, ious};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("assign_simota", TORCH_BOX(&assign_simota_cuda));
}

}  // namespace focalops
