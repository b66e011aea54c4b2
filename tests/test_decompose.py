"""The closed forms against what theory says of them: optimality, orderings, equalities."""

import pytest
import torch

from cskv_hf.decompose import (
    diagonal_blocks,
    driven_channels,
    falling,
    key_weight,
    latent_energy,
    normalized,
    optimal_factors,
    pooled_ranks,
    random_factors,
    relative_error,
    unreached_channels,
    value_weight,
    weight_moment,
)

KV_DIM, HIDDEN = 24, 40


@pytest.fixture
def data():
    """Correlated inputs x, a projection W, and keys k = W x; their second moment."""
    torch.manual_seed(0)
    x = torch.randn(500, HIDDEN, dtype=torch.float64) @ torch.randn(HIDDEN, HIDDEN, dtype=torch.float64) + 0.5
    W = torch.randn(KV_DIM, HIDDEN, dtype=torch.float64)
    k = x @ W.mT
    return x, W, k, k.mT @ k / len(k)


def weights():
    torch.manual_seed(1)
    per_head = [a @ a.mT for a in torch.randn(4, 6, 9, dtype=torch.float64)]
    return torch.block_diag(*per_head)


def initialisations(data, rank, groups):
    x, W, _, C = data
    return {
        "mse": optimal_factors(C, rank, groups),
        "attention": optimal_factors(C, rank, groups, weights()),
        "asvd": optimal_factors(weight_moment(W, x.abs().mean(0).sqrt()), rank, groups),
        "svd": optimal_factors(weight_moment(W), rank, groups),
        "random": random_factors(KV_DIM, rank, groups),
    }


def reconstruct(factors, k):
    """x̂ = B A x from the definition, group by group."""
    out, start, size = [], 0, factors.A.shape[1]
    for g, rank in enumerate(factors.ranks):
        A, B = factors.A[start : start + rank], factors.B[:, start : start + rank]
        out.append(k[:, g * size : (g + 1) * size] @ A.mT @ B.mT)
        start += rank
    return torch.cat(out, dim=1)


def test_eckart_young(data):
    """The error of the optimum is the sum of the eigenvalues that were dropped."""
    _, _, k, C = data
    eigenvalues = torch.linalg.eigvalsh(C)
    for rank in (1, 5, 23):
        error = (k - reconstruct(optimal_factors(C, rank), k)).square().sum(1).mean()
        torch.testing.assert_close(error, eigenvalues[: KV_DIM - rank].sum())


def test_pooled_eckart_young(data):
    """Per head, the error is the sum of the smallest eigenvalues of all heads together, whichever head they are of."""
    _, _, k, C = data
    eigenvalues = torch.linalg.eigvalsh(diagonal_blocks(C, 4)).flatten().sort().values
    factors = optimal_factors(C, 10, 4)
    error = (k - reconstruct(factors, k)).square().sum(1).mean()
    torch.testing.assert_close(error, eigenvalues[:14].sum())
    assert sum(factors.ranks) == 10 and len(set(factors.ranks)) > 1


@pytest.mark.parametrize("groups", [1, 4])
def test_centred_factors_are_the_affine_optimum(data, groups):
    """The error about the mean is the sum of the dropped eigenvalues of the covariance: never more than of C, since
    C is the covariance plus a positive semi-definite matrix."""
    _, _, k, C = data
    mean = k.mean(0)
    covariance = (k - mean).mT @ (k - mean) / len(k)
    eigenvalues, size = torch.linalg.eigvalsh(diagonal_blocks(covariance, groups)), KV_DIM // groups
    for rank in (4, 9, 15):
        plain, factors = optimal_factors(C, rank, groups), optimal_factors(C, rank, groups, mean=mean)
        error = (k - mean - reconstruct(factors, k - mean)).square().sum(1).mean()
        dropped = sum(eigenvalues[g, : size - r].sum() for g, r in enumerate(factors.ranks))
        torch.testing.assert_close(error, dropped)
        assert relative_error(factors, C) == pytest.approx(float(error / k.square().sum(1).mean()))
        assert relative_error(factors, C) <= relative_error(plain, C)
        latents = (k - mean)[:, :size] @ factors.A[: factors.ranks[0]].mT
        torch.testing.assert_close(latent_energy(factors, C)[: factors.ranks[0]], latents.square().mean(0))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [4, 9, 15])
def test_mse_is_never_worse_on_its_own_data(data, groups, rank):
    errors = {name: relative_error(f, data[3]) for name, f in initialisations(data, rank, groups).items()}
    assert min(errors, key=errors.get) == "mse", errors


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_never_worse_on_its_own_weight(data, groups):
    errors = {name: relative_error(f, data[3], weights()) for name, f in initialisations(data, 9, groups).items()}
    assert min(errors, key=errors.get) == "attention", errors


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_full_rank_is_lossless(data, groups):
    _, _, k, C = data
    for name, factors in initialisations(data, KV_DIM, groups).items():
        torch.testing.assert_close(reconstruct(factors, k), k, msg=name)
        torch.testing.assert_close(reconstruct(normalized(factors, C), k), k, msg=name)


def test_svd_factors_truncate_the_weight(data):
    """B A W is the truncated SVD of W: the paper's initialisation in our form."""
    W = data[1]
    factors = optimal_factors(weight_moment(W), 7)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(factors.B @ factors.A @ W, U[:, :7] * S[:7] @ Vt[:7])


def test_asvd_scales_and_unscales(data):
    """ASVD truncates W S and multiplies by the inverse of S; with S = 1 it is the SVD."""
    x, W, _, _ = data
    scale = x.abs().mean(0).sqrt()
    U, S, Vt = torch.linalg.svd(W * scale, full_matrices=False)
    factors = optimal_factors(weight_moment(W, scale), 7)
    torch.testing.assert_close(factors.B @ factors.A @ W, U[:, :7] * S[:7] @ Vt[:7] / scale)
    plain, unit = optimal_factors(weight_moment(W), 7), optimal_factors(weight_moment(W, torch.ones(HIDDEN)), 7)
    torch.testing.assert_close(plain.B @ plain.A, unit.B @ unit.A)


def test_relative_error_is_what_it_says(data):
    _, _, k, C = data
    M = weights()
    for factors in initialisations(data, 9, 4).values():
        residual = k - reconstruct(factors, k)
        expected = torch.einsum("ti,ij,tj->", residual, M, residual) / torch.einsum("ti,ij,tj->", k, M, k)
        assert relative_error(factors, C, M) == pytest.approx(float(expected), rel=1e-9)


def test_falling():
    """The least squares of isotonic regression, by its formula of minima and maxima of means; a sequence that falls is
    left as it is."""
    energies = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(descending=True)[0]
    assert torch.equal(falling(energies), energies)
    energies = energies * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [min(max(energies[a : b + 1].mean() for b in range(i, 40)) for a in range(i + 1)) for i in range(40)]
    torch.testing.assert_close(falling(energies), torch.stack(expected))
    assert not falling(torch.zeros(3)).any()


def test_spectrum_is_the_energy_of_the_latents(data):
    C = data[3]
    factors = optimal_factors(C, 9, 4, weights())
    torch.testing.assert_close(latent_energy(factors, C), factors.spectrum, rtol=1e-5, atol=0)
    assert float(latent_energy(normalized(factors, C), C).mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("groups", [1, 4])
def test_nested_ranks(data, groups):
    """Cutting a fit to a smaller rank is fitting at that rank."""
    C = data[3]
    large, small = optimal_factors(C, 14, groups, weights()), optimal_factors(C, 6, groups, weights())
    cut = large.cut(small.ranks)
    assert cut.ranks == small.ranks
    for name in ("A", "B", "spectrum"):
        torch.testing.assert_close(getattr(cut, name), getattr(small, name))


def test_pooled_ranks_keep_the_largest():
    spectra = torch.tensor([[9.0, 8.0, 7.0], [3.0, 2.0, 1.0]])
    assert pooled_ranks(spectra, 4) == (3, 1)
    assert pooled_ranks(spectra, 2) == (1, 1)  # nobody goes without
    assert pooled_ranks(spectra, 1) == (1, 0)
    with pytest.raises(ValueError, match="between 1 and 6, got 7"):
        pooled_ranks(spectra, 7)


def test_pooled_ranks_leave_alone_what_has_no_channel():
    spectra = torch.tensor([[9.0, 8.0, -1.0], [-1.0, -1.0, -1.0], [3.0, 0.0, -1.0]])
    assert pooled_ranks(spectra, 4) == (2, 0, 2)
    assert pooled_ranks(spectra, 3) == (2, 0, 1)
    assert pooled_ranks(spectra, 2) == (1, 0, 1)
    with pytest.raises(ValueError, match="between 1 and 4, got 5"):
        pooled_ranks(spectra, 5)


def test_key_weight_is_the_mean_over_distances():
    """M = E_Δ[R(Δ)ᵀ Q R(Δ)] for uniformly distributed angles: rotate a random Q by many random angles and average."""
    torch.manual_seed(3)
    half = 3
    q = torch.randn(50, 2 * half, dtype=torch.float64)
    Q = q.mT @ q / 50
    angles = torch.rand(20000, half, dtype=torch.float64) * 2 * torch.pi
    cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    R = torch.cat([torch.cat([cos, -sin], dim=2), torch.cat([sin, cos], dim=2)], dim=1)
    torch.testing.assert_close((R.mT @ Q @ R).mean(0), key_weight(Q[None]), atol=0.05, rtol=0)


def test_value_weight_is_the_energy_of_the_outputs():
    """vᵀ M v is the energy that v brings to the layer's output, each query head attending to it alone."""
    torch.manual_seed(4)
    heads, kv_heads, head_dim = 6, 2, 4
    W = torch.randn(10, heads * head_dim, dtype=torch.float64)
    v = torch.randn(kv_heads * head_dim, dtype=torch.float64)
    energy = sum(
        (W[:, h * head_dim : (h + 1) * head_dim] @ v.view(kv_heads, head_dim)[h // (heads // kv_heads)]).square().sum()
        for h in range(heads)
    )
    torch.testing.assert_close(v @ value_weight(W, kv_heads, head_dim) @ v, energy)


def test_a_weight_with_zeros_stays_finite():
    weight = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    factors = optimal_factors(torch.eye(4, dtype=torch.float64), 4, 1, weight)
    assert torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()
    torch.testing.assert_close(factors.B @ factors.A, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e-9])
def test_a_group_without_weight_stays_finite(data, scale):
    """A head that no query reads is weighed by a millionth of the others' mean: its own factors are those of the data
    alone, it comes last, and heads with a weight of their own are the same as ever."""
    C, weight = data[3], weights()
    expected = optimal_factors(C, KV_DIM, 4, weight)
    weight[:6, :6] *= scale
    factors, alone = optimal_factors(C, KV_DIM, 4, weight), optimal_factors(C[:6, :6], 6)
    for name in ("A", "B"):
        tensor = getattr(normalized(factors, C), name)
        assert torch.isfinite(tensor.float()).all() and tensor.abs().max() < 1e3
        theirs = getattr(factors, name), getattr(expected, name)
        assert torch.equal(*(t[6:] if name == "A" else t[:, 6:] for t in theirs))
    own, scaled = normalized(factors, C), normalized(alone, C[:6, :6])
    torch.testing.assert_close(own.A[:6].mT @ own.A[:6], scaled.A.mT @ scaled.A, rtol=1e-2, atol=0.0)
    assert factors.spectrum[:6].max() < 1e-3 * factors.spectrum.max() and factors.spectrum[:6].float().min() > 0
    assert pooled_ranks(torch.stack(factors.spectra()), 10)[0] == 1


def test_no_weight_at_all_is_the_identity(data):
    for groups in (1, 4):
        none = optimal_factors(data[3], 9, groups, torch.zeros(KV_DIM, KV_DIM))
        plain = optimal_factors(data[3], 9, groups)
        torch.testing.assert_close(none.spectrum, plain.spectrum)
        torch.testing.assert_close(reconstruct(none, data[2]), reconstruct(plain, data[2]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_directions_without_data_get_the_gain_of_the_weakest_that_have_some(data, groups, unit):
    """On data that do reach them, latents stay within a few standard deviations of what they replace; and the map is
    the same, in whatever unit the keys are. Here inputs vary in 10 dimensions only, and so do the keys of a group."""
    x, W, _, _ = data
    k = unit * (x[:, :10] @ W[:, :10].mT).float().double()
    C, mean = k.mT @ k / len(k), k.mean(0)
    factors = normalized(optimal_factors(C, KV_DIM, groups, mean=mean), C)
    unreached, gains = unreached_channels(factors, C), factors.A.norm(dim=1)
    assert int(unreached.sum()) == KV_DIM - 10 * groups and driven_channels(factors, W @ W.mT).all()
    assert gains[unreached].tolist() == pytest.approx([float(gains[~unreached].max())] * int(unreached.sum()))
    assert latent_energy(factors, C)[~unreached].tolist() == pytest.approx([1.0] * 10 * groups)
    torch.testing.assert_close(reconstruct(factors, k), k)
    everything = normalized(optimal_factors(data[3], KV_DIM, groups), data[3])
    assert not unreached_channels(everything, data[3]).any()


def test_constant_keys_keep_rows_of_unit_length(data):
    """Their variance is what rounding leaves of the mean square, and may be zero."""
    constant = torch.randn(KV_DIM, dtype=torch.float64)
    for scale in (1.0, 0.0):
        C, mean = scale**2 * torch.outer(constant, constant), scale * constant
        factors = normalized(optimal_factors(C, 8, 2, mean=mean), C)
        torch.testing.assert_close(factors.A.norm(dim=1), torch.ones(8, dtype=torch.float64))
        assert unreached_channels(factors, C).all()


def test_weights_that_are_zero_drive_nothing(data):
    """A row of W that is zero leaves its channel without data whatever one calibrates on."""
    W = data[1].clone()
    W[5] = 0.0
    k = data[0] @ W.mT
    C = k.mT @ k / len(k)
    factors = normalized(optimal_factors(C, KV_DIM), C)
    unreached, driven = unreached_channels(factors, C), driven_channels(factors, W @ W.mT)
    assert unreached.nonzero().tolist() == [[KV_DIM - 1]] and torch.equal(driven, ~unreached)


def test_refuses_nan():
    with pytest.raises(ValueError, match="NaN or infinite"):
        optimal_factors(torch.full((4, 4), torch.nan), 2)
    with pytest.raises(ValueError, match="`weight` has NaN or infinite entries"):
        optimal_factors(torch.eye(4), 2, weight=torch.full((4, 4), torch.inf))
