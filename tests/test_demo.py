"""The demo: its data, its command line, and a short run on the embedded model."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
from importlib import metadata

import pytest
import tokenizers
import torch
import tyro
from models import tiny_llama
from transformers import PreTrainedTokenizerFast

import lora_func as lf
from lora_func.demo import data
from lora_func.demo.__main__ import TRAINABLE, Demo, answered, encode, main, variant_of
from lora_func.demo.model import embedded, gguf_file


def test_any_variant_of_the_catalogue():
    """The demo builds every variant that trains, with the rank times the width of its card."""
    assert set(TRAINABLE) == lf.VARIANTS.keys() - {"ssteer", "loftq"}
    for name in TRAINABLE:
        variant = variant_of(Demo(variant=name, r=4))
        assert variant.name() == name
        assert getattr(variant, "r", None) in (None, 4 * variant.card.width)


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Demo, args=["--help"], console_outputs=True)
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for field in dataclasses.fields(Demo):
        option = re.search(rf"--{field.name.replace('_', '-')} (.*?)(?= --|$)", text)
        assert option is not None
        assert re.search(r"\w+ \w+.*\.", option[1])  # a sentence, and not the name alone


def test_word_problems_are_right_and_repeat():
    """Every equation in an answer holds, the last result is the answer, and the seed decides."""
    problems = data.word_problems(200, seed=3)
    assert problems == data.word_problems(200, seed=3)
    assert problems != data.word_problems(200, seed=4)
    assert len({problem.question for problem in problems}) > 150
    for problem in problems:
        equations = re.findall(r"(\d+) ([*+-]) (\d+) = \$?(-?\d+)", problem.answer)
        assert equations
        for a, sign, b, result in equations:
            apply = {"*": operator.mul, "+": operator.add, "-": operator.sub}[sign]
            assert apply(int(a), int(b)) == int(result)
        assert problem.answer.endswith(f"#### {equations[-1][-1]}")
        assert int(equations[-1][-1]) >= 0


def test_examples_from_a_folder(tmp_path):
    lines = [json.dumps({"question": f"q{i}", "answer": f"a{i}"}) for i in range(10)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    train, held_out, source = data.find_examples(tmp_path, 20, 3, seed=0)
    assert {example.question for example in train} == {f"q{i}" for i in range(7)}
    assert [example.answer for example in held_out] == ["a7", "a8", "a9"]
    assert source == str(tmp_path)
    (tmp_path / "test.jsonl").write_text(lines[0])
    assert len(data.find_examples(tmp_path, 20, 3, seed=0)[0]) == 10


def test_the_format_of_gsm8k(gsm8k):
    """The real files: a question, and an answer that ends in its number after ####."""
    train, held_out, source = data.find_examples(gsm8k, 50, 10, seed=0)
    assert (len(train), len(held_out), source) == (50, 10, str(gsm8k))
    for example in (*train, *held_out):
        assert example.question
        assert re.search(r"#### -?[\d,.]+$", example.answer)
    assert not {example.question for example in train} & {example.question for example in held_out}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file '.*train.jsonl'; expected JSON lines with 'question' and"),
        (
            '{"question": "q", "answer": "a"}\nnope',
            r"train.jsonl:2: expected an object with 'question' and 'answer'",
        ),
        ('{"question": "q"}', r"train.jsonl:1: expected an object"),
        ("", "too few examples to train on and to hold 2 out"),
    ],
)
def test_bad_data(tmp_path, content, message):
    if content is not None:
        (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(lf.LoraFuncError, match=message):
        data.find_examples(tmp_path, 4, 2, seed=0)


def test_without_a_folder_and_without_the_hub(monkeypatch, capsys):
    """The demo says that the hub did not answer, and why, and generates word problems."""

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(data.HfApi, "dataset_info", no_network)
    train, held_out, source = data.find_examples(None, 6, 2, seed=0)
    assert (len(train), len(held_out)) == (6, 2)
    made = "word problems made by lora_func (the hub did not answer; --data takes a folder"
    assert made in source
    assert "the hub did not answer (OSError: no network)" in capsys.readouterr().out


class Characters:
    """A tokenizer that makes a token of every character."""

    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})


def test_questions_that_leave_no_room_for_an_answer(capsys):
    """A loss over no label is NaN. The demo leaves such examples out, and needs one other."""
    short, long = data.Example("2+2?", "4"), data.Example("a question without end", "yes")
    assert answered(Characters(), [short, long], 30) == [short]
    assert "left out 1 of 2: the question alone fills 30 tokens" in capsys.readouterr().out
    with pytest.raises(lf.LoraFuncError, match="length=10 cuts off the answer of every example"):
        answered(Characters(), [short, long], 10)


def test_a_model_in_a_gguf_file(tmp_path):
    """A model is found by its file, or by a folder that holds one such file and no config."""
    file = embedded()
    assert gguf_file(file) == file
    (tmp_path / "model.gguf").symlink_to(file)
    assert gguf_file(tmp_path) == tmp_path / "model.gguf"
    (tmp_path / "config.json").write_text("{}")
    assert gguf_file(tmp_path) is None
    assert gguf_file(tmp_path / "HuggingFaceTB" / "SmolLM2-135M") is None
    with pytest.raises(lf.LoraFuncError, match=r"there is no file '.*none.gguf'"):
        gguf_file(tmp_path / "none.gguf")
    (tmp_path / "config.json").unlink()
    (tmp_path / "other.gguf").symlink_to(file)
    with pytest.raises(lf.LoraFuncError, match=r"several GGUF files, .*; name one of them"):
        gguf_file(tmp_path)


def test_the_loss_is_on_the_answers():
    examples = [data.Example("2+2?", "4"), data.Example("and a longer one?", "yes")]
    batch = encode(Characters(), examples, length=37)
    assert batch["input_ids"].shape == (2, 37)
    text = ["".join(chr(i) for i in row[row != -100].tolist()) for row in batch["labels"]]
    assert text == ["4\x01", "y"]  # the second is cut
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([25, 37]))


def test_a_short_run_on_the_real_model(tmp_path, capsys):
    """Three steps on SmolLM2-135M-Instruct write every file, and leave the base as it was."""
    problems = data.word_problems(40, seed=0)
    lines = [json.dumps(dataclasses.asdict(problem)) for problem in problems]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    demo = Demo(
        variant="dora",
        steps=3,
        batch_size=2,
        length=96,
        held_out=2,
        data=tmp_path,
        device="cpu",
        out=out,
    )
    result = main(demo)
    assert result == json.loads((out / "result.json").read_text())
    assert result["base unchanged"] is True
    assert result["identity error"] == result["reload error"] == 0
    q_proj, v_proj = 8 * (576 + 576) + 576, 8 * (576 + 192) + 192  # A, B and magnitudes
    assert (result["targets"], result["trainable"]) == (60, 30 * (q_proj + v_proj))
    assert result["loss after"] < result["loss before"]
    assert len(result["losses"]) == 3
    assert result["completion before"]
    written = sorted(file.name for file in out.iterdir())
    assert written == ["adapter.safetensors", "loss.png", "report.md", "result.json"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert "| base unchanged      | True" in report
    assert result["question"] in report
    assert "loss after" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny model whose tokens are characters, and with questions to train on."""
    letters = {c: i for i, c in enumerate(sorted({*"Question:\nAnswer 0123456789+?~"}))}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="~").save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    lines = [json.dumps({"question": f"{i}+1?", "answer": f"{i + 1}"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def short(folder, **options) -> Demo:
    """A run on the tiny model, of two steps."""
    small = {"steps": 2, "batch_size": 2, "held_out": 2, "length": 40, "device": "cpu"}
    paths = {"model": str(folder), "data": folder, "out": folder / "out"}
    return Demo(**{**small, **paths, **options})


def test_a_run_from_a_source_tree(folder, monkeypatch):
    """The report needs no metadata of an installed lora_func."""
    version = metadata.version

    def not_installed(name):
        if name in ("lora_func", "lora-func"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert main(short(folder))["ran on"]["lora_func"] == lf.__version__


@pytest.mark.parametrize("cut", ["train", "test"])
def test_a_run_whose_answers_are_all_cut_off(folder, cut):
    """It stops before training: a loss over no label is NaN."""
    lines = (folder / "train.jsonl").read_text()
    (folder / "test.jsonl").write_text(lines)
    (folder / f"{cut}.jsonl").write_text(lines.replace("?", "?" * 40))
    with pytest.raises(lf.LoraFuncError, match="length=40 cuts off the answer of every example"):
        main(short(folder))
    assert not (folder / "out").exists()
