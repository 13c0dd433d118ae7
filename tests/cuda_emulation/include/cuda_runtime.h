// A stand-in for CUDA's header: the language, the built-in functions and the few runtime calls that
// csrc/cuda/ uses, executed on the CPU by emulation.cpp. What is not here does not compile; nothing
// is here that is not executed as CUDA defines it.
//
// __CUDACC__ and __CUDA_ARCH__ are not defined: code that asks for them takes its host branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// ---- language -----------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Thread-local variables of a library are one contiguous piece of memory, which is how
// emulation.cpp finds all of a block's shared variables; __constinit refuses what CUDA refuses, a
// constructor.
#define __shared__ __constinit thread_local
#define __constant__ const

// ---- vector types -------------------------------------------------------------------------------

#define VECTOR_TYPES(type, name)                                              \
  struct alignas(AT_MOST_16(2 * sizeof(type))) name##2 { type x, y; };        \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(AT_MOST_16(4 * sizeof(type))) name##4 { type x, y, z, w; };  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define AT_MOST_16(n) ((n) < 16 ? (n) : 16)
VECTOR_TYPES(signed char, char)
VECTOR_TYPES(unsigned char, uchar)
VECTOR_TYPES(short, short)
VECTOR_TYPES(unsigned short, ushort)
VECTOR_TYPES(int, int)
VECTOR_TYPES(unsigned, uint)
VECTOR_TYPES(long long, longlong)
VECTOR_TYPES(unsigned long long, ulonglong)
VECTOR_TYPES(float, float)
VECTOR_TYPES(double, double)
#undef VECTOR_TYPES
#undef AT_MOST_16

template <typename T>
void __stwb(T* to, T value) {  // the default cache operator: an ordinary store
  *to = value;
}

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- the runtime --------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

// Where the running thread is. Written at every switch of threads, none of which is inside a
// kernel's own code.
struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Indices now;

using Kernel = const void*;
struct Argument {
  const void* value;
  size_t size, alignment;
};
void launch(const cudaLaunchConfig_t& config, Kernel kernel, const std::vector<Argument>& arguments,
            const std::function<void()>& thread);
cudaError_t allow_dynamic_shared(Kernel kernel, int bytes);
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute);

// Whether the build has kernels for the GPU.
extern bool has_kernel_images;

// Reports it with kernel, block and thread, as an exception of launch().
[[noreturn]] void fail(const std::string& what);

// A barrier is told apart from others by its place in the source.
struct Place {
  const char* what;
  const char* file;
  int line;
};
[[noreturn]] void fail_at_place(const std::string& what, const Place& place);
int count_at_block_barrier(bool predicate,
                           const Place& place);  // the number of threads with a true predicate

struct Lanes {
  unsigned present = 0;
  uint64_t value[32];
};
// Waits for the lanes of `mask`, and returns what each brought. Only __syncwarp orders their memory
// accesses.
Lanes meet_in_warp(unsigned mask, uint64_t value, const Place& place, bool orders_memory = false);
unsigned lane();
void fence();

template <typename To, typename From>
To bits_as(const From& from) {
  To to{};
  std::memcpy(&to, &from, sizeof to < sizeof from ? sizeof to : sizeof from);
  return to;
}

}  // namespace emulation

inline constexpr const uint3& threadIdx = emulation::now.thread;
inline constexpr const uint3& blockIdx = emulation::now.block;
inline constexpr const dim3& blockDim = emulation::now.block_dim;
inline constexpr const dim3& gridDim = emulation::now.grid_dim;
constexpr int warpSize = 32;

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...),
                "kernel parameters are copied as bytes");
  if (!emulation::has_kernel_images) {
    return cudaErrorNoKernelImageForDevice;
  }
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  const auto arguments = std::apply(
      [](const Params&... param) {
        return std::vector<emulation::Argument>{{&param, sizeof(Params), alignof(Params)}...};
      },
      params);
  emulation::launch(*config, reinterpret_cast<emulation::Kernel>(kernel), arguments,
                    [&] { std::apply(kernel, params); });
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return emulation::device_attribute(value, attribute);
}

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
  return emulation::allow_dynamic_shared(reinterpret_cast<emulation::Kernel>(kernel), bytes);
}

template <typename T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int, size_t) {
  if (!emulation::has_kernel_images) {
    return cudaErrorNoKernelImageForDevice;
  }
  *blocks = 2;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// ---- barriers, votes, shuffles ------------------------------------------------------------------

#define PLACE(what) \
  emulation::Place { what, file, line }
#define WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(WHERE) {
  emulation::count_at_block_barrier(true, PLACE("__syncthreads"));
}
inline int __syncthreads_count(int predicate, WHERE) {
  return emulation::count_at_block_barrier(predicate != 0, PLACE("__syncthreads_count"));
}
inline int __syncthreads_or(int predicate, WHERE) {
  return emulation::count_at_block_barrier(predicate != 0, PLACE("__syncthreads_or")) > 0;
}
inline int __syncthreads_and(int predicate, WHERE) {
  return emulation::count_at_block_barrier(predicate == 0, PLACE("__syncthreads_and")) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, WHERE) {
  emulation::meet_in_warp(mask, 0, PLACE("__syncwarp"), true);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, WHERE) {
  const auto lanes = emulation::meet_in_warp(mask, predicate != 0, PLACE("__ballot_sync"));
  unsigned ballot = 0;
  for (int i = 0; i < warpSize; ++i) {
    ballot |= (lanes.present >> i & 1u) & static_cast<unsigned>(lanes.value[i]) ? 1u << i : 0u;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, WHERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, WHERE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
inline unsigned __activemask() = delete;  // which threads are active together is not defined

namespace emulation {

// What `source` brought; a lane that is not there brings nothing that a program may read.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Place& place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 4 or 8 bytes");
  const Lanes lanes = meet_in_warp(mask, bits_as<uint64_t>(value), place);
  if (!(lanes.present >> source & 1u)) {
    fail_at_place("reads a lane that takes no part in it", place);
  }
  return bits_as<T>(lanes.value[source]);
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, WHERE) {
  const unsigned segment = emulation::lane() & ~(width - 1u);
  return emulation::shuffle(mask, value, segment | (source & (width - 1u)), PLACE("__shfl_sync"));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, WHERE) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, delta <= (lane & (width - 1u)) ? lane - delta : lane,
                            PLACE("__shfl_up_sync"));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, WHERE) {
  const unsigned lane = emulation::lane();
  const bool inside = (lane & (width - 1u)) + delta < static_cast<unsigned>(width);
  return emulation::shuffle(mask, value, inside ? lane + delta : lane, PLACE("__shfl_down_sync"));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, WHERE) {
  const unsigned lane = emulation::lane(), source = lane ^ lane_mask;
  return emulation::shuffle(mask, value, source <= (lane | (width - 1u)) ? source : lane,
                            PLACE("__shfl_xor_sync"));
}

#define WARP_REDUCTION(name, type, combine)                                               \
  inline type __reduce_##name##_sync(unsigned mask, type value, WHERE) {                  \
    const auto lanes = emulation::meet_in_warp(mask, emulation::bits_as<uint64_t>(value), \
                                               PLACE("__reduce_" #name "_sync"));         \
    type result = value;                                                                  \
    for (int i = 0; i < warpSize; ++i) {                                                  \
      if ((lanes.present >> i & 1u) && static_cast<unsigned>(i) != emulation::lane()) {   \
        const type other = emulation::bits_as<type>(lanes.value[i]);                      \
        result = (combine);                                                               \
      }                                                                                   \
    }                                                                                     \
    return result;                                                                        \
  }
WARP_REDUCTION(add, unsigned, result + other)
WARP_REDUCTION(min, unsigned, other < result ? other : result)
WARP_REDUCTION(max, unsigned, other > result ? other : result)
WARP_REDUCTION(min, int, other < result ? other : result)
WARP_REDUCTION(max, int, other > result ? other : result)
WARP_REDUCTION(or, unsigned, result | other)
WARP_REDUCTION(and, unsigned, result& other)
#undef WARP_REDUCTION
#undef PLACE
#undef WHERE

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() { emulation::fence(); }
inline void __trap() { emulation::fail("__trap()"); }

// ---- atomics: of the types CUDA has them for, without floats, whose sums depend on the order ----

#define ATOMIC(name, type, combine)                                                        \
  inline type atomic##name(type* address, type value) {                                    \
    type old = __atomic_load_n(address, __ATOMIC_RELAXED);                                 \
    while (!__atomic_compare_exchange_n(address, &old, (combine), false, __ATOMIC_RELAXED, \
                                        __ATOMIC_RELAXED)) {                               \
    }                                                                                      \
    return old;                                                                            \
  }
#define ATOMICS(type)                                                              \
  ATOMIC(Exch, type, value)                                                        \
  ATOMIC(Min, type, value < old ? value : old)                                     \
  ATOMIC(Max, type, value > old ? value : old)                                     \
  ATOMIC(And, type, old& value)                                                    \
  ATOMIC(Or, type, old | value)                                                    \
  ATOMIC(Xor, type, old ^ value)                                                   \
  inline type atomicCAS(type* address, type compare, type value) {                 \
    __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, \
                                __ATOMIC_RELAXED);                                 \
    return compare;                                                                \
  }
ATOMICS(int)
ATOMICS(unsigned)
ATOMICS(unsigned long long)
ATOMIC(Min, long long, value < old ? value : old)
ATOMIC(Max, long long, value > old ? value : old)
ATOMIC(Add, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
ATOMIC(Sub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
ATOMIC(Add, unsigned, old + value)
ATOMIC(Sub, unsigned, old - value)
ATOMIC(Inc, unsigned, old >= value ? 0 : old + 1)
ATOMIC(Add, unsigned long long, old + value)
#undef ATOMICS
#undef ATOMIC

// ---- built-in functions -------------------------------------------------------------------------

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) {
    reversed |= (x >> i & 1u) << (31 - i);
  }
  return reversed;
}

inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_as<double>(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

// As in CUDA, of a number and a NaN the number.
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
constexpr T min(T a, T b) {
  return b < a || a != a ? b : a;
}
template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
constexpr T max(T a, T b) {
  return a < b || a != a ? b : a;
}
