// What every CPU kernel includes: stable tensors, argument checks, run-time SIMD dispatch, threads.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "inline.h"
#include "simd_level.h"
#include "team.h"

// Python sees ValueError. STD_TORCH_CHECK would put the build machine's paths into the message.
#define PYSEG_CHECK(condition, ...)                                            \
  do {                                                                         \
    if (!(condition)) throw std::invalid_argument(::pyseg::text(__VA_ARGS__)); \
  } while (0)

namespace pyseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// "[2, 3, 480, 640]"
inline std::string shape(const Tensor& tensor) {
  std::ostringstream out;
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "[") << tensor.size(i);
  out << (tensor.dim() ? "]" : "[]");
  return out.str();
}

// Two label maps that are compared: what the memory accesses rely on; Python has checked it in more
// words.
inline void check_pair(const Tensor& prediction, const Tensor& target) {
  PYSEG_CHECK(target.dim() == 3 && shape(prediction) == shape(target) &&
                  prediction.scalar_type() == target.scalar_type(),
              "prediction and target must both be [N, H, W] of one dtype, got ", shape(prediction),
              " and ", shape(target));
}

// Asks for huge pages, where that means anything: touching small ones for the first time takes
// longer than what is done to the memory here.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An integer argument as int, where a larger one would silently become another number.
inline int narrow(const char* name, int64_t value) {
  PYSEG_CHECK(value == int64_t(int(value)), name, " must be an integer of 32 bits, got ", value);
  return int(value);
}

// Defines functions_in_force<T>(), where levels have functions<T>(): those of the level in force;
// of double, which checks gradients, there are generic ones only.
#define PYSEG_FUNCTIONS_IN_FORCE             \
  template <class T>                         \
  auto functions_in_force() {                \
    if constexpr (std::is_same_v<T, double>) \
      return generic::functions<double>();   \
    else                                     \
      return PYSEG_AT_LEVEL(functions<T>)(); \
  }

// Below this, in additions of numbers, waking threads takes longer than the work: much longer where
// other processes keep the cores busy, as then each region waits for the scheduler.
#ifndef PYSEG_WORTH_THREADS  // tests/sanitize.py sets 1: there small inputs are shared out, too
#define PYSEG_WORTH_THREADS (int64_t(1) << 18)
#endif
constexpr int64_t kWorthThreads = PYSEG_WORTH_THREADS;

inline int64_t num_threads() {
  return Team::current() ? Team::current()->size() : torch::stable::get_num_threads();
}

// Calls work(item, worker) for every item; which worker takes which is left to chance, so that
// threads that are held up take fewer. `cost`: of an item, in additions, roughly.
template <class Work>
void for_each(int64_t items, int64_t cost, Work work) {
  const int64_t threads = num_threads();
  if (threads == 1 || items <= 1 || cost < (kWorthThreads + items - 1) / items) {
    for (int64_t item = 0; item < items; ++item) work(item, int64_t(0));
    return;
  }
  if (Team* const team = Team::current()) return team->share(items, work);
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(items, threads);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      // Relaxed: items are independent of each other, and the region's end orders what they wrote.
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;)
        work(item, worker);
  });
}

}  // namespace pyseg
