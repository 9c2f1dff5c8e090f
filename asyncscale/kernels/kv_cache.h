// The paged cache of keys and values, laid out so that lanes are keys in scores and elements of a head in sums of values:
// a block's keys are weights of a product with queries, its values weights of a product with probabilities.
//
//   [blocks][layers][key heads] of
//     keys:   [groups][words of a head][16 positions][elements of a word]
//     values: [groups][16 positions / elements of a word][padded head_dim][elements of a word]
//
// A group is 16 positions; the last one of a block may be used in part. Its unwritten values are multiplied by zero, and so
// must be numbers: a block's values are set to zero before its first position is written.
#pragma once

#include <cstring>

#include "model.h"
#include "products.h"

namespace kernels {

template <class P>
class KVCache {
 public:
  using Element = typename P::Weight;
  static constexpr int kElements = P::kElements;

  explicit KVCache(const Cache& cache)
      : cache_(cache), num_groups_(round_up(cache.block_size, kLanes) / kLanes) {}

  const Cache& shape() const { return cache_; }
  int64_t num_groups() const { return num_groups_; }
  int64_t head_words() const { return (cache_.head_dim + kElements - 1) / kElements; }
  int64_t padded_head() const { return round_up(cache_.head_dim, kLanes); }
  int64_t key_group() const { return head_words() * kElements * kLanes; }
  int64_t value_group() const { return kLanes * padded_head(); }
  int64_t head_size() const { return num_groups_ * (key_group() + value_group()); }
  int64_t block_elements() const { return cache_.num_layers * cache_.num_kv_heads * head_size(); }

  Element* keys(int64_t block, int64_t layer, int64_t head) const {
    return static_cast<Element*>(cache_.data) + ((block * cache_.num_layers + layer) * cache_.num_kv_heads + head) * head_size();
  }
  Element* values(int64_t block, int64_t layer, int64_t head) const {
    return keys(block, layer, head) + num_groups_ * key_group();
  }

  // To be done before any position of a block is written, in its whole life.
  void clear_values(int64_t block) const {
    for (int64_t layer = 0; layer < cache_.num_layers; layer++)
      for (int64_t head = 0; head < cache_.num_kv_heads; head++)
        std::memset(values(block, layer, head), 0, num_groups_ * value_group() * sizeof(Element));
  }

  // key, value: [head_dim]; temporary: of head_words() words.
  void write(int64_t block, int64_t slot, int64_t layer, int64_t head, const float* key, const float* value,
             void* temporary) const {
    const int64_t group = slot / kLanes, lane = slot % kLanes;
    auto* narrowed = static_cast<Element*>(temporary);
    Element* k = keys(block, layer, head) + group * key_group() + lane * kElements;
    narrowed[head_words() * kElements - 1] = Element{};
    narrow_any(key, narrowed, cache_.head_dim);
    for (int64_t i = 0; i < head_words(); i++)
      std::memcpy(k + i * kLanes * kElements, narrowed + i * kElements, kElements * sizeof(Element));

    Element* v = values(block, layer, head) + group * value_group() + lane / kElements * padded_head() * kElements + lane % kElements;
    narrow_any(value, narrowed, cache_.head_dim);
    for (int64_t i = 0; i < cache_.head_dim; i++) v[i * kElements] = narrowed[i];
  }

 private:
  const Cache& cache_;
  const int64_t num_groups_;
};

}  // namespace kernels
