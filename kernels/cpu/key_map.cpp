// Keys to slots on the CPU. The memory of several keys is asked for before their turn, for the time goes into waiting
// for it.
#include "key_map.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace npu_rec {
namespace {

constexpr int FEWEST_BITS = 4;             // of the index of a place
constexpr int64_t AHEAD = 16;              // keys
constexpr int64_t KEYS_FOR_A_THREAD = 4096;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014).
inline uint64_t hash_of(int64_t key) {
  uint64_t z = uint64_t(key) + 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

at::Tensor checked(const at::Tensor& keys) {
  TORCH_CHECK_VALUE(
      keys.dim() == 1 && keys.scalar_type() == at::kLong && keys.is_cpu(), "keys must be [U] int64 on the CPU, got ",
      keys.sizes(), " ", keys.scalar_type(), " on ", keys.device());
  return keys.contiguous();
}

}  // namespace

KeyMap::KeyMap() : places(size_t(1) << FEWEST_BITS, Place{0, -1}), count(0), limit(0), shift(64 - FEWEST_BITS) {}

size_t KeyMap::home(int64_t key) const { return hash_of(key) >> shift; }

size_t KeyMap::place_of(int64_t key) const {
  size_t at = home(key);
  while (places[at].slot >= 0 && places[at].key != key) at = next(at);
  return at;
}

void KeyMap::ask_for(const int64_t* keys, int64_t i, int64_t end) const {
  if (i < end) __builtin_prefetch(&places[home(keys[i])]);
}

at::Tensor KeyMap::find(const at::Tensor& tensor) const {
  const at::Tensor keys = checked(tensor);
  at::Tensor slots = at::empty_like(keys);
  const int64_t* key = keys.const_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  at::parallel_for(0, keys.numel(), KEYS_FOR_A_THREAD, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < begin + AHEAD; ++i) ask_for(key, i, end);
    for (int64_t i = begin; i < end; ++i) {
      ask_for(key, i + AHEAD, end);
      slot[i] = places[place_of(key[i])].slot;
    }
  });
  return slots;
}

// Either all keys go in, or none: slots are taken at the end.
at::Tensor KeyMap::insert(const at::Tensor& tensor) {
  const at::Tensor keys = checked(tensor);
  const int64_t total = keys.numel(), again = std::min<int64_t>(total, freed.size());
  at::Tensor slots = at::empty_like(keys);
  const int64_t* key = keys.const_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  grow_for(count + total);
  for (int64_t i = 0; i < total; ++i) {
    ask_for(key, i + AHEAD, total);
    const size_t at = place_of(key[i]);
    if (places[at].slot >= 0) {
      for (int64_t j = i; j-- > 0;) free_place(place_of(key[j]));
      TORCH_CHECK_VALUE(false, "key ", key[i], " is in the map already, or twice among those to insert");
    }
    slot[i] = i < again ? freed[freed.size() - 1 - i] : limit + i - again;
    places[at] = {key[i], slot[i]};
  }
  freed.resize(freed.size() - again);
  limit += total - again;
  count += total;
  return slots;
}

// Either all keys go, or none.
at::Tensor KeyMap::erase(const at::Tensor& tensor) {
  const at::Tensor keys = checked(tensor);
  const int64_t total = keys.numel();
  at::Tensor slots = at::empty_like(keys);
  const int64_t* key = keys.const_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < total; ++i) {
    ask_for(key, i + AHEAD, total);
    const size_t at = place_of(key[i]);
    slot[i] = places[at].slot;
    if (slot[i] < 0) {
      for (int64_t j = i; j-- > 0;) places[place_of(key[j])] = {key[j], slot[j]};
      TORCH_CHECK_VALUE(false, "key ", key[i], " is not in the map, or twice among those to erase");
    }
    free_place(at);
  }
  freed.insert(freed.end(), slot, slot + total);
  count -= total;
  return slots;
}

std::tuple<at::Tensor, at::Tensor> KeyMap::items() const {
  std::vector<const Place*> of_slot(limit, nullptr);
  for (const Place& place : places)
    if (place.slot >= 0) of_slot[place.slot] = &place;
  at::Tensor keys = at::empty({count}, at::kLong), slots = at::empty({count}, at::kLong);
  int64_t* key = keys.mutable_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  for (const Place* place : of_slot)
    if (place) *key++ = place->key, *slot++ = place->slot;
  return {keys, slots};
}

// Entries that follow move back where the gap cuts them off from their home, so that no marks of erased ones remain.
void KeyMap::free_place(size_t at) {
  for (size_t other = next(at); places[other].slot >= 0; other = next(other)) {
    const size_t from_home = (other - home(places[other].key)) & (places.size() - 1);
    const size_t from_gap = (other - at) & (places.size() - 1);
    if (from_home < from_gap) continue;
    places[at] = places[other];
    at = other;
  }
  places[at].slot = -1;
}

// At most three quarters of the places are taken.
void KeyMap::grow_for(int64_t entries) {
  size_t size = places.size();
  int bits = 64 - shift;
  while (size_t(entries) * 4 > size * 3) size *= 2, ++bits;
  if (size == places.size()) return;
  Places before(size, Place{0, -1});
  before.swap(places);
  shift = 64 - bits;
  for (const Place& place : before)
    if (place.slot >= 0) places[place_of(place.key)] = place;
}

}  // namespace npu_rec
