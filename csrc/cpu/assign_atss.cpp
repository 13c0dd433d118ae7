// ATSS' assignment on the CPU, in parallel over images and their boxes.
//
// The anchors' centers are laid out coordinate by coordinate in tiles of 16, and 16 tiles are a
// group. Neighbouring anchors lie close together: a box looks at the group and the tile whose range
// is nearest to its center first, and then only at those that are nearer than its worst candidate.
// Claims are written down and applied image by image in the order of the boxes, so that an anchor
// needs no memory but its match: the IoU of the box that has it is computed again where another one
// claims it.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../checks/assign.h"
#include "../math/assign.h"
#include "ground_truth.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kTile = 16;      // anchors
constexpr int64_t kGroup = kTile;  // tiles
constexpr int64_t kGroupsPerTask = 64;
constexpr int64_t kBoxesPerTask = 32;
constexpr int64_t kConflictsPerTask = 16;
constexpr int64_t kLanes = 32;     // of the sums, as a warp has
constexpr int64_t kConflict = -3;  // several boxes claim the anchor

// The ranges of 16 tiles or groups; that of nothing is infinitely far away.
template <typename T>
struct Ranges {
  alignas(64) T x1[kGroup], y1[kGroup], x2[kGroup], y2[kGroup];

  void set(int64_t i, const Box<T>& range) {
    x1[i] = range.x1;
    y1[i] = range.y1;
    x2[i] = range.x2;
    y2[i] = range.y2;
  }
};

template <typename T>
constexpr Box<T> kNoRange{std::numeric_limits<T>::infinity(), std::numeric_limits<T>::infinity(),
                          -std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity()};

template <typename T>
struct Tile {
  alignas(64) T x[kTile], y[kTile];  // of the centers; past the end NaN, which is near nothing
};

template <typename T>
struct Group {
  Tile<T> tiles[kGroup];
  Ranges<T> ranges;  // of the tiles
  Box<T> range;
  int64_t begin, end;  // its anchors
};

template <typename T>
struct Level {
  const Group<T>* groups;
  int64_t num_groups;
  std::vector<Ranges<T>> ranges;  // of the groups
};

// A loop over the anchors of a whole tile is vectorised.
template <typename T>
FOCALOPS_SIMD void load_tile(const T* anchors, int64_t n, Tile<T>& tile, Box<T>& range) {
  for (int64_t i = 0; i < n; ++i) {
    const Point<T> center = center_of(load_box(anchors + 4 * i));
    tile.x[i] = center.x;
    tile.y[i] = center.y;
  }
  for (int64_t i = std::max<int64_t>(n, 0); i < kTile; ++i) {
    tile.x[i] = tile.y[i] = std::numeric_limits<T>::quiet_NaN();
  }
  range = kNoRange<T>;
  for (int64_t i = 0; i < kTile; ++i) {  // a NaN is in no range
    range = {min_of(tile.x[i], range.x1), min_of(tile.y[i], range.y1), max_of(tile.x[i], range.x2),
             max_of(tile.y[i], range.y2)};
  }
}

template <typename T>
void load_group(const T* anchors, Group<T>& group) {
  group.range = kNoRange<T>;
  for (int64_t t = 0; t < kGroup; ++t) {
    const int64_t begin = group.begin + t * kTile;
    Box<T> range;
    load_tile(anchors + 4 * begin, std::min(kTile, group.end - begin), group.tiles[t], range);
    group.ranges.set(t, range);
    group.range = {min_of(range.x1, group.range.x1), min_of(range.y1, group.range.y1),
                   max_of(range.x2, group.range.x2), max_of(range.y2, group.range.y2)};
  }
}

// The anchors of all levels, the same for all images.
template <typename T>
struct Pyramid {
  std::unique_ptr<Group<T>[]> groups;  // 9 bytes an anchor of float
  int64_t num_groups = 0;
  std::vector<Level<T>> levels;

  Pyramid(const T* anchors, const std::vector<int64_t>& level_sizes) {
    for (const int64_t size : level_sizes) {
      const int64_t in_level = (size + kGroup * kTile - 1) / (kGroup * kTile);
      levels.push_back({nullptr, in_level, {}});
      num_groups += in_level;
    }
    groups.reset(new Group<T>[num_groups]);
    Group<T>* group = groups.get();
    int64_t begin = 0;
    for (size_t i = 0; i < levels.size(); ++i) {
      levels[i].groups = group;
      const int64_t end = begin + level_sizes[i];
      for (; begin < end; begin = group++->end) {
        group->begin = begin;
        group->end = std::min(begin + kGroup * kTile, end);
      }
    }
    torch::stable::parallel_for(0, num_groups, kGroupsPerTask, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        load_group(anchors, groups[g]);
      }
    });
    for (Level<T>& level : levels) {
      level.ranges.resize((level.num_groups + kGroup - 1) / kGroup);
      for (int64_t g = 0; g < kGroup * static_cast<int64_t>(level.ranges.size()); ++g) {
        level.ranges[g / kGroup].set(g % kGroup,
                                     g < level.num_groups ? level.groups[g].range : kNoRange<T>);
      }
    }
  }
};

// The nearest anchors of a level so far, by (distance, index); where there are fewer, infinitely
// distant ones follow that are none.
template <typename T>
struct Nearest {
  static constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

  int64_t most;
  T distance[kMaxAtssTopk];
  int32_t index[kMaxAtssTopk];
  T limit;  // the square of a distance above it is greater than the worst, rounded as it may be

  FOCALOPS_INLINE inline void clear() {
    limit = std::numeric_limits<T>::infinity();
    std::fill(distance, distance + most, std::numeric_limits<T>::infinity());
    std::fill(index, index + most, kNone);
  }

  FOCALOPS_INLINE inline void insert(T d, int32_t i) {
    const auto is_after = [&](int64_t place) FOCALOPS_INLINE {
      return distance[place] > d || (distance[place] == d && index[place] > i);
    };
    int64_t place = most - 1;
    if (!is_after(place)) {
      return;
    }
    for (; place > 0 && is_after(place - 1); --place) {
      distance[place] = distance[place - 1];
      index[place] = index[place - 1];
    }
    distance[place] = d;
    index[place] = i;
    limit = distance[most - 1] * distance[most - 1] * T(1.000001);
  }
};

// Calls f with the places of the squares that are not above the limit, in ascending order. Flags of
// a byte each are made by vectors, and eight at a time are looked at.
template <typename T, typename F>
FOCALOPS_INLINE inline void for_each_near(const T* squares, T limit, const F& f) {
  uint8_t flags[kTile];
  for (int i = 0; i < kTile; ++i) {
    flags[i] = squares[i] <= limit;
  }
  for (int begin = 0; begin < kTile; begin += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + begin, sizeof eight);
    if (eight == 0) {
      continue;
    }
    for (int i = begin; i < begin + 8; ++i) {
      if (flags[i]) {
        f(i);
      }
    }
  }
}

template <typename T>
FOCALOPS_INLINE inline void visit_tile(const Tile<T>& tile, int32_t first, const Point<T>& center,
                                       const int64_t* matches, Nearest<T>& nearest) {
  T squares[kTile];
  for (int i = 0; i < kTile; ++i) {
    squares[i] = squared_distance(center, Point<T>{tile.x[i], tile.y[i]});
  }
  for_each_near(squares, nearest.limit, [&](int32_t i) FOCALOPS_INLINE {
    if (squares[i] <= nearest.limit && matches[first + i] != -2) {
      nearest.insert(std::sqrt(squares[i]), first + i);
    }
  });
}

// Calls f with the place of the nearest range, and then of the others that may hold something
// nearer than the worst of the list.
template <typename T, typename F>
FOCALOPS_INLINE inline void visit_ranges(const Ranges<T>* ranges, int64_t count,
                                         const Point<T>& center, const Nearest<T>& nearest,
                                         const F& f) {
  T squares[kGroup];
  const auto measure = [&](const Ranges<T>& of) FOCALOPS_INLINE {
    for (int i = 0; i < kGroup; ++i) {
      squares[i] = squared_distance(center, Box<T>{of.x1[i], of.y1[i], of.x2[i], of.y2[i]});
    }
  };
  int64_t first = 0;
  T least = std::numeric_limits<T>::infinity();
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    measure(ranges[begin / kGroup]);
    for (int64_t i = 0; i < kGroup; ++i) {
      first = squares[i] < least ? begin + i : first;
      least = squares[i] < least ? squares[i] : least;
    }
  }
  f(first);
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    if (count > kGroup) {
      measure(ranges[begin / kGroup]);
    }
    for_each_near(squares, nearest.limit, [&](int64_t i) FOCALOPS_INLINE {
      if (begin + i != first && begin + i < count && squares[i] <= nearest.limit) {
        f(begin + i);
      }
    });
  }
}

// The candidates of a level. matches: -2 where an anchor is none.
template <typename T>
FOCALOPS_SIMD void find_nearest(const Level<T>& level, const Point<T>& center,
                                const int64_t* matches, Nearest<T>& nearest) {
  nearest.clear();
  if (level.num_groups == 0) {
    return;
  }
  visit_ranges(
      level.ranges.data(), level.num_groups, center, nearest, [&](int64_t g) FOCALOPS_INLINE {
        const Group<T>& group = level.groups[g];
        const int64_t tiles = (group.end - group.begin + kTile - 1) / kTile;
        visit_ranges(&group.ranges, tiles, center, nearest, [&](int64_t t) FOCALOPS_INLINE {
          visit_tile(group.tiles[t], static_cast<int32_t>(group.begin + t * kTile), center, matches,
                     nearest);
        });
      });
}

// Adds up in the order that a warp does, so that a sum has the same bits there.
class LaneSum {
 public:
  void add(int64_t rank, double value) { lanes_[rank % kLanes] += value; }

  double total() const {
    double lanes[kLanes];
    std::copy(lanes_, lanes_ + kLanes, lanes);
    for (int64_t n = kLanes / 2; n > 0; n /= 2) {
      for (int64_t i = 0; i < n; ++i) {
        lanes[i] += lanes[i + n];
      }
    }
    return lanes[0];
  }

 private:
  double lanes_[kLanes] = {};
};

// A box's candidates on all levels, level by level.
template <typename T>
struct Candidates {
  struct Candidate {
    T iou;
    int32_t anchor;
    int32_t rank;  // in its level
  };
  std::vector<Candidate> all;
  Nearest<T> nearest;

  void find(const Pyramid<T>& pyramid, const T* anchors, int64_t topk, const Box<T>& box,
            const int64_t* matches) {
    all.clear();
    nearest.most = topk;
    for (const Level<T>& level : pyramid.levels) {
      find_nearest(level, center_of(box), matches, nearest);
      for (int64_t rank = 0; rank < topk && nearest.index[rank] != nearest.kNone; ++rank) {
        const int32_t anchor = nearest.index[rank];
        all.push_back({atss_iou(box, load_box(anchors + 4 * int64_t{anchor})), anchor,
                       static_cast<int32_t>(rank)});
      }
    }
  }

  T threshold() const {
    const auto n = static_cast<int64_t>(all.size());
    LaneSum sum, squares;
    for (const Candidate& candidate : all) {
      sum.add(candidate.rank, candidate.iou);
    }
    const double mean = sum.total() / static_cast<double>(n);
    for (const Candidate& candidate : all) {
      const double deviation = candidate.iou - mean;
      squares.add(candidate.rank, deviation * deviation);
    }
    return atss_threshold<T>(mean, squares.total(), n);
  }
};

struct Claim {
  int32_t box, anchor;
};

// The ground truth and the matches of an image.
template <typename T>
struct Image {
  const T* anchors;  // [N, 4]
  const T* boxes;    // [M, 4]
  int64_t count;
  const bool* crowd;  // [M], null: none is
  int64_t* matches;   // [N]

  Box<T> box(int64_t j) const { return load_box(boxes + 4 * j); }
  Box<T> anchor(int64_t i) const { return load_box(anchors + 4 * i); }
  bool is_object(int64_t j) const { return crowd == nullptr || !crowd[j]; }

  // Before any anchor is a candidate.
  void clear(const Group<T>& group) const {
    std::fill(matches + group.begin, matches + group.end, -1);
    for (int64_t j = 0; crowd != nullptr && j < count; ++j) {
      if (crowd[j] && intersects(box(j), group.range)) {
        for (int64_t i = group.begin; i < group.end; ++i) {
          matches[i] = is_inside(center_of(anchor(i)), box(j), T(0)) ? -2 : matches[i];
        }
      }
    }
  }

  template <typename Rule>
  void claim(int64_t begin, int64_t end, const Pyramid<T>& pyramid, int64_t topk,
             std::vector<Claim>& claims) const {
    Candidates<T> candidates;
    for (int64_t j = begin; j < end; ++j) {
      if (!is_object(j)) {
        continue;
      }
      candidates.find(pyramid, anchors, topk, box(j), matches);
      const T threshold = candidates.threshold();
      for (const auto& candidate : candidates.all) {
        if (Rule::reaches(candidate.iou, threshold) &&
            is_inside(center_of(anchor(candidate.anchor)), box(j), T(Rule::kMargin))) {
          claims.push_back({static_cast<int32_t>(j), candidate.anchor});
        }
      }
    }
  }

  // In ascending order of the boxes; of equal IoUs the first keeps the anchor. Says whether
  // all boxes have to be asked who gets it.
  template <typename Rule>
  bool apply(const Claim& claim) const {
    int64_t& match = matches[claim.anchor];
    const auto iou_of = [&](int64_t j) { return atss_iou(box(j), anchor(claim.anchor)); };
    if (match == -1) {
      match = claim.box;
    } else if (Rule::kAllBoxesCompete) {
      return std::exchange(match, kConflict) != kConflict;
    } else if (iou_of(claim.box) > iou_of(match)) {
      match = claim.box;
    }
    return false;
  }

  // The box of the greatest IoU, which is above 0: whoever claimed it has such a one.
  int64_t best_box(int64_t i) const {
    T best = 0;
    int64_t match = -1;
    for (int64_t j = 0; j < count; ++j) {
      if (is_object(j) && intersects(box(j), anchor(i))) {
        const T iou = atss_iou(box(j), anchor(i));
        match = iou > best ? j : match;
        best = iou > best ? iou : best;
      }
    }
    return match;
  }

  void give_one_to_each(const Pyramid<T>& pyramid, int64_t topk) const {
    std::vector<int64_t> owned(count);
    for (int64_t i = 0; i < pyramid.num_groups; ++i) {
      const Group<T>& group = pyramid.groups[i];
      for (int64_t a = group.begin; a < group.end; ++a) {
        if (matches[a] >= 0) {
          ++owned[matches[a]];
        }
      }
    }
    Candidates<T> candidates;
    for (int64_t j = 0; j < count; ++j) {
      if (owned[j] > 0 || !is_object(j)) {
        continue;
      }
      candidates.find(pyramid, anchors, topk, box(j), matches);
      T best = 0;
      int64_t* taken = nullptr;
      for (const auto& candidate : candidates.all) {
        int64_t& match = matches[candidate.anchor];
        if (candidate.iou > best && (match < 0 || owned[match] > 1)) {
          best = candidate.iou;
          taken = &match;
        }
      }
      if (taken != nullptr) {
        owned[j] = 1;
        if (*taken >= 0) {
          --owned[*taken];
        }
        *taken = j;
      }
    }
  }
};

template <typename Rule, typename T>
void assign_images(const std::vector<Image<T>>& images, const Pyramid<T>& pyramid,
                   const AtssOptions& options) {
  const auto num_images = static_cast<int64_t>(images.size());
  torch::stable::parallel_for(
      0, num_images * pyramid.num_groups, kGroupsPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          images[i / pyramid.num_groups].clear(pyramid.groups[i % pyramid.num_groups]);
        }
      });

  struct Task {
    int64_t image, begin, end;  // boxes
    std::vector<Claim> claims;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < num_images; ++b) {
    for (int64_t j = 0; j < images[b].count; j += kBoxesPerTask) {
      tasks.push_back({b, j, std::min(j + kBoxesPerTask, images[b].count), {}});
    }
  }
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Task& task = tasks[i];
      images[task.image].template claim<Rule>(task.begin, task.end, pyramid, options.topk,
                                              task.claims);
    }
  });
  struct Conflict {
    int64_t image, anchor;
  };
  std::vector<Conflict> conflicts;
  for (const Task& task : tasks) {
    for (const Claim& claim : task.claims) {
      if (images[task.image].template apply<Rule>(claim)) {
        conflicts.push_back({task.image, claim.anchor});
      }
    }
  }
  const auto num_conflicts = static_cast<int64_t>(conflicts.size());
  torch::stable::parallel_for(0, num_conflicts, kConflictsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Image<T>& image = images[conflicts[i].image];
      image.matches[conflicts[i].anchor] = image.best_box(conflicts[i].anchor);
    }
  });
  if (options.at_least_one) {
    torch::stable::parallel_for(0, num_images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        images[b].give_one_to_each(pyramid, options.topk);
      }
    });
  }
}

Tensor assign_atss_cpu(const Tensor& anchors_, const Tensor& gt_boxes_,
                       const std::optional<Tensor>& counts_, const std::optional<Tensor>& crowd_,
                       const std::vector<int64_t>& level_sizes, int64_t topk, int64_t rule,
                       bool at_least_one) {
  const AtssOptions options{level_sizes, topk, rule, at_least_one};
  check_assign_atss(anchors_, gt_boxes_, counts_, crowd_, options);
  const Tensor anchors = torch::stable::contiguous(anchors_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const std::vector<int64_t> counts = read_counts("assign_atss", gt_boxes, counts_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_anchors = anchors.size(0);
  Tensor matches = torch::stable::new_empty(anchors, {num_images, num_anchors}, ScalarType::Long);
  dispatch_compute(anchors.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto* anchor_data = static_cast<const T*>(anchors.const_data_ptr());
    const auto* box_data = static_cast<const T*>(gt_boxes.const_data_ptr());
    const auto* crowd_data = data_of<bool>(crowd);
    auto* match_data = data_of<int64_t>(matches);
    std::vector<Image<T>> images;
    for (int64_t b = 0; b < num_images; ++b) {
      images.push_back({anchor_data, box_data + 4 * b * max_boxes, counts[b],
                        crowd_data == nullptr ? nullptr : crowd_data + b * max_boxes,
                        match_data + b * num_anchors});
    }
    const Pyramid<T> pyramid(anchor_data, level_sizes);
    dispatch_atss(options, [&](auto rule_tag) {
      assign_images<decltype(rule_tag)>(images, pyramid, options);
    });
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) { m.impl("assign_atss", TORCH_BOX(&assign_atss_cpu)); }

}  // namespace focalops
