// ATSS' assignment on CUDA: all images in four launches at most, and one that clears the claims.
//
// 32 consecutive anchors of a level are a tile. The first kernel writes the range of each tile's
// centers, the next, where there are crowds, a bit for each anchor inside one. Then a warp has a
// box; warps stride over the padded boxes, so that padding costs no blocks. Level by level the
// lanes test 32 ranges at once. The warp visits the nearest tile, and then those that are nearer
// than the worst of its candidates, which it keeps sorted across the lanes, 32 at a time; more are
// found in rounds. Their IoUs stay in shared memory until mean and deviation are known, which add
// up in an order that does not depend on the schedule. A claim is an integer maximum on the
// anchor's match, from which the last kernel makes the box. Nothing depends on the order of the
// claims.
//
// 24 bytes an anchor and image to clear, read and write the matches; what boxes read of anchors and
// ranges, some tiles a level, comes from the L2 cache.
#include "../checks/assign.h"
#include "../math/assign.h"
#include "ground_truth.cuh"

namespace focalops {
namespace {

constexpr int kWarps = 4;  // of a block, so that 128 candidates of 8 levels fit shared memory
constexpr int kThreads = kWarps * kWarpSize;

constexpr int kFewBlocks = 1;  // a multiprocessor, at least: for more the compiler would spill

// 32 ranks are found at a time.
FOCALOPS_HOST_DEVICE int chunks_of_level(int topk) { return (topk + kWarpSize - 1) / kWarpSize; }

template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, double>, unsigned long long, unsigned>;

// Of a level, which begins with a whole tile.
struct AtssLevel {
  int begin, end;  // its anchors
  int first_tile, end_tile;
};

struct AtssLevels {
  int count;
  AtssLevel of[kMaxLevels];

  // Without an index that the compiler does not know, for which it would need local memory.
  __device__ __forceinline__ AtssLevel operator[](int i) const {
    AtssLevel level = of[0];
#pragma unroll
    for (int j = 1; j < static_cast<int>(kMaxLevels); ++j) {
      level = j == i ? of[j] : level;
    }
    return level;
  }

  __device__ __forceinline__ AtssLevel of_tile(int tile) const {
    AtssLevel level = of[0];
#pragma unroll
    for (int j = 1; j < static_cast<int>(kMaxLevels); ++j) {
      level = j < count && tile >= of[j].first_tile ? of[j] : level;
    }
    return level;
  }
};

// The launches read and write these.
template <typename T>
struct Atss {
  Rows<Box<T>, T> anchors;  // [N, 4]
  int64_t num_anchors, tiles;
  AtssLevels levels;
  Rows<Box<T>, T> gt_boxes;  // [B, M, 4]
  int64_t num_images;
  Counts counts;         // [B]
  const uint8_t* crowd;  // [B, M], null: none is
  int topk;
  Box<T>* ranges;              // [tiles]
  unsigned* in_crowd;          // [B, tiles], a bit an anchor; null: none is
  unsigned long long* claims;  // [B, N], 0: none; in the end the matches
  unsigned* first_box;         // [B, N] of float64: ~box, 0: none
  unsigned* owned;             // [B, M], the anchors of each box; null: not wanted

  __device__ __forceinline__ bool is_object(int64_t image, int64_t j) const {
    return crowd == nullptr || crowd[image * counts.most + j] == 0;
  }

  __device__ __forceinline__ bool is_in_crowd(int64_t image, int tile) const {
    return in_crowd != nullptr &&
           (in_crowd[image * tiles + tile] >> (threadIdx.x % kWarpSize) & 1) != 0;
  }
};

// The lane's anchor of a tile.
struct TileLane {
  int tile, anchor;
  bool present;
};

__device__ __forceinline__ TileLane lane_of(const AtssLevel& level, int tile) {
  const int anchor = level.begin + (tile - level.first_tile) * kWarpSize +
                     static_cast<int>(threadIdx.x % kWarpSize);
  return {tile, anchor, anchor < level.end};
}

// The center of the lane's anchor; NaN where it has none.
template <typename T>
__device__ __forceinline__ Point<T> center_of_lane(const Atss<T>& atss, const TileLane& at) {
  const T nan = static_cast<T>(__builtin_nanf(""));
  return at.present ? center_of(atss.anchors.load(0, at.anchor)) : Point<T>{nan, nan};
}

template <typename T>
__device__ __forceinline__ Box<T> from_lane(const Box<T>& box, int lane) {
  return {__shfl_sync(kFullWarp, box.x1, lane), __shfl_sync(kFullWarp, box.y1, lane),
          __shfl_sync(kFullWarp, box.x2, lane), __shfl_sync(kFullWarp, box.y2, lane)};
}

// ---- tiles: a warp each -------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads)
    atss_ranges_kernel(const __grid_constant__ Atss<T> atss) {
  const int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (tile >= atss.tiles) {
    return;
  }
  const TileLane at = lane_of(atss.levels.of_tile(static_cast<int>(tile)), static_cast<int>(tile));
  const Point<T> center = center_of_lane(atss, at);
  const Box<T> range = range_of_warp(Box<T>{center.x, center.y, center.x, center.y}, at.present);
  if (threadIdx.x % kWarpSize == 0) {
    atss.ranges[tile] = range;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    atss_crowds_kernel(const __grid_constant__ Atss<T> atss) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  const int64_t image = warp / atss.tiles;
  const int tile = static_cast<int>(warp - image * atss.tiles);
  if (image >= atss.num_images) {
    return;
  }
  const Point<T> center = center_of_lane(atss, lane_of(atss.levels.of_tile(tile), tile));
  const Box<T> range = atss.ranges[tile];
  const int64_t count = atss.counts[image];
  bool inside = false;
  for (int64_t begin = 0; begin < count; begin += kWarpSize) {
    const int64_t j = begin + lane;
    const Box<T> box = j < count ? atss.gt_boxes.load(image, j) : Box<T>{0, 0, 0, 0};
    const bool visit = j < count && !atss.is_object(image, j) && intersects(box, range);
    for (unsigned mask = __ballot_sync(kFullWarp, visit); mask != 0; mask &= mask - 1) {
      inside |= is_inside(center, from_lane(box, __ffs(mask) - 1), T(0));
    }
  }
  const unsigned word = __ballot_sync(kFullWarp, inside);
  if (lane == 0) {
    atss.in_crowd[image * atss.tiles + tile] = word;
  }
}

// ---- the candidates of a box: a warp ------------------------------------------------------------

template <typename T>
struct Neighbour {
  T distance;
  int anchor;

  __device__ __forceinline__ bool is_before(const Neighbour& other) const {
    return distance < other.distance || (distance == other.distance && anchor < other.anchor);
  }
  __device__ __forceinline__ bool is_none() const { return anchor == 0x7fffffff; }
};

template <typename T>
__device__ __forceinline__ Neighbour<T> no_neighbour() {
  return {static_cast<T>(__builtin_huge_valf()), 0x7fffffff};
}

template <typename T>
__device__ __forceinline__ Neighbour<T> from_lane(const Neighbour<T>& neighbour, int lane) {
  return {__shfl_sync(kFullWarp, neighbour.distance, lane),
          __shfl_sync(kFullWarp, neighbour.anchor, lane)};
}

// The nearest anchors of a level that come after the floor, sorted across the lanes; of these
// `most` are wanted.
template <typename T>
class NearestOfLevel {
 public:
  __device__ __forceinline__ NearestOfLevel(const Atss<T>& atss, int64_t image,
                                            const Point<T>& center, const AtssLevel& level)
      : atss_(atss), image_(image), center_(center), level_(level) {}

  __device__ __forceinline__ Neighbour<T> find(const Neighbour<T>& floor, int most) {
    const int lane = threadIdx.x % kWarpSize;
    floor_ = floor;
    most_ = most;
    mine_ = worst_ = no_neighbour<T>();
    const int first = nearest_tile();
    if (first >= 0) {
      visit(first);
    }
    for (int begin = level_.first_tile; begin < level_.end_tile; begin += kWarpSize) {
      const int tile = begin + lane;
      const T away = tile < level_.end_tile ? distance_to_range(tile) : worst_.distance;
      const bool is_near = tile < level_.end_tile && tile != first && away <= worst_.distance;
      for (unsigned mask = __ballot_sync(kFullWarp, is_near); mask != 0; mask &= mask - 1) {
        const int source = __ffs(mask) - 1;
        if (__shfl_sync(kFullWarp, away, source) <= worst_.distance) {
          visit(begin + source);
        }
      }
    }
    return lane < most ? mine_ : no_neighbour<T>();
  }

 private:
  __device__ __forceinline__ T distance_to_range(int tile) const {
    return std::sqrt(squared_distance(center_, atss_.ranges[tile]));
  }

  __device__ __forceinline__ int nearest_tile() const {
    Neighbour<T> nearest = no_neighbour<T>();
    for (int tile = level_.first_tile + static_cast<int>(threadIdx.x % kWarpSize);
         tile < level_.end_tile; tile += kWarpSize) {
      const Neighbour<T> of{distance_to_range(tile), tile};
      nearest = of.is_before(nearest) ? of : nearest;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const Neighbour<T> other{__shfl_xor_sync(kFullWarp, nearest.distance, offset),
                               __shfl_xor_sync(kFullWarp, nearest.anchor, offset)};
      nearest = other.is_before(nearest) ? other : nearest;
    }
    return nearest.is_none() ? -1 : nearest.anchor;
  }

  __device__ __forceinline__ void visit(int tile) {
    const int lane = threadIdx.x % kWarpSize;
    const TileLane at = lane_of(level_, tile);
    const T squared = squared_distance(center_, center_of_lane(atss_, at));
    const Neighbour<T> other{std::sqrt(squared), at.anchor};
    const bool wants =
        floor_.is_before(other) && other.is_before(worst_) && !atss_.is_in_crowd(image_, tile);
    for (unsigned mask = __ballot_sync(kFullWarp, wants); mask != 0; mask &= mask - 1) {
      const Neighbour<T> next = from_lane(other, __ffs(mask) - 1);
      const int place = __popc(__ballot_sync(kFullWarp, mine_.is_before(next)));
      const Neighbour<T> before{__shfl_up_sync(kFullWarp, mine_.distance, 1),
                                __shfl_up_sync(kFullWarp, mine_.anchor, 1)};
      mine_ = lane < place ? mine_ : lane == place ? next : before;
    }
    worst_ = from_lane(mine_, most_ - 1);
  }

  const Atss<T>& atss_;
  int64_t image_;
  Point<T> center_;
  AtssLevel level_;
  Neighbour<T> floor_, mine_, worst_;
  int most_;
};

// Calls f(anchor) in all lanes for every 32 ranks of every level; -1 where a lane has none.
template <typename T, typename F>
__device__ __forceinline__ void for_each_candidate(const Atss<T>& atss, int64_t image,
                                                   const Box<T>& box, const F& f) {
  for (int i = 0; i < atss.levels.count; ++i) {
    NearestOfLevel<T> level(atss, image, center_of(box), atss.levels[i]);
    Neighbour<T> floor{T(-1), -1};
    for (int rank = 0; rank < atss.topk && !floor.is_none(); rank += kWarpSize) {
      const int most = atss.topk - rank < kWarpSize ? atss.topk - rank : kWarpSize;
      const Neighbour<T> candidate = level.find(floor, most);
      f(candidate.is_none() ? -1 : candidate.anchor);
      floor = from_lane(candidate, most - 1);
    }
  }
}

// The sum over the warp, in all lanes.
__device__ __forceinline__ double sum_of_lanes(double value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = add(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// ---- claims: a warp a box -----------------------------------------------------------------------

// What is an integer maximum of an anchor's claims.
enum class Claim {
  kBest,   // the bits of a float IoU and ~box: of the claimants the best, of equal ones the first
  kIou,    // the bits of a double IoU and 1; kFirst follows
  kFirst,  // ~box, of the boxes of that IoU
  kEveryBox,  // box + 1 and M - box, which add up to M + 1 where one box alone claims the anchor
};

template <Claim claim, typename T>
__device__ __forceinline__ void claim_anchor(const Atss<T>& atss, int64_t image, int anchor,
                                             int64_t box, T iou) {
  const int64_t at = image * atss.num_anchors + anchor;
  const auto inverse = ~static_cast<unsigned>(box);
  if constexpr (claim == Claim::kEveryBox) {
    auto* maxima = reinterpret_cast<unsigned*>(atss.claims + at);
    atomicMax(maxima, static_cast<unsigned>(box + 1));
    atomicMax(maxima + 1, static_cast<unsigned>(atss.counts.most - box));
  } else {
    Bits<T> bits;  // ordered as the IoUs are, which are >= 0
    memcpy(&bits, &iou, sizeof bits);
    if constexpr (claim == Claim::kBest) {
      atomicMax(atss.claims + at, static_cast<unsigned long long>(bits) << 32 | inverse);
    } else if constexpr (claim == Claim::kIou) {
      atomicMax(atss.claims + at, bits + 1);
    } else if (atss.claims[at] == bits + 1) {
      atomicMax(atss.first_box + at, inverse);
    }
  }
}

template <typename Rule, Claim claim, typename T>
__global__ void __launch_bounds__(kThreads, kFewBlocks)
    atss_claims_kernel(const __grid_constant__ Atss<T> atss) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int chunks = atss.levels.count * chunks_of_level(atss.topk);
  T* ious = dynamic_shared<T>() + warp * chunks * kWarpSize + lane;  // of the lane, a chunk apart
  int* anchors = reinterpret_cast<int*>(dynamic_shared<T>() + kThreads * chunks) +
                 warp * chunks * kWarpSize + lane;
  const int64_t slots = atss.num_images * atss.counts.most;
  for (int64_t slot = int64_t{blockIdx.x} * kWarps + warp; slot < slots;
       slot += int64_t{gridDim.x} * kWarps) {
    const int64_t image = slot / atss.counts.most, j = slot - image * atss.counts.most;
    if (j >= atss.counts[image] || !atss.is_object(image, j)) {
      continue;
    }
    const Box<T> box = atss.gt_boxes.load(image, j);
    int chunk = 0, n = 0;
    double sum = 0;
    for_each_candidate(atss, image, box, [&](int anchor) {
      T iou = -1;  // of nothing
      if (anchor >= 0) {
        const Box<T> other = atss.anchors.load(0, anchor);
        iou = atss_iou(box, other);
        sum = add(sum, static_cast<double>(iou));
        anchor = is_inside(center_of(other), box, T(Rule::kMargin)) ? anchor : -1;
      }
      n += __popc(__ballot_sync(kFullWarp, iou != -1));
      ious[chunk * kWarpSize] = iou;
      anchors[chunk * kWarpSize] = anchor;
      ++chunk;
    });
    const double mean = div(sum_of_lanes(sum), static_cast<double>(n));
    double squares = 0;
    for (int i = 0; i < chunk; ++i) {
      const T iou = ious[i * kWarpSize];
      if (iou != -1) {
        const double deviation = sub(static_cast<double>(iou), mean);
        squares = add(squares, mul(deviation, deviation));
      }
    }
    const T threshold = atss_threshold<T>(mean, sum_of_lanes(squares), n);
    for (int i = 0; i < chunk; ++i) {
      const T iou = ious[i * kWarpSize];
      const int anchor = anchors[i * kWarpSize];
      if (anchor >= 0 && Rule::reaches(iou, threshold)) {
        claim_anchor<claim>(atss, image, anchor, j, iou);
      }
    }
  }
}

// ---- matches: a warp a tile ---------------------------------------------------------------------

// The box of the greatest IoU with the anchor, of equal ones the first, in all lanes.
template <typename T>
__device__ __forceinline__ int64_t best_box(const Atss<T>& atss, int64_t image,
                                            const Box<T>& anchor) {
  const int64_t count = atss.counts[image];
  T best = 0;
  int64_t match = -1;
  for (int64_t j = threadIdx.x % kWarpSize; j < count; j += kWarpSize) {
    const T iou = atss.is_object(image, j) ? atss_iou(atss.gt_boxes.load(image, j), anchor) : T(0);
    if (iou > best) {
      best = iou;
      match = j;
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, best, offset);
    const int64_t box = __shfl_xor_sync(kFullWarp, match, offset);
    if (other > best || (other == best && box < match)) {
      best = other;
      match = box;
    }
  }
  return match;
}

template <Claim claim, typename T>
__global__ void __launch_bounds__(kThreads, kFewBlocks)
    atss_matches_kernel(const __grid_constant__ Atss<T> atss) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  const int64_t image = warp / atss.tiles;
  const int tile = static_cast<int>(warp - image * atss.tiles);
  if (image >= atss.num_images) {
    return;
  }
  const TileLane at = lane_of(atss.levels.of_tile(tile), tile);
  const int64_t place = image * atss.num_anchors + at.anchor;
  const unsigned long long claims = at.present ? atss.claims[place] : 0;
  int64_t match = -1;
  if constexpr (claim == Claim::kBest) {
    match = claims == 0 ? -1 : int64_t{~static_cast<unsigned>(claims)};
  } else if constexpr (claim == Claim::kFirst) {
    match = claims == 0 ? -1 : int64_t{~atss.first_box[place]};
  } else {
    unsigned maxima[2];  // as they lie in memory
    memcpy(maxima, &claims, sizeof claims);
    match = int64_t{maxima[0]} - 1;
    const bool is_claimed_by_several =
        claims != 0 && int64_t{maxima[0]} + maxima[1] != atss.counts.most + 1;
    for (unsigned mask = __ballot_sync(kFullWarp, is_claimed_by_several); mask != 0;
         mask &= mask - 1) {
      const int lane = __ffs(mask) - 1;
      const int anchor = __shfl_sync(kFullWarp, at.anchor, lane);
      const int64_t best = best_box(atss, image, atss.anchors.load(0, anchor));
      match = static_cast<int>(threadIdx.x % kWarpSize) == lane ? best : match;
    }
  }
  if (at.present) {
    atss.claims[place] =
        static_cast<unsigned long long>(atss.is_in_crowd(image, tile) ? -2 : match);
    if (match >= 0 && atss.owned != nullptr) {
      atomicAdd(&atss.owned[image * atss.counts.most + match], 1u);
    }
  }
}

// ---- at_least_one: a warp an image, whose boxes take in turn ------------------------------------

template <typename T>
__global__ void __launch_bounds__(kWarpSize)
    atss_at_least_one_kernel(const __grid_constant__ Atss<T> atss) {
  const int lane = threadIdx.x;
  const int64_t image = blockIdx.x;
  auto* matches = reinterpret_cast<long long*>(atss.claims) + image * atss.num_anchors;
  unsigned* owned = atss.owned + image * atss.counts.most;
  const int64_t count = atss.counts[image];
  for (int64_t begin = 0; begin < count; begin += kWarpSize) {
    const int64_t mine = begin + lane;
    // No other box can lose its last anchor, nor get a first one.
    const bool has_none = mine < count && atss.is_object(image, mine) && owned[mine] == 0;
    for (unsigned mask = __ballot_sync(kFullWarp, has_none); mask != 0; mask &= mask - 1) {
      const int64_t j = begin + __ffs(mask) - 1;
      const Box<T> box = atss.gt_boxes.load(image, j);
      T best = 0;
      int taken = -1, rank = lane, best_rank = 0x7fffffff;
      for_each_candidate(atss, image, box, [&](int anchor) {
        if (anchor >= 0) {
          const T iou = atss_iou(box, atss.anchors.load(0, anchor));
          if (iou > best && (matches[anchor] < 0 || owned[matches[anchor]] > 1)) {
            best = iou;
            taken = anchor;
            best_rank = rank;
          }
        }
        rank += kWarpSize;
      });
      T greatest = best;
      int first_rank = best_rank;
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        const T other = __shfl_xor_sync(kFullWarp, greatest, offset);
        const int other_rank = __shfl_xor_sync(kFullWarp, first_rank, offset);
        if (other > greatest || (other == greatest && other_rank < first_rank)) {
          greatest = other;
          first_rank = other_rank;
        }
      }
      __syncwarp();  // all have read
      if (taken >= 0 && best_rank == first_rank) {
        owned[j] = 1;
        if (matches[taken] >= 0) {
          --owned[matches[taken]];
        }
        matches[taken] = j;
      }
      __syncwarp();
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

AtssLevels levels_of(const AtssOptions& options) {
  AtssLevels levels{static_cast<int>(options.level_sizes.size()), {}};
  AtssLevel level{0, 0, 0, 0};
  for (int i = 0; i < levels.count; ++i) {
    const auto size = static_cast<int>(options.level_sizes[i]);
    level = {level.end, level.end + size, level.end_tile,
             level.end_tile + static_cast<int>(ceil_div(size, kWarpSize))};
    levels.of[i] = level;
  }
  return levels;
}

unsigned* words_of(std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<unsigned*>(tensor->mutable_data_ptr()) : nullptr;
}

template <typename Rule, Claim claim, typename T>
void launch_claims(const Atss<T>& atss, const LaunchScope& scope) {
  const auto kernel = &atss_claims_kernel<Rule, claim, T>;
  const size_t shared =
      kThreads * atss.levels.count * chunks_of_level(atss.topk) * (sizeof(T) + sizeof(int));
  const int64_t work = ceil_div(atss.num_images * atss.counts.most, kWarps);
  if (work > 0) {
    launch(kernel, resident_grid(kernel, kThreads, shared, work, scope), kThreads, shared,
           scope.stream(), atss);
  }
}

template <typename Rule, typename T>
void launch_rule(const Atss<T>& atss, int64_t tiles, const LaunchScope& scope) {
  const auto launch_matches = [&](auto kernel) {
    launch(kernel, tiles, kThreads, 0, scope.stream(), atss);
  };
  if constexpr (Rule::kAllBoxesCompete) {
    launch_claims<Rule, Claim::kEveryBox>(atss, scope);
    launch_matches(&atss_matches_kernel<Claim::kEveryBox, T>);
  } else if constexpr (std::is_same_v<T, float>) {
    launch_claims<Rule, Claim::kBest>(atss, scope);
    launch_matches(&atss_matches_kernel<Claim::kBest, T>);
  } else {
    launch_claims<Rule, Claim::kIou>(atss, scope);
    launch_claims<Rule, Claim::kFirst>(atss, scope);
    launch_matches(&atss_matches_kernel<Claim::kFirst, T>);
  }
}

Tensor assign_atss_cuda(const Tensor& anchors_, const Tensor& gt_boxes_,
                        const std::optional<Tensor>& counts_, const std::optional<Tensor>& crowd_,
                        const std::vector<int64_t>& level_sizes, int64_t topk, int64_t rule,
                        bool at_least_one) {
  const AtssOptions options{level_sizes, topk, rule, at_least_one};
  check_assign_atss(anchors_, gt_boxes_, counts_, crowd_, options);
  const LaunchScope scope(anchors_);
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_anchors = anchors.size(0);
  Tensor matches = torch::stable::new_zeros(anchors, {num_images, num_anchors}, ScalarType::Long);
  if (matches.numel() == 0) {
    return matches;
  }
  const AtssLevels levels = levels_of(options);
  const int64_t tiles = levels.of[levels.count - 1].end_tile;
  dispatch_compute(anchors.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    Tensor ranges = torch::stable::new_empty(anchors, {tiles, 4});
    std::optional<Tensor> in_crowd, first_box, owned;
    if (crowd.has_value()) {
      in_crowd = torch::stable::new_empty(anchors, {num_images, tiles}, ScalarType::Int);
    }
    if (std::is_same_v<T, double> && options.rule == static_cast<int64_t>(AtssRule::kAtss)) {
      first_box = torch::stable::new_zeros(anchors, {num_images, num_anchors}, ScalarType::Int);
    }
    if (at_least_one) {
      owned = torch::stable::new_zeros(anchors, {num_images, max_boxes}, ScalarType::Int);
    }
    const Atss<T> atss{Rows<Box<T>, T>(anchors, {0, 4}),
                       num_anchors,
                       tiles,
                       levels,
                       Rows<Box<T>, T>(gt_boxes, {4 * max_boxes, 4}),
                       num_images,
                       {Integers(counts_), counts_.has_value() ? counts_->stride(0) : 0, max_boxes},
                       data_of<uint8_t>(crowd),
                       static_cast<int>(topk),
                       static_cast<Box<T>*>(ranges.mutable_data_ptr()),
                       words_of(in_crowd),
                       static_cast<unsigned long long*>(matches.mutable_data_ptr()),
                       words_of(first_box),
                       words_of(owned)};
    launch(&atss_ranges_kernel<T>, ceil_div(tiles, kWarps), kThreads, 0, scope.stream(), atss);
    const int64_t tiles_of_images = ceil_div(num_images * tiles, kWarps);
    if (crowd.has_value()) {
      launch(&atss_crowds_kernel<T>, tiles_of_images, kThreads, 0, scope.stream(), atss);
    }
    dispatch_atss(options, [&](auto rule_tag) {
      launch_rule<decltype(rule_tag)>(atss, tiles_of_images, scope);
    });
    if (at_least_one && max_boxes > 0) {
      launch(&atss_at_least_one_kernel<T>, num_images, kWarpSize, 0, scope.stream(), atss);
    }
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("assign_atss", TORCH_BOX(&assign_atss_cuda));
}

}  // namespace focalops
