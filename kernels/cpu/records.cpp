// Records of one size in a file, record n at n times that size, read and written at scattered places by all threads.
#include <ATen/Parallel.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

#include "ops.h"

namespace npu_rec {
namespace {

constexpr int64_t RECORDS_FOR_A_THREAD = 256;

struct Failure { int64_t number; int error; };  // error: errno, or 0 for the end of the file

struct Records {
  int file;
  int64_t bytes;
  const int64_t *numbers, *order;
  char* memory;

  int64_t number(int64_t i) const { return numbers[order[i]]; }
  char* data(int64_t i) const { return memory + order[i] * bytes; }
  off_t place(int64_t i) const { return number(i) * bytes; }
};

// All the bytes of record i, in as many steps as `transfer(data, bytes, place)` takes.
template <typename Transfer>
void whole(const Records& r, int64_t i, const Transfer& transfer) {
  for (int64_t done = 0; done < r.bytes;) {
    const ssize_t step = transfer(r.data(i) + done, r.bytes - done, r.place(i) + done);
    if (step < 0 && errno == EINTR) continue;
    if (step <= 0) throw Failure{r.number(i), step < 0 ? errno : 0};
    done += step;
  }
}

// Asks the system to begin reading from the disk; many requests under way are what makes a disk quick.
void ask_for(const Records& r, int64_t i) {
#ifdef POSIX_FADV_WILLNEED
  posix_fadvise(r.file, r.place(i), r.bytes, POSIX_FADV_WILLNEED);
#endif
}

// Whether all of record i was in the system's cache, and has been read.
bool read_from_cache(const Records& r, int64_t i) {
#ifdef RWF_NOWAIT
  const iovec to{r.data(i), size_t(r.bytes)};
  return preadv2(r.file, &to, 1, r.place(i), RWF_NOWAIT) == r.bytes;
#else
  return false;
#endif
}

// What is not in the cache is asked for, all of it, before the first wait.
void read_piece(const Records& r, int64_t begin, int64_t end) {
  std::vector<int64_t> missing;
  for (int64_t i = begin; i < end; ++i) {
    if (read_from_cache(r, i)) continue;
    ask_for(r, i);
    missing.push_back(i);
  }
  for (int64_t i : missing)
    whole(r, i, [&](char* to, size_t bytes, off_t place) { return pread(r.file, to, bytes, place); });
}

// A page that is written in part is read first.
void write_piece(const Records& r, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) ask_for(r, i);
  for (int64_t i = begin; i < end; ++i)
    whole(r, i, [&](char* from, size_t bytes, off_t place) { return pwrite(r.file, from, bytes, place); });
}

template <typename Piece>
std::optional<std::pair<int64_t, int64_t>> in_pieces(
    int64_t file, const Tensor& numbers, const Tensor& order, const Tensor& records, const Piece& piece) {
  const Records r{int(file), records.size(1) * int64_t(records.element_size()), numbers.const_data_ptr<int64_t>(),
                  order.const_data_ptr<int64_t>(), static_cast<char*>(records.mutable_data_ptr())};
  try {
    at::parallel_for(
        0, numbers.numel(), RECORDS_FOR_A_THREAD, [&](int64_t begin, int64_t end) { piece(r, begin, end); });
  } catch (const Failure& failure) {
    return std::pair<int64_t, int64_t>(failure.number, failure.error);
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::pair<int64_t, int64_t>> records_read(
    int64_t file, const Tensor& numbers, const Tensor& order, const Tensor& records) {
  return in_pieces(file, numbers, order, records, read_piece);
}

std::optional<std::pair<int64_t, int64_t>> records_write(
    int64_t file, const Tensor& numbers, const Tensor& order, const Tensor& records) {
  return in_pieces(file, numbers, order, records, write_piece);
}

}  // namespace npu_rec
