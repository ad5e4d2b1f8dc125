// Vectors of 16 floats, by the compiler's own types (GCC and Clang): loading, adding up, exponentials.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BW__) || defined(__AVX512DQ__)
#include <immintrin.h>
#endif

namespace vectors {

constexpr int LANES = 16;

using Floats = float __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Eight = float __attribute__((vector_size(32)));
using Four = float __attribute__((vector_size(16)));

inline Floats load(const float* from) {
  Floats loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

inline Floats load(const at::BFloat16* from) {  // a bfloat16 is the upper half of a float32
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats loaded;
  std::memcpy(&loaded, &words, sizeof loaded);
  return loaded;
}

// Numbers as T keeps them: to the nearest, of two the even one.
inline void store(float* to, const Floats& numbers) { std::memcpy(to, &numbers, sizeof numbers); }

inline void store(at::BFloat16* to, const Floats& numbers) {
  Words words;
  std::memcpy(&words, &numbers, sizeof words);
  const Words nearest = (words + 0x7fffu + (words >> 16 & 1u)) >> 16;
  const Halves halves = __builtin_convertvector(numbers == numbers ? nearest : Words{} + 0x7fc0u, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

template <typename T>
inline Floats rounded(const Floats& numbers) {
  T kept[LANES];
  store(kept, numbers);
  return load(kept);
}

// The lanes in which `found`, a comparison, is true, as bits.
inline uint32_t lanes_of(const Ints& found) {
#ifdef __AVX512DQ__
  return _mm512_movepi32_mask((__m512i)found);
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= (found[lane] & 1u) << lane;
  return bits;
#endif
}

// sum + 2 * LANES products of bytes and 16-bit numbers, two a lane.
inline Ints plus_products(const Ints& sum, const int8_t* bytes, const int16_t* numbers) {
#ifdef __AVX512BW__  // the compiler takes one byte after the other
  const __m512i widened = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  const __m512i with = _mm512_loadu_si512(numbers);
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, widened, with);
#else
  return sum + (Ints)_mm512_madd_epi16(widened, with);
#endif
#else
  Ints sums = sum;
  for (int lane = 0; lane < LANES; ++lane)
    sums[lane] += bytes[2 * lane] * numbers[2 * lane] + bytes[2 * lane + 1] * numbers[2 * lane + 1];
  return sums;
#endif
}

inline float total(const Floats& sums) {
  Eight low, high;
  std::memcpy(&low, &sums, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&sums) + sizeof low, sizeof high);
  low += high;
  Four first, second;
  std::memcpy(&first, &low, sizeof first);
  std::memcpy(&second, reinterpret_cast<const char*>(&low) + sizeof first, sizeof second);
  first += second;
  return (first[0] + first[1]) + (first[2] + first[3]);
}

// The first half of every run of 2 * `width` lanes of a and b, plus the second half: `width` lanes of a, then b.
template <int width>
inline Floats halved(const Floats& a, const Floats& b) {
  Ints first;
  for (int lane = 0; lane < LANES; ++lane) first[lane] = lane / width * 2 * width + lane % width;
#ifdef __clang__
  Floats low, high;
  for (int lane = 0; lane < LANES; ++lane) {
    const int at = first[lane];
    low[lane] = at < LANES ? a[at] : b[at - LANES];
    high[lane] = at < LANES ? a[at + width] : b[at + width - LANES];
  }
  return low + high;
#else
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + width);
#endif
}

// The totals of LANES vectors, in order: four rounds of halving instead of one reduction each.
inline Floats totals(const Floats* sums) {
  Floats eight[8], four[4], two[2];
  for (int i = 0; i < 8; ++i) eight[i] = halved<8>(sums[2 * i], sums[2 * i + 1]);
  for (int i = 0; i < 4; ++i) four[i] = halved<4>(eight[2 * i], eight[2 * i + 1]);
  for (int i = 0; i < 2; ++i) two[i] = halved<2>(four[2 * i], four[2 * i + 1]);
  return halved<1>(two[0], two[1]);
}

// y[t][r] = total(sums[r][t]).
template <int rows, int tokens, typename Y>
inline void store(const Floats (&sums)[rows][tokens], Y* y, int64_t n) {
  constexpr int each = LANES / 4;  // tokens of a vector of totals
  for (int begin = 0; begin < tokens; begin += each) {
    Floats chosen[LANES] = {};
    for (int t = begin; t < std::min(tokens, begin + each); ++t)
      for (int r = 0; r < rows; ++r) chosen[4 * (t - begin) + r] = sums[r][t];
    const Floats found = totals(chosen);
    for (int t = begin; t < std::min(tokens, begin + each); ++t)
      for (int r = 0; r < rows; ++r) y[t * n + r] = static_cast<Y>(found[4 * (t - begin) + r]);
  }
}

// exp(x) for x <= 0, to 2e-7: 2^n times a polynomial on half a unit either side of 0 (Cephes' expf).
inline Floats exponential(Floats x) {
  x = x < -87.f ? Floats{} - 87.f : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // towards 0, so up: the nearest integer
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const Ints bits = (n + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

}  // namespace vectors
