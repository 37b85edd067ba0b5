"""`adapt`, the `Adapter` that it returns, and `bind`: from variants and targets to a pure function of one flat dict."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calibrate import collect
from .errors import LoraFuncError, listing, near_misses
from .targets import Targets, assign
from .variant import Params, Variant, Weight
from .view import AdaptedLayer, Site, call_arguments, make_view
from .weight import check_layer, check_offload, fingerprint, offloading, weight_of

SHARED = "shared"  # stands for the path in the flat keys of tensors that all layers of a variant share
# Dynamo before 2.13 cannot iterate over `module.__dict__`, though it can over a dict that it meets as a value.
DYNAMO_READS_DICT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def adapt(
    model: nn.Module,
    rules: Variant | Mapping[str, Variant],
    *,
    targets: Targets = Targets(),
    generator: torch.Generator | None = None,
    calibration: Iterable[Any] | None = None,
    stats: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter for `model`, and fresh parameters for it. The model is not modified.

    Args:
        model: any module with linear layers.
        rules: one Variant for all targets, or a mapping pattern -> Variant; the first regex that matches a path (search)
            names its variant, and targets that no pattern matches are left alone.
        targets: which layers.
        generator: the only source of randomness; None is torch's default generator.
        calibration: batches of data for variants that look at some, each in the form that the model is called with; one pass
            over them serves all variants (see `collect`). A layer to which a variant then gives no parameters drops out.
        stats: path -> what `collect` found for the layer, instead of calibration.
        dtype: of the trainable parameters. Frozen constants stay in float32 (float64 where the weight is).

    Returns:
        `(adapter, params)`. `adapter(model, params, batch)` is the adapted forward; `params` is the flat dict
        `"<path>.lora_<name>" -> tensor`, each on the device of its layer, without requires_grad.

    Raises:
        LoraFuncError: no target, a pattern that names none, hyperparameters that a layer does not allow, a variant that needs
            calibration and has none, or the other way round.
    """
    if not isinstance(model, nn.Module):
        raise LoraFuncError(f"model must be a torch.nn.Module, and not {type(model).__name__}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoraFuncError(f"dtype must be a floating torch dtype such as torch.float32, and not {dtype!r}")
    chosen = assign(rules, targets, model)
    variants = {path: variant for path, (variant, _) in chosen.items()}
    layers = {path: layer for path, (_, layer) in chosen.items()}
    check_offload(model, layers)
    for path, layer in layers.items():
        check_layer(path, layer)
    if calibration is not None:
        if stats is not None:
            raise LoraFuncError("calibration= and stats= were both given; stats are what a calibration returned")
        stats = calibrate(model, variants, calibration)
    trainable, frozen = draw(variants, {path: weight_of(layer) for path, layer in layers.items()}, generator, stats)
    given = by_path({**trainable, **frozen})
    if SHARED not in given:
        variants = {path: variant for path, variant in variants.items() if path in given}
        layers = {path: layers[path] for path in variants}
    if not variants:
        raise LoraFuncError(f"{listing(chosen)}: the variants gave parameters to none of the layers")
    params = {key: leaf.to(dtype) for key, leaf in trainable.items()}
    base = {path: Base(weight_of(layer).shape, fingerprint(layer)) for path, layer in layers.items()}
    adapter = Adapter(variants, {key: leaf.shape for key, leaf in params.items()}, frozen, base, dtype)
    adapter.remember(model)
    return adapter, params


class Base(NamedTuple):
    """What an adapter knows of the weight of a layer that it was made for."""

    shape: tuple[int, int]  # (d_out, d_in)
    fingerprint: str | None  # see weight.fingerprint


class Adapter:
    """The adapted forward of a model: `adapter(model, params, batch)`. Immutable, hashable by identity, picklable.

    It holds neither the model nor any trainable tensor. What it knows is which variant adapts which layer, the shapes of the
    parameters, and the frozen constants.
    """

    variants: Mapping[str, Variant]  # path -> Variant
    shapes: Mapping[str, torch.Size]  # flat key -> shape of a trainable leaf
    frozen: Mapping[str, Tensor]  # flat key -> frozen constant
    base: Mapping[str, Base]  # path -> Base
    dtype: torch.dtype  # of the trainable leaves that `init` makes
    _sites: tuple[Site, ...]
    _attributes: dict[int, dict[int, dict[str, Any]]]  # see `remember`

    def __init__(
        self,
        variants: Mapping[str, Variant],
        shapes: Mapping[str, torch.Size],
        frozen: Mapping[str, Tensor],
        base: Mapping[str, Base],
        dtype: torch.dtype,
    ):
        keys, constants = by_path(shapes), by_path(frozen)
        sites = tuple(
            Site(
                path,
                variant,
                {name: (key, len(shape)) for name, (key, shape) in (keys.get(SHARED, {}) | keys.get(path, {})).items()},
                {name: leaf for name, (_, leaf) in (constants.get(SHARED, {}) | constants.get(path, {})).items()},
            )
            for path, variant in variants.items()
        )
        vars(self).update(
            variants=MappingProxyType(dict(variants)),
            shapes=MappingProxyType(dict(shapes)),
            frozen=MappingProxyType(dict(frozen)),
            base=MappingProxyType(dict(base)),
            dtype=dtype,
            _sites=sites,
            _attributes={},
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"an Adapter is immutable, so {name!r} cannot be set")

    def __call__(self, model: nn.Module, params: Mapping[str, Tensor], batch: Any) -> Any:
        """What the model returns for `batch`, adapted: a pure function of `params`, differentiable in them and in the batch.

        `batch`: a mapping becomes keyword arguments, a tuple or list positional ones, anything else the one argument.

        Leaves may have one leading axis more than their own shape, the example axis (see `population`): in the layers that
        use them, example i of the batch then runs through entry i. It must be the first axis of what those layers see.

        Raises:
            LoraFuncError: `params` with missing or unexpected keys, wrong shapes or integer dtypes; a model without the
                targets; an example axis that a layer does not see; a batch that no model takes; activation checkpointing of
                a kind that loses gradients.
        """
        args, kwargs = call_arguments(batch)
        self.check(params)
        expects_grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in params.values())
        view = self._view(model, params, expects_grad=expects_grad)
        try:
            return view(*args, **kwargs)
        except RuntimeError as error:
            if "saved tensor hooks" in str(error):
                raise LoraFuncError(
                    "torch.func.grad and vjp cannot run through activation checkpointing, nor through anything else that packs "
                    "saved tensors. Use lf.value_and_grad or plain autograd outside of transforms, or switch it off "
                    "(gradient_checkpointing_disable)"
                ) from error
            if "data pointer" in str(error) and any(offloading(module) for module in model.modules()):
                raise LoraFuncError(
                    "torch.func transforms cannot run through weights that accelerate offloads to the disk. Use "
                    "lf.value_and_grad or plain autograd outside of transforms, or offload to the CPU"
                ) from error
            raise

    @torch.inference_mode(False)
    def init(
        self, model: nn.Module, *, generator: torch.Generator | None = None, stats: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Fresh parameters for this adapter, as `adapt` draws them. A leaf with an anchor starts at it (see `Params`).

        `stats`: path -> what `collect` found for the layer, for variants whose trainable leaves start from data (EVA).
        """
        layers = self.layers(model)
        anchored = {key: self.frozen[f"{key}0"] for key in self.shapes if f"{key}0" in self.frozen}
        drawn = {site.path: site.variant for site in self._sites if not anchored.keys() >= set(self.keys_of(site.path))}
        weights = {path: weight_of(layers[path]) for path in drawn}
        trainable, _ = draw(drawn, weights, generator, stats) if drawn else ({}, {})
        start = {**trainable, **anchored}
        for key, shape in self.shapes.items():
            if key not in start or start[key].shape != shape:
                found = f"shape {tuple(start[key].shape)}" if key in start else "no parameters"
                raise LoraFuncError(f"{key!r} has shape {tuple(shape)} in this adapter, and {found} by these stats; adapt anew")
        return {key: start[key].to(self.dtype, copy=True) for key in self.shapes}

    def replace(self, **fields: Any) -> Adapter:
        """A new Adapter with other hyperparameters in every variant that has them, as in `adapter.replace(coeff=-1.0)`.

        Raises LoraFuncError for a field that no variant has, and for a value that takes parameters of other shapes.
        """
        known = {field.name for variant in self.variants.values() for field in dataclasses.fields(variant)}
        if unknown := [name for name in fields if name not in known]:
            raise LoraFuncError(f"no variant of this adapter has a field {listing(unknown)}.{near_misses(unknown[0], known)}")
        variants = {}
        for path, variant in self.variants.items():
            own = {field.name for field in dataclasses.fields(variant)}
            variants[path] = dataclasses.replace(variant, **{name: value for name, value in fields.items() if name in own})
        leaves = {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()} | dict(self.frozen)
        trainable, frozen = blank(variants, self.base, leaves)
        expected = {**trainable, **frozen}
        for key, leaf in leaves.items():
            if key not in expected or expected[key].shape != leaf.shape:
                raise LoraFuncError(f"{fields} takes other parameters than {key!r} of shape {tuple(leaf.shape)}; adapt anew")
        return Adapter(variants, self.shapes, self.frozen, self.base, self.dtype)

    @property
    def lr_scale(self) -> dict[str, float]:
        """flat key -> the factor by which the leaf should learn faster than others, as its variant says (LoRA+)."""
        scales = {}
        for site in self._sites:
            for name, (key, _) in site.leaves.items():
                scales[key] = float(site.variant.lr_scale.get(name, 1.0))
        return {key: scales[key] for key in self.shapes}

    @torch.inference_mode(False)
    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """A new Adapter whose frozen constants went through `Tensor.to`, as in `adapter.to("cuda")`. Indices stay integers."""
        frozen = {key: leaf.to(*args, **kwargs) for key, leaf in self.frozen.items() if leaf.is_floating_point()}
        for key, leaf in self.frozen.items():
            frozen.setdefault(key, leaf.to(torch.empty(0, device=leaf.device).to(*args, **kwargs).device))
        return Adapter(self.variants, self.shapes, frozen, self.base, self.dtype)

    @property
    def targets(self) -> tuple[str, ...]:
        """The paths of the adapted layers."""
        return tuple(self.variants)

    def check(self, params: Mapping[str, Tensor], *, examples: bool = True) -> None:
        """Raises LoraFuncError unless `params` has exactly this adapter's keys, with floating tensors of their shapes.

        With `examples`, each may have an example axis before its own shape, of one length for all.
        """
        if not isinstance(params, Mapping):
            raise LoraFuncError(
                f"params must be a mapping flat key -> tensor, as adapt returns it, and not {type(params).__name__}"
            )
        if params.keys() != self.shapes.keys():
            raise LoraFuncError(key_mismatch(params.keys(), self.shapes.keys()))
        n, first = None, None
        for key, shape in self.shapes.items():
            leaf = params[key]
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                given = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
                raise LoraFuncError(f"params[{key!r}] is {given}, where a floating tensor of shape {tuple(shape)} was expected")
            if leaf.shape == shape:
                continue
            if leaf.shape[1:] != shape or not examples:
                hint = f", or {('n', *shape)} with an example axis" if examples else ""
                if leaf.shape[1:] == shape:
                    hint = ": it has an example axis. Take one adapter of it, as in lf.unstack(params)[0]"
                raise LoraFuncError(f"params[{key!r}] has shape {tuple(leaf.shape)}, where {tuple(shape)} was expected{hint}")
            if n is None:
                n, first = leaf.shape[0], key
            elif leaf.shape[0] != n:
                raise LoraFuncError(
                    f"the example axis of params[{key!r}] has length {leaf.shape[0]}, and that of params[{first!r}] {n}"
                )

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """path -> layer of `model`. Raises LoraFuncError where a target is missing or has another shape."""
        modules = dict(model.named_modules(remove_duplicate=False))
        if missing := [path for path in self.variants if path not in modules]:
            raise LoraFuncError(missing_modules(model, missing))
        check_offload(model, self.variants)
        for path, base in self.base.items():
            check_layer(path, modules[path])
            if weight_of(modules[path]).shape != base.shape:
                raise LoraFuncError(
                    f"{path!r} is {weight_of(modules[path]).shape} in this {type(model).__name__}, and was {base.shape} in the "
                    "model that the adapter was made for (d_out, d_in)"
                )
        return {path: modules[path] for path in self.variants}

    def params_of(self, path: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the variant at `path` takes as `params`: its leaves of the flat dict and its constants, under short names."""
        site = next(site for site in self._sites if site.path == path)
        return {name: params[key] for name, (key, _) in site.leaves.items()} | site.frozen

    def keys_of(self, path: str) -> tuple[str, ...]:
        """The flat keys of the trainable leaves that the layer at `path` uses."""
        site = next(site for site in self._sites if site.path == path)
        return tuple(key for key, _ in site.leaves.values())

    def remember(self, model: nn.Module) -> None:
        """Lets torch.compile trace a call on `model`, for as long as the model lives.

        Only dynamo before torch 2.13 needs it, and modules that are put into the model later are unknown to it.
        """
        if not DYNAMO_READS_DICT:
            self._attributes[id(model)] = {id(module): module.__dict__ for module in model.modules()}
            weakref.finalize(model, self._attributes.pop, id(model), None)

    def _view(
        self, model: nn.Module, params: Mapping[str, Tensor], *, expects_grad: bool = False, whole: bool = False
    ) -> nn.Module:
        """The view of `model` in which every target carries its part of `params`."""
        replace = {
            site.path: functools.partial(AdaptedLayer, site=site, params=params, expects_grad=expects_grad)
            for site in self._sites
        }
        attributes = vars
        if not DYNAMO_READS_DICT and torch.compiler.is_compiling():
            known = self._attributes.get(id(model), {})
            attributes = lambda module: known[id(module)]  # noqa: E731 (dynamo)
        view, missing = make_view(model, replace, attributes, whole)
        if missing:
            raise LoraFuncError(missing_modules(model, missing))
        return view

    def __repr__(self) -> str:
        counts = Counter(self.variants.values())
        kinds = ", ".join(f"{count} x {variant}" for variant, count in counts.items())
        return f"Adapter({kinds}; {sum(shape.numel() for shape in self.shapes.values()):,} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapter, (dict(self.variants), dict(self.shapes), dict(self.frozen), dict(self.base), self.dtype)


def bind(adapter: Adapter, model: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """The adapted model as a module: a view of `model` that holds `params`, to `generate` from, evaluate, checkpoint or serve.

    It is of the class of `model` and shares its weights and buffers; its modules are copies, so `eval()` on it leaves the
    model as it is, and later changes to the model's modules do not reach it. Raises what calling the adapter raises.
    """
    adapter.check(params)
    adapter.remember(model)
    return adapter._view(model, params, whole=True)


def calibrate(model: nn.Module, variants: Mapping[str, Variant], batches: Iterable[Any]) -> dict[str, Any]:
    """path -> stats, for the layers whose variant has a statistic. Raises LoraFuncError where none has."""
    statistics = {path: variant.statistic for path, variant in variants.items()}
    wanted = {path: statistic for path, statistic in statistics.items() if statistic is not None}
    if not wanted:
        kinds = listing(dict.fromkeys(type(variant).__name__ for variant in variants.values()))
        raise LoraFuncError(f"calibration= was given, and {kinds} looks at no data: leave it out")
    return collect(model, wanted, batches, wanted)


@torch.no_grad()
def draw(
    variants: Mapping[str, Variant],
    weights: Mapping[str, Weight],
    generator: torch.Generator | None,
    stats: Mapping[str, Any] | None = None,
    like: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fresh trainable and frozen leaves of all layers, as two flat dicts. Raises LoraFuncError with the path of the layer.

    `stats`: path -> what calibration found. `like`: path -> leaves under short names; then nothing is drawn, and the leaves
    are what `Variant.like` says.
    """
    trainable: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    sharing: dict[str, Variant] = {}

    def add(path: str, drawn: Params, device: torch.device) -> None:
        if device.type != "meta" and any(leaf.is_meta for leaf in (drawn.trainable | drawn.frozen).values()):
            raise LoraFuncError(
                f'the layer is on {device}, and its parameters were drawn on "meta", without data: call outside of '
                'torch.device("meta")'
            )
        for leaves, flat in ((drawn.trainable, trainable), (drawn.frozen, frozen)):
            flat.update({flat_key(path, name): leaf.to(device).contiguous() for name, leaf in leaves.items()})

    for variant in dict.fromkeys(variants.values()):
        group = [weights[path] for path in variants if variants[path] == variant]
        shared = variant.init_shared(group, generator)
        for name in shared.trainable | shared.frozen:
            if name in sharing:
                raise LoraFuncError(
                    f"{sharing[name]} and {variant} both share a tensor called {name!r} between layers; adapt them apart"
                )
            sharing[name] = variant
        add(SHARED, shared, group[0].device)
    for path, variant in variants.items():
        kind = weights[path].device.type
        try:
            if like is None:
                with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):  # so that it rounds no decomposition
                    drawn = variant.init(weights[path], generator, (stats or {}).get(path))
                add(path, drawn, weights[path].device)
            else:
                add(path, variant.like(weights[path], like.get(path, {})), weights[path].device)
        except LoraFuncError as error:
            raise LoraFuncError(f"{path!r}: {error}") from error
    return trainable, frozen


def blank(
    variants: Mapping[str, Variant], base: Mapping[str, Base], leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `draw` would return, on the meta device: nothing is drawn, and no decomposition is computed."""
    given = {path: {name: leaf for name, (_, leaf) in own.items()} for path, own in by_path(leaves).items()}
    with torch.device("meta"):
        return draw(variants, {path: Weight(torch.empty(base[path].shape)) for path in variants}, None, like=given)


def flat_key(path: str, name: str) -> str:
    """ "model.layers.0.q_proj", "A" -> "model.layers.0.q_proj.lora_A"."""
    return f"{path}.lora_{name}" if path else f"lora_{name}"


def by_path(flat: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, Any]]]:
    """path -> short name -> (flat key, value)."""
    nested: dict[str, dict[str, tuple[str, Any]]] = {}
    for key, value in flat.items():
        path, _, name = key.rpartition("lora_")
        nested.setdefault(path.removesuffix("."), {})[name] = (key, value)
    return nested


def key_mismatch(given: Iterable[str], expected: Iterable[str]) -> str:
    """The message for a flat dict with other keys than expected."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    parts = []
    if missing:
        parts.append(f"missing {listing(missing)}.")
    if unexpected:
        parts.append(f"unexpected {listing(unexpected)}.{near_misses(unexpected[0], missing or expected)}")
    return "params: " + " ".join(parts)


def missing_modules(model: nn.Module, missing: Sequence[str]) -> str:
    """The message for a model without some of the targets."""
    paths = [path for path, _ in model.named_modules()]
    return f"{type(model).__name__} has no layer {listing(missing)}.{near_misses(missing[0], paths)}"
