"""Every adapter and every transform on bitsandbytes' 4-bit and 8-bit layers.

Each must equal the same on the dequantized model. `nox -s bnb` runs these tests on the CPU, and on
a GPU if there is one. They fail, and are not skipped, if bitsandbytes does not load.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from cases import catalogue
from models import (
    assert_at_base,
    checkpoint_activations,
    largest,
    state_of,
    text_batch,
    tiny_llama,
    trained,
)
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lora_func as lf
from lora_func.engine.layer import AdaptedLayer
from lora_func.libraries.functorch import in_transform
from lora_func.variants import _gate
from lora_func.weights.table import weight_of

variants = catalogue()
over_variants = pytest.mark.parametrize("variant", variants.values(), ids=variants.keys())
at_base = catalogue(at_base=True)
over_at_base = pytest.mark.parametrize("variant", at_base.values(), ids=at_base.keys())
over_kinds = pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4, nested", "int8"])
over_packings = pytest.mark.parametrize("kind", ["nf4", "nf4, nested"])
ALL = lf.Targets(roles=())
Q_V_DOWN = lf.Targets(names=(r"(q|v|down)_proj$",))
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    return request.param


def pack(layer: nn.Linear, kind: str, device: str) -> Any:
    """`layer`, packed by bitsandbytes, which does so when a layer moves to its device."""
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if kind == "int8":
        packed = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        data = layer.weight.data.to("cpu", copy=True)  # it packs only what comes from the CPU
        packed.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
    else:
        packing = {"quant_type": kind[:3], "compress_statistics": kind.endswith("nested")}
        packed = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **packing)
        packed.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, **packing)
    if layer.bias is not None:
        packed.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return packed.to(device)


def unpack(layer) -> nn.Linear:
    """A float layer with the dequantized weight."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight.data = weight_of(layer).dense().float()
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.clone()
    return plain


def with_layers(model: nn.Module, kind: type | tuple[type, ...], change) -> Any:
    """A copy of `model` in which `change(layer)` replaces each layer of a kind, except the head."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, kind) and "lm_head" not in path:
            model.set_submodule(path, change(module))
    return model.requires_grad_(False)


def llama(**changes):
    """A Llama of sizes that bitsandbytes' kernel for CPUs with AVX512-BF16 takes.

    Its outputs are multiples of 32, and its inputs of 64.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny_llama(**sizes, attn_implementation="eager", attention_bias=True, **changes)


def pair(kind: str, device: str = "cpu") -> tuple[Any, Any]:
    """A quantized Llama, and the float one with its dequantized weights.

    Both are in train mode if the layers are 8-bit ones, which round their input in eval mode.
    """
    change = functools.partial(pack, kind=kind, device=device)
    packed = with_layers(llama().to(device), nn.Linear, change)
    plain = with_layers(packed, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt), unpack).to(device)
    return (packed.train(), plain.train()) if kind == "int8" else (packed, plain)


def calibration(variant, device) -> dict[str, Any]:
    """A batch for variants that look at data. It passes the layers' own kernels."""
    return {} if variant.statistic is None else {"calibration": [batch_on(device)]}


def adapt(model, variant, device, **options):
    options |= {"generator": torch.Generator().manual_seed(0), **calibration(variant, device)}
    adapter, params = lf.adapt(model, variant, targets=Q_V_DOWN, **options)
    return adapter, trained(params)


def batch_on(device):
    return {name: t.to(device) for name, t in text_batch().items()}


def loss_of(model, adapter, batch):
    return lambda params: adapter(model, params, batch).loss


def near(given, expected, tolerance=1e-5):
    """Relative to the largest entry of the whole dict."""
    scale = max(1e-3, *(leaf.abs().max().item() for leaf in expected.values()))
    return largest(given, expected) <= tolerance * scale


# all adapters


@over_at_base
@over_kinds
def test_identity_at_init(variant, kind, device):
    """The logits are those of the quantized model. The gradients are finite, and not all 0."""
    model, batch = pair(kind, device)[0].eval(), batch_on(device)
    adapter, params = lf.adapt(model, variant, targets=Q_V_DOWN, **calibration(variant, device))
    logits, expected = adapter(model, params, batch).logits, model(**batch).logits
    if variant.card.at_init == "rounding":
        # A rounded input may fall to the next int8 code, or to the next bfloat16, to which the
        # kernel of 4-bit layers rounds it on some CPUs.
        step = 0.1 if kind == "int8" else 2.0**-8
        assert (logits - expected).abs().max() <= step * expected.abs().max()
    else:
        assert_at_base(variant, logits, expected)
    _, grads = lf.value_and_grad(loss_of(model, adapter, batch))(params)
    assert all(leaf.isfinite().all() for leaf in grads.values())
    assert sum(leaf.abs().sum() for leaf in grads.values()) > 0


@over_variants
@over_kinds
def test_equals_the_dequantized_model(variant, kind, device):
    """Outputs and gradients do, with bitsandbytes' kernels (autograd) and ours (torch.func)."""
    packed, plain = pair(kind, device)
    adapter, params = adapt(packed, variant, device)
    batch = batch_on(device)
    expected = grad(loss_of(plain, adapter, batch))(params)
    assert near(grad(loss_of(packed, adapter, batch))(params), expected)
    if device == "cpu" or kind != "int8":  # on CUDA, Linear8bitLt rounds its input in training, too
        assert near(lf.value_and_grad(loss_of(packed, adapter, batch))(params)[1], expected)
        logits, expected = (adapter(model, params, batch).logits for model in (packed, plain))
        torch.testing.assert_close(logits, expected)


@over_variants
@over_kinds
def test_transforms(variant, kind, device):
    """vmap, vmap of grad, jvp, jvp of grad."""
    packed, plain = pair(kind, device)
    adapter, params = adapt(packed, variant, device)
    batch = batch_on(device)
    f, g = loss_of(packed, adapter, batch), loss_of(plain, adapter, batch)
    several = lf.stack([trained(params) for _ in range(2)])
    torch.testing.assert_close(vmap(f)(several), vmap(g)(several))
    assert near(vmap(grad(f))(several), vmap(grad(g))(several))
    tangent = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    slope = jvp(f, (params,), (tangent,))[1]
    torch.testing.assert_close(slope, jvp(g, (params,), (tangent,))[1])
    assert slope != 0
    given, expected = (jvp(grad(h), (params,), (tangent,))[1] for h in (f, g))
    assert near(given, expected, 1e-4)  # twice the products


@over_variants
def test_populations(variant, device):
    """An adapter for each example, and per-sample gradients, through a 4-bit base."""
    packed, plain = pair("nf4, nested", device)
    adapter, params = adapt(packed, variant, device)
    batch, several = batch_on(device), lf.stack([trained(params) for _ in range(3)])
    logits, same = (adapter(model, several, batch).logits for model in (packed, plain))
    torch.testing.assert_close(logits, same)
    given, expected = (
        lf.value_and_grad(loss_of(m, adapter, batch))(lf.expand(params, 3))[1]
        for m in (packed, plain)
    )
    assert near(given, expected)


@over_kinds
def test_the_model_is_never_touched(kind):
    """Neither a transform nor a call writes to it."""
    model, batch = pair(kind)[0], text_batch()
    model(**batch)  # at its first forward, bitsandbytes moves the scales of 8-bit layers
    before = state_of(model)
    adapter, params = adapt(model, lf.DoRA(r=4), "cpu")
    grad(loss_of(model, adapter, batch))(params)
    lf.value_and_grad(loss_of(model, adapter, batch))(params)
    lf.merge(adapter, model, params)
    assert lf.probe(adapter, model, params, batch).inert == ()
    assert state_of(model) == before


# packed weights


@over_kinds
def test_norms_are_those_of_the_dequantized_weight(kind, device):
    """DoRA takes norms of rows and DeLoRA norms of columns, not of the packed bytes."""
    packed, plain = pair(kind, device)
    path = "model.layers.0.self_attn.q_proj"
    W = plain.get_submodule(path).weight
    adapter, params = lf.adapt(packed, lf.DoRA(r=4), targets=Q_V_DOWN)
    torch.testing.assert_close(params[f"{path}.lora_m"], W.norm(dim=1))
    adapter, _ = lf.adapt(packed, lf.DeLoRA(r=4), targets=Q_V_DOWN)
    given, expected = (
        dict(a.frozen) for a in (adapter, lf.adapt(plain, lf.DeLoRA(r=4), targets=Q_V_DOWN)[0])
    )
    assert largest(given, expected) <= 1e-5


def test_parameters_are_rounded_before_the_first_layer(device):
    """To the dtype that the embeddings have, all at once, and not in each layer."""
    packed = with_layers(llama().to(device), nn.Linear, functools.partial(pack_wide, device=device))
    packed, batch = packed.bfloat16(), batch_on(device)
    adapter, params = adapt(packed, lf.DoRA(r=2), device)
    view = adapter.view(packed, params, call=True)
    bound = lf.bind(adapter, packed, {k: t.requires_grad_() for k, t in params.items()})
    assert bound(**batch).logits.isfinite().all()
    own = [module for module in bound.modules() if isinstance(module, AdaptedLayer)]
    for layers in (view.layers, own):
        kept = [t for layer in layers for t in layer._kept.entries.params.values()]
        assert {t.dtype for t in kept} == {torch.bfloat16}


def pack_wide(layer: nn.Linear, device: str) -> Any:
    """`layer`, packed from bfloat16."""
    return pack(layer.bfloat16(), "nf4", device)


def test_hessian(device):
    first, rest = pack(nn.Linear(64, 8), "nf4", device), (nn.Tanh(), nn.Linear(8, 1).to(device))
    packed, plain = nn.Sequential(first, *rest), nn.Sequential(unpack(first).to(device), *rest)
    adapter, params = lf.adapt(packed, lf.LoRA(r=1), targets=lf.Targets(names=("0",), roles=()))
    params, x = trained(params), torch.randn(5, 64, device=device)
    given, expected = (
        torch.func.hessian(lambda p, m=m: adapter(m, p, x).square().sum())(params)
        for m in (packed, plain)
    )
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_jvp_through_a_layer_that_is_not_adapted(device):
    """bitsandbytes alone silently returns 0 here."""
    packed, plain = pair("nf4", device)
    target = lf.Targets(names=(r"layers.0.self_attn.v_proj$",))
    adapter, params = lf.adapt(packed, lf.LoRA(r=4), targets=target)
    params, batch = trained(params), batch_on(device)
    tangent = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    slope = jvp(loss_of(packed, adapter, batch), (params,), (tangent,))[1]
    torch.testing.assert_close(slope, jvp(loss_of(plain, adapter, batch), (params,), (tangent,))[1])
    with forward_ad.dual_level():  # the same, by forward-mode autograd
        dual = {key: forward_ad.make_dual(leaf, tangent[key]) for key, leaf in params.items()}
        assert in_transform()
        loss = loss_of(packed, adapter, batch)(dual)
        torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, slope)
    assert not in_transform()


def test_the_dtype_in_which_a_layer_computes(device):
    """Our product computes in the layer's bfloat16 for a float32 input, as bitsandbytes does."""
    layer = pack(nn.Linear(64, 8), "nf4", device)
    layer.compute_dtype, layer.compute_type_is_set = torch.bfloat16, True
    x = torch.randn(3, 64, device=device)
    given = weight_of(layer)(x)
    assert given.dtype == torch.float32
    assert torch.equal(given, given.bfloat16().float())  # it holds values of bfloat16
    torch.testing.assert_close(given + layer.bias, layer(x), rtol=1e-2, atol=1e-2)


@over_variants
def test_a_step_in_eval_mode_is_seen_without_gradients(variant, device):
    """4-bit layers are prepared for the dtype of an input, and so after the forward has begun."""
    packed, _ = pair("nf4", device)
    adapter, params = adapt(packed, variant, device)
    bound, batch = lf.bind(adapter, packed, params).eval(), batch_on(device)
    bound(**batch).loss.backward()
    with torch.no_grad():
        for leaf in params.values():
            leaf.mul_(1.5)
        torch.testing.assert_close(bound(**batch).loss, adapter(packed, params, batch).loss)


def test_a_bound_view_inside_a_transform(device):
    """A view bound outside of a transform computes by our product when called inside of one."""
    packed, plain = pair("nf4", device)
    adapter, params = adapt(packed, lf.LoRA(r=4), device)
    bound, oracle = lf.bind(adapter, packed, params), lf.bind(adapter, plain, params)
    embeds = torch.randn(2, 5, 64, device=device)
    given, expected = (
        grad(lambda e, m=m: m(inputs_embeds=e).logits.square().mean())(embeds)
        for m in (bound, oracle)
    )
    torch.testing.assert_close(given, expected)


def test_patched_by_accelerate():
    """accelerate's hook binds the forward of the original layer; the copy must run its own."""
    packed, plain = pair("nf4")
    add_hook_to_module(packed.model.layers[0].mlp.up_proj, ModelHook())
    add_hook_to_module(packed.model.layers[0].self_attn.q_proj, ModelHook())
    adapter, params = adapt(packed, lf.LoRA(r=4), "cpu")
    batch = text_batch()
    given, expected = (grad(loss_of(model, adapter, batch))(params) for model in (packed, plain))
    assert near(given, expected)


def test_hooks_run_inside_transforms():
    packed, _ = pair("nf4")
    calls = []
    packed.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    adapter, params = adapt(packed, lf.LoRA(r=4), "cpu")
    grad(loss_of(packed, adapter, text_batch()))(params)
    assert calls == [1]


# dynamo itself does what it warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    torch._dynamo.reset()
    packed, _ = pair("nf4")
    adapter, params = adapt(packed, lf.LoRA(r=4), "cpu")
    f = grad(loss_of(packed, adapter, text_batch()))
    assert near(torch.compile(f, fullgraph=True, backend="aot_eager")(params), f(params))


def test_checkpointed_and_generated():
    packed, plain = pair("nf4")
    adapter, params = adapt(packed, lf.DoRA(r=4), "cpu")
    batch = text_batch()
    f = loss_of(packed.train(), adapter, batch)
    _, expected = lf.value_and_grad(f)(params)
    checkpoint_activations(packed, use_reentrant=False)
    assert largest(lf.value_and_grad(f)(params)[1], expected) == 0
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given, same = (
        lf.bind(adapter, m, params).eval().generate(**prompt, **options) for m in (packed, plain)
    )
    assert torch.equal(given, same)


@over_kinds
def test_memory_for_backward(kind):
    """Our product keeps no dense weight, and no more bytes than bitsandbytes' own kernels."""
    packed, _ = pair(kind)
    batch = text_batch()
    embeds = packed.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    adapter, params = lf.adapt(packed, lf.LoRA(r=4), targets=Q_V_DOWN)
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}

    def kept(forced: bool) -> int:
        storages = {}

        def note(t):
            storages[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
            return t

        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            patch.setattr("lora_func.weights.table.in_transform", lambda: forced)
            out = adapter(packed, leaves, {"inputs_embeds": embeds, "use_cache": False})
        del out
        own = {t.untyped_storage().data_ptr() for t in (*packed.parameters(), *packed.buffers())}
        return sum(size for address, (size, _) in storages.items() if address not in own)

    assert kept(True) <= 1.05 * kept(False)
    linear = [module for module in packed.modules() if isinstance(module, nn.Linear)]
    assert kept(True) < sum(4 * layer.in_features * layer.out_features for layer in linear)


class Noted(lf.DoRA):
    """A DoRA that notes the matrices of its fused form."""

    seen: list[Any] = []  # noqa: RUF012  (cleared by each test)

    def fused(self, x, W, b, params):
        self.seen.append(W)
        return super().fused(x, W, b, params)


class Apart(lf.DoRA):
    """A DoRA without a fused form."""

    fused = lf.Variant.fused


@pytest.mark.parametrize("large", [_gate.LARGE, 0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_4bit_layer_and_its_update_as_one_function(bias, large, device, monkeypatch):
    """Where gradients are asked for. Without them, the layer has kernels of its own."""
    monkeypatch.setattr(_gate, "LARGE", large)
    model = nn.Sequential(pack(nn.Linear(64, 96, bias), "nf4", device), nn.SiLU(inplace=True))
    x = torch.randn(5, 64, device=device).requires_grad_()
    found = []
    for kind in (Noted, Apart):
        adapter, params = lf.adapt(
            model, kind(r=4), targets=ALL, generator=torch.Generator().manual_seed(0)
        )
        torch.manual_seed(0)
        leaves = {key: leaf.requires_grad_() for key, leaf in trained(params).items()}
        Noted.seen.clear()
        out = adapter(model, leaves, x)
        assert len(Noted.seen) == (kind is Noted)
        grads = torch.autograd.grad(out.square().sum(), [x, *leaves.values()], create_graph=True)
        penalty = torch.stack([g.square().sum() for g in grads]).sum()
        second = torch.autograd.grad(penalty, list(leaves.values()))
        found.append((out, *grads, *second))
        with torch.no_grad():
            adapter(model, leaves, x)
        assert len(Noted.seen) == (kind is Noted)
        assert torch.equal(adapter(model, params, x), model(x))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@over_variants
@over_kinds
def test_merge_is_dense(variant, kind):
    """Merged weights are dense, in the given dtype. A float model computes the same with them."""
    packed, plain = pair(kind)
    adapter, params = adapt(packed, variant, "cpu")
    batch = text_batch()
    merged = lf.merge(adapter, packed, params, dtype=torch.float32)
    assert all(t.dtype == torch.float32 for t in merged.values())
    plain.load_state_dict(merged, strict=False)
    logits, expected = plain(**batch).logits, adapter(packed, params, batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    rounded = lf.merge(adapter, packed, params, dtype=torch.bfloat16)
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}


def test_files_go_between_quantized_and_float(tmp_path):
    """Loading onto the other base warns that it is another one; loading onto the same does not."""
    base, batch = llama(), text_batch()
    packed = with_layers(base, nn.Linear, functools.partial(pack, kind="nf4", device="cpu"))
    for model, other in ((packed, base), (base, packed)):
        adapter, params = adapt(model, lf.DeLoRA(r=4), "cpu")
        lf.save(tmp_path / "a.safetensors", adapter, params)
        again, same = lf.load(tmp_path / "a.safetensors", model, check_base="error")
        assert largest(same, params) == 0
        assert torch.equal(again(model, same, batch).logits, adapter(model, params, batch).logits)
        with pytest.warns(UserWarning, match="the adapter was made on another base"):
            elsewhere, same = lf.load(tmp_path / "a.safetensors", other)
        assert elsewhere(other, same, batch).logits.isfinite().all()
        with pytest.raises(lf.LoraFuncError, match="the adapter was made on another base"):
            lf.load(tmp_path / "a.safetensors", other, check_base="error")


@pytest.mark.parametrize("bits", [4, 8])
def test_loaded_through_transformers(bits, device, tmp_path):
    llama().save_pretrained(tmp_path)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options: dict[str, Any] = {"load_in_4bit": True, **nf4} if bits == 4 else {"load_in_8bit": True}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**options),
        device_map=device,
        attn_implementation="eager",
    )
    model.requires_grad_(False)  # bitsandbytes adds a bias in place on CPUs with AVX512-BF16
    batch = batch_on(device)
    adapter, params = lf.adapt(model, lf.PiSSA(r=4))
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)
    params, f = trained(params), loss_of(model, adapter, batch)
    assert all(leaf.isfinite().all() and leaf.any() for leaf in grad(f)(params).values())
    optimizer = torch.optim.AdamW([leaf.requires_grad_() for leaf in params.values()], lr=1e-3)
    first = f(params).item()
    for _ in range(10):
        optimizer.zero_grad()
        f(params).backward()
        optimizer.step()
    assert f(params) < first
    assert lf.probe(adapter, model, params, batch).inert == ()


# states of a layer


def test_scales_that_have_moved():
    """The first forward of an 8-bit layer moves its scales from the weight to the module."""
    layer = pack(nn.Linear(64, 8), "int8", "cpu").train()
    before = weight_of(layer).dense()
    layer(torch.randn(2, 64))
    assert layer.weight.SCB is None
    assert torch.equal(weight_of(layer).dense(), before)


@over_packings
def test_weights_repacked_for_a_cpu(kind):
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit layers in place, with bfloat16 scales.

    The kernel for them has no backward, so our product computes the gradient.
    """
    layer = pack(nn.Linear(128, 64), kind, "cpu")
    before, x = weight_of(layer).dense(), torch.randn(3, 128, requires_grad=True)
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    state = copy.deepcopy(vars(layer.weight.quant_state))
    after = weight_of(layer).dense()
    assert after.shape == (64, 128)
    torch.testing.assert_close(after.float(), before, rtol=2e-2, atol=1e-3)  # bfloat16
    now = vars(layer.weight.quant_state)
    tensors = [key for key, value in now.items() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(torch.equal(now[key], state[key]) for key in tensors)
    model = nn.Sequential(layer)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    adapter(model, params, x).sum().backward()
    torch.testing.assert_close(x.grad, after.float().sum(0).expand(3, -1), rtol=2e-2, atol=1e-2)


def test_float_weights_in_an_8bit_layer(device):
    """`has_fp16_weights=True` keeps a float weight and quantizes it in every forward."""
    layer = bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=True).to(device)
    model = nn.Sequential(layer)
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=()))
    x = torch.randn(3, 64, device=device)
    given = grad(lambda x: adapter(model, params, x).sum())(x)
    torch.testing.assert_close(given, layer.weight.detach().sum(0).expand(3, -1))


@pytest.mark.parametrize(
    "layer",
    [lambda: bnb.nn.Linear4bit(64, 8), lambda: bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False)],
    ids=["4bit", "8bit"],
)
def test_a_layer_that_is_not_quantized_yet(layer):
    message = r"'0' is a Linear\w+ that is not quantized yet: move the model to its device"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(nn.Sequential(layer()), lf.LoRA(r=2), targets=lf.Targets(roles=()))


def test_a_weight_that_was_packed_transposed():
    layer = pack(nn.Linear(64, 8), "nf4", "cpu")
    layer.in_features, layer.out_features = 8, 64
    message = r"'0' is a Linear4bit .* where a floating one of shape \(64, 8\) was expected"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(nn.Sequential(layer), lf.LoRA(r=2), targets=lf.Targets(roles=()))
