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
from lora_func.demo import report as pages
from lora_func.demo.__main__ import TRAINABLE, Demo, main, variant_of
from lora_func.demo.answers import answered, encode, solution, solve, wilson
from lora_func.demo.model import embedded, gguf_file
from lora_func.demo.training import rates_around


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
    assert len({problem.question for problem in problems}) == 200  # none is trained on and held out
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
    train, held_out, source = data.find_examples(str(tmp_path), 20, 3, seed=0)
    assert {example.question for example in train} == {f"q{i}" for i in range(7)}
    assert [example.answer for example in held_out] == ["a7", "a8", "a9"]
    assert source == str(tmp_path)
    (tmp_path / "test.jsonl").write_text(lines[0])
    assert len(data.find_examples(str(tmp_path), 20, 3, seed=0)[0]) == 10


def test_the_format_of_gsm8k(gsm8k):
    """The real files: a question, and an answer that ends in its number after ####."""
    train, held_out, source = data.find_examples(str(gsm8k), 50, 10, seed=0)
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
        data.find_examples(str(tmp_path), 4, 2, seed=0)


def test_generated_problems_and_a_hub_that_does_not_answer(monkeypatch):
    """Nothing is asked of the hub unless it is named; then the error says what happened."""

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(data.HfApi, "dataset_info", no_network)
    train, held_out, source = data.find_examples("generated", 6, 2, seed=0)
    assert (len(train), len(held_out), source) == (6, 2, "word problems made by lora_func")
    with pytest.raises(lf.LoraFuncError, match=r"the hub did not answer \(OSError: no network\)"):
        data.find_examples("openai/gsm8k", 6, 2, seed=0)


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
        data=str(tmp_path),
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
    held_out = result["held-out losses"]
    assert [step for step, _ in held_out] == [0, 1, 2, 3]
    assert (held_out[0][1], held_out[-1][1]) == (result["loss before"], result["loss after"])
    assert [one["question"] for one in result["samples"]] == [p.question for p in problems[-2:]]
    for when in ("before", "after"):
        right = [one[when]["right"] for one in result["samples"]]
        assert result[f"exact match {when}"] | {"interval": 0} == {
            "right": sum(right),
            "of": 2,
            "interval": 0,
        }
    written = sorted(file.name for file in out.iterdir())
    assert written == ["adapter.safetensors", "loss.png", "report.md", "result.json"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert "| base unchanged      | True" in report
    assert all(one["question"] in report for one in result["samples"])
    assert "Exact match " in report
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
    paths = {"model": str(folder), "data": str(folder), "out": folder / "out"}
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


def test_several_learning_rates_in_one_pass(folder):
    """Each member ends where it would end alone. The page shows them all, and one in detail."""
    together = main(short(folder, rates=3, lr=0.1))
    found = together["losses by learning rate"]
    assert [lr for lr, _ in found] == pytest.approx([0.1 * 10**x for x in (-0.5, 0, 0.5)])
    assert together["learning rate"] == found[1][0]
    for lr, loss in found:
        alone = main(short(folder, rates=1, lr=lr, out=folder / "alone"))
        assert alone["loss after"] == pytest.approx(loss, abs=1e-5)  # float32, other kernels
        assert alone["losses by learning rate"] == [[lr, alone["loss after"]]]
    assert len({round(loss, 4) for _, loss in found}) == 3  # the rates do act
    page = (folder / "out" / "report.md").read_text()
    assert "3 adapters trained in one pass" in page
    assert f"| {found[2][0]:.2g}" in page
    assert "adapters trained" not in (folder / "alone" / "report.md").read_text()


def test_no_learning_rate(folder):
    with pytest.raises(lf.LoraFuncError, match="rates=0: expected the number of learning rates"):
        main(short(folder, rates=0))


def test_rates_around_a_rate():
    assert rates_around(0.5, 1) == [0.5]
    eight = rates_around(1e-3, 8)
    assert eight[4] == 1e-3
    assert (eight[0], eight[-1]) == pytest.approx((1e-5, 10**-1.5))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7 * 5 = $35.\n#### 15", "15"),
        ("#### 1,024\nQuestion: 3", "1024"),
        ("10.\n\nThe answer is: 12.", "12"),
        ("24 - 30 = -6", "-6"),
        (" yes\n", "yes"),
        ("####", "####"),
    ],
)
def test_what_counts_as_the_solution(text, number):
    assert solution(text) == number


def test_wilson():
    """The values of statsmodels.stats.proportion.proportion_confint(method="wilson")."""
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)


def test_a_batch_is_answered_as_each_question_alone(folder):
    """Padding on the left changes no completion, and a true answer counts as right."""
    model, tokenizer = tiny_llama(), PreTrainedTokenizerFast.from_pretrained(folder)
    examples = [data.Example(q, "1") for q in ("1+1?", "a question: 1+1?")]
    together = solve(model, tokenizer, examples)
    assert together.right == [solution(text) == "1" for text in together.completions]
    for example, completion in zip(examples, together.completions):
        assert solve(model, tokenizer, [example]).completions == [completion]


def test_a_verdict_says_plainly_what_happened():
    def verdict(before: int, after: int) -> str:
        exact = [{"right": n, "of": 32, "interval": wilson(n, 32)} for n in (before, after)]
        return pages.verdict(dict(zip(pages.EXACT, exact)))

    assert verdict(0, 20).startswith("Exact match improved: 0 before training and 20 after, of 32")
    assert "rose, but the intervals overlap" in verdict(3, 5)
    assert "did not improve" in verdict(3, 3)
    assert "did not improve" in verdict(3, 1)


def test_a_sample_has_a_tick_or_a_cross():
    each = {"before": ("1", False), "after": ("2\n#### 2", True)}
    marked = {when: {"completion": c, "right": r} for when, (c, r) in each.items()}
    text = pages.sample({"question": "1+1?", "answer": "2", **marked})
    assert "\u2717 before:\n\n> 1" in text
    assert "\u2713 after:\n\n> 2\n> #### 2" in text
