#include "pool.h"

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace zerolite {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread must get to be worth waking

// While it lives, this thread rounds to nearest and keeps subnormals, whatever the program asked of it
// (torch.set_flush_denormal, a library built with -ffast-math): the bits must not depend on which thread takes a part.
class Exact {
 public:
  Exact() : before_(get()) { set(before_ & ~kOther); }
  ~Exact() { set(before_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kOther = 0xe040;  // MXCSR: flush to zero, rounding, denormals are zeros
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = unsigned long;
  static constexpr Mode kOther = 0x1c80000;  // FPCR: FZ, RMode, FZ16
  static Mode get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Mode = unsigned;
  static constexpr Mode kOther = 0;
  static Mode get() { return 0; }
  static void set(Mode) {}
#endif
  const Mode before_;
};

void run_part(const std::function<void(int, int)>& body, int part, int parts) {
  const Exact mode;
  body(part, parts);
}

class Pool {
 public:
  bool here() const { return pid_ == getpid(); }
  void run(int parts, const std::function<void(int, int)>& body) {
    std::unique_lock<std::mutex> turn(turn_);
    grow(parts - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      parts_ = parts;
      next_ = 0;
      left_ = parts;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return left_ == 0; });
    body_ = nullptr;
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(workers_) < workers) {
      try {
        std::thread([this] { loop(); }).detach();  // detached: exit must not wait for an idle worker
      } catch (const std::system_error&) {
        return;  // no more threads here: those that there are do the work
      }
      ++workers_;
    }
  }
  void loop() {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return body_ != nullptr && next_ < parts_; });
      }
      work();
    }
  }
  void work() {
    for (;;) {
      const std::function<void(int, int)>* body;
      int part, parts;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (body_ == nullptr || next_ >= parts_) return;
        body = body_;
        part = next_++;
        parts = parts_;
      }
      run_part(*body, part, parts);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) done_.notify_all();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int, int)>* body_ = nullptr;
  int parts_ = 0, next_ = 0, left_ = 0;
  int workers_ = 0;
  const pid_t pid_ = getpid();
};

// This process's pool. Never destroyed: workers may outlive static destructors, and of a fork they and perhaps a held lock
// stayed in the parent (data loader workers), so a child begins with a new one.
Pool& pool() {
  static std::atomic<Pool*> instance{new Pool};
  Pool* known = instance.load();
  if (!known->here()) {
    Pool* const fresh = new Pool;
    if (!instance.compare_exchange_strong(known, fresh)) {
      delete fresh;  // another thread was faster: `known` is its pool
    } else {
      known = fresh;
    }
  }
  return *known;
}

int limit = 1;

}  // namespace

void parallel(int threads, const std::function<void(int, int)>& body) {
  if (threads <= 1) {
    run_part(body, 0, 1);
    return;
  }
  pool().run(threads, body);
}

int threads_for(int64_t elements) {
  const int64_t useful = (elements + kGrain - 1) / kGrain;
  return static_cast<int>(useful < limit ? (useful < 1 ? 1 : useful) : limit);
}

void set_threads(int threads) { limit = threads < 1 ? 1 : threads; }
int get_threads() { return limit; }

}  // namespace zerolite
