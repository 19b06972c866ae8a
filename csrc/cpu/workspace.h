// Scratch memory of a call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"

namespace spectral_ext::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Hands out pieces of one allocation. Walk it twice: first to measure, then to take.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + size_);
    size_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return piece;
  }

  int64_t size() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

/// An allocation that ends with its scope.
struct Block {
  char* base;
  explicit Block(int64_t bytes) : base(static_cast<char*>(allocate(static_cast<size_t>(bytes)))) {}
  ~Block() { release(base); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

}  // namespace spectral_ext::cpu
