"""docs/functional.md runs as it is pasted, and its numbers fit together."""

from __future__ import annotations

from pages import ROOT, WARNINGS, run

THEN = """
assert features.shape == (3, 64)
assert torch.allclose(by_member.softmax(-1).mean(0), prediction, atol=1e-5)
assert all((leaf >= 1).all() for leaf in precision.values())
assert any((leaf > 1).any() for leaf in precision.values())
assert product.isfinite().all() and product.any()
assert probabilities.shape == (3, 3)
assert epsilon > 0
assert all(leaf.grad.any() for leaf in written.values())
base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3).state_dict()
base.pop("score.weight")  # drawn anew
assert all(torch.equal(model.state_dict()[key], weight.float()) for key, weight in base.items())
"""
OTHERS = (
    "ignore:The Tensor default of the field:FutureWarning",  # of tensordict, in posteriors
)


def test_the_page_runs(tmp_path, hub):
    """Laplace imports torchvision, which may need help to be imported."""
    page, help = ROOT / "docs" / "functional.md", str(ROOT / "tests")
    first = f"import sys; sys.path.append({help!r}); import torchvision_operators"
    run(page, tmp_path, hub, first=first, then=THEN, warnings=(*WARNINGS, *OTHERS))
