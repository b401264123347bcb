// half and half2: stored as IEEE binary16, computed as float, rounded to nearest even.
#pragma once
#include "cuda_runtime.h"

namespace emu {

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3FF;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t top = exponent == 31 ? 0xFF : exponent + 112;
    return from_bits<float>(sign | (top << 23) | (fraction << 13));
}

inline uint16_t float_to_half(float f) {
    const uint32_t x = static_cast<uint32_t>(bits(f));
    const uint16_t sign = static_cast<uint16_t>((x >> 16) & 0x8000);
    const float magnitude = fabsf(f);
    if (std::isnan(f)) {
        return sign | 0x7E00;
    }
    if (magnitude >= 65520.0f) {
        return sign | 0x7C00;
    }
    if (magnitude < 0x1p-14f) {
        return sign | static_cast<uint16_t>(nearbyintf(magnitude * 0x1p24f));
    }
    const uint32_t rounded = (x & 0x7FFFFFFF) + 0xFFF + ((x >> 13) & 1);
    return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

}  // namespace emu

struct __half {
    uint16_t x;
    __half() = default;
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    __half(T value) : x(emu::float_to_half(static_cast<float>(value))) {}
    operator float() const { return emu::half_to_float(x); }
};
typedef __half half;

struct alignas(4) __half2 {
    half x, y;
    __half2() = default;
    __half2(half x, half y) : x(x), y(y) {}
};
typedef __half2 half2;

static inline half __float2half(float f) { return half(f); }
static inline half __float2half_rn(float f) { return half(f); }
static inline float __half2float(half h) { return h; }
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half2 __halves2half2(half x, half y) { return {x, y}; }
static inline half2 __float2half2_rn(float f) { return {half(f), half(f)}; }
static inline half2 __half2half2(half h) { return {h, h}; }
static inline half2 __float22half2_rn(float2 f) { return {half(f.x), half(f.y)}; }
static inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
static inline float2 __half22float2(half2 h) { return {h.x, h.y}; }
static inline float __low2float(half2 h) { return h.x; }
static inline float __high2float(half2 h) { return h.y; }
static inline half __low2half(half2 h) { return h.x; }
static inline half __high2half(half2 h) { return h.y; }
static inline half2 __lows2half2(half2 a, half2 b) { return {a.x, b.x}; }
static inline half2 __highs2half2(half2 a, half2 b) { return {a.y, b.y}; }

#define EMU_HALF2(NAME, EXPRESSION)                                                                \
    static inline half2 NAME(half2 a, half2 b) {                                                   \
        const auto f = [](float p, float q) { return half(EXPRESSION); };                          \
        return {f(a.x, b.x), f(a.y, b.y)};                                                         \
    }
EMU_HALF2(__hadd2, p + q)
EMU_HALF2(__hsub2, p - q)
EMU_HALF2(__hmul2, p * q)
EMU_HALF2(__hmax2, fmaxf(p, q))
EMU_HALF2(operator+, p + q)
EMU_HALF2(operator-, p - q)
EMU_HALF2(operator*, p * q)
#undef EMU_HALF2
static inline half2 & operator+=(half2 & a, half2 b) { return a = a + b; }
static inline half2 & operator*=(half2 & a, half2 b) { return a = a * b; }
static inline half __hmax(half a, half b) { return half(fmaxf(a, b)); }
static inline half __hadd(half a, half b) { return half(float(a) + float(b)); }
static inline half __hmul(half a, half b) { return half(float(a) * float(b)); }
