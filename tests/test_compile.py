"""torch.compile of an adapted call, on the families that people train: one graph, no break."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from architectures import ARCHITECTURES
from models import trained

import lora_func as lf
from lora_func.libraries.dynamo import TORCH_2_13

FAMILIES = (
    *("llama", "qwen2", "mistral", "gemma3", "gpt2", "gptj", "opt", "phi3"),
    *("bert", "roberta", "electra", "deberta", "deberta_v2", "t5", "bart", "vit"),
)


# Before torch 2.13 dynamo does not trace `inspect.signature(self.method)`, which three of them call
# in a view, and `copy.deepcopy`, which T5 calls without one.
SINCE_2_13 = ("bert", "roberta", "electra", "t5")


def case(name: str):
    fails = pytest.mark.xfail(not TORCH_2_13, reason="needs torch 2.13", strict=True)
    return pytest.param(name, marks=fails if name in SINCE_2_13 else ())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of models, about what they do not compile
@pytest.mark.parametrize("name", [case(name) for name in FAMILIES])
def test_one_graph(name):
    """There is one graph for all parameters. Its output is that of the eager call."""
    torch._dynamo.reset()
    make, batch_of, *_ = ARCHITECTURES[name]
    model, batch = make(), batch_of()
    model.eval().requires_grad_(False)
    if not model.config.is_encoder_decoder:
        batch.pop("labels", None)  # some models log a warning about them, which dynamo cannot trace
    adapter, params = lf.adapt(model, lf.DoRA(r=2))

    def f(params):
        return adapter(model, params, batch)[0]

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for p in (trained(params), trained(params)):
        torch.testing.assert_close(compiled(p), f(p))
    assert counter.frame_count == 1


def test_a_bound_module_is_one_graph():
    """In eval mode too, where it keeps what was prepared outside of a trace."""
    torch._dynamo.reset()
    make, batch_of, *_ = ARCHITECTURES["llama"]
    model, batch = make().eval().requires_grad_(False), batch_of()
    adapter, params = lf.adapt(model, lf.LoRA(r=2))
    bound = lf.bind(adapter, model, trained(params))
    compiled = torch.compile(bound, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch)[0], bound(**batch)[0])
