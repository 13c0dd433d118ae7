// Detections are made of a head's outputs on CUDA: the logits are read once, nothing waits for the
// host.
//
// A level of an image, here a segment, is contiguous memory in both layouts. filter compares it
// with the threshold, 16 bytes at a time, and appends what passes to the segment's buffer, which
// holds a few times topk candidates. A candidate is a key of 62 bits, score and index, no two
// alike: the result does not depend on the order in which they were appended. It also counts the
// upper 11 bits of the keys. Where a buffer overflowed, refine reads the segment again: it finds in
// the counts the value of these bits that the topk-th key has, and counts the next 11 bits of the
// keys that share them; up to five times, until so few keys are left above the cut that they fit.
// gather then appends them. Where nothing overflowed, refine and gather return at once.
//
// rank finds the place of each candidate in its segment by comparing it with all others, place that
// among the levels of the image by a binary search in each, and decodes its box; then a block an
// image keeps the best (nms.cuh), or unpack hands the candidates to soft NMS.
//
// A head with score factors has a factor for each anchor: filter compares its logits with what
// would pass with the factor 1, and looks at the factor of those alone.
//
// Bytes moved, s = size of the logits: 1s, and 8 for each of the few candidates. Where a buffer
// overflowed: 2s more, or up to 6s where many scores are equal.
#include <algorithm>
#include <limits>
#include <vector>

#include "../checks/detect.h"
#include "../head_levels.h"
#include "../math/detect.h"
#include "../rows.h"
#include "head_items.cuh"
#include "nms.cuh"

namespace focalops {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors of a thread in flight
constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr int kDigits = 6;
constexpr int64_t kLeastCapacity = 2048;

template <typename scalar_t>
constexpr int64_t kItem = kThreads * kUnroll * kVectorSize<scalar_t>;  // logits

struct Level {
  const void* logits;
  const void* deltas;
  const void* factors;  // null: there are none
  LevelLayout layout;
  int64_t size;  // logits of an image
  int64_t first_item;
  int64_t items_of_image;
};

// Of heads whose boxes are distances; without bins they are deltas.
struct Distances {
  int bins;
  float strides[kMaxLevels];
};

struct Head {
  Level levels[kMaxLevels];
  int num_levels;
  int64_t images;
  int64_t num_items;
  uint32_t anchors, classes;
};

// A cut holds what is known of the topk-th key of a segment: its upper bits, the others are 0.
struct Cut {
  uint64_t prefix;
  uint32_t wanted;   // it is the wanted-th of the keys with these upper bits
  uint32_t settled;  // the keys that are not less than the prefix fit into the buffer
};

// A segment is level * images + image.
struct Segments {
  uint64_t* keys;        // [segments, capacity]
  uint32_t* appended;    // [segments], by filter; also those for which there was no place
  uint32_t* gathered;    // [segments]
  uint32_t* histograms;  // [kDigits, segments, kBins]
  Cut* cuts;             // [kDigits, segments], those found by refine
  uint64_t* sorted;      // [segments, topk], best first
  int64_t size;
  uint32_t capacity;
  uint32_t topk;

  __device__ __forceinline__ bool overflowed(int64_t segment) const {
    return appended[segment] > capacity;
  }
  __device__ __forceinline__ uint32_t num_candidates(int64_t segment) const {
    return overflowed(segment) ? gathered[segment] : appended[segment];
  }
  __device__ __forceinline__ uint32_t num_sorted(int64_t segment) const {
    return min(num_candidates(segment), topk);
  }
};

// The place of a digit in a key; the last digit has fewer bits.
__device__ __forceinline__ int shift_of(int digit) { return max(62 - kBinBits * (digit + 1), 0); }

__device__ __forceinline__ uint32_t digit_of(uint64_t key, int digit) {
  return static_cast<uint32_t>(key >> shift_of(digit)) & (kBins - 1);
}

// The sum of a thread's value and those of the threads before it. All of the block must call it.
__device__ __forceinline__ uint32_t block_inclusive_sum(uint32_t value) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ uint32_t warp_sums[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, offset);
    value += lane >= offset ? before : 0;
  }
  __syncthreads();  // the previous call's sums have been read
  if (lane == kWarpSize - 1) {
    warp_sums[warp] = value;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    value += w < warp ? warp_sums[w] : 0;
  }
  return value;
}

// Adds to a cut what the counts of a digit tell. All of the block must call it.
__device__ __forceinline__ Cut refined(const Cut& cut, const uint32_t* histogram, int digit,
                                       const Segments& segments) {
  constexpr int kBinsOfThread = kBins / kThreads;
  __shared__ Cut result;
  uint32_t counts[kBinsOfThread], sum = 0;
  const int first = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsOfThread;  // the upper bin
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    counts[i] = histogram[first - i];
    sum += counts[i];
  }
  uint32_t above = block_inclusive_sum(sum) - sum;
  if (above < cut.wanted && above + sum >= cut.wanted) {
    int i = 0;
#pragma unroll
    for (int j = 0; j < kBinsOfThread - 1; ++j) {
      if (i == j && above + counts[j] < cut.wanted) {
        above += counts[j];
        ++i;
      }
    }
    uint32_t in_bin = 0;
#pragma unroll
    for (int j = 0; j < kBinsOfThread; ++j) {
      in_bin = i == j ? counts[j] : in_bin;
    }
    const uint32_t wanted = cut.wanted - above;
    result = {cut.prefix | static_cast<uint64_t>(first - i) << shift_of(digit), wanted,
              segments.topk - wanted + in_bin <= segments.capacity};
  }
  __syncthreads();
  const Cut found = result;
  __syncthreads();  // it has been read by all
  return found;
}

enum class Stage { kFilter, kRefine, kGather };

// Blocks take a contiguous share of the items each, an item of one segment at a time. digit: the
// one that is counted; gather counts none, but looks at the counts of the last.
template <Stage stage, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 3)  // with 4 blocks it spills on sm_80
    candidates_kernel(const __grid_constant__ Head head, Scoring scoring, Segments segments,
                      int digit) {
  constexpr int N = kVectorSize<scalar_t>;
  constexpr bool counts_digit = stage != Stage::kGather, appends = stage != Stage::kRefine;
  __shared__ uint32_t histogram[kBins];
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  if constexpr (stage != Stage::kFilter) {
    bool overflowed = false;
    for (int64_t segment = thread; segment < segments.size; segment += kThreads) {
      overflowed = overflowed || segments.overflowed(segment);
    }
    if (!__syncthreads_or(overflowed)) {
      return;
    }
  }
  if constexpr (counts_digit) {
    for (int bin = thread; bin < kBins; bin += kThreads) {
      histogram[bin] = 0;
    }
    __syncthreads();
  }

  bool has_counted = false;  // this thread, in `histogram`
  int64_t current = -1;      // the segment whose keys it counts
  const auto flush = [&] {
    if constexpr (counts_digit) {
      if (__syncthreads_or(has_counted)) {
        uint32_t* to = segments.histograms + (digit * segments.size + current) * kBins;
        for (int bin = thread; bin < kBins; bin += kThreads) {
          if (histogram[bin] != 0) {
            atomicAdd(to + bin, histogram[bin]);
            histogram[bin] = 0;
          }
        }
        __syncthreads();
      }
      has_counted = false;
    }
  };

  Cut cut{0, segments.topk, 0};
  const int64_t first_item = head.num_items * blockIdx.x / gridDim.x;
  const int64_t last_item = head.num_items * (blockIdx.x + int64_t{1}) / gridDim.x;
  for (int64_t item = first_item; item < last_item; ++item) {
    const auto [l, image, part] = place_of_item(head, item);
    const Level& level = head.levels[l];
    const int64_t segment = l * head.images + image;
    if (segment != current) {
      flush();
      current = segment;
      if constexpr (stage != Stage::kFilter) {
        cut = {0, segments.topk, !segments.overflowed(segment)};
        if (digit > 1) {
          cut = cut.settled ? cut : segments.cuts[(digit - 1) * segments.size + segment];
        }
        if (!cut.settled) {
          const int64_t counts = (digit - 1) * segments.size + segment;
          cut = refined(cut, segments.histograms + counts * kBins, digit - 1, segments);
        }
      }
    }
    if constexpr (stage == Stage::kRefine) {
      // Of the blocks that found it, the one that has the segment's first item writes it.
      if (part == 0 && thread == 0) {
        segments.cuts[digit * segments.size + segment] = cut;
      }
      if (cut.settled) {
        continue;
      }
    }
    if constexpr (stage == Stage::kGather) {
      if (!segments.overflowed(segment)) {
        continue;
      }
    }

    const int64_t begin = part * kItem<scalar_t>;
    const auto left = static_cast<int>(min(level.size - begin, kItem<scalar_t>));
    const auto* logits = static_cast<const scalar_t*>(level.logits) + image * level.size + begin;
    const bool aligned = is_aligned(logits);
    Vector<scalar_t, N> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      vectors[u] = load_vector<N>(logits, (u * kThreads + thread) * N, left, aligned);
    }
    uint32_t passing = 0;  // a bit a logit
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = (u * kThreads + thread) * N;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const bool passes =
            static_cast<float>(vectors[u].data[j]) >= scoring.least_logit() && i + j < left;
        passing |= passes ? 1u << (u * N + j) : 0u;
      }
    }
    if (!__any_sync(kFullWarp, passing != 0)) {
      continue;
    }
    // The key of a logit is made from memory once more: a register cannot be chosen by a bit. No
    // key is 0 but that of a score that does not pass because of its factor.
    const auto* factors = static_cast<const scalar_t*>(level.factors);
    if (factors != nullptr) {
      factors += image * head.anchors * level.layout.positions;
    }
    const auto key_of = [&](int bit) -> uint64_t {
      const int i = (bit / N * kThreads + thread) * N + bit % N;
      const uint32_t index =
          level.layout.index(static_cast<uint32_t>(begin + i), head.anchors, head.classes);
      float score = score_of_logit(static_cast<float>(logits[i]));
      if (factors != nullptr) {
        const float factor = level.layout.load_factor(factors, index / head.classes, head.anchors);
        if (!(factor >= scoring.least_logit())) {
          return 0;
        }
        score = scoring.combine(score, score_of_logit(factor));
        if (!scoring.passes(score)) {
          return 0;
        }
      }
      return candidate_key(score, index);
    };
    if (stage == Stage::kGather || factors != nullptr) {
      const uint64_t least_key = max(cut.prefix, uint64_t{1});
      for (uint32_t bits = passing; bits != 0; bits &= bits - 1) {
        const int bit = __ffs(static_cast<int>(bits)) - 1;
        passing &= key_of(bit) >= least_key ? ~0u : ~(1u << bit);
      }
    }
    uint32_t place = 0;
    if constexpr (appends) {
      uint32_t* counter =
          (stage == Stage::kFilter ? segments.appended : segments.gathered) + segment;
      const auto own = static_cast<uint32_t>(__popc(passing));
      uint32_t up_to = own;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint32_t before = __shfl_up_sync(kFullWarp, up_to, offset);
        up_to += lane >= offset ? before : 0;
      }
      if (lane == kWarpSize - 1 && up_to > 0) {
        place = atomicAdd(counter, up_to);
      }
      place = __shfl_sync(kFullWarp, place, kWarpSize - 1) + up_to - own;
    }
    for (uint32_t bits = passing; bits != 0; bits &= bits - 1) {
      const uint64_t key = key_of(__ffs(static_cast<int>(bits)) - 1);
      if constexpr (appends) {
        if (place < segments.capacity) {
          segments.keys[segment * segments.capacity + place] = key;
        }
        ++place;
      }
      if constexpr (counts_digit) {
        const bool shares = stage == Stage::kFilter ||
                            key >> shift_of(digit - 1) == cut.prefix >> shift_of(digit - 1);
        if (shares) {
          atomicAdd(histogram + digit_of(key, digit), 1u);
          has_counted = true;
        }
      }
    }
  }
  flush();
}

// Block (segment, slice) has a thread a candidate, which counts how many of its segment are better.
__global__ void __launch_bounds__(kThreads) rank_kernel(Segments segments, int64_t slices) {
  __shared__ uint64_t others[kThreads];
  const int64_t segment = blockIdx.x / slices, first = blockIdx.x % slices * kThreads;
  const int64_t size = segments.num_candidates(segment);
  if (first >= size) {
    return;
  }
  const uint64_t* keys = segments.keys + segment * segments.capacity;
  const int64_t own = first + threadIdx.x;
  const uint64_t key = own < size ? keys[own] : 0;
  uint32_t rank = 0;
  for (int64_t begin = 0; begin < size; begin += kThreads) {
    const auto n = static_cast<int>(min(size - begin, int64_t{kThreads}));
    __syncthreads();  // the previous ones have been read
    if (static_cast<int>(threadIdx.x) < n) {
      others[threadIdx.x] = keys[begin + threadIdx.x];
    }
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < n; ++i) {
      rank += others[i] > key ? 1 : 0;
    }
  }
  if (own < size && rank < segments.topk) {
    segments.sorted[segment * segments.topk + rank] = key;
  }
}

// The candidates of an image, best first; those that have no place are the worst.
struct Candidates {
  uint64_t* keys;     // [images, size]
  Box<float>* boxes;  // [images, size]
  int64_t size;

  __device__ __forceinline__ int64_t count(const Segments& segments, int64_t images,
                                           int64_t image) const {
    int64_t found = 0;
    for (int64_t segment = image; segment < segments.size; segment += images) {
      found += segments.num_sorted(segment);
    }
    return min(found, size);
  }
};

// Each place of a segment has a thread, which finds the place of its candidate in the image, and
// the box.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ Head head, Segments segments, BoxCoder<float> coder,
                 const __grid_constant__ Distances distances, const float* anchors,
                 const float* image_sizes, Candidates candidates) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t segment = i / segments.topk;
  const auto rank = static_cast<uint32_t>(i - segment * segments.topk);
  if (segment >= segments.size || rank >= segments.num_sorted(segment)) {
    return;
  }
  const int64_t l = segment / head.images, image = segment - l * head.images;
  const uint64_t key = segments.sorted[i];
  int64_t place = rank;
  for (int64_t other = image; other < segments.size; other += head.images) {
    if (other == segment) {
      continue;
    }
    const uint64_t* sorted = segments.sorted + other * segments.topk;
    uint32_t better = 0, end = segments.num_sorted(other);
    while (better < end) {
      const uint32_t middle = (better + end) / 2;
      if (sorted[middle] > key) {
        better = middle + 1;
      } else {
        end = middle;
      }
    }
    place += better;
  }
  if (place >= candidates.size) {
    return;
  }
  if (image_sizes != nullptr) {
    coder.clip_to_image(image_sizes[2 * image], image_sizes[2 * image + 1]);
  }
  const Level& level = head.levels[l];
  const uint32_t row = index_of_key(key) / head.classes;
  const bool has_distances = distances.bins > 0;
  const int64_t deltas_of_image =
      int64_t{4} * (has_distances ? distances.bins : head.anchors) * level.layout.positions;
  const auto* deltas = static_cast<const scalar_t*>(level.deltas) + image * deltas_of_image;
  candidates.keys[image * candidates.size + place] = key;
  candidates.boxes[image * candidates.size + place] =
      has_distances
          ? level.layout.load_distances(deltas, row, distances.bins, anchors + int64_t{2} * row,
                                        distances.strides[l], coder.bounds)
          : coder.decode(level.layout.load_deltas(deltas, row, head.anchors),
                         load_box(anchors + int64_t{4} * row));
}

struct ImageCandidates {
  const uint64_t* keys;
  const Box<float>* boxes;
  uint32_t classes;

  __device__ __forceinline__ bool load(int64_t place, Box<float>& box, int64_t& label) const {
    box = boxes[place];
    label = index_of_key(keys[place]) % classes;
    return !has_nan(box);
  }
};

struct Detections {
  Box<float>* boxes;  // [images, size]
  float* scores;      // [images, size]
  int64_t* labels;    // [images, size]
  int64_t* counts;    // [images]
  int64_t size;
};

// Each image has a block.
__global__ void __launch_bounds__(kBoxesPerChunk, 1)
    keep_kernel(Candidates candidates, Segments segments, int64_t images, uint32_t classes,
                Suppression<float> suppresses, bool class_agnostic, Detections detections) {
  const int64_t image = blockIdx.x, size = candidates.count(segments, images, image);
  const uint64_t* keys = candidates.keys + image * candidates.size;
  Box<float>* boxes = detections.boxes + image * detections.size;
  float* scores = detections.scores + image * detections.size;
  int64_t* labels = detections.labels + image * detections.size;
  const int64_t count =
      keep_best(ImageCandidates{keys, candidates.boxes + image * candidates.size, classes}, size,
                suppresses, class_agnostic, detections.size, boxes, labels,
                [&](int64_t at, int64_t place) { scores[at] = score_of_key(keys[place]); });
  for (int64_t i = count + threadIdx.x; i < detections.size; i += kBoxesPerChunk) {
    boxes[i] = {0, 0, 0, 0};
    scores[i] = 0;
    labels[i] = -1;
  }
  if (threadIdx.x == 0) {
    detections.counts[image] = count;
  }
}

// Each place of an image has a thread, which writes what soft NMS asks of its candidate.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Candidates candidates, Segments segments, int64_t images, uint32_t classes,
                  float* scores, int64_t* labels) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t image = i / candidates.size, place = i - image * candidates.size;
  if (image >= images) {
    return;
  }
  if (place < candidates.count(segments, images, image)) {
    scores[i] = score_of_key(candidates.keys[i]);
    labels[i] = index_of_key(candidates.keys[i]) % classes;
  } else {
    candidates.boxes[i] = {0, 0, 0, 0};
    scores[i] = -std::numeric_limits<float>::infinity();
    labels[i] = -1;
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename scalar_t>
Head make_head(const std::vector<HeadLevel>& logits, const std::vector<HeadLevel>& deltas,
               const std::vector<HeadLevel>& factors, const HeadShape& shape) {
  Head head{{}, static_cast<int>(logits.size()),      shape.images,
            0,  static_cast<uint32_t>(shape.anchors), static_cast<uint32_t>(shape.classes)};
  for (size_t l = 0; l < logits.size(); ++l) {
    Level& level = head.levels[l];
    level.logits = logits[l].tensor.const_data_ptr();
    level.deltas = deltas[l].tensor.const_data_ptr();
    level.factors = factors.empty() ? nullptr : factors[l].tensor.const_data_ptr();
    level.layout = {static_cast<uint32_t>(logits[l].positions),
                    static_cast<uint32_t>(logits[l].first_row), logits[l].has_rows,
                    deltas[l].has_rows, !factors.empty() && factors[l].has_rows};
    level.size = logits[l].positions * shape.anchors * shape.classes;
    level.first_item = head.num_items;
    level.items_of_image = ceil_div(level.size, kItem<scalar_t>);
    head.num_items += shape.images * level.items_of_image;
  }
  return head;
}

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

struct OutputTensors {
  Tensor boxes, scores, labels, counts;

  OutputTensors(const Tensor& like, int64_t images, int64_t max_detections)
      : boxes(new_empty(like, {images, max_detections, 4}, ScalarType::Float)),
        scores(new_empty(like, {images, max_detections}, ScalarType::Float)),
        labels(new_empty(like, {images, max_detections}, ScalarType::Long)),
        counts(new_empty(like, {images}, ScalarType::Long)) {}

  Detections detections() {
    return {data_of<Box<float>>(boxes), data_of<float>(scores), data_of<int64_t>(labels),
            data_of<int64_t>(counts), boxes.size(1)};
  }
};

// The memory of Segments; its counters and histograms are 0.
struct SegmentTensors {
  Tensor keys, sorted, cuts, zeros;
  int64_t size, capacity, topk;

  SegmentTensors(const Tensor& like, int64_t size, int64_t topk)
      : keys(new_empty(like, {size, capacity_for(topk)}, ScalarType::Long)),
        sorted(new_empty(like, {size, topk}, ScalarType::Long)),
        cuts(new_empty(like, {kDigits, size, sizeof(Cut) / 8}, ScalarType::Long)),
        zeros(torch::stable::new_zeros(like, {size * (2 + kDigits * kBins)}, ScalarType::Int)),
        size(size),
        capacity(capacity_for(topk)),
        topk(topk) {}

  static int64_t capacity_for(int64_t topk) { return std::max(2 * topk, kLeastCapacity); }

  Segments segments() {
    auto* counters = data_of<uint32_t>(zeros);  // counters first, then histograms
    return {data_of<uint64_t>(keys),
            counters,
            counters + size,
            counters + 2 * size,
            data_of<Cut>(cuts),
            data_of<uint64_t>(sorted),
            size,
            static_cast<uint32_t>(capacity),
            static_cast<uint32_t>(topk)};
  }
};

// Launches what finds the topk best candidates of each segment and sorts them.
template <typename scalar_t>
void find_candidates(const Head& head, const Segments& segments, const Scoring& scoring,
                     const LaunchScope& scope) {
  const auto run = [&](auto* kernel, int digit) {
    launch(kernel, resident_grid(kernel, kThreads, 0, head.num_items, scope), kThreads, 0,
           scope.stream(), head, scoring, segments, digit);
  };
  run(&candidates_kernel<Stage::kFilter, scalar_t>, 0);
  for (int digit = 1; digit < kDigits; ++digit) {
    run(&candidates_kernel<Stage::kRefine, scalar_t>, digit);
  }
  run(&candidates_kernel<Stage::kGather, scalar_t>, kDigits);
  const int64_t slices = ceil_div(segments.capacity, kThreads);
  launch(&rank_kernel, segments.size * slices, kThreads, 0, scope.stream(), segments, slices);
}

Distances distances_of(const CandidateOptions& options) {
  Distances distances{options.has_distances() ? static_cast<int>(options.bins) : 0, {}};
  std::copy(options.strides.begin(), options.strides.end(), distances.strides);
  return distances;
}

// The candidates of all images, in memory that lives as long as this.
struct Found {
  SegmentTensors segment_tensors;
  Tensor keys, boxes;
  Segments segments;
  Candidates candidates;

  Found(const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
        const Tensor& anchors_, const std::optional<Tensor>& image_sizes_,
        const CandidateOptions& options, const HeadShape& shape, const LaunchScope& scope)
      : Found(cls_logits[0], static_cast<int64_t>(cls_logits.size()), options, shape) {
    const auto logits = head_levels(cls_logits, shape), deltas = head_levels(box_deltas, shape);
    const auto factors = head_levels(options.score_factors, shape);
    const Tensor anchors = torch::stable::contiguous(anchors_);
    const auto image_sizes = contiguous(image_sizes_);
    dispatch_floating(cls_logits[0].scalar_type(), [&](auto tag) {
      using scalar_t = tag_t<decltype(tag)>;
      const Head head = make_head<scalar_t>(logits, deltas, factors, shape);
      if (head.num_items == 0) {
        return;
      }
      find_candidates<scalar_t>(head, segments,
                                Scoring(options.score_threshold, options.takes_root), scope);
      launch(&place_kernel<scalar_t>, ceil_div(segments.size * segments.topk, kThreads), kThreads,
             0, scope.stream(), head, segments, box_coder<float>(options.weights, options.clip),
             distances_of(options), static_cast<const float*>(anchors.const_data_ptr()),
             data_of<float>(image_sizes), candidates);
    });
  }

 private:
  Found(const Tensor& like, int64_t num_levels, const CandidateOptions& options,
        const HeadShape& shape)
      : segment_tensors(like, num_levels * shape.images,
                        std::max<int64_t>(options.most_of_level(shape), 1)),
        keys(new_empty(like, {shape.images, options.most(num_levels, shape)}, ScalarType::Long)),
        boxes(
            new_empty(like, {shape.images, options.most(num_levels, shape), 4}, ScalarType::Float)),
        segments(segment_tensors.segments()),
        candidates{data_of<uint64_t>(keys), data_of<Box<float>>(boxes), keys.size(1)} {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor> detect_cuda(
    const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
    const Tensor& anchors, const std::optional<Tensor>& image_sizes,
    const std::vector<double>& weights, double clip, double score_threshold, int64_t topk_per_level,
    double iou_threshold, int64_t max_detections, bool class_agnostic, bool by_distance,
    std::optional<int64_t> topk, const std::vector<double>& strides, int64_t bins, bool takes_root,
    const std::optional<std::vector<Tensor>>& score_factors) {
  const CandidateOptions options{score_factors.value_or(std::vector<Tensor>{}),
                                 takes_root,
                                 weights,
                                 clip,
                                 strides,
                                 bins,
                                 score_threshold,
                                 topk_per_level,
                                 topk};
  const HeadShape shape =
      check_detect(cls_logits, box_deltas, anchors, image_sizes, options, max_detections);
  const LaunchScope scope(cls_logits[0]);
  OutputTensors outputs(cls_logits[0], shape.images, max_detections);
  if (shape.images > 0) {
    const Found found(cls_logits, box_deltas, anchors, image_sizes, options, shape, scope);
    launch(&keep_kernel, shape.images, kBoxesPerChunk, 0, scope.stream(), found.candidates,
           found.segments, shape.images, static_cast<uint32_t>(shape.classes),
           Suppression<float>{round_down<float>(iou_threshold), by_distance}, class_agnostic,
           outputs.detections());
  }
  return {outputs.boxes, outputs.scores, outputs.labels, outputs.counts};
}

std::tuple<Tensor, Tensor, Tensor> head_candidates_cuda(
    const std::vector<Tensor>& cls_logits, const std::vector<Tensor>& box_deltas,
    const Tensor& anchors, const std::optional<Tensor>& image_sizes,
    const std::vector<double>& weights, double clip, double score_threshold, int64_t topk_per_level,
    std::optional<int64_t> topk, const std::vector<double>& strides, int64_t bins, bool takes_root,
    const std::optional<std::vector<Tensor>>& score_factors) {
  const CandidateOptions options{score_factors.value_or(std::vector<Tensor>{}),
                                 takes_root,
                                 weights,
                                 clip,
                                 strides,
                                 bins,
                                 score_threshold,
                                 topk_per_level,
                                 topk};
  const HeadShape shape = check_candidates(cls_logits, box_deltas, anchors, image_sizes, options);
  const LaunchScope scope(cls_logits[0]);
  const int64_t most = options.most(static_cast<int64_t>(cls_logits.size()), shape);
  Tensor scores = new_empty(cls_logits[0], {shape.images, most}, ScalarType::Float);
  Tensor labels = new_empty(cls_logits[0], {shape.images, most}, ScalarType::Long);
  if (shape.images * most == 0) {
    return {new_empty(cls_logits[0], {shape.images, most, 4}, ScalarType::Float), scores, labels};
  }
  const Found found(cls_logits, box_deltas, anchors, image_sizes, options, shape, scope);
  launch(&unpack_kernel, ceil_div(shape.images * most, kThreads), kThreads, 0, scope.stream(),
         found.candidates, found.segments, shape.images, static_cast<uint32_t>(shape.classes),
         data_of<float>(scores), data_of<int64_t>(labels));
  return {found.boxes, scores, labels};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("detect", TORCH_BOX(&detect_cuda));
  m.impl("_head_candidates", TORCH_BOX(&head_candidates_cuda));
}

}  // namespace focalops
