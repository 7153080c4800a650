// What the three engines have in common, and the one that is plain system calls.
#pragma once
#include <sys/eventfd.h>

#include "queue.h"

namespace ds {

enum EngineKind { kUring = 0, kLibaio = 1, kThreads = 2 };

struct Finished {
  Block* block;
  int64_t result;  // bytes, or -errno
};

// Used by one thread, but for `wake`.
class Engine : public Sleeper {
 public:
  virtual ~Engine() = default;
  virtual int open(int depth) = 0;  // 0 or errno
  // Begin with what is left of a block; at the latest at the next `turn`.
  virtual void start(Block& block) = 0;
  // What has finished; waits for one, or for a `wake`.
  virtual int turn(Finished* out, int max) = 0;
};

// One block at a time, at once.
class PlainEngine final : public Engine {
 public:
  int open(int) override { return 0; }
  void start(Block& block) override { finished_ = {&block, plain_call(block, block.fd)}; }
  int turn(Finished* out, int) override {
    out[0] = finished_;
    return 1;
  }
  void wake() override {}

 private:
  Finished finished_{};
};

// A counter to sleep on.
class Event {
 public:
  ~Event() {
    if (fd_ >= 0) close(fd_);
  }
  int open() {
    fd_ = eventfd(0, EFD_CLOEXEC);
    return fd_ < 0 ? errno : 0;
  }
  int fd() const { return fd_; }
  void ring() const {
    const uint64_t one = 1;
    while (write(fd_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }
  // Back to zero; waits while it is zero.
  void clear() const {
    uint64_t count;
    while (read(fd_, &count, sizeof count) < 0 && errno == EINTR) {
    }
  }

 private:
  int fd_ = -1;
};

}  // namespace ds
