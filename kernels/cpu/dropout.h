// Random numbers by counter, as npu_rec/ops/random.py makes them.
#pragma once
#include "rows.h"

namespace npu_rec::NPU_REC_ISA {

inline vu mix(vu z) {  // _mix32
  z = (z ^ z >> 16) * 0x85EBCA6Bu;
  z = (z ^ z >> 13) * 0xC2B2AE35u;
  return z ^ z >> 16;
}

// random_bits of `place` and those after it.
inline vu random_bits(uint64_t key, int64_t place) {
  constexpr uint32_t STEP = 0x9E3779B9;
  const vu index = reinterpret_cast<vu>(LANES) * STEP + (uint32_t(place) * STEP + uint32_t(key));
  return mix(mix(index) ^ uint32_t(key >> 32));
}

// Multipliers of `channel` and those after it, for the token of this key.
inline vf dropout_scale(uint64_t key, int64_t channel, int32_t largest_dropped, float scale) {
  const vu bits = random_bits(key, channel);
  return select(reinterpret_cast<vi>(bits & 0x7FFFFFFF) > largest_dropped, splat(scale), vf{});
}

// derive_keys: the key of one part (a head, say) of what `key` is for.
inline uint64_t derive_key(uint64_t key, int64_t part) {
  uint64_t z = key + uint64_t(part + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

}  // namespace npu_rec::NPU_REC_ISA
