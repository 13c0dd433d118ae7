// Boxes as distances from a point to its four sides, and distances as distributions over bins (Li
// et al., "Generalized Focal Loss", 2020).
#pragma once

#include "box.h"
#include "box_loss.h"
#include "focal.h"

// In front of a loop over the sides: what a thread keeps of each of them is in registers then.
#ifdef __CUDA_ARCH__
#define FOCALOPS_UNROLL _Pragma("unroll")
#else
#define FOCALOPS_UNROLL
#endif

namespace focalops {

// The expectation of a bin under the softmax of logits that come one by one: one exponential each.
// Where a logit is the greatest so far, what has been added up is scaled down instead.
template <typename T>
struct Expectation {
  T largest = -detail::largest(T());
  T sum = 0;       // of exp(x - largest)
  T weighted = 0;  // the same, times the bin

  FOCALOPS_HOST_DEVICE void add(T x, T bin) {
    const bool leads = x > largest;
    const T e = detail::exp_nonpositive(leads ? largest - x : x - largest);
    const T kept = leads ? e : T(1), added = leads ? T(1) : e;
    sum = sum * kept + added;
    weighted = weighted * kept + bin * added;
    largest = leads ? x : largest;
  }

  // An infinite logit has no softmax: its difference from itself makes this a NaN.
  FOCALOPS_HOST_DEVICE T value() const { return weighted / sum + (largest - largest); }
};

// Sides are numbered left, top, right, bottom: of one box, or of its distances from a point.
template <typename T>
FOCALOPS_HOST_DEVICE T coordinate_of_side(int side, T of_point, T stride, T distance) {
  const T reach = mul(stride, distance);
  return side < 2 ? sub(of_point, reach) : add(of_point, reach);
}

template <typename T>
FOCALOPS_HOST_DEVICE T gradient_of_distance(int side, T stride, T upstream) {
  return side < 2 ? -stride * upstream : stride * upstream;
}

// An image's size, or infinite: no clipping.
template <typename T>
struct ImageBounds {
  T low, high;

  // A NaN stays.
  FOCALOPS_HOST_DEVICE T clip(T x) const { return x < low ? low : x > high ? high : x; }

  // At a bound there is no gradient, nor of a NaN, as of torch.clamp with numbers.
  FOCALOPS_HOST_DEVICE bool passes_gradient(T x) const {
    return ((x > low) & (x < high)) | (low < 0);
  }
};

// `image_sizes`, [B, 2] of height and width, may be null. 0, 2: bounds of x; 1, 3: of y.
template <typename T>
FOCALOPS_HOST_DEVICE ImageBounds<T> bounds_of_side(const T* image_sizes, int64_t image, int side) {
  if (image_sizes == nullptr) {
    const T infinity = static_cast<T>(__builtin_huge_val());
    return {-infinity, infinity};
  }
  return {T(0), image_sizes[2 * image + 1 - side % 2]};
}

// A distance between two bins, as the distribution that the distribution focal loss asks for.
template <typename T>
struct BetweenBins {
  int left;  // the bin; the other is the next one
  T share;   // of the right one; NaN where the distance is

  // The cross entropy; the arguments are by how much the logits of the two bins are below the
  // logarithm of the sum of exponentials. A bin without a share does not count, however unlikely.
  FOCALOPS_HOST_DEVICE T loss(T below_left, T below_right) const {
    const T rest = 1 - share;
    return (rest == 0 ? T(0) : rest * below_left) + (share == 0 ? T(0) : share * below_right);
  }

  // d loss / d logit of a bin with this probability. Where the distance is a NaN, so is that of
  // every bin.
  FOCALOPS_HOST_DEVICE T gradient(int bin, T probability) const {
    const T asked = bin == left ? 1 - share : bin == left + 1 ? share : share - share;
    return probability - asked;
  }
};

// What lies beyond the bins counts as the first or the last of them.
template <typename T>
FOCALOPS_HOST_DEVICE BetweenBins<T> between_bins(T distance, int bins) {
  const T most = static_cast<T>(bins - 1);
  const T inside = distance < 0 ? T(0) : distance > most ? most : distance;
  const int floor = inside > 0 ? static_cast<int>(inside) : 0;  // of a NaN 0
  const int left = floor < bins - 2 ? floor : bins - 2;
  return {left, inside - static_cast<T>(left)};
}

// The loss of the box that a head's distances make, one of the IoU family, and `dfl_weight` times
// the mean distribution focal loss of its four sides. Boxes beyond the bins have the last one as
// target.
template <IouKind Kind, typename T>
struct DistanceLoss {
  T eps;  // as in the losses of pairs
  T dfl_weight;
  int bins;

  struct Value {
    T loss;
    T iou;  // the plain one, with whichever loss
  };

  // load(side, bin) is a logit, or with one bin the distance; store(side, bin, grad) gets the
  // derivative of the loss by it.
  template <bool WithGrad, typename Load, typename Store>
  FOCALOPS_HOST_DEVICE Value evaluate(T x, T y, T stride, const Box<T>& gt_box, const Load& load,
                                      const Store& store) const {
    const T point[4] = {x, y, x, y};
    const T truth[4] = {gt_box.x1, gt_box.y1, gt_box.x2, gt_box.y2};
    Expectation<T> expectations[4];
    T distances[4], sides[4];
    T dfl = 0;
    FOCALOPS_UNROLL
    for (int side = 0; side < 4; ++side) {
      if (bins == 1) {
        distances[side] = load(side, 0);
      } else {
        Expectation<T>& expectation = expectations[side];
        for (int bin = 0; bin < bins; ++bin) {
          expectation.add(load(side, bin), static_cast<T>(bin));
        }
        distances[side] = expectation.value();
        if (dfl_weight > 0) {
          const auto between = target(side, point[side], truth[side], stride);
          const T log_sum = logarithm(expectation.sum) + expectation.largest;
          dfl += between.loss(log_sum - load(side, between.left),
                              log_sum - load(side, between.left + 1));
        }
      }
      sides[side] = coordinate_of_side(side, point[side], stride, distances[side]);
    }
    const IouFormula<Kind, T> formula{eps, eps};
    const Box<T> box{sides[0], sides[1], sides[2], sides[3]};
    const auto of_box = iou_terms<Kind>(box), of_gt_box = iou_terms<Kind>(gt_box);
    const T loss = 1 - formula.value(box, gt_box, of_box, of_gt_box);
    if constexpr (WithGrad) {
      const Box<T> by_box = formula.gradient(box, gt_box, of_box, of_gt_box);
      const T by_side[4] = {-by_box.x1, -by_box.y1, -by_box.x2, -by_box.y2};
      FOCALOPS_UNROLL
      for (int side = 0; side < 4; ++side) {
        const T by_distance = gradient_of_distance(side, stride, by_side[side]);
        if (bins == 1) {
          store(side, 0, by_distance);
          continue;
        }
        const auto between = target(side, point[side], truth[side], stride);
        const T per_sum = 1 / expectations[side].sum;
        for (int bin = 0; bin < bins; ++bin) {
          const T p =
              per_sum * detail::exp_nonpositive(load(side, bin) - expectations[side].largest);
          store(side, bin,
                by_distance * p * (static_cast<T>(bin) - distances[side]) +
                    quarter() * between.gradient(bin, p));
        }
      }
    }
    return {loss + quarter() * dfl, iou(box, gt_box)};
  }

 private:
  FOCALOPS_HOST_DEVICE T quarter() const { return T(0.25) * dfl_weight; }

  FOCALOPS_HOST_DEVICE BetweenBins<T> target(int side, T of_point, T of_truth, T stride) const {
    const T reach = side < 2 ? of_point - of_truth : of_truth - of_point;
    return between_bins(reach / stride, bins);
  }
};

// Calls f with the loss of the kind, which has been checked.
template <typename T, typename F>
void dispatch_distance_loss(int64_t kind, double eps, double dfl_weight, int64_t bins, F&& f) {
  const auto call = [&](auto tag) {
    f(DistanceLoss<decltype(tag)::value, T>{static_cast<T>(eps), static_cast<T>(dfl_weight),
                                            static_cast<int>(bins)});
  };
  switch (static_cast<BoxLossKind>(kind)) {
    case BoxLossKind::kIou:
      return call(std::integral_constant<IouKind, IouKind::kPlain>{});
    case BoxLossKind::kGeneralizedIou:
      return call(std::integral_constant<IouKind, IouKind::kGeneralized>{});
    case BoxLossKind::kDistanceIou:
      return call(std::integral_constant<IouKind, IouKind::kDistance>{});
    default:
      return call(std::integral_constant<IouKind, IouKind::kComplete>{});
  }
}

}  // namespace focalops
