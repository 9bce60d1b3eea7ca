// Working memory of CPU kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "common.h"

namespace pyseg {

// Memory on a cache line, not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), kAlignment))) {
    prefer_huge_pages(data_.get(), n * sizeof(T));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace pyseg
