// The attention half of a pretrained layer whose attention is routed, for one token of one row, residual included: see
// routed_layers.py. Its weights come from memory, and reading them is what it should cost; in Python some fifty calls
// cost as much again.

#include "one_token.h"

#include <torch/library.h>

#include <cstring>
#include <tuple>
#include <vector>

namespace {

using namespace vectors;

enum Mixing { CONVOLUTION, ATTENTION, ROUTED };

template <typename T>
void add(T* x, const at::Tensor& bias) {
  const T* const b = weight<T>(bias);
  for (int64_t i = 0; i < bias.numel(); ++i) x[i] = static_cast<T>(x[i] + b[i]);
}

// Rotary positions of all heads of x, in place.
template <typename T>
void rotate_all(T* x, int64_t heads, int64_t each, const T* cosine, const T* sine) {
  std::vector<float> turned(each);
  for (int64_t head = 0; head < heads; ++head, x += each) {
    rotate(x, each, cosine, sine, turned.data());
    for (int64_t i = 0; i < each; ++i) x[i] = static_cast<T>(turned[i]);
  }
}

// The hidden state (1, 1, size) after attention, and the router's gate and logit (1, 1), both 0 if it is not asked.
//
//   norm        weight (size) and epsilon of the norm in front
//   maps        query, key, value, output; then their biases, empty where there are none
//   keys, values (1, key heads, capacity, head size), filled up to `place`, where this token's are put
//   cosine, sine (1, 1, head size)
//   local       taps (heads, count), sink (heads), the router's weight, bias, weight, bias, and the correction's two
//               weights and bias, if there is one; all float32
std::tuple<at::Tensor, at::Tensor, at::Tensor> routed_layer(
    const at::Tensor& hidden, const at::Tensor& norm, double epsilon, at::TensorList maps, const at::Tensor& keys,
    const at::Tensor& values, int64_t place, const at::Tensor& cosine, const at::Tensor& sine, at::TensorList local,
    double scale, int64_t mixing) {
  const int64_t size = hidden.size(2), groups = keys.size(1), capacity = keys.size(2), each = keys.size(3);
  const int64_t inner = maps[0].size(0), rows = groups * each, heads = inner / each, shared = heads / groups;
  TORCH_CHECK(place < capacity && keys.is_contiguous() && values.is_contiguous() &&
                  maps[0].size(1) == size && maps.size() == 8, "routed_layer: sizes do not fit");
  auto logit = at::zeros({1, 1}, local[0].options()), gate = at::zeros({1, 1}, hidden.options());
  auto output = at::empty_like(hidden);
  of_type(hidden, [&](auto zero) {
    using T = decltype(zero);
    const T* const residual = weight<T>(hidden);
    std::vector<T> x(size);
    normalised(residual, weight<T>(norm), x.data(), size, static_cast<float>(epsilon));
    const T *const cos = weight<T>(cosine), *const sin = weight<T>(sine);

    auto query = at::empty({1, heads, 1, each}, hidden.options());
    T* const asked = query.template mutable_data_ptr<T>();
    std::vector<T> fresh(2 * rows), mixed(inner);
    T *const key = fresh.data(), *const value = key + rows;
    const Map<T> of_key{weight<T>(maps[1]), key, rows}, of_value{weight<T>(maps[2]), value, rows};
    const Map<T> of_query{weight<T>(maps[0]), asked, inner};
    if (mixing == ATTENTION)
      multiply<STREAMED, T>({of_query, of_key, of_value}, x.data(), size);
    else
      multiply<STREAMED, T>({of_key, of_value}, x.data(), size);
    add(key, maps[5]);
    add(value, maps[6]);
    rotate_all(key, groups, each, cos, sin);
    T *const all_keys = keys.mutable_data_ptr<T>(), *const all_values = values.mutable_data_ptr<T>();
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t to = (group * capacity + place) * each;
      std::memcpy(all_keys + to, key + group * each, each * sizeof(T));
      std::memcpy(all_values + to, value + group * each, each * sizeof(T));
    }

    bool attends = mixing == ATTENTION;
    if (!attends) {
      // The input and the convolution, side by side: what router and correction look at.
      std::vector<float> features(size + inner);
      for (int64_t i = 0; i < size; ++i) features[i] = x[i];
      float* const found = features.data() + size;
      const int64_t taps = local[0].size(1);
      for (int64_t head = 0; head < heads; ++head) {
        const T* const first = all_values + head / shared * capacity * each;
        float* const to = found + head * each;
        filter_head(weight<float>(local[0]) + head * taps, std::min(taps, place + 1), first + place * each, each, to, each);
        const float sink = weight<float>(local[1])[head];
        for (int64_t i = 0; i < each; ++i) to[i] += sink * static_cast<float>(first[i]);
      }
      const auto map = [&](const at::Tensor& matrix, const float* from) {
        std::vector<float> to(padded(matrix.size(0)));
        multiply<STREAMED, float>({{weight<float>(matrix), to.data(), matrix.size(0)}}, from, matrix.size(1));
        return to;
      };
      if (mixing == ROUTED) {
        auto wide = map(local[2], features.data());
        add(wide.data(), local[3]);
        const float score = *weight<float>(local[5]) + gelu_dot(wide.data(), weight<float>(local[4]), local[4].numel());
        attends = score > 0;
        logit.mutable_data_ptr<float>()[0] = score;
        gate.template mutable_data_ptr<T>()[0] = static_cast<T>(attends ? 1.f : 0.f);
      }
      if (attends) {
        multiply<STREAMED, T>({of_query}, x.data(), size);
      } else if (place == 0) {  // it has only itself to look at
        for (int64_t i = 0; i < inner; ++i) mixed[i] = value[i / each / shared * each + i % each];
      } else {
        std::vector<float> more(inner, 0.f);
        if (local.size() > 6) {
          more = map(local[7], map(local[6], features.data()).data());
          add(more.data(), local[8]);
        }
        for (int64_t i = 0; i < inner; ++i) mixed[i] = static_cast<T>(found[i] + more[i]);
      }
    }
    if (attends) {
      add(asked, maps[4]);
      rotate_all(asked, heads, each, cos, sin);
      const auto attended = attend_one(query, keys, values, place + 1, scale);
      std::memcpy(mixed.data(), attended.template const_data_ptr<T>(), inner * sizeof(T));
    }
    T* const to = output.template mutable_data_ptr<T>();
    multiply<STREAMED, T>({{weight<T>(maps[3]), to, size}}, mixed.data(), inner);
    add(to, maps[7]);
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<T>(to[i] + residual[i]);
  });
  return {output, gate, logit};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(layerwise, library) {
  library.def(
      "routed_layer(Tensor hidden, Tensor norm, float epsilon, Tensor[] maps, Tensor(a!) keys, Tensor(b!) values,"
      " int place, Tensor cosine, Tensor sine, Tensor[] local, float scale, int mixing) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(layerwise, CPU, library) { library.impl("routed_layer", routed_layer); }
