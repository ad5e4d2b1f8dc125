// Attention of a few queries of one head to keys and values that lie in a cache, read where they are.
//
// The scores of a head are made for 16 keys at a time, which end in one vector.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace vectors {

constexpr int64_t AHEAD = 24;  // keys, and values, that are fetched beforehand
constexpr int64_t BLOCK = 64;  // keys whose values meet all tokens while they are in the first-level cache

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
        store(spare.data() + i, load(from + i));
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
      store(scores + t * stride + key, found);
    }
  }
}

// What a softmax is of: exp(score - most) adds up to `sum`.
struct Softened {
  float most = -INFINITY, sum = 0.f;
};

// exp(score - most) of scores (scaled, plus mask if there is one) in place; the row has room up to a multiple of LANES.
inline Softened soften(float* scores, const float* mask, int64_t keys, float scale) {
  Floats bests = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + LANES <= keys; i += LANES) {
    const Floats scaled = load(scores + i) * scale + (mask ? load(mask + i) : Floats{});
    store(scores + i, scaled);
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
    store(scores + i, e);
    sum += e;
  }
  for (i = keys; i % LANES; ++i) sum[0] -= scores[i];  // exp(-87) each, at most
  return {most, total(sum)};
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
    for (int i = 0; i < lanes; ++i) store(to + t * size + i * LANES, sums[t][i]);
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

// What queries (queries, size) of heads that share keys and values see of `length` of these: in `sums` (queries, size) the
// values, each times exp(score - most), and in `seen` what makes that a mean. Query q has row q % tokens of the mask, whose
// rows are `mask_stride` apart.
template <typename T>
void attend_part(const float* query, int64_t queries, const T* keys, const T* values, int64_t length, int64_t size,
                 const float* mask, int64_t mask_stride, int64_t tokens, float scale, float* sums, Softened* seen,
                 std::vector<float>& scores, std::vector<float>& spare) {
  const int64_t stride = (length + LANES - 1) / LANES * LANES;
  scores.resize(queries * stride);
  score(query, keys, scores.data(), queries, length, size, stride, spare);
  for (int64_t q = 0; q < queries; ++q)
    seen[q] = soften(scores.data() + q * stride, mask ? mask + q % tokens * mask_stride : nullptr, length, scale);
  std::fill_n(sums, queries * size, 0.f);
  for (int64_t key = 0; key < length; key += BLOCK) {
    const int64_t count = std::min(BLOCK, length - key);
    int64_t at = 0;
    for (; at + 4 * LANES <= size; at += 4 * LANES)
      mix_all<4>(scores.data() + key, stride, values + key * size + at, count, size, sums + at, queries);
    for (; at < size; at += LANES)
      mix_all<1>(scores.data() + key, stride, values + key * size + at, count, size, sums + at, queries);
  }
}

// The same of all `length` keys, and the means: out (tokens, size), rows `out_stride` apart.
template <typename T>
void attend_head(const float* query, const T* keys, const T* values, const float* mask, T* out, int64_t tokens,
                 int64_t length, int64_t size, int64_t out_stride, float scale, std::vector<float>& scores,
                 std::vector<float>& spare) {
  std::vector<float> sums(tokens * size);
  std::vector<Softened> seen(tokens);
  attend_part(query, tokens, keys, values, length, size, mask, length, tokens, scale, sums.data(), seen.data(), scores,
              spare);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < size; ++i) out[t * out_stride + i] = static_cast<T>(sums[t * size + i] * (1.f / seen[t].sum));
}

// One query's mean over `parts` parts, which saw other keys each: sums of part p stand at p * sums_stride, what makes them
// a mean at p * seen_stride.
template <typename T>
void join(const float* sums, int64_t sums_stride, const Softened* seen, int64_t seen_stride, int64_t parts, int64_t size,
          T* out, std::vector<float>& shares) {
  float most = -INFINITY, all = 0.f;
  for (int64_t p = 0; p < parts; ++p) most = std::max(most, seen[p * seen_stride].most);
  shares.resize(parts);
  for (int64_t p = 0; p < parts; ++p) {
    shares[p] = std::exp(seen[p * seen_stride].most - most);
    all += shares[p] * seen[p * seen_stride].sum;
  }
  for (int64_t i = 0; i < size; i += LANES) {
    Floats mean = {};
    for (int64_t p = 0; p < parts; ++p) mean += load(sums + p * sums_stride + i) * (shares[p] / all);
    store(out + i, mean);
  }
}

}  // namespace vectors
