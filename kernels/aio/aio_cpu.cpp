// Asynchronous reads and writes of files: plain C ABI, no torch and no Python header.
#include <fcntl.h>
#include <sys/stat.h>

#include <new>

#include "driver.h"
#include "libaio.h"
#include "uring.h"

namespace ds {

template <class T, class... Arguments>
T* make(Arguments&&... arguments) {
  void* memory = std::malloc(sizeof(T));
  return memory ? new (memory) T(static_cast<Arguments&&>(arguments)...) : nullptr;
}

template <class T>
void unmake(T* object) {
  if (!object) return;
  object->~T();
  std::free(object);
}

// Null: no memory. A kind that was not compiled in is caught by `known`.
Engine* make_engine(int kind) {
#ifndef DS_NO_URING
  if (kind == kUring) return make<Uring>();
#endif
#ifndef DS_NO_LIBAIO
  if (kind == kLibaio) return make<Libaio>();
#endif
  return make<PlainEngine>();
}

bool known(int kind) {
#ifdef DS_NO_URING
  if (kind == kUring) return false;
#endif
#ifdef DS_NO_LIBAIO
  if (kind == kLibaio) return false;
#endif
  return kind >= kUring && kind <= kThreads;
}

// Whole pages: what lies in one page with other people's bytes is never handed to the device, so that neither a fork
// nor a neighbour's write can tear it.
int64_t alignment() {
  const int64_t page = sysconf(_SC_PAGESIZE);
  return page < 4096 ? 4096 : page;
}

}  // namespace ds

extern "C" {

struct DsAioConfig {
  int64_t block_bytes, limit_bytes;
  int32_t engine, threads, depth, reserved;  // depth: blocks under way per thread
};

struct DsAio {
  DsAio(const DsAioConfig& config) : queue(config.block_bytes, config.limit_bytes) {}

  ~DsAio() {
    for (int i = 0; i < count; ++i) ds::unmake(drivers[i]), ds::unmake(engines[i]);
  }

  ds::Queue queue;
  static constexpr int kMost = 256;
  ds::Engine* engines[kMost];
  ds::Sleeper* sleepers[kMost];
  ds::Driver* drivers[kMost];
  int count = 0;
};

#define DS_EXPORT __attribute__((visibility("default")))

DS_EXPORT int ds_aio_abi() { return 1; }

DS_EXPORT int64_t ds_aio_align() { return ds::alignment(); }

// Can this engine be had here? 0 or errno.
DS_EXPORT int ds_aio_probe(int engine) {
  if (!ds::known(engine)) return ENOSYS;
  ds::Engine* tried = ds::make_engine(engine);
  const int error = tried ? tried->open(1) : ENOMEM;
  ds::unmake(tried);
  return error;
}

// Ask for the requests still waiting to be dropped (`drop`) or done, and take no more.
DS_EXPORT void ds_aio_stop(DsAio* aio, int drop) { aio->queue.stop(drop != 0); }

// After `ds_aio_stop`: wait for the threads, and let the kernel's resources go. The handle stays valid.
DS_EXPORT void ds_aio_join(DsAio* aio) {
  for (int i = 0; i < aio->count; ++i) aio->drivers[i]->join();
  for (int i = 0; i < aio->count; ++i) ds::unmake(aio->drivers[i]), ds::unmake(aio->engines[i]);
  aio->count = 0;
}

// After `ds_aio_join`.
DS_EXPORT void ds_aio_free(DsAio* aio) { ds::unmake(aio); }

// A handle in `out`: 0 or errno.
DS_EXPORT int ds_aio_open(const DsAioConfig* config, DsAio** out) {
  const bool sane = config->block_bytes > 0 && config->block_bytes % ds::alignment() == 0 && config->depth > 0;
  if (!sane || config->threads < 1 || config->threads > DsAio::kMost) return EINVAL;
  if (!ds::known(config->engine)) return ENOSYS;
  DsAio* aio = ds::make<DsAio>(*config);
  if (!aio) return ENOMEM;
  int error = 0;
  while (!error && aio->count < config->threads) {
    ds::Engine* engine = ds::make_engine(config->engine);
    ds::Driver* driver = ds::make<ds::Driver>(aio->queue, engine, config->depth, config->block_bytes, ds::alignment());
    if (!driver) {
      ds::unmake(engine);
      error = ENOMEM;
      break;
    }
    aio->engines[aio->count] = engine;
    aio->sleepers[aio->count] = engine;
    aio->drivers[aio->count++] = driver;
    error = driver->prepare();
  }
  aio->queue.listen(aio->sleepers, aio->count);
  for (int i = 0; !error && i < aio->count; ++i) error = aio->drivers[i]->launch();
  if (error) {
    aio->queue.stop(true);
    ds_aio_join(aio);
    ds_aio_free(aio);
    return error;
  }
  *out = aio;
  return 0;
}

// 0, EAGAIN (over the limit of bytes for `timeout_ms`), ESHUTDOWN or ENOMEM; what the file says comes from `ds_aio_wait`.
DS_EXPORT int ds_aio_submit(DsAio* aio, DsAioRequest* ask, int timeout_ms) {
  ds::Request* request = ds::make<ds::Request>(*ask, ds::alignment());
  if (!request) return ENOMEM;
  const int error = aio->queue.submit(request, timeout_ms);
  if (error) ds::unmake(request);
  ask->accepted = error == 0;
  return error;
}

// Allocate the disk space of a write that makes its file longer by `least` or more: 0 or errno. Without it, a file system
// that finds space block by block makes asynchronous writes wait for each other.
DS_EXPORT int ds_aio_reserve(int fd, int64_t offset, int64_t bytes, int64_t least) {
#if defined(__linux__)
  struct stat found;
  if (fstat(fd, &found) || !S_ISREG(found.st_mode) || offset + bytes - found.st_size < least) return 0;
  while (fallocate(fd, 0, offset, bytes)) {
    if (errno == EINTR) continue;
    return errno == ENOSPC || errno == EDQUOT || errno == EFBIG ? errno : 0;  // others: not this file system
  }
#endif
  return 0;
}

DS_EXPORT int ds_aio_cancel(DsAio* aio, int64_t id) { return aio->queue.cancel(id); }

DS_EXPORT int ds_aio_wait(DsAio* aio, DsAioDone* out, int max, int timeout_ms) {
  return aio->queue.wait(out, max, timeout_ms);
}

}  // extern "C"
