// The anchors of a level whose centers are nearest to a point, for levels of any order.
//
// The centers are laid out coordinate by coordinate in tiles of 16, and 16 tiles are a group.
// Anchors that follow each other lie close together: a point looks at the group and the tile whose
// range is nearest to it first, and then only at those that are nearer than its worst candidate.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "../assign.h"
#include "simd.h"

namespace focalops {
namespace {

// The nearest anchors so far, by (distance, index); where there are fewer, infinitely distant ones
// follow that are none.
template <typename T>
struct Nearest {
  static constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

  int64_t most;
  T distance[kMaxAtssTopk];
  int32_t index[kMaxAtssTopk];
  T limit;  // the square of a distance above it is greater than the worst, rounded as it may be

  FOCALOPS_INLINE inline void clear() {
    limit = std::numeric_limits<T>::infinity();
    std::fill(distance, distance + most, std::numeric_limits<T>::infinity());
    std::fill(index, index + most, kNone);
  }

  FOCALOPS_INLINE inline void insert(T d, int32_t i) {
    const auto is_after = [&](int64_t place) FOCALOPS_INLINE {
      return distance[place] > d || (distance[place] == d && index[place] > i);
    };
    int64_t place = most - 1;
    if (!is_after(place)) {
      return;
    }
    for (; place > 0 && is_after(place - 1); --place) {
      distance[place] = distance[place - 1];
      index[place] = index[place - 1];
    }
    distance[place] = d;
    index[place] = i;
    limit = distance[most - 1] * distance[most - 1] * T(1.000001);
  }

  T worst() const { return distance[most - 1]; }

  int64_t count() const { return std::find(index, index + most, kNone) - index; }
};

constexpr int64_t kTile = 16;      // anchors
constexpr int64_t kGroup = kTile;  // tiles
constexpr int64_t kGroupsPerTask = 64;

// The ranges of 16 tiles or groups; that of nothing is infinitely far away.
template <typename T>
struct Ranges {
  alignas(64) T x1[kGroup], y1[kGroup], x2[kGroup], y2[kGroup];

  void set(int64_t i, const Box<T>& range) {
    x1[i] = range.x1;
    y1[i] = range.y1;
    x2[i] = range.x2;
    y2[i] = range.y2;
  }
};

template <typename T>
constexpr Box<T> kNoRange{std::numeric_limits<T>::infinity(), std::numeric_limits<T>::infinity(),
                          -std::numeric_limits<T>::infinity(), -std::numeric_limits<T>::infinity()};

template <typename T>
struct Tile {
  alignas(64) T x[kTile], y[kTile];  // of the centers; past the end NaN, which is near nothing
};

template <typename T>
struct Group {
  Tile<T> tiles[kGroup];
  Ranges<T> ranges;  // of the tiles
  Box<T> range;
  int64_t begin, end;  // its anchors
};

// A loop over the anchors of a whole tile is vectorised.
template <typename T>
FOCALOPS_SIMD void load_tile(const T* anchors, int64_t n, Tile<T>& tile, Box<T>& range) {
  for (int64_t i = 0; i < n; ++i) {
    const Point<T> center = center_of(load_box(anchors + 4 * i));
    tile.x[i] = center.x;
    tile.y[i] = center.y;
  }
  for (int64_t i = std::max<int64_t>(n, 0); i < kTile; ++i) {
    tile.x[i] = tile.y[i] = std::numeric_limits<T>::quiet_NaN();
  }
  range = kNoRange<T>;
  for (int64_t i = 0; i < kTile; ++i) {  // a NaN is in no range
    range = {min_of(tile.x[i], range.x1), min_of(tile.y[i], range.y1), max_of(tile.x[i], range.x2),
             max_of(tile.y[i], range.y2)};
  }
}

template <typename T>
void load_group(const T* anchors, Group<T>& group) {
  group.range = kNoRange<T>;
  for (int64_t t = 0; t < kGroup; ++t) {
    const int64_t begin = group.begin + t * kTile;
    Box<T> range;
    load_tile(anchors + 4 * begin, std::min(kTile, group.end - begin), group.tiles[t], range);
    group.ranges.set(t, range);
    group.range = {min_of(range.x1, group.range.x1), min_of(range.y1, group.range.y1),
                   max_of(range.x2, group.range.x2), max_of(range.y2, group.range.y2)};
  }
}

// Anchors begin .. end, 9 bytes each of float.
template <typename T>
struct AnchorTiles {
  std::vector<Group<T>> groups;
  std::vector<Ranges<T>> ranges;  // of the groups

  AnchorTiles(const T* anchors, int64_t begin, int64_t end)
      : groups((end - begin + kGroup * kTile - 1) / (kGroup * kTile)),
        ranges((groups.size() + kGroup - 1) / kGroup) {
    const auto num_groups = static_cast<int64_t>(groups.size());
    torch::stable::parallel_for(0, num_groups, kGroupsPerTask, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        groups[g].begin = begin + g * kGroup * kTile;
        groups[g].end = std::min(groups[g].begin + kGroup * kTile, end);
        load_group(anchors, groups[g]);
      }
    });
    for (int64_t g = 0; g < kGroup * static_cast<int64_t>(ranges.size()); ++g) {
      ranges[g / kGroup].set(g % kGroup, g < num_groups ? groups[g].range : kNoRange<T>);
    }
  }

  void ignore_inside(const Box<T>& crowd, int64_t* matches) const {
    for (const Group<T>& group : groups) {
      if (!intersects(crowd, group.range)) {
        continue;
      }
      for (int64_t i = group.begin; i < group.end; ++i) {
        const int64_t place = i - group.begin;
        const Tile<T>& tile = group.tiles[place / kTile];
        if (is_inside({tile.x[place % kTile], tile.y[place % kTile]}, crowd, T(0))) {
          matches[i] = -2;
        }
      }
    }
  }
};

// Calls f with the places of the squares that are not above the limit, in ascending order. Flags of
// a byte each are made by vectors, and eight at a time are looked at.
template <typename T, typename F>
FOCALOPS_INLINE inline void for_each_near(const T* squares, T limit, const F& f) {
  uint8_t flags[kTile];
  for (int i = 0; i < kTile; ++i) {
    flags[i] = squares[i] <= limit;
  }
  for (int begin = 0; begin < kTile; begin += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + begin, sizeof eight);
    if (eight == 0) {
      continue;
    }
    for (int i = begin; i < begin + 8; ++i) {
      if (flags[i]) {
        f(i);
      }
    }
  }
}

template <typename T>
FOCALOPS_INLINE inline void visit_tile(const Tile<T>& tile, int32_t first, const Point<T>& center,
                                       const int64_t* ignored, Nearest<T>& nearest) {
  T squares[kTile];
  for (int i = 0; i < kTile; ++i) {
    squares[i] = squared_distance(center, Point<T>{tile.x[i], tile.y[i]});
  }
  for_each_near(squares, nearest.limit, [&](int32_t i) FOCALOPS_INLINE {
    if (squares[i] <= nearest.limit && (ignored == nullptr || ignored[first + i] != -2)) {
      nearest.insert(std::sqrt(squares[i]), first + i);
    }
  });
}

// Calls f with the place of the nearest range, and then of the others that may hold something
// nearer than the worst of the list.
template <typename T, typename F>
FOCALOPS_INLINE inline void visit_ranges(const Ranges<T>* ranges, int64_t count,
                                         const Point<T>& center, const Nearest<T>& nearest,
                                         const F& f) {
  T squares[kGroup];
  const auto measure = [&](const Ranges<T>& of) FOCALOPS_INLINE {
    for (int i = 0; i < kGroup; ++i) {
      squares[i] = squared_distance(center, Box<T>{of.x1[i], of.y1[i], of.x2[i], of.y2[i]});
    }
  };
  int64_t first = 0;
  T least = std::numeric_limits<T>::infinity();
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    measure(ranges[begin / kGroup]);
    for (int64_t i = 0; i < kGroup; ++i) {
      const bool is_nearer = (squares[i] < least) & (begin + i < count);
      first = is_nearer ? begin + i : first;
      least = is_nearer ? squares[i] : least;
    }
  }
  f(first);
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    if (count > kGroup) {
      measure(ranges[begin / kGroup]);
    }
    for_each_near(squares, nearest.limit, [&](int64_t i) FOCALOPS_INLINE {
      if (begin + i != first && begin + i < count && squares[i] <= nearest.limit) {
        f(begin + i);
      }
    });
  }
}

// How many there are, which are not more than the list takes. ignored: null, or -2 where an anchor
// is not to be found.
template <typename T>
FOCALOPS_SIMD int64_t find_nearest(const AnchorTiles<T>& level, const Point<T>& center,
                                   const int64_t* ignored, Nearest<T>& nearest) {
  nearest.clear();
  const auto num_groups = static_cast<int64_t>(level.groups.size());
  if (num_groups == 0) {
    return 0;
  }
  visit_ranges(level.ranges.data(), num_groups, center, nearest, [&](int64_t g) FOCALOPS_INLINE {
    const Group<T>& group = level.groups[g];
    const int64_t tiles = (group.end - group.begin + kTile - 1) / kTile;
    visit_ranges(&group.ranges, tiles, center, nearest, [&](int64_t t) FOCALOPS_INLINE {
      visit_tile(group.tiles[t], static_cast<int32_t>(group.begin + t * kTile), center, ignored,
                 nearest);
    });
  });
  return nearest.count();
}

}  // namespace
}  // namespace focalops
