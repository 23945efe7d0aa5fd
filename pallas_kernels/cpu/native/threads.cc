#include "threads.h"

#include <chrono>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace jaxquant {
namespace {

constexpr auto kLook = std::chrono::microseconds(200);  // that an idle thread looks on

// Whether it came true while a thread may look on.
template <class Condition>
bool look(Condition condition) {
  const auto end = std::chrono::steady_clock::now() + kLook;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();  // XLA's threads may want this processor
  }
  return true;
}

int processor_here() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// To another processor, if this thread was woken on the one that shares out: there it would keep
// off the thread that it helps, while another idles (Linux does so in a third of all calls).
void leave(int processor) {
#if defined(__linux__)
  if (processor < 0 || processor != sched_getcpu()) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0)
    sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

}  // namespace

Shares::Shares(Work work, int helpers, int64_t count)
    : work_(std::move(work)), helpers_(helpers), count_(count) {}

void Shares::take(int thread) {
  int64_t mine = 0;
  for (int64_t i; (i = next_++) < count_; ++mine) try {
      work_(thread, i);
    } catch (...) {  // the others still use what the caller has lent them
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  if (mine == 0 || (done_ += mine) < count_) return;
  std::lock_guard<std::mutex> lock(mutex_);
  all_.notify_all();
}

void Shares::wait() {
  auto done = [&] { return done_ == count_; };
  const bool seen = look(done);
  std::unique_lock<std::mutex> lock(mutex_);
  if (!seen) all_.wait(lock, done);
  if (error_) std::rethrow_exception(error_);
}

Team& Team::the() {
  static Team* team = new Team;  // never destroyed: its threads may outlive main
  return *team;
}

void Team::share(int helpers, bool wake, int64_t count, Work work) {
  if (!wake) helpers = std::min(helpers, size_ - asleep_);
  helpers = static_cast<int>(std::min<int64_t>(helpers, count - 1));
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(0, i);
    return;
  }
  processor_ = processor_here();
  auto shares = std::make_shared<Shares>(std::move(work), helpers, count);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (wake) start(helpers);
    posted_.push_back(shares);
    ++posts_;
    for (int i = 0; wake && i < std::min<int>(helpers, asleep_); ++i) more_.notify_one();
  }
  shares->take(0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    posted_.erase(std::find(posted_.begin(), posted_.end(), shares));
  }
  shares->wait();
}

// Up to so many; fewer where the system gives no more: the caller then does the more.
void Team::start(int helpers) try {
  for (; size_ < helpers; ++size_) std::thread([this] { help(); }).detach();
} catch (const std::system_error&) {
}

// Whether there was anything to help with.
bool Team::help_once() {
  std::shared_ptr<Shares> shares;
  int thread;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = std::find_if(posted_.begin(), posted_.end(), [](auto& s) { return s->open(); });
    if (found == posted_.end()) return false;
    shares = *found;
    thread = shares->join();
  }
  shares->take(thread);
  return true;
}

void Team::help() {
  for (;;) {
    const uint64_t seen = posts_;  // before the search: what comes after it is news
    auto news = [&] {
      leave(processor_);
      return posts_ != seen;
    };
    if (help_once() || look(news)) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    more_.wait(lock, [&] { return posts_ != seen; });
    --asleep_;
    lock.unlock();
    leave(processor_);
  }
}

}  // namespace jaxquant
