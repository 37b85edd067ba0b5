"""`LoftQ`: its start, beside PEFT's, and what it refuses. On bitsandbytes: bnb/test_loftq_bnb."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import over
from models import text_batch, tiny_llama, trained
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

import lora_func as lf

Q_V = lf.Targets(names=(r"q_proj$", r"v_proj$"))


def rounded(model: nn.Module, step: float = 0.02) -> Any:
    """A copy whose weights are multiples of `step`, as a coarse quantization leaves them."""
    model = copy.deepcopy(model).requires_grad_(False)
    for weight in weights_of(model).values():
        weight.copy_((weight / step).round() * step)
    return model


def weights_of(model: nn.Module) -> dict[str, Any]:
    """The stats: path -> weight, with its `requires_grad`."""
    return {path: model.get_submodule(path).weight for path in Q_V.find(model)}


@over("loftq")
def test_the_start_is_nearest_to_the_float_weight(layer, data):
    """s B A is the truncated SVD of what was lost, in float64, whatever the scale is."""
    lost = layer.stats - layer.weight.matrix
    U, S, V = torch.linalg.svd(lost, full_matrices=False)
    r = layer.variant.r
    expected = layer.weight.matrix + U[:, :r] * S[:r] @ V[:r]
    for variant in (lf.LoftQ(r=r), lf.LoftQ(r=r, alpha=3.0), lf.LoftQ(r=r, rslora=True)):
        start = variant.init(layer.weight, None, layer.stats).trainable
        W, bias = variant.merged(layer.weight, start)
        torch.testing.assert_close(W, expected)
        assert bias is layer.weight.bias


def test_the_start_is_that_of_peft():
    """With alpha = r, where PEFT's is nearest to the float weight, too. The signs are free."""
    W, float_weight, r = torch.randn(24, 16), torch.randn(24, 16), 4
    float_weight = W + 0.1 * float_weight
    theirs = _low_rank_decomposition(float_weight - W, r)
    ours = lf.LoftQ(r=r, alpha=float(r)).init(lf.Weight(W), None, float_weight).trainable
    for given, expected in ((ours["A"], theirs["R"]), (ours["B"].mT, theirs["L"].mT)):
        signs = (given * expected).sum(1, keepdim=True).sign()
        torch.testing.assert_close(given, signs * expected, rtol=1e-4, atol=1e-5)


def test_the_output_moves_to_that_of_the_float_model():
    """The more, the higher the rank is, and all the way at the full rank."""
    float_model, batch = tiny_llama(), text_batch()
    model = rounded(float_model)
    expected = float_model(**batch).logits

    def error(logits: Tensor) -> float:
        return ((logits - expected).norm() / expected.norm()).item()

    errors = [error(model(**batch).logits)]
    full = {"q_proj": lf.LoftQ(r=32), "v_proj": lf.LoftQ(r=24)}
    for rules in (lf.LoftQ(r=2), lf.LoftQ(r=8), full):
        adapter, params = lf.adapt(model, rules, targets=Q_V, stats=weights_of(float_model))
        assert not any(leaf.requires_grad for leaf in params.values())
        errors.append(error(adapter(model, params, batch).logits))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert errors[0] > 1e-2


def test_a_base_without_its_principal_part():
    """QPiSSA quantizes what PiSSA leaves of the weight. LoftQ starts no farther than that."""
    W, variant = torch.randn(24, 16, dtype=torch.float64), lf.LoftQ(r=4)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    principal = U[:, :4] * S[:4] @ V[:4]
    weight = lf.Weight(((W - principal) / 0.2).round() * 0.2)
    start = variant.merged(weight, variant.init(weight, None, W).trainable)[0]
    assert (start - W).norm() < (weight.matrix + principal - W).norm()


def test_a_file_needs_no_float_weights(tmp_path):
    float_model, batch = tiny_llama(), text_batch()
    model = rounded(float_model)
    adapter, params = lf.adapt(model, lf.LoftQ(r=4), targets=Q_V, stats=weights_of(float_model))
    params = trained(params)
    lf.save(tmp_path / "loftq.safetensors", adapter, params)
    again, loaded = lf.load(tmp_path / "loftq.safetensors", model)
    assert torch.equal(adapter(model, params, batch).logits, again(model, loaded, batch).logits)
    fresh = again.init(model, stats=weights_of(float_model))
    assert fresh.keys() == params.keys()
    with pytest.raises(lf.LoraFuncError, match="pass stats="):
        again.init(model)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (lambda W: None, r"pass stats=\{path: float weight .* \(12, 12\) .*, not None"),
        (lambda W: W[:5], r"of shape \(12, 12\) .*, not a tensor of shape \(5, 12\)"),
        (lambda W: W.clone(), r"the layer has lost nothing: .* Take lf.LoRA\(\)"),
        (lambda W: W.mT, "belongs to another layer, or is transposed"),
        (torch.randn_like, "belongs to another layer, or is transposed"),
    ],
)
def test_weights_that_it_refuses(stats, message):
    W = torch.randn(12, 12)
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.LoftQ(r=4).init(lf.Weight(W), None, stats(W))
