// A step of the decoder: all layers in one call, by a team of threads.

#include <chrono>
#include <cstdint>

#include "attention.h"
#include "linear.h"
#include "rows.h"
#include "team.h"

namespace kernels {
namespace {

enum Phase { kNorms, kQkv, kRotary, kAttention, kOutput, kGateUp, kActivation, kDown, kHead, kNumPhases };

// Rows whose inputs stay in the second-level cache while panels of weights pass by.
constexpr int64_t kInputBytes = 384 << 10;
constexpr int64_t kMostRows = 21 * kRows;

uint64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

// The step's buffers. Rows of inputs have room for any format.
struct Workspace {
  char* end;
  float* inputs;
  float* qkv;
  float* attended;
  float* inner;
  float* rows;  // one for each thread
  char* scratch;
  int64_t input_words, row_size, attended_size, scratch_bytes;

  Workspace(const Model& model, char* memory, int64_t num_tokens, int64_t most_tokens, int64_t num_threads) : end(memory) {
    attended_size = round_up(model.num_heads * model.head_dim, kLanes);
    const int64_t qkv_size = model.num_layers > 0 ? model.layers[0].qkv.num_outputs : 0;
    row_size = round_up(std::max({model.hidden_size, attended_size, model.inner_size, qkv_size}), kLanes);
    input_words = round_up(std::max({model.hidden_size, attended_size, model.inner_size}), kLanes);  // in any format
    scratch_bytes = AttentionScratch::bytes(most_tokens * (model.num_heads / model.num_kv_heads), model.head_dim);
    inputs = take(num_tokens * input_words);
    qkv = take(num_tokens * qkv_size);
    attended = take(num_tokens * attended_size);
    inner = take(num_tokens * model.inner_size);
    rows = take(num_threads * row_size);
    scratch = reinterpret_cast<char*>(take(num_threads * scratch_bytes / 4));
  }

 private:
  float* take(int64_t size) {
    char* begin = end;
    end += round_up(size * 4, 64);
    return reinterpret_cast<float*>(begin);
  }
};

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

  void forward(const Step& step, const Cache& cache) {
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
      norm(step.hidden, layer.post_attention_norm, layer.gate_up.format);
      linear<true>(layer.gate_up, Gate{workspace_.inner, model_.inner_size});
      end(kGateUp);
      for_rows([&](int64_t row) { inputs_from(workspace_.inner + row * model_.inner_size, row, layer.down); });
      end(kActivation);
      linear<false>(layer.down, Add{step.hidden, hidden_stride_});
      end(kDown);
    }
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
      rms_norm(hidden + indices[row] * hidden_stride_, model_.norm, model_.hidden_size, float(model_.eps), row_);
      std::fill(row_ + model_.hidden_size, row_ + hidden_stride_, 0.0f);
      inputs_from(row_, row, model_.head);
    });
    end(kNorms);
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
    const Layer& layer = model_.layers[index];
    const int64_t dim = model_.head_dim, half = dim / 2, num_rotated = model_.num_heads + model_.num_kv_heads;
    for (int64_t head = 0; head < num_rotated; head++) {
      if (layer.qk_norm) rms_norm(heads + head * dim, layer.qk_norm + head * dim, dim, float(model_.eps), heads + head * dim);
      rotate(heads + head * dim, step.cos + row * half, step.sin + row * half, dim);
    }
    const int64_t block = block_of(step, cache.shape(), row), slot = step.positions[row] % cache.shape().block_size;
    for (int64_t head = 0; head < model_.num_kv_heads; head++) {
      const float* key = heads + (model_.num_heads + head) * dim;
      cache.write(block, slot, index, head, key, key + model_.num_kv_heads * dim, row_);
    }
  }

  void norm(const float* hidden, const float* weight, int64_t format) {
    for_rows([&](int64_t row) {
      rms_norm(hidden + row * hidden_stride_, weight, model_.hidden_size, float(model_.eps), row_);
      std::fill(row_ + model_.hidden_size, row_ + hidden_stride_, 0.0f);
      make_inputs(row_, model_.hidden_size, format, workspace_.inputs + row * words_of(model_.hidden_size, format));
    });
    end(kNorms);
  }

  void inputs_from(const float* values, int64_t row, const Linear& linear) {
    make_inputs(values, linear.num_inputs, linear.format, workspace_.inputs + row * words_of(linear.num_inputs, linear.format));
  }

  template <bool kGated, class Sink>
  void linear(const Linear& linear, const Sink& sink) {
    if (linear.format == kInt8)
      linear_of<Int8Products, kGated>(linear, sink);
    else
      with_products(linear.format, [&](auto products) { linear_of<decltype(products), kGated>(linear, sink); });
  }

  template <class P, bool kGated, class Sink>
  void linear_of(const Linear& linear, const Sink& sink) {
    const int64_t input_words = words_of(linear.num_inputs, linear.format);
    const PackedLinear<P> product(linear, workspace_.inputs, input_words);
    const int64_t num_panels = (linear.num_outputs + kPanel - 1) / kPanel;
    const int64_t most = std::clamp<int64_t>(kInputBytes / (input_words * 4) / kRows, 4, kMostRows / kRows) * kRows;
    const int64_t num_parts = (num_rows_ + most - 1) / most;
    for (int64_t piece = team_.claim(); piece < num_parts * num_panels; piece = team_.claim()) {
      const int64_t part = piece / num_panels;
      product.template run_panel<kGated>(piece % num_panels, num_rows_ * part / num_parts,
                                         num_rows_ * (part + 1) / num_parts, sink);
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

EXPORT void asyncscale_forward(const Model* model, const Cache* cache, const Step* step, void* team) {
  Team& threads = *static_cast<Team*>(team);
  const Workspace workspace(*model, step->workspace, step->num_tokens, step->most_tokens, threads.size());
  threads.run([&](int64_t thread) {
    Pass(*model, threads, thread, step->num_tokens, workspace, step->ticks, step->durations).forward(*step, *cache);
  });
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
