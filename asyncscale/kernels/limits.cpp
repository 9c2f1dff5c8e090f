// What this CPU does at most, for what a step reaches to be compared with.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "model.h"
#include "products.h"
#include "team.h"

namespace kernels {
namespace {

constexpr int64_t kPiece = 1 << 20;      // bytes that a thread reads at a time
constexpr int64_t kAhead = 2048;         // bytes
constexpr int kChains = W == 16 ? 24 : 10;  // of sums: as many as there are registers for, so that none waits for another

// From here on the compiler does not know what `value` is: it can neither leave out what made it nor do it only once.
template <class T>
inline void hide(T& value) {
#if defined(__x86_64__) || defined(__i386__)
  asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

// Weights of some types are two vectors.
template <class T>
inline void hide_weights(T& weights) {
  if constexpr (requires { weights.first; }) {
    hide(weights.first);
    hide(weights.second);
  } else if constexpr (requires { weights.even; }) {
    hide(weights.even);
    hide(weights.odd);
  } else {
    hide(weights);
  }
}

void read(const char* from, int64_t num_bytes) {
  constexpr int kVectors = 4;
  Bits<W> seen[kVectors]{};
  for (int64_t i = 0; i + kVectors * 4 * W <= num_bytes; i += kVectors * 4 * W) {
    for (int64_t line = 0; line < kVectors * 4 * W; line += 64) __builtin_prefetch(from + i + line + kAhead);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) seen[v] |= load<Bits<W>>(from + i + v * 4 * W);
  }
  for (auto& vector : seen) hide(vector);
}

// Returns the number of multiplications and additions. Of small numbers, as zeros might take less power.
template <class P>
int64_t multiply_registers(int64_t num_rounds) {
  alignas(64) char bytes[64];
  std::memset(bytes, 0x3f, sizeof bytes);
  typename P::Vector weights = P::load_weights(reinterpret_cast<const typename P::Weight*>(bytes));
  const auto input = load<typename P::Word>(bytes);
  typename P::Sums sums[kChains]{};
  for (int64_t round = 0; round < num_rounds; round++)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; i++) {
      hide_weights(weights);
      sums[i] = P::add(sums[i], weights, input);
    }
  for (auto& vector : sums) hide(vector);
  return 2 * num_rounds * kChains * W * P::kElements;
}

int64_t multiply_registers(int64_t format, int64_t num_rounds) {
  switch (format) {
    case kInt8:
      return multiply_registers<Int8Products>(num_rounds);
    case kBFloat16:
      return multiply_registers<BFloat16Products>(num_rounds);
    default:  // what float16 is multiplied as, too
      return multiply_registers<Float32Products>(num_rounds);
  }
}

}  // namespace
}  // namespace kernels

using namespace kernels;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Reads all of `data` once.
EXPORT void asyncscale_read(const char* data, int64_t num_bytes, void* team) {
  Team& threads = *static_cast<Team*>(team);
  threads.run([&](int64_t) {
    for (int64_t i = threads.claim() * kPiece; i < num_bytes; i = threads.claim() * kPiece)
      read(data + i, std::min(kPiece, num_bytes - i));
  });
}

// Multiplies and adds in registers, num_times num_rounds on each thread. Returns the number of operations of all.
EXPORT int64_t asyncscale_multiply(int64_t format, int64_t num_times, int64_t num_rounds, void* team) {
  Team& threads = *static_cast<Team*>(team);
  std::atomic<int64_t> num_operations{0};
  threads.run([&](int64_t) {
    for (int64_t i = 0; i < num_times; i++) num_operations += multiply_registers(format, num_rounds);
  });
  return num_operations;
}
