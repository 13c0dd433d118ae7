// Task-aligned assignment on the CPU, in parallel over images and groups of boxes. A box visits the
// tiles of consecutive points whose range it meets, so that of the matrix of anchors and boxes only
// the pairs that can match are ever computed. Boxes claim anchors by maxima, which leave the same
// bits in any order; they are atomic where threads meet in an image.
//
// 16 bytes an anchor and image beside the outputs: the greatest overlap with its box, and the angle
// of the prediction. The claims lie where the matches will.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../checks/assign.h"
#include "assign.h"
#include "ground_truth.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kBoxesATask = 4;  // whose costs differ by their sizes
constexpr int64_t kPiece = 4096;    // anchors
// So many images, whose costs differ too, are parallel enough: then no two threads meet in one.
constexpr int64_t kImagesAThread = 4;

static_assert(sizeof(Claims) == sizeof(int64_t));

// The points of all tiles; those past the end are NaN.
struct Points {
  std::vector<float> x, y;
  Ranges ranges;

  Points(const float* points, int64_t n)
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
  static constexpr int64_t kRoom = 256;

  int64_t size = 0;
  int32_t anchor[kRoom + kTile];
  float box[4 * (kRoom + kTile)], angle[kRoom + kTile];  // of the predictions
  float overlap[kRoom + kTile], power[kRoom + kTile];

  bool is_full() const { return size >= kRoom; }

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

// Which points of a tile lie within the region.
template <typename T>
void find_inside(const T* x, const T* y, const Box<T>& region, T margin, uint8_t* flags) {
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

// The anchors that boxes have, a list for each piece of an image's anchors.
struct Matched {
  int64_t pieces;  // of an image
  std::vector<std::vector<int32_t>> anchors;

  Matched(int64_t num_images, int64_t num_points)
      : pieces((num_points + kPiece - 1) / kPiece), anchors(num_images * pieces) {}

  template <typename F>
  void for_each(int64_t image, const F& f) const {
    for (int64_t piece = image * pieces; piece < (image + 1) * pieces; ++piece) {
      for (const int32_t n : anchors[piece]) {
        f(int64_t{n});
      }
    }
  }
};

// What all images share, and the tensors of all of them.
template <IouKind Kind>
struct Assignment {
  TaskAligned rule;
  int64_t topk, final_topk;
  ClassScores scores;
  Points points;
  int64_t num_points, max_boxes;
  const float* pred_boxes;  // [B, N, 4]
  const float* gt_boxes;    // [B, M, 4]
  const int64_t* labels;    // [B, M]
  const bool* crowd;        // [B, M], null: none is
  std::vector<int64_t> counts;
  std::vector<std::vector<Box<float>>> crowds;  // B, empty where none is
  float* angles;                                // [B, N], zeros where the overlap has none
  uint64_t* best;    // [B, N], overlap and box; then the overlap with the match
  int64_t* matches;  // [B, N], the claims before
  float* targets;    // [B, N], the metric before
  bool threads_share_images;

  Box<float> box(int64_t image, int64_t j) const {
    return load_box(gt_boxes + 4 * (image * max_boxes + j));
  }
  bool is_crowd(int64_t image, int64_t j) const {
    return crowd != nullptr && crowd[image * max_boxes + j];
  }
  bool in_crowd(int64_t image, int64_t n) const {
    return std::any_of(crowds[image].begin(), crowds[image].end(), [&](const Box<float>& box) {
      return is_inside({points.x[n], points.y[n]}, box, 0.0f);
    });
  }
  Claims* claims(int64_t image) const {
    return reinterpret_cast<Claims*>(matches + image * num_points);
  }
  // Atomics wait for all that was stored before: for the lines of other anchors, too.
  template <typename T>
  void raise_to(T* at, T value) const {
    if (threads_share_images) {
      atomic_max(at, value);
    } else {
      *at = std::max(*at, value);
    }
  }

  float overlap(int64_t image, int64_t n, int64_t j) const {
    const int64_t i = image * num_points + n;
    const Box<float> predicted = load_box(pred_boxes + 4 * i), object = box(image, j);
    const float value = task_overlap<Kind>().value(predicted, object, {area(predicted), angles[i]},
                                                   iou_terms<Kind>(object));
    return value > 0 ? value : 0.0f;
  }
  float metric(int64_t image, int64_t n, int64_t j, float overlap) const {
    return rule.metric(scores.at(image, n, labels[image * max_boxes + j]), overlap);
  }

  // The box's best anchors become its claims.
  void claim(int64_t image, int64_t j, const Ranges& ranges) const {
    const Box<float> object = box(image, j), region = rule.region(object);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Box<float> everywhere{-kInfinity, -kInfinity, kInfinity, kInfinity};
    const Box<float>& within = rule.inside_last ? everywhere : region;
    TopK top(topk);
    Candidates candidates;
    ranges.for_each(region, [&](int64_t tile) {
      const int64_t first = tile * kTile, n = std::min(kTile, num_points - first);
      uint8_t flags[kTile];
      find_inside(points.x.data() + first, points.y.data() + first, within, rule.margin, flags);
      const int64_t known = candidates.size;
      candidates.add(first, n, flags);
      for (int64_t c = known; c < candidates.size; ++c) {
        scores.prefetch(image, candidates.anchor[c], labels[image * max_boxes + j]);
      }
      if (candidates.is_full()) {
        offer(image, j, candidates, top);
      }
    });
    offer(image, j, candidates, top);
    const auto box_index = static_cast<uint32_t>(j);
    const Claims mine = Claims::of(box_index, static_cast<uint32_t>(max_boxes));
    for (const uint64_t candidate : top) {
      const int64_t n = index_of(candidate);
      if (rule.inside_last && !is_inside({points.x[n], points.y[n]}, region, rule.margin)) {
        continue;
      }
      Claims& claimed = claims(image)[n];
      raise_to(&claimed.last, mine.last);
      raise_to(&claimed.first, mine.first);
      if (rule.rivals == Rivals::kTakers) {
        raise_to(best + image * num_points + n, ranked(overlap(image, n, j), box_index));
      }
    }
  }

  void offer(int64_t image, int64_t j, Candidates& candidates, TopK& top) const {
    const int64_t label = labels[image * max_boxes + j], first = image * num_points;
    const Box<float> object = box(image, j);
    for (int64_t c = 0; c < candidates.size; ++c) {
      const int64_t i = first + candidates.anchor[c];
      std::copy_n(pred_boxes + 4 * i, 4, candidates.box + 4 * c);
      candidates.angle[c] = angles[i];
    }
    find_overlaps(task_overlap<Kind>(), candidates.box, candidates.angle, candidates.size, object,
                  iou_terms<Kind>(object), candidates.overlap);
    raise(rule.of_overlap, candidates.overlap, candidates.size, candidates.power);
    for (int64_t c = 0; c < candidates.size; ++c) {
      const int64_t n = candidates.anchor[c];
      if (!(candidates.overlap[c] > 0)) {
        continue;
      }
      if (!crowds[image].empty() && in_crowd(image, n)) {
        continue;
      }
      if (rule.rivals == Rivals::kHolders) {
        raise_to(best + image * num_points + n,
                 ranked(candidates.overlap[c], static_cast<uint32_t>(j)));
      }
      const float value = mul(rule.of_score(scores.at(image, n, label)), candidates.power[c]);
      if (value > 0) {
        top.offer(ranked(value, static_cast<uint32_t>(n)));
      }
    }
    candidates.size = 0;
  }

  // Of the claimants of an anchor.
  int64_t winner(int64_t image, int64_t n, const Claims& claimed) const {
    if (claimed.alone(static_cast<uint32_t>(max_boxes))) {
      return claimed.box();
    }
    if (rule.rivals != Rivals::kAll) {
      return index_of(best[image * num_points + n]);
    }
    int64_t winner = 0;
    float most = -1;
    for (int64_t j = 0; j < counts[image]; ++j) {
      const float value = is_crowd(image, j) ? -1 : overlap(image, n, j);
      winner = value > most ? j : winner;
      most = max_of(value, most);
    }
    return winner;
  }

  // The claims of points begin .. end become matches, of which a list is made.
  void resolve(int64_t image, int64_t begin, int64_t end, std::vector<int32_t>& matched) const {
    const bool has_crowds = !crowds[image].empty();
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t last = std::min(first + kTile, end);
      int64_t* of_image = matches + image * num_points;
      if (!has_crowds && are_zero(of_image + first, last - first)) {
        std::fill(of_image + first, of_image + last, -1);
        continue;
      }
      for (int64_t n = first; n < last; ++n) {
        const int64_t i = image * num_points + n;
        const Claims claimed = claims(image)[n];
        if (!claimed.any()) {
          matches[i] = has_crowds && in_crowd(image, n) ? -2 : -1;
          continue;
        }
        const int64_t match = winner(image, n, claimed);
        const bool is_known = index_of(best[i]) == static_cast<uint32_t>(match);
        const float overlap_of_match = is_known ? value_of(best[i]) : overlap(image, n, match);
        matches[i] = match;
        targets[i] = metric(image, n, match, overlap_of_match);
        std::memcpy(best + i, &overlap_of_match, sizeof overlap_of_match);
        matched.push_back(static_cast<int32_t>(n));
      }
    }
  }

  // Of the anchors that a box has it keeps the best.
  void keep_best(int64_t image, const Matched& matched) const {
    std::vector<TopK> top(counts[image], TopK(final_topk));
    int64_t* match = matches + image * num_points;
    matched.for_each(image, [&](int64_t n) {
      top[match[n]].offer(ranked(targets[image * num_points + n], static_cast<uint32_t>(n)));
      match[n] = -1;
    });
    for (int64_t j = 0; j < counts[image]; ++j) {
      for (const uint64_t kept : top[j]) {
        match[index_of(kept)] = j;
      }
    }
  }

  void find_targets(int64_t image, const Matched& matched) const {
    const int64_t* match = matches + image * num_points;
    float* of_anchors = targets + image * num_points;
    std::vector<float> most_metric(counts[image], 0), most_overlap(counts[image], 0);
    matched.for_each(image, [&](int64_t n) {
      if (match[n] >= 0) {
        float value;
        std::memcpy(&value, best + image * num_points + n, sizeof value);
        most_metric[match[n]] = max_of(of_anchors[n], most_metric[match[n]]);
        most_overlap[match[n]] = max_of(value, most_overlap[match[n]]);
      }
    });
    matched.for_each(image, [&](int64_t n) {
      of_anchors[n] =
          match[n] < 0 ? 0.0f
                       : rule.target(of_anchors[n], most_metric[match[n]], most_overlap[match[n]]);
    });
  }
};

template <IouKind Kind>
void run(const Assignment<Kind>& all, int64_t num_images) {
  if (Kind == IouKind::kComplete) {
    parallel_over(1, num_images * all.num_points, kPiece, [&](int64_t, int64_t begin, int64_t end) {
      find_angles<Kind>(all.pred_boxes + 4 * begin, end - begin, all.angles + begin);
    });
  }
  std::vector<Ranges> predictions(all.rule.inside_last ? num_images : 0,
                                  Ranges(all.points.ranges.size()));
  parallel_over(static_cast<int64_t>(predictions.size()), 1, 1,
                [&](int64_t image, int64_t, int64_t) {
                  for (int64_t n = 0; n < all.num_points; ++n) {
                    predictions[image].add(
                        n / kTile, load_box(all.pred_boxes + 4 * (image * all.num_points + n)));
                  }
                });
  const int64_t boxes_a_task =
      all.threads_share_images ? kBoxesATask : std::max(all.max_boxes, kBoxesATask);
  parallel_over(
      num_images, all.max_boxes, boxes_a_task, [&](int64_t image, int64_t begin, int64_t end) {
        const Ranges& ranges = all.rule.inside_last ? predictions[image] : all.points.ranges;
        for (int64_t j = begin; j < std::min(end, all.counts[image]); ++j) {
          if (!all.is_crowd(image, j)) {
            all.claim(image, j, ranges);
          }
        }
      });
  Matched matched(num_images, all.num_points);
  parallel_over(num_images, all.num_points, kPiece, [&](int64_t image, int64_t begin, int64_t end) {
    all.resolve(image, begin, end, matched.anchors[image * matched.pieces + begin / kPiece]);
  });
  parallel_over(num_images, 1, 1, [&](int64_t image, int64_t, int64_t) {
    if (all.final_topk > 0) {
      all.keep_best(image, matched);
    }
    all.find_targets(image, matched);
  });
}

// Looks at the boxes: which are crowds, and whether the others have labels.
template <IouKind Kind>
void find_crowds(Assignment<Kind>& all) {
  for (size_t image = 0; image < all.counts.size(); ++image) {
    for (int64_t j = 0; j < all.counts[image]; ++j) {
      const int64_t label = all.labels[image * all.max_boxes + j];
      if (all.is_crowd(image, j)) {
        all.crowds[image].push_back(all.box(image, j));
      } else if (!all.scores.has(label)) {
        fail("assign_task_aligned: gt_labels must lie in [0, ", all.scores.num_classes - 1,
             "], as pred_scores has classes, got ", label);
      }
    }
  }
}

std::tuple<Tensor, Tensor> assign_task_aligned_cpu(
    const Tensor& pred_scores, const Tensor& pred_boxes_, const Tensor& points_,
    const Tensor& gt_boxes_, const Tensor& gt_labels_, const std::optional<Tensor>& counts,
    const std::optional<Tensor>& crowd_, int64_t topk, double alpha, double beta, int64_t rule,
    int64_t overlap, double min_side, int64_t final_topk, double eps) {
  const TaskAlignedOptions options{topk, alpha, beta, rule, overlap, min_side, final_topk, eps};
  check_assign_task_aligned(pred_scores, pred_boxes_, points_, gt_boxes_, gt_labels_, counts,
                            crowd_, options);
  const Tensor points = torch::stable::contiguous(points_),
               pred_boxes = torch::stable::contiguous(pred_boxes_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               gt_labels = torch::stable::contiguous(gt_labels_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const int64_t num_images = gt_boxes.size(0), num_points = points.size(0);
  Tensor matches = torch::stable::new_zeros(points, {num_images, num_points}, ScalarType::Long);
  Tensor targets = torch::stable::new_zeros(points, {num_images, num_points});
  Tensor best = torch::stable::new_zeros(points, {num_images, num_points}, ScalarType::Long);
  Tensor angles = overlap == static_cast<int64_t>(IouKind::kComplete)
                      ? torch::stable::new_empty(points, {num_images, num_points})
                      : torch::stable::new_zeros(points, {num_images, num_points});
  dispatch_task_overlap(overlap, [&](auto kind) {
    Assignment<decltype(kind)::value> all{
        options.formula(),
        topk,
        final_topk,
        ClassScores(pred_scores),
        Points(static_cast<const float*>(points.const_data_ptr()), num_points),
        num_points,
        gt_boxes.size(1),
        static_cast<const float*>(pred_boxes.const_data_ptr()),
        static_cast<const float*>(gt_boxes.const_data_ptr()),
        static_cast<const int64_t*>(gt_labels.const_data_ptr()),
        data_of<bool>(crowd),
        read_counts("assign_task_aligned", gt_boxes, counts),
        std::vector<std::vector<Box<float>>>(num_images),
        data_of<float>(angles),
        reinterpret_cast<uint64_t*>(data_of<int64_t>(best)),
        data_of<int64_t>(matches),
        data_of<float>(targets),
        num_images < kImagesAThread * torch::stable::get_num_threads()};
    find_crowds(all);
    run(all, num_images);
  });
  return {matches, targets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("assign_task_aligned", TORCH_BOX(&assign_task_aligned_cpu));
}

}  // namespace focalops
