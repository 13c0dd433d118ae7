// Kernels with one fault each, and sound ones that come close: `faults NAME` runs the kernel of
// that name. test_cuda_emulation.py expects each fault to be reported at the line that says
// "fault:".
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

extern "C" void focalops_emulation_set_order(int order, unsigned seed);
extern "C" void focalops_emulation_expect_streams(int count);
extern "C" void focalops_emulation_begin_stream(int stream);
extern "C" void focalops_emulation_end_stream(int stream);

namespace focalops {
extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
}

namespace {

constexpr int kThreads = 64;

// ---- faults -------------------------------------------------------------------------------------

__global__ void reads_past_the_end(const float* in, float* out, int size) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i <= size) {
    out[i % size] = in[i];  // fault: reads_past_the_end
  }
}

__global__ void misses_a_barrier(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);  // fault: misses_a_barrier
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void misses_a_warp_barrier(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float sum = values[threadIdx.x] + values[threadIdx.x ^ 1];
  __ballot_sync(0xffffffffu, true);  // orders no memory accesses
  values[threadIdx.x] = sum;         // fault: misses_a_warp_barrier
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void reads_misaligned(const float* in, float* out) {
  const uint4* vectors = reinterpret_cast<const uint4*>(in + 1);
  reinterpret_cast<uint4*>(out)[threadIdx.x] = vectors[threadIdx.x];  // fault: reads_misaligned
}

__global__ void is_not_in_its_mask(unsigned* out) {
  out[threadIdx.x] = __ballot_sync(0x0000ffffu, threadIdx.x & 1);  // fault: is_not_in_its_mask
}

__global__ void brings_different_masks(unsigned* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffffffffu;
  out[threadIdx.x] = __ballot_sync(mask, true);  // fault: brings_different_masks
}

__global__ void shuffles_from_nobody(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 16);  // fault: shuffles_from_nobody
  }
}

__global__ void reads_unwritten_shared(float* out) {
  __shared__ float values[kThreads];
  if (threadIdx.x > 0) {
    values[threadIdx.x] = 1;
  }
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];  // fault: reads_unwritten_shared
}

__global__ void reads_beyond_dynamic_shared(float* out) {
  auto* values = reinterpret_cast<float*>(focalops::dynamic_shared_memory);
  values[threadIdx.x + 1] = 1;  // fault: reads_beyond_dynamic_shared
  out[threadIdx.x] = 0;
}

__global__ void indexes_past_an_array(float* out, int last) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + last];  // fault: indexes_past_an_array
}

__global__ void threads_race(float* out) {
  out[threadIdx.x / 2] = 1;  // fault: threads_race
}

__global__ void blocks_race(float* out) {
  if (threadIdx.x == 0) {
    out[0] = static_cast<float>(blockIdx.x);  // fault: blocks_race
  }
}

// The sum of what all blocks wrote, by the block that comes last; without the fence its reads are
// not ordered.
template <bool Fence>
__global__ void last_block_sums(int* partials, unsigned* done, int* out) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = static_cast<int>(blockIdx.x);
    if (Fence) {
      __threadfence();
    }
    is_last = atomicAdd(done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      sum += partials[i];  // fault: misses_a_fence
    }
    out[0] = sum;
  }
}

__global__ void diverges_at_a_barrier(float* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();  // fault: diverges_at_a_barrier
  }
  out[threadIdx.x] = 0;
}

__global__ void waits_at_two_barriers(float* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();  // fault: waits_at_two_barriers
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void waits_for_another_block(const volatile int* flag, float* out) {
  while (*flag == 0) {  // fault: waits_for_another_block
  }
  out[threadIdx.x] = 0;
}

__global__ void shifts_too_far(unsigned* out) {
  out[threadIdx.x] = 1u << threadIdx.x;  // fault: shifts_too_far
}

__global__ void depends_on_the_order(unsigned* count, unsigned* out) {
  out[atomicAdd(count, 1u)] = blockIdx.x * kThreads + threadIdx.x;
}

__global__ void uses_scratch(float* scratch, float* out) {
  scratch[threadIdx.x] = 1;  // fault: streams_share_scratch
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = scratch[threadIdx.x];
}

// ---- sound kernels ------------------------------------------------------------------------------

__global__ void reverses(float* out) {
  auto* values = reinterpret_cast<float*>(focalops::dynamic_shared_memory);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void exchanges_in_a_warp(float* out) {
  __shared__ float values[kThreads];
  for (int offset = 1; offset < 32; offset *= 2) {
    values[threadIdx.x] = static_cast<float>(offset);
    __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ offset];
    __syncwarp();
  }
}

// A warp's halves go different ways, and the second block's last warp has one lane only.
__global__ void diverges_soundly(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  unsigned votes = 0;
  if (lane < 16) {
    votes = __ballot_sync(mask, lane & 1);
  } else {
    votes = __ballot_sync(mask, true);
  }
  atomicMax(&out[0], votes);
}

// ---- running them -------------------------------------------------------------------------------

template <typename T>
T* buffer(int size) {  // of exactly that size, so that the address sanitizer sees its end
  auto* data = static_cast<T*>(std::malloc(size * sizeof(T)));
  std::fill_n(data, size, T(0));
  return data;
}

template <typename... Params, typename... Args>
void run(int blocks, int threads, size_t shared, void (*kernel)(Params...), Args... args) {
  const cudaLaunchConfig_t config{dim3(blocks), dim3(threads), shared, nullptr};
  if (cudaLaunchKernelEx(&config, kernel, args...) != cudaSuccess) {
    throw std::runtime_error("not launched");
  }
}

void order_matters() {
  std::vector<unsigned> results[3];
  for (int order = 0; order < 3; ++order) {
    focalops_emulation_set_order(order, 1);
    auto* out = buffer<unsigned>(4 * kThreads);
    run(4, kThreads, 0, depends_on_the_order, buffer<unsigned>(1), out);
    results[order].assign(out, out + 4 * kThreads);
  }
  if (results[0] != results[1] && results[0] != results[2] && results[1] != results[2]) {
    throw std::runtime_error("three orders, three results");
  }
}

void two_streams(bool share) {
  auto* scratch = buffer<float>(2 * kThreads);
  std::string failure;
  const auto stream = [&](int i) {
    focalops_emulation_begin_stream(i);
    try {
      run(1, kThreads, 0, uses_scratch, scratch + (share ? 0 : i * kThreads),
          buffer<float>(kThreads));
    } catch (const std::exception& error) {
      failure = error.what();
    }
    focalops_emulation_end_stream(i);
  };
  focalops_emulation_expect_streams(2);
  std::thread first(stream, 0), second(stream, 1);
  first.join();
  second.join();
  if (!failure.empty()) {
    throw std::runtime_error(failure);
  }
}

const std::map<std::string, std::function<void()>> kRuns{
    {"reads_past_the_end",
     [] { run(2, kThreads, 0, reads_past_the_end, buffer<float>(100), buffer<float>(100), 100); }},
    {"misses_a_barrier", [] { run(2, kThreads, 0, misses_a_barrier, buffer<float>(kThreads)); }},
    {"misses_a_warp_barrier",
     [] { run(1, kThreads, 0, misses_a_warp_barrier, buffer<float>(kThreads)); }},
    {"reads_misaligned",
     [] {
       run(1, kThreads, 0, reads_misaligned, buffer<float>(4 * kThreads + 4),
           buffer<float>(4 * kThreads));
     }},
    {"is_not_in_its_mask",
     [] { run(1, kThreads, 0, is_not_in_its_mask, buffer<unsigned>(kThreads)); }},
    {"brings_different_masks",
     [] { run(1, kThreads, 0, brings_different_masks, buffer<unsigned>(kThreads)); }},
    {"shuffles_from_nobody",
     [] { run(1, kThreads, 0, shuffles_from_nobody, buffer<int>(kThreads)); }},
    {"reads_unwritten_shared",
     [] { run(1, kThreads, 0, reads_unwritten_shared, buffer<float>(kThreads)); }},
    {"reads_beyond_dynamic_shared",
     [] { run(1, kThreads, 4 * kThreads, reads_beyond_dynamic_shared, buffer<float>(kThreads)); }},
    {"indexes_past_an_array",
     [] { run(1, kThreads, 0, indexes_past_an_array, buffer<float>(kThreads), 1); }},
    {"threads_race", [] { run(1, kThreads, 0, threads_race, buffer<float>(kThreads)); }},
    {"blocks_race", [] { run(3, kThreads, 0, blocks_race, buffer<float>(1)); }},
    {"misses_a_fence",
     [] {
       run(5, kThreads, 0, last_block_sums<false>, buffer<int>(5), buffer<unsigned>(1),
           buffer<int>(1));
     }},
    {"diverges_at_a_barrier",
     [] { run(1, kThreads, 0, diverges_at_a_barrier, buffer<float>(kThreads)); }},
    {"waits_at_two_barriers",
     [] { run(1, kThreads, 0, waits_at_two_barriers, buffer<float>(kThreads)); }},
    {"waits_for_another_block",
     [] { run(1, kThreads, 0, waits_for_another_block, buffer<int>(1), buffer<float>(kThreads)); }},
    {"shifts_too_far", [] { run(1, kThreads, 0, shifts_too_far, buffer<unsigned>(kThreads)); }},
    {"depends_on_the_order", order_matters},
    {"streams_share_scratch", [] { two_streams(true); }},
    {"sound",
     [] {
       for (int order = 0; order < 3; ++order) {
         focalops_emulation_set_order(order, 1);
         run(3, kThreads, 4 * kThreads, reverses, buffer<float>(3 * kThreads));
         run(1, kThreads, 0, exchanges_in_a_warp, buffer<float>(kThreads));
         run(2, 33, 0, diverges_soundly, buffer<unsigned>(1));
         run(5, kThreads, 0, last_block_sums<true>, buffer<int>(5), buffer<unsigned>(1),
             buffer<int>(1));
         two_streams(false);
       }
     }},
};

}  // namespace

int main(int argc, char** argv) {
  try {
    kRuns.at(argc > 1 ? argv[1] : "")();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
