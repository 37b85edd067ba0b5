"""How much of each model the default targets reach, and how much the named ones do.

The models have the sizes of their default configurations in transformers and no weights, so it runs
anywhere in a minute. `python bench/reach.py`
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from common import write
from tqdm import tqdm

import lora_func as lf

ATTENTION = r"\.[qkvo]_proj$"
EXPERTS = r"experts\.(gate_up|down)_proj$"
LINEAR = "."  # every linear layer, but for heads
# Model class, its configuration, fields of that, names, parameters.
MODELS: tuple[tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...]], ...] = (
    ("LlamaForCausalLM", "LlamaConfig", {}, (LINEAR,), ()),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {}, (LINEAR, r"embed_tokens$"), ()),
    ("GPT2LMHeadModel", "GPT2Config", {}, (LINEAR,), ()),
    ("MixtralForCausalLM", "MixtralConfig", {}, (ATTENTION,), (EXPERTS,)),
    (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {  # of Qwen3-30B-A3B
            "vocab_size": 151936,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        (ATTENTION,),
        (EXPERTS,),
    ),
    ("GptOssForCausalLM", "GptOssConfig", {}, (ATTENTION,), (EXPERTS,)),
    ("DeepseekV3ForCausalLM", "DeepseekV3Config", {}, (LINEAR,), (EXPERTS,)),
    ("OlmoeForCausalLM", "OlmoeConfig", {}, (ATTENTION,), (EXPERTS,)),
    ("Llama4ForCausalLM", "Llama4TextConfig", {}, (ATTENTION,), (EXPERTS,)),
    ("GraniteMoeForCausalLM", "GraniteMoeConfig", {}, (ATTENTION,), (EXPERTS,)),
    ("JambaForCausalLM", "JambaConfig", {}, (ATTENTION, "in_proj", "x_proj"), (EXPERTS,)),
    ("Mamba2ForCausalLM", "Mamba2Config", {}, ("in_proj", "out_proj"), ()),
    ("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {}, (LINEAR,), (r"gate_weight$",)),
    ("BertForSequenceClassification", "BertConfig", {}, (LINEAR, "classifier"), ()),
    ("T5ForConditionalGeneration", "T5Config", {}, (LINEAR, "shared"), ()),
    ("WhisperForConditionalGeneration", "WhisperConfig", {}, (LINEAR, r"conv\d$"), ()),
    ("CLIPModel", "CLIPConfig", {}, (LINEAR, "patch_embedding"), ()),
    (
        "SiglipModel",
        "SiglipConfig",
        {},
        (r"layers.*proj$", r"fc\d$"),
        (r"attention.*proj.*weight$",),
    ),
    ("ViTForImageClassification", "ViTConfig", {}, (LINEAR, r"projection$"), ()),
    ("ConvNextForImageClassification", "ConvNextConfig", {}, (LINEAR, "dwconv"), ()),
    ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {}, (LINEAR,), ()),
)


def main() -> None:
    rows = []
    for name, config, fields, names, parameters in tqdm(MODELS):
        with torch.device("meta"):
            kind: Any = getattr(transformers, name)
            model = kind(getattr(transformers, config)(**fields))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            default = lf.reach(model)
            named = lf.reach(model, lf.Targets(names=names, parameters=parameters))
        rows.append(
            {
                "model": name,
                "parameters": default.parameters,
                "default": default.share,
                "names": names,
                "named parameters": parameters,
                "named": named.share,
            }
        )
    write("reach", rows, settings={"sizes": "of the default configurations"})


if __name__ == "__main__":
    main()
