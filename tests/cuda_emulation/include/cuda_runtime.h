// A small host emulation of the CUDA execution model, found by -I in place of NVIDIA's headers, so
// that kernels of llama.cpp's CUDA backend run, as they are written, where there is no GPU.
//
// What is emulated
//   - A grid runs block after block; the threads of a block are fibers with stacks of their own.
//     A fiber runs until it ends or waits: at __syncthreads, __syncwarp, a shuffle, a vote.
//   - 32 threads to a warp. A warp operation happens when all threads of its mask that still live
//     have arrived at the same one; the value of a thread that has ended is an error, not garbage.
//   - Order: schedule seed 0 runs threads and blocks in order, seed 1 backwards, any other in a
//     pseudorandom order, drawn anew at every wait. A missing barrier shows as a wrong result under
//     some of them, or as the poison below.
//   - Shared memory, static and dynamic, has the size that was asked for, is filled with poison
//     before every block; more than 48 KiB, or than what was allowed, is an error.
//   - Global memory comes from `emu::allocate`: filled with poison, between unmapped pages, so that
//     what is read or written outside is an error that names the allocation. Inputs are made
//     read-only. The pinned kernels read behind memory of ggml's pool, where on a GPU other
//     memory of the pool would be: for them it has `slack` bytes of poison behind it, which may be
//     read and not changed. For the patched kernels there are none.
//   - Threads that end, or wait elsewhere, while others of the block wait at a barrier: an error
//     (compute capability 7 and later define the first; older ones define neither).
//   - A launch with more threads than __launch_bounds__ or the device allows is an error.
//   - dp4a, byte permutation and the like, half and bfloat16 (stored as such, computed as float and
//     rounded to nearest even), streams and events that do nothing as all work is done at once;
//     programmatic dependent launch is off, as it is on the emulated devices.
//
// What is not, and what it can therefore not prove
//   - Threads change places at barriers and warp operations only, never between two instructions.
//     Two threads that write one place without a barrier are seen only if the order of whole
//     stretches between barriers changes the result. There are no caches, no memory fences, no
//     weak memory order, no two blocks at once, no two streams at once.
//   - Two architectures: sm_61 (dp4a) and sm_89 (`ptx.h`: int8 tensor cores, as the PTX manual says
//     they work; stream-k). Branches of the source for others, other vendors, and other PTX
//     (float tensor cores, cp.async, Blackwell's FP4) are not run.
//   - Not compiled or not run, of what the patches touch: mul_mat_f (MMF; the dispatch takes it to
//     fit no shape), quantize_mmq_mxfp4 and quantize_mmq_nvfp4 (compiled; only Blackwell runs them),
//     mul_mat_q with their scales, kernels overlapped by programmatic dependent launch, HIP, MUSA.
//     Of mul_mat_q the types and tiles that the tests name; stream-k and its fixup as sm_89 with 3
//     multiprocessors. Of the fusion of ops, the functions that allow it, not what then fuses.
//   - No speed, no registers, no bank conflicts, no alignment of accesses, no nvcc: the compiler is
//     g++, and expf, fused multiply-add and the order of sums may round differently.
//   - Float atomics, textures, cooperative groups: nothing that is run here uses them.
#pragma once

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDART_VERSION 12040
#ifndef __CUDA_ARCH__
#error "the emulated architecture is chosen on the command line: -D__CUDA_ARCH__=610"
#endif

#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __builtin_align__(n) alignas(n)
#define __builtin_assume(condition) emu::assume(condition, #condition, __FILE__, __LINE__)

// ---- vector types -------------------------------------------------------------------------------

#define EMU_VECTOR(T, NAME, A1, A2, A4)                                                            \
    struct alignas(A1) NAME##1 { T x; };                                                           \
    struct alignas(A2) NAME##2 { T x, y; };                                                        \
    struct NAME##3 { T x, y, z; };                                                                 \
    struct alignas(A4) NAME##4 { T x, y, z, w; };                                                  \
    static constexpr NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                           \
    static constexpr NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                   \
    static constexpr NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTOR(signed char, char, 1, 2, 4)
EMU_VECTOR(unsigned char, uchar, 1, 2, 4)
EMU_VECTOR(short, short, 2, 4, 8)
EMU_VECTOR(unsigned short, ushort, 2, 4, 8)
EMU_VECTOR(int, int, 4, 8, 16)
EMU_VECTOR(unsigned int, uint, 4, 8, 16)
EMU_VECTOR(float, float, 4, 8, 16)
EMU_VECTOR(double, double, 8, 16, 16)
#undef EMU_VECTOR

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

// ---- the execution model (emulation.cpp) --------------------------------------------------------

typedef struct emu_stream * cudaStream_t;

extern uint3 threadIdx, blockIdx;  // of the running thread
extern dim3 blockDim, gridDim;

namespace emu {

enum class WarpOp { none, sync, shuffle, any, all, ballot, add, min, max, bit_and, bit_or, call };

[[noreturn]] void fail(const char * format, ...) __attribute__((format(printf, 1, 2)));
void assume(bool condition, const char * text, const char * file, int line);
int block_barrier(int value, const char * file, int line);  // how many gave a value but 0
uint64_t warp_operation(
    WarpOp op, unsigned mask, uint64_t value, int source_lane, const char * file, int line);
// Once all 32 lanes are here, `f` gets what each of them gave.
void together(void (*f)(void * const * lanes), void * mine, const char * file, int line);
void enter_kernel(const char * name, int64_t max_threads);
void * dynamic_shared();
void * static_shared(const char * name, const char * file, int line, size_t size);
bool allow_shared(int bytes);
int lane();

struct Grid {
    dim3 blocks, threads;
    size_t shared;
    Grid(dim3 blocks, dim3 threads, size_t shared = 0, cudaStream_t = nullptr)
        : blocks(blocks), threads(threads), shared(shared) {}
};
void run_grid(const Grid & grid, void (*thread)(void *), void * argument);

// What `kernel<<<grid>>>(arguments)` is rewritten to; `kernel` is a lambda that calls it. As in CUDA
// the arguments are evaluated once, by the host, and each thread has copies of its own.
template <class F, class... A>
void launch(const Grid & grid, F kernel, A &&... arguments) {
    struct Call {
        F kernel;
        std::tuple<std::decay_t<A>...> arguments;
    } call{kernel, {std::forward<A>(arguments)...}};
    run_grid(grid, [](void * c) {
        std::apply(static_cast<Call *>(c)->kernel, static_cast<Call *>(c)->arguments);
    }, &call);
}

// what `__shared__ T name[n]` is rewritten to
template <class T>
T & shared(const char * name, const char * file, int line) {
    return *static_cast<T *>(static_shared(name, file, line, sizeof(T)));
}

template <class T>
uint64_t bits(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t result = 0;
    memcpy(&result, &value, sizeof(T));
    return result;
}

template <class T>
T from_bits(uint64_t value) {
    T result;
    memcpy(&result, &value, sizeof(T));
    return result;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char * file, int line) {
    return from_bits<T>(
        warp_operation(WarpOp::shuffle, mask, bits(value), source, file, line));
}

inline int segment(int width) { return lane() & ~(width - 1); }

inline int source_up(int delta, int width) {
    return lane() - delta < segment(width) ? lane() : lane() - delta;
}

inline int source_down(int delta, int width) {
    return lane() + delta >= segment(width) + width ? lane() : lane() + delta;
}

inline int source_xor(int mask, int width) {
    const int source = lane() ^ mask;
    return source >= segment(width) + width ? lane() : source;
}

}  // namespace emu

#define warpSize 32

#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(EMU_SITE) { emu::block_barrier(0, file, line); }
static inline int __syncthreads_or(int value, EMU_SITE) {
    return emu::block_barrier(value, file, line) > 0;
}
static inline void __syncwarp(unsigned mask = 0xFFFFFFFF, EMU_SITE) {
    emu::warp_operation(emu::WarpOp::sync, mask, 0, 0, file, line);
}

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
    return emu::shuffle(mask, value, emu::segment(width) + (source & (width - 1)), file, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, EMU_SITE) {
    return emu::shuffle(mask, value, emu::source_up(delta, width), file, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, EMU_SITE) {
    return emu::shuffle(mask, value, emu::source_down(delta, width), file, line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_SITE) {
    return emu::shuffle(mask, value, emu::source_xor(lanes, width), file, line);
}

#define EMU_WARP(RESULT, NAME, OP, T)                                                              \
    static inline RESULT NAME(unsigned mask, T value, EMU_SITE) {                                  \
        return static_cast<RESULT>(emu::warp_operation(                                            \
            emu::WarpOp::OP, mask, static_cast<uint64_t>(value), 0, file, line));                  \
    }
EMU_WARP(int, __any_sync, any, int)
EMU_WARP(int, __all_sync, all, int)
EMU_WARP(unsigned, __ballot_sync, ballot, int)
EMU_WARP(int, __reduce_add_sync, add, int)
EMU_WARP(unsigned, __reduce_add_sync, add, unsigned)
EMU_WARP(int, __reduce_min_sync, min, int)
EMU_WARP(int, __reduce_max_sync, max, int)
EMU_WARP(unsigned, __reduce_and_sync, bit_and, unsigned)
EMU_WARP(unsigned, __reduce_or_sync, bit_or, unsigned)
#undef EMU_WARP

[[noreturn]] static inline void __trap() { emu::fail("__trap()"); }

// ---- arithmetic ---------------------------------------------------------------------------------

static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) {
        c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    }
    return c;
}

static inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}

static inline int __popc(unsigned a) { return __builtin_popcount(a); }

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned chosen = (selector >> (4 * i)) & 7;  // unlike PTX's prmt, three bits
        const unsigned byte = static_cast<unsigned>(bytes >> (8 * chosen)) & 0xFF;
        result |= byte << (8 * i);
    }
    return result;
}

template <class F>
static inline unsigned emu_bytes(unsigned a, unsigned b, F f) {
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) {
        result |= static_cast<unsigned>(f((a >> i) & 0xFF, (b >> i) & 0xFF) & 0xFF) << i;
    }
    return result;
}
static inline unsigned __vsub4(unsigned a, unsigned b) {
    return emu_bytes(a, b, [](unsigned x, unsigned y) { return x - y; });
}
static inline unsigned __vadd4(unsigned a, unsigned b) {
    return emu_bytes(a, b, [](unsigned x, unsigned y) { return x + y; });
}
static inline unsigned __vcmpne4(unsigned a, unsigned b) {
    return emu_bytes(a, b, [](unsigned x, unsigned y) { return x != y ? 0xFFu : 0u; });
}
static inline unsigned __vcmpeq4(unsigned a, unsigned b) {
    return emu_bytes(a, b, [](unsigned x, unsigned y) { return x == y ? 0xFFu : 0u; });
}

static inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
#define __expf expf  // glibc has another of that name
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <class A, class B>
static constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
static constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

// ---- the runtime's functions that the compiled host code calls ----------------------------------

typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
static inline const char * cudaGetErrorString(cudaError_t) { return "an error of the emulation"; }
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }

typedef struct emu_event * cudaEvent_t;
typedef struct emu_graph * cudaGraph_t;
typedef struct emu_graph_exec * cudaGraphExec_t;
typedef struct emu_graph_node * cudaGraphNode_t;
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned) { return cudaSuccess; }
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned) { return cudaSuccess; }
static inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

static inline cudaError_t cudaMemsetAsync(void * to, int value, size_t n, cudaStream_t = nullptr) {
    memset(to, value, n);
    return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                      cudaMemcpyDeviceToDevice };
static inline cudaError_t cudaMemcpyAsync(
    void * to, const void * from, size_t n, cudaMemcpyKind, cudaStream_t = nullptr) {
    memcpy(to, from, n);
    return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaMemset2DAsync(
    void * to, size_t pitch, int value, size_t width, size_t height, cudaStream_t = nullptr) {
    for (size_t i = 0; i < height; ++i) {
        memset(static_cast<char *>(to) + i * pitch, value, width);
    }
    return cudaSuccess;
}
static inline cudaError_t cudaMalloc(void **, size_t) { return cudaErrorNotSupported; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F>
static inline cudaError_t cudaFuncSetAttribute(F * kernel, cudaFuncAttribute, int bytes) {
    return emu::allow_shared(bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaFuncAttributes { int ptxVersion; };
static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, const void *) {
    attributes->ptxVersion = __CUDA_ARCH__ / 10;
    return cudaSuccess;
}

enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    int id;
    struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute * attrs;
    unsigned numAttrs;
};
template <class F, class... A>
static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * c, F kernel, A &&... arguments) {
    emu::launch(emu::Grid(c->gridDim, c->blockDim, c->dynamicSmemBytes),
                [=](auto... a) { kernel(a...); }, std::forward<A>(arguments)...);
    return cudaSuccess;
}
static inline void cudaGridDependencySynchronize() {}
static inline void cudaTriggerProgrammaticLaunchCompletion() {}

#include "ptx.h"
