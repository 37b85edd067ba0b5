"""Folders that PEFT writes, checked by the rules of SGLang's loader."""

from __future__ import annotations

import peft
import pytest
from architectures import ARCHITECTURES
from test_vllm import folder_of

import lora_func as lf
from lora_func.interop import sglang

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


def test_what_sglang_serves(tmp_path):
    folder = folder_of(tmp_path, target_modules=r".*(q_proj|down_proj)", r=6)
    names = {"lora_target_modules": ["down_proj", "q_proj"]}  # it reads no regex
    assert sglang.check(folder) == {"enable_lora": True, "max_lora_rank": 6, **names}


def test_a_pattern_that_changes_nothing(tmp_path):
    patterns = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 8}}
    assert sglang.check(folder_of(tmp_path, **patterns))["max_lora_rank"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"DoRA \(use_dora\)"),
        ({"use_rslora": True}, r"divides alpha by r, and not by its root \(use_rslora\)"),
        (
            {"rank_pattern": {"v_proj": 2}},
            r"one rank .* 'model\.layers\.1\..*v_proj' is not 4\. lf",
        ),
        ({"alpha_pattern": {"v_proj": 2}}, r"one alpha for all layers, .*v_proj' is not 8"),
        ({"modules_to_save": ["lm_head"]}, "takes no whole modules"),
    ],
)
def test_what_sglang_refuses_or_scales_otherwise(fields, message, tmp_path):
    with pytest.raises(lf.LoraFuncError, match=f"SGLang cannot serve '.*': .*{message}"):
        sglang.check(folder_of(tmp_path, **fields))


def test_fused_experts_and_other_methods(tmp_path):
    both = ["experts.gate_up_proj", "experts.down_proj"]
    mixtral = ARCHITECTURES["mixtral"][0]()
    folder = folder_of(tmp_path / "experts", mixtral, target_parameters=both)
    with pytest.raises(lf.LoraFuncError, match="reads no fused experts as PEFT stores them"):
        sglang.check(folder)
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(lf.LoraFuncError, match="'IA3', and SGLang serves LoRA alone"):
        sglang.check(folder_of(tmp_path / "ia3", config=config))
