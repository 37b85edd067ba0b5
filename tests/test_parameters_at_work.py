"""Adapted parameters in training and serving: checkpointing, mixed precision, example axes."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import checkpoint_activations, largest, state_of, trained
from test_experts import SMALL
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import lora_func as lf

LORA, DORA = lf.LoRA(r=2), lf.DoRA(r=2)
MIXED = {
    r"experts\.(gate_up|down)_proj$": LORA,
    r"q_proj$": LORA,
    r"norm\.weight$": lf.Full(),
    r"lm_head$": lf.Full(),
    r"embed_tokens$": LORA,
}
DENSE = {r"experts\.(gate_up|down)_proj$": DORA, r"norm\.weight$": lf.Full()}
over_rules = pytest.mark.parametrize("rules", [MIXED, DENSE], ids=["mixed", "dense"])
IDS = torch.arange(1, 25).reshape(4, 6)
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS, "use_cache": False}


def mixtral(way: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> Any:
    model: Any = MixtralForCausalLM(MixtralConfig(**SMALL))
    model.eval().requires_grad_(False).to(dtype)
    model.config._experts_implementation = way
    return model


def adapted(rules: Any, model: Any = None) -> tuple[Any, lf.Adapter, dict[str, torch.Tensor]]:
    model = mixtral() if model is None else model
    adapter, params = lf.adapt(model, rules)
    return model, adapter, trained(params)


def logits(adapter: lf.Adapter, model: Any, params: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return adapter(model, params, {"input_ids": ids, "use_cache": False}).logits


def grads_of(leaves: dict[str, torch.Tensor]) -> Any:
    return {key: leaf.grad for key, leaf in leaves.items()}


# What a training loop does between a forward and its backward.


def nothing(module: Any) -> None:
    del module


def looks_without_gradients(module: Any) -> None:
    with torch.no_grad():
        module(**BATCH)


def evaluates(module: Any) -> None:
    module.eval()
    looks_without_gradients(module)
    module.train()


def runs_a_part(module: Any) -> None:
    module.model(input_ids=IDS, use_cache=False)


@over_rules
@pytest.mark.parametrize("between", [nothing, looks_without_gradients, evaluates, runs_a_part])
def test_a_backward_that_runs_blocks_again(rules, between):
    """With checkpointing, gradients are those of the forward that they belong to."""
    model, adapter, params = adapted(rules)
    _, wanted = lf.value_and_grad(lambda p: adapter(model, p, BATCH).loss)(params)
    checkpoint_activations(model.train(), use_reentrant=False)
    leaves = {key: leaf.clone() for key, leaf in params.items()}
    module = lf.bind(adapter, model, leaves)
    loss = module(**BATCH).loss
    between(module)
    loss.backward()
    assert largest(grads_of(leaves), wanted) < 1e-6


@over_rules
@pytest.mark.parametrize("before", [nothing, looks_without_gradients, evaluates])
def test_parts_called_one_by_one_and_run_again(rules, before):
    """As a loss in chunks calls them: first the body, then the head."""
    model, adapter, params = adapted(rules)
    _, wanted = lf.value_and_grad(lambda p: adapter(model, p, BATCH).loss)(params)
    checkpoint_activations(model.train(), use_reentrant=False)
    leaves = {key: leaf.clone() for key, leaf in params.items()}
    module = lf.bind(adapter, model, leaves)
    before(module)
    hidden = module.model(input_ids=IDS, use_cache=False).last_hidden_state
    out = module.lm_head(hidden)[:, :-1]
    F.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert largest(grads_of(leaves), wanted) < 1e-6


@over_rules
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_lower_precision(rules, way):
    """In bf16 and under autocast, gradients of float32 leaves are those of float32, rounded."""
    model, adapter, params = adapted(rules, mixtral(way))
    loss = lambda p: adapter(model, p, BATCH).loss  # noqa: E731
    expected, wanted = lf.value_and_grad(loss)(params)
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = lf.value_and_grad(loss)(params)
    model.bfloat16()
    low, lows = lf.value_and_grad(loss)(params)
    scale = max(leaf.abs().max() for leaf in wanted.values())
    for given, own in ((value, grads), (low, lows)):
        torch.testing.assert_close(given, expected, rtol=1e-2, atol=0)
        assert largest(own, wanted) < 0.05 * scale  # bfloat16 has 8 bits
        assert all(leaf.dtype == torch.float32 for leaf in own.values())


def test_a_bound_view_has_the_dtype_of_its_model():
    """Models take that of their first parameter for their own."""
    model, adapter, params = adapted(MIXED, mixtral(dtype=torch.bfloat16))
    assert lf.bind(adapter, model, params).dtype == model.dtype


@over_rules
def test_a_bound_view_is_pickled(rules):
    model, adapter, params = adapted(rules)
    module = lf.bind(adapter, model, params)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(**BATCH).logits, module(**BATCH).logits)
    assert type(again.model.norm).__module__ == type(model.model.norm).__module__


@over_rules
def test_an_average_of_bound_views(rules):
    model, adapter, params = adapted(rules)
    module = lf.bind(adapter, model, params)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(module)
    middle = {key: 1.5 * leaf.detach() for key, leaf in params.items()}
    with torch.no_grad():
        for leaf in params.values():
            leaf.mul_(2)
    average.update_parameters(module)
    out = average(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(out, logits(adapter, model, middle))


def test_a_bound_view_that_loses_a_block():
    """As for early exits. What is gone is neither looked for nor an error."""
    model, adapter, params = adapted({r"experts": LORA, "q_proj": LORA})
    module = lf.bind(adapter, model, params)
    module(**BATCH)
    module.model.layers = module.model.layers[:1]
    merged = copy.deepcopy(model)
    merged.load_state_dict(lf.merge(adapter, model, params), strict=False)
    merged.model.layers = merged.model.layers[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parameters that are gone are read no more
        out = module(**BATCH).logits
    torch.testing.assert_close(out, merged(**BATCH).logits)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch, for the router
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_gradients_of_each_example(way):
    model, adapter, params = adapted(MIXED, mixtral(way))

    def loss(params, ids):
        return logits(adapter, model, params, ids[None]).square().mean()

    with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for vmap
        together = vmap(grad(loss), (None, 0))(params, IDS)
    for ids, *leaves in zip(IDS, *together.values()):
        alone = grad(loss)(params, ids)
        assert largest(dict(zip(together, leaves)), alone) < 1e-5


def gpt_oss() -> Any:
    model = GptOssForCausalLM(GptOssConfig(**SMALL)).eval().requires_grad_(False)
    for parameter in model.parameters():  # biases start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
@pytest.mark.parametrize("own", ["gate_up_proj.lora_A", "down_proj.lora_B", "layers.1"])
@pytest.mark.parametrize("rest", [{}, {r"down_proj_bias|gate_up_proj_bias": lf.Full()}])
def test_examples_that_share_some_experts(way, own, rest):
    """Stacks and biases without an example axis, beside others of their module that have one."""
    model = gpt_oss()
    model.config._experts_implementation = way
    model, adapter, params = adapted({r"(gate_up|down)_proj$": LORA, **rest}, model)
    several = [trained(params) for _ in IDS]
    with_axis = [key for key in params if own in key and "bias" not in key]
    mixed = {**params, **{key: lf.stack(several)[key] for key in with_axis}}
    out = logits(adapter, model, mixed)
    bound = lf.bind(adapter, model, mixed)(input_ids=IDS, use_cache=False).logits
    for ids, one, rows, others in zip(IDS, several, out, bound):
        alone = {**params, **{key: one[key] for key in with_axis}}
        torch.testing.assert_close(rows, logits(adapter, model, alone, ids[None])[0])
        torch.testing.assert_close(others, rows)


def test_examples_beside_a_dense_change():
    """One stack with an example axis, the other of a variant without factors."""
    model, adapter, params = adapted({r"gate_up_proj$": LORA, r"down_proj$": DORA})
    several = [trained(params) for _ in IDS]
    with_axis = [key for key in params if "gate_up" in key]
    stacked = lf.stack(several)
    loss = lambda p: logits(adapter, model, p).square().mean(-1).mean(-1)  # noqa: E731
    mixed = {key: stacked[key] if key in with_axis else leaf for key, leaf in params.items()}
    values, grads = lf.value_and_grad(lambda p: loss(p).sum())(mixed)
    assert values.isfinite()
    for i, (ids, one) in enumerate(zip(IDS, several)):
        alone = {**params, **{key: one[key] for key in with_axis}}
        _, wanted = lf.value_and_grad(
            lambda p, ids=ids: logits(adapter, model, p, ids[None]).square().mean()
        )(alone)
        own = {key: grads[key][i] for key in with_axis}
        assert largest(own, {key: wanted[key] for key in with_axis}) < 1e-5


def test_several_adapters_on_one_model_in_threads():
    model, wrong = mixtral(), []
    before = state_of(model)
    pairs = [adapted(rules, model)[1:] for rules in (MIXED, DENSE, {"embed_tokens": DORA})]
    expected = [logits(adapter, model, params) for adapter, params in pairs]

    def run(start: int) -> None:
        for i in range(6):
            adapter, params = pairs[(start + i) % 3]
            out = logits(adapter, model, params)
            wrong.extend([start] * (not torch.allclose(out, expected[(start + i) % 3], atol=1e-6)))

    threads = [threading.Thread(target=run, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_saved_and_loaded(tmp_path, dtype):
    """Weights of every kind go through `save_pretrained` and come back as they were."""
    model, adapter, params = adapted(MIXED, mixtral(dtype=dtype))
    merged = copy.deepcopy(model)
    merged.load_state_dict(lf.merge(adapter, model, params), strict=False)
    merged.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    out, given = logits(adapter, model, params), again(input_ids=IDS, use_cache=False).logits
    tolerance = {} if dtype == torch.float32 else {"rtol": 0, "atol": 0.08}  # of logits up to 2
    torch.testing.assert_close(given, out, **tolerance)
    assert not torch.allclose(given, model(input_ids=IDS).logits, rtol=0, atol=0.1)


def test_calibration_of_layers_beside_parameters():
    """Layers start from data; what has no layer starts without."""
    rules = {"q_proj": lf.EVA(r=2), "experts": LORA, r"norm\.weight": lf.Full()}
    model = mixtral()
    adapter, params = lf.adapt(model, rules, calibration=[BATCH])
    assert len(adapter.targets) == 2 + 4 + 5
    found = lf.probe(adapter, model, trained(params), BATCH)
    assert (found.inert, found.dead, found.base_unchanged) == ((), (), True)
