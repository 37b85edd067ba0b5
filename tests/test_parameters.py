"""Parameters as targets: what they show, against models whose weights are merged by hand."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from models import assert_at_base, largest, state_of, tiny_llama, trained
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import lora_func as lf
from lora_func.variant import Variant


class Experts(nn.Module):
    """Two stacks of matrices `[E, d_out, d_in]`, or of their transposes."""

    def __init__(self, experts: int, d: int, inner: int, transposed: bool):
        super().__init__()
        self.is_transposed = transposed  # as transformers' experts say it
        shapes = (inner, d), (d, inner)
        up, down = (torch.randn(experts, *s[:: -1 if transposed else 1]) / 4 for s in shapes)
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-2, (len(self.up), -1))  # a token is routed by its place
        up, down = (W if self.is_transposed else W.mT for W in (self.up, self.down))
        return (F.gelu(parts @ up) @ down).flatten(-3, -2)


class Zoo(nn.Module):
    """Every way in which a parameter is held and used, on ids `[n, 12]`."""

    def __init__(self, d: int = 12):
        super().__init__()
        self.embed = nn.Embedding(20, d, padding_idx=0)
        self.conv = nn.Conv1d(d, d, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.experts = Experts(3, d, 18, transposed=False)
        self.turned = Experts(2, d, 18, transposed=True)
        self.upsample = nn.ConvTranspose1d(d, d, 2, stride=2)
        self.norm = nn.LayerNorm(d)
        self.read = nn.Linear(d, d)  # its weight is read, and the layer never called
        self.called = nn.Linear(d, d)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.turned(x + self.experts(x)) + x
        x = self.upsample(x.mT).mT
        x = x + F.linear(x, self.read.weight, self.read.bias)
        return self.called(self.norm(x))


IDS = torch.arange(48).reshape(4, 12) % 20
PATTERNS = ("embed", r"conv\.weight", r"proj\.?_?weight", "experts", "turned")
PATTERNS += (r"upsample\.weight", r"read\.weight")
MATRICES = lf.Targets(parameters=PATTERNS)
COUNT = 10
LORA = lf.LoRA(r=2)


def zoo(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Zoo().eval().to(dtype)


def drawn(rules: Any, model: nn.Module, targets: lf.Targets = MATRICES) -> Any:
    adapter, params = lf.adapt(model, rules, targets=targets)
    return adapter, trained(params)


def loss_of(out: Tensor) -> Tensor:
    return out.float().square().mean()


def merged_loss(adapter: lf.Adapter, model: nn.Module, params: dict[str, Tensor]) -> Tensor:
    """Autograd through a model whose weights are merged."""
    return loss_of(torch.func.functional_call(model, lf.merge(adapter, model, params), (IDS,)))


def shown_variants() -> list:
    """The variants that a parameter takes: all with a closed form, without a bias of its own."""
    return [
        pytest.param(case.variant(2), id=name)
        for name, case in CASES.items()
        if case.trains
        and case.example.card.data != "required"
        and type(case.example).merged is not Variant.merged
        and case.example.card.at_init != "moved"
        and not case.own_bias
        and case.multiple <= 2  # which the widths of the zoo are multiples of
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", shown_variants())
def test_at_init_the_model_is_the_base(variant, dtype):
    # Torch picks its kernel of attention by the mode, and on a GPU by what requires grad.
    model = zoo(dtype).train().requires_grad_(False)
    adapter, params = lf.adapt(model, variant, targets=MATRICES)
    assert len(adapter.targets) == COUNT
    assert_at_base(variant, adapter(model, params, IDS), model(IDS), layers=COUNT)


@pytest.mark.parametrize("variant", shown_variants())
def test_it_computes_what_a_merged_model_computes(variant):
    """Value and gradients, in float64, where products of another order agree to 1e-12."""
    model = zoo(torch.float64)
    adapter, params = lf.adapt(model, variant, targets=MATRICES, dtype=torch.float64)
    params = trained(params)
    value, grads = lf.value_and_grad(lambda p: loss_of(adapter(model, p, IDS)))(params)
    expected, wanted = lf.value_and_grad(lambda p: merged_loss(adapter, model, p))(params)
    torch.testing.assert_close(value, expected)
    assert value != loss_of(model(IDS))
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-4, atol=1e-7)


def test_keys_shapes_and_layouts():
    model = zoo()
    adapter, params = drawn(LORA, model)
    shapes = {key: tuple(leaf.shape) for key, leaf in params.items()}
    assert shapes["embed.weight.lora_B"] == (20, 2)
    assert shapes["attention.in_proj_weight.lora_B"] == (36, 2)
    assert shapes["conv.weight.lora_A"] == (2, 6 * 3)
    assert shapes["upsample.weight.lora_A"], shapes["upsample.weight.lora_B"] == ((2, 12), (24, 2))
    for name in ("experts", "turned"):  # however they are held
        assert shapes[f"{name}.up.lora_A"][1:] == (2, 12)
        assert shapes[f"{name}.up.lora_B"][1:] == (18, 2)
        assert shapes[f"{name}.down.lora_A"][1:] == (2, 18)
    merged = lf.merge(adapter, model, params)
    assert {key: t.shape for key, t in merged.items()} == {
        key: t.shape for key, t in model.named_parameters() if key in adapter.targets
    }
    assert all(t.is_contiguous() for t in merged.values())


def test_a_stack_has_one_adapter_for_each_matrix():
    """Each expert's delta is that of its own leaves, by the plain formula."""
    model = zoo()
    adapter, params = drawn(LORA, model)
    merged = lf.merge(adapter, model, params)
    for path, turned in (("experts.up", False), ("turned.down", True)):
        for e in range(2):
            A, B = (params[f"{path}.lora_{name}"][e] for name in "AB")
            delta = LORA.alpha / LORA.r * B @ A
            W = model.get_parameter(path)[e] + (delta.T if turned else delta)
            torch.testing.assert_close(merged[path][e], W)


def test_transforms():
    """grad, jvp and vmap over adapters agree with plain autograd and with one by one."""
    model = zoo()
    adapter, params = drawn(LORA, model)
    loss = lambda p: loss_of(adapter(model, p, IDS))  # noqa: E731
    _, grads = lf.value_and_grad(loss)(params)
    assert largest(torch.func.grad(loss)(params), grads) < 1e-5
    tangent = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    several = lf.stack([params, trained(params), trained(params)])
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have neither of these
        slope = torch.func.jvp(loss, (params,), (tangent,))[1]
        together = torch.vmap(loss)(several)
    expected = sum((grads[key] * tangent[key]).sum() for key in grads)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together, torch.stack([loss(p) for p in lf.unstack(several)]))


def test_compiled():
    model = zoo()
    adapter, params = drawn({"experts|turned|embed": LORA, "weight": lf.DoRA(r=2)}, model)
    compiled = torch.compile(lambda p: adapter(model, p, IDS), fullgraph=True)
    torch.testing.assert_close(compiled(params), adapter(model, params, IDS))


@pytest.mark.parametrize("variant", [LORA, lf.DoRA(r=2)], ids=["by factors", "dense"])
@pytest.mark.parametrize("bound", [False, True], ids=["call", "bound"])
def test_activation_checkpointing(variant, bound):
    """Blocks that run again in the backward get the same gradients."""
    model = zoo()
    adapter, params = drawn(variant, model)
    _, wanted = lf.value_and_grad(lambda p: loss_of(adapter(model, p, IDS)))(params)
    again = copy.deepcopy(model)
    for name in ("experts", "turned", "attention"):
        module = again.get_submodule(name)

        def forward(*args, module=module, **kwargs):
            run = type(module).forward
            return checkpoint(run, module, *args, use_reentrant=False, **kwargs)

        module.forward = forward
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    run = lf.bind(adapter, again, leaves) if bound else lambda ids: adapter(again, leaves, ids)
    loss_of(run(IDS)).backward()
    assert largest({key: leaf.grad for key, leaf in leaves.items()}, wanted) < 1e-6


@pytest.mark.parametrize("variant", [LORA, lf.DoRA(r=2)], ids=["by factors", "dense"])
def test_bound(variant):
    """A bound view trains the very leaves, follows them, and leaves the model alone."""
    model = zoo()
    before = state_of(model)
    adapter, params = drawn(variant, model)
    module = lf.bind(adapter, model, params)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == set(params)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        loss = loss_of(module(IDS))
        optimizer.zero_grad()
        loss.backward()
        _, wanted = lf.value_and_grad(lambda p: loss_of(adapter(model, p, IDS)))(params)
        assert largest({key: leaf.grad for key, leaf in params.items()}, wanted) < 1e-6
        optimizer.step()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(module(IDS), adapter(model, params, IDS))
            torch.testing.assert_close(
                module.read.weight, lf.merge(adapter, model, params)["read.weight"]
            )
    assert state_of(model) == before


def test_parts_of_a_bound_view():
    """A part that is called by itself is adapted as the leaves are now."""
    model = zoo()
    adapter, params = drawn(lf.DoRA(r=2), model)
    module = lf.bind(adapter, model, params)
    module(IDS)
    with torch.no_grad():
        for leaf in params.values():
            leaf.mul_(1.5)
    merged = lf.merge(adapter, model, params)
    expected = F.embedding(IDS, merged["embed.weight"], 0)
    torch.testing.assert_close(module.embed(IDS), expected)
    loss_of(module.embed(IDS)).backward()
    loss_of(module.embed(IDS)).backward()  # a graph of its own


def test_a_bound_view_moves_copies_and_saves(tmp_path):
    model = zoo()
    adapter, params = drawn({"experts": lf.DoRA(r=2), "weight": LORA}, model)
    module = lf.bind(adapter, model, params)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        torch.testing.assert_close(twin(IDS), module(IDS))
    state = {key: leaf + 0.1 for key, leaf in params.items()}
    twin.load_state_dict(state, strict=False)
    assert largest({key: twin.state_dict()[key] for key in state}, state) == 0
    assert module.double()(IDS).dtype == torch.float64
    assert all(leaf.dtype == torch.float64 for leaf in params.values())
    assert next(model.parameters()).dtype == torch.float32


def test_threads_share_a_bound_view():
    model = zoo()
    adapter, params = drawn({"experts|turned": lf.DoRA(r=2), "weight": LORA}, model)
    module, expected, wrong = lf.bind(adapter, model, params), adapter(model, params, IDS), []

    def serve():
        for _ in range(20):
            with torch.no_grad():
                wrong.extend([1] * (not torch.allclose(module(IDS), expected, atol=1e-6)))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files(tmp_path):
    model = zoo()
    adapter, params = drawn({"experts|turned": lf.PiSSA(r=2), ".": LORA}, model)
    lf.save(tmp_path / "a", adapter, params)
    again, loaded = lf.load(tmp_path / "a", zoo(), check_base="error")
    assert largest(loaded, params) == 0
    assert torch.equal(again(model, loaded, IDS), adapter(model, params, IDS))
    assert again.base == adapter.base


def test_a_file_knows_the_layout(tmp_path):
    """Experts that another library holds transposed are refused, also where they are square."""
    model = zoo()
    model.experts = Experts(3, 12, 12, transposed=False)
    adapter, params = drawn(LORA, model, lf.Targets(parameters=("experts",)))
    lf.save(tmp_path / "a", adapter, params)
    model.experts.is_transposed = True
    with pytest.raises(
        lf.LoraFuncError, match=r"held transposed in this Zoo, but was \(3, 12, 12\)"
    ):
        lf.load(tmp_path / "a", model)
    with pytest.raises(lf.LoraFuncError, match="held transposed in this Zoo"):
        adapter(model, params, IDS)


def test_layers_and_parameters_at_once():
    model = zoo()
    rules = {"called": lf.LoRA(r=3), "norm": lf.Full(), "experts": lf.PiSSA(r=2), "conv$": LORA}
    adapter, params = drawn(rules, model, lf.Targets())
    kinds = {path: type(variant).__name__ for path, variant in adapter.variants.items()}
    assert kinds["called"] == "LoRA"
    assert kinds["norm.bias"] == kinds["norm.weight"] == "Full"
    assert "conv" in kinds
    assert "experts.up" in kinds
    _, grads = lf.value_and_grad(lambda p: loss_of(adapter(model, p, IDS)))(params)
    _, wanted = lf.value_and_grad(lambda p: merged_loss(adapter, model, p))(params)
    assert largest(grads, wanted) < 1e-5


def test_embeddings_and_convolutions_are_named_like_layers():
    """By the last part of their path, and under it. A pattern for everything leaves them out."""
    model = zoo()
    adapter, params = lf.adapt(model, LORA, targets=lf.Targets(names=("embed", "conv", "called")))
    assert adapter.targets == ("embed", "conv", "called")
    assert set(params) == {f"{path}.lora_{n}" for path in adapter.targets for n in "AB"}
    everything = lf.Targets(names=(".",), exclude=("read", "attention"))
    assert list(everything.find(model)) == ["called"]
    params = trained(params)
    merged = lf.merge(adapter, model, params)
    assert set(merged) == {"embed.weight", "conv.weight", "called.weight"}
    expected = torch.func.functional_call(model, merged, (IDS,))
    torch.testing.assert_close(adapter(model, params, IDS), expected)


def test_a_tied_head():
    """One adapter acts on both sides of a tie, and `merge` gives the one tensor."""
    model = tiny_llama(tie_word_embeddings=True)
    ids = IDS.clamp(min=1)
    with pytest.warns(UserWarning, match="'model.embed_tokens.weight', 'lm_head.weight' are one"):
        adapter, params = lf.adapt(model, LORA, targets=lf.Targets(names=("embed_tokens",)))
    params = trained(params)
    merged = lf.merge(adapter, model, params)
    out = adapter(model, params, ids).logits
    both = copy.deepcopy(model)
    both.load_state_dict(merged, strict=False)
    torch.testing.assert_close(out, both(ids).logits)
    with pytest.warns(UserWarning, match="one adapter acts in all of them"):
        both_named, _ = lf.adapt(model, LORA, targets=lf.Targets(names=("embed_tokens", "lm_head")))
    assert both_named.targets == ("model.embed_tokens",)


def bad(message: str, make: Any, id: str):
    return pytest.param(message, make, id=id)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        bad(
            r"matches no parameter .* Did you mean 'experts.up'",
            lambda m: lf.adapt(m, LORA, targets=lf.Targets(parameters=(r"expert\.up",))),
            "misspelt",
        ),
        bad(
            r"'norm.weight' of shape \(12,\) is no matrix .* lf.Full\(\)",
            lambda m: lf.adapt(m, LORA, targets=lf.Targets(parameters=("norm",))),
            "vector",
        ),
        bad(
            r"'read.weight' is the weight of 'read', which is adapted as a layer",
            lambda m: lf.adapt(
                m, LORA, targets=lf.Targets(names=("read",), parameters=(r"read\.weight",))
            ),
            "twice",
        ),
        bad(
            "EVA starts from data that a layer sees",
            lambda m: lf.adapt(m, lf.EVA(r=2), targets=lf.Targets(parameters=("experts",))),
            "data",
        ),
        bad(
            r"leaves out 'experts.up'",
            lambda m: lf.adapt(
                m, LORA, targets=lf.Targets(parameters=(r"experts\.up",), exclude=("experts",))
            ),
            "excluded",
        ),
        bad(
            r"'conv.weight': PiSSA\(r=20\) on a layer of shape \(12, 18\)",
            lambda m: lf.adapt(m, lf.PiSSA(r=20), targets=lf.Targets(parameters=("conv.weight",))),
            "rank",
        ),
    ],
)
def test_errors_name_the_parameter(message, make):
    model = zoo()
    before = state_of(model)
    with pytest.raises(lf.LoraFuncError, match=message):
        make(model)
    assert state_of(model) == before


def test_a_parameter_has_no_place_for_a_bias():
    model = zoo()
    adapter, params = drawn(lf.LoRA(r=2, add_bias=True), model)
    message = r"LoRA changes the bias of a layer, and '.*' is a parameter, which has none"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, params, IDS)


def test_a_packed_parameter_is_refused_by_name():
    model = zoo()
    model.experts.up = nn.Parameter(torch.zeros(3, 9, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        lf.LoraFuncError, match=r"'experts.up' of a Experts is packed \(torch.uint8"
    ):
        lf.adapt(model, LORA, targets=lf.Targets(parameters=("experts",)))


def test_a_model_without_the_parameter():
    model = zoo()
    adapter, params = drawn(LORA, model, lf.Targets(parameters=("experts",)))
    other = zoo()
    other.experts = nn.Identity()
    with pytest.raises(lf.LoraFuncError, match=r"Zoo has no parameter 'experts\.up'"):
        adapter(other, params, IDS)
    other = zoo()
    other.experts = Experts(4, 12, 18, transposed=False)
    with pytest.raises(lf.LoraFuncError, match=r"is \(4, 18, 12\) in this Zoo, but was \(3, 18"):
        adapter(other, params, IDS)


def test_a_base_that_changed_is_told():
    model = zoo()
    adapter, params = drawn(LORA, model, lf.Targets(parameters=("experts",)))
    model.load_state_dict(lf.merge(adapter, model, params), strict=False)
    with pytest.warns(UserWarning, match="the weight of 'experts.up' is not the one"):
        adapter(model, params, IDS)


def test_roles_are_those_of_layers():
    targets = lf.Targets(parameters=("experts",), roles=("reader",))
    with pytest.raises(lf.LoraFuncError, match="names parameters alone: leave roles= out"):
        lf.adapt(zoo(), LORA, targets=targets)


def test_a_pattern_for_layers_that_names_parameters_too():
    """It would adapt less than was asked. A pattern for whole parts of a model says nothing."""
    model = tiny_llama()
    with pytest.warns(UserWarning, match=r"also the parameters '.*norm.weight'.* left out"):
        lf.adapt(model, {"q_proj|norm": lf.Full()})
    for pattern in ("q_proj", r"layers\.0", ".", "self_attn"):
        lf.adapt(model, {pattern: LORA})
