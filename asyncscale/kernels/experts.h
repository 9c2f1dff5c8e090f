// Mixture of experts: which experts compute a token, and their results' sum. Between the two, the rows of all tokens are
// in the order of experts, so that each expert's product is one of many rows.
//
// What a token is given does not depend on what is beside it: each of its rows is computed by itself, and the results are
// added up in the order of their weights, not in that of experts or rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "model.h"
#include "products.h"

namespace kernels {

// A step's tokens and their experts. A pair is a token and one of its experts: the token's index times
// num_experts_per_token, plus the expert's rank.
struct Routing {
  int32_t* experts;     // of each pair
  float* weights;       // of each pair
  int32_t* rows;        // of each pair: its place in the order of experts
  int64_t* first_rows;  // [num_experts + 1]: where each expert's rows begin
};

// What experts compute, in their order: of each, the rows first[i] to first[i + 1].
struct ExpertRows {
  const int64_t* first;
  const float* inputs;
  float* inner;
  float* inner_inputs;  // may be where inputs are, which are done with when these are written
  float* results;
};

// The experts with the highest of `logits`, and their probabilities, highest first; of equal ones the first expert.
inline void choose_experts(const float* logits, const Experts& experts, int32_t* chosen, float* weights) {
  const int64_t most = experts.num_experts_per_token;
  int64_t count = 0;
  for (int64_t expert = 0; expert < experts.num_experts; expert++) {
    int64_t rank = count;
    while (rank > 0 && logits[expert] > weights[rank - 1]) rank--;
    if (rank == most) continue;
    count = std::min(count + 1, most);
    std::copy_backward(chosen + rank, chosen + count - 1, chosen + count);
    std::copy_backward(weights + rank, weights + count - 1, weights + count);
    chosen[rank] = int32_t(expert);
    weights[rank] = logits[expert];
  }
  const float highest = weights[0];
  float total = 0, chosen_total = 0;
  for (int64_t expert = 0; expert < experts.num_experts; expert++) total += std::exp(logits[expert] - highest);
  for (int64_t rank = 0; rank < most; rank++) chosen_total += weights[rank] = std::exp(weights[rank] - highest) / total;
  if (!experts.normalizes) return;
  for (int64_t rank = 0; rank < most; rank++) weights[rank] /= chosen_total;
}

// Fills in rows and first_rows.
inline void group_by_expert(const Routing& routing, int64_t num_pairs, int64_t num_experts) {
  int64_t* first_rows = routing.first_rows;
  std::fill_n(first_rows, num_experts + 1, 0);
  for (int64_t pair = 0; pair < num_pairs; pair++) first_rows[routing.experts[pair] + 1]++;
  for (int64_t expert = 0; expert < num_experts; expert++) first_rows[expert + 1] += first_rows[expert];
  for (int64_t pair = 0; pair < num_pairs; pair++) routing.rows[pair] = int32_t(first_rows[routing.experts[pair]]++);
  // Each is now where the next one began.
  std::copy_backward(first_rows, first_rows + num_experts, first_rows + num_experts + 1);
  first_rows[0] = 0;
}

// Adds a token's experts' results, weighted, to `out`. results: [rows, size]; size: a multiple of 16.
inline void add_experts(const float* results, int64_t size, const int32_t* rows, const float* weights, int64_t num_experts,
                        float* out) {
  for (int64_t i = 0; i < size; i += W) {
    Floats<W> sum{};
    for (int64_t rank = 0; rank < num_experts; rank++)
      sum = fused<W>(load<Floats<W>>(results + rows[rank] * size + i), broadcast<W>(weights[rank]), sum);
    store(out + i, load<Floats<W>>(out + i) + sum);
  }
}

}  // namespace kernels
