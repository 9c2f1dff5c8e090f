// The memory that a step computes in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "experts.h"
#include "model.h"

namespace kernels {

// The step's buffers. Rows of inputs have room for any format.
struct Workspace {
  char* end;
  float* inputs;
  float* qkv;
  float* attended;
  float* inner;  // of an MLP, or of experts
  float* rows;   // one for each thread
  char* scratch;
  // Of layers with experts:
  float* normed;
  float* router_logits;
  float* dispatched;  // rows of inputs in the order of experts
  float* results;     // of them
  Routing routing;
  int64_t row_size, attended_size, scratch_bytes;

  Workspace(const Model& model, char* memory, int64_t num_tokens, int64_t most_tokens, int64_t num_threads) : end(memory) {
    const Sizes sizes(model);
    const int64_t hidden = round_up(model.hidden_size, kLanes), num_pairs = num_tokens * sizes.experts_per_token;
    attended_size = round_up(model.num_heads * model.head_dim, kLanes);
    const int64_t qkv_size = model.num_layers > 0 ? model.layers[0].qkv.num_outputs : 0;
    const int64_t input_words = std::max({hidden, attended_size, sizes.mlp});  // in any format
    row_size = std::max({input_words, sizes.expert, qkv_size});
    scratch_bytes = AttentionScratch::bytes(most_tokens * (model.num_heads / model.num_kv_heads), model.head_dim);
    inputs = take(num_tokens * input_words);
    qkv = take(num_tokens * qkv_size);
    attended = take(num_tokens * attended_size);
    inner = take(std::max(num_tokens * sizes.mlp, num_pairs * sizes.expert));
    rows = take(num_threads * row_size);
    scratch = reinterpret_cast<char*>(take(num_threads * scratch_bytes / 4));
    normed = take(sizes.experts > 0 ? num_tokens * hidden : 0);
    router_logits = take(num_tokens * round_up(sizes.experts, kLanes));
    dispatched = take(num_pairs * std::max(hidden, sizes.expert));
    results = take(num_pairs * hidden);
    routing.experts = reinterpret_cast<int32_t*>(take(num_pairs));
    routing.weights = take(num_pairs);
    routing.rows = reinterpret_cast<int32_t*>(take(num_pairs));
    routing.first_rows = reinterpret_cast<int64_t*>(take(2 * (sizes.experts + 1)));
  }

 private:
  // The largest of all layers; mlp and expert: inner sizes.
  struct Sizes {
    int64_t mlp = 0, expert = 0, experts = 0, experts_per_token = 0;

    explicit Sizes(const Model& model) {
      for (int64_t i = 0; i < model.num_layers; i++) {
        const Layer& layer = model.layers[i];
        int64_t& inner = layer.experts.num_experts > 0 ? expert : mlp;
        inner = std::max(inner, round_up(layer.down.num_inputs, kLanes));
        experts = std::max(experts, layer.experts.num_experts);
        experts_per_token = std::max(experts_per_token, layer.experts.num_experts_per_token);
      }
    }
  };

  float* take(int64_t size) {
    char* begin = end;
    end += round_up(size * 4, 64);
    return reinterpret_cast<float*>(begin);
  }
};

}  // namespace kernels
