"""Experts of their own for each example: fused experts, adapted along an example axis.

The experts of one example are as good as experts with other numbers. So expert e of example i
becomes expert `e n + i` of a stack of E n *virtual* experts, and the router's choice e, for a token
of example i, becomes `e n + i`. The module then runs as it is. Its base products do not grow: the
n neighbours that stand for one expert share its matrix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError
from ..libraries import transformers
from .low_rank import LowRank
from .terms import Terms


def virtual_experts(experts: nn.Module, n: int, path: str) -> None:
    """Gives `experts`, a copy that belongs to a view, experts of their own for each of n examples.

    Its stacks of matrices become `LowRank` stacks with `E n` matrices, its biases are repeated, and
    a hook renumbers the choices of the router. Tokens come with those of one example together and
    as many for each. `path` is that of the module.

    Raises LoraFuncError if the module does not say to which expert a token goes.
    """
    routing = transformers.routing(experts)
    if routing is None:
        raise LoraFuncError(
            f"{path!r} is a {type(experts).__name__}, which does not see which expert a token goes "
            "to, so its experts cannot be told apart by example. Leave it out of the targets, or "
            "give it parameters without the example axis"
        )
    experts.__dict__["_parameters"] = {
        name: P if P is None else virtual(P, n, f"{path}.{name}")
        for name, P in experts._parameters.items()
    }
    for name in routing.counts:
        experts.__dict__[name] *= n
    count = experts.__dict__[routing.counts[0]]

    def renumber(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(routing.arguments, args)), **kwargs}
        tokens = given[routing.arguments[0]].shape[0]
        if tokens % (count if routing.ids is None else n):
            raise LoraFuncError(
                f"{path!r} sees {tokens} tokens, which cannot be those of the {n} examples of its "
                "parameters, with as many for each: the batch has another size"
            )
        if routing.ids is not None:
            ids = given[routing.ids]
            example = torch.arange(tokens, device=ids.device) // max(tokens // n, 1)
            # An id past the last expert stands for none.
            given[routing.ids] = (ids * n + example.unsqueeze(-1)).clamp(max=count)
        return tuple(given.values()), {}  # an implementation has names of its own for them

    experts.register_forward_pre_hook(renumber, with_kwargs=True)


def virtual(P: Tensor, n: int, path: str) -> Tensor:
    """A parameter of E experts as one of E n: n for each, one after the other.

    A stack `[E, rows, cols]` becomes a `LowRank` in which the n share its matrices. If it is one
    already, with an example axis or without, each takes its own factors.
    """
    if P.dim() < 3:
        return P.repeat_interleave(n, 0)
    if isinstance(P, LowRank):
        terms = P.terms
        own = terms.n is not None
        left, right = (
            factor.transpose(0, 1).flatten(0, 1) if own else factor.repeat_interleave(n, 0)
            for factor in (terms.left, terms.right)
        )
        return LowRank.of(replace(terms, left=left, right=right, n=None, neighbours=n, kept={}))
    E, rows, cols = P.shape
    return LowRank.of(
        Terms(
            base=P,
            left=P.new_zeros(E * n, rows, 0),
            right=P.new_zeros(E * n, 0, cols),
            form=lambda: P,
            path=path,
            kernel=False,
            n=None,
            repeats={},
            trains=False,
            neighbours=n,
        )
    )
