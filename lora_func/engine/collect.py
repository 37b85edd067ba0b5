"""`collect`: runs statistics over the layers of a model while batches stream by.

Tokens are the rows that the batch's `attention_mask` keeps, in the dtype of the layer. For
gradients all rows count, because the loss decides which of them matter.

A state is a value that is never changed in place. Two layers that share a state and see the same
input share the new state too. So the input of q, k and v is summed once and takes memory once.

The layers are observed through a view of the model. So the model is never touched, whatever a
batch raises.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import LoraFuncError, listing, near_misses
from ..libraries import transformers
from ..libraries.dynamo import Traceable
from ..precision import autocast_off
from ..variant import Statistic, Weight
from ..weights.table import read
from .batch import call_arguments
from .targets import Targets
from .untouched import check_written
from .view import StandIn, make_view


class Collected(dict[str, Any]):
    """path -> what a statistic says of the layer there. It remembers which statistic."""

    def __init__(self, values: Mapping[str, Any], statistics: Mapping[str, Statistic]):
        super().__init__(values)
        self.statistics = dict(statistics)


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
        model: any module with linear layers. It is run in its present mode: call `eval()` on it
            first to keep dropout out.
        targets: paths of linear layers, a Targets, or an Adapter, whose targets are taken.
        batches: what the model is called with (see `Adapter.__call__`). The mask
            `attention_mask [batch, tokens]` of a mapping says which tokens count; without one all
            do. For gradients all count.
        statistic: one for all targets, or a mapping path -> statistic. One pass serves all.
        loss: `(output, batch) -> scalar`, for statistics of gradients; by default the output's own
            `loss`.
        progress: a progress bar (tqdm). None shows one if the standard error is a terminal.

    Raises:
        LoraFuncError: an unknown target; no batch; a layer that no token reached; a mask that does
            not fit what a layer sees; numbers that are not finite.
    """
    paths: tuple[str, ...]
    if isinstance(targets, Targets):
        paths = tuple(targets.find(model))
    else:
        paths = tuple(getattr(targets, "targets", targets))  # of an Adapter, or paths
    given = isinstance(statistic, Mapping)
    chosen = dict(statistic) if given else dict.fromkeys(paths, statistic)
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := [path for path in paths if path not in modules]:
        hint = near_misses(unknown[0], modules)
        raise LoraFuncError(f"no layer {listing(unknown)} in {type(model).__name__}.{hint}")
    if without := [path for path in paths if path not in chosen]:
        raise LoraFuncError(
            f"statistic has none for {listing(without)}; give one for each target, or one for all"
        )
    statistics = {path: chosen[path] for path in paths}
    sums = Sums(statistics, {path: read(path, modules[path]) for path in paths})
    observed = {item.observes for item in statistics.values()}
    wants_grad, wants_mask = "gradients" in observed, bool(observed - {"gradients"})
    replace = {path: functools.partial(Observed, path=path, sums=sums) for path in paths}
    count = 0
    for batch in with_progress(batches, progress):
        args, kwargs = call_arguments(batch)
        sums.begin(token_mask(model, batch) if wants_mask else None)
        view, _, versions = make_view(model, replace, Traceable())
        with torch.set_grad_enabled(wants_grad):
            output = view(*args, **kwargs)
            if wants_grad:
                found = output if loss is None else loss(output, batch)
                value = scalar_loss(found, own=loss is None)
                sums.in_backward = True
                # The taps see the gradients; nothing is stored.
                torch.autograd.grad(value, sums.anchor, allow_unused=True)
        check_written(model, versions)
        count += 1
    if not count:
        raise LoraFuncError("batches is empty, or an iterator that is used up already")
    return Collected(sums.finalize(), statistics)


class Sums:
    """The states of all layers while batches pass.

    Each state has a number. Layers that share a state have the same number.
    """

    def __init__(self, statistics: Mapping[str, Statistic], weights: Mapping[str, Weight]):
        self.statistics = statistics
        self.anchor = torch.zeros((), requires_grad=True)
        self.states: dict[int, Any] = {}  # number -> state
        self.number: dict[str, int] = {}  # path -> number
        unseen: dict[Statistic, int] = {}  # statistics that start from nothing
        for path, statistic in statistics.items():
            state = statistic.init(weights[path])
            number = len(self.states)
            if state is None:
                number = unseen.setdefault(statistic, number)
            self.states[number], self.number[path] = state, number
        self.next = len(self.states)
        self.begin(None)

    def begin(self, mask: Tensor | None) -> None:
        """Begins a batch. `mask [batch, tokens]` says which tokens count; None: all."""
        self.mask = mask
        self.in_backward = False
        # (number of the state, tensor) -> the tensor, if it is alive, and the new number
        self.updated: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def observe(self, path: str, x: Tensor) -> None:
        """Adds what the layer at `path` sees or returns, `[.., d]`."""
        old = self.number[path]
        key = (old, id(x), 0 if x.is_inference() else x._version)
        alive, new = self.updated.get(key, (lambda: None, old))
        if alive() is x and new in self.states:  # and no layer called twice has moved on from it
            self.move(path, new)
        elif len(rows := self.tokens(path, x.detach())):
            self.updated[key] = weakref.ref(x), self.update(path, rows)

    def observe_gradient(self, path: str, x: Tensor, g: Tensor) -> None:
        """Adds a layer's input `x [.., d_in]`, and the gradient `g [.., d_out]` of its output."""
        if x.numel():
            rows = x.detach().reshape(-1, x.shape[-1]), g.detach().reshape(-1, g.shape[-1])
            self.update(path, rows)

    def update(self, path: str, tokens: Any) -> int:
        """A new state for `path`, and its number."""
        first = tokens[0] if isinstance(tokens, tuple) else tokens
        with torch.no_grad(), autocast_off(first.device):
            state = self.statistics[path].update(self.states[self.number[path]], tokens)
        self.states[self.next] = state
        self.next += 1
        self.move(path, self.next - 1)
        return self.next - 1

    def move(self, path: str, new: int) -> None:
        """Gives `path` the state `new`, and forgets its old one if no other layer has it."""
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
        if x[..., 0].numel() == mask.numel() and x.dim() == 2:  # flattened, as before experts
            return x[mask.flatten()]
        raise LoraFuncError(
            f"{path!r} sees an input of shape {tuple(x.shape)}, which the attention_mask of shape "
            f"{tuple(mask.shape)} does not fit. Leave the layer out, or give batches without "
            "padding"
        )

    def finalize(self) -> dict[str, Any]:
        """path -> stats."""
        self.check_finite()
        found: dict[str, Any] = {}
        for statistic in dict.fromkeys(self.statistics.values()):
            paths = [path for path, own in self.statistics.items() if own == statistic]
            found |= statistic.finalize({path: self.states[self.number[path]] for path in paths})
        if unseen := [path for path in self.statistics if found.get(path) is None]:
            raise LoraFuncError(
                f"no token of these batches reached {listing(unseen)}: leave it out, or give more "
                "batches"
            )
        return {path: found[path] for path in self.statistics}

    def check_finite(self) -> None:
        """Raises LoraFuncError if a sum is not finite: one NaN in the data spoils all of it."""
        broken = {number for number, state in self.states.items() if not all_finite(state)}
        if paths := [path for path, number in self.number.items() if number in broken]:
            raise LoraFuncError(
                f"what {listing(paths)} saw is not finite: the batches, or the model's activations "
                "on them, have NaN or infinite entries, or entries that overflow when summed"
            )


def all_finite(tree: Any) -> bool:
    """Whether no tensor in a pytree has a NaN or infinite entry. On the device "meta" none has."""
    tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and not t.is_meta]
    return all(bool(t.isfinite().all()) for t in tensors)


class Observed(StandIn):
    """Replaces an observed layer in a view: runs the layer and adds what it sees to `Sums`."""

    def __init__(self, layer: nn.Module, path: str, sums: Sums):
        super().__init__(layer)
        self.__dict__["_path"], self.__dict__["_sums"] = path, sums

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, sums, path = self.layer(x, *args, **kwargs), self._sums, self._path
        observes = sums.statistics[path].observes
        if observes == "gradients":
            return Tap.apply(y, x, sums.anchor, functools.partial(sums.observe_gradient, path))
        if not sums.in_backward:  # where activation checkpointing runs the layer again
            sums.observe(path, x if observes == "inputs" else y)
        return y


class Tap(torch.autograd.Function):
    """The identity in y. Its backward calls `tell` with x and the gradient of y.

    The anchor makes it part of a graph that has no other leaf. x is saved as autograd saves it: to
    change it in place is an error, and checkpointing need not keep it.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, tell: Callable[..., None]
    ) -> Tensor:
        ctx.tell = tell
        ctx.save_for_backward(x.clone() if x.is_inference() else x)
        return y.clone()  # a view of y could not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        ctx.tell(x, grads[0])
        return grads[0], None, None, None


def token_mask(model: nn.Module, batch: Any) -> Tensor | None:
    """Which tokens of `batch` count, `[batch, tokens]` of bool; None if all do."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or bool((mask != 0).all()):
        return None
    if mask.dim() != 2:
        raise LoraFuncError(
            f"attention_mask has shape {tuple(mask.shape)}; [batch, tokens] was expected"
        )
    if transformers.is_encoder_decoder(model):
        raise LoraFuncError(
            "an encoder-decoder model has two kinds of tokens, and attention_mask masks only one: "
            "give batches without padding"
        )
    return mask != 0


def scalar_loss(value: Any, own: bool) -> Tensor:
    """The loss: `value`, or its `loss` if it is the model's `own` output.

    Raises LoraFuncError for what has no gradient.
    """
    if own:
        value = getattr(value, "loss", None)
        if value is None:
            raise LoraFuncError(
                "a statistic of gradients needs a loss: put labels into the batches, or pass loss="
            )
    if not isinstance(value, Tensor) or value.numel() != 1:
        tensor = isinstance(value, Tensor)
        given = f"a tensor of shape {tuple(value.shape)}" if tensor else type(value).__name__
        raise LoraFuncError(f"the loss is {given}, where a scalar tensor was expected")
    if not value.requires_grad:
        raise LoraFuncError(
            "the loss does not depend on any target, or gradients are switched off on the way to "
            "it (torch.no_grad, or reentrant activation checkpointing: pass use_reentrant=False)"
        )
    return value


def with_progress(batches: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    """`batches`, behind a progress bar if one is wanted.

    Raises LoraFuncError if tqdm is asked for and not installed.
    """
    if progress is False:
        return batches
    try:
        from tqdm import tqdm  # noqa: PLC0415  (an extra)
    except ImportError as error:
        if progress is None:
            return batches
        raise LoraFuncError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(batches, desc="calibrating", disable=None if progress is None else False)
