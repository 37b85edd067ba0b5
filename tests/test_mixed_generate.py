"""`generate` with an adapter for each prompt: token for token what each prompt gives alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from models import VOCABULARY, adapted, tiny_llama, trained
from torch import Tensor, nn
from transformers import GenerationConfig

import lora_func as lf

IDS = torch.tensor([2, 0, 0, 1])
LENGTH = {"min_new_tokens": 6, "max_new_tokens": 6}
BEAMS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "best two of three beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 1},  # alone, so no chance
}


def population(
    variant: lf.Variant, model: Any, **options: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    """Three adapters that differ much, stacked."""
    _, adapter, params = adapted(variant, model, **options)
    return adapter, lf.stack([trained(params, noise=0.5) for _ in range(3)])


def prompts(rows: int = len(IDS)) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, 5))


def one_by_one(
    adapter: lf.Adapter, model: nn.Module, several: dict[str, Tensor], ids: Tensor, options: Any
) -> Tensor:
    """Each prompt alone, through its adapter."""
    own = lf.unstack(several)
    rows = [
        lf.bind(adapter, model, own[int(k)]).generate(row[None], **options)  # pyright: ignore
        for k, row in zip(IDS, ids, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS.keys())
@pytest.mark.parametrize(
    "variant", [lf.LoRA(r=2), lf.DoRA(r=2), lf.HRA(r=2)], ids=lambda variant: variant.name()
)
def test_a_decoder(variant, options):
    model, ids = tiny_llama().double(), prompts()  # float64: no two tokens tie by rounding
    adapter, several = population(variant, model)
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    given = module.generate(ids, **options, **LENGTH)
    assert torch.equal(given, one_by_one(adapter, model, several, ids, {**options, **LENGTH}))
    base = model.generate(ids, **options, **LENGTH)
    assert not torch.equal(given, base)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_and_a_decoder(name):
    """The encoder sees each prompt once, the decoder sees it once for each beam."""
    model: Any = ARCHITECTURES[name][0]().eval().double()
    ids = prompts()
    adapter, several = population(lf.LoRA(r=2), model, targets=lf.Targets(exclude=("lm_head",)))
    assert {path.split(".")[0 if name == "t5" else 1] for path in adapter.targets} == {
        "encoder",
        "decoder",
    }
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    options = {"num_beams": 3, **LENGTH}
    given = module.generate(ids, **options)
    assert torch.equal(given, one_by_one(adapter, model, several, ids, options))


def test_beams_of_a_generation_config():
    """The repeat is what transformers makes of its configs, wherever it is set."""
    model, ids = tiny_llama().double(), prompts()
    adapter, several = population(lf.LoRA(r=2), model)
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    expected = module.generate(ids, num_beams=2, **LENGTH)
    config = GenerationConfig(num_beams=2, **LENGTH)
    assert torch.equal(module.generate(ids, generation_config=config), expected)
    module.generation_config = config
    assert torch.equal(module.generate(ids), expected)


def test_left_padding_and_a_mask():
    model, ids = tiny_llama().double(), prompts()
    adapter, several = population(lf.LoRA(r=2), model)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    given = module.generate(ids, attention_mask=mask, num_beams=2, **LENGTH)
    alone: Any = lf.bind(adapter, model, lf.unstack(several)[IDS[1]])
    expected = alone.generate(ids[1:2, 2:], num_beams=2, **LENGTH)
    assert torch.equal(given[1:2, 5:], expected[:, 3:])


@pytest.mark.parametrize("beams", [1, 4])
def test_one_prompt_is_refused(beams):
    """With as many beams as adapters, each beam would run through another adapter."""
    model = tiny_llama()
    adapter, several = population(lf.LoRA(r=2), model)
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    with pytest.raises(lf.LoraFuncError, match=r"generate got 1 prompts, but .* for 4\. Bind"):
        module.generate(prompts(1), num_beams=beams, **LENGTH)


def test_a_batch_of_beams_is_refused_outside_of_generate():
    """Also after one; the error names the repeat, which then works."""
    model = tiny_llama()
    adapter, several = population(lf.LoRA(r=2), model)
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    module.generate(prompts(), num_beams=3, **LENGTH)
    rows = prompts().repeat_interleave(3, 0)
    for run in (
        lambda: module(rows),
        lambda: adapter(model, lf.select(several, IDS), rows),
    ):
        with pytest.raises(lf.LoraFuncError, match="say each=3 instead of each=1"):
            run()
    adapter(model, lf.select(several, IDS), rows, each=3)


def test_generating_with_different_beams_at_once():
    """Two threads, one module."""
    model, ids = tiny_llama().double(), prompts()
    adapter, several = population(lf.LoRA(r=2), model)
    module: Any = lf.bind(adapter, model, lf.select(several, IDS))
    expected = {k: module.generate(ids, num_beams=k, **LENGTH) for k in (2, 3)}
    found: dict[int, list[Tensor]] = {2: [], 3: []}

    def run(k: int) -> None:
        for _ in range(3):
            found[k].append(module.generate(ids, num_beams=k, **LENGTH))

    threads = [threading.Thread(target=run, args=(k,)) for k in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, runs in found.items():
        assert [torch.equal(run, expected[k]) for run in runs] == [True] * 3
