// Tensors of shape (..., 4) as lists of rows. Broadcasting (A, 4) against (B, A, 4) leaves strides
// that are regular in two levels, an outer and an inner one: such tensors are read where they lie.
#pragma once

#include <array>
#include <limits>
#include <vector>

#include "dtypes.h"
#include "math/box.h"

namespace focalops {

inline Tensor new_rows(const Tensor& like,
                       ScalarType dtype) {  // contiguous, of the shape of `like`
  return torch::stable::new_empty(like, like.sizes(), dtype);
}

inline Tensor new_matrix(const Tensor& boxes1, const Tensor& boxes2) {  // (N, M) or (B, N, M)
  const int64_t dim = boxes1.dim();
  std::vector<int64_t> shape(boxes1.sizes().begin(), boxes1.sizes().end());
  shape[dim - 1] = boxes2.size(dim - 2);
  return torch::stable::new_empty(boxes1, shape);
}

inline Tensor new_pairs(const Tensor& boxes) {  // (..., 4) -> (...)
  const std::vector<int64_t> shape(boxes.sizes().begin(), boxes.sizes().end() - 1);
  return torch::stable::new_empty(boxes, shape);
}

inline Tensor new_gradient(const Tensor& boxes, bool is_wanted) {
  return is_wanted ? new_rows(boxes, boxes.scalar_type()) : torch::stable::new_empty(boxes, {0});
}

// The gradient of pairs; that of their sum is one number for all, and stays one.
struct PairUpstream {
  Tensor tensor;
  int64_t stride;

  explicit PairUpstream(const Tensor& grad_output) : tensor(grad_output), stride(0) {
    for (int64_t d = 0; d < grad_output.dim(); ++d) {
      if (grad_output.size(d) != 1 && grad_output.stride(d) != 0) {
        stride = 1;
      }
    }
    if (stride == 1) {
      tensor = torch::stable::contiguous(grad_output);
    }
  }
};

// Calls f with an integral constant of the IouKind. The check_<op>() functions have refused every
// other number before.
template <typename F>
void dispatch_iou_kind(int64_t kind, F&& f) {
  switch (kind) {
    case 0:
      return f(std::integral_constant<IouKind, IouKind::kPlain>{});
    case 1:
      return f(std::integral_constant<IouKind, IouKind::kGeneralized>{});
    case 2:
      return f(std::integral_constant<IouKind, IouKind::kDistance>{});
    default:
      return f(std::integral_constant<IouKind, IouKind::kComplete>{});
  }
}

// Calls f(tag, formula) with the TypeTag of the dtype and the IouFormula of the kind.
template <typename F>
void dispatch_iou(ScalarType dtype, int64_t kind, double union_eps, double outer_eps, const F& f) {
  dispatch_compute(dtype, [&](auto tag) {
    using T = tag_t<decltype(tag)>;
    dispatch_iou_kind(kind, [&](auto kind_tag) {
      f(tag, IouFormula<decltype(kind_tag)::value, T>{T(union_eps), T(outer_eps)});
    });
  });
}

// The same of a matrix, which may also be of kind 4.
template <typename F>
void dispatch_iou_matrix(ScalarType dtype, int64_t kind, double eps, const F& f) {
  if (kind != static_cast<int64_t>(IouKind::kForeground)) {
    return dispatch_iou(dtype, kind, 0, eps, f);
  }
  dispatch_compute(dtype, [&](auto tag) {
    f(tag, IouFormula<IouKind::kForeground, tag_t<decltype(tag)>>{0, 0});
  });
}

template <typename T>
BoxCoder<T> box_coder(const std::vector<double>& weights, double clip = 0,
                      const std::vector<double>& image_size = {}) {
  const T infinity = std::numeric_limits<T>::infinity();
  BoxCoder<T> coder{{T(weights[0]), T(weights[1]), T(weights[2]), T(weights[3])},
                    T(clip),
                    {-infinity, -infinity, infinity, infinity}};
  if (!image_size.empty()) {
    coder.clip_to_image(T(image_size[0]), T(image_size[1]));
  }
  return coder;
}

struct RowStrides {  // in elements
  int64_t outer, inner;
};

template <size_t N>
struct RowLayout {
  int64_t num_rows;
  int64_t num_inner;  // row i is (i / num_inner, i % num_inner)
  std::array<RowStrides, N> strides;
};

// The common layout of tensors of one shape (..., 4); makes them contiguous where they have none.
template <size_t N>
RowLayout<N> row_layout(std::array<Tensor, N>& tensors) {
  struct Level {
    int64_t size;
    std::array<int64_t, N> strides;
  };
  std::vector<Level> levels;  // the innermost first
  bool regular = true;
  for (const Tensor& tensor : tensors) {
    regular = regular && tensor.stride(tensor.dim() - 1) == 1;
  }
  for (int64_t d = tensors[0].dim() - 2; d >= 0; --d) {
    if (tensors[0].size(d) == 1) {
      continue;
    }
    Level level{tensors[0].size(d), {}};
    bool merges = !levels.empty();
    for (size_t k = 0; k < N; ++k) {
      level.strides[k] = tensors[k].stride(d);
      merges = merges && level.strides[k] == levels.back().size * levels.back().strides[k];
    }
    if (merges) {
      levels.back().size *= level.size;
    } else {
      levels.push_back(level);
    }
  }
  if (!regular || levels.size() > 2) {
    for (Tensor& tensor : tensors) {
      tensor = torch::stable::contiguous(tensor);
    }
    levels = {{tensors[0].numel() / 4, {}}};
    levels[0].strides.fill(4);
  }
  levels.resize(2, Level{1, {}});
  RowLayout<N> layout{levels[0].size * levels[1].size, levels[0].size, {}};
  for (size_t k = 0; k < N; ++k) {
    layout.strides[k] = {levels[1].strides[k], levels[0].strides[k]};
  }
  return layout;
}

// Row is a Box<T> or Deltas<T>.
template <typename Row, typename T>
struct Rows {
  const T* data;
  RowStrides strides;
  bool aligned;

  Rows(const Tensor& tensor, const RowStrides& strides)
      : data(static_cast<const T*>(tensor.const_data_ptr())),
        strides(strides),
        aligned(reinterpret_cast<uintptr_t>(data) % alignof(Row) == 0 && strides.outer % 4 == 0 &&
                strides.inner % 4 == 0) {}

  FOCALOPS_HOST_DEVICE Row load(int64_t outer, int64_t inner) const {
    const T* row = data + outer * strides.outer + inner * strides.inner;
    if (aligned) {
      return *reinterpret_cast<const Row*>(row);
    }
    return {row[0], row[1], row[2], row[3]};
  }
};

}  // namespace focalops
