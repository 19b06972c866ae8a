// Memory for large outputs. The system gives fresh memory page by page, which costs more than the
// arithmetic that fills it: 352 MB of fresh 4 KB pages take longer than normalizing 352 MB of
// weights. So blocks are aligned to huge pages, ask for them, and are kept for the next call when
// nobody references them any more.
#pragma once

#include <cstddef>

namespace spectral_ext::cpu {

/// Blocks of at least this size are worth an allocation here; smaller ones are left to others.
constexpr size_t kLargeBlock = size_t{32} << 10;

/// Returns uninitialized memory aligned to 64 bytes at least. Throws std::bad_alloc.
void* allocate(size_t bytes);

/// Takes back what allocate() gave, from any thread.
void release(void* block) noexcept;

/// Returns all memory that nobody references to the system; returns how many bytes those were.
size_t release_unused() noexcept;

}  // namespace spectral_ext::cpu
