// detect refuses these arguments.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "boxes.h"
#include "head.h"

namespace focalops {

// What is a candidate of an image: detect and _head_candidates take these beside the head's
// outputs.
struct CandidateOptions {
  std::vector<Tensor> score_factors;  // none: the head has no factors
  bool takes_root;                    // of a score and its factor
  std::vector<double> weights;        // with clip those of the box coder
  double clip;
  std::vector<double> strides;  // of each level, of distances; none: the head has deltas
  int64_t bins;                 // of each distance
  double score_threshold;
  int64_t topk_per_level;
  std::optional<int64_t> topk;  // of all levels together

  bool has_distances() const { return !strides.empty(); }
  int64_t deltas_of_an_anchor() const { return has_distances() ? 4 * bins : 4; }

  // How many candidates a level has at most, and how many an image has.
  int64_t most_of_level(const HeadShape& shape) const {
    const int64_t logits = shape.rows * shape.classes;
    return std::min({topk_per_level, logits, topk.value_or(logits)});
  }
  int64_t most(int64_t levels, const HeadShape& shape) const {
    const int64_t logits = shape.rows * shape.classes;
    return std::min({levels * most_of_level(shape), logits, topk.value_or(logits)});
  }
};

inline HeadShape check_candidates(const std::vector<Tensor>& cls_logits,
                                  const std::vector<Tensor>& box_deltas, const Tensor& anchors,
                                  const std::optional<Tensor>& image_sizes,
                                  const CandidateOptions& options) {
  const char* op = "detect";
  check_num_levels(op, "cls_logits", cls_logits);
  if (box_deltas.size() != cls_logits.size()) {
    fail(op, ": box_deltas must be ", cls_logits.size(), " levels like cls_logits, got ",
         box_deltas.size());
  }
  const Tensor& first = cls_logits[0];
  check_floating(op, "cls_logits[0]", first);
  int64_t positions = 0;
  const auto check_levels = [&](const char* levels_name, const std::vector<Tensor>& levels,
                                const char* channels) {
    for (size_t i = 0; i < levels.size(); ++i) {
      const Tensor &level = levels[i], &logits = cls_logits[i];
      const std::string name = level_name(levels_name, i);
      check_like(op, name.c_str(), level, "cls_logits[0]", first);
      if (level.dim() != 4 || level.size(0) != first.size(0) ||
          level.size(1) != levels[0].size(1) || level.size(2) != logits.size(2) ||
          level.size(3) != logits.size(3)) {
        fail(op, ": ", name, " must have shape (B, ", channels, ", H, W), B and ", channels,
             " the same in all levels, H and W those of the level, got ", shape_of(level));
      }
    }
  };
  check_levels("cls_logits", cls_logits, "A * K");
  check_levels("box_deltas", box_deltas, options.has_distances() ? "4 * bins" : "A * 4");
  const std::vector<Tensor>& factors = options.score_factors;
  if (!factors.empty()) {
    if (factors.size() != cls_logits.size()) {
      fail(op, ": score_factors must be ", cls_logits.size(), " levels like cls_logits, got ",
           factors.size());
    }
    check_levels("score_factors", factors, "A");
  } else if (options.takes_root) {
    fail(op, ": combine must be 'product' unless there are score_factors, got 'sqrt'");
  }
  for (const Tensor& level : cls_logits) {
    positions += level.size(2) * level.size(3);
  }
  const int64_t images = first.size(0), channels = first.size(1);
  const int64_t per_position = box_deltas[0].size(1);
  const int64_t num_anchors = options.has_distances() ? 1 : per_position / 4;
  if (options.has_distances()) {
    if (options.strides.size() != cls_logits.size()) {
      fail(op, ": strides must be ", cls_logits.size(), " numbers, one for each level, got ",
           options.strides.size());
    }
    if (options.bins < 1 || options.bins >= int64_t{1} << 29) {
      fail(op, ": bins must lie in [1, 2^29), got ", options.bins);
    }
    if (per_position != 4 * options.bins) {
      fail(op, ": box_deltas must have 4 channels for each of ", options.bins, " bins, got ",
           per_position);
    }
  } else if (num_anchors == 0 || per_position % 4 != 0 || channels % num_anchors != 0) {
    fail(op, ": cls_logits and box_deltas must have A * K and A * 4 channels, got ", channels,
         " and ", per_position);
  }
  if (!factors.empty() && factors[0].size(1) != num_anchors) {
    fail(op, ": score_factors must have a channel for each of ", num_anchors, " anchors, got ",
         factors[0].size(1));
  }
  const int64_t rows = num_anchors * positions, classes = channels / num_anchors;
  if (rows * classes >= int64_t{1} << 31) {
    fail(op, ": cls_logits must have fewer than 2^31 logits an image, got ", rows * classes);
  }
  check_same_device(op, "anchors", anchors, "cls_logits[0]", first);
  if (anchors.scalar_type() != ScalarType::Float) {
    fail(op, ": anchors must be float32, got ", dtype_of(anchors));
  }
  const int64_t of_an_anchor = options.has_distances() ? 2 : 4;
  if (anchors.dim() != 2 || anchors.size(0) != rows || anchors.size(1) != of_an_anchor) {
    fail(op, ": anchors must have shape (", rows, ", ", of_an_anchor, "), ", num_anchors,
         " at each position of the levels, got ", shape_of(anchors));
  }
  if (image_sizes.has_value()) {
    check_same_device(op, "image_sizes", *image_sizes, "cls_logits[0]", first);
    if (image_sizes->scalar_type() != ScalarType::Float) {
      fail(op, ": image_sizes must be float32, got ", dtype_of(*image_sizes));
    }
    if (image_sizes->dim() != 2 || image_sizes->size(0) != images || image_sizes->size(1) != 2) {
      fail(op, ": image_sizes must have shape (", images,
           ", 2), height and width of each image, got ", shape_of(*image_sizes));
    }
  }
  check_weights(op, options.weights);
  if (options.topk_per_level < 1) {
    fail(op, ": topk_per_level must be >= 1, got ", options.topk_per_level);
  }
  if (options.topk.value_or(1) < 1) {
    fail(op, ": topk must be >= 1, or None for no limit, got ", *options.topk);
  }
  return {images, num_anchors, classes, rows};
}

inline HeadShape check_detect(const std::vector<Tensor>& cls_logits,
                              const std::vector<Tensor>& box_deltas, const Tensor& anchors,
                              const std::optional<Tensor>& image_sizes,
                              const CandidateOptions& options, int64_t max_detections) {
  const HeadShape shape = check_candidates(cls_logits, box_deltas, anchors, image_sizes, options);
  if (max_detections < 0) {
    fail("detect: max_detections must be >= 0, got ", max_detections);
  }
  return shape;
}

}  // namespace focalops
