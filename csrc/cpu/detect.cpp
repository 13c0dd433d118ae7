// Detections are made of a head's outputs on the CPU in one pass over the logits, at the speed of
// memory.
//
// A level of an image is contiguous memory in both layouts, and is compared with the threshold as
// such; only what passes is scored and gets an index. The pass is cut into pieces, the unit of
// parallel work. A thread keeps the best candidates of the pieces that it does one after another;
// once it has as many as can be chosen, the worst of them raises the threshold, so that a head
// whose every logit passes costs little more. Boxes are decoded when NMS comes to them, which stops
// at max_detections.
#include <algorithm>
#include <functional>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../checks/detect.h"
#include "../head_levels.h"
#include "../math/detect.h"
#include "../rows.h"
#include "kept_boxes.h"

namespace focalops {
namespace {

constexpr int64_t kPiece = 1 << 19;
constexpr int kBlock = 512;

template <typename scalar_t>
FOCALOPS_SIMD bool any_at_least(const scalar_t* logits, int64_t n, float least) {
  int hits = 0;
#pragma omp simd reduction(+ : hits)
  for (int64_t i = 0; i < n; ++i) {
    hits += static_cast<float>(logits[i]) >= least ? 1 : 0;
  }
  return hits > 0;
}

template <typename scalar_t>
FOCALOPS_SIMD void flag_at_least(const scalar_t* logits, int64_t n, float least, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) {
    flags[i] = static_cast<float>(logits[i]) >= least ? 1 : 0;
  }
}

// The best `most` of the candidates it was offered, by key.
class BestCandidates {
 public:
  BestCandidates(int64_t most, const Scoring& scoring)
      : most_(most), scoring_(scoring), least_logit_(scoring.least_logit()) {}

  // No candidate of a lower logit, be it of the class or of the factor, can be among the best.
  float least_logit() const { return least_logit_; }
  const Scoring& scoring() const { return scoring_; }

  void offer(float score, uint32_t index) {
    const uint64_t key = candidate_key(score, index);
    if (key <= worst_) {
      return;
    }
    keys_.push_back(key);
    if (static_cast<int64_t>(keys_.size()) >= std::max<int64_t>(2 * most_, 4096)) {
      keep_best(keys_, most_);
      worst_ = keys_[most_ - 1];
      const float score_of_worst = score_of_key(worst_);
      least_logit_ = scoring_.least_logit([&](float score) { return score >= score_of_worst; });
    }
  }

  std::vector<uint64_t> take() { return std::exchange(keys_, {}); }

  // The worst of them comes last.
  static void keep_best(std::vector<uint64_t>& keys, int64_t most) {
    if (static_cast<int64_t>(keys.size()) > most) {
      std::nth_element(keys.begin(), keys.begin() + most - 1, keys.end(), std::greater<>());
      keys.resize(most);
    }
  }

 private:
  int64_t most_;
  Scoring scoring_;
  float least_logit_;
  uint64_t worst_ = 0;
  std::vector<uint64_t> keys_;
};

struct Level {
  LevelLayout layout;
  const void* logits;
  const void* deltas;
  const void* factors;  // null: there are none
  int64_t size;         // logits of an image
  int64_t first_piece;  // of an image
};

// The candidates among the logits begin .. end of an image of a level. factors: of the image.
template <typename scalar_t>
void collect(const scalar_t* logits, const scalar_t* factors, int64_t begin, int64_t end,
             const LevelLayout& layout, const HeadShape& shape, BestCandidates& best) {
  const auto anchors = static_cast<uint32_t>(shape.anchors);
  const auto classes = static_cast<uint32_t>(shape.classes);
  alignas(8) uint8_t flags[kBlock] = {};
  float last_logit = std::numeric_limits<float>::quiet_NaN(), last_score = 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, end - first);
    if (!any_at_least(logits + first, n, best.least_logit())) {
      continue;
    }
    flag_at_least(logits + first, n, best.least_logit(), flags);
    std::fill(flags + n, flags + kBlock, uint8_t{0});
    for (int64_t word = 0; word < kBlock; word += 8) {
      uint64_t eight;
      std::memcpy(&eight, flags + word, sizeof eight);
      for (int64_t i = word; eight != 0; ++i, eight >>= 8) {
        const auto logit = static_cast<float>(logits[std::min(first + i, end - 1)]);
        if ((eight & 1) == 0 || !(logit >= best.least_logit())) {
          continue;
        }
        const uint32_t index = layout.index(static_cast<uint32_t>(first + i), anchors, classes);
        float factor = 0;
        if (factors != nullptr) {
          factor = layout.load_factor(factors, index / classes, anchors);
          if (!(factor >= best.least_logit())) {
            continue;
          }
        }
        if (logit != last_logit) {
          last_logit = logit;
          last_score = score_of_logit(logit);
        }
        if (factors == nullptr) {
          best.offer(last_score, index);
          continue;
        }
        const float score = best.scoring().combine(last_score, score_of_logit(factor));
        if (best.scoring().passes(score)) {
          best.offer(score, index);
        }
      }
    }
  }
}

struct Detections {
  float* boxes;     // [max_detections, 4]
  float* scores;    // [max_detections]
  int64_t* labels;  // [max_detections]
  int64_t* count;
};

struct NmsOptions {
  Suppression<float> suppresses;
  int64_t max_detections;
  bool class_agnostic;
};

// keys: the candidates of all levels, best first; box_of(index): that of a candidate.
template <typename BoxOf>
void suppress(const std::vector<uint64_t>& keys, int64_t classes, const NmsOptions& options,
              const BoxOf& box_of, const Detections& to) {
  std::unordered_map<int64_t, KeptBoxes<float>> kept;
  int64_t count = 0;
  for (const uint64_t key : keys) {
    if (count == options.max_detections) {
      break;
    }
    const int64_t index = index_of_key(key), label = index % classes;
    const Box<float> box = box_of(index);
    KeptBoxes<float>& of_class = kept[options.class_agnostic ? 0 : label];
    if (has_nan(box) || of_class.suppress(box, options.suppresses)) {
      continue;
    }
    of_class.append(box);
    std::memcpy(to.boxes + 4 * count, &box, sizeof box);
    to.scores[count] = score_of_key(key);
    to.labels[count] = label;
    ++count;
  }
  std::fill(to.boxes + 4 * count, to.boxes + 4 * options.max_detections, 0.0f);
  std::fill(to.scores + count, to.scores + options.max_detections, 0.0f);
  std::fill(to.labels + count, to.labels + options.max_detections, -1);
  *to.count = count;
}

// For each image, in parallel, finish(image, keys, box_of): the keys of its candidates, best first,
// and the box of each.
template <typename Finish>
void for_each_image(const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
                    const Tensor& anchors_, const std::optional<Tensor>& image_sizes_,
                    const CandidateOptions& options, const HeadShape& shape, const Finish& finish) {
  const auto logits_levels = head_levels(cls_logits, shape);
  const auto deltas_levels = head_levels(box_deltas, shape);
  const auto factors_levels = head_levels(options.score_factors, shape);
  const Tensor anchors = torch::stable::contiguous(anchors_);
  const auto* anchor_boxes = static_cast<const float*>(anchors.const_data_ptr());
  std::optional<Tensor> image_sizes;
  const float* sizes = nullptr;
  if (image_sizes_.has_value()) {
    image_sizes = torch::stable::contiguous(*image_sizes_);
    sizes = static_cast<const float*>(image_sizes->const_data_ptr());
  }
  const int64_t images = shape.images;
  std::vector<Level> levels;
  int64_t pieces_of_image = 0;
  for (size_t l = 0; l < logits_levels.size(); ++l) {
    const HeadLevel &logits = logits_levels[l], &deltas = deltas_levels[l];
    const HeadLevel* factors = factors_levels.empty() ? nullptr : &factors_levels[l];
    const int64_t size = logits.positions * shape.anchors * shape.classes;
    levels.push_back(
        {{static_cast<uint32_t>(logits.positions), static_cast<uint32_t>(logits.first_row),
          logits.has_rows, deltas.has_rows, factors != nullptr && factors->has_rows},
         logits.tensor.const_data_ptr(),
         deltas.tensor.const_data_ptr(),
         factors == nullptr ? nullptr : factors->tensor.const_data_ptr(),
         size,
         pieces_of_image});
    pieces_of_image += (size + kPiece - 1) / kPiece;
  }
  const int64_t most_of_level = options.most_of_level(shape);
  const int64_t most = options.most(static_cast<int64_t>(levels.size()), shape);
  const Scoring scoring(options.score_threshold, options.takes_root);
  const bool by_level = most_of_level < most;  // else the levels of an image compete at once
  const auto level_of = [&](int64_t part) {
    size_t l = 0;
    while (l + 1 < levels.size() && part >= levels[l + 1].first_piece) {
      ++l;
    }
    return l;
  };
  const auto ends_competition = [&](int64_t part) {
    return part + 1 == pieces_of_image || (by_level && level_of(part + 1) != level_of(part));
  };
  std::vector<std::vector<uint64_t>> found(images * pieces_of_image);

  dispatch_floating(cls_logits[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    torch::stable::parallel_for(0, images * pieces_of_image, 1, [&](int64_t first, int64_t last) {
      BestCandidates best(most_of_level, scoring);
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t image = piece / pieces_of_image, part = piece % pieces_of_image;
        const Level& level = levels[level_of(part)];
        const int64_t begin = (part - level.first_piece) * kPiece;
        const auto* factors = static_cast<const scalar_t*>(level.factors);
        collect(
            static_cast<const scalar_t*>(level.logits) + image * level.size,
            factors == nullptr ? nullptr : factors + image * shape.anchors * level.layout.positions,
            begin, std::min(begin + kPiece, level.size), level.layout, shape, best);
        if (piece + 1 == last || ends_competition(part)) {
          found[piece] = best.take();
          best = BestCandidates(most_of_level, scoring);
        }
      }
    });
    const auto finish_image = [&](int64_t image) {
      std::vector<uint64_t> keys, of_level;
      for (int64_t part = 0; part < pieces_of_image; ++part) {
        const auto& more = found[image * pieces_of_image + part];
        of_level.insert(of_level.end(), more.begin(), more.end());
        if (ends_competition(part)) {
          BestCandidates::keep_best(of_level, most_of_level);
          keys.insert(keys.end(), of_level.begin(), of_level.end());
          of_level.clear();
        }
      }
      BestCandidates::keep_best(keys, most);
      std::sort(keys.begin(), keys.end(), std::greater<>());
      const auto coder = sizes == nullptr
                             ? box_coder<float>(options.weights, options.clip)
                             : box_coder<float>(options.weights, options.clip,
                                                {sizes[2 * image], sizes[2 * image + 1]});
      const auto box_of = [&](int64_t index) {
        const auto row = static_cast<uint32_t>(index / shape.classes);
        size_t l = 0;
        while (l + 1 < levels.size() && row >= levels[l + 1].layout.first_row) {
          ++l;
        }
        const Level& level = levels[l];
        const int64_t deltas_of_image =
            options.deltas_of_an_anchor() * level.layout.positions * shape.anchors;
        const auto* deltas = static_cast<const scalar_t*>(level.deltas) + image * deltas_of_image;
        if (options.has_distances()) {
          return level.layout.load_distances(deltas, row, static_cast<int>(options.bins),
                                             anchor_boxes + int64_t{2} * row,
                                             static_cast<float>(options.strides[l]), coder.bounds);
        }
        return coder.decode(
            level.layout.load_deltas(deltas, row, static_cast<uint32_t>(shape.anchors)),
            load_box(anchor_boxes + int64_t{4} * row));
      };
      finish(image, keys, box_of);
    };
    torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
      for (int64_t image = first; image < last; ++image) {
        finish_image(image);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> detect_cpu(
    const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
    const Tensor& anchors, const std::optional<Tensor>& image_sizes,
    const std::vector<double>& weights, double clip, double score_threshold, int64_t topk_per_level,
    double iou_threshold, int64_t max_detections, bool class_agnostic, bool by_distance,
    std::optional<int64_t> topk, const std::vector<double>& strides, int64_t bins, bool takes_root,
    const std::optional<std::vector<Tensor>>& score_factors) {
  const CandidateOptions options{score_factors.value_or(std::vector<Tensor>{}),
                                 takes_root,
                                 weights,
                                 clip,
                                 strides,
                                 bins,
                                 score_threshold,
                                 topk_per_level,
                                 topk};
  const HeadShape shape =
      check_detect(cls_logits, box_deltas, anchors, image_sizes, options, max_detections);
  const auto new_empty = [&](const std::vector<int64_t>& size, ScalarType dtype) {
    return torch::stable::new_empty(cls_logits[0], size, dtype);
  };
  Tensor boxes = new_empty({shape.images, max_detections, 4}, ScalarType::Float);
  Tensor scores = new_empty({shape.images, max_detections}, ScalarType::Float);
  Tensor labels = new_empty({shape.images, max_detections}, ScalarType::Long);
  Tensor counts = new_empty({shape.images}, ScalarType::Long);
  const NmsOptions nms{
      {round_down<float>(iou_threshold), by_distance}, max_detections, class_agnostic};
  for_each_image(cls_logits, box_deltas, anchors, image_sizes, options, shape,
                 [&](int64_t image, const std::vector<uint64_t>& keys, const auto& box_of) {
                   const int64_t first = image * max_detections;
                   suppress(keys, shape.classes, nms, box_of,
                            {static_cast<float*>(boxes.mutable_data_ptr()) + first * 4,
                             static_cast<float*>(scores.mutable_data_ptr()) + first,
                             static_cast<int64_t*>(labels.mutable_data_ptr()) + first,
                             static_cast<int64_t*>(counts.mutable_data_ptr()) + image});
                 });
  return {boxes, scores, labels, counts};
}

std::tuple<Tensor, Tensor, Tensor> head_candidates_cpu(
    const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
    const Tensor& anchors, const std::optional<Tensor>& image_sizes,
    const std::vector<double>& weights, double clip, double score_threshold, int64_t topk_per_level,
    std::optional<int64_t> topk, const std::vector<double>& strides, int64_t bins, bool takes_root,
    const std::optional<std::vector<Tensor>>& score_factors) {
  const CandidateOptions options{score_factors.value_or(std::vector<Tensor>{}),
                                 takes_root,
                                 weights,
                                 clip,
                                 strides,
                                 bins,
                                 score_threshold,
                                 topk_per_level,
                                 topk};
  const HeadShape shape = check_candidates(cls_logits, box_deltas, anchors, image_sizes, options);
  const int64_t most = options.most(static_cast<int64_t>(cls_logits.size()), shape);
  const auto new_empty = [&](const std::vector<int64_t>& size, ScalarType dtype) {
    return torch::stable::new_empty(cls_logits[0], size, dtype);
  };
  Tensor boxes = new_empty({shape.images, most, 4}, ScalarType::Float);
  Tensor scores = new_empty({shape.images, most}, ScalarType::Float);
  Tensor labels = new_empty({shape.images, most}, ScalarType::Long);
  for_each_image(
      cls_logits, box_deltas, anchors, image_sizes, options, shape,
      [&](int64_t image, const std::vector<uint64_t>& keys, const auto& box_of) {
        auto* to_boxes = static_cast<float*>(boxes.mutable_data_ptr()) + image * most * 4;
        auto* to_scores = static_cast<float*>(scores.mutable_data_ptr()) + image * most;
        auto* to_labels = static_cast<int64_t*>(labels.mutable_data_ptr()) + image * most;
        for (size_t i = 0; i < keys.size(); ++i) {
          const int64_t index = index_of_key(keys[i]);
          const Box<float> box = box_of(index);
          std::memcpy(to_boxes + 4 * i, &box, sizeof box);
          to_scores[i] = score_of_key(keys[i]);
          to_labels[i] = index % shape.classes;
        }
        const auto count = static_cast<int64_t>(keys.size());
        std::fill(to_boxes + 4 * count, to_boxes + 4 * most, 0.0f);
        std::fill(to_scores + count, to_scores + most, -std::numeric_limits<float>::infinity());
        std::fill(to_labels + count, to_labels + most, -1);
      });
  return {boxes, scores, labels};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("detect", TORCH_BOX(&detect_cpu));
  m.impl("_head_candidates", TORCH_BOX(&head_candidates_cpu));
}

}  // namespace focalops
