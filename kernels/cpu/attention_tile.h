// What attention of every kind has in common: one head of one sequence in tiles of BLOCK x BLOCK scores, which tiles a
// mask leaves, their bias, and packed copies of the inputs for gemm.h.
//
// A tile of queries holds those of one block of the sequence, so the first one may be short. With plain causal ids, the
// position bias of a tile row is a contiguous piece of the table, and, times being sorted, its time bias is a few
// constant runs whose ends are found in the key times by binary search. Anything else (targets, context, windows, no
// causality, unsorted times) takes the general path: mask and bias element by element.
#pragma once
#include "gemm.h"
#include "kernels.h"
#include "rows.h"

namespace npu_rec::NPU_REC_ISA {

constexpr int BLOCK = 64;

inline int padded(int n) { return (n + VL - 1) / VL * VL; }
inline int smaller(int a, int b) { return a < b ? a : b; }

inline int bucket_of(const int64_t* edges, int64_t seconds, int hint) {
  while (seconds >= edges[hint + 1]) ++hint;
  while (seconds < edges[hint]) --hint;
  return hint;
}

// A piece of a row with one bucket: columns [previous end, end).
struct Run {
  int end, bucket;
};

inline int block_end(const HeadTask& t, int row) { return smaller(row / BLOCK * BLOCK + BLOCK, t.n); }

// The state of one tile: queries of the tokens r0.. to the end of their block against the block of keys from c0 on.
struct Tile {
  const HeadTask& t;
  int r0, c0, rows, columns, width;  // width: columns padded to a multiple of VL
  bool plain;
  float bias[BLOCK][BLOCK];
  float keep[BLOCK][BLOCK];  // general path alone: 1 where allowed
  Run runs[BLOCK][BLOCK];
  int run_count[BLOCK];

  Tile(const HeadTask& task, int r, int c)
      : t(task), r0(r), c0(c), rows(block_end(task, r) - r), columns(smaller(BLOCK, task.n - c)),
        width(padded(columns)), plain(is_plain(task)) {}

  static bool is_plain(const HeadTask& t) {
    return !t.ids && t.mask.causal && t.mask.max_attn_len == 0 && (!t.time || t.sorted);
  }

  int64_t query_time(int row) const { return t.query_time[row - t.first]; }

  // Columns of row r that a plain causal mask leaves.
  int seen(int r) const { return smaller(r0 + r + 1 - c0, columns); }

  void prepare() {
    if (!plain) {
      general();
    } else if (t.time) {
      int hint = 0;
      for (int r = 0; r < rows; ++r) hint = time_runs(r, hint);
    }
  }

  // Splits row r into runs of one bucket and returns the bucket of the first column, the next row's hint.
  int time_runs(int r, int hint) {
    const int64_t query = query_time(r0 + r);
    const int64_t* keys = t.key_time + c0;
    const int stop = seen(r);
    int count = 0, c = 0, first = hint, bucket = hint;
    while (c < stop) {
      bucket = bucket_of(t.edges, query - keys[c], bucket);
      if (count == 0) first = bucket;
      const int64_t newest = query - t.edges[bucket];  // keys up to this time are in the bucket
      int end = stop;
      if (keys[stop - 1] > newest) {
        int low = c, high = stop - 1;
        while (low + 1 < high) {
          const int middle = (low + high) / 2;
          if (keys[middle] <= newest) low = middle; else high = middle;
        }
        end = high;
      }
      for (int i = c; i < end; ++i) bias[r][i] = t.time[bucket];
      runs[r][count++] = {end, bucket};
      c = end;
    }
    for (; c < width; ++c) bias[r][c] = 0;
    run_count[r] = count;
    return first;
  }

  void general() {
    const Mask& m = t.mask;
    for (int r = 0; r < rows; ++r) {
      const int row = r0 + r;
      const int64_t id = t.ids ? t.ids[row] : row;
      int hint = 0;
      for (int c = 0; c < width; ++c) {
        const int column = c0 + c;
        if (c >= columns) {
          bias[r][c] = keep[r][c] = 0;
          continue;
        }
        const int64_t other = t.ids ? t.ids[column] : column, distance = id - other;
        bool allowed = row == column || (m.causal ? distance > 0 : distance != 0);
        if (m.max_attn_len > 0)
          allowed = allowed && (distance <= m.max_attn_len ||
                                (m.min_full_attn_seq_len > 0 && id >= t.limit - m.min_full_attn_seq_len));
        if (m.contextual_seq_len > 0) allowed = allowed || (id == 0 && other < t.limit);
        float value = 0;
        if (allowed) {
          if (t.position) value += t.position[-distance];
          if (t.time) {
            const int64_t delta = query_time(row) - t.key_time[column];
            hint = bucket_of(t.edges, delta < 0 ? -delta : delta, hint);
            value += t.time[hint];
          }
        }
        bias[r][c] = value;
        keep[r][c] = allowed;
      }
    }
  }

  // Scores of row r, columns c..c+VL, from q k^T.
  vf score(int r, int c, vf product) const {
    vf s = product * t.alpha;
    if (!plain) return s + load(&bias[r][c]);
    if (t.position) s += load(t.position + (c0 + c) - (r0 + r));
    if (t.time) s += load(&bias[r][c]);
    return s;
  }

  vf masked(int r, int c, vf x) const {
    if (!plain) return x * load(&keep[r][c]);
    const int last = r0 + r - c0;
    if (c + VL <= last + 1) return x;
    vi column;
    for (int i = 0; i < VL; ++i) column[i] = c + i;
    return select(column <= last, x, vf{});
  }

  // x, and `other` where the mask hides it.
  vf visible(int r, int c, vf x, vf other) const {
    if (!plain) return select(load(&keep[r][c]) > 0.0f, x, other);
    const int last = r0 + r - c0;
    return c + VL <= last + 1 ? x : select(LANES + c <= last, x, other);
  }

  void table_gradients(const float (*d_scores)[BLOCK]) const {
    if (!plain) return general_table_gradients(d_scores);
    for (int r = 0; r < rows; ++r) {
      if (t.d_position) {
        float* entries = t.d_position + c0 - (r0 + r);
        for (int c = 0; c < width; c += VL) store(entries + c, load(entries + c) + load(&d_scores[r][c]));
      }
      if (!t.d_time) continue;
      int c = 0;
      for (int i = 0; i < run_count[r]; ++i) {
        vf total{};
        float rest = 0;
        const int end = runs[r][i].end;
        for (; c + VL <= end; c += VL) total += load(&d_scores[r][c]);
        for (; c < end; ++c) rest += d_scores[r][c];
        t.d_time[runs[r][i].bucket] += sum(total) + rest;
      }
    }
  }

  void general_table_gradients(const float (*d_scores)[BLOCK]) const {
    for (int r = 0; r < rows; ++r) {
      const int row = r0 + r;
      int hint = 0;
      for (int c = 0; c < columns; ++c) {
        if (keep[r][c] == 0) continue;
        const int column = c0 + c;
        if (t.d_position) t.d_position[t.ids ? t.ids[column] - t.ids[row] : column - row] += d_scores[r][c];
        if (t.d_time) {
          const int64_t delta = query_time(row) - t.key_time[column];
          hint = bucket_of(t.edges, delta < 0 ? -delta : delta, hint);
          t.d_time[hint] += d_scores[r][c];
        }
      }
    }
  }
};

// Whether the mask leaves nothing of a tile whose first query is token r.
inline bool empty(const HeadTask& t, int r, int c) {
  const Mask& m = t.mask;
  if (m.causal && m.contextual_seq_len == 0 && c > r) return true;
  if (m.max_attn_len == 0 || m.min_full_attn_seq_len > 0 || m.contextual_seq_len > 0 || c + BLOCK > r) return false;
  const int last = c + BLOCK - 1;  // a full block: it ends before r
  return (t.ids ? t.ids[r] - t.ids[last] : r - last) > m.max_attn_len;
}

// `from [n, width]` with its stride -> `to [n, padded(width)]`, scaled.
inline void pack(const float* from, int64_t stride, int n, int width, float scale, float* to) {
  const int ld = padded(width);
  for (int i = 0; i < n; ++i) {
    for (int d = 0; d < width; ++d) to[i * ld + d] = from[i * stride + d] * scale;
    for (int d = width; d < ld; ++d) to[i * ld + d] = 0;
  }
}

// `from [n, width]` -> `to [width, padded(n)]`.
inline void pack_transposed(const float* from, int64_t stride, int n, int width, float* to) {
  const int64_t ld = padded(n);
  for (int i0 = 0; i0 < n; i0 += 16)
    for (int d = 0; d < width; ++d)
      for (int i = i0; i < smaller(i0 + 16, n); ++i) to[d * ld + i] = from[i * stride + d];
  for (int d = 0; d < width; ++d)
    for (int64_t i = n; i < ld; ++i) to[d * ld + i] = 0;
}

}  // namespace npu_rec::NPU_REC_ISA
