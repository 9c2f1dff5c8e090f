// Attention over a paged cache of keys and values: scores, softmax and sums are float32, whatever is stored.
// Online softmax over tiles of keys (https://arxiv.org/abs/1805.02867). The query heads that share a key head, of all
// tokens of an item, are the rows of small matrix products, so that keys and values are read once for all of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "plan.h"
#include "scores.h"
#include "vectors.h"

namespace attention {

constexpr int kRowsTogether = 4;      // accumulators of so many rows fit into the registers
constexpr int64_t kRowsToPack = 12;   // from so many rows on, it pays to transpose a tile of keys
constexpr float kLowest = -3e38f;     // below every score

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One thread's memory.
struct Scratch {
  char* queries;    // [rows, padded head_dim], of up to four bytes each
  float* packed;    // [padded head_dim, kTile]: keys, transposed
  float* scores;    // [rows, kTile]: scores, then their powers
  float* sums;      // [rows, padded head_dim]: of values, weighted
  float* maxima;    // [rows]: of scores so far
  float* totals;    // [rows]: of weights so far
  float* decays;    // [rows]: what earlier sums are multiplied by

  Scratch(char* memory, int64_t rows, int64_t padded) {
    queries = memory;
    packed = reinterpret_cast<float*>(queries + rows * padded * 4);
    scores = packed + padded * kTile;
    sums = scores + rows * kTile;
    maxima = sums + rows * padded;
    totals = maxima + rows;
    decays = totals + rows;
  }

  static int64_t padded(const Plan& plan) { return round_up(plan.head_dim, 2 * kNativeWidth); }

  static int64_t bytes(const Plan& plan, int64_t num_tokens) {
    const int64_t rows = num_tokens * (plan.num_heads / plan.num_kv_heads);
    const int64_t words = rows * padded(plan) * 2 + padded(plan) * kTile + rows * (kTile + 3);
    return round_up(words * 4, 64);
  }
};

template <class E, int W>
class PagedAttention {
 public:
  PagedAttention(const Plan& plan, const E* cache, char* scratch)
      : plan_(plan),
        cache_(cache),
        memory_(scratch),
        group_(plan.num_heads / plan.num_kv_heads),
        chunks_{plan.head_dim},
        scale_(float(plan.scale / std::log(2.0))) {}

  void run(const Item& item, int64_t kv_head, const E* queries, E* output) {
    const int64_t rows = item.num_tokens * group_;
    const Scratch scratch(memory_, rows, Scratch::padded(plan_));
    const bool packs = rows >= kRowsToPack;
    const int64_t head = kv_head * group_ * plan_.head_dim;
    for (int64_t row = 0; row < rows; row++) {
      const E* query = queries + element(item, row, plan_.query_stride) + head;
      packs ? pack_query<E, W>(query, plan_.head_dim, scratch.queries, row)
            : chunks_.split_query(query, reinterpret_cast<E*>(scratch.queries) + row * chunks_.padded());
    }
    std::fill_n(scratch.sums, rows * chunks_.padded(), 0.0f);
    std::fill_n(scratch.maxima, rows, kLowest);
    std::fill_n(scratch.totals, rows, 0.0f);
    const int64_t end = item.position + item.num_tokens;
    for (int64_t first = first_seen(item.position); first < end; first += kTile) {
      locate(item, kv_head, first, std::min<int64_t>(kTile, end - first));
      prefetch(item, kv_head, first + kTile, std::min<int64_t>(kTile, end - first - kTile));
      add_tile(item, scratch, packs);
    }
    for (int64_t row = 0; row < rows; row++)
      write(scratch, row, output + element(item, row, plan_.output_stride) + head);
  }

 private:
  // A row's place among queries or output, from its key head's first query head on.
  int64_t element(const Item& item, int64_t row, int64_t stride) const {
    return (item.first_token + row / group_) * stride + row % group_ * plan_.head_dim;
  }

  int64_t first_seen(int64_t position) const { return std::max<int64_t>(position - plan_.window + 1, 0); }

  // Calls use(key, count) for each run of keys that follow each other in the cache, from position `first` on.
  template <class Use>
  void for_each_run(const Item& item, int64_t kv_head, int64_t first, int64_t size, Use use) const {
    const int32_t* blocks = plan_.block_table + item.row * plan_.block_table_stride;
    int64_t block = first / plan_.block_size, slot = first % plan_.block_size;
    for (; size > 0; slot = 0) {
      const int64_t count = std::min(plan_.block_size - slot, size);
      use(cache_ + blocks[block++] * plan_.block_stride + kv_head * plan_.head_stride + slot * plan_.head_dim, count);
      size -= count;
    }
  }

  // Finds the tile's keys. What is beyond them up to a whole vector repeats the last one.
  void locate(const Item& item, int64_t kv_head, int64_t first, int64_t size) {
    first_ = first;
    size_ = size;
    const E** next = keys_;
    for_each_run(item, kv_head, first, size, [&](const E* key, int64_t count) {
      for (int64_t i = 0; i < count; i++) *next++ = key + i * plan_.head_dim;
    });
    std::fill(next, keys_ + round_up(size, W), keys_[size - 1]);
  }

  // Blocks are scattered, so the hardware does not foresee them.
  void prefetch(const Item& item, int64_t kv_head, int64_t first, int64_t size) const {
    for_each_run(item, kv_head, first, size, [&](const E* key, int64_t count) {
      const char* line = reinterpret_cast<const char*>(key);
      const int64_t to_value = plan_.value_offset * int64_t(sizeof(E));
      for (int64_t i = 0; i < count * plan_.head_dim * int64_t(sizeof(E)); i += 64) {
        __builtin_prefetch(line + i);
        __builtin_prefetch(line + i + to_value);
      }
    });
  }

  void add_tile(const Item& item, const Scratch& scratch, bool packs) {
    const int64_t first_token = std::max<int64_t>(first_ - item.position, 0);
    const int64_t last_token = std::min(item.num_tokens - 1, first_ + size_ - 2 + plan_.window - item.position);
    const int64_t begin = first_token * group_, end = (last_token + 1) * group_;
    if (packs)
      score_packed<E, W>(keys_, size_, plan_.head_dim, scratch.queries, scratch.packed, begin, end, scratch.scores);
    for (int64_t row = begin; row < end; row++) {
      float* scores = scratch.scores + row * kTile;
      if (!packs) chunks_.score(reinterpret_cast<E*>(scratch.queries) + row * chunks_.padded(), keys_, size_, scores);
      exponentiate(item.position + row / group_, row, scratch);
    }
    for (int64_t row = begin; row < end; row += kRowsTogether) add_values(scratch, row, end - row);
  }

  // Turns a row's scores into weights, relative to the largest score so far.
  void exponentiate(int64_t position, int64_t row, const Scratch& scratch) const {
    float* scores = scratch.scores + row * kTile;
    const int32_t begin = int32_t(std::max<int64_t>(first_seen(position) - first_, 0));
    const int32_t end = int32_t(std::min<int64_t>(position + 1 - first_, size_));
    Floats<W> largest_scores = broadcast<W>(kLowest);
    for (int i = 0; i < size_; i += W) {
      const Ints<W> key = iota<W>() + i;
      const Floats<W> score = load<Floats<W>>(scores + i) * scale_;
      const Floats<W> visible = (key >= begin) & (key < end) ? score : broadcast<W>(-INFINITY);
      largest_scores = larger<W>(visible, largest_scores);
      store(scores + i, visible);
    }
    const float maximum = std::max(scratch.maxima[row], largest<W>(largest_scores));
    Floats<W> total{};
    for (int i = 0; i < size_; i += W) {
      const Floats<W> weight = exp2<W>(load<Floats<W>>(scores + i) - maximum);
      total += weight;
      store(scores + i, weight);
    }
    const float decay = exp2<W>(broadcast<W>(scratch.maxima[row] - maximum))[0];
    scratch.maxima[row] = maximum;
    scratch.decays[row] = decay;
    scratch.totals[row] = scratch.totals[row] * decay + sum<W>(total);
  }

  void add_values(const Scratch& scratch, int64_t row, int64_t num_rows) const {
    switch (num_rows) {
      case 1:
        return add_values<1>(scratch, row);
      case 2:
        return add_values<2>(scratch, row);
      case 3:
        return add_values<3>(scratch, row);
      default:
        return add_values<kRowsTogether>(scratch, row);
    }
  }

  template <int R>
  void add_values(const Scratch& scratch, int64_t row) const {
    const float* weights = scratch.scores + row * kTile;
    for (int64_t chunk = 0; chunk < chunks_.count(); chunk++) {
      float* sums = scratch.sums + row * chunks_.padded() + chunk * 2 * W;
      const int64_t offset = plan_.value_offset + chunks_.offset(chunk);
      Floats<W> first[R], second[R];
      for (int r = 0; r < R; r++) {
        first[r] = load<Floats<W>>(sums + r * chunks_.padded()) * scratch.decays[row + r];
        second[r] = load<Floats<W>>(sums + r * chunks_.padded() + W) * scratch.decays[row + r];
      }
      for (int64_t key = 0; key < size_; key++) {
        const Pair<W> value = load_pair<W>(keys_[key] + offset);
        for (int r = 0; r < R; r++) {
          first[r] += value.first * weights[r * kTile + key];
          second[r] += value.second * weights[r * kTile + key];
        }
      }
      for (int r = 0; r < R; r++) {
        store(sums + r * chunks_.padded(), first[r]);
        store(sums + r * chunks_.padded() + W, second[r]);
      }
    }
  }

  void write(const Scratch& scratch, int64_t row, E* output) const {
    const float* sums = scratch.sums + row * chunks_.padded();
    const float factor = 1.0f / scratch.totals[row];
    for (int64_t chunk = 0; chunk < chunks_.count(); chunk++, sums += 2 * W)
      store_pair<W>(output + chunks_.offset(chunk),
                    {load<Floats<W>>(sums) * factor, load<Floats<W>>(sums + W) * factor});
  }

  const Plan& plan_;
  const E* const cache_;
  char* const memory_;
  const int64_t group_;
  const Chunks<E, W> chunks_;
  const float scale_;  // of scores whose powers are of two
  int64_t first_ = 0;  // position of the tile's first key
  int64_t size_ = 0;
  const E* keys_[kTile];
};

}  // namespace attention
