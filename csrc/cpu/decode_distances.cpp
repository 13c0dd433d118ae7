// Boxes from the distances, or the distributions of distances, of a head's levels on the CPU, where
// the head left them.
//
// Sides are the lanes of bins.h. In planes (contiguous) those of one side of neighbouring positions
// lie side by side; in rows (channels_last) neighbouring lanes are the four sides of a position, a
// row of bins apart. Work is cut into stretches of lanes of one image of one level.
#include <algorithm>
#include <vector>

#include "../checks/distances.h"
#include "../head_levels.h"
#include "bins.h"
#include "memory.h"

namespace focalops {
namespace {

constexpr int64_t kLanes = 256;
constexpr int64_t kLanesOfRows = 128;
constexpr int64_t kGrain = 8;  // stretches

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a stretch has of each lane.
template <typename T>
struct Lanes {
  std::vector<T> bins;  // logits, then their exponentials: [bins, kLanes]
  alignas(64) T largest[kLanes], sum[kLanes], weighted[kLanes], distance[kLanes], factor[kLanes];

  explicit Lanes(int64_t num_bins) : bins(num_bins * kLanes) {}

  T* of_bin(int64_t bin) { return bins.data() + bin * kLanes; }
};

template <typename T>
FOCALOPS_SIMD void add_weighted(const T* exponential, T bin, int64_t n, T* weighted) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    weighted[i] += bin * exponential[i];
  }
}

template <typename T>
FOCALOPS_SIMD void expectations(const Lanes<T>& lanes, int64_t n, T* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = Expectation<T>{lanes.largest[i], lanes.sum[i], lanes.weighted[i]}.value();
  }
}

// d distance / d logit = p (bin - distance), times `factor`, the gradient of the distance over the
// sum of the exponentials.
template <typename T, typename scalar_t>
FOCALOPS_SIMD void gradients_of_bin(const T* exponential, T bin, const T* distance, const T* factor,
                                    int64_t step, int64_t n, scalar_t* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i * step] = static_cast<scalar_t>(factor[i] * exponential[i] * (bin - distance[i]));
  }
}

struct Head {
  HeadShape shape;
  std::vector<HeadLevel> levels;
  Tensor points;  // contiguous, as the sizes
  std::vector<double> strides;
  int64_t bins;
  std::optional<Tensor> image_sizes;

  Head(const HeadShape& shape, const std::vector<Tensor>& levels, const Tensor& points,
       const std::vector<double>& strides, int64_t bins, const std::optional<Tensor>& image_sizes)
      : shape(shape),
        levels(head_levels(levels, shape)),
        points(torch::stable::contiguous(points)),
        strides(strides),
        bins(bins),
        image_sizes(contiguous(image_sizes)) {}
};

// Lanes of one image of one level, and where the first of them is.
struct Stretch {
  size_t level;
  int64_t image;
  int64_t n;
  bool has_rows;
  int side;                 // of planes
  int64_t row;              // of the image
  int64_t logit;            // of the level's tensor
  int64_t of_lane, of_bin;  // from one to the next

  int side_of(int64_t i) const { return has_rows ? static_cast<int>(i % 4) : side; }
  int64_t row_of(int64_t i) const { return row + (has_rows ? i / 4 : i); }
};

// Calls f(stretch, lanes) for each, in parallel; the lanes are a thread's own.
template <typename T, typename F>
void for_each_stretch(const Head& head, const F& f) {
  const auto stretches_of_image = [](const HeadLevel& level) {
    return level.has_rows ? ceil_div(4 * level.positions, kLanesOfRows)
                          : 4 * ceil_div(level.positions, kLanes);
  };
  std::vector<int64_t> first_task{0};  // of each level, and their number
  for (const HeadLevel& level : head.levels) {
    first_task.push_back(first_task.back() + head.shape.images * stretches_of_image(level));
  }
  torch::stable::parallel_for(0, first_task.back(), kGrain, [&](int64_t task, int64_t last) {
    Lanes<T> lanes(head.bins);
    size_t l = 0;
    for (; task < last; ++task) {
      while (task >= first_task[l + 1]) {
        ++l;
      }
      const HeadLevel& level = head.levels[l];
      const int64_t of_image = stretches_of_image(level), positions = level.positions;
      const int64_t image = (task - first_task[l]) / of_image;
      const int64_t part = (task - first_task[l]) % of_image;
      const int64_t of_side = head.bins * positions;
      if (level.has_rows) {
        const int64_t first = part * kLanesOfRows;
        f(Stretch{l, image, std::min(kLanesOfRows, 4 * positions - first), true, 0,
                  level.first_row + first / 4, 4 * image * of_side + first * head.bins, head.bins,
                  1},
          lanes);
      } else {
        const int64_t side = part % 4, first = part / 4 * kLanes;
        f(Stretch{l, image, std::min(kLanes, positions - first), false, static_cast<int>(side),
                  level.first_row + first, (4 * image + side) * of_side + first, 1, positions},
          lanes);
      }
    }
  });
}

// Finds the distances of a stretch, in units of the stride.
template <typename scalar_t, typename T = compute_t<scalar_t>>
void find_distances(const scalar_t* logits, const Stretch& stretch, int64_t bins, Lanes<T>& lanes) {
  const int64_t n = stretch.n;
  std::fill_n(lanes.largest, n, least_logit<T>());
  std::fill_n(lanes.sum, n, T(0));
  std::fill_n(lanes.weighted, n, T(0));
  for (int64_t bin = 0; bin < bins; ++bin) {
    lay_out_bin(logits + stretch.logit + bin * stretch.of_bin, stretch.of_lane, n,
                lanes.of_bin(bin), lanes.largest);
  }
  if (bins == 1) {
    std::copy_n(lanes.of_bin(0), n, lanes.distance);
    return;
  }
  for (int64_t bin = 0; bin < bins; ++bin) {
    add_exponentials(lanes.of_bin(bin), lanes.largest, n, lanes.sum);
    add_weighted(lanes.of_bin(bin), static_cast<T>(bin), n, lanes.weighted);
  }
  expectations(lanes, n, lanes.distance);
}

Tensor decode_distances_cpu(const std::vector<Tensor>& levels, const Tensor& points,
                            const std::vector<double>& strides, int64_t bins,
                            const std::optional<Tensor>& image_sizes) {
  const HeadShape shape = check_decode_distances(levels, points, strides, bins, image_sizes);
  const Head head(shape, levels, points, strides, bins, image_sizes);
  Tensor boxes = on_huge_pages(torch::stable::new_empty(head.points, {shape.images, shape.rows, 4}),
                               head.points.element_size());
  dispatch_floating(levels[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* point_data = static_cast<const T*>(head.points.const_data_ptr());
    const T* sizes = data_of<T>(head.image_sizes);
    T* out = data_of<T>(boxes);
    for_each_stretch<T>(head, [&](const Stretch& stretch, Lanes<T>& lanes) {
      const auto* logits =
          static_cast<const scalar_t*>(head.levels[stretch.level].tensor.const_data_ptr());
      find_distances(logits, stretch, bins, lanes);
      const T stride = static_cast<T>(strides[stretch.level]);
      for (int64_t i = 0; i < stretch.n; ++i) {
        const int side = stretch.side_of(i);
        const int64_t row = stretch.row_of(i);
        const auto bounds = bounds_of_side(sizes, stretch.image, side);
        out[4 * (stretch.image * shape.rows + row) + side] = bounds.clip(
            coordinate_of_side(side, point_data[2 * row + side % 2], stride, lanes.distance[i]));
      }
    });
  });
  return boxes;
}

std::vector<Tensor> decode_distances_backward_cpu(const Tensor& grad_output_,
                                                  const std::vector<Tensor>& levels,
                                                  const Tensor& points,
                                                  const std::vector<double>& strides, int64_t bins,
                                                  const std::optional<Tensor>& image_sizes) {
  const HeadShape shape =
      check_decode_distances_backward(grad_output_, levels, points, strides, bins, image_sizes);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  const Head head(shape, levels, points, strides, bins, image_sizes);
  std::vector<Tensor> grads;
  for (const HeadLevel& level : head.levels) {
    const Tensor& tensor = level.tensor;
    grads.push_back(on_huge_pages(torch::stable::empty_like(tensor), tensor.element_size()));
  }
  dispatch_floating(levels[0].scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* point_data = static_cast<const T*>(head.points.const_data_ptr());
    const auto* upstream_data = static_cast<const T*>(grad_output.const_data_ptr());
    const T* sizes = data_of<T>(head.image_sizes);
    for_each_stretch<T>(head, [&](const Stretch& stretch, Lanes<T>& lanes) {
      const auto* logits =
          static_cast<const scalar_t*>(head.levels[stretch.level].tensor.const_data_ptr());
      scalar_t* grad = data_of<scalar_t>(grads[stretch.level]) + stretch.logit;
      find_distances(logits, stretch, bins, lanes);
      const T stride = static_cast<T>(strides[stretch.level]);
      for (int64_t i = 0; i < stretch.n; ++i) {
        const int side = stretch.side_of(i);
        const int64_t row = stretch.row_of(i);
        const T upstream = upstream_data[4 * (stretch.image * shape.rows + row) + side];
        const T coordinate =
            coordinate_of_side(side, point_data[2 * row + side % 2], stride, lanes.distance[i]);
        lanes.factor[i] = bounds_of_side(sizes, stretch.image, side).passes_gradient(coordinate)
                              ? gradient_of_distance(side, stride, upstream)
                              : T(0);
      }
      if (bins == 1) {
        for (int64_t i = 0; i < stretch.n; ++i) {
          grad[i * stretch.of_lane] = static_cast<scalar_t>(lanes.factor[i]);
        }
        return;
      }
      for (int64_t i = 0; i < stretch.n; ++i) {
        lanes.factor[i] /= lanes.sum[i];
      }
      for (int64_t bin = 0; bin < bins; ++bin) {
        gradients_of_bin(lanes.of_bin(bin), static_cast<T>(bin), lanes.distance, lanes.factor,
                         stretch.of_lane, stretch.n, grad + bin * stretch.of_bin);
      }
    });
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("decode_distances", TORCH_BOX(&decode_distances_cpu));
  m.impl("_decode_distances_backward", TORCH_BOX(&decode_distances_backward_cpu));
}

}  // namespace focalops
