// Decoder layers for one token of one row, one after another in a single parallel region.
//
// A token meets every weight once, so a layer should take as long as reading its weights: 150 us of one of 7 MB. What is
// added by calls, and by threads that start and wait for each other a dozen times a layer, is as much again. Here threads
// meet at six barriers a layer and nowhere else; what is too small to share (norms, rotary positions) each does itself.
//
// The layers are those of Llama and its kin: RMS norm, attention with rotary positions, RMS norm, gated MLP with SiLU,
// both added to the residual stream; either half may be left out. See token_layers.py.

#include "attention.h"
#include "one_token.h"

#include <ATen/ATen.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using namespace vectors;

enum Weight { NORM, QUERY, KEY, VALUE, OUTPUT, QUERY_BIAS, KEY_BIAS, VALUE_BIAS, OUTPUT_BIAS,
              MLP_NORM, GATE, UP, DOWN, DOWN_BIAS, WEIGHTS };

// The weights of one layer; null where there is none.
template <typename T>
struct Layer {
  const T* of[WEIGHTS];
  int64_t neurons;
  T *keys, *values;  // (key heads, capacity, head size)
  int64_t capacity;
};

// The rows of a map that thread `number` of `count` takes.
struct Share {
  int64_t first, last;
  Share(int64_t rows, int number, int count) : first(bound(rows, number, count)), last(bound(rows, number + 1, count)) {}
  static int64_t bound(int64_t rows, int number, int count) {
    return number == count ? rows : rows * number / count / LANES * LANES;
  }
};

// The layer's norm: x / rms(x) * weight, rounded as the framework rounds it.
template <typename T>
void normalised(const T* x, const T* scale, T* out, int64_t size, float epsilon) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) sums += load(x + i) * load(x + i);
  float squares = total(sums);
  for (; i < size; ++i) squares += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  const float factor = 1.f / std::sqrt(squares / size + epsilon);
  for (i = 0; i < size; ++i)
    out[i] = static_cast<T>(static_cast<float>(scale[i]) * static_cast<float>(static_cast<T>(x[i] * factor)));
}

constexpr int64_t AHEAD_BYTES = 2048;  // that are fetched beforehand, in each place that is read

// y = W x for `n` rows of W of `k` numbers. Some machines read memory fastest in several places at once, others in one:
// there are `streams`.
template <int streams, typename T, typename Y>
void streamed(const T* w, const T* x, Y* y, int64_t n, int64_t k) {
  constexpr int step = STEP<T>, wide = streams == 1 ? 4 : 1;  // enough sums that none waits for its last product
  constexpr int64_t ahead = AHEAD_BYTES / sizeof(T);
  const int64_t each = n / streams / LANES * LANES, whole = k / step * step;
  for (int64_t row = 0; row < each; row += LANES) {
    Floats sums[streams][LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const T* const from = w + (row + lane) * k;
      Floats found[streams][wide] = {};
      int64_t i = 0;
      for (; i + wide * step <= whole; i += wide * step)
#pragma GCC unroll 6
        for (int s = 0; s < streams; ++s)
#pragma GCC unroll 4
          for (int j = 0; j < wide; ++j) {
            const T* const at = from + s * each * k + i + j * step;
            __builtin_prefetch(at + ahead, 0, 2);
            found[s][j] = plus_product(found[s][j], at, x + i + j * step);
          }
      for (; i < whole; i += step)
        for (int s = 0; s < streams; ++s) found[s][0] = plus_product(found[s][0], from + s * each * k + i, x + i);
      for (int s = 0; s < streams; ++s) {
        sums[s][lane] = found[s][0];
        for (int j = 1; j < wide; ++j) sums[s][lane] += found[s][j];
      }
    }
    for (int s = 0; s < streams; ++s) {
      const Floats found = totals(sums[s]);
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t at = s * each + row + lane;
        float sum = found[lane];
        for (int64_t i = whole; i < k; ++i) sum += static_cast<float>(w[at * k + i]) * static_cast<float>(x[i]);
        y[at] = static_cast<Y>(sum);
      }
    }
  }
  const int64_t done = streams * each;
  product<STREAMED>(w + done * k, x, y + done, n - done, k);
}

template <typename T, typename Y>
void streamed(int64_t streams, const T* w, const T* x, Y* y, int64_t n, int64_t k) {
  if (streams > 1)
    streamed<6>(w, x, y, n, k);
  else
    streamed<1>(w, x, y, n, k);
}

// Rows of y = W x + bias.
template <typename T>
void rows_of(int64_t streams, const T* w, const T* bias, const T* x, T* y, const Share& share, int64_t k) {
  streamed(streams, w + share.first * k, x, y + share.first, share.last - share.first, k);
  if (bias)
    for (int64_t i = share.first; i < share.last; ++i) y[i] = static_cast<T>(y[i] + bias[i]);
}

// Rotary positions in the rotate-half form, of one head.
template <typename T>
void rotate(T* x, int64_t each, const T* cosine, const T* sine) {
  const int64_t half = each / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    const auto turned = [&](float a, float b, int64_t at) {  // each product rounded, as the framework does
      return static_cast<T>(static_cast<float>(static_cast<T>(a * cosine[at])) + static_cast<float>(static_cast<T>(b * sine[at])));
    };
    x[i] = turned(first, -second, i);
    x[i + half] = turned(second, first, i + half);
  }
}

// gate = silu(gate) * up, of `count` numbers.
template <typename T>
void activate(T* gate, const T* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = gate[i], e = std::exp(-std::abs(x));
    gate[i] = static_cast<T>(static_cast<float>(static_cast<T>(x * (x < 0.f ? e : 1.f) / (1.f + e))) * static_cast<float>(up[i]));
  }
}

template <typename T>
void run(std::vector<Layer<T>>& layers, T* hidden, int64_t size, int64_t inner, int64_t groups, int64_t each,
         int64_t place, const T* cosine, const T* sine, float epsilon, float scale, int64_t streams) {
  const int64_t heads = inner / each, rows = groups * each, shared = groups ? heads / groups : 0;
  int64_t neurons = 0;
  for (const auto& layer : layers) neurons = std::max(neurons, layer.neurons);
  std::vector<T> query(inner), key(rows), value(rows), mixed(inner), gate(neurons), up(neurons), out(size);
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const int number = omp_get_thread_num(), count = omp_get_num_threads();
    const Share of_hidden(size, number, count);
    std::vector<T> x(size);
    std::vector<float> asked(each), scores, spare;
    const auto add = [&] {
      for (int64_t i = of_hidden.first; i < of_hidden.last; ++i) hidden[i] = static_cast<T>(hidden[i] + out[i]);
    };
    for (const auto& layer : layers) {
      if (layer.of[QUERY]) {
        normalised(hidden, layer.of[NORM], x.data(), size, epsilon);
        rows_of(streams, layer.of[QUERY], layer.of[QUERY_BIAS], x.data(), query.data(), Share(inner, number, count), size);
        // From the other end, so that shares that cannot be equal even out.
        const Share of_keys(rows, count - 1 - number, count);
        rows_of(streams, layer.of[KEY], layer.of[KEY_BIAS], x.data(), key.data(), of_keys, size);
        rows_of(streams, layer.of[VALUE], layer.of[VALUE_BIAS], x.data(), value.data(), of_keys, size);
#pragma omp barrier
        for (int64_t group = number; group < groups; group += count) {
          const int64_t to = (group * layer.capacity + place) * each;
          rotate(key.data() + group * each, each, cosine, sine);
          std::memcpy(layer.keys + to, key.data() + group * each, each * sizeof(T));
          std::memcpy(layer.values + to, value.data() + group * each, each * sizeof(T));
        }
#pragma omp barrier
        for (int64_t head = heads * number / count; head < heads * (number + 1) / count; ++head) {
          T* const own = query.data() + head * each;
          rotate(own, each, cosine, sine);
          for (int64_t i = 0; i < each; ++i) asked[i] = own[i];
          const int64_t first = head / shared * layer.capacity * each;
          attend_head<T>(asked.data(), layer.keys + first, layer.values + first, nullptr, mixed.data() + head * each, 1,
                         place + 1, each, each, scale, scores, spare);
        }
#pragma omp barrier
        rows_of(streams, layer.of[OUTPUT], layer.of[OUTPUT_BIAS], mixed.data(), out.data(), of_hidden, inner);
        add();
#pragma omp barrier
      }
      if (layer.of[GATE]) {
        normalised(hidden, layer.of[MLP_NORM], x.data(), size, epsilon);
        const Share own(layer.neurons, number, count);
        rows_of<T>(streams, layer.of[GATE], nullptr, x.data(), gate.data(), own, size);
        rows_of<T>(streams, layer.of[UP], nullptr, x.data(), up.data(), own, size);
        activate(gate.data() + own.first, up.data() + own.first, own.last - own.first);
#pragma omp barrier
        rows_of(streams, layer.of[DOWN], layer.of[DOWN_BIAS], gate.data(), out.data(), of_hidden, layer.neurons);
        add();
#pragma omp barrier
      }
    }
  }
}

// The hidden state (1, 1, size) after the layers.
//
//   weights       WEIGHTS of each layer, empty where there is none
//   keys, values  (1, key heads, capacity, head size) of each layer, filled up to `place`, where this token's are put;
//                 empty where the attention is left out
//   cosine, sine  (1, 1, head size)
at::Tensor token_layers(const at::Tensor& hidden, at::TensorList weights, at::TensorList keys, at::TensorList values,
                        int64_t place, const at::Tensor& cosine, const at::Tensor& sine, double epsilon, double scale,
                        int64_t streams) {
  const int64_t size = hidden.size(2), each = cosine.size(2);
  TORCH_CHECK(weights.size() == WEIGHTS * keys.size() && keys.size() == values.size(), "token_layers: sizes do not fit");
  auto output = hidden.clone(at::MemoryFormat::Contiguous);
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    int64_t inner = 0, groups = 0;
    std::vector<Layer<T>> layers(keys.size());
    for (size_t at = 0; at < layers.size(); ++at) {
      auto& layer = layers[at];
      for (int which = 0; which < WEIGHTS; ++which) {
        const auto& one = weights[at * WEIGHTS + which];
        layer.of[which] = one.numel() ? weight<T>(one) : nullptr;
      }
      layer.neurons = layer.of[GATE] ? weights[at * WEIGHTS + GATE].size(0) : 0;
      if (!layer.of[QUERY]) continue;
      TORCH_CHECK(place < keys[at].size(2) && keys[at].is_contiguous() && values[at].is_contiguous() &&
                      keys[at].size(3) == each && each % LANES == 0, "token_layers: sizes do not fit");
      inner = weights[at * WEIGHTS + QUERY].size(0);
      groups = keys[at].size(1);
      layer.capacity = keys[at].size(2);
      layer.keys = keys[at].template mutable_data_ptr<T>();
      layer.values = values[at].template mutable_data_ptr<T>();
    }
    run<T>(layers, output.template mutable_data_ptr<T>(), size, inner, groups, each, place, weight<T>(cosine),
           weight<T>(sine), static_cast<float>(epsilon), static_cast<float>(scale), streams);
  });
  return output;
}

// Logits (1, 1, vocabulary), in float32, of a hidden state (1, 1, size): norm, head and its bias, which may be empty.
at::Tensor token_head(const at::Tensor& hidden, const at::Tensor& norm, double epsilon, const at::Tensor& head,
                      const at::Tensor& bias, int64_t streams) {
  const int64_t size = hidden.size(2), vocabulary = head.size(0);
  TORCH_CHECK(head.size(1) == size && norm.numel() == size, "token_head: sizes do not fit");
  auto logits = at::empty({1, 1, vocabulary}, hidden.options().dtype(at::kFloat));
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> x(size);
    normalised(weight<T>(hidden), weight<T>(norm), x.data(), size, static_cast<float>(epsilon));
    const T *const w = weight<T>(head), *const b = bias.numel() ? weight<T>(bias) : nullptr;
    float* const to = logits.mutable_data_ptr<float>();
#pragma omp parallel num_threads(at::get_num_threads())
    {
      const Share own(vocabulary, omp_get_thread_num(), omp_get_num_threads());
      streamed(streams, w + own.first * size, x.data(), to + own.first, own.last - own.first, size);
      for (int64_t i = own.first; b && i < own.last; ++i) to[i] += static_cast<float>(b[i]);
    }
  });
  return logits;
}

// The places of the `count` largest of `values`.
std::vector<int64_t> largest(const float* values, int64_t size, int64_t count) {
  constexpr int BITS = 12;  // of a float's order, by which the values are sorted into bins
  const auto bin = [&](int64_t i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) >> (32 - BITS);
  };
  std::vector<int64_t> counts(1 << BITS, 0), found, at_border;
  for (int64_t i = 0; i < size; ++i) ++counts[bin(i)];
  uint32_t border = (1 << BITS) - 1;  // the bin that the last of them are in
  int64_t above = 0;
  while (border > 0 && above + counts[border] < count) above += counts[border--];
  found.reserve(count);
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t in = bin(i);
    if (in > border) found.push_back(i);
    if (in == border) at_border.push_back(i);
  }
  const int64_t missing = std::min<int64_t>(count - above, at_border.size());
  std::nth_element(at_border.begin(), at_border.begin() + missing, at_border.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  found.insert(found.end(), at_border.begin(), at_border.begin() + missing);
  return found;
}

// The same by a thin head: see thin_head.py. `preview` are center, down, sketch (all of the head's type) and offset
// (float32).
at::Tensor token_thin_head(const at::Tensor& hidden, const at::Tensor& norm, double epsilon, const at::Tensor& head,
                           const at::Tensor& bias, at::TensorList preview, int64_t candidates,
                           int64_t streams) {
  const int64_t size = hidden.size(2), vocabulary = head.size(0), rank = preview[1].size(0);
  TORCH_CHECK(head.size(1) == size && norm.numel() == size && preview[0].numel() == size && preview[1].size(1) == size &&
                  preview[2].size(0) == vocabulary && preview[2].size(1) == rank && preview[3].numel() == vocabulary &&
                  candidates <= vocabulary, "token_thin_head: sizes do not fit");
  auto logits = at::empty({1, 1, vocabulary}, hidden.options().dtype(at::kFloat));
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> x(size), centered(size), z(rank);
    normalised(weight<T>(hidden), weight<T>(norm), x.data(), size, static_cast<float>(epsilon));
    const T* const center = weight<T>(preview[0]);
    for (int64_t i = 0; i < size; ++i) centered[i] = static_cast<T>(x[i] - center[i]);
    product<CACHED>(weight<T>(preview[1]), centered.data(), z.data(), rank, size);
    const T *const w = weight<T>(head), *const b = bias.numel() ? weight<T>(bias) : nullptr;
    const T* const sketch = weight<T>(preview[2]);
    const float* const offset = weight<float>(preview[3]);
    float* const to = logits.mutable_data_ptr<float>();
    std::vector<int64_t> chosen;
#pragma omp parallel num_threads(at::get_num_threads())
    {
      const int number = omp_get_thread_num(), count = omp_get_num_threads();
      const Share own(vocabulary, number, count);
      streamed(streams, sketch + own.first * rank, z.data(), to + own.first, own.last - own.first, rank);
      for (int64_t i = own.first; i < own.last; ++i) to[i] += offset[i];
#pragma omp barrier
#pragma omp single
      chosen = largest(to, vocabulary, candidates);
      const int64_t each = chosen.size();
      for (int64_t at = each * number / count; at < each * (number + 1) / count; ++at) {
        const int64_t row = chosen[at];
        float sum;
        product<STREAMED>(w + row * size, x.data(), &sum, 1, size);
        to[row] = sum + (b ? static_cast<float>(b[row]) : 0.f);
      }
    }
  });
  return logits;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerwise, library) {
  library.def(
      "token_thin_head(Tensor hidden, Tensor norm, float epsilon, Tensor head, Tensor bias, Tensor[] preview,"
      " int candidates, int streams) -> Tensor");
  library.def("token_head(Tensor hidden, Tensor norm, float epsilon, Tensor head, Tensor bias, int streams) -> Tensor");
  library.def(
      "token_layers(Tensor hidden, Tensor[] weights, Tensor(a!)[] keys, Tensor(b!)[] values, int place, Tensor cosine,"
      " Tensor sine, float epsilon, float scale, int streams) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerwise, CPU, library) { 
  library.impl("token_layers", token_layers);
  library.impl("token_head", token_head);
  library.impl("token_thin_head", token_thin_head);
}
