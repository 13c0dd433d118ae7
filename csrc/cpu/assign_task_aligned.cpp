// Task-aligned assignment on the CPU, in parallel over images and groups of boxes. A box looks up
// the points inside of it where they are grids, and else visits the tiles of consecutive points
// whose range it meets, so that of the matrix of anchors and boxes only the pairs that can match
// are ever computed. Boxes claim anchors by maxima, which leave the same bits in any order; they
// are atomic where threads meet in an image.
//
// 12 bytes an anchor beside the outputs, of the images that are in work: the greatest overlap with
// its box, and among many boxes the angle of the prediction. The claims lie where the matches will.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../checks/assign.h"
#include "assign.h"
#include "ground_truth.h"
#include "point_grid.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kFewBoxes = 32;   // hold fewer predictions, all in all, than there are
constexpr int64_t kBoxesATask = 4;  // whose costs differ by their sizes
constexpr int64_t kPiece = 4096;    // anchors
// So many images, whose costs differ too, are parallel enough: then no two threads meet in one, and
// what a thread wrote of it stays in its caches.
constexpr int64_t kImagesAThread = 4;

static_assert(sizeof(Claims) == sizeof(int64_t));

// Tiles of the points; those past the end are NaN.
struct Tiles {
  std::vector<float> x, y;
  Ranges ranges;

  Tiles(const float* points, int64_t n)
      : x(tiles_of(n) * kTile, std::numeric_limits<float>::quiet_NaN()), y(x), ranges(tiles_of(n)) {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = points[2 * i];
      y[i] = points[2 * i + 1];
      ranges.add(i / kTile, {x[i], y[i], x[i], y[i]});
    }
  }

  static int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
};

template <IouKind Kind, typename T>
FOCALOPS_SIMD void find_angles(const T* boxes, int64_t n, T* angles) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    angles[i] = iou_terms<Kind>(load_box(boxes + 4 * i)).angle;
  }
}

// Anchors that a box may take, as many as are looked at together, packed for the vectors: their
// scores, which lie apart, are fetched meanwhile.
struct Candidates {
  static constexpr int64_t kRoom = 256, kMostAdded = 32;

  int64_t size = 0;
  int32_t anchor[kRoom + kMostAdded];
  float box[4 * (kRoom + kMostAdded)], angle[kRoom + kMostAdded];  // of the predictions
  float overlap[kRoom + kMostAdded], power[kRoom + kMostAdded];

  bool is_full() const { return size >= kRoom; }

  void add(int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      anchor[size + i] = static_cast<int32_t>(first + i);
    }
    size += n;
  }

  // Without branches, of which half would be foretold wrongly.
  void add(int64_t first, int64_t n, const uint8_t* flags) {
    int64_t end = size;
    for (int64_t i = 0; i < n; ++i) {
      anchor[end] = static_cast<int32_t>(first + i);
      end += flags[i];
    }
    size = end;
  }
};

static_assert(kTile <= Candidates::kMostAdded);

// Which points of a tile lie within the region.
template <typename T>
void find_inside_tile(const T* x, const T* y, const Box<T>& region, T margin, uint8_t* flags) {
  for (int64_t i = 0; i < kTile; ++i) {
    flags[i] = is_inside({x[i], y[i]}, region, margin);
  }
}

template <typename Formula, typename T>
FOCALOPS_SIMD void find_overlaps(const Formula& formula, const T* boxes, const T* angles, int64_t n,
                                 const Box<T>& box, const IouTerms<T>& terms, T* overlaps) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> predicted = load_box(boxes + 4 * i);
    const T value = formula.value(predicted, box, {area(predicted), angles[i]}, terms);
    overlaps[i] = value > 0 ? value : T(0);
  }
}

template <typename T>
FOCALOPS_SIMD void raise(const Power& power, const T* values, int64_t n, T* powers) {
  power.raise(values, n, powers);
}

FOCALOPS_SIMD bool are_zero(const int64_t* words, int64_t n) {
  int64_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    any |= words[i];
  }
  return any == 0;
}

// What all images share.
struct Assignment {
  TaskAligned rule;
  int64_t topk, final_topk;
  ClassScores scores;
  const float* points;  // [N, 2]
  int64_t num_points, max_boxes;
  std::vector<PointGrid> grids;  // none where the points are no grids
  Tiles tiles;                   // none where they are not needed
  bool threads_share_images;

  // Then the angle of a prediction is found for each that is inside of a box, else for all.
  bool has_few_boxes() const { return max_boxes < kFewBoxes; }
  Point<float> point(int64_t n) const { return {points[2 * n], points[2 * n + 1]}; }
};

// The predictions and the boxes of an image, and what becomes of its anchors.
template <IouKind Kind>
struct Image {
  const Assignment& all;
  int64_t index;
  const float* pred_boxes;  // [N, 4]
  const float* gt_boxes;    // [M, 4]
  const int64_t* labels;    // [M]
  const bool* crowd;        // [M], null: none is
  int64_t count;
  int64_t* matches;  // [N], the claims before
  float* targets;    // [N], the metric before
  std::vector<Box<float>> crowds = {};
  float* angles = nullptr;   // [N], unless there are few boxes
  uint64_t* best = nullptr;  // [N], overlap and box; then the overlap with the match
  std::vector<std::vector<int32_t>> matched = {};  // the anchors that boxes have, of each piece

  Box<float> box(int64_t j) const { return load_box(gt_boxes + 4 * j); }
  Box<float> prediction(int64_t n) const { return load_box(pred_boxes + 4 * n); }
  bool is_crowd(int64_t j) const { return crowd != nullptr && crowd[j]; }
  bool in_crowd(int64_t n) const {
    return std::any_of(crowds.begin(), crowds.end(),
                       [&](const Box<float>& box) { return is_inside(all.point(n), box, 0.0f); });
  }
  Claims* claims() const { return reinterpret_cast<Claims*>(matches); }
  // Atomics wait for all that was stored before: for the lines of other anchors, too.
  template <typename T>
  void raise_to(T* at, T value) const {
    if (all.threads_share_images) {
      atomic_max(at, value);
    } else {
      *at = std::max(*at, value);
    }
  }

  float overlap(int64_t n, int64_t j) const {
    const Box<float> predicted = prediction(n), object = box(j);
    const float value = task_overlap<Kind>().value(predicted, object, iou_terms<Kind>(predicted),
                                                   iou_terms<Kind>(object));
    return value > 0 ? value : 0.0f;
  }
  float metric(int64_t n, int64_t j, float overlap) const {
    return all.rule.metric(all.scores.at(index, n, labels[j]), overlap);
  }

  void prepare(int64_t begin, int64_t end) const {
    std::fill(matches + begin, matches + end, 0);
    std::fill(targets + begin, targets + end, 0.0f);
    if (!all.has_few_boxes()) {
      find_angles<Kind>(pred_boxes + 4 * begin, end - begin, angles + begin);
    }
  }

  Ranges ranges_of_predictions() const {
    Ranges ranges(all.tiles.ranges.size());
    for (int64_t n = 0; n < all.num_points; ++n) {
      ranges.add(n / kTile, prediction(n));
    }
    return ranges;
  }

  // The box's best anchors become its claims. The ranges are of tiles, null where none are needed.
  void claim(int64_t j, const Ranges* ranges) const {
    const Box<float> region = all.rule.region(box(j));
    TopK top(all.topk);
    Candidates candidates;
    const auto add = [&](int64_t first, int64_t n, const auto&... flags) {
      const int64_t known = candidates.size;
      candidates.add(first, n, flags...);
      for (int64_t c = known; c < candidates.size; ++c) {
        all.scores.prefetch(index, candidates.anchor[c], labels[j]);
      }
      if (candidates.is_full()) {
        offer(j, candidates, top);
      }
    };
    if (ranges == nullptr) {
      for (const PointGrid& grid : all.grids) {
        grid.for_each_inside(region, all.rule.margin, [&](int64_t first, int64_t n) {
          for (; n > 0; first += Candidates::kMostAdded, n -= Candidates::kMostAdded) {
            add(first, std::min(n, Candidates::kMostAdded));
          }
        });
      }
    } else {
      ranges->for_each(region, [&](int64_t tile) {
        const int64_t first = tile * kTile, n = std::min(kTile, all.num_points - first);
        if (all.rule.inside_last) {
          return add(first, n);
        }
        uint8_t flags[kTile];
        find_inside_tile(all.tiles.x.data() + first, all.tiles.y.data() + first, region,
                         all.rule.margin, flags);
        add(first, n, flags);
      });
    }
    offer(j, candidates, top);
    const auto box_index = static_cast<uint32_t>(j);
    const Claims mine = Claims::of(box_index, static_cast<uint32_t>(all.max_boxes));
    for (const uint64_t candidate : top) {
      const int64_t n = index_of(candidate);
      if (all.rule.inside_last && !is_inside(all.point(n), region, all.rule.margin)) {
        continue;
      }
      Claims& claimed = claims()[n];
      raise_to(&claimed.last, mine.last);
      raise_to(&claimed.first, mine.first);
      if (all.rule.rivals == Rivals::kTakers) {
        raise_to(best + n, ranked(overlap(n, j), box_index));
      }
    }
  }

  void offer(int64_t j, Candidates& candidates, TopK& top) const {
    const Box<float> object = box(j);
    for (int64_t c = 0; c < candidates.size; ++c) {
      const int64_t n = candidates.anchor[c];
      std::copy_n(pred_boxes + 4 * n, 4, candidates.box + 4 * c);
    }
    if (all.has_few_boxes()) {
      find_angles<Kind>(candidates.box, candidates.size, candidates.angle);
    } else {
      for (int64_t c = 0; c < candidates.size; ++c) {
        candidates.angle[c] = angles[candidates.anchor[c]];
      }
    }
    find_overlaps(task_overlap<Kind>(), candidates.box, candidates.angle, candidates.size, object,
                  iou_terms<Kind>(object), candidates.overlap);
    raise(all.rule.of_overlap, candidates.overlap, candidates.size, candidates.power);
    for (int64_t c = 0; c < candidates.size; ++c) {
      const int64_t n = candidates.anchor[c];
      if (!(candidates.overlap[c] > 0)) {
        continue;
      }
      if (!crowds.empty() && in_crowd(n)) {
        continue;
      }
      if (all.rule.rivals == Rivals::kHolders) {
        raise_to(best + n, ranked(candidates.overlap[c], static_cast<uint32_t>(j)));
      }
      const float score = all.scores.at(index, n, labels[j]);
      const float value = mul(all.rule.of_score(score), candidates.power[c]);
      if (value > 0) {
        top.offer(ranked(value, static_cast<uint32_t>(n)));
      }
    }
    candidates.size = 0;
  }

  // Of the claimants of an anchor.
  int64_t winner(int64_t n, const Claims& claimed) const {
    if (claimed.alone(static_cast<uint32_t>(all.max_boxes))) {
      return claimed.box();
    }
    if (all.rule.rivals != Rivals::kAll) {
      return index_of(best[n]);
    }
    int64_t winner = 0;
    float most = -1;
    for (int64_t j = 0; j < count; ++j) {
      const float value = is_crowd(j) ? -1 : overlap(n, j);
      winner = value > most ? j : winner;
      most = max_of(value, most);
    }
    return winner;
  }

  template <typename F>
  void for_each_matched(const F& f) const {
    for (const std::vector<int32_t>& of_piece : matched) {
      for (const int32_t n : of_piece) {
        f(int64_t{n});
      }
    }
  }

  // The claims of points begin .. end become matches, of which a list is made.
  void resolve(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t last = std::min(first + kTile, end);
      if (crowds.empty() && are_zero(matches + first, last - first)) {
        std::fill(matches + first, matches + last, -1);
        continue;
      }
      for (int64_t n = first; n < last; ++n) {
        const Claims claimed = claims()[n];
        if (!claimed.any()) {
          matches[n] = !crowds.empty() && in_crowd(n) ? -2 : -1;
          continue;
        }
        const int64_t match = winner(n, claimed);
        const bool is_known = index_of(best[n]) == static_cast<uint32_t>(match);
        const float overlap_of_match = is_known ? value_of(best[n]) : overlap(n, match);
        matches[n] = match;
        targets[n] = metric(n, match, overlap_of_match);
        std::memcpy(best + n, &overlap_of_match, sizeof overlap_of_match);
        matched[begin / kPiece].push_back(static_cast<int32_t>(n));
      }
    }
  }

  // Of the anchors that a box has it keeps the best.
  void keep_best() const {
    std::vector<TopK> top(count, TopK(all.final_topk));
    for_each_matched([&](int64_t n) {
      top[matches[n]].offer(ranked(targets[n], static_cast<uint32_t>(n)));
      matches[n] = -1;
    });
    for (int64_t j = 0; j < count; ++j) {
      for (const uint64_t kept : top[j]) {
        matches[index_of(kept)] = j;
      }
    }
  }

  void find_targets() const {
    std::vector<float> most_metric(count, 0), most_overlap(count, 0);
    for_each_matched([&](int64_t n) {
      if (const int64_t j = matches[n]; j >= 0) {
        float value;
        std::memcpy(&value, best + n, sizeof value);
        most_metric[j] = max_of(targets[n], most_metric[j]);
        most_overlap[j] = max_of(value, most_overlap[j]);
      }
    });
    for_each_matched([&](int64_t n) {
      const int64_t j = matches[n];
      targets[n] = j < 0 ? 0.0f : all.rule.target(targets[n], most_metric[j], most_overlap[j]);
    });
  }
};

template <IouKind Kind>
void assign(const Assignment& all, Image<Kind>* images, int64_t num_images) {
  const int64_t num_points = all.num_points;
  std::vector<uint64_t> best(num_images * num_points);
  std::vector<float> angles(all.has_few_boxes() ? 0 : num_images * num_points);
  for (int64_t i = 0; i < num_images; ++i) {
    images[i].best = best.data() + i * num_points;
    images[i].angles = all.has_few_boxes() ? nullptr : angles.data() + i * num_points;
    images[i].matched.resize((num_points + kPiece - 1) / kPiece);
  }
  parallel_over(num_images, num_points, kPiece,
                [&](int64_t i, int64_t begin, int64_t end) { images[i].prepare(begin, end); });
  std::vector<Ranges> predictions(all.rule.inside_last ? num_images : 0, Ranges(0));
  parallel_over(static_cast<int64_t>(predictions.size()), 1, 1, [&](int64_t i, int64_t, int64_t) {
    predictions[i] = images[i].ranges_of_predictions();
  });
  parallel_over(num_images, all.max_boxes, kBoxesATask, [&](int64_t i, int64_t begin, int64_t end) {
    const Ranges* ranges = all.rule.inside_last ? &predictions[i]
                           : all.grids.empty()  ? &all.tiles.ranges
                                                : nullptr;
    for (int64_t j = begin; j < std::min(end, images[i].count); ++j) {
      if (!images[i].is_crowd(j)) {
        images[i].claim(j, ranges);
      }
    }
  });
  parallel_over(num_images, num_points, kPiece,
                [&](int64_t i, int64_t begin, int64_t end) { images[i].resolve(begin, end); });
  parallel_over(num_images, 1, 1, [&](int64_t i, int64_t, int64_t) {
    if (all.final_topk > 0) {
      images[i].keep_best();
    }
    images[i].find_targets();
  });
}

// Looks at the boxes: which are crowds, and whether the others have labels.
template <IouKind Kind>
void find_crowds(Image<Kind>& image) {
  const ClassScores& scores = image.all.scores;
  for (int64_t j = 0; j < image.count; ++j) {
    if (image.is_crowd(j)) {
      image.crowds.push_back(image.box(j));
    } else if (!scores.has(image.labels[j])) {
      fail("assign_task_aligned: gt_labels must lie in [0, ", scores.num_classes - 1,
           "], as pred_scores has classes, got ", image.labels[j]);
    }
  }
}

std::tuple<Tensor, Tensor> assign_task_aligned_cpu(
    const Tensor& pred_scores, const Tensor& pred_boxes_, const Tensor& points_,
    const Tensor& gt_boxes_, const Tensor& gt_labels_, const std::optional<Tensor>& counts_,
    const std::optional<Tensor>& crowd_, int64_t topk, double alpha, double beta, int64_t rule,
    int64_t overlap, double min_side, int64_t final_topk, double eps) {
  const TaskAlignedOptions options{topk, alpha, beta, rule, overlap, min_side, final_topk, eps};
  check_assign_task_aligned(pred_scores, pred_boxes_, points_, gt_boxes_, gt_labels_, counts_,
                            crowd_, options);
  const Tensor points = torch::stable::contiguous(points_),
               pred_boxes = torch::stable::contiguous(pred_boxes_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               gt_labels = torch::stable::contiguous(gt_labels_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const std::vector<int64_t> counts = read_counts("assign_task_aligned", gt_boxes, counts_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_points = points.size(0);
  Tensor matches = torch::stable::new_empty(points, {num_images, num_points}, ScalarType::Long);
  Tensor targets = torch::stable::new_empty(points, {num_images, num_points});
  const TaskAligned formula = options.formula();
  const auto* point_data = static_cast<const float*>(points.const_data_ptr());
  std::vector<PointGrid> grids;
  if (!formula.inside_last) {
    grids = grids_of(point_data, num_points);
  }
  const int64_t num_tiled = grids.empty() ? num_points : 0;
  const Assignment all{formula,
                       topk,
                       final_topk,
                       ClassScores(pred_scores),
                       point_data,
                       num_points,
                       max_boxes,
                       std::move(grids),
                       Tiles(point_data, num_tiled),
                       num_images < kImagesAThread * torch::stable::get_num_threads()};
  dispatch_task_overlap(overlap, [&](auto kind) {
    const auto* predictions = static_cast<const float*>(pred_boxes.const_data_ptr());
    const auto* boxes = static_cast<const float*>(gt_boxes.const_data_ptr());
    const auto* labels = static_cast<const int64_t*>(gt_labels.const_data_ptr());
    const bool* flags = data_of<bool>(crowd);
    std::vector<Image<decltype(kind)::value>> images;
    for (int64_t i = 0; i < num_images; ++i) {
      const int64_t anchor = i * num_points, box = i * max_boxes;
      images.push_back({all, i, predictions + 4 * anchor, boxes + 4 * box, labels + box,
                        flags == nullptr ? nullptr : flags + box, counts[i],
                        data_of<int64_t>(matches) + anchor, data_of<float>(targets) + anchor});
      find_crowds(images.back());
    }
    if (all.threads_share_images) {
      assign(all, images.data(), num_images);
    } else {
      parallel_over(num_images, 1, 1, [&](int64_t image, int64_t, int64_t) {
        assign(all, images.data() + image, 1);
      });
    }
  });
  return {matches, targets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("assign_task_aligned", TORCH_BOX(&assign_task_aligned_cpu));
}

}  // namespace focalops
