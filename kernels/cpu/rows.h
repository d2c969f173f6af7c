// Rows of a tensor, vector by vector: elements of 16 bits become float32, and the last vector of a row may be a part.
#pragma once
#include "kernels.h"
#include "vec.h"
#if NPU_REC_VECTOR > 4
#include <immintrin.h>
#endif

namespace npu_rec::NPU_REC_ISA {

typedef uint32_t vu __attribute__((vector_size(4 * VL)));  // arithmetic modulo 2^32, logical shifts
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// How much of a vector lies within the row: every lane, or the first `count` (1 to VL - 1).
struct Whole {};
struct Part { int count; };

// The number of each lane. Written out, because GCC makes no constant of a loop over lanes.
#if NPU_REC_VECTOR == 16
const vi LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif NPU_REC_VECTOR == 8
const vi LANES = {0, 1, 2, 3, 4, 5, 6, 7};
#else
const vi LANES = {0, 1, 2, 3};
#endif

// body(i, reach) for the vectors of a row of `width` elements, i their first element.
template <typename Body>
inline void for_vectors(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + VL <= width; i += VL) body(i, Whole{});
  if (i < width) body(i, Part{int(width - i)});
}

inline int64_t whole_vectors(int64_t width) { return (width + VL - 1) / VL * VL; }

inline vf within(vf x, Whole) { return x; }
inline vf within(vf x, Part part) { return select(LANES < part.count, x, vf{}); }

// The sum of the lanes, in each lane. Not `sum` of vec.h, which adds one lane after the other.
inline vf total(vf x) {
  for (int apart = VL / 2; apart >= 1; apart /= 2) x += __builtin_shuffle(x, LANES ^ apart);
  return x;
}

// --- reading; lanes outside the row are 0

inline vf load(const float* p, Whole) { return load(p); }

inline vf load(const float* p, Part part) {
#if NPU_REC_VECTOR == 16
  return _mm512_maskz_loadu_ps(__mmask16((1u << part.count) - 1), p);
#elif NPU_REC_VECTOR == 8
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(LANES < part.count));
#else
  vf x{};
  for (int i = 0; i < part.count; ++i) x[i] = p[i];
  return x;
#endif
}

inline vu load_bits(const uint16_t* p, Whole) {
  vh bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, vu);
}

inline vu load_bits(const uint16_t* p, Part part) {
#if NPU_REC_VECTOR == 16
  return __builtin_convertvector((vh)_mm256_maskz_loadu_epi16(__mmask16((1u << part.count) - 1), p), vu);
#else
  uint16_t bits[VL] = {};
  for (int i = 0; i < part.count; ++i) bits[i] = p[i];
  return load_bits(bits, Whole{});
#endif
}

template <typename Reach>
inline vf load(const bf16* p, Reach reach) { return reinterpret_cast<vf>(load_bits(&p->bits, reach) << 16); }

// The exponent and fraction moved to their places in a float32, which is then 2^112 times too small.
template <typename Reach>
inline vf load(const f16* p, Reach reach) {
  const vu bits = load_bits(&p->bits, reach), magnitude = bits & 0x7FFF;
  const vu scaled = reinterpret_cast<vu>(reinterpret_cast<vf>(magnitude << 13) * 0x1p112f);
  const vu not_finite = reinterpret_cast<vu>(magnitude > 0x7BFF) & 0x7F800000;
  return reinterpret_cast<vf>(scaled | not_finite | (bits & 0x8000) << 16);
}

// --- writing; to the nearest, ties to even; elements outside the row are left alone

inline void store(float* p, vf x, Whole) { store(p, x); }

inline void store(float* p, vf x, Part part) {
#if NPU_REC_VECTOR == 16
  _mm512_mask_storeu_ps(p, __mmask16((1u << part.count) - 1), x);
#elif NPU_REC_VECTOR == 8
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(LANES < part.count), x);
#else
  for (int i = 0; i < part.count; ++i) p[i] = x[i];
#endif
}

inline void store_bits(uint16_t* p, vu x, Whole) {
  const vh bits = __builtin_convertvector(x, vh);
  __builtin_memcpy(p, &bits, sizeof bits);
}

inline void store_bits(uint16_t* p, vu x, Part part) {
#if NPU_REC_VECTOR == 16
  const vh bits = __builtin_convertvector(x, vh);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << part.count) - 1), (__m256i)bits);
#else
  uint16_t bits[VL];
  store_bits(bits, x, Whole{});
  for (int i = 0; i < part.count; ++i) p[i] = bits[i];
#endif
}

inline vu choose(vi mask, vu a, vu b) { return (a & reinterpret_cast<vu>(mask)) | (b & ~reinterpret_cast<vu>(mask)); }

template <typename Reach>
inline void store(bf16* p, vf x, Reach reach) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  store_bits(&p->bits, choose(x == x, rounded, vu{} + 0x7FC0), reach);
}

template <typename Reach>
inline void store(f16* p, vf x, Reach reach) {
  const vu bits = reinterpret_cast<vu>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  // normal numbers: the exponent moved, 13 bits rounded away; a carry into the exponent is right, up to infinity
  const vu normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  // below 2^-14: adding a half makes the addition round at the place of the last bit, 2^-24
  const vf shifted = reinterpret_cast<vf>(magnitude) + 0.5f;
  const vu subnormal = reinterpret_cast<vu>(shifted) - reinterpret_cast<vu>(splat(0.5f));
  vu half = choose(reinterpret_cast<vi>(magnitude) < int32_t(113u << 23), subnormal, normal);
  half = choose(reinterpret_cast<vi>(magnitude) >= int32_t(143u << 23), vu{} + 0x7C00, half);
  half = choose(x == x, half, vu{} + 0x7E00);
  store_bits(&p->bits, half | sign, reach);
}

}  // namespace npu_rec::NPU_REC_ISA
