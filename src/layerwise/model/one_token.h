// What operators for one token of one row share: maps of one vector, by several threads, short filters, and attention.
//
// A matrix that is still in the processor's cache meets its vector in runs of eight rows: as many sums as hide the
// latency of a product, and few enough streams to load from. One that comes from memory is read as it lies there, a row
// after the other, or half of the bandwidth is lost.
#pragma once

#include "vectors.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace vectors {

constexpr int CACHED = 8, STREAMED = 1;  // rows at once
constexpr int64_t SHARE = 1 << 15;       // products that are worth a thread
constexpr int64_t AHEAD_BYTES = 2048;    // that are fetched beforehand, in each place that is read

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// The rows of a map that thread `number` of `count` takes.
struct Share {
  int64_t first, last;
  Share(int64_t rows, int number, int count) : first(bound(rows, number, count)), last(bound(rows, number + 1, count)) {}
  static int64_t bound(int64_t rows, int number, int count) {
    return number == count ? rows : rows * number / count / LANES * LANES;
  }
};

// RMS norm: x / rms(x) * scale, rounded as the framework rounds it.
template <typename T>
void normalised(const T* x, const T* scale, T* out, int64_t size, float epsilon) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) sums += load(x + i) * load(x + i);
  float squares = total(sums);
  for (; i < size; ++i) squares += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  const float factor = 1.f / std::sqrt(squares / size + epsilon);
  for (i = 0; i + LANES <= size; i += LANES) store(out + i, load(scale + i) * rounded<T>(load(x + i) * factor));
  for (; i < size; ++i)
    out[i] = static_cast<T>(static_cast<float>(scale[i]) * static_cast<float>(static_cast<T>(x[i] * factor)));
}

// Rotary positions in the rotate-half form, of one head of `each` numbers; each product rounded, as the framework does.
template <typename T>
void rotate(const T* x, int64_t each, const T* cosine, const T* sine, float* to) {
  const int64_t half = each / 2, whole = half / LANES * LANES;
  const auto turned = [&](const Floats& a, const Floats& b, int64_t at) {
    return rounded<T>(rounded<T>(a * load(cosine + at)) + rounded<T>(b * load(sine + at)));
  };
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats first = load(x + i), second = load(x + i + half);
    store(to + i, turned(first, -second, i));
    store(to + i + half, turned(second, first, i + half));
  }
  const auto product = [](float a, float b) { return static_cast<float>(static_cast<T>(a * b)); };
  for (int64_t i = whole; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    to[i] = static_cast<T>(product(first, cosine[i]) + product(-second, sine[i]));
    to[i + half] = static_cast<T>(product(second, cosine[i + half]) + product(first, sine[i + half]));
  }
}

// sum + w x, of as many numbers as one step takes: LANES, or twice that by bfloat16 products.
template <typename T>
constexpr int STEP = LANES;
template <typename T>
inline Floats plus_product(const Floats& sum, const T* w, const T* x) {
  return sum + load(w) * load(x);
}
#ifdef __AVX512BF16__
template <>
constexpr int STEP<at::BFloat16> = 2 * LANES;
template <>
inline Floats plus_product(const Floats& sum, const at::BFloat16* w, const at::BFloat16* x) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
}
#endif

// sums[r] adds up to row r of W times x, of `rows` rows of `k` numbers; the last few, if they fill no step, are left out.
template <int rows, typename T>
inline void dots(const T* w, const T* x, int64_t k, Floats* sums) {
  constexpr int wide = rows == 1 ? 4 : 1, step = STEP<T>;
  Floats found[rows][wide] = {};
  int64_t i = 0;
  for (; i + wide * step <= k; i += wide * step)
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < wide; ++j) found[r][j] = plus_product(found[r][j], w + r * k + i + j * step, x + i + j * step);
  for (; i + step <= k; i += step)
    for (int r = 0; r < rows; ++r) found[r][0] = plus_product(found[r][0], w + r * k + i, x + i);
  for (int r = 0; r < rows; ++r) {
    sums[r] = found[r][0];
    for (int j = 1; j < wide; ++j) sums[r] += found[r][j];
  }
}

// y = W x for `n` rows of W, each of `k` numbers; `back`: the last rows first.
template <int rows, typename T, typename Y = T>
void product(const T* w, const T* x, Y* y, int64_t n, int64_t k, bool back = false) {
  const int64_t whole = k / STEP<T> * STEP<T>;
  const auto rest = [&](int64_t row) {
    float sum = 0.f;
    for (int64_t i = whole; i < k; ++i) sum += static_cast<float>(w[row * k + i]) * static_cast<float>(x[i]);
    return sum;
  };
  const int64_t blocks = n / LANES;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = (back ? blocks - 1 - block : block) * LANES;
    Floats sums[LANES];
    for (int at = 0; at < LANES; at += rows) dots<rows>(w + (row + at) * k, x, k, sums + at);
    const Floats found = totals(sums);
    for (int lane = 0; lane < LANES; ++lane) y[row + lane] = static_cast<Y>(found[lane] + rest(row + lane));
  }
  for (int64_t row = blocks * LANES; row < n; ++row) {
    Floats sum;
    dots<1>(w + row * k, x, k, &sum);
    y[row] = static_cast<Y>(total(sum) + rest(row));
  }
}

template <typename T>
struct Map {
  const T* weight;  // (n, k)
  T* output;
  int64_t n;
};

// The maps of one input: every thread takes its share of each.
template <int rows, typename T>
void multiply(std::initializer_list<Map<T>> maps, const T* x, int64_t k, bool back = false) {
  int64_t work = 0;
  for (const auto& map : maps) work += map.n * k;
  const int64_t parts = std::clamp<int64_t>(work / SHARE, 1, at::get_num_threads());
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (const auto& map : maps) {
      const auto bound = [&](int64_t part) { return part == parts ? map.n : map.n * part / parts / LANES * LANES; };
      const int64_t first = bound(begin);
      product<rows>(map.weight + first * k, x, map.output + first, bound(end) - first, k, back);
    }
  });
}

template <typename T>
const T* weight(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "routed tokens: weights and states must be contiguous");
  return tensor.const_data_ptr<T>();  // checks the type as well
}

// weights . gelu(x), by the tanh form; both have `count` numbers and x room up to a multiple of LANES.
template <typename T>
float gelu_dot(float* x, const T* weights, int64_t count) {
  std::vector<float> last(padded(count), 0.f);
  for (int64_t i = 0; i < count; ++i) last[i] = weights[i];
  for (int64_t i = count; i % LANES; ++i) x[i] = 0.f;
  Floats sum = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats v = load(x + i), u = 0.7978845608f * (v + 0.044715f * v * v * v);
    const Floats e = exponential(u < 0.f ? 2.f * u : -2.f * u), tanh = (1.f - e) / (1.f + e);
    sum += load(last.data() + i) * 0.5f * v * (1.f + (u < 0.f ? -tanh : tanh));
  }
  return total(sum);
}

// `lanes` x LANES numbers of one head, filtered: several sums at once, since each waits for its last product.
template <int lanes, typename T, typename Y>
inline void filter(const float* taps, int64_t count, const T* newest, int64_t size, Y* to) {
  Floats sums[lanes] = {};
  for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < lanes; ++i) sums[i] += taps[j] * load(newest - j * size + i * LANES);
  for (int i = 0; i < lanes; ++i)
    for (int lane = 0; lane < LANES; ++lane) to[i * LANES + lane] = static_cast<Y>(sums[i][lane]);
}

// All `each` numbers of one head.
template <typename T, typename Y>
void filter_head(const float* taps, int64_t count, const T* newest, int64_t size, Y* to, int64_t each) {
  int64_t at = 0;
  for (; at + 4 * LANES <= each; at += 4 * LANES) filter<4>(taps, count, newest + at, size, to + at);
  for (; at + LANES <= each; at += LANES) filter<1>(taps, count, newest + at, size, to + at);
  for (; at < each; ++at) {
    float sum = 0.f;
    for (int64_t j = 0; j < count; ++j) sum += taps[j] * static_cast<float>(newest[at - j * size]);
    to[at] = static_cast<Y>(sum);
  }
}

// Attention of one query (1, heads, 1, size) to the first `length` of keys and values (1, key heads, capacity, size):
// (1, 1, heads, size). By the operator of few_tokens.cpp, which must be loaded.
inline at::Tensor attend_one(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, int64_t length,
                             double scale) {
  static const auto few =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("layerwise::few_token_attention", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            double, std::optional<int64_t>)>();
  return few.call(query, keys, values, std::nullopt, scale, length);
}

template <typename Run>
auto of_type(const at::Tensor& like, const Run& run) {
  return like.scalar_type() == at::kFloat ? run(0.f) : run(at::BFloat16(0.f));
}

}  // namespace vectors
