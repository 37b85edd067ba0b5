"""Claims of each method: bounds, invariances, special cases, and its hyperparameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import CASES, layers
from hypothesis import assume, given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.linalg import compact_wy, low_rank_difference
from lora_func.testing import Layer
from lora_func.variants.dora import row_norms

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
sizes = st.integers(2, 40)
bad: Any = lf  # for calls that a type checker refuses, too


def weights(layer: Layer) -> torch.Tensor:
    return layer.variant.merged(layer.weight, layer.trained)[0]


def delta(layer: Layer) -> torch.Tensor:
    return weights(layer) - layer.weight.matrix


def drawn(name: str):
    return given(layer=layers(CASES[name], sizes=sizes, leads=((5,),)), data=st.data())


# LoRA


@drawn("lora")
def test_lora_sees_only_the_product(layer, data):
    c = data.draw(st.floats(0.1, 10))
    A, B = layer.trained["A"], layer.trained["B"]
    torch.testing.assert_close(layer.at({"A": c * A, "B": B / c}), layer.at({}), **CLOSE)
    assert torch.linalg.matrix_rank(delta(layer)) <= layer.variant.r


def test_lora_scales():
    assert lf.LoRA(r=32, alpha=64).scale == 2.0
    assert lf.LoRA(r=32, alpha=64, rslora=True).scale == pytest.approx(64 / math.sqrt(32))
    assert lf.PiSSA(r=9).scale == 1.0
    assert lf.PiSSA(r=9, rslora=True).scale == 3.0  # alpha=None means r


RSLORA = [kind for kind in lf.VARIANTS.values() if "rslora" in kind.__dataclass_fields__]


@pytest.mark.parametrize("kind", RSLORA, ids=lambda kind: kind.name())
def test_rslora_divides_by_the_root_of_r(kind):
    assert kind(r=16, alpha=8.0).scale == 0.5
    assert kind(r=16, alpha=8.0, rslora=True).scale == 2.0
    with pytest.raises(lf.LoraFuncError, match=r"rslora=1\): rslora must be False or True"):
        kind(rslora=1)


def test_what_peft_scales_by_rslora_takes_it():
    takes = {kind for kind in lf.VARIANTS.values() if (kind.card.peft or ("",))[0] == "LoraConfig"}
    assert takes <= set(RSLORA)


@pytest.mark.parametrize(("start", "std"), [("kaiming", (3 * 4096) ** -0.5), ("gaussian", 1 / 8)])
def test_what_lora_draws_a_from(start, std):
    """The standard deviation is known to 1 % from 32,768 numbers, with a wide margin."""
    generator, weight = torch.Generator().manual_seed(0), lf.Weight(torch.empty(16, 4096))
    drawn = lf.LoRA(r=8, start=start).init(weight, generator).trainable
    assert drawn["A"].std().item() == pytest.approx(std, rel=0.02)
    assert not drawn["B"].any()


@drawn("lora-bias")
def test_the_bias_of_lora_is_scaled_like_its_product(layer, data):
    A, B, b, s = *(layer.trained[name] for name in ("A", "B", "b")), layer.variant.scale
    expected = layer.base(layer.x) + s * (layer.x @ A.mT @ B.mT + b)
    torch.testing.assert_close(layer.at({}), expected, **CLOSE)


# PiSSA


@drawn("pissa")
def test_pissa_starts_at_the_principal_part(layer, data):
    U, S, V = torch.linalg.svd(layer.weight.matrix, full_matrices=False)
    r = layer.variant.r
    alpha = data.draw(st.floats(0.5, 64))
    for variant in (layer.variant, dataclasses.replace(layer.variant, alpha=alpha)):
        frozen = variant.init(layer.weight, None).frozen
        start = variant.scale * frozen["B0"] @ frozen["A0"]
        torch.testing.assert_close(start, U[:, :r] * S[:r] @ V[:r], **CLOSE)


@drawn("pissa")
def test_pissa_is_the_difference_of_two_products(layer, data):
    A, B, A0, B0 = (layer.trained[name] for name in ("A", "B", "A0", "B0"))
    torch.testing.assert_close(delta(layer), layer.variant.scale * (B @ A - B0 @ A0), **CLOSE)
    rank_2r = low_rank_difference(A, B, A0, B0)
    lora = lf.LoRA(r=2 * layer.variant.r, alpha=2 * layer.variant.r * layer.variant.scale)
    exported = lora.apply(layer.x, layer.base(layer.x), layer.weight, dict(zip("AB", rank_2r)))
    torch.testing.assert_close(exported, layer.at({}), **CLOSE)


# InitAB


def test_both_factors_of_initab_are_drawn_alike():
    """From U(-1, 1) / sqrt(d_in), A as well as B, and both have a gradient at init."""
    weight, generator = lf.Weight(torch.empty(2000, 3000)), torch.Generator().manual_seed(0)
    for leaf in lf.InitAB(r=8).init(weight, generator).frozen.values():
        assert leaf.abs().max().item() == pytest.approx(3000**-0.5, rel=1e-3)
        assert leaf.std().item() == pytest.approx((3 * 3000) ** -0.5, rel=0.02)


@drawn("initab")
def test_both_factors_of_initab_learn_at_once(layer, data):
    def loss(leaves):
        return (layer({**layer.init, **leaves}) * layer.base(layer.x).cos()).sum()

    grads = torch.func.grad(loss)({name: layer.init[name] for name in layer.names})
    assert all(grad.abs().max() > 0 for grad in grads.values())


# DoRA


@drawn("dora")
def test_dora_row_norms(layer, data):
    """The rows of W_eff have the lengths |m|. The norm needs no dense temporary."""
    torch.testing.assert_close(weights(layer).norm(dim=1), layer.trained["m"].abs(), **CLOSE)
    A, B, s = layer.trained["A"], layer.trained["B"], layer.variant.scale
    cheap = row_norms(A, B, layer.weight, layer.trained["w2"], s)
    torch.testing.assert_close(cheap, (layer.weight.matrix + s * B @ A).norm(dim=1), **CLOSE)


@drawn("dora")
def test_dora_cheap_norm_in_float32(layer, data):
    A, B = layer.trained["A"].float(), layer.trained["B"].float()
    W, s = layer.weight.matrix.float(), layer.variant.scale
    dense = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    without_cancellation = W.norm(dim=1) + s * (B.abs() @ A.abs()).norm(dim=1)
    assume((dense > 0.1 * without_cancellation).all())
    cheap = row_norms(A, B, lf.Weight(W), W.square().sum(1), s)
    torch.testing.assert_close(cheap.double(), dense, rtol=1e-5, atol=0)


def test_dora_survives_a_row_that_cancels():
    """For V_i = 0 the norm is clamped at the resolution of its dtype, and all stays finite."""
    W, A = torch.eye(3), torch.eye(3)
    B = torch.diag(torch.tensor([-1.0, 0.5, 0.0]))
    norms = row_norms(A, B, lf.Weight(W), torch.ones(3), 1.0)
    assert norms.isfinite().all()
    assert norms[0] >= 1e-4
    torch.testing.assert_close(norms[1:], torch.tensor([1.5, 1.0]))


@drawn("dora")
def test_dora_magnitude_alone(layer, data):
    """With B = 0, out - b = (m / |W_i|)(y0 - b)."""
    b = 0 if layer.weight.bias is None else layer.weight.bias
    rho = layer.trained["m"] / layer.weight.matrix.norm(dim=1)
    out = layer.at({"B": torch.zeros_like(layer.trained["B"])})
    torch.testing.assert_close(out - b, rho * (layer.base(layer.x) - b), **CLOSE)


@drawn("dora")
def test_dora_gradient_is_that_with_frozen_norms(layer, data):
    b = 0 if layer.weight.bias is None else layer.weight.bias
    A, B, s, W = layer.trained["A"], layer.trained["B"], layer.variant.scale, layer.weight.matrix
    n = (W + s * B @ A).norm(dim=1)
    target = torch.randn_like(layer.base(layer.x))

    def dense(leaves):
        V = W + s * leaves["B"] @ leaves["A"]
        return ((layer.x @ ((leaves["m"] / n)[:, None] * V).mT + b) * target).sum()

    leaves = {name: layer.trained[name] for name in layer.names}
    given_ = torch.func.grad(lambda p: (layer.at(p) * target).sum())(leaves)
    torch.testing.assert_close(given_, torch.func.grad(dense)(leaves), **CLOSE)


# DeLoRA


@drawn("delora")
def test_delora_bound(layer, data):
    """|dW|_F <= |lam| max wn for A and B of any size."""
    c = data.draw(st.floats(0.01, 1e4))
    trained = {**layer.trained, "A": c * layer.trained["A"], "B": c * layer.trained["B"]}
    W = layer.variant.merged(layer.weight, trained)[0]
    bound = trained["lam"].abs() * trained["wn"].max()
    assert (W - layer.weight.matrix).norm() <= bound * (1 + 1e-9)
    torch.testing.assert_close(trained["wn"], layer.weight.matrix.norm(dim=0), **CLOSE)


@drawn("delora")
def test_delora_invariances(layer, data):
    A, B, lam = (layer.trained[name] for name in ("A", "B", "lam"))
    assume((A.norm(dim=1) > 1e-3).all() and (B.norm(dim=0) > 1e-3).all())
    c = 0.5 + torch.rand(layer.variant.r, dtype=torch.float64)
    torch.testing.assert_close(layer.at({"A": c[:, None] * A, "B": B * c}), layer.at({}), **CLOSE)
    torch.testing.assert_close(layer.at({"A": -A, "B": -B}), layer.at({}), **CLOSE)
    base = layer.base(layer.x)
    tripled = layer.at({"lam": 3 * lam}) - base
    torch.testing.assert_close(tripled, 3 * (layer.at({}) - base), **CLOSE)
    grads = torch.func.grad(lambda p: layer.at(p).square().sum())({"A": A, "B": B})
    size = layer.at({}).square().sum()
    assert ((grads["A"] * A).sum(1).abs() <= 1e-9 * size).all()
    assert ((grads["B"] * B).sum(0).abs() <= 1e-9 * size).all()


@drawn("delora-paper")
def test_delora_of_the_paper_subtracts_the_frozen_copy_at_lambda0(layer, data):
    """Eq. 9: Δ(A, B, lam) - Δ(A0, B0, lambda0)."""

    def update(A, B, lam):
        A, B = A.double(), B.double()
        unit_A, unit_B = A / A.norm(dim=1, keepdim=True), B / B.norm(dim=0)
        return lam / layer.variant.r * unit_B @ unit_A * layer.trained["wn"]

    p = layer.trained
    expected = update(p["A"], p["B"], p["lam"]) - update(p["A0"], p["B0"], layer.variant.lambda0)
    torch.testing.assert_close(delta(layer), expected, **CLOSE)


def test_delora_start_was_called_init():
    """The old name works, with a warning that names the new one."""
    with pytest.warns(DeprecationWarning, match=r"DeLoRA\(init=..\) is deprecated .*; use start="):
        old = bad.DeLoRA(init="paper")
    assert old == lf.DeLoRA(start="paper")


# IA3


@drawn("ia3")
def test_ia3_gates(layer, data):
    """Gates multiply. A gate of 0 switches the output off, bias included."""
    y, d = layer.base(layer.x), layer.trained["d"]
    twice = layer.variant.apply(layer.x, layer.at({}), layer.weight, {"d": d})
    torch.testing.assert_close(twice, layer.at({"d": (1 + d) ** 2 - 1}), **CLOSE)
    assert torch.equal(layer.at({"d": -torch.ones_like(d)}), torch.zeros_like(y))


@drawn("ia3ff")
def test_ia3ff_gates(layer, data):
    """With all gates at 0, only the bias is left."""
    d = layer.trained["d"]
    off = layer.at({"d": -torch.ones_like(d)})
    bias = layer.weight.bias
    alone = torch.zeros_like(off) if bias is None else bias.expand_as(off)
    torch.testing.assert_close(off, alone, **CLOSE)


# HRA


@drawn("hra")
def test_hra_is_a_rotation(layer, data):
    """R is orthogonal with determinant (-1)^r = 1. Norms of x and singular values of W stay."""
    U, x = layer.trained["U"], layer.x
    V, K = compact_wy(U)
    eye = torch.eye(U.shape[1], dtype=U.dtype)
    R = eye - V.mT @ K  # x Rᵀ for rows, so this is Rᵀ
    torch.testing.assert_close(R @ R.mT, eye, **CLOSE)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=U.dtype), **CLOSE)
    turned = layer.variant.transform_input(x, layer.trained)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **CLOSE)
    singular = torch.linalg.svdvals
    torch.testing.assert_close(singular(weights(layer)), singular(layer.weight.matrix), **CLOSE)


@drawn("hra")
def test_hra_is_the_product_of_reflections(layer, data):
    U = layer.trained["U"]
    R = torch.eye(U.shape[1], dtype=U.dtype)
    for u in U:
        R = R - 2 * R @ torch.outer(u, u) / u.square().sum()  # R H_j
    turned = layer.variant.transform_input(layer.x, layer.trained)
    torch.testing.assert_close(turned, layer.x @ R.mT, **CLOSE)
    torch.testing.assert_close(weights(layer), layer.weight.matrix @ R, **CLOSE)


@drawn("hra")
def test_hra_sees_only_directions(layer, data):
    c = data.draw(st.floats(0.1, 10)) * data.draw(st.sampled_from((-1, 1)))
    torch.testing.assert_close(layer.at({"U": c * layer.trained["U"]}), layer.at({}), **CLOSE)


def test_hra_init_norm():
    weight = lf.Weight(torch.zeros(5, 48))
    norms = lf.HRA(r=8).init(weight, None).trainable["U"].norm(dim=1)
    torch.testing.assert_close(norms, torch.full((8,), math.sqrt(2 * 48 / (3 * 8))))
    norms = lf.HRA(r=8, init_norm=0.5).init(weight, None).trainable["U"].norm(dim=1)
    torch.testing.assert_close(norms, torch.full((8,), 0.5))


def test_hra_survives_a_zero_vector():
    U = torch.randn(4, 6)
    U[1] = 0

    def f(U):
        return lf.HRA(r=4).transform_input(torch.ones(2, 6), {"U": U})

    assert f(U).isfinite().all()
    assert torch.func.grad(lambda U: f(U).sum())(U).isfinite().all()


# hyperparameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bad.LoRA(r=0), r"LoRA\(r=0\): r must be an integer of at least 1"),
        (lambda: bad.LoRA(r=2.0), r"LoRA\(r=2.0\): r must be an integer"),
        (lambda: bad.LoRA(r=True), r"LoRA\(r=True\): r must be an integer"),
        (
            lambda: bad.InitAB(r=3, start="orthogonal"),
            r"InitAB\(r=3, start='orthogonal'\): r must be even there",
        ),
        (lambda: bad.LoRA(alpha=0), r"LoRA\(alpha=0\): alpha must be a finite number above 0"),
        (lambda: bad.LoRA(alpha=float("nan")), "alpha must be a finite number above 0"),
        (lambda: bad.LoRA(alpha="16"), r"LoRA\(alpha='16'\): alpha must be a finite number"),
        (lambda: bad.LoRA(rslora=1), r"LoRA\(rslora=1\): rslora must be False or True"),
        (lambda: bad.PiSSA(r=-1), r"PiSSA\(r=-1\): r must be"),
        (lambda: bad.DoRA(detach_norm="no"), "detach_norm must be False or True"),
        (
            lambda: bad.DeLoRA(lambda0=0.0),
            r"DeLoRA\(lambda0=0.0\): lambda0 must be a finite number above 0",
        ),
        (lambda: bad.DeLoRA(start="pissa"), "start must be 'peft' or 'paper'"),
        (lambda: bad.DeLoRA(start=3), "start must be 'peft' or 'paper'"),
        (lambda: bad.HRA(r=7), r"HRA\(r=7\): r must be even, such as 8"),
        (lambda: bad.HRA(init_norm=-1.0), "init_norm must be a finite number above 0"),
    ],
)
def test_hyperparameters_are_checked(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        make()


def test_rank_above_what_the_layer_allows():
    message = r"PiSSA\(r=8\) on a layer of shape \(16, 4\): r must be at most 4 there"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.PiSSA(r=8).init(lf.Weight(torch.randn(16, 4)), None)


def test_params_are_trainable_or_frozen():
    with pytest.raises(lf.LoraFuncError, match=r"either trainable or frozen, but \['A'\] are both"):
        lf.Params({"A": torch.zeros(1)}, {"A": torch.zeros(1)})
