// How a kernel is launched and how its threads reach memory: everything the .cu files share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../checks.h"
#include "../math/host_device.h"

namespace focalops {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Blocks a multiprocessor, at least; 0: as the compiler likes it, which for double is to spill.
template <typename T>
constexpr int kMinBlocks = std::is_same_v<T, double> ? 1 : 0;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The device of a tensor made current, and its current stream: what every host function needs
// before it launches.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor)
      : guard_(tensor.get_device_index()),
        device_(tensor.get_device_index()),
        stream_(static_cast<cudaStream_t>(current_cuda_stream(tensor))) {}

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_;
};

// Of a call that names a kernel: the first one meets a GPU that the build has none for.
inline void check_kernel(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();
    fail(
        "focalops was not compiled for this GPU: `python -m focalops.info` prints its architecture "
        "and the compiled ones");
  }
  STD_CUDA_CHECK(error);
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, int block, size_t shared, cudaStream_t stream,
            const Args&... args) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (grid > kMostBlocks) {
    fail("focalops: a launch has at most ", kMostBlocks, " blocks, and these inputs need ", grid);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check_kernel(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// Kernels that stride over their work get as many blocks as run at the same time, but no more than
// there is work for.
template <typename Kernel>
int64_t resident_grid(Kernel* kernel, int block, size_t shared, int64_t work,
                      const LaunchScope& scope) {
  int blocks_per_multiprocessor = 0;
  check_kernel(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel,
                                                             block, shared));
  const int64_t resident = int64_t{1} * scope.multiprocessors() *
                           (blocks_per_multiprocessor > 0 ? blocks_per_multiprocessor : 1);
  return work < resident ? work : resident;
}

// Of the namespace: within a function the emulation's compiler takes it for one that must be
// initialised.
extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

template <typename T>
__device__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// ---- 16-byte access -----------------------------------------------------------------------------

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

FOCALOPS_HOST_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

template <typename T, int N = kVectorSize<T>>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T data[N];
};

// Elements i .. i + N of an array of `size`, past whose end nothing is read. A view may begin
// anywhere: where its pointer is not aligned (the same for all threads), elements are read one by
// one.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* array, int64_t i, int64_t size,
                                                    bool aligned) {
  constexpr int kWords = static_cast<int>(sizeof(T)) * N / kVectorBytes;
  Vector<T, N> vector;
  if (aligned && i + N <= size) {
    const uint4* from = reinterpret_cast<const uint4*>(array + i);
    uint4* to = reinterpret_cast<uint4*>(vector.data);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      to[word] = from[word];
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      vector.data[j] = i + j < size ? array[i + j] : T(0);
    }
  }
  return vector;
}

template <int N, typename T>
__device__ __forceinline__ void store_vector(T* array, int64_t i, int64_t size, bool aligned,
                                             const Vector<T, N>& vector) {
  constexpr int kWords = static_cast<int>(sizeof(T)) * N / kVectorBytes;
  if (aligned && i + N <= size) {
    uint4* to = reinterpret_cast<uint4*>(array + i);
    const uint4* from = reinterpret_cast<const uint4*>(vector.data);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      to[word] = from[word];
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (i + j < size) {
        array[i + j] = vector.data[j];
      }
    }
  }
}

// ---- arithmetic ---------------------------------------------------------------------------------

// n / divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, 1994); divisor in [1,
// 2^31).
class FastDivisor {
 public:
  explicit FastDivisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < divisor_) {
      ++shift_;
    }
    multiplier_ = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor_)) / divisor_ + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, multiplier_) + n) >> shift_;
  }

  __device__ __forceinline__ uint32_t remainder(uint32_t n, uint32_t quotient) const {
    return n - quotient * divisor_;
  }

 private:
  uint32_t divisor_;
  uint32_t multiplier_ = 0;
  uint32_t shift_ = 0;
};

// ---- reductions: a fixed tree, so that two runs give the same bits ------------------------------

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kFullWarp, value, offset);
  }
  return value;  // in lane 0
}

// The sum over a block of Threads threads, in thread 0. All of them must call it.
template <int Threads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  constexpr int kWarps = Threads / kWarpSize;
  __shared__ T warp_sums[kWarps];
  value = warp_sum(value);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  __syncthreads();  // the previous call's sums have been read
  if (lane == 0) {
    warp_sums[warp] = value;
  }
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps; ++i) {
      sum += warp_sums[i];
    }
  }
  return sum;
}

}  // namespace focalops
