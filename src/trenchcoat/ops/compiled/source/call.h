// One call: sizes and tensors as Python passes them (`trenchcoat.ops.compiled.call` mirrors these structures), and how rows
// of tokens are read and written.
#pragma once
#include <atomic>
#include <cstdlib>
#include "products.h"

// A tensor [B, heads, T, width] of floats (or bfloat16 where said); the last axis is contiguous, other strides in elements.
struct View {
  void *data;
  Int row, head, token;
};

enum Kind { TERRACE, SLIDING, LINEAR };

struct Map {
  const float *weight, *bias;  // [heads, D, P], [heads, P] or null
  float *dweight, *dbias;      // gradients are added; null for none
};

struct Call {
  Int rows, heads, kv_heads, key_maps, tokens, dim, values, features, columns, window, sinks;
  Int kind, far, narrow, mapped, paired, threads;  // kind: a Kind; narrow: q, k, v are bfloat16
  Int skip;                                  // a forward pass has no queries before this token, a multiple of `window`
  double scale, softcap, eps, error_scale;   // softcap 0: none
  View q, k, v, fq, fk, y, target, dy;       // fq, fk null where `mapped`; target: the teacher's y in transfer
  View sink_k, sink_v;                       // [B, G, S, width]
  View dq, dk, dv, dfq, dfk;                 // dk, dv, dfk [B, K, T, width]; gradients are added
  View dsink_k, dsink_v;                     // [B, K, S, width]
  Map query, key;
  const float *ratio, *logit;      // g / l and the sink's logit, [H]
  const Int *first, *length;       // position of token 0, and tokens of a row, [B]; null: 0, and all
  const float *start_s, *start_z;  // far sums before token 0, [B, K, F, E] and [B, K, F], or null
  float *end_s, *end_z;            // those after the last token, or null
  float *den;                      // [B, H, T]: written by a forward pass if not null, read by a backward pass
  float *dratio, *dlogit;          // gradients of log(g / l) and of the sink's logit, [B, H], or null
  double *error;                   // squared error, [B, K]
  // Of a forward pass with a far part that forgets and has a denominator of its own, else null: logarithms of the gates of
  // keys [B, K, T], and the far part's weight in y, [B, H, T].
  const float *log_forget, *log_input, *far_mix;
};

static inline float widened(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Copy `count` tokens from token t on to rows of `out`, zeros up to a whole number of blocks.
static void read(const View &x, bool narrow, Int b, Int head, Int t, Int count, Int width, float *out, Int stride) {
  Int at = b * x.row + head * x.head + t * x.token, full = whole(width);
  for (Int i = 0; i < count; ++i, at += x.token, out += stride) {
    if (narrow) {
      const uint16_t *p = (const uint16_t *)x.data + at;
      for (Int d = 0; d < width; ++d) out[d] = widened(p[d]);
    } else {
      std::memcpy(out, (const float *)x.data + at, width * sizeof(float));
    }
    for (Int d = width; d < full; ++d) out[d] = 0;
  }
}

static inline float *at(const View &x, Int b, Int head, Int t) {
  return (float *)x.data + b * x.row + head * x.head + t * x.token;
}

// Add rows to a gradient.
static void add(const View &x, Int b, Int head, Int t, Int count, Int width, const float *from, Int stride) {
  for (Int i = 0; i < count; ++i, from += stride) {
    float *p = at(x, b, head, t + i);
    for (Int d = 0; d < width; ++d) p[d] += from[d];
  }
}

// Bytes that all threads hold for intermediate results, the most they held since the last question, and the most that a
// thread keeps from one call to the next.
static std::atomic<Int> scratch_bytes{0}, scratch_peak{0};
constexpr Int KEPT_BYTES = 8 << 20;

// Memory of one thread, handed out piece by piece.
class Scratch {
 public:
  void reset() { used = 0; }
  float *take(Int count) {
    count = (count + 31) / 16 * 16;
    used += count;
    if (!held) return nullptr;
    return held + used - count;
  }
  // Run `lay_out` twice: to count what it takes, and with memory for it.
  template <class F> void lay(F lay_out) {
    float *memory = held;
    held = nullptr;
    reset();
    lay_out();
    held = memory;
    if (used > size) resize(used);
    reset();
    lay_out();
  }
  // At the end of a call: a long row's memory goes back to the system.
  void trim() {
    if (size * (Int)sizeof(float) > KEPT_BYTES) resize(0);
  }
  ~Scratch() { resize(0); }

 private:
  void resize(Int count) {
    free(held);
    const Int bytes = scratch_bytes += (count - size) * (Int)sizeof(float);
    for (Int most = scratch_peak; bytes > most && !scratch_peak.compare_exchange_weak(most, bytes);) {
    }
    size = count;
    held = count ? (float *)aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64) : nullptr;
  }
  float *held = nullptr;
  Int size = 0, used = 0;
};
