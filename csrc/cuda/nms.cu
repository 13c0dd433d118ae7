// NMS on CUDA in O(N) memory, without asking the host before the end.
//
// Boxes are sorted by score, classes one after another, and cut into chunks of 512. What the boxes
// of a chunk do to each other does not depend on what was kept before, so one launch prepares it
// for all chunks: 512 bits a box. Then one launch a chunk, in order: each block finds out which
// boxes of the chunk are kept (the same result in every block, in about 1 us), and compares its
// share of the later boxes with them. A class ends where it ends: later boxes of other classes are
// left.
//
// Bytes moved, with N float32 boxes of which A are still alive: gather 33 N; prepare 64 N (+ 16 N
// from cache); a chunk 32 KB from cache and 16 bytes for each of the A boxes, which meet up to 512
// boxes in shared memory. Arithmetic is the limit: about 20 instructions a pair, A x 512 pairs a
// chunk.
#include <algorithm>

#include "../checks/nms.h"
#include "nms.cuh"

namespace focalops {
namespace {

constexpr int kThreadsPerBox = 8;  // share the comparisons of one later box
constexpr int kBoxesPerPass = kChunk / kThreadsPerBox;

template <typename T>
struct SortedBoxes {
  const Box<T>* boxes;     // [size]
  const int64_t* classes;  // [size], equal ones side by side; null: all boxes are of one class
  int64_t size;

  __device__ __forceinline__ bool same_class(int64_t i, int64_t j) const {
    return classes == nullptr || classes[i] == classes[j];
  }
};

// One thread a box: the class of each box in order of score.
template <typename index_t>
__global__ void __launch_bounds__(kChunk)
    gather_classes_kernel(const index_t* idxs, const int64_t* order, int64_t size,
                          int64_t* classes) {
  const int64_t rank = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (rank < size) {
    classes[rank] = idxs[order[rank]];
  }
}

// One thread a box of a batch: the box at each place of its image, and whether it is out of the
// question. ranks: its rank by score, null: the place.
template <typename scalar_t, typename score_t>
__global__ void __launch_bounds__(kChunk)
    gather_boxes_kernel(const scalar_t* boxes, const score_t* scores, const int64_t* order,
                        const int64_t* ranks, Integers counts, int64_t images, int64_t size,
                        Box<compute_t<scalar_t>>* sorted, uint8_t* removed) {
  using T = compute_t<scalar_t>;
  const int64_t place = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (place < images * size) {
    const int64_t image = place / size;
    const int64_t in_image = order[ranks == nullptr ? place : ranks[place]];
    const int64_t i = image * size + in_image;
    const scalar_t* from = boxes + 4 * i;
    const Box<T> box{static_cast<T>(from[0]), static_cast<T>(from[1]), static_cast<T>(from[2]),
                     static_cast<T>(from[3])};
    const auto score = static_cast<compute_t<score_t>>(scores[i]);
    sorted[place] = box;
    removed[place] = has_nan(box) || score != score || in_image >= counts.at(image, size);
  }
}

// Block (chunk, word), a thread for each box of the chunk: which of the word's 32 boxes would
// suppress this thread's, a later one of the same class. The 32 lie in shared memory, where a warp
// reads the same box at a time.
template <typename T>
__global__ void __launch_bounds__(kChunk)
    overlaps_kernel(SortedBoxes<T> sorted, Suppression<T> suppresses,
                    uint32_t* overlaps) {  // [chunks, kWords, kChunk]
  __shared__ Box<T> boxes[kWarpSize];
  __shared__ T areas[kWarpSize];
  const int64_t begin = blockIdx.x / kWords * int64_t{kChunk};
  const int word = blockIdx.x % kWords, thread = threadIdx.x;
  const int64_t first = begin + word * kWarpSize;
  if (thread < kWarpSize && first + thread < sorted.size) {
    boxes[thread] = sorted.boxes[first + thread];
    areas[thread] = area(boxes[thread]);
  }
  __syncthreads();
  uint32_t mask = 0;
  const int64_t i = begin + thread;
  if (i < sorted.size && thread >= word * kWarpSize) {
    const Box<T> box = sorted.boxes[i];
    const T box_area = area(box);
    const int earlier =
        thread - word * kWarpSize < kWarpSize ? thread - word * kWarpSize : kWarpSize;
    for (int bit = 0; bit < earlier; ++bit) {
      if (sorted.same_class(first + bit, i) && suppresses(boxes[bit], box, areas[bit], box_area)) {
        mask |= 1u << bit;
      }
    }
  }
  overlaps[int64_t{blockIdx.x} * kChunk + thread] = mask;
}

// Settles the chunk that begins at `begin`, in every block alike, and removes the later boxes that
// its kept boxes suppress. Blocks stride over the later boxes, 64 at a time, 8 threads each: so few
// that a warp often finds all of its boxes removed, and enough to occupy the device with a few
// thousand boxes.
template <typename T>
__global__ void __launch_bounds__(kChunk)
    chunk_kernel(SortedBoxes<T> sorted, int64_t begin, Suppression<T> suppresses,
                 const uint32_t* overlaps, const int64_t* ranks, uint8_t* removed,
                 uint8_t* kept) {  // overlaps: [kWords, kChunk], kept: [size] by rank
  __shared__ Box<T> boxes[kChunk];
  __shared__ T areas[kChunk];
  const int64_t own = begin + threadIdx.x, end = begin + kChunk, last = end - 1;
  uint32_t suppressors[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    suppressors[w] = overlaps[w * kChunk + threadIdx.x];
  }
  const bool keep = settle_chunk(own < sorted.size && !removed[own], suppressors);
  if (blockIdx.x == 0 && own < sorted.size) {
    kept[ranks == nullptr ? own : ranks[own]] = keep;
  }
  if (end >= sorted.size) {
    return;
  }
  const bool has_later = keep && sorted.same_class(own, last);
  const Count count = count_flags(has_later);
  if (has_later) {
    boxes[count.before] = sorted.boxes[own];
    areas[count.before] = area(sorted.boxes[own]);
  }
  __syncthreads();
  if (count.total == 0) {
    return;
  }
  const int share = threadIdx.x % kThreadsPerBox, lane = threadIdx.x % kWarpSize;
  for (int64_t first = end + int64_t{blockIdx.x} * kBoxesPerPass;
       first < sorted.size && sorted.same_class(first, last);
       first += int64_t{gridDim.x} * kBoxesPerPass) {
    const int64_t i = first + threadIdx.x / kThreadsPerBox;
    bool hit = false;
    if (i < sorted.size && !removed[i] && sorted.same_class(i, last)) {
      const Box<T> box = sorted.boxes[i];
      const T box_area = area(box);
      for (int k = share; k < count.total && !hit; k += kThreadsPerBox) {
        hit = suppresses(boxes[k], box, areas[k], box_area);
      }
    }
    const uint32_t hits = __ballot_sync(kFullWarp, hit);
    __syncwarp();  // removed[i] has been read by all
    if (share == 0 && (hits >> lane & ((1u << kThreadsPerBox) - 1)) != 0) {
      removed[i] = 1;
    }
  }
}

// One thread a rank. counts: kept boxes of each block; total: of all, 0 before.
__global__ void __launch_bounds__(kChunk)
    count_kernel(const uint8_t* kept, int64_t size, int64_t* counts, unsigned long long* total) {
  const int64_t rank = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  const Count count = count_flags(rank < size && kept[rank]);
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = count.total;
    atomicAdd(total, static_cast<unsigned long long>(count.total));
  }
}

// One thread a rank: the index of each kept box to its place in the result. A block adds up the
// counts of those before it, which are few: size / 512.
__global__ void __launch_bounds__(kChunk)
    write_kernel(const uint8_t* kept, const int64_t* order, int64_t size, const int64_t* counts,
                 int64_t* indices) {
  __shared__ int64_t begin;
  int64_t before = 0;
  for (int64_t block = threadIdx.x; block < blockIdx.x; block += kChunk) {
    before += counts[block];
  }
  before = block_sum<kChunk>(before);
  if (threadIdx.x == 0) {
    begin = before;
  }
  const int64_t rank = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  const bool keep = rank < size && kept[rank];
  const Count count = count_flags(keep);
  if (keep) {
    indices[begin + count.before] = order[rank];
  }
}

template <typename T>
struct SortedImage {
  const Box<T>* boxes;     // [size]
  const uint8_t* removed;  // [size]
  const int64_t* order;    // [size]
  Integers labels;
  int64_t first;  // of the image's labels

  __device__ __forceinline__ bool load(int64_t place, Box<T>& box, int64_t& label) const {
    if (removed[place]) {
      return false;
    }
    box = boxes[place];
    label = labels.at(first + order[place], 0);
    return true;
  }
};

// A block for each image.
template <typename T>
__global__ void __launch_bounds__(kChunk, 1)  // fewer registers for more blocks would spill
    multiclass_nms_kernel(const Box<T>* all_sorted, const uint8_t* all_removed,
                          const int64_t* all_order, Integers labels, int64_t size,
                          Suppression<T> suppresses, int64_t max_detections, Box<T>* all_kept_boxes,
                          int64_t* all_kept_labels, int64_t* all_indices, int64_t* num_kept) {
  const int64_t image = blockIdx.x, begin = image * size;
  const int64_t* order = all_order + begin;
  int64_t* indices = all_indices + image * max_detections;
  const SortedImage<T> sorted{all_sorted + begin, all_removed + begin, order, labels, begin};
  const int64_t total =
      keep_best(sorted, size, suppresses, false, max_detections,
                all_kept_boxes + image * max_detections, all_kept_labels + image * max_detections,
                [&](int64_t at, int64_t place) { indices[at] = order[place]; });
  for (int64_t i = total + threadIdx.x; i < max_detections; i += kChunk) {
    indices[i] = -1;
  }
  if (threadIdx.x == 0) {
    num_kept[image] = total;
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor nms_cuda(const Tensor& boxes_, const Tensor& scores_, const std::optional<Tensor>& idxs_,
                double iou_threshold, bool by_distance) {
  check_nms(boxes_, scores_, idxs_);
  const LaunchScope scope(boxes_);
  const Tensor boxes = torch::stable::contiguous(boxes_),
               scores = torch::stable::contiguous(scores_);
  const int64_t size = boxes.size(0);
  const auto new_empty = [&](int64_t n, ScalarType dtype) {
    return torch::stable::new_empty(boxes, {n}, dtype);
  };
  if (size == 0) {
    return new_empty(0, ScalarType::Long);
  }
  const int64_t chunks = ceil_div(size, kChunk);
  const Tensor order_tensor = std::get<1>(stable_sort_descending(scores));
  const auto* order = static_cast<const int64_t*>(order_tensor.const_data_ptr());

  // A class after the other, by rank inside a class.
  std::optional<Tensor> classes_tensor, ranks_tensor;
  const int64_t *classes = nullptr, *ranks = nullptr;
  if (idxs_.has_value()) {
    const Tensor idxs = torch::stable::contiguous(*idxs_);
    Tensor by_rank = new_empty(size, ScalarType::Long);
    dispatch_index(idxs.scalar_type(), [&](auto tag) {
      using index_t = tag_t<decltype(tag)>;
      launch(&gather_classes_kernel<index_t>, chunks, kChunk, 0, scope.stream(),
             static_cast<const index_t*>(idxs.const_data_ptr()), order, size,
             data_of<int64_t>(by_rank));
    });
    std::tie(classes_tensor, ranks_tensor) = stable_sort_descending(by_rank);
    classes = static_cast<const int64_t*>(classes_tensor->const_data_ptr());
    ranks = static_cast<const int64_t*>(ranks_tensor->const_data_ptr());
  }

  Tensor removed = new_empty(size, ScalarType::Byte), kept = new_empty(size, ScalarType::Byte);
  Tensor overlaps_tensor = new_empty(chunks * kWords * kChunk, ScalarType::Int);
  auto* overlaps = static_cast<uint32_t*>(overlaps_tensor.mutable_data_ptr());
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    Tensor sorted_tensor = new_empty(4 * size, compute_dtype(boxes.scalar_type()));
    auto* sorted = static_cast<Box<T>*>(sorted_tensor.mutable_data_ptr());
    dispatch_floating(scores.scalar_type(), [&](auto score_tag) {
      using score_t = tag_t<decltype(score_tag)>;
      launch(&gather_boxes_kernel<scalar_t, score_t>, chunks, kChunk, 0, scope.stream(),
             static_cast<const scalar_t*>(boxes.const_data_ptr()),
             static_cast<const score_t*>(scores.const_data_ptr()), order, ranks, Integers{},
             int64_t{1}, size, sorted, data_of<uint8_t>(removed));
    });
    const SortedBoxes<T> sorted_boxes{sorted, classes, size};
    const Suppression<T> suppresses{round_down<T>(iou_threshold), by_distance};
    launch(&overlaps_kernel<T>, chunks * kWords, kChunk, 0, scope.stream(), sorted_boxes,
           suppresses, overlaps);
    const int64_t resident =
        resident_grid(&chunk_kernel<T>, kChunk, 0, ceil_div(size, kBoxesPerPass), scope);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = chunk * kChunk;
      const int64_t passes = ceil_div(std::max<int64_t>(size - begin - kChunk, 1), kBoxesPerPass);
      launch(&chunk_kernel<T>, std::min(passes, resident), kChunk, 0, scope.stream(), sorted_boxes,
             begin, suppresses, overlaps + begin * kWords, ranks, data_of<uint8_t>(removed),
             data_of<uint8_t>(kept));
    }
  });

  Tensor counts = new_empty(chunks, ScalarType::Long);
  Tensor total_tensor = torch::stable::new_zeros(boxes, {1}, ScalarType::Long);
  launch(&count_kernel, chunks, kChunk, 0, scope.stream(), data_of<uint8_t>(kept), size,
         data_of<int64_t>(counts),
         static_cast<unsigned long long*>(total_tensor.mutable_data_ptr()));
  // The size of the result: the one thing that the host has to wait for.
  int64_t total = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&total, total_tensor.const_data_ptr(), sizeof(total),
                                 cudaMemcpyDeviceToHost, scope.stream()));
  STD_CUDA_CHECK(cudaStreamSynchronize(scope.stream()));
  Tensor indices = new_empty(total, ScalarType::Long);
  if (total > 0) {
    launch(&write_kernel, chunks, kChunk, 0, scope.stream(), data_of<uint8_t>(kept), order, size,
           data_of<int64_t>(counts), data_of<int64_t>(indices));
  }
  return indices;
}

std::tuple<Tensor, Tensor> multiclass_nms_cuda(const Tensor& boxes_, const Tensor& scores_,
                                               const std::optional<Tensor>& labels_,
                                               const std::optional<Tensor>& counts_,
                                               double iou_threshold, int64_t max_detections,
                                               bool by_distance) {
  check_multiclass_nms(boxes_, scores_, labels_, counts_, max_detections);
  const LaunchScope scope(boxes_);
  const Tensor boxes = torch::stable::contiguous(boxes_);
  const Tensor scores = torch::stable::contiguous(scores_);
  const int64_t images = boxes.size(0), size = boxes.size(1), total = images * size;
  const auto new_empty = [&](int64_t n, ScalarType dtype) {
    return torch::stable::new_empty(boxes, {n}, dtype);
  };
  Tensor indices = torch::stable::new_empty(boxes, {images, max_detections}, ScalarType::Long);
  Tensor num_kept = new_empty(images, ScalarType::Long);
  if (images == 0) {
    return {indices, num_kept};
  }
  std::optional<Tensor> labels_tensor, counts_tensor;
  const auto integers_of = [](const std::optional<Tensor>& tensor, std::optional<Tensor>& holder) {
    if (!tensor.has_value()) {
      return Integers{};
    }
    holder = torch::stable::contiguous(*tensor);
    return Integers{holder->const_data_ptr(), holder->scalar_type() == ScalarType::Long};
  };
  const Integers labels = integers_of(labels_, labels_tensor);
  const Integers counts = integers_of(counts_, counts_tensor);

  const Tensor order_tensor = std::get<1>(stable_sort_descending(scores));
  const auto* order = static_cast<const int64_t*>(order_tensor.const_data_ptr());
  Tensor removed = new_empty(total, ScalarType::Byte);
  Tensor kept_labels = new_empty(images * max_detections, ScalarType::Long);
  dispatch_floating(boxes.scalar_type(), [&](auto tag) {
    using scalar_t = tag_t<decltype(tag)>;
    using T = compute_t<scalar_t>;
    Tensor sorted_tensor = new_empty(4 * total, compute_dtype(boxes.scalar_type()));
    Tensor kept_tensor = new_empty(4 * images * max_detections, compute_dtype(boxes.scalar_type()));
    auto* sorted = static_cast<Box<T>*>(sorted_tensor.mutable_data_ptr());
    if (total > 0) {
      dispatch_floating(scores.scalar_type(), [&](auto score_tag) {
        using score_t = tag_t<decltype(score_tag)>;
        launch(&gather_boxes_kernel<scalar_t, score_t>, ceil_div(total, kChunk), kChunk, 0,
               scope.stream(), static_cast<const scalar_t*>(boxes.const_data_ptr()),
               static_cast<const score_t*>(scores.const_data_ptr()), order, nullptr, counts, images,
               size, sorted, data_of<uint8_t>(removed));
      });
    }
    launch(&multiclass_nms_kernel<T>, images, kChunk, 0, scope.stream(), sorted,
           data_of<uint8_t>(removed), order, labels, size,
           Suppression<T>{round_down<T>(iou_threshold), by_distance}, max_detections,
           static_cast<Box<T>*>(kept_tensor.mutable_data_ptr()), data_of<int64_t>(kept_labels),
           data_of<int64_t>(indices), data_of<int64_t>(num_kept));
  });
  return {indices, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(focalops, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nms_cuda));
  m.impl("multiclass_nms", TORCH_BOX(&multiclass_nms_cuda));
}

}  // namespace focalops
