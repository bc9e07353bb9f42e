// Generation: a few tokens of each row against its state, which is updated in place (ops/state.py describes it).
#pragma once
#include "maps.h"

struct Step {
  Int rows, tokens, heads, kv_heads, key_maps, dim, values, features, columns, window, sinks;
  // Which are bfloat16: q, k, v (narrow), the buffers and sinks (narrow_slots), the far sums of F x E (narrow_sums).
  Int far, narrow, narrow_slots, narrow_sums, paired, affine, threads;
  Int parts;  // of a row's state, each with as many neighbouring groups and their key maps
  // Whether the far part forgets and has a denominator of its own, the width of the layer's input, and whether it is
  // bfloat16.
  Int gated, inputs, narrow_inputs;
  double scale, softcap, eps, cap;
  View q, k, v, y, x;  // y is float32; x, the layer's input, has no heads
  Map query, key;
  const float *mix, *logit;
  // The gated far part's: mix [H, 2 D + E] (`mix` is its bias), gates of keys [K, inputs] and [K].
  const float *mix_weight, *forget_weight, *forget_bias, *input_weight, *input_bias;
  const uint8_t *mask;  // [B, T], or null: all tokens are real
  // One pointer for each part of each row: buffers [G, 2W, D] and [G, 2W, E], sinks [G, S, D] and [G, S, E], far sums
  // [K, F, E] and [K, F], logarithms of the gates of buffered keys [K, 2W]; and one for each row: tokens seen.
  void **slots_k, **slots_v, **sink_k, **sink_v, **far_s;
  float **far_z, **log_forget, **log_input;
  Int **seen;
  // Groups that keep softmax attention: q, k, v and y then hold the heads of all groups, `free_heads` and `free_groups`
  // are the places of the student's heads and groups in them, `kept_groups` those of the others, whose `held` keys and
  // values [B, kept, ...] are followed by room for the new ones. Null where there are none.
  Int kept, held;
  View kept_k, kept_v;
  const Int *free_heads, *free_groups, *kept_groups;
};

// The states of the rows of a step in pages of a server's caches, in place of their pointers.
struct Pages {
  char **bases;         // page 0 of each part's cache
  Int size;             // bytes from a page to the next
  Int places[8];        // in a page: k, v, their sinks, the far sums, the gates
  const Int **slots;    // of each part: the page of each row
  const Int *seen;      // tokens of each row before this step
};

class Decoding {
 public:
  Decoding(const Step &step, Scratch &scratch) : a(step), d(spaced(a.dim)), e(spaced(a.values)), w(spaced(a.window)) {
    scratch.lay([&] { lay_out(scratch); });
  }

  // Where the state of a row has a group or key map: the part's pointer, and the number in the part.
  struct Place {
    Int part, inside;
  };
  static Place place_of(const Step &a, Int b, Int index, Int all) {
    const Int each = all / a.parts;
    return {b * a.parts + index / each, index % each};
  }

  // The chunk that leaves the window with this token becomes far.
  static bool due(const Step &a, Int b) {
    const Int n = *a.seen[b];
    return a.far && n % a.window == 0 && n >= 2 * a.window && n - a.window > a.sinks;
  }

  void fold(Int b, Int map) {
    const Int n = *a.seen[b], kv = map * a.kv_heads / a.key_maps, slot = n % (2 * a.window), old = n - 2 * a.window;
    const Place group = place_of(a, b, kv, a.kv_heads), sum = place_of(a, b, map, a.key_maps);
    rows(a.slots_k[group.part], a.narrow_slots, group.inside * 2 * a.window + slot, a.window, a.dim, keys, d);
    rows(a.slots_v[group.part], a.narrow_slots, group.inside * 2 * a.window + slot, a.window, a.values, values, e);
    std::memset(turned, 0, a.dim * w * sizeof(float));
    transpose(keys, d, turned, w, a.window, a.dim);
    HeadMap phi = map_of(a.key, map);
    phi.features(turned, f, a.window, w);
    for (Int r = 0; r < a.features; ++r)
      for (Int i = 0; old + i < a.sinks; ++i) f[r * w + i] = 0;
    const Int gates = sum.inside * 2 * a.window + slot;
    float left = 1.0f;
    if (a.gated)
      left = weigh_keys(a.log_forget[sum.part] + gates, a.log_input[sum.part] + gates, f, a.features, a.window, w, weights);
    product<ALL>({f, w, 1}, values, e, sums, e, a.features, a.values, a.window, false);
    float *z = a.far_z[sum.part] + sum.inside * a.features;
    for (Int r = 0; r < a.features; ++r) {
      add(sum, map, r, left, sums + r * e, n);
      z[r] = left * z[r] + summed(f + r * w, nullptr, a.window);
    }
  }

  // Stores the token's keys and values.
  static void keep(const Step &a, Int b, Int t) {
    const Int n = *a.seen[b], slot = n % (2 * a.window);
    for (Int g = 0; g < a.kv_heads; ++g) {
      const Int from = a.free_groups ? a.free_groups[g] : g;
      const Place at = place_of(a, b, g, a.kv_heads);
      const Int row = at.inside * 2 * a.window + slot, sink = at.inside * a.sinks + n;
      put(a, a.k, b, from, t, a.dim, a.slots_k[at.part], row * a.dim, a.narrow_slots);
      put(a, a.v, b, from, t, a.values, a.slots_v[at.part], row * a.values, a.narrow_slots);
      if (n >= a.sinks) continue;
      put(a, a.k, b, from, t, a.dim, a.sink_k[at.part], sink * a.dim, a.narrow_slots);
      put(a, a.v, b, from, t, a.values, a.sink_v[at.part], sink * a.values, a.narrow_slots);
    }
    for (Int i = 0; i < a.kept; ++i) {
      const Int k = b * a.kept_k.row + i * a.kept_k.head + (a.held + t) * a.kept_k.token;
      const Int v = b * a.kept_v.row + i * a.kept_v.head + (a.held + t) * a.kept_v.token;
      put(a, a.k, b, a.kept_groups[i], t, a.dim, a.kept_k.data, k, a.narrow);
      put(a, a.v, b, a.kept_groups[i], t, a.values, a.kept_v.data, v, a.narrow);
    }
  }

  // Stores the logarithms of the token's gates.
  void keep_gates(Int b, Int map, Int t) {
    const float *x = inputs_of(b, t), over = 1.0f / length(x, a.inputs);
    const Place at = place_of(a, b, map, a.key_maps);
    const Int slot = at.inside * 2 * a.window + *a.seen[b] % (2 * a.window);
    const float forget = over * summed(x, a.forget_weight + map * a.inputs, a.inputs) + a.forget_bias[map];
    const float write = over * summed(x, a.input_weight + map * a.inputs, a.inputs) + a.input_bias[map];
    a.log_forget[at.part][slot] = (forget < 0 ? forget : 0.0f) - log1pf(expf(-fabsf(forget)));
    a.log_input[at.part][slot] = (float)a.cap * tanhf(write / (float)a.cap);
  }

  // Outputs of the student's heads of a key map.
  void look(Int b, Int map, Int t) {
    const Int heads = a.heads / a.key_maps, kv = map * a.kv_heads / a.key_maps;
    gather(b, kv);
    const bool gated = a.gated && (*a.seen[b] / a.window - 1) * a.window > a.sinks;
    if (gated) {
      const Int from = a.free_groups ? a.free_groups[kv] : kv;
      read(a.k, a.narrow, b, from, t, 1, a.dim, own_k, d);
      read(a.v, a.narrow, b, from, t, 1, a.values, own_v, e);
    }
    for (Int h = map * heads; h < (map + 1) * heads; ++h) {
      const Int place = a.free_heads ? a.free_heads[h] : h;
      read(a.q, a.narrow, b, place, t, 1, a.dim, q, d);
      float ratio = 1.0f;
      if (a.far && !a.gated) ratio = a.affine ? expf(a.mix[h]) : 1.0f / (1.0f + expf(-a.mix[h]));
      float den = softmax_part(ratio, a.logit ? a.logit + h : nullptr);
      if (a.far && !a.gated) {
        query_features(h);
        gathered_sums(b, map);
        const Place sum = place_of(a, b, map, a.key_maps);
        den += summed(f, a.far_z[sum.part] + sum.inside * a.features, a.features);
      }
      divided(den, at(a.y, b, place, t));
      if (gated) mix_far_part(b, map, h, at(a.y, b, place, t));
    }
  }

  // Output of one head of a kept group: query head `h` of kept group `i`.
  void look_at_all(Int b, Int i, Int h, Int t) {
    const Int place = a.kept_groups[i] * (a.heads / a.kv_heads) + h, count = a.held + t + 1;
    read(a.q, a.narrow, b, place, t, 1, a.dim, q, d);
    gathered_row = -1;
    near = near_counts[0] = count, near_counts[1] = near_counts[2] = 0;
    if (a.narrow) {
      read(a.kept_k, true, b, i, 0, count, a.dim, keys, d);
      read(a.kept_v, true, b, i, 0, count, a.values, values, e);
      near_keys[0] = keys, near_values[0] = values, key_stride = d, value_stride = e;
    } else {
      near_keys[0] = at(a.kept_k, b, i, 0), near_values[0] = at(a.kept_v, b, i, 0);
      key_stride = a.kept_k.token, value_stride = a.kept_v.token;
    }
    divided(softmax_part(1.0f, nullptr), at(a.y, b, place, t));
  }

 private:
  const Step &a;
  const Int d, e, w;
  Int near = 0, key_stride = 0, value_stride = 0;  // keys the query sees, and lengths of their rows
  const float *near_keys[3], *near_values[3];
  Int near_counts[3];
  Int gathered_row = -1, gathered_group = -1;  // whose keys these are
  float *q, *keys, *values, *turned, *f, *sums, *p, *num, *own_k, *own_v, *weights, *input;

  void lay_out(Scratch &m) {
    const Int window = 2 * a.window + a.sinks, held = a.kept ? a.held + a.tokens : 0;
    const Int widened_rows = a.kept && a.narrow && held > window ? held : window, all = held > window ? held : window;
    q = m.take(d), keys = m.take(widened_rows * d), values = m.take(widened_rows * e), turned = m.take(a.dim * w);
    f = m.take(a.features * w + 2 * LANES), sums = m.take(a.features * e), p = m.take(all), num = m.take(e);
    if (!a.gated) return;
    own_k = m.take(d), own_v = m.take(e), weights = m.take(w), input = m.take(whole(a.inputs));
  }

  // |x|, at least 1e-12.
  static float length(const float *x, Int count) {
    const float found = sqrtf(summed(x, x, count));
    return found < 1e-12f ? 1e-12f : found;
  }

  // The layer's input of a token.
  const float *inputs_of(Int b, Int t) {
    if (!a.narrow_inputs) return at(a.x, b, 0, t);
    read(a.x, true, b, 0, t, 1, a.inputs, input, a.inputs);
    return input;
  }

  // y = (1 - o) y + o far, where y is the near part and o depends on the directions of q, k and v.
  void mix_far_part(Int b, Int map, Int h, float *y) {
    const float *weight = a.mix_weight + h * (2 * a.dim + a.values);
    const float logit = a.mix[h] + summed(q, weight, a.dim) / length(q, a.dim) +
                        summed(own_k, weight + a.dim, a.dim) / length(own_k, a.dim) +
                        summed(own_v, weight + 2 * a.dim, a.values) / length(own_v, a.values);
    const float o = 1.0f / (1.0f + expf(-logit));
    query_features(h);
    for (Int c = 0; c < a.values; ++c) num[c] = 0;
    gathered_sums(b, map);
    const Place sum = place_of(a, b, map, a.key_maps);
    const float den = summed(f, a.far_z[sum.part] + sum.inside * a.features, a.features);
    const float over = o / (den > 0 ? den : 1.0f);
    for (Int c = 0; c < a.values; ++c) y[c] = (1.0f - o) * y[c] + over * num[c];
  }

  // Adds E numbers to what is left of the far sums of feature r, `n` tokens after the row's start.
  void add(Place sum, Int map, Int r, float left, const float *x, Int n) const {
    const Int at = (sum.inside * a.features + r) * a.values, element = (map * a.features + r) * a.values;
    if (!a.narrow_sums) {
      float *s = (float *)a.far_s[sum.part] + at;
      for (Int c = 0; c < a.values; ++c) s[c] = left * s[c] + x[c];
      return;
    }
    uint16_t *s = (uint16_t *)a.far_s[sum.part] + at;
    for (Int c = 0; c < a.values; ++c) s[c] = rounded_at(left * widened(s[c]) + x[c], element + c, n);
  }

  // To bfloat16, up or down by a threshold that varies with element and position (ops/state.py, round_to_bfloat16).
  static uint16_t rounded_at(float x, Int element, Int n) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + (uint32_t)(((element * 2654435761 >> 8) + n * 40503) & 0xFFFF)) >> 16);
  }

  // num += features of the query times the far sums of a key map.
  void gathered_sums(Int b, Int map) {
    const Place sum = place_of(a, b, map, a.key_maps);
    const Int from = sum.inside * a.features * a.values;
    if (!a.narrow_sums) return gathered(f, (const float *)a.far_s[sum.part] + from, a.values, a.features);
    const uint16_t *s = (const uint16_t *)a.far_s[sum.part] + from;
    for (Int r = 0; r < a.features; ++r)
      for (Int c = 0; c < a.values; ++c) sums[r * e + c] = widened(s[r * a.values + c]);
    gathered(f, sums, e, a.features);
  }

  HeadMap map_of(const Map &m, Int head) const {
    return {m.weight + head * a.dim * a.columns, m.bias ? m.bias + head * a.columns : nullptr, nullptr, nullptr, nullptr,
            a.dim, a.columns, d, a.paired != 0, (float)a.eps};
  }

  // Rows of a buffer as floats.
  static void rows(const void *buffer, bool narrow, Int from, Int count, Int width, float *out, Int stride) {
    View view = {(void *)buffer, 0, 0, width};
    read(view, narrow, 0, 0, from, count, width, out, stride);
  }

  static void put(const Step &a, const View &x, Int b, Int g, Int t, Int width, void *buffer, Int place, bool narrow) {
    const Int from = b * x.row + g * x.head + t * x.token;
    for (Int i = 0; i < width; ++i) {
      if (a.narrow && narrow) {
        ((uint16_t *)buffer)[place + i] = ((const uint16_t *)x.data)[from + i];
        continue;
      }
      float value = a.narrow ? widened(((const uint16_t *)x.data)[from + i]) : ((const float *)x.data)[from + i];
      if (narrow) {
        ((uint16_t *)buffer)[place + i] = narrowed(value);
      } else {
        ((float *)buffer)[place + i] = value;
      }
    }
  }

  // To the nearest bfloat16, ties to even; NaN stays NaN.
  static uint16_t narrowed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  // Where the near keys lie: sinks, and the window in at most two pieces of the ring.
  void gather(Int b, Int g) {
    if (b == gathered_row && g == gathered_group) return;
    gathered_row = b, gathered_group = g;
    const Int n = *a.seen[b], ring = 2 * a.window, chunk = n / a.window;
    const Int from = chunk > 0 ? (chunk - 1) * a.window : 0, slot = from % ring;
    const Int first = n + 1 - from < ring - slot ? n + 1 - from : ring - slot;
    const Int sinks = from < a.sinks ? from : a.sinks;
    const Place at = place_of(a, b, g, a.kv_heads);
    const Int starts[3] = {at.inside * a.sinks, at.inside * ring + slot, at.inside * ring}, counts[3] = {sinks, first, n + 1 - from - first};
    near = 0, key_stride = a.narrow_slots ? d : a.dim, value_stride = a.narrow_slots ? e : a.values;
    for (int i = 0; i < 3; ++i) {
      const void *k = i ? a.slots_k[at.part] : a.sink_k[at.part], *v = i ? a.slots_v[at.part] : a.sink_v[at.part];
      near_counts[i] = counts[i];
      if (a.narrow_slots && counts[i]) {
        rows(k, true, starts[i], counts[i], a.dim, keys + near * d, d);
        rows(v, true, starts[i], counts[i], a.values, values + near * e, e);
        near_keys[i] = keys + near * d, near_values[i] = values + near * e;
      } else {
        near_keys[i] = (const float *)k + starts[i] * a.dim, near_values[i] = (const float *)v + starts[i] * a.values;
      }
      near += counts[i];
    }
  }

  // num = sum of r exp(s - max) v over the near keys; returns the sum of the weights, with the sink's.
  float softmax_part(float ratio, const float *logit) {
    const float scale = (float)a.scale, cap = (float)a.softcap;
    float top = -FLT_MAX;
    for (Int i = 0, j = 0; i < 3; ++i) {
      products_with(q, near_keys[i], key_stride, a.dim, near_counts[i], p + j);
      for (Int r = 0; r < near_counts[i]; ++r, ++j) {
        p[j] *= scale;
        if (cap) p[j] = cap * hyperbolic_tangent(splat(p[j] / cap))[0];
        top = p[j] > top || p[j] != p[j] ? p[j] : top;
      }
    }
    if (logit && *logit > top) top = *logit;
    for (Int j = 0; j < near; j += LANES) store(p + j, exp_negative(load(p + j) - top) * ratio);
    for (Int c = 0; c < a.values; ++c) num[c] = 0;
    for (Int i = 0, j = 0; i < 3; j += near_counts[i++]) gathered(p + j, near_values[i], value_stride, near_counts[i]);
    float den = summed(p, nullptr, near);
    return logit ? den + ratio * exp_negative(splat(*logit - top))[0] : den;
  }

  void divided(float den, float *y) const {
    for (Int c = 0; c < a.values; ++c) y[c] = num[c] / den;
  }

  // num += sum of weights times rows.
  void gathered(const float *weights, const float *x, Int stride, Int count) {
    Int j = 0;
    for (; j + 4 <= count; j += 4, x += 4 * stride)
      for (Int c = 0; c < a.values; ++c)
        num[c] += (weights[j] * x[c] + weights[j + 1] * x[stride + c]) +
                  (weights[j + 2] * x[2 * stride + c] + weights[j + 3] * x[3 * stride + c]);
    for (; j < count; ++j, x += stride)
      for (Int c = 0; c < a.values; ++c) num[c] += weights[j] * x[c];
  }

  // f [F] of the query.
  void query_features(Int h) {
    const float *weight = a.query.weight + h * a.dim * a.columns;
    const Int columns = a.columns;
    for (Int c = 0; c < columns; ++c) f[c] = a.query.bias ? a.query.bias[h * columns + c] : 0.0f;
    for (Int i = 0; i < a.dim; ++i)
      for (Int c = 0; c < columns; ++c) f[c] += q[i] * weight[i * columns + c];
    float top = f[0], low = f[0], sum = 0, sum_low = 0;
    for (Int c = 1; c < columns; ++c) top = f[c] > top ? f[c] : top, low = f[c] < low ? f[c] : low;
    float *u = sums;  // free outside of `fold`
    std::memcpy(u, f, columns * sizeof(float));
    for (Int c = 0; c < columns; c += LANES) store(f + c, exp_negative(load(u + c) - top));
    sum = summed(f, nullptr, columns);
    if (a.paired) {
      for (Int c = 0; c < columns; c += LANES) store(f + columns + c, exp_negative(low - load(u + c)));
      sum_low = summed(f + columns, nullptr, columns);
    }
    for (Int c = 0; c < a.features; ++c) {
      float x = f[c] / (c < columns ? sum : sum_low);
      f[c] = x < (float)a.eps ? (float)a.eps : x;
    }
  }
};
