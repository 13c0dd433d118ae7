// The losses of a head's anchors on CUDA, one an anchor, and the gradient multiplied by one number
// an anchor (dense_head.cuh has what an item is).
//
// The logits of an anchor are the work of many threads, whose sums meet in shared memory, in a
// fixed order:
//   rows    an item is a chunk of whole rows; a vector leaves the sums of what it has of the row
//           that it begins in and of the next one, and a group of lanes adds up a row. A row that
//           is longer than a chunk is an item of its own, chunk after chunk.
//   planes  the slices of the classes of the same positions are threads of one block.
//
// Bytes moved, s = size of the logits: losses 1s, with gradient 2s, the gradient multiplied 2s; and
// some numbers an anchor.
#include "../checks/dense_row_losses.h"
#include "../math/row_losses.h"
#include "dense_head.cuh"

namespace focalops {
namespace {

// Of a vector, where a row is no shorter.
template <typename T>
struct alignas(2 * sizeof(T)) RowParts {
  T of_first = 0, of_next = 0;
};

// `column` is the first loss's.
template <typename T, int N>
__device__ __forceinline__ RowParts<T> parts_of(const T (&losses)[N], int column, int num_classes) {
  RowParts<T> parts;
  if (column + N <= num_classes) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      parts.of_first += losses[j];
    }
    return parts;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    (column + j < num_classes ? parts.of_first : parts.of_next) += losses[j];
  }
  return parts;
}

// What one of `lanes` adds up of the losses begin .. end, a row; `shared` has them or, where
// rows are no shorter than a vector, the parts of each vector.
template <int N, typename T>
__device__ __forceinline__ T share_of_row(const T* shared, bool has_parts, int begin, int end,
                                          int lane, int lanes) {
  T sum = 0;
  if (has_parts) {
    const auto* parts = reinterpret_cast<const RowParts<T>*>(shared);
    for (int v = begin / N + lane; v * N < end; v += lanes) {
      sum += v * N < begin ? parts[v].of_next : parts[v].of_first;
    }
  } else {
    for (int i = begin + lane; i < end; i += lanes) {
      sum += shared[i];
    }
  }
  return sum;
}

template <typename Head, typename Loss, typename Cut, typename T = typename Head::T>
__device__ __forceinline__ void losses_of_rows(const Head& head, const Cut& division,
                                               const LossLevel& level, int64_t image, int64_t part,
                                               T divisor, const Loss& formula, T* shared,
                                               T* losses) {
  using scalar_t = typename Head::scalar_t;
  constexpr int N = kVectorSize<scalar_t>;
  constexpr auto kChunk = static_cast<int>(kLogitsPerChunk<scalar_t>);
  const T scale = gradient_scale<scalar_t>(divisor);
  const bool with_grad = level.grad != nullptr;
  const int64_t first_row = part * division.rows, begin = first_row * head.classes;
  const bool is_long = head.classes > kChunk, has_parts = head.classes >= N;
  const auto num_rows =
      static_cast<int>(min(division.rows, level.positions * head.anchors - first_row));
  const int num_logits = num_rows * head.classes;
  const int lane = static_cast<int>(threadIdx.x) % division.lanes;
  const int rows_at_once = kThreads / division.lanes;
  T of_row = 0;  // the last one that a group added up
  for (int at = 0; at < num_logits; at += kChunk) {
    const int left = min(kChunk, num_logits - at), logits_of_row = is_long ? left : head.classes;
    evaluate_rows(head, level, image, begin + at, left, with_grad, scale, formula,
                  [&](const auto& values, int i, int column) {
                    if (has_parts) {
                      reinterpret_cast<RowParts<T>*>(shared)[i / N] =
                          parts_of(values.loss, column, head.classes);
                      return;
                    }
                    Vector<T, N> out;
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                      out.data[j] = values.loss[j];
                    }
                    *reinterpret_cast<Vector<T, N>*>(shared + i) = out;
                  });
    __syncthreads();
    for (int first = 0; first < num_rows; first += rows_at_once) {
      const int row = first + static_cast<int>(threadIdx.x) / division.lanes;
      T sum = 0;
      if (row < num_rows) {
        sum = share_of_row<N>(shared, has_parts, row * logits_of_row, (row + 1) * logits_of_row,
                              lane, division.lanes);
      }
      for (int offset = division.lanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_down_sync(kFullWarp, sum, offset, division.lanes);
      }
      of_row = at == 0 ? sum : of_row + sum;
      if (lane == 0 && row < num_rows) {
        losses[first_row + row] = of_row / divisor;
      }
    }
    __syncthreads();  // what comes next writes there
  }
}

template <typename Head, typename Loss, typename Cut, typename T = typename Head::T>
__device__ __forceinline__ void losses_of_planes(const Head& head, const Cut& division,
                                                 const LossLevel& level, int64_t image,
                                                 int64_t part, T divisor, const Loss& formula,
                                                 T* shared, T* losses) {
  using scalar_t = typename Head::scalar_t;
  constexpr int N = kVectorSize<scalar_t>;
  const int vectors = division.vectors();
  const int slice = static_cast<int>(threadIdx.x) / vectors;
  const int vector = static_cast<int>(threadIdx.x) % vectors;
  const auto unit = static_cast<uint32_t>(part * vectors + vector);
  const uint32_t anchor = level.vectors_of_plane.divide(unit);
  const bool exists = anchor < static_cast<uint32_t>(head.anchors);
  const int64_t i = int64_t{level.vectors_of_plane.remainder(unit, anchor)} * N;
  T sums[N] = {};
  if (exists) {
    const int begin = slice * division.classes_of_slice;
    const int end = min(begin + division.classes_of_slice, head.classes);
    const int64_t row = image * head.rows + level.first_row + i * head.anchors + anchor;
    evaluate_planes(head, level, image, anchor, {i, row}, begin, end, level.grad != nullptr,
                    gradient_scale<scalar_t>(divisor), formula, [&](const auto& values) {
#pragma unroll
                      for (int j = 0; j < N; ++j) {
                        sums[j] += values.loss[j];
                      }
                    });
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    shared[j * kThreads + threadIdx.x] = sums[j];
  }
  __syncthreads();
  if (slice == 0 && exists) {
    for (int j = 0; j < N && i + j < level.positions; ++j) {
      T sum = 0;
      for (int s = 0; s < division.slices; ++s) {
        sum += shared[j * kThreads + s * vectors + vector];
      }
      losses[(i + j) * head.anchors + anchor] = sum / divisor;
    }
  }
  __syncthreads();
}

template <typename Head, typename Loss>
__global__ void __launch_bounds__(kThreads, 2)
    dense_row_losses_kernel(const __grid_constant__ Head head,
                            const Division<typename Head::scalar_t> division, Loss formula,
                            typename Head::T* losses) {
  using T = typename Head::T;
  __shared__ __align__(16) T shared[kLogitsPerChunk<typename Head::scalar_t>];
  for (int64_t item = blockIdx.x; item < head.num_items; item += gridDim.x) {
    const auto [l, image, part] = place_of_item(head, item);
    const LossLevel& level = head.levels[l];
    const T divisor = head.normalizer.divisor(image);
    T* of_level = losses + image * head.rows + level.first_row;
    if (level.has_rows) {
      losses_of_rows(head, division, level, image, part, divisor, formula, shared, of_level);
    } else {
      losses_of_planes(head, division, level, image, part, divisor, formula, shared, of_level);
    }
  }
}

// ---- the gradient times one number an anchor ----------------------------------------------------

template <typename scalar_t>
struct ScaledLevel {
  using T = compute_t<scalar_t>;

  scalar_t* data;
  const T* scale;  // of the level's first anchor
  int64_t rows;    // of an image in `scale`
  int64_t positions;
  int anchors;
  int channels;  // of an anchor
  FastDivisor channels_of{1};
  FastDivisor vectors_of_plane{1};
};

template <typename scalar_t, typename T = compute_t<scalar_t>>
__device__ __forceinline__ void multiply(scalar_t* array, int64_t i, int64_t size,
                                         const T (&factors)[kVectorSize<scalar_t>]) {
  constexpr int N = kVectorSize<scalar_t>;
  const bool aligned = is_aligned(array);
  auto vector = load_vector<N>(array, i, size, aligned);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    vector.data[j] = static_cast<scalar_t>(factors[j] * static_cast<T>(vector.data[j]));
  }
  store_vector(array, i, size, aligned, vector);
}

// A thread has a vector of a plane's positions, and walks through the channels of their anchor.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    scale_planes_kernel(ScaledLevel<scalar_t> level, int64_t vectors_of_image, int64_t vectors) {
  constexpr int N = kVectorSize<scalar_t>;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t v = int64_t{blockIdx.x} * kThreads + threadIdx.x; v < vectors; v += stride) {
    const int64_t image = v / vectors_of_image;
    const auto unit = static_cast<uint32_t>(v - image * vectors_of_image);
    const uint32_t anchor = level.vectors_of_plane.divide(unit);
    const int64_t i = int64_t{level.vectors_of_plane.remainder(unit, anchor)} * N;
    const auto* scale = level.scale + image * level.rows + anchor;
    compute_t<scalar_t> factors[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factors[j] = i + j < level.positions ? scale[(i + j) * level.anchors] : 0;
    }
    scalar_t* plane =
        level.data + (image * level.anchors + anchor) * level.channels * level.positions;
    for (int k = 0; k < level.channels; ++k, plane += level.positions) {
      multiply(plane, i, level.positions, factors);
    }
  }
}

// A thread has a vector of an image's rows, and knows the row of each number.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(ScaledLevel<scalar_t> level, int64_t vectors_of_image, int64_t vectors) {
  constexpr int N = kVectorSize<scalar_t>;
  const int64_t size = level.positions * level.anchors * level.channels;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t v = int64_t{blockIdx.x} * kThreads + threadIdx.x; v < vectors; v += stride) {
    const int64_t image = v / vectors_of_image, i = (v - image * vectors_of_image) * N;
    const auto* scale = level.scale + image * level.rows;
    uint32_t row = level.channels_of.divide(static_cast<uint32_t>(i));
    auto column = static_cast<int>(level.channels_of.remainder(static_cast<uint32_t>(i), row));
    compute_t<scalar_t> factors[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factors[j] = i + j < size ? scale[row] : 0;
      if (++column == level.channels) {
        column = 0;
        ++row;
      }
    }
    multiply(level.data + image * size, i, size, factors);
  }
}

// ---- host ---------------------------------------------------------------------------------------

std::tuple<Tensor, std::vector<Tensor>> dense_row_losses_cuda(
    const std::vector<Tensor>& cls_logits, const Tensor& labels_,
    const std::optional<Tensor>& scores_, const Name& name, const std::vector<double>& parameters,
    const std::optional<Tensor>& weight_, const std::optional<Tensor>& class_weight_,
    int64_t ignore_index, const std::optional<Tensor>& normalizer_, double min_normalizer,
    bool compute_grad) {
  const HeadShape shape = check_dense_row_losses(cls_logits, labels_, scores_, name, parameters,
                                                 weight_, class_weight_, normalizer_);
  const LaunchScope scope(cls_logits[0]);
  const auto levels = head_levels(cls_logits, shape);
  const Tensor labels = torch::stable::contiguous(labels_);
  const auto scores = contiguous(scores_), weight = contiguous(weight_),
             class_weight = contiguous(class_weight_),
             given = contiguous(normalizer_);  // held until the launch
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(torch::stable::empty_like(levels[l].tensor));
  }
  const Tensor& like = levels[0].tensor;
  Tensor losses =
      torch::stable::new_empty(like, {shape.images, shape.rows}, compute_dtype(like.scalar_type()));
  if (shape.images * shape.rows * shape.classes == 0) {
    return {torch::stable::zero_(losses), grads};
  }
  const auto run = [&](auto member, auto tag) {
    using Loss = decltype(member);
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const Division<scalar_t> division(shape.classes);
    const auto normalizer = normalizer_of<T>(given, min_normalizer);
    const auto items_of_image = [&](const HeadLevel& level, int64_t vectors_of_plane) {
      return level.has_rows ? ceil_div(level.positions * shape.anchors, division.rows)
                            : ceil_div(vectors_of_plane * shape.anchors, division.vectors());
    };
    const auto launch_head = [&](const auto& head, const auto& formula) {
      auto* kernel =
          &dense_row_losses_kernel<std::decay_t<decltype(head)>, std::decay_t<decltype(formula)>>;
      launch(kernel, resident_grid(kernel, kThreads, 0, head.num_items, scope), kThreads, 0,
             scope.stream(), head, division, formula, data_of<T>(losses));
    };
    if constexpr (std::is_same_v<Loss, row_losses::Focal>) {
      if (!weight.has_value() && !class_weight.has_value() && parameters[2] == 0) {
        const auto head = make_head<Head<scalar_t, void>>(levels, shape, labels, ignore_index,
                                                          normalizer, grads, items_of_image);
        return dispatch_focal_loss<T>(parameters[0], parameters[1],
                                      [&](const auto& formula) { launch_head(head, formula); });
      }
    }
    auto head = make_head<Head<scalar_t, RowExtras<T>>>(levels, shape, labels, ignore_index,
                                                        normalizer, grads, items_of_image);
    head.extras = {{data_of<T>(weight), class_weights_of<T>(class_weight)}, data_of<T>(scores)};
    Loss::template dispatch<T>(parameters,
                               [&](const auto& formula) { launch_head(head, formula); });
  };
  with_row_loss("dense_row_losses", name, [&](auto member) {
    if constexpr (!decltype(member)::kIsSoftmax) {
      dispatch_floating(like.scalar_type(), [&](auto tag) { run(member, tag); });
    }
  });
  return {losses, grads};
}

void scale_rows_cuda(const Tensor& tensor, const Tensor& scale_, int64_t anchors,
                     int64_t first_row) {
  const HeadShape shape = check_scale_rows(tensor, scale_, anchors, first_row);
  if (tensor.numel() == 0) {
    return;
  }
  const LaunchScope scope(tensor);
  const HeadLevel from = head_levels({tensor}, shape)[0];
  const Tensor scale = torch::stable::contiguous(scale_);
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    constexpr int64_t N = kVectorSize<scalar_t>;
    const int64_t vectors_of_plane = ceil_div(from.positions, N);
    const int64_t vectors_of_image = from.has_rows
                                         ? ceil_div(from.positions * anchors * shape.classes, N)
                                         : vectors_of_plane * anchors;
    const int64_t vectors = shape.images * vectors_of_image;
    const ScaledLevel<scalar_t> level{static_cast<scalar_t*>(tensor.mutable_data_ptr()),
                                      static_cast<const T*>(scale.const_data_ptr()) + first_row,
                                      shape.rows,
                                      from.positions,
                                      static_cast<int>(anchors),
                                      static_cast<int>(shape.classes),
                                      FastDivisor(shape.classes),
                                      FastDivisor(vectors_of_plane)};
    auto* kernel = from.has_rows ? &scale_rows_kernel<scalar_t> : &scale_planes_kernel<scalar_t>;
    const int64_t grid = resident_grid(kernel, kThreads, 0, ceil_div(vectors, kThreads), scope);
    launch(kernel, grid, kThreads, 0, scope.stream(), level, vectors_of_image, vectors);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("dense_row_losses", TORCH_BOX(&dense_row_losses_cuda));
  m.impl("_scale_rows_", TORCH_BOX(&scale_rows_cuda));
}

}  // namespace focalops
