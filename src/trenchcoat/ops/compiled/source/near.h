// The softmax window: weights of the near keys and their gradients. Rows are keys and columns queries, so that the queries
// of a chunk lie side by side in a vector. `lead` keys come before the chunk; its own key i is row lead + i and is seen by
// the queries from i on.
#pragma once
#include "products.h"

struct Near {
  Int window, lead, count, stride;  // count: tokens in the chunk; stride: of a row of weights
  float scale, softcap, ratio;
  const float *logit;  // of this head, or null
};

// The vectors of own key i: those before `first` have no query that sees it.
static inline Int first_vector(Int own) { return own / LANES * LANES; }

static void cap_scores(const Near &n, float *s, float *capped) {
  for (Int j = 0; j < n.lead + n.count; ++j)
    for (Int i = j < n.lead ? 0 : first_vector(j - n.lead); i < whole(n.window); i += LANES) {
      Vec x = n.softcap * hyperbolic_tangent(load(s + j * n.stride + i) * (n.scale / n.softcap));
      store(s + j * n.stride + i, x);
      if (capped) store(capped + j * n.stride + i, x);
    }
}

// Replaces scores s by weights r exp(s - max), zero where a query does not see the key. Adds up the weights of each query
// in `sum`, with the sink's, which go to `sink` (if there is a logit).
static void near_weights(const Near &n, float *s, float *sum, float *sink) {
  const float scale = n.softcap ? 1.0f : n.scale;
  for (Int i = 0; i < whole(n.window); i += LANES) {
    Vec top = splat(-FLT_MAX), added = {}, below = {};
    for (Int j = 0; j < n.lead; ++j) top = larger(load(s + j * n.stride + i), top);
    const Mask lane = lanes(i);
    const Int seen = n.count < i + LANES ? n.count : i + LANES;
    const Int sure = seen < i + 1 ? seen : i + 1;  // keys that every query of the vector sees
    float *own = s + n.lead * n.stride + i;
    for (Int j = 0; j < sure; ++j) top = larger(load(own + j * n.stride), top);
    for (Int j = sure; j < seen; ++j) top = larger(lane >= (int32_t)j ? load(own + j * n.stride) : splat(-FLT_MAX), top);
    if (n.logit) {
      Vec all = larger(top * scale, splat(*n.logit));
      below = top * scale - all;
      Vec w = exp_negative(*n.logit - all) * n.ratio;
      store(sink + i, w);
      added = w;
    }
    for (Int j = 0; j < n.lead + seen; ++j) {
      float *p = s + j * n.stride + i;
      Vec w = exp_negative((load(p) - top) * scale + below) * n.ratio;
      if (j >= n.lead + sure) w = lane >= (int32_t)(j - n.lead) ? w : splat(0.0f);
      store(p, w);
      added += w;
    }
    for (Int j = seen; j < n.count; ++j) store(own + j * n.stride, Vec{});
    store(sum + i, added);
  }
}

// Replaces the gradients of the weights, but for `dden`, by those of the scores q . k, where w are the weights: w dw, and
// `pull` at the largest score. Returns the gradient of the sink's logit.
static float score_gradients(const Near &n, const float *w, float *dw, const float *dden, const float *pull,
                             const float *sink, const float *capped) {
  Vec dlogit = {};
  for (Int i = 0; i < whole(n.window); i += LANES) {
    const Mask lane = lanes(i);
    const Int seen = n.count < i + LANES ? n.count : i + LANES;
    Vec top = {}, bias = load(dden + i), left = load(pull + i);
    for (Int j = 0; j < n.lead + seen; ++j) top = larger(load(w + j * n.stride + i), top);
    if (n.logit) {
      Vec ws = load(sink + i);
      dlogit += ws * bias + (ws > top ? left : splat(0.0f));
      left = ws > top ? splat(0.0f) : left;
    }
    for (Int j = 0; j < n.lead + seen; ++j) {
      Int at = j * n.stride + i;
      Vec x = load(w + at), d = x * (load(dw + at) + bias);
      Mask here = x == top;
      d += here ? left : splat(0.0f);
      left = here ? splat(0.0f) : left;
      if (n.softcap) {
        Vec bent = load(capped + at) * (1.0f / n.softcap);
        d *= 1.0f - bent * bent;
      }
      d *= n.scale;
      if (j > n.lead + i) d = lane >= (int32_t)(j - n.lead) ? d : splat(0.0f);
      store(dw + at, d);
    }
    for (Int j = seen; j < n.count; ++j) store(dw + (n.lead + j) * n.stride + i, Vec{});
  }
  return total(dlogit);
}
