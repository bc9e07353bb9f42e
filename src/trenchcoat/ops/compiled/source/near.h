// The softmax window: weights of the near keys and their gradients. Rows are keys, [sinks | chunk before | own chunk], and
// columns queries, so that the queries of a chunk lie side by side in a vector.
#pragma once
#include "products.h"

// Lanes from .. upto - 1 of a row of weights.
struct Range {
  Int from, upto;
  bool none(Int i) const { return i + LANES <= from || i >= upto; }
  bool all(Int i) const { return i >= from && i + LANES <= upto; }
  Mask of(Int i) const {
    const Mask lane = lanes(i);
    return (lane >= (int32_t)from) & (lane < (int32_t)upto);
  }
};

struct Near {
  Int window, lead, count, stride;  // count: tokens in the chunk; stride: of a row of weights
  Int sinks, first_seen;            // the first query that sees sink 0, where they slide
  bool slides;
  float scale, softcap, ratio;
  const float *logit;  // of this head, or null

  Int keys() const { return lead + count; }

  // The queries that see key j.
  Range seen(Int j) const {
    if (j >= lead) return {j - lead, whole(window)};
    if (!slides) return {0, whole(window)};
    if (j < sinks) return {first_seen + j, whole(window)};
    return {0, j - sinks};
  }
};

static void cap_scores(const Near &n, float *s, float *capped) {
  for (Int j = 0; j < n.keys(); ++j)
    for (Int i = 0; i < whole(n.window); i += LANES) {
      if (n.seen(j).none(i)) continue;
      Vec x = n.softcap * hyperbolic_tangent(load(s + j * n.stride + i) * (n.scale / n.softcap));
      store(s + j * n.stride + i, x);
      if (capped) store(capped + j * n.stride + i, x);
    }
}

// The rows of vector i: `every` for keys that all its queries see, `some` with a mask, `none`.
template <class Every, class Some, class None>
static inline __attribute__((always_inline)) void for_rows(const Near &n, Int i, Every every, Some some, None none) {
  Int j = 0;
  if (!n.slides)
    for (; j < n.lead; ++j) every(j);
  for (; j < n.keys(); ++j) {
    const Range seen = n.seen(j);
    if (seen.none(i)) {
      none(j);
    } else if (seen.all(i)) {
      every(j);
    } else {
      some(j, seen.of(i));
    }
  }
}

// Replaces scores s by weights r exp(s - max), zero where a query does not see the key. Adds up the weights of each query
// in `sum`, with the sink's, which go to `sink` (if there is a logit).
static void near_weights(const Near &n, float *s, float *sum, float *sink) {
  const float scale = n.softcap ? 1.0f : n.scale;
  for (Int i = 0; i < whole(n.window); i += LANES) {
    Vec top = splat(-FLT_MAX), added = {}, below = {};
    auto at = [&](Int j) { return s + j * n.stride + i; };
    for_rows(n, i, [&](Int j) { top = larger(load(at(j)), top); },
             [&](Int j, Mask seen) { top = larger(seen ? load(at(j)) : splat(-FLT_MAX), top); }, [](Int) {});
    if (n.logit) {
      Vec all = larger(top * scale, splat(*n.logit));
      below = top * scale - all;
      Vec w = exp_negative(*n.logit - all) * n.ratio;
      store(sink + i, w);
      added = w;
    }
    auto weigh = [&](Int j) { return exp_negative((load(at(j)) - top) * scale + below) * n.ratio; };
    auto put = [&](Int j, Vec w) {
      store(at(j), w);
      added += w;
    };
    for_rows(n, i, [&](Int j) { put(j, weigh(j)); },
             [&](Int j, Mask seen) { put(j, seen ? weigh(j) : splat(0.0f)); }, [&](Int j) { store(at(j), Vec{}); });
    store(sum + i, added);
  }
}

// Replaces the gradients of the weights, but for `dden`, by those of the scores q . k, where w are the weights: w dw, and
// `pull` at the largest score. Returns the gradient of the sink's logit.
static float score_gradients(const Near &n, const float *w, float *dw, const float *dden, const float *pull,
                             const float *sink, const float *capped) {
  Vec dlogit = {};
  for (Int i = 0; i < whole(n.window); i += LANES) {
    Vec top = {}, bias = load(dden + i), left = load(pull + i);
    for (Int j = 0; j < n.keys(); ++j) top = larger(load(w + j * n.stride + i), top);
    if (n.logit) {
      Vec ws = load(sink + i);
      dlogit += ws * bias + (ws > top ? left : splat(0.0f));
      left = ws > top ? splat(0.0f) : left;
    }
    auto gradient = [&](Int j) {
      const Int at = j * n.stride + i;
      Vec x = load(w + at), d = x * (load(dw + at) + bias);
      Mask here = x == top;
      d += here ? left : splat(0.0f);
      left = here ? splat(0.0f) : left;
      if (n.softcap) {
        Vec bent = load(capped + at) * (1.0f / n.softcap);
        d *= 1.0f - bent * bent;
      }
      return d * n.scale;
    };
    auto put = [&](Int j, Vec d) { store(dw + j * n.stride + i, d); };
    for_rows(n, i, [&](Int j) { put(j, gradient(j)); },
             [&](Int j, Mask seen) { put(j, seen ? gradient(j) : splat(0.0f)); }, [&](Int j) { put(j, Vec{}); });
  }
  return total(dlogit);
}

// Weights phi(q) . phi(k) of keys that are far for the queries from their own place on: zero for those before; and their
// sums, added to `sum` (if not null). `bias` (if not null) is added first.
static void keep_later_queries(float *x, Int keys, Int window, Int stride, const float *bias, float *sum) {
  for (Int i = 0; i < whole(window); i += LANES) {
    Vec added = {};
    for (Int j = 0; j < keys; ++j) {
      const Range seen = {j, whole(window)};
      Vec w = {};
      if (!seen.none(i)) {
        w = load(x + j * stride + i);
        if (bias) w += load(bias + i);
        if (!seen.all(i)) w = seen.of(i) ? w : splat(0.0f);
      }
      store(x + j * stride + i, w);
      added += w;
    }
    if (sum) store(sum + i, load(sum + i) + added);
  }
}
