// The LM head for one token, thin: the logits of all tokens from a sketch, and those of the likeliest computed in full. See
// thin_head.py.
#pragma once

#include "one_token.h"

#include <ATen/ATen.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace vectors {

constexpr int64_t ROWS_AHEAD = 2;  // rows that do not lie together are fetched so long beforehand

// The final norm and the head: what operators are told of them, `bias` may be empty.
struct Head {
  const at::Tensor &norm, &weight, &bias;
  double epsilon;
  void check(int64_t size) const {
    TORCH_CHECK(weight.size(1) == size && norm.numel() == size && (!bias.numel() || bias.numel() == weight.size(0)),
                "token_head: sizes do not fit");
  }
};

// How many of LANES numbers are not less than `border`; up to 2^31 of such sums fit.
inline Ints at_least(const Floats& numbers, float border) { return -(numbers >= border); }

// How many of `values` are not less than `border`.
inline int64_t count_from(const float* values, int64_t size, float border) {
  Ints counts[4] = {};
  int64_t i = 0, found = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) counts[j] += at_least(load(values + i + j * LANES), border);
  for (; i < size; ++i) found += values[i] >= border;
  const Ints sums = counts[0] + counts[1] + counts[2] + counts[3];
  for (int lane = 0; lane < LANES; ++lane) found += sums[lane];
  return found;
}

// Where the `count` largest of `values` begin: so many or more are not less than `low`, fewer not less than `high`.
//
// Found by halving: to count what is above a value takes a microsecond or two, to sort a hundred times as long. It ends
// when `enough` at most are not less than `low`, or nothing lies between the two.
struct Border {
  float low, high;
  Border(const float* values, int64_t size, int64_t count, int64_t enough) : low(values[0]), high(values[0]) {
    Floats small = Floats{} + values[0], great = small;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const Floats now = load(values + i);
      small = now < small ? now : small;
      great = now > great ? now : great;
    }
    for (int lane = 0; lane < LANES; ++lane) low = std::min(low, small[lane]), high = std::max(high, great[lane]);
    for (; i < size; ++i) low = std::min(low, values[i]), high = std::max(high, values[i]);
    high = std::nextafter(high, INFINITY);
    for (int64_t from_low = size; from_low > enough;) {
      const float middle = low + (high - low) / 2;
      if (!(low < middle && middle < high)) break;
      const int64_t from = count_from(values, size, middle);
      if (from < count) {
        high = middle;
      } else {
        low = middle;
        from_low = from;
      }
    }
  }
};

// Some tokens, in order, and their logits.
struct Likely {
  std::vector<int64_t> places;
  std::vector<float> logits;
};

// Those of `size` tokens whose logits are not less than `border`; the first of them is token `first`.
inline Likely likely(const float* logits, int64_t size, float border, int64_t first) {
  Likely found;
  const auto add = [&](int64_t at) {
    found.places.push_back(first + at);
    found.logits.push_back(logits[at]);
  };
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    for (uint32_t lanes = lanes_of(load(logits + i) >= border); lanes; lanes &= lanes - 1) add(i + __builtin_ctz(lanes));
  for (; i < size; ++i)
    if (logits[i] >= border) add(i);
  return found;
}

// The `count` likeliest of them, in order; of equal ones at the border the first.
inline std::vector<int64_t> likeliest(const std::vector<Likely>& found, int64_t count) {
  Likely all;
  for (const auto& some : found) {
    all.places.insert(all.places.end(), some.places.begin(), some.places.end());
    all.logits.insert(all.logits.end(), some.logits.begin(), some.logits.end());
  }
  const int64_t size = all.logits.size();
  if (size <= count) return all.places;
  const Border border(all.logits.data(), size, count, count);
  int64_t room = count - count_from(all.logits.data(), size, border.high);  // for those at the border
  std::vector<int64_t> chosen;
  chosen.reserve(count);
  for (int64_t at = 0; at < size; ++at)
    if (all.logits[at] >= border.high || (all.logits[at] >= border.low && room-- > 0)) chosen.push_back(all.places[at]);
  return chosen;
}

// The thin head, see thin_head.py: `parts` are center and down (of the head's type), sketch (8 bits), scale and offset
// (float32).
struct Preview {
  at::TensorList parts;
  int64_t candidates;
  void check(int64_t size, int64_t vocabulary) const {
    TORCH_CHECK(parts.size() == 5 && parts[0].numel() == size && parts[1].size(1) == size &&
                    parts[2].size(0) == vocabulary && parts[2].size(1) == parts[1].size(0) &&
                    parts[3].numel() == vocabulary && parts[4].numel() == vocabulary && candidates <= vocabulary,
                "token_thin_head: sizes do not fit");
  }
};

// What a vector is in 16 bits: numbers times `scale`.
struct Fixed {
  std::vector<int16_t> numbers;
  float scale;
};

// Such that the products with a row of bytes add up to less than 2^31.
inline Fixed fixed(const std::vector<float>& z) {
  float greatest = std::numeric_limits<float>::min();
  for (float one : z) greatest = std::max(greatest, std::abs(one));
  const float most = std::min<float>(INT16_MAX, INT32_MAX / (INT8_MAX * (z.size() + 1.f)));
  Fixed found{std::vector<int16_t>(z.size()), greatest / most};
  for (size_t i = 0; i < z.size(); ++i) found.numbers[i] = static_cast<int16_t>(std::nearbyint(z[i] / found.scale));
  return found;
}

// y = scale (S z) + offset for `n` rows of S of `k` numbers, read in `places` places at once.
template <int places>
void sketched(const int8_t* sketch, const Fixed& z, const float* scale, const float* offset, float* y, int64_t n,
                     int64_t k) {
  constexpr int step = 2 * LANES;
  const int64_t each = n / places / LANES * LANES, whole = k / step * step;
  const int16_t* const with = z.numbers.data();
  const auto rest = [&](int64_t row, float sum) {
    for (int64_t i = whole; i < k; ++i) sum += sketch[row * k + i] * with[i];
    return sum * z.scale * scale[row] + offset[row];
  };
  for (int64_t row = 0; row < each; row += LANES) {
    Floats sums[places][LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const int8_t* const from = sketch + (row + lane) * k;
      Ints found[places] = {};
      for (int64_t i = 0; i < whole; i += step)
#pragma GCC unroll 4
        for (int p = 0; p < places; ++p) {
          const int8_t* const at = from + p * each * k + i;
          if (i % 64 == 0) __builtin_prefetch(at + AHEAD_BYTES, 0, 2);
          found[p] = plus_products(found[p], at, with + i);
        }
      for (int p = 0; p < places; ++p) sums[p][lane] = __builtin_convertvector(found[p], Floats);
    }
    for (int p = 0; p < places; ++p) {
      const Floats found = totals(sums[p]);
      for (int lane = 0; lane < LANES; ++lane) y[p * each + row + lane] = rest(p * each + row + lane, found[lane]);
    }
  }
  for (int64_t row = places * each; row < n; ++row) {
    Ints sum = {};
    for (int64_t i = 0; i < whole; i += step) sum = plus_products(sum, sketch + row * k + i, with + i);
    y[row] = rest(row, total(__builtin_convertvector(sum, Floats)));
  }
}

// Logits (vocabulary,) of a hidden state (size,) by the thin head; `several`: memory is faster in several places at once.
template <typename T>
void thin_logits_of(const Head& head, const Preview& preview, const T* hidden, float* to, bool several) {
  const int64_t size = head.norm.numel(), vocabulary = head.weight.size(0), rank = preview.parts[1].size(0);
  const T *const center = weight<T>(preview.parts[0]), *const down = weight<T>(preview.parts[1]);
  const T *const w = weight<T>(head.weight), *const b = head.bias.numel() ? weight<T>(head.bias) : nullptr;
  const int8_t* const sketch = weight<int8_t>(preview.parts[2]);
  const float *const scale = weight<float>(preview.parts[3]), *const offset = weight<float>(preview.parts[4]);
  std::vector<T> z(rank);
  std::vector<Likely> found(at::get_num_threads());  // by each thread in its share of the vocabulary
  std::vector<int64_t> chosen;
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const int number = omp_get_thread_num(), count = omp_get_num_threads();
    std::vector<T> x(size), centered(size);
    normalised(hidden, weight<T>(head.norm), x.data(), size, static_cast<float>(head.epsilon));
    for (int64_t i = 0; i < size; ++i) centered[i] = static_cast<T>(x[i] - center[i]);
    const Share of_rank(rank, number, count);
    product<CACHED>(down + of_rank.first * size, centered.data(), z.data() + of_rank.first, of_rank.last - of_rank.first, size);
#pragma omp barrier
    const Share own(vocabulary, number, count);
    const int64_t from = own.first, mine = own.last - own.first;
    const auto sketch_of = several ? sketched<4> : sketched<1>;
    sketch_of(sketch + from * rank, fixed({z.begin(), z.end()}), scale + from, offset + from, to + from, mine, rank);
    const int64_t most = std::min(mine, preview.candidates);
    if (most > 0) found[number] = likely(to + from, mine, Border(to + from, mine, most, most * 5 / 4).low, from);
#pragma omp barrier
#pragma omp single
    chosen = likeliest(found, preview.candidates);
    const int64_t each = chosen.size();
    for (int64_t at = each * number / count; at < each * (number + 1) / count; ++at) {
      const int64_t row = chosen[at];
      const T* const soon = w + chosen[std::min(at + ROWS_AHEAD, each - 1)] * size;
      for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(soon + i, 0, 2);
      float sum;
      product<STREAMED>(w + row * size, x.data(), &sum, 1, size);
      to[row] = sum + (b ? static_cast<float>(b[row]) : 0.f);
    }
  }
}

}  // namespace vectors
