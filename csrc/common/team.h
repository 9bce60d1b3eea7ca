// Threads that stay together for a whole call of an op that has many short parallel loops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>

namespace pyseg {

// At the end of each of its regions OpenMP waits for every thread, those that have not begun, too.
// Beside a process that keeps a core busy that is a slice of the scheduler, some milliseconds, for
// a loop of tenths of one: hundreds of loops in a row then take up to four times as long. In a team
// one region surrounds all the loops: the others wait in it for loops, the leader takes items
// itself and waits at a loop's end only for those who are at an item.
class Team {
 public:
  // Calls body() on this thread; until it returns, for_each shares out its items within the team.
  // Not `worth_it`: inputs so small that starting a team would take longer than it gains.
  template <class Body>
  static void run(bool worth_it, const Body& body) {
    const int64_t threads = torch::stable::get_num_threads();
    if (!worth_it || threads == 1 || current_) return body();
    Team team(threads);
    // Where torch has fewer threads, in a parallel region of its own for one, a thread gets several
    // numbers: those after the leader's find the body done.
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        if (worker == 0)
          team.lead(body);
        else
          team.follow(worker);
    });
    // Here: of what leaves the region torch's C interface makes an error of its own.
    if (team.error_) std::rethrow_exception(team.error_);
  }

  // The one that this thread leads, or null.
  static Team* current() { return current_; }

  int64_t size() const { return threads_; }

  // Calls work(item, worker) for every item, with numbers of workers below that of items. What an
  // item throws, the call does, too.
  template <class Work>
  void share(int64_t items, Work& work) {
    call_ = [](void* each, int64_t item, int64_t worker) {
      (*static_cast<Work*>(each))(item, worker);
    };
    work_ = &work;
    items_ = items;
    next_.store(0, std::memory_order_relaxed);
    Team* const self = current_;
    current_ = nullptr;  // a loop within an item is the item's own
    loop_.fetch_add(1);
    loop_.notify_all();
    take_items(0);
    loop_.fetch_add(1);
    current_ = self;
    wait_while(at_work_, [](int32_t count) { return count != 0; });
    if (error_) std::rethrow_exception(error_);  // which ends the body, so none comes after
  }

 private:
  static constexpr int32_t kEnd = -1;

  explicit Team(int64_t threads) : threads_(threads) {}

  template <class Body>
  void lead(const Body& body) {
    current_ = this;
    try {
      body();
    } catch (...) {
      error_ = std::current_exception();
    }
    current_ = nullptr;
    loop_.store(kEnd);
    loop_.notify_all();
  }

  void follow(int64_t worker) {
    for (int32_t seen = 0; seen != kEnd;) {
      const int32_t before = seen;
      seen = wait_while(loop_, [=](int32_t loop) { return loop == before; });
      if (seen % 2 != 1) continue;
      // Either the leader, who has closed the loop, sees that somebody is at work, or that one sees
      // that it is closed.
      at_work_.fetch_add(1);
      if (loop_.load() == seen && worker < items_) take_items(worker);
      if (at_work_.fetch_sub(1) == 1) at_work_.notify_one();
    }
  }

  void take_items(int64_t worker) {
    try {
      // Relaxed: items are independent of each other, and the loop's end orders what they wrote.
      for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;)
        call_(work_, item, worker);
    } catch (...) {
      if (!failed_.test_and_set()) error_ = std::current_exception();
      next_.store(items_, std::memory_order_relaxed);
    }
  }

  // Looks for some tens of microseconds, as loops follow each other at once, then sleeps. Twenty
  // and two hundred times as long gained nothing alone and lost beside a busy process.
  template <class Condition>
  static int32_t wait_while(const std::atomic<int32_t>& value, Condition holds) {
    int32_t seen = value.load();
    for (int i = 0; i < kLooks && holds(seen); ++i) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("isb");
#endif
      seen = value.load();
    }
    while (holds(seen)) {
      value.wait(seen);
      seen = value.load();
    }
    return seen;
  }

  static constexpr int kLooks = 1000;
  static inline thread_local Team* current_ = nullptr;

  const int64_t threads_;
  // Of the loop: written while it is closed and nobody is at work.
  void (*call_)(void*, int64_t, int64_t) = nullptr;
  void* work_ = nullptr;
  int64_t items_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int32_t> loop_{0};     // its number: odd while it is open
  alignas(64) std::atomic<int32_t> at_work_{0};  // followers
  std::atomic_flag failed_;
  std::exception_ptr error_;
};

}  // namespace pyseg
