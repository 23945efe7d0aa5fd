// Work shared out over threads that stay awake between the calls of a decode step.
//
// Such calls come every few microseconds, which is less than a sleeping thread takes to wake, and
// a thread of XLA's pool that looked on would keep it from other work. So these are our own.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace jaxquant {

// How many threads so many multiplications are worth, from 1 to `most`.
inline int worth(int64_t multiplications, int64_t most) {
  return static_cast<int>(std::max<int64_t>(1, std::min(most, multiplications >> 17)));
}

// work(thread, i): share i, by one of the threads, whose caller is thread 0.
using Work = std::function<void(int, int64_t)>;

// What some threads do together: work for all i < count.
class Shares {
 public:
  Shares(Work work, int helpers, int64_t count);

  bool open() const { return helpers_ > 0 && next_ < count_; }
  int join() { return helpers_--; }  // the number of a helper, which joins while shares are open

  // Takes shares until none is left. What one throws `wait` throws.
  void take(int thread);

  // Until the shares that others took are done.
  void wait();

 private:
  Work work_;
  std::atomic<int> helpers_;  // that may still join
  int64_t count_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_;
  std::exception_ptr error_;  // the last
};

// The helpers of all callers.
class Team {
 public:
  static Team& the();

  // Work for all i < count on the caller and on up to `helpers` others: on those that are awake,
  // and on sleeping ones only if `wake`. The caller waits for shares under way only: a helper that
  // comes late finds nothing to do.
  void share(int helpers, bool wake, int64_t count, Work work);

 private:
  void start(int helpers);
  void help();
  bool help_once();

  std::mutex mutex_;
  std::condition_variable more_;
  std::vector<std::shared_ptr<Shares>> posted_;
  std::atomic<uint64_t> posts_{0};
  std::atomic<int> size_{0}, asleep_{0};
  std::atomic<int> processor_{-1};  // of the thread that shared out last
};

}  // namespace jaxquant
