"""What users get wrong, and odd things in models: an error that says so, or the right result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import catalogue
from models import adapted, text_batch, tiny_llama, trained
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, BertModel

import lora_func as lf

Q_V = lf.Targets(names=(r"(q|v)_proj$",))
Q = "model.layers.0.self_attn.q_proj"
over_variants = pytest.mark.parametrize("variant", catalogue().values(), ids=catalogue().keys())


# stats that are not those of the variant


def collected(statistic, model=None) -> dict:
    return lf.collect(model or tiny_llama(), Q_V, [text_batch(8, 20)], statistic)


@pytest.mark.parametrize(
    ("variant", "stats", "message"),
    [
        (lf.EVA(r=2), {}, r"stats has nothing for '.*q_proj'"),
        (lf.LoRA(r=2), {Q: torch.ones(3)}, r"stats= was given, and 'LoRA' looks at no data"),
        (lf.EVA(r=2), [torch.ones(3)], "stats must be a mapping path -> what collect found"),
        (
            lf.AntiPaSTOCorDA(r=2),
            lf.OutputMoments(),
            r"stats of '.*q_proj' were collected by OutputMoments\(\), and .* at InputMoments",
        ),
        (lf.AntiPaSTO(r=2), lf.Projections(pool="mean_abs"), r"by Projections\(pool='mean_abs'\)"),
        (lf.EVA(r=8), lf.EVA(r=4).statistic, r"by PrincipalComponents\(r=4, .*\(r=8, "),
        (lf.AntiPaSTO(r=2), lf.InputMoments(), r"were collected by InputMoments\(\)"),
    ],
)
def test_stats_of_something_else(variant, stats, message):
    given = stats if isinstance(stats, (dict, list)) else collected(stats)
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
    """Copied by hand, they have lost which statistic they are of."""
    stats = {path: found for path, found in collected(statistic).items()}
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), variant, targets=Q_V, stats=stats)


def test_stats_of_more_layers_than_needed():
    model = tiny_llama()
    stats = lf.collect(model, lf.Targets(), [text_batch()], lf.InputMoments())
    adapter, _ = lf.adapt(model, lf.CorDA(r=2), targets=Q_V, stats=stats)
    assert len(adapter.targets) == 4


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
    """Four tokens span three directions about their mean: the ranks are 3, and a warning says so."""
    model, batch = tiny_llama(), text_batch(1, 4)
    del batch["attention_mask"]
    warning = "only .* components for 4 layers, where r=16 asks for 64.* Calibrate on more tokens"
    with pytest.warns(UserWarning, match=warning):
        adapter, params = lf.adapt(model, lf.EVA(r=16, rho=1.0), targets=Q_V, calibration=[batch])
    assert {len(params[f"{path}.lora_A"]) for path in adapter.targets} <= {2, 3}


# layers that are built otherwise


class NoBias(nn.Module):
    """Linear by the definition: sizes and a weight. It has no attribute `bias`."""

    def __init__(self, d_in: int = 8, d_out: int = 8):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)

    def forward(self, x):
        return F.linear(x, self.weight)


class Transposed(NoBias):
    """It holds `[in, out]`."""

    def __init__(self, d_in: int = 8, d_out: int = 8):
        super().__init__(d_out, d_in)
        self.in_features, self.out_features = d_in, d_out

    def forward(self, x):
        return x @ self.weight


@over_variants
@pytest.mark.parametrize("kind", [NoBias, Transposed])
@pytest.mark.parametrize("shape", [(8, 8), (8, 12)], ids=str)
def test_layers_without_a_bias_and_transposed_ones(variant, kind, shape, tmp_path):
    """Found out from the layer, also where it is square: called, merged, saved and loaded."""
    model = nn.Sequential(kind(*shape), nn.Tanh(), kind(*shape[::-1]))
    everything = lf.Targets(roles=())
    data = {}
    if variant.statistic is not None:
        batches, loss = [torch.randn(64, 8)], lambda out, batch: out.square().sum()
        stats = lf.collect(model, everything, batches, variant.statistic, loss=loss)
        data = {"stats": stats}
    adapter, params = lf.adapt(model, variant, targets=everything, **data)
    params, x = trained(params), torch.randn(5, 8)
    out = adapter(model, params, x)
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(functional_call(model, merged, x), out, rtol=1e-4, atol=1e-5)
    assert (out - model(x)).abs().max() > 1e-3
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "a.safetensors", model, check_base="error")
    assert torch.equal(again(model, loaded, x), out)
    assert torch.equal(lf.bind(again, model, loaded)(x), out)


def test_a_square_layer_that_cannot_be_asked():
    class Strange(NoBias):
        def forward(self, x, scale):
            return F.linear(x, self.weight) * scale

    with pytest.raises(lf.LoraFuncError, match=r"'0' is a Strange with a square .* Leave it out"):
        lf.adapt(nn.Sequential(Strange()), lf.LoRA(r=2))


# which layers


def test_layers_are_counted_in_the_stack_of_blocks():
    """Not in a wrapper: the 0 of nn.Sequential(model) is no block."""
    model = nn.Sequential(tiny_llama())
    found = lf.Targets(layers=[1]).find(model)
    assert {path.split(".")[3] for path in found} == {"1"}
    assert {path.split(".")[0] for path in found} == {"0"}


def test_layers_of_a_sentence_transformer():
    """A wrapper numbers its parts: the model is its 0, and the pooling its 1."""
    wrapped = nn.Module()
    wrapped.auto_model = BertModel(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
        )
    )
    model = nn.Sequential(wrapped, nn.Identity())
    found = lf.Targets(layers=[1]).find(model)
    assert len(found) == 6
    assert all(path.startswith("0.auto_model.encoder.layer.1.") for path in found)
    with pytest.raises(
        lf.LoraFuncError, match=r"BertModel|Sequential has no block '2'; it has 0 to 1"
    ):
        lf.Targets(layers=range(3)).find(model)


def test_an_exclusion_that_matches_nothing():
    """It would adapt what it was meant to spare."""
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
    with pytest.raises(lf.LoraFuncError, match=rf"'{Q}' carries an adapter already"):
        adapter(bound, params, text_batch())


# numbers


def test_parameters_that_are_not_finite_are_not_merged():
    model, adapter, params = adapted()
    key = next(iter(params))
    params[key][0, 0] = float("nan")
    with pytest.raises(lf.LoraFuncError, match=rf"params: '{key}' has NaN or infinite entries"):
        lf.merge(adapter, model, params)


def test_a_loss_without_labels_is_told_by_the_probe():
    model, adapter, params = adapted()
    batch = text_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(lf.LoraFuncError, match=r"the loss is nan: .* labels that count"):
        lf.probe(adapter, model, params, batch)


@pytest.mark.parametrize("kind", [lf.PiSSA, lf.MiLoRA], ids=lambda kind: kind.name())
def test_alpha_scales_training_and_not_the_start(kind):
    """None means r, that is s = 1. s B0A0 does not depend on s; a step of SGD grows with it."""
    weight, x = lf.Weight(torch.randn(12, 8, dtype=torch.float64)), torch.randn(5, 8).double()
    target = torch.randn(5, 12).double()
    starts, steps = [], []
    for alpha in (None, 4.0, 16.0):
        variant = kind(r=4, alpha=alpha)
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
    assert steps[2] == pytest.approx(4 * steps[0], rel=1e-4)


# constructors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lf.LoRA(8), r"LoRA takes its fields by name, as in LoRA\(r=8\)"),
        (lambda: lf.LoRA(rank=8), r"LoRA has no field 'rank'; .* It is called r here"),
        (
            lambda: lf.LoRA(lora_alpha=8),
            r"no field 'lora_alpha'; .*: r, alpha, .* called alpha here",
        ),
        (lambda: lf.LoRA(alhpa=8), r"no field 'alhpa'; .* Did you mean 'alpha'"),
        (lambda: lf.LoRA(target_modules=["q_proj"]), r"called adapt\(.., targets=Targets\(names="),
        (lambda: lf.LoRA(use_dora=True), "It is called the variant DoRA here"),
        (lambda: lf.IA3(8), r"IA3 takes its fields by name, as in IA3\(\)"),
    ],
)
def test_fields_by_another_name(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        make()
