// Boxes from the distances, or the distributions of distances, of a head's levels on the CPU, where
// the head left them.
//
// Positions are lanes: a loop over them adds a bin's logits to what each has of the bins before.
// Where the layout has neighbouring positions apart, or the dtype is half precision, the logits of
// a bin are put side by side first. Work is cut into stretches of positions of one image of one
// level.
#include <algorithm>
#include <vector>

#include "../checks/distances.h"
#include "../head_levels.h"
#include "../math/distances.h"
#include "memory.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kLanes = 128;
constexpr int64_t kGrain = 8;  // stretches

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
struct ExpectationLanes {
  alignas(64) T largest[kLanes], sum[kLanes], weighted[kLanes];

  FOCALOPS_HOST_DEVICE Expectation<T> at(int64_t i) const {
    return {largest[i], sum[i], weighted[i]};
  }
  FOCALOPS_HOST_DEVICE void put(int64_t i, const Expectation<T>& expectation) {
    largest[i] = expectation.largest;
    sum[i] = expectation.sum;
    weighted[i] = expectation.weighted;
  }
};

template <typename T>
FOCALOPS_SIMD void add_bin(const T* x, T bin, int64_t n, ExpectationLanes<T>& lanes) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    Expectation<T> expectation = lanes.at(i);
    expectation.add(x[i], bin);
    lanes.put(i, expectation);
  }
}

template <typename T>
FOCALOPS_SIMD void values_of(const ExpectationLanes<T>& lanes, int64_t n, T* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = lanes.at(i).value();
  }
}

// d value / d x = p (bin - value), times `factor`, that of the value over the sum.
template <typename T>
FOCALOPS_SIMD void gradients_of_bin(const T* x, T bin, const ExpectationLanes<T>& lanes,
                                    const T* value, const T* factor, int64_t n, T* out) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    out[i] = factor[i] * detail::exp_nonpositive(x[i] - lanes.largest[i]) * (bin - value[i]);
  }
}

template <typename From, typename To>
FOCALOPS_SIMD void gather(const From* from, int64_t step, int64_t n, To* to) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(from[i * step]);
  }
}

template <typename From, typename To>
FOCALOPS_SIMD void scatter(const From* from, int64_t step, int64_t n, To* to) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    to[i * step] = static_cast<To>(from[i]);
  }
}

// The logits of a bin side by side: in the buffer where they do not lie so.
template <typename scalar_t, typename T>
const T* side_by_side(const scalar_t* from, int64_t step, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    if (step == 1) {
      return from;
    }
  }
  gather(from, step, n, buffer);
  return buffer;
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

// Positions of one side of one image of one level.
struct Stretch {
  size_t level;
  int64_t image;
  int side;
  int64_t n;
  int64_t logit;                // the first of the level's tensor
  int64_t of_position, of_bin;  // from one to the next
  int64_t row;                  // the first of the image's
};

// Calls f(stretch) for each side of each stretch, in parallel.
template <typename F>
void for_each_stretch(const Head& head, const F& f) {
  std::vector<int64_t> first_task{0};  // of each level, and their number
  for (const HeadLevel& level : head.levels) {
    first_task.push_back(first_task.back() + head.shape.images * ceil_div(level.positions, kLanes));
  }
  torch::stable::parallel_for(0, first_task.back(), kGrain, [&](int64_t task, int64_t last) {
    size_t l = 0;
    for (; task < last; ++task) {
      while (task >= first_task[l + 1]) {
        ++l;
      }
      const HeadLevel& level = head.levels[l];
      const int64_t stretches = ceil_div(level.positions, kLanes);
      const int64_t image = (task - first_task[l]) / stretches;
      const int64_t first = (task - first_task[l]) % stretches * kLanes;
      const int64_t of_position = level.has_rows ? 4 * head.bins : 1;
      const int64_t of_bin = level.has_rows ? 1 : level.positions;
      for (int side = 0; side < 4; ++side) {
        f(Stretch{l, image, side, std::min(kLanes, level.positions - first),
                  (image * 4 * level.positions) * head.bins + first * of_position +
                      side * head.bins * of_bin,
                  of_position, of_bin, level.first_row + first});
      }
    }
  });
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
void expectations(const scalar_t* logits, const Stretch& stretch, int64_t bins,
                  ExpectationLanes<T>& lanes, T* values) {
  alignas(64) T buffer[kLanes];
  for (int64_t i = 0; i < stretch.n; ++i) {
    lanes.put(i, Expectation<T>{});
  }
  for (int64_t bin = 0; bin < bins; ++bin) {
    const scalar_t* of_bin = logits + stretch.logit + bin * stretch.of_bin;
    add_bin(side_by_side(of_bin, stretch.of_position, stretch.n, buffer), static_cast<T>(bin),
            stretch.n, lanes);
  }
  values_of(lanes, stretch.n, values);
}

// The distances of a stretch, in units of the stride.
template <typename scalar_t, typename T = compute_t<scalar_t>>
void distances_of(const scalar_t* logits, const Stretch& stretch, int64_t bins,
                  ExpectationLanes<T>& lanes, T* distances) {
  if (bins > 1) {
    expectations(logits, stretch, bins, lanes, distances);
  } else {
    gather(logits + stretch.logit, stretch.of_position, stretch.n, distances);
  }
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
    for_each_stretch(head, [&](const Stretch& stretch) {
      const auto* logits =
          static_cast<const scalar_t*>(head.levels[stretch.level].tensor.const_data_ptr());
      ExpectationLanes<T> lanes;
      alignas(64) T distance[kLanes];
      distances_of(logits, stretch, bins, lanes, distance);
      const int side = stretch.side;
      const T stride = static_cast<T>(strides[stretch.level]);
      const auto bounds = bounds_of_side(sizes, stretch.image, side);
      const T* point = point_data + 2 * stretch.row + side % 2;
      T* coordinate = out + 4 * (stretch.image * shape.rows + stretch.row) + side;
      for (int64_t i = 0; i < stretch.n; ++i) {
        coordinate[4 * i] =
            bounds.clip(coordinate_of_side(side, point[2 * i], stride, distance[i]));
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
    for_each_stretch(head, [&](const Stretch& stretch) {
      const auto* logits =
          static_cast<const scalar_t*>(head.levels[stretch.level].tensor.const_data_ptr());
      scalar_t* grad = data_of<scalar_t>(grads[stretch.level]) + stretch.logit;
      ExpectationLanes<T> lanes;
      alignas(64) T distance[kLanes], factor[kLanes], x[kLanes], of_bin[kLanes];
      distances_of(logits, stretch, bins, lanes, distance);
      const int side = stretch.side;
      const T stride = static_cast<T>(strides[stretch.level]);
      const auto bounds = bounds_of_side(sizes, stretch.image, side);
      const T* point = point_data + 2 * stretch.row + side % 2;
      const T* upstream = upstream_data + 4 * (stretch.image * shape.rows + stretch.row) + side;
      for (int64_t i = 0; i < stretch.n; ++i) {
        const T coordinate = coordinate_of_side(side, point[2 * i], stride, distance[i]);
        const T of_distance = gradient_of_distance(side, stride, upstream[4 * i]);
        factor[i] = bounds.passes_gradient(coordinate) ? of_distance : T(0);
      }
      if (bins == 1) {
        scatter(factor, stretch.of_position, stretch.n, grad);
        return;
      }
      for (int64_t i = 0; i < stretch.n; ++i) {
        factor[i] /= lanes.sum[i];
      }
      for (int64_t bin = 0; bin < bins; ++bin) {
        const scalar_t* from = logits + stretch.logit + bin * stretch.of_bin;
        gradients_of_bin(side_by_side(from, stretch.of_position, stretch.n, x), static_cast<T>(bin),
                         lanes, distance, factor, stretch.n, of_bin);
        scatter(of_bin, stretch.of_position, stretch.n, grad + bin * stretch.of_bin);
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
