"""`C3A`: its blocks are circulant, which sizes it takes, and the gradient that PEFT gets wrong."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from cases import over
from torch import nn

import lora_func as lf


@over("c3a")
def test_blocks_are_circulant(layer, data):
    """A shift of inputs and outputs within their blocks changes nothing: cyclic convolutions."""
    b = layer.variant.block_size
    delta = layer.variant.merged(layer.weight, layer.trained)[0] - layer.weight.matrix
    d_out, d_in = delta.shape
    blocks = delta.reshape(d_out // b, b, d_in // b, b)
    torch.testing.assert_close(blocks.roll((1, 1), (1, 3)), blocks, rtol=1e-9, atol=1e-9)
    first = layer.trained["w"] / d_in  # the first rows of the blocks
    torch.testing.assert_close(blocks[:, 0], first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "size", "nearest"),
    [((48, 32), 5, "4 or 8"), ((48, 32), 64, "16"), ((7, 9), 2, "1"), ((48, 32), 3, "2 or 4")],
)
def test_sizes_that_do_not_divide(shape, size, nearest):
    message = rf"C3A\(block_size={size}\) .* must divide both sizes; the nearest .* is {nearest}$"
    with pytest.raises(lf.LoraFuncError, match=message):
        lf.C3A(block_size=size).init(lf.Weight(torch.zeros(shape)), None)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 12])
def test_the_gradient_in_x(block_size):
    """That of the dense layer, and not PEFT's: it correlates where a convolution is due.

    Once PEFT's is right, `gradient_in_x` of the case and this half of the test can go.
    """
    base = nn.Linear(24, 48).requires_grad_(False)
    weight, variant = lf.Weight(base.weight, base.bias), lf.C3A(block_size=block_size)
    w = torch.randn_like(variant.init(weight, None).trainable["w"])
    x, out_grad = torch.randn(5, 24, requires_grad=True), torch.randn(5, 48)

    def gradient(out):
        return torch.autograd.grad(out, x, out_grad)[0]

    ours = gradient(variant.apply(x, base(x), weight, {"w": w}))
    dense = out_grad @ variant.merged(weight, {"w": w})[0]
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)

    config: Any = peft.C3AConfig(block_size=block_size, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    theirs.base_model.model[0].c3a_kernel["default"].data.copy_(w)
    torch.testing.assert_close(theirs(x), x @ dense_of(weight, variant, w) + base.bias)
    if block_size > 2:  # up to 2 the two are the same
        assert (gradient(theirs(x)) - dense).norm() > 0.1 * (dense - out_grad @ base.weight).norm()


def dense_of(weight, variant, w):
    return variant.merged(weight, {"w": w})[0].mT
