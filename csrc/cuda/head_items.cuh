// Kernels over a head's levels cut them into items of one image of one level each, numbered level
// by level and image by image, and find an item's place by its number.
#pragma once

#include <cstdint>

#include "../head_levels.h"
#include "launch.cuh"

namespace focalops {

struct ItemPlace {
  int level;
  int64_t image;
  int64_t part;  // of the image
};

// A head has num_levels `levels`, each of which knows first_item and items_of_image.
template <typename Head>
__device__ __forceinline__ ItemPlace place_of_item(const Head& head, int64_t item) {
  int l = 0;
  while (l + 1 < head.num_levels && item >= head.levels[l + 1].first_item) {
    ++l;
  }
  const auto& level = head.levels[l];
  const int64_t image = (item - level.first_item) / level.items_of_image;
  return {l, image, item - level.first_item - image * level.items_of_image};
}

// A level as the kernels of the dense losses see it.
struct LossLevel {
  const void* data;  // logits or deltas
  void* grad;        // null: not wanted
  int64_t positions;
  int64_t first_row;
  int64_t first_item;
  int64_t items_of_image;
  FastDivisor vectors_of_plane{1};
  bool has_rows;
};

// Appends a level to a head. items_of_image(level, vectors) is told of how many vectors a plane
// consists.
template <typename scalar_t, typename Head, typename ItemsOfImage>
void append_level(Head& head, const HeadLevel& from, void* grad, int64_t images,
                  const ItemsOfImage& items_of_image) {
  const int64_t vectors = ceil_div(from.positions, kVectorSize<scalar_t>);
  LossLevel& to = head.levels[head.num_levels++];
  to.data = from.tensor.const_data_ptr();
  to.grad = grad;
  to.positions = from.positions;
  to.first_row = from.first_row;
  to.first_item = head.num_items;
  to.items_of_image = items_of_image(from, vectors);
  to.vectors_of_plane = FastDivisor(vectors > 0 ? vectors : 1);
  to.has_rows = from.has_rows;
  head.num_items += images * to.items_of_image;
}

}  // namespace focalops
