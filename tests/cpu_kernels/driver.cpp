// The CPU backend without torch: schedule, kernels and pool, called from threads of this program,
// against the formulas in long double. A layer of any kind must be right, with the same bits for
// any number of threads. Sanitizers see all of it, and it runs on any processor that it is compiled
// for.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

using namespace spectral_ext;

namespace {

using Real = long double;
using Vector = std::vector<Real>;

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  ++failures;
}

/// As torch's: the parts of [0, n), each in a thread of its own.
void parallel_for(int64_t n, void (*f)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back(f, i, i + 1, context);
  f(0, 1, context);
  for (std::thread& thread : threads) thread.join();
}

// ---- numbers ----

uint64_t state = 1;

/// The same on every machine: between -1 and 1.
Real random_number() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<Real>(static_cast<int64_t>(state >> 11)) / (int64_t{1} << 52) - 1;
}

/// Memory of elements of one dtype, of exactly their size.
struct Tensor {
  DType dtype;
  std::vector<char> bytes;

  Tensor(DType type, int64_t count)
      : dtype(type), bytes(static_cast<size_t>(count * element_size(type)), char(0x7f)) {}
  void* data() { return bytes.data(); }
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / element_size(dtype); }

  Real get(int64_t i) const {
    Real value = 0;
    cpu::dispatch(dtype, [&](auto zero) {
      auto element = zero;
      std::memcpy(&element, bytes.data() + i * element_size(dtype), sizeof element);
      value = cpu::to_compute(element);
    });
    return value;
  }

  void set(int64_t i, Real value) {
    cpu::dispatch(dtype, [&](auto zero) {
      using T = decltype(zero);
      const T element = cpu::from_compute<T>(static_cast<compute_t<T>>(value));
      std::memcpy(bytes.data() + i * element_size(dtype), &element, sizeof element);
    });
  }

  Vector values() const {
    Vector result;
    for (int64_t i = 0; i < count(); ++i) result.push_back(get(i));
    return result;
  }
};

Tensor random_tensor(DType dtype, int64_t count) {
  Tensor tensor(dtype, count);
  for (int64_t i = 0; i < count; ++i) tensor.set(i, random_number());
  return tensor;
}

DType compute_of(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

Real norm(const Vector& x) {
  Real square = 0;
  for (const Real value : x) square += value * value;
  return std::sqrt(square);
}

Vector unit(Vector x) {
  const Real length = std::max<Real>(norm(x), 1e-12L);
  for (Real& value : x) value /= length;
  return x;
}

void expect_close(const Vector& found, const Vector& expected, Real tolerance,
                  const std::string& what) {
  Real largest = 0;
  bool is_close = found.size() == expected.size();
  for (const Real value : expected) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    is_close = is_close && std::fabs(found[i] - expected[i]) <= tolerance * largest;
  }
  expect(is_close, what);
}

// ---- layers ----

struct Case {
  Shape shape;
  DType dtype, output_dtype;
  bool v_first;
  int n_power_iterations;
  double scale;
  bool soft, detach_sigma;
};

struct Tensors {
  Tensor weight, output, u, v, u_saved, v_saved, sigma, residual, iterations;
  Tensor grad_output, grad_sigma, grad_weight;

  explicit Tensors(const Case& of)
      : weight(random_tensor(of.dtype, of.shape.numel())),
        output(of.output_dtype, of.shape.numel()),
        u(random_tensor(compute_of(of.dtype), of.shape.rows)),
        v(random_tensor(compute_of(of.dtype), of.shape.columns())),
        u_saved(compute_of(of.dtype), of.shape.rows),
        v_saved(compute_of(of.dtype), of.shape.columns()),
        sigma(compute_of(of.dtype), 1),
        residual(compute_of(of.dtype), 1),
        iterations(compute_of(of.dtype), 1),
        grad_output(random_tensor(of.output_dtype, of.shape.numel())),
        grad_sigma(random_tensor(compute_of(of.dtype), 1)),
        grad_weight(of.dtype, of.shape.numel()) {
    normalize(u);
    normalize(v);
  }

  static void normalize(Tensor& vector) {
    const Vector values = unit(vector.values());
    for (int64_t i = 0; i < vector.count(); ++i) vector.set(i, values[i]);
  }
};

/// Calls f(place in storage, row, place in v) for every element.
template <class F>
void for_elements(const Shape& shape, F f) {
  Vector unused;
  std::vector<int64_t> place(static_cast<size_t>(shape.columns()));
  cpu::for_columns(shape, [&](int64_t c, int64_t in_v) { place[c] = in_v; });
  int64_t i = 0;
  for (int64_t o = 0; o < shape.outer; ++o) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      for (int64_t k = 0; k < shape.inner; ++k) f(i++, r, place[o * shape.inner + k]);
    }
  }
}

struct Expected {
  Vector output, u, v, grad_weight;
  Real sigma;
};

Expected reference(const Case& of, const Tensors& given, bool update) {
  const Vector weight = given.weight.values();
  Expected result;
  result.u = given.u.values();
  result.v = given.v.values();
  const auto make_u = [&] {
    Vector product(result.u.size());
    for_elements(of.shape,
                 [&](int64_t i, int64_t r, int64_t c) { product[r] += weight[i] * result.v[c]; });
    return product;
  };
  const auto make_v = [&] {
    Vector product(result.v.size());
    for_elements(of.shape,
                 [&](int64_t i, int64_t r, int64_t c) { product[c] += weight[i] * result.u[r]; });
    return product;
  };
  for (int n = 0; update && n < of.n_power_iterations; ++n) {
    if (of.v_first) result.v = unit(make_v());
    result.u = unit(make_u());
    if (!of.v_first) result.v = unit(make_v());
  }
  const Vector product = make_u();
  result.sigma = 0;
  for (size_t r = 0; r < product.size(); ++r) result.sigma += result.u[r] * product[r];
  const bool alone = is_left_alone(static_cast<double>(result.sigma), of.scale, of.soft);
  const Real factor = alone ? 1 : of.scale / result.sigma;
  Real along = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    result.output.push_back(weight[i] * factor);
    along += given.grad_output.get(static_cast<int64_t>(i)) * result.output[i];
  }
  const bool constant = alone || of.detach_sigma;
  const Real of_rank_one = given.grad_sigma.get(0) - (constant ? 0 : along / result.sigma);
  result.grad_weight.resize(weight.size());
  for_elements(of.shape, [&](int64_t i, int64_t r, int64_t c) {
    result.grad_weight[i] =
        factor * given.grad_output.get(i) + of_rank_one * result.u[r] * result.v[c];
  });
  return result;
}

Layer layer_of(const Case& of, Tensors& tensors) {
  Layer layer{};
  layer.shape = of.shape;
  layer.dtype = of.dtype;
  layer.output_dtype = of.output_dtype;
  layer.wide_vectors = of.dtype != compute_of(of.dtype);
  layer.v_first = of.v_first;
  layer.n_power_iterations = of.n_power_iterations;
  layer.eps = 1e-12;
  layer.scale = of.scale;
  layer.soft = of.soft;
  layer.weight = tensors.weight.data();
  layer.output = tensors.output.data();
  layer.u = tensors.u.data();
  layer.v = tensors.v.data();
  layer.u_stride = layer.v_stride = 1;
  layer.u_saved = tensors.u_saved.data();
  layer.v_saved = tensors.v_saved.data();
  layer.sigma = tensors.sigma.data();
  layer.residual = tensors.residual.data();
  layer.iterations = tensors.iterations.data();
  return layer;
}

LayerGradient gradient_of(const Case& of, Tensors& tensors) {
  LayerGradient layer{};
  layer.shape = of.shape;
  layer.dtype = of.output_dtype;
  layer.grad_dtype = of.dtype;
  layer.scale = of.scale;
  layer.soft = of.soft;
  layer.detach_sigma = of.detach_sigma;
  layer.grad_output = tensors.grad_output.data();
  layer.grad_sigma = tensors.grad_sigma.data();
  layer.output = tensors.output.data();
  layer.u = tensors.u_saved.data();
  layer.v = tensors.v_saved.data();
  layer.sigma = tensors.sigma.data();
  layer.grad_weight = tensors.grad_weight.data();
  return layer;
}

std::vector<Case> cases() {
  Shape permuted{1, 6, 20, {}};
  permuted.column_order.count = 2;
  permuted.column_order.size[0] = 4;
  permuted.column_order.size[1] = 5;
  permuted.column_order.stride[0] = 1;
  permuted.column_order.stride[1] = 4;
  const std::vector<Shape> shapes = {{1, 5, 7, {}},     permuted,          {3, 40, 9, {}},
                                     {7, 11, 1, {}},    {1, 1, 33, {}},    {1, 600, 500, {}},
                                     {50, 120, 40, {}}, {1, 3, 90000, {}}, {1, 9000, 30, {}}};
  const std::vector<std::pair<DType, DType>> dtypes = {{DType::kFloat32, DType::kFloat32},
                                                       {DType::kFloat64, DType::kFloat64},
                                                       {DType::kBFloat16, DType::kBFloat16},
                                                       {DType::kFloat16, DType::kFloat16},
                                                       {DType::kFloat32, DType::kBFloat16}};
  std::vector<Case> result;
  int i = 0;
  for (const Shape& shape : shapes) {
    for (size_t d = 0; d < (shape.numel() < 2000 ? dtypes.size() : 2); ++d, ++i) {
      const auto [dtype, output_dtype] = dtypes[(d + i / 5) % dtypes.size()];
      result.push_back({shape, dtype, output_dtype, i % 2 == 1, 1 + i % 3, i % 3 == 0 ? 1 : 2.5,
                        i % 4 == 3, i % 7 == 2});
    }
  }
  return result;
}

std::vector<Tensors> run(const std::vector<Case>& of, std::vector<Tensors> tensors, bool update,
                         int threads) {
  std::vector<Layer> layers;
  std::vector<LayerGradient> gradients;
  for (size_t i = 0; i < of.size(); ++i) {
    layers.push_back(layer_of(of[i], tensors[i]));
    gradients.push_back(gradient_of(of[i], tensors[i]));
  }
  cpu::forward(layers, update, threads, parallel_for);
  cpu::backward(gradients, threads, parallel_for);
  return tensors;
}

Real tolerance_of(DType dtype) {
  if (dtype == DType::kFloat64) return 1e-12L;
  if (dtype == DType::kFloat32) return 3e-5L;
  return dtype == DType::kFloat16 ? 4e-3L : 3e-2L;
}

void check_numbers(const std::vector<Case>& of, const std::vector<Tensors>& given, bool update) {
  const std::vector<Tensors> found = run(of, given, update, 3);
  for (size_t i = 0; i < of.size(); ++i) {
    const Expected expected = reference(of[i], given[i], update);
    const std::string name = " of layer " + std::to_string(i) + (update ? "" : " in evaluation");
    const Real fine = tolerance_of(compute_of(of[i].dtype)),
               coarse = tolerance_of(of[i].output_dtype);
    expect_close(found[i].sigma.values(), {expected.sigma}, fine, "sigma" + name);
    expect_close(found[i].u.values(), expected.u, fine, "u" + name);
    expect_close(found[i].v.values(), expected.v, fine, "v" + name);
    expect_close(found[i].u_saved.values(), expected.u, fine, "the saved u" + name);
    expect_close(found[i].v_saved.values(), expected.v, fine, "the saved v" + name);
    expect_close(found[i].output.values(), expected.output, coarse, "the output" + name);
    expect_close(found[i].grad_weight.values(), expected.grad_weight, coarse,
                 "the gradient" + name);
  }
  for (const int threads : {1, 2, 5}) {
    const std::vector<Tensors> again = run(of, given, update, threads);
    for (size_t i = 0; i < of.size(); ++i) {
      expect(again[i].output.bytes == found[i].output.bytes &&
                 again[i].grad_weight.bytes == found[i].grad_weight.bytes &&
                 again[i].u.bytes == found[i].u.bytes && again[i].v.bytes == found[i].v.bytes,
             "the bits of layer " + std::to_string(i) + " for " + std::to_string(threads) +
                 " threads");
    }
  }
}

/// Threads that take memory, write all of it and give it back, also to each other.
void check_pool() {
  std::vector<void*> shared(4);
  parallel_for(
      4,
      [](int64_t begin, int64_t, void* context) {
        auto* blocks = static_cast<std::vector<void*>*>(context);
        for (int round = 0; round < 20; ++round) {
          const size_t bytes = (size_t{40} << 10) * (1 + (begin + round) % 3);
          void* const block = cpu::allocate(bytes);
          std::memset(block, static_cast<int>(begin), bytes);
          cpu::release(block);
          if (round % 7 == 6) cpu::release_unused();
        }
        (*blocks)[begin] = cpu::allocate(size_t{1} << 20);
      },
      &shared);
  for (void* block : shared) cpu::release(block);
  expect(cpu::release_unused() >= size_t{4} << 20, "the pool has lost memory");
}

}  // namespace

int main(int count, char**) {
  std::vector<Case> all = cases();
  // With an argument one call of some layers alone, for sanitizers that are slow. More threads
  // would spin for a processor.
  const bool is_short = count > 1;
  if (is_short) {
    for (size_t i = 0; 5 * i < all.size(); ++i) all[i] = all[5 * i];
    all.resize((all.size() + 4) / 5);
  }
  std::vector<Tensors> given;
  for (const Case& one : all) given.emplace_back(one);
  if (is_short) {
    run(all, given, true, 2);
    return 0;
  }
  check_numbers(all, given, true);
  check_numbers(all, given, false);
  check_pool();
  std::printf("%zu layers on %s kernels: %d wrong\n", all.size(), cpu::instruction_level(),
              failures);
  return failures > 0;
}
