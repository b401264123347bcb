// Kernels with faults that the emulation must see, and one without; `emu_fault` runs one by number.
// Each is launched with two blocks of 64 threads, `out` has 64 numbers, `in` 64 zeros.

#include "cuda_runtime.h"
#include "cuda_fp16.h"

#include "emulation.h"

static __global__ void right(const int * in, int * out) {
    __shared__ int sums[2];
    int sum = in[threadIdx.x] + 1;
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, offset);
    }
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    out[threadIdx.x] = sums[0] + sums[1];
}

static __global__ void no_barrier(const int * in, int * out) {
    __shared__ int values[64];
    values[threadIdx.x] = in[threadIdx.x] + threadIdx.x;
    out[threadIdx.x] = values[63 - threadIdx.x];
}

static __global__ void no_warp_barrier(const int * in, int * out) {
    extern __shared__ int dynamic[];
    dynamic[threadIdx.x] = in[threadIdx.x] + 1;
    out[threadIdx.x] = dynamic[threadIdx.x ^ 1];
}

static __global__ void ended_before_barrier(const int * in, int * out) {
    if (in[threadIdx.x] == 0 && threadIdx.x < 32) {
        return;
    }
    __syncthreads();
    out[threadIdx.x] = 0;
}

static __global__ void two_barriers(const int * in, int * out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = in[threadIdx.x];
}

static __global__ void divergent_shuffle(const int * in, int * out) {
    int value = in[threadIdx.x];
    if (threadIdx.x % 2 == 0) {
        value = __shfl_sync(0xFFFFFFFF, value, 0);
    } else {
        __syncwarp();
    }
    out[threadIdx.x] = value;
}

static __global__ void ended_lane(const int * in, int * out) {
    if (threadIdx.x % 32 == 31) {
        return;
    }
    out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, in[threadIdx.x], 1);
}

static __global__ void read_behind(const int * in, int * out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

static __global__ void read_before(const int * in, int * out) {
    out[threadIdx.x] = in[static_cast<int>(threadIdx.x) - 1];
}

static __global__ void write_behind(const int * in, int * out) { out[threadIdx.x + 1] = in[0]; }

static __global__ void write_input(const int * in, int * out) {
    out[threadIdx.x] = const_cast<int *>(in)[threadIdx.x] = 1;
}

static __global__ void shared_behind(const int * in, int * out) {
    __shared__ int values[64];
    values[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = (&values[0])[threadIdx.x + 1];
}

static __global__ void much_shared(const int * in, int * out) {
    __shared__ int values[13000];
    values[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = values[threadIdx.x];
}

static __global__ void unwritten(const int * in, int * out) {
    __shared__ int values[64];
    out[threadIdx.x] = values[threadIdx.x];
}

static __global__ void blocks_in_order(const int * in, int * out) {
    out[threadIdx.x] = blockIdx.x + in[threadIdx.x];
}

__launch_bounds__(32, 1)
static __global__ void few_threads(const int * in, int * out) { out[threadIdx.x] = in[threadIdx.x]; }

static __global__ void trap(const int * in, int * out) { __trap(); }

#pragma GCC visibility push(default)
extern "C" const char * emu_fault(const emu::Settings * settings, int number, int * result) {
    return emu::guarded(*settings, [&] {
        int * in = static_cast<int *>(emu::allocate("in", 64 * sizeof(int), emu::Kind::buffer));
        int * out = static_cast<int *>(emu::allocate("out", 64 * sizeof(int), emu::Kind::buffer));
        memset(in, 0, 64 * sizeof(int));
        emu::make_read_only(in);
        void (*const kernels[])(const int *, int *) = {
            right, no_barrier, no_warp_barrier, ended_before_barrier, two_barriers, divergent_shuffle,
            ended_lane, read_behind, read_before, write_behind, write_input, shared_behind,
            much_shared, unwritten, blocks_in_order, few_threads, trap,
        };
        void (*const kernel)(const int *, int *) = kernels[number];
        kernel<<<2, 64, 64 * sizeof(int)>>>(in, out);
        memcpy(result, out, 64 * sizeof(int));
    });
}
#pragma GCC visibility pop
