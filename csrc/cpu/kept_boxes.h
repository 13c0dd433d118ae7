// The boxes that a class has kept so far, 64 to a block of vectors, and whether one of them
// suppresses another box.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../math/nms.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int kLanes = 64;

template <typename T>
struct alignas(64) BoxBlock {
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
};

// Counts are T, so that their lanes are as wide as those of the boxes.
template <bool ByDistance, typename T>
FOCALOPS_SIMD bool is_suppressed(const Box<T>& box, const BoxBlock<T>* blocks, int64_t num_blocks,
                                 T threshold) {
  const T box_area = area(box);
  for (int64_t i = 0; i < num_blocks; ++i) {
    const BoxBlock<T>& block = blocks[i];
    T candidates = 0;
#pragma omp simd reduction(+ : candidates)
    for (int lane = 0; lane < kLanes; ++lane) {
      const Box<T> kept = {block.x1[lane], block.y1[lane], block.x2[lane], block.y2[lane]};
      candidates += may_suppress(kept, box, block.area[lane], box_area, threshold) ? T(1) : T(0);
    }
    if (candidates == 0 && threshold >= 0) {
      continue;
    }
    T suppressors = 0;
#pragma omp simd reduction(+ : suppressors)
    for (int lane = 0; lane < kLanes; ++lane) {
      const Box<T> kept = {block.x1[lane], block.y1[lane], block.x2[lane], block.y2[lane]};
      suppressors +=
          overlap<ByDistance>(kept, box, block.area[lane], box_area) > threshold ? T(1) : T(0);
    }
    if (suppressors > 0) {
      return true;
    }
  }
  return false;
}

template <typename T>
class KeptBoxes {
 public:
  int64_t size() const { return size_; }

  void append(const Box<T>& box) {
    const int lane = static_cast<int>(size_ % kLanes);
    if (lane == 0) {
      blocks_.emplace_back();
      // A NaN area makes the IoU a NaN, which is above no threshold.
      std::fill(std::begin(blocks_.back().area), std::end(blocks_.back().area),
                std::numeric_limits<T>::quiet_NaN());
    }
    BoxBlock<T>& block = blocks_.back();
    block.x1[lane] = box.x1;
    block.y1[lane] = box.y1;
    block.x2[lane] = box.x2;
    block.y2[lane] = box.y2;
    block.area[lane] = area(box);
    ++size_;
  }

  // Looks at the kept boxes from place `first` on, and at some before it again.
  bool suppress(const Box<T>& box, const Suppression<T>& suppresses, int64_t first = 0) const {
    const int64_t block = first / kLanes;
    const auto run = suppresses.by_distance ? &is_suppressed<true, T> : &is_suppressed<false, T>;
    return run(box, blocks_.data() + block, static_cast<int64_t>(blocks_.size()) - block,
               suppresses.threshold);
  }

 private:
  std::vector<BoxBlock<T>> blocks_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace focalops
