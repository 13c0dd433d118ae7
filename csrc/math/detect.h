// What leads from a head's logits to detections: the score of a logit, the order of candidates, and
// where a candidate's numbers lie in a level.
#pragma once

#include <limits>

#include "box.h"
#include "distances.h"

namespace focalops {

// ---- scores -------------------------------------------------------------------------------------

namespace detail {

template <typename To, typename From>
FOCALOPS_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct RoundedOnce {
  FOCALOPS_HOST_DEVICE static float multiply_add(float a, float b, float c) {
    return add(mul(a, b), c);
  }
  FOCALOPS_HOST_DEVICE static float multiply_subtract(float c, float a, float b) {
    return sub(c, mul(a, b));
  }
};

// exp(x) for x <= 0, each operation rounded once; 0 below -87.
FOCALOPS_HOST_DEVICE float exp_rounded_once(float x) {
  const Exponential e = exponential_parts<RoundedOnce>(x);
  return x < -87.0f ? 0.0f : mul(e.factor, power_of_two(e.power));
}

}  // namespace detail

// A score has the same bits on every machine, within 3 ulp of the sigmoid: scores order candidates,
// equal ones go by index. The logit must not be a NaN.
FOCALOPS_HOST_DEVICE float score_of_logit(float x) {
  const float e = detail::exp_rounded_once(x < 0 ? x : -x);
  return div(x < 0 ? e : 1.0f, add(1.0f, e));
}

// The least float that a monotone condition holds for, NaN where it holds for none.
template <typename Condition>
float least_float(const Condition& holds) {
  const auto at = [](int64_t place) {  // floats in their order: -inf is at 0, 0 in the middle
    const auto half =
        static_cast<int64_t>(detail::bits_as<uint32_t>(std::numeric_limits<float>::infinity()));
    const auto magnitude = static_cast<uint32_t>(place < half ? half - place : place - half);
    const auto value = detail::bits_as<float>(magnitude);
    return place < half ? -value : value;
  };
  constexpr int64_t kPlaces = 2 * int64_t{0x7f800000};
  int64_t no = -1, yes = kPlaces + 1;
  while (yes - no > 1) {
    const int64_t middle = no + (yes - no) / 2;
    (holds(at(middle)) ? yes : no) = middle;
  }
  return yes > kPlaces ? std::numeric_limits<float>::quiet_NaN() : at(yes);
}

// Scores of classes, and those of a head that also has a score factor for each anchor (the
// objectness of YOLOX, the centerness of FCOS). A threshold is float32, as scores are.
class Scoring {
 public:
  Scoring(double threshold, bool takes_root)
      : threshold_(static_cast<float>(threshold)), takes_root_(takes_root) {
    least_logit_ = least_logit([&](float score) { return passes(score); });
  }

  FOCALOPS_HOST_DEVICE bool passes(float score) const { return score > threshold_; }

  // No score passes where the logit of the class, or that of the factor, is not at least this one.
  // Where there are no factors the others pass.
  FOCALOPS_HOST_DEVICE float least_logit() const { return least_logit_; }

  // The score of a class and the factor are in [0, 1].
  FOCALOPS_HOST_DEVICE float combine(float of_class, float factor) const {
    const float product = mul(of_class, factor);
    return takes_root_ ? square_root(product) : product;
  }

  // The least logit for which a monotone condition holds of the score; of a score with a factor it
  // holds for none that is lower, since no factor is above 1.
  template <typename Condition>
  float least_logit(const Condition& holds) const {
    return least_float([&](float x) { return holds(combine(score_of_logit(x), 1.0f)); });
  }

 private:
  float threshold_, least_logit_;
  bool takes_root_;
};

// ---- candidates: a (row, class) of an image whose score is above the threshold ------------------

// Greater is better: the score, then the lower index. No score is negative, so that its bits are
// ordered as it is. index: row * K + class, over all levels.
FOCALOPS_HOST_DEVICE uint64_t candidate_key(float score, uint32_t index) {
  return uint64_t{detail::bits_as<uint32_t>(score)} << 32 | (0xffffffffu - index);
}

FOCALOPS_HOST_DEVICE float score_of_key(uint64_t key) {
  return detail::bits_as<float>(static_cast<uint32_t>(key >> 32));
}

FOCALOPS_HOST_DEVICE uint32_t index_of_key(uint64_t key) {
  return 0xffffffffu - static_cast<uint32_t>(key);
}

// How an image of a level lies in memory: rows of K, or planes of H * W (head_levels.h).
struct LevelLayout {
  uint32_t positions;  // H * W
  uint32_t first_row;
  bool logits_have_rows, deltas_have_rows, factors_have_rows;

  // The index of the logit at an offset, counted from the level's image.
  FOCALOPS_HOST_DEVICE uint32_t index(uint32_t offset, uint32_t anchors, uint32_t classes) const {
    uint32_t in_level = offset;
    if (!logits_have_rows) {
      const uint32_t plane = offset / positions, position = offset - plane * positions;
      const uint32_t anchor = plane / classes, k = plane - anchor * classes;
      in_level = (position * anchors + anchor) * classes + k;
    }
    return first_row * classes + in_level;
  }

  // `factors` points to those of the level's image.
  template <typename T>
  FOCALOPS_HOST_DEVICE float load_factor(const T* factors, uint32_t row, uint32_t anchors) const {
    uint32_t at = row - first_row;
    if (!factors_have_rows) {
      const uint32_t position = at / anchors, anchor = at - position * anchors;
      at = anchor * positions + position;
    }
    return static_cast<float>(factors[at]);
  }

  // `deltas` points to those of the level's image.
  template <typename T>
  FOCALOPS_HOST_DEVICE Deltas<float> load_deltas(const T* deltas, uint32_t row,
                                                 uint32_t anchors) const {
    const uint32_t in_level = row - first_row;
    int64_t at = int64_t{in_level} * 4, stride = 1;
    if (!deltas_have_rows) {
      const uint32_t position = in_level / anchors, anchor = in_level - position * anchors;
      at = int64_t{anchor} * 4 * positions + position;
      stride = positions;
    }
    return {static_cast<float>(deltas[at]), static_cast<float>(deltas[at + stride]),
            static_cast<float>(deltas[at + 2 * stride]),
            static_cast<float>(deltas[at + 3 * stride])};
  }

  // The box of a position whose four distances have so many bins each, and there is one anchor.
  template <typename T>
  FOCALOPS_HOST_DEVICE Box<float> load_distances(const T* logits, uint32_t row, int bins,
                                                 const float* point, float stride,
                                                 const Box<float>& bounds) const {
    const int64_t position = row - first_row;
    const T* at = deltas_have_rows ? logits + position * 4 * bins : logits + position;
    const int64_t step = deltas_have_rows ? 1 : positions;
    float sides[4];
    FOCALOPS_UNROLL
    for (int side = 0; side < 4; ++side) {
      float distance = static_cast<float>(*at);
      if (bins > 1) {
        Expectation<float> expectation;
        for (int bin = 0; bin < bins; ++bin) {
          expectation.add(static_cast<float>(at[bin * step]), static_cast<float>(bin));
        }
        distance = expectation.value();
      }
      at += bins * step;
      sides[side] = coordinate_of_side(side, point[side % 2], stride, distance);
    }
    const ImageBounds<float> x{bounds.x1, bounds.x2}, y{bounds.y1, bounds.y2};
    return {x.clip(sides[0]), y.clip(sides[1]), x.clip(sides[2]), y.clip(sides[3])};
  }
};

}  // namespace focalops
