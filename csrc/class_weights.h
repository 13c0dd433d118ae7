// The weights of the classes, one each or one for each part that a logit can have in its row.
#pragma once

#include <cstdint>
#include <optional>

#include "dtypes.h"
#include "math/host_device.h"

namespace focalops {

enum ClassPart { kPositive, kNegativeOfForeground, kNegativeOfBackground };

template <typename T>
struct ClassWeights {
  const T* data = nullptr;  // [K] or [3, K], a row a part; null: all are 1
  uint32_t stride = 0;      // from part to part; K is less than 2^30

  // [K], null where all are 1
  FOCALOPS_HOST_DEVICE const T* of(ClassPart part) const {
    return data == nullptr ? nullptr : data + static_cast<uint32_t>(part) * stride;
  }
  FOCALOPS_HOST_DEVICE T at(ClassPart part, uint32_t column) const {
    return data == nullptr ? T(1) : data[static_cast<uint32_t>(part) * stride + column];
  }
};

// Those of one class.
template <typename T>
struct PartWeights {
  T positive, of_foreground, of_background;

  FOCALOPS_HOST_DEVICE PartWeights(const ClassWeights<T>& weights, uint32_t column)
      : positive(weights.at(kPositive, column)),
        of_foreground(weights.at(kNegativeOfForeground, column)),
        of_background(weights.at(kNegativeOfBackground, column)) {}

  FOCALOPS_HOST_DEVICE T at(ClassPart part) const {
    return part == kPositive               ? positive
           : part == kNegativeOfForeground ? of_foreground
                                           : of_background;
  }
};

// `given`, which is contiguous, must outlive it.
template <typename T>
ClassWeights<T> class_weights_of(const std::optional<Tensor>& given) {
  const bool by_part = given.has_value() && given->dim() == 2;
  return {data_of<T>(given), by_part ? static_cast<uint32_t>(given->size(1)) : 0};
}

}  // namespace focalops
