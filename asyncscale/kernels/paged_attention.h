// Attention over a paged cache of keys and values: scores, softmax and sums are float32, whatever is stored.
// Online softmax over tiles of keys (https://arxiv.org/abs/1805.02867). The query heads that share a key head, of all
// tokens of an item, are the rows of small matrix products, so that keys and values are read once for all of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

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

  int64_t num_units() const { return plan_.num_items * plan_.num_kv_heads; }

  // Computes one item for the query heads of one key head.
  void run(int64_t unit, const E* queries, E* output) {
    const Item& item = plan_.items[unit / plan_.num_kv_heads];
    const int64_t rows = item.num_tokens * group_;
    const Scratch scratch(memory_, rows, Scratch::padded(plan_));
    const bool packs = rows >= kRowsToPack;
    for (int64_t row = 0; row < rows; row++) {
      const E* query = queries + offset(unit, row, plan_.query_stride);
      packs ? pack_query<E, W>(query, plan_.head_dim, scratch.queries, row)
            : chunks_.split_query(query, scratch.queries, row);
    }
    std::fill_n(scratch.sums, rows * chunks_.padded(), 0.0f);
    std::fill_n(scratch.maxima, rows, kLowest);
    std::fill_n(scratch.totals, rows, 0.0f);
    add_tiles(unit, scratch, packs);
    for (int64_t row = 0; row < rows; row++) write(scratch, row, output + offset(unit, row, plan_.output_stride));
  }

 private:
  struct Tile {
    int64_t first;         // position of its first key
    int64_t size;          // number of its keys
    const E* keys[kTile];  // where they are; then the last one again and again
  };

  // A row's place among queries or output.
  int64_t offset(int64_t unit, int64_t row, int64_t stride) const {
    const int64_t token = plan_.items[unit / plan_.num_kv_heads].first_token + row / group_;
    return token * stride + (unit % plan_.num_kv_heads * group_ + row % group_) * plan_.head_dim;
  }

  // The first position that a token at `position` sees.
  int64_t first_seen(int64_t position) const { return std::max<int64_t>(position - plan_.window + 1, 0); }

  void add_tiles(int64_t unit, const Scratch& scratch, bool packs) {
    const Item& item = plan_.items[unit / plan_.num_kv_heads];
    const int64_t end = item.position + item.num_tokens;
    Tile* tile = &tiles_[0];
    Tile* next = &tiles_[1];
    locate(*tile, unit, first_seen(item.position));
    for (bool is_last = false; !is_last; std::swap(tile, next)) {
      const int64_t first = tile->first + kTile;
      is_last = first >= end;
      if (!is_last)
        locate(*next, unit, first);
      else if (unit + 1 < num_units())
        locate(*next, unit + 1, first_seen(plan_.items[(unit + 1) / plan_.num_kv_heads].position));
      else
        next = tile;
      add_tile(item, *tile, *next, scratch, packs);
    }
  }

  void locate(Tile& tile, int64_t unit, int64_t first) const {
    const Item& item = plan_.items[unit / plan_.num_kv_heads];
    tile.first = first;
    tile.size = std::min<int64_t>(kTile, item.position + item.num_tokens - first);
    const E* head = cache_ + unit % plan_.num_kv_heads * plan_.head_stride;
    const int32_t* blocks = plan_.block_table + item.row * plan_.block_table_stride + first / plan_.block_size;
    int64_t slot = first % plan_.block_size;
    for (int64_t i = 0; i < tile.size; slot = 0, blocks++)
      for (; slot < plan_.block_size && i < tile.size; slot++)
        tile.keys[i++] = head + *blocks * plan_.block_stride + slot * plan_.head_dim;
    std::fill(tile.keys + tile.size, tile.keys + kTile, tile.keys[tile.size - 1]);
  }

  void add_tile(const Item& item, const Tile& tile, const Tile& next, const Scratch& scratch, bool packs) const {
    const int64_t last_key = tile.first + tile.size - 1;
    const int64_t first_token = std::max<int64_t>(tile.first - item.position, 0);
    const int64_t last_token = std::min(item.num_tokens - 1, last_key + plan_.window - 1 - item.position);
    const int64_t begin = first_token * group_, end = (last_token + 1) * group_;
    if (packs)
      score_packed<E, W>(tile.keys, tile.size, plan_.head_dim, scratch.queries, scratch.packed, begin, end,
                         scratch.scores);
    for (int64_t row = begin; row < end; row++) {
      if (!packs) chunks_.score(scratch.queries, row, tile.keys, tile.size, scratch.scores + row * kTile);
      weigh(tile, item.position + row / group_, row, scratch);
    }
    for (int64_t row = begin; row < end; row += kRowsTogether)
      if (packs || row > begin)
        add_values<false>(tile, next, scratch, row, end - row);
      else
        add_values<true>(tile, next, scratch, row, end - row);
  }

  // Turns a row's scores into weights, relative to the largest score so far.
  void weigh(const Tile& tile, int64_t position, int64_t row, const Scratch& scratch) const {
    float* scores = scratch.scores + row * kTile;
    const int32_t begin = int32_t(std::max<int64_t>(first_seen(position) - tile.first, 0));
    const int32_t end = int32_t(std::min<int64_t>(position + 1 - tile.first, tile.size));
    Floats<W> largest_scores = broadcast<W>(kLowest);
    for (int i = 0; i < tile.size; i += W) {
      const Ints<W> key = iota<W>() + i;
      const Floats<W> score = load<Floats<W>>(scores + i) * scale_;
      const Floats<W> visible = (key >= begin) & (key < end) ? score : broadcast<W>(-INFINITY);
      largest_scores = larger<W>(visible, largest_scores);
      store(scores + i, visible);
    }
    const float maximum = std::max(scratch.maxima[row], largest<W>(largest_scores));
    Floats<W> total{};
    for (int i = 0; i < tile.size; i += W) {
      const Floats<W> weight = exp2<W>(load<Floats<W>>(scores + i) - maximum);
      total += weight;
      store(scores + i, weight);
    }
    const float decay = exp2<W>(broadcast<W>(scratch.maxima[row] - maximum))[0];
    scratch.maxima[row] = maximum;
    scratch.decays[row] = decay;
    scratch.totals[row] = scratch.totals[row] * decay + sum<W>(total);
  }

  template <bool kPrefetches>
  void add_values(const Tile& tile, const Tile& next, const Scratch& scratch, int64_t row, int64_t num_rows) const {
    switch (num_rows) {
      case 1:
        return add_values<kPrefetches, 1>(tile, next, scratch, row);
      case 2:
        return add_values<kPrefetches, 2>(tile, next, scratch, row);
      case 3:
        return add_values<kPrefetches, 3>(tile, next, scratch, row);
      default:
        return add_values<kPrefetches, kRowsTogether>(tile, next, scratch, row);
    }
  }

  // Adds the weighted values to the sums of rows row .. row + R. Blocks are scattered, so that the hardware does not
  // foresee them: where memory is the bottleneck, the next tile is fetched meanwhile, line by line.
  template <bool kPrefetches, int R>
  void add_values(const Tile& tile, const Tile& next, const Scratch& scratch, int64_t row) const {
    const int64_t padded = chunks_.padded();
    const float* weights = scratch.scores + row * kTile;
    for (int64_t chunk = 0; chunk < chunks_.count(); chunk++) {
      float* sums = scratch.sums + row * padded + chunk * 2 * W;
      const int64_t key_offset = chunks_.offset(chunk), value_offset = plan_.value_offset + key_offset;
      Floats<W> first[R], second[R];
      for (int r = 0; r < R; r++) {
        first[r] = load<Floats<W>>(sums + r * padded) * scratch.decays[row + r];
        second[r] = load<Floats<W>>(sums + r * padded + W) * scratch.decays[row + r];
      }
      for (int64_t key = 0; key < tile.size; key++) {
        const Pair<W> value = load_pair<W>(tile.keys[key] + value_offset);
        if constexpr (kPrefetches) {
          __builtin_prefetch(next.keys[key] + key_offset);
          __builtin_prefetch(next.keys[key] + value_offset);
        }
        for (int r = 0; r < R; r++) {
          first[r] += value.first * weights[r * kTile + key];
          second[r] += value.second * weights[r * kTile + key];
        }
      }
      for (int r = 0; r < R; r++) {
        store(sums + r * padded, first[r]);
        store(sums + r * padded + W, second[r]);
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
  const int64_t group_;  // query heads that share a key head
  const Chunks<E, W> chunks_;
  const float scale_;  // of scores, so that weights are powers of two
  Tile tiles_[2] = {};
};

}  // namespace attention
