// Causal attention over the paged cache, with online softmax over tiles of keys (https://arxiv.org/abs/1805.02867).
// The query heads that share a key head, of all tokens of an item, are the rows of two small products, so that keys and
// values are read once for all of them. Tiles begin at multiples of their size in the sequence, and a tile that a row does
// not see leaves its sums as they are: a token's result does not depend on what is computed beside it.
#pragma once

#include <cmath>

#include "kv_cache.h"
#include "linear.h"

namespace kernels {

constexpr int64_t kTileGroups = 4;
constexpr int64_t kTile = kTileGroups * kLanes;  // keys; with their values they stay in the first-level cache
constexpr float kLowest = -3e38f;                // below every score

// One thread's memory, for items of up to so many rows.
struct AttentionScratch {
  float* queries;  // [rows, words of a head], of words
  float* sums;     // [rows, padded head_dim]: of values, weighted
  float* maxima;   // [rows]: of scores so far
  float* totals;   // [rows]: of weights so far

  AttentionScratch(char* memory, int64_t rows, int64_t head_dim) {
    const int64_t padded = round_up(head_dim, kLanes);
    queries = reinterpret_cast<float*>(memory);
    sums = queries + rows * padded;
    maxima = sums + rows * padded;
    totals = maxima + rows;
  }

  static int64_t bytes(int64_t rows, int64_t head_dim) {
    return round_up(4 * rows * (2 * round_up(head_dim, kLanes) + 2), 64);
  }
};

// What a few rows make of a tile.
struct alignas(64) TileWeights {
  float scores[kRows][kTile];
  float weights[kRows][kTile];  // as inputs of a product with values
  float decays[W];              // what each row's earlier sums are multiplied by
};

template <class P>
class PagedAttention {
 public:
  using Element = typename P::Weight;
  using Input = typename P::Input;
  using Word = typename P::Word;

  // queries, output: [tokens, num_heads * head_dim], their strides apart.
  PagedAttention(const Model& model, const Step& step, const Cache& cache, int64_t layer, const float* queries,
                 int64_t query_stride, float* output, int64_t output_stride)
      : step_(step),
        cache_(cache),
        layout_(cache_),
        layer_(layer),
        window_(model.layers[layer].window),
        num_kv_heads_(model.num_kv_heads),
        group_(model.num_heads / model.num_kv_heads),
        head_dim_(model.head_dim),
        scale_(float(1.0 / (std::sqrt(double(model.head_dim)) * std::log(2.0)))),
        queries_(queries),
        query_stride_(query_stride),
        output_(output),
        output_stride_(output_stride) {}

  // An item for the query heads of one key head; those of a head follow each other, as they may share its keys.
  int64_t num_units() const { return step_.num_items * num_kv_heads_; }

  // next: the unit that this thread computes next, if there is one: its first keys are fetched meanwhile.
  void run(int64_t unit, int64_t next, char* memory) const {
    const Item& item = step_.items[unit % step_.num_items];
    const int64_t rows = item.num_tokens * group_;
    const AttentionScratch scratch(memory, rows, head_dim_);
    for (int64_t row = 0; row < rows; row++)
      narrow_query(queries_ + offset(unit, row, query_stride_), scratch.queries + row * layout_.head_words());
    std::fill_n(scratch.sums, rows * layout_.padded_head(), 0.0f);
    std::fill_n(scratch.maxima, rows, kLowest);
    std::fill_n(scratch.totals, rows, 0.0f);

    const int64_t last = group_of(item.position + item.num_tokens - 1);
    Tile tiles[2];
    Tile *tile = &tiles[0], *following = &tiles[1];
    locate(*tile, unit, first_group(item));
    for (bool is_last = false; !is_last; std::swap(tile, following)) {
      is_last = tile->first_group + kTileGroups > last;
      if (!is_last)
        locate(*following, unit, tile->first_group + kTileGroups);
      else if (next < num_units())
        locate(*following, next, first_group(step_.items[next % step_.num_items]));
      else
        *following = *tile;
      add_tile(item, *tile, *following, scratch);
    }
    for (int64_t row = 0; row < rows; row++) write(scratch, row, output_ + offset(unit, row, output_stride_));
  }

 private:
  struct Tile {
    int64_t first_group;
    int64_t num_groups;
    int64_t positions[kTileGroups];  // of each group's first key
    int64_t sizes[kTileGroups];      // of each group, in keys
    const Element* keys[kTileGroups];
    const Element* values[kTileGroups];

    // Whether all its lanes are keys from `first` to `last`.
    bool sees_all(int64_t first, int64_t last) const {
      return positions[0] >= first && positions[num_groups - 1] + kLanes - 1 <= last &&
             positions[num_groups - 1] - positions[0] == (num_groups - 1) * kLanes;
    }
  };

  // A row's place among queries or output.
  int64_t offset(int64_t unit, int64_t row, int64_t stride) const {
    const int64_t token = step_.items[unit % step_.num_items].first_token + row / group_;
    return token * stride + (unit / step_.num_items * group_ + row % group_) * head_dim_;
  }

  void narrow_query(const float* query, float* words) const {
    auto* inputs = reinterpret_cast<Input*>(words);
    inputs[layout_.head_words() * P::kElements - 1] = Input{};
    narrow_any(query, inputs, head_dim_);
  }

  // The first position that a token at `position` sees.
  int64_t first_seen(int64_t position) const { return std::max<int64_t>(position - window_ + 1, 0); }

  // Groups are counted through a sequence's blocks.
  int64_t group_of(int64_t position) const {
    return position / cache_.block_size * layout_.num_groups() + position % cache_.block_size / kLanes;
  }

  int64_t first_group(const Item& item) const {
    return group_of(first_seen(item.position)) / kTileGroups * kTileGroups;
  }

  void locate(Tile& tile, int64_t unit, int64_t first) const {
    const Item& item = step_.items[unit % step_.num_items];
    const int64_t head = unit / step_.num_items, last = group_of(item.position + item.num_tokens - 1);
    const int32_t* blocks = step_.block_table + item.row * step_.block_table_stride;
    tile.first_group = first;
    tile.num_groups = std::min(kTileGroups, last + 1 - first);
    for (int64_t i = 0; i < tile.num_groups; i++) {
      const int64_t block = (first + i) / layout_.num_groups(), group = (first + i) % layout_.num_groups();
      tile.positions[i] = block * cache_.block_size + group * kLanes;
      tile.sizes[i] = std::min(kLanes, cache_.block_size - group * kLanes);
      tile.keys[i] = layout_.keys(blocks[block], layer_, head) + group * layout_.key_group();
      tile.values[i] = layout_.values(blocks[block], layer_, head) + group * layout_.value_group();
    }
  }

  void add_tile(const Item& item, const Tile& tile, const Tile& following, const AttentionScratch& scratch) const {
    const int64_t last = tile.num_groups - 1, last_key = tile.positions[last] + tile.sizes[last] - 1;
    const int64_t first_token = std::max<int64_t>(tile.positions[0] - item.position, 0);
    const int64_t last_token = std::min(item.num_tokens - 1, last_key + window_ - 1 - item.position);
    const int64_t begin = first_token * group_, end = (last_token + 1) * group_;
    TileWeights weights;
    for_rows(begin, end, [&](auto rows, int64_t row) {
      constexpr int R = decltype(rows)::value;
      // The following tile is fetched line by line, as blocks are scattered and the hardware does not foresee them.
      if (row == begin)
        add_rows<R, true>(item, tile, following, scratch, row, weights);
      else
        add_rows<R, false>(item, tile, following, scratch, row, weights);
    });
  }

  template <int R, bool kFetches>
  void add_rows(const Item& item, const Tile& tile, const Tile& following, const AttentionScratch& scratch, int64_t row,
                TileWeights& weights) const {
    score<R, kFetches>(tile, following, scratch, row, weights);
    weigh<R>(tile, item.position, row, scratch, weights);
    add_values<R, kFetches>(tile, following, scratch, row, weights);
  }

  template <class F>
  static void for_rows(int64_t begin, int64_t end, const F& f) {
    int64_t num_blocks = (end - begin + kRows - 1) / kRows;
    for (int64_t row = begin, size; row < end; row += size, num_blocks--) {
      size = (end - row + num_blocks - 1) / num_blocks;
      with_constant<kRows>(size, [&](auto rows) { f(rows, row); });
    }
  }

  template <int R, bool kFetches>
  void score(const Tile& tile, const Tile& following, const AttentionScratch& scratch, int64_t row,
             TileWeights& weights) const {
    constexpr int kVectorsOfGroup = kLanes / W;
    const int64_t words = layout_.head_words(), num_vectors = tile.num_groups * kVectorsOfGroup;
    const auto* inputs = reinterpret_cast<const Word*>(scratch.queries) + row * words;
    for (int64_t first = 0; first < num_vectors; first += kVectors)
      with_constant<kVectors>(std::min<int64_t>(kVectors, num_vectors - first), [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        const Element *columns[V], *ahead[V];
        for (int v = 0; v < V; v++) {
          const int64_t group = (first + v) / kVectorsOfGroup, lane = (first + v) % kVectorsOfGroup * W;
          columns[v] = tile.keys[group] + lane * P::kElements;
          ahead[v] = following.keys[std::min(group, following.num_groups - 1)] + lane * P::kElements;
        }
        const Operands<P> operands{columns, ahead, 1, kLanes * P::kElements, inputs, words, words};
        multiply<P, R, V, kFetches>(operands, nullptr, weights.scores[0] + first * W, kTile);
      });
  }

  // Turns scores into weights, relative to each row's largest score so far.
  template <int R>
  void weigh(const Tile& tile, int64_t first_position, int64_t row, const AttentionScratch& scratch,
             TileWeights& weights) const {
    static_assert(R <= W);
    const int64_t size = tile.num_groups * kLanes;
    alignas(64) float maxima[W] = {}, before[W] = {};
    for (int r = 0; r < R; r++) {
      hide(tile, first_position + (row + r) / group_, weights.scores[r]);
      Floats<W> most = broadcast<W>(kLowest);
      for (int64_t i = 0; i < size; i += W) most = larger<W>(load<Floats<W>>(weights.scores[r] + i), most);
      before[r] = scratch.maxima[row + r];
      maxima[r] = std::max(before[r], largest<W>(most) * scale_);
    }
    Floats<W> totals[R] = {};
    for (int64_t i = 0; i < size; i += W)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Floats<W> weight = exp2<W>(load<Floats<W>>(weights.scores[r] + i) * scale_ - maxima[r]);
        // What is added up to the total is what will be multiplied.
        totals[r] += narrow_vector(weight, reinterpret_cast<Input*>(weights.weights[r]) + i);
      }
    store(weights.decays, exp2<W>(load<Floats<W>>(before) - load<Floats<W>>(maxima)));
    for (int r = 0; r < R; r++) {
      scratch.maxima[row + r] = maxima[r];
      scratch.totals[row + r] = scratch.totals[row + r] * weights.decays[r] + sum<W>(totals[r]);
    }
  }

  // Makes a row's scores of keys that it does not see minus infinity.
  void hide(const Tile& tile, int64_t position, float* scores) const {
    if (tile.sees_all(first_seen(position), position)) return;
    for (int64_t group = 0; group < tile.num_groups; group++) {
      const int64_t from = first_seen(position) - tile.positions[group], to = position + 1 - tile.positions[group];
      const int32_t begin = int32_t(std::clamp<int64_t>(from, 0, kLanes));
      const int32_t end = int32_t(std::clamp<int64_t>(to, 0, tile.sizes[group]));
      for (int i = 0; i < kLanes; i += W) {
        float* at = scores + group * kLanes + i;
        const Ints<W> key = iota<W>() + i;
        store(at, (key >= begin) & (key < end) ? load<Floats<W>>(at) : broadcast<W>(-INFINITY));
      }
    }
  }

  template <int R, bool kFetches>
  void add_values(const Tile& tile, const Tile& following, const AttentionScratch& scratch, int64_t row,
                  TileWeights& weights) const {
    const int64_t padded = layout_.padded_head(), num_vectors = padded / W;
    const auto* inputs = reinterpret_cast<const Word*>(weights.weights[0]);
    for (int64_t first = 0; first < num_vectors; first += kVectors)
      with_constant<kVectors>(std::min<int64_t>(kVectors, num_vectors - first), [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        const Element *columns[kTileGroups * V], *ahead[kTileGroups * V];
        for (int64_t group = 0; group < tile.num_groups; group++)
          for (int v = 0; v < V; v++) {
            const int64_t at = (first + v) * W * P::kElements;
            columns[group * V + v] = tile.values[group] + at;
            ahead[group * V + v] = following.values[std::min(group, following.num_groups - 1)] + at;
          }
        const Operands<P> operands{columns, ahead,  tile.num_groups,        padded * P::kElements,
                                   inputs,  kTile, kLanes / P::kElements};
        multiply<P, R, V, kFetches>(operands, weights.decays, scratch.sums + row * padded + first * W, padded);
      });
  }

  void write(const AttentionScratch& scratch, int64_t row, float* output) const {
    const float* sums = scratch.sums + row * layout_.padded_head();
    const float factor = 1.0f / scratch.totals[row];
    for (int64_t i = 0; i < head_dim_; i++) output[i] = sums[i] * factor;
  }

  const Step& step_;
  const Cache& cache_;
  const KVCache<P> layout_;
  const int64_t layer_, window_, num_kv_heads_;
  const int64_t group_;  // query heads that share a key head
  const int64_t head_dim_;
  const float scale_;  // of scores, so that weights are powers of two
  const float* const queries_;
  const int64_t query_stride_;
  float* const output_;
  const int64_t output_stride_;
};

}  // namespace kernels
