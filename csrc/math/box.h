// Boxes: xyxy, absolute pixels, no "+1". IoU of two empty boxes is 0.
//
// Low-quality matches and NMS compare IoUs that are computed twice, on different machines, so an IoU must be the same bits
// everywhere: every operation here rounds once (no contraction to a fused multiply-add on the device; the host compiles box
// code with -ffp-contract=off), and division is IEEE division.
#pragma once

#include <cmath>

#include "host_device.h"

namespace focalops {

#ifdef __CUDA_ARCH__
FOCALOPS_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FOCALOPS_HOST_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
FOCALOPS_HOST_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
FOCALOPS_HOST_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
FOCALOPS_HOST_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
FOCALOPS_HOST_DEVICE double sub(double a, double b) { return __dsub_rn(a, b); }
FOCALOPS_HOST_DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
FOCALOPS_HOST_DEVICE double div(double a, double b) { return __ddiv_rn(a, b); }
#else
template <typename T>
FOCALOPS_HOST_DEVICE T add(T a, T b) { return a + b; }
template <typename T>
FOCALOPS_HOST_DEVICE T sub(T a, T b) { return a - b; }
template <typename T>
FOCALOPS_HOST_DEVICE T mul(T a, T b) { return a * b; }
template <typename T>
FOCALOPS_HOST_DEVICE T div(T a, T b) { return a / b; }
#endif

// Of two numbers; the second where either is a NaN. Written so that loops over them are vectorised.
template <typename T>
FOCALOPS_HOST_DEVICE T min_of(T a, T b) { return a < b ? a : b; }
template <typename T>
FOCALOPS_HOST_DEVICE T max_of(T a, T b) { return a > b ? a : b; }

template <typename T>
struct alignas(4 * sizeof(T)) Box {
  T x1, y1, x2, y2;
};

template <typename T>
FOCALOPS_HOST_DEVICE T area(const Box<T>& box) {
  return mul(sub(box.x2, box.x1), sub(box.y2, box.y1));
}

template <typename T>
FOCALOPS_HOST_DEVICE T intersection(const Box<T>& a, const Box<T>& b) {
  const T width = max_of(sub(min_of(a.x2, b.x2), max_of(a.x1, b.x1)), T(0));
  const T height = max_of(sub(min_of(a.y2, b.y2), max_of(a.y1, b.y1)), T(0));
  return mul(width, height);
}

// Intersection over union; a NaN coordinate gives a NaN, through the area. `area_a` and `area_b` are area(a) and area(b): the
// caller has them at hand.
template <typename T>
FOCALOPS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b, T area_a, T area_b) {
  const T both = intersection(a, b);
  const T either = sub(add(area_a, area_b), both);
  return either == 0 ? T(0) : div(both, either);
}

template <typename T>
FOCALOPS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b) {
  return iou(a, b, area(a), area(b));
}

}  // namespace focalops
