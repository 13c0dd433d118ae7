// NMS on the CPU. The boxes of a class are taken in order of score, and each is compared with the
// boxes that its class has kept so far, 64 at a time, until one suppresses it. That is the same
// pairs as "each kept box removes the rest", but only kept boxes are stored, and nothing has to be
// compacted. Classes are independent; a class of many boxes takes its candidates in tiles: all
// threads compare a tile with what was kept before it, then one thread settles the tile itself.
#include <algorithm>
#include <atomic>
#include <unordered_map>
#include <vector>

#include "../checks/nms.h"
#include "kept_boxes.h"
#include "order.h"

namespace focalops {
namespace {

constexpr int64_t kSmallestTile = 256;
constexpr int64_t kPairsWorthAThread = 1 << 21;  // half a millisecond: waking threads can take that
constexpr int64_t kBoxesWorthAThread = 1 << 16;  // to be copied
constexpr int64_t kLargeClass = 2048;

template <typename scalar_t>
Box<compute_t<scalar_t>> load_box(const scalar_t* boxes, int64_t i) {  // boxes: [..., 4]
  using T = compute_t<scalar_t>;
  const scalar_t* box = boxes + 4 * i;
  return {static_cast<T>(box[0]), static_cast<T>(box[1]), static_cast<T>(box[2]),
          static_cast<T>(box[3])};
}

// boxes: [size], those of one class in order of score; keep: [size].
template <typename T>
void suppress_class(const Box<T>* boxes, int64_t size, const Suppression<T>& suppresses,
                    uint8_t* keep) {
  KeptBoxes<T> kept;
  for (int64_t begin = 0, end = 0; begin < size; begin = end) {
    const int64_t before = kept.size();
    end = std::min(begin + std::max(kSmallestTile, before / 4), size);
    const auto compare_with_kept = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        keep[i] = !has_nan(boxes[i]) && !kept.suppress(boxes[i], suppresses);
      }
    };
    const int64_t grain = kPairsWorthAThread / std::max<int64_t>(before, 1) + 1;
    torch::stable::parallel_for(begin, end, grain, compare_with_kept);
    for (int64_t i = begin; i < end; ++i) {
      if (keep[i] && kept.suppress(boxes[i], suppresses, before)) {
        keep[i] = false;
      }
      if (keep[i]) {
        kept.append(boxes[i]);
      }
    }
  }
}

// begins: [classes + 1]. Large classes one after another, each with all threads; then a thread
// takes one small class at a time.
template <typename T>
void suppress_classes(const Box<T>* boxes, const std::vector<int64_t>& begins,
                      const Suppression<T>& suppresses, uint8_t* keep) {
  const auto num_classes = static_cast<int64_t>(begins.size()) - 1;
  const auto suppress = [&](int64_t c) {
    suppress_class(boxes + begins[c], begins[c + 1] - begins[c], suppresses, keep + begins[c]);
  };
  const auto is_large = [&](int64_t c) { return begins[c + 1] - begins[c] >= kLargeClass; };
  int64_t pairs = 0;  // at most, in small classes
  for (int64_t c = 0; c < num_classes; ++c) {
    if (is_large(c)) {
      suppress(c);
    } else {
      pairs += (begins[c + 1] - begins[c]) * (begins[c + 1] - begins[c]) / 2;
    }
  }
  std::atomic<int64_t> next{0};
  const auto take_small_classes = [&](int64_t, int64_t) {
    for (int64_t c; (c = next.fetch_add(1)) < num_classes;) {
      if (!is_large(c)) {
        suppress(c);
      }
    }
  };
  const int64_t threads = pairs < 2 * kPairsWorthAThread ? 1 : torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, take_small_classes);
}

// Empty where there is no tensor.
std::vector<int64_t> integers_of(const std::optional<Tensor>& tensor) {
  std::vector<int64_t> values;
  if (tensor.has_value()) {
    const Tensor contiguous = torch::stable::contiguous(*tensor);
    dispatch_index(contiguous.scalar_type(), [&](auto tag) {
      const auto* data = static_cast<const tag_t<decltype(tag)>*>(contiguous.const_data_ptr());
      values.assign(data, data + contiguous.numel());
    });
  }
  return values;
}

Tensor nms_cpu(const Tensor& boxes_, const Tensor& scores_, const std::optional<Tensor>& idxs,
               double iou_threshold, bool by_distance) {
  check_nms(boxes_, scores_, idxs);
  const Tensor boxes = torch::stable::contiguous(boxes_),
               scores = torch::stable::contiguous(scores_);
  const std::vector<Item> order = order_by_score(scores, 0, scores.numel());
  const auto size = static_cast<int64_t>(order.size());
  const auto grouped = idxs.has_value() ? group_by_class(order, torch::stable::contiguous(*idxs))
                                        : std::vector<Item>();
  const auto place = [&](int64_t i) { return idxs.has_value() ? grouped[i].index : i; };

  std::vector<uint8_t> keep(size);
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* data = static_cast<const scalar_t*>(boxes.const_data_ptr());
    std::vector<Box<T>> sorted(size);
    torch::stable::parallel_for(0, size, kBoxesWorthAThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sorted[i] = load_box(data, order[place(i)].index);
      }
    });
    const Suppression<T> suppresses{round_down<T>(iou_threshold), by_distance};
    if (idxs.has_value()) {
      suppress_classes(sorted.data(), class_begins(grouped), suppresses, keep.data());
    } else {
      suppress_class(sorted.data(), size, suppresses, keep.data());
    }
  });

  std::vector<uint8_t> is_kept(size);  // by place in `order`
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    is_kept[place(i)] = keep[i];
    count += keep[i];
  }
  Tensor indices = torch::stable::new_empty(boxes, {count}, ScalarType::Long);
  auto* out = static_cast<int64_t*>(indices.mutable_data_ptr());
  for (int64_t i = 0; i < size; ++i) {
    if (is_kept[i]) {
      *out++ = order[i].index;
    }
  }
  return indices;
}

// One image at a time for a thread. The boxes of all classes come in order of score, each compared
// with what its own class has kept, until max_detections are kept.
std::tuple<Tensor, Tensor> multiclass_nms_cpu(const Tensor& boxes_, const Tensor& scores_,
                                              const std::optional<Tensor>& labels_,
                                              const std::optional<Tensor>& counts_,
                                              double iou_threshold, int64_t max_detections,
                                              bool by_distance) {
  check_multiclass_nms(boxes_, scores_, labels_, counts_, max_detections);
  const Tensor boxes = torch::stable::contiguous(boxes_);
  const Tensor scores = torch::stable::contiguous(scores_);
  const std::vector<int64_t> labels = integers_of(labels_), counts = integers_of(counts_);
  const int64_t images = boxes.size(0), size = boxes.size(1);
  Tensor indices = torch::stable::new_empty(boxes, {images, max_detections}, ScalarType::Long);
  Tensor num_kept = torch::stable::new_empty(boxes, {images}, ScalarType::Long);
  auto* all_indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* all_num_kept = static_cast<int64_t*>(num_kept.mutable_data_ptr());
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    const auto* data = static_cast<const scalar_t*>(boxes.const_data_ptr());
    const Suppression<T> suppresses{round_down<T>(iou_threshold), by_distance};
    const auto suppress_image = [&](int64_t image) {
      const int64_t begin = image * size;
      const int64_t count = counts.empty() ? size : std::clamp<int64_t>(counts[image], 0, size);
      int64_t* kept_indices = all_indices + image * max_detections;
      int64_t kept = 0;
      std::unordered_map<int64_t, KeptBoxes<T>> classes;
      for (const Item& item : order_by_score(scores, begin, begin + count)) {
        if (kept == max_detections) {
          break;
        }
        const Box<T> box = load_box(data, item.index);
        KeptBoxes<T>& of_class = classes[labels.empty() ? 0 : labels[item.index]];
        if (!has_nan(box) && !of_class.suppress(box, suppresses)) {
          of_class.append(box);
          kept_indices[kept++] = item.index - begin;
        }
      }
      std::fill(kept_indices + kept, kept_indices + max_detections, -1);
      all_num_kept[image] = kept;
    };
    torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
      for (int64_t image = first; image < last; ++image) {
        suppress_image(image);
      }
    });
  });
  return {indices, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms_cpu));
  m.impl("multiclass_nms", TORCH_BOX(&multiclass_nms_cpu));
}

}  // namespace focalops
