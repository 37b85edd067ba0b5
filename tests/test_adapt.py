"""`adapt` and `Adapter`: their results, their checks and their error messages."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from cases import catalogue, data_for
from models import adapted, mlp, qwen3_600m, text_batch, tiny_llama, trained
from torch import nn
from transformers import BatchEncoding

import lora_func as lf

Q_V = lf.Targets(names=(r"q_proj$", r"v_proj$"))
ALL = lf.Targets(roles=())


def test_the_example_of_the_readme_in_small():
    model = tiny_llama()
    adapter, params = lf.adapt(model, lf.LoRA(r=4, alpha=16))
    assert adapter.targets == tuple(
        f"model.layers.{i}.{part}"
        for i in range(2)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    )
    assert {key: leaf.shape for key, leaf in params.items()} == dict(adapter.shapes)
    assert params["model.layers.1.self_attn.k_proj.lora_A"].shape == (4, 32)
    assert params["model.layers.1.self_attn.k_proj.lora_B"].shape == (24, 4)
    assert all(leaf.dtype == torch.float32 and not leaf.requires_grad for leaf in params.values())


@pytest.mark.parametrize(
    ("rules", "targets", "expected"),
    [
        (lf.LoRA(r=32), Q_V, 4_587_520),
        (lf.PiSSA(r=32), Q_V, 4_587_520),
        (lf.DoRA(r=32), Q_V, 4_673_536),
        (lf.DeLoRA(r=32), Q_V, 4_587_576),
        (lf.HRA(r=32), Q_V, 1_835_008),
        ({r"\.(k|v)_proj$": lf.IA3()}, lf.Targets(), 57_344),
        ({r"\.down_proj$": lf.IA3FF()}, lf.Targets(), 86_016),
        ({r"\.(k|v)_proj$": lf.IA3(), r"\.down_proj$": lf.IA3FF()}, lf.Targets(), 57_344 + 86_016),
    ],
    ids=["lora", "pissa", "dora", "delora", "hra", "ia3", "ia3ff", "ia3+ia3ff"],
)
def test_counts_on_qwen3_600m(rules, targets, expected):
    """The counts are the published ones for Qwen3-0.6B. Counting needs no weights."""
    adapter, params = lf.adapt(qwen3_600m(), rules, targets=targets)
    assert sum(leaf.numel() for leaf in params.values()) == expected
    assert f"{expected:,} parameters" in repr(adapter)


def test_a_mapping_of_patterns():
    """The first matching pattern sets the variant; a layer that matches none stays as it is."""
    model = tiny_llama()
    rules = {
        r"\.k_proj$": lf.IA3(),
        r"layers\.0.*_proj$": lf.LoRA(r=2),
        r"\.down_proj$": lf.IA3FF(),
    }
    adapter, params = lf.adapt(model, rules, targets=lf.Targets(exclude=("gate", "up_proj")))
    kinds = {
        path.removeprefix("model.layers."): variant.name()
        for path, variant in adapter.variants.items()
    }
    assert kinds == {
        "0.self_attn.q_proj": "lora",
        "0.self_attn.k_proj": "ia3",
        "0.self_attn.v_proj": "lora",
        "0.self_attn.o_proj": "lora",
        "0.mlp.down_proj": "lora",
        "1.self_attn.k_proj": "ia3",
        "1.mlp.down_proj": "ia3ff",
    }
    batch = text_batch()
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", ["dict", "BatchEncoding", "tuple", "list", "tensor"])
def test_batches(kind):
    model, adapter, params = adapted()
    ids = text_batch()["input_ids"]
    batch = {
        "dict": {"input_ids": ids},
        "BatchEncoding": BatchEncoding({"input_ids": ids}),
        "tuple": (ids,),
        "list": [ids],
    }
    expected = adapter(model, params, {"input_ids": ids, "use_cache": False}).logits
    assert torch.equal(adapter(model, params, batch.get(kind, ids)).logits, expected)


@pytest.mark.parametrize(
    "batch",
    [None, "text", b"bytes", 3, 2.5, True, {1, 2}, iter([1])],
    ids=lambda batch: type(batch).__name__,
)
def test_batch_of_a_wrong_type(batch):
    model, adapter, params = adapted()
    message = rf"batch is {type(batch).__name__}; expected a mapping"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, params, batch)


def test_batch_with_keys_that_are_no_names():
    model, adapter, params = adapted()
    with pytest.raises(lf.LoraFuncError, match=r"its keys must be strings, not \[0\]"):
        adapter(model, params, {0: torch.ones(1)})


def changed(params, **changes):
    return {**params, **changes}


def test_params_with_a_misspelt_key():
    """torch.func.functional_call itself accepts this silently."""
    model, adapter, params = adapted()
    key = "model.layers.0.self_attn.q_proj.lora_A"
    params["model.layers.0.self_attn.q_proj.lora_a"] = params.pop(key)
    with pytest.raises(lf.LoraFuncError) as error:
        adapter(model, params, text_batch())
    assert str(error.value) == (
        f"params: missing '{key}'. unexpected 'model.layers.0.self_attn.q_proj.lora_a'. "
        f"Did you mean '{key}'?"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: [],
            r"params must be a mapping flat key -> tensor, as adapt returns it, not list",
        ),
        (lambda p: {}, r"params: missing 'model.layers.0.self_attn.q_proj.lora_A', .* and 2 more"),
        (
            lambda p: {**p, "extra": p["model.layers.0.self_attn.q_proj.lora_A"]},
            r"params: unexpected 'extra'",
        ),
        (
            lambda p: {k: v.int() for k, v in p.items()},
            r"lora_A'\] is a tensor of torch.int32, where a floating tensor of shape \(4, 32\)",
        ),
        (
            lambda p: {k: v.tolist() for k, v in p.items()},
            r"where a floating tensor of shape \(4, 32\) was expected",
        ),
        (
            lambda p: {k: v.mT for k, v in p.items()},
            r"lora_A'\] has shape \(32, 4\), where \(4, 32\) was expected",
        ),
        (
            lambda p: {k: v[..., None] for k, v in p.items()},
            r"has shape \(4, 32, 1\), where \(4, 32\) was expected",
        ),
    ],
    ids=["type", "missing", "unexpected", "integer", "list", "transposed", "trailing axis"],
)
def test_bad_params(change, message, tmp_path):
    """Every entry point raises, and nothing is written."""
    model, adapter, params = adapted()
    bad = change(params)
    for use in (
        lambda: adapter(model, bad, text_batch()),
        lambda: lf.bind(adapter, model, bad),
        lambda: lf.merge(adapter, model, bad),
        lambda: lf.save(tmp_path / "a.safetensors", adapter, bad),
    ):
        with pytest.raises(lf.LoraFuncError, match=message):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (
            "lora",
            {},
            r"rules must be a Variant such as LoRA\(r=8\), or a mapping pattern -> Variant, "
            r"not 'lora'",
        ),
        ({}, {}, "rules must be a Variant"),
        (lf.LoRA, {}, "rules must be a Variant"),
        ({"q_proj": "lora"}, {}, "rules must be a Variant"),
        ({"(": lf.LoRA()}, {}, r"'\(' is not a regular expression"),
        ({"q_prj": lf.LoRA()}, {}, r"the pattern 'q_prj' names no layer. Did you mean 'q_proj'"),
        (
            {"q_proj": lf.LoRA()},
            {"targets": lf.Targets(exclude=("q_proj",))},
            r"names no layer. It matches 'model.layers.0.self_attn.q_proj', .* leaves out",
        ),
        (
            {"_proj": lf.IA3(), "q_proj": lf.LoRA()},
            {},
            r"the pattern 'q_proj' names no layer. An earlier pattern takes",
        ),
        (
            lf.LoRA(),
            {"dtype": torch.int8},
            "dtype must be a floating torch dtype such as torch.float32, not torch.int8",
        ),
        (
            lf.PiSSA(r=32),
            {},
            r"0.self_attn.k_proj': PiSSA\(r=32\) on a layer of shape \(24, 32\): "
            r"r must be at most 24",
        ),
    ],
)
def test_bad_rules(rules, options, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), rules, **options)


def test_not_a_model():
    with pytest.raises(lf.LoraFuncError, match=r"model must be a torch.nn.Module, not str"):
        lf.adapt("Qwen/Qwen3-0.6B", lf.LoRA())  # pyright: ignore[reportArgumentType]


def test_another_model():
    model, adapter, params = adapted()
    missing = r"Sequential has no layer 'model.layers.0.self_attn.q_proj'"
    with pytest.raises(lf.LoraFuncError, match=missing):
        adapter(mlp(), params, torch.ones(1, 6))
    prefixed = nn.ModuleDict({"language_model": model.model})
    suggestion = r"Did you mean 'language_model.layers.0.self_attn.q_proj'"
    with pytest.raises(lf.LoraFuncError, match=suggestion):
        adapter.init(prefixed)
    shape = r"q_proj' is \(48, 64\) in this LlamaForCausalLM, but was \(48, 32\)"
    with pytest.raises(lf.LoraFuncError, match=shape):
        adapter.init(tiny_llama(hidden_size=64))


def test_a_layer_without_a_weight_yet():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    message = r"'0' is a LazyLinear without a weight yet: run the model once"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, lf.LoRA(), targets=ALL)


def test_a_packed_weight_that_nobody_knows():
    class Packed(nn.Module):
        in_features = out_features = 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)

    message = r"'0' is a Packed with a weight of torch.uint8 and shape \(4, 2\)"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(nn.Sequential(Packed()), lf.LoRA(), targets=ALL)


# the Adapter


AT_BASE = catalogue(at_base=True)


@pytest.mark.parametrize("variant", AT_BASE.values(), ids=AT_BASE.keys())
def test_init_draws_afresh(variant):
    """The generator decides the draw, each draw is the identity, and draws share no memory."""
    model, batch = tiny_llama(), text_batch()
    data = data_for(variant, model, Q_V)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    adapter, params = lf.adapt(model, variant, targets=Q_V, generator=seeded(1), **data)
    again = adapter.init(model, generator=seeded(1), **data)
    assert all(torch.equal(params[key], again[key]) for key in params)
    other = adapter.init(model, generator=seeded(2), **data)
    assert other.keys() == params.keys()
    torch.testing.assert_close(adapter(model, other, batch).logits, model(**batch).logits)
    other[next(key for key in params if "layers.0.self_attn.q_proj" in key)].add_(1)
    assert all(torch.equal(params[key], again[key]) for key in params)
    both = other.keys() & adapter.frozen.keys()
    assert all(not torch.equal(adapter.frozen[key], other[key]) for key in both)


def test_adapter_is_immutable_hashable_and_picklable():
    model, adapter, params = adapted(lf.PiSSA(r=4))
    batch = text_batch()
    for twin in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter), adapter.to("cpu")):
        assert twin != adapter
        assert dict(twin.variants) == dict(adapter.variants)
        assert torch.equal(twin(model, params, batch).logits, adapter(model, params, batch).logits)
    assert len({adapter, adapter}) == 1
    with pytest.raises(TypeError):
        adapter.variants["lm_head"] = lf.LoRA()  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        adapter.dtype = torch.float64
    variant: Any = adapter.variants["model.layers.0.self_attn.q_proj"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.r = 5


def test_replace_by_a_function_keeps_the_ratios_of_the_layers():
    """Each layer's own field is halved, whatever its variant; what has no such field stays."""
    rules = {
        "q_proj": lf.LoRA(r=4, alpha=16),
        "v_proj": lf.DoRA(r=4, alpha=4),
        "o_proj": lf.IA3(),
    }
    names = lf.Targets(names=tuple(rules))
    model, adapter, params = adapted(rules, targets=names)
    halved = adapter.replace(alpha=lambda alpha: alpha / 2)
    for path, variant in adapter.variants.items():
        expected = getattr(variant, "alpha", None)
        assert getattr(halved.variants[path], "alpha", None) == (expected and expected / 2)
    rules = {**rules, "q_proj": lf.LoRA(r=4, alpha=8), "v_proj": lf.DoRA(r=4, alpha=2)}
    batch, params = text_batch(), trained(params)
    same, _ = lf.adapt(model, rules, targets=names)
    assert torch.equal(halved(model, params, batch).logits, same(model, params, batch).logits)
    with pytest.raises(lf.LoraFuncError, match=r"LoRA\(alpha=0.0\): alpha must be a finite number"):
        adapter.replace(alpha=lambda alpha: 0.0 * alpha)
    with pytest.raises(lf.LoraFuncError, match="needs other parameters than"):
        adapter.replace(r=lambda r: 2 * r)


def test_adapter_to_moves_the_constants():
    _, adapter, _ = adapted(lf.PiSSA(r=4))
    assert {leaf.dtype for leaf in adapter.to(torch.float64).frozen.values()} == {torch.float64}
    assert {leaf.dtype for leaf in adapter.frozen.values()} == {torch.float32}
    assert {leaf.device.type for leaf in adapter.to("meta").frozen.values()} == {"meta"}


def test_repr():
    _, adapter, _ = adapted()
    fields = "r=4, alpha=16.0, rslora=False, lr_ratio=1.0, start='kaiming', add_bias=False"
    assert repr(adapter) == f"Adapter(4 x LoRA({fields}); 1,088 parameters)"


# a user's own variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift(lf.Variant):
    """Adds to the output a u + bank.

    Each layer learns its own number a. All layers share the fixed direction u and train bank
    together.
    """

    d: int = 32

    def init_shared(self, weights, generator):
        u = torch.rand(self.d, generator=generator)
        return lf.Params({"bank": torch.zeros(self.d)}, frozen={"u": u})

    def init(self, weight, generator, stats=None):
        return lf.Params({"a": torch.zeros(())})

    def apply(self, x, base_out, weight, params):
        return base_out + (params["a"] * params["u"] + params["bank"]).to(base_out.dtype)


def test_a_variant_of_ones_own(tmp_path):
    """It needs no registration. Tensors that all layers share are drawn once, under `shared`."""
    model, batch = tiny_llama(), text_batch()
    writers = lf.Targets(roles=("writer",))
    adapter, params = lf.adapt(model, Shift(), targets=writers, generator=torch.Generator())
    assert set(params) == {"shared.lora_bank", *(f"{path}.lora_a" for path in adapter.targets)}
    assert set(adapter.frozen) == {"shared.lora_u"}
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)
    grads = torch.func.grad(lambda p: adapter(model, p, batch).loss)(trained(params))
    assert all(grad.abs().max() > 0 for grad in grads.values())
    lf.save(tmp_path / "shift.safetensors", adapter, params)
    message = r"unknown variant 'shift'.* your own class as load\(..., variants=\[Mine\]\)"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.load(tmp_path / "shift.safetensors", model)
    again, loaded = lf.load(tmp_path / "shift.safetensors", model, variants=[Shift])
    assert torch.equal(again.frozen["shared.lora_u"], adapter.frozen["shared.lora_u"])
    assert loaded.keys() == params.keys()
    message = "Shift has no closed form as one linear layer, so it cannot be merged"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.merge(adapter, model, params)


def test_two_variants_that_share_one_name():
    message = r"Shift\(d=32\) and Shift\(d=33\) both share a tensor called 'bank'"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(tiny_llama(), {"o_proj": Shift(), "down_proj": Shift(d=33)})


@pytest.mark.parametrize("other", [lf.LoRA(r=4), lf.PiSSA(r=4), lf.TinyLoRA(r=4, n=3)])
def test_what_one_variant_shares_is_not_a_leaf_of_another(other):
    """VeRA shares tensors A and B. They have the shapes of LoRA's leaves A and B here."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    adapter, params = lf.adapt(model, {"^0$": other, "^1$": lf.VeRA(r=4)})
    params = trained(params)
    ours = adapter(model, params, x)
    for path, variant in adapter.variants.items():
        frozen = {key: t for key, t in adapter.frozen.items() if key.startswith(f"{path}.")}
        if variant != other:
            frozen |= {key: t for key, t in adapter.frozen.items() if key.startswith("shared.")}
        leaves = {key: t for key, t in params.items() if key.startswith(f"{path}.")}
        shapes = {key: t.shape for key, t in leaves.items()}
        base = {path: adapter.base[path]}
        alone = lf.Adapter({path: variant}, shapes, frozen, base, adapter.dtype)
        x = lf.bind(alone, model, leaves)[int(path)](x)
    torch.testing.assert_close(ours, x)
