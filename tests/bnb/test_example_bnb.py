"""The example of QLoRA runs as it stands, and its page is what it prints."""

from __future__ import annotations

import render


def test_qlora(tmp_path):
    path = render.SCRIPTS["qlora"]
    run = render.run(path, tmp_path)
    assert run.returncode == 0, run.stderr
    expected = render.output_of(path.with_suffix(".md").read_text(encoding="utf-8"))
    assert run.stdout.splitlines()[0] == expected.splitlines()[0]
