// FCOS' assignment on the CPU, in parallel over images and chunks of points, with vectors over the
// points of a tile. Neighbouring points lie close together, so that most boxes miss the range of a
// tile as a whole and are skipped.
#include <algorithm>
#include <limits>

#include "../checks/assign.h"
#include "../math/assign.h"
#include "ground_truth.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kTile = 128;  // points in the buffers of one thread
constexpr int64_t kTilesPerTask = 16;

template <typename T>
struct PointTile {
  using Index = std::conditional_t<std::is_same_v<T, double>, int64_t,
                                   int32_t>;  // as wide as T, for the vector lanes

  alignas(64) T x[kTile], y[kTile];
  alignas(64) T worth[kTile];  // of the best box so far
  alignas(64) Index match[kTile];
  alignas(64) Index in_crowd[kTile];
  Box<T> range;  // that holds all points; a NaN is in no range
};

// Past the end of the points there are NaNs, which are inside nothing.
template <typename T>
FOCALOPS_SIMD void load_tile(const T* points, int64_t n, PointTile<T>& tile) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  Box<T> range{kInfinity, kInfinity, -kInfinity, -kInfinity};
  for (int64_t i = 0; i < n; ++i) {
    tile.x[i] = points[2 * i];
    tile.y[i] = points[2 * i + 1];
    range.x1 = min_of(tile.x[i], range.x1);
    range.y1 = min_of(tile.y[i], range.y1);
    range.x2 = max_of(tile.x[i], range.x2);
    range.y2 = max_of(tile.y[i], range.y2);
  }
  for (int64_t i = n; i < kTile; ++i) {
    tile.x[i] = tile.y[i] = std::numeric_limits<T>::quiet_NaN();
  }
  for (int64_t i = 0; i < kTile; ++i) {
    tile.worth[i] = -kInfinity;
    tile.match[i] = -1;
    tile.in_crowd[i] = 0;
  }
  tile.range = range;
}

// Takes one box into account; of equal ones the first keeps the point.
template <typename Rule, typename T>
FOCALOPS_SIMD void match_box(const FcosBox<T>& of, typename PointTile<T>::Index index,
                             const FcosLevel<T>& level, PointTile<T>& tile) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    const bool is_better = fcos_matches<Rule>({tile.x[i], tile.y[i]}, of, level) &
                           (of.worth > tile.worth[i]) & (tile.in_crowd[i] == 0);
    tile.worth[i] = is_better ? of.worth : tile.worth[i];
    tile.match[i] = is_better ? index : tile.match[i];
  }
}

template <typename T>
FOCALOPS_SIMD void ignore_inside(const Box<T>& crowd, PointTile<T>& tile) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < kTile; ++i) {
    const bool inside = is_inside({tile.x[i], tile.y[i]}, crowd, T(0));
    tile.in_crowd[i] = inside ? 1 : tile.in_crowd[i];
    tile.match[i] = inside ? -2 : tile.match[i];
  }
}

// The ground truth of an image.
template <typename T>
struct ImageBoxes {
  const T* boxes;  // [M, 4]
  int64_t count;
  const bool* crowd;  // [M], null: none is

  // Calls f(box, index) with the crowds, or with the others, that meet the range.
  template <typename F>
  void for_each(bool is_crowd, const Box<T>& range, const F& f) const {
    for (int64_t j = 0; j < count; ++j) {
      const Box<T> box = load_box(boxes + 4 * j);
      if (intersects(box, range) && (crowd != nullptr && crowd[j]) == is_crowd) {
        f(box, j);
      }
    }
  }
};

// Consecutive points of one level.
struct Piece {
  size_t level;
  int64_t begin, end;
};

std::vector<Piece> pieces_of(const std::vector<int64_t>& level_sizes) {
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (size_t level = 0; level < level_sizes.size(); ++level) {
    for (const int64_t end = begin + level_sizes[level]; begin < end;) {
      const int64_t next = std::min(begin + kTile * kTilesPerTask, end);
      pieces.push_back({level, begin, next});
      begin = next;
    }
  }
  return pieces;
}

template <typename Rule, typename T>
void assign_piece(const T* points, const Piece& piece, const FcosLevel<T>& level,
                  const ImageBoxes<T>& truth, int64_t* matches) {
  using Index = typename PointTile<T>::Index;
  PointTile<T> tile;
  for (int64_t begin = piece.begin; begin < piece.end; begin += kTile) {
    const int64_t n = std::min(kTile, piece.end - begin);
    load_tile(points + 2 * begin, n, tile);
    if (truth.crowd != nullptr) {
      truth.for_each(true, tile.range,
                     [&](const Box<T>& box, int64_t) { ignore_inside(box, tile); });
    }
    truth.for_each(false, tile.range, [&](const Box<T>& box, int64_t j) {
      match_box<Rule>(fcos_box<Rule>(box), static_cast<Index>(j), level, tile);
    });
    std::copy(tile.match, tile.match + n, matches + begin);
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
  const std::vector<Piece> pieces = pieces_of(level_sizes);
  const auto num_pieces = static_cast<int64_t>(pieces.size());
  dispatch_compute(points.scalar_type(), [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    const auto* point_data = static_cast<const T*>(points.const_data_ptr());
    const auto* box_data = static_cast<const T*>(gt_boxes.const_data_ptr());
    const auto* crowd_data = data_of<bool>(crowd);
    auto* match_data = data_of<int64_t>(matches);
    const std::vector<FcosLevel<T>> levels = fcos_levels<T>(options);
    torch::stable::parallel_for(0, num_images * num_pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / num_pieces;
        const Piece& piece = pieces[task % num_pieces];
        const ImageBoxes<T> truth{box_data + 4 * b * max_boxes, counts[b],
                                  crowd_data == nullptr ? nullptr : crowd_data + b * max_boxes};
        dispatch_fcos(options, [&](auto rule_tag) {
          assign_piece<decltype(rule_tag)>(point_data, piece, levels[piece.level], truth,
                                           match_data + b * num_points);
        });
      }
    });
  });
  return matches;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) { m.impl("assign_fcos", TORCH_BOX(&assign_fcos_cpu)); }

}  // namespace focalops
