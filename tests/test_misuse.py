"""Mistakes of users and oddities of models: an error that names them, or the right result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, SIZES
from cases import catalogue
from models import adapted, state_of, text_batch, tiny_llama, trained
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import CausalLMOutput

import lora_func as lf
from lora_func.probing import largest

Q_V = lf.Targets(names=(r"(q|v)_proj$",))
Q = "model.layers.0.self_attn.q_proj"
over_variants = pytest.mark.parametrize("variant", catalogue().values(), ids=catalogue().keys())


# stats of something else


def collected(statistic, model=None) -> dict:
    return lf.collect(model or tiny_llama(), Q_V, [text_batch(8, 20)], statistic)


@pytest.mark.parametrize(
    ("variant", "stats", "message"),
    [
        (lf.EVA(r=2), {}, r"stats has nothing for '.*q_proj'"),
        (lf.LoRA(r=2), {Q: torch.ones(3)}, r"stats= was given, but 'LoRA' looks at no data"),
        (lf.EVA(r=2), [torch.ones(3)], "stats must be a mapping path -> what collect found"),
        (
            lf.AntiPaSTOCorDA(r=2),
            lf.OutputMoments(),
            r"stats of '.*q_proj' were collected by OutputMoments\(\), but .* at InputMoments",
        ),
        (lf.AntiPaSTO(r=2), lf.Projections(pool="mean_abs"), r"by Projections\(pool='mean_abs'\)"),
        (lf.EVA(r=8), lf.EVA(r=4).statistic, r"by PrincipalComponents\(r=4, .*\(r=8, "),
        (lf.AntiPaSTO(r=2), lf.InputMoments(), r"were collected by InputMoments\(\)"),
    ],
)
def test_stats_of_something_else(variant, stats, message):
    given: Any = collected(stats) if isinstance(stats, lf.Statistic) else stats
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), variant, targets=Q_V, stats=given)


@pytest.mark.parametrize(
    ("variant", "statistic", "message"),
    [
        (lf.AntiPaSTO(r=2), lf.InputMoments(), r"the stats are a Moments; Projections.* gives a"),
        (lf.AntiPaSTOCorDA(r=2), lf.OutputMoments(), r"of shape \(48,\); .* of shape \(32,\) here"),
        (lf.EVA(r=2), lf.InputMoments(), "the stats are a Moments; .* gives Components"),
        (lf.LoRAGA(r=2), lf.OutputMeans(), r"shape \(48,\); MeanGradient\(\) gives .* \(48, 32\)"),
        (lf.SSteer(r=2), lf.InputMoments(), r"the stats are a Moments; OutputMeans\(\) gives"),
    ],
)
def test_stats_in_a_plain_dict_are_checked_by_their_shape(variant, statistic, message):
    """A plain dict does not say which statistic it is of."""
    stats = dict(collected(statistic))
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), variant, targets=Q_V, stats=stats)


def test_stats_of_more_layers_than_needed():
    model = tiny_llama()
    stats = lf.collect(model, lf.Targets(), [text_batch()], lf.InputMoments())
    adapter, _ = lf.adapt(model, lf.CorDA(r=2), targets=Q_V, stats=stats)
    assert len(adapter.targets) == 4


@pytest.mark.parametrize(
    "variant",
    [lf.EVA(r=1), lf.CorDA(r=1), lf.AntiPaSTO(r=1), lf.AntiPaSTOAblate(r=1), lf.LoRAGA(r=1)],
    ids=lambda v: v.name(),
)
def test_stats_that_are_not_finite(variant):
    """They may come from a file. `collect` itself refuses to return them."""
    stats = collected(variant.statistic)
    tensors, structure = pytree.tree_flatten(stats[Q])
    broken = [t * float("nan") if isinstance(t, torch.Tensor) else t for t in tensors]
    stats[Q] = pytree.tree_unflatten(broken, structure)
    with pytest.raises(lf.LoraFuncError, match=rf"stats of '{Q}' have NaN or infinite entries"):
        lf.adapt(tiny_llama(), variant, targets=Q_V, stats=stats)


def test_stats_of_another_shape_inside():
    """The parts of one statistic must fit together."""
    stats = collected(lf.InputMoments())
    stats[Q] = stats[Q]._replace(scatter=stats[Q].scatter[:3])
    message = r"a tensor of shape \(3, 32\); InputMoments\(\) gives a tensor of shape \(32, 32\)"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), lf.CorDA(r=2), targets=Q_V, stats=stats)


def test_stats_for_init_are_checked_as_for_adapt():
    """They are checked even if all leaves start at anchors, which come from adapt's stats."""
    model, stats = tiny_llama(), collected(lf.InputMoments())
    adapter, _ = lf.adapt(model, lf.CorDA(r=2), targets=Q_V, stats=stats)
    with pytest.raises(lf.LoraFuncError, match=r"stats has nothing for '.*q_proj'"):
        adapter.init(model, stats={})
    adapter, _ = lf.adapt(model, {"q_proj": lf.CorDA(r=2), "v_proj": lf.LoRA(r=2)}, stats=stats)
    assert adapter.init(model, stats=stats).keys() == adapter.shapes.keys()


@pytest.mark.parametrize(
    "variant", [lf.PiSSA(r=2), lf.OLoRA(r=2), lf.DoRA(r=2), lf.DeLoRA(r=2)], ids=lambda v: v.name()
)
def test_a_weight_that_is_not_finite(variant):
    model = tiny_llama()
    model.get_submodule(Q).weight.data[0, 0] = float("nan")
    message = rf"'{Q}': (the parameters of .* start with NaN|linalg.svd: .* non-finite)"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, variant, targets=Q_V)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38], ids=str)
@pytest.mark.parametrize(
    "variant", [lf.EVA(r=1), lf.CorDA(r=1), lf.AntiPaSTO(r=1)], ids=lambda v: v.name()
)
def test_calibration_data_that_is_not_finite(variant, value):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4)
    x[3, 2] = value
    with pytest.raises(lf.LoraFuncError, match=r"what '0' saw is not finite: the batches, or"):
        lf.adapt(model, variant, calibration=[torch.randn(8, 4), x])


def test_too_few_tokens_for_eva():
    """Four tokens span three directions about their mean. A warning says that ranks are lower."""
    model, batch = tiny_llama(), text_batch(1, 4)
    del batch["attention_mask"]
    warning = "only .* components for 4 layers, where r=16 asks for 64.* Calibrate on more tokens"
    with pytest.warns(UserWarning, match=warning):
        adapter, params = lf.adapt(model, lf.EVA(r=16, rho=1.0), targets=Q_V, calibration=[batch])
    assert {len(params[f"{path}.lora_A"]) for path in adapter.targets} <= {2, 3}


# unusual layers


class NoBias(nn.Module):
    """A linear layer by its sizes and its weight, without an attribute `bias`."""

    def __init__(self, d_in: int = 8, d_out: int = 8):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)

    def forward(self, x):
        return F.linear(x, self.weight)


class Transposed(NoBias):
    """Holds its weight as `[in, out]`."""

    def __init__(self, d_in: int = 8, d_out: int = 8):
        super().__init__(d_out, d_in)
        self.in_features, self.out_features = d_in, d_out

    def forward(self, x):
        return x @ self.weight


@over_variants
@pytest.mark.parametrize("kind", [NoBias, Transposed])
@pytest.mark.parametrize("shape", [(8, 8), (8, 12)], ids=str)
def test_layers_without_a_bias_and_transposed_ones(variant, kind, shape, tmp_path):
    """The layer itself tells how it holds its weight, even if it is square."""
    model = nn.Sequential(kind(*shape), nn.Tanh(), kind(*shape[::-1]))
    everything, stats = lf.Targets(roles=()), None
    if variant.statistic is not None:
        batches, loss = [torch.randn(64, 8)], lambda out, batch: out.square().sum()
        stats = lf.collect(model, everything, batches, variant.statistic, loss=loss)
    adapter, params = lf.adapt(model, variant, targets=everything, stats=stats)
    params, x = trained(params), torch.randn(5, 8)
    out = adapter(model, params, x)
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(functional_call(model, merged, x), out, rtol=1e-4, atol=1e-5)
    assert (out - model(x)).abs().max() > 1e-3
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    assert torch.equal(again(model, loaded, x), out)
    assert torch.equal(lf.bind(again, model, loaded)(x), out)


@pytest.mark.parametrize("make", [torch.zeros, torch.eye], ids=["zero", "identity"])
def test_a_square_layer_with_a_symmetric_weight(make):
    """Its own weight cannot tell x Wᵀ from x W, so a copy of it runs with another one."""
    model = nn.Sequential(Transposed())
    model[0].weight.data = make(8, *[8] * (make is torch.zeros))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    params, x = trained(params), torch.randn(5, 8)
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(functional_call(model, merged, x), adapter(model, params, x))


def test_probing_a_square_layer_changes_nothing():
    """Its copy runs in eval mode, with buffers of its own: fake quantization writes to them."""

    class Observing(NoBias):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.get_buffer("calls").add_(1)
            return F.linear(self.norm(x), self.weight)

    model = nn.Sequential(Observing()).train()
    before, state = state_of(model), torch.get_rng_state()
    lf.adapt(model, lf.PiSSA(r=2))
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_square_layer_that_cannot_be_probed():
    class Strange(NoBias):
        def forward(self, x, *scales):
            (scale,) = scales
            return F.linear(x, self.weight) * scale

    with pytest.raises(
        lf.LoraFuncError, match=r"'0' is a Strange, .* cannot be told.* Leave it out"
    ):
        lf.adapt(nn.Sequential(Strange()), lf.LoRA(r=2))


# which layers


def test_layers_are_counted_in_the_stack_of_blocks():
    """The 0 of nn.Sequential(model) is no block."""
    model = nn.Sequential(tiny_llama())
    found = lf.Targets(layers=[1]).find(model)
    assert {path.split(".")[3] for path in found} == {"1"}
    assert {path.split(".")[0] for path in found} == {"0"}


def test_layers_of_a_sentence_transformer():
    """Its parts have numbers, too: the model is its 0, and the pooling its 1."""
    wrapped = nn.Module()
    wrapped.auto_model = BertModel(BertConfig(**SIZES))
    model = nn.Sequential(wrapped, nn.Identity())
    found = lf.Targets(layers=[1]).find(model)
    assert len(found) == 6
    assert all(path.startswith("0.auto_model.encoder.layer.1.") for path in found)
    with pytest.raises(lf.LoraFuncError, match="Sequential has no block '2'; it has 0 to 1"):
        lf.Targets(layers=range(3)).find(model)


@pytest.mark.parametrize("layers", [1, "1", ["1"], [True], [1.0]], ids=repr)
def test_layers_that_are_no_indices(layers):
    with pytest.raises(lf.LoraFuncError, match=r"layers=.*; expected indices of blocks, such as"):
        lf.Targets(layers=layers)


def test_an_exclusion_that_matches_nothing():
    """A misspelt one would adapt the layer that it should spare."""
    with pytest.raises(lf.LoraFuncError, match=r"exclude='lm_haed' .* Did you mean 'lm_head'"):
        lf.adapt(tiny_llama(), lf.LoRA(r=2), targets=lf.Targets(exclude=("lm_haed",)))


# adapters on adapters


@pytest.mark.parametrize("variant", [lf.LoRA(r=2), lf.DoRA(r=2)], ids=lambda v: v.name())
def test_a_bound_view_is_no_base(variant):
    """DoRA would take the norms of the bare base."""
    model, adapter, params = adapted()
    bound = lf.bind(adapter, model, params)
    with pytest.raises(lf.LoraFuncError, match="a bound view, which carries an adapter already"):
        lf.adapt(bound, variant)
    for use in (
        lambda: adapter(bound, params, text_batch()),
        lambda: adapter.init(bound),
        lambda: lf.merge(adapter, bound, params),
    ):
        with pytest.raises(lf.LoraFuncError, match=rf"'{Q}' carries an adapter already"):
            use()


# numbers


def test_parameters_that_are_not_finite_are_not_merged():
    model, adapter, params = adapted()
    key = next(iter(params))
    params[key][0, 0] = float("nan")
    with pytest.raises(lf.LoraFuncError, match=rf"params: '{key}' has NaN or infinite entries"):
        lf.merge(adapter, model, params)


def test_a_merged_weight_that_overflows():
    model, adapter, params = adapted()
    params = {key: 1e4 * leaf for key, leaf in params.items()}
    with pytest.raises(lf.LoraFuncError, match=rf"'{Q}.weight'.* overflows in torch.float16"):
        lf.merge(adapter, model, params, dtype=torch.float16)


def test_the_probe_names_a_gradient_that_is_not_finite():
    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return CausalLMOutput(loss=(y - y.detach()).square().sum().sqrt(), logits=y)

    model = Distance()
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    with pytest.raises(lf.LoraFuncError, match=r"the loss is 0, and its gradient is .* 'a.lora_A'"):
        lf.probe(adapter, model, params, torch.randn(3, 4))


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ([1.0, -torch.inf, torch.nan], 0.5),  # equal infinities and equal NaN differ by nothing
        ([1.0, 0.0, torch.nan], torch.inf),
        ([1.0, -torch.inf, 0.0], torch.nan),
        ([torch.nan, -torch.inf, torch.nan], torch.nan),
    ],
    ids=str,
)
def test_a_difference_hides_no_nan(given, difference):
    base = [torch.tensor([0.5, -torch.inf, torch.nan]), torch.zeros(2)]
    found = largest([torch.tensor(given), torch.zeros(2)], base)
    assert found == pytest.approx(difference, nan_ok=True)


def test_the_probe_names_a_loss_without_labels():
    model, adapter, params = adapted()
    batch = text_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(lf.LoraFuncError, match=r"the loss is nan: .* labels that count"):
        lf.probe(adapter, model, params, batch)


@pytest.mark.parametrize("kind", [lf.PiSSA, lf.MiLoRA], ids=lambda kind: kind.name())
def test_alpha_scales_training_and_not_the_start(kind):
    """s B0 A0 does not depend on s, and a step of SGD grows with it. alpha=None gives s = 1.

    With rslora, alpha 2 and r 4 give s = 1, too.
    """
    weight, x = lf.Weight(torch.randn(12, 8, dtype=torch.float64)), torch.randn(5, 8).double()
    target = torch.randn(5, 12).double()
    starts, steps = [], []
    for alpha, rslora in ((None, False), (4.0, False), (16.0, False), (2.0, True)):
        variant = kind(r=4, alpha=alpha, rslora=rslora)
        drawn = variant.init(weight, None)
        starts.append(variant.scale * drawn.frozen["B0"] @ drawn.frozen["A0"])

        def out(leaves, variant=variant, drawn=drawn):
            return variant.apply(x, weight(x), weight, {**drawn.frozen, **leaves})

        grads = torch.func.grad(lambda p: (out(p) * target).sum())(drawn.trainable)
        moved = {name: leaf - 1e-6 * grads[name] for name, leaf in drawn.trainable.items()}
        steps.append((out(moved) - weight(x)).norm().item())
    assert kind(r=4).scale == 1.0
    for start in starts:
        torch.testing.assert_close(start, starts[0])
    assert steps[1] == pytest.approx(steps[0], rel=1e-6)
    assert steps[3] == pytest.approx(steps[0], rel=1e-6)
    assert steps[2] == pytest.approx(4 * steps[0], rel=1e-4)


# constructors

bad: Any = lf  # for calls that a type checker refuses, too


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bad.LoRA(8), r"LoRA takes its fields by name, as in LoRA\(r=8\)"),
        (lambda: bad.LoRA(rank=8), r"LoRA has no field 'rank'; .* It is called r here"),
        (
            lambda: bad.LoRA(lora_alpha=8),
            r"no field 'lora_alpha'; .*: r, alpha, .* called alpha here",
        ),
        (lambda: bad.LoRA(alhpa=8), r"no field 'alhpa'; .* Did you mean 'alpha'"),
        (
            lambda: bad.LoRA(target_modules=["q_proj"]),
            r"called adapt\(.., targets=Targets\(names=",
        ),
        (lambda: bad.LoRA(use_dora=True), "It is called the variant DoRA here"),
        (lambda: bad.LoRA(lora_bias=True), "It is called add_bias here"),
        (lambda: bad.LoRA(init_lora_weights="pissa"), "called start, or a variant of its own such"),
        (lambda: bad.LoRA(start="pissa"), "start must be 'kaiming' or 'gaussian'"),
        (lambda: bad.IA3(8), r"IA3 takes its fields by name, as in IA3\(\)"),
        (
            lambda: bad.DeLoRA(init="peft", start="paper"),
            r"given start= and its old name init=:",
        ),
        (lambda: bad.EVA(rho=0.5), r"EVA\(rho=0.5\): rho must be at least 1"),
    ],
)
def test_fields_by_another_name(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        make()


# arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bad.adapt(tiny_llama(), lf.LoRA(), targets=["q_proj"]),
            r"lf.Targets\(names=\('q_",
        ),
        (
            lambda: bad.adapt(tiny_llama(), lf.LoRA(), targets="q_proj"),
            r"lf.Targets\(names=\('q_",
        ),
        (
            lambda: bad.adapt(tiny_llama(), lf.LoRA(), target_modules=["q_proj"]),
            r"no argument 'target_modules'; .* It is called adapt\(.., targets=Targets\(names=",
        ),
        (lambda: bad.adapt(tiny_llama(), lf.LoRA(), lora_alpha=3), "alpha is a field of LoRA"),
        (lambda: bad.adapt(tiny_llama(), lf.LoRA(), r=3), "'r': r is a field of LoRA"),
        (lambda: bad.adapt(tiny_llama(), lf.LoRA(), target=Q_V), r"Did you mean 'targets'"),
        (
            lambda: bad.adapt(lf.LoRA(), tiny_llama()),
            r"model must be a torch.nn.Module, not LoRA",
        ),
        (lambda: bad.load(tiny_llama(), "a"), r"load\(path, model\) takes a path and a module"),
    ],
)
def test_arguments_by_another_name(call, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, a, p: a(m, p, **text_batch()), r"write adapted_forward\(model, params, batch\)"),
        (lambda m, a, p: a(p, m, text_batch()), "model must be a torch.nn.Module, not dict"),
        (
            lambda m, a, p: bad.save(a, "a.safetensors", p),
            r"save\(path, adapter, params\): adapter",
        ),
        (lambda m, a, p: bad.save("a.safetensors", p, a), r"must be of type Adapter, not dict"),
        (bad.bind, r"bind\(adapter, model, params\): adapter must be"),
        (lambda m, a, p: bad.merge(a, p, m), r"merge\(adapter, model, params\): model must be"),
        (
            lambda m, a, p: bad.probe(m, a, p, {}),
            r"probe\(adapter, model, params, batch\): adapter",
        ),
    ],
)
def test_arguments_in_another_order(call, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        call(*adapted())


# how much of a model is reached


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_model_of_fused_experts(name):
    """Nothing is named, and the defaults reach a small part: that is said, once for each adapt."""
    model = ARCHITECTURES[name][0]()
    held = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    with pytest.warns(UserWarning, match=rf"{experts / held:.1%} lie in fused experts such as"):
        lf.adapt(model, lf.LoRA(r=2))
    lf.adapt(model, lf.LoRA(r=2), targets=Q_V)


def test_heads_are_adapted_only_if_they_are_named():
    model = tiny_llama()
    for targets in (lf.Targets(), lf.Targets(exclude=("k_proj",))):
        assert "lm_head" not in targets.find(model)
    for rules in ({r"lm_head$": lf.LoRA(r=2)}, {r"(q_proj|lm_head)$": lf.LoRA(r=2)}):
        adapter, _ = lf.adapt(model, rules)
        assert "lm_head" in adapter.targets


def test_what_roles_leave_out_of_named_layers_is_said():
    """Without roles, named layers are adapted whatever their width: q and o are 48 wide here."""
    model, named = tiny_llama(), (r"(down|q)_proj$",)
    assert len(lf.Targets(names=named).find(model)) == 4
    with pytest.warns(UserWarning, match=r"roles=\('reader',\) leaves out 2 layers that are named"):
        assert len(lf.Targets(names=named, roles=("reader",)).find(model)) == 2
