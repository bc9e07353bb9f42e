// Attention with a softmax window and linear attention over everything older, on CPUs: entry points.
// What is computed is defined in ops/reference.py; the arithmetic of a backward pass is explained in ops/chunked/.
#include "decode.h"
#include "walk.h"

template <Pass pass> static void walk(const Call *call) {
  const Int tasks = call->rows * call->key_maps;
#pragma omp parallel num_threads((int)(tasks < call->threads ? tasks : call->threads))
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (Int task = 0; task < tasks; ++task)
      Walk<pass>(*call, scratch, task / call->key_maps, task % call->key_maps).run();
    scratch.trim();
  }
}

static void decode_token(const Step *step, Int t) {
  const Int tasks = step->rows * step->key_maps, shared = step->heads / step->kv_heads;
  const Int kept = step->rows * step->kept * shared, most = tasks + kept;
  bool any = false;
  for (Int b = 0; b < step->rows; ++b) any = any || Decoding::due(*step, b);
#pragma omp parallel num_threads((int)(most < step->threads ? most : step->threads))
  {
    static thread_local Scratch scratch;
    Decoding decoding(*step, scratch);
    auto real = [&](Int b) { return !step->mask || step->mask[b * step->tokens + t]; };
    if (any) {
#pragma omp for schedule(static)
      for (Int task = 0; task < tasks; ++task) {
        const Int b = task / step->key_maps;
        if (real(b) && Decoding::due(*step, b)) decoding.fold(b, task % step->key_maps);
      }
    }
#pragma omp for schedule(static)
    for (Int b = 0; b < step->rows; ++b)
      if (real(b)) Decoding::keep(*step, b, t);
#pragma omp for schedule(dynamic, 1)
    for (Int task = 0; task < most; ++task) {
      if (task < kept) {
        decoding.look_at_all(task / (step->kept * shared), task / shared % step->kept, task % shared, t);
        continue;
      }
      const Int b = (task - kept) / step->key_maps;
      if (real(b)) decoding.look(b, (task - kept) % step->key_maps, t);
    }
#pragma omp for schedule(static)
    for (Int b = 0; b < step->rows; ++b)
      if (real(b)) ++*step->seen[b];
  }
}

extern "C" {
Int call_bytes() { return (Int)sizeof(Call); }
Int scratch_peak_bytes() { return scratch_peak.exchange(scratch_bytes); }
Int step_bytes() { return (Int)sizeof(Step); }
void forward(const Call *call) { walk<FORWARD>(call); }
void transfer(const Call *call) { walk<TRANSFER>(call); }
void backward(const Call *call) { walk<BACKWARD>(call); }
void decode(const Step *step) {
  for (Int t = 0; t < step->tokens; ++t) decode_token(step, t);
}
}
