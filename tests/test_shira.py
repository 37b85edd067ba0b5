"""`SHiRA`: where its positions are, and that the update is there and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import over

import lora_func as lf
from lora_func.variants._sparse import distinct


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (64, 64)])
def test_positions(shape):
    """r (d_in + d_out) different ones, row by row, as PEFT has them; drawn by the seed."""
    variant, weight = lf.SHiRA(r=4), lf.Weight(torch.randn(shape))
    first, second = (variant.init(weight, torch.Generator().manual_seed(3)) for _ in range(2))
    rows, cols = first.frozen["rows"], first.frozen["cols"]
    flat = rows.long() * shape[1] + cols
    assert len(flat) == 4 * sum(shape)
    assert (flat.diff() > 0).all()
    assert cols.max() < shape[1]
    assert rows.max() < shape[0]
    assert all(torch.equal(second.frozen[name], t) for name, t in first.frozen.items())


def test_every_position_is_equally_likely():
    """Of 2000 draws of 6 out of 15, each number is in 800, give or take 5 standard deviations."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([distinct(6, 15, generator) for _ in range(2000)])
    count = torch.bincount(drawn, minlength=15)
    deviation = (2000 * 0.4 * 0.6) ** 0.5
    assert ((count - 800).abs() <= 5 * deviation).all()


def test_all_positions():
    """The largest r of a square matrix takes each entry once."""
    assert torch.equal(distinct(16, 16, torch.Generator().manual_seed(0)), torch.arange(16))
    with pytest.raises(lf.LoraFuncError, match=r"SHiRA\(r=3\) on .* \(4, 4\): r must be at most 2"):
        lf.SHiRA(r=3).init(lf.Weight(torch.randn(4, 4)), None)


@over("shira")
def test_the_update_is_at_the_positions_alone(layer, data):
    rows, cols, v = (layer.trained[name] for name in ("rows", "cols", "v"))
    delta = layer.variant.merged(layer.weight, layer.trained)[0] - layer.weight.matrix
    torch.testing.assert_close(delta[rows, cols], v, rtol=1e-9, atol=1e-9)
    assert (delta != 0).sum() == len(v)
    # out = base_out + Σ_k x[cols_k] v_k at rows_k
    expected = layer.base(layer.x).index_add(-1, rows, layer.x[..., cols] * v)
    torch.testing.assert_close(layer(layer.trained), expected, rtol=1e-9, atol=1e-9)


def test_the_rank_is_not_limited():
    """24 numbers of a LoRA of rank 1 in a 12 x 12 matrix: their update has a higher rank."""
    weight = lf.Weight(torch.zeros(12, 12))
    params = lf.SHiRA(r=1).init(weight, torch.Generator().manual_seed(0))
    trained = {**params.frozen, "v": torch.randn(24, generator=torch.Generator().manual_seed(1))}
    assert torch.linalg.matrix_rank(lf.SHiRA(r=1).merged(weight, trained)[0]) > 6


def test_positions_of_the_largest_entries():
    W = torch.tensor([[1.0, -5.0, 2.0], [0.5, 3.0, -4.0], [0.1, 0.2, 0.3]])
    drawn = lf.SHiRA(r=1, mask="magnitude").init(lf.Weight(W), None)
    at = set(zip(drawn.frozen["rows"].tolist(), drawn.frozen["cols"].tolist()))
    assert at == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}


def test_positions_of_the_largest_gradients():
    """Those of autograd's gradient of the weight over the batches, through calibration."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), Loss())
    batches = [torch.randn(4, 12) for _ in range(3)]
    variant, targets = lf.SHiRA(r=2, mask="gradient"), lf.Targets(roles=())
    with pytest.raises(lf.LoraFuncError, match="pass calibration=batches"):
        lf.adapt(model, variant, targets=targets)
    adapter, _ = lf.adapt(model, variant, targets=targets, calibration=batches)
    sum(model(batch).loss for batch in batches).backward()  # pyright: ignore
    expected = model[0].weight.grad.abs().flatten().topk(40).indices.sort().values  # pyright: ignore
    rows, cols = (adapter.frozen[f"0.lora_{name}"].long() for name in ("rows", "cols"))
    assert torch.equal(rows * 12 + cols, expected)


class Loss(torch.nn.Module):
    """A loss in the form that calibration by gradients expects."""

    def forward(self, y):
        return SimpleNamespace(loss=y.square().sum())
