// The loss of the deltas that a head gives an anchor, and its derivative by them. L1 losses compare
// with the encoded box; those of the IoU family decode the deltas.
#pragma once

#include "box.h"

namespace focalops {

enum class BoxLossKind {
  kNone = -1,
  kL1,
  kSmoothL1,
  kIou,
  kGeneralizedIou,
  kDistanceIou,
  kCompleteIou
};

template <typename T>
struct BoxLossAndGrad {
  T loss;
  Deltas<T> grad;
};

template <BoxLossKind Kind, typename T>
struct BoxLoss {
  BoxCoder<T> coder;
  T beta;      // smooth L1: below it the loss is quadratic
  T per_beta;  // its inverse
  T eps;       // as in the losses of pairs

  static constexpr bool kIsL1 = Kind == BoxLossKind::kL1 || Kind == BoxLossKind::kSmoothL1;
  static constexpr IouKind kIou = Kind == BoxLossKind::kGeneralizedIou ? IouKind::kGeneralized
                                  : Kind == BoxLossKind::kDistanceIou  ? IouKind::kDistance
                                  : Kind == BoxLossKind::kCompleteIou  ? IouKind::kComplete
                                                                       : IouKind::kPlain;

  FOCALOPS_HOST_DEVICE BoxLossAndGrad<T> evaluate(const Deltas<T>& deltas, const Box<T>& anchor,
                                                  const Box<T>& gt_box) const {
    if constexpr (kIsL1) {
      const Deltas<T> target = coder.encode(gt_box, anchor);
      BoxLossAndGrad<T> result{0, {}};
      result.grad.x = add_difference(deltas.x - target.x, result.loss);
      result.grad.y = add_difference(deltas.y - target.y, result.loss);
      result.grad.w = add_difference(deltas.w - target.w, result.loss);
      result.grad.h = add_difference(deltas.h - target.h, result.loss);
      return result;
    } else {
      const IouFormula<kIou, T> formula{eps, eps};
      const Box<T> box = coder.decode(deltas, anchor);
      const auto of_box = iou_terms<kIou>(box), of_gt_box = iou_terms<kIou>(gt_box);
      const Box<T> by_box = formula.gradient(box, gt_box, of_box, of_gt_box);
      const Box<T> grad{-by_box.x1, -by_box.y1, -by_box.x2, -by_box.y2};
      return {1 - formula.value(box, gt_box, of_box, of_gt_box),
              coder.decode_gradient_of_deltas(grad, deltas, anchor)};
    }
  }

  // The plain IoU of the decoded box, with whichever loss.
  FOCALOPS_HOST_DEVICE T overlap(const Deltas<T>& deltas, const Box<T>& anchor,
                                 const Box<T>& gt_box) const {
    return iou(coder.decode(deltas, anchor), gt_box);
  }

 private:
  // Adds the loss of one difference, and returns its derivative. A NaN stays.
  FOCALOPS_HOST_DEVICE T add_difference(T difference, T& loss) const {
    const T magnitude = difference < 0 ? -difference : difference;
    if (Kind == BoxLossKind::kSmoothL1 && magnitude < beta) {
      loss += T(0.5) * difference * difference * per_beta;
      return difference * per_beta;
    }
    loss += Kind == BoxLossKind::kSmoothL1 ? magnitude - T(0.5) * beta : magnitude;
    return difference > 0 ? T(1) : difference < 0 ? T(-1) : difference;
  }
};

// Calls f with the loss of the kind, which has been checked. Where none is asked for, any has the
// overlap.
template <typename T, typename F>
void dispatch_box_loss(int64_t kind, const BoxCoder<T>& coder, double beta, double eps, F&& f) {
  const auto call = [&](auto&& loss) {
    loss.coder = coder;
    loss.beta = static_cast<T>(beta);
    loss.per_beta = static_cast<T>(beta > 0 ? 1 / beta : 0);
    loss.eps = static_cast<T>(eps);
    f(loss);
  };
  switch (static_cast<BoxLossKind>(kind)) {
    case BoxLossKind::kL1:
      return call(BoxLoss<BoxLossKind::kL1, T>{});
    case BoxLossKind::kSmoothL1:
      return call(BoxLoss<BoxLossKind::kSmoothL1, T>{});
    case BoxLossKind::kNone:
    case BoxLossKind::kIou:
      return call(BoxLoss<BoxLossKind::kIou, T>{});
    case BoxLossKind::kGeneralizedIou:
      return call(BoxLoss<BoxLossKind::kGeneralizedIou, T>{});
    case BoxLossKind::kDistanceIou:
      return call(BoxLoss<BoxLossKind::kDistanceIou, T>{});
    default:
      return call(BoxLoss<BoxLossKind::kCompleteIou, T>{});
  }
}

}  // namespace focalops
