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

#include "attention.h"
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
