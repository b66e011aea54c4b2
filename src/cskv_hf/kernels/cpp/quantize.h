// Latents in few bits: `quantize` of ../../quantize.py, bit for bit, which is made of many short operations of torch.

#pragma once

#include <ATen/Parallel.h>

#include "latents.h"

namespace cskv {

// The nearest float16 that is not below (`up`) or not above a number.
inline float to_half_grid(float value, bool up) {
  const int32_t cut = std::bit_cast<int32_t>(value) & -(1 << 13);  // without the bits that float16 has no room for
  const float inner = std::bit_cast<float>(cut), outer = std::bit_cast<float>(cut + (1 << 13));
  const float scaled = value * 0x1p24f;
  if (std::abs(value) < 0x1p-14f) return (up ? std::ceil(scaled) : std::floor(scaled)) * 0x1p-24f;
  return (up ? inner < value : inner > value) ? outer : inner;
}

// Codes (tokens of a block, width) below 2^bits to bytes: a plane of `bits` of them, from bit `shift` on.
inline void pack_plane(const int32_t* codes, int64_t size, int64_t width, int bits, int shift, uint8_t* out) {
  const int64_t rows = size * bits / 8, together = size % 32 ? 1 : 4;
  std::vector<int32_t> words(width);
  for (int64_t first = 0; first < rows; first += together, out += width * together) {
    std::fill(words.begin(), words.end(), 0);
    for (int64_t row = first; row < first + together; ++row)
      for (int64_t place = 0; place < 8 / bits; ++place) {
        const int32_t* of_token = codes + (row + place * rows) * width;
        const int at = 8 * int(row - first) + bits * int(place);
        for (int64_t k = 0; k < width; ++k) words[k] |= (of_token[k] >> shift & ((1 << bits) - 1)) << at;
      }
    if (together == 4)
      std::copy_n(reinterpret_cast<const uint8_t*>(words.data()), 4 * width, out);
    else
      for (int64_t k = 0; k < width; ++k) out[k] = words[k];
  }
}

// A tier of a block: values (size, width) to codes and to ranges, (minimum, step) by groups of tokens and channels.
inline void quantize_tier(const float* values, int64_t size, int64_t width, int bits, int64_t group_tokens,
                          int64_t group_channels, uint8_t* codes, at::Half* ranges) {
  constexpr float limit = 65504;
  const float highest_code = (1 << bits) - 1;
  std::vector<float> low(width), high(width), step(width);
  std::vector<int32_t> levels(size * width);
  for (int64_t first = 0; first < size; first += group_tokens) {
    std::copy_n(values + first * width, width, low.begin());
    std::copy_n(values + first * width, width, high.begin());
    for (int64_t t = first + 1; t < first + group_tokens; ++t)
      for (int64_t k = 0; k < width; ++k) {
        const float value = values[t * width + k];  // NaN stays
        low[k] = value < low[k] || value != value ? value : low[k];
        high[k] = value > high[k] || value != value ? value : high[k];
      }
    for (int64_t k = 0; k < width; k += group_channels, ranges += 2) {
      const int64_t end = std::min(width, k + group_channels);
      float lowest = low[k], greatest = high[k];
      for (int64_t other = k + 1; other < end; ++other) {
        lowest = low[other] < lowest || low[other] != low[other] ? low[other] : lowest;
        greatest = high[other] > greatest || high[other] != high[other] ? high[other] : greatest;
      }
      const float minimum = to_half_grid(std::clamp(lowest, -limit, limit), false);
      const float spread = (std::clamp(greatest, -limit, limit) - minimum) / highest_code;
      const float of_code = std::min(to_half_grid(spread, true), limit);
      ranges[0] = minimum, ranges[1] = of_code;
      std::fill(low.begin() + k, low.begin() + end, minimum);
      std::fill(step.begin() + k, step.begin() + end, of_code == 0 ? 1 : of_code);
    }
    for (int64_t t = first; t < first + group_tokens; ++t)
      for (int64_t k = 0; k < width; ++k) {
        const float level = std::nearbyint((values[t * width + k] - low[k]) / step[k]);
        levels[t * width + k] = static_cast<int32_t>(level > 0 ? (level < highest_code ? level : highest_code) : 0);
      }
  }
  for (int plane : {8, 4, 2, 1})
    if (bits & plane) {
      pack_plane(levels.data(), size, width, plane, bits & ~(2 * plane - 1), codes);
      codes += size * plane / 8 * width;
    }
}

// latents (batch, tokens, rank) float32, of whole blocks -> codes (batch, blocks, code_bytes) uint8 and ranges (batch,
// blocks, num_ranges, 2) float16. runs: of all channels as one group. sizes: of a block, and of a range in tokens and
// channels.
inline std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& latents, const at::Tensor& runs,
                                                   at::IntArrayRef sizes, int64_t code_bytes, int64_t num_ranges) {
  const int64_t batch = latents.size(0), size = sizes[0], rank = latents.size(2), blocks = latents.size(1) / size;
  TORCH_CHECK(latents.size(1) == blocks * size, latents.size(1), " tokens are not whole blocks of ", size, ".");
  TORCH_CHECK(latents.scalar_type() == at::kFloat, "Latents of ", latents.scalar_type(), " where float32 is needed.");
  const at::Tensor from = latents.contiguous();
  at::Tensor codes = at::empty({batch, blocks, code_bytes}, from.options().dtype(at::kByte));
  at::Tensor ranges = at::empty({batch, blocks, num_ranges, 2}, from.options().dtype(at::kHalf));
  const auto* run = reinterpret_cast<const Run*>(runs.const_data_ptr<int32_t>());
  std::vector<Run> by_tier(run, run + runs.size(0));
  int64_t channels = 0;
  for (const Run& of_tier : by_tier) channels += of_tier.channels;
  TORCH_CHECK(channels == rank, "Latents of ", rank, " channels, ", channels, " of which have bits.");
  std::sort(by_tier.begin(), by_tier.end(), [](const Run& a, const Run& b) {
    return std::pair(a.first_byte, a.inside) < std::pair(b.first_byte, b.inside);
  });
  at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> of_tier(size * rank);
    for (int64_t block = begin; block < end; ++block) {
      const float* values = from.const_data_ptr<float>() + block * size * rank;
      for (auto first = by_tier.begin(), next = first; first < by_tier.end(); first = next) {
        for (; next < by_tier.end() && next->first_byte == first->first_byte; ++next)
          for (int64_t t = 0; t < size; ++t)
            std::copy_n(values + t * rank + next->first_channel, next->channels,
                        of_tier.data() + t * first->width + next->inside);
        quantize_tier(of_tier.data(), size, first->width, first->bits, sizes[1], sizes[2],
                      codes.data_ptr<uint8_t>() + block * code_bytes + first->first_byte,
                      ranges.data_ptr<at::Half>() + 2 * (block * num_ranges + first->first_range));
      }
    }
  });
  return {codes, ranges};
}

}  // namespace cskv
