"""Adapters as changes of weights: `as_lora`, `singular_values` and `combine`.

Arithmetic leaf by leaf is not arithmetic on the weights: the mean of two B A is not the B A of the
means. Here every change is a product B A, or a dense difference, and what is summed is the change.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .changes import Change, changes_of
from .engine.adapter import Adapter, check_order
from .engine.keys import flat_key
from .errors import LoraFuncError, listing
from .linalg import top_svd
from .variant import Variant
from .variants import Full, LoRA

Pair = tuple[Adapter, Mapping[str, Tensor]]


def as_lora(
    adapter: Adapter,
    params: Mapping[str, Tensor],
    r: int | None = None,
    *,
    model: nn.Module | None = None,
) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter of plain `LoRA` with the same change of every weight, and its parameters.

    Exact for each variant whose change is a product of low rank: LoRA and kin, those that start
    from the weight (PiSSA's difference has rank 2 r), gains and blocks in a basis, Householder
    reflections. Ranks differ from layer to layer, and alpha is r, so that the scale is 1.
    Differentiable in `params`, which may have an example axis.

    With `r`, all layers have that rank, as some servers want it, and as `stack` wants it of
    adapters that were none of a kind. A lower rank is filled up with zeros, which changes nothing
    (and which do not learn: both factors are zero). In the place of a change of higher rank, which
    may be any, comes the best approximation. Its relative error is `s[r:].norm() / s.norm()`, for
    the `s` that `singular_values` finds for the layer.

    Args:
        adapter: as `adapt` or `load` returned it.
        params: flat key -> tensor. The result has them in float32 or wider.
        r: the rank of all layers. None: all are exact.
        model: the model that the adapter was made for. Needed by variants whose change depends on
            the weight, and for an approximation of those without low rank.

    Raises:
        LoraFuncError: bad `params`; a variant whose change is no product of low rank (DoRA, OFT,
            IA3, Full, ..), unless `r` and `model` are given; a parameter that is no matrix; a
            variant that reads the weight, without `model`.
    """
    check_order("as_lora(adapter, params)", adapter=adapter)
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise LoraFuncError(
            f"r must be the rank of all layers, an integer of at least 1, or None: {r!r}"
        )
    parts = {}
    for change in changes_of(adapter, params, model):
        factors, b = change.low_rank(), change.bias()
        if factors is None:
            if r is None or not change.matrix:
                raise LoraFuncError(no_factors(change))
            delta, b = change.dense()
            factors = halves(top_svd(delta, min(r, *delta.shape[-2:])), r)
        elif r is not None and r < factors[0].shape[-2]:
            factors = halves(svd_of_product(*factors), r)
        if r is not None:
            factors = padded(*factors, r)
        parts[change.site.path] = change, plain(*factors, b)
    return assembled(parts, adapter.dropout)


def singular_values(
    adapter: Adapter, params: Mapping[str, Tensor], *, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Path of each layer -> the singular values of the change of its weight, in falling order.

    They tell what a rank keeps: `s.norm()` is the size of the change, and
    `s[r:].norm() / s.norm()` the relative error of its best approximation of rank r, which is
    `as_lora(.., r=r)`; both in the Frobenius norm. A change of low rank is never made dense, and
    has as many values as its exact rank. For a stack of matrices: `[E, values]`.

    Args:
        adapter: as in `as_lora`.
        params: as in `as_lora`.
        model: as in `as_lora`.

    Raises:
        LoraFuncError: as `as_lora` with an `r`.
    """
    check_order("singular_values(adapter, params)", adapter=adapter)
    found = {}
    for change in changes_of(adapter, params, model):
        factors = change.low_rank()
        if factors is not None:
            found[change.site.path] = svd_of_product(*factors)[1]
        elif change.matrix:
            found[change.site.path] = torch.linalg.svdvals(change.dense()[0])
        else:
            raise LoraFuncError(no_factors(change))
    return found


def combine(
    pairs: Sequence[Pair], weights: Sequence[float | Tensor], *, model: nn.Module | None = None
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter whose change of every weight is the weighted sum of the changes of several.

        total = lf.combine([a, b], [1, 1])          # a and b are pairs (adapter, params)
        mean = lf.combine([a, b, c], [1 / 3] * 3)
        opposite = lf.combine([a], [-1])
        between = lf.combine([a, b], [1 - t, t])
        short = lf.as_lora(*total, r=8)             # ranks add up; this cuts them

    Exact, for any variants whose change is a product of low rank: the result is plain `LoRA`, and
    the ranks add up. Where `Full` is one of the terms, the result is `Full`. Where all terms are
    of one `Full`, `SHiRA`, `FourierFT` or `C3A` with equal constants, so is the result. A layer
    that not all adapters have gets the sum of those that do. Differentiable in the params, which
    may have an example axis, and in weights that are tensors.

    Args:
        pairs: (adapter, params) of each, as `adapt` or `load` returned them, on one base.
        weights: a number for each, of any sign, or a tensor without axes.
        model: as in `as_lora`.

    Returns:
        The adapter, with the dropout of the first, and its parameters in float32 or wider.

    Raises:
        LoraFuncError: other than one weight for each pair; adapters of different bases; a variant
            whose change cannot be summed exactly, such as DoRA's: approximate it by `as_lora` with
            an `r` first.
    """
    pairs, weights = list(pairs), list(weights)
    if not pairs or len(pairs) != len(weights):
        raise LoraFuncError(
            f"combine takes pairs (adapter, params) and a weight for each, not {len(pairs)} pairs "
            f"and {len(weights)} weights"
        )
    by_path: dict[str, list[Change]] = {}
    for pair, factor in zip(pairs, weights):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise LoraFuncError(
                f"combine takes a list of pairs (adapter, params), not of {type(pair).__name__}"
            )
        check_order("combine([(adapter, params), ..], weights)", adapter=pair[0])
        for change in changes_of(*pair, model, factor):
            by_path.setdefault(change.site.path, []).append(change)
    check_bases(by_path)
    parts = {path: (changes[0], total(changes)) for path, changes in by_path.items()}
    return assembled(parts, pairs[0][0].dropout)


Leaves = dict[str, Tensor]
Part = tuple[Variant, Leaves, Leaves]  # what adapts a weight, its leaves and its constants


def total(changes: Sequence[Change]) -> Part:
    """What changes a weight by the sum of several changes."""
    kinds = [type(change.variant) for change in changes]
    if changes[0].linear and all(is_alike(changes[0], change) for change in changes[1:]):
        names = dict.fromkeys(name for change in changes for name in change.site.leaves)
        leaves = {
            name: summed([c.leaf(name) for c in changes if name in c.site.leaves]) for name in names
        }
        return changes[0].variant, leaves, changes[0].site.frozen
    factors = [change.low_rank() for change in changes]
    biases = [b for change in changes if (b := change.bias()) is not None]
    b = summed(biases) if biases else None
    if Full not in kinds:
        exact = [known for known in factors if known is not None]
        if len(exact) < len(changes):
            raise LoraFuncError(no_sum(changes[factors.index(None)]))
        A = concatenated([A for A, _ in exact], dim=-2)
        return plain(A, concatenated([B for _, B in exact], dim=-1), b)
    deltas = []
    for change, known in zip(changes, factors):
        if known is None and not change.linear:
            raise LoraFuncError(no_sum(change))
        deltas.append(change.dense()[0] if known is None else known[1] @ known[0])
    return Full(), {"D": summed(deltas)} | ({} if b is None else {"d": b}), {}


def plain(A: Tensor, B: Tensor, b: Tensor | None) -> Part:
    """LoRA with a scale of 1 and given leaves."""
    k = A.shape[-2]
    leaves = {"A": A, "B": B} | ({} if b is None else {"b": b})
    return LoRA(r=k, alpha=float(k), add_bias=b is not None), leaves, {}


def assembled(parts: Mapping[str, tuple[Change, Part]], dropout: float) -> tuple[Adapter, Leaves]:
    """The adapter that puts each part in the place of its change, and its parameters."""
    variants, base, shapes, frozen, params = {}, {}, {}, {}, {}
    for path, (change, (variant, leaves, constants)) in parts.items():
        variants[path], base[path] = variant, change.base
        frozen |= {flat_key(path, name): leaf for name, leaf in constants.items()}
        for name, leaf in leaves.items():  # of its own memory, and not that of the given params
            key = flat_key(path, name)
            params[key] = leaf.clone(memory_format=torch.contiguous_format)
            shapes[key] = leaf.shape[leaf.dim() - axes_of(change, variant, name) :]
    dtype = next(iter(params.values())).dtype
    return Adapter(variants, shapes, frozen, base, dtype, dropout=dropout), params


def axes_of(change: Change, variant: Variant, name: str) -> int:
    """How many axes a leaf has without that of the examples."""
    if variant == change.variant and name in change.site.leaves:
        return change.site.leaves[name][1]
    return 1 if name in ("b", "d") else len(change.base.shape)


def svd_of_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD `U [.., d_out, k]`, `S [.., k]`, `V [.., k, d_in]` of B A, which is not formed."""
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.mT)
    core = R_out @ R_in.mT  # [.., k, k], or smaller
    U, S, V = top_svd(core, min(core.shape[-2:]))
    return Q_out @ U, S, V @ Q_in.mT


def halves(svd: tuple[Tensor, Tensor, Tensor], r: int) -> tuple[Tensor, Tensor]:
    """`A [.., r, d_in]` and `B [.., d_out, r]` with B A = U_r S_r V_r, and half of S in each."""
    U, S, V = svd
    root = S[..., :r].sqrt()
    return root[..., None] * V[..., :r, :], U[..., :r] * root[..., None, :]


def padded(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`A [.., r, d_in]` and `B [.., d_out, r]` with rows and columns of zeros after the given."""
    k = A.shape[-2]
    return F.pad(A, (0, 0, 0, r - k)), F.pad(B, (0, r - k))


def summed(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, of which some have an example axis in front of their own."""
    return functools.reduce(torch.add, tensors)


def concatenated(factors: Sequence[Tensor], dim: int) -> Tensor:
    """The rows (-2) or columns (-1) of all, of which some have an example axis in front."""
    lead = torch.broadcast_shapes(*(factor.shape[:-2] for factor in factors))
    return torch.cat([factor.expand(*lead, *factor.shape[-2:]) for factor in factors], dim)


def is_alike(change: Change, other: Change) -> bool:
    """Whether two changes are of one variant with the same constants."""
    mine, yours = change.site.frozen, other.site.frozen
    same = change.variant == other.variant and mine.keys() == yours.keys()
    return same and all(torch.equal(leaf, yours[name]) for name, leaf in mine.items())


def check_bases(by_path: Mapping[str, Sequence[Change]]) -> None:
    """Raises LoraFuncError unless all adapters are of one base, and of one number of examples."""
    for path, changes in by_path.items():
        bases = [change.base for change in changes]
        if len({base._replace(fingerprint=None) for base in bases}) > 1:
            shapes = listing(dict.fromkeys(base.shape for base in bases))
            raise LoraFuncError(f"{path!r} is not the same weight in all of them: {shapes}")
        if len({base.fingerprint for base in bases} - {None}) > 1:
            raise LoraFuncError(
                f"the adapters were made on different bases: the weights of {path!r} differ. Only "
                "changes of the same weights add up"
            )
        tensor = bases[0].tensor
        if tensor is not None and tensor.removesuffix(".weight") in by_path.keys() - {path}:
            raise LoraFuncError(
                f"one adapter has the parameter {path!r}, and another the layer that it is the "
                "weight of. Only changes of the same kind of target add up"
            )
    lengths = {change.examples for changes in by_path.values() for change in changes}
    if len(lengths - {None}) > 1:
        raise LoraFuncError(f"the params have example axes of lengths {listing(lengths - {None})}")


def no_factors(change: Change) -> str:
    """Why a change cannot be that of a plain LoRA."""
    path, kind = change.site.path, type(change.variant).__name__
    if not change.matrix:
        return f"{path!r} of shape {change.base.shape} is no matrix, so no LoRA can change it"
    return (
        f"{path!r}: {kind} changes the weight by no product of low rank, so no LoRA is equal to "
        "it. For the best approximation of a rank, give r= and model="
    )


def no_sum(change: Change) -> str:
    """Why a change cannot be added to others."""
    path, kind = change.site.path, type(change.variant).__name__
    if change.linear:
        return (
            f"{path!r}: {kind} changes the weight by no product of low rank, so it adds up only "
            f"with Full, and with {kind} of the same settings and constants. For an "
            "approximation of a rank, call lf.as_lora(adapter, params, r=..) first"
        )
    return (
        f"{path!r}: {kind} changes the weight by no product of low rank, so it has no exact sum "
        "with others. For an approximation of a rank, call lf.as_lora(adapter, params, r=.., "
        "model=..) first"
    )
