// NMS: what two boxes do to each other.
#pragma once

#include <limits>

#include "box.h"

namespace focalops {

// The greatest T that is not above the threshold: a T is above the one where it is above the other.
template <typename T>
inline T round_down(double threshold) {
  const T rounded = static_cast<T>(threshold);
  return rounded > threshold ? std::nextafter(rounded, -std::numeric_limits<T>::infinity())
                             : rounded;
}

// False only where the IoU is not above the threshold, and seldom true there: it spares most of the
// divisions. A quotient that rounds to more than t is more than t; then t times the union is less
// than the intersection, and is not rounded past it, as that is a T itself. Not for thresholds
// below 0, which boxes without an intersection exceed.
template <typename T>
FOCALOPS_HOST_DEVICE bool may_suppress(const Box<T>& a, const Box<T>& b, T area_a, T area_b,
                                       T threshold) {
  const T both = intersection(a, b);
  return both >= mul(threshold, sub(add(area_a, area_b), both));
}

// IoU, or DIoU (Zheng et al., 2020), which is never above it.
template <bool ByDistance, typename T>
FOCALOPS_HOST_DEVICE T overlap(const Box<T>& a, const Box<T>& b, T area_a, T area_b) {
  if constexpr (ByDistance) {
    constexpr IouFormula<IouKind::kDistance, T> kDistanceIou{T(0), T(1e-7)};
    return kDistanceIou.value(a, b, {area_a, T(0)}, {area_b, T(0)});
  } else {
    return iou(a, b, area_a, area_b);
  }
}

// Says when a kept box suppresses another one of its class.
template <typename T>
struct Suppression {
  T threshold;
  bool by_distance;

  FOCALOPS_HOST_DEVICE bool operator()(const Box<T>& a, const Box<T>& b, T area_a, T area_b) const {
    return (threshold < 0 || may_suppress(a, b, area_a, area_b, threshold)) &&
           (by_distance ? overlap<true>(a, b, area_a, area_b)
                        : overlap<false>(a, b, area_a, area_b)) > threshold;
  }
};

template <typename T>
FOCALOPS_HOST_DEVICE bool has_nan(const Box<T>& box) {
  return box.x1 != box.x1 || box.y1 != box.y1 || box.x2 != box.x2 || box.y2 != box.y2;
}

// Soft-NMS (Bodla et al., "Improving Object Detection With One Line of Code", 2017): what becomes
// of a score beside a better box.
template <typename T>
struct ScoreDecay {
  T iou_threshold;  // linear: no decay up to it
  T sigma;          // gaussian
  bool is_gaussian;

  FOCALOPS_HOST_DEVICE T operator()(T score, T iou) const {
    if (is_gaussian) {
      return mul(score, T(std::exp(-div(mul(iou, iou), sigma))));
    }
    return iou > iou_threshold ? mul(score, sub(T(1), iou)) : score;
  }
};

// Matrix NMS (Wang et al., "SOLOv2", 2020): what all better boxes of its class at once leave of a
// score. A box leaves less the greater its IoU with this one, and more the greater its own IoU with
// a box that is better still, `beneath`: it would not be there itself. left_by is to be minimised.
template <typename T>
struct LinearDecay {
  static constexpr T kLeftByNone = 1;

  FOCALOPS_HOST_DEVICE T left_by(T iou, T beneath) const {
    const T left = div(sub(T(1), iou), divisor(sub(T(1), beneath)));
    return beneath < 1 ? left : T(1);
  }

  FOCALOPS_HOST_DEVICE T factor(T least) const { return max_of(least, T(0)); }
};

template <typename T>
struct GaussianDecay {
  static constexpr T kLeftByNone = 0;
  T sigma;

  FOCALOPS_HOST_DEVICE T left_by(T iou, T beneath) const {
    return sub(mul(beneath, beneath), mul(iou, iou));
  }

  FOCALOPS_HOST_DEVICE T factor(T least) const { return T(std::exp(mul(sigma, least))); }
};

// function(decay)
template <typename T, typename F>
void dispatch_matrix_decay(bool is_gaussian, double sigma, const F& function) {
  if (is_gaussian) {
    function(GaussianDecay<T>{static_cast<T>(sigma)});
  } else {
    function(LinearDecay<T>{});
  }
}

}  // namespace focalops
