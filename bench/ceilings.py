"""What memory gives: gigabytes a second of reads, copies and writes past the caches, without torch.

    python bench/ceilings.py [--threads N ...] [--megabytes N ...]

Compiles a few loops with the C++ compiler and runs them over blocks of several sizes, from what fits in a
cache to what does not, in turns. It is what `copy_` and a forward can reach at best: NOTES.md says more.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

SOURCE = r"""
#include <immintrin.h>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

static void read(const float* x, int64_t n, float* out) {
  __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
  for (int64_t i = 0; i < n; i += 32) {
    a = _mm256_add_ps(a, _mm256_loadu_ps(x + i));
    b = _mm256_add_ps(b, _mm256_loadu_ps(x + i + 8));
    c = _mm256_add_ps(c, _mm256_loadu_ps(x + i + 16));
    d = _mm256_add_ps(d, _mm256_loadu_ps(x + i + 24));
  }
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
}
static void stored(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(y + i, _mm256_loadu_ps(x + i));
}
static void streamed(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(y + i, _mm256_loadu_ps(x + i));
  _mm_sfence();
}
static void streamed_beside_read(const float* x, int64_t n, float* y, const float* next, float* out) {
  __m256 a = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 8) {
    a = _mm256_add_ps(a, _mm256_loadu_ps(next + i));
    _mm256_stream_ps(y + i, _mm256_loadu_ps(x + i));
  }
  _mm256_storeu_ps(out, a);
  _mm_sfence();
}

// Random numbers: memory takes lines of zeros faster than any weights.
extern "C" void fill(float* x, int64_t n) {
  uint32_t state = 1;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    x[i] = static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
  }
}

// Returns seconds of one run over n floats; blocks of `block` floats are taken by the threads in turn.
extern "C" double run(int kind, float* x, float* y, int64_t n, int64_t block, int threads) {
  auto work = [&](int t) {
    float sink[8];
    const int64_t stride = threads * block;
    for (int64_t at = t * block; at < n; at += stride) {
      const int64_t count = block < n - at ? block : n - at;
      const bool is_unread = kind == 6 && (at < stride || count < block);
      if (kind == 0 || kind == 4 || kind == 5 || is_unread) read(x + at, count, sink);
      if (kind == 4) read(x + at, count, sink);
      if (kind == 1) memcpy(y + at, x + at, count * 4);
      if (kind == 2) stored(x + at, count, y + at);
      const bool has_next = kind == 6 && at + stride + block <= n;
      if (has_next) streamed_beside_read(x + at, count, y + at, x + at + stride, sink);
      if (kind == 3 || kind == 5 || (kind == 6 && !has_next)) streamed(x + at, count, y + at);
    }
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
"""
# Name, and the bytes for each of x that the program moves, a fetch before a store not counted.
KINDS = (
    ("read", 1),
    ("copy: memcpy", 2),
    ("copy: stores", 2),
    ("copy: past the caches", 2),
    ("read, and read again", 2),
    ("read, then copy past", 3),
    ("copy past beside the next read", 3),
)


def compile_loops(folder: Path) -> ctypes.CDLL:
    """Compile the loops for AVX2."""
    source, library = folder / "loops.cpp", folder / "loops.so"
    source.write_text(SOURCE)
    compiler = os.environ.get("CXX", "c++")
    flags = ("-O2", "-mavx2", "-shared", "-fPIC", "-pthread", "-std=c++17")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loops = ctypes.CDLL(str(library))
    loops.run.restype = ctypes.c_double
    return loops


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[4, 16, 146, 352])
    parser.add_argument("--block", type=int, default=4, help="MB that a thread takes at a time")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loops = compile_loops(Path(folder))
    times: dict[tuple[int, int, int], list[float]] = {}
    for megabytes in track(options.megabytes, "measuring", transient=True):
        count = megabytes * 250_000 // 32 * 32
        # As the pool of outputs has them: aligned, and in huge pages where the system gives them.
        buffers = [ctypes.create_string_buffer(4 * count + 4096) for _ in range(2)]
        x, y = (ctypes.c_void_p((ctypes.addressof(b) + 4095) // 4096 * 4096) for b in buffers)
        for buffer in (x, y):
            loops.fill(buffer, ctypes.c_int64(count))
        for threads in options.threads:
            block = min(options.block * 250_000, -(-count // threads)) // 32 * 32
            for repeat in range(options.repeats + 1):
                for kind in range(len(KINDS)):
                    arguments = (x, y, ctypes.c_int64(count), ctypes.c_int64(block), threads)
                    seconds = loops.run(kind, *arguments)
                    if repeat:
                        times.setdefault((megabytes, threads, kind), []).append(seconds)
    table = Table(title=f"GB/s of the bytes that the program moves; blocks of {options.block} MB")
    table.add_column("MB, threads")
    for name, _ in KINDS:
        table.add_column(name, justify="right")
    for megabytes in options.megabytes:
        for threads in options.threads:
            row = [f"{megabytes}, {threads}"]
            for kind, (_, moved) in enumerate(KINDS):
                seconds = statistics.median(times[megabytes, threads, kind])
                row.append(f"{megabytes * moved / 1e3 / seconds:.1f}")
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
