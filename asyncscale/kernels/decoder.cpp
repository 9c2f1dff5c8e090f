// A step of the decoder: all layers in one call, by a team of threads.

#include <chrono>
#include <cstdint>

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "rows.h"
#include "team.h"
#include "workspace.h"

namespace kernels {
namespace {

// As library.py names them.
enum Phase {
  kNorms,
  kQkv,
  kRotary,
  kAttention,
  kOutput,
  kGateUp,
  kActivation,
  kDown,
  kRouter,
  kDispatch,
  kExchangeOut,
  kExpertsGateUp,
  kExpertsDown,
  kExchangeBack,
  kCombine,
  kHead
};

// Rows whose inputs stay in the second-level cache while panels of weights pass by.
constexpr int64_t kInputBytes = 384 << 10;
constexpr int64_t kMostRows = 21 * kRows;

uint64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

struct Store {
  float* to;
  int64_t stride;

  void put(int64_t row, int64_t column, Floats<W> outputs) const { store(to + row * stride + column, outputs); }
};

struct Add {
  float* to;
  int64_t stride;

  void put(int64_t row, int64_t column, Floats<W> outputs) const {
    float* at = to + row * stride + column;
    store(at, load<Floats<W>>(at) + outputs);
  }
};

struct Gate {
  float* to;
  int64_t stride;

  void put(int64_t row, int64_t column, Floats<W> gate, Floats<W> up) const {
    store(to + row * stride + column, swiglu(gate, up));
  }
};

// The highest output of each lane so far, the first of several, and where it is. What is not a number stays the highest.
struct Highest {
  float* values;     // [rows, kLanes], minus infinity at first
  int32_t* columns;  // [rows, kLanes]
  int64_t size;      // beyond it, outputs are padding

  void put(int64_t row, int64_t column, Floats<W> outputs) const {
    const int64_t at = row * kLanes + column % kLanes;
    const Ints<W> here = iota<W>() + int32_t(column);
    if (column + W > size) outputs = here < int32_t(size) ? outputs : broadcast<W>(-INFINITY);
    const Floats<W> highest = load<Floats<W>>(values + at);
    const auto is_higher = (outputs > highest) | (outputs != outputs);
    store(values + at, is_higher ? outputs : highest);
    store(columns + at, is_higher ? here : load<Ints<W>>(columns + at));
  }
};

// Calls f with the Products of `format`, which is not int8.
template <class F>
void with_products(int64_t format, const F& f) {
  if (format == kFloat32)
    f(Float32Products{});
  else if (format == kFloat16)
    f(Float16Products{});
  else
    f(BFloat16Products{});
}

// The cache's block that a token is written to.
int64_t block_of(const Step& step, const Cache& cache, int64_t token) {
  return step.block_table[step.rows[token] * step.block_table_stride + step.positions[token] / cache.block_size];
}

// What one thread computes of a step.
class Pass {
 public:
  Pass(const Model& model, Team& team, int64_t thread, int64_t num_rows, const Workspace& workspace, uint64_t* ticks,
       uint64_t* durations)
      : model_(model),
        team_(team),
        thread_(thread),
        num_rows_(num_rows),
        workspace_(workspace),
        row_(workspace.rows + thread * workspace.row_size),
        scratch_(workspace.scratch + thread * workspace.scratch_bytes),
        hidden_stride_(round_up(model.hidden_size, kLanes)),
        ticks_(thread == 0 ? ticks : nullptr),
        durations_(thread == 0 ? durations : nullptr),
        began_(durations_ ? now() : 0) {}

  // Returns whether it was done: the exchange with other engines may fail, for all threads alike.
  bool forward(const Step& step, const Cache& cache) {
    for_rows([&](int64_t row) {
      embed(model_, step.token_ids[row], step.hidden + row * hidden_stride_);
      if (step.positions[row] % cache.block_size == 0)
        with_products(cache.format, [&](auto products) {
          KVCache<decltype(products)>(cache).clear_values(block_of(step, cache, row));
        });
    });
    end(kNorms);
    for (int64_t index = 0; index < model_.num_layers; index++) {
      const Layer& layer = model_.layers[index];
      norm(step.hidden, layer.input_norm, layer.qkv.format);
      linear<false>(layer.qkv, Store{workspace_.qkv, layer.qkv.num_outputs});
      end(kQkv);
      with_products(cache.format, [&](auto products) { attend<decltype(products)>(step, cache, index); });
      linear<false>(layer.output, Add{step.hidden, hidden_stride_});
      end(kOutput);
      if (layer.experts.num_experts == 0)
        compute_mlp(step, layer);
      else if (!compute_experts(step, layer))
        return false;
    }
    return true;
  }

  void logits(const float* hidden, const int64_t* indices, float* out) {
    prepare_head(hidden, indices);
    linear<false>(model_.head, Store{out, model_.head.num_outputs});
    end(kHead);
  }

  // partial: of all threads, as Highest has them.
  void best(const float* hidden, const int64_t* indices, int64_t vocab_size, float* partial_values,
            int32_t* partial_columns, float* values, int64_t* columns) {
    const int64_t size = num_rows_ * kLanes;
    float* own_values = partial_values + thread_ * size;
    int32_t* own_columns = partial_columns + thread_ * size;
    std::fill_n(own_values, size, -INFINITY);
    std::fill_n(own_columns, size, 0);
    prepare_head(hidden, indices);
    linear<false>(model_.head, Highest{own_values, own_columns, vocab_size});
    end(kHead);
    for_rows([&](int64_t row) {
      values[row] = -INFINITY;
      columns[row] = 0;
      for (int64_t thread = 0; thread < team_.size(); thread++)
        for (int64_t lane = 0; lane < kLanes; lane++) {
          const int64_t at = thread * size + row * kLanes + lane;
          const float value = partial_values[at];
          const bool is_first = value == values[row] && partial_columns[at] < columns[row];
          if (value > values[row] || is_first || value != value) {
            values[row] = value;
            columns[row] = partial_columns[at];
          }
        }
    });
  }

 private:
  void prepare_head(const float* hidden, const int64_t* indices) {
    for_rows([&](int64_t row) {
      norm_row(hidden, model_.norm, indices[row], row_);
      inputs_from(row_, row, model_.head);
    });
    end(kNorms);
  }

  void compute_mlp(const Step& step, const Layer& layer) {
    const int64_t inner_size = layer.down.num_inputs;
    norm(step.hidden, layer.post_attention_norm, layer.gate_up.format);
    linear<true>(layer.gate_up, Gate{workspace_.inner, inner_size});
    end(kGateUp);
    for_rows([&](int64_t row) { inputs_from(workspace_.inner + row * inner_size, row, layer.down); });
    end(kActivation);
    linear<false>(layer.down, Add{step.hidden, hidden_stride_});
    end(kDown);
  }

  bool compute_experts(const Step& step, const Layer& layer) {
    route(step.hidden, layer);
    dispatch(layer);
    const float* results = workspace_.results;
    if (step.exchange == nullptr)
      multiply_by_experts(layer, {workspace_.routing.first_rows, workspace_.dispatched, workspace_.inner,
                                  workspace_.dispatched, workspace_.results});
    else if (multiply_elsewhere(layer, *step.exchange))
      results = step.exchange->results;
    else
      return false;
    const Routing& routing = workspace_.routing;
    const int64_t num_chosen = layer.experts.num_experts_per_token;
    for_rows([&](int64_t row) {
      add_experts(results, hidden_stride_, routing.rows + row * num_chosen, routing.weights + row * num_chosen, num_chosen,
                  step.hidden + row * hidden_stride_);
    });
    end(kCombine);
    return true;
  }

  // By the engines that hold the experts, while this one computes for them what is its part. Returns whether it was done.
  bool multiply_elsewhere(const Layer& layer, Exchange& exchange) {
    const int64_t inner_size = layer.down.num_inputs, inner_words = words_of(inner_size, layer.down.format);
    if (thread_ == 0)
      exchange.succeeded = exchange.dispatch(workspace_.dispatched, words_of(layer.gate_up.num_inputs, layer.gate_up.format),
                                             workspace_.routing.first_rows, layer.experts.num_experts,
                                             inner_size + inner_words + hidden_stride_);
    end(kExchangeOut);
    if (!exchange.succeeded) return false;
    const int64_t num_rows = exchange.received_first[layer.experts.num_held];
    float* inner_inputs = exchange.room + num_rows * inner_size;
    float* results = inner_inputs + num_rows * inner_words;
    multiply_by_experts(layer, {exchange.received_first, exchange.received, exchange.room, inner_inputs, results});
    if (thread_ == 0) exchange.succeeded = exchange.combine(results, hidden_stride_);
    end(kExchangeBack);
    return exchange.succeeded;
  }

  // Each token's experts and their weights; its inputs for them are then at workspace_.inputs.
  void route(const float* hidden, const Layer& layer) {
    const Experts& experts = layer.experts;
    const Routing& routing = workspace_.routing;
    for_rows([&](int64_t row) { norm_row(hidden, layer.post_attention_norm, row, workspace_.normed + row * hidden_stride_); });
    end(kNorms);
    const int64_t all_rows[] = {0, num_rows_}, num_logits = experts.router.num_outputs;
    multiply<false>(experts.router, workspace_.normed, 1, all_rows, Store{workspace_.router_logits, num_logits});
    end(kRouter);
    for_rows([&](int64_t row) {
      const int64_t pair = row * experts.num_experts_per_token;
      choose_experts(workspace_.router_logits + row * num_logits, experts, routing.experts + pair, routing.weights + pair);
      inputs_from(workspace_.normed + row * hidden_stride_, row, layer.gate_up);
    });
    end(kRouter);
    if (team_.claim() == 0) group_by_expert(routing, num_rows_ * experts.num_experts_per_token, experts.num_experts);
    end(kRouter);
  }

  // Copies the tokens' inputs to where their experts want them.
  void dispatch(const Layer& layer) {
    const int64_t num_chosen = layer.experts.num_experts_per_token;
    const int64_t words = words_of(layer.gate_up.num_inputs, layer.gate_up.format);
    for_rows([&](int64_t row) {
      for (int64_t pair = row * num_chosen; pair < (row + 1) * num_chosen; pair++)
        std::copy_n(workspace_.inputs + row * words, words, workspace_.dispatched + workspace_.routing.rows[pair] * words);
    });
    end(kDispatch);
  }

  // Of the experts held here.
  void multiply_by_experts(const Layer& layer, const ExpertRows& rows) {
    const int64_t num_experts = layer.experts.num_held, inner_size = layer.down.num_inputs;
    multiply<true>(layer.gate_up, rows.inputs, num_experts, rows.first, Gate{rows.inner, inner_size});
    end(kExpertsGateUp);
    const int64_t num_rows = rows.first[num_experts], words = words_of(inner_size, layer.down.format);
    for (int64_t row = team_.claim(); row < num_rows; row = team_.claim())
      make_inputs(rows.inner + row * inner_size, inner_size, layer.down.format, rows.inner_inputs + row * words);
    end(kActivation);
    multiply<false>(layer.down, rows.inner_inputs, num_experts, rows.first, Store{rows.results, hidden_stride_});
    end(kExpertsDown);
  }

  template <class P>
  void attend(const Step& step, const Cache& cache, int64_t index) {
    const Layer& layer = model_.layers[index];
    const int64_t stride = layer.qkv.num_outputs;
    for_rows([&](int64_t row) { rotate_and_write(step, KVCache<P>(cache), index, row, workspace_.qkv + row * stride); });
    end(kRotary);
    const PagedAttention<P> attention(model_, step, cache, index, workspace_.qkv, stride, workspace_.attended,
                                      workspace_.attended_size);
    for (int64_t unit = team_.claim(), next; unit < attention.num_units(); unit = next) {
      next = team_.claim();
      attention.run(unit, next, scratch_);
    }
    end(kAttention);
    for_rows([&](int64_t row) {
      float* attended = workspace_.attended + row * workspace_.attended_size;
      std::fill(attended + model_.num_heads * model_.head_dim, attended + workspace_.attended_size, 0.0f);
      inputs_from(attended, row, layer.output);
    });
    end(kActivation);
  }

  template <class P>
  void rotate_and_write(const Step& step, const KVCache<P>& cache, int64_t index, int64_t row, float* heads) {
    const int64_t dim = model_.head_dim, half = dim / 2, num_rotated = model_.num_heads + model_.num_kv_heads;
    norm_heads(model_.layers[index].qk_norm, heads);
    for (int64_t head = 0; head < num_rotated; head++)
      rotate(heads + head * dim, step.cos + row * half, step.sin + row * half, dim);
    const int64_t block = block_of(step, cache.shape(), row), slot = step.positions[row] % cache.shape().block_size;
    for (int64_t head = 0; head < model_.num_kv_heads; head++) {
      const float* key = heads + (model_.num_heads + head) * dim;
      cache.write(block, slot, index, head, key, key + model_.num_kv_heads * dim, row_);
    }
  }

  // What is done to a token's queries, keys and values before they are rotated.
  void norm_heads(const float* weights, float* heads) {
    const int64_t dim = model_.head_dim, num_normed = model_.num_heads + model_.num_kv_heads;
    const float eps = float(model_.eps);
    if (weights && model_.qk_norm_spans_heads) {
      const int64_t queries = model_.num_heads * dim;
      rms_norm(heads, weights, queries, eps, heads);
      rms_norm(heads + queries, weights + queries, model_.num_kv_heads * dim, eps, heads + queries);
    } else if (weights) {
      for (int64_t i = 0; i < num_normed * dim; i += dim) rms_norm(heads + i, weights + i, dim, eps, heads + i);
    }
    const float limit = float(model_.qkv_limit);
    if (std::isfinite(limit))
      for (int64_t i = 0; i < (num_normed + model_.num_kv_heads) * dim; i++) heads[i] = std::clamp(heads[i], -limit, limit);
  }

  void norm_row(const float* hidden, const float* weight, int64_t row, float* out) {
    rms_norm(hidden + row * hidden_stride_, weight, model_.hidden_size, float(model_.eps), out);
    std::fill(out + model_.hidden_size, out + hidden_stride_, 0.0f);
  }

  void norm(const float* hidden, const float* weight, int64_t format) {
    for_rows([&](int64_t row) {
      norm_row(hidden, weight, row, row_);
      make_inputs(row_, model_.hidden_size, format, workspace_.inputs + row * words_of(model_.hidden_size, format));
    });
    end(kNorms);
  }

  void inputs_from(const float* values, int64_t row, const Linear& linear) {
    make_inputs(values, linear.num_inputs, linear.format, workspace_.inputs + row * words_of(linear.num_inputs, linear.format));
  }

  // Of all tokens' inputs.
  template <bool kGated, class Sink>
  void linear(const Linear& linear, const Sink& sink) {
    const int64_t all_rows[] = {0, num_rows_};
    multiply<kGated>(linear, workspace_.inputs, 1, all_rows, sink);
  }

  // Rows first_rows[i] to first_rows[i + 1] of `inputs` by matrix i of those that begin with `linear`.
  template <bool kGated, class Sink>
  void multiply(const Linear& linear, const float* inputs, int64_t num_matrices, const int64_t* first_rows, const Sink& sink) {
    if (linear.format == kInt8)
      multiply_in<Int8Products, kGated>(linear, inputs, num_matrices, first_rows, sink);
    else
      with_products(linear.format, [&](auto products) {
        multiply_in<decltype(products), kGated>(linear, inputs, num_matrices, first_rows, sink);
      });
  }

  template <class P, bool kGated, class Sink>
  void multiply_in(const Linear& first, const float* inputs, int64_t num_matrices, const int64_t* first_rows,
                   const Sink& sink) {
    const int64_t input_words = words_of(first.num_inputs, first.format);
    const int64_t num_panels = (first.num_outputs + kPanel - 1) / kPanel;
    const int64_t most = std::clamp<int64_t>(kInputBytes / (input_words * 4) / kRows, 4, kMostRows / kRows) * kRows;
    int64_t first_piece = 0, piece = team_.claim();
    for (int64_t matrix = 0; matrix < num_matrices; matrix++) {
      const int64_t begin = first_rows[matrix], num_rows = first_rows[matrix + 1] - begin;
      const int64_t num_parts = (num_rows + most - 1) / most, end_piece = first_piece + num_parts * num_panels;
      const Linear linear = matrix_at<P>(first, matrix);
      const PackedLinear<P> product(linear, inputs, input_words);
      for (; piece < end_piece; piece = team_.claim()) {
        const int64_t part = (piece - first_piece) / num_panels, panel = (piece - first_piece) % num_panels;
        product.template run_panel<kGated>(panel, begin + num_rows * part / num_parts,
                                           begin + num_rows * (part + 1) / num_parts, sink);
      }
      first_piece = end_piece;
    }
  }

  template <class F>
  void for_rows(const F& f) {
    for (int64_t row = team_.claim(); row < num_rows_; row = team_.claim()) f(row);
  }

  void end(Phase phase) {
    team_.meet();
    if (ticks_) ++*ticks_;
    if (durations_) {
      const uint64_t ended = now();
      durations_[phase] += ended - began_;
      began_ = ended;
    }
  }

  const Model& model_;
  Team& team_;
  const int64_t thread_;
  const int64_t num_rows_;
  const Workspace& workspace_;
  float* const row_;
  char* const scratch_;
  const int64_t hidden_stride_;
  uint64_t* const ticks_;
  uint64_t* const durations_;
  uint64_t began_;
};

}  // namespace
}  // namespace kernels

using namespace kernels;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether this CPU has the instructions that this library was compiled for.
EXPORT int asyncscale_supported() {
#if defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX512VNNI__)
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return 1;
#endif
}

EXPORT void* asyncscale_team_new(int64_t num_threads) { return new Team(num_threads); }

EXPORT int64_t asyncscale_team_size(const void* team) { return static_cast<const Team*>(team)->size(); }

EXPORT void asyncscale_team_delete(void* team) { delete static_cast<Team*>(team); }

// Bytes of the cache for one block.
EXPORT int64_t asyncscale_block_bytes(const Cache* cache) {
  int64_t bytes = 0;
  with_products(cache->format, [&](auto products) {
    using P = decltype(products);
    bytes = KVCache<P>(*cache).block_elements() * int64_t(sizeof(typename P::Weight));
  });
  return bytes;
}

// Bytes that a step of up to num_tokens needs at `workspace`. most_tokens: of its items.
EXPORT int64_t asyncscale_workspace_bytes(const Model* model, int64_t num_tokens, int64_t most_tokens, int64_t num_threads) {
  alignas(64) static char begin[64];
  return Workspace(*model, begin, num_tokens, most_tokens, num_threads).end - begin;
}

// Returns 0 where the step's exchange failed, after which there are no hidden states.
EXPORT int64_t asyncscale_forward(const Model* model, const Cache* cache, const Step* step, void* team) {
  Team& threads = *static_cast<Team*>(team);
  const Workspace workspace(*model, step->workspace, step->num_tokens, step->most_tokens, threads.size());
  bool done = false;
  threads.run([&](int64_t thread) {
    Pass pass(*model, threads, thread, step->num_tokens, workspace, step->ticks, step->durations);
    const bool own = pass.forward(*step, *cache);
    if (thread == 0) done = own;
  });
  return done;
}

// Of the tokens `indices` of the last step. out: [num_rows, outputs of the head].
EXPORT void asyncscale_logits(const Model* model, const Step* step, const int64_t* indices, int64_t num_rows, float* out,
                              void* team) {
  Team& threads = *static_cast<Team*>(team);
  const Workspace workspace(*model, step->workspace, num_rows, step->most_tokens, threads.size());
  threads.run([&](int64_t thread) {
    Pass(*model, threads, thread, num_rows, workspace, step->ticks, step->durations).logits(step->hidden, indices, out);
  });
}

// The first highest logit of each, and its token; not a number where one of the logits is. Room for 16 times num_rows of
// each thread's own at partial_values and partial_columns.
EXPORT void asyncscale_best(const Model* model, const Step* step, const int64_t* indices, int64_t num_rows,
                            int64_t vocab_size, float* partial_values, int32_t* partial_columns, float* values,
                            int64_t* columns, void* team) {
  Team& threads = *static_cast<Team*>(team);
  const Workspace workspace(*model, step->workspace, num_rows, step->most_tokens, threads.size());
  threads.run([&](int64_t thread) {
    Pass(*model, threads, thread, num_rows, workspace, step->ticks, step->durations)
        .best(step->hidden, indices, vocab_size, partial_values, partial_columns, values, columns);
  });
}
