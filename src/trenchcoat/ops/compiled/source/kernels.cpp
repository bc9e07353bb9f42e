// Attention with a softmax window and linear attention over everything older, on CPUs: entry points.
// What is computed is defined in ops/reference.py; the arithmetic of a backward pass is explained in ops/chunked/.
#include <vector>

#include "decode.h"
#include "walk.h"

static Scratch &scratch() {
  static thread_local Scratch own;
  return own;
}

template <class Work> static void in_parallel(Int tasks, Int threads, Work work) {
  if (tasks < 1) return;
#pragma omp parallel num_threads((int)(tasks < threads ? tasks : threads))
  {
#pragma omp for schedule(dynamic, 1)
    for (Int task = 0; task < tasks; ++task) work(task);
    scratch().trim();
  }
}

template <Pass pass> static void walk(const Call *call) {
  const Int maps = call->key_maps;
  in_parallel(call->rows * maps, call->threads,
              [=](Int task) { Walk<pass>(*call, scratch(), task / maps, task % maps).run(); });
}

constexpr Int SHORTEST = 8;

// A forward pass where there are fewer tasks than threads: rows are cut into parts of at least SHORTEST chunks. The far
// sums of all parts but the last come first, then what each part begins with, then the walks.
static void walk_parts(const Call *call, Int parts) {
  const Int maps = call->key_maps, tasks = call->rows * maps, size = call->features * (call->values + 1);
  const Int chunks = (call->tokens + call->window - 1) / call->window, each = (chunks + parts - 1) / parts;
  const Int values = call->features * call->values;
  std::vector<float> sums(tasks * parts * size);
  auto at = [&](Int task, Int part) { return sums.data() + (task * parts + part) * size; };
  auto walk_of = [&](Int task, Int part) {
    const float *from = at(task, part);
    return Walk<FORWARD>(*call, scratch(), task / maps, task % maps,
                         {part * each, (part + 1) * each, from, from + values});
  };
  if (call->far) {
    in_parallel(tasks * (parts - 1), call->threads, [&](Int i) {
      const Int task = i / (parts - 1), part = i % (parts - 1);
      float *to = at(task, part + 1);
      walk_of(task, part).add_up(to, to + values);
    });
    for (Int task = 0; task < tasks; ++task) {
      if (call->start_s) {
        std::memcpy(at(task, 0), call->start_s + task * values, values * sizeof(float));
        std::memcpy(at(task, 0) + values, call->start_z + task * call->features, call->features * sizeof(float));
      }
      for (Int part = 1; part < parts; ++part)
        for (Int i = 0; i < size; ++i) at(task, part)[i] += at(task, part - 1)[i];
    }
  }
  in_parallel(tasks * parts, call->threads, [&](Int i) { walk_of(i / parts, i % parts).run(); });
}

static void walk_forward(const Call *call) {
  const Int tasks = call->rows * call->key_maps, chunks = (call->tokens + call->window - 1) / call->window;
  if (tasks < 1) return;
  Int parts = (call->threads + tasks - 1) / tasks;
  if (parts > chunks / SHORTEST) parts = chunks / SHORTEST;
  if (parts > 1 && call->kind == TERRACE && !call->far_mix) return walk_parts(call, parts);
  walk<FORWARD>(call);
}

static void decode_token(const Step *step, Int t) {
  const Int tasks = step->rows * step->key_maps, shared = step->heads / step->kv_heads;
  const Int kept = step->rows * step->kept * shared, most = tasks + kept;
  if (most < 1) return;
  bool any = false;
  for (Int b = 0; b < step->rows; ++b) any = any || Decoding::due(*step, b);
#pragma omp parallel num_threads((int)(most < step->threads ? most : step->threads))
  {
    Decoding decoding(*step, scratch());
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
      if (!real(b)) continue;
      decoding.look(b, (task - kept) % step->key_maps, t);
      if (step->gated) decoding.keep_gates(b, (task - kept) % step->key_maps, t);
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
void forward(const Call *call) { walk_forward(call); }
void transfer(const Call *call) { walk<TRANSFER>(call); }
void backward(const Call *call) { walk<BACKWARD>(call); }
void decode(const Step *step) {
  for (Int t = 0; t < step->tokens; ++t) decode_token(step, t);
}
void decode_pages(const Step *step, const Pages *pages) {
  Step own = *step;
  const Int count = step->rows * step->parts;
  constexpr Int TENSORS = sizeof(pages->places) / sizeof(Int);
  std::vector<void *> at(TENSORS * count);
  std::vector<Int> counts(pages->seen, pages->seen + step->rows);
  std::vector<Int *> seen(step->rows);
  for (Int b = 0; b < step->rows; ++b) {
    for (Int part = 0; part < step->parts; ++part) {
      char *page = pages->bases[part] + pages->slots[part][b] * pages->size;
      for (Int i = 0; i < TENSORS; ++i) at[i * count + b * step->parts + part] = page + pages->places[i];
    }
    seen[b] = &counts[b];
  }
  void **rows = at.data();
  own.slots_k = rows, own.slots_v = rows + count, own.sink_k = rows + 2 * count, own.sink_v = rows + 3 * count;
  own.far_s = rows + 4 * count, own.far_z = (float **)(rows + 5 * count);
  own.log_forget = (float **)(rows + 6 * count), own.log_input = (float **)(rows + 7 * count);
  own.seen = seen.data();
  decode(&own);
}
}
