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

template <typename T>
FOCALOPS_HOST_DEVICE bool suppresses(const Box<T>& a, const Box<T>& b, T area_a, T area_b,
                                     T threshold) {
  return (threshold < 0 || may_suppress(a, b, area_a, area_b, threshold)) &&
         iou(a, b, area_a, area_b) > threshold;
}

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

}  // namespace focalops
