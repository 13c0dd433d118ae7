// Points that are the crossings of columns and rows, as those of a feature map are: a box holds
// some columns and some rows of them.
#pragma once

#include <vector>

#include "../head_levels.h"
#include "../math/assign.h"
#include "simd.h"

namespace focalops {
namespace {

template <typename T>
FOCALOPS_SIMD bool are_a_row(const T* points, const T* x, T y, int64_t n) {
  int differing = 0;
  for (int64_t i = 0; i < n; ++i) {
    differing += (points[2 * i] != x[i]) | (points[2 * i + 1] != y);
  }
  return differing == 0;
}

struct Interval {
  int32_t begin, end;
};

// Of places in ascending order those that are inside. Differences, rounded as they are, keep that
// order: those that are not too low are the last ones, and those that are not too high the first.
template <typename T>
FOCALOPS_SIMD Interval places_inside(const T* places, int32_t n, T low, T high, T margin) {
  int32_t begin = 0, end = 0;
  for (int32_t i = 0; i < n; ++i) {
    begin += !(sub(places[i], low) > margin);
    end += sub(high, places[i]) > margin;
  }
  return {begin, end};
}

class PointGrid {
 public:
  // The longest one from the first of the points on; of no rows where that is a NaN.
  PointGrid(const float* points, int64_t first, int64_t num_points) : first_(first) {
    const auto x = [&](int64_t i) { return points[2 * i]; };
    const auto y = [&](int64_t i) { return points[2 * i + 1]; };
    for (int64_t i = first; i < num_points && y(i) == y(first) && x(i) == x(i); ++i) {
      if (i > first && !(x(i) > x_.back())) {
        break;
      }
      x_.push_back(x(i));
    }
    for (int64_t i = first; columns() > 0 && i + columns() <= num_points; i += columns()) {
      if ((i > first && !(y(i) > y_.back())) ||
          !are_a_row(points + 2 * i, x_.data(), y(i), columns())) {
        break;
      }
      y_.push_back(y(i));
    }
  }

  int64_t columns() const { return static_cast<int64_t>(x_.size()); }
  int64_t size() const { return columns() * static_cast<int64_t>(y_.size()); }

  // Calls f(first, number) with the points inside of the box, row by row.
  template <typename F>
  void for_each_inside(const Box<float>& box, float margin, const F& f) const {
    const Interval inside = find(x_, box.x1, box.x2, margin);
    if (inside.begin >= inside.end) {
      return;
    }
    const Interval rows = find(y_, box.y1, box.y2, margin);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      f(first_ + row * columns() + inside.begin, int64_t{inside.end} - inside.begin);
    }
  }

 private:
  static Interval find(const std::vector<float>& places, float low, float high, float margin) {
    return places_inside(places.data(), static_cast<int32_t>(places.size()), low, high, margin);
  }

  int64_t first_;
  std::vector<float> x_, y_;  // of columns and rows, ascending
};

// All points, as few grids; none where they are none or too many.
inline std::vector<PointGrid> grids_of(const float* points, int64_t num_points) {
  std::vector<PointGrid> grids;
  for (int64_t first = 0; first < num_points; first += grids.back().size()) {
    if (grids.size() == kMaxLevels) {
      return {};
    }
    grids.emplace_back(points, first, num_points);
    if (grids.back().size() == 0) {
      return {};
    }
  }
  return grids;
}

}  // namespace
}  // namespace focalops
