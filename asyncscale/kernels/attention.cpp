// The kernel's entry points: what Python passes, and how the work is divided over threads.

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "paged_attention.h"

namespace {

using namespace attention;

template <class E, int W>
void attend_items(const Plan& plan, const void* queries, const void* cache, void* output) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread) {
    char* scratch = static_cast<char*>(plan.scratch) + thread * plan.scratch_bytes;
    PagedAttention<E, W> attention(plan, static_cast<const E*>(cache), scratch);
    for (int64_t unit = next++; unit < attention.num_units(); unit = next++)
      attention.run(unit, static_cast<const E*>(queries), static_cast<E*>(output));
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t thread = 1; thread < plan.num_threads; thread++) helpers.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // No further thread can be had: those that run do all the work.
  }
  work(0);
  for (auto& helper : helpers) helper.join();
}

template <class E>
void attend_elements(const Plan& plan, const void* queries, const void* cache, void* output) {
  if (plan.head_dim >= 2 * kNativeWidth)
    attend_items<E, kNativeWidth>(plan, queries, cache, output);
  else
    attend_items<E, 1>(plan, queries, cache, output);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether this CPU has the instructions that this library was compiled for.
EXPORT int asyncscale_attention_supported() {
#if defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// Bytes that each thread needs at `scratch` for items of up to `num_tokens` tokens.
EXPORT int64_t asyncscale_attention_scratch_bytes(const Plan* plan, int64_t num_tokens) {
  return Scratch::bytes(*plan, num_tokens);
}

EXPORT void asyncscale_attention_run(const Plan* plan, const void* queries, const void* cache, void* output) {
  switch (plan->dtype) {
    case kFloat32:
      return attend_elements<float>(*plan, queries, cache, output);
    case kBFloat16:
      return attend_elements<BFloat16>(*plan, queries, cache, output);
    case kFloat16:
      return attend_elements<Float16>(*plan, queries, cache, output);
  }
}
