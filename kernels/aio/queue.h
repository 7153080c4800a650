// The requests of one AsyncIO: those waiting to be cut into blocks, those under way, those finished.
#pragma once
#include <initializer_list>

#include "lock.h"
#include "request.h"

namespace ds {

// Someone who may be asleep with blocks under way and wants to hear of new requests.
class Sleeper {
 public:
  virtual void wake() = 0;

 protected:
  ~Sleeper() = default;
};

class List {
 public:
  Request* first = nullptr;
  Request* last = nullptr;

  void push_back(Request* r) {
    r->previous = last, r->following = nullptr;
    (last ? last->following : first) = r;
    last = r;
  }
  void push_front(Request* r) {
    r->previous = nullptr, r->following = first;
    (first ? first->previous : last) = r;
    first = r;
  }
  void remove(Request* r) {
    (r->previous ? r->previous->following : first) = r->following;
    (r->following ? r->following->previous : last) = r->previous;
  }
};

class Queue {
 public:
  Queue(int64_t block_bytes, int64_t limit_bytes) : block_bytes_(block_bytes), limit_bytes_(limit_bytes) {}

  ~Queue() {
    for (List* list : {&waiting_, &finished_}) {
      while (Request* request = list->first) list->remove(request), drop(request);
    }
  }

  // Give the request over: 0, EAGAIN (too many bytes are accepted already, and the time is up), or ESHUTDOWN.
  int submit(Request* request, int timeout_ms) {
    const Deadline deadline(timeout_ms);
    Hold hold(mutex_);
    const int64_t bytes = request->ask.bytes;
    while (!stopping_ && open_bytes_ > 0 && open_bytes_ + bytes > limit_bytes_) {
      if (!space_.wait(mutex_, deadline)) return EAGAIN;
    }
    if (stopping_) return ESHUTDOWN;
    open_bytes_ += bytes;
    ++open_;
    if (request->over()) {
      finish(request);
      return 0;
    }
    const bool many = request->ask.bytes > block_bytes_;
    enqueue(request, false);
    if (idle_ > 0) {
      many ? work_.all() : work_.one();
    } else if (!rung_) {  // who was rung for and has not come yet will see this request, too
      rung_ = true;
      for (int i = 0; i < sleepers_count_; ++i) sleepers_[i]->wake();
    }
    return 0;
  }

  // Take a request back; true if no block of it was handed over.
  bool cancel(int64_t id) {
    Hold hold(mutex_);
    for (Request* r = waiting_.first; r; r = r->following) {
      if (r->ask.id != id) continue;
      if (r->started) return false;
      dequeue(r);
      close(r);
      drop(r);
      return true;
    }
    return false;
  }

  // Take no more; with `dropping`, hand over no further block either.
  void stop(bool dropping) {
    Hold hold(mutex_);
    stopping_ = true;
    if (dropping) {
      dropping_ = true;
      while (Request* r = waiting_.first) {
        dequeue(r);
        r->fail(r->next, ECANCELED);
        if (r->over()) finish(r);
      }
    }
    work_.all();
    space_.all();
    done_.all();
  }

  // Up to `max` finished requests, waiting for one; 0: the time is up; -1: stopped, and there will be no more.
  int wait(DsAioDone* out, int max, int timeout_ms) {
    const Deadline deadline(timeout_ms);
    Hold hold(mutex_);
    while (!finished_.first) {
      if (stopping_ && open_ == 0) return -1;
      if (!done_.wait(mutex_, deadline)) return 0;
    }
    int count = 0;
    for (Request* r; count < max && (r = finished_.first); ++count) {
      out[count] = {r->ask.id, r->got(), r->error, 0};
      finished_.remove(r);
      drop(r);
    }
    return count;
  }

  // -- for the threads that do the work --

  // Fill up to `wanted` blocks.
  int take(Block** blocks, int wanted) {
    Hold hold(mutex_);
    rung_ = false;
    int count = 0;
    for (Request* r; count < wanted && (r = waiting_.first);) {
      cut(*r, *blocks[count++], block_bytes_);
      if (!r->ready()) dequeue(r);
    }
    return count;
  }

  // A block is done, or has failed at its byte `done` (with error 0: the file ended there).
  void settle(Block& block, bool failed, int error) {
    Hold hold(mutex_);
    Request* r = block.request;
    --r->under_way;
    if (failed) r->fail(block.position + block.done, error);
    if (dropping_ && r->at < r->count) r->fail(r->next, ECANCELED);
    if (r->failed && r->queued) dequeue(r);
    if (r->over()) return finish(r);
    if (r->ready() && !r->queued) enqueue(r, true), work_.one();
  }

  // Sleep until there is something to take; false when there never will be.
  bool sleep() {
    Hold hold(mutex_);
    ++idle_;
    while (!waiting_.first && !(stopping_ && open_ == 0)) work_.wait(mutex_, Deadline(-1));
    --idle_;
    return waiting_.first != nullptr;
  }

  void listen(Sleeper** sleepers, int count) {
    sleepers_ = sleepers;
    sleepers_count_ = count;
  }

 private:
  static void drop(Request* request) {
    request->~Request();
    std::free(request);
  }

  void enqueue(Request* request, bool in_front) {
    in_front ? waiting_.push_front(request) : waiting_.push_back(request);
    request->queued = true;
  }

  void dequeue(Request* request) {
    waiting_.remove(request);
    request->queued = false;
  }

  // The request counts no longer against the limit.
  void close(Request* request) {
    open_bytes_ -= request->ask.bytes;
    --open_;
    space_.all();
    if (stopping_ && open_ == 0) work_.all(), done_.all();
  }

  void finish(Request* request) {
    finished_.push_back(request);
    close(request);
    done_.one();
  }

  const int64_t block_bytes_, limit_bytes_;
  Mutex mutex_;
  Condition work_, space_, done_;
  List waiting_, finished_;
  int64_t open_bytes_ = 0, open_ = 0;  // accepted and not finished
  int idle_ = 0;
  bool stopping_ = false, dropping_ = false, rung_ = false;
  Sleeper** sleepers_ = nullptr;
  int sleepers_count_ = 0;
};

}  // namespace ds
