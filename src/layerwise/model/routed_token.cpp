// What a layer with routed attention does for one token of one row: see routed_attention.py.
//
// Of a token so small that its weights are still in the processor's cache, most of the time is calls. So router,
// convolution and attention are one operator.

#include "one_token.h"

#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>

namespace {

using namespace vectors;

constexpr int64_t MANY = 12, MANY_BY_THREADS = 48;  // from so many tokens the framework's matrix product is faster

// What each of `maps` (n, k) makes of `tokens` (count, k).
template <typename T>
std::vector<at::Tensor> multiply_all(at::TensorList maps, const T* tokens, int64_t count) {
  const auto inputs = at::from_blob(const_cast<T*>(tokens), {count, maps[0].size(1)}, maps[0].options());
  if (count >= (at::get_num_threads() > 1 ? MANY_BY_THREADS : MANY)) {
    std::vector<at::Tensor> outputs;
    for (const auto& map : maps) outputs.push_back(at::mm(inputs, map.t()));
    return outputs;
  }
  static const auto few = c10::Dispatcher::singleton()
                              .findSchemaOrThrow("layerwise::few_token_linear", "")
                              .typed<std::vector<at::Tensor>(const at::Tensor&, at::TensorList)>();
  return few.call(inputs, maps);
}

struct Attention {
  const at::Tensor &query, &key, &value, &output;
};

// The router: its logit, and into `kept` the moving average (width) after this token. inputs (2 width, size) are the
// maps of the token and of the average; `old` (width) is the average so far, if any.
template <typename T>
float route(const T* hidden, int64_t size, at::TensorList weights, const T* old, T* kept, float decay) {
  const int64_t width = weights[2].size(-1);
  std::vector<T> mapped(2 * width);
  std::vector<float> inner(padded(width));
  product<CACHED>(weight<T>(weights[0]), hidden, mapped.data(), 2 * width, size);
  const T* const bias = weight<T>(weights[1]);
  for (int64_t i = 0; i < width; ++i) {
    const float past = (1.f - decay) * (mapped[width + i] + bias[width + i]) + (old ? decay * old[i] : 0.f);
    kept[i] = static_cast<T>(past);
    inner[i] = mapped[i] + bias[i] + past;
  }
  return weights[3].const_data_ptr<T>()[0] + gelu_dot(inner.data(), weight<T>(weights[2]), width);
}

// Softmax of a head's `count` taps into `to`, which has room up to a multiple of LANES.
template <typename T>
void soften(const T* taps, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = taps[i];
  for (int64_t i = count; i % LANES; ++i) to[i] = -INFINITY;
  Floats bests = load(to), sums = {};
  for (int64_t i = LANES; i < count; i += LANES) bests = load(to + i) > bests ? load(to + i) : bests;
  float most = bests[0];
  for (int lane = 1; lane < LANES; ++lane) most = std::max(most, bests[lane]);
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats e = exponential(load(to + i) - most);
    std::memcpy(to + i, &e, sizeof e);
    sums += e;  // what stands beyond `count` is exp(-87)
  }
  const float scale = 1.f / total(sums);
  for (int64_t i = 0; i < count; ++i) to[i] *= scale;
}

// The convolution: of `tokens` inputs (tokens, k) the last one's output is wanted; the others waited for their values.
// `window` (1, capacity, size) holds `filled` values and gets the new ones; taps (heads, count), the newest first.
template <typename T>
at::Tensor convolve(const T* inputs, int64_t tokens, const at::Tensor& value, const at::Tensor& output,
                    const at::Tensor& window, int64_t filled, const at::Tensor& taps) {
  const int64_t size = value.size(0), k = value.size(1), heads = taps.size(0), count = taps.size(1);
  const int64_t each = size / heads, last = filled + tokens - 1, seen = std::min(count, last + 1);
  TORCH_CHECK(last < window.size(1) && window.is_contiguous(), "routed_token: sizes do not fit");
  T* const kept = window.mutable_data_ptr<T>();
  if (tokens > 1)
    std::memcpy(kept + filled * size, multiply_all({value}, inputs, tokens)[0].template const_data_ptr<T>(),
                tokens * size * sizeof(T));
  // Every second token reads the weights from their end: what was read last is in the nearest cache still.
  static std::atomic<bool> turned{false};
  const bool back = turned.exchange(!turned);
  std::vector<T> mixed(size);
  const T *const tap = weight<T>(taps), *const from = weight<T>(value);
  const int64_t grain = std::max<int64_t>(1, SHARE / (each * k));
  at::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {  // head by head, so that none waits for another
    std::vector<float> share(padded(count));
    for (int64_t number = begin; number < end; ++number) {
      const int64_t head = back ? end - 1 - (number - begin) : number, at = head * each;
      T* const newest = kept + last * size + at;
      if (tokens == 1) product<CACHED>(from + at * k, inputs, newest, each, k, back);
      soften(tap + head * count, count, share.data());
      filter_head(share.data(), seen, newest, size, mixed.data() + at, each);
    }
  });
  auto result = at::empty({1, 1, output.size(0)}, window.options());
  multiply<CACHED, T>({{weight<T>(output), result.mutable_data_ptr<T>(), output.size(0)}}, mixed.data(), size, back);
  return result;
}

// Attention of the last of `count` inputs (count, size), the first of which stands at `made`: their keys and values go
// into the buffers (1, key heads, capacity, head size), of which earlier ones are filled. Gives (1, 1, size). If `fused`,
// scores are left to the framework's attention.
template <typename T>
at::Tensor attend(const T* tokens, int64_t count, const Attention& maps, const at::Tensor& keys,
                  const at::Tensor& values, int64_t made, bool fused = false) {
  const int64_t inner = maps.query.size(0), size = maps.query.size(1), length = made + count;
  const int64_t groups = keys.size(1), capacity = keys.size(2), each = keys.size(3), rows = groups * each;
  TORCH_CHECK(length <= capacity && keys.is_contiguous() && values.is_contiguous(),
              "attend_token: sizes do not fit");
  auto query = at::empty({1, inner / each, 1, each}, keys.options());
  std::vector<at::Tensor> fresh;  // keys and values (count, rows)
  const T* const newest = tokens + (count - 1) * size;
  const Map<T> asked{weight<T>(maps.query), query.template mutable_data_ptr<T>(), inner};
  if (count == 1) {
    fresh = {at::empty({1, rows}, keys.options()), at::empty({1, rows}, keys.options())};
    const Map<T> key{weight<T>(maps.key), fresh[0].template mutable_data_ptr<T>(), rows};
    const Map<T> value{weight<T>(maps.value), fresh[1].template mutable_data_ptr<T>(), rows};
    multiply<CACHED, T>({asked, key, value}, newest, size);
  } else {
    multiply<CACHED, T>({asked}, newest, size);
    fresh = multiply_all({maps.key, maps.value}, tokens, count);
  }
  const T *const new_keys = weight<T>(fresh[0]), *const new_values = weight<T>(fresh[1]);
  T *const all_keys = keys.mutable_data_ptr<T>(), *const all_values = values.mutable_data_ptr<T>();
  for (int64_t token = 0; token < count; ++token)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t to = (group * capacity + made + token) * each, from = token * rows + group * each;
      std::memcpy(all_keys + to, new_keys + from, each * sizeof(T));
      std::memcpy(all_values + to, new_values + from, each * sizeof(T));
    }
  const bool theirs = fused || each % (2 * LANES) != 0;  // sizes that our operator would copy for
  const auto mixed = theirs ? at::scaled_dot_product_attention(query, keys.narrow(2, 0, length),
                                                              values.narrow(2, 0, length), {}, 0.0, false, {},
                                                              inner != rows)
                                 .contiguous()
                           : attend_one(query, keys, values, length, 1.0 / std::sqrt(each));
  auto output = at::empty({1, 1, maps.output.size(0)}, keys.options());
  multiply<CACHED, T>({{weight<T>(maps.output), output.template mutable_data_ptr<T>(), output.size(2)}},
              mixed.template const_data_ptr<T>(), inner);
  return output;
}

// `attend` for inputs (1, capacity, size) from `first` on.
at::Tensor attend_token(const at::Tensor& inputs, int64_t first, int64_t count, at::TensorList weights,
                        const at::Tensor& keys, const at::Tensor& values, int64_t made, bool fused) {
  const Attention maps{weights[0], weights[1], weights[2], weights[3]};
  TORCH_CHECK(first >= 0 && first + count <= inputs.size(1),
              "attend_token: sizes do not fit");
  return of_type(inputs, [&](auto zero) {
    using T = decltype(zero);
    return attend<T>(weight<T>(inputs) + first * inputs.size(2), count, maps, keys, values, made,
                     fused);
  });
}

// The router's logit and gate (1, 1), its average, the token's output (1, 1, size), and whether it attends. weights:
// the router's four, the convolution's value, output and taps, attention's four. `gate` (1, 1) decides instead, if given.
//
// hidden is stored in inputs (1, capacity, size) at `place`, behind `waiting` inputs that the convolution has not seen.
// Its values go into `window` behind `filled` others. Keys and values of all inputs from `made` on go into their
// buffers if the token attends; without room in them the output is then (1, 0, size), and up to the caller.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, bool> routed_token(
    const at::Tensor& hidden, at::TensorList weights, const std::optional<at::Tensor>& before, double decay,
    const std::optional<at::Tensor>& gate, const at::Tensor& inputs, int64_t place, int64_t waiting,
    const at::Tensor& window, int64_t filled, const std::optional<at::Tensor>& keys,
    const std::optional<at::Tensor>& values, int64_t position, int64_t made) {
  const int64_t size = hidden.size(2), width = weights[2].size(-1), count = position + 1 - made;
  TORCH_CHECK(place < inputs.size(1) && waiting <= place && count <= place + 1,
              "routed_token: sizes do not fit");
  return of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const T* const token = weight<T>(hidden);
    T* const kept = inputs.mutable_data_ptr<T>() + place * size;
    std::memcpy(kept, token, size * sizeof(T));
    auto average = at::empty({1, width}, hidden.options());
    const T* const old = before ? weight<T>(*before) : nullptr;
    const float score = route<T>(token, size, weights, old, average.mutable_data_ptr<T>(), decay);
    auto logit = at::empty({1, 1}, hidden.options()), chosen = at::empty({1, 1}, hidden.options());
    bool attends = score > 0;
    if (gate) {  // `item` takes longer than the router
      attends = gate->scalar_type() == hidden.scalar_type() ? weight<T>(*gate)[0] > 0 : gate->item().toFloat() > 0;
    }
    logit.mutable_data_ptr<T>()[0] = static_cast<T>(score);
    chosen.mutable_data_ptr<T>()[0] = static_cast<T>(attends ? 1.f : 0.f);
    at::Tensor mixed;
    if (!attends) {
      mixed = convolve<T>(kept - waiting * size, waiting + 1, weights[4], weights[5], window, filled, weights[6]);
    } else if (keys && values && keys->size(2) > position) {
      const Attention maps{weights[7], weights[8], weights[9], weights[10]};
      mixed = attend<T>(kept - (count - 1) * size, count, maps, *keys, *values, made);
    } else {
      mixed = at::empty({1, 0, size}, hidden.options());
    }
    return std::make_tuple(logit, chosen, average, mixed, attends);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerwise, library) {
  library.def(
      "routed_token(Tensor hidden, Tensor[] weights, Tensor? before, float decay, Tensor? gate, Tensor(a!) inputs,"
      " int place, int waiting, Tensor(b!) window, int filled, Tensor(c!)? keys, Tensor(d!)? values,"
      " int position, int made) -> (Tensor, Tensor, Tensor, Tensor, bool)");
  library.def(
      "attend_token(Tensor inputs, int first, int count, Tensor[] weights, Tensor(a!) keys, Tensor(b!) values,"
      " int made, bool fused=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerwise, CPU, library) {
  library.impl("routed_token", routed_token);
  library.impl("attend_token", attend_token);
}
