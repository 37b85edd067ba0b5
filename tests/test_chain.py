"""Several variants on one layer: the laws over pairs of the catalogue, and the dense formula."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from effort import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import mlp, text_batch, tiny_llama, trained
from torch import nn

import lora_func as lf
from lora_func.testing import LAWS, Law, Layer

ALL = lf.Targets(roles=())


def fit(first: Case, second: Case) -> bool:
    """Whether two cases can be linked."""
    looking = [case for case in (first, second) if case.example.looks_at_data]
    return second.example.card.reads not in ("rows", "dense") and len(looking) < 2


FIRST = [case for case in CASES.values() if case.engine and case.example.name() != "chain"]
SHAPES = {96: [(32, 48), (48, 32)], 24: [(8, 16), (16, 8)], 6: [(8, 8)]}  # which all of them take
PAIRS = [pair for pair in itertools.product(FIRST, FIRST) if fit(*pair)]


def layer_of(
    pair: tuple[Case, Case], shape: tuple[int, int], dtype: torch.dtype, seed: int, **about: Any
) -> Layer:
    """A layer with a chain of two cases, as `layers` draws one of a single case."""
    chain = lf.Chain(*(case.variant(2) for case in pair))
    stats = None
    for case, link in zip(pair, chain.links):
        if case.stats is not None:
            stats = lambda W, of=case.stats, link=link: of(link, W, seed)  # noqa: E731
    return Layer.draw(
        chain,
        shape,
        torch.Generator().manual_seed(seed),
        dtype=dtype,
        noise=lambda n: 0.1 * n,
        stats=stats,
        moved=sum(case.moved(link) for case, link in zip(pair, chain.links)),
        **about,
    )


def over_pairs(law: Law):
    """The test of one law over drawn pairs."""

    @pytest.mark.parametrize("dtype", law.dtypes, ids=lambda dtype: str(dtype).split(".")[1])
    @settings(max_examples=EXAMPLES if law.largest < 24 else 5 * EXAMPLES)
    @given(
        pair=st.sampled_from(PAIRS),
        shape=st.sampled_from(SHAPES[law.largest]),
        lead=st.sampled_from([lead for lead in law.leads]),
        bias=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def test(pair, shape, dtype, **drawn) -> None:
        layer = layer_of(pair, shape, dtype, **drawn)
        if law.applies(layer.variant) and (layer.names or not law.trains):
            law.check(layer)

    test.__doc__ = law.statement
    return test


globals().update({f"test_pairs_{name}": over_pairs(law) for name, law in LAWS.items()})


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_dense_formula(bias: bool):
    """HRA rotates the input of all before it, IA3 scales the output of all before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias, dtype=torch.float64))
    chain = lf.Chain(lf.LoRA(r=2, alpha=6), lf.HRA(r=2), lf.IA3(), lf.LoRA(r=1, alpha=1))
    adapter, params = lf.adapt(model, chain, targets=ALL, dtype=torch.float64)
    params = trained(params)
    p = {key.removeprefix("0.lora_"): leaf for key, leaf in params.items()}
    assert list(p) == ["0_A", "0_B", "1_U", "2_d", "3_A", "3_B"]
    linear: Any = model[0]
    R = torch.eye(6, dtype=torch.float64)
    for u in p["1_U"]:
        R = R @ (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    scaled = (1 + p["2_d"])[:, None] * ((linear.weight + 3 * p["0_B"] @ p["0_A"]) @ R)
    W, b = scaled + p["3_B"] @ p["3_A"], (1 + p["2_d"]) * linear.bias if bias else None
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(adapter(model, params, x), F.linear(x, W, b))
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(merged["0.weight"], W)


def test_a_population_of_chains_in_a_model():
    """Each example by its own entry, gradients and file included."""
    model, chain = tiny_llama(), lf.Chain(lf.PiSSA(r=2), lf.IA3())
    adapter, _ = lf.adapt(model, chain)
    population = [trained(adapter.init(model)) for _ in range(3)]
    batch = text_batch()
    stacked = lf.stack(population)

    def grads_of(params, batch):
        size = lambda p: adapter(model, p, batch).logits.square().sum()  # noqa: E731
        return lf.value_and_grad(size)(params)[1]

    grads = grads_of(stacked, batch)
    for i, params in enumerate(population):
        row = {key: t[i : i + 1] for key, t in batch.items()}
        for key, grad in grads_of(params, row).items():
            torch.testing.assert_close(grads[key][i], grad, rtol=1e-3, atol=1e-4)


def test_what_it_hands_on():
    """Hyperparameters, learning rates and data of the links."""
    model, batches = tiny_llama(), [text_batch()]
    chain = lf.Chain(lf.IA3(), lf.CorDA(r=2, alpha=4.0), lf.LoRA(r=2, lr_ratio=4.0))
    adapter, params = lf.adapt(model, chain, calibration=batches)
    key = "model.layers.0.self_attn.q_proj.lora_"
    assert adapter.lr_scale[f"{key}2_B"] == 4.0
    assert adapter.lr_scale[f"{key}1_B"] == 1.0
    half = adapter.replace(alpha=lambda alpha: alpha / 2)
    links: Any = half.variants[key.removesuffix(".lora_")].parts()
    assert [getattr(link, "alpha", None) for link in links] == [None, 2.0, 8.0]
    alone, _ = lf.adapt(model, lf.CorDA(r=2, alpha=4.0), calibration=batches)
    assert torch.equal(adapter.frozen[f"{key}1_A0"], alone.frozen[f"{key}A0"])
    fresh = adapter.init(model)  # CorDA's leaves start at anchors and need no data again
    assert torch.equal(fresh[f"{key}1_A"], params[f"{key}1_A"])
    assert not torch.equal(fresh[f"{key}2_A"], params[f"{key}2_A"])
    with pytest.raises(lf.LoraFuncError, match=r"field 'alhpa'\. Did you mean 'alpha'"):
        adapter.replace(alhpa=1.0)


def test_rosa_is_a_lora_and_a_sparse_matrix():
    """Nikdan et al. 2024, Algorithm 1: W + s B A + S, S at the largest gradients of W."""
    model, batches = tiny_llama(), [text_batch() | {"labels": text_batch()["input_ids"]}]
    rosa = lf.Chain(lf.LoRA(r=2), lf.SHiRA(r=2, mask="gradient"))
    adapter, params = lf.adapt(model, rosa, calibration=batches)
    params, key = trained(params), "model.layers.0.self_attn.q_proj"
    model(**batches[0]).loss.backward()
    layer = model.get_submodule(key)
    W, n = layer.weight, 2 * sum(layer.weight.shape)
    at = layer.weight.grad.abs().flatten().topk(n).indices.sort().values
    S = torch.zeros(W.numel()).index_put((at,), params[f"{key}.lora_1_v"]).view_as(W)
    A, B = params[f"{key}.lora_0_A"], params[f"{key}.lora_0_B"]
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(merged[f"{key}.weight"], W.detach() + 8 * B @ A + S)


def test_what_two_chains_share_is_their_own():
    """VeRA's constants in one chain are none of another chain's."""
    model = mlp()
    rules = {"^0$": lf.Chain(lf.VeRA(r=2), lf.IA3()), "": lf.Chain(lf.LoRA(r=2), lf.IA3())}
    adapter, params = lf.adapt(model, rules, targets=ALL)
    alone, _ = lf.adapt(model, {"^2$|^4$": rules[""]}, targets=ALL)
    x, params = torch.randn(3, 6), trained(params)
    own = {key: leaf for key, leaf in params.items() if key in alone.shapes}
    first, _ = lf.adapt(model, {"^0$": rules["^0$"]}, targets=ALL)
    assert {*own, *first.shapes} == set(params)
    W = lf.merge(adapter, model, params)
    expected = torch.func.functional_call(model, W, x)
    torch.testing.assert_close(adapter(model, params, x), expected)
    merged = lf.merge(alone, model, own)
    assert all(torch.equal(W[key], tensor) for key, tensor in merged.items())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lf.Chain, "Chain takes variants, as in Chain"),
        (lambda: lf.Chain(cast("Any", "lora")), "Chain takes variants, .* not 'lora'"),
        (lambda: lf.Chain(lf.IA3(), lf.DoRA(r=2)), "put DoRA first"),
        (lambda: lf.Chain(lf.CorDA(r=2), lf.LoRAGA(r=2)), "CorDA and LoRAGA look at different"),
        (lambda: cast("Any", lf.LoRA)(8), r"LoRA takes its fields by name, as in LoRA\(r=8\)"),
    ],
)
def test_what_it_refuses(make: Any, reason: str):
    with pytest.raises(lf.LoraFuncError, match=reason):
        make()


def test_dropout_that_no_link_sees_is_refused():
    with pytest.raises(lf.LoraFuncError, match="acts on what the base layer sees"):
        lf.adapt(mlp(), lf.Chain(lf.HRA(r=2), lf.OFT(block_size=2)), targets=ALL, dropout=0.1)
