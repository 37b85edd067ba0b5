"""Layers and models of every kind: adapted rightly, or refused with a message that says why."""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from models import adapted, state_of, text_batch, tiny_llama, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from transformers.integrations.bitnet import AutoBitLinear, BitLinear
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear

import lora_func as lf

ALL = lf.Targets(roles=())
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """BitNet's quantizers are compiled functions."""
    with torch.compiler.set_stance("force_eager"):
        yield


def set_(layer: Any, name: str, value: float) -> Any:
    getattr(layer, name).data.fill_(value)
    return layer


def patched(forward: Callable[..., Tensor]) -> nn.Linear:
    """A linear layer whose forward was set on the layer."""
    layer = nn.Linear(8, 12)
    layer.forward = types.MethodType(forward, layer)
    return layer


def sparse(layout: str) -> nn.Linear:
    layer = nn.Linear(8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are in beta
        layer.weight = nn.Parameter(getattr(layer.weight.detach(), layout)())
    return layer


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Unbiased(nn.Linear):
    """Takes its bias for something else, as layers that return it apart do."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Normalized(nn.Linear):
    """Not linear in its input. On its own weight, which is zero, it looks right."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.layer_norm(input, input.shape[-1:]), self.weight)


class NotANumber(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * float("nan")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # of transformers
    "bitnet, ternary on the fly": (
        lambda: AutoBitLinear(8, 12, online_quant=True),
        "AutoBitLinear, whose forward computes something else than .* off",
    ),
    "bitnet, rescaled": (
        lambda: set_(AutoBitLinear(8, 12), "weight_scale", 0.3),
        "AutoBitLinear, whose forward computes something else than .* 70% off",
    ),
    "bitnet, normed": (
        lambda: AutoBitLinear(8, 12, use_rms_norm=True),
        "AutoBitLinear, whose forward computes something else",
    ),
    "bitnet, packed": (
        lambda: BitLinear(8, 12, bias=False),
        r"BitLinear with a weight of torch\.uint8",
    ),
    "finegrained fp8": (lambda: FP8Linear(8, 12), r"FP8Linear with a weight of torch\.float8"),
    "fbgemm fp8": (
        lambda: FbgemmFp8Linear(8, 12, True),
        r"FbgemmFp8Linear with a weight of torch\.float8",
    ),
    "compressed-tensors fp8": (
        lambda: CompressedTensorsFP8Linear(8, 12),
        r"CompressedTensorsFP8Linear with a weight of torch\.float8",
    ),
    "gemma": (lambda: QuantizedLinear(8, 12), r"QuantizedLinear with a weight of torch\.int8"),
    "grouped": (
        lambda: DeepseekV4GroupedLinear(8, 12, 4),
        r"DeepseekV4GroupedLinear, whose forward returns shape \(4, 3\)",
    ),
    "more outputs than it says": (
        lambda: IdeficsDecoupledLinear(8, 12, out_additional_features=2),
        r"IdeficsDecoupledLinear, whose forward returns shape \(4, 14\)",
    ),
    # of torch
    "sparse csr": (lambda: sparse("to_sparse_csr"), "Linear with a sparse weight of"),
    "sparse coo": (lambda: sparse("to_sparse"), "Linear with a sparse weight of"),
    # of a user
    "doubled": (lambda: Doubled(8, 12), "Doubled, whose forward .* 100% off"),
    "doubled, square": (lambda: Doubled(8, 8), "Doubled, whose forward .* 100% off"),
    "no bias": (lambda: Unbiased(8, 12), "Unbiased, whose forward computes something else"),
    "normalized": (lambda: Normalized(8, 12), "Normalized, whose forward computes something"),
    "not a number": (lambda: NotANumber(8, 12), "NotANumber, whose forward computes something"),
    "rescaled by a method": (
        lambda: patched(lambda self, x: 3 * F.linear(x, self.weight, self.bias)),
        "Linear, whose forward computes something else than .* 200% off",
    ),
    "weights rounded by a method": (
        lambda: patched(lambda self, x: F.linear(x, self.weight.sign(), self.bias)),
        "Linear, whose forward computes something else",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_layer_that_is_refused(make, message):
    """By `adapt`, with path, class and the way out, which works. Nothing of the model changes."""
    model = nn.Sequential(nn.Linear(8, 8), make())
    before = state_of(model) if "sparse" not in message else ""
    with pytest.raises(lf.LoraFuncError, match=rf"^'1' is a {message}.*Targets\(exclude="):
        lf.adapt(model, lf.LoRA(r=2), targets=ALL)
    assert not before or state_of(model) == before
    adapter, _ = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(roles=(), exclude=("^1$",)))
    assert "0" in adapter.targets
    assert "1" not in adapter.targets


def test_the_way_out_names_a_pattern():
    model = nn.Sequential(nn.ModuleDict({"a+b": Doubled(8, 8)}))
    with pytest.raises(lf.LoraFuncError, match=r"exclude=\('a\\\\\+b\$',\)"):
        lf.adapt(model, lf.LoRA(r=2), targets=ALL)


ROUTERS: dict[str, tuple[Any, Any, str]] = {
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **SMALL, intermediate_size_mlp=48, head_dim=8, interleave_moe_layer_step=1
        ),
        r"'model\.layers\.0\.feed_forward\.router' is a Llama4Router, whose forward returns a tup",
    ),
    "phimoe": (
        PhimoeForCausalLM,
        PhimoeConfig(**SMALL),
        r"'model\.layers\.0\.mlp\.router' is a PhimoeTopKRouter, whose forward returns a tuple",
    ),
}


@pytest.mark.filterwarnings("ignore:the .* adapted layers hold .* in fused experts")
@pytest.mark.parametrize(("kind", "config", "message"), ROUTERS.values(), ids=ROUTERS.keys())
def test_routers(kind, config, message):
    """They return tuples. Without them, the model is adapted as its merged weights compute."""
    model = kind(config).eval()
    with pytest.raises(lf.LoraFuncError, match=rf"{message}.*exclude=\('router\$',\)"):
        lf.adapt(model, lf.LoRA(r=2))
    adapter, params = lf.adapt(model, lf.LoRA(r=2), targets=lf.Targets(exclude=(r"router$",)))
    params, batch = trained(params, noise=0.02), text_batch()
    merged = functional_call(model, lf.merge(adapter, model, params), (), batch).logits
    torch.testing.assert_close(adapter(model, params, batch).logits, merged, rtol=1e-3, atol=1e-4)


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "falcon": lambda: FalconLinear(8, 12),
    "falcon, square, bfloat16": lambda: FalconLinear(300, 300).bfloat16(),
    "falcon, float16": lambda: FalconLinear(300, 1200).half(),
    "idefics": lambda: IdeficsDecoupledLinear(8, 12),
    "bitnet, unscaled": lambda: AutoBitLinear(64, 48),  # its input is rounded to 8 bits
    "a forward of its own": lambda: patched(lambda self, x: type(self).forward(self, x)),
    "a forward of its own, zero": lambda: set_(
        patched(lambda self, x: type(self).forward(self, x)), "weight", 0.0
    ),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT.keys())
def test_a_layer_that_is_right(make):
    """The adapted output is that of the merged weights."""
    model = nn.Sequential(make())
    adapter, params = lf.adapt(model, lf.DoRA(r=2), targets=ALL)
    params = trained(params)
    merged = copy.deepcopy(model)
    merged.load_state_dict(lf.merge(adapter, model, params), strict=False)
    layer: Any = model[0]
    x = torch.randn(5, layer.in_features).to(layer.weight.dtype)
    out, expected = adapter(model, params, x), merged(x)
    # bfloat16, or an input that is rounded to 8 bits
    assert (out - expected).norm() <= 0.02 * expected.norm()
    if layer.weight.any():
        assert (out - model(x)).norm() > 0.04 * expected.norm()


class ByScale(nn.Linear):
    """What it computes depends on a parameter that has no data on "meta"."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


def test_a_layer_on_meta_is_asked_when_it_has_data():
    """The shape alone tells on "meta"; `init` on the model with data asks again."""
    with torch.device("meta"):
        shell = nn.Sequential(ByScale(8, 12))
        adapter, _ = lf.adapt(shell, lf.LoRA(r=2), targets=ALL)
    with pytest.raises(lf.LoraFuncError, match=r"ByScale, whose forward .* 100% off"):
        adapter.init(nn.Sequential(ByScale(8, 12)))


@pytest.mark.parametrize(("scale", "right"), [(1.0, True), (2.0, False)])
def test_an_offloaded_layer_is_asked_with_its_tensors(scale, right):
    """accelerate keeps the scale elsewhere, too."""
    layer = ByScale(8, 12)
    layer.scale.data.fill_(scale)
    model = cpu_offload(nn.Sequential(layer))
    if right:
        lf.adapt(model, lf.LoRA(r=2), targets=ALL)
    else:
        with pytest.raises(lf.LoraFuncError, match=r"ByScale, whose forward .* 100% off"):
            lf.adapt(model, lf.LoRA(r=2), targets=ALL)


def test_a_transposed_layer_on_meta():
    class Transposed(nn.Linear):
        def __init__(self, d_in: int, d_out: int):
            super().__init__(d_in, d_out)
            self.weight = nn.Parameter(self.weight.mT.contiguous())

        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight + self.bias

    with torch.device("meta"):
        adapter, params = lf.adapt(nn.Sequential(Transposed(8, 12)), lf.LoRA(r=2), targets=ALL)
    assert adapter.base["0"].transposed
    assert params["0.lora_A"].shape == (2, 8)
    adapter, _ = lf.adapt(nn.Sequential(Transposed(8, 12)), lf.LoRA(r=2), targets=ALL)
    assert adapter.base["0"].transposed


def test_asking_takes_no_randomness_and_no_grad():
    model = nn.Sequential(FalconLinear(8, 8))
    before, state = state_of(model), torch.get_rng_state()
    adapter, params = lf.adapt(model, lf.IA3(), targets=ALL, generator=torch.Generator())
    torch.vmap(lambda d: lf.merge(adapter, model, {"0.lora_d": d})["0.weight"])(
        params["0.lora_d"].expand(3, -1)
    )
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)


# models that cannot be a base


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Linear(4, 4)))


def in_peft() -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return peft.get_peft_model(tiny_llama(), config)


def with_a_proxy() -> nn.Module:
    """`isinstance` takes a weak proxy for a module, so torch registers it as a child."""
    model: Any = nn.Sequential(nn.Linear(4, 4))
    model.partner = weakref.proxy(model[0])
    return model


def bound() -> nn.Module:
    model, adapter, params = adapted()
    return lf.bind(adapter, model, params)


BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (scripted, "^the model is a RecursiveScriptModule: TorchScript runs code of"),
    "scripted in part": (
        lambda: nn.Sequential(nn.Linear(4, 4), scripted()),
        "^'1' is a RecursiveScriptModule: TorchScript runs code",
    ),
    "DataParallel": (
        lambda: nn.DataParallel(tiny_llama()),
        r"^the model is a DataParallel, .*model\.module.*wrap the module that lf\.bind",
    ),
    "PeftModel": (in_peft, r"q_proj' is a Linear of PEFT, .*model\.unload\(\).*merge_and_unload"),
    "bound": (bound, "q_proj' is a AdaptedLayer: the model is a bound view, which carries an"),
    "a weak proxy": (with_a_proxy, "^'partner' is a weak proxy .* use weakref.ref"),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks
@pytest.mark.parametrize(("make", "message"), BASES.values(), ids=BASES.keys())
def test_a_model_that_is_no_base(make, message):
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.adapt(make(), lf.LoRA(r=2))


@pytest.mark.filterwarnings("ignore:.*FSDP:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_a_model_wrapped_for_many_ranks(wrapper, tmp_path):
    """The way out, adapting what is inside and wrapping the bound module, works for DDP."""
    path = str(tmp_path / "store")
    store = torch.distributed.FileStore(path, 1)  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4))
        if wrapper == "FSDP":
            from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415

            wrapped: Any = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
            message = "is a FullyShardedDataParallel, .* Use fully_shard, or adapt before you wrap"
        else:
            wrapped = DistributedDataParallel(model)
            message = r"is a DistributedDataParallel, .* Adapt that one, and wrap the module"
        with pytest.raises(lf.LoraFuncError, match=message):
            lf.adapt(wrapped, lf.LoRA(r=2))
        if wrapper == "DDP":
            adapter, params = lf.adapt(wrapped.module, lf.LoRA(r=2), targets=ALL)
            out = DistributedDataParallel(lf.bind(adapter, wrapped.module, params))(torch.ones(4))
            out.sum().backward()
            assert params["0.lora_B"].grad is not None
    finally:
        torch.distributed.destroy_process_group()


# the base is not what it was


def merge_into(model: nn.Module, adapter: lf.Adapter, params: dict[str, Tensor]) -> None:
    model.load_state_dict(lf.merge(adapter, model, params), strict=False)


SECOND_TIME = r"the weight of 'model\.layers\.0\.self_attn\.q_proj' is not the one .* second time"


def test_a_call_after_a_merge_into_the_base_warns_once():
    model, adapter, params = adapted()
    batch = text_batch()
    adapter(model, params, batch)
    module = lf.bind(adapter, model, params)
    merge_into(model, adapter, params)
    with pytest.warns(UserWarning, match=SECOND_TIME):
        adapter(model, params, batch)
    adapter(model, params, batch)  # known by now; a warning is an error
    with pytest.warns(UserWarning, match=SECOND_TIME):
        module(**batch)
    module(**batch)
    merge_into(model, adapter, trained(params))
    with pytest.warns(UserWarning, match=SECOND_TIME):
        lf.bind(adapter, model, params)


def test_a_merged_copy_warns():
    """A model that the adapter has not seen is checked at the first call."""
    model, adapter, params = adapted()
    merged = copy.deepcopy(model)
    merge_into(merged, adapter, params)
    adapter(model, params, text_batch())
    with pytest.warns(UserWarning, match=SECOND_TIME):
        adapter(merged, params, text_batch())


def test_an_adapter_from_a_file_knows_its_base(tmp_path):
    model, adapter, params = adapted()
    lf.save(tmp_path / "a.safetensors", adapter, params)
    again, same = lf.load(tmp_path / "a.safetensors", model)
    merge_into(model, again, same)
    with pytest.warns(UserWarning, match=SECOND_TIME):
        again(model, same, text_batch())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: model.requires_grad_(False),
        lambda model: model.model.norm.weight.data.add_(1),  # not adapted
    ],
    ids=["half", "bfloat16", "double", "assigned", "copied", "frozen", "another weight"],
)
def test_the_same_weights_do_not_warn(change):
    model, adapter, params = adapted()
    module = lf.bind(adapter, model, params)
    change(model)
    adapter(model, params, text_batch())
    module(**text_batch())


def test_a_bound_module_in_another_dtype_does_not_warn():
    model, adapter, params = adapted()
    module: Any = lf.bind(adapter, model, params)
    for move in (module.half, module.float, module.bfloat16):
        move()(**text_batch())


def test_transforms_and_traces_do_not_look():
    """What runs in a transform may hold other weights on purpose."""
    model, adapter, params = adapted()
    merge_into(model, adapter, params)
    torch.func.grad(lambda p: adapter(model, p, text_batch()).loss)(params)
