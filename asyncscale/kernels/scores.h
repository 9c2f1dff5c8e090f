// Scores: dot products of queries and a tile of keys, in float32, two ways.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace attention {

using namespace vectors;

constexpr int kTile = 64;  // keys; with their values they stay in the first-level cache

template <int W, class E>
inline Floats<W> add_products(Floats<W> sum, const E* query, const E* key) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, BFloat16> && W == 16)
    return (Floats<W>)_mm512_dpbf16_ps((__m512)sum, load<__m512bh>(query), load<__m512bh>(key));
#endif
  const Pair<W> q = load_pair<W>(query), k = load_pair<W>(key);
  return sum + q.first * k.first + q.second * k.second;
}

// One row at a time. Heads are read in chunks of 2 * W elements, of which the last may overlap the one before: there
// the query is zero, and sums of values come out equal.
template <class E, int W>
struct Chunks {
  int64_t head_dim;

  int64_t count() const { return (head_dim + 2 * W - 1) / (2 * W); }
  int64_t padded() const { return count() * 2 * W; }
  int64_t offset(int64_t chunk) const { return std::min(chunk * 2 * W, head_dim - 2 * W); }

  // queries: [rows, padded]
  void split_query(const E* query, char* queries, int64_t row) const {
    E* to = reinterpret_cast<E*>(queries) + row * padded();
    const int64_t whole = padded() - 2 * W;
    std::copy_n(query, whole, to);
    std::fill_n(to + whole, padded() - head_dim, E{});
    std::copy(query + whole, query + head_dim, to + whole + padded() - head_dim);
  }

  void score(const char* queries, int64_t row, const E* const* keys, int64_t size, float* scores) const {
    const E* query = reinterpret_cast<const E*>(queries) + row * padded();
    for (int64_t i = 0; i < size; i += W) {
      Floats<W> products[W] = {};
      for (int64_t chunk = 0; chunk < count(); chunk++) {
        const E* part = query + chunk * 2 * W;
        const int64_t from = offset(chunk);
        for (int lane = 0; lane < W; lane++)
          products[lane] = add_products<W>(products[lane], part, keys[i + lane] + from);
      }
      store(scores + i, sum_each<W>(products));
    }
  }
};

// Many rows at a time: keys are transposed, so that lanes are keys. A word is what one lane multiplies.
template <class E, int W>
struct Packing {
  using Word = float;
  static constexpr int kElements = 1;

  static Word word(const E* head, int64_t i, int64_t) { return to_float(head[i]); }
  static Floats<W> add_product(Floats<W> sum, const Word* keys, Word query) {
    return sum + load<Floats<W>>(keys) * query;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Packing<BFloat16, 16> {
  using Word = uint32_t;
  static constexpr int kElements = 2;

  static Word word(const BFloat16* head, int64_t i, int64_t head_dim) {
    return head[2 * i].bits | (2 * i + 1 < head_dim ? uint32_t(head[2 * i + 1].bits) << 16 : 0u);
  }
  static Floats<16> add_product(Floats<16> sum, const Word* keys, Word query) {
    return (Floats<16>)_mm512_dpbf16_ps((__m512)sum, load<__m512bh>(keys), (__m512bh)_mm512_set1_epi32(int(query)));
  }
};
#endif

template <class E, int W>
inline int64_t num_words(int64_t head_dim) {
  return (head_dim + Packing<E, W>::kElements - 1) / Packing<E, W>::kElements;
}

// queries: [rows, words]
template <class E, int W>
inline void pack_query(const E* query, int64_t head_dim, char* queries, int64_t row) {
  using P = Packing<E, W>;
  const int64_t words = num_words<E, W>(head_dim);
  auto* to = reinterpret_cast<typename P::Word*>(queries) + row * words;
  for (int64_t i = 0; i < words; i++) to[i] = P::word(query, i, head_dim);
}

template <class E, int W, int R, int V>
inline void score_block(const typename Packing<E, W>::Word* queries, const typename Packing<E, W>::Word* packed,
                        int64_t words, float* scores) {
  Floats<W> sums[R][V] = {};
  for (int64_t i = 0; i < words; i++)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++)
        sums[r][v] = Packing<E, W>::add_product(sums[r][v], packed + i * kTile + v * W, queries[r * words + i]);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(scores + r * kTile + v * W, sums[r][v]);
}

// Scores of rows begin .. end. packed: [words, kTile], to write; scores: [rows, kTile].
template <class E, int W>
inline void score_packed(const E* const* keys, int64_t size, int64_t head_dim, const char* queries, float* packed,
                         int64_t begin, int64_t end, float* scores) {
  using P = Packing<E, W>;
  constexpr int kVectors = W == 16 ? 4 : 2;  // with four rows' sums, as many as there are registers for
  const int64_t words = num_words<E, W>(head_dim);
  auto* transposed = reinterpret_cast<typename P::Word*>(packed);
  const int64_t padded = (size + kVectors * W - 1) / (kVectors * W) * (kVectors * W);
  for (int64_t key = 0; key < padded; key++)
    for (int64_t i = 0; i < words; i++) transposed[i * kTile + key] = P::word(keys[key], i, head_dim);
  const auto* rows = reinterpret_cast<const typename P::Word*>(queries);
  for (int64_t row = begin; row < end;) {
    const bool whole = end - row >= 4;
    for (int64_t i = 0; i < padded; i += kVectors * W)
      if (whole)
        score_block<E, W, 4, kVectors>(rows + row * words, transposed + i, words, scores + row * kTile + i);
      else
        score_block<E, W, 1, kVectors>(rows + row * words, transposed + i, words, scores + row * kTile + i);
    row += whole ? 4 : 1;
  }
}

}  // namespace attention
