// What fuse_features refuses.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "../math/fusion.h"

namespace focalops {

enum class Resampling { kNone, kUp, kPool };

// How a feature of n_in rows and columns comes to the size of the first; -1: not at all.
inline int resampling_of(const Tensor& feature, const Tensor& first) {
  bool is_same = true, goes_up = true, is_pooled = true;
  for (const int64_t d : {2, 3}) {
    const int64_t from = feature.size(d), to = first.size(d);
    is_same = is_same && from == to;
    goes_up = goes_up && from <= to && (from > 0 || to == 0);
    is_pooled = is_pooled && (from + 1) / 2 == to;
  }
  return is_same     ? static_cast<int>(Resampling::kNone)
         : goes_up   ? static_cast<int>(Resampling::kUp)
         : is_pooled ? static_cast<int>(Resampling::kPool)
                     : -1;
}

inline void check_fuse_features(const std::vector<Tensor>& features,
                                const std::optional<Tensor>& weights, int64_t mode,
                                int64_t activation) {
  const char* op = "fuse_features";
  if (features.empty() || features.size() > kMaxFeatures) {
    fail(op, ": features must be 1 to 8 maps, got ", features.size());
  }
  const Tensor& first = features[0];
  check_floating(op, "features[0]", first);
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& feature = features[i];
    const std::string name = "features[" + std::to_string(i) + "]";
    check_like(op, name.c_str(), feature, "features[0]", first);
    if (feature.dim() != 4 || !same_shape(feature, first, 2)) {
      fail(op, ": ", name, " must have shape (B, C, H, W), B and C the same in all maps, got ",
           shape_of(feature));
    }
    if (resampling_of(feature, first) < 0) {
      fail(op, ": ", name, " must have the height and width of features[0], ", first.size(2), " x ",
           first.size(3), ", twice as much or less, got ", feature.size(2), " x ", feature.size(3));
    }
  }
  if (mode < 0 || mode > 3) {
    fail(op, ": mode must lie in [0, 3], got ", mode);
  }
  if (activation < 0 || activation > 2) {
    fail(op, ": activation must lie in [0, 2], got ", activation);
  }
  const bool is_sum = static_cast<FusionMode>(mode) == FusionMode::kSum;
  if (weights.has_value() == is_sum) {
    fail(op, is_sum ? ": weights must be None with mode='sum'"
                    : ": weights must be one number for each map unless mode='sum'");
  }
  if (weights.has_value()) {
    check_same_device(op, "weights", *weights, "features[0]", first);
    if (weights->dim() != 1 || weights->size(0) != static_cast<int64_t>(features.size())) {
      fail(op, ": weights must have shape (", features.size(), ",), one for each map, got ",
           shape_of(*weights));
    }
    if (weights->scalar_type() != compute_dtype(first.scalar_type())) {
      fail(op, ": weights must be float32 (float64 for float64 maps), got ", dtype_of(*weights));
    }
  }
}

inline void check_fuse_features_backward(const Tensor& grad_output,
                                         const std::vector<Tensor>& features,
                                         const std::optional<Tensor>& weights, int64_t mode,
                                         int64_t activation) {
  check_fuse_features(features, weights, mode, activation);
  check_like("fuse_features", "grad_output", grad_output, "features[0]", features[0]);
  if (!same_shape(grad_output, features[0])) {
    fail("fuse_features: grad_output must have the shape of the output, ", shape_of(features[0]),
         ", got ", shape_of(grad_output));
  }
}

}  // namespace focalops
