// Boxes: xyxy, absolute pixels, no "+1". IoU of two empty boxes is 0.
//
// Low-quality matches and NMS compare IoUs that are computed twice, on different machines, so an
// IoU must be the same bits everywhere: every operation here rounds once (no contraction to a fused
// multiply-add on the device; the host compiles box code with -ffp-contract=off), and division is
// IEEE division.
#pragma once

#include <cmath>

#include "elementary.h"
#include "host_device.h"

namespace focalops {

#ifdef __CUDA_ARCH__
FOCALOPS_HOST_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FOCALOPS_HOST_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
FOCALOPS_HOST_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
FOCALOPS_HOST_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
FOCALOPS_HOST_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
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
FOCALOPS_HOST_DEVICE float square_root(float x) { return std::sqrt(x); }
#endif

// min_of and max_of return the second number where either is a NaN. They are written so that loops
// over them are vectorised.
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

// The memory need not be aligned as a Box is.
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

// Quotients are x / divisor(d): where d is 0, so is every x here. A division that is always taken
// can be vectorised.
template <typename T>
FOCALOPS_HOST_DEVICE T divisor(T d) {
  return d == 0 ? T(1) : d;
}

// Intersection over union; a NaN coordinate gives a NaN, through the area. `area_a` and `area_b`
// are area(a) and area(b): the caller has them at hand.
template <typename T>
FOCALOPS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b, T area_a, T area_b) {
  const T both = intersection(a, b);
  return div(both, divisor(sub(add(area_a, area_b), both)));
}

template <typename T>
FOCALOPS_HOST_DEVICE T iou(const Box<T>& a, const Box<T>& b) {
  return iou(a, b, area(a), area(b));
}

// How much of the box with this area, which is one of the two, lies in the other, 0 .. 1.
template <typename T>
FOCALOPS_HOST_DEVICE T share_inside(const Box<T>& a, const Box<T>& b, T area) {
  return div(intersection(a, b), divisor(area));
}

// Says whether the boxes overlap by more than an edge. Where they do not, or a coordinate is NaN,
// their IoU is 0 or NaN.
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

// ---- the IoU family: IoU, generalized IoU (Rezatofighi et al., 2019), distance and complete IoU
// (Zheng et al., 2020); and the intersection over the area of the first box alone, which has no
// gradient here

enum class IouKind { kPlain, kGeneralized, kDistance, kComplete, kForeground };

template <IouKind Kind>
constexpr bool kHasDistance = Kind == IouKind::kDistance || Kind == IouKind::kComplete;

FOCALOPS_HOST_DEVICE double arctangent(double x) { return atan(x); }

// Within 3 ulp. atanf is a call that no loop is vectorised over. A minimax polynomial on
// [-tan(pi / 8), tan(pi / 8)] (Moshier, Cephes), to which larger x are reduced by pi / 4 or pi / 2.
FOCALOPS_HOST_DEVICE float arctangent(float x) {
  const float magnitude = x < 0 ? -x : x;
  const bool is_large = magnitude > 2.414213562f, is_middle = magnitude > 0.4142135624f;
  const float above = is_large ? -1.0f : is_middle ? sub(magnitude, 1.0f) : magnitude;
  const float below = is_large ? magnitude : is_middle ? add(magnitude, 1.0f) : 1.0f;
  const float offset = is_large ? 1.5707963268f : is_middle ? 0.7853981634f : 0.0f;
  const float r = div(above, below), z = mul(r, r);
  float p = 8.05374449538e-2f;
  p = sub(mul(p, z), 1.38776856032e-1f);
  p = add(mul(p, z), 1.99777106478e-1f);
  p = sub(mul(p, z), 3.33329491539e-1f);
  const float value = add(offset, add(mul(mul(p, z), r), r));
  return x < 0 ? -value : value;
}

// The angle of a box's diagonal, from the vertical; 0 for a point.
template <typename T>
FOCALOPS_HOST_DEVICE T diagonal_angle(const Box<T>& box) {
  const T w = sub(box.x2, box.x1), h = sub(box.y2, box.y1);
  const bool is_point = (w == 0) & (h == 0);
  return arctangent(div(w, is_point ? T(1) : h));
}

// The terms that a box has of its own are found once where the box meets many others.
template <typename T>
struct IouTerms {
  T area;
  T angle;  // complete IoU only
};

template <IouKind Kind, typename T>
FOCALOPS_HOST_DEVICE IouTerms<T> iou_terms(const Box<T>& box) {
  return {area(box), Kind == IouKind::kComplete ? diagonal_angle(box) : T(0)};
}

// The eps are added to divisors: losses have both, matrices none of the union.
template <IouKind Kind, typename T>
struct IouFormula {
  T union_eps;
  T outer_eps;  // of the enclosing box, and of complete IoU's weight

  FOCALOPS_HOST_DEVICE T value(const Box<T>& a, const Box<T>& b, const IouTerms<T>& of_a,
                               const IouTerms<T>& of_b) const {
    const T both = intersection(a, b);
    if constexpr (Kind == IouKind::kForeground) {
      return div(both, divisor(of_a.area));
    }
    const T either = sub(add(of_a.area, of_b.area), both);
    T value = div(both, divisor(add(either, union_eps)));
    if constexpr (Kind != IouKind::kPlain) {
      const T overlap = value;
      const T width = sub(max_of(a.x2, b.x2), min_of(a.x1, b.x1));
      const T height = sub(max_of(a.y2, b.y2), min_of(a.y1, b.y1));
      if constexpr (Kind == IouKind::kGeneralized) {
        const T outer = mul(width, height);
        value = sub(value, div(sub(outer, either), divisor(add(outer, outer_eps))));
      } else {
        const T x = center_distance(a.x1, a.x2, b.x1, b.x2);
        const T y = center_distance(a.y1, a.y2, b.y1, b.y2);
        const T diagonal = add(add(mul(width, width), mul(height, height)), outer_eps);
        value = sub(value, div(add(mul(x, x), mul(y, y)), divisor(diagonal)));
      }
      if constexpr (Kind == IouKind::kComplete) {
        const T v = aspect_term(sub(of_a.angle, of_b.angle));
        value = sub(value, mul(aspect_weight(v, overlap), v));
      }
    }
    return value;
  }

  // d value(a, b) / d a; the weight of complete IoU counts as constant, as in the paper. Boxes that
  // only touch do not pull at each other by their intersection.
  FOCALOPS_HOST_DEVICE Box<T> gradient(const Box<T>& a, const Box<T>& b, const IouTerms<T>& of_a,
                                       const IouTerms<T>& of_b) const {
    const T width = max_of(min_of(a.x2, b.x2) - max_of(a.x1, b.x1), T(0));
    const T height = max_of(min_of(a.y2, b.y2) - max_of(a.y1, b.y1), T(0));
    const T a_width = a.x2 - a.x1, a_height = a.y2 - a.y1;
    const T both = width * height;
    const T either = of_a.area + of_b.area - both;
    const T per_either = reciprocal_or_0(either + union_eps);
    const T overlap = both * per_either;
    T by_both = (1 + overlap) * per_either;  // either shrinks as both grows
    T by_area = -overlap * per_either;
    T by_x = 0, by_y = 0;  // by each corner, through the center
    T by_a_width = 0, by_a_height = 0, by_outer_width = 0, by_outer_height = 0;
    if constexpr (Kind != IouKind::kPlain) {
      const T outer_width = max_of(a.x2, b.x2) - min_of(a.x1, b.x1);
      const T outer_height = max_of(a.y2, b.y2) - min_of(a.y1, b.y1);
      if constexpr (Kind == IouKind::kGeneralized) {
        const T outer = outer_width * outer_height;
        const T per_outer = reciprocal_or_0(outer + outer_eps);
        const T by_outer = ((outer - either) * per_outer - 1) * per_outer;
        by_both -= per_outer;
        by_area += per_outer;
        by_outer_width = by_outer * outer_height;
        by_outer_height = by_outer * outer_width;
      } else {
        const T x = center_distance(a.x1, a.x2, b.x1, b.x2);
        const T y = center_distance(a.y1, a.y2, b.y1, b.y2);
        const T per_diagonal =
            reciprocal_or_0(outer_width * outer_width + outer_height * outer_height + outer_eps);
        const T by_diagonal = (x * x + y * y) * per_diagonal * 2 * per_diagonal;
        by_x = -x * per_diagonal;
        by_y = -y * per_diagonal;
        by_outer_width = by_diagonal * outer_width;
        by_outer_height = by_diagonal * outer_height;
      }
    }
    if constexpr (Kind == IouKind::kComplete) {
      const T difference = of_a.angle - of_b.angle;
      const T weight = aspect_weight(aspect_term(difference), overlap);
      const T by_angle = -2 * kAspect * weight * difference;
      const T per_square = reciprocal_or_0(a_width * a_width + a_height * a_height);
      by_a_width = by_angle * a_height * per_square;
      by_a_height = -by_angle * a_width * per_square;
    }
    by_a_width += by_area * a_height;
    by_a_height += by_area * a_width;
    const T by_width = width > 0 ? by_both * height : T(0);
    const T by_height = height > 0 ? by_both * width : T(0);
    Box<T> grad{-by_width * share_of_greater(a.x1, b.x1) - by_a_width,
                -by_height * share_of_greater(a.y1, b.y1) - by_a_height,
                by_width * share_of_greater(b.x2, a.x2) + by_a_width,
                by_height * share_of_greater(b.y2, a.y2) + by_a_height};
    if constexpr (Kind != IouKind::kPlain) {
      grad.x1 += by_x - by_outer_width * share_of_greater(b.x1, a.x1);
      grad.y1 += by_y - by_outer_height * share_of_greater(b.y1, a.y1);
      grad.x2 += by_x + by_outer_width * share_of_greater(a.x2, b.x2);
      grad.y2 += by_y + by_outer_height * share_of_greater(a.y2, b.y2);
    }
    return grad;
  }

 private:
  static constexpr T kAspect = T(0.405284734569351085775517852838911);  // 4 / pi^2

  static FOCALOPS_HOST_DEVICE T center_distance(T a1, T a2, T b1, T b2) {
    return sub(mul(T(0.5), add(a1, a2)), mul(T(0.5), add(b1, b2)));
  }

  static FOCALOPS_HOST_DEVICE T aspect_term(T difference) {
    return mul(kAspect, mul(difference, difference));
  }

  FOCALOPS_HOST_DEVICE T aspect_weight(T v, T overlap) const {
    return div(v, divisor(add(add(sub(T(1), overlap), v), outer_eps)));
  }

  static FOCALOPS_HOST_DEVICE T reciprocal_or_0(T x) { return x == 0 ? T(0) : 1 / divisor(x); }
};

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

// Turns a gradient with respect to center and size into one with respect to the corners.
template <typename T>
FOCALOPS_HOST_DEVICE Box<T> corner_gradient(const CenterSize<T>& grad) {
  const T half_x = T(0.5) * grad.x, half_y = T(0.5) * grad.y;
  return {half_x - grad.w, half_y - grad.h, half_x + grad.w, half_y + grad.h};
}

template <typename T>
struct BoxCoder {
  Deltas<T> weights;
  T clip;         // of the logarithms of width and height, when decoding
  Box<T> bounds;  // of decoded boxes; infinite where they have none

  FOCALOPS_HOST_DEVICE void clip_to_image(T height, T width) {
    bounds = {T(0), T(0), width, height};
  }

  FOCALOPS_HOST_DEVICE Deltas<T> encode(const Box<T>& box, const Box<T>& anchor) const {
    const CenterSize<T> b = center_size(box), a = center_size(anchor);
    return {div(mul(weights.x, sub(b.x, a.x)), a.w), div(mul(weights.y, sub(b.y, a.y)), a.h),
            mul(weights.w, logarithm(div(b.w, a.w))), mul(weights.h, logarithm(div(b.h, a.h)))};
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
    const Box<T> box = decode_unbounded(deltas, center_size(anchor));
    return {bounded(box.x1, bounds.x1, bounds.x2), bounded(box.y1, bounds.y1, bounds.y2),
            bounded(box.x2, bounds.x1, bounds.x2), bounded(box.y2, bounds.y1, bounds.y2)};
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
    return exponential(log_ratio > clip ? clip : log_ratio);
  }

  static FOCALOPS_HOST_DEVICE T bounded(T x, T low, T high) {
    return x < low ? low : x > high ? high : x;
  }
  // Does as torch.clamp: at a bound there is no gradient, nor of a NaN. Where x is unbounded, low
  // is -infinity.
  static FOCALOPS_HOST_DEVICE T inside(T x, T low, T high, T grad) {
    const bool is_inside = (x > low) & (x < high);
    return is_inside | (low < 0) ? grad : T(0);
  }

  FOCALOPS_HOST_DEVICE Box<T> decode_unbounded(const Deltas<T>& deltas,
                                               const CenterSize<T>& a) const {
    const T x = add(mul(div(deltas.x, weights.x), a.w), a.x);
    const T y = add(mul(div(deltas.y, weights.y), a.h), a.y);
    const T half_w = mul(T(0.5), mul(stretch(div(deltas.w, weights.w)), a.w));
    const T half_h = mul(T(0.5), mul(stretch(div(deltas.h, weights.h)), a.h));
    return {sub(x, half_w), sub(y, half_h), add(x, half_w), add(y, half_h)};
  }

  // Returns the gradient with respect to the center and size of the decoded box.
  FOCALOPS_HOST_DEVICE CenterSize<T> center_gradient(const Box<T>& upstream,
                                                     const Deltas<T>& deltas,
                                                     const CenterSize<T>& a) const {
    const Box<T> box = decode_unbounded(deltas, a);
    const Box<T> grad = {inside(box.x1, bounds.x1, bounds.x2, upstream.x1),
                         inside(box.y1, bounds.y1, bounds.y2, upstream.y1),
                         inside(box.x2, bounds.x1, bounds.x2, upstream.x2),
                         inside(box.y2, bounds.y1, bounds.y2, upstream.y2)};
    return {grad.x1 + grad.x2, grad.y1 + grad.y2, T(0.5) * (grad.x2 - grad.x1),
            T(0.5) * (grad.y2 - grad.y1)};
  }
};

}  // namespace focalops
