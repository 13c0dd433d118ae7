// Boxes: xyxy, absolute pixels, no "+1". IoU of two empty boxes is 0.
//
// Low-quality matches and NMS compare IoUs that are computed twice, on different machines, so an
// IoU must be the same bits everywhere: every operation here rounds once (no contraction to a fused
// multiply-add on the device; the host compiles box code with -ffp-contract=off), and division is
// IEEE division.
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
FOCALOPS_HOST_DEVICE T add(T a, T b) {
  return a + b;
}
template <typename T>
FOCALOPS_HOST_DEVICE T sub(T a, T b) {
  return a - b;
}
template <typename T>
FOCALOPS_HOST_DEVICE T mul(T a, T b) {
  return a * b;
}
template <typename T>
FOCALOPS_HOST_DEVICE T div(T a, T b) {
  return a / b;
}
#endif

// Of two numbers; the second where either is a NaN. Written so that loops over them are vectorised.
template <typename T>
FOCALOPS_HOST_DEVICE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
FOCALOPS_HOST_DEVICE T max_of(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
struct alignas(4 * sizeof(T)) Box {
  T x1, y1, x2, y2;
};

// From memory that need not be aligned as a Box is.
template <typename T>
FOCALOPS_HOST_DEVICE Box<T> load_box(const T* coordinates) {
  return {coordinates[0], coordinates[1], coordinates[2], coordinates[3]};
}

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

// Intersection over union; a NaN coordinate gives a NaN, through the area. `area_a` and `area_b`
// are area(a) and area(b): the caller has them at hand.
template <typename T>
FOCALOPS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b, T area_a, T area_b) {
  const T both = intersection(a, b);
  const T either = sub(add(area_a, area_b), both);
  // Where either is 0, both is 0 too. A division that is always taken can be vectorised.
  return div(both, either == 0 ? T(1) : either);
}

template <typename T>
FOCALOPS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b) {
  return iou(a, b, area(a), area(b));
}

// Whether the boxes overlap by more than an edge. Where they do not, or a coordinate is NaN, their
// IoU is 0 or NaN.
template <typename T>
FOCALOPS_HOST_DEVICE bool intersects(const Box<T>& a, const Box<T>& b) {
  return (a.x1 < b.x2) & (b.x1 < a.x2) & (a.y1 < b.y2) & (b.y1 < a.y2);
}

// The derivative of max(a, b), and of min(b, a), with respect to a. Equal arguments share it, as in
// torch.
template <typename T>
FOCALOPS_HOST_DEVICE T share_of_greater(T a, T b) {
  return a > b ? T(1) : a == b ? T(0.5) : T(0);
}

// d iou(a, b) / d a. Boxes that only touch do not pull at each other: there the intersection has no
// gradient.
template <typename T>
FOCALOPS_HOST_DEVICE Box<T> iou_gradient(const Box<T>& a, const Box<T>& b, T area_a, T area_b) {
  const T width = max_of(min_of(a.x2, b.x2) - max_of(a.x1, b.x1), T(0));
  const T height = max_of(min_of(a.y2, b.y2) - max_of(a.y1, b.y1), T(0));
  const T both = width * height;
  const T either = area_a + area_b - both;
  const T per_either = either == 0 ? T(0) : 1 / (either == 0 ? T(1) : either);
  const T value = both * per_either;
  const T by_both = (1 + value) * per_either;  // either shrinks as both grows
  const T by_area = -value * per_either;
  const T by_width = width > 0 ? by_both * height : T(0);
  const T by_height = height > 0 ? by_both * width : T(0);
  const T by_a_width = by_area * (a.y2 - a.y1);
  const T by_a_height = by_area * (a.x2 - a.x1);
  return {-by_width * share_of_greater(a.x1, b.x1) - by_a_width,
          -by_height * share_of_greater(a.y1, b.y1) - by_a_height,
          by_width * share_of_greater(b.x2, a.x2) + by_a_width,
          by_height * share_of_greater(b.y2, a.y2) + by_a_height};
}

// ---- box coding (Girshick et al., "Rich feature hierarchies", 2014, appendix C)
// ------------------------------------

// Four numbers like a Box, so that both are read and written alike.
template <typename T>
struct alignas(4 * sizeof(T)) Deltas {
  T x, y, w, h;
};

template <typename To, typename From>
FOCALOPS_HOST_DEVICE Deltas<To> deltas_cast(const Deltas<From>& deltas) {
  return {static_cast<To>(deltas.x), static_cast<To>(deltas.y), static_cast<To>(deltas.w),
          static_cast<To>(deltas.h)};
}

template <typename T>
struct CenterSize {
  T x, y, w, h;
};

template <typename T>
FOCALOPS_HOST_DEVICE CenterSize<T> center_size(const Box<T>& box) {
  const T w = sub(box.x2, box.x1), h = sub(box.y2, box.y1);
  return {add(box.x1, mul(T(0.5), w)), add(box.y1, mul(T(0.5), h)), w, h};
}

// From a gradient with respect to center and size to one with respect to the corners.
template <typename T>
FOCALOPS_HOST_DEVICE Box<T> corner_gradient(const CenterSize<T>& grad) {
  const T half_x = T(0.5) * grad.x, half_y = T(0.5) * grad.y;
  return {half_x - grad.w, half_y - grad.h, half_x + grad.w, half_y + grad.h};
}

template <typename T>
struct BoxCoder {
  Deltas<T> weights;
  T clip;  // of the logarithms of width and height, when decoding
  bool clip_to_image;
  T image_width, image_height;

  FOCALOPS_HOST_DEVICE Deltas<T> encode(const Box<T>& box, const Box<T>& anchor) const {
    const CenterSize<T> b = center_size(box), a = center_size(anchor);
    return {div(mul(weights.x, sub(b.x, a.x)), a.w), div(mul(weights.y, sub(b.y, a.y)), a.h),
            mul(weights.w, T(std::log(div(b.w, a.w)))), mul(weights.h, T(std::log(div(b.h, a.h))))};
  }

  FOCALOPS_HOST_DEVICE Box<T> encode_gradient_of_box(const Deltas<T>& grad, const Box<T>& box,
                                                     const Box<T>& anchor) const {
    const CenterSize<T> b = center_size(box), a = center_size(anchor);
    return corner_gradient<T>({grad.x * weights.x / a.w, grad.y * weights.y / a.h,
                               grad.w * weights.w / b.w, grad.h * weights.h / b.h});
  }

  FOCALOPS_HOST_DEVICE Box<T> encode_gradient_of_anchor(const Deltas<T>& grad, const Box<T>& box,
                                                        const Box<T>& anchor) const {
    const CenterSize<T> b = center_size(box), a = center_size(anchor);
    const T by_x = -grad.x * weights.x / a.w, by_y = -grad.y * weights.y / a.h;
    return corner_gradient<T>({by_x, by_y, (by_x * (b.x - a.x) - grad.w * weights.w) / a.w,
                               (by_y * (b.y - a.y) - grad.h * weights.h) / a.h});
  }

  FOCALOPS_HOST_DEVICE Box<T> decode(const Deltas<T>& deltas, const Box<T>& anchor) const {
    Box<T> box = decode_unbounded(deltas, center_size(anchor));
    if (clip_to_image) {
      box = {clamp(box.x1, image_width), clamp(box.y1, image_height), clamp(box.x2, image_width),
             clamp(box.y2, image_height)};
    }
    return box;
  }

  FOCALOPS_HOST_DEVICE Deltas<T> decode_gradient_of_deltas(const Box<T>& grad,
                                                           const Deltas<T>& deltas,
                                                           const Box<T>& anchor) const {
    const CenterSize<T> a = center_size(anchor);
    const CenterSize<T> by = center_gradient(grad, deltas, a);
    // The derivative of the exponential is itself; past the clip it is constant.
    const T w = div(deltas.w, weights.w), h = div(deltas.h, weights.h);
    return {by.x * a.w / weights.x, by.y * a.h / weights.y,
            w < clip ? by.w * a.w * stretch(w) / weights.w : T(0),
            h < clip ? by.h * a.h * stretch(h) / weights.h : T(0)};
  }

  FOCALOPS_HOST_DEVICE Box<T> decode_gradient_of_anchor(const Box<T>& grad, const Deltas<T>& deltas,
                                                        const Box<T>& anchor) const {
    const CenterSize<T> by = center_gradient(grad, deltas, center_size(anchor));
    return corner_gradient<T>(
        {by.x, by.y, by.x * div(deltas.x, weights.x) + by.w * stretch(div(deltas.w, weights.w)),
         by.y * div(deltas.y, weights.y) + by.h * stretch(div(deltas.h, weights.h))});
  }

 private:
  // The factor by which a width or height grows. A NaN stays.
  FOCALOPS_HOST_DEVICE T stretch(T log_ratio) const {
    return std::exp(log_ratio > clip ? clip : log_ratio);
  }

  static FOCALOPS_HOST_DEVICE T clamp(T x, T most) { return x < 0 ? T(0) : x > most ? most : x; }
  static FOCALOPS_HOST_DEVICE T inside(T x, T most, T grad) {
    return x > 0 && x < most ? grad : T(0);
  }

  FOCALOPS_HOST_DEVICE Box<T> decode_unbounded(const Deltas<T>& deltas,
                                               const CenterSize<T>& a) const {
    const T x = add(mul(div(deltas.x, weights.x), a.w), a.x);
    const T y = add(mul(div(deltas.y, weights.y), a.h), a.y);
    const T half_w = mul(T(0.5), mul(stretch(div(deltas.w, weights.w)), a.w));
    const T half_h = mul(T(0.5), mul(stretch(div(deltas.h, weights.h)), a.h));
    return {sub(x, half_w), sub(y, half_h), add(x, half_w), add(y, half_h)};
  }

  // With respect to the center and size of the decoded box.
  FOCALOPS_HOST_DEVICE CenterSize<T> center_gradient(const Box<T>& upstream,
                                                     const Deltas<T>& deltas,
                                                     const CenterSize<T>& a) const {
    Box<T> grad = upstream;
    if (clip_to_image) {
      const Box<T> box = decode_unbounded(deltas, a);
      grad = {inside(box.x1, image_width, grad.x1), inside(box.y1, image_height, grad.y1),
              inside(box.x2, image_width, grad.x2), inside(box.y2, image_height, grad.y2)};
    }
    return {grad.x1 + grad.x2, grad.y1 + grad.y2, T(0.5) * (grad.x2 - grad.x1),
            T(0.5) * (grad.y2 - grad.y1)};
  }
};

}  // namespace focalops
