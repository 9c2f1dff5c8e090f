// Runs the kernels on buffers of exactly the size that they may touch, for a build with sanitizers to watch. Compiled
// together with decoder.cpp and sampling.cpp, whose functions are declared here as library.py and sampling.py know them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "model.h"

using namespace kernels;

extern "C" {
void* asyncscale_team_new(int64_t);
void asyncscale_team_delete(void*);
int64_t asyncscale_block_bytes(const Cache*);
int64_t asyncscale_workspace_bytes(const Model*, int64_t, int64_t, int64_t);
int64_t asyncscale_forward(const Model*, const Cache*, const Step*, void*);
void asyncscale_logits(const Model*, const Step*, const int64_t*, int64_t, float*, void*);
void asyncscale_best(const Model*, const Step*, const int64_t*, int64_t, int64_t, float*, int32_t*, float*, int64_t*, void*);
int64_t asyncscale_sampling_scratch_bytes(int64_t);
void asyncscale_draw(const float*, int64_t, const void*, int64_t, void*, int64_t*);
void asyncscale_log_probabilities(const float*, int64_t, const int64_t*, const int64_t*, int64_t, int64_t, void*, float*,
                                  int64_t*, int64_t*, float*);
}

namespace {

float random_float() { return float(std::rand()) / float(RAND_MAX) - 0.5f; }

// Memory of one size, aligned as the caller of the library aligns it, and freed with everything else at the end of a case.
class Buffers {
 public:
  void* bytes(int64_t size, int fill = 255) {
    // aligned_alloc wants a multiple of the alignment, which would leave room behind the end.
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max<int64_t>(size, 1)) != 0) std::abort();
    std::fill_n(static_cast<unsigned char*>(memory), size, (unsigned char)fill);
    owned_.emplace_back(memory, &std::free);
    return memory;
  }

  float* floats(int64_t size) {
    auto* values = static_cast<float*>(bytes(size * 4));
    std::generate_n(values, size, random_float);
    return values;
  }

  // Random numbers of a format.
  void* elements(int64_t size, int64_t format) {
    if (format == kFloat32) return floats(size);
    if (format == kInt8) {
      auto* values = static_cast<uint8_t*>(bytes(size));
      std::generate_n(values, size, [] { return uint8_t(std::rand() % 255 + 1); });
      return values;
    }
    // 0.5 to 1, of either sign.
    auto* values = static_cast<uint16_t*>(bytes(size * 2));
    std::generate_n(values, size, [=] {
      return uint16_t(format == kBFloat16 ? std::rand() % 2 * 0x8000 + 0x3f00 + std::rand() % 128
                                          : std::rand() % 2 * 0x8000 + 0x3800 + std::rand() % 1024);
    });
    return values;
  }

  template <class T>
  T* of(const std::vector<T>& values) {
    auto* copy = static_cast<T*>(bytes(int64_t(values.size() * sizeof(T))));
    std::copy(values.begin(), values.end(), copy);
    return copy;
  }

 private:
  std::vector<std::unique_ptr<void, decltype(&std::free)>> owned_;
};

Linear make_linear(Buffers& buffers, int64_t num_outputs, int64_t num_inputs, int64_t format, bool bias) {
  Linear linear{};
  const int64_t group = format == kInt8 ? 4 : format == kBFloat16 ? 2 : 1;
  linear.num_outputs = round_up(num_outputs, kLanes);
  linear.num_inputs = num_inputs;
  linear.format = format;
  linear.weights = buffers.elements(linear.num_outputs * round_up(num_inputs, group), format);
  linear.scales = format == kInt8 ? buffers.floats(linear.num_outputs) : nullptr;
  linear.bias = bias ? buffers.floats(linear.num_outputs) : nullptr;
  return linear;
}

// Experts' matrices follow each other.
Linear make_experts(Buffers& buffers, int64_t num_experts, int64_t num_outputs, int64_t num_inputs, int64_t format) {
  const int64_t padded = round_up(num_outputs, kLanes);
  Linear linear = make_linear(buffers, num_experts * padded, num_inputs, format, false);
  linear.num_outputs = padded;
  return linear;
}

struct Shape {
  int64_t hidden, inner, heads, kv_heads, head_dim, vocab, block_size, window;
  bool extras;  // biases and norms of heads
  int64_t experts = 0, experts_per_token = 0;
};

// An engine's exchange with itself, which fails when num_exchanges is used up.
Exchange exchange;
Buffers* exchange_buffers;
int64_t num_exchanges, num_received;

int64_t send(const float* rows, int64_t num_words, const int64_t* first_rows, int64_t num_experts, int64_t room_words) {
  const int64_t num_rows = num_received = first_rows[num_experts];
  exchange.received_first = exchange_buffers->of(std::vector<int64_t>(first_rows, first_rows + num_experts + 1));
  exchange.received = exchange_buffers->of(std::vector<float>(rows, rows + num_rows * num_words));
  exchange.room = static_cast<float*>(exchange_buffers->bytes(num_rows * room_words * 4));
  return num_exchanges-- > 0;
}

int64_t send_back(const float* results, int64_t num_words) {
  const int64_t num_rows = num_received;
  exchange.results = exchange_buffers->of(std::vector<float>(results, results + num_rows * num_words));
  return num_exchanges-- > 0;
}

// Two sequences: one chunk after a first one, and a single token beside it.
bool run_decoder(const Shape& shape, int64_t format, int64_t cache_format, int64_t num_threads, float spoilt) {
  Buffers buffers;
  const int64_t heads_size = shape.heads * shape.head_dim, inner = round_up(shape.inner, kLanes);
  Model model{};
  model.num_layers = 2;
  model.hidden_size = shape.hidden;
  model.num_heads = shape.heads;
  model.num_kv_heads = shape.kv_heads;
  model.head_dim = shape.head_dim;
  model.embedding_format = format == kInt8 ? kBFloat16 : format;
  model.embedding = buffers.elements(shape.vocab * shape.hidden, model.embedding_format);
  model.norm = buffers.floats(shape.hidden);
  model.head = make_linear(buffers, shape.vocab, shape.hidden, format, false);
  model.eps = 1e-5;
  model.qkv_limit = shape.experts ? 3 : HUGE_VALF;
  model.qk_norm_spans_heads = shape.experts > 0;
  std::vector<Layer> layers(2);
  for (Layer& layer : layers) {
    layer.qkv = make_linear(buffers, heads_size + 2 * shape.kv_heads * shape.head_dim, shape.hidden, format, shape.extras);
    layer.output = make_linear(buffers, shape.hidden, heads_size, format, shape.extras);
    if (shape.experts) {
      layer.experts = {make_linear(buffers, shape.experts, shape.hidden, kFloat32, false), shape.experts,
                       shape.experts, shape.experts_per_token, shape.extras};
      layer.gate_up = make_experts(buffers, shape.experts, 2 * inner, shape.hidden, format);
      layer.down = make_experts(buffers, shape.experts, shape.hidden, inner, format);
    } else {
      layer.gate_up = make_linear(buffers, 2 * inner, shape.hidden, format, shape.extras);
      layer.down = make_linear(buffers, shape.hidden, inner, format, shape.extras);
    }
    layer.input_norm = buffers.floats(shape.hidden);
    layer.post_attention_norm = buffers.floats(shape.hidden);
    layer.qk_norm = shape.extras ? buffers.floats((shape.heads + shape.kv_heads) * shape.head_dim) : nullptr;
    layer.window = shape.window;
  }
  const_cast<float*>(layers[1].post_attention_norm)[0] += spoilt;
  model.layers = buffers.of(layers);

  constexpr int64_t kFirst = 61, kChunk = 20;
  const int64_t length = kFirst + kChunk, most_tokens = 13, half = shape.head_dim / 2;
  const int64_t num_blocks = (length + shape.block_size - 1) / shape.block_size;
  Cache cache{nullptr, cache_format, 2, shape.kv_heads, shape.head_dim, shape.block_size};
  cache.data = buffers.bytes((num_blocks + 1) * asyncscale_block_bytes(&cache));
  std::vector<int32_t> table;
  for (int64_t i = 0; i < num_blocks; i++) table.push_back(int32_t(num_blocks - i));
  table.push_back(0);  // the other sequence's row is as long as its one block

  void* team = asyncscale_team_new(num_threads);
  bool finite = true;
  for (int64_t begin : {int64_t(0), kFirst}) {
    const int64_t count = begin == 0 ? kFirst : kChunk, num_tokens = count + (begin == 0);
    std::vector<int32_t> ids, positions, rows;
    std::vector<Item> items;
    for (int64_t i = 0; i < count; i++) {
      ids.push_back(int32_t(std::rand() % shape.vocab)), positions.push_back(int32_t(begin + i)), rows.push_back(0);
      if (i % most_tokens == 0) items.push_back({i, std::min(most_tokens, count - i), begin + i, 0});
    }
    if (begin == 0) {
      ids.push_back(int32_t(shape.vocab - 1)), positions.push_back(0), rows.push_back(1);
      items.push_back({count, 1, 0, 1});
    }
    Step step{};
    step.num_tokens = num_tokens;
    step.token_ids = buffers.of(ids);
    step.positions = buffers.of(positions);
    step.rows = buffers.of(rows);
    step.cos = buffers.floats(num_tokens * half);
    step.sin = buffers.floats(num_tokens * half);
    step.block_table = buffers.of(table);
    step.block_table_stride = num_blocks;
    step.items = buffers.of(items);
    step.num_items = int64_t(items.size());
    step.most_tokens = most_tokens;
    step.hidden = static_cast<float*>(buffers.bytes(num_tokens * round_up(shape.hidden, kLanes) * 4));
    step.workspace = static_cast<char*>(buffers.bytes(asyncscale_workspace_bytes(&model, num_tokens, most_tokens, num_threads)));
    step.ticks = buffers.of(std::vector<uint64_t>{0});
    step.durations = buffers.of(std::vector<uint64_t>(16));
    if (shape.experts && num_threads > 1) {
      exchange = {send, send_back, nullptr, nullptr, nullptr, nullptr, 0};
      exchange_buffers = &buffers;
      step.exchange = &exchange;
      for (num_exchanges = 0; num_exchanges < 4;) {
        const int64_t most = num_exchanges;
        if (asyncscale_forward(&model, &cache, &step, team)) std::abort();
        num_exchanges = most + 1;
      }
    }
    if (!asyncscale_forward(&model, &cache, &step, team)) std::abort();
    const int64_t* indices = buffers.of(std::vector<int64_t>{num_tokens - 1, 0});
    auto* logits = static_cast<float*>(buffers.bytes(2 * model.head.num_outputs * 4));
    asyncscale_logits(&model, &step, indices, 2, logits, team);
    for (int64_t row = 0; row < 2; row++)
      for (int64_t i = 0; i < shape.vocab; i++) finite = finite && std::isfinite(logits[row * model.head.num_outputs + i]);
    const int64_t num_partial = num_threads * 2 * kLanes;
    float* partial_values = static_cast<float*>(buffers.bytes(num_partial * 4));
    int32_t* partial_columns = static_cast<int32_t*>(buffers.bytes(num_partial * 4));
    float* values = static_cast<float*>(buffers.bytes(2 * 4));
    int64_t* columns = static_cast<int64_t*>(buffers.bytes(2 * 8));
    asyncscale_best(&model, &step, indices, 2, shape.vocab, partial_values, partial_columns, values, columns, team);
    for (int64_t row = 0; row < 2; row++)
      finite = finite && columns[row] < shape.vocab && values[row] == logits[row * model.head.num_outputs + columns[row]];
  }
  asyncscale_team_delete(team);
  return finite;
}

struct Draw {
  int64_t index;
  double uniform, top_p;
  int64_t top_k;
  float temperature, min_p, highest;
  int32_t unused;
};

bool run_sampling(int64_t vocab, int64_t top_k, double top_p, int64_t num_top) {
  Buffers buffers;
  const float* logits = buffers.floats(2 * vocab);
  void* scratch = buffers.bytes(asyncscale_sampling_scratch_bytes(vocab));
  std::vector<Draw> draws;
  for (double uniform : {0.0, 0.3, 1 - 0x1p-53})
    draws.push_back({1, uniform, top_p, top_k, 0.7f, 0.01f, *std::max_element(logits + vocab, logits + 2 * vocab), 0});
  auto* drawn = static_cast<int64_t*>(buffers.bytes(3 * 8));
  asyncscale_draw(logits, vocab, buffers.of(draws), 3, scratch, drawn);
  auto* chosen = static_cast<float*>(buffers.bytes(2 * 4));
  auto* ranks = static_cast<int64_t*>(buffers.bytes(2 * 8));
  auto* top_ids = static_cast<int64_t*>(buffers.bytes(2 * num_top * 8));
  auto* top = static_cast<float*>(buffers.bytes(2 * num_top * 4));
  asyncscale_log_probabilities(logits, vocab, buffers.of(std::vector<int64_t>{1, 0}),
                               buffers.of(std::vector<int64_t>{vocab - 1, 0}), 2, num_top, scratch, chosen, ranks, top_ids, top);
  return std::all_of(drawn, drawn + 3, [=](int64_t id) { return id >= 0 && id < vocab; }) && chosen[0] <= 0 && ranks[1] <= vocab;
}

int fail(const char* what) {
  std::printf("wrong: %s\n", what);
  return 1;
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {50, 43, 6, 2, 34, 83, 5, 30, true},
      {33, 75, 8, 1, 8, 17, 16, int64_t(1) << 40, false},
      {64, 100, 3, 3, 80, 64, 32, 70, false},
      {18, 16, 5, 1, 128, 130, 1, 1, true},
      {50, 43, 4, 2, 34, 83, 5, 30, true, 17, 3},
      {33, 75, 8, 1, 8, 17, 16, int64_t(1) << 40, false, 2, 2},
  };
  const float infinity = HUGE_VALF;
  for (const Shape& shape : shapes)
    for (int64_t format : {kFloat32, kBFloat16, kFloat16, kInt8})
      for (int64_t num_threads : {1, 3}) {
        const int64_t cache_format = format == kInt8 ? (num_threads == 1 ? kBFloat16 : kFloat32) : format;
        if (!run_decoder(shape, format, cache_format, num_threads, 0)) return fail("logits are not finite");
        if (run_decoder(shape, format, cache_format, num_threads, infinity)) return fail("logits are finite");
      }
  for (int64_t vocab : {1, 7, 128, 300, 1000})
    for (int64_t top_k : {0, 1, 70})
      for (double top_p : {1.0, 0.5})
        for (int64_t num_top : {int64_t(0), int64_t(5), int64_t(100)})
          if (!run_sampling(vocab, std::min(top_k, vocab), top_p, std::min(num_top, vocab))) return fail("sampling");
  std::puts("done");
}
