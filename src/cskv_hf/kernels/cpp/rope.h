// cos and sin by which RoPE has turned the keys of a block, from positions, as the model's rotary module computes and
// rounds them.

#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include "vectors.h"

namespace cskv {

// Of a model in T, which rounds them.
template <typename T>
inline float rounded(float x) {
  return static_cast<float>(static_cast<T>(x));
}

struct Rope {
  const int32_t* positions;  // (batch or 1, num_old)
  const float* inv_freq;     // (half), or ((batch or 1,) num_old, half)
  int64_t rows_positions, rows_freq, num_old, half;
  bool of_tokens;  // whether each has frequencies of its own
  float scaling;
  at::ScalarType type;

  Rope(const at::Tensor& positions, const at::Tensor& inv_freq, double scaling, at::ScalarType type)
      : positions(positions.const_data_ptr<int32_t>()), inv_freq(inv_freq.const_data_ptr<float>()),
        num_old(positions.size(1)), half(inv_freq.size(-1)), of_tokens(inv_freq.dim() > 1), scaling(scaling),
        type(type) {
    TORCH_CHECK(positions.is_contiguous() && inv_freq.is_contiguous(), "Positions have to be contiguous.");
    TORCH_CHECK(!of_tokens || inv_freq.size(-2) == num_old, "Frequencies of ", inv_freq.size(-2), " tokens where ",
                "there are ", num_old, ".");
    rows_positions = positions.size(0), rows_freq = inv_freq.dim() == 3 ? inv_freq.size(0) : 1;
  }

  bool serves(int64_t batch) const {
    return (rows_positions == 1 || rows_positions == batch) && (rows_freq == 1 || rows_freq == batch);
  }

  // cos and sin, (half, wide) each, of `size` tokens from `first` on; anything beyond them.
  void turn(int64_t batch, int64_t first, int64_t size, int64_t wide, float* cos, float* sin) const {
    const int32_t* position = positions + (rows_positions > 1 ? batch * num_old : 0) + first;
    const float* freq = inv_freq + (of_tokens ? ((rows_freq > 1 ? batch * num_old : 0) + first) * half : 0);
    for (int64_t t = 0; t < wide; t += LANES) {
      Vector turned_by = {};
      for (int64_t lane = 0; lane < LANES && t + lane < size; ++lane) turned_by[lane] = position[t + lane];
      for (int64_t f = 0; f < half; ++f) {
        Vector angle = turned_by;
        if (of_tokens)
          for (int64_t lane = 0; lane < LANES && t + lane < size; ++lane) angle[lane] *= freq[(t + lane) * half + f];
        else
          angle *= freq[f];
        cos_sin(angle, at(cos + f * wide + t), at(sin + f * wide + t));
      }
    }
    for (float* turned : {cos, sin}) {
      if (scaling != 1)
        for (int64_t i = 0; i < half * wide; ++i) turned[i] *= scaling;
      if (type == at::kHalf)
        for (int64_t i = 0; i < half * wide; ++i) turned[i] = rounded<at::Half>(turned[i]);
      if (type == at::kBFloat16)
        for (int64_t i = 0; i < half * wide; ++i) turned[i] = rounded<at::BFloat16>(turned[i]);
    }
  }
};

}  // namespace cskv
