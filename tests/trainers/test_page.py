"""docs/trainers.md runs as it is pasted, and each of its recipes trains."""

from __future__ import annotations

from pages import ROOT, python, run

PAGE = ROOT / "docs" / "trainers.md"
TRAINS = [
    any(call in block for call in (".train()", ".train(resume", ".fit(", "backward("))
    for block in python(PAGE)
]
AFTER_EACH = (
    'seen = [*globals().get("seen", []), '
    '{key: leaf.detach().clone() for key, leaf in globals().get("params", {}).items()}]'
)
THEN = f"""
trained = [leaves for leaves, trains in zip(seen, {TRAINS}) if trains]
assert len(trained) == 11
# B starts at zero, or in two of them at a file.
assert all(leaf.any() for leaves in trained for leaf in leaves.values())
once, resumed, _, sft, _, dpo, *_ = trained
assert all(torch.equal(once[key], resumed[key]) for key in once)
assert not all(torch.equal(sft[key], dpo[key]) for key in sft)
base = AutoModelForCausalLM.from_pretrained(name).state_dict()
assert all(torch.equal(base[key], weight) for key, weight in model.state_dict().items())
"""


def test_the_page_runs(tmp_path, hub):
    """Trainer, TRL and Lightning warn of settings that the page leaves as they are."""
    run(PAGE, tmp_path, hub, after_each=AFTER_EACH, then=THEN, warnings=())
