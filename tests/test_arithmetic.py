"""Adapters as changes of weights, against dense algebra in float64.

What a layer adds to the outputs of the identity matrix is the change of its weight. It comes from
`apply` alone, which the arithmetic never calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, stats_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapted, largest, mlp, state_of, text_batch, tiny_llama, trained
from test_parameters import drawn, zoo
from torch import Tensor, nn

import lora_func as lf
from lora_func.changes import LINEAR
from lora_func.testing.laws import has_closed_form, has_factors

ALL = lf.Targets(roles=())
LOW_RANK = [name for name, case in CASES.items() if has_factors(case.example)]
DENSE = [n for n, c in CASES.items() if has_closed_form(c.example) and n not in LOW_RANK]
Pair = tuple[lf.Adapter, dict[str, Tensor]]


def wide(size: int = 12, bias: bool = False) -> nn.Module:
    """One layer in float64, of shape [16, size] and path "0"."""
    return nn.Sequential(nn.Linear(size, 16, bias, dtype=torch.float64))


def trained_on(model: nn.Module, case: Case, seed: int, r: int = 4) -> Pair:
    """An adapter of every layer, with parameters as if trained, in float64."""
    variant, generator = case.variant(r), torch.Generator().manual_seed(seed)
    layer: Any = model[0]  # pyright: ignore
    weight = lf.Weight(layer.weight.detach(), None)
    options: dict[str, Any] = {}
    if variant.card.data != "none":
        stats = (case.stats or stats_of)(variant, weight, seed)
        options["stats"] = {"0": stats}
    adapter, params = lf.adapt(
        model, variant, targets=ALL, generator=generator, dtype=torch.float64, **options
    )
    noise = {
        key: case.noise(torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype))
        for key, leaf in params.items()
    }
    return adapter, {key: leaf + noise[key] for key, leaf in params.items()}


def change(model: nn.Module, pair: Pair) -> Tensor:
    """What the only layer of a model adds to its weight."""
    eye = torch.eye(model[0].in_features, dtype=torch.float64)  # pyright: ignore
    zero = torch.zeros_like(eye[:1])
    out = pair[0](model, pair[1], eye) - pair[0](model, pair[1], zero)
    return (out - (model(eye) - model(zero))).mT.detach()


def close(given: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(given / scale, expected / scale, rtol=0, atol=1e-9)


def best(delta: Tensor, r: int) -> Tensor:
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :r] * S[:r]) @ V[:r]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LOW_RANK)
def test_as_lora_is_the_same_adapter(name, bias):
    """The same outputs, from plain LoRA with a scale of 1."""
    model = wide(bias=bias)
    adapter, params = trained_on(model, CASES[name], 0)
    plain, leaves = lf.as_lora(adapter, params, model=model)
    variant: Any = plain.variants["0"]
    assert type(variant) is lf.LoRA
    assert variant.scale == 1
    plain.check(leaves)
    x = torch.randn(5, 12, dtype=torch.float64)
    close(plain(model, leaves, x), adapter(model, params, x))


@pytest.mark.parametrize("name", LOW_RANK)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), r=st.integers(1, 6))
def test_a_lower_rank_is_the_best_approximation(name, seed, r):
    """Eckart and Young: the dense SVD, cut. Its error is what the singular values say."""
    model = wide()
    pair = trained_on(model, CASES[name], seed)
    delta = change(model, pair)
    s = lf.singular_values(*pair, model=model)["0"]
    dense = torch.linalg.svdvals(delta)
    close(s[: len(dense)], dense[: len(s)])
    assert dense[len(s) :].sum() < 1e-6 * dense.sum()
    low, leaves = lf.as_lora(*pair, r=r, model=model)
    assert leaves["0.lora_A"].shape == (r, 12)
    error = (change(model, (low, leaves)) - delta).norm() / delta.norm()
    torch.testing.assert_close(error, s[r:].norm() / s.norm(), rtol=1e-7, atol=1e-9)
    if r < len(dense) and dense[r - 1] > 1.01 * dense[r]:  # otherwise there are several
        close(change(model, (low, leaves)), best(delta, r))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", DENSE)
def test_an_approximation_of_a_dense_change(name, bias):
    model = wide(16, bias)
    if name == "full" and bias:
        model[0].bias.data.zero_()  # pyright: ignore
    pair = trained_on(model, CASES[name], 0)
    with pytest.raises(lf.LoraFuncError, match=r"'0': \w+ changes the weight by no product of low"):
        lf.as_lora(*pair, model=model)
    delta = change(model, pair)
    low = change(model, lf.as_lora(*pair, r=3, model=model))
    # C3A's singular values come in pairs, so that there are several best ones.
    torch.testing.assert_close((low - delta).norm(), (best(delta, 3) - delta).norm())
    close(lf.singular_values(*pair, model=model)["0"], torch.linalg.svdvals(delta))
    x = torch.randn(5, 16, dtype=torch.float64)
    whole = lf.as_lora(*pair, r=16, model=model)
    close(whole[0](model, whole[1], x), pair[0](model, pair[1], x))


@given(data=st.data())
def test_a_weighted_sum_is_that_of_the_dense_changes(data):
    """Of any variants with factors, mixed."""
    model = wide()
    names = data.draw(st.lists(st.sampled_from(LOW_RANK), min_size=1, max_size=3))
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(names), max_size=len(names)))
    seed = data.draw(st.integers(0, 999))
    pairs = [trained_on(model, CASES[name], seed + i) for i, name in enumerate(names)]
    given = lf.combine(pairs, weights, model=model)
    expected: Any = sum(w * change(model, pair) for w, pair in zip(weights, pairs))
    close(change(model, given), expected)
    (variant,) = given[0].variants.values()
    assert type(variant) is lf.LoRA
    close(change(model, lf.as_lora(*given, r=16)), expected)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if type(c.example) in LINEAR])
def test_linear_variants_add_up_leaf_by_leaf(name):
    """With the same constants. So the sum is no larger than its terms."""
    model = wide(16)
    adapter, a = trained_on(model, CASES[name], 1)
    b = trained(a)
    added, params = lf.combine([(adapter, a), (adapter, b)], [0.5, -2.0])
    assert added.variants == adapter.variants
    assert added.shapes == adapter.shapes
    close(
        change(model, (added, params)),
        0.5 * change(model, (adapter, a)) - 2 * change(model, (adapter, b)),
    )


@pytest.mark.parametrize("name", sorted({"lora", "pissa", "hra", "shira", "full", "fourierft"}))
def test_full_takes_any_exact_change(name):
    model = wide(16, bias=True)
    pairs = [trained_on(model, CASES["full"], 1), trained_on(model, CASES[name], 2)]
    added = lf.combine(pairs, [1, 3], model=model)
    assert type(added[0].variants["0"]) is lf.Full
    x = torch.randn(5, 16, dtype=torch.float64)
    base = model(x)
    expected: Any = sum(w * (p[0](model, p[1], x) - base) for w, p in zip([1, 3], pairs))
    close(added[0](model, added[1], x) - base, expected)


def test_variants_without_low_rank_are_exceptions():
    """That no variant with a linear change is forgotten."""
    linear = set()
    for name in DENSE:
        model = wide(16)
        adapter, a = trained_on(model, CASES[name], 1)
        at_zero = {key: torch.zeros_like(leaf) for key, leaf in a.items()}
        twice = {key: 2 * leaf for key, leaf in a.items()}
        once = change(model, (adapter, a))
        if (
            torch.allclose(change(model, (adapter, twice)), 2 * once)
            and not change(model, (adapter, at_zero)).any()
        ):
            linear.add(type(CASES[name].example))
    assert linear - {lf.IA3, lf.IA3FF} == set(LINEAR)  # those depend on the weight


def merged(model: nn.Module, pair: Pair) -> dict[str, Tensor]:
    return lf.merge(pair[0], model, pair[1], dtype=torch.float64)


def in_float64(adapter: lf.Adapter, params: dict[str, Tensor]) -> Pair:
    return adapter.to(torch.float64), {key: leaf.double() for key, leaf in params.items()}


ON_PARAMETERS = [
    lf.LoRA(r=2),
    lf.PiSSA(r=2),
    lf.HRA(r=2),
    lf.AntiPaSTO(r=2),
    lf.LoHa(r=2),
    lf.MiSS(r=2),
]
ON_PARAMETERS += [lf.VeRA(r=3), lf.VBLoRA(r=2, num_vectors=6, vector_length=2)]


@pytest.mark.parametrize("variant", ON_PARAMETERS, ids=lambda variant: variant.name())
def test_parameters(variant):
    """Embeddings, kernels and stacks of experts, in either layout."""
    model = zoo(torch.float64)
    first, second = (in_float64(*drawn(variant, model)) for _ in range(2))
    plain = lf.as_lora(*first, model=model)
    assert plain[0].base == first[0].base
    exact = merged(model, first)
    torch.testing.assert_close(merged(model, plain), exact)
    added = lf.combine([first, second], [2, -1], model=model)
    base, other = dict(model.named_parameters()), merged(model, second)
    expected = {key: 2 * exact[key] - other[key] for key in exact}
    torch.testing.assert_close(merged(model, added), expected)
    for path, s in lf.singular_values(*plain).items():
        delta = exact[path] - base[path]
        sizes = delta.flatten(1).norm(dim=1) if s.dim() == 2 else delta.norm()
        torch.testing.assert_close(s.norm(dim=-1), sizes)


def test_experts_have_each_their_own_approximation():
    model = zoo(torch.float64)
    pair = in_float64(*drawn(lf.Full(), model, lf.Targets(parameters=("experts",))))
    with pytest.raises(lf.LoraFuncError, match=r"'experts\.up': Full changes the weight by no"):
        lf.as_lora(*pair)
    low = merged(model, lf.as_lora(*pair, r=2))
    for path, W in merged(model, pair).items():
        base = model.get_parameter(path)
        for e in range(3):
            torch.testing.assert_close(low[path][e], base[e] + best(W[e] - base[e], 2))


def test_vectors():
    """No LoRA changes a bias or a norm; Full adds up there too."""
    model = zoo(torch.float64)
    first, second = (drawn(lf.Full(), model, lf.Targets(parameters=("bias", "norm"))) for _ in "ab")
    with pytest.raises(lf.LoraFuncError, match=r"'conv.bias' of shape \(12,\) is no matrix"):
        lf.as_lora(*first, r=2, model=model)
    with pytest.raises(lf.LoraFuncError, match=r"'conv.bias' of shape \(12,\) is no matrix"):
        lf.singular_values(*first, model=model)
    adapter, params = lf.combine([first, second], [1, -1])
    torch.testing.assert_close(params, {k: first[1][k] - second[1][k] for k in params})
    assert adapter.variants == first[0].variants


@pytest.mark.parametrize(
    "variant",
    [
        lf.LoRA(r=2),
        lf.VeRA(r=4),
        lf.PiSSA(r=2),
        lf.HRA(r=2),
        lf.VBLoRA(r=2, vector_length=4, num_vectors=6),
    ],
    ids=lambda variant: variant.name(),
)
def test_populations(variant):
    """The example axis stays in front, also where only some leaves have it."""
    model, adapter, params = adapted(variant)
    several = [trained(params) for _ in range(3)]
    stacked = lf.stack(several)
    plain, leaves = lf.as_lora(adapter, stacked, model=model)
    for one, own in zip(lf.unstack(leaves), several):
        torch.testing.assert_close(one, lf.as_lora(adapter, own, model=model)[1])
    batch = text_batch(3)
    expected = adapter(model, stacked, batch).logits
    torch.testing.assert_close(plain(model, leaves, batch).logits, expected)
    mapped = torch.vmap(lambda own: lf.as_lora(adapter, own, model=model)[1])(stacked)
    torch.testing.assert_close(mapped, leaves)
    low, short = lf.as_lora(adapter, stacked, r=1, model=model)
    assert all(leaf.shape == (3, *low.shapes[key]) for key, leaf in short.items())
    mixed = {**params, next(iter(params)): stacked[next(iter(params))]}
    plain, leaves = lf.as_lora(adapter, mixed, model=model)
    expected = adapter(model, mixed, batch).logits
    torch.testing.assert_close(plain(model, leaves, batch).logits, expected)
    # Something that all have, added to each.
    added, leaves = lf.combine([(adapter, stacked), (adapter, params)], [1, 1], model=model)
    for one, own in zip(lf.unstack(leaves), several):
        alone = lf.combine([(adapter, own), (adapter, params)], [1, 1], model=model)
        torch.testing.assert_close(lf.merge(added, model, one), lf.merge(alone[0], model, alone[1]))


def test_adapters_of_different_kinds_become_one_population():
    """One rank for all makes their parameters alike, so one batch runs through both."""
    model = tiny_llama()
    first, second = (adapted(variant, model)[1:] for variant in (lf.LoRA(r=2), lf.HRA(r=4)))
    plain, a = lf.as_lora(*first, r=4)
    same, b = lf.as_lora(*second, r=4, model=model)
    assert plain.variants == same.variants
    batch = text_batch(3)
    given = plain(model, lf.select(lf.stack([a, b]), torch.tensor([1, 0, 1])), batch).logits
    for i, (adapter, params) in enumerate((second, first, second)):
        torch.testing.assert_close(given[i], adapter(model, params, batch).logits[i])


def test_the_mean_of_leaves_is_not_the_mean_of_changes():
    """Why this module exists."""
    model = wide()
    a, b = (trained_on(model, CASES["lora"], seed) for seed in (1, 2))
    leaves = {key: (a[1][key] + b[1][key]) / 2 for key in a[1]}
    mean = (change(model, a) + change(model, b)) / 2
    assert (change(model, (a[0], leaves)) - mean).norm() > 0.3 * mean.norm()
    close(change(model, lf.combine([a, b], [0.5, 0.5])), mean)


def test_layers_of_either():
    """What only one adapter has, counts as zero in the other."""
    model = mlp()
    one = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=("^0$", "^2$"), roles=()))
    two = lf.adapt(model, {"^4$": lf.Full(), "^2$": lf.PiSSA(r=2)}, targets=ALL)
    one, two = (one[0], trained(one[1])), (two[0], trained(two[1]))
    adapter, params = lf.combine([one, two], [2, -1])
    kinds = {path: type(variant) for path, variant in adapter.variants.items()}
    assert kinds == {"0": lf.LoRA, "2": lf.LoRA, "4": lf.Full}
    assert adapter.shapes["2.lora_A"] == (2 + 2 * 2, 16)
    a, b = (lf.merge(p[0], model, p[1]) for p in (one, two))
    given = lf.merge(adapter, model, params)
    state = model.state_dict()
    for key, W in given.items():
        expected = state[key]
        expected = expected + 2 * (a[key] - state[key]) if key in a else expected
        expected = expected - (b[key] - state[key]) if key in b else expected
        torch.testing.assert_close(W, expected)


def test_gradients_reach_all_params_and_weights():
    model, adapter, params = adapted(lf.PiSSA(r=2))
    batch, t = text_batch(), torch.tensor(0.3, requires_grad=True)
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    other = {key: leaf.detach() for key, leaf in trained(params).items()}

    def loss(params, t):
        between, mixed = lf.combine([(adapter, params), (adapter, other)], [1 - t, t])
        return between(model, mixed, batch).loss

    loss(leaves, t).backward()
    assert t.grad
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves.values())
    grads = torch.func.grad(loss)(leaves, t)
    torch.testing.assert_close(grads, {key: leaf.grad for key, leaf in leaves.items()})


def test_nothing_given_changes(tmp_path):
    model, adapter, params = adapted(lf.HRA(r=2))
    before, copies = state_of(model), {key: leaf.clone() for key, leaf in params.items()}
    _, leaves = lf.as_lora(adapter, params, model=model)
    for leaf in leaves.values():
        leaf.zero_()
    assert state_of(model) == before
    assert largest(params, copies) == 0
    _, adapter, params = adapted(lf.LoRA(r=2))
    _, leaves = lf.as_lora(adapter, params)
    own = {leaf.data_ptr() for leaf in params.values()}
    assert not own & {leaf.data_ptr() for leaf in leaves.values()}


@pytest.mark.parametrize("variant", [lf.PiSSA(r=2), lf.AntiPaSTO(r=4)], ids=lambda v: v.name())
def test_the_result_is_an_adapter_like_any_other(variant, tmp_path):
    """It can be saved and loaded, trained in train mode with its dropout, and started anew."""
    model, adapter, params = adapted(variant, dropout=0.5)
    plain, leaves = lf.as_lora(adapter, params, model=model)
    lf.save(tmp_path / "plain.safetensors", plain, leaves)
    loaded, same = lf.load(tmp_path / "plain.safetensors", model, check_base="error")
    assert largest(leaves, same) == 0
    assert loaded.variants == plain.variants
    assert loaded.dropout == plain.dropout == 0.5
    fresh = plain.init(model)
    assert {key: leaf.shape for key, leaf in fresh.items()} == plain.shapes
    batch = text_batch()
    assert torch.equal(plain(model, fresh, batch).logits, model(**batch).logits)


def test_bfloat16():
    """The result is in float32, in which the product is made."""
    model, adapter, params = adapted(lf.PiSSA(r=2), dtype=torch.bfloat16)
    plain, leaves = lf.as_lora(adapter, params)
    plain.check(leaves, examples=False)
    assert plain.dtype == torch.float32 == leaves[next(iter(leaves))].dtype
    torch.testing.assert_close(lf.merge(plain, model, leaves), lf.merge(adapter, model, params))


def test_a_bias_of_lora():
    """It goes along, with its scale."""
    model = mlp()
    _, adapter, params = adapted(lf.LoRA(r=2, add_bias=True), model, targets=ALL)
    plain, leaves = lf.as_lora(adapter, params, r=1)
    assert plain.variants["0"] == lf.LoRA(r=1, alpha=1.0, add_bias=True)
    x = torch.randn(5, 6)
    added, both = lf.combine([(adapter, params), (plain, leaves)], [1, 1])
    for result, own, scale in ((plain, leaves, 1), (added, both, 2)):
        for path in ("0", "2", "4"):
            b = lf.merge(result, model, own)[f"{path}.bias"] - model.get_parameter(f"{path}.bias")
            torch.testing.assert_close(b, scale * 8 * params[f"{path}.lora_b"])
    assert not torch.equal(plain(model, leaves, x), model(x))


def test_who_reads_the_weight():
    """The others need no model."""
    reading = set()
    for name in LOW_RANK:
        model = wide()
        pair = trained_on(model, CASES[name], 0)
        try:
            lf.as_lora(*pair)
        except lf.LoraFuncError as error:
            kind = type(CASES[name].example)
            message = f"'0': the change of {kind.__name__} depends on the weight: give model=, "
            assert str(error).startswith(message)  # noqa: PT017
            reading.add(kind)
    in_a_basis = {lf.AntiPaSTO, lf.AntiPaSTOCorDA, lf.AntiPaSTOAblate, lf.AntiPaSTOArrow, lf.SSteer}
    assert reading == {lf.HRA, lf.ETHER, lf.ETHERPlus, *in_a_basis}


@pytest.mark.parametrize(
    ("r", "message"),
    [(0, "at least 1"), (True, "at least 1"), (2.0, "at least 1"), ("2", "at least 1")],
)
def test_a_bad_rank(r, message):
    _, adapter, params = adapted()
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.as_lora(adapter, params, r=r)


def test_what_is_refused():
    model, adapter, params = adapted()
    pair = adapter, params
    refused = {
        "2 pairs and 1 weights": ([pair, pair], [1]),
        "0 pairs and 0 weights": ([], []),
        "a list of pairs .adapter, params., not of Adapter": (pair, [1, 1]),
        "adapter must be of type Adapter, not dict": ([(params, adapter)], [1]),
    }
    for message, arguments in refused.items():
        with pytest.raises(lf.LoraFuncError, match=message):
            lf.combine(*arguments)
    dora = adapted(lf.DoRA(r=2), model)[1:]
    with pytest.raises(lf.LoraFuncError, match=r"DoRA .* no exact sum .* lf.as_lora\(adapter, "):
        lf.combine([pair, dora], [1, 1])
    low = lf.as_lora(*dora, r=2, model=model)
    lf.combine([pair, low], [1, 1])
    first, second = (adapted(lf.SHiRA(r=2), model)[1:] for _ in "ab")
    with pytest.raises(
        lf.LoraFuncError, match=r"SHiRA .* only with Full, and with SHiRA of the sa"
    ):
        lf.combine([first, second], [1, 1])
    other = adapted(lf.LoRA(r=2))[1:]  # on a model with other weights
    with pytest.raises(lf.LoraFuncError, match=r"made on different bases: the weights of .*q_proj"):
        lf.combine([pair, other], [1, 1])
    smaller = adapted(lf.LoRA(r=2), tiny_llama(hidden_size=16))[1:]
    with pytest.raises(lf.LoraFuncError, match=r"not the same weight in all of them: '\(48, 32\)'"):
        lf.combine([pair, smaller], [1, 1])
    targets = lf.Targets(parameters=(r"q_proj\.weight$",))
    parameter = adapted(lf.LoRA(r=2), model, targets=targets)[1:]
    with pytest.raises(lf.LoraFuncError, match="the layer that it is the weight of"):
        lf.combine([pair, parameter], [1, 1])
    three = lf.stack([params] * 3)
    with pytest.raises(lf.LoraFuncError, match="example axes of lengths"):
        lf.combine([(adapter, three), (adapter, lf.stack([params] * 2))], [1, 1])
    broken = {key: leaf / 0 for key, leaf in params.items()}
    with pytest.raises(lf.LoraFuncError, match=r"NaN or infinite entries\. Take parameters"):
        lf.as_lora(adapter, broken, r=1)


def test_a_change_that_depends_on_another_weight():
    """It is told; a change that does not depend on it is not."""
    model, adapter, params = adapted(lf.HRA(r=2))
    other = tiny_llama()
    with pytest.warns(UserWarning, match="not those that the adapter was made on.* change of HRA"):
        lf.as_lora(adapter, params, model=other)
    lf.as_lora(adapter, params, model=model)
    _, adapter, params = adapted(lf.PiSSA(r=2), model)
    lf.as_lora(adapter, params, model=other)
