"""What the AntiPaSTO family, SSVD and SSteer claim: adapters along singular directions of the weight."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Layer, data_for, layers, stats_of
from hypothesis import assume, given
from hypothesis import strategies as st
from models import adapted, mlp, text_batch, tiny_llama, trained
from torch import Tensor

import lora_func as lf
from lora_func import numerics
from lora_func.numerics import skew
from lora_func.variants.antipastoablate import directions
from lora_func.variants.ssvd import inverse_cayley_minus_identity
from lora_func.weight import weight_of

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
GAIN = ("antipasto", "antipasto-data", "antipasto-suppress", "antipastocorda")
ARROW = ("antipastoarrow", "antipastoarrow-data")
ABLATE = ("antipastoablate", "antipastoablate-2")
ROTATION = ("antipastorotation", "antipastorotation-U", "antipastorotation-none")
SSVDS = ("ssvd", "ssvd-approximate")
ALL = (*GAIN, *ARROW, *ABLATE, *ROTATION, *SSVDS, "ssteer")
Q_V = lf.Targets(names=(r"q_proj$", r"v_proj$"))


def over(*names: str):
    """Runs a test on drawn layers of each of these cases, with five tokens."""

    def decorate(test):
        def run(case, data):
            test(data.draw(layers(case, sizes=st.integers(2, 24), leads=((5,),))), data)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        cases = [pytest.param(CASES[name], id=name) for name in names]
        return pytest.mark.parametrize("case", cases)(given(data=st.data())(run))

    return decorate


def bias(layer: Layer) -> Tensor:
    return torch.zeros(layer.weight.shape[0], dtype=torch.float64) if layer.weight.bias is None else layer.weight.bias


def delta(layer: Layer) -> Tensor:
    return layer.variant.merged(layer.weight, layer.trained)[0] - layer.weight.matrix


def triplets(layer: Layer) -> tuple[Tensor, Tensor]:
    """S and V that belong to the layer's own U, which may hold any of the left singular vectors."""
    U, S, V = torch.linalg.svd(layer.weight.matrix, full_matrices=False)
    overlap = U.mT @ layer.trained["U"]
    kept = overlap.abs().argmax(0)
    return S[kept], V[kept] * overlap.gather(0, kept[None]).mT.sign()


def core(layer: Layer) -> Tensor:
    """K [r, r] of out = base_out + (z Kᵀ) Uᵀ, from the formulas."""
    variant, p = layer.variant, layer.trained
    if isinstance(variant, lf.AntiPaSTOAblate):
        C = p["c"] / p["c"].norm() if variant.k == 1 else torch.linalg.qr(p["c"]).Q
        return -variant.coeff * C @ p["a"].diag() @ C.mT
    g = variant.coeff * (p["g"].clamp(max=0) if variant.suppress_only else p["g"])
    gain = torch.where(g > 0, g, g.exp() - 1).diag()
    return torch.block_diag(variant.coeff * p["M"], gain) if "M" in p else gain


# what they have in common


@over(*ALL)
def test_the_output_moves_along_the_directions(layer, data):
    """out - base_out lies in the span of U, whose columns are orthonormal, and the bias stays as it is."""
    U, moved = layer.trained["U"], layer.at({}) - layer.base(layer.x)
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), **CLOSE)
    torch.testing.assert_close(moved @ U @ U.mT, moved, **CLOSE)
    zero = torch.zeros_like(layer.x)
    torch.testing.assert_close(layer(layer.trained, zero), layer.base(zero), **CLOSE)


@over("antipasto", "antipasto-data", "antipasto-suppress", *ARROW, *ABLATE)
def test_the_form_in_outputs_is_the_form_in_inputs(layer, data):
    """(base_out - b) U = S (V x), for directions that data or their rank has chosen."""
    S, V = triplets(layer)
    z = S * (layer.x @ V.mT)
    torch.testing.assert_close(layer.at({}), layer.base(layer.x) + z @ core(layer).mT @ layer.trained["U"].mT, **CLOSE)


@over(*GAIN, *ARROW, *ABLATE)
def test_the_weight_is_that_of_the_core(layer, data):
    """W_eff = (I + U K Uᵀ) W; also for directions that are no singular vectors of W."""
    U, W = layer.trained["U"], layer.weight.matrix
    torch.testing.assert_close(delta(layer), U @ core(layer) @ U.mT @ W, **CLOSE)


@over(*GAIN, *ARROW, *ABLATE)
def test_coeff_of_zero_is_the_base(layer, data):
    """To the bit, whatever was learned."""
    off = dataclasses.replace(layer.variant, coeff=0.0)
    base_out = layer.base(layer.x)
    assert torch.equal(off.apply(layer.x, base_out, layer.weight, layer.trained), base_out)


@over("antipasto-data", "antipastoarrow-data", "antipastorotation-U")
def test_data_chooses_the_directions(layer, data):
    """Those that the tokens excite most, by S_i |v_i x|, in descending order of S."""
    U, S, V = torch.linalg.svd(layer.weight.matrix, full_matrices=False)
    kept = layer.stats.topk(layer.variant.r).indices.sort().values
    overlap = (U[:, kept] * layer.trained["U"]).sum(0)
    torch.testing.assert_close(overlap.abs(), torch.ones_like(overlap), **CLOSE)
    x, weight = layer.x, layer.weight
    for pool, direct in (("rms", lambda t: t.square().mean(0).sqrt()), ("mean_abs", lambda t: t.abs().mean(0))):
        statistic = lf.Projections(pool=pool)
        state = statistic.update(statistic.init(weight), layer.base(x))
        torch.testing.assert_close(statistic.finalize({"": state})[""], direct(S * (x @ V.mT)), **CLOSE)


@pytest.mark.parametrize("kind", [lf.AntiPaSTO, lf.AntiPaSTOArrow, lf.AntiPaSTORotation, lf.AntiPaSTOCorDA, lf.AntiPaSTOAblate])
@pytest.mark.parametrize("calibrated", [False, True])
def test_more_directions_than_the_layer_has(kind, calibrated):
    """Named, also where the data would choose among them."""
    variant, weight = kind(r=12), lf.Weight(torch.randn(8, 20))
    with pytest.raises(lf.LoraFuncError, match=r"r must be at most 8 there|starts from .* of data"):
        variant.init(weight, None, stats_of(variant, weight) if calibrated else None)


@pytest.mark.parametrize("name", [*ABLATE, *ROTATION[:2], "ssvd"])
def test_small_solves_are_not_rounded_by_autocast(name):
    """Rotations stay orthogonal, and ablated directions orthonormal, to what float32 resolves."""
    variant, weight = CASES[name].make(r=8), lf.Weight(torch.randn(16, 16))
    params = variant.init(weight, torch.Generator().manual_seed(0))
    p = {key: leaf + 0.3 * torch.randn_like(leaf) for key, leaf in params.trainable.items()}
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(variant, lf.AntiPaSTOAblate):
            R = directions(params.frozen["U"], p["c"])
        elif isinstance(variant, lf.SSVD):
            R = torch.eye(8) + inverse_cayley_minus_identity(skew(p["k"], 8))
        else:
            R = torch.eye(variant.block_size) + variant.turn(p)
    torch.testing.assert_close(R.mT @ R, torch.eye(R.shape[-1]).expand_as(R.mT @ R), rtol=0, atol=2e-6)


# gains


@over(*GAIN)
def test_gains(layer, data):
    """Never negative, and monotone in g; one that suppresses only shrinks what lies along its directions."""
    variant = dataclasses.replace(layer.variant, coeff=data.draw(st.floats(0, 3)))
    g = torch.tensor(data.draw(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)), dtype=torch.float64).sort().values
    gain = 1 + numerics.gain(g, variant.coeff, variant.suppress_only)
    assert (gain >= 0).all()
    assert (gain.diff() >= 0).all()
    if variant.suppress_only:
        assert (gain <= 1).all()
        U, b = layer.trained["U"], bias(layer)
        out, base_out = variant.apply(layer.x, layer.base(layer.x), layer.weight, layer.trained), layer.base(layer.x)
        assert (((out - b) @ U).norm(dim=-1) <= ((base_out - b) @ U).norm(dim=-1) * (1 + 1e-12)).all()


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
    """Those of W_eff are S_i (1 + gain_i) along the directions, and the others as they were; equal gains scale W."""
    S, _ = triplets(layer)
    everything = torch.linalg.svdvals(layer.weight.matrix)
    rest = [s for s in everything.tolist() if (S - s).abs().min() > 1e-12]
    assume(len(rest) + len(S) == len(everything))
    expected = torch.cat([S * (1 + core(layer).diag()), torch.tensor(rest, dtype=torch.float64)]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight.matrix + delta(layer)), expected, **CLOSE)
    full = lf.AntiPaSTO(r=min(layer.weight.shape))
    frozen = full.init(layer.weight, None).frozen
    W, _ = full.merged(layer.weight, {**frozen, "g": torch.full((full.r,), 0.4, dtype=torch.float64)})
    torch.testing.assert_close(W, 1.4 * layer.weight.matrix, **CLOSE)


# a basis oriented by data


def oriented(W: Tensor, C: Tensor, r: int, eps: float = 1e-12) -> Tensor:
    """U of AntiPaSTO-CorDA for the second moment C."""
    moments = lf.Moments(100, torch.zeros(len(C), dtype=C.dtype), 100 * C)
    return lf.AntiPaSTOCorDA(r=r, cov_eps=eps).init(lf.Weight(W), None, moments).frozen["U"]


def projector(U: Tensor) -> Tensor:
    return U @ U.mT


@over("antipastocorda")
def test_oblique_coordinates(layer, data):
    """W = U S P with P C Pᵀ = I: z = S (P x), and at full rank U S P is W itself."""
    W, C = layer.weight.matrix, layer.stats.about(0) + layer.variant.cov_eps * torch.eye(layer.weight.shape[1])
    d_out, d_in = W.shape
    U = oriented(W, layer.stats.about(0), min(d_out, d_in), layer.variant.cov_eps)
    values, Q = torch.linalg.eigh(C)
    S, V = torch.linalg.svd(W @ (Q * values.sqrt()) @ Q.mT, full_matrices=False)[1:]
    P = V @ (Q / values.sqrt()) @ Q.mT
    torch.testing.assert_close(P @ C @ P.mT, torch.eye(len(P), dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close((U.mT @ W).abs(), (S[:, None] * P).abs(), rtol=1e-6, atol=1e-7)  # up to signs
    torch.testing.assert_close(U.mT @ W @ C @ W.mT @ U, S.square().diag(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(U @ U.mT @ W, W, **CLOSE)


@over("antipastocorda")
def test_the_oriented_basis(layer, data):
    """Plain for C = I, the same for k C, the uncentred principal components of the outputs, and best for the data."""
    W, C, r = layer.weight.matrix, layer.stats.about(0), layer.variant.r
    d_in = W.shape[1]
    plain = torch.linalg.svd(W)[0][:, :r]
    S = torch.linalg.svdvals(W)
    values, vectors = torch.linalg.eigh(W @ C @ W.mT)
    gap = lambda s: len(s) <= r or s[r - 1] > 1.01 * s[r]  # noqa: E731
    assume(gap(S) and gap(values.flip(0)[: len(S)]))
    U = oriented(W, C, r)
    torch.testing.assert_close(projector(oriented(W, torch.eye(d_in, dtype=W.dtype), r)), projector(plain), rtol=0, atol=1e-8)
    torch.testing.assert_close(projector(oriented(W, data.draw(st.floats(0.1, 10)) * C, r)), projector(U), rtol=0, atol=1e-6)
    torch.testing.assert_close(projector(vectors[:, -r:]), projector(U), rtol=0, atol=1e-6)

    def lost(basis: Tensor) -> Tensor:
        """E |(W - W_r) x|²"""
        rest = W - projector(basis) @ W
        return (rest @ C @ rest.mT).trace()

    assert lost(U) <= lost(plain) * (1 + 1e-9) + 1e-9


def test_corda_needs_as_many_tokens_as_directions():
    few = lf.Moments(3, torch.zeros(8), torch.eye(8))
    with pytest.raises(lf.LoraFuncError, match=r"AntiPaSTOCorDA\(r=4\) needs at least 4 calibration tokens, and got 3"):
        lf.AntiPaSTOCorDA(r=4).init(lf.Weight(torch.randn(8, 8)), None, few)


def test_fresh_gains_need_no_data():
    model = tiny_llama()
    variant = lf.AntiPaSTOCorDA(r=4)
    adapter, params = lf.adapt(model, variant, targets=Q_V, calibration=[text_batch()])
    again = adapter.init(model)
    assert again.keys() == params.keys()
    assert all(not leaf.any() for leaf in again.values())


# the dense block


@over(*ARROW)
def test_routing(layer, data):
    """Along v_j the output moves by c M[i, j] S_j along u_i within the block, by its own gain in the tail, and else not."""
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
    gain = lf.AntiPaSTO(r=layer.variant.r)
    expected = gain.apply(layer.x, layer.base(layer.x), layer.weight, {"U": layer.trained["U"], "g": g})
    torch.testing.assert_close(layer.at({"M": F.elu(g[:b]).diag(), "g": g[b:]}), expected, **CLOSE)


# ablation


@over(*ABLATE)
def test_ablation(layer, data):
    """Whole, it leaves nothing along its directions and is idempotent; in part, it contracts. Its rank is at most k."""
    variant, p = dataclasses.replace(layer.variant, coeff=1.0), layer.trained
    base_out, b = layer.base(layer.x), bias(layer)
    D = directions(p["U"], p["c"])
    torch.testing.assert_close(D.mT @ D, torch.eye(variant.k, dtype=torch.float64), **CLOSE)
    whole = {**p, "a": torch.ones_like(p["a"])}
    out = variant.apply(layer.x, base_out, layer.weight, whole)
    torch.testing.assert_close((out - b) @ D, torch.zeros(5, variant.k, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(variant.apply(layer.x, out, layer.weight, whole), out, **CLOSE)
    part = variant.apply(layer.x, base_out, layer.weight, {**p, "a": torch.rand(variant.k, dtype=torch.float64)})
    assert ((part - b).norm(dim=-1) <= (base_out - b).norm(dim=-1) * (1 + 1e-12)).all()
    assert torch.linalg.matrix_rank(delta(layer)) <= variant.k


@over(*ABLATE)
def test_ablation_sees_only_directions(layer, data):
    c = data.draw(st.floats(0.1, 10)) * data.draw(st.sampled_from((-1, 1)))
    torch.testing.assert_close(layer.at({"c": c * layer.trained["c"]}), layer.at({}), **CLOSE)


@over(*ABLATE)
def test_size_of_the_ablation_at_init(layer, data):
    """It is the one adapter that does not start at the base: by coeff a0 |<base_out - b, F>|."""
    D, base_out = directions(layer.init["U"], layer.init["c"]), layer.base(layer.x)
    moved = (layer(layer.init) - base_out).norm(dim=-1)
    share = layer.variant.coeff * layer.variant.init_alpha
    torch.testing.assert_close(moved, share * ((base_out - bias(layer)) @ D).norm(dim=-1), **CLOSE)


@over("antipastoablate-2")
def test_ablation_starts_at_what_is_strongest(layer, data):
    """The top eigenvectors of E[z zᵀ], so no other pair within U carries more of the calibration outputs."""
    U, moments = layer.init["U"], layer.stats.about(bias(layer))
    values, vectors = torch.linalg.eigh(U.mT @ moments @ U)
    assume(len(values) == 2 or values[-2] > 1.01 * values[-3])
    torch.testing.assert_close(projector(directions(U, layer.init["c"])), projector(U @ vectors[:, -2:]), rtol=0, atol=1e-6)


def test_ablation_of_a_zero_direction():
    """Neither the output nor the gradient becomes NaN."""
    variant, weight = lf.AntiPaSTOAblate(r=4), lf.Weight(torch.randn(6, 6))
    params = variant.init(weight, None)
    x = torch.randn(3, 6)
    f = lambda c: variant.apply(x, weight(x), weight, {**params.frozen, **params.trainable, "c": c})  # noqa: E731
    out, vjp = torch.func.vjp(f, torch.zeros(4, 1))
    assert torch.equal(out, weight(x))
    assert vjp(out)[0].isfinite().all()


# rotations


@over(*ROTATION)
def test_rotation_is_the_dense_formula(layer, data):
    """dW = U [ diag(S + ds) R - S ] V, or U [ Rᵀ diag(S + ds) - S ] V, with R written out block by block."""
    variant, p = layer.variant, layer.trained
    n, L = variant.block_size, 2 * math.tan(variant.max_rotation_angle / 2)
    blocks = []
    for v in p.get("rot", torch.zeros(0)):
        T = torch.zeros(n, n, dtype=torch.float64)
        T[tuple(torch.triu_indices(n, n, 1))] = v
        X = L * torch.tanh((T - T.mT) / 2 / L) / 2
        eye = torch.eye(n, dtype=torch.float64)
        blocks.append(torch.linalg.inv(eye - X) @ (eye + X))
    R = torch.block_diag(*blocks) if blocks else torch.eye(variant.r, dtype=torch.float64)
    shifted = (p["S"] + p["ds"]).diag()
    inner = R.mT @ shifted if variant.rotate_basis == "U" else shifted @ R
    torch.testing.assert_close(delta(layer), p["U"] @ (inner - p["S"].diag()) @ p["V"], **CLOSE)
    out = layer.base(layer.x) + layer.x @ delta(layer).mT
    torch.testing.assert_close(layer.at({}), out, **CLOSE)


@over("antipastorotation", "antipastorotation-U")
def test_rotations_are_orthogonal(layer, data):
    """R(-rot) is the inverse; a block of 2 turns by at most theta, however large its parameter is."""
    variant, p = layer.variant, layer.trained
    eye = torch.eye(variant.block_size, dtype=torch.float64)
    R = eye + variant.turn(p)
    torch.testing.assert_close(R @ R.mT, eye.expand_as(R), **CLOSE)
    torch.testing.assert_close(eye + variant.turn({"rot": -p["rot"]}), R.mT, **CLOSE)
    large = eye + variant.turn({"rot": data.draw(st.floats(-1e6, 1e6)) * p["rot"]})
    if variant.block_size == 2:
        assert (large[:, 0, 0].clamp(-1, 1).arccos() <= variant.max_rotation_angle + 1e-7).all()
    assert large.isfinite().all()


@over("antipastorotation", "antipastorotation-U")
def test_parts_of_a_rotation(layer, data):
    """Without ds the adapted part keeps its singular values; without rot only they change."""
    p, W = layer.trained, layer.weight.matrix
    part = p["U"] * p["S"] @ p["V"]
    turned = layer.variant.merged(layer.weight, {**p, "ds": torch.zeros_like(p["ds"])})[0] - W + part
    torch.testing.assert_close(turned.norm(), p["S"].norm(), **CLOSE)
    torch.testing.assert_close(torch.linalg.svdvals(turned)[: layer.variant.r], p["S"], rtol=1e-9, atol=1e-9)
    shifted = layer.variant.merged(layer.weight, {**p, "rot": torch.zeros_like(p["rot"])})[0] - W
    torch.testing.assert_close(shifted, p["U"] * p["ds"] @ p["V"], **CLOSE)


@over(*SSVDS)
def test_ssvd_is_the_dense_formula(layer, data):
    """dW = U [ (S + dS) G - S ] V with G = (I - K)(I + K)⁻¹, orthogonal, or G = I - 2K, which is O(|K|²) off."""
    p, r = layer.trained, layer.variant.r
    K, eye = torch.zeros(r, r, dtype=torch.float64), torch.eye(r, dtype=torch.float64)
    K[tuple(torch.triu_indices(r, r, 1))] = p["k"]
    K = K - K.mT
    strict, approximate = (eye - K) @ torch.linalg.inv(eye + K), eye - 2 * K
    torch.testing.assert_close(strict @ strict.mT, eye, **CLOSE)
    assert torch.linalg.matrix_norm(strict - approximate, 2) <= 2 * torch.linalg.matrix_norm(K, 2) ** 2 + 1e-12
    G = approximate if layer.variant.approximate else strict
    torch.testing.assert_close(delta(layer), p["U"] @ ((p["S"] + p["dS"]).diag() @ G - p["S"].diag()) @ p["V"], **CLOSE)


def test_ssvd_of_one_direction(tmp_path):
    """It has nothing to rotate, and a leaf without entries."""
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
    at = lambda alpha: dataclasses.replace(layer.variant, alpha=alpha).apply(x, base_out, layer.weight, p)  # noqa: E731
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
    steered, off = adapter(model, params, batch).logits, adapter.replace(alpha=0.0)(model, params, batch).logits
    assert torch.equal(off, model(**batch).logits)
    assert not torch.equal(steered, off)


def test_steering_from_two_collections(tmp_path):
    """As its file says; saved, loaded and merged without a trainable leaf."""
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
    with pytest.raises(lf.LoraFuncError, match=r"q_proj': SSteer steers along a difference of mean outputs: pass stats="):
        lf.adapt(model, lf.SSteer(r=4), targets=Q_V)
    means = lf.collect(model, Q_V, [text_batch()], lf.OutputMeans())
    with pytest.raises(lf.LoraFuncError, match=r"q_proj': .* and this one is 0 or not finite"):
        lf.adapt(model, lf.SSteer(r=4), targets=Q_V, stats={path: mean - mean for path, mean in means.items()})


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
    """On q and v of the 28 layers of Qwen3-0.6B, with the defaults."""
    with torch.device("meta"):
        layers = [variant.like(lf.Weight(torch.empty(d_out, 1024)), {}) for d_out in (2048, 1024)]
    assert 28 * sum(leaf.numel() for params in layers for leaf in params.trainable.values()) == count


@pytest.mark.parametrize("name", [*GAIN, *ARROW, *ABLATE, *ROTATION, *SSVDS, "ssteer"])
def test_what_is_expected_of_a_file_is_what_init_gives(name):
    """`like` and `init` agree in names and shapes, so files of data-dependent variants can be checked without data."""
    variant, weight = CASES[name].make(r=4), lf.Weight(torch.randn(12, 8))
    drawn = variant.init(weight, torch.Generator(), stats_of(variant, weight) if CASES[name].data else None)
    with torch.device("meta"):
        expected = variant.like(lf.Weight(torch.empty(12, 8)), {**drawn.trainable, **drawn.frozen})
    for given_, blank in ((drawn.trainable, expected.trainable), (drawn.frozen, expected.frozen)):
        assert {key: leaf.shape for key, leaf in given_.items()} == {key: leaf.shape for key, leaf in blank.items()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lf.AntiPaSTO(coeff=math.inf), r"AntiPaSTO\(coeff=inf\): coeff must be a finite number"),
        (lambda: lf.AntiPaSTO(pool="max"), "pool must be 'rms' or 'mean_abs'"),
        (lambda: lf.AntiPaSTO(suppress_only=1), "suppress_only must be False or True"),
        (
            lambda: lf.AntiPaSTORotation(r=6),
            r"AntiPaSTORotation\(r=6, block_size=4\): block_size must be at least 2 and divide r",
        ),
        (lambda: lf.AntiPaSTORotation(block_size=1), "block_size must be at least 2 and divide r"),
        (lambda: lf.AntiPaSTORotation(max_rotation_angle=3.2), "must be below pi"),
        (lambda: lf.AntiPaSTORotation(rotate_basis="W"), "rotate_basis must be 'V' or 'U' or 'none'"),
        (lambda: lf.AntiPaSTOCorDA(cov_eps=0), "cov_eps must be a finite number above 0"),
        (lambda: lf.AntiPaSTOAblate(r=2, k=3), r"AntiPaSTOAblate\(r=2, k=3\): k must be at most r"),
        (lambda: lf.AntiPaSTOAblate(init_alpha=1.5), "init_alpha must be at most 1"),
        (lambda: lf.AntiPaSTOAblate(init_alpha=0), "init_alpha must be a finite number above 0"),
        (lambda: lf.AntiPaSTOArrow(r=8, block=8), r"AntiPaSTOArrow\(r=8, block=8\): block must be below r"),
        (lambda: lf.SSVD(approximate="yes"), "approximate must be False or True"),
        (lambda: lf.SSteer(alpha="1"), r"SSteer\(alpha='1'\): alpha must be a finite number"),
    ],
)
def test_hyperparameters_are_checked(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        make()


# at runtime


def test_replace_at_runtime():
    """Another coeff is another adapter: its output is that of the formula, and the old adapter is as it was."""
    model, adapter, params = adapted(lf.AntiPaSTO(r=4))
    batch = text_batch()
    before, variants = adapter(model, params, batch).logits, dict(adapter.variants)
    reversed_ = adapter.replace(coeff=-1.0)
    assert {variant.coeff for variant in reversed_.variants.values()} == {-1.0}
    negative = {key: -leaf for key, leaf in params.items()}
    assert torch.equal(reversed_(model, params, batch).logits, adapter(model, negative, batch).logits)
    assert not torch.equal(reversed_(model, params, batch).logits, before)
    assert dict(adapter.variants) == variants
    assert torch.equal(adapter(model, params, batch).logits, before)
    assert torch.equal(adapter.replace(coeff=0.0)(model, params, batch).logits, model(**batch).logits)


def test_replace_leaves_other_variants_alone():
    rules = {"q_proj": lf.AntiPaSTO(r=4), "v_proj": lf.LoRA(r=2)}
    model, adapter, params = adapted(rules)
    other = adapter.replace(coeff=0.5)
    assert {type(variant) for variant in other.variants.values()} == {lf.AntiPaSTO, lf.LoRA}
    assert other(model, params, text_batch()).logits.isfinite().all()


@pytest.mark.parametrize("variant", [lf.AntiPaSTO(r=4), lf.AntiPaSTOArrow(r=4, block=2), lf.AntiPaSTOCorDA(r=4)], ids=str)
def test_replace_of_what_cannot_be_replaced(variant):
    model = tiny_llama()
    adapter, _ = lf.adapt(model, variant, targets=Q_V, **data_for(variant, model, Q_V))
    with pytest.raises(lf.LoraFuncError, match=r"no variant of this adapter has a field 'coef'.*coeff"):
        adapter.replace(coef=-1.0)
    with pytest.raises(lf.LoraFuncError, match=r"\{'r': 8\} takes other parameters than .*; adapt anew"):
        adapter.replace(r=8)
    with pytest.raises(lf.LoraFuncError, match="coeff must be a finite number"):
        adapter.replace(coeff="1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*ABLATE, "antipasto", "antipastoarrow", "antipastorotation", "ssvd"])
def test_parameters_in_another_dtype_than_the_constants(name, dtype, model_dtype):
    """A float64 model with float32 parameters and the other way round: forward, gradient and merge."""
    model = mlp().to(model_dtype)
    variant = CASES[name].make(r=4)
    adapter, params = lf.adapt(model, variant, targets=lf.Targets(roles=()), dtype=dtype)
    x = torch.randn(3, 6, dtype=model_dtype)
    grads = torch.func.grad(lambda p: adapter(model, p, x).square().sum())(trained(params, 0.01))
    assert {leaf.dtype for leaf in grads.values()} == {dtype}
    assert {leaf.dtype for leaf in lf.merge(adapter, model, params).values()} == {model_dtype}


def test_stats_come_from_the_layer_itself():
    """What the tests put in the place of a calibration is what one gives."""
    model = mlp().double()
    x = torch.randn(64, 6, dtype=torch.float64)
    found = lf.collect(model, ["0"], [x], lf.Projections())["0"]
    direct = lf.Projections()
    state = direct.update(direct.init(weight_of(model[0])), model[0](x))
    torch.testing.assert_close(found, direct.finalize({"0": state})["0"])
