"""Each law can fail: a variant that breaks it, for every one, and what `check_variant` says."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import lora_func as lf
from lora_func.precision import at_least_float32
from lora_func.testing import LAWS, Broken, check_variant


@dataclass(frozen=True, kw_only=True)
class Sound(lf.Variant):
    """out = base_out + (x Aᵀ) Bᵀ, which keeps all laws."""

    r: int = 4

    broadcasts = rounds_last = prepares_together = True

    def init(self, weight, generator, stats=None):
        d_out, d_in = weight.shape
        A = torch.randn(self.r, d_in, generator=generator) * d_in**-0.5
        return lf.Params({"A": A, "B": torch.zeros(d_out, self.r)})

    def prepare(self, weight, params, dtype):
        return {name: leaf.to(dtype) for name, leaf in params.items()}

    def apply(self, x, base_out, weight, params):
        return base_out + self.delta(x, params).to(base_out.dtype)

    def fused(self, x, W, b, params):
        return F.linear(x, W, b) + self.delta(x, params)

    def delta(self, x, params):
        return (x @ params["A"].to(x.dtype).mT) @ params["B"].to(x.dtype).mT

    def merged(self, weight, params):
        A, B = self.factors(weight, params)
        return at_least_float32(weight.dense()) + B @ A, weight.bias

    def factors(self, weight, params):
        return at_least_float32(params["A"]), at_least_float32(params["B"])


class WritesToTheBias(Sound):
    def apply(self, x, base_out, weight, params):
        if weight.bias is not None:
            weight.bias.mul_(1)
        return super().apply(x, base_out, weight, params)


class StartsElsewhere(Sound):
    def init(self, weight, generator, stats=None):
        drawn = super().init(weight, generator)
        drawn.trainable["B"].add_(1e-6)
        return drawn


class MergesTwice(Sound):
    def merged(self, weight, params):
        return weight.dense() + 2 * params["B"] @ params["A"], weight.bias


class MergesWithTwoRoundings(Sound):
    """W / 3 * 3 is not W."""

    def merged(self, weight, params):
        W, b = super().merged(weight, params)
        return W / 3 * 3, b


class CancelsAtInit(Sound):
    """B A - B A is zero, and yet no form of it that is exact in any order of the sum."""

    def factors(self, weight, params):
        A, B = super().factors(weight, params)
        A1, B1 = torch.ones(1, A.shape[1]).to(A), torch.ones(len(B), 1).to(B)
        return torch.cat([A, A1, A1]), torch.cat([B, B1, -B1], dim=1)


class ForgetsTheScale(Sound):
    def factors(self, weight, params):
        A, B = super().factors(weight, params)
        return A, 2 * B

    def merged(self, weight, params):
        return Sound().merged(weight, params)


class MergesOneMatrixOnly(Sound):
    def merged(self, weight, params):
        W, b = super().merged(weight, params)
        return W if W.isfinite().all().item() else weight.dense(), b


class MergesWithoutADerivative(Sound):
    def factors(self, weight, params):
        A, B = super().factors(weight, params)
        return A.detach(), B


class Bends(Sound):
    def delta(self, x, params):
        return super().delta(x, params) + 1e-6 * super().delta(x, params) ** 2


class MixesTokens(Sound):
    def delta(self, x, params):
        whole = params["B"].sum() * x.mean() if x.numel() else 0.0
        return super().delta(x, params) + whole


class TakesTheDtypeOfItsParameters(Sound):
    def apply(self, x, base_out, weight, params):
        return base_out + self.delta(x.to(params["A"].dtype), params)


class RoundsOnTheWay(Sound):
    def prepare(self, weight, params, dtype):
        return {name: leaf.bfloat16().to(dtype) for name, leaf in params.items()}


class ComputesInTheDtype(Sound):
    rounds_last = True

    def prepare(self, weight, params, dtype):
        return {name: 1.1 * leaf.to(dtype) for name, leaf in params.items()}


class WritesWhatItPrepares(Sound):
    prepares_together = True

    def prepare(self, weight, params, dtype):
        A = torch.zeros(params["A"].shape, dtype=dtype)
        A.copy_(params["A"])
        return {**params, "A": A}


class Branches(Sound):
    def delta(self, x, params):
        return super().delta(x, params) if params["B"].abs().sum().item() else x.new_zeros(())


class FusesWithoutADerivative(Sound):
    def fused(self, x, W, b, params):
        return super().fused(x, W, b, {**params, "A": params["A"].detach()})


class ForgetsADerivative(Sound):
    def delta(self, x, params):
        return super().delta(x, {**params, "A": params["A"].detach()})


class IsDead(Sound):
    def init(self, weight, generator, stats=None):
        drawn = super().init(weight, generator).trainable
        return lf.Params({name: torch.zeros_like(leaf) for name, leaf in drawn.items()})


class HasAnIdleLeaf(Sound):
    def init(self, weight, generator, stats=None):
        return lf.Params({**super().init(weight, generator).trainable, "idle": torch.zeros(3)})


class DeclaresOtherShapes(Sound):
    card = lf.Card(trainable={"A": "r, d_in", "B": "r, d_out"})


class ReadsMoreThanItSays(Sound):
    card = lf.Card(reads="init")

    def delta(self, x, params):
        return super().delta(x, params)

    def apply(self, x, base_out, weight, params):
        rows = weight(params["A"].to(x.dtype))
        return super().apply(x, base_out, weight, params) + (0 * rows).sum().to(base_out.dtype)


class ReadsTheMatrix(Sound):
    card = lf.Card(reads="rows")

    def apply(self, x, base_out, weight, params):
        out = super().apply(x, base_out, weight, params)
        return out + (0 * weight.dense()).sum().to(out.dtype)


class SaysThatItReadsTheMatrix(ReadsTheMatrix):
    card = lf.Card(reads="dense")


class PreparesFromTheMatrix(SaysThatItReadsTheMatrix):
    def prepare(self, weight, params, dtype):
        return {**params, "A": params["A"] + (0 * weight.dense()).sum()}


class TakesOneExample(Sound):
    def delta(self, x, params):
        return F.linear(F.linear(x, params["A"].to(x.dtype)), params["B"].to(x.dtype))


class DrawsInFloat64(Sound):
    def init(self, weight, generator, stats=None):
        drawn = super().init(weight, generator).trainable
        return lf.Params({name: leaf.double() for name, leaf in drawn.items()})


class TellsOtherShapes(Sound):
    def like(self, weight, leaves):
        return lf.Params({"A": torch.empty(self.r, self.r), "B": torch.empty(weight.shape[0], 1)})


class LeavesAutocast(Sound):
    def apply(self, x, base_out, weight, params):
        with torch.autocast("cpu", enabled=False):
            return base_out.to(x.dtype) + self.delta(x, params)


@dataclass(frozen=True, kw_only=True)
class ComesBackAnother(Sound):
    def __post_init__(self):
        object.__setattr__(self, "r", self.r + 1)


BREAKERS = {
    "purity": (WritesToTheBias, "b was written to"),
    "identity_at_init": (StartsElsewhere, r"the base output: [\d.e-]+ off, expected equality to"),
    "equals_the_merged_layer": (MergesTwice, r"the merged layer: [\d.]+ off, at most [\d.e-]+ all"),
    "merged_at_init_is_the_weight": (
        MergesWithTwoRoundings,
        r"W_eff at init, parameters in torch.float32: [\d.e-]+ off, expected equality to the bit",
    ),
    "factors_make_the_merged_weight": (ForgetsTheScale, r"W \+ B A against W_eff: [\d.]+ off, at"),
    "merged_of_a_stack_is_the_loop": (MergesOneMatrixOnly, r"RuntimeError: .*vmap"),
    "closed_forms_have_the_derivatives": (
        MergesWithoutADerivative,
        r"the gradient of the merged layer in A: [\d.]+ off, at most",
    ),
    "affine_in_x": (Bends, r"f\(0.7 u - 1.3 v\): [\d.e-]+ off, at most"),
    "rows_are_independent": (MixesTokens, r"split|permuted tokens|one by one: [\d.]+ off"),
    "shape_and_dtype": (TakesTheDtypeOfItsParameters, r"parameters in torch.float64: out is torch"),
    "two_steps_are_one_function": (RoundsOnTheWay, r"prepared for torch.float32: [\d.e-]+ off"),
    "vmap_is_the_loop": (Branches, r"RuntimeError: .*vmap"),
    "examples_are_the_loop": (TakesOneExample, "RuntimeError"),
    "rounding_comes_last": (ComputesInTheDtype, r"A, prepared for torch.bfloat16: [\d.e-]+ off"),
    "prepared_together": (WritesWhatItPrepares, "RuntimeError: .*vmap"),
    "fused_is_apply": (FusesWithoutADerivative, "only one of the two forms has d / d A"),
    "gradients": (ForgetsADerivative, r"finite differences: Jacobian mismatch .* numerical:"),
    "alive_at_init": (IsDead, r"no leaf has a gradient at init: {'A': 0.0, 'B': 0.0}"),
    "every_leaf_matters": (HasAnIdleLeaf, "moving idle moves the output by 0"),
    "leaves_are_those_of_the_card": (DeclaresOtherShapes, r"B has shape \(12, 4\), declared as"),
    "reads_of_the_weight": (ReadsMoreThanItSays, "rows went through the weight, where the card"),
    "draws_from_the_generator_alone": (DrawsInFloat64, "A is in torch.float64, not in torch.float"),
    "a_file_can_tell_its_leaves": (TellsOtherShapes, r"like says {'A': \(4, 4\), .* init {'A'"),
    "autocast": (LeavesAutocast, "out is torch.float32, the base output torch.bfloat16"),
    "file_round_trip": (ComesBackAnother, r"one like torch.float32 of shape \(6, 8\) was expected"),
}


def test_the_sound_one_keeps_all_laws():
    report = check_variant(Sound())
    assert report.held.keys() == LAWS.keys() == BREAKERS.keys()
    assert "Sound(r=4): 25 laws hold" in str(report)
    assert not report.left_out


def test_all_laws_are_checked_unless_some_are_named():
    with pytest.raises(Broken, match=r"equals_the_merged_layer \((.|\n)*on a layer of shape"):
        check_variant(MergesTwice())


def test_unknown_laws_are_named():
    message = r"unknown law \['identity'\]; the laws are \['purity'"
    with pytest.raises(lf.LoraFuncError, match=message):
        check_variant(Sound(), laws=["identity"])


def test_factors_that_cancel_at_init_are_not_exact():
    with pytest.raises(Broken, match=r"the terms of B A at init, .* add up to 2, not 0"):
        check_variant(CancelsAtInit(), laws=["merged_at_init_is_the_weight"])


def test_the_matrix_on_each_call():
    """Only in `apply`, and only if the card says so: what is prepared from it would be kept."""
    check_variant(SaysThatItReadsTheMatrix(), laws=["reads_of_the_weight"])
    for kind, says in ((ReadsTheMatrix, "rows"), (PreparesFromTheMatrix, "dense")):
        message = f"the dense weight was read, where the card says '{says}'"
        with pytest.raises(Broken, match=message):
            check_variant(kind(), laws=["reads_of_the_weight"])


@pytest.mark.parametrize("law", BREAKERS)
def test_a_law_is_broken(law):
    """The message names the law and shows the numbers, in a few lines."""
    kind, numbers = BREAKERS[law]
    with pytest.raises(Broken) as error:
        check_variant(kind(), laws=[law])
    message = str(error.value)
    assert f"{law} ({LAWS[law].statement})" in message
    assert re.search(numbers, message), message
    assert len(message) < 900
