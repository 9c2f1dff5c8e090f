// What a step computes, laid out as kernels/library.py fills it in. Sizes and strides count elements unless they say
// otherwise. Rows of float32 are padded to multiples of 16, with zeros, as the layers' outputs are.
#pragma once

#include <cstdint>

namespace kernels {

constexpr int64_t kLanes = 16;  // every width and group is a multiple of it, whatever the CPU's vectors are
constexpr int64_t kPanel = 64;  // outputs that are packed together; see packing.py

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

enum Format : int64_t { kFloat32, kBFloat16, kFloat16, kInt8 };

struct Linear {
  const void* weights;
  const float* scales;  // of each output, for int8
  const float* bias;    // of each output, or null
  int64_t num_outputs;  // padded
  int64_t num_inputs;
  int64_t format;
};

// How a layer's tokens are given to its experts.
struct Experts {
  Linear router;        // in float32
  int64_t num_experts;  // 0: the layer has a plain MLP
  int64_t num_held;     // of them here; all, unless steps have an Exchange
  int64_t num_experts_per_token;
  int64_t normalizes;  // whether the weights of a token's experts are divided by their sum
};

struct Layer {
  Linear qkv, output;
  Linear gate_up, down;  // of the MLP; or of the first expert held, whose weights those of the others follow
  Experts experts;
  const float* input_norm;
  const float* post_attention_norm;
  const float* qk_norm;  // [num_heads + num_kv_heads, head_dim], or null
  int64_t window;        // how many positions a token sees, its own included
};

struct Model {
  const Layer* layers;
  int64_t num_layers;
  int64_t hidden_size;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  const void* embedding;
  int64_t embedding_format;
  const float* norm;
  Linear head;
  double eps;
  double qkv_limit;             // magnitude beyond which queries, keys and values are cut off; may be infinite
  int64_t qk_norm_spans_heads;  // whether all query heads are normalized together, and all key heads; else each
};

// Keys and values: see kv_cache.h.
struct Cache {
  void* data;
  int64_t format;
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
};

// Consecutive new tokens of one sequence that are attended to together.
struct Item {
  int64_t first_token;  // index among the step's tokens
  int64_t num_tokens;
  int64_t position;  // of the first of them in the sequence
  int64_t row;       // of the block table
};

// How tokens' inputs get to experts that other engines hold, and results back. Rows are in the order of experts; what
// dispatch leaves is good until the next dispatch, what combine leaves until the next combine. Both are called by thread
// 0 and return 0 where the exchange failed: the step is then given up.
struct Exchange {
  // rows: [first_rows[num_experts], num_words], for all experts. Leaves those of all engines for the experts held here,
  // and room for room_words of each.
  int64_t (*dispatch)(const float* rows, int64_t num_words, const int64_t* first_rows, int64_t num_experts,
                      int64_t room_words);
  // results: [received rows, num_words]. Leaves those of the rows that were given to dispatch.
  int64_t (*combine)(const float* results, int64_t num_words);
  const float* received;          // by dispatch: rows
  const int64_t* received_first;  // by dispatch: [num_held + 1], where each expert's begin
  float* room;                    // by dispatch
  const float* results;           // by combine
  int64_t succeeded;              // what the last of both returned, for the other threads
};

struct Step {
  int64_t num_tokens;
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* rows;  // of the block table, of each token
  const float* cos;     // [num_tokens, head_dim / 2]
  const float* sin;
  const int32_t* block_table;
  int64_t block_table_stride;
  const Item* items;
  int64_t num_items;
  int64_t most_tokens;   // of an item
  float* hidden;         // [num_tokens, padded hidden_size]: the result
  char* workspace;       // of workspace_bytes
  uint64_t* ticks;       // is counted up several times in each layer, or null
  uint64_t* durations;   // nanoseconds of each Phase are added to it, or null
  Exchange* exchange;    // null: all experts are here
};

}  // namespace kernels
