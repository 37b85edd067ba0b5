"""`probe`: the evidence that an adapter is alive, before a long run or when training stalls."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .engine.adapter import Adapter, check_order
from .engine.batch import call_arguments
from .errors import LoraFuncError, listing
from .weights.layer import whole


@dataclass(frozen=True)
class Probe:
    """What `probe` found. Printed, it is a table."""

    targets: int
    """Number of adapted layers."""
    trainable: int
    """Number of trainable parameters."""
    difference: float
    """Largest |adapted - base| over the outputs: the identity error, if the parameters are new."""
    perturbation: float
    """Largest change of the outputs when every parameter moves."""
    loss: float
    """The output's `loss`, otherwise the mean square of the outputs."""
    gradient_norm: float
    """Norm of the gradient of the loss, over all parameters."""
    live: dict[str, float]
    """Path of a layer -> gradient norm of its parameters, once they have moved."""
    dead: tuple[str, ...]
    """Flat keys of leaves that have no gradient even once they have moved."""
    base_unchanged: bool
    """Whether the model holds the same bits as before."""

    @property
    def inert(self) -> tuple[str, ...]:
        """Layers whose parameters do not reach the output: never called, bypassed, or cut off."""
        return tuple(path for path, norm in self.live.items() if norm == 0)

    def __str__(self) -> str:
        rows = {
            "targets": f"{self.targets}",
            "live": f"{self.targets - len(self.inert)} of {self.targets}",
            "trainable parameters": f"{self.trainable:,}",
            "difference to the base": f"{self.difference:.3g}",
            "change when moved": f"{self.perturbation:.3g}",
            "loss": f"{self.loss:.4g}",
            "gradient norm": f"{self.gradient_norm:.4g}",
            "dead leaves": f"{len(self.dead)}",
            "base unchanged": "yes" if self.base_unchanged else "NO",
        }
        width = max(len(name) for name in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
        lines += [f"inert: {path}" for path in self.inert]
        lines += [f"dead:  {key}" for key in self.dead]
        return "\n".join(lines)


def probe(
    adapter: Adapter,
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    noise: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Probe:
    """Runs the model three times and the gradient twice, and reports which layers are alive.

    A layer is alive if its parameters reach the loss.

    Args:
        adapter: as `adapt` or `load` returned it.
        model: the base model.
        params: flat key -> tensor, for one adapter.
        batch: what the adapter is called with.
        noise: how far the parameters move for the perturbation: noise times N(0, 1) per entry.
        generator: draws that noise; None is a new one with seed 0, so two probes are equal.

    Raises:
        LoraFuncError: what calling the adapter raises; a model without floating outputs; a loss
            or a gradient that is not finite, as without any label that counts.
    """
    check_order("probe(adapter, model, params, batch)", adapter=adapter, model=model)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    before = state_hash(model)
    args, kwargs = call_arguments(batch)
    with torch.no_grad():
        base = floating(model(*args, **kwargs))
    start = {key: leaf.detach().clone().requires_grad_() for key, leaf in params.items()}
    moved = {
        key: (leaf + noise * noise_like(leaf, generator)).detach().requires_grad_()
        for key, leaf in start.items()
    }
    out, loss, grads = run(adapter, model, start, batch)
    out_moved, _, grads_moved = run(adapter, model, moved, batch)
    norms = {key: grad.norm().item() for key, grad in grads_moved.items()}
    layers = {path: adapter.keys_of(path) for path in adapter.targets}
    return Probe(
        targets=len(adapter.targets),
        trainable=sum(shape.numel() for shape in adapter.shapes.values()),
        difference=largest(out, base),
        perturbation=largest(out_moved, out),
        loss=loss.item(),
        gradient_norm=sum(grad.float().square().sum().item() for grad in grads.values()) ** 0.5,
        live={path: sum(norms[key] ** 2 for key in keys) ** 0.5 for path, keys in layers.items()},
        dead=tuple(key for key, norm in norms.items() if norm == 0),
        base_unchanged=state_hash(model) == before,
    )


def run(
    adapter: Adapter, model: nn.Module, leaves: dict[str, Tensor], batch: Any
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Outputs, loss and gradients at `leaves`."""
    with torch.enable_grad():
        output = adapter.run(model, leaves, batch, watched=False)  # the table tells
        outputs = floating(output)
        loss = getattr(output, "loss", None)
        if loss is None:
            loss = torch.stack([t.float().square().mean() for t in outputs]).sum()
        if not math.isfinite(loss.item()):
            raise LoraFuncError(
                f"the loss is {loss.item()}: it has no gradient. Check that the batch has labels "
                "that count (other than -100), and that inputs and parameters are finite"
            )
        if loss.requires_grad:
            grads = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        else:  # of a frozen model that never runs through an adapter
            grads = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if broken := [key for key, grad in zip(leaves, grads) if not grad.isfinite().all()]:
        raise LoraFuncError(
            f"the loss is {loss.item():.4g}, and its gradient is not finite in {listing(broken)}. "
            "Check that inputs and parameters are finite"
        )
    return [t.detach() for t in outputs], loss.detach(), dict(zip(leaves, grads))


def floating(output: Any) -> list[Tensor]:
    """The floating tensors in what a model returned. Raises LoraFuncError if there are none."""
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    tensors = [t for t in leaves if t.is_floating_point()]
    if not tensors:
        raise LoraFuncError(
            f"the model returned {type(output).__name__} without a floating tensor: nothing to "
            "probe"
        )
    return tensors


def largest(given: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference between two lists of tensors; NaN if only one has a NaN somewhere.

    Equal entries differ by 0, also if both are infinite, as in a mask, or both NaN.
    """
    found = [torch.zeros(())]
    for a, b in zip(given, expected):
        if a.numel():
            equal = (a == b) | (a.isnan() & b.isnan())
            found.append((a.float() - b.float()).abs().masked_fill(equal, 0.0).max().cpu())
    return torch.stack(found).max().item()


def noise_like(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) in the shape and dtype of `leaf`."""
    return torch.randn(leaf.shape, generator=generator, device=generator.device).to(leaf)


def state_hash(model: nn.Module) -> str:
    """A hash of all parameters and buffers of a model, computed where they are."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        for name in (*module._parameters, *module._buffers):
            if getattr(module, name) is not None:
                t = whole(module, name).detach()
                bits = None if t.is_meta else torch.hash_tensor(t).item()
                digest.update(f"{path}.{name} {tuple(t.shape)} {t.dtype} {bits};".encode())
    return digest.hexdigest()[:16]
