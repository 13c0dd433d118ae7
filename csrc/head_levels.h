// The levels of a dense head, read where the head left them.
//
// Labels are ordered level, row, column, anchor. A level in memory is
//     channels_last   (B, H, W, A, K): an image is H * W * A contiguous rows of K logits;
//     contiguous      (B, A, K, H, W): an image is A * K contiguous planes of H * W logits.
#pragma once

#include <vector>

#include "checks.h"

namespace focalops {

struct HeadLevel {
  Tensor logits;
  bool has_rows;      // channels_last; else it has planes
  int64_t positions;  // H * W
  int64_t first_row;  // the level's first in an image's labels
};

// Of levels that have been checked; one that lies neither way is made contiguous. Where H = W = 1
// both layouts are the same memory, and rows are longer than planes.
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
