// torch's parallel_for for ThreadSanitizer: plain threads, whose start and end it sees.
//
// libgomp, on which torch's own is built, is not instrumented: its barriers are invisible, so every
// result that a worker leaves would count as a race. This library comes first in LD_PRELOAD; our
// kernels call these functions through torch's C interface and get them in torch's place. Everything
// else is as it is: which part of the range goes to which worker, and that regions do not nest.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

thread_local bool inside = false;
thread_local uint32_t worker = 0;

uint32_t threads() {
  static const uint32_t count = [] {
    const char* const text = std::getenv("PYSEG_TSAN_THREADS");
    return text ? uint32_t(std::atoi(text)) : 4u;
  }();
  return count;
}

}  // namespace

extern "C" {

int32_t torch_get_num_threads(uint32_t* count) {
  *count = threads();
  return 0;
}

int32_t torch_get_thread_idx(uint32_t* index) {
  *index = worker;
  return 0;
}

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                           void (*function)(int64_t, int64_t, void*), void* context) {
  if (begin >= end) return 0;
  int64_t workers = inside ? 1 : threads();
  if (grain > 0) workers = std::min(workers, (end - begin + grain - 1) / grain);
  if (workers <= 1) {
    function(begin, end, context);
    return 0;
  }
  const int64_t share = (end - begin + workers - 1) / workers;
  // All begin together: else the first has done small work before the second is there.
  std::atomic<int64_t> missing{workers};
  const auto run = [=, &missing](int64_t number) {
    const int64_t first = begin + number * share;
    missing.fetch_sub(1, std::memory_order_relaxed);
    while (missing.load(std::memory_order_relaxed) > 0) std::this_thread::yield();
    inside = true, worker = uint32_t(number);
    if (first < end) function(first, std::min(end, first + share), context);
    inside = false, worker = 0;
  };
  std::vector<std::thread> others;
  for (int64_t number = 1; number < workers; ++number) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
  return 0;
}

}  // extern "C"
