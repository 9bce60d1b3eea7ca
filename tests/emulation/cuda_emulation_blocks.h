// Races between blocks: of one launch, two blocks that touch a byte of global memory, where one of
// them writes it and not both do so atomically. Blocks of the emulation run one after the other, so
// such a race never shows in their results.
//
// Included where CUDA_EMULATION_BLOCKS is defined. The compiler then instruments every access for
// ThreadSanitizer (-fsanitize=thread), but the functions that it calls are these, not libtsan's: they
// note for each byte which blocks read it, wrote it or changed it atomically.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#define CUDA_EMULATION_UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace cuda_emulation::blocks {

enum class Access { read, write, atomic_read, atomic_change };

// Of a byte: the block that did it, counted from 1; 0 for none, kSeveral for more than one.
inline constexpr std::uint32_t kSeveral = ~0u;
struct Byte {
  std::uint32_t read = 0, written = 0, changed = 0;
};

using Range = std::pair<std::uintptr_t, std::uintptr_t>;

inline bool watching = false;      // while a kernel's own code runs
inline std::uint32_t block = 0;    // which does, counted from 1
inline Range stack;                // its thread's
inline std::vector<Range> shared;  // memory that each block has for itself
inline std::unordered_map<std::uintptr_t, Byte> bytes;
inline std::string found;

// Whether to watch from here on; returns whether it was so before.
CUDA_EMULATION_UNSEEN inline bool watch(bool now) {
  const bool before = watching;
  watching = now;
  return before;
}

CUDA_EMULATION_UNSEEN inline void begin_launch(std::vector<Range> shared_memory) {
  shared = std::move(shared_memory);
  bytes.clear();
  found.clear();
}

CUDA_EMULATION_UNSEEN inline bool inside(std::uintptr_t at, const Range& range) {
  return at >= range.first && at < range.second;
}

CUDA_EMULATION_UNSEEN inline void note(std::uint32_t& blocks) {
  blocks = blocks == 0 || blocks == block ? block : kSeveral;
}

CUDA_EMULATION_UNSEEN inline void touch(const volatile void* address, unsigned long size,
                                        Access access, void* code) {
  if (!watching) return;
  watching = false;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  bool own = inside(at, stack);
  for (const Range& range : shared) own = own || inside(at, range);
  const char* what = nullptr;
  const auto others = [](std::uint32_t blocks) { return blocks != 0 && blocks != block; };
  for (unsigned long i = 0; i < size && !own; ++i) {
    Byte& byte = bytes[at + i];
    switch (access) {
      case Access::read:
        if (others(byte.written)) what = "reads what another block writes";
        if (others(byte.changed)) what = "reads what another block changes atomically";
        note(byte.read);
        break;
      case Access::write:
        if (others(byte.written)) what = "writes what another block writes";
        if (others(byte.read)) what = "writes what another block reads";
        if (others(byte.changed)) what = "writes what another block changes atomically";
        note(byte.written);
        break;
      case Access::atomic_read:
        if (others(byte.written)) what = "reads atomically what another block writes";
        break;
      case Access::atomic_change:
        if (others(byte.written)) what = "changes atomically what another block writes";
        if (others(byte.read)) what = "changes atomically what another block reads";
        note(byte.changed);
        break;
    }
  }
  if (what && found.empty()) {
    Dl_info library{};
    dladdr(code, &library);
    char place[32];
    std::snprintf(place, sizeof place, "+0x%lx",
                  static_cast<unsigned long>(static_cast<char*>(code) -
                                             static_cast<char*>(library.dli_fbase) - 1));
    found = "race between blocks: block " + std::to_string(block - 1) + " " + what + ", at " +
            (library.dli_fname ? library.dli_fname : "?") + place + " (see addr2line)";
  }
  watching = true;
}

}  // namespace cuda_emulation::blocks

// What instrumented code calls, under the names that the compiler knows.
#define CUDA_EMULATION_CALLED(result) \
  extern "C" CUDA_EMULATION_UNSEEN inline __attribute__((used, visibility("hidden"))) result
#define CUDA_EMULATION_TOUCH(address, size, access)                                              \
  ::cuda_emulation::blocks::touch(address, size, ::cuda_emulation::blocks::Access::access, \
                                  __builtin_return_address(0))
#define CUDA_EMULATION_PLAIN(size)                                               \
  CUDA_EMULATION_CALLED(void) __tsan_read##size(void* p) { CUDA_EMULATION_TOUCH(p, size, read); }  \
  CUDA_EMULATION_CALLED(void) __tsan_write##size(void* p) { CUDA_EMULATION_TOUCH(p, size, write); } \
  CUDA_EMULATION_CALLED(void) __tsan_unaligned_read##size(void* p) {             \
    CUDA_EMULATION_TOUCH(p, size, read);                                         \
  }                                                                              \
  CUDA_EMULATION_CALLED(void) __tsan_unaligned_write##size(void* p) {            \
    CUDA_EMULATION_TOUCH(p, size, write);                                        \
  }                                                                              \
  CUDA_EMULATION_CALLED(void) __tsan_volatile_read##size(void* p) {              \
    CUDA_EMULATION_TOUCH(p, size, read);                                         \
  }                                                                              \
  CUDA_EMULATION_CALLED(void) __tsan_volatile_write##size(void* p) {             \
    CUDA_EMULATION_TOUCH(p, size, write);                                        \
  }
CUDA_EMULATION_PLAIN(1)
CUDA_EMULATION_PLAIN(2)
CUDA_EMULATION_PLAIN(4)
CUDA_EMULATION_PLAIN(8)
CUDA_EMULATION_PLAIN(16)
CUDA_EMULATION_CALLED(void) __tsan_read_range(void* p, unsigned long size) {
  CUDA_EMULATION_TOUCH(p, size, read);
}
CUDA_EMULATION_CALLED(void) __tsan_write_range(void* p, unsigned long size) {
  CUDA_EMULATION_TOUCH(p, size, write);
}
CUDA_EMULATION_CALLED(void) __tsan_vptr_update(void**, void*) {}
CUDA_EMULATION_CALLED(void) __tsan_vptr_read(void**) {}
CUDA_EMULATION_CALLED(void) __tsan_func_entry(void*) {}
CUDA_EMULATION_CALLED(void) __tsan_func_exit() {}
CUDA_EMULATION_CALLED(void) __tsan_init() {}
CUDA_EMULATION_CALLED(void) __tsan_atomic_thread_fence(int) {}
CUDA_EMULATION_CALLED(void) __tsan_atomic_signal_fence(int) {}

#define CUDA_EMULATION_ATOMICALLY(bits, name, next)                                           \
  CUDA_EMULATION_CALLED(std::uint##bits##_t)                                                  \
  __tsan_atomic##bits##_##name(volatile std::uint##bits##_t* p, std::uint##bits##_t v, int) { \
    CUDA_EMULATION_TOUCH(p, bits / 8, atomic_change);                                         \
    const std::uint##bits##_t old = *p;                                                       \
    *p = std::uint##bits##_t(next);                                                           \
    return old;                                                                               \
  }
#define CUDA_EMULATION_ATOMIC_TYPE(bits)                                                          \
  CUDA_EMULATION_CALLED(std::uint##bits##_t)                                                      \
  __tsan_atomic##bits##_load(const volatile std::uint##bits##_t* p, int) {                        \
    CUDA_EMULATION_TOUCH(p, bits / 8, atomic_read);                                               \
    return *p;                                                                                    \
  }                                                                                               \
  CUDA_EMULATION_CALLED(void)                                                                     \
  __tsan_atomic##bits##_store(volatile std::uint##bits##_t* p, std::uint##bits##_t v, int) {      \
    CUDA_EMULATION_TOUCH(p, bits / 8, atomic_change);                                             \
    *p = v;                                                                                       \
  }                                                                                               \
  CUDA_EMULATION_ATOMICALLY(bits, exchange, v)                                                    \
  CUDA_EMULATION_ATOMICALLY(bits, fetch_add, old + v)                                             \
  CUDA_EMULATION_ATOMICALLY(bits, fetch_sub, old - v)                                             \
  CUDA_EMULATION_ATOMICALLY(bits, fetch_and, old & v)                                             \
  CUDA_EMULATION_ATOMICALLY(bits, fetch_or, old | v)                                              \
  CUDA_EMULATION_ATOMICALLY(bits, fetch_xor, old ^ v)                                             \
  CUDA_EMULATION_CALLED(int)                                                                      \
  __tsan_atomic##bits##_compare_exchange_strong(volatile std::uint##bits##_t* p,                  \
                                                std::uint##bits##_t* expected,                    \
                                                std::uint##bits##_t v, int, int) {                \
    CUDA_EMULATION_TOUCH(p, bits / 8, atomic_change);                                             \
    const bool equal = *p == *expected;                                                           \
    if (equal)                                                                                    \
      *p = v;                                                                                     \
    else                                                                                          \
      *expected = *p;                                                                             \
    return equal;                                                                                 \
  }                                                                                               \
  CUDA_EMULATION_CALLED(int)                                                                      \
  __tsan_atomic##bits##_compare_exchange_weak(volatile std::uint##bits##_t* p,                    \
                                              std::uint##bits##_t* expected,                      \
                                              std::uint##bits##_t v, int a, int b) {              \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, a, b);                   \
  }                                                                                               \
  CUDA_EMULATION_CALLED(std::uint##bits##_t)                                                      \
  __tsan_atomic##bits##_compare_exchange_val(volatile std::uint##bits##_t* p,                     \
                                             std::uint##bits##_t expected,                        \
                                             std::uint##bits##_t v, int a, int b) {               \
    __tsan_atomic##bits##_compare_exchange_strong(p, &expected, v, a, b);                         \
    return expected;                                                                              \
  }
CUDA_EMULATION_ATOMIC_TYPE(8)
CUDA_EMULATION_ATOMIC_TYPE(16)
CUDA_EMULATION_ATOMIC_TYPE(32)
CUDA_EMULATION_ATOMIC_TYPE(64)
#undef CUDA_EMULATION_ATOMIC_TYPE
#undef CUDA_EMULATION_ATOMICALLY
#undef CUDA_EMULATION_PLAIN
#undef CUDA_EMULATION_TOUCH
#undef CUDA_EMULATION_CALLED
