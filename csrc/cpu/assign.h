// What the assigners that choose by what is predicted share: boxes visit tiles of consecutive
// points.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../assign.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kTile = 16;  // points in the vectors of one step

template <typename T>
void atomic_max(T* at, T value) {
  T found = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (found < value && !__atomic_compare_exchange_n(at, &found, value, true, __ATOMIC_RELAXED,
                                                       __ATOMIC_RELAXED)) {
  }
}

// The ranges of tiles of points, or of predicted boxes.
class Ranges {
 public:
  explicit Ranges(int64_t tiles)
      : x1_(tiles, kInfinity),
        y1_(tiles, kInfinity),
        x2_(tiles, -kInfinity),
        y2_(tiles, -kInfinity) {}

  int64_t size() const { return static_cast<int64_t>(x1_.size()); }

  // A NaN is in no range.
  void add(int64_t tile, const Box<float>& box) {
    x1_[tile] = min_of(box.x1, x1_[tile]);
    y1_[tile] = min_of(box.y1, y1_[tile]);
    x2_[tile] = max_of(box.x2, x2_[tile]);
    y2_[tile] = max_of(box.y2, y2_[tile]);
  }

  // Which of tiles begin .. end the box meets.
  template <typename F>
  void for_each(const Box<float>& box, const F& f) const {
    constexpr int64_t kStep = 64;
    alignas(64) uint8_t meets[kStep];
    for (int64_t begin = 0; begin < size(); begin += kStep) {
      const int64_t n = std::min(kStep, size() - begin);
      if (!find(box, begin, n, meets)) {
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        if (meets[i]) {
          f(begin + i);
        }
      }
    }
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  bool find(const Box<float>& box, int64_t begin, int64_t n, uint8_t* meets) const;

  std::vector<float> x1_, y1_, x2_, y2_;
};

template <typename T>
FOCALOPS_SIMD bool meets_ranges(const T* x1, const T* y1, const T* x2, const T* y2,
                                const Box<T>& box, int64_t n, uint8_t* meets) {
  uint8_t any = 0;
  for (int64_t i = 0; i < n; ++i) {
    meets[i] = intersects(box, Box<T>{x1[i], y1[i], x2[i], y2[i]});
    any |= meets[i];
  }
  return any != 0;
}

bool Ranges::find(const Box<float>& box, int64_t begin, int64_t n, uint8_t* meets) const {
  return meets_ranges(x1_.data() + begin, y1_.data() + begin, x2_.data() + begin,
                      y2_.data() + begin, box, n, meets);
}

// The greatest that were offered, in descending order.
class TopK {
 public:
  explicit TopK(int64_t k) : k_(k) {}

  void offer(uint64_t ranked) {
    if (size_ == k_ && ranked <= best_[k_ - 1]) {
      return;
    }
    int64_t i = size_ < k_ ? size_++ : k_ - 1;
    for (; i > 0 && best_[i - 1] < ranked; --i) {
      best_[i] = best_[i - 1];
    }
    best_[i] = ranked;
  }

  bool is_full() const { return size_ == k_; }
  // Of as many as there shall be.
  uint64_t last() const { return best_[k_ - 1]; }

  const uint64_t* begin() const { return best_; }
  const uint64_t* end() const { return best_ + size_; }

 private:
  int64_t k_, size_ = 0;
  uint64_t best_[kMaxTopk];
};

// Calls f(image, begin, end) for the items of each image, so many a task.
template <typename F>
void parallel_over(int64_t images, int64_t items, int64_t of_a_task, const F& f) {
  const int64_t tasks = (items + of_a_task - 1) / of_a_task;
  torch::stable::parallel_for(0, images * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tasks * of_a_task;
      f(task / tasks, first, std::min(first + of_a_task, items));
    }
  });
}

}  // namespace
}  // namespace focalops
