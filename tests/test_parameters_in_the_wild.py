"""Parameters as models hold them: what is adapted where, and what is refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload
from models import state_of, tiny_llama, trained
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lora_func as lf

LORA = lf.LoRA(r=2)
X = torch.linspace(-1, 1, 3 * 5 * 8).reshape(3, 5, 8).sin()
IDS = torch.arange(1, 13).reshape(2, 6)


def parameters(*patterns: str, **options: Any) -> lf.Targets:
    return lf.Targets(parameters=patterns, **options)


def merged_loss(adapter: lf.Adapter, model: Any, params: Any, run: Any) -> Tensor:
    """The loss of a copy of the model with merged weights."""
    merged = copy.deepcopy(model)
    merged.load_state_dict(lf.merge(adapter, model, params), strict=False)
    return run(merged)


def check(model: Any, run: Any, rules: Any, targets: lf.Targets = lf.Targets()) -> None:
    """A call and a bound view compute what a merged model does; so do their gradients.

    `run` is a model -> its loss. In float64, where central differences are exact to 1e-7. DoRA's
    norm is no constant here, since they see it move.
    """
    before = state_of(model)
    adapter, params = lf.adapt(model, rules, targets=targets, dtype=torch.float64)
    params = trained(params)
    expected = merged_loss(adapter, model, params, run)
    assert expected != run(model)
    move = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    with torch.no_grad():
        ahead, behind = (
            merged_loss(adapter, model, {k: p + eps * move[k] for k, p in params.items()}, run)
            for eps in (1e-5, -1e-5)
        )
    slope = (ahead - behind) / 2e-5

    def bound(leaves: Any) -> Tensor:
        return run(lf.bind(adapter, model, leaves))

    def called(leaves: Any) -> Tensor:
        return run(lambda *args: adapter(model, leaves, args))

    for way in (bound, called):
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
        loss = way(leaves)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        found = sum((leaf.grad * move[key]).sum() for key, leaf in leaves.items())  # pyright: ignore
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(way(params), expected)
    assert state_of(model) == before


def loss_of(out: Any) -> Tensor:
    weights = torch.arange(out.numel(), dtype=torch.float64).sin().reshape(out.shape)
    return (out * weights).sum() + out.square().mean()


class Recurrent(nn.Module):
    def __init__(self, kind: Any):
        super().__init__()
        self.rnn = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.rnn(x)[0]


DORA = lf.DoRA(r=2, detach_norm=False)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(kind):
    """torch's keep their parameters in lists, too."""
    rules = {"weight_hh": LORA, "weight_ih": DORA, "bias": lf.Full()}
    check(Recurrent(kind).double(), lambda m: loss_of(m(X.double())), rules)


def test_a_bound_recurrent_network_lives():
    """It is copied, pickled, cast and trained."""
    model = Recurrent(nn.LSTM)
    adapter, params = lf.adapt(model, LORA, targets=parameters("weight"))
    module = lf.bind(adapter, model, trained(params))
    expected = module(X)
    twice = copy.deepcopy(copy.deepcopy(module))
    for other in (twice, pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(X), expected)
    torch.testing.assert_close(module.double()(X.double()).float(), expected)
    optimizer = torch.optim.SGD(twice.parameters(), lr=1.0)
    loss_of(twice(X)).backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(twice(X), expected)


class Root(nn.Module):
    """Parameters of the model itself, and parts of them."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.pos = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 12))
        self.logit_scale = nn.Parameter(torch.tensor(1.3))
        self.four = nn.Parameter(torch.randn(1, 2, 2, 8))
        self.out = nn.Linear(8, 8)
        self.several = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
        self.named = nn.ParameterDict({"a": torch.randn(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.pos[:, : x.shape[1]]
        for weight in self.several:
            x = x @ weight / 8
        return self.out(x @ self.named["a"]) * self.logit_scale.exp() + self.four.sum()


@pytest.mark.parametrize(
    "rules",
    [
        {"cls|scale|four": lf.Full(), "pos": LORA, "several": LORA, "named": LORA, "out": LORA},
        {"cls": lf.LoRA(r=1), "pos": lf.PiSSA(r=2), r"several\.1": DORA, "out": lf.Full()},
    ],
    ids=["by factors", "mixed"],
)
def test_parameters_of_the_model_itself(rules):
    check(Root().double(), lambda m: loss_of(m(X.double())), rules)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (parametrizations.weight_norm, r"original1"),
        (parametrizations.spectral_norm, r"original"),
        (parametrizations.orthogonal, r"original"),
        (spectral_norm, "weight_orig"),
        (weight_norm, "weight_v"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight_orig"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_what_a_weight_is_computed_from(wrap, name):
    """Its adapter acts in front of the computation, also in the middle of a model."""
    model = nn.Sequential(wrap(nn.Linear(8, 6)), nn.Linear(6, 4)).double().eval()
    x, before = X.double(), None
    with torch.no_grad():
        before = model(x)
    adapter, params = lf.adapt(model, LORA, targets=parameters(name), dtype=torch.float64)
    params = trained(params)
    merged = lf.merge(adapter, model, params)
    out, bound = adapter(model, params, x), lf.bind(adapter, model, params)(x)
    model.load_state_dict(merged, strict=False)
    torch.testing.assert_close(out, model(x))
    torch.testing.assert_close(bound, out)
    assert not torch.allclose(out, before)


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.randn(8, 8))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) @ self.scale


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x @ self.scale


def layer(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Linear(8, 8))


def offloaded() -> Any:
    return cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("message", "make", "rules"),
    [
        (
            r"'scale' of a Chain cannot be adapted: it would stand among the parts that",
            Chain,
            {"scale": LORA},
        ),
        (
            r"'0.weight' of a Embedding is written to in each call, .* max_norm=1",
            lambda: layer(nn.Embedding(20, 8, max_norm=1)),
            {r"^0$": LORA},
        ),
        (
            r"'0.weight' of a LazyConv1d has no values yet: run the model once",
            lambda: layer(nn.LazyConv1d(8, 2)),
            {r"^0$": LORA},
        ),
        (
            r"'0' computes its weight from '0.parametrizations.weight.original0', .*"
            r"parameters=\('0\\\\.parametrizations\\\\.weight\\\\.original1',\)",
            lambda: layer(parametrizations.weight_norm(nn.Conv1d(8, 8, 2))),
            {r"^0$": LORA},
        ),
        (
            r"'model.norm.weight' of a LlamaRMSNorm is offloaded by accelerate",
            offloaded,
            {r"model\.norm": lf.Full()},
        ),
        (
            r"'lm_head\\\\.weight' names no layer. It is the tensor of 'model.embed_tokens.weight'",
            lambda: tiny_llama(tie_word_embeddings=True),
            {r"lm_head\.weight": LORA, "q_proj": LORA},
        ),
        (
            r"'norm' names no layer. An earlier pattern takes .*'model.norm.weight'",
            tiny_llama,
            {".": LORA, "norm": lf.Full()},
        ),
    ],
    ids=["container", "max_norm", "lazy", "weight_norm", "offloaded", "tied", "shadowed"],
)
def test_refused_by_name(message, make, rules):
    model = make()
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(model, rules)


def test_reach_of_a_model_without_values():
    with pytest.raises(lf.LoraFuncError, match=r"'0.weight' of a LazyLinear has no values yet"):
        lf.reach(layer(nn.LazyLinear(8)))


def test_a_sharded_parameter_is_refused_by_name():
    store = dist.HashStore()  # pyright: ignore  (not exported)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        whole = model[0].weight.detach()
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)))
        model[0].weight = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(lf.LoraFuncError, match=r"'0.weight' of a Linear is sharded over ranks"):
            lf.adapt(model, LORA, targets=parameters(r"0\.weight"))
    finally:
        dist.destroy_process_group()


def test_beside_offloaded_modules():
    """Only the module of the parameter itself has to stay."""
    model = tiny_llama()
    adapter, params = lf.adapt(model, {r"model\.norm": lf.Full(), "q_proj": LORA})
    params = trained(params)
    expected = adapter(model, params, {"input_ids": IDS}).logits
    for block in model.model.layers:
        cpu_offload(block, execution_device=torch.device("cpu"))
    assert torch.equal(adapter(model, params, {"input_ids": IDS}).logits, expected)
    assert torch.equal(lf.bind(adapter, model, params)(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
def test_a_module_that_calls_all_of_its_children(bound):
    model = Children()
    adapter, params = lf.adapt(model, LORA, targets=parameters("scale"))
    run = lf.bind(adapter, model, params) if bound else lambda x: adapter(model, params, x)
    with pytest.raises(lf.LoraFuncError, match="'scale': its module calls all of its children"):
        run(X)


def test_an_attribute_that_a_bound_view_cannot_follow():
    model: Any = Children()
    model.copies = [model.scale]
    adapter, params = lf.adapt(model, LORA, targets=parameters("scale"))
    with pytest.raises(lf.LoraFuncError, match="refers to the parameter 'scale', which is adapted"):
        lf.bind(adapter, model, params)


def test_one_tensor_takes_one_adapter():
    """A tied head as a layer, and its table as a parameter."""
    targets = lf.Targets(names=("lm_head",), parameters=("embed_tokens",))
    with pytest.raises(lf.LoraFuncError, match=r"embed_tokens.weight' is the weight of 'lm_head'"):
        lf.adapt(tiny_llama(tie_word_embeddings=True), LORA, targets=targets)


def test_an_exclusion_of_a_weight_is_one_of_its_layer():
    targets = lf.Targets(names=(r"(q|k)_proj$",), exclude=(r"0\.self_attn\.q_proj\.weight$",))
    found = [path.removeprefix("model.layers.") for path in targets.find(tiny_llama())]
    assert found == ["0.self_attn.k_proj", "1.self_attn.q_proj", "1.self_attn.k_proj"]


def test_several_readers_of_one_parameter():
    """One adapter for a tensor that three modules hold under two names."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b: Any = nn.Module()
            self.c.weight = self.b.kernel = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.gelu(self.a(x)) @ self.b.kernel)

    model = Shared().double()
    with pytest.warns(UserWarning, match="'a.weight', 'c.weight', 'b.kernel' are one tensor"):
        check(model, lambda m: loss_of(m(X.double())), LORA, parameters(r"a\.weight"))
