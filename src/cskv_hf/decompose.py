"""Optimal and baseline low-rank factors from second moments: pure functions of tensors, in float64.

Symbols, for the keys (or values) of one layer: ``x`` the flattened state before RoPE, of size ``kv_dim``, seen as
`G` groups of ``group_dim = kv_dim / G`` consecutive channels; ``C = E[x xᵀ]`` its second moment (kv_dim, kv_dim);
``M`` the weight of an error (kv_dim, kv_dim), block-diagonal over the groups. Per group the factors are ``c = A x``
and ``x̂ = B c``, and they minimise ``E[(x - x̂)ᵀ M (x - x̂)]``: with U the leading eigenvectors of ``M^½ C M^½``,
``A = Uᵀ M^½`` and ``B = M^-½ U`` (Eckart-Young after the change of variable ``M^½ x``; CSKV eq. 1 is the case M =
I). The paper's SVD and ASVD initialisations have the same form with ``C`` replaced by ``W Wᵀ`` and ``W S² Wᵀ``:
``U_r U_rᵀ W`` is the truncated SVD of W, and ASVD's scaling S cancels on the right.

Centred factors leave the mean ``μ = E[x]`` to a constant: ``c = A (x - μ)`` and ``x̂ = B c + μ``, the same with the
covariance ``C - μ μᵀ`` in the place of C. Keys before RoPE lie so far from zero that this takes much of their energy
out of the latents, and it costs no byte per token.

Expectations may be over all tokens alike or weigh some more; factors can then meet data of another mean than theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DAMPING = 1e-6  # of the mean weight, so that a channel no query ever reads keeps an invertible M
UNREACHED = 1e-10  # of the largest variance; below it a channel's is what rounding leaves of directions without data
CANCELLED = 1e-13  # of a channel's mean square, in its variance: they are sums of float64
DRIVEN = 1e-6  # of the largest energy that weights give a direction; below it they hardly use it


@dataclass(frozen=True)
class Factors:
    """Factors of the keys or values of one layer, all groups side by side.

    Attributes:
        A: (rank, group_dim); row i reads the group that channel i belongs to.
        B: (group_dim, rank); column i writes that same group.
        ranks: channels per group; they sum to ``rank``. Channels are sorted by group, then by falling importance.
        spectrum: (rank,) share of the objective that each channel carries; comparable across the groups of a layer.
        rounding: (rank,) what noise as large as a channel, of each token its own, costs of the objective: the
            spectrum, but for values read as sums, in which noise averages out.
        mean: (kv_dim,) what is taken off before encoding and put back after decoding; zeros for plain linear factors,
            else the mean of the data that the factors are optimal for.
    """

    A: torch.Tensor
    B: torch.Tensor
    ranks: tuple[int, ...]
    spectrum: torch.Tensor
    rounding: torch.Tensor
    mean: torch.Tensor

    def cut(self, ranks: Sequence[int]) -> Factors:
        """The first `ranks[g]` channels of every group."""
        kept = first_channels(self.ranks, ranks)
        A, B, energies = self.A[kept], self.B[:, kept], (self.spectrum[kept], self.rounding[kept])
        return Factors(A, B, tuple(ranks), *energies, self.mean)

    def spectra(self) -> tuple[torch.Tensor, ...]:
        """The spectrum of each group."""
        return self.spectrum.split(list(self.ranks))


def first_channels(there: Sequence[int], kept: Sequence[int]) -> torch.Tensor:
    """The first ``kept[g]`` channels of every group of ``there[g]``, as an index of all."""
    starts = torch.tensor([0, *there]).cumsum(0)[:-1].tolist()
    return torch.cat([torch.arange(start, start + rank) for start, rank in zip(starts, kept)])


def diagonal_blocks(matrix: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The diagonal blocks (num_groups, group_dim, group_dim) of a (kv_dim, kv_dim) matrix."""
    size = matrix.shape[0] // num_groups
    return torch.stack([matrix[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(num_groups)])


def sqrt_and_inverse(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``M^½`` and ``M^-½`` of symmetric positive semi-definite matrices (..., n, n), damped to be invertible.

    By the mean of each, or of all of them where one has next to nothing; without any weight M is the identity.
    """
    values, vectors = torch.linalg.eigh(matrix)
    own, overall = values.mean(-1, keepdim=True), values.mean()
    if overall > torch.finfo(values.dtype).tiny:
        floor = DAMPING * torch.where(own > DAMPING * overall, own, overall)
    else:
        floor = torch.ones_like(own)
    root = values.clamp_min(0.0).add(floor).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def pooled_ranks(spectra: torch.Tensor, rank: int) -> tuple[int, ...]:
    """Distribute `rank` channels over groups by keeping the largest of all their eigenvalues.

    Args:
        spectra: (num_groups, group_dim), falling along the last axis; -1 where a group has no channel.
        rank: the sum of the ranks. Every group that has a channel gets one as long as `rank` allows it.

    Raises:
        ValueError: if there are not that many channels.
    """
    num_groups, group_dim = spectra.shape
    there = spectra >= 0
    if not 1 <= rank <= int(there.sum()):
        raise ValueError(f"`rank` must be between 1 and {int(there.sum())}, got {rank}.")
    order = spectra.clone()
    if rank >= int(there[:, 0].sum()):
        order[there[:, 0], 0] = torch.inf
    chosen = order.flatten().argsort(descending=True, stable=True)[:rank] // group_dim
    return tuple(torch.bincount(chosen, minlength=num_groups).tolist())


def assemble(
    A: torch.Tensor, B: torch.Tensor, spectra: torch.Tensor, ranks: Sequence[int], mean: torch.Tensor | None = None
) -> Factors:
    """Cut full bases A (G, n, n), B (G, n, n), spectra (G, n) to the given ranks and lay the groups side by side."""
    spectrum = torch.cat([spectra[g, :r] for g, r in enumerate(ranks)])
    return Factors(
        A=torch.cat([A[g, :r] for g, r in enumerate(ranks)]),
        B=torch.cat([B[g, :, :r] for g, r in enumerate(ranks)], dim=1),
        ranks=tuple(ranks),
        spectrum=spectrum,
        rounding=spectrum,
        mean=torch.zeros(spectra.numel(), dtype=spectra.dtype) if mean is None else mean,
    )


def optimal_factors(
    second_moment: torch.Tensor,
    rank: int,
    num_groups: int = 1,
    weight: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> Factors:
    """The factors of total rank `rank` with the least weighted error, ranks pooled over the groups.

    Args:
        second_moment: C, (kv_dim, kv_dim). For ``svd`` and ``asvd`` pass [`weight_moment`].
        rank: channels kept over all groups.
        num_groups: 1 factors all heads jointly.
        weight: M, (kv_dim, kv_dim), block-diagonal over groups; None is the identity.
        mean: (kv_dim,), E[x] of the data that `second_moment` is of, for centred factors.

    Raises:
        ValueError: if `second_moment` or `weight` has NaN or infinite entries, or `rank` does not fit.
    """
    for name, matrix in (("second_moment", second_moment), ("weight", weight)):
        if matrix is not None and not torch.isfinite(matrix).all():
            raise ValueError(
                f"`{name}` has NaN or infinite entries; check the calibration data and the model's weights and dtype."
            )
    mean = torch.zeros(len(second_moment), dtype=torch.float64) if mean is None else mean.double()
    moments = diagonal_blocks(centred(second_moment, mean), num_groups)
    if weight is None:
        values, vectors = torch.linalg.eigh(moments)
        A, B = vectors.flip(-1).mT, vectors.flip(-1)
    else:
        root, inverse = sqrt_and_inverse(diagonal_blocks(weight.double(), num_groups))
        values, vectors = torch.linalg.eigh(root @ moments @ root)
        A, B = vectors.flip(-1).mT @ root, inverse @ vectors.flip(-1)
    spectra = values.flip(-1).clamp_min(0.0)
    return assemble(A, B, spectra, pooled_ranks(spectra, rank), mean)


def centred(second_moment: torch.Tensor, center: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """``E[(x - μ)(x - μ)ᵀ] = C - E[x] μᵀ - μ E[x]ᵀ + μ μᵀ``.

    Args:
        center: μ.
        mean: E[x]; by default equal to `center`.
    """
    away = center - 2 * (center if mean is None else mean.double())
    crossed = torch.outer(away, center)
    return second_moment.double() + (crossed + crossed.mT) / 2


def random_factors(kv_dim: int, rank: int, num_groups: int = 1, seed: int = 0) -> Factors:
    """Projections on random orthonormal subspaces, ranks split evenly.

    (The paper draws A and B independently, which is wrong at any rank before training; a projection is lossless at
    full rank.)
    """
    generator = torch.Generator().manual_seed(seed)
    size = kv_dim // num_groups
    A = torch.linalg.qr(torch.randn(num_groups, size, size, generator=generator, dtype=torch.float64))[0].mT
    return assemble(A, A.mT, torch.ones(num_groups, size, dtype=torch.float64), even_ranks(rank, num_groups))


def even_ranks(rank: int, num_groups: int) -> tuple[int, ...]:
    """`rank` split over groups as evenly as possible, the first ones getting the remainder."""
    return tuple(rank // num_groups + (g < rank % num_groups) for g in range(num_groups))


def normalized(factors: Factors, second_moment: torch.Tensor, mean: torch.Tensor | None = None) -> Factors:
    """The same map with every latent channel of unit mean square: ``(A / s, B s)``.

    A weighted basis scales latents by the square root of the summed query energy, which overflows 16-bit floats; and
    channels of equal size can share a range when they are packed.

    Channels that the data do not reach get the ``s`` of the weakest that they do. By their own they would be 1e5 times
    as large as others on data that do reach them, which overflows float16 and ruins the range they share; a larger
    one would bring the rounding of that range into the keys.

    Args:
        mean: of the data, if it is not that of the factors.
    """
    energy, centre = latent_energy(factors, second_moment, mean), factors.mean
    mean_square = latent_energy(dataclasses.replace(factors, mean=torch.zeros_like(centre)), second_moment)
    reached = (energy >= UNREACHED * energy.max()) & (energy > CANCELLED * mean_square)
    least = energy[reached].min() if reached.any() else factors.A.double().square().sum(1)  # then rows of unit length
    scale = torch.where(reached, energy, least).sqrt()
    return dataclasses.replace(factors, A=factors.A / scale[:, None], B=factors.B * scale)


def unreached_channels(
    factors: Factors, second_moment: torch.Tensor, mean: torch.Tensor | None = None
) -> torch.Tensor:
    """Which channels of [`normalized`] factors are of directions that the data do not reach, (rank,) bool; `mean` as
    there."""
    return latent_energy(factors, second_moment, mean) < 0.5  # of 1


def driven_channels(factors: Factors, weight_moment: torch.Tensor) -> torch.Tensor:
    """Which channels are of directions that the weights of ``W Wᵀ`` bring inputs into, (rank,) bool."""
    linear = dataclasses.replace(factors, mean=torch.zeros_like(factors.mean))
    energy = latent_energy(linear, weight_moment) / factors.A.double().square().sum(1)
    return energy > DRIVEN * torch.linalg.eigvalsh(weight_moment)[-1]


def noise_energy(factors: Factors, weight: torch.Tensor) -> torch.Tensor:
    """``B_iᵀ M B_i``, (rank,): what an error of unit energy in latent channel i costs; of [`normalized`] factors, one
    as large as the channel."""
    parts = zip(factors.B.double().split(factors.ranks, dim=1), diagonal_blocks(weight.double(), len(factors.ranks)))
    return torch.cat([(B * (M @ B)).sum(0) for B, M in parts])


def falling(energies: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that do not rise, by least squares: means of neighbours where they would (pool adjacent
    violators). Channels of falling worth get falling bits, which kernels read in few runs."""
    pools: list[list[float]] = []  # sum and count
    for energy in energies.tolist():
        pools.append([energy, 1])
        while len(pools) > 1 and pools[-1][0] * pools[-2][1] > pools[-2][0] * pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    return torch.cat([energies.new_full((count,), total / count) for total, count in pools])


def latent_energy(factors: Factors, second_moment: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """E[c_i²] of every channel, (rank,); `mean`: of the data, if it is not that of the factors."""
    energies = []
    for A, _, moment in _groups(factors, centred(second_moment, factors.mean, mean)):
        energies.append(torch.einsum("ri,ij,rj->r", A, moment, A))
    return torch.cat(energies)


def relative_error(
    factors: Factors,
    second_moment: torch.Tensor,
    weight: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> float:
    """``E[(x - x̂)ᵀ M (x - x̂)] / E[xᵀ M x]`` on the data that `second_moment` was taken from; `mean`: of them, if it is
    not that of the factors."""
    second_moment, lost = second_moment.double(), 0.0
    total = float(second_moment.trace() if weight is None else (weight.double() * second_moment).sum())
    M = None if weight is None else diagonal_blocks(weight.double(), len(factors.ranks))
    for g, (A, B, moment) in enumerate(_groups(factors, centred(second_moment, factors.mean, mean))):
        residual = torch.eye(moment.shape[0], dtype=torch.float64) - B @ A
        weighted = residual if M is None else M[g] @ residual
        lost += float((weighted * (residual @ moment)).sum())  # the trace of residualᵀ M residual C
    return lost / total if total > 0 else 0.0


def _groups(factors: Factors, second_moment: torch.Tensor):
    start = 0
    for rank, moment in zip(factors.ranks, diagonal_blocks(second_moment, len(factors.ranks))):
        channels = slice(start, start + rank)
        yield factors.A[channels].double(), factors.B[:, channels].double(), moment
        start += rank


def weight_moment(weight: torch.Tensor, input_scale: torch.Tensor | None = None) -> torch.Tensor:
    """``W Wᵀ`` (svd), or ``W S² Wᵀ`` with the scale of every input channel (asvd: mean absolute activation to the
    power alpha).

    Args:
        weight: (kv_dim, hidden_size).
        input_scale: (hidden_size,) or None.
    """
    weight = weight.double() if input_scale is None else weight.double() * input_scale.double()
    return weight @ weight.mT


def key_weight(query_moment: torch.Tensor) -> torch.Tensor:
    """M of the keys if every query meets every key alike: the energy of the queries, per KV head and RoPE pair.

    The error of a score is ``qᵀ R(Δ) (k - k̂)``. Averaged over the distance Δ, rotation mixes the two channels of a
    frequency and cancels what is between frequencies, so that M is diagonal, and equal on the pair (f, f + head_dim
    / 2).

    Args:
        query_moment: (num_key_value_heads, head_dim, head_dim), E[q qᵀ] summed over the query heads of each KV head.

    Returns:
        (kv_dim, kv_dim), diagonal.
    """
    energy = query_moment.double().diagonal(dim1=-2, dim2=-1)
    half = energy.shape[-1] // 2
    pair = (energy[:, :half] + energy[:, half:]) / 2
    return torch.diag(torch.cat([pair, pair], dim=-1).flatten())


def value_weight(output_weight: torch.Tensor, num_key_value_heads: int, head_dim: int) -> torch.Tensor:
    """M of the values for the ``attention`` objective: ``W_oᵀ W_o`` summed over the query heads of each KV head.

    Args:
        output_weight: (hidden_size, num_attention_heads * head_dim), the weight of o_proj.

    Returns:
        (kv_dim, kv_dim), block-diagonal over KV heads: different heads attend to different tokens.
    """
    # the query heads that share a KV head are consecutive
    per_kv_head = output_weight.double().reshape(output_weight.shape[0], num_key_value_heads, -1, head_dim)
    rows = per_kv_head.transpose(0, 1).flatten(1, 2)  # (num_key_value_heads, hidden_size * query heads, head_dim)
    return torch.block_diag(*(rows.mT @ rows))
