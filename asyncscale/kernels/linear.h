// Linear layers over packed weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "model.h"
#include "products.h"

namespace kernels {

constexpr int64_t kFetchDistance = 2048;  // bytes

// Matrix `index` of those that follow each other in memory, `first` being the first one. Only that may have a bias.
template <class P>
inline Linear matrix_at(const Linear& first, int64_t index) {
  Linear linear = first;
  const int64_t size = first.num_outputs * round_up(first.num_inputs, P::kElements);
  linear.weights = static_cast<const typename P::Weight*>(first.weights) + index * size;
  if (first.scales) linear.scales = first.scales + index * first.num_outputs;
  return linear;
}

// A layer's product with rows of inputs, for one element type. A sink takes the outputs:
// sink.put(row, column, W outputs). gated: see packing.py; a sink is then given two: put(row, column, gate, up).
template <class P>
class PackedLinear {
 public:
  using Word = typename P::Word;
  using Weight = typename P::Weight;

  // inputs: [rows, words], as make_inputs writes them, input_stride words apart.
  PackedLinear(const Linear& linear, const void* inputs, int64_t input_stride)
      : linear_(linear),
        inputs_(static_cast<const Word*>(inputs)),
        input_stride_(input_stride),
        num_words_((linear.num_inputs + P::kElements - 1) / P::kElements) {}

  template <bool kGated, class Sink>
  void run_panel(int64_t panel, int64_t begin, int64_t end, const Sink& sink) const {
    const int64_t first = panel * kPanel;
    const int64_t width = std::min(kPanel, linear_.num_outputs - first);
    const Weight* weights = static_cast<const Weight*>(linear_.weights) + first * num_words_ * P::kElements;
    const int64_t num_vectors = width / W;
    for (int64_t v = 0; v < num_vectors; v += kVectors) {
      const int64_t count = std::min<int64_t>(kVectors, num_vectors - v);
      with_constant<kVectors>(count, [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        if constexpr (!kGated || V % 2 == 0) {
          const Weight* columns[V];
          int64_t places[V];
          for (int i = 0; i < V; i++) {
            const int64_t vector = !kGated ? v + i : v / 2 + i % (V / 2) + (i < V / 2 ? 0 : num_vectors / 2);
            places[i] = first + vector * W;
            columns[i] = weights + vector * W * P::kElements;
          }
          run_rows<kGated, V>(columns, places, width, begin, end, sink);
        }
      });
    }
  }

 private:
  template <bool kGated, int V, class Sink>
  void run_rows(const Weight* const* columns, const int64_t* places, int64_t width, int64_t begin, int64_t end,
                const Sink& sink) const {
    // As even as can be: a block of one or two rows would read the weights for little.
    int64_t num_blocks = (end - begin + kRows - 1) / kRows;
    for (int64_t row = begin, size; row < end; row += size, num_blocks--) {
      size = (end - row + num_blocks - 1) / num_blocks;
      with_constant<kRows>(size, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        // Once per panel, as it comes from memory, what follows is fetched.
        if (row == begin)
          run_block<kGated, R, V, true>(columns, places, width, row, sink);
        else
          run_block<kGated, R, V, false>(columns, places, width, row, sink);
      });
    }
  }

  template <bool kGated, int R, int V, bool kFetches, class Sink>
  void run_block(const Weight* const* columns, const int64_t* places, int64_t width, int64_t row, const Sink& sink) const {
    const Weight* ahead[V];
    for (int v = 0; v < V; v++) ahead[v] = columns[v] + kFetchDistance / sizeof(Weight);
    alignas(64) float sums[R][V * W];
    const Word* inputs = inputs_ + row * input_stride_;
    const Operands<P> operands{columns, ahead, 1, width * P::kElements, inputs, input_stride_, num_words_};
    if constexpr (std::is_same_v<P, Int8Products>)
      multiply_quantized<R, V, kFetches>(operands, round_up(linear_.num_inputs, kLanes), sums[0], V * W);
    else
      multiply<P, R, V, kFetches>(operands, nullptr, sums[0], V * W);
    for (int r = 0; r < R; r++) {
      const auto outputs = [&](int v) { return output(load<Floats<W>>(sums[r] + v * W), places[v]); };
      if constexpr (kGated)
        for (int v = 0; v < V / 2; v++)
          sink.put(row + r, (places[v] - places[v] % kPanel) / 2 + places[v] % kPanel, outputs(v), outputs(v + V / 2));
      else
        for (int v = 0; v < V; v++) sink.put(row + r, places[v], outputs(v));
    }
  }

  Floats<W> output(Floats<W> sums, int64_t column) const {
    const Floats<W> bias = linear_.bias ? load<Floats<W>>(linear_.bias + column) : Floats<W>{};
    if constexpr (std::is_same_v<P, Int8Products>) return fused<W>(sums, load<Floats<W>>(linear_.scales + column), bias);
    return sums + bias;
  }

  const Linear& linear_;
  const Word* const inputs_;
  const int64_t input_stride_;
  const int64_t num_words_;
};

}  // namespace kernels
