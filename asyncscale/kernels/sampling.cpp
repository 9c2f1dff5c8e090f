// Draws tokens from logits, and reports how likely tokens are. Each row is computed alone, in an order that depends on
// nothing but its own length.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "vectors.h"

namespace {

using namespace vectors;

constexpr int W = kNativeWidth;
constexpr int64_t kBlock = 128;  // numbers that are summed, and skipped, together
constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeast = std::numeric_limits<float>::min();  // exp2 gives nothing between it and zero
constexpr int64_t kFew = 64;

// What one draw needs: DRAW of sampling.py. highest: the row's, which is a number.
struct Draw {
  int64_t index;
  double uniform, top_p;
  int64_t top_k;
  float temperature, min_p, highest;
  int32_t unused;
};

int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Calls use(block, pointer) for each block of a row; the last one is filled up with minus infinity.
template <class Use>
void for_each_block(const float* row, int64_t size, Use use) {
  const int64_t num_whole = size / kBlock;
  for (int64_t block = 0; block < num_whole; block++) use(block, row + block * kBlock);
  if (size % kBlock) {
    float last[kBlock];
    std::fill(std::copy(row + num_whole * kBlock, row + size, last), last + kBlock, -kInfinity);
    use(num_whole, static_cast<const float*>(last));
  }
}

// Sum of what a function gives for the block's vectors.
template <class Function>
float sum_block(const float* block, Function function) {
  Floats<W> total{};
  for (int64_t i = 0; i < kBlock; i += W) total += function(load<Floats<W>>(block + i), i);
  return sum<W>(total);
}

float largest_of_block(const float* block) {
  Floats<W> most = broadcast<W>(-kInfinity);
  for (int64_t i = 0; i < kBlock; i += W) most = larger<W>(load<Floats<W>>(block + i), most);  // passes over NaN
  return largest<W>(most);
}

// A row's probabilities, as multiples of that of its most likely token.
struct Weights {
  int64_t num_blocks;
  float* values;   // whole blocks
  float* sums;     // of each block
  float* largest;  // of each block

  Weights(float* scratch, int64_t size) : num_blocks(::num_blocks(size)), values(scratch) {
    sums = values + num_blocks * kBlock;
    largest = sums + num_blocks;
  }
  float* end() const { return largest + num_blocks; }

  void compute(const float* logits, int64_t size, float highest, float temperature) {
    const float scale = float(kLog2E / temperature);
    for_each_block(logits, size, [&](int64_t block, const float* from) {
      float* to = values + block * kBlock;
      sums[block] = sum_block(from, [&](Floats<W> x, int64_t i) {
        const Floats<W> weight = exp2<W>((x - highest) * scale);
        store(to + i, weight);
        return weight;
      });
      largest[block] = largest_of_block(to);
    });
  }

  double total() const {
    double total = 0;
    for (int64_t block = 0; block < num_blocks; block++) total += sums[block];
    return total;
  }

  // Copies all weights from `least` (which is positive) to below `limit`; returns how many.
  int64_t list(float least, float limit, float* to) const {
    int64_t count = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
      if (largest[block] < least) continue;
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i++) {
        to[count] = values[i];
        count += values[i] >= least && values[i] < limit;
      }
    }
    return count;
  }

  // Leaves out of the sums what is less than `least`.
  void cut(float least) {
    for (int64_t block = 0; block < num_blocks; block++)
      sums[block] = largest[block] < least ? 0.0f : sum_block(values + block * kBlock, [&](Floats<W> x, int64_t) {
        return x >= least ? x : Floats<W>{};
      });
  }

  // The token that the uniform falls on, in order of token id, among those of at least `least`.
  int64_t invert(double uniform, float least) const {
    const double all = total();
    const double target = std::min(uniform * all, std::nextafter(all, 0.0));
    double before = 0;
    int64_t found = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
      if (!(sums[block] > 0)) continue;
      found = block;
      if (before + sums[block] > target) break;
      before += sums[block];
    }
    int64_t token = found * kBlock;
    for (int64_t i = found * kBlock; i < (found + 1) * kBlock; i++) {
      if (!(values[i] > 0 && values[i] >= least)) continue;
      token = i;
      before += values[i];
      if (before > target) break;  // else, by rounding, the block's last one
    }
    return token;
  }
};

double sum_of(const float* from, const float* to) {
  double total = 0;
  for (; from < to; from++) total += *from;
  return total;
}

// How much of a row is at least as likely as each of several cutoffs: how many tokens, or their weights' sum.
constexpr int kCutoffs = 8;
struct Amounts {
  double of[kCutoffs];
};

template <bool counting>
Amounts amounts(const Weights& weights, const float* cutoffs) {
  constexpr int64_t kTogether = 16;  // blocks: more would round too much
  const float lowest = *std::min_element(cutoffs, cutoffs + kCutoffs);
  Amounts amounts{};
  for (int64_t first = 0; first < weights.num_blocks; first += kTogether) {
    Floats<W> totals[kCutoffs] = {};
    for (int64_t block = first; block < std::min(first + kTogether, weights.num_blocks); block++) {
      if (weights.largest[block] < lowest) continue;
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += W) {
        const auto x = load<Floats<W>>(weights.values + i);
        for (int j = 0; j < kCutoffs; j++)
          totals[j] += x >= cutoffs[j] ? (counting ? broadcast<W>(1.0f) : x) : Floats<W>{};
      }
    }
    for (int j = 0; j < kCutoffs; j++) amounts.of[j] += sum<W>(totals[j]);
  }
  return amounts;
}

// The weight at which the largest ones, added up in descending order, reach the target. Reorders the weights.
template <bool counting>
float weight_that_reaches(double target, float* begin, float* end) {
  const auto amount = [](const float* from, const float* to) { return counting ? to - from : sum_of(from, to); };
  double before = 0;
  while (end - begin > kFew) {
    float* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, std::greater<float>());
    const double upper = amount(begin, middle);
    if (before + upper >= target) {
      end = middle;
    } else {
      before += upper;
      begin = middle;
    }
  }
  std::sort(begin, end, std::greater<float>());
  for (; begin + 1 < end && before + amount(begin, begin + 1) < target; begin++) before += amount(begin, begin + 1);
  return *begin;
}

// The same of a whole row, but never less than `least`: looks twice where, between cutoffs, it is, then at each weight
// between the nearest two of these.
template <bool counting>
float find_weight(const Weights& weights, double target, float least, float* listed) {
  float cutoffs[kCutoffs] = {0x1p-2f, 0x1p-4f, 0x1p-6f, 0x1p-8f, 0x1p-10f, 0x1p-13f, 0x1p-17f, 0x1p-22f};
  float low = std::max(least, kLeast), high = std::nextafter(1.0f, 2.0f);
  double before = 0;  // of what is at least high
  for (const bool again : {true, false}) {
    const Amounts found = amounts<counting>(weights, cutoffs);
    for (int j = 0; j < kCutoffs; j++) {
      if (found.of[j] >= target) {
        low = std::max(low, cutoffs[j]);
        break;
      }
      high = cutoffs[j];
      before = found.of[j];
    }
    if (high <= low) return low;
    if (again) {
      const auto bits = bit_cast<uint32_t>(low), step = (bit_cast<uint32_t>(high) - bits) / (kCutoffs + 1);
      for (int j = 0; j < kCutoffs; j++) cutoffs[j] = bit_cast<float>(bits + step * uint32_t(kCutoffs - j));
    }
  }
  const int64_t count = weights.list(low, high, listed);
  return count ? weight_that_reaches<counting>(target - before, listed, listed + count) : low;
}

// The least weight that a token needs to stay: min_p first, of those top_k (0: off), of those top_p. Equals of the last
// one that stays do, too.
float least_weight(const Weights& weights, const Draw& draw, float* listed) {
  float least = draw.min_p;
  if (draw.top_k) least = find_weight<true>(weights, double(draw.top_k), least, listed);
  if (draw.top_p >= 1) return least;
  double total = weights.total();
  if (least > 0) {
    float cutoffs[kCutoffs];
    std::fill(cutoffs, cutoffs + kCutoffs, least);
    total = amounts<false>(weights, cutoffs).of[0];
  }
  return find_weight<false>(weights, draw.top_p * total, least, listed);
}

// How many of a row are greater.
int64_t count_greater(const float* row, int64_t size, float than) {
  Ints<W> counts{};
  for_each_block(row, size, [&](int64_t, const float* block) {
    for (int64_t i = 0; i < kBlock; i += W) counts -= Ints<W>(load<Floats<W>>(block + i) > than);
  });
  int64_t count = 0;
  for (int i = 0; i < W; i++) count += counts[i];
  return count;
}

float no_nan(float x) { return x == x ? x : -kInfinity; }

// The ids of the `count` highest, in order, the lower id first among equals. largest: of the row's blocks.
void list_few(const float* row, int64_t size, const float* largest, int64_t count, int64_t* ids) {
  float values[kFew];
  int64_t found = 0;
  for (int64_t i = 0; i < size; i++) {
    if (found == count && i % kBlock == 0 && !(largest[i / kBlock] > values[count - 1])) {
      i += kBlock - 1;
      continue;
    }
    const float x = no_nan(row[i]);
    if (found == count && !(x > values[count - 1])) continue;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && x > values[at - 1]; at--) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x;
    ids[at] = i;
  }
}

void list_many(const float* row, int64_t size, int64_t count, int64_t* order, int64_t* ids) {
  for (int64_t i = 0; i < size; i++) order[i] = i;
  std::partial_sort(order, order + count, order + size, [&](int64_t a, int64_t b) {
    const float x = no_nan(row[a]), y = no_nan(row[b]);
    return x > y || (x == y && a < b);
  });
  std::copy(order, order + count, ids);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Bytes that the functions below need at `scratch`.
EXPORT int64_t asyncscale_sampling_scratch_bytes(int64_t vocab_size) {
  const int64_t floats = num_blocks(vocab_size) * (2 * kBlock + 2);
  return std::max(floats * int64_t(sizeof(float)), vocab_size * int64_t(sizeof(int64_t)) + num_blocks(vocab_size) * 4);
}

// One token for each draw. logits: [rows, vocab_size], which are left as they are.
EXPORT void asyncscale_draw(const float* logits, int64_t vocab_size, const void* draws, int64_t num_draws, void* scratch,
                            int64_t* token_ids) {
  Weights weights(static_cast<float*>(scratch), vocab_size);
  for (int64_t i = 0; i < num_draws; i++) {
    const Draw& draw = static_cast<const Draw*>(draws)[i];
    weights.compute(logits + draw.index * vocab_size, vocab_size, draw.highest, draw.temperature);
    const float least = least_weight(weights, draw, weights.end());
    if (least > 0) weights.cut(least);
    token_ids[i] = weights.invert(draw.uniform, least);
  }
}

// Of each of the rows `indices`: its token's log-probability and rank (1 + how many have a higher logit), and the ids
// and log-probabilities of the num_top most likely tokens, the lower id first among equals.
EXPORT void asyncscale_log_probabilities(const float* logits, int64_t vocab_size, const int64_t* indices,
                                         const int64_t* token_ids, int64_t num_rows, int64_t num_top, void* scratch,
                                         float* chosen, int64_t* ranks, int64_t* top_ids, float* top) {
  int64_t* order = static_cast<int64_t*>(scratch);
  float* largest = reinterpret_cast<float*>(order + vocab_size);
  for (int64_t i = 0; i < num_rows; i++) {
    const float* row = logits + indices[i] * vocab_size;
    float highest = -kInfinity;
    for_each_block(row, vocab_size, [&](int64_t block, const float* from) {
      largest[block] = largest_of_block(from);
      highest = std::max(highest, largest[block]);
    });
    double sum = 0;
    for_each_block(row, vocab_size, [&](int64_t, const float* from) {
      sum += sum_block(from, [&](Floats<W> x, int64_t) { return exp2<W>((x - highest) * float(kLog2E)); });
    });
    const double log_sum = std::log(sum);
    const auto log_probability = [&](int64_t token_id) { return float(double(row[token_id]) - highest - log_sum); };
    chosen[i] = log_probability(token_ids[i]);
    ranks[i] = 1 + count_greater(row, vocab_size, row[token_ids[i]]);
    int64_t* ids = top_ids + i * num_top;
    if (num_top > kFew)
      list_many(row, vocab_size, num_top, order, ids);
    else if (num_top > 0)
      list_few(row, vocab_size, largest, num_top, ids);
    for (int64_t j = 0; j < num_top; j++) top[i * num_top + j] = log_probability(ids[j]);
  }
}
