"""docs/quantized.md runs as it is pasted, on 4-bit layers of bitsandbytes."""

from __future__ import annotations

from pages import ROOT, run

THEN = """
from bitsandbytes.nn import Linear4bit
packed = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
assert len(packed) == 14 and all(layer.weight.dtype == torch.uint8 for layer in packed)
assert all(grad.isfinite().all() for grad in grads.values())
assert any(grad.any() for grad in grads.values())
"""


def test_the_page_runs(tmp_path, hub):
    run(ROOT / "docs" / "quantized.md", tmp_path, hub, then=THEN)
