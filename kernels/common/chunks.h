// Runs numbered pieces of work over threads: each thread owns a run of them and helps the others when done.
//
// Memory so stays with the thread that first touched it, and a core taken away by another process holds nobody up.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace ds {

struct alignas(64) Cursor {
  std::atomic<int64_t> next;
  int64_t end;
};

// `run(chunk)` for every chunk in [0, chunks), on at most `threads` threads; on one when there is nothing to share.
template <class Run>
static void over_chunks(int64_t chunks, int threads, const Run& run) {
  if (threads > chunks) threads = static_cast<int>(chunks);
  Cursor* cursors = threads > 1 ? static_cast<Cursor*>(std::aligned_alloc(64, sizeof(Cursor) * threads)) : nullptr;
  if (!cursors) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
    return;
  }
  for (int t = 0; t < threads; ++t) {
    new (&cursors[t].next) std::atomic<int64_t>(chunks * t / threads);
    cursors[t].end = chunks * (t + 1) / threads;
  }
#pragma omp parallel num_threads(threads)
  {
    const int self = omp_get_thread_num();
    for (int k = 0; k < threads; ++k) {
      Cursor& cursor = cursors[(self + k) % threads];
      for (int64_t chunk; (chunk = cursor.next.fetch_add(1, std::memory_order_relaxed)) < cursor.end;) run(chunk);
    }
  }
  std::free(cursors);
}

// Pieces of `size` elements of [0, numel): `run(begin, end)`.
template <class Run>
static void over_ranges(int64_t numel, int64_t size, int threads, const Run& run) {
  over_chunks((numel + size - 1) / size, threads, [&](int64_t chunk) {
    const int64_t begin = chunk * size;
    run(begin, begin + size < numel ? begin + size : numel);
  });
}

}  // namespace ds
