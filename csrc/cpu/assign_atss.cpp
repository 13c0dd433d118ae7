// ATSS' assignment on the CPU, in parallel over images and their boxes.
//
// Claims are written down and applied image by image in the order of the boxes, so that an anchor
// needs no memory but its match: the IoU of the box that has it is computed again where another one
// claims it.
#include <algorithm>
#include <utility>
#include <variant>
#include <vector>

#include "../checks/assign.h"
#include "../math/assign.h"
#include "anchor_grid.h"
#include "ground_truth.h"
#include "nearest_anchors.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kMatchesPerTask = 1 << 15;
constexpr int64_t kBoxesPerTask = 32;
constexpr int64_t kConflictsPerTask = 16;
constexpr int64_t kLanes = 32;     // of the sums, as a warp has
constexpr int64_t kConflict = -3;  // several boxes claim the anchor

template <typename T>
using Level = std::variant<AnchorGrid<T>, AnchorTiles<T>>;

// The anchors of all levels, the same for all images.
template <typename T>
std::vector<Level<T>> levels_of(const T* anchors, const std::vector<int64_t>& level_sizes) {
  std::vector<Level<T>> levels;
  int64_t begin = 0;
  for (const int64_t size : level_sizes) {
    std::optional<AnchorGrid<T>> grid = AnchorGrid<T>::find(anchors, begin, begin + size);
    if (grid.has_value()) {
      levels.push_back(std::move(*grid));
    } else {
      levels.push_back(AnchorTiles<T>(anchors, begin, begin + size));
    }
    begin += size;
  }
  return levels;
}

template <typename T>
FOCALOPS_SIMD void measure(const T* anchors, int64_t n, const Box<T>& box, T margin, T* ious,
                           uint8_t* holds) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> anchor = load_box(anchors + 4 * i);
    ious[i] = atss_iou(box, anchor);
    holds[i] = is_inside(center_of(anchor), box, margin);
  }
}

// The sum of f over values, so many of each level, in the order that a warp adds them up: it has
// the same bits there.
template <typename T, typename F>
double sum_by_lanes(const T* values, const std::vector<int64_t>& of_level, const F& f) {
  double lanes[kLanes] = {};
  for (const int64_t n : of_level) {
    for (int64_t rank = 0; rank < n; ++rank) {
      lanes[rank % kLanes] += f(static_cast<double>(values[rank]));
    }
    values += n;
  }
  for (int64_t n = kLanes / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) {
      lanes[i] += lanes[i + n];
    }
  }
  return lanes[0];
}

// A box's candidates, level by level.
template <typename T>
struct Candidates {
  static constexpr int64_t kMost = kMaxLevels * kMaxAtssTopk;

  int64_t size = 0;
  int32_t anchor[kMost];
  T coordinates[4 * kMost];  // of the anchors
  T iou[kMost];
  uint8_t holds[kMost];  // whether the box holds its center
  std::vector<int64_t> of_level;
  Nearest<T> nearest;

  void find(const std::vector<Level<T>>& levels, const T* anchors, int64_t topk, const Box<T>& box,
            T margin, const int64_t* ignored) {
    size = 0;
    of_level.clear();
    nearest.most = topk;
    for (const Level<T>& any : levels) {
      of_level.push_back(std::visit(
          [&](const auto& level) { return find_nearest(level, center_of(box), ignored, nearest); },
          any));
      std::copy(nearest.index, nearest.index + of_level.back(), anchor + size);
      size += of_level.back();
    }
    for (int64_t i = 0; i < size; ++i) {
      std::copy_n(anchors + 4 * int64_t{anchor[i]}, 4, coordinates + 4 * i);
    }
    measure(coordinates, size, box, margin, iou, holds);
  }

  T threshold() const {
    const double mean =
        sum_by_lanes(iou, of_level, [](double x) { return x; }) / static_cast<double>(size);
    const double squares =
        sum_by_lanes(iou, of_level, [&](double x) { return (x - mean) * (x - mean); });
    return atss_threshold<T>(mean, squares, size);
  }
};

struct Claim {
  int32_t box, anchor;
};

// The ground truth and the matches of an image.
template <typename T>
struct Image {
  const T* anchors;  // [N, 4]
  int64_t num_anchors;
  const T* boxes;  // [M, 4]
  int64_t count;
  const bool* crowd;  // [M], null: none is
  int64_t* matches;   // [N]

  Box<T> box(int64_t j) const { return load_box(boxes + 4 * j); }
  Box<T> anchor(int64_t i) const { return load_box(anchors + 4 * i); }
  bool is_object(int64_t j) const { return crowd == nullptr || !crowd[j]; }
  const int64_t* ignored() const { return crowd == nullptr ? nullptr : matches; }

  // What the crowds hold becomes no candidate.
  void ignore_crowds(const Level<T>& any) const {
    for (int64_t j = 0; crowd != nullptr && j < count; ++j) {
      if (crowd[j]) {
        std::visit([&](const auto& level) { level.ignore_inside(box(j), matches); }, any);
      }
    }
  }

  template <typename Rule>
  void claim(int64_t begin, int64_t end, const std::vector<Level<T>>& levels, int64_t topk,
             std::vector<Claim>& claims) const {
    Candidates<T> candidates;
    for (int64_t j = begin; j < end; ++j) {
      if (!is_object(j)) {
        continue;
      }
      candidates.find(levels, anchors, topk, box(j), T(Rule::kMargin), ignored());
      const T threshold = candidates.threshold();
      for (int64_t i = 0; i < candidates.size; ++i) {
        if (Rule::reaches(candidates.iou[i], threshold) && candidates.holds[i]) {
          claims.push_back({static_cast<int32_t>(j), candidates.anchor[i]});
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

  void give_one_to_each(const std::vector<Level<T>>& levels, int64_t topk) const {
    std::vector<int64_t> owned(count);
    for (int64_t i = 0; i < num_anchors; ++i) {
      if (matches[i] >= 0) {
        ++owned[matches[i]];
      }
    }
    Candidates<T> candidates;
    for (int64_t j = 0; j < count; ++j) {
      if (owned[j] > 0 || !is_object(j)) {
        continue;
      }
      candidates.find(levels, anchors, topk, box(j), T(0), ignored());
      T best = 0;
      int64_t* taken = nullptr;
      for (int64_t i = 0; i < candidates.size; ++i) {
        int64_t& match = matches[candidates.anchor[i]];
        if (candidates.iou[i] > best && (match < 0 || owned[match] > 1)) {
          best = candidates.iou[i];
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
void assign_images(const std::vector<Image<T>>& images, const std::vector<Level<T>>& levels,
                   const AtssOptions& options) {
  const auto num_images = static_cast<int64_t>(images.size());
  const auto num_levels = static_cast<int64_t>(levels.size());
  torch::stable::parallel_for(0, num_images * num_levels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      images[i / num_levels].ignore_crowds(levels[i % num_levels]);
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
      images[task.image].template claim<Rule>(task.begin, task.end, levels, options.topk,
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
        images[b].give_one_to_each(levels, options.topk);
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
    torch::stable::parallel_for(
        0, num_images * num_anchors, kMatchesPerTask,
        [&](int64_t begin, int64_t end) { std::fill(match_data + begin, match_data + end, -1); });
    std::vector<Image<T>> images;
    for (int64_t b = 0; b < num_images; ++b) {
      images.push_back({anchor_data, num_anchors, box_data + 4 * b * max_boxes, counts[b],
                        crowd_data == nullptr ? nullptr : crowd_data + b * max_boxes,
                        match_data + b * num_anchors});
    }
    const std::vector<Level<T>> levels = levels_of(anchor_data, level_sizes);
    dispatch_atss(options, [&](auto rule_tag) {
      assign_images<decltype(rule_tag)>(images, levels, options);
    });
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) { m.impl("assign_atss", TORCH_BOX(&assign_atss_cpu)); }

}  // namespace focalops
