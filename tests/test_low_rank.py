"""A parameter with a low-rank change that is not formed, against the dense one."""

from __future__ import annotations

import ast
import copy
import importlib
import operator
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import CURRENT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.models.convbert.modeling_convbert import GroupedLinearLayer
from transformers.models.csm.modeling_csm import CsmCodebooksHead
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import lora_func as lf
from lora_func.libraries.transformers import TRANSPOSED, holds_transposed
from lora_func.weights.experts import virtual, virtual_experts
from lora_func.weights.low_rank import LowRank
from lora_func.weights.parameter import Layout
from lora_func.weights.products import together

r = 3
aria: Any = importlib.import_module("transformers.models.aria.modeling_aria")


def factors(
    layout: Layout, *lead: int, dtype=torch.float64, rank: int = r
) -> tuple[Tensor, Tensor]:
    """A and B of a layout, with axes `lead` in front."""
    *stack, d_out, d_in = layout.shape
    A = torch.randn(*lead, *stack, rank, d_in, dtype=dtype) / d_in**0.5
    B = torch.randn(*lead, *stack, d_out, rank, dtype=dtype)
    return A.requires_grad_(), B.requires_grad_()


def dense(P: Tensor, A: Tensor, B: Tensor, layout: Layout) -> Tensor:
    """The sum."""
    W = layout.matrix(P)
    return layout.as_stored(W + (B @ A).to(W.dtype))


def never() -> Tensor:
    """In the place of a sum that must not be formed."""
    raise AssertionError("the dense sum was formed")


def fast(P: Tensor, A: Tensor, B: Tensor, layout: Layout, n: int | None = None) -> LowRank:
    """The tensor under test, which must not form its sum."""
    return LowRank(P, A, B, layout, never, n, "m.weight")


def slow(P: Tensor, A: Tensor, B: Tensor, layout: Layout) -> LowRank:
    """The same, which may."""
    return LowRank(P, A, B, layout, lambda: dense(P, A, B, layout), None, "m.weight")


def assert_same(run, P, pair, layout, x, *, made=fast, **tolerances):
    """Value and gradients of `run(W, x)` are those with the dense sum."""
    A, B = pair
    inputs = (A, B, x) if x.is_floating_point() else (A, B)
    results = []
    for W in (made(P, A, B, layout), dense(P, A, B, layout)):
        out = run(W, x)
        assert type(out) is Tensor
        weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        results.append((out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, **tolerances)


def normal(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


IDS = torch.tensor([[0, 2, 2], [4, 0, 1]])
OFFS = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # an empty group
# name -> what is computed, the shape of P, that of x (or x itself)
MATRIX = {
    "linear": (lambda W, x: F.linear(x, W), (5, 4), (2, 3, 4)),
    "linear with bias": (lambda W, x: F.linear(x, W, torch.ones(5).double()), (5, 4), (3, 4)),
    "linear of one token": (lambda W, x: F.linear(x, W), (5, 4), (4,)),
    "right": (lambda W, x: x @ W, (5, 4), (2, 3, 5)),
    "left": (lambda W, x: W @ x, (5, 4), (2, 4, 3)),
    "left of a vector": (lambda W, x: W @ x, (5, 4), (4,)),
    "matmul": (torch.matmul, (5, 4), (4, 3)),
    "mm": (lambda W, x: torch.mm(x, W), (5, 4), (3, 5)),
    "method mm": (lambda W, x: W.mm(x), (5, 4), (4, 3)),
    "addmm": (
        lambda W, x: torch.addmm(torch.ones(4).double(), x, W, alpha=2.0),
        (5, 4),
        (3, 5),
    ),
    "T": (lambda W, x: x @ W.T, (5, 4), (3, 4)),
    "t": (lambda W, x: x @ W.t(), (5, 4), (3, 4)),
    "mT": (lambda W, x: x @ W.mT, (5, 4), (3, 4)),
    "transpose": (lambda W, x: F.linear(x, W.transpose(0, 1)), (5, 4), (3, 5)),
    "transpose, negative": (lambda W, x: F.linear(x, W.transpose(-1, 0)), (5, 4), (3, 5)),
    "embedding": (lambda W, ids: F.embedding(ids, W), (5, 4), IDS),
    "padding": (lambda W, ids: F.embedding(ids, W, padding_idx=2), (5, 4), IDS),
    "padding, negative": (lambda W, ids: F.embedding(ids, W, padding_idx=-1), (5, 4), IDS),
    "index": (lambda W, ids: W[ids], (5, 4), IDS),
    "negative index": (lambda W, ids: W[ids - 2], (5, 4), IDS),
    "index_select": (lambda W, ids: torch.index_select(W, 0, ids), (5, 4), IDS[0]),
    "to": (lambda W, x: F.linear(x, W.to(x.dtype).contiguous().clone()), (5, 4), (3, 4)),
}
STACK = {
    "matrix": (lambda W, x: F.linear(x, W[1]), (4, 5, 6), (3, 6)),
    "last matrix": (lambda W, x: F.linear(x, W[-1]), (4, 5, 6), (3, 6)),
    "tensor of one": (lambda W, x: x @ W[torch.tensor(2)], (4, 5, 6), (3, 5)),
    "bmm": (lambda W, x: torch.bmm(x, W), (4, 5, 6), (4, 3, 5)),
    "left bmm": (torch.bmm, (4, 5, 6), (4, 6, 3)),
    "selected": (lambda W, x: torch.bmm(W[torch.tensor([1, 1, 3])], x), (4, 5, 6), (3, 6, 2)),
    "transposed": (lambda W, x: torch.bmm(x, W.transpose(1, 2)), (4, 5, 6), (4, 3, 6)),
    "broadcast": (lambda W, x: W[:, None] @ x, (4, 5, 6), (4, 2, 6, 3)),
    "new axis": (lambda W, x: x @ W.mT[None, :, :, :], (4, 5, 6), (2, 4, 1, 6)),
    "slice": (lambda W, x: torch.bmm(x, W[1:3]), (4, 5, 6), (2, 3, 5)),
    "iterated": (lambda W, x: sum(F.linear(x, one) for one in W), (4, 5, 6), (3, 6)),
    "baddbmm": (
        lambda W, x: torch.baddbmm(torch.ones(4, 1, 6).double(), x, W),
        (4, 5, 6),
        (4, 3, 5),
    ),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [*MATRIX, *STACK])
def test_products_without_the_sum(name, transposed):
    """To the rounding of float64; the products are summed in another order."""
    run, shape, x = {**MATRIX, **STACK}[name]
    layout = Layout(shape, transposed)
    x = x if isinstance(x, Tensor) else normal(*x)
    P = torch.randn(shape, dtype=torch.float64)
    assert_same(run, P, factors(layout), layout, x)


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, bias=False),
    nn.Conv1d(4, 6, 3, padding="same", dilation=2),
    nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    nn.Conv2d(8, 12, 3, groups=4, padding=1),
    nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    nn.Conv3d(4, 6, 2),
    nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1),
    nn.ConvTranspose2d(12, 8, 3, groups=4, dilation=2),
    nn.ConvTranspose3d(4, 6, 2),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions_without_the_sum(layer, batched):
    layer = copy.deepcopy(layer).double()
    layout = Layout.of(layer, "weight")
    x = normal(*([2] if batched else []), layer.in_channels, *[7] * (len(layout.stored) - 2))
    P = layer.weight.detach()
    assert_same(run_of(layer, "weight"), P, factors(layout), layout, x)


def run_of(module: nn.Module, name: str):
    """`run(W, x)`: the module with W in the place of a parameter."""

    def run(W, *args, **kwargs):
        return with_parameters(module, **{name: W})(*args, **kwargs)

    return run


def with_parameters(module: nn.Module, **new: Any) -> Any:
    """A shallow copy of a module with other parameters."""
    other = copy.copy(module)
    other._parameters = {**module._parameters, **new}
    other._forward_pre_hooks = type(module._forward_pre_hooks)()
    return other


def test_a_depthwise_convolution_takes_the_sum():
    """r channels for each of its groups would be r times what it has."""
    layer = nn.Conv2d(4, 4, 3, groups=4).double()
    layout, calls = Layout.of(layer, "weight"), []

    def counted(P, A, B, layout):
        return LowRank(P, A, B, layout, lambda: calls.append(0) or dense(P, A, B, layout))

    P, x = layer.weight.detach(), normal(2, 4, 7, 7)
    assert_same(run_of(layer, "weight"), P, factors(layout), layout, x, made=counted)
    assert len(calls) == 1


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["grouped_mm", "_grouped_mm", "fallback"])
def test_grouped_products(name, transposed, dtype, rank):
    """The last row belongs to no group. Tolerance: a few roundings of the dtype."""
    function = {
        "grouped_mm": F.grouped_mm,
        "_grouped_mm": torch._grouped_mm,  # pyright: ignore  (private)
        "fallback": torch.ops.transformers.grouped_mm_fallback,
    }[name]
    layout = Layout((4, 16, 8), transposed)
    P = torch.randn(4, 16, 8).to(dtype)
    A, B = factors(layout, dtype=torch.float32, rank=rank)
    x = normal(8, 8, dtype=dtype)

    past = (torch.arange(8) >= OFFS[-1]).unsqueeze(-1)  # rows that the kernel leaves as they are

    def run(W, x):
        out = function(x.masked_fill(past, 0), W.transpose(-2, -1), offs=OFFS)
        return out.masked_fill(past, 0)

    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    assert_same(run, P, (A, B), layout, x, atol=tolerance, rtol=tolerance / 10)


def test_how_many_neighbours_are_a_group():
    assert together(groups=64, neighbours=8, cheap=1) == 1
    assert together(groups=64, neighbours=8, cheap=5) == 4
    assert together(groups=64, neighbours=8, cheap=100) == 8
    assert together(groups=64 * 24, neighbours=24, cheap=1) == 2
    assert together(groups=2048 * 3, neighbours=3, cheap=1) == 3  # the kernel says why it cannot


@pytest.mark.parametrize(("n", "m"), [(8, 1), (24, 2), (31, 31)])
def test_more_groups_than_the_kernel_takes(n, m):
    """64 experts for each of n examples: m neighbours are one group, exactly."""
    E, rows = 64, 300
    layout = Layout((E, 16, 8), transposed=False)
    P, pair = torch.randn(E, 16, 8), factors(layout, n, dtype=torch.float32)
    W = virtual(fast(P, *pair, layout, n), n, "m.weight")
    assert together(E * n, n, 1) == m
    group = torch.randint(E * n, (rows,)).sort().values
    offs = torch.searchsorted(group, torch.arange(E * n), right=True).int()
    x = normal(rows, 8, dtype=torch.float32)
    ours = torch._grouped_mm(x, W.transpose(-2, -1), offs=offs)  # pyright: ignore  (private)
    A, B = (leaf[group % n, group // n] for leaf in pair)
    theirs = ((P[group // n] + B @ A) @ x.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(t.square().sum(), (x, *pair)) for t in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


# Modules


def config(implementation: str = "eager", **changes: Any) -> Any:
    """Sizes of experts of any family; no two axes of a matrix are equal."""
    sizes: dict[str, Any] = dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4
    )
    sizes |= {"hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12}
    sizes |= {"expert_ffn_hidden_size": 12, "zero_expert_num": 2, "n_shared_experts": 4}
    sizes |= {"hidden_act": "silu", "mlp_hidden_act": "relu2", "moe_latent_size": None}
    sizes |= {"swiglu_limit": 7.0, "swiglu_alpha": 1.7}
    return SimpleNamespace(**{**sizes, "_experts_implementation": implementation, **changes})


REGISTERED = [MixtralExperts, Qwen3MoeExperts, DeepseekV3Experts, DeepseekV4Experts]
REGISTERED += [GptOssExperts, NemotronHExperts]
if CURRENT:
    REGISTERED.append(aria.AriaExperts)  # an older one has a layer for each product
ROUTED = [*REGISTERED, Step3p7Experts, LongcatFlashExperts]


def made(kind: Any, implementation: str, dtype=torch.float32) -> Any:
    """Experts with random weights, frozen."""
    module = kind(config(implementation))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).requires_grad_(False)


def routed(tokens: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts and the experts' weights. No token goes to expert 2."""
    ids = torch.tensor([0, 1, 3])[torch.rand(tokens, 3).argsort(-1)][:, :2]
    return normal(tokens, 16, dtype=dtype), ids, torch.rand(tokens, 2).to(dtype)


def stacks(module: nn.Module) -> dict[str, Layout]:
    """Its stacks of matrices."""
    return {n: Layout.of(module, n) for n, p in module._parameters.items() if p.dim() == 3}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ROUTED)
def test_experts(kind, implementation):
    """In float32, since torch's grouped product has no float64."""
    module = made(kind, implementation)
    layouts = stacks(module)
    leaves = {name: factors(layout, dtype=torch.float32) for name, layout in layouts.items()}
    x, ids, weights = routed(6)
    inputs = [x, *(leaf for pair in leaves.values() for leaf in pair)]
    results = []
    for form in (fast, dense):
        new = {n: form(getattr(module, n), *leaves[n], layouts[n]) for n in layouts}
        out = with_parameters(module, **new)(x, ids, weights)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Module, one of its stacks, its d_in and d_out, and a call.
FAMILIES = {
    "Mixtral up": (lambda: made(MixtralExperts, "eager"), "gate_up_proj", 16, 24, "routed"),
    "Mixtral down": (lambda: made(MixtralExperts, "eager"), "down_proj", 12, 16, "routed"),
    "GptOss up": (lambda: made(GptOssExperts, "eager"), "gate_up_proj", 16, 24, "routed"),
    "GptOss down": (lambda: made(GptOssExperts, "eager"), "down_proj", 12, 16, "routed"),
    "NemotronH up": (lambda: made(NemotronHExperts, "eager"), "up_proj", 16, 12, "routed"),
    "Longcat up": (lambda: made(LongcatFlashExperts, "eager"), "gate_up_proj", 16, 24, "routed"),
    "Step3p7 down": (lambda: made(Step3p7Experts, "eager"), "down_proj", 12, 16, "routed"),
    "Llama4 up": (lambda: made(Llama4TextExperts, ""), "gate_up_proj", 16, 24, (8, 16)),
    "Llama4 down": (lambda: made(Llama4TextExperts, ""), "down_proj", 12, 16, (8, 16)),
    "Inkling": (lambda: made(InklingSharedExperts, ""), "up_proj", 16, 12, "shared"),
    "JetMoe": (lambda: JetMoeParallelExperts(4, 16, 12), "weight", 16, 12, "sorted"),
    "Moshi": (lambda: MoshiFlexibleLinear(16, 12, 4), "weight", 16, 12, (2, 4, 16)),
    "ConvBert": (lambda: GroupedLinearLayer(16, 12, 2), "weight", 8, 6, (3, 16)),
    "Csm": (lambda: CsmCodebooksHead(16, 4, 12), "weight", 16, 12, "codebooks"),
}

if CURRENT:
    up = lambda: made(aria.AriaExperts, "eager")  # noqa: E731
    FAMILIES["Aria up"] = up, "gate_up_proj", 16, 24, "routed"
else:
    layer = lambda: aria.AriaGroupedExpertsGemm(16, 12, 4)  # noqa: E731
    FAMILIES["Aria"] = layer, "weight", 16, 12, "sorted tensor"


def call(module: Any, how: Any) -> Tensor:
    """The module, called on a batch of ones."""
    if how == "routed":
        ids = torch.tensor([[0, 1], [3, 0], [1, 3], [2, 1]])
        return module(torch.ones(4, 16), ids, torch.full((4, 2), 0.4))
    if how == "shared":
        return module(torch.ones(2, 16), torch.ones(2, 4))
    if how == "sorted":
        return module(torch.ones(5, 16), [2, 0, 1, 2])
    if how == "sorted tensor":
        return module(torch.ones(5, 16), torch.tensor([2, 0, 1, 2]))
    if how == "codebooks":
        return module(torch.ones(2, 2, 16), torch.tensor([1, 3]))
    return module(torch.ones(how))


@pytest.mark.parametrize("family", FAMILIES)
def test_how_a_stack_is_held(family):
    """The module computes with factors for the layout that we know of it, and forms no sum."""
    make, name, d_in, d_out, how = FAMILIES[family]
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter.requires_grad_(False), std=0.3)
    P = getattr(module, name)
    layout = Layout.of(module, name)
    assert layout.shape == (P.shape[0], d_out, d_in)
    A, B = factors(layout, dtype=torch.float32)
    ours, theirs = (
        call(with_parameters(module, **{name: form(P, A, B, layout)}), how)
        for form in (fast, dense)
    )
    assert not torch.allclose(theirs, call(module, how))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Classes with parameters of three axes that are not in transformers' registry of experts, and hold
# their matrices as `F.linear` takes them.
AS_LINEAR = {
    "GraniteMoeHybridParallelExperts",
    "GraniteMoeParallelExperts",
    "GraniteMoeSharedParallelExperts",
    "InklingSharedExperts",
    "JetMoeParallelExperts",
    "KyutaiSpeechToTextFlexibleLinear",
    "LongcatFlashExperts",
    "MoshiFlexibleLinear",
    "Step3p7Experts",
    "ZambaMambaMixer",
}
NO_STACKS = {
    "FunnelRelMultiheadAttention",  # a matrix [d_in, heads, d_head], in einsum
    "XLNetRelativeAttention",  # the same
    "NeighborhoodAttention",  # biases
    "Gemma4VisionPatchEmbedder",  # positions
    "Gemma4UnifiedVisionEmbedder",
    "Kimi_K25VisionPositionEmbeddings",
}


# In older releases alone.
GONE = {"AriaGroupedExpertsGemm", *(name for name in AS_LINEAR if name.startswith("Granite"))}


def stacks_in(source: str) -> set[str]:
    """Classes of a module with a parameter of three axes, the first two longer than 1."""
    found = set()
    if not re.search(r"Parameter\([^,]*,[^,]*,", source):  # to parse the rest takes long
        return found
    for kind in ast.walk(ast.parse(source)):
        if isinstance(kind, ast.ClassDef) and "use_experts_implementation" not in "".join(
            map(ast.unparse, kind.decorator_list)
        ):
            for node in ast.walk(kind):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parameter"):
                    inner = node.args[0] if node.args else None
                    sizes = inner.args if isinstance(inner, ast.Call) else []
                    if len(sizes) == 1 and isinstance(sizes[0], (ast.Tuple, ast.List)):
                        sizes = sizes[0].elts
                    if len(sizes) == 3 and all(ast.unparse(size) != "1" for size in sizes[:2]):
                        found.add(kind.name)
    return found


def test_every_stack_of_transformers_is_known():
    """A release with a new one fails here, by name: see how its forward uses it.

    Seen in 5.2, 5.5, 5.9, 5.13, 5.17, 5.21, 5.23 and 5.24.
    """
    folder = Path(str(transformers.__file__)).parent / "models"
    found = set()
    for path in folder.glob("*/modeling_*.py"):
        found |= stacks_in(path.read_text(encoding="utf-8"))
    known = {*TRANSPOSED, *AS_LINEAR, *NO_STACKS}
    assert found <= known
    if CURRENT:
        assert known - found == GONE


def test_a_square_stack():
    """RecurrentGemma's gates: each block of x times its matrix."""
    sizes = SimpleNamespace(num_attention_heads=2, lru_width=8)
    module = RecurrentGemmaRglru(sizes)
    for parameter in module.parameters():
        nn.init.normal_(parameter.requires_grad_(False), std=0.3)
    assert holds_transposed(module, "input_gate_weight")
    P, layout = module.input_gate_weight, Layout.of(module, "input_gate_weight")
    A, B = factors(layout, dtype=torch.float32)
    ours, theirs = (
        with_parameters(module, input_gate_weight=form(P, A, B, layout))(
            torch.ones(2, 3, 8), torch.arange(3).expand(2, 3)
        )
        for form in (fast, dense)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(9, 4, padding_idx=3),
        Gemma3TextScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=2.0),
    ],
)
def test_embeddings(layer):
    layer = copy.deepcopy(layer).double()
    layout = Layout.of(layer, "weight")
    ids = torch.tensor([[0, 3, 8], [3, 3, 1]])
    assert_same(run_of(layer, "weight"), layer.weight.detach(), factors(layout), layout, ids)


def test_a_renormed_embedding_takes_the_sum():
    """It writes to its rows: to those of the sum, and never to the base's."""
    layer = nn.Embedding(9, 4, max_norm=0.5).double().requires_grad_(False)
    before = layer.weight.clone()
    layout = Layout.of(layer, "weight")
    A, B = factors(layout)
    ours, theirs = (
        run_of(layer, "weight")(form(layer.weight, A, B, layout), IDS) for form in (slow, dense)
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(training, need_weights):
    """Its own forward takes the sums. In eval mode, its fused kernel does not pass them by."""
    module = nn.MultiheadAttention(8, 2, batch_first=True).double().train(training)
    module.requires_grad_(False)
    layout = Layout.of(module, "in_proj_weight")

    def run(W, x):
        return with_parameters(module, in_proj_weight=W)(x, x, x, need_weights=need_weights)[0]

    assert_same(run, module.in_proj_weight, factors(layout), layout, normal(2, 3, 8), made=slow)
    inner = Layout.of(module.out_proj, "weight")

    def run_out(W, x):
        outer = with_parameters(module)
        outer._modules = {"out_proj": with_parameters(module.out_proj, weight=W)}
        return outer(x, x, x, need_weights=need_weights)[0]

    P = module.out_proj.weight
    assert_same(run_out, P, factors(inner), inner, normal(2, 3, 8), made=slow)
    with torch.no_grad():  # where the fused kernel would run
        x, (A, B) = normal(2, 3, 8), factors(layout)
        W = module.in_proj_weight
        torch.testing.assert_close(run(slow(W, A, B, layout), x), run(dense(W, A, B, layout), x))


# What a tensor in the place of a parameter must be


SUMS = {
    "einsum": lambda W: torch.einsum("oi,bi->bo", W, torch.ones(2, 4).double()),
    "arithmetic": lambda W: 2 * W - W.square() / 3,
    "reduction": lambda W: W.norm(dim=0),
    "list": lambda W: torch.cat([W, W.T.T]),
    "column": lambda W: W[:, 1],
    "part": lambda W: W[1:3] + W[..., :1][1:3],
    "row": lambda W: W[0],
    "chunk": lambda W: F.linear(torch.ones(4).double(), torch.chunk(W, 2)[0]),
    "both": lambda W: W @ W.T,
    "reshape": lambda W: W.reshape(-1),
    "detach": lambda W: W.detach(),
    "data": lambda W: W.data,
    "mask": lambda W: W[torch.tensor([True, False, True, False, True])],
    "written from": lambda W: torch.zeros(5, 4).double().copy_(W),
    "normalized": lambda W: F.linear(torch.ones(4).double(), F.normalize(W)),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", SUMS)
def test_anything_else_takes_the_sum(name):
    layout, calls = Layout((5, 4)), []
    P = torch.randn(5, 4).double()
    A, B = (t.detach() for t in factors(layout))
    W = LowRank(P, A, B, layout, lambda: calls.append(0) or dense(P, A, B, layout))
    for _ in range(2):
        result = SUMS[name](W)
        assert type(result) is Tensor
        torch.testing.assert_close(result, SUMS[name](dense(P, A, B, layout)))
    assert len(calls) == 1


def test_what_it_says_of_itself():
    P = nn.Parameter(torch.zeros(3, 5, 4, dtype=torch.bfloat16), requires_grad=False)
    layout = Layout((3, 5, 4), transposed=True)
    W = fast(P, *factors(layout, dtype=torch.float32), layout)
    for view in (lambda t: t, lambda t: t[0], lambda t: t.mT, lambda t: t.float()):
        ours, theirs = view(W), view(P)
        assert isinstance(ours, LowRank)
        for read in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"):
            assert getattr(ours, read) == getattr(theirs, read)
        assert ours.stride() == theirs.stride()
        assert (len(ours), ours.size(-1), ours.numel()) == (
            len(theirs),
            theirs.size(-1),
            theirs.numel(),
        )
        assert ours.is_floating_point()
    assert torch.ones(2).to(W).dtype == torch.ones(2).type_as(W).dtype == torch.bfloat16
    with torch.inference_mode():
        assert fast(P, *factors(layout), layout)[0].shape == (5, 4)
    assert repr(W) == "LowRank('m.weight', (3, 5, 4), rank=3)"
    assert len({W, W}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_init_it_is_the_base_to_the_bit(dtype):
    def base_and_ours(shape, run, x):
        layout = Layout(shape, kernel=len(shape) == 4)
        P = torch.randn(shape).to(dtype)
        A, B = factors(layout, dtype=torch.float32)
        W = fast(P, A, torch.zeros_like(B), layout)
        return run(P, x), run(W, x)

    x = torch.randn(7, 16).to(dtype)
    image = torch.randn(2, 16, 8, 8).to(dtype)
    for case in (
        ((8, 16), lambda W, x: F.linear(x, W), x),
        ((16, 8), lambda W, x: x @ W, x),
        ((9, 16), lambda W, x: F.embedding(x, W), IDS),
        ((8, 16, 3, 3), lambda W, x: F.conv2d(x, W), image),
        ((4, 16, 8), lambda W, x: F.grouped_mm(x, W, offs=OFFS), x),
    ):
        theirs, ours = base_and_ours(*case)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_autocast():
    """A product has the dtype that the base's has. Tolerance: bfloat16's rounding."""
    x, layout = torch.randn(3, 16), Layout((8, 16))
    P, (A, B) = torch.randn(8, 16), factors(layout, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = F.linear(x, fast(P, A, B, layout))
        base = F.linear(x, P)
        rows = F.embedding(IDS, fast(P, A, B, layout))
    assert ours.dtype == base.dtype == torch.bfloat16
    assert rows.dtype == P.dtype
    torch.testing.assert_close(
        ours.float(), F.linear(x, dense(P, A, B, layout)), atol=0.1, rtol=0.03
    )
    torch.testing.assert_close(rows, F.embedding(IDS, dense(P, A, B, layout)), atol=0.1, rtol=0.03)


# Transforms


def network(form, P, leaves, layouts, inputs):
    """A function of all kinds of products, from ids and an image-like x."""
    x, ids = inputs
    W = [form(p, *ab, layout) for p, ab, layout in zip(P, leaves, layouts)]
    h = F.embedding(ids, W[0]) + x
    h = torch.tanh(F.linear(h, W[1]))
    h = F.conv1d(h.mT, W[2], padding=1, groups=2).mT
    chosen = W[3][ids.reshape(-1) % 3]
    return torch.bmm(h.reshape(-1, 1, 6), chosen.mT).squeeze(1) @ W[3][1]


def network_inputs():
    layouts = [Layout((7, 6)), Layout((6, 6)), Layout((6, 3, 3), kernel=True), Layout((3, 4, 6))]
    P = [torch.randn(layout.stored).double() for layout in layouts]
    leaves = [tuple(t.detach() for t in factors(layout)) for layout in layouts]
    ids = torch.tensor([[1, 2, 6], [0, 1, 5]])
    return P, leaves, layouts, torch.randn(2, 3, 6).double(), ids


@pytest.mark.parametrize(
    "transform", ["grad", "vjp", "jvp", "vmap", "vmap of grad", "batch", "hessian"]
)
def test_transforms(transform):
    P, leaves, layouts, x, ids = network_inputs()
    many = [tuple(torch.stack([t, t + 0.1]) for t in pair) for pair in leaves]
    results = []
    for form in (fast, dense):

        def out(leaves, x=x, ids=ids, form=form):
            return network(form, P, leaves, layouts, (x, ids))

        def loss(leaves, out=out):
            return out(leaves).square().sum()

        results.append(
            {
                "grad": lambda: torch.func.grad(loss)(leaves),
                "vjp": lambda: torch.func.vjp(out, leaves)[1](out(leaves)),
                "jvp": lambda: torch.func.jvp(out, (leaves,), (leaves,)),
                "vmap": lambda: torch.vmap(out)(many),
                "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(many),
                "batch": lambda: torch.vmap(lambda x, i: out(leaves, x[None], i[None]))(x, ids),
                "hessian": lambda: torch.func.grad(
                    lambda p: sum(
                        g.square().sum() for pair in torch.func.grad(loss)(p) for g in pair
                    )
                )(leaves),
            }[transform]()
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", [fast, slow])
def test_activation_checkpointing(form):
    """Also where the sum is formed: the second run, in the backward, finds it formed."""
    layout = Layout((5, 4))
    P, x = torch.randn(5, 4).double(), normal(3, 4)
    A, B = factors(layout)

    def block(x, W):
        product = F.linear(x, W) if form is fast else torch.einsum("bi,oi->bo", x, W)
        return torch.tanh(product).square() @ (W.mT.mT if form is fast else W * 2)

    W = form(P, A, B, layout)
    out = checkpoint(block, checkpoint(block, x, W, use_reentrant=False), W, use_reentrant=False)
    plain = dense(P, A, B, layout)
    expected = block(block(x, plain), plain)
    ours = torch.autograd.grad(out.sum(), (A, B, x))
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), (A, B, x)))


def test_nothing_of_the_size_of_the_parameter_is_made_or_kept():
    """Few tokens: all else is small. The factors are held in float32, and cast."""
    layout = Layout((4, 64, 48))
    P = torch.randn(4, 64, 48, dtype=torch.bfloat16)
    A, B = factors(layout, dtype=torch.float32, rank=8)
    x = normal(8, 48, dtype=torch.bfloat16)
    kept, large = [], []

    def of_P(t):
        return t.untyped_storage().data_ptr() == P.untyped_storage().data_ptr()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() >= P.numel() and not of_P(out):
                large.append(func)
            return out

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Watch():
        W = fast(P, A, B, layout)
        out = F.grouped_mm(x, W.transpose(-2, -1), offs=OFFS) + F.linear(x, W[2])
        out.square().sum().backward()
    assert not large
    assert all(of_P(t) or t.numel() < P.numel() // 4 for t in kept)


@pytest.mark.parametrize("trains", [True, False])
def test_a_stack_is_cast_once(trains):
    """Not for each of its matrices, nor for each product."""
    layout, casts = Layout((4, 5, 6)), []
    P, x = torch.randn(4, 5, 6).bfloat16(), torch.randn(3, 6).bfloat16()
    A, B = (t.requires_grad_(trains) for t in factors(layout, dtype=torch.float32))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                casts.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        W = fast(P, A, B, layout)
        for e in range(4):
            F.linear(x, W[e])
        torch.bmm(x.expand(4, 3, 6), W.mT)
        torch.bmm(x.expand(4, 3, 6), W[torch.tensor([1, 2, 3, 0])].mT)
    assert len(casts) == 2


# Errors


def test_gradients_switched_off_inside_the_model():
    layout = Layout((5, 4))
    W, x = fast(torch.randn(5, 4), *factors(layout, dtype=torch.float32), layout), torch.ones(2, 4)
    for use in (lambda: F.linear(x, W), W.norm, lambda: F.linear(x, W.mT.mT)):
        with torch.no_grad(), pytest.raises(lf.LoraFuncError, match=r"'m.weight', so its adapter"):
            use()
    with pytest.raises(lf.LoraFuncError, match="use_reentrant=False"):
        checkpoint(F.linear, x.requires_grad_(), W, use_reentrant=True)
    with torch.no_grad():
        F.linear(x, fast(torch.randn(5, 4), *factors(layout, dtype=torch.float32), layout))


WRITES = {
    "method": lambda W: W.zero_(),
    "operator": lambda W: operator.iadd(W, 1),
    "item": lambda W: W.__setitem__(0, 1.0),
    "data": lambda W: setattr(W, "data", torch.ones(5, 4)),
    "out": lambda W: torch.add(torch.ones(5, 4), 1, out=W),
    "init": nn.init.zeros_,
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_refused(how):
    layout = Layout((5, 4))
    A, B = (t.detach() for t in factors(layout))
    with pytest.raises(lf.LoraFuncError, match=r"'m.weight': its module writes to the parameter"):
        WRITES[how](slow(torch.randn(5, 4).double(), A, B, layout))


def test_code_below_torch_function_is_refused():
    layout = Layout((5, 4))
    W = slow(torch.randn(5, 4).double(), *factors(layout), layout)
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(lf.LoraFuncError, match=r"'m.weight': its module passes the parameter to"),
    ):
        F.linear(torch.ones(2, 5).double(), W.t())


# The example axis


EXAMPLES: dict[str, Any] = {
    "linear": (lambda W, x: F.linear(x, W, torch.ones(5).double()), (5, 4), (3, 2, 4)),
    "one token": (lambda W, x: F.linear(x, W), (5, 4), (3, 4)),
    "right": (lambda W, x: x @ W, (5, 4), (3, 2, 2, 5)),
    "left": (lambda W, x: W @ x, (5, 4), (3, 4, 2)),
    "transposed": (lambda W, x: x @ W.T, (5, 4), (3, 4)),
    "embedding": (lambda W, x: F.embedding(x, W, padding_idx=1), (5, 4), IDS[[0, 1, 0]]),
    "conv1d": (lambda W, x: F.conv1d(x, W, padding="same", groups=2), (6, 2, 3), (3, 4, 5)),
    "depthwise": (lambda W, x: F.conv1d(x, W, groups=4), (4, 1, 3), (3, 4, 5)),
    "conv2d": (lambda W, x: F.conv2d(x, W, stride=2), (6, 4, 3, 3), (3, 4, 5, 5)),
    "conv_transpose": (
        lambda W, x: F.conv_transpose1d(x, W, stride=2, groups=2),
        (4, 3, 3),
        (3, 4, 5),
    ),
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_has_its_own_factors(name, beams):
    run, shape, x = EXAMPLES[name]
    n, kernel = 3, "conv" in name or name == "depthwise"
    layout = Layout(shape, name == "conv_transpose", kernel)
    P, (A, B) = torch.randn(shape).double(), factors(layout, n)
    x = (x if isinstance(x, Tensor) else torch.randn(x).double()).repeat_interleave(beams, 0)
    W = LowRank(P, A, B, layout, never, n, "m.weight", {"beams": beams})
    ours = run(W, x)
    theirs = [run(dense(P, A[i], B[i], layout), x[i * beams : (i + 1) * beams]) for i in range(n)]
    torch.testing.assert_close(ours, torch.cat(theirs))
    grads = [torch.autograd.grad(t.square().sum(), (A, B)) for t in (ours, torch.cat(theirs))]
    torch.testing.assert_close(*grads)


NO_EXAMPLES = {
    "another batch": lambda W: F.linear(torch.ones(4, 4).double(), W),
    "beams nobody spoke of": lambda W: F.linear(torch.ones(6, 4).double(), W),
    "no batch": lambda W: F.linear(torch.ones(4).double(), W),
    "no batch on the right": lambda W: W @ torch.ones(4, 3).double(),
    "positions": lambda W: F.embedding(torch.arange(3), W),  # as many as there are examples
    "a table of positions": lambda W: W[torch.arange(3)],
    "a row": lambda W: W[0],
    "the sum": lambda W: W.norm(),
}


@pytest.mark.parametrize("name", NO_EXAMPLES)
def test_an_example_axis_that_is_not_seen(name):
    layout = Layout((5, 4))
    W = LowRank(torch.ones(5, 4).double(), *factors(layout, 3), layout, never, 3, "m.weight")
    with pytest.raises(lf.LoraFuncError, match=r"'m.weight'.* example axis"):
        NO_EXAMPLES[name](W)


def test_an_axis_that_is_as_long_as_the_batch():
    """An operand without a batch is refused, though its first axis has the right length."""
    layout = Layout((5, 3))
    W = LowRank(torch.ones(5, 3).double(), *factors(layout, 3), layout, never, 3, "m.weight")
    for use in (lambda: F.linear(torch.ones(3).double(), W), lambda: W @ torch.ones(3, 2).double()):
        with pytest.raises(lf.LoraFuncError, match=r"'m.weight' meets .* example axis"):
            use()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("adapted", ["both", "one", "one of them alike"])
def test_experts_of_each_example(kind, implementation, adapted):
    """Equal to one example after the other, with gradients. In float32."""
    n, tokens = 3, 4
    module = made(kind, implementation)
    layouts = stacks(module)
    first = next(iter(layouts))
    if adapted == "one":
        layouts = {first: layouts[first]}
    alike = {first} if adapted == "one of them alike" else set()  # no example axis
    leaves = {
        name: factors(layout, *([] if name in alike else [n]), dtype=torch.float32)
        for name, layout in layouts.items()
    }
    x, ids, weights = routed(n * tokens)
    eager = implementation == "eager" or (kind is Step3p7Experts and not CURRENT)
    if not eager or (CURRENT and kind not in (GptOssExperts, NemotronHExperts)):
        # No expert: in expert-parallel runs, one of another rank; in LongCat, the identity.
        ids[5, 0] = vars(module).get("num_routed_experts", 4)
        weights[5, 0] = 0
    inputs = [x, *(leaf for pair in leaves.values() for leaf in pair)]
    module._is_expert_parallel = True

    view = with_parameters(module)
    view._parameters |= {
        name: fast(getattr(module, name), *leaves[name], layout, None if name in alike else n)
        for name, layout in layouts.items()
    }
    virtual_experts(view, n, "m.experts")
    ours = view(x, ids, weights)
    theirs = []
    for i in range(n):
        pick = {m: ... if m in alike else i for m in layouts}  # no axis, or example i
        new = {
            m: dense(getattr(module, m), A[pick[m]], B[pick[m]], layouts[m])
            for m, (A, B) in leaves.items()
        }
        rows = slice(i * tokens, (i + 1) * tokens)
        theirs.append(with_parameters(module, **new)(x[rows], ids[rows], weights[rows]))
    theirs = torch.cat(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(t.square().sum(), inputs) for t in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    assert count_of(module) * n == count_of(view)


def count_of(module: Any) -> int:
    return vars(module).get("num_experts") or module.total_experts


def test_llama4_experts_of_each_example():
    """They are called with all tokens for each expert, expert by expert."""
    n, tokens, E = 3, 2, 4
    module = made(Llama4TextExperts, "", torch.float64)
    layouts = stacks(module)
    leaves = {name: factors(layout, n) for name, layout in layouts.items()}
    x = normal(E * n * tokens, 16)
    view = with_parameters(module)
    view._parameters |= {m: fast(getattr(module, m), *leaves[m], layouts[m], n) for m in layouts}
    virtual_experts(view, n, "m.experts")
    ours = view(x).unflatten(0, (E, n, tokens))
    for i in range(n):
        new = {m: dense(getattr(module, m), A[i], B[i], layouts[m]) for m, (A, B) in leaves.items()}
        own = x.unflatten(0, (E, n, tokens))[:, i].flatten(0, 1)
        theirs = with_parameters(module, **new)(own).unflatten(0, (E, tokens))
        torch.testing.assert_close(ours[:, i], theirs)


def test_experts_that_cannot_tell_examples_apart():
    layout = Layout((4, 12, 16))
    A, B = factors(layout, 3, dtype=torch.float32)
    module = JetMoeParallelExperts(4, 16, 12).requires_grad_(False)
    W = fast(module.weight, A, B, layout, 3)
    view = with_parameters(module, weight=W)
    with pytest.raises(lf.LoraFuncError, match=r"'m.weight': its module uses .* example axis"):
        call(view, "sorted")
    with pytest.raises(lf.LoraFuncError, match=r"'m.experts' is a JetMoeParallelExperts, which"):
        virtual_experts(view, 3, "m.experts")


def test_a_batch_of_another_size():
    view = made(MixtralExperts, "eager")
    virtual_experts(view, 3, "m.experts")
    with pytest.raises(lf.LoraFuncError, match=r"'m.experts' sees 7 tokens, which .* 3 examples"):
        view(*routed(7))


def test_virtual_experts_take_no_sum():
    W = virtual(torch.ones(4, 5, 6), 3, "m.weight")
    assert W.shape == (12, 5, 6)
    for use in (W.sum, W[1].sum, lambda: torch.ones(5) @ W, lambda: W[1:2]):
        with pytest.raises(lf.LoraFuncError, match=r"'m.weight'.* example axis"):
            use()
