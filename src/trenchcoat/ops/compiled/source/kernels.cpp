// Attention with a softmax window and linear attention over everything older, on CPUs: entry points.
// What is computed is defined in ops/reference.py; the arithmetic of a backward pass is explained in ops/chunked/.
#include "walk.h"

template <Pass pass> static void walk(const Call *call) {
  const Int tasks = call->rows * call->key_maps;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)call->threads)
  for (Int task = 0; task < tasks; ++task) {
    static thread_local Scratch scratch;
    Walk<pass>(*call, scratch, task / call->key_maps, task % call->key_maps).run();
  }
}

extern "C" {
Int call_bytes() { return (Int)sizeof(Call); }
void forward(const Call *call) { walk<FORWARD>(call); }
void transfer(const Call *call) { walk<TRANSFER>(call); }
void backward(const Call *call) { walk<BACKWARD>(call); }
}
