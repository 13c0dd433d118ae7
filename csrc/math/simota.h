// SimOTA (Ge et al., YOLOX, 2021) and its form with soft labels (Lyu et al., RTMDet, 2022): which
// anchors a box may take, and what each costs it. In float32.
//
// The cost of the classes is a sum over all of them, in which the box's own differs from the rest.
// Of an anchor the sum as if no class were the box's is found once, and a pair replaces one term.
#pragma once

#include "assign.h"
#include "focal.h"

namespace focalops {

enum class SimotaRule { kSimota, kYolox, kRtmdet };

// What a box has of its own. Of what is no object all is NaN: nothing is inside, and all costs are.
struct SimotaBox {
  Box<float> box;
  Point<float> center;
  float area;
};

FOCALOPS_HOST_DEVICE SimotaBox simota_box(const Box<float>& box) {
  return {box, {div(add(box.x1, box.x2), 2.0f), div(add(box.y1, box.y2), 2.0f)}, area(box)};
}

FOCALOPS_HOST_DEVICE float simota_overlap(const Box<float>& predicted, const SimotaBox& object) {
  const float both = intersection(predicted, object.box);
  const float either = sub(add(area(predicted), object.area), both);
  return div(both, either < 1e-6f ? 1e-6f : either);  // a NaN stays
}

FOCALOPS_HOST_DEVICE float sigmoid_of(float x) { return div(1.0f, add(1.0f, exponential(-x))); }

// In place of the base of an anchor that takes no part.
constexpr float kOutside = -1, kInCrowd = -2;

// A prediction as the costs need it.
struct SimotaAnchor {
  float base;     // of the classes, as if none were the box's
  float logit;    // of the box's class
  float quality;  // of the object, a probability; negative: the anchor has none
};

template <SimotaRule Rule>
struct Simota {
  float radius;  // in strides

  static constexpr SimotaRule kRule = Rule;
  static constexpr bool kIsSoft = Rule == SimotaRule::kRtmdet;

  // The square around the center within which points are near it.
  FOCALOPS_HOST_DEVICE Box<float> near(const SimotaBox& object, float stride) const {
    const float reach = mul(radius, stride);
    return {sub(object.center.x, reach), sub(object.center.y, reach), add(object.center.x, reach),
            add(object.center.y, reach)};
  }

  // Whether a box lets the anchor take part, and whether it may have it without a penalty.
  static FOCALOPS_HOST_DEVICE bool admits(bool is_inside, bool is_near) {
    return Rule == SimotaRule::kYolox ? is_near : kIsSoft ? is_inside : is_inside | is_near;
  }
  static FOCALOPS_HOST_DEVICE bool owns(bool is_inside, bool is_near) {
    return Rule == SimotaRule::kYolox ? is_near : is_inside & is_near;
  }

  FOCALOPS_HOST_DEVICE bool admits(const Point<float>& point, float stride,
                                   const SimotaBox& object) const {
    return admits(is_inside(point, object.box, 0.0f), is_inside(point, near(object, stride), 0.0f));
  }
  FOCALOPS_HOST_DEVICE bool owns(const Point<float>& point, float stride,
                                 const SimotaBox& object) const {
    return owns(is_inside(point, object.box, 0.0f), is_inside(point, near(object, stride), 0.0f));
  }

  // Whether this may hold of a point in the range, whose stride is at most the given one.
  FOCALOPS_HOST_DEVICE bool may_admit(const Box<float>& range, float stride,
                                      const SimotaBox& object) const {
    return admits(intersects(range, object.box), intersects(range, near(object, stride)));
  }
  FOCALOPS_HOST_DEVICE bool may_own(const Box<float>& range, float stride,
                                    const SimotaBox& object) const {
    return owns(intersects(range, object.box), intersects(range, near(object, stride)));
  }

  // Pairs come in three lots: those without a penalty, others that overlap, and the rest. What is
  // in later lots costs at least `floor`: classes cost at least 0, and sums are rounded
  // monotonically.
  static constexpr int kLots = 3, kFirstLot = kIsSoft ? 1 : 0;

  static FOCALOPS_HOST_DEVICE int lot(bool is_own, float overlap) {
    return is_own && !kIsSoft ? 0 : overlap > 0 ? 1 : 2;
  }
  static FOCALOPS_HOST_DEVICE float floor(int lot) {
    const float of_overlap = lot == 0 ? 0.0f : overlap_cost(0.0f);
    return kIsSoft ? of_overlap : add(of_overlap, penalty());
  }

  // The cost of classes that are not the box's is sum - log(factor), of several classes that of
  // the sums' sum and the factors' product. A factor is 0 or at least 2^-24: kFactors of them
  // multiplied do not underflow.
  struct Negative {
    float factor, sum;
  };
  static constexpr int kFactors = 5;

  static FOCALOPS_HOST_DEVICE Negative negative(float logit, float quality) {
    if constexpr (kIsSoft) {
      const float s = sigmoid_of(logit);
      return {1.0f, mul(softplus(logit), mul(s, s))};
    } else {
      const float p = probability(logit, quality);
      // log(1 - p), at least -100; what the difference loses of a small p is added.
      const float rest = sub(1.0f, p), is_certain = rest == 0 ? 1.0f : 0.0f;
      return {add(rest, is_certain), add(sub(p, sub(1.0f, rest)), mul(is_certain, 100.0f))};
    }
  }
  static FOCALOPS_HOST_DEVICE float cost_of(const Negative& negative) {
    return kIsSoft ? negative.sum : sub(negative.sum, logarithm(negative.factor));
  }

  FOCALOPS_HOST_DEVICE float cost(const SimotaAnchor& anchor, float overlap, float place) const {
    const float others = sub(anchor.base, cost_of(negative(anchor.logit, anchor.quality)));
    const float classes =
        add(others < 0 ? 0.0f : others, positive(anchor.logit, anchor.quality, overlap));
    return add(add(classes, overlap_cost(overlap)), place);
  }

  // What it costs that the point lies there.
  FOCALOPS_HOST_DEVICE float place(const Point<float>& point, float stride, const SimotaBox& object,
                                   bool is_own) const {
    if constexpr (kIsSoft) {
      const float x = sub(point.x, object.center.x), y = sub(point.y, object.center.y);
      const float distance = div(square_root(add(mul(x, x), mul(y, y))), stride);
      return exponential(mul(sub(distance, radius), 2.302585093f));  // of 10
    } else {
      return is_own ? 0.0f : penalty();
    }
  }

  // How many anchors a box takes whose greatest overlaps have the sum.
  static FOCALOPS_HOST_DEVICE int number(float sum, int candidates) {
    return sum < 1 ? 1 : sum < static_cast<float>(candidates) ? static_cast<int>(sum) : candidates;
  }

 private:
  static FOCALOPS_HOST_DEVICE float penalty() { return Rule == SimotaRule::kYolox ? 1e6f : 1e5f; }

  static FOCALOPS_HOST_DEVICE float at_most_100(float x) { return x > 100 ? 100.0f : x; }

  static FOCALOPS_HOST_DEVICE float overlap_cost(float overlap) {
    return mul(3.0f, -logarithm(add(overlap, Rule == SimotaRule::kYolox ? 1e-8f : 1e-7f)));
  }

  static FOCALOPS_HOST_DEVICE float probability(float logit, float quality) {
    const float p = sigmoid_of(logit);
    return quality < 0 ? p : square_root(mul(p, quality));
  }

  static FOCALOPS_HOST_DEVICE float softplus(float x) {
    const float magnitude = std::fabs(x);
    return add(x > 0 ? x : 0.0f, detail::log1p_unit(exponential(-magnitude)));
  }

  static FOCALOPS_HOST_DEVICE float positive(float logit, float quality, float overlap) {
    if constexpr (kIsSoft) {
      const float off = sub(overlap, sigmoid_of(logit));
      return mul(sub(softplus(logit), mul(logit, overlap)), mul(off, off));
    } else {
      return at_most_100(-logarithm(probability(logit, quality)));
    }
  }
};

// As ranked(), but the cheapest is the greatest. No cost is a NaN.
FOCALOPS_HOST_DEVICE uint64_t by_cost(float cost, uint32_t index) {
  uint32_t bits;
  memcpy(&bits, &cost, sizeof bits);
  const uint32_t ascending = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return ~(uint64_t{ascending} << 32 | index);
}

FOCALOPS_HOST_DEVICE float cost_of(uint64_t by_cost) {
  const auto ascending = static_cast<uint32_t>(~by_cost >> 32);
  const uint32_t bits = ascending >> 31 != 0 ? ascending & 0x7fffffffu : ~ascending;
  float cost;
  memcpy(&cost, &bits, sizeof cost);
  return cost;
}

}  // namespace focalops
