// A map from 64-bit keys to slots 0, 1, 2, ...; npu_rec/embedding/key_map.py says what it promises.
#pragma once
#include <ATen/Tensor.h>

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <tuple>
#include <vector>

namespace npu_rec {

// Memory for large arrays, in huge pages where the system has them: at random places the search for the page costs as
// much as the read.
template <typename T>
struct HugePages {
  using value_type = T;
  static constexpr size_t HUGE_PAGE = size_t(1) << 21;

  T* allocate(size_t count) {
    const size_t bytes = count * sizeof(T);
    void* memory = ::operator new(bytes, alignment(bytes));
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: a refusal does not matter
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t count) { ::operator delete(memory, alignment(count * sizeof(T))); }
  bool operator==(const HugePages&) const { return true; }

 private:
  static std::align_val_t alignment(size_t bytes) { return std::align_val_t{bytes >= HUGE_PAGE ? HUGE_PAGE : 64}; }
};

// Open addressing with linear probing: an entry stands in the first place from its home that was free. The home is
// the top bits of the key's hash, so that a larger array has the entries in nearly the same order, and growing reads
// and writes memory from one end to the other.
class KeyMap {
 public:
  KeyMap();

  // Keys and slots are [U] int64.
  at::Tensor find(const at::Tensor& keys) const;
  at::Tensor insert(const at::Tensor& keys);
  at::Tensor erase(const at::Tensor& keys);
  std::tuple<at::Tensor, at::Tensor> items() const;

  int64_t entries() const { return count; }
  int64_t slot_limit() const { return limit; }
  double load_factor() const { return double(count) / double(places.size()); }
  int64_t memory_bytes() const { return places.capacity() * sizeof(Place) + freed.capacity() * sizeof(int64_t); }

 private:
  struct Place { int64_t key, slot; };  // slot -1: free
  using Places = std::vector<Place, HugePages<Place>>;

  Places places;               // 2^(64 - shift) of them
  std::vector<int64_t> freed;  // slots to be given again, from the back
  int64_t count, limit;
  int shift;

  size_t home(int64_t key) const;
  size_t next(size_t at) const { return (at + 1) & (places.size() - 1); }
  size_t place_of(int64_t key) const;  // where it stands, or the free place where it would
  void ask_for(const int64_t* keys, int64_t i, int64_t end) const;
  void free_place(size_t at);
  void grow_for(int64_t entries);
};

}  // namespace npu_rec
