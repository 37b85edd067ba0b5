"""Every adapter on 4-bit and 8-bit bases: identity at init, gradients, loss and memory.

The model has the shape of Qwen3-0.6B with fewer layers and random weights. transformers quantizes
it through a BitsAndBytesConfig, as users do, and each adapter learns one batch of random tokens by
heart in 20 steps. `python bench/quantized.py --help`
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

import torch
from common import of_rank, peak_bytes, qwen3, write
from overhead import LAYERS
from transformers import BitsAndBytesConfig, Qwen3ForCausalLM

import lora_func as lf

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
KINDS = {
    "nf4": {**FOUR_BITS, "bnb_4bit_quant_type": "nf4"},
    "fp4": {**FOUR_BITS, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def load(folder: str, kind: str, device: str, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The model in a folder, quantized."""
    options = dict(KINDS[kind])
    if "load_in_4bit" in options:
        options["bnb_4bit_compute_dtype"] = dtype
    return Qwen3ForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map=device, dtype=dtype
    ).requires_grad_(False)


def measure(
    name: str, variant: lf.Variant, kind: str, model, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    targets = lf.Targets(names=(r"\.(q|v|down)_proj$",))
    adapter, params = lf.adapt(model, variant, targets=targets, generator=generator)
    ids = torch.randint(1000, (options.batch, options.tokens), generator=generator)
    ids = ids.to(options.device)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.no_grad():
        identity = (adapter(model, params, batch).logits - model(**batch).logits).abs().max().item()
    leaves = {key: leaf.requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=options.lr)

    def step() -> float:
        optimizer.zero_grad()
        loss = adapter(model, leaves, batch).loss
        loss.backward()
        return loss.item()

    first = last = step()
    norm = sum(leaf.grad.square().sum().item() for leaf in leaves.values()) ** 0.5
    for _ in range(options.steps):
        optimizer.step()
        last = step()
    autograd = {key: leaf.grad.detach() for key, leaf in leaves.items()}
    plain = {key: leaf.detach() for key, leaf in leaves.items()}
    functional = torch.func.grad(lambda p: adapter(model, p, batch).loss)(plain)
    apart = max((functional[key] - autograd[key]).abs().max().item() for key in autograd)
    largest = max(leaf.abs().max().item() for leaf in autograd.values())
    row = {
        "variant": name,
        "base": kind,
        "identity error": identity,
        "gradient norm": norm,
        "loss": first,
        "loss after": last,
        "drop %": 100 * (first - last) / first,
        "mebibytes": peak_bytes(step) / 2**20,
        "torch.func.grad - autograd, relative": apart / largest,
    }
    shown = {key: f"{x:.3g}" if isinstance(x, float) else x for key, x in row.items()}
    print(shown, flush=True)
    return row


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--layers", type=int, default=8 if cuda else 2, help=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4 if cuda else 2)
    parser.add_argument("--tokens", type=int, default=256 if cuda else 32)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    dtype = getattr(torch, options.dtype)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        qwen3(options.layers, "cpu", dtype, vocab_size=options.vocabulary).save_pretrained(folder)
        for kind in KINDS:
            model = load(folder, kind, options.device, dtype)
            for name in ("lora", "pissa", "dora", "delora", "ia3", "ia3ff", "hra"):
                variant = of_rank(name, options.r)
                rows.append(measure(name, variant, kind, model, options))
                write("quantized", rows, settings=vars(options))


if __name__ == "__main__":
    main()
