"""The layers that targets find, and the errors if they find none."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from models import adapted, mlp, tiny_llama
from torch import nn

import lora_func as lf


def found(model: nn.Module, **fields) -> list[str]:
    return list(lf.Targets(**fields).find(model))


def short(paths: list[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


def test_roles():
    model = tiny_llama()  # hidden 32, attention 48 and 24 wide, mlp 48
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert short(found(model)) == everything
    assert short(found(model, roles=("reader",))) == everything - {"o_proj", "down_proj"}
    assert short(found(model, roles="writer")) == {"o_proj", "down_proj"}
    assert short(found(mlp(), roles=())) == {"0", "2", "4"}
    inner = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)], nn.Linear(5, 3))
    assert found(inner, roles=("inner",)) == ["3"]
    assert found(inner) == ["0", "1", "2"]


def test_names_exclude_and_layers():
    model = tiny_llama()
    assert found(model, names=(r"q_proj$",), layers=[1]) == ["model.layers.1.self_attn.q_proj"]
    (only,) = found(model, names=r"layers\.0\..*(q|o)_proj", exclude=("o_proj",))
    assert only == "model.layers.0.self_attn.q_proj"
    assert len(found(model, layers=range(1))) == 7
    assert found(model, names=("lm_head",), exclude=()) == ["lm_head"]


def test_conv1d():
    """GPT-2 holds its weights transposed."""
    model = ARCHITECTURES["gpt2"][0]()
    assert short(found(model)) == {"c_attn", "c_proj", "c_fc"}
    model, adapter, params = adapted(model=model.eval(), targets=lf.Targets(layers=[0]))
    ids = torch.randint(64, (2, 7))
    merged = lf.merge(adapter, model, params)
    assert merged["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    expected = torch.func.functional_call(model, merged, ids).logits
    torch.testing.assert_close(adapter(model, params, ids).logits, expected)


def test_a_weight_that_is_also_an_embedding():
    """It is left out by default, adapted if it is named, and never merged."""
    model = ARCHITECTURES["bert"][0]().eval()
    decoder = "cls.predictions.decoder"
    assert decoder not in found(model)
    targets = lf.Targets(names=(decoder,))
    model, adapter, params = adapted(model=model, targets=targets)
    assert adapter.targets == (decoder,)
    ids = torch.randint(64, (2, 7))
    assert not torch.equal(adapter(model, params, ids).logits, model(ids).logits)
    message = rf"'{decoder}' shares its weight with 'bert.embeddings.word_embeddings', which"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.merge(adapter, model, params)


def test_a_layer_that_its_parent_never_calls():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert found(model) == ["linear1", "linear2"]
    message = (
        "'self_attn.out_proj' cannot be adapted as a layer: MultiheadAttention uses its weight"
    )
    with pytest.raises(lf.LoraFuncError, match=message):
        found(model, names=("out_proj",))
    with pytest.raises(lf.LoraFuncError, match="; the parents of 'out_proj' never call it"):
        found(nn.MultiheadAttention(8, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"names": ("qproj",)},
            r"'qproj' matches no layer that .* admit. .* mean 'q_proj'.* Its linear layers are",
        ),
        (
            {"names": (r"q_proj", r"gate"), "layers": [0], "exclude": "gate"},
            r"'gate' matches no layer that the other fields admit",
        ),
        (
            {"roles": ("inner",)},
            r"matches no layer of Llama.*. Its linear layers are 'model.layers.N.self_attn.q_proj'",
        ),
        ({"layers": [1, 7]}, r"layers=\[1, 7\]: LlamaForCausalLM has no block '7'; it has 0 to 1"),
        ({"exclude": ("lm_haed",)}, r"exclude='lm_haed' matches no module .* mean 'lm_head'"),
        (
            {"roles": ("readers",)},
            r"unknown role 'readers'; a role is one of 'reader', 'writer', 'inner'",
        ),
        ({"names": ("(",)}, r"'\(' is not a regular expression"),
        ({"exclude": (3,)}, r"3 is not a regular expression"),
    ],
)
def test_nothing_found(fields, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        found(tiny_llama(), **fields)


def test_a_model_without_linear_layers():
    message = "matches no layer of Conv2d. The model has no linear layers"
    with pytest.raises(lf.LoraFuncError, match=message):
        found(nn.Conv2d(3, 3, 3))


class HQQLinear(nn.Module):
    """Like layers of HQQ, GPTQ or AWQ: only their own kernels can read the matrix."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.W_q = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)


def test_a_layer_that_cannot_be_read_is_refused_by_its_class():
    """Silently left out, such layers would leave half of a model without adapters."""
    model = nn.Sequential(nn.Linear(4, 4), HQQLinear())
    message = "'1' is a HQQLinear with no weight.*not supported. Leave it out"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, lf.LoRA(r=2))
    adapter, _ = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(exclude=("1",)))
    assert adapter.targets == ("0",)


def test_fused_experts_are_parameters_and_no_layers():
    model = ARCHITECTURES["mixtral"][0]()
    text = r"fuses 4 matrices in one tensor of shape \(4, 96, 32\): name it as a parameter, Targets"
    with pytest.raises(lf.LoraFuncError, match=text):
        lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(names=(r"experts",)))
    by_rule, _ = lf.adapt(model, {r"experts": lf.LoRA(r=2)})
    by_name, _ = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(parameters=(r"experts",)))
    assert by_rule.targets == by_name.targets
    assert short([*by_rule.targets]) == {"gate_up_proj", "down_proj"}


def test_a_float_weight_that_is_no_matrix():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(2, 4, 4))
    message = r"a Linear with a weight of torch.float32 and shape \(2, 4, 4\), where .* \(4, 4\)"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(nn.Sequential(layer), lf.LoRA(r=2))
