// What the modules share: arrays, checks, threads.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace classical {

namespace py = pybind11;

using Reals = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Hot loops are compiled for AVX2, too, and the processor takes its own; without fused
// multiplication, so that every machine gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLASSICAL_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLASSICAL_CLONES
#endif

// The Python side checks what users give; this guards the memory.
inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// Calls body(part) for every part in 0..parts-1, on so many threads. What a part does must not depend
// on which thread has it.
template <class Body>
void for_parts(int64_t parts, int threads, const Body& body) {
  const int64_t workers = std::min<int64_t>(parts, std::max(threads, 1));
  const auto run = [&](int64_t worker) {
    for (int64_t part = worker; part < parts; part += workers) body(part);
  };
  std::vector<std::thread> pool;
  for (int64_t worker = 1; worker < workers; ++worker) pool.emplace_back(run, worker);
  if (workers > 0) run(0);
  for (auto& thread : pool) thread.join();
}

// Disjoint sets with path halving; the root of a union is the larger side, of equals the smaller
// number.
class Sets {
 public:
  explicit Sets(int64_t count) : parent_(count), size_(count, 1) {
    for (int64_t i = 0; i < count; ++i) parent_[i] = static_cast<int32_t>(i);
  }
  int32_t find(int32_t x) {
    while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
    return x;
  }
  int32_t join(int32_t a, int32_t b) {  // of two roots, to the new root
    if (size_[a] < size_[b] || (size_[a] == size_[b] && b < a)) std::swap(a, b);
    parent_[b] = a;
    size_[a] += size_[b];
    return a;
  }
  int32_t size(int32_t root) const { return size_[root]; }

 private:
  std::vector<int32_t> parent_, size_;
};

void bind_clustering(py::module_& m);
void bind_growing(py::module_& m);
void bind_split_merge(py::module_& m);
void bind_flow(py::module_& m);
void bind_cuts(py::module_& m);
void bind_graphs(py::module_& m);
void bind_matching(py::module_& m);

}  // namespace classical
