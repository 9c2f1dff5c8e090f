// Vectors of floats in the compilers' own vector extension, so that one source serves every instruction set: how wide
// they are is decided by the flags that a translation unit is compiled with.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vectors {

#if defined(__AVX512F__)
constexpr int kNativeWidth = 16;
#elif defined(__AVX__)
constexpr int kNativeWidth = 8;
#else
constexpr int kNativeWidth = 4;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int W>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * W)));
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
  typedef int32_t Ints __attribute__((vector_size(4 * W)));
};
template <int W>
using Floats = typename Lanes<W>::Floats;
template <int W>
using Bits = typename Lanes<W>::Bits;
template <int W>
using Ints = typename Lanes<W>::Ints;

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector>
inline void store(void* to, Vector v) {
  std::memcpy(to, &v, sizeof v);
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  return load<To>(&from);
}

template <int W>
inline Floats<W> broadcast(float x) {
  return Floats<W>{} + x;
}

template <int W, std::size_t... I>
inline Ints<W> iota(std::index_sequence<I...>) {
  return Ints<W>{int32_t(I)...};
}

// a * b + c, rounded once where the CPU can. Left to itself, a compiler fuses in one instance of a template and not in
// another, and their results differ.
template <int W>
inline Floats<W> fused(Floats<W> a, Floats<W> b, Floats<W> c) {
#if defined(__AVX512F__)
  if constexpr (W == 16) return (Floats<W>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
  if constexpr (W == 8) return (Floats<W>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Lane i is i.
template <int W>
inline Ints<W> iota() {
  return iota<W>(std::make_index_sequence<W>{});
}

template <int W, std::size_t... I>
inline Floats<W> shuffle(Floats<W> a, Floats<W> b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(I)...);
#else
  return __builtin_shuffle(a, b, Ints<W>{int32_t(I)...});
#endif
}

// Lanes whose index has bit S from b, the others from a; each plus its neighbour S lanes away in the same vector.
template <int W, int S, std::size_t... I>
inline Floats<W> add_neighbours(Floats<W> a, Floats<W> b, std::index_sequence<I...>) {
  const Floats<W> own = shuffle<W>(a, b, std::index_sequence<((I & S) ? W + I : I)...>{});
  const Floats<W> neighbours = shuffle<W>(a, b, std::index_sequence<((I & S) ? W + (I ^ S) : (I ^ S))...>{});
  return own + neighbours;
}

// Lane i of the result is the sum of all lanes of rows[i]. Adds vectors pair by pair, log2(W) times.
template <int W, int S = 1>
inline Floats<W> sum_each(Floats<W>* rows) {
  if constexpr (S < W) {
    for (int i = 0; i < W / (2 * S); i++)
      rows[i] = add_neighbours<W, S>(rows[2 * i], rows[2 * i + 1], std::make_index_sequence<W>{});
    return sum_each<W, 2 * S>(rows);
  } else {
    return rows[0];
  }
}

template <int W, int S, std::size_t... I>
inline Floats<W> neighbours(Floats<W> v, std::index_sequence<I...>) {
  return shuffle<W>(v, v, std::index_sequence<(I ^ S)...>{});
}

template <int W>
inline Floats<W> larger(Floats<W> a, Floats<W> b) {
  return a > b ? a : b;
}

template <int W, int S = 1>
inline float sum(Floats<W> v) {
  if constexpr (S < W)
    return sum<W, 2 * S>(v + neighbours<W, S>(v, std::make_index_sequence<W>{}));
  else
    return v[0];
}

template <int W, int S = 1>
inline float largest(Floats<W> v) {
  if constexpr (S < W)
    return largest<W, 2 * S>(larger<W>(v, neighbours<W, S>(v, std::make_index_sequence<W>{})));
  else
    return v[0];
}

// 2^x for x <= 0, within two units in the last place; 0 where that is less than 2^-126.5. NaN stays NaN.
// The fraction's power is its Taylor series: (x ln 2)^k / k!.
template <int W>
inline Floats<W> exp2(Floats<W> x) {
  x = larger<W>(broadcast<W>(-127.0f), x);  // whose exponent's bits are those of zero
  const Floats<W> shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which is then in the low bits
  const Floats<W> fraction = x - (shifted - 12582912.0f);
  Floats<W> power = broadcast<W>(1.52527338e-5f);
  power = power * fraction + 1.54035304e-4f;
  power = power * fraction + 1.33335581e-3f;
  power = power * fraction + 9.61812911e-3f;
  power = power * fraction + 5.55041087e-2f;
  power = power * fraction + 2.40226507e-1f;
  power = power * fraction + 6.93147181e-1f;
  power = power * fraction + 1.0f;
  const Bits<W> exponent = (bit_cast<Bits<W>>(shifted) << 23) + 0x3f800000u;
  return power * bit_cast<Floats<W>>(exponent);
}

// 2 * W consecutive elements as float32: halves of words as they lie in memory for 16-bit types, so that no lane moves.
template <int W>
struct Pair {
  Floats<W> first, second;
};

template <int W>
inline Pair<W> load_pair(const float* from) {
  return {load<Floats<W>>(from), load<Floats<W>>(from + W)};
}

template <int W>
inline void store_pair(float* to, Pair<W> pair) {
  store(to, pair.first);
  store(to + W, pair.second);
}

template <int W>
inline Pair<W> load_pair(const BFloat16* from) {
  const auto words = load<Bits<W>>(from);
  return {bit_cast<Floats<W>>(words << 16), bit_cast<Floats<W>>(words & 0xffff0000u)};
}

// The 16 upper bits of each float32, rounded to nearest even. NaN stays NaN, as its low bits are zero here: it comes
// from a bfloat16, or from an operation that has no result.
template <int W>
inline Bits<W> round_to_bfloat16(Floats<W> x) {
  const auto bits = bit_cast<Bits<W>>(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <int W>
inline void store_pair(BFloat16* to, Pair<W> pair) {
  store(to, round_to_bfloat16<W>(pair.first) | (round_to_bfloat16<W>(pair.second) << 16));
}

// From a float16 in the upper half of each word.
template <int W>
inline Floats<W> from_float16(Bits<W> upper) {
  const Bits<W> sign = upper & 0x80000000u;
  const Bits<W> magnitude = (upper & 0x7fff0000u) >> 3;
  const Floats<W> finite = bit_cast<Floats<W>>(magnitude) * 0x1p112f;  // the exponents' biases are 15 and 127
  const Bits<W> special = magnitude | 0x7f800000u;
  return bit_cast<Floats<W>>((magnitude < 0x0f800000u ? bit_cast<Bits<W>>(finite) : special) | sign);
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) { return from_float16<1>(Bits<1>{uint32_t(x.bits) << 16})[0]; }

// Consecutive float16 numbers.
inline Floats<kNativeWidth> widen(const Float16* from) {
#if defined(__AVX512F__)
  return (Floats<kNativeWidth>)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
  return (Floats<kNativeWidth>)_mm256_cvtph_ps(load<__m128i>(from));
#else
  Floats<kNativeWidth> wide;
  for (int i = 0; i < kNativeWidth; i++) wide[i] = to_float(from[i]);
  return wide;
#endif
}

template <int W>
inline Pair<W> load_pair(const Float16* from) {
  const auto words = load<Bits<W>>(from);
  return {from_float16<W>(words << 16), from_float16<W>(words & 0xffff0000u)};
}

// Rounded to nearest even, in the lower half of each word.
template <int W>
inline Bits<W> round_to_float16(Floats<W> x) {
  const auto bits = bit_cast<Bits<W>>(x);
  const Bits<W> sign = (bits & 0x80000000u) >> 16;
  const Bits<W> magnitude = bits & 0x7fffffffu;
  const Bits<W> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the bits of a float16's subnormal in the lowest ten.
  const Bits<W> subnormal = bit_cast<Bits<W>>(bit_cast<Floats<W>>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits<W> finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits<W> infinite = magnitude > 0x7f800000u ? Bits<W>{} + 0x7e00u : Bits<W>{} + 0x7c00u;
  return (magnitude >= 0x477ff000u ? infinite : finite) | sign;
}

template <int W>
inline void store_pair(Float16* to, Pair<W> pair) {
  store(to, round_to_float16<W>(pair.first) | (round_to_float16<W>(pair.second) << 16));
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, BFloat16& to) { to.bits = uint16_t(round_to_bfloat16<1>(Floats<1>{x})[0]); }
inline void narrow(float x, Float16& to) { to.bits = uint16_t(round_to_float16<1>(Floats<1>{x})[0]); }

// size: a multiple of 16.
template <class E>
inline void narrow(const float* from, E* to, int64_t size) {
  for (int64_t i = 0; i < size; i++) narrow(from[i], to[i]);
}

template <>
inline void narrow(const float* from, float* to, int64_t size) { std::memcpy(to, from, size * sizeof(float)); }

#if defined(__AVX512BF16__)
template <>
inline void narrow(const float* from, BFloat16* to, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) store(to + i, _mm512_cvtneps_pbh(load<__m512>(from + i)));
}
#endif

// A vector of numbers. Returns what is stored, widened again.
template <class E>
inline Floats<kNativeWidth> narrow_vector(Floats<kNativeWidth> from, E* to) {
  if constexpr (std::is_same_v<E, float>) {
    store(to, from);
    return from;
  } else {
    static_assert(std::is_same_v<E, BFloat16>);
#if defined(__AVX512BF16__)
    const auto narrowed = (__m256i)_mm512_cvtneps_pbh((__m512)from);
    store(to, narrowed);
    return bit_cast<Floats<16>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed), 16));
#else
    const Bits<kNativeWidth> bits = round_to_bfloat16<kNativeWidth>(from);
    for (int i = 0; i < kNativeWidth; i++) to[i].bits = uint16_t(bits[i]);
    return bit_cast<Floats<kNativeWidth>>(bits << 16);
#endif
  }
}

// As the above, for any size.
template <class E>
inline void narrow_any(const float* from, E* to, int64_t size) {
  const int64_t whole = size / 16 * 16;
  narrow(from, to, whole);
  for (int64_t i = whole; i < size; i++) narrow(from[i], to[i]);
}

}  // namespace vectors
