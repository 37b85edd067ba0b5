"""The `Adapter`: the adapted forward of a model, as a pure function of one flat dict."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import LoraFuncError, listing
from ..libraries import accelerate
from ..libraries.dynamo import Traceable
from ..variant import Variant
from ..weights.experts import virtual_experts
from ..weights.layer import LayerWeight
from ..weights.parameter import ParameterWeight
from ..weights.table import read
from .ahead import prepare_ahead
from .batch import call_arguments, check_active, check_each, check_no_mask
from .holder import entries_of
from .keys import SHARED, by_path, key_mismatch
from .layer import AdaptedLayer, check_bare, overrides
from .leaves import blank, check_stats, draw
from .messages import explained, missing_modules
from .parameters import parameter_of
from .reach import Reach, View
from .refused import check_base
from .replace import replaced
from .sites import Base, Found, Site
from .survey import survey
from .tensor import AdaptedTensor, experts_apart, shown
from .untouched import Drift, check_written
from .view import make_view


class Adapter:
    """The adapted forward of a model: `adapter(model, params, batch)`.

    Immutable, hashable by identity, picklable. It holds the variant of each layer, the shapes of
    the parameters and the frozen constants, but neither the model nor any trainable tensor.
    """

    variants: Mapping[str, Variant]
    """Path of a layer -> its variant."""
    shapes: Mapping[str, torch.Size]
    """Flat key -> shape of a trainable leaf."""
    frozen: Mapping[str, Tensor]
    """Flat key -> frozen constant."""
    base: Mapping[str, Base]
    """Path of a layer -> the shape and fingerprint of its weight."""
    dtype: torch.dtype
    """The dtype of the trainable leaves that `init` draws."""
    dropout: float
    """The share of the input's entries that variants do not see, in train mode."""
    _sites: tuple[Site, ...]
    _traceable: Traceable
    _reach: Reach
    _drift: Drift

    def __init__(
        self,
        variants: Mapping[str, Variant],
        shapes: Mapping[str, torch.Size],
        frozen: Mapping[str, Tensor],
        base: Mapping[str, Base],
        dtype: torch.dtype,
        *,
        dropout: float = 0.0,
    ):
        leaves = by_path({key: (key, len(shape)) for key, shape in shapes.items()})
        constants = by_path(frozen)

        def site(path: str, variant: Variant) -> Site:
            # What another variant shares may have the name of a leaf of this one: VeRA's A is not
            # LoRA's.
            shares = any(overrides(part, "init_shared") for part in variant.parts())
            common = leaves.get(SHARED, {}).keys() | constants.get(SHARED, {}).keys()
            own = leaves.get(path, {}).keys() | constants.get(path, {}).keys()
            shared = frozenset(common - own if shares else ())

            def named(nested: Mapping[str, Mapping[str, tuple[str, Any]]]) -> dict[str, Any]:
                of_all = {n: v for n, (_, v) in nested.get(SHARED, {}).items() if n in shared}
                return of_all | {n: v for n, (_, v) in nested.get(path, {}).items()}

            return Site(path, variant, base[path], named(leaves), named(constants), shared, dropout)

        sites = tuple(site(path, variant) for path, variant in variants.items())
        vars(self).update(
            variants=MappingProxyType(dict(variants)),
            shapes=MappingProxyType(dict(shapes)),
            frozen=MappingProxyType(dict(frozen)),
            base=MappingProxyType(dict(base)),
            dtype=dtype,
            dropout=dropout,
            _sites=sites,
            _traceable=Traceable(),
            _reach=Reach(),
            _drift=Drift(),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"an Adapter is immutable, so {name!r} cannot be set")

    def __call__(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        batch: Any = None,
        *,
        active: Tensor | None = None,
        each: int = 1,
        **unpacked: NoReturn,
    ) -> Any:
        """What the model returns for `batch`, adapted.

        A pure function of `params`, differentiable in them and in the batch. A leaf may have one
        leading axis more than its own shape, the example axis (see `population`): then example i
        of the batch runs through entry i, in the layers that use the leaf. With `each`, example i
        runs through entry `i // each`. The examples must be the first axis of what those layers
        see.

        Args:
            model: the model that the adapter was made for, or one with the same layers.
            params: flat key -> tensor, with the keys and shapes of `shapes`.
            batch: a mapping becomes keyword arguments, a tuple or list positional ones, anything
                else the one argument.
            active: bool `[batch, tokens]`, on which tokens the adapter acts; None: on all. The
                others pass the base layers alone, whose keys and values any adapter can then
                share: aLoRA (Greenewald et al. 2025, arXiv 2504.12397), with any variant.
            each: how many examples, one after the other, an entry of the example axis serves. The
                same as `lf.select(params, ids)` with each id repeated so often, without a copy.

        Raises:
            LoraFuncError: params with missing or unexpected keys, wrong shapes or integer dtypes;
                a model without the targets; an example axis that a layer does not see; `each`
                without an example axis, or with adapted parameters; `active` of another shape
                than the tokens that a layer sees, or with adapted parameters; a
                batch that no model takes; activation checkpointing of a kind that loses
                gradients; a layer that is adapted and never called, because its parent reads its
                weight; a forward that writes in place to a tensor of the model, which a call
                cannot undo.

        Warns, once, of an adapted layer that its parent ran without calling; and, once for each
        change, of a model whose weights are no longer those that the adapter was made on.
        """
        if unpacked:
            raise LoraFuncError(
                f"the batch is one argument: write adapted_forward(model, params, batch), not "
                f"**batch; {listing(unpacked)} were given by name"
            )
        watched = not torch.compiler.is_compiling()
        return self.run(model, params, batch, active=active, each=each, watched=watched)

    def run(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        batch: Any,
        *,
        active: Tensor | None = None,
        each: int = 1,
        watched: bool,
    ) -> Any:
        """The same. `watched`: whether to tell of layers that do not run."""
        args, kwargs = call_arguments(batch)
        check_model(model)
        check_no_mask(model, kwargs)
        self.check(params)
        if active is not None:
            check_active(active, [path for path, base in self.base.items() if base.tensor])
        view = self.view(model, params, call=True, active=active, each=each)
        traced = torch.compiler.is_compiling()
        if not traced:
            self._drift.check(model, view.weights(), self.base)
        watch = self._reach.watch(model, view, kept=False) if watched else None
        try:
            out = view.module(*args, **kwargs)
        except RuntimeError as error:
            if reason := explained(error, model):
                raise LoraFuncError(reason) from error
            raise
        if watch is not None:
            watch.check()
        if not traced:
            check_written(model, view.versions)
        return out

    @torch.inference_mode(False)
    def init(
        self,
        model: nn.Module,
        *,
        generator: torch.Generator | None = None,
        stats: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Fresh parameters, as `adapt` draws them. A leaf with an anchor starts at it.

        Args:
            generator: the only source of randomness; None is torch's default generator.
            stats: as for `adapt`. Only leaves without an anchor start from them (EVA's).

        Raises:
            LoraFuncError: a model without the targets; stats of another statistic, or that give
                other shapes.
        """
        weights = self.weights(model)
        sites = [Found(site.path, site.variant, weights[site.path]) for site in self._sites]
        check_stats(sites, stats)
        start = {key: self.frozen[f"{key}0"] for key in self.shapes if f"{key}0" in self.frozen}
        found = []
        for site, (path, variant, weight) in zip(self._sites, sites):
            if names := [name for name, (key, _) in site.leaves.items() if key not in start]:
                found.append(Found(path, variant.drawing(names), weight))
        if found:
            start = {**draw(found, generator, stats).trainable, **start}
        for key, shape in self.shapes.items():
            if key not in start or start[key].shape != shape:
                other = f"shape {tuple(start[key].shape)}" if key in start else "no parameters"
                raise LoraFuncError(
                    f"{key!r} has shape {tuple(shape)} in this adapter, but these stats give it "
                    f"{other}: call lf.adapt with them"
                )
        return {key: start[key].to(self.dtype, copy=True) for key in self.shapes}

    def replace(self, **fields: Any) -> Adapter:
        """A new Adapter with other hyperparameters, as in `adapter.replace(coeff=-1.0)`.

        Each field changes in every variant that has it. A function is called with the old value of
        each: `adapter.replace(alpha=lambda alpha: alpha / 2)` halves the alpha of every layer,
        where `alpha=8` would give them all one.

        Raises:
            LoraFuncError: a field that no variant has; a value that needs other parameters.
        """
        variants = replaced(self.variants, fields)
        shapes = {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()}
        leaves = {**shapes, **self.frozen}
        needed = blank(variants, self.base, leaves)
        expected = {**needed.trainable, **needed.frozen}
        for key, leaf in leaves.items():
            if key not in expected or expected[key].shape != leaf.shape:
                raise LoraFuncError(
                    f"{fields} needs other parameters than {key!r} of shape {tuple(leaf.shape)}: "
                    "call lf.adapt with the new variant"
                )
        parts = variants, self.shapes, self.frozen, self.base
        return Adapter(*parts, self.dtype, dropout=self.dropout)

    @property
    def lr_scale(self) -> dict[str, float]:
        """Flat key -> multiple of the learning rate for the leaf (LoRA+)."""
        scales = {}
        for site in self._sites:
            for name, (key, _) in site.leaves.items():
                scales[key] = float(site.variant.lr_scale.get(name, 1.0))
        return {key: scales[key] for key in self.shapes}

    @torch.inference_mode(False)
    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """A new Adapter with its constants moved or cast, as in `adapter.to("cuda")`.

        The arguments are those of `Tensor.to`. Indices stay integers.
        """

        def placed(leaf: Tensor) -> Tensor:
            moved = leaf.to(*args, **kwargs)
            return moved if leaf.is_floating_point() else leaf.to(moved.device)

        return self.placed(placed)

    def placed(self, move: Callable[[Tensor], Tensor]) -> Adapter:
        """A new Adapter with each constant as `move` returns it."""
        frozen = {key: move(leaf) for key, leaf in self.frozen.items()}
        parts = self.variants, self.shapes, frozen, self.base
        return Adapter(*parts, self.dtype, dropout=self.dropout)

    def site(self, path: str) -> Site:
        """What is known of the layer at `path`."""
        return next(site for site in self._sites if site.path == path)

    @property
    def targets(self) -> tuple[str, ...]:
        """The paths of the adapted layers."""
        return tuple(self.variants)

    def check(self, params: Mapping[str, Tensor], *, examples: bool = True) -> None:
        """Raises LoraFuncError unless `params` has this adapter's keys, with tensors of its shapes.

        With `examples`, each may have an example axis before its own shape, of one length for all.
        """
        if not isinstance(params, Mapping):
            raise LoraFuncError(
                "params must be a mapping flat key -> tensor, as adapt returns it, not "
                f"{type(params).__name__}"
            )
        if params.keys() != self.shapes.keys():
            raise LoraFuncError(key_mismatch(params.keys(), self.shapes.keys()))
        n, first = None, None
        for key, shape in self.shapes.items():
            leaf = params[key]
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                given = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
                raise LoraFuncError(
                    f"params[{key!r}] is {given}, where a floating tensor of shape {tuple(shape)} "
                    "was expected"
                )
            if leaf.shape == shape:
                continue
            if leaf.shape[1:] != shape or not examples:
                hint = f", or {('n', *shape)} with an example axis" if examples else ""
                if leaf.shape[1:] == shape:
                    hint = ": it has an example axis. Take one adapter of it, as in "
                    hint += "lf.unstack(params)[0]"
                raise LoraFuncError(
                    f"params[{key!r}] has shape {tuple(leaf.shape)}, where {tuple(shape)} was "
                    f"expected{hint}"
                )
            if n is None:
                n, first = leaf.shape[0], key
            elif leaf.shape[0] != n:
                raise LoraFuncError(
                    f"the example axis of params[{key!r}] has length {leaf.shape[0]}, and that of "
                    f"params[{first!r}] {n}"
                )

    def weights(self, model: nn.Module) -> dict[str, LayerWeight | ParameterWeight]:
        """path -> the `Weight` of a target.

        Raises LoraFuncError if a target is missing, has another shape or carries an adapter.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        layers = [path for path, base in self.base.items() if base.tensor is None]
        if missing := [path for path in layers if path not in modules]:
            raise LoraFuncError(missing_modules(model, missing))
        for path in layers:
            check_bare(modules[path], path)
        check_base(model)
        accelerate.check_offload(model, self.variants)
        weights: dict[str, Any] = {}
        for path, base in self.base.items():
            if base.tensor is not None:
                weights[path] = parameter_of(model, path, base)
                continue
            weights[path] = read(path, modules[path])
            if weights[path].shape != base.shape:
                raise LoraFuncError(
                    f"{path!r} is {weights[path].shape} in this {type(model).__name__}, but was "
                    f"{base.shape} in the model that the adapter was made for (d_out, d_in)"
                )
        return weights

    def params_of(self, path: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the variant at `path` takes as `params`: leaves and constants under short names."""
        site = self.site(path)
        return {name: params[key] for name, (key, _) in site.leaves.items()} | site.frozen

    def keys_of(self, path: str) -> tuple[str, ...]:
        """The flat keys of the trainable leaves that the layer at `path` uses."""
        return tuple(key for key, _ in self.site(path).leaves.values())

    def remember(self, model: nn.Module) -> None:
        """Notes what torch.compile needs to trace a call on `model`, for as long as it lives."""
        if not self._traceable.knows(model):
            self._traceable.note(model, survey(model))

    def trust(self, model: nn.Module) -> None:
        """Takes the weights of `model`, as they are now, for those that the adapter was made on."""
        self._drift.note(model, self.base)

    def view(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        *,
        call: bool,
        active: Tensor | None = None,
        each: int = 1,
    ) -> View:
        """The view of `model` in which every target carries its part of `params`.

        `call`: for one call. Otherwise the view is kept, and all modules are copied. `active`,
        `each`: as for a call.
        """
        if each != 1:
            parameters = [path for path, base in self.base.items() if base.tensor]
            check_each(each, params, self.shapes, parameters)
        adapted: list[AdaptedLayer] = []

        def replacing(site: Site) -> Callable[[nn.Module], nn.Module]:
            def replace(layer: nn.Module) -> nn.Module:
                adapted.append(AdaptedLayer(layer, site, params, not call))
                return adapted[-1]

            return replace

        replace = {s.path: replacing(s) for s in self._sites if s.base.tensor is None}
        tensors, parameters, held = {}, {}, []
        for site in self._sites if len(replace) < len(self._sites) else ():
            if site.path in replace:
                continue
            weight = parameters[site.path] = parameter_of(model, site.path, site.base)
            if torch.compiler.is_compiling():
                leaves = {name: params[key] for name, (key, _) in site.leaves.items()}
                tensors[id(weight.stored)] = shown(site, weight, entries_of(site, leaves))
            else:
                held.append(AdaptedTensor(weight, site, params, not call))
                tensors[id(weight.stored)] = held[-1]
        kept = not call
        view, missing, versions = make_view(model, replace, self._traceable, kept, tensors)
        if missing:
            raise LoraFuncError(missing_modules(model, missing))
        for layer in adapted:
            layer.settle(call, active, each)
        if call:
            prepare_ahead(model, adapted)
        for path, n in experts_apart(held).items():
            virtual_experts(view.get_submodule(path), n, path)
        return View(view, adapted, held, parameters, versions)

    def __repr__(self) -> str:
        counts = Counter(self.variants.values())
        kinds = ", ".join(f"{count} x {variant}" for variant, count in counts.items())
        total = sum(shape.numel() for shape in self.shapes.values())
        return f"Adapter({kinds}; {total:,} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        parts = self.variants, self.shapes, self.frozen, self.base
        make = functools.partial(Adapter, dropout=self.dropout)
        return make, (*map(dict, parts), self.dtype)


def check_model(model: Any) -> None:
    """Raises LoraFuncError for what is no model, as when arguments are swapped."""
    if not isinstance(model, nn.Module):
        raise LoraFuncError(
            f"model must be a torch.nn.Module, not {type(model).__name__}. A call is "
            "adapted_forward(model, params, batch)"
        )


def check_order(call: str, **given: Any) -> None:
    """Raises LoraFuncError unless adapter and model are what their names say."""
    kinds = {"adapter": Adapter, "model": nn.Module}
    for name, value in given.items():
        if not isinstance(value, kinds[name]):
            raise LoraFuncError(
                f"{call}: {name} must be of type {kinds[name].__name__}, not "
                f"{type(value).__name__}. Check the order of the arguments"
            )
