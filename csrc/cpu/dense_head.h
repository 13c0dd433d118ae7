// The classification losses of a head's levels share this on the CPU: one pass over the logits,
// where the head left them.
//
// Work is cut into pieces, each of one image of one level: the unit of parallel work, and of the
// sum's order. Rows (channels_last) are evaluated as in focal_loss.cpp. In planes (contiguous) a
// piece is a stretch of one anchor's positions through all classes: its labels are read once and
// sorted by class, so that each plane finds its positives in turn.
#pragma once

#include <vector>

#include "../head_levels.h"
#include "focal_loss.h"

namespace focalops {
namespace {

// A level consists of these pieces.
struct Pieces {
  int64_t first;
  int64_t of_image;
  int64_t stretches;  // planes only: of how many pieces a plane consists
};

// Of rows a piece has `logits_of_piece` of an image, the last one fewer.
struct Cut {
  std::vector<Pieces> levels;
  int64_t num_pieces = 0;
  int64_t logits_of_piece;

  Cut(const std::vector<HeadLevel>& head_levels, const HeadShape& shape, int64_t logits_of_piece)
      : logits_of_piece(logits_of_piece) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    for (const HeadLevel& level : head_levels) {
      const int64_t stretches = ceil_div(level.positions, kBlock);
      const int64_t logits = level.positions * shape.anchors * shape.classes;
      const int64_t of_image =
          level.has_rows ? ceil_div(logits, logits_of_piece) : shape.anchors * stretches;
      levels.push_back({num_pieces, of_image, stretches});
      num_pieces += shape.images * of_image;
    }
  }
};

struct Piece {
  size_t level;
  int64_t image;
  int64_t part;  // of the image
  int64_t number;
};

inline Piece piece_of(const Cut& cut, int64_t number) {
  size_t l = 0;
  while (l + 1 < cut.levels.size() && number >= cut.levels[l + 1].first) {
    ++l;
  }
  const Pieces& pieces = cut.levels[l];
  const int64_t in_level = number - pieces.first;
  return {l, in_level / pieces.of_image, in_level % pieces.of_image, number};
}

// Calls f(piece, block) for each piece, from any thread.
template <typename T, typename F>
void for_each_piece(const Cut& cut, const F& f) {
  torch::stable::parallel_for(0, cut.num_pieces, 1, [&](int64_t number, int64_t end) {
    Block<T> block;
    for (; number < end; ++number) {
      f(piece_of(cut, number), block);
    }
  });
}

template <typename scalar_t, typename index_t>
struct DenseHead {
  using T = compute_t<scalar_t>;

  const std::vector<HeadLevel>& levels;
  HeadShape shape;
  const Cut& cut;
  const index_t* labels;  // [B, rows]
  RowExtras<T> extras;    // as the labels
  int64_t ignore_index;
  InvalidIndex invalid{};

  // Evaluates a piece and hands each block to consume(begin, n, block), begin counted from the
  // level's first logit.
  template <bool WithGrad, typename Loss, typename Consume>
  void evaluate(const Piece& piece, const Loss& formula, Block<T>& block, const Consume& consume) {
    const HeadLevel& level = levels[piece.level];
    const int64_t image = piece.image;
    const auto* logits = static_cast<const scalar_t*>(level.tensor.const_data_ptr());
    const int64_t first_row = image * shape.rows + level.first_row;
    const int64_t size = level.positions * shape.anchors * shape.classes;  // of an image
    if (level.has_rows) {
      const int64_t end = std::min((piece.part + 1) * cut.logits_of_piece, size);
      for (int64_t begin = piece.part * cut.logits_of_piece; begin < end; begin += kBlock) {
        const int64_t n = std::min(kBlock, end - begin);
        evaluate_rows<WithGrad>(logits + image * size, labels + first_row, extras.from(first_row),
                                shape.classes, ignore_index, begin, n, formula, block, invalid);
        consume(image * size + begin, n, block);
      }
      return;
    }
    const int64_t stretches = cut.levels[piece.level].stretches;
    const int64_t anchor = piece.part / stretches, stretch = piece.part % stretches;
    const int64_t begin = level.positions * stretch / stretches;
    const int64_t n = level.positions * (stretch + 1) / stretches - begin;
    const int64_t first_plane = (image * shape.anchors + anchor) * shape.classes;
    evaluate_planes<WithGrad>(logits, first_row + begin * shape.anchors + anchor,
                              first_plane * level.positions + begin, level.positions, n, formula,
                              block, consume);
  }

 private:
  // n positions from `begin` on, in each of the classes' planes; `row` is the first one's.
  template <bool WithGrad, typename Loss, typename Consume>
  void evaluate_planes(const scalar_t* logits, int64_t row, int64_t begin, int64_t plane_size,
                       int64_t n, const Loss& formula, Block<T>& block, const Consume& consume) {
    struct Labelled {
      int64_t label, at;
      T score;
    } labelled[kBlock];
    int64_t num_labelled = 0, num_ignored = 0;
    Range ignored[kBlock];
    for (int64_t at = 0; at < n; ++at, row += shape.anchors) {
      const int64_t label = labels[row];
      block.weights[at] = extras.weight_of(row);
      if (label == ignore_index) {
        ignored[num_ignored++] = {at, at + 1};
      } else if (label >= 0 && label < shape.classes) {
        labelled[num_labelled++] = {label, at, extras.score_of(row)};
      } else if (label != shape.classes) {
        invalid.note(label);
      }
    }
    std::sort(labelled, labelled + num_labelled,
              [](const Labelled& a, const Labelled& b) { return a.label < b.label; });

    Positive<T> positives[kBlock];
    const bool by_part = extras.class_weights.stride > 0;
    T foreground_loss[kBlock], foreground_grad[kBlock];  // by_part: before they are weighed
    int64_t next = 0;
    for (int64_t k = 0; k < shape.classes; ++k, begin += plane_size) {
      const T* plane = as_computed(logits + begin, block.logits, n);
      int64_t num_positives = 0;
      for (; next < num_labelled && labelled[next].label == k; ++next) {
        positives[num_positives++] = {labelled[next].at, labelled[next].score};
      }
      const auto& of_k = of_class(formula, k);
      evaluate_negatives<WithGrad>(plane, block.loss, block.grad, n, of_k, 0);
      evaluate_positives<WithGrad>(plane, positives, num_positives, of_k, 0, block);
      for (int64_t i = 0; by_part && i < num_labelled; ++i) {
        const auto [label, at, _] = labelled[i];
        const T weight = block.weights[at] *
                         extras.class_weights.at(label == k ? kPositive : kNegativeOfForeground, k);
        foreground_loss[i] = weight * block.loss[at];
        foreground_grad[i] = WithGrad ? weight * block.grad[at] : T(0);
      }
      if (extras.weighs()) {
        weigh<WithGrad>(block, extras.class_weights.at(kNegativeOfBackground, k), n);
      }
      for (int64_t i = 0; by_part && i < num_labelled; ++i) {
        block.loss[labelled[i].at] = foreground_loss[i];
        if (WithGrad) {
          block.grad[labelled[i].at] = foreground_grad[i];
        }
      }
      clear<WithGrad>(ignored, num_ignored, block);
      consume(begin, n, block);
    }
  }
};

}  // namespace
}  // namespace focalops
