// The two products of a decoder layer, for a few tokens.
//
// Linear maps, y = x W^T: x (tokens, k), W (n, k), both row-major.
// A general matrix product is made for large x; for 2 to 32 tokens it reaches a fraction of the memory bandwidth.
// Here W is streamed once, in tiles of a few rows. A tile stays in the first-level cache while it meets all tokens, a
// group of them at a time, so that rows x group sums live in registers; meanwhile the next tile is prefetched.
// Sums are kept in float32. Vectors are the compiler's own (GCC and Clang), so no instruction set is named, except
// for bfloat16 dot products where the processor has them.
//
// Attention over a cache: the scores of a head are made for 16 keys at a time, which end in one vector. Keys and values
// are read where they are; a fused kernel of the framework would first copy them out of the preallocated cache.

#include "vectors.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using namespace vectors;

constexpr int64_t AHEAD = 24;  // keys, and values, that are fetched beforehand

constexpr int64_t BLOCK = 64;  // keys whose values meet all tokens while they are in the first-level cache

// One tile of `rows` rows of W with `tokens` tokens of x. k is a multiple of LANES.
template <int rows, int tokens, typename W, typename Y>
inline void tile(const W* w, const float* x, Y* y, int64_t k, int64_t n, bool fetch) {
  Floats sums[rows][tokens] = {};
  for (int64_t i = 0; i < k; i += LANES) {
    Floats weights[rows];
    if (fetch) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) __builtin_prefetch(w + (rows + r) * k + i, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) weights[r] = load(w + r * k + i);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const Floats inputs = load(x + t * k + i);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sums[r][t] += weights[r] * inputs;
    }
  }
  store(sums, y, n);
}

#ifdef __AVX512BF16__
// The same with bfloat16 products of 32 lanes, summed in float32. k is a multiple of 2 * LANES.
template <int rows, int tokens, typename Y>
inline void tile(const at::BFloat16* w, const at::BFloat16* x, Y* y, int64_t k, int64_t n, bool fetch) {
  Floats sums[rows][tokens] = {};
  for (int64_t i = 0; i < k; i += 2 * LANES) {
    __m512bh weights[rows];
    if (fetch) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) __builtin_prefetch(w + (rows + r) * k + i, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) weights[r] = (__m512bh)_mm512_loadu_si512(w + r * k + i);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const __m512bh inputs = (__m512bh)_mm512_loadu_si512(x + t * k + i);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sums[r][t] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][t], weights[r], inputs);
    }
  }
  store(sums, y, n);
}
#endif

// `rows` rows of W with all tokens, `group` of them at a time.
template <int rows, int group, typename W, typename X, typename Y>
inline void all_tokens(const W* w, const X* x, Y* y, int64_t tokens, int64_t k, int64_t n) {
  static_assert(group <= 8);
  for (int64_t t = 0; t < tokens; t += group) {
    const X* const in = x + t * k;
    Y* const out = y + t * n;
    const bool fetch = t == 0;
    switch (std::min<int64_t>(tokens - t, group)) {
      case 1: tile<rows, 1>(w, in, out, k, n, fetch); break;
      case 2: tile<rows, 2>(w, in, out, k, n, fetch); break;
      case 3: tile<rows, 3>(w, in, out, k, n, fetch); break;
      case 4: tile<rows, 4>(w, in, out, k, n, fetch); break;
      case 5: tile<rows, 5>(w, in, out, k, n, fetch); break;
      case 6: tile<rows, 6>(w, in, out, k, n, fetch); break;
      case 7: tile<rows, std::min(7, group)>(w, in, out, k, n, fetch); break;
      default: tile<rows, group>(w, in, out, k, n, fetch);
    }
  }
}

// The maps of one input, W_0 ... W_g, in one parallel region: blocks of `rows` rows are dealt out over all of them.
template <int rows, int group, typename W, typename X>
void multiply(const std::vector<const W*>& weights, const std::vector<W*>& outputs, const std::vector<int64_t>& sizes,
              const X* x, int64_t tokens, int64_t k) {
  std::vector<int64_t> first(sizes.size() + 1, 0);  // number of the first block of each map
  for (size_t map = 0; map < sizes.size(); ++map) first[map + 1] = first[map] + sizes[map] / rows;
  at::parallel_for(0, first.back(), 8, [&](int64_t begin, int64_t end) {
    for (size_t map = 0; map < sizes.size(); ++map) {
      const int64_t stop = std::min(end, first[map + 1]) - first[map];
      for (int64_t block = std::max(begin, first[map]) - first[map]; block < stop; ++block)
        all_tokens<rows, group>(weights[map] + block * rows * k, x, outputs[map] + block * rows, tokens, k, sizes[map]);
    }
  });
  for (size_t map = 0; map < sizes.size(); ++map)
    for (int64_t row = sizes[map] / rows * rows; row < sizes[map]; ++row)
      all_tokens<1, 8>(weights[map] + row * k, x, outputs[map] + row, tokens, k, sizes[map]);
}

template <typename W, typename X>
void multiply(const at::Tensor& x, at::TensorList weights, const std::vector<at::Tensor>& outputs, int64_t k) {
  std::vector<const W*> from;
  std::vector<W*> to;
  std::vector<int64_t> sizes;
  for (size_t map = 0; map < weights.size(); ++map) {
    from.push_back(weights[map].const_data_ptr<W>());
    to.push_back(outputs[map].mutable_data_ptr<W>());
    sizes.push_back(weights[map].size(0));
  }
  const int64_t tokens = x.numel() / k;
  if (tokens <= 6)  // 24 sums either way, as many as registers hold
    multiply<4, 6>(from, to, sizes, x.const_data_ptr<X>(), tokens, k);
  else
    multiply<3, 8>(from, to, sizes, x.const_data_ptr<X>(), tokens, k);
}

std::vector<at::Tensor> few_token_linear(const at::Tensor& input, at::TensorList weights) {
  const int64_t k = input.size(-1);
  const auto type = input.scalar_type();
  bool fits = k % (2 * LANES) == 0 && (type == at::kFloat || type == at::kBFloat16);
  for (const auto& weight : weights) fits = fits && weight.is_contiguous() && weight.scalar_type() == type;
  std::vector<at::Tensor> outputs;
  for (const auto& weight : weights) {
    if (fits) {
      auto sizes = input.sizes().vec();
      sizes.back() = weight.size(0);
      outputs.push_back(at::empty(sizes, weight.options()));
    } else {
      outputs.push_back(at::linear(input, weight));
    }
  }
  if (!fits) return outputs;
  const auto x = input.contiguous();
  if (type == at::kFloat) {
    multiply<float, float>(x, weights, outputs, k);
  } else {
#ifdef __AVX512BF16__
    multiply<at::BFloat16, at::BFloat16>(x, weights, outputs, k);
#else
    multiply<at::BFloat16, float>(x.to(at::kFloat), weights, outputs, k);
#endif
  }
  return outputs;
}

// scores[t][key] = query[t] . keys[key], query (tokens, size) and keys (length, size); a row of scores has room for
// `stride` of them, a multiple of LANES no less than length.
template <typename T>
void score(const float* query, const T* keys, float* scores, int64_t tokens, int64_t length, int64_t size,
           int64_t stride, std::vector<float>& spare) {
  for (int64_t key = 0; key < length; key += LANES) {
    const T* const from = keys + key * size;
    const float* block = reinterpret_cast<const float*>(from);
    const int64_t count = std::min<int64_t>(LANES, length - key);
    if (count < LANES || !std::is_same_v<T, float>) {
      spare.resize(LANES * size);
      for (int64_t i = 0; i < count * size; i += LANES) {
        const Floats loaded = load(from + i);
        std::memcpy(spare.data() + i, &loaded, sizeof loaded);
      }
      block = spare.data();
    }
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sums[LANES] = {};
      for (int64_t i = 0; i < size; i += LANES) {
        const Floats inputs = load(query + t * size + i);
#pragma GCC unroll 16
        for (int k = 0; k < LANES; ++k) {
          if (t == 0) __builtin_prefetch(from + (AHEAD + k) * size + i, 0, 2);
          sums[k] += load(block + k * size + i) * inputs;
        }
      }
      const Floats found = totals(sums);
      std::memcpy(scores + t * stride + key, &found, sizeof found);
    }
  }
}

// Softmax of scores (scaled, plus mask if there is one) in place; the row has room up to a multiple of LANES. Returns
// 1 / sum.
inline float soften(float* scores, const float* mask, int64_t keys, float scale) {
  Floats bests = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + LANES <= keys; i += LANES) {
    const Floats scaled = load(scores + i) * scale + (mask ? load(mask + i) : Floats{});
    std::memcpy(scores + i, &scaled, sizeof scaled);
    bests = scaled > bests ? scaled : bests;
  }
  float most = -INFINITY;
  for (int lane = 0; lane < LANES; ++lane) most = std::max(most, bests[lane]);
  for (; i < keys; ++i) {
    scores[i] = scores[i] * scale + (mask ? mask[i] : 0.f);
    most = std::max(most, scores[i]);
  }
  for (; i % LANES; ++i) scores[i] = -INFINITY;
  Floats sum = {};
  for (i = 0; i < keys; i += LANES) {
    const Floats e = exponential(load(scores + i) - most);
    std::memcpy(scores + i, &e, sizeof e);
    sum += e;
  }
  for (i = keys; i % LANES; ++i) sum[0] -= scores[i];  // exp(-87) each, at most
  return 1.f / total(sum);
}

// to[t] += sum over `keys` keys of weights[t][key] * values[key], of `lanes` x LANES numbers of each value.
template <int tokens, int lanes, typename V>
inline void mix(const float* weights, int64_t stride, const V* values, int64_t keys, int64_t size, float* to) {
  Floats sums[tokens][lanes];
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < lanes; ++i) sums[t][i] = load(to + t * size + i * LANES);
  for (int64_t key = 0; key < keys; ++key) {
    Floats value[lanes];
    for (int i = 0; i < lanes; ++i) {
      __builtin_prefetch(values + (key + AHEAD) * size + i * LANES, 0, 2);
      value[i] = load(values + key * size + i * LANES);
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < lanes; ++i) sums[t][i] += weights[t * stride + key] * value[i];
  }
  for (int t = 0; t < tokens; ++t)
    for (int i = 0; i < lanes; ++i) std::memcpy(to + t * size + i * LANES, &sums[t][i], sizeof(Floats));
}

// The same for any number of tokens.
template <int lanes, typename V>
void mix_all(const float* weights, int64_t stride, const V* values, int64_t keys, int64_t size, float* to, int64_t tokens) {
  for (int64_t t = 0; t < tokens; t += 6) {  // 24 sums at most, as many as registers hold
    const float* const from = weights + t * stride;
    float* const out = to + t * size;
    switch (std::min<int64_t>(6, tokens - t)) {
      case 1: mix<1, lanes>(from, stride, values, keys, size, out); break;
      case 2: mix<2, lanes>(from, stride, values, keys, size, out); break;
      case 3: mix<3, lanes>(from, stride, values, keys, size, out); break;
      case 4: mix<4, lanes>(from, stride, values, keys, size, out); break;
      case 5: mix<5, lanes>(from, stride, values, keys, size, out); break;
      default: mix<6, lanes>(from, stride, values, keys, size, out);
    }
  }
}

template <typename T>
void attend_head(const float* query, const T* keys, const T* values, const float* mask, T* out, int64_t tokens,
                 int64_t length, int64_t size, int64_t out_stride, float scale, std::vector<float>& scores,
                 std::vector<float>& spare) {
  const int64_t stride = (length + LANES - 1) / LANES * LANES;
  scores.resize(tokens * stride);
  score(query, keys, scores.data(), tokens, length, size, stride, spare);
  std::vector<float> norms(tokens);
  for (int64_t t = 0; t < tokens; ++t)
    norms[t] = soften(scores.data() + t * stride, mask ? mask + t * length : nullptr, length, scale);
  spare.assign(tokens * size, 0.f);  // the sums, from here on
  for (int64_t key = 0; key < length; key += BLOCK) {
    const int64_t count = std::min(BLOCK, length - key);
    int64_t at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES)
      mix_all<4>(scores.data() + key, stride, values + key * size + at, count, size, spare.data() + at, tokens);
    for (; at < size; at += LANES)
      mix_all<1>(scores.data() + key, stride, values + key * size + at, count, size, spare.data() + at, tokens);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < size; ++i) out[t * out_stride + i] = static_cast<T>(spare[t * size + i] * norms[t]);
}

// query (rows, heads, tokens, size), keys and values (rows, key heads, capacity, size) of which the first `known` count,
// mask (rows, 1, tokens, known) added to the scaled scores, float32. Without one `known` is given, and all tokens see all
// of them. Gives (rows, tokens, heads, size).
at::Tensor few_token_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                               const std::optional<at::Tensor>& mask, double scale, std::optional<int64_t> known) {
  const int64_t rows = query.size(0), heads = query.size(1), tokens = query.size(2), size = query.size(3);
  const int64_t groups = keys.size(1), capacity = keys.size(2), shared = heads / groups;
  const int64_t length = mask ? mask->size(3) : known.value_or(capacity);
  TORCH_CHECK(length <= capacity, "few_token_attention: sizes do not fit");
  const auto type = keys.scalar_type();
  const bool fits = keys.is_contiguous() && values.is_contiguous() && size % (2 * LANES) == 0 &&
                    (type == at::kFloat || type == at::kBFloat16) && query.scalar_type() == type;
  if (!fits) {
    const auto k = keys.narrow(2, 0, length).repeat_interleave(shared, 1);
    const auto v = values.narrow(2, 0, length).repeat_interleave(shared, 1);
    const auto bias = mask ? std::optional(mask->to(type)) : std::nullopt;
    return at::scaled_dot_product_attention(query, k, v, bias, 0.0, false, scale).transpose(1, 2).contiguous();
  }
  const auto q = query.to(at::kFloat).contiguous(), m = mask ? mask->contiguous() : at::Tensor();
  const float* const bias = mask ? m.const_data_ptr<float>() : nullptr;
  auto out = at::empty({rows, tokens, heads, size}, query.options());
  const auto run = [&](auto* result, const auto* k, const auto* v) {
    const float* const inputs = q.const_data_ptr<float>();
    at::parallel_for(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scores, spare;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / heads, head = item % heads, group = row * groups + head / shared;
        attend_head(inputs + item * tokens * size, k + group * capacity * size, v + group * capacity * size,
                    bias ? bias + row * tokens * length : nullptr, result + (row * tokens * heads + head) * size,
                    tokens, length, size, heads * size, static_cast<float>(scale), scores, spare);
      }
    });
  };
  if (type == at::kFloat)
    run(out.mutable_data_ptr<float>(), keys.const_data_ptr<float>(), values.const_data_ptr<float>());
  else
    run(out.mutable_data_ptr<at::BFloat16>(), keys.const_data_ptr<at::BFloat16>(),
        values.const_data_ptr<at::BFloat16>());
  return out;
}

}  // namespace

TORCH_LIBRARY(layerwise, library) {
  library.def("few_token_linear(Tensor input, Tensor[] weights) -> Tensor[]");
  library.def("few_token_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale,"
              " int? length=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerwise, CPU, library) {
  library.impl("few_token_linear", few_token_linear);
  library.impl("few_token_attention", few_token_attention);
}
