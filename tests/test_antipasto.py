"""The claims of the AntiPaSTO family, SSVD and SSteer: adapters along singular directions of W."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, data_for, over, stats_of
from hypothesis import assume
from hypothesis import strategies as st
from models import adapted, mlp, text_batch, tiny_llama, trained
from torch import Tensor

import lora_func as lf
from lora_func.linalg import cayley_minus_identity, skew
from lora_func.testing import Layer
from lora_func.variants.antipastoablate import directions
from lora_func.weights.table import weight_of

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
CORDA = ("antipastocorda", "antipastocorda-diagonal")
GAIN = ("antipasto", "antipasto-data", "antipasto-suppress", *CORDA)
ARROW = ("antipastoarrow", "antipastoarrow-data")
ABLATE = ("antipastoablate", "antipastoablate-2")
ROTATION = ("antipastorotation", "antipastorotation-U", "antipastorotation-none")
DPLR = ("antipastodplr", "antipastodplr-data")
SSVDS = ("ssvd", "ssvd-approximate")
ALL = (*GAIN, *ARROW, *ABLATE, *ROTATION, *DPLR, *SSVDS, "ssteer")
Q_V = lf.Targets(names=(r"q_proj$", r"v_proj$"))


def bias(layer: Layer) -> Tensor:
    b = layer.weight.bias
    return torch.zeros(layer.weight.shape[0], dtype=torch.float64) if b is None else b


def delta(layer: Layer) -> Tensor:
    return layer.variant.merged(layer.weight, layer.trained)[0] - layer.weight.matrix


def triplets(layer: Layer) -> tuple[Tensor, Tensor]:
    """S and V of the layer's own U, which may hold any of the left singular vectors."""
    U, S, V = torch.linalg.svd(layer.weight.matrix, full_matrices=False)
    overlap = U.mT @ layer.trained["U"]
    kept = overlap.abs().argmax(0)
    return S[kept], V[kept] * overlap.gather(0, kept[None]).mT.sign()


def gain_core(variant, p: dict[str, Tensor]) -> Tensor:
    g = variant.coeff * (p["g"].clamp(max=0) if variant.suppress_only else p["g"])
    gain = torch.where(g > 0, g, g.exp() - 1).diag()
    return torch.block_diag(variant.coeff * p["M"], gain) if "M" in p else gain


def ablating_core(variant, p: dict[str, Tensor]) -> Tensor:
    C = p["c"] / p["c"].norm() if variant.k == 1 else torch.linalg.qr(p["c"]).Q
    return -variant.coeff * C @ p["a"].diag() @ C.mT


CORES = {"antipastoablate": ablating_core}


def core(layer: Layer) -> Tensor:
    """K [r, r] of out = base_out + (z Kᵀ) Uᵀ, by the formulas."""
    return CORES.get(layer.variant.name(), gain_core)(layer.variant, layer.trained)


# common to all


@over(*ALL)
def test_the_output_moves_along_the_directions(layer, data):
    """out - base_out lies in the span of the orthonormal U; the bias does not change."""
    U, moved = layer.trained["U"], layer.at({}) - layer.base(layer.x)
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), **CLOSE)
    torch.testing.assert_close(moved @ U @ U.mT, moved, **CLOSE)
    zero = torch.zeros_like(layer.x)
    torch.testing.assert_close(layer(layer.trained, zero), layer.base(zero), **CLOSE)


@over("antipasto", "antipasto-data", "antipasto-suppress", *ARROW, "antipastoablate")
def test_the_form_in_outputs_is_the_form_in_inputs(layer, data):
    """(base_out - b) U = S (V x), if data or the rank chose the directions."""
    S, V = triplets(layer)
    z = S * (layer.x @ V.mT)
    expected = layer.base(layer.x) + z @ core(layer).mT @ layer.trained["U"].mT
    torch.testing.assert_close(layer.at({}), expected, **CLOSE)


@over(*GAIN, *ARROW, *ABLATE)
def test_the_weight_is_that_of_the_core(layer, data):
    """W_eff = (I + U K Uᵀ) W, even if the directions are not singular vectors of W."""
    U, W = layer.trained["U"], layer.weight.matrix
    torch.testing.assert_close(delta(layer), U @ core(layer) @ U.mT @ W, **CLOSE)


@over(*GAIN, *ARROW, *ABLATE, *DPLR)
def test_coeff_of_zero_is_the_base(layer, data):
    """The output equals the base output bit by bit, whatever the parameters are."""
    off = dataclasses.replace(layer.variant, coeff=0.0)
    base_out = layer.base(layer.x)
    assert torch.equal(off.apply(layer.x, base_out, layer.weight, layer.trained), base_out)


@over("antipasto-data", "antipastoarrow-data", "antipastorotation-U", "antipastodplr-data")
def test_data_chooses_the_directions(layer, data):
    """It keeps the directions with the largest S_i |v_i x| over the tokens, in descending S."""
    U, S, V = torch.linalg.svd(layer.weight.matrix, full_matrices=False)
    kept = layer.stats.topk(layer.variant.r).indices.sort().values
    overlap = (U[:, kept] * layer.trained["U"]).sum(0)
    torch.testing.assert_close(overlap.abs(), torch.ones_like(overlap), **CLOSE)
    x, weight = layer.x, layer.weight
    z = S * (x @ V.mT)
    for pool, expected in (("rms", z.square().mean(0).sqrt()), ("mean_abs", z.abs().mean(0))):
        statistic = lf.Projections(pool=pool)
        state = statistic.update(statistic.init(weight), layer.base(x))
        torch.testing.assert_close(statistic.finalize({"": state})[""], expected, **CLOSE)


@pytest.mark.parametrize(
    "kind",
    [
        lf.AntiPaSTO,
        lf.AntiPaSTOArrow,
        lf.AntiPaSTORotation,
        lf.AntiPaSTOCorDA,
        lf.AntiPaSTOAblate,
        lf.AntiPaSTODPLR,
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_more_directions_than_the_layer_has(kind, calibrated):
    """The error names the limit, even if data would choose the directions."""
    variant, weight = kind(r=12), lf.Weight(torch.randn(8, 20))
    with pytest.raises(lf.LoraFuncError, match=r"r must be at most 8 there|starts from "):
        variant.init(weight, None, stats_of(variant, weight) if calibrated else None)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: directions(torch.eye(16)[:, :8], p["c"]),
        lambda p: torch.eye(8) + cayley_minus_identity(skew(p["v"], 8)),
        lambda p: torch.eye(4) + lf.AntiPaSTORotation(r=8).turn({"rot": p["rot"]}),
    ],
    ids=["ablate", "cayley", "rotation"],
)
def test_small_solves_are_not_rounded_by_autocast(make):
    """Rotations stay orthogonal and ablated directions orthonormal, to the precision of float32."""
    p = {"c": torch.randn(8, 2), "v": 0.3 * torch.randn(28), "rot": 0.3 * torch.randn(2, 6)}
    with torch.autocast("cpu", torch.bfloat16):
        R = make(p)
    eye = torch.eye(R.shape[-1]).expand_as(R.mT @ R)
    torch.testing.assert_close(R.mT @ R, eye, rtol=0, atol=2e-6)


# gains


@over(*GAIN)
def test_gains(layer, data):
    """Gains are never negative and monotone in g; with suppress_only they never amplify."""
    variant = dataclasses.replace(layer.variant, coeff=data.draw(st.floats(0, 3)))
    values = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
    gain = 1 + variant.gain(torch.tensor(sorted(values), dtype=torch.float64))
    assert (gain >= 0).all()
    assert (gain.diff() >= 0).all()
    if variant.suppress_only:
        assert (gain <= 1).all()
        base_out = layer.base(layer.x)
        out = variant.apply(layer.x, base_out, layer.weight, layer.trained)

        def along(y):
            return ((y - bias(layer)) @ layer.trained["U"]).norm(dim=-1)

        assert (along(out) <= along(base_out) * (1 + 1e-12)).all()


@over(*GAIN)
def test_a_gain_moves_its_direction_alone(layer, data):
    g = layer.trained["g"]
    i = data.draw(st.integers(0, len(g) - 1))
    one = torch.zeros_like(g)
    one[i] = -0.7
    moved = (layer.at({"g": one}) - layer.base(layer.x)) @ layer.trained["U"]
    others = [j for j in range(len(g)) if j != i]
    assert (moved[:, others].abs() <= 1e-12).all()
    assert moved[:, i].abs().max() > 1e-9


@over("antipasto", "antipasto-data", "antipasto-suppress")
def test_gains_scale_singular_values(layer, data):
    """W_eff has S_i (1 + gain_i) along the directions and keeps the others; equal gains scale W."""
    S, _ = triplets(layer)
    everything = torch.linalg.svdvals(layer.weight.matrix)
    rest = [s for s in everything.tolist() if (S - s).abs().min() > 1e-12]
    assume(len(rest) + len(S) == len(everything))
    scaled = S * (1 + core(layer).diag())
    expected = torch.cat([scaled, torch.tensor(rest, dtype=torch.float64)])
    given = torch.linalg.svdvals(layer.weight.matrix + delta(layer))
    torch.testing.assert_close(given, expected.sort(descending=True).values, **CLOSE)
    full = lf.AntiPaSTO(r=min(layer.weight.shape))
    frozen = full.init(layer.weight, None).frozen
    g = torch.full((full.r,), 0.4, dtype=torch.float64)
    W, _ = full.merged(layer.weight, {**frozen, "g": g})
    torch.testing.assert_close(W, 1.4 * layer.weight.matrix, **CLOSE)


# a basis oriented by data


def oriented(W: Tensor, C: Tensor, r: int, eps: float = 1e-12) -> Tensor:
    """U of AntiPaSTO-CorDA for the second moment C of the inputs."""
    moments = lf.Moments(100, torch.zeros(len(C), dtype=C.dtype), 100 * C)
    return lf.AntiPaSTOCorDA(r=r, cov_eps=eps).init(lf.Weight(W), None, moments).frozen["U"]


def projector(U: Tensor) -> Tensor:
    return U @ U.mT


@over("antipastocorda")
def test_oblique_coordinates(layer, data):
    """W = U S P with P C Pᵀ = I: z = S (P x), and at full rank U S P is W itself."""
    W, moment, eps = layer.weight.matrix, layer.stats.about(0), layer.variant.cov_eps
    C = moment + eps * torch.eye(W.shape[1])
    U = oriented(W, moment, min(W.shape), eps)
    values, Q = torch.linalg.eigh(C)
    S, V = torch.linalg.svd(W @ (Q * values.sqrt()) @ Q.mT, full_matrices=False)[1:]
    P = V @ (Q / values.sqrt()) @ Q.mT
    eye = torch.eye(len(P), dtype=torch.float64)
    torch.testing.assert_close(P @ C @ P.mT, eye, rtol=0, atol=1e-8)
    z, expected = U.mT @ W, S[:, None] * P  # equal up to signs
    torch.testing.assert_close(z.abs(), expected.abs(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(U.mT @ W @ C @ W.mT @ U, S.square().diag(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(U @ U.mT @ W, W, **CLOSE)


@over("antipastocorda")
def test_the_oriented_basis(layer, data):
    """The basis is the plain one for C = I and the same for C and k C.

    It holds the uncentred principal components of the outputs and loses the least on the data.
    """
    W, C, r = layer.weight.matrix, layer.stats.about(0), layer.variant.r
    d_in = W.shape[1]
    plain = torch.linalg.svd(W)[0][:, :r]
    S = torch.linalg.svdvals(W)
    values, vectors = torch.linalg.eigh(W @ C @ W.mT)

    def gap(s):
        return len(s) <= r or s[r - 1] > 1.01 * s[r]

    def assert_same_span(U, expected, atol):
        torch.testing.assert_close(projector(U), projector(expected), rtol=0, atol=atol)

    assume(gap(S) and gap(values.flip(0)[: len(S)]))
    U = oriented(W, C, r)
    assert_same_span(oriented(W, torch.eye(d_in, dtype=W.dtype), r), plain, atol=1e-8)
    assert_same_span(oriented(W, data.draw(st.floats(0.1, 10)) * C, r), U, atol=1e-6)
    assert_same_span(vectors[:, -r:], U, atol=1e-6)

    def lost(basis: Tensor) -> Tensor:
        """E |(W - W_r) x|²"""
        rest = W - projector(basis) @ W
        return (rest @ C @ rest.mT).trace()

    assert lost(U) <= lost(plain) * (1 + 1e-9) + 1e-9


@over("antipastocorda-diagonal")
def test_the_basis_of_a_diagonal(layer, data):
    """U are left singular vectors of W diag(E[x²] + eps)^(1/2), in which W loses little of x."""
    W, scale = layer.weight.matrix, (layer.stats + layer.variant.cov_eps).sqrt()
    U, S, _ = torch.linalg.svd(W @ scale.diag(), full_matrices=False)
    r = layer.variant.r
    assume(len(S) <= r or S[r - 1] > 1.01 * S[r])
    torch.testing.assert_close(projector(layer.trained["U"]), projector(U[:, :r]), **CLOSE)
    x = layer.x
    statistic: Any = lf.AntiPaSTOCorDA(diagonal=True).statistic
    state = statistic.update(statistic.update(None, x), 2 * x)
    squares = statistic.finalize({"seen": state, "not seen": None})
    torch.testing.assert_close(squares["seen"], 2.5 * x.square().mean(0), **CLOSE)
    assert squares.keys() == {"seen"}


def test_corda_needs_as_many_tokens_as_directions():
    few = lf.Moments(3, torch.zeros(8), torch.eye(8))
    message = r"AntiPaSTOCorDA\(r=4\) needs at least 4 calibration tokens, and got 3"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.AntiPaSTOCorDA(r=4).init(lf.Weight(torch.randn(8, 8)), None, few)


def test_fresh_gains_need_no_data():
    model = tiny_llama()
    variant = lf.AntiPaSTOCorDA(r=4)
    adapter, params = lf.adapt(model, variant, targets=Q_V, calibration=[text_batch()])
    again = adapter.init(model)
    assert again.keys() == params.keys()
    assert all(not leaf.any() for leaf in again.values())


# the low-rank core


@over(*DPLR)
def test_gains_and_a_low_rank_core(layer, data):
    """W_eff = W + U (diag(S ELU(c g)) + c B A) V"""
    variant, p = layer.variant, layer.trained
    expected = p["U"] @ (p["S"].diag() @ gain_core(variant, p) + variant.coeff * p["B"] @ p["A"])
    torch.testing.assert_close(delta(layer), expected @ p["V"], **CLOSE)


@over(*DPLR)
def test_without_the_core_these_are_the_gains(layer, data):
    """The form in inputs equals AntiPaSTO's in outputs."""
    variant, p = layer.variant, layer.trained
    gains = lf.AntiPaSTO(r=variant.r, coeff=variant.coeff, suppress_only=variant.suppress_only)
    expected = gains.apply(layer.x, layer.base(layer.x), layer.weight, {"U": p["U"], "g": p["g"]})
    torch.testing.assert_close(layer.at({"B": torch.zeros_like(p["B"])}), expected, **CLOSE)


# the dense block


@over(*ARROW)
def test_routing(layer, data):
    """An input v_j moves the output by c M[i, j] S_j along u_i within the block.

    In the tail it moves the output by its own gain along u_j. All other movements are 0.
    """
    variant, p, b = layer.variant, layer.trained, layer.variant.block
    S, V = triplets(layer)
    x = V  # [r, d_in], row j is v_j
    moved = ((layer(p, x) - layer.base(x)) @ p["U"]).mT  # [i, j]
    expected = torch.zeros_like(moved)
    for i in range(b):
        for j in range(b):
            expected[i, j] = variant.coeff * p["M"][i, j] * S[j]
    for i in range(b, variant.r):
        expected[i, i] = F.elu(variant.coeff * p["g"][i - b]) * S[i]
    torch.testing.assert_close(moved, expected, **CLOSE)


@over("antipastoarrow")
def test_a_diagonal_block_is_a_gain(layer, data):
    g = torch.randn(layer.variant.r, dtype=torch.float64)
    b = layer.variant.block
    gain, params = lf.AntiPaSTO(r=layer.variant.r), {"U": layer.trained["U"], "g": g}
    expected = gain.apply(layer.x, layer.base(layer.x), layer.weight, params)
    torch.testing.assert_close(layer.at({"M": F.elu(g[:b]).diag(), "g": g[b:]}), expected, **CLOSE)


# ablation


@over(*ABLATE)
def test_ablation(layer, data):
    """Full ablation is idempotent and leaves 0 along its directions; partial ablation contracts.

    The rank of the update is at most k.
    """
    variant, p = dataclasses.replace(layer.variant, coeff=1.0), layer.trained
    base_out, b = layer.base(layer.x), bias(layer)
    D = directions(p["U"], p["c"])
    torch.testing.assert_close(D.mT @ D, torch.eye(variant.k, dtype=torch.float64), **CLOSE)

    def ablate(y, a):
        return variant.apply(layer.x, y, layer.weight, {**p, "a": a})

    full = torch.ones_like(p["a"])
    out = ablate(base_out, full)
    zero = torch.zeros(5, variant.k, dtype=torch.float64)
    torch.testing.assert_close((out - b) @ D, zero, **CLOSE)
    torch.testing.assert_close(ablate(out, full), out, **CLOSE)
    part = ablate(base_out, torch.rand(variant.k, dtype=torch.float64))
    assert ((part - b).norm(dim=-1) <= (base_out - b).norm(dim=-1) * (1 + 1e-12)).all()
    assert torch.linalg.matrix_rank(delta(layer)) <= variant.k


@over(*ABLATE)
def test_ablation_sees_only_directions(layer, data):
    c = data.draw(st.floats(0.1, 10)) * data.draw(st.sampled_from((-1, 1)))
    torch.testing.assert_close(layer.at({"c": c * layer.trained["c"]}), layer.at({}), **CLOSE)


@over(*ABLATE)
def test_size_of_the_ablation_at_init(layer, data):
    """The start is not the base output: it moves by coeff a0 |<base_out - b, F>|."""
    D, base_out = directions(layer.init["U"], layer.init["c"]), layer.base(layer.x)
    moved = (layer(layer.init) - base_out).norm(dim=-1)
    share = layer.variant.coeff * layer.variant.init_alpha
    torch.testing.assert_close(moved, share * ((base_out - bias(layer)) @ D).norm(dim=-1), **CLOSE)


@over("antipastoablate-2")
def test_ablation_is_oriented_by_data(layer, data):
    """U spans the top eigenvectors of E[(y - b)(y - b)ᵀ]; c is random and ignores the data."""
    r, moment = layer.variant.r, layer.stats.about(bias(layer))
    values, vectors = torch.linalg.eigh(moment)
    assume(len(values) == r or values[-r] > 1.01 * values[-r - 1])
    U = layer.init["U"]
    torch.testing.assert_close(projector(U), projector(vectors[:, -r:]), rtol=0, atol=1e-6)
    first, second = (
        layer.variant.init(layer.weight, torch.Generator().manual_seed(seed), layer.stats)
        for seed in (0, 1)
    )
    assert torch.equal(first.frozen["U"], second.frozen["U"])
    assert not torch.equal(first.trainable["c"], second.trainable["c"])


def test_ablation_of_a_zero_direction():
    """Neither the output nor the gradient becomes NaN."""
    variant, weight = lf.AntiPaSTOAblate(r=4), lf.Weight(torch.randn(6, 6))
    params = variant.init(weight, None)
    x = torch.randn(3, 6)

    def f(c):
        return variant.apply(x, weight(x), weight, {**params.frozen, **params.trainable, "c": c})

    zero = torch.zeros(4, 1)
    assert torch.equal(f(zero), weight(x))
    assert torch.func.grad(lambda c: f(c).square().sum())(zero).isfinite().all()


# rotations


@over(*ROTATION)
def test_rotation_is_the_dense_formula(layer, data):
    """dW = U [ diag(S + c ds) R - S ] V, or U [ Rᵀ diag(S + c ds) - S ] V; R is block-diagonal."""
    variant, p = layer.variant, layer.trained
    n, L = variant.block_size, 2 * math.tan(variant.max_rotation_angle / 2)
    blocks = []
    for v in p.get("rot", torch.zeros(0)):
        T = torch.zeros(n, n, dtype=torch.float64)
        T[tuple(torch.triu_indices(n, n, 1))] = v
        X = variant.coeff * L * torch.tanh((T - T.mT) / 2 / L) / 2
        eye = torch.eye(n, dtype=torch.float64)
        blocks.append(torch.linalg.inv(eye - X) @ (eye + X))
    R = torch.block_diag(*blocks) if blocks else torch.eye(variant.r, dtype=torch.float64)
    shifted = (p["S"] + variant.coeff * p["ds"]).diag()
    inner = R.mT @ shifted if variant.rotate_basis == "U" else shifted @ R
    torch.testing.assert_close(delta(layer), p["U"] @ (inner - p["S"].diag()) @ p["V"], **CLOSE)
    out = layer.base(layer.x) + layer.x @ delta(layer).mT
    torch.testing.assert_close(layer.at({}), out, **CLOSE)


@over("antipastorotation", "antipastorotation-U")
def test_rotations_are_orthogonal(layer, data):
    """R(-rot) is the inverse, and a block of 2 rotates by at most theta for any parameter."""
    variant, p = layer.variant, layer.trained
    eye = torch.eye(variant.block_size, dtype=torch.float64)
    R = eye + variant.turn(p)
    torch.testing.assert_close(R @ R.mT, eye.expand_as(R), **CLOSE)
    torch.testing.assert_close(eye + variant.turn({"rot": -p["rot"]}), R.mT, **CLOSE)
    back = dataclasses.replace(variant, coeff=-variant.coeff)
    torch.testing.assert_close(eye + back.turn(p), R.mT, **CLOSE)
    large = eye + variant.turn({"rot": data.draw(st.floats(-1e6, 1e6)) * p["rot"]})
    if variant.block_size == 2:
        assert (large[:, 0, 0].clamp(-1, 1).arccos() <= variant.max_rotation_angle + 1e-7).all()
    assert large.isfinite().all()


@over("antipastorotation", "antipastorotation-U")
def test_parts_of_a_rotation(layer, data):
    """Without ds the adapted part keeps its singular values; without rot only they change."""
    p = layer.trained

    def delta_without(name):
        p_without = {**p, name: torch.zeros_like(p[name])}
        return layer.variant.merged(layer.weight, p_without)[0] - layer.weight.matrix

    turned = delta_without("ds") + p["U"] * p["S"] @ p["V"]
    torch.testing.assert_close(turned.norm(), p["S"].norm(), **CLOSE)
    values = torch.linalg.svdvals(turned)[: layer.variant.r]
    torch.testing.assert_close(values, p["S"], rtol=1e-9, atol=1e-9)
    shifted = layer.variant.coeff * p["U"] * p["ds"] @ p["V"]
    torch.testing.assert_close(delta_without("rot"), shifted, **CLOSE)


@over(*SSVDS)
def test_ssvd_is_the_dense_formula(layer, data):
    """dW = U [ (S + dS) G - S ] V with the orthogonal G = (I - K)(I + K)⁻¹.

    The approximate G = I - 2K has an error of O(|K|²).
    """
    p, r = layer.trained, layer.variant.r
    K, eye = torch.zeros(r, r, dtype=torch.float64), torch.eye(r, dtype=torch.float64)
    K[tuple(torch.triu_indices(r, r, 1))] = p["k"]
    K = K - K.mT
    strict, approximate = (eye - K) @ torch.linalg.inv(eye + K), eye - 2 * K
    torch.testing.assert_close(strict @ strict.mT, eye, **CLOSE)
    error, norm = (torch.linalg.matrix_norm(M, 2) for M in (strict - approximate, K))
    assert error <= 2 * norm**2 + 1e-12
    G = approximate if layer.variant.approximate else strict
    inner = (p["S"] + p["dS"]).diag() @ G - p["S"].diag()
    torch.testing.assert_close(delta(layer), p["U"] @ inner @ p["V"], **CLOSE)


def test_ssvd_of_one_direction(tmp_path):
    """It has nothing to rotate, so one leaf is empty."""
    model, adapter, params = adapted(lf.SSVD(r=1), mlp(), targets=lf.Targets(roles=()))
    assert params["0.lora_k"].shape == (0,)
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    x = torch.randn(3, 6)
    assert torch.equal(again(model, loaded, x), adapter(model, params, x))


# steering


@over("ssteer")
def test_steering(layer, data):
    """dS is (Uᵀ h) sqrt(S) of length 1, and the output is linear in alpha."""
    p, x, base_out = layer.trained, layer.x, layer.base(layer.x)
    S, V = triplets(layer)
    direction = (layer.stats @ p["U"]) * S.sqrt()
    torch.testing.assert_close(p["dS"], direction / direction.norm(), **CLOSE)

    def at(alpha):
        variant = dataclasses.replace(layer.variant, alpha=alpha)
        return variant.apply(x, base_out, layer.weight, p)

    assert torch.equal(at(0.0), base_out)
    alpha = data.draw(st.floats(-8, 8))
    torch.testing.assert_close(at(alpha) - base_out, alpha * (at(1.0) - base_out), **CLOSE)
    torch.testing.assert_close(at(1.0), base_out + (S * p["dS"] * (x @ V.mT)) @ p["U"].mT, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steering_by_nothing_is_the_base(dtype):
    model, batch = tiny_llama().to(dtype), text_batch()
    variant = lf.SSteer(r=4, alpha=3.0)
    adapter, params = lf.adapt(model, variant, targets=Q_V, **data_for(variant, model, Q_V))
    assert params == {}
    steered = adapter(model, params, batch).logits
    off = adapter.replace(alpha=0.0)(model, params, batch).logits
    assert torch.equal(off, model(**batch).logits)
    assert not torch.equal(steered, off)


def test_steering_from_two_collections(tmp_path):
    """The recipe of its module; it saves, loads and merges without a trainable leaf."""
    model, positive, negative = tiny_llama(), text_batch(), text_batch()
    means = [lf.collect(model, Q_V, [batch], lf.OutputMeans()) for batch in (positive, negative)]
    difference = {path: means[0][path] - means[1][path] for path in means[0]}
    adapter, params = lf.adapt(model, lf.SSteer(r=4, alpha=2.0), targets=Q_V, stats=difference)
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    expected = adapter(model, params, positive).logits
    assert torch.equal(again(model, loaded, positive).logits, expected)
    assert adapter.init(model) == {}
    model.load_state_dict(lf.merge(adapter, model, params), strict=False)
    torch.testing.assert_close(model(**positive).logits, expected)


def test_steering_needs_a_difference():
    model = tiny_llama()
    message = r"q_proj': SSteer steers along a difference of mean outputs: pass stats="
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, lf.SSteer(r=4), targets=Q_V)
    means = lf.collect(model, Q_V, [text_batch()], lf.OutputMeans())
    zero = {path: mean - mean for path, mean in means.items()}
    with pytest.raises(lf.LoraFuncError, match=r"q_proj': .* this one is 0 or not finite"):
        lf.adapt(model, lf.SSteer(r=4), targets=Q_V, stats=zero)


# hyperparameters


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        (lf.AntiPaSTO(), 14_336),
        (lf.AntiPaSTORotation(), 35_840),
        (lf.AntiPaSTORotation(rotate_basis="none"), 14_336),
        (lf.AntiPaSTOCorDA(), 14_336),
        (lf.AntiPaSTOAblate(), 14_392),
        (lf.AntiPaSTOArrow(), 17_472),
        (lf.SSteer(), 0),
    ],
    ids=lambda value: value.name() if isinstance(value, lf.Variant) else None,
)
def test_counts_on_qwen3(variant, count):
    """Counts on q and v of the 28 layers of Qwen3-0.6B, with the defaults."""
    with torch.device("meta"):
        layers = [variant.like(lf.Weight(torch.empty(d_out, 1024)), {}) for d_out in (2048, 1024)]
    sizes = [leaf.numel() for params in layers for leaf in params.trainable.values()]
    assert 28 * sum(sizes) == count


bad: Any = lf  # for calls that a type checker refuses, too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: bad.AntiPaSTO(coeff=math.inf),
            r"AntiPaSTO\(coeff=inf\): coeff must be a finite number",
        ),
        (lambda: bad.AntiPaSTO(pool="max"), "pool must be 'rms' or 'mean_abs'"),
        (lambda: bad.AntiPaSTO(suppress_only=1), "suppress_only must be False or True"),
        (
            lambda: bad.AntiPaSTORotation(r=6),
            r"AntiPaSTORotation\(r=6, block_size=4\): block_size must be at least 2 and divide r",
        ),
        (
            lambda: bad.AntiPaSTORotation(block_size=1),
            "block_size must be at least 2 and divide r",
        ),
        (lambda: bad.AntiPaSTORotation(max_rotation_angle=3.2), "must be below pi"),
        (
            lambda: bad.AntiPaSTORotation(rotate_basis="W"),
            "rotate_basis must be 'V' or 'U' or 'none'",
        ),
        (lambda: bad.AntiPaSTOCorDA(cov_eps=0), "cov_eps must be a finite number above 0"),
        (
            lambda: bad.AntiPaSTOAblate(r=2, k=3),
            r"AntiPaSTOAblate\(r=2, k=3\): k must be at most r",
        ),
        (lambda: bad.AntiPaSTOAblate(init_alpha=1.5), "init_alpha must be at most 1"),
        (
            lambda: bad.AntiPaSTOAblate(init_alpha=0),
            "init_alpha must be a finite number above 0",
        ),
        (
            lambda: bad.AntiPaSTOArrow(r=8, block=8),
            r"AntiPaSTOArrow\(r=8, block=8\): block must be below r",
        ),
        (lambda: bad.SSVD(approximate="yes"), "approximate must be False or True"),
        (lambda: bad.SSteer(alpha="1"), r"SSteer\(alpha='1'\): alpha must be a finite number"),
    ],
)
def test_hyperparameters_are_checked(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        make()


# changes at runtime


def test_replace_at_runtime():
    """A replaced coeff gives a new adapter that follows the formula; the old one is unchanged."""
    model, adapter, params = adapted(lf.AntiPaSTO(r=4))
    batch = text_batch()
    before, variants = adapter(model, params, batch).logits, dict(adapter.variants)
    reversed_ = adapter.replace(coeff=-1.0)
    assert {getattr(variant, "coeff", None) for variant in reversed_.variants.values()} == {-1.0}
    negative = {key: -leaf for key, leaf in params.items()}
    after = reversed_(model, params, batch).logits
    assert torch.equal(after, adapter(model, negative, batch).logits)
    assert not torch.equal(after, before)
    assert dict(adapter.variants) == variants
    assert torch.equal(adapter(model, params, batch).logits, before)
    off = adapter.replace(coeff=0.0)
    assert torch.equal(off(model, params, batch).logits, model(**batch).logits)


def test_replace_leaves_other_variants_alone():
    rules = {"q_proj": lf.AntiPaSTO(r=4), "v_proj": lf.LoRA(r=2)}
    model, adapter, params = adapted(rules)
    other = adapter.replace(coeff=0.5)
    assert {type(variant) for variant in other.variants.values()} == {lf.AntiPaSTO, lf.LoRA}
    assert other(model, params, text_batch()).logits.isfinite().all()


@pytest.mark.parametrize(
    "variant", [lf.AntiPaSTO(r=4), lf.AntiPaSTOArrow(r=4, block=2), lf.AntiPaSTOCorDA(r=4)], ids=str
)
def test_replace_of_what_cannot_be_replaced(variant):
    model = tiny_llama()
    adapter, _ = lf.adapt(model, variant, targets=Q_V, **data_for(variant, model, Q_V))
    unknown = r"no variant of this adapter has a field 'coef'.*coeff"
    with pytest.raises(lf.LoraFuncError, match=unknown):
        adapter.replace(coef=-1.0)
    other_shapes = r"\{'r': 8\} needs other parameters than .*: call lf.adapt"
    with pytest.raises(lf.LoraFuncError, match=other_shapes):
        adapter.replace(r=8)
    with pytest.raises(lf.LoraFuncError, match="coeff must be a finite number"):
        adapter.replace(coeff="1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", [*ABLATE, "antipasto", "antipastoarrow", "antipastorotation", "antipastodplr", "ssvd"]
)
def test_parameters_in_another_dtype_than_the_constants(name, dtype, model_dtype):
    """Forward, gradient and merge of a float64 model with float32 parameters, and vice versa."""
    model = mlp().to(model_dtype)
    variant = CASES[name].make(r=4)
    adapter, params = lf.adapt(model, variant, targets=lf.Targets(roles=()), dtype=dtype)
    x = torch.randn(3, 6, dtype=model_dtype)
    grads = torch.func.grad(lambda p: adapter(model, p, x).square().sum())(trained(params, 0.01))
    assert {leaf.dtype for leaf in grads.values()} == {dtype}
    assert {leaf.dtype for leaf in lf.merge(adapter, model, params).values()} == {model_dtype}


def test_stats_come_from_the_layer_itself():
    """The statistics that these tests pass equal those of a calibration."""
    model = mlp().double()
    x = torch.randn(64, 6, dtype=torch.float64)
    found = lf.collect(model, ["0"], [x], lf.Projections())["0"]
    direct = lf.Projections()
    state = direct.update(direct.init(weight_of(model[0])), model[0](x))
    torch.testing.assert_close(found, direct.finalize({"0": state})["0"])


def test_skew_matrices():
    """v fills the upper triangle row by row, and the lower one is its negative.

    Also covers size 1, vmap and the second derivative.
    """
    v = torch.arange(1.0, 7.0, dtype=torch.float64)
    rows = [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]
    expected = torch.tensor(rows, dtype=torch.float64)
    assert torch.equal(skew(v, 4), expected)
    assert torch.equal(skew(torch.zeros(0), 1), torch.zeros(1, 1))
    both = torch.vmap(lambda row: skew(row, 4))(torch.stack([v, -v]))
    assert torch.equal(both, torch.stack([expected, -expected]))
    leaf = v.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda row: skew(row, 4).square(), leaf)


def test_skew_keeps_nothing_of_size_n_cubed():
    """A basis of all skew matrices would hold n^4 / 2 numbers: 32 MiB for one layer with r=64."""
    kept = []
    v = torch.randn(64 * 63 // 2, requires_grad=True)

    def pack(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        skew(v, 64)
    assert sum(kept) <= 4 * 64 * 64
