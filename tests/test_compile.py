"""torch.compile of an adapted call, on the families that people train: one graph, no break."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from architectures import ARCHITECTURES
from models import trained

import lora_func as lf

FAMILIES = (
    *("llama", "qwen2", "mistral", "gemma3", "gpt2", "opt", "phi3"),
    *("bert", "roberta", "electra", "deberta_v2", "t5", "bart", "vit"),
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of models, about what they do not compile
@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph(name):
    """fullgraph, and none more for other parameters; the output is that of the eager call."""
    torch._dynamo.reset()
    make, batch_of, _ = ARCHITECTURES[name]
    model, batch = make().eval().requires_grad_(False), batch_of()
    if not model.config.is_encoder_decoder:
        batch.pop("labels", None)  # for which some models log a warning, which dynamo cannot trace
    adapter, params = lf.adapt(model, lf.DoRA(r=2))

    def f(params):
        return adapter(model, params, batch)[0]

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for p in (trained(params), trained(params)):
        torch.testing.assert_close(compiled(p), f(p))
    assert counter.frame_count == 1
