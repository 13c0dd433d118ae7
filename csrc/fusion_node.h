// The maps of a node of a BiFPN, read where they lie.
//
// Both layouts are planes of pixels: contiguous maps have B * C planes of pixels of one number,
// channels_last ones B planes of pixels of C numbers. The first map says which it is.
#pragma once

#include <vector>

#include "checks/fusion.h"
#include "head_levels.h"

namespace focalops {

struct FusionMap {
  Tensor tensor;
  Resampling resampling;
  int64_t height, width;
  int64_t pad_y, pad_x;  // rows and columns of -inf before a map that is pooled
};

struct FusionNode {
  std::vector<FusionMap> maps;
  int64_t planes, height, width, pixel;  // pixel: numbers of one
  ScalarType dtype;
  bool channels_last;

  int64_t row() const { return width * pixel; }
  int64_t rows() const { return row() == 0 ? 0 : planes * height; }
};

inline Tensor laid_out(const Tensor& tensor, bool channels_last) {
  if (channels_last) {
    return is_channels_last(tensor)
               ? tensor
               : torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
  }
  return torch::stable::contiguous(tensor);
}

// Takes features that have been checked, and copies one that does not lie as the first does.
inline FusionNode fusion_node(const std::vector<Tensor>& features, bool symmetric) {
  const auto padding = [&](int64_t size) { return symmetric || size % 2 == 1 ? 1 : 0; };
  const Tensor& first = features[0];
  const bool rows = is_channels_last(first);
  const int64_t channels = first.size(1);
  FusionNode node{{},
                  rows ? first.size(0) : first.size(0) * channels,
                  first.size(2),
                  first.size(3),
                  rows ? channels : 1,
                  first.scalar_type(),
                  rows};
  for (const Tensor& feature : features) {
    const int64_t height = feature.size(2), width = feature.size(3);
    node.maps.push_back({laid_out(feature, rows),
                         static_cast<Resampling>(resampling_of(feature, first)), height, width,
                         padding(height), padding(width)});
  }
  return node;
}

}  // namespace focalops
