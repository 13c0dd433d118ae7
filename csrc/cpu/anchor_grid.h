// The anchors of a level whose centers are nearest to a point, for levels whose centers are a grid,
// as those of feature maps are.
//
// Of a grid a few columns and rows around the point hold the nearest crossings. They are found to
// be the nearest before they are taken: what lies outside is in ranges, and is farther than these
// are.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "nearest_anchors.h"

namespace focalops {
namespace {

template <typename T>
FOCALOPS_SIMD bool are_centers(const T* anchors, const T* x, T y, int64_t n) {
  int differing = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Point<T> center = center_of(load_box(anchors + 4 * i));
    differing += (center.x != x[i]) | (center.y != y);
  }
  return differing == 0;
}

// Some columns and rows.
struct Window {
  int64_t left, top, right, bottom;
};

// Centers that are the crossings of columns and rows, row by row from left to right, with as many
// anchors at each.
template <typename T>
struct AnchorGrid {
  int64_t begin;  // the first anchor
  int64_t of_crossing;
  std::vector<T> x, y;                  // of columns and rows, ascending
  T columns_per_pixel, rows_per_pixel;  // on average

  // Nothing where the centers of anchors begin .. end are none.
  static std::optional<AnchorGrid> find(const T* anchors, int64_t begin, int64_t end) {
    if (begin == end) {
      return {};
    }
    const auto center = [&](int64_t i) { return center_of(load_box(anchors + 4 * i)); };
    AnchorGrid grid{begin, 1, {}, {}, 0, 0};
    const Point<T> first = center(begin);
    const auto is_first = [&](const Point<T>& at) { return at.x == first.x && at.y == first.y; };
    while (begin + grid.of_crossing < end && is_first(center(begin + grid.of_crossing))) {
      ++grid.of_crossing;
    }
    std::vector<T> row;  // x of its anchors
    for (int64_t i = begin; i < end; i += grid.of_crossing) {
      const Point<T> at = center(i);
      if (at.y != first.y || !(grid.x.empty() || at.x > grid.x.back())) {
        break;
      }
      grid.x.push_back(at.x);
      row.insert(row.end(), grid.of_crossing, at.x);
    }
    const auto of_row = static_cast<int64_t>(row.size());
    if (of_row == 0 || (end - begin) % of_row != 0) {
      return {};
    }
    for (int64_t i = begin; i < end; i += of_row) {
      const T y = center(i).y;
      if (!(grid.y.empty() || y > grid.y.back()) ||
          !are_centers(anchors + 4 * i, row.data(), y, of_row)) {
        return {};
      }
      grid.y.push_back(y);
    }
    grid.columns_per_pixel = per_pixel(grid.x);
    grid.rows_per_pixel = per_pixel(grid.y);
    return grid;
  }

  int64_t columns() const { return static_cast<int64_t>(x.size()); }
  int64_t rows() const { return static_cast<int64_t>(y.size()); }

  // Twice as many columns as half, or all there are, of which about half lie on either side of the
  // point, and as many rows.
  Window around(const Point<T>& point, int64_t half) const {
    const int64_t left = first_around(point.x, x, columns_per_pixel, half),
                  top = first_around(point.y, y, rows_per_pixel, half);
    return {left, top, std::min(left + 2 * half, columns()), std::min(top + 2 * half, rows())};
  }

  // Calls f(first anchor, center) with the crossings, in ascending order.
  template <typename F>
  void for_each(const Window& window, const F& f) const {
    for (int64_t r = window.top; r < window.bottom; ++r) {
      for (int64_t c = window.left; c < window.right; ++c) {
        f(begin + (r * columns() + c) * of_crossing, Point<T>{x[c], y[r]});
      }
    }
  }

  // At most the distance from the point to each crossing outside of the window: that to the ranges
  // which hold them, whatever is rounded. Infinite where there are none.
  T distance_outside(const Window& window, const Point<T>& point) const {
    T square = std::numeric_limits<T>::infinity();
    const auto leave_out = [&](int64_t left, int64_t top, int64_t right, int64_t bottom) {
      if (left < right && top < bottom) {
        const Box<T> range{x[left], y[top], x[right - 1], y[bottom - 1]};
        square = min_of(squared_distance(point, range), square);
      }
    };
    leave_out(0, 0, window.left, rows());
    leave_out(window.right, 0, columns(), rows());
    leave_out(0, 0, columns(), window.top);
    leave_out(0, window.bottom, columns(), rows());
    return std::sqrt(square);
  }

  void ignore_inside(const Box<T>& crowd, int64_t* matches) const {
    for (int64_t r = 0; r < rows(); ++r) {
      if (intersects(crowd, {x.front(), y[r], x.back(), y[r]})) {
        for_each({0, r, columns(), r + 1}, [&](int64_t i, const Point<T>& center) {
          if (is_inside(center, crowd, T(0))) {
            std::fill(matches + i, matches + i + of_crossing, -2);
          }
        });
      }
    }
  }

 private:
  static T per_pixel(const std::vector<T>& along) {
    return along.size() == 1 ? T(0) : T(along.size() - 1) / (along.back() - along.front());
  }

  static int64_t first_around(T place, const std::vector<T>& along, T per_pixel, int64_t half) {
    const auto n = static_cast<int64_t>(along.size());
    const T before = min_of((place - along.front()) * per_pixel + 1, static_cast<T>(n));  // no NaN
    return std::max<int64_t>(
        std::min(static_cast<int64_t>(max_of(before, T(0))) - half, n - 2 * half), 0);
  }
};

// Crossings in ascending order of their anchors.
template <typename T>
struct Crossings {
  using Rank = std::conditional_t<std::is_same_v<T, double>, int64_t,
                                  int32_t>;  // as wide as T, for the vector lanes
  static constexpr int64_t kMost = 256;
  static constexpr int64_t kVector = 16;

  int32_t anchor[kMost];  // the first of each
  T distance[kMost];
  Rank rank[kMost];
  int32_t order[kMost];
};

// Makes distances of their squares and sorts by (distance, anchor): as many as precede a crossing
// are its rank. Sixteen are compared with each other by vectors sooner than by a list that grows,
// whose branches nobody can foretell.
template <typename T>
FOCALOPS_SIMD void sort_squares(int64_t size, Crossings<T>& of) {
  using Rank = typename Crossings<T>::Rank;
  constexpr int64_t kVector = Crossings<T>::kVector;
  const auto n = static_cast<Rank>(size),
             padded = static_cast<Rank>((size + kVector - 1) / kVector * kVector);
  std::fill(of.distance + n, of.distance + padded, std::numeric_limits<T>::infinity());
  for (Rank i = 0; i < padded; ++i) {
    of.distance[i] = std::sqrt(of.distance[i]);
    of.rank[i] = 0;
  }
  for (Rank j = 0; j < n; ++j) {
    const T distance = of.distance[j];
    for (Rank i = 0; i < padded; ++i) {
      of.rank[i] += (distance < of.distance[i]) | ((distance == of.distance[i]) & (j < i));
    }
  }
  std::fill(of.order, of.order + n, 0);  // NaNs leave places empty
  for (Rank i = 0; i < n; ++i) {
    of.order[of.rank[i]] = static_cast<int32_t>(i);
  }
}

// Takes the nearest of the window, unless others are or may be nearer, or it has too few.
template <typename T>
bool take_nearest(const AnchorGrid<T>& level, const Window& window, const Point<T>& center,
                  const int64_t* ignored, Nearest<T>& nearest) {
  const int64_t last = (nearest.most - 1) / level.of_crossing;  // of the crossings that are taken
  Crossings<T> crossings;
  int64_t n = 0;
  level.for_each(window, [&](int64_t i, const Point<T>& at) {
    const bool is_none = ignored != nullptr && ignored[i] == -2;
    crossings.anchor[n] = static_cast<int32_t>(i);
    crossings.distance[n] =
        is_none ? std::numeric_limits<T>::infinity() : squared_distance(center, at);
    ++n;
  });
  if (last >= n) {
    return false;
  }
  sort_squares(n, crossings);
  const T worst = crossings.distance[crossings.order[last]];
  if (!(worst < level.distance_outside(window, center))) {
    return false;
  }
  for (int64_t rank = 0, at = 0; rank <= last; ++rank) {
    const int32_t anchor = crossings.anchor[crossings.order[rank]];
    for (int64_t a = 0; a < level.of_crossing && at < nearest.most; ++a, ++at) {
      nearest.index[at] = static_cast<int32_t>(anchor + a);
    }
  }
  return true;
}

// As that of tiles.
template <typename T>
int64_t find_nearest(const AnchorGrid<T>& level, const Point<T>& center, const int64_t* ignored,
                     Nearest<T>& nearest) {
  // So many on each side are enough where columns and rows are as far apart, whatever the place
  // between them.
  int64_t half = 1;
  while (9 * half * half * level.of_crossing < 4 * nearest.most) {
    ++half;
  }
  if (take_nearest(level, level.around(center, half), center, ignored, nearest)) {
    return nearest.most;
  }
  for (;; half *= 2) {
    const Window window = level.around(center, half);
    nearest.clear();
    level.for_each(window, [&](int64_t i, const Point<T>& at) {
      if (ignored == nullptr || ignored[i] != -2) {
        const T distance = std::sqrt(squared_distance(center, at));
        for (int64_t a = 0; a < level.of_crossing; ++a) {
          nearest.insert(distance, static_cast<int32_t>(i + a));
        }
      }
    });
    const bool is_all = std::max(level.columns(), level.rows()) <= 2 * half;
    if (is_all || nearest.worst() < level.distance_outside(window, center)) {
      return nearest.count();
    }
  }
}

}  // namespace
}  // namespace focalops
