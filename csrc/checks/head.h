// All ops of a head's levels refuse these arguments.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "../head_levels.h"

namespace focalops {

inline void check_num_levels(const char* op, const char* name, const std::vector<Tensor>& levels) {
  if (levels.empty() || levels.size() > kMaxLevels) {
    fail(op, ": ", name, " must be 1 to ", kMaxLevels, " levels, got ", levels.size());
  }
}

// "cls_logits[2]"
inline std::string level_name(const char* name, size_t level) {
  return name + ("[" + std::to_string(level) + "]");
}

// The CUDA kernels number the parts of an image in 32 bits.
inline void check_image_size(const char* op, const std::string& name, const Tensor& level,
                             const char* what) {
  const int64_t numbers = level.size(1) * level.size(2) * level.size(3);
  if (numbers >= int64_t{1} << 31) {
    fail(op, ": ", name, " must have fewer than 2^31 ", what, " an image, got ", numbers);
  }
}

// How many positions the levels have together. `channels` of each, a multiple of `multiple`, are
// the same in all of them as `same` is; `what` is in them.
inline int64_t check_levels(const char* op, const char* name, const std::vector<Tensor>& levels,
                            const char* channels, int64_t multiple, const char* same,
                            const char* what) {
  check_num_levels(op, name, levels);
  const std::string first_name = level_name(name, 0);
  check_floating(op, first_name.c_str(), levels[0]);
  int64_t positions = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const Tensor& level = levels[i];
    const std::string level_i = level_name(name, i);
    check_like(op, level_i.c_str(), level, first_name.c_str(), levels[0]);
    if (level.dim() != 4 || level.size(1) % multiple != 0 || !same_shape(level, levels[0], 2)) {
      fail(op, ": ", level_i, " must have shape (B, ", channels, ", H, W), B and ", same,
           " the same in all levels, got ", shape_of(level));
    }
    check_image_size(op, level_i, level, what);
    positions += level.size(2) * level.size(3);
  }
  return positions;
}

// A normalizer of all images, or one for each. `name` is that of the levels, `first` the first.
inline void check_normalizer_of_images(const char* op, const std::optional<Tensor>& normalizer,
                                       const char* name, const Tensor& first) {
  if (!normalizer.has_value()) {
    return;
  }
  const int64_t images = first.size(0);
  check_same_device(op, "normalizer", *normalizer, level_name(name, 0).c_str(), first);
  if (normalizer->dim() > 1 || (normalizer->dim() == 1 && normalizer->size(0) != images)) {
    fail(op, ": normalizer must be a number, a 0-d tensor or a tensor of shape (", images,
         ",), got a tensor of shape ", shape_of(*normalizer));
  }
  if (normalizer->scalar_type() != compute_dtype(first.scalar_type())) {
    fail(op, ": normalizer must be float32 (float64 for float64 ", name, "), got ",
         dtype_of(*normalizer));
  }
}

}  // namespace focalops
