// Small matrix products out of registers: C [M, N] (+)= A [M, K] B [K, N].
// A is read element by element with any two strides, so it may be a transposed view. Rows of B and C are
// contiguous and N is a multiple of VL: the caller pads columns.
#pragma once
#include "vec.h"

namespace npu_rec::NPU_REC_ISA {

// Rows of C held in registers, two vectors a row; leaves room for B and a broadcast of A.
constexpr int ROWS = VL == 16 ? 14 : 6;

template <int M, int NV>
inline void micro(
    int K, const float* A, int64_t row, int64_t column, const float* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  vf acc[M][NV];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) acc[m][j] = add ? load(C + m * ldc + j * VL) : vf{};
  for (int k = 0; k < K; ++k) {
    vf b[NV];
    for (int j = 0; j < NV; ++j) b[j] = load(B + k * ldb + j * VL);
    for (int m = 0; m < M; ++m) {
      const float a = A[m * row + k * column];
      for (int j = 0; j < NV; ++j) acc[m][j] += a * b[j];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < NV; ++j) store(C + m * ldc + j * VL, acc[m][j]);
}

template <int M>
inline void rows(
    int N, int K, const float* A, int64_t row, int64_t column, const float* B, int64_t ldb, float* C, int64_t ldc,
    bool add) {
  int n = 0;
  for (; n + 2 * VL <= N; n += 2 * VL) micro<M, 2>(K, A, row, column, B + n, ldb, C + n, ldc, add);
  if (n < N) micro<M, 1>(K, A, row, column, B + n, ldb, C + n, ldc, add);
}

template <int M>
void last_rows(
    int left, int N, int K, const float* A, int64_t row, int64_t column, const float* B, int64_t ldb, float* C,
    int64_t ldc, bool add) {
  if (left == M) {
    rows<M>(N, K, A, row, column, B, ldb, C, ldc, add);
  } else if constexpr (M > 1) {
    last_rows<M - 1>(left, N, K, A, row, column, B, ldb, C, ldc, add);
  }
}

inline void gemm(
    int M, int N, int K, const float* A, int64_t row, int64_t column, const float* B, int64_t ldb, float* C,
    int64_t ldc, bool add) {
  int m = 0;
  for (; m + ROWS <= M; m += ROWS) rows<ROWS>(N, K, A + m * row, row, column, B, ldb, C + m * ldc, ldc, add);
  last_rows<ROWS>(M - m, N, K, A + m * row, row, column, B, ldb, C + m * ldc, ldc, add);
}

}  // namespace npu_rec::NPU_REC_ISA
