// bfloat16: the upper half of a float, rounded to nearest even.
#pragma once
#include "cuda_runtime.h"

namespace emu {

inline uint16_t float_to_bfloat16(float f) {
    const uint32_t x = static_cast<uint32_t>(bits(f));
    if (std::isnan(f)) {
        return static_cast<uint16_t>((x >> 16) | 0x40);
    }
    return static_cast<uint16_t>((x + 0x7FFF + ((x >> 16) & 1)) >> 16);
}

}  // namespace emu

struct nv_bfloat16 {
    uint16_t x;
    nv_bfloat16() = default;
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    nv_bfloat16(T value) : x(emu::float_to_bfloat16(static_cast<float>(value))) {}
    operator float() const { return emu::from_bits<float>(static_cast<uint64_t>(x) << 16); }
};
typedef nv_bfloat16 __nv_bfloat16;

struct alignas(4) nv_bfloat162 {
    nv_bfloat16 x, y;
    nv_bfloat162() = default;
    nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) : x(x), y(y) {}
};
typedef nv_bfloat162 __nv_bfloat162;

static inline nv_bfloat16 __float2bfloat16(float f) { return nv_bfloat16(f); }
static inline float __bfloat162float(nv_bfloat16 b) { return b; }
static inline float2 __bfloat1622float2(nv_bfloat162 b) { return {b.x, b.y}; }
static inline nv_bfloat162 __float22bfloat162_rn(float2 f) {
    return {nv_bfloat16(f.x), nv_bfloat16(f.y)};
}
static inline nv_bfloat16 __low2bfloat16(nv_bfloat162 b) { return b.x; }
static inline nv_bfloat16 __high2bfloat16(nv_bfloat162 b) { return b.y; }
