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

  // Whether a point in the range can be: rounded as they are, differences keep their order.
  template <typename T>
  static FOCALOPS_HOST_DEVICE bool may_be_near(const Box<T>& range, const Point<T>& center,
                                               T reach) {
    return (sub(range.x1, center.x) < reach) & (sub(center.x, range.x2) < reach) &
           (sub(range.y1, center.y) < reach) & (sub(center.y, range.y2) < reach);
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
  static FOCALOPS_HOST_DEVICE bool may_be_near(const Box<T>& range, const Point<T>& center,
                                               T reach) {
    return (range.x2 > sub(center.x, reach)) & (range.y2 > sub(center.y, reach)) &
           (range.x1 < add(center.x, reach)) & (range.y1 < add(center.y, reach));
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

// Whether the level's range may hold the greatest distance from a point inside the box to a side,
// which is at most the longer side and at least half of it, but for the rounding.
template <typename T>
FOCALOPS_HOST_DEVICE bool may_fit(const Box<T>& box, const FcosLevel<T>& level) {
  const T longer = max_of(sub(box.x2, box.x1), sub(box.y2, box.y1));
  const T finite = min_of(longer, T(3e38));  // the difference of two numbers may be none
  return (longer >= level.least) & (mul(finite, T(0.4999)) <= level.most);
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

// ---- task-aligned assignment (Feng et al., TOOD, 2021), in float32

// x^exponent for x >= 0. By the root, or by products of squares, it is the same bits everywhere.
class Power {
 public:
  explicit Power(double exponent)
      : exponent_(static_cast<float>(exponent)),
        kind_(exponent == 0.5                                         ? kRoot
              : exponent <= kMaxProducts && exponent == int(exponent) ? int(exponent)
                                                                      : kAny) {}

  FOCALOPS_HOST_DEVICE float operator()(float x) const {
    if (kind_ == kRoot) {
      return square_root(x);
    }
    if (kind_ == kAny) {
      return exponential(mul(exponent_, logarithm(x)));
    }
    float power = 1;
    for (int bits = kind_; bits != 0; bits >>= 1) {
      power = bits & 1 ? mul(power, x) : power;
      x = mul(x, x);
    }
    return power;
  }

  // The same of several, in loops that are vectorised.
  FOCALOPS_HOST_DEVICE void raise(const float* values, int64_t n, float* powers) const {
    if (kind_ == kRoot || kind_ == kAny) {
      for (int64_t i = 0; i < n; ++i) {
        powers[i] = (*this)(values[i]);
      }
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      float x = values[i], power = 1;
      for (int bit = 0; bit < kBits; ++bit) {
        power = kind_ >> bit & 1 ? mul(power, x) : power;
        x = mul(x, x);
      }
      powers[i] = power;
    }
  }

 private:
  static constexpr int kBits = 4, kMaxProducts = (1 << kBits) - 1, kRoot = -1, kAny = -2;

  float exponent_;
  int kind_;
};

// An anchor that several boxes take goes to the one that it overlaps most, of
enum class Rivals { kHolders, kAll, kTakers };

struct TaskAligned {
  Power of_score, of_overlap;
  float margin;    // by which a point lies inside
  float min_side;  // of the region whose points a box may take; negative: the region is the box
  float eps;
  bool
      inside_last;  // the best are those of all anchors, taken where they lie inside the box itself
  Rivals rivals;

  // The arithmetic of a box that is turned into center and size and back.
  FOCALOPS_HOST_DEVICE Box<float> region(const Box<float>& box) const {
    if (min_side < 0) {
      return box;
    }
    const float x = div(add(box.x1, box.x2), 2.0f), y = div(add(box.y1, box.y2), 2.0f);
    const float half_w = div(side(sub(box.x2, box.x1)), 2.0f);
    const float half_h = div(side(sub(box.y2, box.y1)), 2.0f);
    return {sub(x, half_w), sub(y, half_h), add(x, half_w), add(y, half_h)};
  }

  // How well an anchor with this score does with a box that it overlaps so: 0 where either is
  // none.
  FOCALOPS_HOST_DEVICE float metric(float score, float overlap) const {
    const float value = mul(of_score(score), of_overlap(overlap));
    return value > 0 ? value : 0.0f;
  }

  // `most` are the greatest of the anchors that the box has.
  FOCALOPS_HOST_DEVICE float target(float metric, float most_metric, float most_overlap) const {
    const float divisor = add(most_metric, eps);
    return inside_last ? mul(div(metric, divisor), most_overlap)
                       : div(mul(metric, most_overlap), divisor);
  }

 private:
  FOCALOPS_HOST_DEVICE float side(float given) const { return given < min_side ? min_side : given; }
};

// Ordered by the value, which is > 0, and of equal ones by the index, the lowest last.
FOCALOPS_HOST_DEVICE uint64_t ranked(float value, uint32_t index) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint64_t{bits} << 32 | static_cast<uint32_t>(~index);
}

FOCALOPS_HOST_DEVICE uint32_t index_of(uint64_t ranked) { return ~static_cast<uint32_t>(ranked); }

FOCALOPS_HOST_DEVICE float value_of(uint64_t ranked) {
  const auto bits = static_cast<uint32_t>(ranked >> 32);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Boxes claim an anchor by two maxima, which know of no order: the claimant is alone iff they add
// up. 0 are the claims of nobody.
struct Claims {
  uint32_t last, first;  // box + 1, boxes - box

  static FOCALOPS_HOST_DEVICE Claims of(uint32_t box, uint32_t boxes) {
    return {box + 1, boxes - box};
  }
  FOCALOPS_HOST_DEVICE bool any() const { return last != 0; }
  FOCALOPS_HOST_DEVICE bool alone(uint32_t boxes) const { return last + first == boxes + 1; }
  FOCALOPS_HOST_DEVICE uint32_t box() const { return last - 1; }
};

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
