// The losses of a head's anchors on the CPU, one an anchor, and the gradient multiplied by one
// number an anchor.
#include "../checks/dense_row_losses.h"
#include "../math/row_losses.h"
#include "dense_head.h"

namespace focalops {
namespace {

// Adds up n losses of rows of K, of which the first begins `column` logits before.
template <typename T>
FOCALOPS_SIMD void add_rows(const T* loss, int64_t column, int64_t n, int64_t num_classes,
                            T divisor, T* rows) {
  if (num_classes == 1) {
    for (int64_t i = 0; i < n; ++i) {
      rows[i] = loss[i] / divisor;
    }
    return;
  }
  for (int64_t i = 0; i < n; ++rows) {
    const int64_t left = num_classes - column, end = left < n - i ? i + left : n;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = i; j < end; ++j) {
      sum += loss[j];
    }
    *rows = column == 0 ? sum / divisor : *rows + sum / divisor;
    i = end;
    column = 0;
  }
}

template <typename T>
FOCALOPS_SIMD void add(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] += from[i];
  }
}

// Takes the blocks of a piece and writes the sums of its rows.
template <typename T>
struct RowSums {
  const HeadLevel& level;
  const HeadShape& shape;
  T divisor;
  T* losses;         // [rows] of the image, the level's
  T sums[kBlock]{};  // planes: of the positions of the piece

  // `begin` is counted from the image's first logit.
  void take(const T* loss, int64_t begin, int64_t n) {
    if (level.has_rows) {
      const int64_t row = begin / shape.classes;
      return add_rows(loss, begin - row * shape.classes, n, shape.classes, divisor, losses + row);
    }
    const int64_t plane = begin / level.positions, at = begin - plane * level.positions;
    const int64_t anchor = plane / shape.classes;
    add(loss, sums, n);
    if (plane - anchor * shape.classes == shape.classes - 1) {
      for (int64_t i = 0; i < n; ++i) {
        losses[(at + i) * shape.anchors + anchor] = sums[i] / divisor;
      }
    }
  }
};

std::tuple<Tensor, std::vector<Tensor>> dense_row_losses_cpu(
    const std::vector<Tensor>& cls_logits, const Tensor& labels_,
    const std::optional<Tensor>& scores_, const Name& name, const std::vector<double>& parameters,
    const std::optional<Tensor>& weight_, const std::optional<Tensor>& class_weight_,
    int64_t ignore_index, const std::optional<Tensor>& normalizer_, double min_normalizer,
    bool compute_grad) {
  const HeadShape shape = check_dense_row_losses(cls_logits, labels_, scores_, name, parameters,
                                                 weight_, class_weight_, normalizer_);
  const auto levels = head_levels(cls_logits, shape);
  const Tensor labels = torch::stable::contiguous(labels_);
  const auto scores = contiguous(scores_), weight = contiguous(weight_),
             class_weight = contiguous(class_weight_), given = contiguous(normalizer_);
  std::vector<Tensor> grads;
  for (size_t l = 0; compute_grad && l < levels.size(); ++l) {
    grads.push_back(new_like(levels[l].tensor));
  }
  const ScalarType dtype = levels[0].tensor.scalar_type();
  Tensor losses = torch::stable::new_empty(labels, labels.sizes(), compute_dtype(dtype));
  if (shape.classes == 0) {
    return {torch::stable::zero_(losses), grads};
  }
  // A row is of one piece.
  const Cut cut(levels, shape,
                std::max<int64_t>(kLogitsPerChunk / shape.classes, 1) * shape.classes);

  const auto run = [&](auto member, auto scalar_tag, auto index_tag) {
    using scalar_t = tag_t<decltype(scalar_tag)>;
    using index_t = tag_t<decltype(index_tag)>;
    using T = compute_t<scalar_t>;
    const auto normalizer = normalizer_of<T>(given, min_normalizer);
    DenseHead<scalar_t, index_t> head{
        levels,
        shape,
        cut,
        static_cast<const index_t*>(labels.const_data_ptr()),
        {data_of<T>(weight), class_weights_of<T>(class_weight), data_of<T>(scores)},
        ignore_index};
    decltype(member)::template dispatch<T>(parameters, [&](const auto& formula) {
      for_each_piece<T>(cut, [&](const Piece& piece, Block<T>& block) {
        const HeadLevel& level = levels[piece.level];
        const T divisor = normalizer.divisor(piece.image);
        const int64_t first = piece.image * shape.anchors * shape.classes * level.positions;
        RowSums<T> rows{level, shape, divisor,
                        data_of<T>(losses) + piece.image * shape.rows + level.first_row};
        if (compute_grad) {
          auto* grad = static_cast<scalar_t*>(grads[piece.level].mutable_data_ptr());
          const T scale = gradient_scale<scalar_t>(divisor);
          head.template evaluate<true>(piece, formula, block,
                                       [&](int64_t begin, int64_t n, const auto& values) {
                                         rows.take(values.loss, begin - first, n);
                                         scale_and_convert(values.grad, scale, grad + begin, n);
                                       });
        } else {
          head.template evaluate<false>(piece, formula, block,
                                        [&](int64_t begin, int64_t n, const auto& values) {
                                          rows.take(values.loss, begin - first, n);
                                        });
        }
      });
    });
    head.invalid.check(dense_loss_name(name), "labels", shape.classes, ignore_index);
  };
  with_row_loss("dense_row_losses", name, [&](auto member) {
    if constexpr (!decltype(member)::kIsSoftmax) {
      dispatch_floating(dtype, [&](auto scalar_tag) {
        dispatch_index(labels.scalar_type(),
                       [&](auto index_tag) { run(member, scalar_tag, index_tag); });
      });
    }
  });
  return {losses, grads};
}

// ---- the gradient times one number an anchor ----------------------------------------------------

// The factors of n logits of rows of K, of which the first begins `column` logits before.
template <typename T>
FOCALOPS_SIMD void repeat(const T* factors, int64_t column, int64_t n, int64_t num_classes,
                          T* repeated) {
  for (int64_t i = 0; i < n; ++factors) {
    const int64_t left = num_classes - column, end = left < n - i ? i + left : n;
    for (; i < end; ++i) {
      repeated[i] = *factors;
    }
    column = 0;
  }
}

template <typename scalar_t, typename T>
FOCALOPS_SIMD void multiply_each(scalar_t* data, const T* factors, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    data[i] = static_cast<scalar_t>(factors[i] * static_cast<T>(data[i]));
  }
}

// Of rows as short as a box's deltas the repeated factors would take longer than the products.
template <int Columns, typename scalar_t, typename T>
FOCALOPS_SIMD void multiply_rows(scalar_t* data, const T* factors, int64_t rows) {
  FOCALOPS_INDEPENDENT
  for (int64_t row = 0; row < rows; ++row) {
    const T factor = factors[row];
    for (int column = 0; column < Columns; ++column) {
      scalar_t& number = data[Columns * row + column];
      number = static_cast<scalar_t>(factor * static_cast<T>(number));
    }
  }
}

void scale_rows_cpu(const Tensor& tensor, const Tensor& scale_, int64_t anchors,
                    int64_t first_row) {
  const HeadShape shape = check_scale_rows(tensor, scale_, anchors, first_row);
  if (tensor.numel() == 0) {
    return;
  }
  const HeadLevel level = head_levels({tensor}, shape)[0];
  const Tensor scale = torch::stable::contiguous(scale_);
  const Cut cut({level}, shape,
                std::max<int64_t>(kLogitsPerChunk / shape.classes, 1) * shape.classes);
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    auto* data = static_cast<scalar_t*>(tensor.mutable_data_ptr());
    const auto* factors = static_cast<const T*>(scale.const_data_ptr());
    const int64_t rows = level.positions * anchors, size = rows * shape.classes;
    for_each_piece<T>(cut, [&](const Piece& piece, Block<T>& block) {
      const T* of_image = factors + piece.image * shape.rows + first_row;
      scalar_t* image = data + piece.image * size;
      if (level.has_rows) {
        const int64_t first = piece.part * cut.logits_of_piece;
        const int64_t end = std::min(first + cut.logits_of_piece, size);
        if (shape.classes == 4) {
          return multiply_rows<4>(image + first, of_image + first / 4, (end - first) / 4);
        }
        for (int64_t begin = first; begin < end; begin += kBlock) {
          const int64_t n = std::min(kBlock, end - begin), row = begin / shape.classes;
          repeat(of_image + row, begin - row * shape.classes, n, shape.classes, block.weights);
          multiply_each(image + begin, block.weights, n);
        }
        return;
      }
      const int64_t stretches = cut.levels[0].stretches;
      const int64_t anchor = piece.part / stretches, stretch = piece.part % stretches;
      const int64_t begin = level.positions * stretch / stretches;
      const int64_t n = level.positions * (stretch + 1) / stretches - begin;
      for (int64_t i = 0; i < n; ++i) {
        block.weights[i] = of_image[(begin + i) * anchors + anchor];
      }
      for (int64_t k = 0; k < shape.classes; ++k) {
        const int64_t plane = anchor * shape.classes + k;
        multiply_each(image + plane * level.positions + begin, block.weights, n);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("dense_row_losses", TORCH_BOX(&dense_row_losses_cpu));
  m.impl("_scale_rows_", TORCH_BOX(&scale_rows_cpu));
}

}  // namespace focalops
