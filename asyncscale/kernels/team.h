// The threads that compute a step together: they all run the same function, and meet between its phases.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace kernels {

// Waits briefly by looking, which costs a tenth of a microsecond; then asleep, for whoever else needs the core.
template <class T>
inline void wait_while(const std::atomic<T>& value, T old, int looks) {
  for (int i = 0; i < looks; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

class Team {
 public:
  explicit Team(int64_t num_threads) {
    try {
      for (int64_t i = 1; i < num_threads; i++) helpers_.emplace_back([this, i] { help(i); });
    } catch (const std::system_error&) {
      // No further thread can be had: those that run do all the work.
    }
  }

  ~Team() {
    run(nullptr, nullptr);
    for (auto& helper : helpers_) helper.join();
  }

  int64_t size() const { return int64_t(helpers_.size()) + 1; }

  // Calls work(thread) on all threads, this one being thread 0. Not to be called from two threads at once.
  template <class F>
  void run(const F& work) {
    run([](const void* f, int64_t thread) { (*static_cast<const F*>(f))(thread); }, &work);
  }

  // The next piece of work of this phase that nobody has taken yet.
  int64_t claim() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // Ends a phase: returns when all threads are here. Claims begin at 0 again.
  void meet() {
    const uint32_t meeting = meeting_.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
      num_arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      meeting_.store(meeting + 1, std::memory_order_release);
      if (size() > 1) meeting_.notify_all();
    } else {
      wait_while(meeting_, meeting, kLooks);
    }
  }

 private:
  using Work = void (*)(const void*, int64_t);
  static constexpr int kLooks = 4000;

  void run(Work work, const void* argument) {
    work_ = work;
    argument_ = argument;
    num_runs_.fetch_add(1, std::memory_order_release);
    if (size() > 1) num_runs_.notify_all();
    if (work == nullptr) return;
    work(argument, 0);
    meet();
  }

  void help(int64_t thread) {
    for (uint32_t run = 0;; run++) {
      wait_while(num_runs_, run, kLooks);
      if (work_ == nullptr) return;
      work_(argument_, thread);
      meet();
    }
  }

  std::vector<std::thread> helpers_;
  Work work_ = nullptr;
  const void* argument_ = nullptr;
  std::atomic<uint32_t> num_runs_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> meeting_{0};
};

}  // namespace kernels
