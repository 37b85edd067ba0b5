"""An adapted layer with random weights, on which the laws are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..variant import Variant, Weight

Shape = tuple[int, ...]
ANY: tuple[Shape, ...] = ((), (0,), (1,), (5,), (2, 3), (2, 0, 3))
"""Leading axes of x, with and without tokens."""


@dataclass(frozen=True)
class Layer:
    """A linear layer with an adapter."""

    variant: Variant
    """The variant of the adapter."""
    weight: Weight
    """The frozen weight of the layer."""
    stats: Any
    """What `init` was given."""
    x: Tensor
    """The input, `[*lead, d_in]`."""
    init: dict[str, Tensor]
    """Trainable and frozen leaves, as `init` made them."""
    names: tuple[str, ...]
    """Names of the trainable ones."""
    trained: dict[str, Tensor]
    """The same leaves, with noise on the trainable ones."""
    moved: float = 0.0
    """Relative size of what the variant adds at init, by design."""
    condition: float = 1.0
    """How much the formula itself amplifies rounding, at least 1."""

    @classmethod
    def draw(
        cls,
        variant: Variant,
        shape: tuple[int, int],
        generator: torch.Generator,
        *,
        lead: Shape = (5,),
        bias: bool = True,
        dtype: torch.dtype = torch.float64,
        noise: Callable[[Tensor], Tensor] = lambda n: 0.3 * n,
        stats: Any = None,
        **about: Any,
    ) -> Layer:
        """A random layer of `shape` (d_out, d_in) in `dtype`, and an adapter for it.

        Parameters are in float32, or float64 for a float64 layer. Trained ones differ from the
        initial ones by `noise(N(0, 1))`. `stats` is a function of the weight, or its result.
        """
        d_out, d_in = shape

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        W, b = normal(d_out, d_in) / d_in**0.5, normal(d_out)
        weight = Weight(W.to(dtype), b.to(dtype) if bias else None)
        found = stats(weight) if callable(stats) else stats
        drawn = variant.init(weight, generator, found)
        wide = torch.promote_types(dtype, torch.float32)
        init = {name: leaf.to(wide) for name, leaf in drawn.trainable.items()}
        shared = variant.init_shared([weight], generator)
        init |= {name: leaf.to(wide) for name, leaf in shared.trainable.items()}
        frozen = {**drawn.frozen, **shared.frozen}
        trained = {n: leaf + noise(normal(*leaf.shape)).to(wide) for n, leaf in init.items()}
        x, names = normal(*lead, d_in).to(dtype), tuple(init)
        both = {**init, **frozen}, names, {**trained, **frozen}
        return cls(variant, weight, found, x, *both, **about)

    def base(self, x: Tensor) -> Tensor:
        """The frozen layer."""
        return F.linear(x, self.weight.matrix, self.weight.bias)

    def __call__(
        self, params: dict[str, Tensor], x: Tensor | None = None, weight: Weight | None = None
    ) -> Tensor:
        """The adapted layer, as the engine computes it."""
        x = self.x if x is None else x
        base_out = self.base(self.variant.transform_input(x, params))
        return self.variant.apply(x, base_out, weight or self.weight, params)

    def at(self, trainable: dict[str, Tensor]) -> Tensor:
        """The adapted layer with some of the trained parameters replaced."""
        return self({**self.trained, **trainable})

    def leaves(self) -> dict[str, Tensor]:
        """The trained values of the trainable leaves."""
        return {name: self.trained[name] for name in self.names}

    def reference(self) -> tuple[Tensor, Tensor]:
        """The output of the merged layer in float64, and the size of the terms that it sums.

        A sum of products resolves no better than its largest term: |x| |W| for the base, and
        |x| |W_eff| with the adapter.
        """
        wide = {n: t.double() if t.is_floating_point() else t for n, t in self.trained.items()}
        bias = None if self.weight.bias is None else self.weight.bias.double()
        base = self.weight.matrix.double()
        W, b = self.variant.merged(Weight(base, bias), wide)
        x = self.x.double()
        return F.linear(x, W, b), x.abs() @ (W.abs() + base.abs()).mT


def stats_for(variant: Variant, weight: Weight, seed: int = 0) -> Any:
    """What calibration on 64 random tokens, drawn from `seed`, gives one layer.

    None without a statistic.
    """
    if variant.statistic is None:
        return None
    d_in, W = weight.shape[1], weight.dense()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(64, d_in, generator=generator, dtype=torch.float64)
    x = (tokens * torch.linspace(0.5, 2, d_in) + 0.3).to(W)
    y = F.linear(x, W, None if weight.bias is None else weight.bias.to(W.dtype))
    observed = {"inputs": x, "outputs": y, "gradients": (x, y.tanh() / 64)}
    statistic = variant.statistic
    state = statistic.update(statistic.init(weight), observed[statistic.observes])
    return statistic.finalize({"": state})[""]
