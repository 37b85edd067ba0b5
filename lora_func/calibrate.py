"""`collect`: statistics of what layers see, summed up while batches stream by, for variants whose init looks at data.

A *statistic* is a triple of pure functions in the manner of an optax transform, as a frozen dataclass:

    state = statistic.init(weight)                                 None: nothing seen yet
    state = statistic.update(state, tokens)                        for every batch that passes the layer
    stats = statistic.finalize({path: state, ...})                 sees all layers at once; one value for each

`observes` says what `update` is given: "inputs" (x [n, d_in]), "outputs" (y [n, d_out]) or "gradients" (both x and dL/dy).
Tokens are the rows that the batch's `attention_mask` keeps, in the dtype of the layer; of gradients all rows count, because
the loss has said which do. A state is a value: layers whose states are one object and that see one input have one new state, so
what q, k and v read is summed up once, and takes memory once.

The layers are observed through a view, as adapters are (see `view`): the model is never touched, whatever a batch raises.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .errors import LoraFuncError, listing, near_misses
from .numerics import at_least_float32
from .targets import Targets
from .variant import Statistic, Weight
from .view import StandIn, call_arguments, make_view
from .weight import check_layer, weight_of


class Moments(NamedTuple):
    """First and second moments of n tokens, in float32 (float64 of a float64 model)."""

    n: int
    mean: Tensor  # [d]
    scatter: Tensor  # [d, d], sum of (x - mean)(x - mean)ᵀ

    @property
    def covariance(self) -> Tensor:
        """`E[(x - mean)(x - mean)ᵀ] [d, d]`."""
        return self.scatter / self.n

    def about(self, origin: Tensor | float = 0.0) -> Tensor:
        """`E[(x - origin)(x - origin)ᵀ] [d, d]`; the uncentred second moment about 0."""
        shift = self.mean - origin
        return self.covariance + torch.outer(shift, shift)


def add_tokens(state: Moments | None, x: Tensor) -> Moments:
    """`state` with the tokens `x [n, d]`, by the pairwise update of Chan, Golub & LeVeque 1979: it cancels nowhere."""
    x = at_least_float32(x)
    n, mean = x.shape[0], x.mean(0)
    centred = x - mean
    scatter = centred.mT @ centred
    if state is None:
        return Moments(n, mean, scatter)
    total, shift = state.n + n, mean - state.mean
    scatter = torch.addr(state.scatter + scatter, shift, shift, alpha=state.n * n / total)
    return Moments(total, state.mean + shift * (n / total), scatter)


@dataclass(frozen=True, kw_only=True)
class InputMoments(Statistic):
    """`Moments` of a layer's inputs: d_in² numbers for each distinct input."""

    observes: ClassVar[str] = "inputs"

    def update(self, state: Moments | None, tokens: Tensor) -> Moments:
        return add_tokens(state, tokens)


@dataclass(frozen=True, kw_only=True)
class OutputMoments(Statistic):
    """`Moments` of a layer's outputs, bias included: d_out² numbers for each layer."""

    observes: ClassVar[str] = "outputs"

    def update(self, state: Moments | None, tokens: Tensor) -> Moments:
        return add_tokens(state, tokens)


@dataclass(frozen=True, kw_only=True)
class OutputMeans(Statistic):
    """The mean of a layer's outputs, `[d_out]`, bias included."""

    observes: ClassVar[str] = "outputs"

    def update(self, state: tuple[int, Tensor] | None, tokens: Tensor) -> tuple[int, Tensor]:
        n, total = (0, 0.0) if state is None else state
        return n + len(tokens), total + at_least_float32(tokens).sum(0)

    def finalize(self, states: Mapping[str, Any]) -> dict[str, Tensor]:
        return {path: state[1] / state[0] for path, state in states.items() if state is not None}


@dataclass(frozen=True, kw_only=True)
class OutputGradients(Statistic):
    """`Σ (dL/dy) xᵀ [d_out, d_in]` over the tokens: the gradient of the summed losses with respect to the weight.

    No weight needs `requires_grad`, so it also works where the weight is packed.
    """

    observes: ClassVar[str] = "gradients"

    def update(self, state: Tensor | None, tokens: tuple[Tensor, Tensor]) -> Tensor:
        x, g = tokens
        G = at_least_float32(g).mT @ at_least_float32(x)
        return G if state is None else state + G


@dataclass(frozen=True, kw_only=True)
class Projections(Statistic):
    """How strongly tokens excite each left singular vector of the weight: `pool` of `|u_iᵀ (y - b)| = S_i |v_i x|`.

    `pool`: "rms", or "mean_abs". The stats are `[min(d_out, d_in)]`, in the order of the singular values.
    """

    pool: str = "rms"
    observes: ClassVar[str] = "outputs"

    def init(self, weight: Weight) -> Any:
        U = torch.linalg.svd(at_least_float32(weight.dense()), full_matrices=False)[0]
        return U, weight.bias, 0, U.new_zeros(U.shape[1])

    def update(self, state: Any, tokens: Tensor) -> Any:
        U, bias, n, total = state
        z = ((tokens if bias is None else tokens - bias).to(U.dtype) @ U).abs()
        return U, bias, n + len(z), total + (z.square() if self.pool == "rms" else z).sum(0)

    def finalize(self, states: Mapping[str, Any]) -> dict[str, Any]:
        means = {path: total / n for path, (_, _, n, total) in states.items() if n}
        return {path: mean.sqrt() if self.pool == "rms" else mean for path, mean in means.items()}


@torch.inference_mode(False)  # tensors made in inference mode could not be part of a backward pass
def collect(
    model: nn.Module,
    targets: Any,
    batches: Iterable[Any],
    statistic: Statistic | Mapping[str, Statistic],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """path -> what `statistic` says of the layer there, after all `batches` went through `model`.

    Args:
        model: as it is; call `eval()` on it first where dropout should not take part.
        targets: paths of linear layers, a Targets, or an Adapter, whose targets are taken.
        batches: what the model is called with (see `Adapter.__call__`). A mapping's `attention_mask [batch, tokens]` says which
            tokens count; without one all do, as they do for gradients, where the loss has said it.
        statistic: one for all targets, or a mapping path -> statistic; one pass over the data serves all.
        loss: `(output, batch) -> scalar`, for statistics of gradients; by default the output's own `loss`.
        progress: a progress bar (tqdm); None shows one where the standard error is a terminal.

    Raises:
        LoraFuncError: an unknown target, no batch, a layer that no token reached, a mask that does not fit what a layer sees.
    """
    paths = tuple(targets.find(model) if isinstance(targets, Targets) else getattr(targets, "targets", targets))
    chosen = dict(statistic) if isinstance(statistic, Mapping) else dict.fromkeys(paths, statistic)
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := [path for path in paths if path not in modules]:
        raise LoraFuncError(f"no layer {listing(unknown)} in {type(model).__name__}.{near_misses(unknown[0], modules)}")
    if without := [path for path in paths if path not in chosen]:
        raise LoraFuncError(f"statistic names none for {listing(without)}; give one for each target, or one for all")
    for path in paths:
        check_layer(path, modules[path])
    sums = Sums({path: chosen[path] for path in paths}, {path: weight_of(modules[path]) for path in paths})
    observed = {chosen[path].observes for path in paths}
    wants_grad, wants_mask = "gradients" in observed, bool(observed - {"gradients"})
    replace = {path: functools.partial(Observed, path=path, sums=sums) for path in paths}
    count = 0
    for batch in with_progress(batches, progress):
        args, kwargs = call_arguments(batch)
        sums.begin(token_mask(model, batch) if wants_mask else None)
        view, _ = make_view(model, replace)
        with torch.set_grad_enabled(wants_grad):
            output = view(*args, **kwargs)
            if wants_grad:
                value = scalar_loss(output if loss is None else loss(output, batch), own=loss is None)
                sums.in_backward = True
                torch.autograd.grad(value, sums.anchor, allow_unused=True)  # the taps see the gradients; nothing is stored
        count += 1
    if not count:
        raise LoraFuncError("batches is empty, or an iterator that was used up before")
    return sums.finalize()


class Sums:
    """The states of all layers while batches pass. Equal states are one: a state is known by a number, and shared by it."""

    def __init__(self, statistics: Mapping[str, Statistic], weights: Mapping[str, Weight]):
        self.statistics = statistics
        self.anchor = torch.zeros((), requires_grad=True)
        self.states: dict[int, Any] = {}  # number -> state
        self.number: dict[str, int] = {}  # path -> number
        unseen: dict[Statistic, int] = {}  # those that start from nothing start together
        for path, statistic in statistics.items():
            state = statistic.init(weights[path])
            number = len(self.states) if state is not None else unseen.setdefault(statistic, len(self.states))
            self.states[number], self.number[path] = state, number
        self.next = len(self.states)
        self.begin(None)

    def begin(self, mask: Tensor | None) -> None:
        """A new batch, of which `mask [batch, tokens]` (None: all) says which tokens count."""
        self.mask = mask
        self.in_backward = False
        # (state, tensor) -> the tensor, if it is still alive, and the new state
        self.updated: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def observe(self, path: str, x: Tensor) -> None:
        """Adds what the layer at `path` sees or returns, `[.., d]`."""
        old = self.number[path]
        key = (old, id(x), 0 if x.is_inference() else x._version)
        alive, new = self.updated.get(key, (lambda: None, old))
        if alive() is x and new in self.states:  # not where a layer that was called twice has moved on from it
            self.move(path, new)
        elif len(rows := self.tokens(path, x.detach())):
            self.updated[key] = weakref.ref(x), self.update(path, rows)

    def observe_gradient(self, path: str, x: Tensor, g: Tensor) -> None:
        """Adds the input `x [.., d_in]` of the layer at `path` and the gradient `g [.., d_out]` of its output."""
        if x.numel():
            self.update(path, (x.detach().reshape(-1, x.shape[-1]), g.detach().reshape(-1, g.shape[-1])))

    def update(self, path: str, tokens: Any) -> int:
        """A new state for `path`, and its number."""
        device = (tokens[0] if isinstance(tokens, tuple) else tokens).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            state = self.statistics[path].update(self.states[self.number[path]], tokens)
        self.states[self.next] = state
        self.next += 1
        self.move(path, self.next - 1)
        return self.next - 1

    def move(self, path: str, new: int) -> None:
        """Gives `path` the state `new`, and forgets its old one where no other layer has it."""
        old, self.number[path] = self.number[path], new
        if old not in self.number.values():
            del self.states[old]

    def tokens(self, path: str, x: Tensor) -> Tensor:
        """The rows `[n, d]` of `x [.., d]` that the mask keeps."""
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        mask = self.mask.to(x.device)
        if x.shape[:-1] == mask.shape:
            return x[mask]
        if x[..., 0].numel() == mask.numel() and x.dim() == 2:  # tokens flattened, as before experts
            return x[mask.flatten()]
        raise LoraFuncError(
            f"{path!r} sees an input of shape {tuple(x.shape)}, to which the attention_mask of shape {tuple(mask.shape)} does "
            "not apply. Leave the layer out, or give batches without padding"
        )

    def finalize(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for statistic in dict.fromkeys(self.statistics.values()):
            states = {path: self.states[self.number[path]] for path, own in self.statistics.items() if own == statistic}
            found |= statistic.finalize(states)
        if unseen := [path for path in self.statistics if found.get(path) is None]:
            raise LoraFuncError(f"no token of these batches reached {listing(unseen)}: leave it out, or give more batches")
        return {path: found[path] for path in self.statistics}


class Observed(StandIn):
    """What stands for an observed layer in a view: the layer itself, which also tells what it sees."""

    def __init__(self, layer: nn.Module, path: str, sums: Sums):
        super().__init__(layer)
        self.__dict__["path"], self.__dict__["sums"] = path, sums

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.layer(x, *args, **kwargs)
        observes = self.sums.statistics[self.path].observes
        if observes == "gradients":
            return Tap.apply(y, x, self.sums.anchor, functools.partial(self.sums.observe_gradient, self.path))
        if not self.sums.in_backward:  # where activation checkpointing runs the layer once more
            self.sums.observe(self.path, x if observes == "inputs" else y)
        return y


class Tap(torch.autograd.Function):
    """The identity in y, which hands x and its own gradient to `tell`. The anchor makes it part of a graph without a leaf.

    x is saved as autograd saves it, so that a change of it in place is an error, and checkpointing need not keep it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.tell = tell
        ctx.save_for_backward(x.clone() if x.is_inference() else x)
        return y.clone()  # a view of y could not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        ctx.tell(x, grads[0])
        return grads[0], None, None, None


def token_mask(model: nn.Module, batch: Any) -> Tensor | None:
    """Which tokens of `batch` count, `[batch, tokens]` of bool; None where all do."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or bool((mask != 0).all()):
        return None
    if mask.dim() != 2:
        raise LoraFuncError(f"attention_mask has shape {tuple(mask.shape)}; [batch, tokens] was expected")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise LoraFuncError(
            "an encoder-decoder model has two kinds of tokens, and attention_mask speaks of one: give batches without padding"
        )
    return mask != 0


def scalar_loss(value: Any, own: bool) -> Tensor:
    """The loss: `value`, or where it is the output of a model its `own`. Raises LoraFuncError for what has no gradient."""
    if own:
        value = getattr(value, "loss", None)
        if value is None:
            raise LoraFuncError("a statistic of gradients needs a loss: put labels into the batches, or pass loss=")
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LoraFuncError(f"the loss is {given}, where a scalar tensor was expected")
    if not value.requires_grad:
        raise LoraFuncError(
            "the loss does not depend on any target, or gradients are switched off on the way to it (torch.no_grad, or "
            "reentrant activation checkpointing: pass use_reentrant=False)"
        )
    return value


def with_progress(batches: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    """`batches`, behind a progress bar where one is wanted. Raises LoraFuncError where tqdm is wanted and not installed."""
    if progress is False:
        return batches
    try:
        from tqdm import tqdm  # noqa: PLC0415  (an extra)
    except ImportError as error:
        if progress is None:
            return batches
        raise LoraFuncError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(batches, desc="calibrating", disable=None if progress is None else False)
