// Bytes between processes of one host: counters that can be waited for, copies, and sums of several ranks' memory.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <type_traits>

#include "board.h"
#include "chunks.h"

namespace ds {

constexpr int kMaxRanks = 64;
constexpr int64_t kPiece = 1 << 15;      // elements claimed at a time
constexpr int64_t kCopyPiece = 1 << 18;  // bytes
constexpr int64_t kSpinNs = 50000, kNapNs = 20000;
constexpr int64_t kMoveNs = 10000000;    // how long one waits at most, before looking whether all live
constexpr int64_t kAlone = 1 << 18;      // up to so many bytes one thread is as fast as several

using Sum = void (*)(void* out, void* const* also, int copies, const void* const* in, int ranks, int64_t begin, int64_t end, float factor);

static int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `ready` within so many nanoseconds. After the first few the core is left to whoever is waited for.
template <class Ready>
static bool within(int64_t ns, const Ready& ready) {
  const int64_t begin = now_ns();
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
    const int64_t spent = now_ns() - begin;
    if (spent >= ns) return ready();
    if (spent < kSpinNs) continue;
    const timespec nap{0, kNapNs};
    nanosleep(&nap, nullptr);
  }
}

// Shared by processes, so without FUTEX_PRIVATE_FLAG.
static uint32_t* low_half(std::atomic<uint64_t>& word) { return reinterpret_cast<uint32_t*>(&word); }

static void sleep_on(std::atomic<uint64_t>& word, uint64_t seen, int64_t ns) {
  timespec limit{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  syscall(SYS_futex, low_half(word), FUTEX_WAIT, static_cast<uint32_t>(seen), &limit, nullptr, 0);
}

static bool enter(Entry& entry) {
  if (!(entry.gate.fetch_add(1, std::memory_order_acquire) & kMoving)) return true;
  entry.gate.fetch_sub(1, std::memory_order_relaxed);
  return false;
}

static void wake(std::atomic<uint64_t>& word) { syscall(SYS_futex, low_half(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace ds

#define DS_LOOP "sum_loop.h"
#include "each_set.h"

extern "C" {

DS_EXPORT int64_t ds_shm_board_bytes() { return sizeof(ds::Board); }

DS_EXPORT void ds_shm_publish(ds::Board* mine, uint64_t number, uint32_t tag, uint64_t offset, uint64_t bytes, uint32_t layout) {
  using namespace ds;
  Entry& entry = mine->of(number);
  entry.offset = offset;
  entry.bytes = bytes;
  entry.tag = tag;
  entry.layout = layout;
  entry.gate.store(0, std::memory_order_relaxed);
  entry.cursor.store(0, std::memory_order_relaxed);
  entry.finished.store(0, std::memory_order_relaxed);
  mine->issued.store(number, std::memory_order_seq_cst);
  if (mine->sleepers.load(std::memory_order_seq_cst)) wake(mine->issued);
}

// 0: the rank has issued it. 1: not yet. 2: it has closed and never will.
DS_EXPORT int ds_shm_await(ds::Board* theirs, uint64_t number, int64_t spin_ns, int64_t sleep_ns) {
  using namespace ds;
  const auto there = [&] { return theirs->issued.load(std::memory_order_acquire) >= number; };
  if (within(spin_ns < kSpinNs ? spin_ns : kSpinNs, there)) return 0;
  const int64_t end = now_ns() + sleep_ns;
  theirs->sleepers.fetch_add(1, std::memory_order_seq_cst);
  bool found = false, closed = false;
  for (;;) {
    const uint64_t seen = theirs->issued.load(std::memory_order_seq_cst);
    closed = theirs->closed.load(std::memory_order_acquire) != 0;
    found = seen >= number;
    const int64_t left = end - now_ns();
    if (found || closed || left <= 0) break;
    sleep_on(theirs->issued, seen, left);
  }
  theirs->sleepers.fetch_sub(1, std::memory_order_seq_cst);
  return found || there() ? 0 : closed ? 2 : 1;
}

// 0: the rank has not come to it. 1: it has issued it. 2: it has finished it too.
DS_EXPORT int ds_shm_standing(const ds::Board* theirs, uint64_t number) {
  if (theirs->done.load(std::memory_order_acquire) >= number) return 2;
  return theirs->issued.load(std::memory_order_acquire) >= number;
}

// All ranks have issued it: find where their bytes are, and hold them there until ds_shm_leave. -1: done; -2: one of them
// is being moved, try again; else the first rank whose collective is another one. Only after -1 is anything held.
DS_EXPORT int ds_shm_enter(DsShmCall* call) {
  using namespace ds;
  for (int r = 0; r < call->world; ++r) {
    if (call->boards[r]->of(call->number).tag != call->tag) return r;
  }
  call->shared = 0;
  for (int r = 0; r < call->world; ++r) {
    Entry& entry = call->boards[r]->of(call->number);
    if (r != call->rank && !within(kMoveNs, [&] { return enter(entry); })) {
      for (int held = 0; held < r; ++held) {
        if (held != call->rank) call->boards[held]->of(call->number).gate.fetch_sub(1, std::memory_order_release);
      }
      return -2;
    }
    call->shared += entry.layout == kShared;
    if (r == call->rank) continue;
    const int skipped = entry.layout == kParts && call->rank > r ? 1 : 0;
    call->places[r] = call->segments[r] + entry.offset + call->part_bytes * (call->rank - skipped);
  }
  return -1;
}

// `finished`: what was entered has been read, and the owners of the memory may use it again; else it is let go only.
DS_EXPORT void ds_shm_leave(const DsShmCall* call, int32_t finished) {
  if (finished) call->boards[call->rank]->done.store(call->number, std::memory_order_release);
  for (int r = 0; r < call->world; ++r) {
    if (r != call->rank) call->boards[r]->of(call->number).gate.fetch_sub(1, std::memory_order_release);
  }
}

// The number up to which every rank, this one too, has finished.
DS_EXPORT uint64_t ds_shm_read_by_all(ds::Board* const* boards, int32_t world) {
  uint64_t least = UINT64_MAX;
  for (int r = 0; r < world; ++r) {
    const uint64_t done = boards[r]->done.load(std::memory_order_acquire);
    least = done < least ? done : least;
  }
  return least;
}

DS_EXPORT void ds_shm_close(ds::Board* mine) {
  using namespace ds;
  mine->closed.store(1, std::memory_order_release);
  wake(mine->issued);
}

// Whether every rank has finished this collective, within so many nanoseconds.
DS_EXPORT int ds_shm_await_readers(const DsShmCall* call, uint64_t number, int64_t wait_ns) {
  return ds::within(wait_ns, [&] { return ds_shm_read_by_all(call->boards, call->world) >= number; });
}

// The caller takes its memory back: if not all have read it, copy what it holds to `offset` and point the others there.
// 0: done. 1: a peer reads it now.
DS_EXPORT int ds_shm_withdraw(const DsShmCall* call, uint64_t number, uint64_t offset, int64_t wait_ns) {
  using namespace ds;
  Entry& entry = call->boards[call->rank]->of(number);
  const auto shut = [&] {
    uint32_t nobody = 0;
    return entry.gate.compare_exchange_strong(nobody, kMoving, std::memory_order_acquire);
  };
  if (!within(wait_ns, shut)) return 1;
  if (ds_shm_read_by_all(call->boards, call->world) < number) {
    std::memcpy(call->segments[call->rank] + offset, call->segments[call->rank] + entry.offset, entry.bytes);
    entry.offset = offset;
    if (entry.layout == kShared) entry.layout = kWhole;
  }
  entry.gate.fetch_and(~kMoving, std::memory_order_release);
  return 0;
}

// To one place, or to two while it is in the cache (`also` may be null).
DS_EXPORT void ds_shm_copy(void* to, void* also, const void* from, int64_t bytes, int32_t threads) {
  using namespace ds;
  const auto piece = [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
    if (also) std::memcpy(static_cast<char*>(also) + begin, static_cast<const char*>(from) + begin, end - begin);
  };
  if (!bytes) return;
  if (!also && (bytes <= kAlone || threads < 2)) {
    piece(0, bytes);
  } else {
    over_ranges(bytes, kCopyPiece, bytes <= kAlone ? 1 : threads, piece);
  }
}

// out[begin:end] = factor * the sum of call->places, in rank order.
DS_EXPORT int ds_shm_sum(const DsShmCall* call, void* out, int32_t out_dtype, int32_t in_dtype, int64_t begin, int64_t end, float factor) {
  using namespace ds;
  if (out_dtype < 0 || out_dtype > kFp16 || in_dtype < 0 || in_dtype > kFp16 || call->world > kMaxRanks) return kBadArgument;
  if (!has_isa(call->isa)) return kNoSuchIsa;
  const Sum sum = DS_PICK(call->isa, pick(out_dtype, in_dtype, call->world));
  const auto from = reinterpret_cast<const void* const*>(call->places);
  const int threads = (end - begin) * 4 <= kAlone ? 1 : call->threads;
  over_ranges(end - begin, kPiece, threads, [&](int64_t a, int64_t b) {
    sum(out, nullptr, 0, from, call->world, begin + a, begin + b, factor);
  });
  return kOk;
}

// A large all-reduce in place: each piece is summed by whichever rank comes first, into every rank's memory. -1: every
// piece is there; -2: some rank is still at one; else kBadArgument or kNoSuchIsa. `claimed` counts this rank's pieces.
DS_EXPORT int ds_shm_all_reduce(const DsShmCall* call, int32_t dtype, int64_t numel, int64_t wait_ns, int64_t* claimed) {
  using namespace ds;
  if (dtype < 0 || dtype > kFp16 || call->world > kMaxRanks) return kBadArgument;
  if (!has_isa(call->isa)) return kNoSuchIsa;
  const Sum sum = DS_PICK(call->isa, pick(dtype, dtype, call->world));
  const uint32_t pieces = static_cast<uint32_t>((numel + kPiece - 1) / kPiece);
  Entry& shared = call->boards[0]->of(call->number);
  const auto from = reinterpret_cast<const void* const*>(call->places);
  void* to[kMaxRanks];
  for (int r = 0; r < call->world; ++r) to[r] = const_cast<char*>(call->places[r]);
  const auto work = [&](int64_t) {
    for (;;) {
      const uint32_t piece = shared.cursor.fetch_add(1, std::memory_order_relaxed);
      if (piece >= pieces) return;
      const int64_t begin = piece * kPiece, end = begin + kPiece < numel ? begin + kPiece : numel;
      sum(to[0], to + 1, call->world - 1, from, call->world, begin, end, 1.0f);
      __atomic_fetch_add(claimed, 1, __ATOMIC_RELAXED);
      shared.finished.fetch_add(1, std::memory_order_release);
    }
  };
  over_chunks(call->threads, call->threads, work);
  return within(wait_ns, [&] { return shared.finished.load(std::memory_order_acquire) >= pieces; }) ? -1 : -2;
}

}  // extern "C"
