"""Merged weights: a new dict in the layout and the dtype of the layers, computed in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import catalogue
from models import adapted, mlp, text_batch, tiny_llama
from torch import nn
from torch.func import functional_call
from transformers import LlamaForCausalLM

import lora_func as lf

ALL = lf.Targets(roles=())


VARIANTS = catalogue(2)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_merged_model_is_the_adapted_one(variant, bias):
    model = mlp(bias)
    model, adapter, params = adapted(variant, model, targets=ALL)
    merged = lf.merge(adapter, model, params)
    weights = {key for key in merged if key.endswith("weight")}
    assert weights == {f"{path}.weight" for path in adapter.targets}
    own = dict(model.named_parameters())
    assert not any(k.endswith("bias") and torch.equal(t, own[k]) for k, t in merged.items())
    x = torch.randn(5, 6)
    torch.testing.assert_close(functional_call(model, merged, x), adapter(model, params, x))
    own = {t.data_ptr() for t in (*model.parameters(), *params.values(), *adapter.frozen.values())}
    assert not own & {t.data_ptr() for t in merged.values()}


def test_dtypes():
    """Merging computes in float32 and rounds once, to the dtype of the weight or the given one."""
    variant = lf.LoRA(r=4)
    model, adapter, params = adapted(variant, mlp().bfloat16(), targets=ALL)
    key = "0.weight"
    A, B = params["0.lora_A"], params["0.lora_B"]
    exact = model[0].weight.float() + variant.scale * B @ A
    assert torch.equal(lf.merge(adapter, model, params)[key], exact.bfloat16())
    assert torch.equal(lf.merge(adapter, model, params, dtype=torch.float32)[key], exact)


def test_differentiable():
    model, adapter, params = adapted(model=mlp(), targets=ALL)

    def size(p):
        return sum(t.square().sum() for t in lf.merge(adapter, model, p).values())

    grads = torch.func.grad(size)(params)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_never_the_memory_of_the_model():
    """A merged weight is a copy, even if the variant does not change it."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bias(lf.Variant):
        """Changes the bias alone."""

        def init(self, weight, generator, stats=None):
            return lf.Params({"b": torch.zeros(weight.shape[0])})

        def merged(self, weight, params):
            assert weight.bias is not None
            return weight.dense(), weight.bias + params["b"]

    model, adapter, params = adapted(Bias(), mlp(), targets=ALL)
    merged = lf.merge(adapter, model, params)
    names = ("weight", "bias")
    assert set(merged) == {f"{path}.{name}" for path in adapter.targets for name in names}
    assert merged["0.weight"].data_ptr() != model[0].weight.data_ptr()


def test_a_bias_that_the_layer_cannot_hold():
    """`load_state_dict(.., strict=False)` would leave it out without a word."""
    variant = lf.LoRA(r=2, add_bias=True)
    model, adapter, params = adapted(variant, mlp(bias=False), targets=ALL)
    message = r"'0' has no bias, and LoRA\(r=2, .* adds one, .* give the layer a bias of zeros"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.merge(adapter, model, params)
    for path in adapter.targets:
        layer = model.get_submodule(path)
        layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    x = torch.randn(5, model[0].in_features)
    merged = lf.merge(adapter, model, params)
    torch.testing.assert_close(functional_call(model, merged, x), adapter(model, params, x))
    assert (functional_call(model, merged, x) - model(x)).abs().max() > 1e-2


def test_load_state_dict_takes_it():
    model, adapter, params = adapted()
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    model.load_state_dict(lf.merge(adapter, model, params), strict=False)
    torch.testing.assert_close(model(**batch).logits, expected)


def test_a_weight_of_two_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model, adapter, params = adapted(model=model, targets=lf.Targets())
    message = "'0' shares its weight with '1', which merging would change too"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.merge(adapter, model, params)


def test_another_model():
    _, adapter, params = adapted()
    with pytest.raises(lf.LoraFuncError, match=r"q_proj' is \(48, 64\) in this LlamaForCausalLM"):
        lf.merge(adapter, tiny_llama(hidden_size=64), params)


@pytest.mark.filterwarnings("ignore:.* are one tensor, so one adapter acts in all:UserWarning")
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_by_transformers(tied, dtype, shards, tmp_path):
    """Three lines make a checkpoint that needs nothing of ours; a tied head stays tied."""
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    rules = {
        r"(q|down)_proj$": lf.LoRA(r=4),
        r"o_proj$": lf.DoRA(r=4),
        "embed_tokens": lf.LoRA(r=4),
    }
    model, adapter, params = adapted(rules, model, targets=lf.Targets())
    batch = text_batch()
    expected = adapter(model, params, batch).logits
    merged = lf.merge(adapter, model, params)
    model.load_state_dict(merged, strict=False)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    own = model.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in loaded.state_dict().items())
    if dtype == torch.float32:  # in bfloat16, a merged weight has lost what the adapter keeps
        torch.testing.assert_close(loaded(**batch).logits, expected)


def test_a_tied_head_as_a_layer():
    """Its adapter is the head's alone, which one tensor for two cannot hold."""
    model = tiny_llama(tie_word_embeddings=True)
    rules = {"lm_head": lf.LoRA(r=4)}
    model, adapter, params = adapted(
        rules, model, targets=lf.Targets(names=("lm_head",), exclude=())
    )
    with pytest.raises(lf.LoraFuncError, match=r"'lm_head' shares its weight with 'model\.embed_t"):
        lf.merge(adapter, model, params)
