// The latents of one layer as they are stored, plain or packed, and how to read a block of them: with channels side by
// side, or with tokens side by side.

#pragma once

#include <ATen/ATen.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <bit>
#include <vector>

#include "vectors.h"

namespace cskv {

constexpr int64_t USUAL = 32;  // tokens of a block for which loops are unrolled

// Channels that lie side by side in their own order and in a tier, all of one group of KV heads: a row of the table of
// `runs_of` in ../cpu.py.
struct Run {
  int32_t first_channel, channels, bits, first_byte, width, inside, first_range, groups;
};

// Segments (batch, blocks, ...) of codes and of ranges, for both of which plain latents stand.
struct Latents {
  at::TensorList data, ranges;
  const Run* runs;
  int64_t num_runs, rank, block_size, group_tokens;
  bool packed;
  std::vector<int32_t> range_of, stride_of;  // of each channel: its first range in a block, and how far the next is

  // sizes: of a block, and of a range in tokens and channels.
  Latents(at::TensorList data, at::TensorList ranges, const at::Tensor& table, int64_t rank, at::IntArrayRef sizes)
      : data(data), ranges(ranges), runs(reinterpret_cast<const Run*>(table.const_data_ptr<int32_t>())),
        num_runs(table.size(0)), rank(rank), block_size(sizes[0]), group_tokens(sizes[1]),
        packed(data[0].scalar_type() == at::kByte), range_of(rank), stride_of(rank) {
    int64_t channels = 0;
    for (const Run* run = runs; run < runs + num_runs; ++run) {
      TORCH_CHECK(run->first_channel == channels && channels + run->channels <= rank,
                  "The latents have more channels than the factors, ", rank, ".");
      for (int32_t k = 0; k < run->channels; ++k, ++channels) {
        range_of[channels] = run->first_range + (run->inside + k) / int32_t(sizes[2]);
        stride_of[channels] = run->groups;
      }
    }
    TORCH_CHECK(channels == rank, "The latents have ", channels, " channels, the factors ", rank, ".");
  }

  // Those of earlier runs, which are the first channel of this one.
  int64_t channels_before(int64_t run) const { return run < num_runs ? runs[run].first_channel : rank; }

  int64_t blocks() const {
    int64_t sum = 0;
    for (const at::Tensor& segment : data) sum += segment.size(1);
    return sum;
  }

  // That the segments hold what the runs and the number of tokens say; nothing below looks again.
  void check(int64_t batch, int64_t num_tokens) const {
    const at::ScalarType type = data[0].scalar_type();
    TORCH_CHECK(packed || type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                "Latents of ", type, ", which the kernels do not read.");
    int64_t code_bytes = 0, num_ranges = 0;
    for (const Run* run = runs; run < runs + num_runs; ++run) {
      code_bytes = std::max(code_bytes, run->first_byte + int64_t(run->width) * run->bits * block_size / 8);
      num_ranges = std::max(num_ranges, run->first_range + run->groups * (block_size / group_tokens));
    }
    TORCH_CHECK(blocks() * block_size == num_tokens, "There are latents of ", blocks() * block_size,
                " tokens where there should be ", num_tokens, ".");
    for (size_t i = 0; i < data.size(); ++i) {
      const at::IntArrayRef of_data = data[i].sizes(), of_ranges = ranges[i].sizes();
      const int64_t blocks = of_data.size() > 1 ? of_data[1] : 0;
      const bool sizes = packed ? of_data == at::IntArrayRef({batch, blocks, code_bytes}) &&
                                      of_ranges == at::IntArrayRef({batch, blocks, num_ranges, 2})
                                : of_data == at::IntArrayRef({batch, blocks, block_size, rank});
      TORCH_CHECK(sizes && data[i].scalar_type() == type && (!packed || ranges[i].scalar_type() == at::kHalf),
                  "Latents of other sizes than the factors': ", of_data, " and ", of_ranges, ".");
      for (const at::Tensor& tensor : {data[i], ranges[i]})
        TORCH_CHECK(blocks == 0 || tensor[0].is_contiguous(), "Blocks of latents have to be compact.");
    }
  }
};

// Codes of LANES channels for one token of a block of `size`, whose planes are as in `pack` of quantize.py: token t
// lies in row t % rows, at place t / rows, and four rows of a channel make a word.
template <int BITS>
inline Ints codes_of_channels(const int32_t* words, int64_t row, int64_t size, int64_t t) {
  const int64_t words4 = size / 8, words2 = size / 16, words1 = size / 32, q = t / 4;
  const int byte = 8 * (t % 4);
  const int32_t *plane2 = words + (BITS & 4) * words1 * row, *plane1 = words + (BITS & 6) * words1 * row;
  Ints code = {};
  if (BITS == 8) code = at(words + q * row) >> byte & 255;
  if (BITS & 4) code = at(words + q % words4 * row) >> (byte + 4 * int(q / words4)) & 15;
  if (BITS & 2) code |= (at(plane2 + q % words2 * row) >> (byte + 2 * int(q / words2)) & 3) << (BITS & 4);
  if (BITS & 1) code |= (at(plane1 + q % words1 * row) >> (byte + int(q / words1)) & 1) << (BITS & 6);
  return code;
}

inline void store(const Vector& values, int64_t count, float* out) {
  if (count == LANES) {
    at(out) = values;
    return;
  }
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(out, (1u << count) - 1, (__m512)values);
#else
  for (int64_t lane = 0; lane < count; ++lane) out[lane] = values[lane];
#endif
}

// Tokens first to last (exclusive) of a run; of all if SIZE, which a block then has, is not 0. So many channels at a
// time as there are lanes. Where there are fewer, words of others are read along, or if that went beyond `bytes_end`,
// theirs are copied first. minimum and step are of each channel, with LANES numbers to spare.
template <int BITS, int64_t SIZE>
void unpack_words(const uint8_t* bytes, const uint8_t* bytes_end, int64_t width, int64_t size, int64_t first,
                  int64_t last, int64_t count, const float* minimum, const float* step, float* out, int64_t out_row) {
  if (SIZE) size = SIZE, first = 0, last = SIZE;
  std::vector<int32_t> copy;
  for (int64_t k = 0; k < count; k += LANES) {
    const int64_t lanes = std::min(LANES, count - k), words = BITS * size / 32;
    const auto* from = reinterpret_cast<const int32_t*>(bytes) + k;
    int64_t row = width;
    if (reinterpret_cast<const uint8_t*>(from + (words - 1) * width + LANES) > bytes_end) {
      copy.resize(words * LANES);
      for (int64_t w = 0; w < words; ++w) std::copy_n(from + w * width, lanes, copy.begin() + w * LANES);
      from = copy.data(), row = LANES;
    }
    const Vector low = at(minimum + k), steps = at(step + k);
#pragma GCC unroll 32
    for (int64_t t = first; t < last; ++t) {
      const Ints code = codes_of_channels<BITS>(from, row, size, t);
      store(low + steps * __builtin_convertvector(code, Vector), lanes, out + t * out_row + k);
    }
  }
}

// The same where rows do not make words, byte by byte.
template <int BITS>
void unpack_bytes(const uint8_t* codes, const uint8_t*, int64_t width, int64_t size, int64_t first, int64_t last,
                  int64_t count, const float* minimum, const float* step, float* out, int64_t out_row) {
  const uint8_t *plane2 = codes + (BITS & 4) * size / 8 * width, *plane1 = codes + (BITS & 6) * size / 8 * width;
  const int64_t rows4 = size / 2, rows2 = size / 4, rows1 = size / 8;
  for (int64_t t = first; t < last; ++t)
    for (int64_t k = 0; k < count; ++k) {
      int code = 0;
      if (BITS == 8) code = codes[t * width + k];
      if (BITS & 4) code = codes[t % rows4 * width + k] >> (4 * (t / rows4)) & 15;
      if (BITS & 2) code |= (plane2[t % rows2 * width + k] >> (2 * (t / rows2)) & 3) << (BITS & 4);
      if (BITS & 1) code |= (plane1[t % rows1 * width + k] >> (t / rows1) & 1) << (BITS & 6);
      out[t * out_row + k] = minimum[k] + step[k] * code;
    }
}

typedef void (*Unpack)(const uint8_t*, const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                       const float*, float*, int64_t);
template <int64_t SIZE>
constexpr Unpack UNPACK_WORDS[] = {
    nullptr,
    unpack_words<1, SIZE>,
    unpack_words<2, SIZE>,
    unpack_words<3, SIZE>,
    unpack_words<4, SIZE>,
    unpack_words<5, SIZE>,
    unpack_words<6, SIZE>,
    unpack_words<7, SIZE>,
    unpack_words<8, SIZE>,
};
constexpr Unpack UNPACK_BYTES[] = {nullptr,         unpack_bytes<1>, unpack_bytes<2>, unpack_bytes<3>, unpack_bytes<4>,
                                   unpack_bytes<5>, unpack_bytes<6>, unpack_bytes<7>, unpack_bytes<8>};

// Codes of LANES tokens of one channel, the v-th ones of a block of USUAL, from its words of a plane of so many bits.
template <int BITS>
inline Ints codes_of_tokens(const int32_t* words, int64_t v) {
  constexpr int64_t rows = USUAL * BITS / 8;
  Ints word, shift;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const int64_t token = v * LANES + lane, row = token % rows;
    word[lane] = row / 4, shift[lane] = 8 * (row % 4) + BITS * (token / rows);
  }
  return __builtin_shuffle(at(words), word) >> shift & ((1 << BITS) - 1);
}

// Words of a plane of `count` channels, which lie next to one another for every four tokens, channel by channel.
template <int BITS>
inline void gather_words(const int32_t* from, int64_t width, int64_t count, int32_t* out) {
  for (int64_t k = 0; k < count; ++k)
    for (int64_t w = 0; w < BITS; ++w) out[k * BITS + w] = from[w * width + k];
}

// A run of a block of USUAL tokens, to (count, USUAL).
template <int BITS>
void unpack_across(const uint8_t* bytes, int64_t width, int64_t count, const float* minimum, const float* step,
                   float* out) {
  constexpr int64_t SOME = 32;
  const auto* words = reinterpret_cast<const int32_t*>(bytes);
  int32_t plane8[8 * SOME + LANES], plane4[4 * SOME + LANES], plane2[2 * SOME + LANES], plane1[SOME + LANES];
  for (int64_t k = 0; k < count; k += SOME, words += SOME) {
    const int64_t some = std::min(SOME, count - k);
    if (BITS == 8) gather_words<8>(words, width, some, plane8);
    if (BITS & 4) gather_words<4>(words, width, some, plane4);
    if (BITS & 2) gather_words<2>(words + (BITS & 4) * width, width, some, plane2);
    if (BITS & 1) gather_words<1>(words + (BITS & 6) * width, width, some, plane1);
    for (int64_t i = 0; i < some; ++i)
#pragma GCC unroll 4
      for (int64_t v = 0; v < USUAL / LANES; ++v) {
        Ints code = {};
        if (BITS == 8) code = codes_of_tokens<8>(plane8 + 8 * i, v);
        if (BITS & 4) code = codes_of_tokens<4>(plane4 + 4 * i, v);
        if (BITS & 2) code |= codes_of_tokens<2>(plane2 + 2 * i, v) << (BITS & 4);
        if (BITS & 1) code |= codes_of_tokens<1>(plane1 + i, v) << (BITS & 6);
        const Vector values = minimum[k + i] + step[k + i] * __builtin_convertvector(code, Vector);
        at(out + (k + i) * USUAL + v * LANES) = values;
      }
  }
}

typedef void (*UnpackAcross)(const uint8_t*, int64_t, int64_t, const float*, const float*, float*);
constexpr UnpackAcross UNPACK_ACROSS[] = {
    nullptr,          unpack_across<1>, unpack_across<2>, unpack_across<3>, unpack_across<4>,
    unpack_across<5>, unpack_across<6>, unpack_across<7>, unpack_across<8>,
};

// Of a float16; in integers, which a compiler makes vectors of.
inline float widened(uint32_t half) {
  const float magnitude = std::bit_cast<float>((half & 0x7fff) << 13) * 0x1p112f;
  const uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // or NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | infinite | (half & 0x8000) << 16);
}

// Reads blocks, one after the other; each thread has its own.
class Reader {
 public:
  explicit Reader(const Latents& latents)
      : latents(latents), minimum(latents.rank + LANES), step(latents.rank + LANES) {}

  // Which block comes next.
  void go_to(int64_t batch, int64_t index) {
    const size_t segment = segment_of(index);
    const at::Tensor& ranges = latents.ranges[segment];
    type = latents.data[segment].scalar_type();
    bytes = bytes_of(latents.data[segment], batch, index);
    bytes_end = bytes_of(latents.data[segment], batch, latents.data[segment].size(1));
    if (latents.packed)
      pairs = reinterpret_cast<const uint32_t*>(ranges.const_data_ptr<at::Half>() + batch * ranges.stride(0)) +
              index * ranges.size(2);
  }

  // Have one of so many parts of a block's codes brought into the core's cache.
  void prefetch(int64_t batch, int64_t index, int64_t part, int64_t parts) const {
    const at::Tensor& data = latents.data[segment_of(index)];
    const int64_t size = block_bytes(data), line = 64;
    const uint8_t* from = bytes_of(data, batch, index);
    const uint8_t* const end = from + (part + 1) * size / parts;
    for (from += part * size / parts; from < end; from += line) __builtin_prefetch(from, 0, 2);
  }

  // The channels of some runs, (block_size, out_row), from the first of them on.
  void read(int64_t first_run, int64_t last_run, float* out, int64_t out_row) {
    if (first_run == last_run) return;
    const int64_t first = latents.runs[first_run].first_channel, size = latents.block_size;
    const int64_t count = latents.channels_before(last_run) - first;
    if (type == at::kFloat) return copy<float>(first, count, out, out_row);
    if (type == at::kHalf) return copy<at::Half>(first, count, out, out_row);
    if (type == at::kBFloat16) return copy<at::BFloat16>(first, count, out, out_row);
    const bool words = size % 32 == 0, usual = size == USUAL && latents.group_tokens == USUAL;
    for (int64_t t = 0, group = 0; t < size; t += latents.group_tokens, ++group) {
      read_ranges(first, count, group);
      for (const Run* p = latents.runs + first_run; p < latents.runs + last_run; ++p) {
        const Unpack unpack = usual ? UNPACK_WORDS<USUAL>[p->bits]
                              : words ? UNPACK_WORDS<0>[p->bits]
                                      : UNPACK_BYTES[p->bits];
        unpack(bytes + p->first_byte + p->inside * (words ? 4 : 1), bytes_end, p->width, size, t,
               t + latents.group_tokens, p->channels, minimum.data() + p->first_channel,
               step.data() + p->first_channel, out + p->first_channel - first, out_row);
      }
    }
  }

  // The same turned round, (channels, out_row).
  void read_across(int64_t first_run, int64_t last_run, float* out, int64_t out_row) {
    if (first_run == last_run) return;
    const int64_t first = latents.runs[first_run].first_channel, size = latents.block_size;
    const int64_t count = latents.channels_before(last_run) - first;
    if (type == at::kByte && size == USUAL && latents.group_tokens == USUAL && out_row == USUAL) {
      read_ranges(first, count, 0);
      for (const Run* p = latents.runs + first_run; p < latents.runs + last_run; ++p)
        UNPACK_ACROSS[p->bits](bytes + p->first_byte + p->inside * 4, p->width, p->channels,
                               minimum.data() + p->first_channel, step.data() + p->first_channel,
                               out + (p->first_channel - first) * out_row);
      return;
    }
    if (type == at::kFloat)
      return transpose(reinterpret_cast<const float*>(bytes) + first, latents.rank, size, count, out, out_row);
    beside.resize(size * count);
    read(first_run, last_run, beside.data(), count);
    transpose(beside.data(), count, size, count, out, out_row);
  }

 private:
  // The segment of a block, whose index becomes that within it.
  size_t segment_of(int64_t& index) const {
    size_t segment = 0;
    for (; index >= latents.data[segment].size(1); ++segment) index -= latents.data[segment].size(1);
    return segment;
  }

  // From sizes: the stride of a dimension of one block may be anything.
  static int64_t block_bytes(const at::Tensor& data) {
    return data.element_size() * data.size(2) * (data.dim() == 4 ? data.size(3) : 1);
  }

  static const uint8_t* bytes_of(const at::Tensor& data, int64_t batch, int64_t index) {
    return static_cast<const uint8_t*>(data.const_data_ptr()) + data.element_size() * batch * data.stride(0) +
           index * block_bytes(data);
  }

  template <typename T>
  void copy(int64_t first, int64_t count, float* out, int64_t out_row) const {
    const T* from = reinterpret_cast<const T*>(bytes) + first;
    for (int64_t t = 0; t < latents.block_size; ++t)
      for (int64_t k = 0; k < count; ++k) out[t * out_row + k] = from[t * latents.rank + k];
  }

  // Minimum and step of channels, for one group of tokens.
  void read_ranges(int64_t first, int64_t count, int64_t group) {
    for (int64_t k = first; k < first + count; ++k) {
      const uint32_t pair = pairs[latents.range_of[k] + group * latents.stride_of[k]];
      minimum[k] = widened(pair & 0xffff), step[k] = widened(pair >> 16);
    }
  }

  const Latents& latents;
  std::vector<float> minimum, step, beside;  // of every channel; some channels side by side
  at::ScalarType type;
  const uint8_t *bytes, *bytes_end;  // of the block; of its segment
  const uint32_t* pairs;
};

}  // namespace cskv
