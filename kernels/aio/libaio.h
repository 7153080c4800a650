// Linux native asynchronous I/O by its system calls: what the libaio library wraps.
#pragma once
#include "engine.h"

#if defined(__linux__) && __has_include(<linux/aio_abi.h>)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#endif

#if defined(__NR_io_setup) && defined(IOCB_FLAG_RESFD)

namespace ds {

class Libaio final : public Engine {
 public:
  ~Libaio() override {
    if (context_) syscall(__NR_io_destroy, context_);
    std::free(calls_);
    std::free(pointers_);
    std::free(events_);
    std::free(refused_);
  }

  int open(int depth) override {
    depth_ = static_cast<size_t>(depth);
    calls_ = static_cast<iocb*>(std::calloc(depth_, sizeof(iocb)));
    pointers_ = static_cast<iocb**>(std::calloc(depth_, sizeof(iocb*)));
    events_ = static_cast<io_event*>(std::calloc(depth_, sizeof(io_event)));
    refused_ = static_cast<Finished*>(std::calloc(depth_, sizeof(Finished)));
    if (!calls_ || !pointers_ || !events_ || !refused_) return ENOMEM;
    for (size_t i = 0; i < depth_; ++i) pointers_[i] = &calls_[i];
    if (const int error = event_.open()) return error;
    return syscall(__NR_io_setup, depth, &context_) < 0 ? errno : 0;
  }

  // The kernel copies the call when it takes it, so calls are free again after `submit`.
  void start(Block& block) override {
    iocb& call = calls_[prepared_++];
    std::memset(&call, 0, sizeof call);
    call.aio_data = reinterpret_cast<uintptr_t>(&block);
    call.aio_fildes = static_cast<uint32_t>(block.fd);
    call.aio_flags = IOCB_FLAG_RESFD;
    call.aio_resfd = static_cast<uint32_t>(event_.fd());
    if (block.way == kFlush) {
      call.aio_lio_opcode = block.op() == kSync ? IOCB_CMD_FSYNC : IOCB_CMD_FDSYNC;
      return;
    }
    call.aio_lio_opcode = block.op() == kWrite ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
    call.aio_buf = reinterpret_cast<uintptr_t>(block.here());
    call.aio_nbytes = static_cast<uint64_t>(block.left());
    call.aio_offset = block.offset();
  }

  int turn(Finished* out, int max) override {
    submit();
    int count = 0;
    while (refused_count_ && count < max) out[count++] = refused_[--refused_count_];
    if (count) return count;
    count = reap(out, max);
    if (count || !under_way_) return count;
    event_.clear();  // each completion rings, and so does `wake`
    return reap(out, max);
  }

  void wake() override { event_.ring(); }

 private:
  void submit() {
    size_t sent = 0;
    while (sent < prepared_) {
      const long took = syscall(__NR_io_submit, context_, prepared_ - sent, pointers_ + sent);
      if (took > 0) {
        sent += static_cast<size_t>(took);
        under_way_ += static_cast<size_t>(took);
      } else if (took < 0 && errno != EINTR) {
        // The first of them cannot be had; EAGAIN, too, is answered with a plain call (driver.h).
        refused_[refused_count_++] = {reinterpret_cast<Block*>(static_cast<uintptr_t>(calls_[sent].aio_data)), -errno};
        ++sent;
      }
    }
    prepared_ = 0;
  }

  int reap(Finished* out, int max) {
    timespec now{};
    const long limit = smaller(max, static_cast<int64_t>(depth_));
    const long count = syscall(__NR_io_getevents, context_, 0L, limit, events_, &now);
    for (long i = 0; i < count; ++i) {
      out[i] = {reinterpret_cast<Block*>(static_cast<uintptr_t>(events_[i].data)), events_[i].res};
    }
    if (count <= 0) return 0;
    under_way_ -= static_cast<size_t>(count);
    return static_cast<int>(count);
  }

  aio_context_t context_ = 0;
  Event event_;
  size_t depth_ = 0, prepared_ = 0, under_way_ = 0;
  int refused_count_ = 0;
  iocb* calls_ = nullptr;
  iocb** pointers_ = nullptr;
  io_event* events_ = nullptr;
  Finished* refused_ = nullptr;
};

}  // namespace ds

#else
#define DS_NO_LIBAIO 1
#endif
