// float8 with four bits of exponent, three of fraction: what ggml reads NVFP4's scales with.
#pragma once
#include "cuda_runtime.h"

struct __nv_fp8_e4m3 {
    uint8_t __x;
    operator float() const {
        const int exponent = (__x >> 3) & 15, fraction = __x & 7;
        if (exponent == 15 && fraction == 7) {
            return NAN;
        }
        const float magnitude = exponent == 0 ? ldexpf(static_cast<float>(fraction), -9)
                                              : ldexpf(1.0f + fraction / 8.0f, exponent - 7);
        return __x & 0x80 ? -magnitude : magnitude;
    }
};
