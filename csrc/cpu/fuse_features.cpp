// A node of a BiFPN on the CPU: one pass over the maps where they lie, vectorised along a row,
// parallel over rows of the output.
//
// The backward computes the sum before the activation again, keeps the gradient by it and which of
// the nine pixels of each window was the maximum, and then writes each map's gradient by looking up
// what a pixel went to.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "../fusion_node.h"
#include "memory.h"
#include "simd.h"

namespace focalops {
namespace {

constexpr int64_t kGrain = 16384;  // numbers of a piece of parallel work, about

// ---- vectors ------------------------------------------------------------------------------------

template <typename From, typename To>
FOCALOPS_SIMD void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

template <typename T>
FOCALOPS_SIMD void add_term(const T* x, T factor, T divisor, T* sum, int64_t n, bool is_first) {
  if (is_first) {
    for (int64_t i = 0; i < n; ++i) {
      sum[i] = x[i] * factor / divisor;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      sum[i] += x[i] * factor / divisor;
    }
  }
}

template <FusionActivation Activation, typename T, typename To>
FOCALOPS_SIMD void activate_row(const T* x, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(activate<Activation>(x[i]));
  }
}

template <FusionActivation Activation, typename T, typename From>
FOCALOPS_SIMD void gradient_of_sum(const From* upstream, const T* x, T* grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = static_cast<T>(upstream[i]) * activation_derivative<Activation>(x[i]);
  }
}

template <typename T>
FOCALOPS_SIMD T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

template <typename T>
FOCALOPS_SIMD void add(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] += from[i];
  }
}

template <typename T, typename To>
FOCALOPS_SIMD void scale(const T* from, T factor, T divisor, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<To>(from[i] / divisor * factor);
  }
}

// The larger, or a NaN, as torch's max_pool2d: of several NaNs and of equal numbers it does not
// matter which.
template <typename T>
FOCALOPS_SIMD void take_larger(const T* x, int64_t step, T* largest, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i * step];
    largest[i] = value > largest[i] || value != value ? value : largest[i];
  }
}

template <typename T>
FOCALOPS_SIMD void take_larger_at(const T* x, int64_t step, int32_t place, T* largest,
                                  int32_t* places, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i * step];
    const bool takes = value > largest[i] || value != value;
    largest[i] = takes ? value : largest[i];
    places[i] = takes ? place : places[i];
  }
}

template <typename T>
FOCALOPS_SIMD void add_where(const T* grad, const uint8_t* places, uint8_t place, int64_t step,
                             T* to, int64_t n) {
  FOCALOPS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    to[i * step] += places[i] == place ? grad[i] : T(0);
  }
}

// ---- maps ---------------------------------------------------------------------------------------

template <typename T>
FusionWeights<T> weights_of(const std::optional<Tensor>& weights, int64_t mode, size_t count,
                            double eps) {
  FusionWeights<T> fusion;
  fusion_weights(static_cast<FusionMode>(mode), data_of<T>(weights), static_cast<int>(count),
                 static_cast<T>(eps), fusion);
  return fusion;
}

// What one thread needs to bring rows of maps to the output's size.
template <typename scalar_t>
class Resampler {
 public:
  using T = compute_t<scalar_t>;

  explicit Resampler(const FusionNode& node) : node_(node), rows_(node.maps.size()) {
    for (auto& row : rows_) {
      row.resize(node.row());
    }
    // A window's row: up to one pixel of -inf on each side, and one more.
    window_.resize((2 * node.width + 2) * node.pixel);
    places_.resize(node.row());
  }

  // Row y of a plane of map i, resampled; `places`, where asked for and where the map is pooled,
  // says which of the 9 pixels of its window, in row-major order, each number is.
  const T* row(size_t i, int64_t plane, int64_t y, uint8_t* places = nullptr) {
    const FusionMap& map = node_.maps[i];
    const int64_t pixel = node_.pixel;
    const auto* data = static_cast<const scalar_t*>(map.tensor.const_data_ptr()) +
                       plane * map.height * map.width * pixel;
    T* out = rows_[i].data();
    if (map.resampling == Resampling::kPool) {
      pool(map, data, y, out, places);
      return out;
    }
    const bool goes_up = map.resampling == Resampling::kUp;
    const auto* from = data + (goes_up ? y * map.height / node_.height : y) * map.width * pixel;
    if (!goes_up) {
      if constexpr (std::is_same_v<T, scalar_t>) {
        return from;
      } else {
        convert(from, out, node_.row());
        return out;
      }
    }
    convert(from, window_.data(), map.width * pixel);
    for (int64_t source = 0, x = 0; x < node_.width; ++x) {
      while ((source + 1) * node_.width <= x * map.width) {
        ++source;
      }
      if (pixel == 1) {
        out[x] = window_[source];
      } else {
        std::copy_n(window_.data() + source * pixel, pixel, out + x * pixel);
      }
    }
    return out;
  }

 private:
  void pool(const FusionMap& map, const scalar_t* data, int64_t y, T* out, uint8_t* places) {
    const T infinity = std::numeric_limits<T>::infinity();
    const int64_t pixel = node_.pixel, width = node_.width, size = 2 * width + 1;
    const int64_t top = 2 * y - map.pad_y;
    const int64_t columns = std::min(map.width, size - map.pad_x);
    std::fill_n(out, node_.row(), -infinity);
    if (places != nullptr) {
      // Where nothing is larger than -inf, the first that there is.
      const int32_t first_row = top < 0 ? 3 : 0;
      std::fill_n(places_.data(), node_.row(), first_row);
      std::fill_n(places_.data(), pixel, first_row + static_cast<int32_t>(map.pad_x));
    }
    for (int32_t ky = 0; ky < 3; ++ky) {
      if (top + ky < 0 || top + ky >= map.height) {
        continue;
      }
      std::fill_n(window_.data(), size * pixel, -infinity);
      convert(data + (top + ky) * map.width * pixel, window_.data() + map.pad_x * pixel,
              columns * pixel);
      for (int32_t kx = 0; kx < 3; ++kx) {
        const int64_t steps = pixel == 1 ? 1 : width, length = pixel == 1 ? width : pixel;
        for (int64_t x = 0; x < steps; ++x) {
          const T* from = window_.data() + (2 * x + kx) * pixel;
          if (places == nullptr) {
            take_larger(from, pixel == 1 ? 2 : 1, out + x * pixel, length);
          } else {
            take_larger_at(from, pixel == 1 ? 2 : 1, 3 * ky + kx, out + x * pixel,
                           places_.data() + x * pixel, length);
          }
        }
      }
    }
    if (places != nullptr) {
      convert(places_.data(), places, node_.row());
    }
  }

  const FusionNode& node_;
  std::vector<std::vector<T>> rows_;
  std::vector<T> window_;
  std::vector<int32_t> places_;
};

template <typename F>
void for_rows(int64_t rows, int64_t length, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(length, 1));
  torch::stable::parallel_for(0, rows, grain, f);
}

// The sum of the terms of row y of a plane; `rows` are the resampled maps.
template <typename scalar_t, typename T>
void sum_terms(const FusionNode& node, const FusionWeights<T>& fusion,
               const std::vector<const T*>& rows, T* sum) {
  for (size_t i = 0; i < rows.size(); ++i) {
    add_term(rows[i], fusion.factor[i], fusion.divisor, sum, node.row(), i == 0);
  }
}

Tensor fuse_features_cpu(const std::vector<Tensor>& features, const std::optional<Tensor>& weights_,
                         int64_t mode, double eps, int64_t activation, bool symmetric) {
  check_fuse_features(features, weights_, mode, activation);
  const auto weights = contiguous(weights_);
  const FusionNode node = fusion_node(features, symmetric);
  Tensor output = torch::stable::empty_like(node.maps[0].tensor);
  output = on_huge_pages(output, output.element_size());
  dispatch_floating(node.dtype, [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto fusion = weights_of<T>(weights, mode, features.size(), eps);
    auto* out = static_cast<scalar_t*>(output.mutable_data_ptr());
    dispatch_activation(activation, [&](auto activation_tag) {
      for_rows(node.rows(), node.row(), [&](int64_t row, int64_t end) {
        Resampler<scalar_t> resampler(node);
        std::vector<const T*> rows(features.size());
        std::vector<T> sum(node.row());
        for (; row < end; ++row) {
          for (size_t i = 0; i < rows.size(); ++i) {
            rows[i] = resampler.row(i, row / node.height, row % node.height);
          }
          sum_terms<scalar_t>(node, fusion, rows, sum.data());
          activate_row<decltype(activation_tag)::value>(sum.data(), out + row * node.row(),
                                                        node.row());
        }
      });
    });
  });
  return output;
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient by the sum of the terms, and by the places of the maxima.
template <typename T>
struct Upstream {
  const FusionNode& node;
  const T* grad;
  const uint8_t* places;  // of a map that is pooled
  T factor, divisor;
};

// Rows or columns of the output that source `i` of `from` goes to when it is upsampled.
int64_t first_child(int64_t i, int64_t from, int64_t to) { return (i * to + from - 1) / from; }

template <typename T>
void add_children(const Upstream<T>& up, const FusionMap& map, int64_t plane, int64_t y,
                  T* children, T* out) {
  const FusionNode& node = up.node;
  std::fill_n(children, node.row(), T(0));
  for (int64_t child = first_child(y, map.height, node.height);
       child < first_child(y + 1, map.height, node.height); ++child) {
    add(up.grad + (plane * node.height + child) * node.row(), children, node.row());
  }
  std::fill_n(out, map.width * node.pixel, T(0));
  for (int64_t x = 0; x < map.width; ++x) {
    for (int64_t child = first_child(x, map.width, node.width);
         child < first_child(x + 1, map.width, node.width); ++child) {
      if (node.pixel == 1) {
        out[x] += children[child];
      } else {
        add(children + child * node.pixel, out + x * node.pixel, node.pixel);
      }
    }
  }
}

template <typename T>
void add_maxima(const Upstream<T>& up, const FusionMap& map, int64_t plane, int64_t y, T* window) {
  const FusionNode& node = up.node;
  const int64_t pixel = node.pixel;
  std::fill_n(window, (2 * node.width + 1) * pixel, T(0));
  const int64_t last = std::min((y + map.pad_y) / 2, node.height - 1);
  for (int64_t parent = std::max<int64_t>((y + map.pad_y - 1) / 2, 0); parent <= last; ++parent) {
    const int64_t ky = y - (2 * parent - map.pad_y);
    const int64_t at = (plane * node.height + parent) * node.row();
    for (int64_t kx = 0; kx < 3; ++kx) {
      const auto place = static_cast<uint8_t>(3 * ky + kx);
      if (pixel == 1) {
        add_where(up.grad + at, up.places + at, place, 2, window + kx, node.width);
        continue;
      }
      for (int64_t x = 0; x < node.width; ++x) {
        add_where(up.grad + at + x * pixel, up.places + at + x * pixel, place, 1,
                  window + (2 * x + kx) * pixel, pixel);
      }
    }
  }
}

template <typename scalar_t, typename T = compute_t<scalar_t>>
void write_gradient(const Upstream<T>& up, const FusionMap& map, scalar_t* out) {
  const FusionNode& node = up.node;
  const int64_t length = map.width * node.pixel;
  const int64_t rows = length == 0 ? 0 : node.planes * map.height;
  for_rows(rows, length, [&](int64_t row, int64_t end) {
    std::vector<T> first((2 * node.width + 2) * node.pixel), second(first.size());
    for (; row < end; ++row) {
      const int64_t plane = row / map.height, y = row % map.height;
      const T* sum = first.data();
      if (map.resampling == Resampling::kNone) {
        sum = up.grad + row * length;
      } else if (map.resampling == Resampling::kUp) {
        add_children(up, map, plane, y, second.data(), first.data());
      } else {
        add_maxima(up, map, plane, y, first.data());
        sum += map.pad_x * node.pixel;
      }
      scale(sum, up.factor, up.divisor, out + row * length, length);
    }
  });
}

std::tuple<std::vector<Tensor>, Tensor> fuse_features_backward_cpu(
    const Tensor& grad_output_, const std::vector<Tensor>& features,
    const std::optional<Tensor>& weights_, int64_t mode, double eps, int64_t activation,
    bool symmetric) {
  check_fuse_features_backward(grad_output_, features, weights_, mode, activation);
  const auto weights = contiguous(weights_);
  const FusionNode node = fusion_node(features, symmetric);
  const Tensor grad_output = laid_out(grad_output_, node.channels_last);
  const size_t count = features.size();
  std::vector<Tensor> grads;
  for (const FusionMap& map : node.maps) {
    Tensor grad = torch::stable::empty_like(map.tensor);
    grads.push_back(on_huge_pages(grad, grad.element_size()));
  }
  const Tensor& first = features[0];
  const ScalarType computed = compute_dtype(node.dtype);
  Tensor grad_weights = torch::stable::new_empty(
      first, {weights.has_value() ? static_cast<int64_t>(count) : 0}, computed);
  const int64_t numel = node.rows() * node.row();
  Tensor grad_sum = torch::stable::new_empty(first, {numel}, computed);
  std::vector<Tensor> places;
  for (const FusionMap& map : node.maps) {
    const bool is_pooled = map.resampling == Resampling::kPool;
    places.push_back(torch::stable::new_empty(first, {is_pooled ? numel : 0}, ScalarType::Byte));
  }
  std::vector<double> sums(node.rows() * count);  // a row's, by each factor
  dispatch_floating(node.dtype, [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto fusion = weights_of<T>(weights, mode, count, eps);
    const auto* upstream = static_cast<const scalar_t*>(grad_output.const_data_ptr());
    auto* grad = static_cast<T*>(grad_sum.mutable_data_ptr());
    std::vector<uint8_t*> place_data;
    for (size_t i = 0; i < count; ++i) {
      place_data.push_back(node.maps[i].resampling == Resampling::kPool
                               ? static_cast<uint8_t*>(places[i].mutable_data_ptr())
                               : nullptr);
    }
    dispatch_activation(activation, [&](auto activation_tag) {
      for_rows(node.rows(), node.row(), [&](int64_t row, int64_t end) {
        Resampler<scalar_t> resampler(node);
        std::vector<const T*> rows(count);
        std::vector<T> sum(node.row());
        for (; row < end; ++row) {
          const int64_t at = row * node.row();
          for (size_t i = 0; i < count; ++i) {
            rows[i] = resampler.row(i, row / node.height, row % node.height,
                                    place_data[i] == nullptr ? nullptr : place_data[i] + at);
          }
          sum_terms<scalar_t>(node, fusion, rows, sum.data());
          gradient_of_sum<decltype(activation_tag)::value>(upstream + at, sum.data(), grad + at,
                                                           node.row());
          for (size_t i = 0; i < count; ++i) {
            sums[row * count + i] = dot(grad + at, rows[i], node.row());
          }
        }
      });
    });
    for (size_t i = 0; i < count; ++i) {
      const Upstream<T> up{node, grad, place_data[i], fusion.factor[i], fusion.divisor};
      write_gradient(up, node.maps[i], static_cast<scalar_t*>(grads[i].mutable_data_ptr()));
    }
    if (weights.has_value()) {
      std::array<double, kMaxFeatures> totals{};
      for (size_t i = 0; i < sums.size(); ++i) {
        totals[i % count] += sums[i];
      }
      fusion_weights_gradient(static_cast<FusionMode>(mode), data_of<T>(weights),
                              static_cast<int>(count), static_cast<T>(eps), fusion, totals.data(),
                              static_cast<T*>(grad_weights.mutable_data_ptr()));
    }
  });
  return {grads, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("fuse_features", TORCH_BOX(&fuse_features_cpu));
  m.impl("_fuse_features_backward", TORCH_BOX(&fuse_features_backward_cpu));
}

}  // namespace focalops
