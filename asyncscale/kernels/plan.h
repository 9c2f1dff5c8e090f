// What a step's attention computes, laid out as kernels/attention.py fills it in. Sizes and strides count elements.
#pragma once

#include <cstdint>

namespace attention {

enum DType : int64_t { kFloat32, kBFloat16, kFloat16 };

// Consecutive new tokens of one sequence.
struct Item {
  int64_t first_token;  // index among the step's tokens
  int64_t num_tokens;
  int64_t position;  // of the first of them in the sequence
  int64_t row;       // of the block table
};

struct Plan {
  const Item* items;
  int64_t num_items;
  const int32_t* block_table;
  int64_t block_table_stride;
  int64_t dtype;  // of queries, cache and output
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t query_stride;  // from one token's heads to the next one's
  int64_t output_stride;
  int64_t block_size;
  int64_t block_stride;
  int64_t head_stride;   // within a block; a token's keys follow those of the token before
  int64_t value_offset;  // from a key to its value
  int64_t window;        // how many positions a token sees, its own included
  int64_t num_threads;
  void* scratch;  // of num_threads times scratch_bytes, aligned to 64 bytes
  int64_t scratch_bytes;
  double scale;  // of the scores
};

}  // namespace attention
