// What one rank shows the others: how many collectives it has issued and finished, and where the bytes of each are.
//
// [Note: nobody waits for a reader]
// A rank writes its bytes down when it issues a collective, and the others read them when they wait for it. So a wait needs
// of the peers that they have issued the same, never that they are inside a call: there is no thread that makes progress,
// and none is missed. Memory that a caller takes back while a peer has yet to read it is copied first (`withdraw`).
#pragma once
#include <cstdint>
#include <new>

#include "abi.h"

#include <atomic>

namespace ds {

constexpr uint64_t kRing = 1024;  // collectives that a rank may be ahead of the slowest reader, twice over
constexpr uint32_t kMoving = 1u << 31;

// One collective of one rank. `gate` counts the peers that read it now; with kMoving nobody may begin.
struct alignas(64) Entry {
  uint64_t offset;  // of the bytes in the rank's segment
  uint64_t bytes;
  uint32_t tag;     // what ranks must agree on
  uint32_t layout;  // kWhole, kParts, kShared
  std::atomic<uint32_t> gate;
  std::atomic<uint32_t> cursor, finished;  // of rank 0 only: pieces of an all-reduce taken and done
};

enum Layout { kWhole = 0, kParts = 1, kShared = 2 };  // kParts: without the rank's own; kShared: the caller's own memory

// At the start of each rank's segment. Every counter that others watch has a cache line of its own.
struct Board {
  uint8_t name[64];
  alignas(64) std::atomic<uint64_t> issued;
  alignas(64) std::atomic<uint32_t> sleepers;
  alignas(64) std::atomic<uint64_t> done;
  alignas(64) std::atomic<uint32_t> closed;
  alignas(64) Entry ring[kRing];

  Entry& of(uint64_t number) { return ring[number % kRing]; }
};

static_assert(sizeof(std::atomic<uint64_t>) == 8 && std::atomic<uint64_t>::is_always_lock_free, "shared by processes");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the futex is the low half of a counter");

}  // namespace ds

// What Python calls; ds_kernels/shm.py has the same struct, field by field.
extern "C" {

// One collective as this rank sees it. `places[r]`: where rank r's bytes are for this rank, filled in by ds_shm_enter;
// the own place is given.
struct DsShmCall {
  ds::Board* const* boards;
  char* const* segments;
  const char** places;
  uint64_t number;
  int64_t part_bytes;  // of one rank's part where each rank reads another, else 0
  uint32_t tag;
  int32_t world, rank, threads, isa;
  int32_t shared;  // how many ranks show the caller's own memory; from ds_shm_enter
};

DS_EXPORT int64_t ds_shm_board_bytes();
DS_EXPORT void ds_shm_publish(ds::Board* mine, uint64_t number, uint32_t tag, uint64_t offset, uint64_t bytes, uint32_t layout);
DS_EXPORT int ds_shm_await(ds::Board* theirs, uint64_t number, int64_t spin_ns, int64_t sleep_ns);
DS_EXPORT int ds_shm_standing(const ds::Board* theirs, uint64_t number);
DS_EXPORT int ds_shm_enter(DsShmCall* call);
DS_EXPORT void ds_shm_leave(const DsShmCall* call, int32_t finished);
DS_EXPORT uint64_t ds_shm_read_by_all(ds::Board* const* boards, int32_t world);
DS_EXPORT void ds_shm_close(ds::Board* mine);
DS_EXPORT int ds_shm_await_readers(const DsShmCall* call, uint64_t number, int64_t wait_ns);
DS_EXPORT int ds_shm_withdraw(const DsShmCall* call, uint64_t number, uint64_t offset, int64_t wait_ns);
DS_EXPORT void ds_shm_copy(void* to, void* also, const void* from, int64_t bytes, int32_t threads);
DS_EXPORT int ds_shm_sum(const DsShmCall* call, void* out, int32_t out_dtype, int32_t in_dtype, int64_t begin, int64_t end, float factor);
DS_EXPORT int ds_shm_all_reduce(const DsShmCall* call, int32_t dtype, int64_t numel, int64_t wait_ns, int64_t* claimed);

}  // extern "C"
