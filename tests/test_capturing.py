"""A captured step is the eager step; what cannot be captured says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import text_batch, tiny_llama

import lora_func as lf

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


class Training:
    """A small model, an adapter's leaves, and a step of AdamW on them."""

    def __init__(self, device: str, variant: lf.Variant) -> None:
        torch.manual_seed(0)
        self.model = tiny_llama().to(device)
        self.adapter, params = lf.adapt(
            self.model, variant, generator=torch.Generator().manual_seed(0)
        )
        self.leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
        self.lr = torch.tensor(1e-2, device=device)
        self.optimizer = torch.optim.AdamW(
            self.leaves.values(), lr=self.lr, capturable=device == "cuda"
        )

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = self.adapter(self.model, self.leaves, batch).loss
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "tokens": batch["input_ids"].numel()}


def batches(device: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one shape with different tokens."""
    like = text_batch()
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 50, like["input_ids"].shape, generator=generator)
        made.append({"input_ids": ids.to(device), "labels": ids.to(device)})
    return made


@pytest.mark.parametrize("variant", [lf.LoRA(r=4), lf.DoRA(r=4), lf.HRA(r=4)], ids=repr)
@pytest.mark.parametrize("device", DEVICES)
def test_each_call_is_one_eager_step(device, variant):
    eager, own = Training(device, variant), Training(device, variant)
    data = batches(device, 7)
    captured = lf.capture(own.step, data[0])
    for i, batch in enumerate(data):
        expected, found = eager.step(batch), captured(batch)
        exact = i < 3 or device == "cpu"  # in a recording, cuBLAS may choose other kernels
        close: dict[str, Any] = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found["loss"], expected["loss"].detach(), **close)
        assert not found["loss"].requires_grad
        assert found["tokens"] == expected["tokens"]
        for key in eager.leaves:
            torch.testing.assert_close(own.leaves[key], eager.leaves[key], **close)
        eager.lr.mul_(0.5)  # a schedule
        own.lr.mul_(0.5)
    assert captured.recorded == (device == "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_kept(device):
    """A replay writes to the same memory; what a call has returned stays."""
    own = Training(device, lf.LoRA(r=4))
    captured = lf.capture(own.step, batches(device, 1)[0])
    found = [captured(batch)["loss"] for batch in batches(device, 6)]
    values = [loss.item() for loss in found]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "labels": b["labels"][:, :-1]}, r"batch\['labels'\] is int64 .*pad the"),
        (lambda b: {**b, "input_ids": b["input_ids"].int()}, r"batch\['input_ids'\] is int32"),
        (lambda b: {"input_ids": b["input_ids"]}, "the batch has the structure"),
        (lambda b: {**b, "labels": 3}, r"batch\['labels'\] is 3, and in the example it is int64"),
    ],
)
def test_other_batches_are_refused_and_change_nothing(device, change, message):
    own = Training(device, lf.LoRA(r=4))
    batch = batches(device, 1)[0]
    captured = lf.capture(own.step, batch)
    for _ in range(5):
        captured(batch)
    before = {key: leaf.clone() for key, leaf in own.leaves.items()}
    with pytest.raises(lf.LoraFuncError, match=message):
        captured(change(batch))
    assert all(torch.equal(own.leaves[key], leaf) for key, leaf in before.items())


def test_the_example_holds_tensors():
    with pytest.raises(lf.LoraFuncError, match=r"must hold tensors, all on one device.*none"):
        lf.capture(lambda batch: batch, {"text": "a"})


@CUDA
def test_a_step_that_waits_for_the_gpu_says_so():
    own = Training("cuda", lf.LoRA(r=4))
    captured = lf.capture(lambda batch: own.step(batch)["loss"].item(), batches("cuda", 1)[0])
    for batch in batches("cuda", 3):
        captured(batch)
    with pytest.raises(lf.LoraFuncError, match=r"waits for the GPU, as \.item\(\)"):
        captured(batches("cuda", 1)[0])
    assert torch.isfinite(own.step(batches("cuda", 1)[0])["loss"])  # the GPU is still there


@CUDA
def test_an_optimizer_that_counts_on_the_cpu_says_so():
    own = Training("cuda", lf.LoRA(r=4))
    own.optimizer = torch.optim.AdamW(own.leaves.values(), lr=1e-3)
    captured = lf.capture(own.step, batches("cuda", 1)[0])
    for batch in batches("cuda", 3):
        captured(batch)
    with pytest.raises(lf.LoraFuncError, match="give it capturable=True"):
        captured(batches("cuda", 1)[0])


@CUDA
def test_a_batch_elsewhere_than_the_model_says_so():
    own = Training("cuda", lf.LoRA(r=4))

    def step(batch):
        return own.step({name: t.cuda() for name, t in batch.items()})

    with pytest.raises(lf.LoraFuncError, match="give capture a batch on the GPU"):
        lf.capture(step, batches("cpu", 1)[0])(batches("cpu", 1)[0])
