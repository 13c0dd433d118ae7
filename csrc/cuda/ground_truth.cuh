// The boxes of a batch, padded to the same number in each image, which blocks take chunk by chunk.
#pragma once

#include "../matching.h"
#include "../rows.h"
#include "integers.cuh"
#include "launch.cuh"

namespace focalops {
namespace {

// Counts of boxes; where there are none, every image has all of them.
struct Counts {
  Integers values;
  int64_t stride;
  int64_t most;

  __device__ __forceinline__ int64_t operator[](int64_t image) const {
    if (values.data == nullptr) {
      return most;
    }
    const int64_t count = values[image * stride];
    return count < 0 ? 0 : count > most ? most : count;
  }
};

// The smallest box that holds the anchors of the warp, in every lane. A NaN is in no range.
template <typename T>
__device__ __forceinline__ Box<T> range_of_warp(const Box<T>& anchor, bool present) {
  const T infinity = static_cast<T>(__builtin_huge_valf());
  Box<T> range{infinity, infinity, -infinity, -infinity};
  if (present) {
    range = {min_of(anchor.x1, range.x1), min_of(anchor.y1, range.y1), max_of(anchor.x2, range.x2),
             max_of(anchor.y2, range.y2)};
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    range.x1 = min_of(range.x1, __shfl_xor_sync(kFullWarp, range.x1, offset));
    range.y1 = min_of(range.y1, __shfl_xor_sync(kFullWarp, range.y1, offset));
    range.x2 = max_of(range.x2, __shfl_xor_sync(kFullWarp, range.x2, offset));
    range.y2 = max_of(range.y2, __shfl_xor_sync(kFullWarp, range.y2, offset));
  }
  return range;
}

// Loads boxes begin .. begin + n of an image that have the role; the others become NaN.
template <typename T>
__device__ __forceinline__ void load_boxes(const Rows<Box<T>, T>& gt_boxes, const uint8_t* roles,
                                           int64_t image, int64_t most, int64_t begin, int n,
                                           Role role, Box<T>* boxes) {
  const int thread = threadIdx.x;
  if (thread < n) {
    const T nan = static_cast<T>(__builtin_nanf(""));
    const bool has_role = roles == nullptr || roles[image * most + begin + thread] == role;
    boxes[thread] = has_role ? gt_boxes.load(image, begin + thread) : Box<T>{nan, nan, nan, nan};
  }
}

}  // namespace
}  // namespace focalops
