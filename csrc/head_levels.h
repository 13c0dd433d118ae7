// The levels of a dense head, read where the head left them.
//
// An image's labels are ordered level, row, column, anchor. A level in memory is
//     channels_last   (B, H, W, A, K): an image is H * W * A contiguous rows of K logits;
//     contiguous      (B, A, K, H, W): an image is A * K contiguous planes of H * W logits.
#pragma once

#include <vector>

#include "dtypes.h"

namespace focalops {

constexpr size_t kMaxLevels = 8;

// What the levels of a head have in common.
struct HeadShape {
  int64_t images, anchors, classes;  // anchors of a position
  int64_t rows;                      // of an image, over all levels: one an anchor
};

// (B, C, H, W) in memory as (B, H, W, C).
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) {
    return false;
  }
  int64_t stride = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) != 1 && tensor.stride(d) != stride) {
      return false;
    }
    stride *= tensor.size(d);
  }
  return true;
}

struct HeadLevel {
  Tensor tensor;
  bool has_rows;      // channels_last; else it has planes
  int64_t positions;  // H * W
  int64_t first_row;  // the level's first in an image's labels
};

// Takes levels that have been checked, and makes one that lies neither way contiguous. Where
// H = W = 1 both layouts are the same memory: it counts as rows, which are longer than planes.
inline std::vector<HeadLevel> head_levels(const std::vector<Tensor>& tensors,
                                          const HeadShape& head) {
  std::vector<HeadLevel> levels;
  int64_t first_row = 0;
  for (const Tensor& tensor : tensors) {
    const bool has_rows = is_channels_last(tensor);
    const int64_t positions = tensor.size(2) * tensor.size(3);
    levels.push_back(
        {has_rows ? tensor : torch::stable::contiguous(tensor), has_rows, positions, first_row});
    first_row += positions * head.anchors;
  }
  return levels;
}

}  // namespace focalops
