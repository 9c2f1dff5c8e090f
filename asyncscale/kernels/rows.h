// What is computed for each token by itself: norms, rotation, activation, and rounding to what a product takes.
#pragma once

#include <algorithm>
#include <cmath>

#include "model.h"
#include "products.h"

namespace kernels {

// Words (of 4 bytes) that a row of num_inputs takes as inputs of weights of `format`.
inline int64_t words_of(int64_t num_inputs, int64_t format) {
  const int64_t padded = round_up(num_inputs, kLanes);
  return format == kInt8 ? QuantizedRow::words(padded) : format == kBFloat16 ? padded / 2 : padded;
}

// Rounds a group of up to QuantizedRow::kGroup values so that the largest magnitude is 127; sets its scale and 128 times
// the negative sum. Where one is infinite or not a number, so is the scale, and with it each output.
inline void quantize(const float* values, int64_t size, int8_t* to, float* scale, int32_t* beginning) {
  Floats<W> magnitudes{}, spoilt{};
  for (int64_t i = 0; i < size; i += W) {
    const auto v = load<Floats<W>>(values + i);
    magnitudes = larger<W>(magnitudes, larger<W>(v, -v));
    spoilt += v * 0.0f;
  }
  const float most = largest<W>(magnitudes);
  *scale = most / 127.0f + sum<W>(spoilt);
  const float steps = most >= 1e-30f && std::isfinite(most) ? 127.0f / most : 0.0f;
  uint32_t total = 0;  // of bits, which may be anything where a value is not a number
  for (int64_t i = 0; i < size; i++) {
    const uint32_t number = bit_cast<uint32_t>(values[i] * steps + 12582912.0f) - 0x4b400000u;
    to[i] = int8_t(number);
    total += number;
  }
  *beginning = int32_t(0u - 128u * total);
}

// A row of float32 as inputs of a product with weights of `format`. values: padded with zeros to a multiple of 16.
inline void make_inputs(const float* values, int64_t size, int64_t format, void* inputs) {
  const int64_t padded = round_up(size, kLanes);
  if (format == kBFloat16) {
    narrow(values, static_cast<BFloat16*>(inputs), padded);
  } else if (format == kInt8) {
    auto* elements = static_cast<int8_t*>(inputs);
    auto* scales = reinterpret_cast<float*>(elements + padded);
    auto* beginnings = reinterpret_cast<int32_t*>(scales + QuantizedRow::num_groups(padded));
    for (int64_t i = 0; i < padded; i += QuantizedRow::kGroup)
      quantize(values + i, std::min(QuantizedRow::kGroup, padded - i), elements + i, scales++, beginnings++);
  } else {
    std::memcpy(inputs, values, padded * sizeof(float));
  }
}

// out: [padded size]; https://arxiv.org/abs/1910.07467
inline void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
  Floats<W> squares{};
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    const auto v = load<Floats<W>>(x + i);
    squares += v * v;
  }
  float total = sum<W>(squares);
  for (; i < size; i++) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / float(size) + eps);
  for (i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
}

// Element i of a head is paired with i + head_dim / 2; cos, sin: [head_dim / 2].
inline void rotate(float* __restrict head, const float* __restrict cos, const float* __restrict sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

// silu(gate) * up
inline Floats<W> swiglu(Floats<W> gate, Floats<W> up) {
  const Floats<W> magnitude = larger<W>(gate, -gate);
  const Floats<W> power = exp2<W>(magnitude * -1.44269504f);
  const Floats<W> sigmoid = (gate >= 0.0f ? broadcast<W>(1.0f) : power) / (power + 1.0f);
  return gate * sigmoid * up;
}

inline void embed(const Model& model, int64_t token_id, float* out) {
  const int64_t size = model.hidden_size, first = token_id * size;
  switch (model.embedding_format) {
    case kFloat32:
      for (int64_t i = 0; i < size; i++) out[i] = static_cast<const float*>(model.embedding)[first + i];
      break;
    case kFloat16:
      for (int64_t i = 0; i < size; i++) out[i] = to_float(static_cast<const Float16*>(model.embedding)[first + i]);
      break;
    default:
      for (int64_t i = 0; i < size; i++) out[i] = to_float(static_cast<const BFloat16*>(model.embedding)[first + i]);
  }
  std::fill(out + size, out + round_up(size, kLanes), 0.0f);
}

}  // namespace kernels
