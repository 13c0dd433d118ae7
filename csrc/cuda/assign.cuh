// What the assigners that choose by what is predicted share: boxes visit tiles of 32 consecutive
// points, and keep their best anchors sorted over the lanes of a warp.
#pragma once

#include "../assign.h"
#include "launch.cuh"

namespace focalops {
namespace {

using Key = unsigned long long;  // ranked() or by_cost()

// The greatest keys, one a lane in descending order.
class TopK {
 public:
  // All lanes must call it, each with a key of its own, or 0.
  __device__ __forceinline__ void offer(Key key, int k) {
    const Key least = __shfl_sync(kFullWarp, mine_, k - 1);
    if (__ballot_sync(kFullWarp, key > least) == 0) {
      return;
    }
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int size = 2; size <= kWarpSize; size *= 2) {
#pragma unroll
      for (int stride = size / 2; stride > 0; stride /= 2) {
        key = exchange(key, stride, ((lane & size) == 0) == ((lane & stride) == 0));
      }
    }
    merge(__shfl_sync(kFullWarp, key, kWarpSize - 1 - lane));
  }

  // With the keys of another, in ascending order.
  __device__ __forceinline__ void merge(Key ascending) {
    const int lane = threadIdx.x % kWarpSize;
    mine_ = ascending > mine_ ? ascending : mine_;
#pragma unroll
    for (int stride = kWarpSize / 2; stride > 0; stride /= 2) {
      mine_ = exchange(mine_, stride, (lane & stride) == 0);
    }
  }

  __device__ __forceinline__ Key mine() const { return mine_; }

 private:
  static __device__ __forceinline__ Key exchange(Key key, int stride, bool takes_greater) {
    const Key other = __shfl_xor_sync(kFullWarp, key, stride);
    return (other > key) == takes_greater ? other : key;
  }

  Key mine_ = 0;
};

// Which of the tiles begin, begin + step ..., a lane each, the box meets.
__device__ __forceinline__ unsigned tiles_met(const Box<float>* ranges, int64_t tiles,
                                              const Box<float>& box, int64_t begin, int step) {
  const int64_t mine = begin + static_cast<int>(threadIdx.x) % kWarpSize * step;
  const bool meets = mine < tiles && intersects(box, ranges[mine < tiles ? mine : 0]);
  return __ballot_sync(kFullWarp, meets);
}

}  // namespace
}  // namespace focalops
