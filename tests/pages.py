"""README and docs as programs: each page runs as it is pasted, in a process of its own.

Nothing is injected. A hub cache with tiny models of the real architectures stands in for the
download alone, so `from_pretrained(name)` is transformers' own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.S | re.M)
ELSEWHERE = ("trainers.md", "functional.md", "quantized.md")  # in folders with those packages

# All but a few warnings are errors.
WARNINGS = (
    "error",
    "ignore:`torch.jit.script",  # torch's own forward-mode derivatives
    "ignore:`gradient_checkpointing_enable:FutureWarning",  # the name of transformers 5.2
    "ignore:`gradient_checkpointing_disable:FutureWarning",
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (LlamaConfig, LlamaForCausalLM),
    "Qwen/Qwen3-0.6B": (Qwen3Config, Qwen3ForCausalLM),
}
REVISION = "0" * 40


def python(page: Path) -> list[str]:
    """The Python blocks of a page."""
    found = FENCED.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language == "python"]


def program(page: Path, first: str = "", after_each: str = "") -> str:
    """The Python blocks of a page, each on its own lines: a traceback names lines of the page.

    `first` and `after_each` are lines of a test, in the place of the title and of each block's end.
    """
    text, lines = page.read_text(encoding="utf-8"), [first]
    for found in FENCED.finditer(text):
        if found[1] == "python":
            lines += [""] * (text.count("\n", 0, found.start(2)) - len(lines))
            lines += [*found[2].splitlines(), after_each]
    return "\n".join(lines) + "\n"


def run(
    page: Path,
    folder: Path,
    hub: Path,
    *,
    first: str = "",
    after_each: str = "",
    then: str = "",
    warnings: Sequence[str] = WARNINGS,
) -> None:
    """Runs a page in an empty folder, and then what a test asserts of its names."""
    path = folder / page.name
    path.write_text(program(page, first, after_each) + then, encoding="utf-8")
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_CACHE": str(hub / "hub")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    filters = [word for given in warnings for word in ("-W", given)]
    process = subprocess.run(
        [sys.executable, *filters, path.name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert process.returncode == 0, process.stderr


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and the special tokens of SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    letters.decoder = ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def fill(cache: Path) -> None:
    """Writes tiny models under the names of real ones, in the layout of huggingface_hub."""
    words = tokenizer()
    for name, (config, kind) in HUB.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION, encoding="utf-8")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind(config(vocab_size=len(words), **TINY))
        snapshot = folder / "snapshots" / REVISION
        model.bfloat16().save_pretrained(snapshot)  # as the real ones are stored
        words.save_pretrained(snapshot)
