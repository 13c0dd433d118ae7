// NMS of a chunk of boxes by a block of threads, which nms.cu and detect.cu share.
#pragma once

#include "../math/nms.h"
#include "integers.cuh"
#include "launch.cuh"

namespace focalops {
namespace {

constexpr int kBoxesPerChunk = 512;                 // boxes in a chunk, and threads in a block
constexpr int kWords = kBoxesPerChunk / kWarpSize;  // of 32 bits, one for each box of a chunk

// Counts how many threads of the block before this one, and how many in all, have their flag set.
// All of them must call it.
struct Count {
  int before;
  int total;
};

__device__ __forceinline__ Count count_flags(bool flag) {
  __shared__ uint32_t words[kWords];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t word = __ballot_sync(kFullWarp, flag);
  __syncthreads();  // the previous call's words have been read
  if (lane == 0) {
    words[warp] = word;
  }
  __syncthreads();
  Count count{__popc(word & ((1u << lane) - 1)), 0};
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int in_word = __popc(words[w]);
    count.before += w < warp ? in_word : 0;
    count.total += in_word;
  }
  return count;
}

// Says whether this thread's box of the chunk is kept. All boxes that are alive are taken for kept,
// and each corrects itself by those before it until nothing changes. After t rounds the first t
// boxes are right at least, so that the end is the one result there is; chains of boxes that
// suppress each other are short, and so are the rounds: seldom 10, never above 513. suppressors:
// those of this thread's box in the chunk.
__device__ __forceinline__ bool settle_chunk(bool alive, const uint32_t (&suppressors)[kWords]) {
  __shared__ uint32_t kept[2][kWords];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t previous[kWords] = {};
  bool keep = alive;
  __syncthreads();  // the previous chunk's words have been read
  for (int round = 0;; ++round) {
    const uint32_t word = __ballot_sync(kFullWarp, keep);
    if (lane == 0) {
      kept[round % 2][warp] = word;
    }
    __syncthreads();  // also: whoever writes the other half next has seen all of it read
    uint32_t changed = 0, suppressed = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t now = kept[round % 2][w];
      changed |= now ^ previous[w];
      suppressed |= now & suppressors[w];
      previous[w] = now;
    }
    if (changed == 0) {
      return keep;
    }
    keep = alive && suppressed == 0;
  }
}

// The boxes of an image in order of score, chunk by chunk, a thread for each, until max_detections
// are kept. A thread compares its box with those kept from earlier chunks, then with those before
// it in its own chunk, of its class both times; the chunk is settled as above. With 100 detections
// an image seldom reads more than two chunks. All comparisons read shared memory or the first-level
// cache.
//
// boxes.load(place, box, label): whether there is a box to consider. kept(at, place): is called for
// each kept box, by one thread. kept_boxes, kept_labels: [max_detections]. Returns their number.
template <typename T, typename Boxes, typename Kept>
__device__ __forceinline__ int64_t keep_best(const Boxes& boxes, int64_t size,
                                             const Suppression<T>& suppresses, bool class_agnostic,
                                             int64_t max_detections, Box<T>* kept_boxes,
                                             int64_t* kept_labels, const Kept& kept) {
  __shared__ Box<T> chunk_boxes[kBoxesPerChunk];
  __shared__ T areas[kBoxesPerChunk];
  __shared__ int64_t classes[kBoxesPerChunk];
  __shared__ uint32_t alive_words[kWords];
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;

  int64_t total = 0;
  for (int64_t begin = 0; begin < size && total < max_detections; begin += kBoxesPerChunk) {
    const int64_t place = begin + thread;
    Box<T> box{};
    int64_t label = 0;
    bool alive = place < size && boxes.load(place, box, label);
    const T box_area = area(box);
    for (int64_t k = 0; alive && k < total; ++k) {
      const Box<T> other = kept_boxes[k];
      alive = (!class_agnostic && kept_labels[k] != label) ||
              !suppresses(other, box, area(other), box_area);
    }
    chunk_boxes[thread] = box;
    areas[thread] = box_area;
    classes[thread] = label;
    const uint32_t word = __ballot_sync(kFullWarp, alive);
    if (lane == 0) {
      alive_words[warp] = word;
    }
    __syncthreads();
    uint32_t suppressors[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      suppressors[w] = 0;
      uint32_t others = alive && w <= warp ? alive_words[w] : 0;
      if (w == warp) {
        others &= (1u << lane) - 1;
      }
      for (; others != 0; others &= others - 1) {
        const int bit = __ffs(static_cast<int>(others)) - 1, other = w * kWarpSize + bit;
        if ((class_agnostic || classes[other] == label) &&
            suppresses(chunk_boxes[other], box, areas[other], box_area)) {
          suppressors[w] |= 1u << bit;
        }
      }
    }
    const bool keep = settle_chunk(alive, suppressors);
    const Count count = count_flags(keep);
    const int64_t at = total + count.before;
    if (keep && at < max_detections) {
      kept_boxes[at] = box;
      kept_labels[at] = label;
      kept(at, place);
    }
    total = total + count.total < max_detections ? total + count.total : max_detections;
    __syncthreads();  // kept boxes are written, those of the chunk have been read
  }
  return total;
}

}  // namespace
}  // namespace focalops
