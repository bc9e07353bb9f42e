// Vectors of floats as wide as the processor's registers, in GCC's portable notation, and what is computed lane by lane.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef int64_t Int;

#if defined(__AVX512F__)
constexpr Int LANES = 16;
#elif defined(__AVX__)
constexpr Int LANES = 8;
#else
constexpr Int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t Mask __attribute__((vector_size(LANES * 4), may_alias));
typedef float LooseVec __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef float Four __attribute__((vector_size(16), may_alias, aligned(4)));

static inline Vec load(const float *p) { return *(const LooseVec *)p; }
static inline void store(float *p, Vec x) { *(LooseVec *)p = x; }
static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The number of each lane, counted from `first`.
static inline Mask lanes(Int first) {
  Mask m;
  for (Int i = 0; i < LANES; ++i) m[i] = (int32_t)(first + i);
  return m;
}

static inline float total(Vec x) {
  float s = 0;
  for (Int i = 0; i < LANES; ++i) s += x[i];
  return s;
}

// The sum of x [count], or of the products x y.
static inline float summed(const float *x, const float *y, Int count) {
  Vec t = {};
  Int i = 0;
  for (; i + LANES <= count; i += LANES) t += y ? load(x + i) * load(y + i) : load(x + i);
  float found = total(t);
  for (; i < count; ++i) found += y ? x[i] * y[i] : x[i];
  return found;
}

// The sums of the lanes of four vectors.
static inline Four totals(Vec a, Vec b, Vec c, Vec d) {
  const Vec given[4] = {a, b, c, d};
  Four x[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = ((const Four *)&given[i])[0];
    for (Int j = 1; j < LANES / 4; ++j) x[i] += ((const Four *)&given[i])[j];
  }
  const Four y = __builtin_shufflevector(x[0], x[1], 0, 4, 2, 6) + __builtin_shufflevector(x[0], x[1], 1, 5, 3, 7);
  const Four z = __builtin_shufflevector(x[2], x[3], 0, 4, 2, 6) + __builtin_shufflevector(x[2], x[3], 1, 5, 3, 7);
  return __builtin_shufflevector(y, z, 0, 1, 4, 5) + __builtin_shufflevector(y, z, 2, 3, 6, 7);
}

// found [count]: the products of x [width] with rows of y.
static inline void products_with(const float *x, const float *y, Int stride, Int width, Int count, float *found) {
  Int r = 0;
  for (; r + 4 <= count; r += 4, y += 4 * stride) {
    Vec a = {}, b = {}, c = {}, d = {};
    Int i = 0;
    for (; i + LANES <= width; i += LANES) {
      const Vec part = load(x + i);
      a += part * load(y + i), b += part * load(y + stride + i);
      c += part * load(y + 2 * stride + i), d += part * load(y + 3 * stride + i);
    }
    *(Four *)(found + r) = totals(a, b, c, d);
    for (; i < width; ++i)
      for (Int row = 0; row < 4; ++row) found[r + row] += x[i] * y[row * stride + i];
  }
  for (; r < count; ++r, y += stride) found[r] = summed(x, y, width);
}

// exp(x) for x <= 0, relative error below 2e-7; the smallest result is exp(-87). NaN stays NaN.
static inline Vec exp_negative(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  const float magic = 12582912.0f;  // adding it rounds to an integer, in the low bits
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (Vec)((Mask)p + ((Mask)shifted << 23));
}

static inline Vec hyperbolic_tangent(Vec x) {
  Vec size = x < 0.0f ? -x : x;
  Vec t = exp_negative(size * -2.0f);
  Vec y = (1.0f - t) / (1.0f + t);
  return x < 0.0f ? -y : y;
}

// out [columns, rows] = in [rows, columns] transposed, in squares of four.
static void transpose(const float *in, Int in_stride, float *out, Int out_stride, Int rows, Int columns) {
  Int r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float *a = in + r * in_stride;
    Int c = 0;
    for (; c + 4 <= columns; c += 4, a += 4) {
      Four x0 = *(const Four *)a, x1 = *(const Four *)(a + in_stride);
      Four x2 = *(const Four *)(a + 2 * in_stride), x3 = *(const Four *)(a + 3 * in_stride);
      Four y0 = __builtin_shufflevector(x0, x1, 0, 4, 1, 5), y1 = __builtin_shufflevector(x0, x1, 2, 6, 3, 7);
      Four y2 = __builtin_shufflevector(x2, x3, 0, 4, 1, 5), y3 = __builtin_shufflevector(x2, x3, 2, 6, 3, 7);
      float *o = out + c * out_stride + r;
      *(Four *)o = __builtin_shufflevector(y0, y2, 0, 1, 4, 5);
      *(Four *)(o + out_stride) = __builtin_shufflevector(y0, y2, 2, 3, 6, 7);
      *(Four *)(o + 2 * out_stride) = __builtin_shufflevector(y1, y3, 0, 1, 4, 5);
      *(Four *)(o + 3 * out_stride) = __builtin_shufflevector(y1, y3, 2, 3, 6, 7);
    }
    for (; c < columns; ++c, ++a)
      for (Int i = 0; i < 4; ++i) out[c * out_stride + r + i] = a[i * in_stride];
  }
  for (; r < rows; ++r)
    for (Int c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}
