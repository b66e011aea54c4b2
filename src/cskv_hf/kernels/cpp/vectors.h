// Vectors of floats and what is computed with them, in the compiler's own notation.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace cskv {

constexpr int64_t WIDE = 32;  // columns of a product that are summed in registers; every buffer has rows of so many
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 8;  // 16 of 32 registers hold sums
#else
constexpr int64_t LANES = 8, ROWS = 2;  // 8 of 16
#endif
constexpr int64_t VECTORS = WIDE / LANES;
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline Vector& at(float* p) { return *(Vector*)p; }
inline const Vector& at(const float* p) { return *(const Vector*)p; }
inline const Ints& at(const int32_t* p) { return *(const Ints*)p; }

template <int DISTANCE>
inline Vector swapped(const Vector& v) {  // lanes that lie so far apart
  Ints other;
  for (int lane = 0; lane < LANES; ++lane) other[lane] = lane ^ DISTANCE;
  return __builtin_shuffle(v, other);
}

inline float sum(Vector v) {
  if constexpr (LANES == 16) v += swapped<8>(v);
  v += swapped<4>(v), v += swapped<2>(v), v += swapped<1>(v);
  return v[0];
}

inline Vector larger(const Vector& a, const Vector& b) { return a > b ? a : b; }

inline float largest(Vector v) {
  if constexpr (LANES == 16) v = larger(v, swapped<8>(v));
  v = larger(v, swapped<4>(v)), v = larger(v, swapped<2>(v)), v = larger(v, swapped<1>(v));
  return v[0];
}

// e^x to two units of the last place, for x <= 0: 0 below the smallest normal number, NaN of NaN.
inline Vector exponential(const Vector& x) {
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // to the nearest, of x <= 0
  const Vector powers = __builtin_convertvector(n, Vector), r = x - powers * 0.693359375f - powers * -2.12194440e-4f;
  Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;  // of Cephes' expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vector result = (p * r * r + r + 1.0f) * (Vector)((n + 127) << 23);
  return x < -87.0f ? Vector{} : result;
}

// cos and sin to two units of the last place of 1, for x from -10^6 to 10^6.
inline void cos_sin(const Vector& x, Vector& cos, Vector& sin) {
#if !defined(__FMA__) && !defined(__aarch64__)  // what follows needs products that are not rounded
  for (int64_t lane = 0; lane < LANES; ++lane) cos[lane] = std::cos(x[lane]), sin[lane] = std::sin(x[lane]);
  return;
#endif
  const Ints n = __builtin_convertvector(x * 0.636619772f + (x < 0 ? Vector{} - 0.5f : Vector{} + 0.5f), Ints);
  const Vector turns = __builtin_convertvector(n, Vector);  // quarter turns, to the nearest
  const Vector r = x - turns * 1.57079637f - turns * -4.37113883e-8f;  // exact, then a correction: with FMA
  const Vector z = r * r;
  const Vector odd = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;  // of Cephes
  const Vector even = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
                      0.5f * z + 1.0f;
  const Ints swapped = (n & 1) != 0, negative_sin = (n & 2) << 30, negative_cos = ((n + 1) & 2) << 30;
  cos = (Vector)((Ints)(swapped ? odd : even) ^ negative_cos);
  sin = (Vector)((Ints)(swapped ? even : odd) ^ negative_sin);
}

// out += a b for N rows of a (N, depth) and WIDE columns of b (depth, WIDE).
template <int N>
inline void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* out,
                     int64_t out_row) {
  Vector sums[N][VECTORS];
  for (int64_t i = 0; i < N; ++i)
    for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] = at(out + i * out_row + v * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) right[v] = at(b + k * b_row + v * LANES);
    for (int64_t i = 0; i < N; ++i)
      for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] += a[i * a_row + k] * right[v];
  }
  for (int64_t i = 0; i < N; ++i)
    for (int64_t v = 0; v < VECTORS; ++v) at(out + i * out_row + v * LANES) = sums[i][v];
}

// The same for any number of rows.
inline void multiply_rows(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                          float* out, int64_t out_row) {
  for (int64_t i = 0, count; i < rows; i += count) {
    count = rows - i >= ROWS ? ROWS : rows - i >= 4 ? 4 : 1;
    (count == ROWS ? multiply<ROWS> : count == 4 ? multiply<4> : multiply<1>)(a + i * a_row, a_row, b, b_row, depth,
                                                                              out + i * out_row, out_row);
  }
}

// Step of a transposition: of pairs of rows and of columns that lie SIZE apart, the squares off the diagonal change
// places.
template <int SIZE>
inline void exchange(Vector* rows) {
  Ints low, high;
  for (int lane = 0; lane < LANES; ++lane) {
    low[lane] = lane & SIZE ? LANES + lane - SIZE : lane;
    high[lane] = lane & SIZE ? LANES + lane : lane + SIZE;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & SIZE)) {
      const Vector a = rows[i], b = rows[i + SIZE];
      rows[i] = __builtin_shuffle(a, b, low), rows[i + SIZE] = __builtin_shuffle(a, b, high);
    }
}

// A square of LANES rows and columns.
inline void transpose_square(const float* from, int64_t from_row, float* to, int64_t to_row) {
  Vector square[LANES];
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r, from += from_row) square[r] = at(from);
  exchange<1>(square), exchange<2>(square), exchange<4>(square);
  if constexpr (LANES == 16) exchange<8>(square);
#pragma GCC unroll 16
  for (int c = 0; c < LANES; ++c, to += to_row) at(to) = square[c];
}

// from (rows, from_row) -> to (columns, to_row). The last squares of a row or column overlap.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  if (rows < LANES || columns < LANES) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
    return;
  }
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) {
      const int64_t r = std::min(i, rows - LANES), c = std::min(j, columns - LANES);
      transpose_square(from + r * from_row + c, from_row, to + c * to_row + r, to_row);
    }
}

}  // namespace cskv
