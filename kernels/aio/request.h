// What is asked for, and how it is cut into blocks for the kernel.
#pragma once
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" {

struct DsAioRequest {
  int64_t id;
  void* data;
  int64_t bytes, offset;
  int32_t direct_fd;    // opened with O_DIRECT, or -1
  int32_t buffered_fd;  // the same file through the page cache
  int32_t op, durable;
  int32_t accepted, reserved;  // set by ds_aio_submit: from then on the answer comes from ds_aio_wait
};

struct DsAioDone {
  int64_t id;
  int64_t got;    // bytes from the start of the request that are there
  int32_t error;  // errno; 0 with fewer bytes than asked for means that the file ended
  int32_t reserved;
};

}  // extern "C"

namespace ds {

enum Op : int32_t { kRead = 0, kWrite = 1, kSync = 2 };
enum Way : int32_t { kBuffered = 0, kDirect = 1, kFlush = 2 };

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A run of bytes of one request that goes one way. `after_all`: starts when nothing of the request is under way.
struct Segment {
  int64_t begin, end;
  Way way;
  bool after_all;
};

// [Note: edges go through the page cache]
// O_DIRECT wants memory, offset and length aligned. What lies before the first aligned byte of the file and after the
// last one goes through the buffered descriptor: the kernel merges it with its neighbours, where reading a whole block,
// changing it and writing it back would lose what another writer put next to ours. A write's edges wait for its body,
// so that the kernel never drops a cached page for the one while the other makes it dirty.
struct Request {
  DsAioRequest ask;
  Segment segments[4];
  int count = 0, at = 0;  // segments, and the one that is being cut
  int64_t next = 0;       // first byte of it that was not handed over
  int under_way = 0;      // blocks
  bool started = false, failed = false, queued = false;
  int error = 0;
  int64_t fail_at = 0;
  Request *previous = nullptr, *following = nullptr;  // in the queue, or in the list of finished ones

  Request(const DsAioRequest& asked, int64_t align) : ask(asked) {
    const int64_t end = ask.bytes;
    if (ask.op == kSync) {
      add({0, 0, kFlush, false});
      return;
    }
    const bool write = ask.op == kWrite;
    const int64_t head = ask.direct_fd < 0 ? end : smaller(end, (align - ask.offset % align) % align);
    const int64_t tail = end - (end - head) % align;
    if (write) {
      add({head, tail, kDirect, false});
      add({0, head, kBuffered, true});
    } else {
      add({0, head, kBuffered, false});
      add({head, tail, kDirect, false});
    }
    add({tail, end, kBuffered, write && head == 0});
    if (write && ask.durable) add({end, end, kFlush, true});
  }

  void add(Segment segment) {
    if (segment.begin == segment.end && segment.way != kFlush) return;
    if (count == 0) next = segment.begin;
    segments[count++] = segment;
  }

  // Can a block be cut now?
  bool ready() const { return !failed && at < count && !(segments[at].after_all && under_way > 0); }

  bool over() const { return under_way == 0 && (failed || at == count); }

  void fail(int64_t position, int code) {
    if (failed && position >= fail_at) return;
    failed = true;
    error = code;
    fail_at = position;
  }

  // Bytes from the start without a gap: up to the first failure and the first byte never handed over.
  int64_t got() const {
    int64_t first = failed ? fail_at : ask.bytes;
    for (int i = at; i < count; ++i) first = smaller(first, i == at ? next : segments[i].begin);
    return first;
  }
};

// One block of a request: what the kernel works on at a time.
struct Block {
  Request* request;
  Way way;
  bool plain;        // by a plain system call from here on: the engine cannot do it
  int32_t fd;
  char *user, *memory;  // the caller's bytes, and what the kernel reads or fills
  int64_t position, bytes, done;

  int64_t offset() const { return request->ask.offset + position + done; }
  int64_t left() const { return bytes - done; }
  char* here() const { return memory + done; }
  Op op() const { return static_cast<Op>(request->ask.op); }
};

// The next block of a request that is ready.
inline void cut(Request& request, Block& block, int64_t block_bytes) {
  Segment& segment = request.segments[request.at];
  const int64_t begin = request.next, bytes = smaller(block_bytes, segment.end - begin);
  segment.after_all = false;
  block.request = &request;
  block.way = segment.way;
  block.plain = false;
  block.fd = segment.way == kDirect ? request.ask.direct_fd : request.ask.buffered_fd;
  block.user = block.memory = static_cast<char*>(request.ask.data) + begin;
  block.position = begin;
  block.bytes = bytes;
  block.done = 0;
  request.next += bytes;
  request.started = true;
  ++request.under_way;
  if (request.next == segment.end && ++request.at < request.count) request.next = request.segments[request.at].begin;
}

// One plain system call for what is left of a block, through the page cache: result or -errno.
inline int64_t plain_call(Block& block, int fd) {
  ssize_t result;
  if (block.way == kFlush) {
    result = block.op() == kSync ? fsync(fd) : fdatasync(fd);
  } else if (block.op() == kWrite) {
    result = pwrite(fd, block.here(), static_cast<size_t>(block.left()), block.offset());
  } else {
    result = pread(fd, block.here(), static_cast<size_t>(block.left()), block.offset());
  }
  return result < 0 ? -errno : result;
}

}  // namespace ds
