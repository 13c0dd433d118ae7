// What decides whether an anchor may learn a ground-truth box, and how much it is worth to it.
#pragma once

#include "box.h"

namespace focalops {

template <typename T>
struct Point {
  T x, y;
};

// By more than the margin. A NaN is inside nothing.
template <typename T>
FOCALOPS_HOST_DEVICE bool is_inside(const Point<T>& point, const Box<T>& box, T margin) {
  return (sub(point.x, box.x1) > margin) & (sub(point.y, box.y1) > margin) &
         (sub(box.x2, point.x) > margin) & (sub(box.y2, point.y) > margin);
}

// ---- FCOS (Tian et al., 2019)

// Which points of a level are near a box's center, and which boxes are of its size.
template <typename T>
struct FcosLevel {
  T reach;        // of the center, in pixels
  T least, most;  // of the greatest distance to a side
};

// What a box has of its own. Of the boxes that a point may learn it gets the one of greatest worth,
// which is the smallest; one of worth -infinity is learned by none.
template <typename T>
struct FcosBox {
  Box<T> box;
  Point<T> center;
  T worth;
};

// torchvision's: the range is open, and areas are compared by what they leave of 1e8.
struct TorchvisionFcos {
  template <typename T>
  static FOCALOPS_HOST_DEVICE T worth(T area) {
    const T left = sub(T(1e8), area);
    return left >= T(1e-5) ? left : -static_cast<T>(__builtin_huge_valf());
  }

  template <typename T>
  static FOCALOPS_HOST_DEVICE bool is_near(const Point<T>& point, const Point<T>& center, T reach) {
    const T x = sub(point.x, center.x), y = sub(point.y, center.y);
    return (x < reach) & (-x < reach) & (y < reach) & (-y < reach);
  }

  template <typename T>
  static FOCALOPS_HOST_DEVICE bool fits(T distance, const FcosLevel<T>& level) {
    return (distance > level.least) & (distance < level.most);
  }
};

// mmdet's, which is the original: the range is closed.
struct MmdetFcos {
  template <typename T>
  static FOCALOPS_HOST_DEVICE T worth(T area) {
    return area < T(1e8) ? -area : -static_cast<T>(__builtin_huge_valf());
  }

  template <typename T>
  static FOCALOPS_HOST_DEVICE bool is_near(const Point<T>& point, const Point<T>& center, T reach) {
    return (point.x > sub(center.x, reach)) & (point.y > sub(center.y, reach)) &
           (point.x < add(center.x, reach)) & (point.y < add(center.y, reach));
  }

  template <typename T>
  static FOCALOPS_HOST_DEVICE bool fits(T distance, const FcosLevel<T>& level) {
    return (distance >= level.least) & (distance <= level.most);
  }
};

template <typename Rule, typename T>
FOCALOPS_HOST_DEVICE FcosBox<T> fcos_box(const Box<T>& box) {
  const Point<T> center{div(add(box.x1, box.x2), T(2)), div(add(box.y1, box.y2), T(2))};
  return {box, center, Rule::worth(area(box))};
}

template <typename Rule, typename T>
FOCALOPS_HOST_DEVICE bool fcos_matches(const Point<T>& point, const FcosBox<T>& of,
                                       const FcosLevel<T>& level) {
  const Box<T>& box = of.box;
  const T distance = max_of(max_of(sub(point.x, box.x1), sub(point.y, box.y1)),
                            max_of(sub(box.x2, point.x), sub(box.y2, point.y)));
  return is_inside(point, box, T(0)) & Rule::is_near(point, of.center, level.reach) &
         Rule::fits(distance, level);
}

// ---- ATSS (Zhang et al., 2020)

// mmdet's, which is the original but for its IoUs.
struct MmdetAtss {
  static constexpr double kMargin = 0.01;          // of a center inside a box
  static constexpr bool kAllBoxesCompete = false;  // for an anchor that several claim

  template <typename T>
  static FOCALOPS_HOST_DEVICE bool reaches(T iou, T threshold) {
    return iou >= threshold;
  }
};

struct MmyoloAtss {
  static constexpr double kMargin = 1e-9;
  static constexpr bool kAllBoxesCompete = true;

  template <typename T>
  static FOCALOPS_HOST_DEVICE bool reaches(T iou, T threshold) {
    return iou > threshold;
  }
};

template <typename T>
FOCALOPS_HOST_DEVICE Point<T> center_of(const Box<T>& box) {
  return {mul(T(0.5), add(box.x1, box.x2)), mul(T(0.5), add(box.y1, box.y2))};
}

template <typename T>
FOCALOPS_HOST_DEVICE T squared_distance(const Point<T>& a, const Point<T>& b) {
  const T x = sub(a.x, b.x), y = sub(a.y, b.y);
  return add(mul(x, x), mul(y, y));
}

// To the nearest place of a range. Each operation, rounded as it is, gives no less for a greater
// argument: it is at most that to any point in the range.
template <typename T>
FOCALOPS_HOST_DEVICE T squared_distance(const Point<T>& point, const Box<T>& range) {
  const T x = max_of(max_of(sub(range.x1, point.x), sub(point.x, range.x2)), T(0));
  const T y = max_of(max_of(sub(range.y1, point.y), sub(point.y, range.y2)), T(0));
  return add(mul(x, x), mul(y, y));
}

// Two empty boxes have an IoU of 0; it is >= 0 or a NaN.
template <typename T>
FOCALOPS_HOST_DEVICE T atss_iou(const Box<T>& a, const Box<T>& b) {
  const T both = intersection(a, b);
  return div(both, max_of(T(1e-6), sub(add(area(a), area(b)), both)));
}

// What the IoUs of n candidates have to reach: the sum of their mean and unbiased deviation, each
// rounded to T. A single one reaches nothing.
template <typename T>
FOCALOPS_HOST_DEVICE T atss_threshold(double mean, double sum_of_squares, int64_t n) {
  const double deviation = std::sqrt(div(sum_of_squares, static_cast<double>(n - 1)));
  return add(static_cast<T>(mean), static_cast<T>(deviation));
}

}  // namespace focalops
