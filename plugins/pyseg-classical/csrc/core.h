// What the methods share, and what each file gives. None knows Python: module.cpp alone does, as
// pybind11's headers take longer to compile than all methods together.
#pragma once

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

// Calls body(part) for every part in 0..parts-1, on so many threads. What a part does must not
// depend on which thread has it.
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

// Rows of a matrix.
struct Points {
  const double* values;  // [count, dims]
  int64_t count, dims;
  const double* at(int64_t i) const { return values + i * dims; }
};

struct Image {
  const double* values;  // [height, width, channels]
  int64_t height, width, channels;
  int64_t pixels() const { return height * width; }
};

// ---------------------------------------------------------------------------- clustering.cpp

struct Clusters {
  std::vector<int32_t> labels;  // [N]
  std::vector<double> centres;  // [K, D]
  double inertia = 0;           // sum of the squared distances
  int64_t iterations = 0;
};

// k-means from the centres [k, D]; tolerance: see pyseg_classical/kmeans.py.
Clusters lloyd(const Points& points, const double* centres, int64_t k, int64_t iterations,
               double tolerance, int threads);

// Squared distances of all points to the nearest of the centres so far: nearest [N] becomes the
// smaller of itself and that to `centre`.
void lower_to(const Points& points, const double* centre, double* nearest, int threads);

// ------------------------------------------------------------------------------- growing.cpp

// labels [H, W]: regions 1..count at the seeds and 0 elsewhere, and then everywhere.
void grow_seeds(const Image& image, int64_t count, double threshold, bool fill, bool diagonal,
                int32_t* labels);

// One region after the other, each from the first pixel in `order` that is in none.
void grow_in_order(const Image& image, const int64_t* order, int64_t count, double threshold,
                   bool diagonal, int32_t* labels);

// --------------------------------------------------------------------------- split_merge.cpp

// Area, sums and sums of squares of every channel over a block.
struct Summary {
  double area = 0;
  std::vector<double> sum, squares;
  explicit Summary(int64_t channels) : sum(channels), squares(channels) {}
  void add(const Summary& other);
  // Root of the variance, of several channels of its mean over them.
  double deviation() const;
  // Between the means; of several channels the root of the mean square.
  double distance(const Summary& other) const;
};

using SplitTest = std::function<bool(int64_t, int64_t, int64_t, int64_t)>;  // rows, columns: [a, b)
using MergeTest = std::function<bool(const Summary&, const Summary&)>;

class Quadtree {
 public:
  Quadtree(const Image& image, int32_t* labels);

  // Blocks of a square of 2^k, as far as they are inside the image, until they are even or of the
  // smallest side. Labels are from 0; returns how many blocks there are.
  int32_t split(int64_t smallest, const SplitTest& uneven);

  Summary summary(int64_t top, int64_t bottom, int64_t left, int64_t right) const;

  // Largest range of values of a channel.
  double range(int64_t top, int64_t bottom, int64_t left, int64_t right) const;

 private:
  void visit(int64_t y, int64_t x, int64_t side, int64_t smallest, const SplitTest& uneven);

  Image image_;
  int32_t* labels_;
  int32_t blocks_ = 0;
  std::vector<double> sums_, squares_;  // tables of sums, [height + 1, width + 1, channels]
};

// Merges neighbours of labels [H, W] from 0 to blocks - 1, the most similar first, as long as
// `alike` says so; its answer is asked again where either has changed.
void merge(const Image& image, int32_t blocks, const MergeTest& alike, int32_t* labels);

// ---------------------------------------------------------------------------------- flow.cpp

// Both return the flow; sides: what is on the source's side of the smallest minimum cut.
double max_flow(int64_t nodes, const double* source, const double* sink, int64_t count,
                const int64_t* ends, const double* forward, const double* backward, bool* sides);
double grid_max_flow(int64_t height, int64_t width, int64_t planes, const double* source,
                     const double* sink, const double* weights, bool* sides);

// ---------------------------------------------------------------------------------- cuts.cpp

// edges: [count, 2] nodes. Returns the cut's weight.
double minimum_cut(int64_t nodes, int64_t count, const int64_t* edges, const double* weights,
                   bool* side);
void highly_connected(int64_t nodes, int64_t count, const int64_t* edges, int32_t* owner);

// -------------------------------------------------------------------------------- graphs.cpp

void felzenszwalb(const Image& image, double scale, int64_t min_size, int32_t* labels);
void spanning_tree(const Image& image, int64_t parts, double least, int64_t min_size,
                   int32_t* labels);

struct Affinity {
  std::vector<int32_t> pairs;   // [E, 2]
  std::vector<double> weights;  // [E]
};

// Affinities exp(-|dF|^2 / feature) exp(-|dX|^2 / space) of pixels nearer than radius, added up for
// every pair of regions; total [count] gets the sum of all affinities of the pixels of each region;
// a pixel has the affinity 1 to itself.
Affinity affinity(const Image& features, const int64_t* regions, int64_t count, double radius,
                  double feature, double space, int threads, double* total);

// ------------------------------------------------------------------------------ matching.cpp

// The pixels of either map [H, W] that have a partner; one and other are false before.
void match(const bool* ours, const bool* theirs, int64_t height, int64_t width, double radius,
           bool* one, bool* other);

}  // namespace classical
