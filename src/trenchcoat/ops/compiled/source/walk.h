// One row of one key map with its query heads, chunk by chunk: the window of a chunk, and the far sums of the chunks that
// are at least `lag` before it, two or (linear) one. Of the last chunk that is not in these sums yet, some keys may be far
// for some queries: in a sliding window the chunk before, without a window the queries' own, key j for the queries from j
// on. Here they are called local. A backward pass or a transfer walks through the row a second time, from its end, for the
// gradients of the keys and values in the far sums.
#pragma once
#include "maps.h"
#include "near.h"

enum Pass { FORWARD, TRANSFER, BACKWARD };

// Added to the denominator of kind linear, where all features can be zero.
constexpr float LINEAR_EPS = 1e-12f;

// The chunks of a row that a walk computes, and the far sums [F, E] and [F] before them (null: those before token 0).
struct Span {
  Int from, upto;
  const float *s, *z;
};

template <Pass pass> class Walk {
 public:
  Walk(const Call &call, Scratch &scratch, Int row, Int key_map, Span part = {0, INT64_MAX, nullptr, nullptr})
      : a(call), b(row), map(key_map), heads(call.heads / call.key_maps), kv(map * call.kv_heads / call.key_maps),
        length(call.length ? call.length[row] : call.tokens), chunks((length + call.window - 1) / call.window),
        first(call.first ? call.first[row] : 0), span{part.from, part.upto < chunks ? part.upto : chunks, part.s, part.z},
        features(call.features), w(spaced(call.window)), d(spaced(call.dim)),
        e(spaced(call.values)), wide(spaced(call.features)),
        lag(call.kind == LINEAR ? 1 : 2), has_local(call.far && call.kind != TERRACE), learns(pass == BACKWARD || (pass == TRANSFER && call.far && call.query.dweight)) {
    scratch.lay([&] { lay_out(scratch); });
  }

  void run() {
    if (span.from && span.from >= chunks) return;
    start();
    if (span.from) read_keys(span.from - 1);
    for (Int c = span.from; c < span.upto; ++c) {
      if (a.far && c >= lag) fold(c - lag);
      read_keys(c);
      if (has_local) find_local(c);
      for (Int h = 0; h < heads && c * a.window >= a.skip; ++h) queries(c, h);
    }
    if (a.error) a.error[b * a.key_maps + map] = squares;
    if (a.end_s && span.upto == chunks) finish();
    if (learns && a.far) {
      for (Int c = chunks - 1; c >= 0; --c) far_keys(c);
      give_map_gradients();
    }
  }

  // To `s` and `z`: the sums of the chunks that `run` would add to those it begins with.
  void add_up(float *to_s, float *to_z) {
    start();
    std::memset(s, 0, features * e * sizeof(float));
    std::memset(z, 0, features * sizeof(float));
    for (Int c = span.from; c < span.upto; ++c) {
      if (c < 2) continue;
      read_keys(c - 1);
      fold(c - 2);
    }
    for (Int f = 0; f < features; ++f) std::memcpy(to_s + f * a.values, s + f * e, a.values * sizeof(float));
    std::memcpy(to_z, z, features * sizeof(float));
  }

 private:
  const Call &a;
  const Int b, map, heads, kv, length, chunks, first;
  const Span span;
  const Int features, w, d, e, wide;  // w, d, e, wide: lengths of rows
  const Int lag;
  const bool has_local, learns;
  Int lead = 0, sinks = 0, count = 0;  // of the current chunk: keys before it, sinks among them, tokens
  Int locals = 0, local_row = 0;       // local keys, and the first one's row among the near keys
  double squares = 0;
  float *q, *qt, *k, *v, *p, *num, *sum, *sink, *kt, *fk, *fq, *natural, *s, *z;
  float *dnum, *dnumt, *dden, *pull, *dp, *capped, *df, *dx, *dpair, *vt, *g, *gz, *other;
  float *local, *dlocal, *turned_local, *saved_dfk;
  float *saved_fk, *saved_fq, *saved_dnum, *saved_dden, *dquery, *dquery_bias, *dkey, *dkey_bias, *turned;

  void lay_out(Scratch &m) {
    const Int window = a.window, keys = a.sinks + 2 * window, far = a.far ? features : 0;
    q = m.take(window * d), qt = m.take(a.dim * w), k = m.take(keys * d), v = m.take(keys * e), p = m.take(keys * w);
    num = m.take(window * e), sum = m.take(w), sink = m.take(w), kt = m.take(a.dim * w);
    natural = m.take(a.mapped ? 0 : window * wide);
    local = m.take(has_local ? window * w : 0);
    s = m.take(far * e), z = m.take(far), fk = m.take(far * w), fq = m.take(far * w);
    other = m.take(pass == FORWARD && !a.far_mix ? 0 : window * e);
    if (!learns) return;
    const bool near = pass == BACKWARD;
    dnum = m.take(window * e), dnumt = m.take(a.values * w), dden = m.take(w), pull = m.take(w);
    df = m.take(far * w), dx = m.take(window * d), vt = m.take(a.values * w), g = m.take(far * e), gz = m.take(far);
    dp = m.take(near ? keys * w : 0), capped = m.take(near && a.softcap ? keys * w : 0);
    dpair = m.take(near ? keys * (d > e ? d : e) : window * e);
    dlocal = m.take(has_local ? window * w : 0), turned_local = m.take(has_local ? window * w : 0);
    saved_dfk = m.take(has_local ? chunks * features * w : 0);
    if (!a.far) return;
    saved_fk = m.take(chunks * features * w), saved_fq = m.take(heads * chunks * features * w);
    saved_dnum = m.take(heads * chunks * window * e), saved_dden = m.take(heads * chunks * w);
    if (!a.mapped) return;
    const Int size = a.columns * d;
    dquery = m.take(heads * size), dquery_bias = m.take(heads * a.columns);
    dkey = m.take(size), dkey_bias = m.take(a.columns), turned = m.take((heads + 1) * size);
  }

  Int tokens_of(Int c) const { return length - c * a.window < a.window ? length - c * a.window : a.window; }
  bool far_at(Int c) const { return a.far && (c >= lag - has_local || a.start_s); }
  Int head_of(Int h) const { return map * heads + h; }

  void start() {
    std::memset(qt, 0, a.dim * w * sizeof(float));
    std::memset(kt, 0, a.dim * w * sizeof(float));
    if (learns) std::memset(dnumt, 0, a.values * w * sizeof(float)), std::memset(vt, 0, a.values * w * sizeof(float));
    if (has_local && learns) {
      std::memset(turned_local, 0, a.window * w * sizeof(float));
      std::memset(saved_dfk, 0, chunks * features * w * sizeof(float));
    }
    if (!a.far) return;
    std::memset(s, 0, features * e * sizeof(float));
    std::memset(z, 0, features * sizeof(float));
    if (learns) std::memset(g, 0, features * e * sizeof(float)), std::memset(gz, 0, features * sizeof(float));
    if (!a.mapped) std::memset(fk, 0, features * w * sizeof(float)), std::memset(fq, 0, features * w * sizeof(float));
    const Int at = (b * a.key_maps + map) * features;
    if (span.from) {
      begin_with(span.s, span.z);
    } else if (a.start_s) {
      begin_with(a.start_s + at * a.values, a.start_z + at);
    }
    if (!learns || !a.mapped) return;
    std::memset(dquery, 0, heads * a.columns * d * sizeof(float));
    std::memset(dquery_bias, 0, heads * a.columns * sizeof(float));
    std::memset(dkey, 0, a.columns * d * sizeof(float));
    std::memset(dkey_bias, 0, a.columns * sizeof(float));
    for (Int h = 0; h <= heads; ++h) {
      const float *weight = h < heads ? a.query.weight + head_of(h) * a.dim * a.columns
                                      : a.key.weight + map * a.dim * a.columns;
      transpose(weight, a.columns, turned + h * a.columns * d, d, a.dim, a.columns);
      for (Int r = 0; r < a.columns; ++r)
        for (Int i = a.dim; i < d; ++i) turned[(h * a.columns + r) * d + i] = 0;
    }
  }

  void begin_with(const float *start_s, const float *start_z) {
    for (Int f = 0; f < features; ++f) std::memcpy(s + f * e, start_s + f * a.values, a.values * sizeof(float));
    std::memcpy(z, start_z, features * sizeof(float));
  }

  HeadMap map_of(const Map &m, Int head, float *dweight, float *dbias, const float *back) const {
    return {m.weight + head * a.dim * a.columns, m.bias ? m.bias + head * a.columns : nullptr,
            learns && m.dweight ? dweight : nullptr, learns && m.dbias ? dbias : nullptr, back, a.dim, a.columns, d, a.paired != 0,
            (float)a.eps};
  }
  HeadMap query_map(Int h) const {
    const Int size = a.columns * d;
    return map_of(a.query, head_of(h), dquery + h * size, dquery_bias + h * a.columns, turned + h * size);
  }
  HeadMap key_map() const { return map_of(a.key, map, dkey, dkey_bias, turned + heads * a.columns * d); }

  // Zero the lanes of the first S tokens of a row, which never become far.
  void clear_sinks(Int c, float *f) const {
    Int upto = a.sinks - first - c * a.window;
    for (Int r = 0; upto > 0 && r < features; ++r)
      for (Int i = 0; i < (upto < a.window ? upto : a.window); ++i) f[r * w + i] = 0;
  }

  float *features_at(Int c) const { return learns ? saved_fk + c * features * w : fk; }

  // Features [F, window] of the keys of chunk c, from the near keys where they lie.
  void key_features(Int c, const float *keys, float *f) {
    const Int tokens = tokens_of(c);
    if (a.mapped) {
      transpose(keys, d, kt, w, tokens, a.dim);
      key_map().features(kt, f, a.window, w);
    } else {
      read(a.fk, false, b, map, c * a.window, tokens, features, natural, wide);
      transpose(natural, wide, f, w, tokens, features);
    }
    clear_sinks(c, f);
  }

  // Adds chunk c to the far sums. Its keys and values are still there from the chunk before this one; its features too, if
  // they were local.
  void fold(Int c) {
    const Int row = has_local ? local_row : lead - a.window;
    if (!has_local) key_features(c, k + row * d, features_at(c));
    if (a.far_mix) forget(c);
    add_to_sums(features_at(c), v + row * e, a.window);
  }

  // Weighs the features of chunk c's keys by their gates, and the sums before by the forget gates.
  void forget(Int c) {
    const Int from = (b * a.key_maps + map) * a.tokens + c * a.window;
    const float left = weigh_keys(a.log_forget + from, a.log_input + from, features_at(c), features, a.window, w, sink);
    for (Int i = 0; i < features * e; ++i) s[i] *= left;
    for (Int r = 0; r < features; ++r) z[r] *= left;
  }

  void add_to_sums(const float *f, const float *values, Int tokens) {
    product<ALL>({f, w, 1}, values, e, s, e, features, a.values, tokens, true);
    for (Int r = 0; r < features; ++r) z[r] += summed(f + r * w, nullptr, tokens);
  }

  // The local keys of chunk c's queries, if there are any, and their features.
  void find_local(Int c) {
    locals = a.kind == LINEAR ? count : c ? a.window : 0;
    local_row = a.kind == LINEAR ? lead : sinks;
    if (locals) key_features(c - lag + 1, k + local_row * d, features_at(c - lag + 1));
  }

  // Weights of the local keys; adds them up in `sum` (if not null).
  void weigh_local(Int c, const float *f, float *sums) {
    product<QUERIES_FROM>({features_at(c - lag + 1), 1, w}, f, w, local, w, locals, a.window, features, false, 0);
    keep_later_queries(local, locals, a.window, w, nullptr, sums);
  }

  void read_keys(Int c) {
    count = tokens_of(c);
    Int old = first + (c - (a.kind == TERRACE)) * a.window;
    if (a.kind == LINEAR) old = 0;
    sinks = old < 0 ? 0 : old < a.sinks ? old : a.sinks;
    read(a.sink_k, a.narrow, b, kv, 0, sinks, a.dim, k, d);
    read(a.sink_v, a.narrow, b, kv, 0, sinks, a.values, v, e);
    lead = sinks + (c ? a.window : 0);
    Int from = (c ? c - 1 : 0) * a.window, all = lead - sinks + count;
    read(a.k, a.narrow, b, kv, from, all, a.dim, k + sinks * d, d);
    read(a.v, a.narrow, b, kv, from, all, a.values, v + sinks * e, e);
  }

  void queries(Int c, Int h) {
    const Int head = head_of(h), t = c * a.window;
    const bool far = far_at(c);
    read(a.q, a.narrow, b, head, t, count, a.dim, q, d);
    for (Int i = count; i < a.window; ++i) std::memset(q + i * d, 0, d * sizeof(float));
    transpose(q, d, qt, w, a.window, a.dim);
    Near near = {a.window, lead, count, w, sinks, a.window - first - t, a.kind == SLIDING, (float)a.scale, (float)a.softcap, far ? a.ratio[head] : 1.0f,
                 a.logit ? a.logit + head : nullptr};
    if (a.kind != LINEAR) {
      product<QUERIES_FROM>({k, d, 1}, qt, w, p, w, lead + count, a.window, a.dim, false, lead);
      if (a.softcap) cap_scores(near, p, pass == BACKWARD ? capped : nullptr);
      near_weights(near, p, sum, sink);
    }
    float *f = learns && far ? saved_fq + (h * chunks + c) * features * w : fq;
    if (far) query_features(t, h, f);
    if (pass != BACKWARD) outputs(c, head, far, f);
    if (!learns || (pass == TRANSFER && !far)) return;
    float *dn = a.far ? saved_dnum + (h * chunks + c) * a.window * e : dnum;
    float *dd = a.far ? saved_dden + (h * chunks + c) * w : dden;
    output_gradients(head, t, dn, dd);
    std::memset(pull, 0, w * sizeof(float));
    if (far) far_gradients(c, h, f, dn, dd);
    if (pass == BACKWARD) near_gradients(near, c, h, far, dn, dd);
  }

  void query_features(Int t, Int h, float *f) {
    if (a.mapped) return query_map(h).features(qt, f, a.window, w);
    read(a.fq, false, b, head_of(h), t, count, features, natural, wide);
    transpose(natural, wide, f, w, count, features);
  }

  // y of the chunk in `num`, and what becomes of it.
  void outputs(Int c, Int head, bool far, const float *f) {
    const Int t = c * a.window;
    if (a.kind != LINEAR) {
      product<KEYS_UPTO>({p, 1, w}, v, e, num, e, count, a.values, lead + count, false, lead);
    } else {
      std::memset(num, 0, a.window * e * sizeof(float));
      for (Int i = 0; i < w; ++i) sum[i] = LINEAR_EPS;
    }
    if (far && locals) {
      weigh_local(c, f, sum);
      product<KEYS_UPTO>({local, 1, w}, v + local_row * e, e, num, e, count, a.values, locals, true, 0);
    }
    if (far && a.far_mix) {
      mix_far_part(t, head, f);
    } else {
      if (far) {
        product<ALL>({f, 1, w}, s, e, num, e, count, a.values, features, true);
        add_far_weights(f, sum);
      }
      for (Int i = 0; i < count; ++i)
        for (Int c = 0; c < e; c += LANES) store(num + i * e + c, load(num + i * e + c) * (1.0f / sum[i]));
    }
    if (pass == FORWARD) {
      for (Int i = 0; i < count; ++i)
        std::memcpy(at(a.y, b, head, t + i), num + i * e, a.values * sizeof(float));
      if (a.den) std::memcpy(a.den + (b * a.heads + head) * a.tokens + t, sum, count * sizeof(float));
      return;
    }
    read(a.target, a.narrow, b, head, t, count, a.values, other, e);
    float found = 0;
    for (Int i = 0; i < count; ++i) {
      Vec x = {};
      for (Int c = 0; c < whole(a.values); c += LANES) {
        Vec error = load(num + i * e + c) - load(other + i * e + c);
        x += error * error;
        store(other + i * e + c, error);
      }
      found += total(x);
    }
    squares += found;
  }

  // Adds phi(q) z of each query.
  void add_far_weights(const float *f, float *sums) const {
    for (Int i = 0; i < whole(a.window); i += LANES) {
      Vec x = load(sums + i);
      for (Int r = 0; r < features; ++r) x += z[r] * load(f + r * w + i);
      store(sums + i, x);
    }
  }

  // num = (1 - o) num / sum + o far, where the far part has a denominator of its own.
  void mix_far_part(Int t, Int head, const float *f) {
    const float *mix = a.far_mix + (b * a.heads + head) * a.tokens + t;
    product<ALL>({f, 1, w}, s, e, other, e, count, a.values, features, false);
    std::memset(sink, 0, w * sizeof(float));
    add_far_weights(f, sink);
    for (Int i = 0; i < count; ++i) {
      const float near = (1.0f - mix[i]) / sum[i], far = mix[i] / (sink[i] > 0 ? sink[i] : 1.0f);
      for (Int c = 0; c < whole(a.values); c += LANES)
        store(num + i * e + c, near * load(num + i * e + c) + far * load(other + i * e + c));
    }
  }

  // Gradients of numerator [window, E] and denominator, both over the denominator; zero after the last token.
  void output_gradients(Int head, Int t, float *dn, float *dd) {
    const float scale = pass == TRANSFER ? 2.0f * (float)a.error_scale : 1.0f;
    const float *den = pass == TRANSFER ? sum : a.den + (b * a.heads + head) * a.tokens + t;
    if (pass == BACKWARD) {
      read(a.dy, false, b, head, t, count, a.values, other, e);
      read(a.y, false, b, head, t, count, a.values, num, e);
    }
    for (Int i = 0; i < count; ++i) {
      Vec dot = {};
      for (Int c = 0; c < whole(a.values); c += LANES) {
        Vec x = load(other + i * e + c) * (scale / den[i]);
        store(dn + i * e + c, x);
        dot += x * load(num + i * e + c);
      }
      dd[i] = -total(dot);
    }
    for (Int i = count; i < a.window; ++i) std::memset(dn + i * e, 0, e * sizeof(float));
    for (Int i = count; i < w; ++i) dd[i] = 0;
    transpose(dn, e, dnumt, w, a.window, a.values);
  }

  void far_gradients(Int c, Int h, const float *f, const float *dn, const float *dd) {
    const Int head = head_of(h), t = c * a.window;
    product<ALL>({s, e, 1}, dnumt, w, df, w, features, a.window, a.values, false);
    // What the sums lack: z times the gradient of the denominator. Local keys bring their own, before it.
    if (locals) local_gradients(c, f, dn, dd);
    if (a.mapped) {
      query_map(h).backward(f, df, {z, dd}, pull, q, count, w);
    } else {
      for (Int i = 0; i < whole(a.window); i += LANES) store(pull + i, Rest{z, dd}.complete(f, df, 0, features, w, i));
    }
    // Lanes after the last token have gradients 0, but features may be anything.
    for (Int i = count; i < w; ++i) pull[i] = 0;
    if (a.dratio && a.kind != LINEAR) a.dratio[b * a.heads + head] -= summed(pull, nullptr, count);
    if (a.mapped) return;
    if (!a.dfq.data) return;
    transpose(df, w, natural, wide, features, count);
    add(a.dfq, b, head, t, count, features, natural, wide);
  }

  // Adds those of the local keys' weights to df and to the gradients of their features and values.
  void local_gradients(Int c, const float *f, const float *dn, const float *dd) {
    const Int chunk = c - lag + 1;
    const float *keys = features_at(chunk);
    product<QUERIES_FROM>({v + local_row * e, e, 1}, dnumt, w, dlocal, w, locals, a.window, a.values, false, 0);
    keep_later_queries(dlocal, locals, a.window, w, dd, nullptr);
    product<ALL>({keys, w, 1}, dlocal, w, df, w, features, a.window, locals, true);
    transpose(dlocal, w, turned_local, w, locals, a.window);
    product<ALL>({f, w, 1}, turned_local, w, saved_dfk + chunk * features * w, w, features, a.window, count, true);
    if (pass != BACKWARD || !a.dv.data) return;
    weigh_local(c, f, nullptr);
    product<QUERIES_SUM>({local, w, 1}, dn, e, dpair, e, locals, a.values, count, false, 0);
    add(a.dv, b, map, chunk * a.window, locals, a.values, dpair, e);
  }

  void near_gradients(const Near &near, Int c, Int h, bool far, const float *dn, const float *dd) {
    const Int head = head_of(h), keys = lead + count, stride = d > e ? d : e;
    if (a.kind == LINEAR) {
      if (!a.dq.data || !far || !a.mapped) return;
      query_map(h).inputs(df, dx, count, w, false);
      return add(a.dq, b, head, c * a.window, count, a.dim, dx, d);
    }
    if (a.dv.data) {
      product<QUERIES_SUM>({p, w, 1}, dn, e, dpair, stride, keys, a.values, count, false, lead);
      spread(a.dsink_v, a.dv, c, a.values, stride);
    }
    if (a.dq.data || a.dk.data || a.dlogit) {
      product<QUERIES_FROM>({v, e, 1}, dnumt, w, dp, w, keys, a.window, a.values, false, lead);
      float dlogit = score_gradients(near, p, dp, dd, pull, sink, capped);
      if (a.dlogit) a.dlogit[b * a.heads + head] += dlogit;
    }
    if (a.dq.data) {
      product<KEYS_UPTO>({dp, 1, w}, k, d, dx, d, count, a.dim, keys, false, lead);
      if (far && a.mapped) query_map(h).inputs(df, dx, count, w, true);
      add(a.dq, b, head, c * a.window, count, a.dim, dx, d);
    }
    if (a.dk.data) {
      product<QUERIES_SUM>({dp, w, 1}, q, d, dpair, stride, keys, a.dim, count, false, lead);
      spread(a.dsink_k, a.dk, c, a.dim, stride);
    }
  }

  // Adds gradients [sinks | previous chunk | own chunk] of near keys or values to where they belong.
  void spread(const View &dsink, const View &dtokens, Int c, Int width, Int stride) {
    if (dsink.data) add(dsink, b, map, 0, sinks, width, dpair, stride);
    Int from = (c ? c - 1 : 0) * a.window;
    add(dtokens, b, map, from, lead - sinks + count, width, dpair + sinks * stride, stride);
  }

  // Gradients of the keys and values of chunk c in the far sums, once the queries that read it there are added up.
  void far_keys(Int c) {
    const Int t = c * a.window, tokens = tokens_of(c), last = chunks - (has_local ? lag - 1 : lag);
    if (c >= last) return;
    if (c + lag < chunks) add_up_queries(c + lag);
    const float *f = features_at(c);
    if (a.mapped || a.dfk.data) {
      read(a.v, a.narrow, b, kv, t, tokens, a.values, v, e);
      transpose(v, e, vt, w, tokens, a.values);
      product<ALL>({g, e, 1}, vt, w, df, w, features, a.window, a.values, false);
      const float *more = has_local ? saved_dfk + c * features * w : nullptr;
      for (Int i = 0; more && i < features * w; i += LANES) store(df + i, load(df + i) + load(more + i));
    }
    if (a.mapped) {
      // Features of sinks are 0, so their gradients count for nothing.
      read(a.k, a.narrow, b, kv, t, tokens, a.dim, k, d);
      key_map().backward(f, df, {gz, nullptr}, nullptr, k, tokens, w);
      if (a.dk.data) {
        key_map().inputs(df, dx, tokens, w, false);
        add(a.dk, b, map, t, tokens, a.dim, dx, d);
      }
    } else if (a.dfk.data) {
      for (Int r = 0; r < features; ++r)
        for (Int i = 0; i < whole(a.window); i += LANES) store(df + r * w + i, load(df + r * w + i) + gz[r]);
      clear_sinks(c, df);
      transpose(df, w, natural, wide, features, tokens);
      add(a.dfk, b, map, t, tokens, features, natural, wide);
    }
    if (!a.dv.data) return;
    product<ALL>({f, 1, w}, g, e, dpair, e, tokens, a.values, features, false);
    add(a.dv, b, map, t, tokens, a.values, dpair, e);
  }

  // Adds the gradients of the far sums that chunk c's queries read.
  void add_up_queries(Int c) {
    const Int tokens = tokens_of(c);
    for (Int h = 0; h < heads; ++h) {
      const Int at = h * chunks + c;
      const float *f = saved_fq + at * features * w, *dd = saved_dden + at * w;
      product<ALL>({f, w, 1}, saved_dnum + at * a.window * e, e, g, e, features, a.values, tokens, true);
      for (Int r = 0; r < features; ++r) gz[r] += summed(f + r * w, dd, tokens);
    }
  }

  void give_map_gradients() {
    if (!a.mapped) return;
    for (Int h = 0; h < heads; ++h) give(a.query, a.heads, head_of(h), dquery + h * a.columns * d, dquery_bias + h * a.columns);
    give(a.key, a.key_maps, map, dkey, dkey_bias);
  }

  // Gradients [B, heads, D, P] and [B, heads, P], one for each row, so that rows may run at the same time.
  void give(const Map &m, Int of, Int head, const float *dweight, const float *dbias) {
    if (!m.dweight) return;
    float *out = m.dweight + (b * of + head) * a.dim * a.columns;
    transpose(dweight, d, out, a.columns, a.columns, a.dim);
    if (m.dbias) std::memcpy(m.dbias + (b * of + head) * a.columns, dbias, a.columns * sizeof(float));
  }

  // Far sums after the row: as its last query reads them, with the local keys up to its place in the chunk.
  void finish() {
    if (has_local && locals) add_to_sums(features_at(chunks - lag), v + local_row * e, count);
    for (Int f = 0; f < features; ++f) {
      Int at = (b * a.key_maps + map) * features + f;
      std::memcpy(a.end_s + at * a.values, s + f * e, a.values * sizeof(float));
      a.end_z[at] = z[f];
    }
  }
};
