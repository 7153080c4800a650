// Mutex and condition on pthread: std::thread and its friends end the process when the system has none to give.
#pragma once
#include <pthread.h>
#include <time.h>

namespace ds {

class Mutex {
 public:
  Mutex() { pthread_mutex_init(&mutex_, nullptr); }
  ~Mutex() { pthread_mutex_destroy(&mutex_); }
  Mutex(const Mutex&) = delete;
  pthread_mutex_t mutex_;
};

class Hold {
 public:
  explicit Hold(Mutex& mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_.mutex_); }
  ~Hold() { pthread_mutex_unlock(&mutex_.mutex_); }
  Hold(const Hold&) = delete;

 private:
  Mutex& mutex_;
};

// A moment on the clock that nobody sets.
class Deadline {
 public:
  explicit Deadline(int milliseconds) : never_(milliseconds < 0) {
    clock_gettime(CLOCK_MONOTONIC, &time_);
    if (never_) return;
    time_.tv_sec += milliseconds / 1000;
    time_.tv_nsec += (milliseconds % 1000) * 1000000L;
    if (time_.tv_nsec >= 1000000000L) ++time_.tv_sec, time_.tv_nsec -= 1000000000L;
  }
  bool never_;
  timespec time_;
};

class Condition {
 public:
  Condition() {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&condition_, &attributes);
    pthread_condattr_destroy(&attributes);
  }
  ~Condition() { pthread_cond_destroy(&condition_); }
  Condition(const Condition&) = delete;

  // False when the time is up.
  bool wait(Mutex& mutex, const Deadline& deadline) {
    if (deadline.never_) return pthread_cond_wait(&condition_, &mutex.mutex_) == 0;
    return pthread_cond_timedwait(&condition_, &mutex.mutex_, &deadline.time_) == 0;
  }
  void one() { pthread_cond_signal(&condition_); }
  void all() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_;
};

}  // namespace ds
