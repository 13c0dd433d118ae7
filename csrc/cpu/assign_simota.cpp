// SimOTA on the CPU, in parallel over images, points and groups of boxes. The classes' part of the
// costs is summed once an anchor; a box then visits the tiles of consecutive points whose points or
// predictions it meets, so that of the matrix of anchors and boxes only the pairs that can matter
// are computed. All are where these do not suffice.
//
// A byte an anchor and image beside the outputs, the ranges of the tiles. The claims lie where the
// matches will, the sums of the classes where the overlaps will.
#include <algorithm>
#include <limits>

#include "../checks/assign.h"
#include "assign.h"
#include "ground_truth.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kBoxesATask = 4;      // whose costs differ by their sizes
constexpr int64_t kPiece = 64 * kTile;  // points
constexpr int64_t kSums = 16;           // of the classes of an anchor, in one vector

static_assert(sizeof(Claims) == sizeof(int64_t));

// n is a multiple of kSums.
template <typename Rule, typename T>
FOCALOPS_SIMD T cost_of_negatives(const T* logits, int64_t n, T quality) {
  alignas(64) T sums[kSums] = {};
  for (int64_t first = 0; first < n;) {
    alignas(64) T factors[kSums];
    std::fill_n(factors, kSums, T(1));
    const int64_t end = std::min(first + kSums * Rule::kFactors, n);
    for (; first < end; first += kSums) {
      FOCALOPS_INDEPENDENT
      for (int64_t i = 0; i < kSums; ++i) {
        const auto negative = Rule::negative(logits[first + i], quality);
        factors[i] *= negative.factor;
        sums[i] += negative.sum;
      }
    }
    FOCALOPS_INDEPENDENT
    for (int64_t i = 0; i < kSums; ++i) {
      sums[i] = Rule::cost_of({factors[i], sums[i]});
    }
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

// The points of all tiles, those past the end NaN, and the tiles' ranges and greatest strides.
struct Tiles {
  std::vector<float> x, y, stride;
  std::vector<float> x1, y1, x2, y2, greatest;

  Tiles(const float* points, const float* strides, int64_t n)
      : x(tiles_of(n) * kTile, std::numeric_limits<float>::quiet_NaN()),
        y(x),
        stride(x),
        x1(tiles_of(n), std::numeric_limits<float>::infinity()),
        y1(x1),
        x2(tiles_of(n), -std::numeric_limits<float>::infinity()),
        y2(x2),
        greatest(tiles_of(n), 0) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t tile = i / kTile;
      x[i] = points[2 * i];
      y[i] = points[2 * i + 1];
      stride[i] = strides[i];
      x1[tile] = min_of(x[i], x1[tile]);
      y1[tile] = min_of(y[i], y1[tile]);
      x2[tile] = max_of(x[i], x2[tile]);
      y2[tile] = max_of(y[i], y2[tile]);
      greatest[tile] = max_of(stride[i], greatest[tile]);
    }
  }

  int64_t size() const { return static_cast<int64_t>(x1.size()); }
  static int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
};

// Whether the box may admit, or own, points of n tiles.
template <bool kOwns, typename Rule, typename T>
FOCALOPS_SIMD bool find_tiles(const Rule& rule, const T* x1, const T* y1, const T* x2, const T* y2,
                              const T* strides, const SimotaBox& object, int64_t n,
                              uint8_t* found) {
  uint8_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Box<T> range{x1[i], y1[i], x2[i], y2[i]};
    found[i] =
        kOwns ? rule.may_own(range, strides[i], object) : rule.may_admit(range, strides[i], object);
    any |= found[i];
  }
  return any != 0;
}

template <typename Rule, typename T>
FOCALOPS_SIMD void admit_points(const Rule& rule, const T* x, const T* y, const T* strides,
                                const SimotaBox& object, T* admitted) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    admitted[i] = rule.admits({x[i], y[i]}, strides[i], object) ? T(1) : admitted[i];
  }
}

// The overlaps of the predictions of n <= kTile points with a box; negative where they take no
// part.
template <typename T>
FOCALOPS_SIMD void overlap_tile(const T* boxes, const T* bases, int64_t n, const SimotaBox& object,
                                T* overlaps) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const T overlap = simota_overlap(load_box(boxes + 4 * i), object);
    overlaps[i] = bases[i] < 0 ? T(-1) : overlap;
  }
}

template <typename Rule, typename T>
FOCALOPS_SIMD void own_tile(const Rule& rule, const T* x, const T* y, const T* strides, int64_t n,
                            const SimotaBox& object, uint8_t* is_own) {
  for (int64_t i = 0; i < n; ++i) {
    is_own[i] = rule.owns({x[i], y[i]}, strides[i], object);
  }
}

// Pairs of a box and anchors, as many as are looked at together: their logits, which lie apart, are
// fetched meanwhile.
struct Pairs {
  static constexpr int64_t kRoom = 256;

  int64_t size = 0;
  int32_t anchor[kRoom + kTile];
  float overlap[kRoom + kTile], base[kRoom + kTile], logit[kRoom + kTile], quality[kRoom + kTile];
  float x[kRoom + kTile], y[kRoom + kTile], stride[kRoom + kTile], cost[kRoom + kTile];
  uint8_t is_own[kRoom + kTile];

  bool is_full() const { return size >= kRoom; }
};

template <typename Rule, typename T>
FOCALOPS_SIMD void find_costs(const Rule& rule, const SimotaBox& object, const T* bases,
                              const T* logits, const T* qualities, const T* overlaps, const T* x,
                              const T* y, const T* strides, const uint8_t* is_own, int64_t n,
                              T* costs) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    costs[i] = rule.cost({bases[i], logits[i], qualities[i]}, overlaps[i],
                         rule.place({x[i], y[i]}, strides[i], object, is_own[i] != 0));
  }
}

// What all images share, and the tensors of all of them.
template <typename Rule>
struct Assignment {
  Rule rule;
  int64_t candidates;
  ClassScores logits, objectness;
  Tiles tiles;
  int64_t num_points, max_boxes;
  const float* pred_boxes;  // [B, N, 4]
  const int64_t* labels;    // [B, M]
  std::vector<int64_t> counts;
  std::vector<SimotaBox> objects;               // B x M
  std::vector<std::vector<Box<float>>> crowds;  // B, empty where none is
  std::vector<Ranges> predictions;              // B, of the anchors that take part
  int64_t* matches;                             // [B, N], the claims before
  float* ious;                                  // [B, N], the sums of the classes before

  const SimotaBox& object(int64_t image, int64_t j) const { return objects[image * max_boxes + j]; }
  Point<float> point(int64_t n) const { return {tiles.x[n], tiles.y[n]}; }
  Box<float> predicted(int64_t image, int64_t n) const {
    return load_box(pred_boxes + 4 * (image * num_points + n));
  }
  Claims* claims(int64_t image) const {
    return reinterpret_cast<Claims*>(matches + image * num_points);
  }
  float quality(int64_t image, int64_t n) const {
    return objectness.data == nullptr ? -1.0f : sigmoid_of(objectness.at(image, n, 0));
  }

  // Calls f with those of tiles begin .. end that hold points which the box may admit, or own.
  template <bool kOwns, typename F>
  void for_tiles(const SimotaBox& box, int64_t begin, int64_t end, const F& f) const {
    constexpr int64_t kStep = 64;
    alignas(64) uint8_t found[kStep];
    for (; begin < end; begin += kStep) {
      const int64_t n = std::min(kStep, end - begin);
      if (find_tiles<kOwns>(rule, tiles.x1.data() + begin, tiles.y1.data() + begin,
                            tiles.x2.data() + begin, tiles.y2.data() + begin,
                            tiles.greatest.data() + begin, box, n, found)) {
        for (int64_t i = 0; i < n; ++i) {
          if (found[i]) {
            f(begin + i);
          }
        }
      }
    }
  }

  // Finds which points begin .. end take part, and sums their classes.
  void weigh(int64_t image, int64_t begin, int64_t end) {
    const int64_t first = image * num_points;
    const int64_t first_tile = begin / kTile, end_tile = Tiles::tiles_of(end);
    std::vector<float> admitted((end_tile - first_tile) * kTile, 0);
    for (int64_t j = 0; j < counts[image]; ++j) {
      for_tiles<false>(object(image, j), first_tile, end_tile, [&](int64_t tile) {
        const int64_t n = tile * kTile;
        admit_points(rule, tiles.x.data() + n, tiles.y.data() + n, tiles.stride.data() + n,
                     object(image, j), admitted.data() + (n - begin));
      });
    }
    const int64_t padded = (logits.num_classes + kSums - 1) / kSums * kSums;
    std::vector<float> row(padded, -std::numeric_limits<float>::infinity());  // of no class
    for (int64_t n = begin; n < end; ++n) {
      if (std::any_of(crowds[image].begin(), crowds[image].end(),
                      [&](const Box<float>& crowd) { return is_inside(point(n), crowd, 0.0f); })) {
        ious[first + n] = kInCrowd;
      } else if (admitted[n - begin] == 0) {
        ious[first + n] = kOutside;
      } else {
        logits.read(image, n, row.data());
        ious[first + n] = cost_of_negatives<Rule>(row.data(), padded, quality(image, n));
        predictions[image].add(n / kTile, predicted(image, n));
      }
    }
  }

  // The box's cheapest anchors become its claims.
  void claim(int64_t image, int64_t j) const {
    const SimotaBox& box = object(image, j);
    const int64_t k = number(image, box);
    TopK cheapest(k);
    Pairs pairs;
    for (int lot = Rule::kFirstLot; lot < Rule::kLots; ++lot) {
      const auto of_tile = [&](int64_t tile) {
        add(image, j, tile, lot, pairs);
        if (pairs.is_full()) {
          offer(image, j, pairs, cheapest);
        }
      };
      if (lot == 0) {
        for_tiles<true>(box, 0, tiles.size(), of_tile);
      } else if (lot == 1) {
        predictions[image].for_each(box.box, of_tile);
      } else {
        for (int64_t tile = 0; tile < tiles.size(); ++tile) {
          of_tile(tile);
        }
      }
      offer(image, j, pairs, cheapest);
      if (cheapest.is_full() && cost_of(cheapest.last()) < Rule::floor(lot)) {
        break;
      }
    }
    const Claims mine = Claims::of(static_cast<uint32_t>(j), static_cast<uint32_t>(max_boxes));
    for (const uint64_t candidate : cheapest) {
      Claims& claimed = claims(image)[index_of(candidate)];
      atomic_max(&claimed.last, mine.last);
      atomic_max(&claimed.first, mine.first);
    }
  }

  // How many anchors the box takes.
  int64_t number(int64_t image, const SimotaBox& box) const {
    TopK most(candidates);
    predictions[image].for_each(box.box, [&](int64_t tile) {
      const int64_t first = tile * kTile, n = std::min(kTile, num_points - first);
      const int64_t i = image * num_points + first;
      alignas(64) float overlaps[kTile];
      overlap_tile(pred_boxes + 4 * i, ious + i, n, box, overlaps);
      for (int64_t m = 0; m < n; ++m) {
        if (overlaps[m] > 0) {
          most.offer(ranked(overlaps[m], static_cast<uint32_t>(first + m)));
        }
      }
    });
    float sum = 0;
    for (const uint64_t overlap : most) {
      sum += value_of(overlap);
    }
    return Rule::number(sum, static_cast<int>(candidates));
  }

  // Those of a tile that are of the lot.
  void add(int64_t image, int64_t j, int64_t tile, int lot, Pairs& pairs) const {
    const int64_t first = tile * kTile, n = std::min(kTile, num_points - first);
    const int64_t i = image * num_points + first;
    const SimotaBox& box = object(image, j);
    alignas(64) float overlaps[kTile];
    alignas(64) uint8_t is_own[kTile];
    overlap_tile(pred_boxes + 4 * i, ious + i, n, box, overlaps);
    own_tile(rule, tiles.x.data() + first, tiles.y.data() + first, tiles.stride.data() + first, n,
             box, is_own);
    for (int64_t m = 0; m < n; ++m) {
      if (overlaps[m] >= 0 && Rule::lot(is_own[m] != 0, overlaps[m]) == lot) {
        const int64_t at = pairs.size++;
        pairs.anchor[at] = static_cast<int32_t>(first + m);
        pairs.overlap[at] = overlaps[m];
        pairs.is_own[at] = is_own[m];
        logits.prefetch(image, first + m, labels[image * max_boxes + j]);
      }
    }
  }

  void offer(int64_t image, int64_t j, Pairs& pairs, TopK& cheapest) const {
    const int64_t label = labels[image * max_boxes + j];
    for (int64_t at = 0; at < pairs.size; ++at) {
      const int64_t n = pairs.anchor[at];
      pairs.base[at] = ious[image * num_points + n];
      pairs.logit[at] = logits.at(image, n, label);
      pairs.quality[at] = quality(image, n);
      pairs.x[at] = tiles.x[n];
      pairs.y[at] = tiles.y[n];
      pairs.stride[at] = tiles.stride[n];
    }
    find_costs(rule, object(image, j), pairs.base, pairs.logit, pairs.quality, pairs.overlap,
               pairs.x, pairs.y, pairs.stride, pairs.is_own, pairs.size, pairs.cost);
    for (int64_t at = 0; at < pairs.size; ++at) {
      if (pairs.cost[at] == pairs.cost[at]) {
        cheapest.offer(by_cost(pairs.cost[at], static_cast<uint32_t>(pairs.anchor[at])));
      }
    }
    pairs.size = 0;
  }

  // The box to which an anchor that several claim is cheapest, of equal ones the first.
  int64_t winner(int64_t image, int64_t n) const {
    const int64_t i = image * num_points + n;
    const Box<float> prediction = predicted(image, n);
    const float of_object = quality(image, n);
    uint64_t best = 0;
    for (int lot = Rule::kFirstLot; lot < Rule::kLots; ++lot) {
      for (int64_t j = 0; j < counts[image]; ++j) {
        const SimotaBox& box = object(image, j);
        const bool is_own = rule.owns(point(n), tiles.stride[n], box);
        if (lot == 0 && !is_own) {
          continue;
        }
        const float overlap = simota_overlap(prediction, box);
        if (overlap >= 0 && Rule::lot(is_own, overlap) == lot) {
          const float cost =
              rule.cost({ious[i], logits.at(image, n, labels[image * max_boxes + j]), of_object},
                        overlap, rule.place(point(n), tiles.stride[n], box, is_own));
          best = cost == cost ? std::max(best, by_cost(cost, static_cast<uint32_t>(j))) : best;
        }
      }
      if (best != 0 && cost_of(best) < Rule::floor(lot)) {
        break;
      }
    }
    return index_of(best);
  }

  void resolve(int64_t image, int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = image * num_points + n;
      const Claims claimed = claims(image)[n];
      if (!claimed.any()) {
        matches[i] = ious[i] == kInCrowd ? -2 : -1;
        ious[i] = 0;
        continue;
      }
      matches[i] = claimed.alone(static_cast<uint32_t>(max_boxes)) ? int64_t{claimed.box()}
                                                                   : winner(image, n);
      ious[i] = simota_overlap(predicted(image, n), object(image, matches[i]));
    }
  }
};

template <typename Rule>
void run(Assignment<Rule>& all, int64_t num_images) {
  parallel_over(num_images, all.num_points, kPiece,
                [&](int64_t image, int64_t begin, int64_t end) { all.weigh(image, begin, end); });
  parallel_over(num_images, all.max_boxes, kBoxesATask,
                [&](int64_t image, int64_t begin, int64_t end) {
                  for (int64_t j = begin; j < std::min(end, all.counts[image]); ++j) {
                    if (all.object(image, j).area == all.object(image, j).area) {
                      all.claim(image, j);
                    }
                  }
                });
  parallel_over(num_images, all.num_points, kPiece,
                [&](int64_t image, int64_t begin, int64_t end) { all.resolve(image, begin, end); });
}

// Looks at the boxes: which are crowds, and whether the others have labels.
template <typename Rule>
void find_objects(Assignment<Rule>& all, const float* gt_boxes, const bool* crowd) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (size_t image = 0; image < all.counts.size(); ++image) {
    for (int64_t j = 0; j < all.counts[image]; ++j) {
      const int64_t i = image * all.max_boxes + j;
      const Box<float> box = load_box(gt_boxes + 4 * i);
      const bool is_crowd = crowd != nullptr && crowd[i];
      if (is_crowd) {
        all.crowds[image].push_back(box);
      } else if (!all.logits.has(all.labels[i])) {
        fail("assign_simota: gt_labels must lie in [0, ", all.logits.num_classes - 1,
             "], as cls_logits has classes, got ", all.labels[i]);
      }
      all.objects[i] = simota_box(is_crowd ? Box<float>{nan, nan, nan, nan} : box);
    }
  }
}

std::tuple<Tensor, Tensor> assign_simota_cpu(const Tensor& cls_logits, const Tensor& pred_boxes_,
                                             const Tensor& points_, const Tensor& strides_,
                                             const Tensor& gt_boxes_, const Tensor& gt_labels_,
                                             const std::optional<Tensor>& objectness,
                                             const std::optional<Tensor>& counts,
                                             const std::optional<Tensor>& crowd_, int64_t rule,
                                             double center_radius, int64_t candidates) {
  const SimotaOptions options{rule, center_radius, candidates};
  check_assign_simota(cls_logits, pred_boxes_, points_, strides_, gt_boxes_, gt_labels_, objectness,
                      counts, crowd_, options);
  const Tensor points = torch::stable::contiguous(points_),
               strides = torch::stable::contiguous(strides_),
               pred_boxes = torch::stable::contiguous(pred_boxes_),
               gt_boxes = torch::stable::contiguous(gt_boxes_),
               gt_labels = torch::stable::contiguous(gt_labels_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const int64_t num_images = gt_boxes.size(0), num_points = points.size(0),
                max_boxes = gt_boxes.size(1);
  Tensor matches = torch::stable::new_zeros(points, {num_images, num_points}, ScalarType::Long);
  Tensor ious = torch::stable::new_empty(points, {num_images, num_points});
  dispatch_simota(options, [&](auto formula) {
    const Tiles tiles(static_cast<const float*>(points.const_data_ptr()),
                      static_cast<const float*>(strides.const_data_ptr()), num_points);
    Assignment<decltype(formula)> all{
        formula,
        candidates,
        ClassScores(cls_logits),
        objectness.has_value() ? ClassScores(*objectness) : ClassScores(),
        tiles,
        num_points,
        max_boxes,
        static_cast<const float*>(pred_boxes.const_data_ptr()),
        static_cast<const int64_t*>(gt_labels.const_data_ptr()),
        read_counts("assign_simota", gt_boxes, counts),
        std::vector<SimotaBox>(num_images * max_boxes),
        std::vector<std::vector<Box<float>>>(num_images),
        std::vector<Ranges>(num_images, Ranges(tiles.size())),
        data_of<int64_t>(matches),
        data_of<float>(ious)};
    find_objects(all, static_cast<const float*>(gt_boxes.const_data_ptr()), data_of<bool>(crowd));
    run(all, num_images);
  });
  return {matches, ious};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("assign_simota", TORCH_BOX(&assign_simota_cpu));
}

}  // namespace focalops
