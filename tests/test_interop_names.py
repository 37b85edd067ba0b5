"""How PEFT's configs name layers: our reading of them is PEFT's own."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import peft
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import lora_func as lf
from lora_func.interop.peft import names

PATHS = [
    *("q", "q_proj", "lm_head", "layers.0", "model.layers.1.q"),
    *(f"model.layers.{i}.attn.{name}" for i in (0, 1, 11) for name in ("q_proj", "q", "my_q")),
    *(f"model.layers.{i}.experts.{j}.up" for i, j in product((0, 1), (1, 2))),
    *(f"enc.block.{i}.layer.{j}.q" for i, j in product((0, 1), (0, 1))),
]
ENDS = ["q", "q_proj", "up", "attn.q", "layers.1.q", "lm_head", "my_q", "model.layers.1.q", "1.up"]
REGEXES = [r".*\.q", r"model\.layers\.\d+\.attn\.(q|my_q)", "lm_head|q", r".*1\..*"]
named = st.one_of(st.sampled_from(REGEXES), st.lists(st.sampled_from(ENDS), min_size=1, max_size=3))
fields = st.fixed_dictionaries(
    {
        "target_modules": named,
        "exclude_modules": st.none() | named,
        "modules_to_save": st.none() | st.lists(st.sampled_from(["attn", "lm_head", "q"])),
        "layers_to_transform": st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2)),
        "layers_pattern": st.sampled_from([None, [], "layers", ["block", "layers"], ["layer"]]),
    }
)


EVERYWHERE = {"exclude_modules": None, "modules_to_save": None, "layers_pattern": None}


@given(config=fields)
@example(config={**EVERYWHERE, "target_modules": ["up"], "layers_to_transform": [0]})
@example(config={**EVERYWHERE, "target_modules": ["q"], "layers_to_transform": 1})
def test_targets(config: dict[str, Any]):
    theirs = peft.LoraConfig()
    vars(theirs).update(config)  # without the constructor, which refuses some mixtures
    for path in PATHS:
        expected = bool(check_target_module_exists(theirs, path))
        assert names.is_target(config, path) == expected, path


@given(
    keys=st.lists(st.sampled_from([*ENDS, *PATHS, "^q", r"^model\.layers.*q", "q.*"]), unique=True)
)
def test_exceptions(keys: list[str]):
    patterns = dict(zip(keys, range(len(keys))))
    for path in PATHS:
        found = names.exception(patterns, path, anchored=True, usual=None)
        assert found == patterns.get(get_pattern_key(list(patterns), path))
        # C3A and FourierFT have a rule of their own, in their models.
        own = next((key for key in patterns if re.match(rf".*\.{key}$", path)), path)
        assert names.exception(patterns, path, anchored=False, usual=None) == patterns.get(own)


@given(paths=st.lists(st.sampled_from(PATHS), min_size=1, unique=True))
def test_shortest_names(paths: list[str]):
    """They name all of the layers and no other, or are the whole paths."""
    found = names.shortest(paths, PATHS)
    chosen = {path for path in PATHS if names.ends(path, found)}
    assert chosen == set(paths) or found == sorted(paths)


def test_no_regex():
    with pytest.raises(lf.LoraFuncError, match="not a regular expression"):
        names.is_named("(", "q")
