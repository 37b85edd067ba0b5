"""Laws of `collect`: a statistic equals the dense formula over all tokens of a layer at once."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import sys
from dataclasses import dataclass

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from models import adapted, checkpoint_activations, largest, state_of, text_batch, tiny_llama
from torch import nn

import lora_func as lf
from lora_func.variants.loraga import MeanGradient

ALL = lf.Targets(roles=())
Q, K, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True, kw_only=True)
class Tokens(lf.Statistic):
    """Keeps all that a layer sees, to compare the other statistics with."""

    observes: str = "inputs"  # pyright: ignore[reportIncompatibleVariableOverride]  (a field here)

    def update(self, state, tokens):
        return tokens if state is None else torch.cat([state, tokens])


@dataclass(frozen=True, kw_only=True)
class RunningMax(lf.Statistic):
    """max |x| of each input, `[d_in]`: a statistic that a user might write."""

    def update(self, state, tokens):
        new = tokens.abs().amax(0)
        return new if state is None else torch.maximum(state, new)


@dataclass(frozen=True, kw_only=True)
class Mine(lf.Variant):
    """out = base_out + (x / max |x|) dᵀ. Only data gives the constant max |x|."""

    @property
    def statistic(self):
        return RunningMax()

    def init(self, weight, generator, stats=None):
        if stats is None:
            raise lf.LoraFuncError("Mine needs the maxima of its inputs")
        return lf.Params({"d": torch.zeros(weight.shape)}, {"scale": 1 / stats})

    def like(self, weight, leaves):
        return lf.Params({"d": torch.empty(weight.shape)}, {"scale": torch.empty(weight.shape[1])})

    def apply(self, x, base_out, weight, params):
        return base_out + (x * params["scale"]) @ params["d"].mT


class Chain(nn.Module):
    """Two layers. Between them, the forward calls `between()`."""

    def __init__(self, between):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 4)])
        self.between = between

    def forward(self, x):
        h = self.layers[0](x)
        self.between()
        return self.layers[1](h)


def close(a: lf.Moments, b: lf.Moments, tolerance: float) -> bool:
    """Relative to the largest entry, which counts as 1 at least."""
    pairs = [(a.mean, b.mean), (a.scatter, b.scatter)]
    return a.n == b.n and all(
        (x.double() - y.double()).abs().max() <= tolerance * max(1.0, y.abs().max().item())
        for x, y in pairs
    )


def dense(x: torch.Tensor) -> lf.Moments:
    """The textbook formula over all tokens at once, in float64."""
    x = x.double()
    return lf.Moments(len(x), x.mean(0), (x - x.mean(0)).mT @ (x - x.mean(0)))


def layer(d: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 3, dtype=dtype))


def square(output, batch=None) -> torch.Tensor:
    """A loss."""
    return output.square().sum()


def moments(batches, model=None, **options) -> lf.Moments:
    """Those of the inputs of layer "0"."""
    model = layer() if model is None else model
    return lf.collect(model, ["0"], batches, lf.InputMoments(), **options)["0"]


# moments


@given(
    n=st.integers(1, 40),
    cuts=st.sets(st.integers(1, 39)),
    seed=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_moments_are_those_of_all_tokens_at_once(n, cuts, seed, offset):
    """Neither the split into batches, nor the order, nor a mean far from zero matters."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64) + offset
    expected = dense(x)
    bounds = [0, *sorted(cut for cut in cuts if cut < n), n]
    split = [x[a:b] for a, b in itertools.pairwise(bounds)]
    assert close(moments([x]), expected, 1e-12)
    assert close(moments(split), expected, 1e-12)
    assert close(moments([x[torch.randperm(n, generator=generator)]]), expected, 1e-12)
    single = moments([part.float() for part in split], layer(dtype=torch.float32))
    tolerance = 1e-5 * max(1.0, offset / 10)  # the mean has 7 digits; the scatter does not cancel
    assert close(single, dense(x.float()), tolerance)
    assert single.mean.dtype == torch.float32


def test_covariance_and_second_moment():
    """`covariance` is numpy's biased one, `about(o)` the mean of outer products of x - o."""
    x = torch.randn(30, 5, dtype=torch.float64) + 2
    found, origin = moments([x]), torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(found.covariance, x.mT.cov(correction=0))
    torch.testing.assert_close(found.about(), x.mT @ x / 30)
    torch.testing.assert_close(found.about(origin), (x - origin).mT @ (x - origin) / 30)


def covariance_of(y, linear):
    """That of all outputs, bias included."""
    return y.mT.cov(correction=0)


def mean_of(y, linear):
    """That of all outputs, bias included."""
    return y.mean(0)


def along_singular_vectors(y, linear):
    """U, and the outputs without their bias in its basis, `[n, r]`."""
    U = torch.linalg.svd(linear.weight.detach(), full_matrices=False)[0]
    return (y if linear.bias is None else y - linear.bias.detach()) @ U


def rms(y, linear):
    """That of the outputs along each singular vector, without the bias."""
    return along_singular_vectors(y, linear).square().mean(0).sqrt()


def mean_abs(y, linear):
    """That of the outputs along each singular vector, without the bias."""
    return along_singular_vectors(y, linear).abs().mean(0)


@pytest.mark.parametrize(
    ("statistic", "value_of", "formula"),
    [
        (lf.OutputMoments(), lambda found: found.covariance, covariance_of),
        (lf.OutputMeans(), lambda found: found, mean_of),
        (lf.Projections(), lambda found: found, rms),
        (lf.Projections(pool="mean_abs"), lambda found: found, mean_abs),
    ],
    ids=lambda value: str(value) if isinstance(value, lf.Statistic) else "",
)
def test_statistics_of_outputs_equal_the_dense_formulas(statistic, value_of, formula):
    """Over the kept outputs of layers with a bias and without."""
    model, batches = tiny_llama(attention_bias=True).double(), [text_batch() for _ in range(3)]
    kept = lf.collect(model, ALL, batches, Tokens(observes="outputs"))
    found = lf.collect(model, ALL, batches, statistic)
    for path, y in kept.items():
        expected = formula(y, model.get_submodule(path))
        torch.testing.assert_close(value_of(found[path]), expected)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_changes_nothing(pad):
    """The same texts with and without padding give the same moments.

    They agree up to the rounding of rotary angles, which are float32.
    """
    model = tiny_llama().double()
    batch = text_batch(pad=pad)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    alone = [{"input_ids": row[keep][None]} for row, keep in zip(ids, mask)]
    padded, expected = (
        lf.collect(model, ALL, batches, lf.InputMoments()) for batches in ([batch], alone)
    )
    assert all(close(padded[path], expected[path], 1e-5) for path in expected)
    rubbish = {**batch, "input_ids": ids.masked_fill(~mask, 63)}
    found = lf.collect(model, ALL, [rubbish], lf.InputMoments())
    assert all(torch.equal(found[path].scatter, padded[path].scatter) for path in padded)


def test_an_example_that_is_all_padding_counts_for_nothing():
    model, batch = tiny_llama().double(), text_batch()
    zeros = torch.zeros(2, 6, dtype=torch.long)
    empty = {"input_ids": zeros, "attention_mask": zeros}
    found = lf.collect(model, ALL, [empty, batch, empty], lf.InputMoments())
    expected = lf.collect(model, ALL, [batch], lf.InputMoments())
    assert all(torch.equal(found[path].scatter, expected[path].scatter) for path in expected)
    with pytest.raises(lf.LoraFuncError, match="no token of these batches reached"):
        lf.collect(model, ALL, [empty], lf.InputMoments())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_moments_are_summed_in_float32_at_least(dtype):
    """The summands are the inputs of the layer, in its own dtype."""
    model, batches = tiny_llama().to(dtype), [text_batch(), text_batch()]
    kept, found = (
        lf.collect(model, ALL, batches, statistic) for statistic in (Tokens(), lf.InputMoments())
    )
    wide = torch.promote_types(dtype, torch.float32)
    for path, x in kept.items():
        assert x.dtype == dtype
        assert found[path].scatter.dtype == found[path].mean.dtype == wide
        assert close(found[path], dense(x), 1e-5)


@pytest.mark.parametrize(
    ("statistic", "value_of"),
    [
        (lf.InputMoments(), lambda found: found.scatter),
        (lf.OutputGradients(), lambda found: found),
    ],
    ids=["InputMoments", "OutputGradients"],
)
@pytest.mark.parametrize(
    ("context", "tolerance"),
    [
        (torch.inference_mode, 0),
        (torch.no_grad, 0),
        (functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16), 0.1),
    ],
    ids=["inference_mode", "no_grad", "autocast"],
)
def test_contexts_around_collect(context, tolerance, statistic, value_of):
    """Autocast rounds the inputs of layers, but no sum. Other contexts change nothing."""
    model, batches = tiny_llama(), [text_batch(), text_batch()]
    expected = lf.collect(model, [Q, DOWN], batches, statistic)
    with context():
        # A loader makes its batches inside of the context, too.
        fresh = ({key: leaf.clone() for key, leaf in batch.items()} for batch in batches)
        found = lf.collect(model, [Q, DOWN], fresh, statistic)
    for path in expected:
        a, b = value_of(found[path]), value_of(expected[path])
        assert a.dtype == torch.float32
        assert not a.is_inference()
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_inputs_made_in_inference_mode():
    """The input of the first layer is an inference tensor here."""
    model, x = layer(), torch.randn(7, 5, dtype=torch.float64)
    with torch.inference_mode():
        made = x.clone()
    assert torch.equal(moments([made], model).scatter, moments([x], model).scatter)

    def gradient(batch):
        return lf.collect(model, ["0"], [batch], lf.OutputGradients(), loss=square)["0"]

    assert torch.equal(gradient(made), gradient(x))


# who shares what


def test_layers_that_read_one_input_share_one_state():
    stats = lf.collect(tiny_llama(), ALL, [text_batch() for _ in range(3)], lf.InputMoments())
    assert stats[Q] is stats[K] is stats[V]
    assert stats[GATE] is stats[UP]
    groups = ("q k v", "o", "gate up", "down")
    assert len({id(found) for found in stats.values()}) == 2 * len(groups)  # two layers


class Branch(nn.Module):
    """Layers a, b and c, called in the order of the plan in the batch.

    A step such as "a" reads the input. "a*" reads another tensor, and "a+" reads the input after a
    change in place.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x, plan: str):
        for step in plan.split():
            name, change = step[0], step[1:]
            if change == "+":
                x.add_(1)
            getattr(self, name)(x * 2 if change == "*" else x)
        return x


@pytest.mark.parametrize(
    "plans",
    [
        ["a b c", "a b* c", "a b c"],  # one input, then another
        ["a b+ c", "a b c"],  # changed in place between them
        ["a a b c"],  # called twice before the others
        ["a b a* c", "a* a b a c", "c b a"],
        ["a", "a b", "a b c"],  # first reached in a later batch
        ["a b c", "a b* c*", "a a* a c b"],
    ],
    ids="; ".join,
)
def test_sharing_is_never_more_than_an_optimization(plans):
    """Each layer's moments are those of its own inputs, whichever inputs the layers share."""
    x = torch.randn(len(plans), 3, 4, dtype=torch.float64)
    model, batches = Branch(), [{"x": rows, "plan": plan} for rows, plan in zip(x, plans)]
    own: dict[str, list[torch.Tensor]] = {name: [] for name in "abc"}
    watched = copy.deepcopy(model)
    for name, seen in own.items():
        watched.get_submodule(name).register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].clone())
        )
    for batch in copy.deepcopy(batches):
        watched(**batch)
    stats = lf.collect(model, list(own), batches, lf.InputMoments())
    for name, seen in own.items():
        assert close(stats[name], dense(torch.cat(seen)), 1e-12)


class Reshaping(nn.Module):
    """A layer that sees tokens flattened, and one that sees the first token alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.flat, self.pool = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        return self.flat(h.flatten(0, 1)), self.pool(h[:, 0])


def test_flattened_tokens_with_a_mask():
    model, ids = Reshaping(), torch.randint(0, 20, (3, 5))
    mask = (torch.rand(3, 5) > 0.4).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    found = lf.collect(model, ["flat"], [batch], lf.InputMoments())["flat"]
    assert close(found, dense(model.embed(ids)[mask.bool()].detach()), 1e-5)


def test_a_layer_to_which_the_mask_does_not_apply_is_named():
    """It stands in nobody's way while nothing is padded."""
    model, mask = Reshaping(), torch.ones(3, 5)
    batch = {"input_ids": torch.randint(0, 20, (3, 5)), "attention_mask": mask}
    assert lf.collect(model, ["pool"], [batch], lf.InputMoments())["pool"].n == 3
    mask[0, 3:] = 0
    message = r"'pool' sees an input of shape \(3, 4\).*Leave the layer out"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.collect(model, ["pool"], [batch], lf.InputMoments())


# gradients


def own_gradients(model, batches, paths, loss=None):
    """Autograd's gradients of the summed losses with respect to the weights."""
    model = copy.deepcopy(model).requires_grad_(False)
    weights = [model.get_submodule(path).weight.requires_grad_() for path in paths]
    outputs = [model(**batch) for batch in batches]
    losses = [out.loss if loss is None else loss(out, b) for out, b in zip(outputs, batches)]
    return dict(zip(paths, torch.autograd.grad(losses, weights)))


def target_loss(output, batch):
    return (output.logits * torch.linspace(-1, 1, output.logits.shape[-1])).square().mean()


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable base"])
@pytest.mark.parametrize("loss", [None, target_loss], ids=["own loss", "loss="])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_output_gradients_are_those_of_the_weights(loss, frozen, pad):
    """They are gradients of the summed losses, in every layer. No parameter gets a `.grad`.

    The loss decides which tokens count, padded or not.
    """
    model = tiny_llama().double().requires_grad_(not frozen)
    batches = [text_batch(pad=pad) for _ in range(3)]
    paths = list(ALL.find(model))
    before = state_of(model)
    found = lf.collect(model, paths, batches, lf.OutputGradients(), loss=loss)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = own_gradients(model, batches, paths, loss)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest(found, expected) <= 1e-12 * scale  # float64


def test_mean_gradient_does_not_grow_with_the_number_of_batches():
    model, batch = tiny_llama(), text_batch()
    once, thrice = (lf.collect(model, ALL, [batch] * n, MeanGradient()) for n in (1, 3))
    assert largest(once, thrice) <= 1e-6
    assert largest(once, lf.collect(model, ALL, [batch], lf.OutputGradients())) == 0


def test_a_layer_called_twice_adds_both_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x):
            return self.inner(self.inner(x).tanh())

    model, x = Twice(), torch.randn(3, 4, dtype=torch.float64)
    found = lf.collect(model, ["inner"], [x], lf.OutputGradients(), loss=square)
    (expected,) = torch.autograd.grad(square(model(x)), model.inner.weight)
    torch.testing.assert_close(found["inner"], expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(use_reentrant):
    """A layer that runs again in the backward pass is counted once.

    Reentrant checkpointing lets no gradient pass, and is refused with a hint.
    """
    model, batches = tiny_llama().double(), [text_batch()]
    statistics = {Q: lf.OutputGradients(), O: lf.InputMoments(), DOWN: lf.OutputMeans()}
    expected = lf.collect(model.train(), list(statistics), batches, statistics)
    model.requires_grad_(False)
    checkpoint_activations(model, use_reentrant)
    model.disable_input_require_grads()
    if use_reentrant:
        with (
            pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
            pytest.raises(lf.LoraFuncError, match="use_reentrant=False"),
        ):
            lf.collect(model, list(statistics), batches, statistics)
    else:
        found = lf.collect(model, list(statistics), batches, statistics)
        assert torch.equal(found[Q], expected[Q])
        assert found[O].n == expected[O].n
        assert torch.equal(found[O].scatter, expected[O].scatter)
        assert torch.equal(found[DOWN], expected[DOWN])


def test_an_input_that_is_overwritten_is_no_silent_error():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            h = x * 2
            y = self.inner(h)
            h.zero_()
            return y

    model, batches = Overwriting(), [torch.randn(2, 4)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lf.collect(model, ["inner"], batches, lf.OutputGradients(), loss=square)


# bad input


LONG_MASK = {
    "input_ids": torch.ones(1, 3, dtype=torch.long),
    "attention_mask": torch.zeros(1, 1, 3, 3),
}
MESSAGES = {
    "no batch": (dict(batches=[]), "batches is empty, or an iterator that is used up"),
    "unknown layer": (
        dict(targets=[Q.replace("q_proj", "q_porj")]),
        r"no layer .*q_porj.*Did you mean .*q_proj",
    ),
    "not linear": (dict(targets=["model.norm"]), "not a linear layer"),
    "statistic without a target": (
        dict(statistic={K: lf.InputMoments()}),
        f"statistic has none for '{Q}'",
    ),
    "no labels": (
        dict(statistic=lf.OutputGradients()),
        "put labels into the batches, or pass loss=",
    ),
    "loss of many": (
        dict(statistic=lf.OutputGradients(), loss=lambda o, _: o.logits),
        "a scalar tensor was expected",
    ),
    "loss is a number": (
        dict(statistic=lf.OutputGradients(), loss=lambda o, _: 1.0),
        "the loss is float",
    ),
    "loss of nothing": (
        dict(statistic=lf.OutputGradients(), loss=lambda o, _: torch.zeros(())),
        "does not depend on any target",
    ),
    "mask of another kind": (
        dict(batches=[LONG_MASK]),
        r"attention_mask has shape \(1, 1, 3, 3\); \[batch, tokens\]",
    ),
}


@pytest.mark.parametrize(("options", "message"), MESSAGES.values(), ids=MESSAGES.keys())
def test_errors_say_how_to_fix_them(options, message):
    batch = text_batch()
    del batch["labels"]
    arguments = {"targets": [Q], "batches": [batch], "statistic": lf.InputMoments(), **options}
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.collect(tiny_llama(), **arguments)


def test_a_used_up_iterator():
    batches = iter([text_batch()])
    lf.collect(tiny_llama(), [Q], batches, lf.InputMoments())
    with pytest.raises(lf.LoraFuncError, match="used up"):
        lf.collect(tiny_llama(), [Q], batches, lf.InputMoments())


def test_a_layer_that_is_never_called_is_named():
    batch = {"x": torch.ones(1, 4, dtype=torch.float64), "plan": "a b"}
    with pytest.raises(lf.LoraFuncError, match="no token of these batches reached 'c'"):
        lf.collect(Branch(), ["a", "c"], [batch], lf.InputMoments())


def test_adapt_says_when_data_is_missing_or_useless():
    model, batches = tiny_llama(), [text_batch()]
    for variant in (lf.EVA(), lf.CorDA(), lf.LoRAGA()):
        with pytest.raises(lf.LoraFuncError, match="pass calibration=batches to adapt"):
            lf.adapt(model, variant)
    with pytest.raises(lf.LoraFuncError, match="looks at no data"):
        lf.adapt(model, lf.LoRA(), calibration=batches)
    with pytest.raises(lf.LoraFuncError, match="both given"):
        lf.adapt(model, lf.EVA(), calibration=batches, stats={})


def test_encoder_decoder():
    """One mask does not say which tokens of both sides count, so padding is refused.

    Without padding all tokens count; for gradients the loss decides.
    """
    model = ARCHITECTURES["t5"][0]().eval()
    ids, labels = torch.randint(1, 32, (2, 5)), torch.randint(1, 32, (2, 4))
    path = "decoder.block.0.layer.0.SelfAttention.q"
    whole = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert lf.collect(model, [path], [whole], lf.InputMoments())[path].n == labels.numel()
    padded = {**whole, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    with pytest.raises(lf.LoraFuncError, match=r"two kinds of tokens.*without padding"):
        lf.collect(model, [path], [padded], lf.InputMoments())
    found = lf.collect(model, [path], [padded], lf.OutputGradients())
    assert largest(found, own_gradients(model, [padded], [path])) <= 1e-6


# the model is untouched


@pytest.mark.parametrize(
    "statistic", [lf.InputMoments(), lf.OutputMoments(), lf.OutputGradients()], ids=str
)
def test_the_model_is_untouched(statistic):
    model = tiny_llama()
    before = state_of(model)
    lf.collect(model, ALL, [text_batch()], statistic)
    lf.collect(model, adapted(model=model)[1], [text_batch()], statistic)
    assert state_of(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("statistic", [lf.InputMoments(), lf.OutputGradients()], ids=str)
def test_the_model_is_untouched_by_what_a_batch_raises(statistic, error):
    """The second batch raises in the middle of its forward. A later call works as if afresh."""

    calls = itertools.count(1)

    def fail():
        if next(calls) == 2:
            raise error("in the middle")

    model, x = Chain(fail), torch.randn(3, 5)
    before = state_of(model)
    with pytest.raises(error, match="in the middle"):
        lf.collect(model, ["layers.0", "layers.1"], [x, x, x], statistic, loss=square)
    assert state_of(model) == before
    lf.collect(model, ["layers.0", "layers.1"], [x], statistic, loss=square)
    assert state_of(model) == before


# memory


@pytest.mark.parametrize(
    "statistic",
    [lf.InputMoments(), lf.OutputMeans(), lf.OutputGradients(), lf.EVA(r=2).statistic],
    ids=lambda s: type(s).__name__,
)
def test_memory_does_not_grow_with_the_number_of_tokens(statistic):
    """As many bytes of tensors are alive after 30 batches as after 3."""
    model, alive = tiny_llama(), []
    weights = {id(parameter) for parameter in model.parameters()}

    def batches(n):
        for _ in range(n):
            yield text_batch(8, 32)
        gc.collect()
        tensors = [
            t
            for t in gc.get_objects()
            if issubclass(type(t), torch.Tensor) and id(t) not in weights
        ]
        alive.append(sum(t.nbytes for t in tensors))

    lf.collect(model, ALL, batches(3), statistic)
    lf.collect(model, ALL, batches(30), statistic)
    batch = sum(leaf.nbytes for leaf in text_batch(8, 32).values())
    assert alive[1] <= alive[0] + batch


# statistics of a user's own, and several at once


def test_a_statistic_of_ones_own():
    model, batches = tiny_llama(), [text_batch() for _ in range(3)]
    kept, found = (
        lf.collect(model, ALL, batches, statistic) for statistic in (Tokens(), RunningMax())
    )
    assert all(torch.equal(found[path], x.abs().amax(0)) for path, x in kept.items())


def test_a_variant_with_a_statistic_of_ones_own(tmp_path):
    """It is calibrated, starts at the base's outputs to the bit, and reloads without data."""
    model, batch = tiny_llama(), text_batch()
    adapter, params = lf.adapt(model, Mine(), calibration=[batch])
    scale = 1 / lf.collect(model, adapter, [batch], RunningMax())[Q]
    assert torch.equal(adapter.frozen[f"{Q}.lora_scale"], scale)
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)
    params = {key: leaf + 0.1 * torch.randn_like(leaf) for key, leaf in params.items()}
    lf.save(tmp_path / "mine.safetensors", adapter, params)
    again, reloaded = lf.load(tmp_path / "mine.safetensors", model, variants=[Mine])
    assert torch.equal(again(model, reloaded, batch).logits, adapter(model, params, batch).logits)
    with pytest.raises(lf.LoraFuncError, match=f"'{Q}': Mine needs the maxima"):
        lf.adapt(model, Mine())


def test_one_pass_serves_all_variants():
    """Each batch runs through the model once, for layers with two statistics and with none."""

    calls = itertools.count()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain, self.head = Chain(lambda: next(calls)), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.chain(x))

    model, batches = Net(), [torch.randn(8, 5) for _ in range(4)]
    rules = {r"layers\.0$": lf.EVA(r=2, rho=1.0), r"layers\.1$": Mine(), "head": lf.LoRA(r=2)}

    def adapt(**data):
        generator = torch.Generator().manual_seed(0)
        return lf.adapt(model, rules, targets=ALL, generator=generator, **data)

    adapter, params = adapt(calibration=batches)
    assert next(calls) == len(batches)
    statistics = {
        path: variant.statistic
        for path, variant in adapter.variants.items()
        if variant.statistic is not None
    }
    stats = lf.collect(model, list(statistics), batches, statistics)
    assert next(calls) == 1 + 2 * len(batches)  # the first question counts, too
    again, same = adapt(stats=stats)
    assert largest({**params, **adapter.frozen}, {**same, **again.frozen}) == 0


# progress


class Terminal:
    """A standard error, of a terminal or of a file, that keeps its text."""

    encoding = "utf-8"

    def __init__(self, terminal: bool):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize("progress", [None, True, False])
def test_a_progress_bar_only_if_it_is_wanted(progress, terminal, monkeypatch):
    """By default a terminal gets one, and a file gets none."""
    stderr = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    moments([torch.randn(2, 5, dtype=torch.float64)], progress=progress)
    assert ("calibrating" in stderr.text) == (terminal if progress is None else progress)


def test_without_tqdm(monkeypatch):
    """Nothing is shown. A call that asks for a bar fails, and says what to install."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    batches = [torch.randn(2, 5, dtype=torch.float64)]
    moments(batches)
    with pytest.raises(lf.LoraFuncError, match="pip install tqdm"):
        moments(batches, progress=True)


@pytest.mark.parametrize("variant", [lf.EVA(r=2), lf.AntiPaSTO(r=2)], ids=repr)
def test_stats_without_a_target(variant):
    """Missing stats are an error, even for a variant that can do without data."""
    model, targets = tiny_llama(), lf.Targets(names=(r"(q|v)_proj$",))
    stats = lf.collect(model, targets, [text_batch()], variant.statistic)
    path = next(iter(stats))
    stats[path.replace("q_proj", "qproj")] = stats.pop(path)
    message = rf"stats has nothing for '{path}'.* Did you mean '.*qproj'"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, variant, targets=targets, stats=stats)
