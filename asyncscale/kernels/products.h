// How weights are multiplied by inputs and added up, one way for each element type.
//
// A word is what one lane multiplies at once: one element, or a pair or four neighbours of the summed dimension. Words of
// weights lie side by side for neighbouring outputs (see packing.py), so that lanes are outputs and nothing is ever
// summed across lanes: every output is the sum of its words in their order, whatever is computed beside it. That makes
// results bitwise the same for every batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kernels {

using namespace vectors;

constexpr int W = kNativeWidth;

struct Float32Products {
  using Weight = float;
  using Input = float;
  using Word = float;
  using Vector = Floats<W>;
  using Sums = Floats<W>;
  static constexpr int kElements = 1;

  static Vector load_weights(const Weight* from) { return load<Floats<W>>(from); }
  static Sums add(Sums sums, Vector weights, Word input) { return sums + weights * input; }
};

struct Float16Products : Float32Products {
  using Weight = Float16;

  static Vector load_weights(const Weight* from) { return widen(from); }
};

struct BFloat16Products {
  using Weight = BFloat16;
  using Input = BFloat16;
  using Word = uint32_t;
  using Sums = Floats<W>;
  static constexpr int kElements = 2;

#if defined(__AVX512BF16__)
  using Vector = __m512bh;

  static Vector load_weights(const Weight* from) { return load<__m512bh>(from); }
  static Sums add(Sums sums, Vector weights, Word input) {
    return (Sums)_mm512_dpbf16_ps((__m512)sums, weights, (__m512bh)_mm512_set1_epi32(int(input)));
  }
#else
  using Vector = Pair<W>;

  static Vector load_weights(const Weight* from) { return load_pair<W>(from); }
  static Sums add(Sums sums, Vector weights, Word input) {
    sums += weights.first * bit_cast<float>(input << 16);
    return sums + weights.second * bit_cast<float>(input & 0xffff0000u);
  }
#endif
};

// Weights are unsigned: 128 more than the number that they stand for. Inputs are signed, and scaled in groups: see
// QuantizedRow.
struct Int8Products {
  using Weight = uint8_t;
  using Input = int8_t;
  using Word = uint32_t;
  using Sums = Ints<W>;
  static constexpr int kElements = 4;

#if defined(__AVX512VNNI__)
  using Vector = __m512i;

  static Vector load_weights(const Weight* from) { return load<__m512i>(from); }
  static Sums add(Sums sums, Vector weights, Word input) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, weights, _mm512_set1_epi32(int(input)));
  }
#else
  // Bytes 0 and 2, and bytes 1 and 3, of each word as 16-bit numbers: their products' sums are exact.
  struct Vector {
    Ints<W> even, odd;
  };

  static Vector load_weights(const Weight* from) {
    const auto words = load<Bits<W>>(from);
    return {(Ints<W>)(words & 0x00ff00ffu), (Ints<W>)((words >> 8) & 0x00ff00ffu)};
  }
  static Sums add(Sums sums, Vector weights, Word input) {
    return sums + multiply_pairs(weights.even, signed_pair(input)) + multiply_pairs(weights.odd, signed_pair(input >> 8));
  }

 private:
  // Bytes 0 and 2 as signed 16-bit numbers.
  static uint32_t signed_pair(uint32_t input) {
    return uint32_t(uint16_t(int8_t(input))) | uint32_t(uint16_t(int8_t(input >> 16))) << 16;
  }

  static Ints<W> multiply_pairs(Ints<W> weights, uint32_t input) {
#if defined(__AVX512BW__)
    return (Ints<W>)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(int(input)));
#elif defined(__AVX2__)
    return (Ints<W>)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(int(input)));
#else
    return (weights & 0xffff) * int32_t(int16_t(input)) + (weights >> 16) * int32_t(int16_t(input >> 16));
#endif
  }
#endif
};

// A row of inputs for int8: its elements in groups, each as whole numbers times a scale of its own, as a few elements are
// much larger than all others and would leave those nothing to tell them apart with. Words of elements, then the groups'
// scales, then 128 times their sums, which the weights' excess adds and which each group's sum begins with, negative.
struct QuantizedRow {
  static constexpr int64_t kGroup = 64;  // elements

  static int64_t num_groups(int64_t size) { return (size + kGroup - 1) / kGroup; }
  // size: a multiple of 4.
  static int64_t words(int64_t size) { return size / 4 + 2 * num_groups(size); }
};

// What is summed: parts of num_words words each, one after the other.
//
// columns: [num_parts][V], where the first of W neighbouring weights is; those of the next word follow `step` elements on.
// ahead: [num_parts][V], what to fetch into the cache meanwhile, at the same places as what is read.
// inputs: row r's begin at inputs + r * input_stride, in words; its parts follow each other.
template <class P>
struct Operands {
  const typename P::Weight* const* columns;
  const typename P::Weight* const* ahead;
  int64_t num_parts;
  int64_t step;
  const typename P::Word* inputs;
  int64_t input_stride;
  int64_t num_words;
};

// sums: [R, V] vectors, sums_stride elements from row to row. They begin at zero, or where `factors` are given, at what is
// there times its row's factor. Not inlined, lest what surrounds it takes registers from it.
template <class P, int R, int V, bool kFetches>
__attribute__((noinline)) void multiply(const Operands<P>& operands, const float* factors,
                                        float* sums, int64_t sums_stride) {
  using Sums = typename P::Sums;
  Sums total[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      total[r][v] = factors ? load<Sums>(sums + r * sums_stride + v * W) * factors[r] : Sums{};
  const typename P::Word* inputs = operands.inputs;
  const int64_t step = operands.step, input_stride = operands.input_stride, num_words = operands.num_words;
  for (int64_t part = 0; part < operands.num_parts; part++, inputs += num_words) {
    const typename P::Weight* const* columns = operands.columns + part * V;
    const typename P::Weight* const* ahead = operands.ahead + part * V;
    for (int64_t i = 0; i < num_words; i++) {
      typename P::Vector weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        weights[v] = P::load_weights(columns[v] + i * step);
        if constexpr (kFetches) __builtin_prefetch(ahead[v] + i * step);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const typename P::Word input = inputs[r * input_stride + i];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[r][v] = P::add(total[r][v], weights[v], input);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(sums + r * sums_stride + v * W, total[r][v]);
}

// As multiply, from zero, for a row of groups: each group's sum is exact, and added to the others as float32.
// size: of a row, in elements.
template <int R, int V, bool kFetches>
__attribute__((noinline)) void multiply_quantized(const Operands<Int8Products>& operands, int64_t size, float* sums,
                                                  int64_t sums_stride) {
  using P = Int8Products;
  constexpr int64_t kWords = QuantizedRow::kGroup / P::kElements;
  const int64_t step = operands.step, stride = operands.input_stride, num_groups = QuantizedRow::num_groups(size);
  for (int64_t group = 0; group < num_groups; group++) {
    const uint32_t* scales = operands.inputs + size / P::kElements + group;
    const uint32_t* beginnings = scales + num_groups;
    P::Sums total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) total[r][v] = P::Sums{} + int32_t(beginnings[r * stride]);
    const int64_t end = std::min(operands.num_words, (group + 1) * kWords);
    for (int64_t i = group * kWords; i < end; i++) {
      P::Vector weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        weights[v] = P::load_weights(operands.columns[v] + i * step);
        if constexpr (kFetches) __builtin_prefetch(operands.ahead[v] + i * step);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint32_t input = operands.inputs[r * stride + i];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[r][v] = P::add(total[r][v], weights[v], input);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float scale = bit_cast<float>(scales[r * stride]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        float* at = sums + r * sums_stride + v * W;
        const Floats<W> before = group == 0 ? Floats<W>{} : load<Floats<W>>(at);
        store(at, fused<W>(__builtin_convertvector(total[r][v], Floats<W>), broadcast<W>(scale), before));
      }
    }
  }
}

// As many rows and vectors of sums as there are registers for, with the weights and an input.
constexpr int kRows = W == 16 ? 6 : W == 8 ? 4 : 2;
constexpr int kVectors = W == 8 ? 2 : 4;

// Calls f with a std::integral_constant of n, which is 1 to N.
template <int N, class F>
inline __attribute__((always_inline)) void with_constant(int64_t n, const F& f) {
  if constexpr (N == 1)
    f(std::integral_constant<int, 1>{});
  else if (n == N)
    f(std::integral_constant<int, N>{});
  else
    with_constant<N - 1>(n, f);
}

}  // namespace kernels
