// Feature maps: softmax of x W + b, and of its negative where they are paired. Rows are columns of W, columns are tokens.
#pragma once
#include "call.h"

// Replaces u [P, tokens] by features [P or 2P, tokens] (f may begin at u); features below eps are raised to it.
static void softmax_features(const float *u, float *f, Int columns, bool paired, Int tokens, Int stride, float eps) {
  for (Int i = 0; i < whole(tokens); i += LANES) {
    Vec top = load(u + i), low = top, sum = {}, sum_low = {};
    for (Int p = 1; p < columns; ++p) {
      Vec x = load(u + p * stride + i);
      top = larger(x, top);
      low = x < low ? x : low;
    }
    float *second = f + columns * stride;
    for (Int p = 0; p < columns; ++p) {
      Vec x = load(u + p * stride + i), e = exp_negative(x - top);
      sum += e;
      store(f + p * stride + i, e);
      if (!paired) continue;
      Vec e_low = exp_negative(low - x);
      sum_low += e_low;
      store(second + p * stride + i, e_low);
    }
    for (Int half = 0; half < (paired ? 2 : 1); ++half) {
      Vec over = 1.0f / (half ? sum_low : sum), least = splat(eps);
      float *g = (half ? second : f) + i;
      for (Int p = 0; p < columns; ++p) store(g + p * stride, larger(load(g + p * stride) * over, least));
    }
  }
}

// What is still missing in the gradients of features: z [F] times a number for each token (null: 1).
struct Rest {
  const float *z, *times;

  // Adds it to rows `first` to `last` of df, and returns the sum of f df over them.
  Vec complete(const float *f, float *df, Int first, Int last, Int stride, Int i) const {
    Vec dot = {}, by = times ? load(times + i) : splat(1.0f);
    for (Int p = first; p < last; ++p) {
      Vec x = load(df + p * stride + i) + z[p] * by;
      store(df + p * stride + i, x);
      dot += load(f + p * stride + i) * x;
    }
    return dot;
  }
};

// Replaces the first P rows of df, once it is complete, by the gradients of u; `pull` (if not null) gets each token's sum
// of f df.
static void softmax_gradients(const float *f, float *df, Rest rest, float *pull, Int columns, bool paired, Int tokens,
                              Int stride) {
  const float *second = f + columns * stride;
  float *dsecond = df + columns * stride;
  for (Int i = 0; i < whole(tokens); i += LANES) {
    Vec dot = rest.complete(f, df, 0, columns, stride, i), dot_low = {};
    if (paired) dot_low = rest.complete(f, df, columns, 2 * columns, stride, i);
    if (pull) store(pull + i, dot + dot_low);
    for (Int p = 0; p < columns; ++p) {
      Int at = p * stride + i;
      Vec du = load(f + at) * (load(df + at) - dot);
      if (paired) du -= load(second + at) * (load(dsecond + at) - dot_low);
      store(df + at, du);
    }
  }
}

// Multiplies the features [F, tokens] of keys by what is left of each after the last: its input gate and the forget gates
// of those after it, given as logarithms. Returns what is left of the sums before them. `weights` is [tokens], for use here.
static float weigh_keys(const float *log_forget, const float *log_input, float *f, Int features, Int tokens, Int stride,
                        float *weights) {
  float after = 0;
  for (Int i = tokens - 1; i >= 0; after += log_forget[i--]) weights[i] = expf(log_input[i] + after);
  for (Int r = 0; r < features; ++r)
    for (Int i = 0; i < tokens; ++i) f[r * stride + i] *= weights[i];
  return expf(after);
}

// One head of a map, with the gradients it collects (transposed).
struct HeadMap {
  const float *weight, *bias;  // [D, P], [P] or null
  float *dweight, *dbias;      // [P, stride], [P]; null for none
  const float *turned;         // W transposed [P, stride]; null where dx is not needed
  Int dim, columns, stride;    // stride: of rows of D
  bool paired;
  float eps;

  // f [F, tokens] of x, given as xt [D, tokens].
  void features(const float *xt, float *f, Int tokens, Int lane_stride) const {
    if (bias)
      for (Int p = 0; p < columns; ++p)
        for (Int i = 0; i < whole(tokens); ++i) f[p * lane_stride + i] = bias[p];
    product<ALL>({weight, 1, columns}, xt, lane_stride, f, lane_stride, columns, tokens, dim, bias != nullptr);
    softmax_features(f, f, columns, paired, tokens, lane_stride, eps);
  }

  // Adds to the gradients from df [F, tokens] and the rest of it, which are overwritten (the first P rows with the
  // gradients of u); x is [tokens, D].
  void backward(const float *f, float *df, Rest rest, float *pull, const float *x, Int tokens, Int lane_stride) const {
    softmax_gradients(f, df, rest, pull, columns, paired, tokens, lane_stride);
    if (dweight) product<ALL>({df, lane_stride, 1}, x, stride, dweight, stride, columns, dim, tokens, true);
    if (dbias)
      for (Int p = 0; p < columns; ++p)
        for (Int i = 0; i < tokens; ++i) dbias[p] += df[p * lane_stride + i];
  }

  // dx [tokens, D] (+)= du W^T, with du from `backward`.
  void inputs(const float *du, float *dx, Int tokens, Int lane_stride, bool add) const {
    product<ALL>({du, 1, lane_stride}, turned, stride, dx, stride, tokens, dim, columns, add);
  }
};
