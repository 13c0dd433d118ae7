// FCOS' assignment on the CPU, in parallel over images and chunks of points, with vectors over the
// points of a tile. Tiles are laid out once for all images. Neighbouring points lie close together,
// so that most boxes miss the range of a tile as a whole and are skipped, as are those whose size
// no point of the level can have.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "../checks/assign.h"
#include "../math/assign.h"
#include "ground_truth.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kTile = 128;  // points
constexpr int64_t kLanes = 16;  // of a tile's range
constexpr int64_t kTilesPerTask = 16, kTilesPerLoad = 128;

// Consecutive points of a level.
template <typename T>
struct PointTile {
  alignas(64) T x[kTile], y[kTile];  // past the end NaN, which is inside nothing
  Box<T> range;                      // that holds all points; a NaN is in no range
  int64_t begin, size;
};

template <typename T>
FOCALOPS_SIMD void load_tile(const T* points, PointTile<T>& tile) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < tile.size; ++i) {
    tile.x[i] = points[2 * (tile.begin + i)];
    tile.y[i] = points[2 * (tile.begin + i) + 1];
  }
  for (int64_t i = tile.size; i < kTile; ++i) {
    tile.x[i] = tile.y[i] = std::numeric_limits<T>::quiet_NaN();
  }
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    x1[lane] = y1[lane] = kInfinity;
    x2[lane] = y2[lane] = -kInfinity;
  }
  for (int64_t i = 0; i < kTile; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      x1[lane] = min_of(tile.x[i + lane], x1[lane]);
      y1[lane] = min_of(tile.y[i + lane], y1[lane]);
      x2[lane] = max_of(tile.x[i + lane], x2[lane]);
      y2[lane] = max_of(tile.y[i + lane], y2[lane]);
    }
  }
  tile.range = {kInfinity, kInfinity, -kInfinity, -kInfinity};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    tile.range = {min_of(x1[lane], tile.range.x1), min_of(y1[lane], tile.range.y1),
                  max_of(x2[lane], tile.range.x2), max_of(y2[lane], tile.range.y2)};
  }
}

// Tiles of one level.
struct Piece {
  size_t level;
  int64_t begin, end;
};

// The tiles of all points, level by level, in pieces.
template <typename T>
struct PointTiles {
  std::vector<PointTile<T>> tiles;
  std::vector<Piece> pieces;

  PointTiles(const T* points, const std::vector<int64_t>& level_sizes) {
    int64_t count = 0;
    for (const int64_t size : level_sizes) {
      count += (size + kTile - 1) / kTile;
    }
    tiles.resize(count);
    int64_t tile = 0, begin = 0;
    for (size_t level = 0; level < level_sizes.size(); ++level) {
      const int64_t first = tile, end = begin + level_sizes[level];
      for (; begin < end; ++tile) {
        tiles[tile].begin = begin;
        tiles[tile].size = std::min(kTile, end - begin);
        begin += tiles[tile].size;
      }
      for (int64_t t = first; t < tile; t += kTilesPerTask) {
        pieces.push_back({level, t, std::min(t + kTilesPerTask, tile)});
      }
    }
    torch::stable::parallel_for(0, count, kTilesPerLoad, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        load_tile(points, tiles[t]);
      }
    });
  }
};

// What the points of a tile have found.
template <typename T>
struct Found {
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t,
                                   int32_t>;  // as wide as T, for the vector lanes

  alignas(64) T worth[kTile];  // of the best box so far
  alignas(64) Index match[kTile];
  alignas(64) Index in_crowd[kTile];
  bool any = false;  // where not, there is nothing to be read

  void clear() {
    std::fill(worth, worth + kTile, -std::numeric_limits<T>::infinity());
    std::fill(match, match + kTile, -1);
    std::fill(in_crowd, in_crowd + kTile, 0);
    any = true;
  }
};

// Takes one box into account; of equal ones the first keeps the point.
template <typename Rule, typename T>
FOCALOPS_SIMD void match_box(const FcosBox<T>& of, typename Found<T>::Index index,
                             const FcosLevel<T>& level, const PointTile<T>& tile, Found<T>& found) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    const bool is_better = fcos_matches<Rule>({tile.x[i], tile.y[i]}, of, level) &
                           (of.worth > found.worth[i]) & (found.in_crowd[i] == 0);
    found.worth[i] = is_better ? of.worth : found.worth[i];
    found.match[i] = is_better ? index : found.match[i];
  }
}

template <typename T>
FOCALOPS_SIMD void ignore_inside(const Box<T>& crowd, const PointTile<T>& tile, Found<T>& found) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    const bool inside = is_inside({tile.x[i], tile.y[i]}, crowd, T(0));
    found.in_crowd[i] = inside ? 1 : found.in_crowd[i];
    found.match[i] = inside ? -2 : found.match[i];
  }
}

// The ground truth of an image.
template <typename T>
struct ImageBoxes {
  const T* boxes;  // [M, 4]
  int64_t count;
  const bool* crowd;  // [M], null: none is

  Box<T> box(int64_t j) const { return load_box(boxes + 4 * j); }
  bool is_crowd(int64_t j) const { return crowd != nullptr && crowd[j]; }
};

template <typename Rule, typename T>
void assign_piece(const PointTile<T>* tiles, int64_t count, const FcosLevel<T>& level,
                  const ImageBoxes<T>& truth, int64_t* matches) {
  std::vector<Box<T>> crowds;
  std::vector<std::pair<FcosBox<T>, int64_t>> objects;
  for (int64_t j = 0; j < truth.count; ++j) {
    if (truth.is_crowd(j)) {
      crowds.push_back(truth.box(j));
    } else if (may_fit(truth.box(j), level)) {
      objects.push_back({fcos_box<Rule>(truth.box(j)), j});
    }
  }
  Found<T> found;
  for (const PointTile<T>* tile = tiles; tile < tiles + count; ++tile) {
    found.any = false;
    const auto prepare = [&] {
      if (!found.any) {
        found.clear();
      }
    };
    for (const Box<T>& crowd : crowds) {
      if (intersects(crowd, tile->range)) {
        prepare();
        ignore_inside(crowd, *tile, found);
      }
    }
    for (const auto& [of, j] : objects) {
      if (intersects(of.box, tile->range) &
          Rule::may_be_near(tile->range, of.center, level.reach)) {
        prepare();
        match_box<Rule>(of, static_cast<typename Found<T>::Index>(j), level, *tile, found);
      }
    }
    int64_t* to = matches + tile->begin;
    if (found.any) {
      std::copy(found.match, found.match + tile->size, to);
    } else {
      std::fill(to, to + tile->size, -1);
    }
  }
}

Tensor assign_fcos_cpu(const Tensor& points_, const Tensor& gt_boxes_,
                       const std::optional<Tensor>& counts_, const std::optional<Tensor>& crowd_,
                       const std::vector<int64_t>& level_sizes, const std::vector<double>& strides,
                       const std::vector<double>& least, const std::vector<double>& most,
                       double center_radius, int64_t rule) {
  const FcosOptions options{level_sizes, strides, least, most, center_radius, rule};
  check_assign_fcos(points_, gt_boxes_, counts_, crowd_, options);
  const Tensor points = torch::stable::contiguous(points_),
               gt_boxes = torch::stable::contiguous(gt_boxes_);
  const std::optional<Tensor> crowd = contiguous(crowd_);
  const std::vector<int64_t> counts = read_counts("assign_fcos", gt_boxes, counts_);
  const int64_t num_images = gt_boxes.size(0), max_boxes = gt_boxes.size(1),
                num_points = points.size(0);
  Tensor matches = torch::stable::new_empty(points, {num_images, num_points}, ScalarType::Long);
  dispatch_compute(points.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto* point_data = static_cast<const T*>(points.const_data_ptr());
    const auto* box_data = static_cast<const T*>(gt_boxes.const_data_ptr());
    const auto* crowd_data = data_of<bool>(crowd);
    auto* match_data = data_of<int64_t>(matches);
    const std::vector<FcosLevel<T>> levels = fcos_levels<T>(options);
    const PointTiles<T> of(point_data, level_sizes);
    const auto num_pieces = static_cast<int64_t>(of.pieces.size());
    torch::stable::parallel_for(0, num_images * num_pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / num_pieces;
        const Piece& piece = of.pieces[task % num_pieces];
        const ImageBoxes<T> truth{box_data + 4 * b * max_boxes, counts[b],
                                  crowd_data == nullptr ? nullptr : crowd_data + b * max_boxes};
        dispatch_fcos(options, [&](auto rule_tag) {
          assign_piece<decltype(rule_tag)>(of.tiles.data() + piece.begin, piece.end - piece.begin,
                                           levels[piece.level], truth, match_data + b * num_points);
        });
      }
    });
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) { m.impl("assign_fcos", TORCH_BOX(&assign_fcos_cpu)); }

}  // namespace focalops
