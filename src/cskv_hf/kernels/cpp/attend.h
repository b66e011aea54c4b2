// Attention of a few queries to a compressed past, in one pass (Dao et al. 2023, "Flash-Decoding"): threads share the
// blocks of latents; keys are rebuilt, turned and scored, scores become weights relative to a running maximum, and
// weights sum up latents of values, block by block in a core's cache. Then the threads' sums and the exact tokens
// meet. The torch code in ../../attention.py is the oracle.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "latents.h"
#include "rope.h"

namespace cskv {

constexpr float LOWEST = std::numeric_limits<float>::lowest() / 2;  // no score that counts is less

// Adds to scores (rows, wide) of q (rows, 2 * half) what PAIRS pairs of channels give of WIDE tokens: channels f and
// f + half of their keys are rebuilt in registers, as `up` (2 * half, up_row) times latents (rank, wide) plus means,
// and turned by RoPE there. cos and sin: (half, wide). All from channel f on; the first pairs set the scores.
template <int PAIRS>
void score_pairs(const float* up, int64_t up_row, const float* latents, int64_t wide, int64_t rank, const float* mean,
                 const float* cos, const float* sin, const float* q, int64_t rows, int64_t half, bool set,
                 float* scores) {
  Vector first[PAIRS][VECTORS], second[PAIRS][VECTORS];
  for (int64_t f = 0; f < PAIRS; ++f)
    for (int64_t v = 0; v < VECTORS; ++v) first[f][v] = Vector{} + mean[f], second[f][v] = Vector{} + mean[half + f];
  for (int64_t k = 0; k < rank; ++k) {
    Vector latent[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) latent[v] = at(latents + k * wide + v * LANES);
    for (int64_t f = 0; f < PAIRS; ++f)
      for (int64_t v = 0; v < VECTORS; ++v) {
        first[f][v] += up[f * up_row + k] * latent[v];
        second[f][v] += up[(half + f) * up_row + k] * latent[v];
      }
  }
  for (int64_t f = 0; f < PAIRS; ++f)
    for (int64_t v = 0; v < VECTORS; ++v) {
      const Vector c = at(cos + f * wide + v * LANES), s = at(sin + f * wide + v * LANES), x = first[f][v];
      first[f][v] = x * c - second[f][v] * s;
      second[f][v] = second[f][v] * c + x * s;
    }
  for (int64_t row = 0; row < rows; ++row, q += 2 * half, scores += wide)
    for (int64_t v = 0; v < VECTORS; ++v) {
      Vector score = set ? Vector{} : at(scores + v * LANES), other = {};
      for (int64_t f = 0; f < PAIRS; ++f) score += q[f] * first[f][v], other += q[half + f] * second[f][v];
      at(scores + v * LANES) = score + other;
    }
}

// Scores (rows, wide) of the queries q (rows, 2 * half) of a KV head, whose keys are rebuilt.
inline void score_rebuilt(const float* up, int64_t up_row, const float* latents, int64_t wide, int64_t rank,
                          const float* mean, const float* cos, const float* sin, const float* q, int64_t rows,
                          int64_t half, float* scores) {
  constexpr int64_t PAIRS = ROWS / 2;
  for (int64_t t = 0; t < wide; t += WIDE)
    for (int64_t f = 0, count; f < half; f += count) {
      count = half - f >= PAIRS ? PAIRS : 1;
      const auto score = count == PAIRS ? score_pairs<PAIRS> : score_pairs<1>;
      score(up + f * up_row, up_row, latents + t, wide, rank, mean + f, cos + f * wide + t, sin + f * wide + t, q + f,
            rows, half, f == 0, scores + t);
    }
}

// Products of rows of a (rows, depth) and rows of b (columns, depth) -> out (rows, out_row).
inline void dot_rows(int64_t rows, const float* a, int64_t a_row, int64_t columns, const float* b, int64_t depth,
                     float* out, int64_t out_row) {
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      const float *left = a + i * a_row, *right = b + j * depth;
      Vector sums = {};
      int64_t k = 0;
      for (; k + LANES <= depth; k += LANES) sums += at(left + k) * at(right + k);
      float dot = sum(sums);
      for (; k < depth; ++k) dot += left[k] * right[k];
      out[i * out_row + j] = dot;
    }
}

// The scores (wide) of a row become weights relative to `maximum`, which they may raise; returns their sum, and in
// `decay` by how much what was summed before has to shrink.
inline float weigh(float* scores, int64_t wide, float& maximum, float& decay) {
  Vector highest = at(scores);
  for (int64_t t = LANES; t < wide; t += LANES) highest = larger(at(scores + t), highest);
  const float raised = std::max(maximum, largest(highest));
  decay = raised > maximum ? std::exp(maximum - raised) : 1;
  maximum = raised;
  Vector sums = {};
  for (int64_t t = 0; t < wide; t += LANES) sums += at(scores + t) = exponential(at(scores + t) - raised);
  return sum(sums);
}

// Of exact tokens and then latents, for each query: (batch or 1, 1, queries or 1, columns), bool or to be added.
struct Mask {
  const std::optional<at::Tensor>& mask;

  // Applied to `count` scores of a query, from `column` on.
  void apply(float* scores, int64_t batch, int64_t query, int64_t column, int64_t count) const {
    if (!mask.has_value()) return;
    const int64_t row = (mask->size(0) > 1 ? batch * mask->size(2) : 0) + (mask->size(2) > 1 ? query : 0);
    const int64_t start = row * mask->size(3) + column;
    if (mask->scalar_type() == at::kBool) {
      const bool* seen = mask->const_data_ptr<bool>() + start;
      for (int64_t t = 0; t < count; ++t) scores[t] = seen[t] ? scores[t] : -INFINITY;
    } else {
      const float* added = mask->const_data_ptr<float>() + start;
      for (int64_t t = 0; t < count; ++t) scores[t] += added[t];
    }
  }

  int64_t queries() const { return mask.has_value() ? mask->size(2) : 1; }
};

// What torch's own operations would find wrong.
inline void check_sizes(const at::Tensor& query, const at::Tensor& exact_keys, const at::Tensor& exact_values,
                        const std::optional<at::Tensor>& mask, const at::Tensor& key_B, const at::Tensor& key_mean,
                        const at::Tensor& value_B, const at::Tensor& value_mean, const at::Tensor& first_run,
                        int64_t num_old) {
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  const int64_t num_exact = exact_keys.size(2), of_group = key_B.size(0) / dim;
  for (const at::Tensor& tensor : {query, exact_keys, exact_values, key_B, key_mean, value_B, value_mean})
    TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == at::kFloat, "Compact float32 is needed.");
  for (const at::Tensor& exact : {exact_keys, exact_values})
    TORCH_CHECK(exact.sizes() == at::IntArrayRef({batch, heads, num_exact, dim}), "Exact keys or values of sizes ",
                exact.sizes(), " where they should be ", batch, ", ", heads, ", ", num_exact, ", ", dim, ".");
  TORCH_CHECK(of_group > 0 && key_B.size(0) == of_group * dim && heads % of_group == 0 &&
                  first_run.numel() == heads / of_group + 1 && key_mean.numel() == heads * dim &&
                  value_mean.numel() == heads * dim && value_B.size(0) == heads * dim,
              "Factors of other sizes than the keys: ", key_B.sizes(), " and ", value_B.sizes(), ".");
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->is_contiguous() && mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == batch) &&
                  mask->size(1) == 1 && mask->size(2) > 0 && rows % mask->size(2) == 0 &&
                  mask->size(3) == num_exact + num_old &&
                  (mask->scalar_type() == at::kBool || mask->scalar_type() == at::kFloat),
              "A mask of sizes ", mask->sizes(), " for ", batch, " rows, ", rows, " queries of a KV head and ",
              num_exact + num_old, " tokens.");
}

// The queries (batches, heads, rows, dim), scaled; the rows of a KV head are those of its query heads, one after the
// other.
struct Queries {
  int64_t batches, heads, rows, dim;
  std::vector<float> scaled;

  Queries(const at::Tensor& query, double scale)
      : batches(query.size(0)), heads(query.size(1)), rows(query.size(2)), dim(query.size(3)),
        scaled(query.const_data_ptr<float>(), query.const_data_ptr<float>() + query.numel()) {
    for (float& x : scaled) x *= float(scale);
  }

  const float* of(int64_t batch, int64_t head) const { return scaled.data() + (batch * heads + head) * rows * dim; }
};

// What the queries of a row of the batch see in one split of the past: running maximum (heads * rows) of scores, sums
// of weights, and sums (heads * rows, wide_rank) of latents of values by these weights.
struct Seen {
  std::vector<float> maximum, total, latents;
};

// Attention to the latents of blocks `block` to `last` (exclusive) of a row of the batch. key_B: (heads of a group *
// dim, rank). means: (heads, dim). starts: of each key group's runs.
inline Seen attend_to_latents(const Queries& queries, const Mask& mask, int64_t num_exact, const Latents& keys,
                              const Latents& values, const Rope& rope, const at::Tensor& key_B, const float* means,
                              const int32_t* starts, int64_t batch, int64_t block, int64_t last) {
  const int64_t heads = queries.heads, rows = queries.rows, dim = queries.dim, all_rows = heads * rows;
  const int64_t of_group = key_B.size(0) / dim, half = dim / 2, size = keys.block_size, wide = whole(size, WIDE);
  const int64_t wide_rank = whole(values.rank, WIDE);
  const float* up = key_B.const_data_ptr<float>();
  Reader of_keys(keys), of_values(values);
  std::vector<float> latents(keys.rank * wide), cos(half * wide), sin(half * wide), scores(all_rows * wide);
  std::vector<float> tokens(size * wide_rank);
  Seen seen{std::vector<float>(all_rows, LOWEST), std::vector<float>(all_rows),
            std::vector<float>(all_rows * wide_rank)};
  for (; block < last; ++block) {
    rope.turn(batch, block * size, size, wide, cos.data(), sin.data());
    of_keys.go_to(batch, block), of_values.go_to(batch, block);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t group = head / of_group, in_group = head % of_group;
      const int64_t first = keys.channels_before(starts[group]);
      const int64_t rank = keys.channels_before(starts[group + 1]) - first;
      if (in_group == 0) of_keys.read_across(starts[group], starts[group + 1], latents.data(), wide);
      if (block + 1 < last) of_keys.prefetch(batch, block + 1, head, heads);
      of_values.prefetch(batch, block, head, heads);
      score_rebuilt(up + in_group * dim * keys.rank + first, keys.rank, latents.data(), wide, rank, means + head * dim,
                    cos.data(), sin.data(), queries.of(batch, head), rows, half, scores.data() + head * rows * wide);
    }
    for (int64_t row = 0; row < all_rows; ++row) {
      float *of_row = scores.data() + row * wide, decay;
      mask.apply(of_row, batch, row % mask.queries(), num_exact + block * size, size);
      std::fill(of_row + size, of_row + wide, -INFINITY);
      const float added = weigh(of_row, wide, seen.maximum[row], decay);
      seen.total[row] = seen.total[row] * decay + added;
      if (decay != 1)
        for (int64_t c = 0; c < wide_rank; ++c) seen.latents[row * wide_rank + c] *= decay;
    }
    of_values.read(0, values.num_runs, tokens.data(), wide_rank);
    for (int64_t c = 0; c < wide_rank; c += WIDE)
      multiply_rows(all_rows, scores.data(), wide, tokens.data() + c, wide_rank, size, seen.latents.data() + c,
                    wide_rank);
  }
  return seen;
}

// What a KV head's queries see in the exact tokens (num_exact, dim) and, `seen` of each split, in latents of values,
// which `up` (dim, rank) and `mean` make values of -> out (rows, dim).
inline void join(const Queries& queries, const Mask& mask, const float* exact_keys, const float* exact_values,
                 int64_t num_exact, const Seen* seen, int64_t splits, const float* up, int64_t rank, const float* mean,
                 int64_t batch, int64_t head, float* out) {
  const int64_t rows = queries.rows, dim = queries.dim, wide_dim = whole(dim, WIDE), wide_rank = whole(rank, WIDE);
  const int64_t wide = whole(std::max<int64_t>(num_exact, 1), WIDE);
  std::vector<float> scores(rows * wide), padded(num_exact * wide_dim), near(rows * wide_dim), far(rows * dim);
  std::vector<float> latent(rows * wide_rank), total(rows), old(rows);
  dot_rows(rows, queries.of(batch, head), dim, num_exact, exact_keys, dim, scores.data(), wide);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = head * rows + row;
    float *of_row = scores.data() + row * wide, maximum = LOWEST, decay;
    mask.apply(of_row, batch, row % mask.queries(), 0, num_exact);
    std::fill(of_row + num_exact, of_row + wide, -INFINITY);
    for (int64_t split = 0; split < splits; ++split) maximum = std::max(maximum, seen[split].maximum[at]);
    total[row] = weigh(of_row, wide, maximum, decay);
    for (int64_t split = 0; split < splits; ++split) {
      const float share = std::exp(seen[split].maximum[at] - maximum);
      old[row] += share * seen[split].total[at];
      for (int64_t c = 0; c < wide_rank; ++c)
        latent[row * wide_rank + c] += share * seen[split].latents[at * wide_rank + c];
    }
    total[row] = std::max(total[row] + old[row], std::numeric_limits<float>::min());
  }
  for (int64_t t = 0; t < num_exact; ++t) std::copy_n(exact_values + t * dim, dim, padded.data() + t * wide_dim);
  for (int64_t d = 0; d < wide_dim; d += WIDE)
    multiply_rows(rows, scores.data(), wide, padded.data() + d, wide_dim, num_exact, near.data() + d, wide_dim);
  dot_rows(rows, latent.data(), wide_rank, dim, up, rank, far.data(), dim);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < dim; ++d)
      out[row * dim + d] = (near[row * wide_dim + d] + far[row * dim + d] + old[row] * mean[d]) / total[row];
}

// Attention of query (batch, heads, rows, head_dim), times `scale`, to exact tokens and latents; all in float32.
// first_run: (groups + 1). key_B: (heads of a group * head_dim, rank). key_mean, value_mean: (heads, head_dim).
// positions: (batch or 1, num_old) int32. inv_freq: (head_dim / 2), or ((batch or 1,) num_old, head_dim / 2). cos and
// sin are scaled, and rounded to `dtype`. value_B: (heads * head_dim, rank). key_sizes, value_sizes: of a block, and
// of a range in tokens and channels.
inline at::Tensor attend(const at::Tensor& query, double scale, const at::Tensor& exact_keys,
                         const at::Tensor& exact_values, const std::optional<at::Tensor>& mask,
                         at::TensorList key_data, at::TensorList key_ranges, const at::Tensor& key_runs,
                         const at::Tensor& first_run, const at::Tensor& key_B, const at::Tensor& key_mean,
                         const at::Tensor& positions, const at::Tensor& inv_freq, double scaling, at::ScalarType dtype,
                         at::IntArrayRef key_sizes, at::TensorList value_data, at::TensorList value_ranges,
                         const at::Tensor& value_runs, const at::Tensor& value_B, const at::Tensor& value_mean,
                         at::IntArrayRef value_sizes) {
  const int64_t num_exact = exact_keys.size(2), num_old = positions.size(1);
  const Latents keys(key_data, key_ranges, key_runs, key_B.size(1), key_sizes);
  const Latents values(value_data, value_ranges, value_runs, value_B.size(1), value_sizes);
  const Rope rope(positions, inv_freq, scaling, dtype);
  keys.check(query.size(0), num_old);
  values.check(query.size(0), num_old);
  check_sizes(query, exact_keys, exact_values, mask, key_B, key_mean, value_B, value_mean, first_run, num_old);
  TORCH_CHECK(2 * rope.half == query.size(3) && rope.serves(query.size(0)) && keys.block_size == values.block_size,
              "Positions, frequencies and blocks of other sizes than the keys'.");
  const Queries queries(query, scale);
  const Mask masked{mask};
  const int64_t batches = queries.batches, heads = queries.heads, dim = queries.dim, blocks = keys.blocks();
  const int64_t threads = at::get_num_threads();  // as many splits as give each thread as much
  const int64_t splits = std::max<int64_t>(1, std::min(blocks, threads / std::gcd(threads, batches)));
  std::vector<Seen> seen(batches * splits);
  at::parallel_for(0, batches * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / splits, split = item % splits;
      seen[item] = attend_to_latents(queries, masked, num_exact, keys, values, rope, key_B,
                                     key_mean.const_data_ptr<float>(), first_run.const_data_ptr<int32_t>(), batch,
                                     split * blocks / splits, (split + 1) * blocks / splits);
    }
  });
  at::Tensor out = at::empty(query.sizes(), query.options());
  at::parallel_for(0, batches * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t batch = item / heads, head = item % heads, exact = item * num_exact * dim;
      join(queries, masked, exact_keys.const_data_ptr<float>() + exact, exact_values.const_data_ptr<float>() + exact,
           num_exact, seen.data() + batch * splits, splits, value_B.const_data_ptr<float>() + head * dim * values.rank,
           values.rank, value_mean.const_data_ptr<float>() + head * dim, batch, head,
           out.data_ptr<float>() + item * queries.rows * dim);
    }
  });
  return out;
}

}  // namespace cskv
