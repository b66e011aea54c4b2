// Attention of a few queries to a compressed past, on a CPU. Latents are unpacked, and keys rebuilt, turned and
// scored, block by block in a core's cache; neither reaches memory. The torch code in ../attention.py is the oracle;
// cpu.py compiles and calls this.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace {

constexpr int64_t WIDE = 32;  // columns of a product that are summed in registers
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 8;  // 16 of 32 registers hold sums
#else
constexpr int64_t LANES = 8, ROWS = 2;  // 8 of 16
#endif
constexpr int64_t VECTORS = WIDE / LANES;
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// out = start + a b for N rows of a (N, depth) and WIDE columns of b (depth, WIDE).
template <int N>
inline void multiply(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, const float* start,
                     int64_t start_row, float* out, int64_t out_row) {
  Vector sums[N][VECTORS];
  for (int64_t i = 0; i < N; ++i)
    for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] = *(const Vector*)(start + i * start_row + v * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) right[v] = *(const Vector*)(b + k * b_row + v * LANES);
    for (int64_t i = 0; i < N; ++i)
      for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] += a[i * a_row + k] * right[v];
  }
  for (int64_t i = 0; i < N; ++i)
    for (int64_t v = 0; v < VECTORS; ++v) *(Vector*)(out + i * out_row + v * LANES) = sums[i][v];
}

inline void multiply_rows(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth,
                          const float* start, int64_t start_row, float* out, int64_t out_row) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    multiply<ROWS>(a + i * a_row, a_row, b, b_row, depth, start + i * start_row, start_row, out + i * out_row,
                   out_row);
  for (; i + 4 <= rows; i += 4)
    multiply<4>(a + i * a_row, a_row, b, b_row, depth, start + i * start_row, start_row, out + i * out_row, out_row);
  for (; i < rows; ++i)
    multiply<1>(a + i * a_row, a_row, b, b_row, depth, start + i * start_row, start_row, out + i * out_row, out_row);
}

// How the latents of one layer are stored: segments (batch, blocks, ...) of codes and of ranges, for both of which
// plain latents stand. A piece is a row of the table of `chunks_of` in cpu.py.
struct Stored {
  at::TensorList data, ranges;
  const int32_t* pieces;
  int64_t rank, block_size, group_tokens, group_channels;

  Stored(at::TensorList data, at::TensorList ranges, const at::Tensor& pieces, int64_t rank, at::IntArrayRef sizes)
      : data(data), ranges(ranges), pieces(pieces.const_data_ptr<int32_t>()), rank(rank), block_size(sizes[0]),
        group_tokens(sizes[1]), group_channels(sizes[2]) {}

  int64_t blocks() const {
    int64_t sum = 0;
    for (const at::Tensor& segment : data) sum += segment.size(1);
    return sum;
  }

  // That the segments hold what the pieces and the number of tokens say; nothing below looks again.
  void check(int64_t batch, int64_t num_tokens, const at::Tensor& table) const {
    int64_t channels = 0, code_bytes = 0, num_ranges = 0;
    for (int64_t p = 0; p < table.size(0); ++p) {
      const int32_t* piece = pieces + 8 * p;
      channels += piece[1];
      code_bytes = std::max(code_bytes, piece[3] + int64_t(piece[4]) * piece[2] * block_size / 8);
      num_ranges = std::max(num_ranges, piece[6] + int64_t(piece[7]) * (block_size / group_tokens));
    }
    TORCH_CHECK(channels == rank, "The latents have ", channels, " channels, the factors ", rank, ".");
    TORCH_CHECK(blocks() * block_size == num_tokens, "There are latents of ", blocks() * block_size,
                " tokens where there should be ", num_tokens, ".");
    for (size_t i = 0; i < data.size(); ++i) {
      const bool packed = data[i].scalar_type() == at::kByte;
      TORCH_CHECK(data[i].size(0) == batch && ranges[i].size(0) == batch && ranges[i].size(1) == data[i].size(1) &&
                      (packed ? data[i].size(2) == code_bytes && ranges[i].size(2) == num_ranges
                              : data[i].size(2) == block_size && data[i].size(3) == rank),
                  "Latents of other sizes than the factors': ", data[i].sizes(), " and ", ranges[i].sizes(), ".");
    }
  }
};

inline void store(const Vector& values, int64_t count, float* out) {
  if (count == LANES) {
    *(Vector*)out = values;
    return;
  }
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(out, (1u << count) - 1, (__m512)values);
#else
  for (int64_t lane = 0; lane < count; ++lane) out[lane] = values[lane];
#endif
}

// Tokens first to last (exclusive) of a piece with one range per channel. Planes as in `pack` of quantize.py: token
// t lies in row t % rows, at place t / rows, and four rows of a channel make a word. So many channels at a time as
// there are lanes; where there are fewer, their words are copied first, so that none is read that is not there.
// minimum and step have LANES numbers to spare.
template <int BITS>
void unpack(const uint8_t* bytes, int64_t width, int64_t block_size, int64_t first, int64_t last, int64_t count,
            const float* minimum, const float* step, float* out, int64_t out_row) {
  const int64_t words4 = block_size / 8, words2 = block_size / 16, words1 = block_size / 32, words = BITS * words1;
  std::vector<int32_t> copy;
  for (int64_t k = 0; k < count; k += LANES) {
    const int64_t lanes = std::min(LANES, count - k);
    const auto* from = reinterpret_cast<const int32_t*>(bytes) + k;
    int64_t row = width;
    if (lanes < LANES) {
      copy.assign(words * LANES, 0);
      for (int64_t w = 0; w < words; ++w) std::copy_n(from + w * width, lanes, copy.begin() + w * LANES);
      from = copy.data(), row = LANES;
    }
    const int32_t *plane2 = from + (BITS & 4) * words1 * row, *plane1 = from + (BITS & 6) * words1 * row;
    const Vector low = *(const Vector*)(minimum + k), steps = *(const Vector*)(step + k);
    for (int64_t t = first; t < last; ++t) {
      const int byte = 8 * (t % 4), q = t / 4;
      Ints code = {};
      if (BITS == 8) code = *(const Ints*)(from + q * row) >> byte & 255;
      if (BITS & 4) code = *(const Ints*)(from + q % words4 * row) >> (byte + 4 * int(q / words4)) & 15;
      if (BITS & 2)
        code |= (*(const Ints*)(plane2 + q % words2 * row) >> (byte + 2 * int(q / words2)) & 3) << (BITS & 4);
      if (BITS & 1) code |= (*(const Ints*)(plane1 + q % words1 * row) >> (byte + int(q / words1)) & 1) << (BITS & 6);
      store(low + steps * __builtin_convertvector(code, Vector), lanes, out + t * out_row + k);
    }
  }
}

// The same where rows do not make words, byte by byte.
template <int BITS>
void unpack_bytes(const uint8_t* codes, int64_t width, int64_t block_size, int64_t first, int64_t last, int64_t count,
            const float* minimum, const float* step, float* out, int64_t out_row) {
  if (BITS == 8) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t k = 0; k < count; ++k) out[t * out_row + k] = minimum[k] + step[k] * codes[t * width + k];
    return;
  }
  const int64_t rows4 = block_size / 2, rows2 = block_size / 4, rows1 = block_size / 8;
  const uint8_t* plane2 = codes + (BITS & 4) * block_size / 8 * width;
  const uint8_t* plane1 = codes + (BITS & 6) * block_size / 8 * width;
  for (int64_t t = first; t < last; ++t) {
    const uint8_t *row4 = codes + t % rows4 * width, *row2 = plane2 + t % rows2 * width;
    const uint8_t* row1 = plane1 + t % rows1 * width;
    const int shift4 = 4 * (t / rows4), shift2 = 2 * (t / rows2), shift1 = t / rows1;
    float* target = out + t * out_row;
    for (int64_t k = 0; k < count; ++k) {
      int code = 0;
      if (BITS & 4) code = row4[k] >> shift4 & 15;
      if (BITS & 2) code |= (row2[k] >> shift2 & 3) << (BITS & 4);
      if (BITS & 1) code |= (row1[k] >> shift1 & 1) << (BITS & 6);
      target[k] = minimum[k] + step[k] * code;
    }
  }
}

typedef void (*Unpack)(const uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*, float*,
                       int64_t);
constexpr Unpack UNPACK[] = {nullptr,   unpack<1>, unpack<2>, unpack<3>, unpack<4>,
                             unpack<5>, unpack<6>, unpack<7>, unpack<8>};
constexpr Unpack UNPACK_BYTES[] = {nullptr,         unpack_bytes<1>, unpack_bytes<2>, unpack_bytes<3>, unpack_bytes<4>,
                                   unpack_bytes<5>, unpack_bytes<6>, unpack_bytes<7>, unpack_bytes<8>};

void read_packed(const Stored& stored, const at::Tensor& data, const at::Tensor& range_data, int64_t batch,
                 int64_t block, const int32_t* piece, float* out, int64_t out_row) {
  const int64_t count = piece[1], bits = piece[2], width = piece[4], inside = piece[5], groups = piece[7];
  const bool words = stored.block_size % 32 == 0;
  const auto* codes = data.const_data_ptr<uint8_t>() + batch * data.stride(0) + block * data.size(2) + piece[3] +
                      inside * (words ? 4 : 1);
  const Unpack unpack = (words ? UNPACK : UNPACK_BYTES)[bits];
  const auto* ranges = range_data.const_data_ptr<at::Half>() + batch * range_data.stride(0) +
                       (block * range_data.size(2) + piece[6]) * 2;
  std::vector<float> minimum(count + LANES), step(count + LANES);
  for (int64_t first = 0; first < stored.block_size; first += stored.group_tokens, ranges += 2 * groups) {
    for (int64_t k = 0; k < count; ++k) {
      const at::Half* range = ranges + (inside + k) / stored.group_channels * 2;
      minimum[k] = range[0], step[k] = range[1];
    }
    unpack(codes, width, stored.block_size, first, first + stored.group_tokens, count, minimum.data(), step.data(),
           out, out_row);
  }
}

template <typename T>
void read_plain(const Stored& stored, const at::Tensor& data, int64_t batch, int64_t block, const int32_t* piece,
                float* out, int64_t out_row) {
  const T* from =
      data.const_data_ptr<T>() + batch * data.stride(0) + block * stored.block_size * stored.rank + piece[0];
  for (int64_t t = 0; t < stored.block_size; ++t)
    for (int64_t k = 0; k < piece[1]; ++k) out[t * out_row + k] = from[t * stored.rank + k];
}

// The latents of some pieces of a block of a row of the batch, (block_size, out_row), from `first_channel` on.
void read(const Stored& stored, int64_t batch, int64_t block, int64_t first_piece, int64_t last_piece,
          int64_t first_channel, float* out, int64_t out_row) {
  size_t segment = 0;
  for (; block >= stored.data[segment].size(1); ++segment) block -= stored.data[segment].size(1);
  const at::Tensor &data = stored.data[segment], &ranges = stored.ranges[segment];
  for (int64_t p = first_piece; p < last_piece; ++p) {
    const int32_t* piece = stored.pieces + 8 * p;
    float* target = out + piece[0] - first_channel;
    switch (data.scalar_type()) {
      case at::kByte: read_packed(stored, data, ranges, batch, block, piece, target, out_row); break;
      case at::kFloat: read_plain<float>(stored, data, batch, block, piece, target, out_row); break;
      case at::kHalf: read_plain<at::Half>(stored, data, batch, block, piece, target, out_row); break;
      default: read_plain<at::BFloat16>(stored, data, batch, block, piece, target, out_row);
    }
  }
}

// Scores of N rows of q (N, 2 * half) against keys (tokens, key_row), which RoPE turns on the way: their channels f
// and f + half are a pair. cos and sin: (tokens, half). out: (N, out_row).
template <int N>
void turned_scores(const float* q, const float* keys, int64_t key_row, int64_t tokens, int64_t half, const float* cos,
                   const float* sin, float* out, int64_t out_row) {
  for (int64_t t = 0; t < tokens; ++t, keys += key_row, cos += half, sin += half) {
    Vector sums[N] = {};
    int64_t f = 0;
    for (; f + LANES <= half; f += LANES) {
      const Vector first = *(const Vector*)(keys + f), second = *(const Vector*)(keys + half + f);
      const Vector c = *(const Vector*)(cos + f), s = *(const Vector*)(sin + f);
      const Vector turned_first = first * c - second * s, turned_second = second * c + first * s;
      for (int64_t i = 0; i < N; ++i)
        sums[i] += turned_first * *(const Vector*)(q + 2 * half * i + f) +
                   turned_second * *(const Vector*)(q + 2 * half * i + half + f);
    }
    for (int64_t i = 0; i < N; ++i) {
      float sum = 0;
      for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[i][lane];
      for (int64_t g = f; g < half; ++g)
        sum += (keys[g] * cos[g] - keys[half + g] * sin[g]) * q[2 * half * i + g] +
               (keys[half + g] * cos[g] + keys[g] * sin[g]) * q[2 * half * i + half + g];
      out[i * out_row + t] = sum;
    }
  }
}

// For each head of a group and each WIDE rows of its matrix (heads * head_dim, rank): (rank, WIDE), zeros below.
std::vector<float> in_panels(const at::Tensor& matrix, int64_t heads, int64_t wide_dim) {
  const int64_t rank = matrix.size(1), head_dim = matrix.size(0) / heads, panels = wide_dim / WIDE;
  const auto* from = matrix.const_data_ptr<float>();
  std::vector<float> out(heads * wide_dim * rank);
  at::parallel_for(0, heads * panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel % panels * WIDE, count = std::min(WIDE, head_dim - first);
      const float* rows = from + (panel / panels * head_dim + first) * rank;
      float* to = out.data() + panel * rank * WIDE;
      for (int64_t c = 0; c < rank; ++c)
        for (int64_t d = 0; d < count; ++d) to[c * WIDE + d] = rows[d * rank + c];
    }
  });
  return out;
}

// Writes scores (batch, heads, rows, columns) from `first_column` on: of query (batch, heads, rows, head_dim) against
// keys. first_piece: (groups + 1). key_B: (heads of a group * head_dim, rank). mean: (heads, head_dim). cos, sin:
// (batch or 1, num_old, head_dim / 2). sizes: of a block, and of a range in tokens and channels.
void write_scores(at::Tensor& scores, int64_t first_column, const at::Tensor& query, at::TensorList data,
                  at::TensorList ranges, const at::Tensor& pieces, const at::Tensor& first_piece,
                  const at::Tensor& key_B, const at::Tensor& mean, const at::Tensor& cos, const at::Tensor& sin,
                  at::IntArrayRef sizes) {
  const Stored stored(data, ranges, pieces, key_B.size(1), sizes);
  const int64_t heads = query.size(1), rows = query.size(2), head_dim = query.size(3), columns = scores.size(3);
  const int64_t heads_per_group = key_B.size(0) / head_dim, wide_dim = (head_dim + WIDE - 1) / WIDE * WIDE;
  const int64_t blocks = stored.blocks(), block_size = stored.block_size;
  const int64_t turn_row = cos.size(0) > 1 ? cos.size(1) * head_dim / 2 : 0;
  const auto* q = query.const_data_ptr<float>();
  const auto *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
  const auto* starts = first_piece.const_data_ptr<int32_t>();
  auto* target = scores.data_ptr<float>();
  const std::vector<float> B = in_panels(key_B, heads_per_group, wide_dim);
  std::vector<float> means(heads * wide_dim);
  for (int64_t head = 0; head < heads; ++head)
    std::copy_n(mean.const_data_ptr<float>() + head * head_dim, head_dim, means.begin() + head * wide_dim);
  at::parallel_for(0, query.size(0) * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> latents(block_size * stored.rank), keys(block_size * wide_dim);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / blocks, block = item % blocks;
      int64_t channel = 0;
      for (int64_t group = 0; group < heads / heads_per_group; ++group) {
        int64_t rank = 0;
        for (int64_t p = starts[group]; p < starts[group + 1]; ++p) rank += stored.pieces[8 * p + 1];
        read(stored, batch, block, starts[group], starts[group + 1], channel, latents.data(), rank);
        for (int64_t of_group = 0; of_group < heads_per_group; ++of_group) {
          const int64_t head = group * heads_per_group + of_group;
          for (int64_t d = 0; d < wide_dim; d += WIDE)
            multiply_rows(block_size, latents.data(), rank,
                          B.data() + (of_group * wide_dim + d) * stored.rank + channel * WIDE, WIDE, rank,
                          means.data() + head * wide_dim + d, 0, keys.data() + d, wide_dim);
          const int64_t turn = batch * turn_row + block * block_size * head_dim / 2;
          for (int64_t row = 0, count; row < rows; row += count) {
            const int64_t at = (batch * heads + head) * rows + row;
            count = rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
            (count == 4 ? turned_scores<4> : count == 2 ? turned_scores<2> : turned_scores<1>)(
                q + at * head_dim, keys.data(), wide_dim, block_size, head_dim / 2, cosines + turn, sines + turn,
                target + at * columns + first_column + block * block_size, columns);
          }
        }
        channel += rank;
      }
    }
  });
}

// weights (batch, rows, columns), from `first_column` on, times latents: (batch, rows, rank).
at::Tensor sum_values(const at::Tensor& weights, int64_t first_column, at::TensorList data, at::TensorList ranges,
                      const at::Tensor& pieces, int64_t rank, at::IntArrayRef sizes) {
  const Stored stored(data, ranges, pieces, rank, sizes);
  const int64_t batches = weights.size(0), rows = weights.size(1), columns = weights.size(2);
  const int64_t blocks = stored.blocks(), wide_rank = (rank + WIDE - 1) / WIDE * WIDE;
  const int64_t splits = (at::get_num_threads() + batches - 1) / batches;
  at::Tensor sums = at::zeros({splits, batches, rows, wide_rank}, weights.options());
  const auto* weight = weights.const_data_ptr<float>();
  auto* out = sums.data_ptr<float>();
  at::parallel_for(0, splits * batches, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> latents(stored.block_size * wide_rank);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t split = item / batches, batch = item % batches;
      float* sum = out + item * rows * wide_rank;
      for (int64_t block = split * blocks / splits; block < (split + 1) * blocks / splits; ++block) {
        read(stored, batch, block, 0, pieces.size(0), 0, latents.data(), wide_rank);
        const float* of_block = weight + batch * rows * columns + first_column + block * stored.block_size;
        for (int64_t c = 0; c < wide_rank; c += WIDE)
          multiply_rows(rows, of_block, columns, latents.data() + c, wide_rank, stored.block_size, sum + c, wide_rank,
                        sum + c, wide_rank);
      }
    }
  });
  return sums.sum(0).narrow(-1, 0, rank);
}

// Attention of query (batch, heads, rows, head_dim), scaled, to exact tokens and latents; all in float32. mask: (batch
// or 1, 1, num_queries or 1, columns), bool or to be added, of exact tokens and then latents; a KV head's rows are
// those of its query heads, one after the other. key_sizes, value_sizes: of a block, and of a range in tokens and
// channels.
at::Tensor attend(const at::Tensor& query, const at::Tensor& exact_keys, const at::Tensor& exact_values,
                  const std::optional<at::Tensor>& mask, at::TensorList key_data, at::TensorList key_ranges,
                  const at::Tensor& key_pieces, const at::Tensor& first_piece, const at::Tensor& key_B,
                  const at::Tensor& key_mean, const at::Tensor& cos, const at::Tensor& sin, at::IntArrayRef key_sizes,
                  at::TensorList value_data, at::TensorList value_ranges, const at::Tensor& value_pieces,
                  const at::Tensor& value_B, const at::Tensor& value_mean, at::IntArrayRef value_sizes) {
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), head_dim = query.size(3);
  const int64_t num_exact = exact_keys.size(2), num_old = cos.size(1), rank = value_B.size(1);
  Stored(key_data, key_ranges, key_pieces, key_B.size(1), key_sizes).check(batch, num_old, key_pieces);
  Stored(value_data, value_ranges, value_pieces, rank, value_sizes).check(batch, num_old, value_pieces);
  TORCH_CHECK(2 * cos.size(2) == head_dim && sin.sizes() == cos.sizes() && cos.is_contiguous() &&
                  sin.is_contiguous() && (cos.size(0) == 1 || cos.size(0) == batch),
              "cos and sin are of other sizes than the keys: ", cos.sizes(), ".");
  at::Tensor scores = at::empty({batch, heads, rows, num_exact + num_old}, query.options());
  scores.narrow(3, 0, num_exact).copy_(query.matmul(exact_keys.mT()));
  write_scores(scores, num_exact, query, key_data, key_ranges, key_pieces, first_piece, key_B, key_mean, cos, sin,
               key_sizes);
  at::Tensor weights;
  if (mask.has_value()) {
    at::Tensor by_query = scores.view({batch, heads, -1, std::max<int64_t>(1, mask->size(2)), num_exact + num_old});
    const at::Tensor of_query = mask->unsqueeze(2);
    if (mask->scalar_type() == at::kBool)
      by_query.masked_fill_(~of_query, -INFINITY);
    else
      by_query.add_(of_query);
    const at::Tensor hidden = scores.amax(-1, true) < std::numeric_limits<float>::lowest() / 2;  // all of a row
    weights = scores.softmax(-1).masked_fill_(hidden, 0);
  } else {
    weights = scores.softmax(-1);
  }
  const at::Tensor latent = sum_values(weights.flatten(1, 2), num_exact, value_data, value_ranges, value_pieces, rank,
                                       value_sizes);
  const at::Tensor up = value_B.view({heads, head_dim, rank}).mT();
  at::Tensor out = weights.narrow(3, 0, num_exact).matmul(exact_values);
  out.add_(latent.view({batch, heads, rows, rank}).matmul(up));
  return out.addcmul_(weights.narrow(3, num_exact, num_old).sum(-1, true), value_mean.view({heads, 1, head_dim}));
}

TORCH_LIBRARY(cskv_hf, library) {
  library.def(
      "attend(Tensor query, Tensor exact_keys, Tensor exact_values, Tensor? mask, Tensor[] key_data, "
      "Tensor[] key_ranges, Tensor key_pieces, Tensor first_piece, Tensor key_B, Tensor key_mean, Tensor cos, "
      "Tensor sin, int[] key_sizes, Tensor[] value_data, Tensor[] value_ranges, Tensor value_pieces, Tensor value_B, "
      "Tensor value_mean, int[] value_sizes) -> Tensor");
}

TORCH_LIBRARY_IMPL(cskv_hf, CPU, library) { library.impl("attend", attend); }

}  // namespace
