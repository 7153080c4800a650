// io_uring by its three system calls (Linux 5.6).
#pragma once
#include "engine.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#endif

#if defined(IORING_FEAT_RW_CUR_POS) && defined(__NR_io_uring_setup)

namespace ds {

class Uring final : public Engine {
 public:
  ~Uring() override {
    if (sqes_) munmap(sqes_, sqes_bytes_);
    if (ring_) munmap(ring_, ring_bytes_);
    if (fd_ >= 0) close(fd_);
  }

  int open(int depth) override {
    io_uring_params p;
    std::memset(&p, 0, sizeof p);
    p.flags = IORING_SETUP_CLAMP;
    // One entry more than blocks, for the poll that wakes us.
    fd_ = static_cast<int>(syscall(__NR_io_uring_setup, depth + 1, &p));
    if (fd_ < 0) return errno;
    if (!(p.features & IORING_FEAT_SINGLE_MMAP) || !(p.features & IORING_FEAT_RW_CUR_POS)) return ENOSYS;
    if (p.sq_entries < static_cast<unsigned>(depth) + 1) return EINVAL;
    const size_t sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    const size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe);
    ring_bytes_ = sq > cq ? sq : cq;
    sqes_bytes_ = p.sq_entries * sizeof(io_uring_sqe);
    void* ring = map(ring_bytes_, IORING_OFF_SQ_RING);
    void* sqes = map(sqes_bytes_, IORING_OFF_SQES);
    ring_ = ring == MAP_FAILED ? nullptr : static_cast<char*>(ring);
    sqes_ = sqes == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(sqes);
    if (!ring_ || !sqes_) return ENOMEM;
    sq_tail_ = at(p.sq_off.tail);
    sq_array_ = at(p.sq_off.array);
    sq_mask_ = *at(p.sq_off.ring_mask);
    cq_head_ = at(p.cq_off.head);
    cq_tail_ = at(p.cq_off.tail);
    cq_mask_ = *at(p.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(ring_ + p.cq_off.cqes);
    if (const int error = event_.open()) return error;
    listen();
    return enter(0) ? errno : 0;  // a seccomp filter may allow the set-up and not this
  }

  void start(Block& block) override {
    io_uring_sqe& e = next();
    e.user_data = reinterpret_cast<uintptr_t>(&block);
    e.fd = block.fd;
    if (block.way == kFlush) {
      e.opcode = IORING_OP_FSYNC;
      e.fsync_flags = block.op() == kSync ? 0 : IORING_FSYNC_DATASYNC;
      return;
    }
    e.opcode = block.op() == kWrite ? IORING_OP_WRITE : IORING_OP_READ;
    e.addr = reinterpret_cast<uintptr_t>(block.here());
    e.len = static_cast<unsigned>(block.left());
    e.off = static_cast<uint64_t>(block.offset());
  }

  int turn(Finished* out, int max) override {
    const bool some = *cq_head_ != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
    if (unsubmitted_ || !some) {
      const int failed = enter(some ? 0 : 1);
      if (failed && errno != EINTR) usleep(1000);  // EAGAIN, EBUSY: the kernel is short of memory
    }
    unsigned head = *cq_head_;
    const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
    int count = 0;
    for (; head != tail && count < max; ++head) {
      const io_uring_cqe& e = cqes_[head & cq_mask_];
      if (e.user_data) {
        out[count++] = {reinterpret_cast<Block*>(static_cast<uintptr_t>(e.user_data)), e.res};
      } else {
        event_.clear();
        listen();
      }
    }
    __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    return count;
  }

  void wake() override { event_.ring(); }

 private:
  void* map(size_t bytes, uint64_t what) const {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, static_cast<off_t>(what));
  }

  unsigned* at(unsigned offset) const { return reinterpret_cast<unsigned*>(ring_ + offset); }

  // There is always room: a block has at most one entry, and so has the poll.
  io_uring_sqe& next() {
    const unsigned tail = *sq_tail_, index = tail & sq_mask_;
    std::memset(&sqes_[index], 0, sizeof sqes_[index]);
    sq_array_[index] = index;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++unsubmitted_;
    return sqes_[index];
  }

  // The next `wake` ends a wait.
  void listen() {
    io_uring_sqe& e = next();
    e.opcode = IORING_OP_POLL_ADD;
    e.fd = event_.fd();
    e.poll_events = POLLIN;
  }

  // Hand over what is prepared and wait for `least` to finish: 0, or -1 with errno.
  int enter(unsigned least) {
    const long sent = syscall(__NR_io_uring_enter, fd_, unsubmitted_, least, least ? IORING_ENTER_GETEVENTS : 0, nullptr, 0);
    if (sent < 0) return -1;
    unsubmitted_ -= static_cast<unsigned>(sent);
    return 0;
  }

  int fd_ = -1;
  Event event_;
  char* ring_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  io_uring_cqe* cqes_ = nullptr;
  size_t ring_bytes_ = 0, sqes_bytes_ = 0;
  unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0, unsubmitted_ = 0;
};

}  // namespace ds

#else
#define DS_NO_URING 1
#endif
