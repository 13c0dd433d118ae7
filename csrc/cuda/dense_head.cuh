// The classification losses of a head's levels share this on CUDA: the logits, where the head left
// them, are read once, and the gradient is written once, in the same layout. No permute, no cat.
//
// The levels travel by value in a kernel parameter. Work is cut into items of one image of one
// level each, strided by the grid; the layout is the same for a whole item, so that no warp
// diverges over it.
//   rows (channels_last)  an item is at most a chunk of kThreads x kUnroll vectors, as in
//                         focal_loss.cu: a vector finds its row by one division and makes masks
//                         from the labels.
//   planes (contiguous)   a thread owns a 16-byte vector of positions of one anchor and walks a
//                         slice of the classes, from plane to plane; neighbouring threads have
//                         neighbouring positions. The labels of its positions stay in registers.
// Where an image's rows or a plane do not begin at a multiple of 16 bytes, their elements are
// accessed one by one.
#pragma once

#include "../head_levels.h"
#include "focal_loss.cuh"
#include "head_items.cuh"

namespace focalops {

// Extras is void, RowWeights<T> or RowExtras<T>.
template <typename scalar_t_, typename Extras_>
struct Head {
  using scalar_t = scalar_t_;
  using T = compute_t<scalar_t>;
  using Extras = Extras_;

  LossLevel levels[kMaxLevels];
  int num_levels;
  int64_t num_items;
  Integers labels;  // [B, rows]
  int64_t rows;
  int64_t ignore_index;
  int anchors;
  int classes;
  FastDivisor rows_of;  // by classes
  Normalizer<T> normalizer;
  std::conditional_t<std::is_void_v<Extras>, char, Extras> extras;  // as the labels
};

constexpr int64_t kClassesOfSlice = 16;  // of planes, that a thread walks through, about
constexpr int kMaxSlices = 8;            // of a block, so that a warp has neighbouring positions

// How an item is divided whose threads meet: rows are whole ones, and the slices of the classes of
// the same positions are of one block.
template <typename scalar_t>
struct Division {
  int64_t rows = 1;  // of an item
  int lanes = 1;     // that add up a row: as many as add up an item's rows at once
  int slices = 1;
  int classes_of_slice;

  explicit Division(int64_t num_classes) {
    constexpr int64_t kChunk = kLogitsPerChunk<scalar_t>, N = kVectorSize<scalar_t>;
    if (num_classes < kChunk) {
      rows = kChunk / num_classes;
      rows = rows > N ? rows / N * N : rows;  // items begin at a multiple of 16 bytes
    }
    while (lanes < kWarpSize && 2 * lanes * rows <= kThreads) {
      lanes *= 2;
    }
    while (slices < kMaxSlices && 2 * slices * kClassesOfSlice <= num_classes) {
      slices *= 2;
    }
    classes_of_slice = static_cast<int>(ceil_div(num_classes, slices));
  }

  FOCALOPS_HOST_DEVICE int vectors() const { return kThreads / slices; }
};

// Vectors in flight: what else the rows of 8 logits have takes the registers of two.
template <typename Head>
constexpr int kInFlight =
    sizeof(typename Head::scalar_t) == 2 && !std::is_void_v<typename Head::Extras>
        ? kUnroll<typename Head::scalar_t> / 2
        : kUnroll<typename Head::scalar_t>;

// Evaluates a thread's share of `left` logits of an image of rows, no more than a chunk, `begin`
// being the first; take(values, i, column) gets what becomes of the vector i logits further, whose
// first logit is that of the class `column`.
template <typename Head, typename Loss, typename Take, typename T = typename Head::T>
__device__ __forceinline__ void evaluate_rows(const Head& head, const LossLevel& level,
                                              int64_t image, int64_t begin, int left,
                                              bool with_grad, T scale, const Loss& formula,
                                              const Take& take) {
  using scalar_t = typename Head::scalar_t;
  constexpr int N = kVectorSize<scalar_t>;
  const int64_t rows = level.positions * head.anchors, size = rows * head.classes;
  const int64_t first_row = begin / head.classes;
  const auto first_column = static_cast<uint32_t>(begin - first_row * head.classes);
  // From here on all is counted from the first logit, in 32 bits.
  const int rows_left = static_cast<int>(min(rows - first_row, kLogitsPerChunk<scalar_t>));
  const int64_t first_label = image * head.rows + level.first_row + first_row;
  const Integers labels = head.labels.from(first_label);
  const auto* logits = static_cast<const scalar_t*>(level.data) + image * size + begin;
  const bool aligned = is_aligned(logits);

#pragma unroll 1
  for (int first = 0; first < kUnroll<scalar_t>; first += kInFlight<Head>) {
    Vector<scalar_t, N> vectors[kInFlight<Head>];
#pragma unroll
    for (int u = 0; u < kInFlight<Head>; ++u) {
      const int i = ((first + u) * kThreads + static_cast<int>(threadIdx.x)) * N;
      vectors[u] = load_vector<N>(logits, i, left, aligned);
    }
#pragma unroll
    for (int u = 0; u < kInFlight<Head>; ++u) {
      const int i = ((first + u) * kThreads + static_cast<int>(threadIdx.x)) * N;
      if (i >= left) {
        return;
      }
      const uint32_t from_row = first_column + i;
      const uint32_t row = head.rows_of.divide(from_row);
      const int column = static_cast<int>(head.rows_of.remainder(from_row, row));
      const auto masks = class_row_masks<N>(labels, static_cast<int>(row), rows_left, column,
                                            head.classes, head.ignore_index);
      Values<T, N> values;
      if constexpr (std::is_void_v<typename Head::Extras>) {
        values = evaluate_hard(vectors[u], masks, formula);
      } else {
        values = evaluate_extras(vectors[u], masks, head.extras.from(first_label),
                                 static_cast<int>(row), rows_left, column, head.classes, formula);
      }
      take(values, i, column);
      if (with_grad) {
        auto* grad = static_cast<scalar_t*>(level.grad) + image * size + begin;
        store_gradient(grad, i, left, is_aligned(grad), values, scale);
      }
    }
  }
}

// Planes in flight: the labels take registers too, and the weights of 8 positions even more.
template <typename Head>
constexpr int kPlanes =
    sizeof(typename Head::scalar_t) == 8 ||
            (sizeof(typename Head::scalar_t) == 2 && !std::is_void_v<typename Head::Extras>)
        ? 1
        : 2;

// The positions of one anchor that a thread has.
struct PlaneVector {
  int64_t first;  // of the positions
  int64_t row;    // of the first, in the labels
};

// N positions of the plane of a class, with what else their anchors have. `masks` are those of
// their rows but for the positive ones.
template <typename Head, int N, typename Loss, typename T = typename Head::T>
__device__ __forceinline__ Values<T, N> evaluate_plane(
    const Head& head, const Vector<typename Head::scalar_t, N>& logits, const ElementMasks& masks,
    const T (&weight)[N], int64_t row, int column, const Loss& formula) {
  const PartWeights<T> class_weights(head.extras.class_weights, column);
  const auto& of_column = of_class(formula, column);
  Values<T, N> values;
  // As of most threads: their positions are all background.
  if ((masks.foreground | masks.ignored | masks.invalid) == 0) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto value = of_column.negative(static_cast<T>(logits.data[j]));
      const T factor = weight[j] * class_weights.of_background;
      values.loss[j] = factor * value.loss;
      values.grad[j] = factor * value.grad;
    }
    return values;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t bit = 1u << j;
    const T x = masks.invalid & bit ? quiet_nan<T>() : static_cast<T>(logits.data[j]);
    LossAndGrad<T> value = of_column.negative(x);
    if (masks.positive & bit) {
      value = of_column.positive(x, head.extras.score_of(row + j * head.anchors));
    }
    const T factor = weight[j] * class_weights.at(masks.part_of(bit));
    values.loss[j] = masks.ignored & bit ? T(0) : factor * value.loss;
    values.grad[j] = masks.ignored & bit ? T(0) : factor * value.grad;
  }
  return values;
}

// Evaluates the classes begin .. end of the positions that a thread has; take(values) gets what
// becomes of a plane.
template <typename Head, typename Loss, typename Take, typename T = typename Head::T>
__device__ __forceinline__ void evaluate_planes(const Head& head, const LossLevel& level,
                                                int64_t image, int64_t anchor,
                                                const PlaneVector& place, int begin, int end,
                                                bool with_grad, T scale, const Loss& formula,
                                                const Take& take) {
  using scalar_t = typename Head::scalar_t;
  using Extras = typename Head::Extras;
  constexpr int N = kVectorSize<scalar_t>;
  const int64_t size = level.positions;
  const auto [i, row] = place;
  int positive_class[N];
  ElementMasks row_masks;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    // What lies past the end of the plane is read as background and left out of the sum.
    const int64_t label = i + j < size ? head.labels[row + j * head.anchors] : head.classes;
    const bool is_class = label >= 0 && label < head.classes && label != head.ignore_index;
    positive_class[j] = is_class ? static_cast<int>(label) : -1;
    row_masks.foreground |= is_class ? 1u << j : 0u;
    row_masks.ignored |= label == head.ignore_index ? 1u << j : 0u;
    row_masks.invalid |=
        !is_class && label != head.classes && label != head.ignore_index ? 1u << j : 0u;
  }

  T weight[N];
  if constexpr (!std::is_void_v<Extras>) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      weight[j] = i + j < size ? head.extras.weight_of(row + j * head.anchors) : T(0);
    }
  }

  const int64_t first_plane = (image * head.anchors + anchor) * head.classes;
  const auto* logits = static_cast<const scalar_t*>(level.data);
  for (int first = begin; first < end; first += kPlanes<Head>) {
    Vector<scalar_t, N> vectors[kPlanes<Head>];
#pragma unroll
    for (int u = 0; u < kPlanes<Head>; ++u) {
      if (first + u < end) {
        const auto* plane = logits + (first_plane + first + u) * size;
        vectors[u] = load_vector<N>(plane, i, size, is_aligned(plane));
      }
    }
#pragma unroll
    for (int u = 0; u < kPlanes<Head>; ++u) {
      if (first + u < end) {
        ElementMasks masks = row_masks;
        if (row_masks.foreground != 0) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            masks.positive |= positive_class[j] == first + u ? 1u << j : 0u;
          }
        }
        Values<T, N> values;
        if constexpr (std::is_void_v<Extras>) {
          values = evaluate_hard(vectors[u], masks, formula);
        } else {
          values = evaluate_plane(head, vectors[u], masks, weight, row, first + u, formula);
        }
        take(values);
        if (with_grad) {
          auto* plane = static_cast<scalar_t*>(level.grad) + (first_plane + first + u) * size;
          store_gradient(plane, i, size, is_aligned(plane), values, scale);
        }
      }
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

// items_of_image as append_level() takes it.
template <typename Head, typename ItemsOfImage>
Head make_head(const std::vector<HeadLevel>& levels, const HeadShape& shape, const Tensor& labels,
               int64_t ignore_index, const Normalizer<typename Head::T>& normalizer,
               const std::vector<Tensor>& grads, const ItemsOfImage& items_of_image) {
  Head head{{},
            0,
            0,
            Integers(labels),
            shape.rows,
            ignore_index,
            static_cast<int>(shape.anchors),
            static_cast<int>(shape.classes),
            FastDivisor(shape.classes),
            normalizer,
            {}};
  for (size_t l = 0; l < levels.size(); ++l) {
    append_level<typename Head::scalar_t>(head, levels[l],
                                          grads.empty() ? nullptr : grads[l].mutable_data_ptr(),
                                          shape.images, items_of_image);
  }
  return head;
}

}  // namespace focalops
