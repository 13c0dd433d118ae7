// Anchor matching on the CPU: no matrix of IoUs, in parallel over images and chunks of anchors.
//
// A tile of anchors is laid out coordinate by coordinate, and the loop over its anchors is
// vectorised, one ground-truth box at a time. Neighbouring anchors lie close together, so that most
// boxes miss the range of a tile as a whole: their IoU with each of its anchors is 0, and they are
// skipped. The first pass writes the matches and keeps, for each chunk and box, the best IoU. The
// second, for low-quality matches, visits only chunks that hold the best anchor of some box.
// Anchors inside a crowd become empty boxes, which overlap nothing, before either pass looks at
// them.
#include <algorithm>
#include <limits>
#include <vector>

#include "../checks/matching.h"
#include "../matching.h"
#include "../math/box.h"
#include "ground_truth.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kTile = 256;  // anchors in the buffers of one thread; they stay in the L1 cache
constexpr int64_t kAnchorsPerChunk = 8 * kTile;  // the unit of parallel work

template <typename T>
struct AnchorTile {
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t,
                                   int32_t>;  // as wide as T, for the vector lanes

  alignas(64) T x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];
  alignas(64) T best_iou[kTile];
  alignas(64) Index best_box[kTile];
  alignas(64) Index claimed[kTile];     // by which box that has no better anchor, plus 1
  alignas(64) Index is_ignored[kTile];  // inside a crowd
  Box<T> range;                         // that holds all anchors; a NaN is in no range
};

// Past the end of the anchors there are empty boxes, whose IoU is 0: the loops over a tile have a
// constant length.
template <typename T>
FOCALOPS_SIMD void load_tile(const T* anchors, int64_t n, AnchorTile<T>& tile) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  Box<T> range{kInfinity, kInfinity, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> anchor = load_box(anchors + 4 * i);
    tile.x1[i] = anchor.x1;
    tile.y1[i] = anchor.y1;
    tile.x2[i] = anchor.x2;
    tile.y2[i] = anchor.y2;
    range.x1 = min_of(anchor.x1, range.x1);
    range.y1 = min_of(anchor.y1, range.y1);
    range.x2 = max_of(anchor.x2, range.x2);
    range.y2 = max_of(anchor.y2, range.y2);
  }
  for (int64_t i = n; i < kTile; ++i) {
    tile.x1[i] = tile.y1[i] = tile.x2[i] = tile.y2[i] = 0;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    tile.area[i] = area(Box<T>{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]});
    tile.best_iou[i] = 0;
    tile.best_box[i] = 0;
    tile.claimed[i] = 0;
    tile.is_ignored[i] = 0;
  }
  tile.range = range;
}

// Takes one box into account and returns its best IoU with an anchor of the tile. A NaN is never
// greater, so that it counts as 0; of equal IoUs the first box keeps the anchor.
template <typename T>
FOCALOPS_SIMD T match_box(const Box<T>& box, typename AnchorTile<T>::Index index,
                          AnchorTile<T>& tile) {
  const T box_area = area(box);
  T best = 0;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < kTile; ++i) {
    const Box<T> anchor{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
    const T value = iou(anchor, box, tile.area[i], box_area);
    const bool is_better = value > tile.best_iou[i];
    tile.best_iou[i] = is_better ? value : tile.best_iou[i];
    tile.best_box[i] = is_better ? index : tile.best_box[i];
    best = value > best ? value : best;
  }
  return best;
}

template <typename T>
FOCALOPS_SIMD void claim_best(const Box<T>& box, typename AnchorTile<T>::Index index, T best,
                              AnchorTile<T>& tile) {
  const T box_area = area(box);
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    const Box<T> anchor{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
    const bool is_best = iou(anchor, box, tile.area[i], box_area) == best;
    tile.claimed[i] = is_best ? index + 1 : tile.claimed[i];
  }
}

template <typename T>
FOCALOPS_SIMD void ignore_inside(const Box<T>& crowd, T threshold, bool of_anchor,
                                 AnchorTile<T>& tile) {
  const T crowd_area = area(crowd);
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    const Box<T> anchor{tile.x1[i], tile.y1[i], tile.x2[i], tile.y2[i]};
    const T of = of_anchor ? tile.area[i] : crowd_area;
    tile.is_ignored[i] |= share_inside(anchor, crowd, of) > threshold;
  }
}

template <typename T>
FOCALOPS_SIMD void empty_ignored(AnchorTile<T>& tile) {
  for (int64_t i = 0; i < kTile; ++i) {
    const bool keep = tile.is_ignored[i] == 0;
    tile.x1[i] = keep ? tile.x1[i] : T(0);
    tile.y1[i] = keep ? tile.y1[i] : T(0);
    tile.x2[i] = keep ? tile.x2[i] : T(0);
    tile.y2[i] = keep ? tile.y2[i] : T(0);
    tile.area[i] = keep ? tile.area[i] : T(0);
  }
}

template <typename T>
FOCALOPS_SIMD void write_matches(const AnchorTile<T>& tile, int64_t n, T fg_iou_threshold,
                                 T bg_iou_threshold, int64_t* matches) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = tile.best_iou[i];
    const int64_t match = value < bg_iou_threshold   ? -1
                          : value < fg_iou_threshold ? -2
                                                     : int64_t{tile.best_box[i]};
    matches[i] = tile.is_ignored[i] ? -2 : match;
  }
}

// The ground truth of an image.
template <typename T>
struct GroundTruth {
  const T* boxes;  // [M, 4]
  int64_t count;
  const uint8_t* roles;  // [M], null: all are objects
  T crowd_threshold;
  bool ignore_wrt_candidates;

  Box<T> box(int64_t j) const { return load_box(boxes + 4 * j); }
  Role role(int64_t j) const { return roles == nullptr ? kObject : static_cast<Role>(roles[j]); }

  int64_t first_object() const {  // `count` if there is none
    int64_t j = 0;
    while (j < count && role(j) != kObject) {
      ++j;
    }
    return j;
  }
};

template <typename T>
class ImageMatcher {
 public:
  using Index = typename AnchorTile<T>::Index;

  ImageMatcher(const T* anchors, int64_t num_anchors, const GroundTruth<T>& truth, int64_t* matches)
      : anchors_(anchors),
        num_anchors_(num_anchors),
        truth_(truth),
        first_object_(truth.first_object()),
        matches_(matches) {}

  // best[j]: the best IoU of box j with an anchor of this chunk.
  void match(int64_t chunk, T fg_iou_threshold, T bg_iou_threshold, T* best) const {
    if (first_object_ == truth_.count) {  // only background, whatever the thresholds
      fg_iou_threshold = bg_iou_threshold = std::numeric_limits<T>::infinity();
    }
    AnchorTile<T> tile;
    for_each_tile(chunk, tile, [&](int64_t begin, int64_t n) {
      match_tile(tile, best);
      write_matches(tile, n, fg_iou_threshold, bg_iou_threshold, matches_ + begin);
    });
  }

  // Gives the anchors that some box has no better one than a box: their own best or the last such
  // box. best_of_chunk and best: the best IoU of each box within the chunk, and at all.
  void restore_low_quality(int64_t chunk, const T* best_of_chunk, const T* best, T min_pos_iou,
                           LowQuality rule) const {
    std::vector<int64_t> ties;  // boxes whose best anchor is in this chunk
    for (int64_t j = 0; j < truth_.count; ++j) {
      if (best[j] > 0 && best[j] >= min_pos_iou && best_of_chunk[j] == best[j]) {
        ties.push_back(j);
      }
    }
    if (ties.empty()) {
      return;
    }
    AnchorTile<T> tile;
    for_each_tile(chunk, tile, [&](int64_t begin, int64_t n) {
      bool any = false;
      for (const int64_t j : ties) {
        if (intersects(truth_.box(j), tile.range)) {
          claim_best(truth_.box(j), static_cast<Index>(j), best[j], tile);
          any = true;
        }
      }
      if (any) {
        if (rule == LowQuality::kOwnBest) {
          match_tile(tile, nullptr);
        }
        for (int64_t i = 0; i < n; ++i) {
          if (tile.claimed[i]) {
            matches_[begin + i] =
                rule == LowQuality::kOwnBest ? tile.best_box[i] : tile.claimed[i] - 1;
          }
        }
      }
    });
  }

  // Gives each box the first of its best anchors, which is in the chunk first_chunk[j] (< 0: it has
  // none); of boxes with the same one the last gets it, or by another rule the first.
  void restore_first_anchors(const std::vector<int64_t>& first_chunk, const T* best,
                             LowQuality rule) const {
    AnchorTile<T> tile;
    for (int64_t k = 0; k < truth_.count; ++k) {
      const int64_t j = rule == LowQuality::kFirstBoxFirstAnchor ? truth_.count - 1 - k : k;
      bool found = first_chunk[j] < 0;
      for_each_tile(found ? 0 : first_chunk[j], tile, [&](int64_t begin, int64_t n) {
        if (!found && intersects(truth_.box(j), tile.range)) {
          claim_best(truth_.box(j), static_cast<Index>(j), best[j], tile);
          for (int64_t i = 0; i < n && !found; ++i) {
            if (tile.claimed[i]) {
              matches_[begin + i] = j;
              found = true;
            }
          }
        }
      });
    }
  }

 private:
  template <typename F>
  void for_each_tile(int64_t chunk, AnchorTile<T>& tile, const F& f) const {
    const int64_t end = std::min((chunk + 1) * kAnchorsPerChunk, num_anchors_);
    for (int64_t begin = chunk * kAnchorsPerChunk; begin < end; begin += kTile) {
      const int64_t n = std::min(kTile, end - begin);
      load_tile(anchors_ + 4 * begin, n, tile);
      ignore_crowds(tile);
      f(begin, n);
    }
  }

  void ignore_crowds(AnchorTile<T>& tile) const {
    bool any = false;
    for (int64_t j = 0; truth_.roles != nullptr && j < truth_.count; ++j) {
      if (truth_.role(j) == kCrowd && intersects(truth_.box(j), tile.range)) {
        ignore_inside(truth_.box(j), truth_.crowd_threshold, truth_.ignore_wrt_candidates, tile);
        any = true;
      }
    }
    if (any) {
      empty_ignored(tile);
    }
  }

  void match_tile(AnchorTile<T>& tile, T* best) const {
    if (first_object_ > 0) {
      std::fill(tile.best_box, tile.best_box + kTile, static_cast<Index>(first_object_));
    }
    for (int64_t j = first_object_; j < truth_.count; ++j) {
      if (truth_.role(j) == kObject && intersects(truth_.box(j), tile.range)) {
        const T best_of_tile = match_box(truth_.box(j), static_cast<Index>(j), tile);
        if (best != nullptr) {
          best[j] = std::max(best[j], best_of_tile);
        }
      }
    }
  }

  const T* anchors_;
  int64_t num_anchors_;
  GroundTruth<T> truth_;
  int64_t first_object_;
  int64_t* matches_;
};

Tensor match_anchors_cpu(const Tensor& anchors_, const Tensor& gt_boxes_,
                         const std::optional<Tensor>& counts_, double fg_iou_threshold,
                         double bg_iou_threshold, int64_t low_quality, double min_pos_iou,
                         const std::optional<Tensor>& roles_, double crowd_threshold,
                         bool ignore_wrt_candidates) {
  check_match_anchors(
      anchors_, gt_boxes_, counts_, roles_,
      {fg_iou_threshold, bg_iou_threshold, low_quality, min_pos_iou, crowd_threshold});
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  std::optional<Tensor> roles;
  if (roles_.has_value()) {
    roles = torch::stable::contiguous(*roles_);
  }
  const auto rule = static_cast<LowQuality>(low_quality);
  const std::vector<int64_t> counts = read_counts("match_anchors", gt_boxes, counts_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_anchors = anchors.size(0);
  const int64_t num_chunks = (num_anchors + kAnchorsPerChunk - 1) / kAnchorsPerChunk;
  Tensor matches = torch::stable::new_empty(anchors, {num_images, num_anchors}, ScalarType::Long);

  dispatch_compute(anchors.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto* anchor_data = static_cast<const T*>(anchors.const_data_ptr());
    const auto* box_data = static_cast<const T*>(gt_boxes.const_data_ptr());
    const auto* role_data =
        roles.has_value() ? static_cast<const uint8_t*>(roles->const_data_ptr()) : nullptr;
    auto* match_data = static_cast<int64_t*>(matches.mutable_data_ptr());
    const auto image = [&](int64_t b) {
      const GroundTruth<T> truth{box_data + 4 * b * max_boxes, counts[b],
                                 role_data == nullptr ? nullptr : role_data + b * max_boxes,
                                 T(crowd_threshold), ignore_wrt_candidates};
      return ImageMatcher<T>(anchor_data, num_anchors, truth, match_data + b * num_anchors);
    };

    std::vector<T> best_of_chunk(num_images * num_chunks * max_boxes);  // best IoU of each box
    torch::stable::parallel_for(0, num_images * num_chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        image(task / num_chunks)
            .match(task % num_chunks, T(fg_iou_threshold), T(bg_iou_threshold),
                   &best_of_chunk[task * max_boxes]);
      }
    });
    if (rule == LowQuality::kNone) {
      return;
    }
    std::vector<T> best(num_images * max_boxes);
    for (int64_t task = 0; task < num_images * num_chunks; ++task) {
      for (int64_t j = 0; j < max_boxes; ++j) {
        T& value = best[task / num_chunks * max_boxes + j];
        value = std::max(value, best_of_chunk[task * max_boxes + j]);
      }
    }
    if (takes_first_anchor(rule)) {
      torch::stable::parallel_for(0, num_images, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          std::vector<int64_t> first_chunk(max_boxes, -1);
          for (int64_t j = 0; j < max_boxes; ++j) {
            const T value = best[b * max_boxes + j];
            for (int64_t chunk = num_chunks - 1; chunk >= 0; --chunk) {
              if (value > 0 && value >= T(min_pos_iou) &&
                  best_of_chunk[(b * num_chunks + chunk) * max_boxes + j] == value) {
                first_chunk[j] = chunk;
              }
            }
          }
          image(b).restore_first_anchors(first_chunk, &best[b * max_boxes], rule);
        }
      });
      return;
    }
    torch::stable::parallel_for(0, num_images * num_chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / num_chunks;
        image(b).restore_low_quality(task % num_chunks, &best_of_chunk[task * max_boxes],
                                     &best[b * max_boxes], T(min_pos_iou), rule);
      }
    });
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("match_anchors", TORCH_BOX(&match_anchors_cpu));
}

}  // namespace focalops
