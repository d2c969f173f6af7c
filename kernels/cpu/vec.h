// Vectors of the instruction set a file is compiled for, by the compiler's own vector types.
// NPU_REC_VECTOR is their width in floats; the file that includes this sets it.
#pragma once
#include <cstdint>

namespace npu_rec::NPU_REC_ISA {

constexpr int VL = NPU_REC_VECTOR;

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vfu __attribute__((vector_size(4 * VL), aligned(4), may_alias));  // in memory, any alignment

inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
inline vf splat(float x) { return x - vf{}; }

inline float sum(vf x) {
  float total = 0;
  for (int i = 0; i < VL; ++i) total += x[i];
  return total;
}

inline vf select(vi mask, vf a, vf b) {
  return reinterpret_cast<vf>((reinterpret_cast<vi>(a) & mask) | (reinterpret_cast<vi>(b) & ~mask));
}

// e^x for float32, within 2 units in the last place: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes).
inline vf exp(vf x) {
  x = select(x < -87.3f, splat(-87.3f), x);
  x = select(x > 88.3f, splat(88.3f), x);
  const vf magic = splat(12582912.0f);  // adding and taking it away rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * reinterpret_cast<vf>(power);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace npu_rec::NPU_REC_ISA
