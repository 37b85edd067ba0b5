"""Files by older versions are read forever.

tests/golden/format1 holds one file for each variant, written at commit 581b3d8, with the base model
and the outputs at that time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_func as lf

FORMAT1 = Path(__file__).parent / "golden" / "format1"
EXPECTED = load_file(FORMAT1 / "expected.safetensors")


def base() -> nn.Module:
    layers = nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.GELU(), nn.Linear(16, 4)
    model = nn.Sequential(*layers)
    model.load_state_dict(load_file(FORMAT1 / "base.safetensors"))
    return model


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"x"}))
def test_format_1(name):
    """A file loads without a warning, and gives the outputs that it gave when it was written."""
    model = base()
    adapter, params = lf.load(FORMAT1 / f"{name}.safetensors", model, check_base="error")
    torch.testing.assert_close(adapter(model, params, EXPECTED["x"]), EXPECTED[name])


def test_every_variant_of_that_time_is_there():
    assert len(EXPECTED) == 1 + 19 + 2  # the input; the variants; a mixture, and a rebuilt file


def test_a_field_that_was_renamed_since():
    """DeLoRA's `init` is `start` now, and read from a file without a warning."""
    adapter, _ = lf.load(FORMAT1 / "delora.safetensors", base())
    assert set(adapter.variants.values()) == {lf.DeLoRA(r=2, lambda0=2.0, start="paper")}


def test_written_again_it_is_the_same(tmp_path):
    """An adapter of an old file, saved and loaded, is the same adapter."""
    model = base()
    for file in FORMAT1.glob("*.safetensors"):
        if file.stem not in ("base", "expected"):
            adapter, params = lf.load(file, model)
            lf.save(tmp_path / file.name, adapter, params)
            again, loaded = lf.load(tmp_path / file.name, model, check_base="error")
            assert dict(again.variants) == dict(adapter.variants)
            assert all(torch.equal(loaded[key], leaf) for key, leaf in params.items())
