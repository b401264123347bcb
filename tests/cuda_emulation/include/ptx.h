// The PTX instructions of MMQ's int8 tensor core path, by the layouts of registers that NVIDIA's PTX
// manual gives for them. `translate.py` writes the calls; other PTX becomes an error when it is run.
#pragma once

#include "cuda_runtime.h"

namespace emu::ptx {

// lane t gets, of matrix m, the t%4-th word of row t/4; lane 8·m + i has that matrix's row i
template <int n>
void ldmatrix(int (&registers)[n], const void * row, const char * file, int line) {
    struct Lane {
        const void * row;
        int * registers;
    } mine{row, registers};
    together([](void * const * lanes) {
        for (int t = 0; t < 32; ++t) {
            for (int m = 0; m < n; ++m) {
                const void * row = static_cast<const Lane *>(lanes[8 * m + t / 4])->row;
                if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
                    fail("ldmatrix: the row of lane %d is not aligned to 16 bytes", 8 * m + t / 4);
                }
                static_cast<Lane *>(lanes[t])->registers[m] = static_cast<const int *>(row)[t % 4];
            }
        }
    }, &mine, file, line);
}

inline void ldmatrix_sync_aligned_m8n8_x2_b16(int & r0, int & r1, const void * row, EMU_SITE) {
    int r[2];
    ldmatrix(r, row, file, line);
    r0 = r[0], r1 = r[1];
}

inline void ldmatrix_sync_aligned_m8n8_x4_b16(
    int & r0, int & r1, int & r2, int & r3, const void * row, EMU_SITE) {
    int r[4];
    ldmatrix(r, row, file, line);
    r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}

template <int k>
__attribute__((optimize("O3"))) int dot(const int8_t * a, const int8_t * b) {
    int sum = 0;
    for (int i = 0; i < k; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

// D [16, 8] += A [16, k] · B [k, 8], of bytes. Lane 4·g + t has of A the rows g and g+8, of B the
// column g, of D the rows g and g+8; a register four bytes from k = 4·t, the next ones from 16 on.
template <int k>
void mma(int (&d)[4], const int (&a)[k / 8], const int (&b)[k / 16], const char * file, int line) {
    struct Lane {
        int * d;
        const int * a;
        const int * b;
    } mine{d, a, b};
    together([](void * const * lanes) {
        int8_t A[16][k], B[8][k];
        for (int lane = 0; lane < 32; ++lane) {
            const Lane & l = *static_cast<const Lane *>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < k / 8; ++i) {
                memcpy(&A[g + 8 * (i % 2)][4 * t + 16 * (i / 2)], &l.a[i], 4);
            }
            for (int i = 0; i < k / 16; ++i) {
                memcpy(&B[g][4 * t + 16 * i], &l.b[i], 4);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const Lane & l = *static_cast<const Lane *>(lanes[lane]);
            for (int i = 0; i < 4; ++i) {
                const int8_t * row = A[lane / 4 + 8 * (i / 2)];
                const int8_t * column = B[2 * (lane % 4) + i % 2];
                l.d[i] += dot<k>(row, column);
            }
        }
    }, &mine, file, line);
}

inline void mma_sync_aligned_m16n8k16_row_col_s32_s8_s8_s32(
    int & d0, int & d1, int & d2, int & d3, int a0, int a1, int b0, EMU_SITE) {
    int d[4] = {d0, d1, d2, d3}, a[2] = {a0, a1}, b[1] = {b0};
    mma<16>(d, a, b, file, line);
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(
    int & d0, int & d1, int & d2, int & d3, int a0, int a1, int a2, int a3, int b0, int b1,
    EMU_SITE) {
    int d[4] = {d0, d1, d2, d3}, a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    mma<32>(d, a, b, file, line);
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

}  // namespace emu::ptx
