// Decoder layers for one token of one row, or a few to verify, one after another in a single parallel region.
//
// A token meets every weight once, so a layer should take as long as reading its weights: 150 us of one of 7 MB. What is
// added by calls, and by threads that start and wait for each other a dozen times a layer, is as much again. Here threads
// meet at six barriers a layer and nowhere else; what is too small to share (norms, rotary positions) each does itself.
//
// The layers are those of Llama and its kin: RMS norm, attention with rotary positions, RMS norm, gated MLP with SiLU,
// both added to the residual stream; either half may be left out. See token_layers.py.

#include "attention.h"
#include "one_token.h"
#include "thin_head.h"

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
  int64_t neurons, inner, groups;  // of the MLP; numbers of all heads, key heads
  T *keys, *values;                // (key heads, capacity, head size)
  int64_t capacity;
};

constexpr int MOST = 8;  // tokens at once

// y = W x for `n` rows of W of `k` numbers and `tokens` vectors x; y has `stride` numbers a token. W is read in `streams`
// places at once: as often as sums fit into registers.
template <int streams, int tokens, typename T, typename Y>
void streamed(const T* w, const T* x, Y* y, int64_t n, int64_t k, int64_t stride) {
  constexpr int step = STEP<T>, wide = streams * tokens < 4 ? 4 : 1;  // enough sums that none waits for its last product
  constexpr int64_t ahead = AHEAD_BYTES / sizeof(T);
  const int64_t each = n / streams / LANES * LANES, whole = k / step * step;
  for (int64_t row = 0; row < each; row += LANES) {
    Floats sums[streams][tokens][LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const T* const from = w + (row + lane) * k;
      Floats found[streams][tokens][wide] = {};
      const auto add = [&](int64_t i, int j) {
#pragma GCC unroll 6
        for (int s = 0; s < streams; ++s) {
          const T* const at = from + s * each * k + i;
          __builtin_prefetch(at + ahead, 0, 2);
#pragma GCC unroll 8
          for (int t = 0; t < tokens; ++t) found[s][t][j] = plus_product(found[s][t][j], at, x + t * k + i);
        }
      };
      int64_t i = 0;
      for (; i + wide * step <= whole; i += wide * step)
#pragma GCC unroll 4
        for (int j = 0; j < wide; ++j) add(i + j * step, j);
      for (; i < whole; i += step) add(i, 0);
      for (int s = 0; s < streams; ++s)
        for (int t = 0; t < tokens; ++t) {
          sums[s][t][lane] = found[s][t][0];
          for (int j = 1; j < wide; ++j) sums[s][t][lane] += found[s][t][j];
        }
    }
    for (int s = 0; s < streams; ++s)
      for (int t = 0; t < tokens; ++t) {
        const Floats found = totals(sums[s][t]);
        for (int lane = 0; lane < LANES; ++lane) {
          const int64_t at = s * each + row + lane;
          float sum = found[lane];
          for (int64_t i = whole; i < k; ++i) sum += static_cast<float>(w[at * k + i]) * static_cast<float>(x[t * k + i]);
          y[t * stride + at] = static_cast<Y>(sum);
        }
      }
  }
  const int64_t done = streams * each;
  for (int t = 0; t < tokens; ++t) product<STREAMED>(w + done * k, x + t * k, y + t * stride + done, n - done, k);
}

// How many tokens there are, and whether this machine reads memory fastest in several places at once, or in one.
struct Pass {
  int64_t tokens;
  bool several;
};

template <typename T, typename Y>
void streamed(const Pass& pass, const T* w, const T* x, Y* y, int64_t n, int64_t k, int64_t stride) {
  switch (pass.tokens) {
    case 1: return pass.several ? streamed<6, 1>(w, x, y, n, k, stride) : streamed<1, 1>(w, x, y, n, k, stride);
    case 2: return streamed<6, 2>(w, x, y, n, k, stride);
    case 3: return streamed<6, 3>(w, x, y, n, k, stride);
    case 4: return streamed<6, 4>(w, x, y, n, k, stride);
    case 5: return streamed<4, 5>(w, x, y, n, k, stride);
    case 6: return streamed<4, 6>(w, x, y, n, k, stride);
    case 7: return streamed<3, 7>(w, x, y, n, k, stride);
    default: return streamed<3, 8>(w, x, y, n, k, stride);
  }
}

// Rows of y = W x + bias, of a map with `rows` rows.
template <typename T>
void rows_of(const Pass& pass, const T* w, const T* bias, const T* x, T* y, const Share& share, int64_t k, int64_t rows) {
  streamed(pass, w + share.first * k, x, y + share.first, share.last - share.first, k, rows);
  for (int64_t t = 0; bias && t < pass.tokens; ++t)
    for (int64_t i = share.first; i < share.last; ++i) y[t * rows + i] = static_cast<T>(y[t * rows + i] + bias[i]);
}

// gate = silu(gate) * up, of `count` numbers.
template <typename T>
void activate(T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats x = load(gate + i), e = exponential(x < 0.f ? x : -x);
    store(gate + i, rounded<T>(x * (x < 0.f ? e : Floats{} + 1.f) / (1.f + e)) * load(up + i));
  }
  for (; i < count; ++i) {
    const float x = gate[i], e = std::exp(-std::abs(x));
    gate[i] = static_cast<T>(static_cast<float>(static_cast<T>(x * (x < 0.f ? e : 1.f) / (1.f + e))) * static_cast<float>(up[i]));
  }
}

template <typename T>
void run(const Pass& pass, const std::vector<Layer<T>>& layers, T* hidden, int64_t size, int64_t each, int64_t place,
         const T* cosine, const T* sine, const float* mask, float epsilon, float scale) {
  const int64_t tokens = pass.tokens;
  int64_t most = 0, neurons = 0;  // numbers of all heads, neurons
  for (const auto& layer : layers) {
    most = std::max(most, layer.inner);
    neurons = std::max(neurons, layer.neurons);
  }
  std::vector<T> query(tokens * most), key(tokens * most), value(tokens * most);
  // By head and token: what is asked, and what each thread found in its part of the keys.
  std::vector<float> asked(tokens * most), found(at::get_num_threads() * tokens * most);
  std::vector<Softened> seen(at::get_num_threads() * tokens * most / each);
  std::vector<T> gate(tokens * neurons), up(tokens * neurons), out(tokens * size);
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const int number = omp_get_thread_num(), count = omp_get_num_threads();
    const Share of_hidden(size, number, count);
    std::vector<T> x(tokens * size), mixed(tokens * most);
    std::vector<float> turned(each), scores, spare;
    const auto norm = [&](const T* weight) {
      for (int64_t t = 0; t < tokens; ++t) normalised(hidden + t * size, weight, x.data() + t * size, size, epsilon);
    };
    const auto add = [&] {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = t * size + of_hidden.first; i < t * size + of_hidden.last; ++i)
          hidden[i] = static_cast<T>(hidden[i] + out[i]);
    };
    for (const auto& layer : layers) {
      const auto map = [&](Weight which, const T* bias, const T* from, T* to, const Share& share, int64_t k, int64_t n) {
        rows_of(pass, layer.of[which], bias, from, to, share, k, n);
      };
      if (layer.of[QUERY]) {
        const int64_t inner = layer.inner, groups = layer.groups, rows = groups * each;
        const int64_t heads = inner / each, shared = heads / groups;
        norm(layer.of[NORM]);
        map(QUERY, layer.of[QUERY_BIAS], x.data(), query.data(), Share(inner, number, count), size, inner);
        // From the other end, so that shares that cannot be equal even out.
        const Share of_keys(rows, count - 1 - number, count);
        map(KEY, layer.of[KEY_BIAS], x.data(), key.data(), of_keys, size, rows);
        map(VALUE, layer.of[VALUE_BIAS], x.data(), value.data(), of_keys, size, rows);
#pragma omp barrier
        for (int64_t item = number; item < tokens * (groups + heads); item += count) {
          const int64_t t = item / (groups + heads), which = item % (groups + heads), head = which - groups;
          if (which < groups) {
            const int64_t from = t * rows + which * each, to = (which * layer.capacity + place + t) * each;
            rotate(key.data() + from, each, cosine + t * each, sine + t * each, turned.data());
            for (int64_t i = 0; i < each; i += LANES) store(layer.keys + to + i, load(turned.data() + i));
            std::memcpy(layer.values + to, value.data() + from, each * sizeof(T));
          } else {
            rotate(query.data() + t * inner + head * each, each, cosine + t * each, sine + t * each,
                   asked.data() + (head * tokens + t) * each);
          }
        }
#pragma omp barrier
        // A thread sees a part of the keys for all heads: these divide evenly where heads do not.
        const Share own(place + tokens, number, count);
        for (int64_t group = 0; group < groups && own.first < own.last; ++group) {
          const int64_t first = group * shared * tokens, at = (group * layer.capacity + own.first) * each;
          attend_part(asked.data() + first * each, shared * tokens, layer.keys + at, layer.values + at,
                      own.last - own.first, each, mask ? mask + own.first : nullptr, place + tokens, tokens, scale,
                      found.data() + number * tokens * most + first * each,
                      seen.data() + number * tokens * heads + first, scores, spare);
        }
#pragma omp barrier
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t head = 0; head < heads; ++head) {
            const int64_t at = head * tokens + t;
            join(found.data() + at * each, tokens * most, seen.data() + at, tokens * heads, count, each,
                 mixed.data() + t * inner + head * each, spare);
          }
        map(OUTPUT, layer.of[OUTPUT_BIAS], mixed.data(), out.data(), of_hidden, inner, size);
        add();
#pragma omp barrier
      }
      if (layer.of[GATE]) {
        norm(layer.of[MLP_NORM]);
        const int64_t all = layer.neurons;
        const Share own(all, number, count);
        map(GATE, nullptr, x.data(), gate.data(), own, size, all);
        map(UP, nullptr, x.data(), up.data(), own, size, all);
        for (int64_t t = 0; t < tokens; ++t)
          activate(gate.data() + t * all + own.first, up.data() + t * all + own.first, own.last - own.first);
#pragma omp barrier
        map(DOWN, layer.of[DOWN_BIAS], gate.data(), out.data(), of_hidden, all, size);
        add();
#pragma omp barrier
      }
    }
  }
}

// The layers, from what the operators below are given.
template <typename T>
std::vector<Layer<T>> layers_of(at::TensorList weights, at::TensorList keys, at::TensorList values, int64_t place,
                                int64_t tokens, int64_t size, int64_t each) {
  TORCH_CHECK(weights.size() == WEIGHTS * keys.size() && keys.size() == values.size(), "token_layers: sizes do not fit");
  std::vector<Layer<T>> layers(keys.size());
  for (size_t at = 0; at < layers.size(); ++at) {
    auto& layer = layers[at];
    for (int which = 0; which < WEIGHTS; ++which) {
      const auto& one = weights[at * WEIGHTS + which];
      layer.of[which] = one.numel() ? weight<T>(one) : nullptr;
    }
    layer.neurons = layer.of[GATE] ? weights[at * WEIGHTS + GATE].size(0) : 0;
    layer.inner = layer.of[QUERY] ? weights[at * WEIGHTS + QUERY].size(0) : 0;
    if (!layer.of[QUERY]) continue;
    TORCH_CHECK(place + tokens <= keys[at].size(2) && keys[at].is_contiguous() && values[at].is_contiguous() &&
                    keys[at].size(3) == each && each % LANES == 0 && layer.inner % (keys[at].size(1) * each) == 0 &&
                    weights[at * WEIGHTS + KEY].size(0) == keys[at].size(1) * each &&
                    weights[at * WEIGHTS + QUERY].size(1) == size && keys[at].sizes() == values[at].sizes(),
                "token_layers: sizes do not fit");
    layer.groups = keys[at].size(1);
    layer.capacity = keys[at].size(2);
    layer.keys = keys[at].template mutable_data_ptr<T>();
    layer.values = values[at].template mutable_data_ptr<T>();
  }
  return layers;
}

// The hidden states (1, tokens, size) after the layers, of MOST tokens at most.
//
//   weights       WEIGHTS of each layer, empty where there is none
//   keys, values  (1, key heads, capacity, head size) of each layer, filled up to `place`, from where on these tokens' are
//                 put; empty where the attention is left out
//   cosine, sine  (1, tokens, head size)
//   mask          (1, 1, tokens, place + tokens) added to scores, float32; empty for a single token, which sees all
at::Tensor token_layers(const at::Tensor& hidden, at::TensorList weights, at::TensorList keys, at::TensorList values,
                        int64_t place, const at::Tensor& cosine, const at::Tensor& sine, const at::Tensor& mask,
                        double epsilon, double scale, int64_t streams) {
  const int64_t tokens = hidden.size(1), size = hidden.size(2), each = cosine.size(2);
  TORCH_CHECK(hidden.size(0) == 1 && tokens >= 1 && tokens <= MOST && cosine.numel() == tokens * each &&
                  sine.numel() == tokens * each && (tokens == 1 || mask.numel() == tokens * (place + tokens)),
              "token_layers: sizes do not fit");
  auto output = hidden.clone(at::MemoryFormat::Contiguous);
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    run<T>({tokens, streams > 1}, layers_of<T>(weights, keys, values, place, tokens, size, each),
           output.template mutable_data_ptr<T>(), size, each, place, weight<T>(cosine), weight<T>(sine),
           tokens > 1 ? weight<float>(mask) : nullptr, static_cast<float>(epsilon), static_cast<float>(scale));
  });
  return output;
}

// Logits (tokens, vocabulary) of hidden states (tokens, size).
template <typename T>
void logits_of(const Pass& pass, const Head& head, const T* hidden, float* to) {
  const int64_t size = head.norm.numel(), vocabulary = head.weight.size(0), tokens = pass.tokens;
  std::vector<T> x(tokens * size);
  for (int64_t t = 0; t < tokens; ++t)
    normalised(hidden + t * size, weight<T>(head.norm), x.data() + t * size, size, static_cast<float>(head.epsilon));
  const T *const w = weight<T>(head.weight), *const b = head.bias.numel() ? weight<T>(head.bias) : nullptr;
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const Share own(vocabulary, omp_get_thread_num(), omp_get_num_threads());
    streamed(pass, w + own.first * size, x.data(), to + own.first, own.last - own.first, size, vocabulary);
    for (int64_t t = 0; b && t < tokens; ++t)
      for (int64_t i = own.first; i < own.last; ++i) to[t * vocabulary + i] += static_cast<float>(b[i]);
  }
}

// Logits (1, tokens, vocabulary), in float32, of hidden states (1, tokens, size).
at::Tensor token_head(const at::Tensor& hidden, const at::Tensor& norm, double epsilon, const at::Tensor& head,
                      const at::Tensor& bias, int64_t streams) {
  const int64_t tokens = hidden.size(1);
  const Head with{norm, head, bias, epsilon};
  with.check(hidden.size(2));
  TORCH_CHECK(hidden.size(0) == 1 && tokens >= 1 && tokens <= MOST, "token_head: sizes do not fit");
  auto logits = at::empty({1, tokens, head.size(0)}, hidden.options().dtype(at::kFloat));
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    logits_of<T>({tokens, streams > 1}, with, weight<T>(hidden), logits.mutable_data_ptr<float>());
  });
  return logits;
}

// Logits (1, 1, vocabulary), in float32, of a hidden state (1, 1, size), by a thin head.
at::Tensor token_thin_head(const at::Tensor& hidden, const at::Tensor& norm, double epsilon, const at::Tensor& head,
                           const at::Tensor& bias, at::TensorList preview, int64_t candidates, int64_t streams) {
  const Head with{norm, head, bias, epsilon};
  const Preview by{preview, candidates};
  with.check(hidden.numel());
  by.check(hidden.numel(), head.size(0));
  auto logits = at::empty({1, 1, head.size(0)}, hidden.options().dtype(at::kFloat));
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    thin_logits_of<T>(with, by, weight<T>(hidden), logits.mutable_data_ptr<float>(), streams > 1);
  });
  return logits;
}

// The place of the greatest value, the first of equals.
int64_t greatest(const float* values, int64_t size) {
  Floats great = Floats{} + values[0];
  Ints places = {};  // of the first of each lane's greatest, without the lane
  const int64_t whole = size / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    const Floats now = load(values + i);
    const Ints more = now > great;
    great = more ? now : great;
    places = more ? Ints{} + static_cast<int32_t>(i) : places;
  }
  int64_t best = 0;
  const auto consider = [&](float value, int64_t place) {
    if (value > values[best] || (value == values[best] && place < best)) best = place;
  };
  for (int lane = 0; lane < LANES; ++lane)
    if (whole && great[lane] == values[places[lane] + lane]) consider(great[lane], places[lane] + lane);
  for (int64_t i = whole; i < size; ++i) consider(values[i], i);
  return best;
}

// The likeliest token after `token`, which the caches get: embedding, layers, norm, head, choice.
//
//   embedding     (vocabulary, size)
//   cosine, sine  (places, head size), of all places up to this one at least
//   preview       empty for the whole head
int64_t token_greedy(int64_t token, const at::Tensor& embedding, at::TensorList weights, at::TensorList keys,
                     at::TensorList values, int64_t place, const at::Tensor& cosine, const at::Tensor& sine,
                     double epsilon, double scale, const at::Tensor& norm, double norm_epsilon, const at::Tensor& head,
                     const at::Tensor& bias, at::TensorList preview, int64_t candidates, int64_t streams) {
  const int64_t size = embedding.size(1), vocabulary = head.size(0), each = cosine.size(1);
  const Head with{norm, head, bias, norm_epsilon};
  const Preview by{preview, candidates};
  with.check(size);
  if (!preview.empty()) by.check(size, vocabulary);
  TORCH_CHECK(token >= 0 && token < embedding.size(0) && place < cosine.size(0) && sine.sizes() == cosine.sizes(),
              "token_greedy: sizes do not fit");
  thread_local std::vector<float> logits;  // kept: a page of fresh memory costs more than a row of the head
  logits.resize(vocabulary);
  of_type(embedding, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = weight<T>(embedding) + token * size;
    std::vector<T> hidden(from, from + size);
    const Pass pass{1, streams > 1};
    run<T>(pass, layers_of<T>(weights, keys, values, place, 1, size, each), hidden.data(), size, each, place,
           weight<T>(cosine) + place * each, weight<T>(sine) + place * each, nullptr, static_cast<float>(epsilon),
           static_cast<float>(scale));
    if (preview.empty()) {
      logits_of<T>(pass, with, hidden.data(), logits.data());
    } else {
      thin_logits_of<T>(with, by, hidden.data(), logits.data(), pass.several);
    }
  });
  return greatest(logits.data(), vocabulary);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerwise, library) {
  library.def(
      "token_greedy(int token, Tensor embedding, Tensor[] weights, Tensor(a!)[] keys, Tensor(b!)[] values, int place,"
      " Tensor cosine, Tensor sine, float epsilon, float scale, Tensor norm, float norm_epsilon, Tensor head, Tensor bias,"
      " Tensor[] preview, int candidates, int streams) -> int");
  library.def(
      "token_thin_head(Tensor hidden, Tensor norm, float epsilon, Tensor head, Tensor bias, Tensor[] preview,"
      " int candidates, int streams) -> Tensor");
  library.def("token_head(Tensor hidden, Tensor norm, float epsilon, Tensor head, Tensor bias, int streams) -> Tensor");
  library.def(
      "token_layers(Tensor hidden, Tensor[] weights, Tensor(a!)[] keys, Tensor(b!)[] values, int place, Tensor cosine,"
      " Tensor sine, Tensor mask, float epsilon, float scale, int streams) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerwise, CPU, library) {
  library.impl("token_greedy", token_greedy);
  library.impl("token_layers", token_layers);
  library.impl("token_head", token_head);
  library.impl("token_thin_head", token_thin_head);
}
