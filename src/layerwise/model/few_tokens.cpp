// The two products of a decoder layer, for a few tokens; and what a routed layer does for one.
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
#include <tuple>
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
        for (int k = 0; k < LANES; ++k) sums[k] += load(block + k * size + i) * inputs;
      }
      const Floats found = totals(sums);
      std::memcpy(scores + t * stride + key, &found, sizeof found);
    }
  }
}

// Softmax of scores (scaled, plus mask) in place; the row has room up to a multiple of LANES. Returns 1 / sum.
inline float soften(float* scores, const float* mask, int64_t keys, float scale) {
  Floats bests = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + LANES <= keys; i += LANES) {
    const Floats scaled = load(scores + i) * scale + load(mask + i);
    std::memcpy(scores + i, &scaled, sizeof scaled);
    bests = scaled > bests ? scaled : bests;
  }
  float most = -INFINITY;
  for (int lane = 0; lane < LANES; ++lane) most = std::max(most, bests[lane]);
  for (; i < keys; ++i) {
    scores[i] = scores[i] * scale + mask[i];
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

// out[t] = sum over keys of weights[t][key] * values[key], for LANES values at a time.
template <int tokens, typename V>
inline void mix(const float* weights, int64_t stride, const V* values, int64_t keys, int64_t size, Floats* out) {
  Floats sums[tokens] = {};
  for (int64_t key = 0; key < keys; ++key) {
    const Floats value = load(values + key * size);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) sums[t] += weights[t * stride + key] * value;
  }
  for (int t = 0; t < tokens; ++t) out[t] = sums[t];
}

template <typename T>
void attend_head(const float* query, const T* keys, const T* values, const float* mask, T* out, int64_t tokens,
                 int64_t length, int64_t size, int64_t out_stride, float scale, std::vector<float>& scores,
                 std::vector<float>& spare) {
  const int64_t stride = (length + LANES - 1) / LANES * LANES;
  scores.resize(tokens * stride);
  score(query, keys, scores.data(), tokens, length, size, stride, spare);
  std::vector<float> norms(tokens);
  for (int64_t t = 0; t < tokens; ++t) norms[t] = soften(scores.data() + t * stride, mask + t * length, length, scale);
  for (int64_t at = 0; at < size; at += LANES) {
    for (int64_t t = 0; t < tokens; t += 8) {
      const float* const weights = scores.data() + t * stride;
      Floats mixed[8];
      const int64_t now = std::min<int64_t>(8, tokens - t);
      switch (now) {
        case 1: mix<1>(weights, stride, values + at, length, size, mixed); break;
        case 2: mix<2>(weights, stride, values + at, length, size, mixed); break;
        case 3: mix<3>(weights, stride, values + at, length, size, mixed); break;
        case 4: mix<4>(weights, stride, values + at, length, size, mixed); break;
        case 5: mix<5>(weights, stride, values + at, length, size, mixed); break;
        case 6: mix<6>(weights, stride, values + at, length, size, mixed); break;
        case 7: mix<7>(weights, stride, values + at, length, size, mixed); break;
        default: mix<8>(weights, stride, values + at, length, size, mixed);
      }
      for (int64_t i = 0; i < now; ++i)
        for (int lane = 0; lane < LANES; ++lane)
          out[(t + i) * out_stride + at + lane] = static_cast<T>(mixed[i][lane] * norms[t + i]);
    }
  }
}

// query (rows, heads, tokens, size), keys and values (rows, key heads, capacity, size) of which the first `length`
// count, mask (rows, 1, tokens, length) added to the scaled scores, float32. Gives (rows, tokens, heads, size).
at::Tensor few_token_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                               const at::Tensor& mask, double scale) {
  const int64_t rows = query.size(0), heads = query.size(1), tokens = query.size(2), size = query.size(3);
  const int64_t groups = keys.size(1), capacity = keys.size(2), length = mask.size(3), shared = heads / groups;
  const auto type = keys.scalar_type();
  const bool fits = keys.is_contiguous() && values.is_contiguous() && size % (2 * LANES) == 0 &&
                    (type == at::kFloat || type == at::kBFloat16) && query.scalar_type() == type;
  if (!fits) {
    const auto k = keys.narrow(2, 0, length).repeat_interleave(shared, 1);
    const auto v = values.narrow(2, 0, length).repeat_interleave(shared, 1);
    return at::scaled_dot_product_attention(query, k, v, mask.to(type), 0.0, false, scale).transpose(1, 2).contiguous();
  }
  const auto q = query.to(at::kFloat).contiguous(), m = mask.contiguous();
  auto out = at::empty({rows, tokens, heads, size}, query.options());
  const auto run = [&](auto* result, const auto* k, const auto* v) {
    const float* const inputs = q.const_data_ptr<float>();
    at::parallel_for(0, rows * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scores, spare;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / heads, head = item % heads, group = row * groups + head / shared;
        attend_head(inputs + item * tokens * size, k + group * capacity * size, v + group * capacity * size,
                    m.const_data_ptr<float>() + row * tokens * length, result + (row * tokens * heads + head) * size,
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

// -- one token of a routed layer: see routed_attention.py -------------------------------------------------------------

// The router: the logit of hidden (1, 1, size), and the moving average (1, width) after it. inputs (2 width, size) are
// the maps of the token and of the average, out (1, width); `before` (1, width) is the average so far, if any.
template <typename T>
std::tuple<float, at::Tensor> route(const at::Tensor& hidden, const at::Tensor& inputs, const at::Tensor& bias,
                                    const at::Tensor& out, const at::Tensor& out_bias,
                                    const std::optional<at::Tensor>& before, float decay) {
  const auto both = few_token_linear(hidden, {inputs})[0];
  const int64_t width = out.size(-1);
  auto average = at::empty({1, width}, hidden.options());
  const T *const mapped = both.const_data_ptr<T>(), *const b = bias.const_data_ptr<T>();
  const T *const last = out.const_data_ptr<T>(), *const old = before ? before->const_data_ptr<T>() : nullptr;
  T* const kept = average.mutable_data_ptr<T>();
  float logit = out_bias.const_data_ptr<T>()[0];
  for (int64_t i = 0; i < width; ++i) {
    const float past = (1.f - decay) * (mapped[width + i] + b[width + i]) + (old ? decay * old[i] : 0.f);
    kept[i] = static_cast<T>(past);
    const float x = mapped[i] + b[i] + past;
    logit += last[i] * 0.5f * x * (1.f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
  }
  return {logit, average};
}

// `lanes` x LANES numbers of one head, filtered: several sums at once, since each waits for its last product.
template <int lanes, typename T>
inline void filter(const float* taps, int64_t count, const T* newest, int64_t size, T* to) {
  Floats sums[lanes] = {};
  for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < lanes; ++i) sums[i] += taps[j] * load(newest - j * size + i * LANES);
  for (int i = 0; i < lanes; ++i)
    for (int lane = 0; lane < LANES; ++lane) to[i * LANES + lane] = static_cast<T>(sums[i][lane]);
}

// The convolution: of hidden (1, tokens, size) the last token's output (1, 1, size) is wanted; the others waited for
// their values. `window` (1, capacity, size) holds `filled` values and gets the new ones; taps (heads, count) are
// float32, the newest first.
template <typename T>
at::Tensor convolve(const at::Tensor& hidden, const at::Tensor& value, const at::Tensor& output,
                    const at::Tensor& window, int64_t filled, const at::Tensor& taps) {
  const int64_t tokens = hidden.size(1), size = value.size(0), heads = taps.size(0), count = taps.size(1);
  const int64_t each = size / heads, last = filled + tokens - 1, seen = std::min(count, last + 1);
  TORCH_CHECK(last < window.size(1) && window.is_contiguous() && each % LANES == 0, "routed_token: sizes do not fit");
  const auto values = few_token_linear(hidden, {value})[0];
  auto mixed = at::empty({1, 1, size}, hidden.options());
  T* const kept = window.mutable_data_ptr<T>();
  std::memcpy(kept + filled * size, values.const_data_ptr<T>(), tokens * size * sizeof(T));
  T* const to = mixed.mutable_data_ptr<T>();
  for (int64_t head = 0; head < heads; ++head) {
    const float* const tap = taps.const_data_ptr<float>() + head * count;
    int64_t at = head * each;
    for (; at + 4 * LANES <= (head + 1) * each; at += 4 * LANES) filter<4>(tap, seen, kept + last * size + at, size, to + at);
    for (; at < (head + 1) * each; at += LANES) filter<1>(tap, seen, kept + last * size + at, size, to + at);
  }
  return few_token_linear(mixed, {output})[0];
}

// The router's logit and gate (1, 1), its average, and the convolution's output: (1, 1, size), or (1, 0, size) if the
// token attends. `gate` (1, 1) decides instead of the router, if given; `waiting` are the inputs of earlier tokens that
// the convolution has not seen yet.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> routed_token(
    const at::Tensor& hidden, at::TensorList router, const std::optional<at::Tensor>& before, double decay,
    const std::optional<at::Tensor>& gate, at::TensorList waiting, at::TensorList maps, const at::Tensor& window,
    int64_t filled, const at::Tensor& taps) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    auto [score, average] = route<T>(hidden, router[0], router[1], router[2], router[3], before, decay);
    auto logit = at::empty({1, 1}, hidden.options()), chosen = at::empty({1, 1}, hidden.options());
    const bool attends = gate ? gate->item().toFloat() > 0 : score > 0;
    logit.mutable_data_ptr<T>()[0] = static_cast<T>(score);
    chosen.mutable_data_ptr<T>()[0] = static_cast<T>(attends ? 1.f : 0.f);
    at::Tensor mixed;
    if (attends) {
      mixed = at::empty({1, 0, hidden.size(2)}, hidden.options());
    } else if (waiting.empty()) {
      mixed = convolve<T>(hidden, maps[0], maps[1], window, filled, taps);
    } else {
      auto inputs = waiting.vec();
      inputs.push_back(hidden);
      mixed = convolve<T>(at::cat(inputs, 1), maps[0], maps[1], window, filled, taps);
    }
    return std::make_tuple(logit, chosen, average, mixed);
  };
  return hidden.scalar_type() == at::kFloat ? run(0.f) : run(at::BFloat16(0.f));
}

}  // namespace

TORCH_LIBRARY(layerwise, library) {
  library.def("few_token_linear(Tensor input, Tensor[] weights) -> Tensor[]");
  library.def("few_token_attention(Tensor query, Tensor keys, Tensor values, Tensor mask, float scale) -> Tensor");
  library.def(
      "routed_token(Tensor hidden, Tensor[] router, Tensor? before, float decay, Tensor? gate, Tensor[] waiting,"
      " Tensor[] maps, Tensor(a!) window, int filled, Tensor taps) -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(layerwise, CPU, library) {
  library.impl("few_token_linear", few_token_linear);
  library.impl("few_token_attention", few_token_attention);
  library.impl("routed_token", routed_token);
}
