// One thread that takes blocks from the queue, gives them to its engine, and sees them through.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include "engine.h"

namespace ds {

class Driver {
 public:
  Driver(Queue& queue, Engine* engine, int depth, int64_t block_bytes, int64_t align)
      : queue_(queue), engine_(engine), depth_(depth), block_bytes_(block_bytes), align_(align) {}

  ~Driver() {
    std::free(bounce_);
    std::free(blocks_);
    std::free(free_);
    std::free(finished_);
  }
  Driver(const Driver&) = delete;

  // Memory and the engine: 0 or errno.
  int prepare() {
    const size_t depth = static_cast<size_t>(depth_);
    blocks_ = static_cast<Block*>(std::calloc(depth, sizeof(Block)));
    free_ = static_cast<Block**>(std::calloc(depth, sizeof(Block*)));
    finished_ = static_cast<Finished*>(std::calloc(depth, sizeof(Finished)));
    if (!engine_ || !blocks_ || !free_ || !finished_) return ENOMEM;
    for (int i = 0; i < depth_; ++i) free_[i] = &blocks_[i];
    free_count_ = depth_;
    return engine_->open(depth_);
  }

  // Signals are for the threads that were there before.
  int launch() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int error = pthread_create(&thread_, nullptr, [](void* self) -> void* {
      static_cast<Driver*>(self)->run();
      return nullptr;
    }, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    running_ = error == 0;
    return error;
  }

  void join() {
    if (running_) pthread_join(thread_, nullptr);
    running_ = false;
  }

 private:
  void run() {
    for (;;) {
      const int taken = queue_.take(free_, free_count_);
      for (int i = 0; i < taken; ++i) begin(*free_[i]);
      free_count_ -= taken;
      std::memmove(free_, free_ + taken, static_cast<size_t>(free_count_) * sizeof(Block*));
      if (free_count_ == depth_) {
        if (!queue_.sleep()) return;
        continue;
      }
      const int count = engine_->turn(finished_, depth_);
      for (int i = 0; i < count; ++i) advance(*finished_[i].block, finished_[i].result);
    }
  }

  // Memory that O_DIRECT takes: the caller's, or a copy; without memory for that, the page cache.
  void begin(Block& block) {
    const bool fits = reinterpret_cast<uintptr_t>(block.user) % static_cast<uintptr_t>(align_) == 0;
    if (block.way == kDirect && !fits) {
      if (char* bounce = bounce_of(block)) {
        block.memory = bounce;
        if (block.op() == kWrite) std::memcpy(bounce, block.user, static_cast<size_t>(block.bytes));
      } else {
        block.fd = block.request->ask.buffered_fd;
      }
    }
    engine_->start(block);
  }

  // The slot's part of memory that is there from its first use on, in large pages: a device is given fewer pieces.
  char* bounce_of(const Block& block) {
    constexpr size_t kLargePage = 2 << 20;
    if (!bounce_) {
      const size_t wanted = static_cast<size_t>(depth_) * static_cast<size_t>(block_bytes_);
      const size_t size = (wanted + kLargePage - 1) / kLargePage * kLargePage;
      bounce_ = static_cast<char*>(std::aligned_alloc(kLargePage, size));
#if defined(MADV_HUGEPAGE)
      if (bounce_) madvise(bounce_, size, MADV_HUGEPAGE);
#endif
    }
    return bounce_ ? bounce_ + (&block - blocks_) * block_bytes_ : nullptr;
  }

  // A block came back with `result`: go on with it, or let it go.
  void advance(Block& block, int64_t result) {
    int error = 0;
    bool failed = false;
    while (!over(block, result, failed, error)) {
      if (!block.plain) return engine_->start(block);
      result = plain_call(block, block.request->ask.buffered_fd);
    }
    if (block.memory != block.user && block.op() == kRead) {
      std::memcpy(block.user, block.memory, static_cast<size_t>(block.done));
    }
    queue_.settle(block, failed, error);
    free_[free_count_++] = &block;
  }

  bool over(Block& block, int64_t result, bool& failed, int& error) const {
    if (result == -EINTR) return false;
    if (result < 0) {
      // Devices without asynchronous calls, file systems with a coarser O_DIRECT, no resources at the moment.
      const bool refused = result == -EINVAL || result == -EOPNOTSUPP || result == -EAGAIN || result == -ENOSYS;
      if (refused && !block.plain) {
        block.plain = true;
        return false;
      }
      failed = true;
      error = static_cast<int>(-result);
      return true;
    }
    block.done += result;
    if (block.left() == 0) return true;
    if (result == 0) {  // a read's file has ended; a write that gets nowhere is an error
      failed = true;
      error = block.op() == kRead ? 0 : EIO;
      return true;
    }
    return false;  // from an unaligned place O_DIRECT is refused, and a plain call does the rest
  }

  Queue& queue_;
  Engine* engine_;
  const int depth_;
  const int64_t block_bytes_, align_;
  char* bounce_ = nullptr;
  Block* blocks_ = nullptr;
  Block** free_ = nullptr;
  Finished* finished_ = nullptr;
  int free_count_ = 0;
  pthread_t thread_{};
  bool running_ = false;
};

}  // namespace ds
