// Boxes in order of score, and class by class.
#pragma once

#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "../dtypes.h"

namespace focalops {
namespace {

struct Item {
  uint64_t key;
  int64_t index;
};

// The sort is stable and ascending. A byte in which all keys agree costs no pass: float32 scores
// take 4, the ids of 80 classes one.
void radix_sort(std::vector<Item>& items) {
  constexpr int kBytes = 8, kValues = 256;
  std::vector<std::array<int64_t, kValues>> counts(kBytes);
  for (const Item& item : items) {
    for (int byte = 0; byte < kBytes; ++byte) {
      ++counts[byte][item.key >> (8 * byte) & 0xff];
    }
  }
  std::vector<Item> sorted(items.size());
  for (int byte = 0; byte < kBytes; ++byte) {
    auto& count = counts[byte];
    if (items.empty() ||
        count[items[0].key >> (8 * byte) & 0xff] == static_cast<int64_t>(items.size())) {
      continue;
    }
    int64_t begin = 0;
    for (int64_t& place : count) {
      begin += std::exchange(place, begin);
    }
    for (const Item& item : items) {
      sorted[count[item.key >> (8 * byte) & 0xff]++] = item;
    }
    items.swap(sorted);
  }
}

// Keys ascend where scores descend; 0 and -0 are equal.
uint64_t descending_key(float score) {
  uint32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

uint64_t descending_key(double score) {
  uint64_t bits;
  score += 0.0;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits >> 63 ? bits : bits ^ 0x7fffffffffffffffu;
}

// The indices of [begin, end) in order of score, without those whose score is a NaN.
std::vector<Item> order_by_score(const Tensor& scores, int64_t begin, int64_t end) {
  std::vector<Item> order;
  order.reserve(end - begin);
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    const auto* data = static_cast<const scalar_t*>(scores.const_data_ptr());
    for (int64_t i = begin; i < end; ++i) {
      const auto score = static_cast<compute_t<scalar_t>>(data[i]);
      if (score == score) {
        order.push_back({descending_key(score), i});
      }
    }
  });
  radix_sort(order);
  return order;
}

// The order sorted by class, inside a class by score; an item's index becomes its place in `order`.
std::vector<Item> group_by_class(const std::vector<Item>& order, const Tensor& idxs) {
  std::vector<Item> grouped(order.size());
  dispatch_index(idxs.scalar_type(), [&](auto tag) {
    const auto* classes = static_cast<const tag_t<decltype(tag)>*>(idxs.const_data_ptr());
    for (size_t i = 0; i < order.size(); ++i) {
      grouped[i] = {static_cast<uint64_t>(classes[order[i].index]), static_cast<int64_t>(i)};
    }
  });
  radix_sort(grouped);
  return grouped;
}

// Places in `grouped` at which a class begins, and its size.
std::vector<int64_t> class_begins(const std::vector<Item>& grouped) {
  std::vector<int64_t> begins;
  for (size_t i = 0; i < grouped.size(); ++i) {
    if (i == 0 || grouped[i].key != grouped[i - 1].key) {
      begins.push_back(i);
    }
  }
  begins.push_back(grouped.size());
  return begins;
}

}  // namespace
}  // namespace focalops
