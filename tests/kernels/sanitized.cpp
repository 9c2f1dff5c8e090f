// Runs the kernel on buffers of exactly the size that it may touch, for a build with sanitizers to watch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.cpp"

namespace {

constexpr int64_t kKeyHeads = 2, kBlockSize = 5;

void fill(std::vector<float>& values) {
  for (float& value : values) value = float(std::rand()) / float(RAND_MAX) - 0.5f;
}

// Elements are zero but for float32, whose results are checked; the others are for their sizes.
template <class E>
bool is_finite(const E* output, int64_t size, int64_t dtype) {
  if (dtype != kFloat32) return true;
  for (int64_t i = 0; i < size; i++)
    if (!std::isfinite(reinterpret_cast<const float*>(output)[i])) return false;
  return true;
}

bool run(int64_t dtype, int64_t head_dim, int64_t group, int64_t position, int64_t num_tokens, int64_t window,
         int64_t num_threads) {
  const int64_t num_blocks = (position + num_tokens + kBlockSize - 1) / kBlockSize;
  const int64_t block = kKeyHeads * kBlockSize * head_dim, heads = kKeyHeads * group;
  std::vector<int32_t> table;
  for (int64_t i = 0; i < 2 * num_blocks; i++) table.push_back(int32_t(i));
  const Item items[] = {{0, num_tokens, position, 0}, {num_tokens, num_tokens, position, 1}};
  Plan plan{items,      2,          table.data(),    num_blocks,           dtype,  heads,       kKeyHeads, head_dim,
            heads * head_dim, heads * head_dim, kBlockSize, block, kBlockSize * head_dim, 2 * num_blocks * block,
            window,     num_threads, nullptr,        0,                    0.3};
  const int64_t bytes = dtype == kFloat32 ? 1 : 2;  // of a float's four, how many elements share them
  std::vector<float> queries(2 * num_tokens * heads * head_dim / bytes), output(queries.size());
  // The last block's last positions are not written, and may be the end of the memory.
  const int64_t unwritten = num_blocks * kBlockSize - position - num_tokens;
  std::vector<float> cache((4 * num_blocks * block - unwritten * head_dim) / bytes);
  if (dtype == kFloat32) fill(queries), fill(cache);
  plan.scratch_bytes = asyncscale_attention_scratch_bytes(&plan, num_tokens);
  std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, plan.scratch_bytes * num_threads), &std::free);
  plan.scratch = scratch.get();
  asyncscale_attention_run(&plan, queries.data(), cache.data(), output.data());
  return is_finite(output.data(), int64_t(output.size()), dtype);
}

}  // namespace

int main() {
  for (int64_t dtype : {kFloat32, kBFloat16, kFloat16})
    for (int64_t head_dim : {8, 34, 80, 128})
      for (int64_t group : {1, 8})
        for (int64_t position : {0, 7, 130})
          for (int64_t num_tokens : {1, 13, 70})
            for (int64_t window : {int64_t(1) << 40, int64_t(30)})
              for (int64_t num_threads : {1, 3})
                if (!run(dtype, head_dim, group, position, num_tokens, window, num_threads)) {
                  std::printf("not finite: dtype %d head_dim %d\n", int(dtype), int(head_dim));
                  return 1;
                }
  std::puts("done");
}
