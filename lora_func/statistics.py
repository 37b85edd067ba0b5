"""What calibration can sum up for a layer, for variants whose init looks at data.

A statistic is a triple of pure functions, in the manner of an optax transform:

    state = statistic.init(weight)                       None: nothing seen yet
    state = statistic.update(state, tokens)              for every batch that passes the layer
    stats = statistic.finalize({path: state, ...})       sees all layers, returns a value for each

`lora_func.collect` runs them. A state is a value, never changed in place: layers that start from
equal states and read one input keep one state between them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .errors import LoraFuncError
from .linalg import top_svd
from .precision import at_least_float32
from .variant import Statistic, Weight

__all__ = [
    "Components",
    "InputMoments",
    "Moments",
    "OutputGradients",
    "OutputMeans",
    "OutputMoments",
    "PrincipalComponents",
    "Projections",
    "add_tokens",
    "check_shape",
]


class Moments(NamedTuple):
    """First and second moments of n tokens, in float32 (float64 for a float64 model)."""

    n: int
    """Number of tokens."""
    mean: Tensor
    """Mean of the tokens, `[d]`."""
    scatter: Tensor
    """Sum of (x - mean)(x - mean)ᵀ over the tokens, `[d, d]`."""

    @property
    def covariance(self) -> Tensor:
        """`E[(x - mean)(x - mean)ᵀ] [d, d]`."""
        return self.scatter / self.n

    def about(self, origin: Tensor | float = 0.0) -> Tensor:
        """`E[(x - origin)(x - origin)ᵀ] [d, d]`; about 0, the uncentred second moment."""
        shift = self.mean - origin
        return self.covariance + torch.outer(shift, shift)


def add_tokens(state: Moments | None, x: Tensor) -> Moments:
    """`state` with the tokens `x [n, d]` added.

    The pairwise update of Chan, Golub & LeVeque 1979, in which nothing cancels.
    """
    x = at_least_float32(x)
    n, mean = x.shape[0], x.mean(0)
    centred = x - mean
    scatter = centred.mT @ centred
    if state is None:
        return Moments(n, mean, scatter)
    total, shift = state.n + n, mean - state.mean
    scatter = torch.addr(state.scatter + scatter, shift, shift, alpha=state.n * n / total)
    return Moments(total, state.mean + shift * (n / total), scatter)


def check_shape(owner: Statistic, given: Any, shape: tuple[int, ...]) -> None:
    """Raises LoraFuncError, naming `owner`, unless `given` is a tensor of `shape`."""
    if not isinstance(given, Tensor) or tuple(given.shape) != shape:
        found = (
            f"a tensor of shape {tuple(given.shape)}"
            if isinstance(given, Tensor)
            else f"a {type(given).__name__}"
        )
        raise LoraFuncError(f"the stats are {found}; {owner} gives a tensor of shape {shape} here")


def check_moments(owner: Statistic, given: Any, d: int) -> None:
    """Raises LoraFuncError unless `given` is `Moments` of `d` features."""
    if not isinstance(given, Moments):
        raise LoraFuncError(f"the stats are a {type(given).__name__}; {owner} gives Moments")
    check_shape(owner, given.mean, (d,))
    check_shape(owner, given.scatter, (d, d))


@dataclass(frozen=True, kw_only=True)
class InputMoments(Statistic):
    """`Moments` of a layer's inputs: d_in² numbers for each distinct input."""

    observes: ClassVar[str] = "inputs"

    def update(self, state: Moments | None, tokens: Tensor) -> Moments:
        return add_tokens(state, tokens)

    def check(self, stats: Any, weight: Weight) -> None:
        check_moments(self, stats, weight.shape[1])


@dataclass(frozen=True, kw_only=True)
class OutputMoments(Statistic):
    """`Moments` of a layer's outputs, bias included: d_out² numbers for each layer."""

    observes: ClassVar[str] = "outputs"

    def update(self, state: Moments | None, tokens: Tensor) -> Moments:
        return add_tokens(state, tokens)

    def check(self, stats: Any, weight: Weight) -> None:
        check_moments(self, stats, weight.shape[0])


@dataclass(frozen=True, kw_only=True)
class OutputMeans(Statistic):
    """The mean of a layer's outputs, `[d_out]`, bias included."""

    observes: ClassVar[str] = "outputs"

    def update(self, state: tuple[int, Tensor] | None, tokens: Tensor) -> tuple[int, Tensor]:
        n, total = (0, 0.0) if state is None else state
        return n + len(tokens), total + at_least_float32(tokens).sum(0)

    def finalize(self, states: Mapping[str, Any]) -> dict[str, Tensor]:
        return {path: state[1] / state[0] for path, state in states.items() if state is not None}

    def check(self, stats: Any, weight: Weight) -> None:
        check_shape(self, stats, weight.shape[:1])


@dataclass(frozen=True, kw_only=True)
class OutputGradients(Statistic):
    """`Σ (dL/dy) xᵀ [d_out, d_in]` over the tokens: the gradient of the weight, losses summed.

    No weight needs `requires_grad`, so it works on packed weights too.
    """

    observes: ClassVar[str] = "gradients"

    def update(self, state: Any, tokens: tuple[Tensor, Tensor]) -> Any:
        x, g = tokens
        G = at_least_float32(g).mT @ at_least_float32(x)
        return G if state is None else state + G

    def check(self, stats: Any, weight: Weight) -> None:
        check_shape(self, stats, weight.shape)


@dataclass(frozen=True, kw_only=True)
class Projections(Statistic):
    """How strongly tokens excite each left singular vector of the weight, `[min(d_out, d_in)]`.

    `pool` of `|u_iᵀ (y - b)| = S_i |v_i x|` over the tokens, in the order of the singular values.
    """

    pool: str = "rms"
    """How tokens are averaged: "rms" or "mean_abs"."""
    observes: ClassVar[str] = "outputs"

    def init(self, weight: Weight) -> Any:
        U = top_svd(weight.dense(), min(weight.shape))[0]
        return U, weight.bias, 0, U.new_zeros(U.shape[1])

    def update(self, state: Any, tokens: Tensor) -> Any:
        U, bias, n, total = state
        z = ((tokens if bias is None else tokens - bias).to(U.dtype) @ U).abs()
        return U, bias, n + len(z), total + (z.square() if self.pool == "rms" else z).sum(0)

    def finalize(self, states: Mapping[str, Any]) -> dict[str, Any]:
        means = {path: total / n for path, (_, _, n, total) in states.items() if n}
        return {p: mean.sqrt() if self.pool == "rms" else mean for p, mean in means.items()}

    def check(self, stats: Any, weight: Weight) -> None:
        check_shape(self, stats, (min(weight.shape),))


class Components(NamedTuple):
    """The principal components that `PrincipalComponents` gives to a layer."""

    directions: Tensor
    """Directions of unit length as rows, `[r_l, d]`."""
    singular_values: Tensor
    """Of the layer's tokens along the directions, `[r_l]`."""


@dataclass(frozen=True, kw_only=True)
class PrincipalComponents(InputMoments):
    """The `Components` of every layer's inputs, r for each layer on average.

    A layer offers up to round(rho r). Of all that are offered, those with the largest share of
    their layer's variance are taken.
    """

    r: int
    """Components of a layer, on average: at least 1."""
    rho: float = 1.0
    """A layer offers up to round(rho r) components. 1: every layer gets r."""
    center: bool = True
    """Take the components of the covariance. False: of the uncentred second moment."""

    def finalize(self, states: Mapping[str, Any]) -> dict[str, Components]:
        seen = {path: state for path, state in states.items() if state is not None}
        distinct = {id(state): state for state in seen.values()}  # layers that read one input
        decomposed = {key: self.components(state) for key, state in distinct.items()}
        own = {path: decomposed[id(state)] for path, state in seen.items()}
        shares = [(share.item(), path) for path, (_, shares) in own.items() for share in shares]
        budget = self.r * len(own)
        taken = sorted(shares, key=lambda entry: -entry[0])[:budget]
        if len(taken) < budget:
            warnings.warn(
                f"the calibration inputs have only {len(taken)} components for {len(own)} layers, "
                f"where r={self.r} asks for {budget}: ranks will be lower. Calibrate on more "
                "tokens, or lower r",
                stacklevel=2,
            )
        ranks = Counter(path for _, path in taken)
        return {
            path: Components(*(part[: ranks[path]] for part in components))
            for path, (components, _) in own.items()
        }

    def components(self, moments: Moments) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Up to round(rho r) components, and their shares of the variance."""
        C = moments.covariance if self.center else moments.about(0)
        values, vectors = torch.linalg.eigh(C)  # ascending
        values = values.flip(0).clamp(min=0)
        rank = int((values > values[0] * len(C) * torch.finfo(C.dtype).eps).sum())
        count = min(round(self.rho * self.r), rank)
        directions = vectors.mT.flip(0)[:count]
        # The sign is free: make the largest entry positive.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = directions * largest.sign()
        singular_values = (values[:count] * moments.n).sqrt()
        return (directions, singular_values), values[:count] / values.sum()

    def check(self, stats: Any, weight: Weight) -> None:
        if not isinstance(stats, Components):
            raise LoraFuncError(f"the stats are a {type(stats).__name__}; {self} gives Components")
        check_shape(self, stats.directions, (len(stats.directions), weight.shape[1]))
        check_shape(self, stats.singular_values, (len(stats.directions),))
