// Work shared out over XLA's own threads.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jaxquant {

// Calls work(thread, i) for i < count on the caller and on what the pool gives. The caller waits
// for tasks under way only: a task that starts late finds nothing to do, so that callers which
// occupy the whole pool cannot wait for each other.
inline void parallel(xla::ffi::ThreadPool& pool, int threads, int64_t count,
              std::function<void(int, int64_t)> work) {
  struct Shared {
    std::function<void(int, int64_t)> work;
    int64_t count, done = 0;
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all;
  };
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->count = count;
  auto run = [shared](int thread) {
    int64_t mine = 0;
    for (int64_t i; (i = shared->next++) < shared->count; ++mine) shared->work(thread, i);
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += mine;
    if (shared->done == shared->count) shared->all.notify_all();
  };
  for (int thread = 1; thread < threads; ++thread) pool.Schedule([run, thread] { run(thread); });
  run(0);
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all.wait(lock, [&] { return shared->done == shared->count; });
}

}  // namespace jaxquant
