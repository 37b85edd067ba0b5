"""The view: a structural copy of a model in which some layers are replaced, while the model itself is never touched.

Copied is only what must differ: the containers on the way to a replaced layer, and modules whose parameters require grad,
which the copy holds detached, so that the base is frozen without a `requires_grad_(False)` on the user's model. A copy is a
new object with a copy of the original's `__dict__` and of its tables of hooks; weights, buffers, the hooks themselves and all
other modules are shared. Layers with packed weights, and modules that transformers is about to hook, are copied too. A view is
made anew for every call, which takes a millisecond or two, so it follows the model as it is now: train or eval, moved, patched,
checkpointed. Nothing in it is shared between calls, so threads and nested transforms cannot meet in it. It is made by plain
Python that torch.compile traces, so a compiled call guards on the model and is traced again when the model changes.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, vmap
from torch.nn.utils import parametrize

from .errors import LoraFuncError
from .product import in_transform
from .variant import Variant
from .weight import is_packed, weight_hooks, weight_of

MODULE_STATE = frozenset(nn.Module().__dict__)  # what every module has; shared or replaced as a whole, never searched
HOOKS = frozenset(name for name in MODULE_STATE if "_hooks" in name)
PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})  # types that refer to nothing


def make_view(
    model: nn.Module,
    replace: Mapping[str, Callable[[nn.Module], nn.Module]],
    attributes: Callable[[nn.Module], dict[str, Any]] = vars,
    whole: bool = False,
) -> tuple[nn.Module, list[str]]:
    """A structural copy of `model` in which the module at each path of `replace` is `replace[path](module)`.

    A module that stands in the tree twice is copied once and stays in both places. `whole` copies every module, so that a
    user may call `eval()` on the result. `attributes` returns the `__dict__` of a module (see `Adapter.remember`).
    Returns the copy, and the paths of `replace` that the model does not have.
    """
    structure = Structure(replace, whole)
    view = structure.visit(model, "")
    new = structure.new
    for module, copy, own in structure.copies:
        standing_in = new[id(module)]
        new[id(module)] = copy  # what a replaced layer says of itself means its copy; what others say means the replacement
        for name, value in attributes(module).items():
            if name in HOOKS:
                value = value.copy() if value else type(value)()  # noqa: PLW2901  (what is registered on a copy stays there)
            elif name not in MODULE_STATE and type(value) not in PLAIN:
                if name == "forward":
                    check_globals(value, new, module)
                value = rebound(value, new)  # noqa: PLW2901
            copy.__dict__[name] = value
        for name, value in own.items():
            copy.__dict__[name] = value
        new[id(module)] = standing_in
    return view, list(structure.missing)


class Structure:
    """The first pass of `make_view`: which modules are copied. The copies are empty still."""

    def __init__(self, replace: Mapping[str, Callable[[nn.Module], nn.Module]], whole: bool):
        self.replace = replace
        self.whole = whole
        self.missing = dict.fromkeys(replace)
        self.copies: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []  # original, copy, attributes of the copy alone
        self.new: dict[int, Any] = {}  # id of an original module or parameter -> what stands for it in the view

    def visit(self, module: nn.Module, path: str, hooked: tuple[type, ...] = ()) -> nn.Module:
        """What stands for `module` in the view. Modules of the classes `hooked` are copied, too."""
        if id(module) in self.new:
            return self.new[id(module)]
        if hasattr(type(module), "_can_record_outputs"):
            hooked = recorded_classes(module)
        children, detached = {}, {}
        for name, child in module._modules.items():
            if child is not None:
                standing_in = self.visit(child, f"{path}.{name}" if path else name, hooked)
                if standing_in is not child:
                    children[name] = standing_in
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                detached[name] = self.new[id(parameter)] = frozen(parameter, path)
        standing_in, kind = module, class_in_view(module)
        special = kind is not type(module) or isinstance(module, hooked)
        if self.whole or children or detached or special or (module._forward_pre_hooks and weight_hooks(module)):
            if parametrize._cache_enabled and parametrize.is_parametrized(module):
                raise LoraFuncError(
                    f"torch.nn.utils.parametrize.cached() keeps weights by the id of their module, and {path!r} is a passing "
                    "copy here. Leave cached(), or freeze the model with requires_grad_(False)"
                )
            standing_in = object.__new__(kind)
            own: dict[str, Any] = {"_modules": {**module._modules, **children}}
            if detached:
                own["_parameters"] = {**module._parameters, **detached}
            if children and isinstance(module, nn.TransformerEncoderLayer):
                own["activation_relu_or_gelu"] = 0  # no fused path, which reads the weights of linear1 and linear2 itself
            self.copies.append((module, standing_in, own))
        if path in self.missing:
            del self.missing[path]
            standing_in = self.replace[path](standing_in)
        self.new[id(module)] = standing_in
        return standing_in


def frozen(parameter: Tensor, path: str) -> Tensor:
    """What stands for a parameter that requires grad. Raises LoraFuncError, with the path of its module, for a sharded one."""
    if type(parameter) is nn.Parameter and not parameter.is_meta:
        return parameter.detach()
    if parameter.is_meta:  # accelerate, which offloads it, makes another of its class, with its requires_grad
        return nn.Parameter(parameter.detach(), requires_grad=False)
    if hasattr(parameter, "full_tensor"):  # a DTensor; fully_shard gathers into modules of its own, and not into copies
        raise LoraFuncError(
            f"the parameters of {path!r} are sharded and require grad. Freeze the base, model.requires_grad_(False), before "
            "fully_shard"
        )
    return parameter.detach()


def recorded_classes(model: Any) -> tuple[type, ...]:
    """The classes of modules on which a model of transformers will register hooks, to return their outputs.

    It does so in the middle of the first forward that asks for them, once for each model and on the modules that it finds, so
    a view that shared such a module would leave a hook on it at every call. Names instead of classes may mean any module.
    """
    if model.__dict__.get("_output_capturing_hooks_installed"):
        return ()
    specs = []
    for spec in (model._can_record_outputs or {}).values():
        specs += spec if isinstance(spec, list) else [spec]
    classes = [getattr(spec, "target_class", spec) for spec in specs]
    return tuple(kind if isinstance(kind, type) else nn.Module for kind in classes)


def class_in_view(module: nn.Module) -> type[nn.Module]:
    """The class of the copy of `module`: its own, but for a layer with a packed weight one that every transform can pass."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter or not is_packed(weight):
        return type(module)
    return safe(type(module))


SAFE: dict[type[nn.Module], type[nn.Module]] = {}  # what `safe` returned; functools.cache would be a warning under dynamo


def safe(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer with a packed weight, which runs the layer's own kernel, but under transforms its `Weight`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wants_grad = x.requires_grad and torch.is_grad_enabled()
        if in_transform() or (wants_grad and weight_of(self).inference_only):
            out = weight_of(self)(x)
            return out if self.bias is None else out + self.bias.to(out.dtype)
        return kind.forward(self, x, *args, **kwargs)

    if kind not in SAFE:
        SAFE[kind] = type(kind.__name__, (kind,), {"forward": forward})
    return SAFE[kind]


def rebound(value: Any, new: Mapping[int, Any]) -> Any:
    """`value` with the modules and parameters that `new` replaces replaced; `value` itself where it refers to none.

    accelerate, for one, sets `module.forward = partial(new_forward, module)`: kept as it is, it would run the original
    children and leave every adapter below it inert, without a word. Containers are searched one level deep, functions in what
    they close over.
    """
    kind = type(value)
    if kind is list or kind is tuple:
        items = [rebound_item(item, new) for item in value]
        return kind(items) if any(item is not old for item, old in zip(items, value)) else value
    if kind is dict or kind is OrderedDict:
        entries = {name: rebound_item(item, new) for name, item in value.items()}
        return kind(entries) if any(item is not value[name] for name, item in entries.items()) else value
    return rebound_item(value, new)


def rebound_item(value: Any, new: Mapping[int, Any]) -> Any:
    kind = type(value)
    if kind is types.MethodType:
        owner = rebound_item(value.__self__, new)
        if owner is value.__self__:
            return value
        function: Any = value.__func__  # a function, or whatever else can be called
        name = getattr(function, "__name__", "")
        if getattr(type(value.__self__), name, None) is function:  # what stands for the owner may have a method of its own
            function = getattr(type(owner), name, function)
        return types.MethodType(function, owner)
    if kind is functools.partial:
        function, args, kwargs = rebound_item(value.func, new), rebound(value.args, new), rebound(value.keywords, new)
        same = function is value.func and args is value.args and kwargs is value.keywords
        return value if same else functools.partial(function, *args, **kwargs)
    if kind is types.FunctionType:
        return rebound_function(value, new)
    if issubclass(kind, (nn.Module, Tensor)):  # of the type: isinstance would ask objects with a __getattribute__ of their own
        return new.get(id(value), value)
    return value


def rebound_function(function: Any, new: Mapping[int, Any]) -> Any:
    """A function that closes over modules, as after `old = module.forward`, `module.forward = lambda x: old(x)`.

    What torch.compile wraps is unwrapped: its guards are on the original, so it would be traced anew for each view.
    """
    compiled = getattr(function, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        original = rebound_item(compiled, new)
        return function if original is compiled else original
    if not function.__closure__ or id(function) in new:
        return function
    new = {**new, id(function): function}  # functions may close over each other
    cells = tuple(rebound_cell(cell, new) for cell in function.__closure__)
    if all(cell is old for cell, old in zip(cells, function.__closure__)):
        return function
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin


def rebound_cell(cell: Any, new: Mapping[int, Any]) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # empty still
        return cell
    standing_in = rebound(value, new)
    return cell if standing_in is value else types.CellType(standing_in)


def check_globals(forward: Any, new: Mapping[int, Any], module: nn.Module) -> None:
    """Raises LoraFuncError where a `forward` set on a module reaches the original by a global name, as in a notebook."""
    function = getattr(forward, "__func__", forward)
    if type(function) is not types.FunctionType:
        return
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is not None and rebound(value, new) is not value:
            raise LoraFuncError(
                f"the forward that was set on a {type(module).__name__} reaches the model by the global name {name!r}, past "
                "what stands for it in a call, so that adapters would be inert. Set it as types.MethodType(forward, module), "
                "and have it call type(module).forward(self, ...)"
            )


class StandIn(nn.Module):
    """What stands for a layer in a view. Attributes that it lacks are those of the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        # straight into the dicts, here and below: `nn.Module.__setattr__` would take longer than all else that a view costs
        self._modules["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class Site(NamedTuple):
    """One adapted layer, as a call needs to know it."""

    path: str
    variant: Variant
    leaves: dict[str, tuple[str, int]]  # short name -> flat key and number of axes, of the trainable leaves
    frozen: dict[str, Tensor]  # short name -> constant


class AdaptedLayer(StandIn):
    """What stands for an adapted layer in a view: `variant.apply(x, layer(variant.transform_input(x)), ..)`.

    Leaves with an example axis make it that of the variant's functions, by a `torch.vmap` that the model around never sees:
    it runs once, with its fused attention and its masks, on the whole batch.

    Its trainable leaves are buffers called `lora_<name>`, so the flat dict's keys are paths in the view, and
    `torch.func.functional_call(view, params, ...)` works too.
    """

    def __init__(self, layer: nn.Module, site: Site, params: Mapping[str, Tensor], expects_grad: bool):
        super().__init__(layer)
        self.__dict__["site"] = site
        self.__dict__["expects_grad"] = expects_grad  # whether gradients were on, and wanted, where the call began
        for name, (key, _) in site.leaves.items():
            self._buffers[f"lora_{name}"] = params[key]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        path, variant, leaves, frozen = self.site
        if self.expects_grad and not torch.is_grad_enabled():
            raise LoraFuncError(
                f"gradients are switched off inside the model where it calls {path!r}, so its adapter would get none. With "
                "activation checkpointing, pass use_reentrant=False; otherwise leave this layer out of the targets, or call "
                "under torch.no_grad()"
            )
        params = {name: self._buffers[f"lora_{name}"] for name in leaves} | frozen
        device = next((leaf.device for leaf in params.values()), x.device)
        if x.device != device and hasattr(self.layer, "_hf_hook"):
            x = x.to(device)  # as accelerate's hook does, but for the layer alone
        own = [name for name, (_, dim) in leaves.items() if params[name].dim() > dim]  # those with an example axis
        if not own:
            base_out = self.layer(variant.transform_input(x, params), *args, **kwargs)
            return variant.apply(x, base_out, weight_of(self.layer), params)
        n = params[own[0]].shape[0]
        if x.dim() < 2 or x.shape[0] != n:
            raise LoraFuncError(
                f"{path!r} sees an input of shape {tuple(x.shape)}, whose first axis is not that of the {n} examples for which "
                "it has parameters: the batch has another size, or the model moves its examples before this layer (time first, "
                "tokens flattened, experts). Leave the layer out of the targets, or give it parameters without the example axis"
            )
        weight = weight_of(self.layer)
        changed = x
        if overrides(variant, "transform_input"):
            changed = over_examples(variant.transform_input, (x,), params, own)
        base_out = self.layer(changed, *args, **kwargs)
        if not overrides(variant, "apply"):
            return base_out
        return over_examples(lambda x, base_out, params: variant.apply(x, base_out, weight, params), (x, base_out), params, own)


def overrides(variant: Variant, method: str) -> bool:
    """Whether the variant has a `transform_input` or an `apply` of its own: under vmap, even the identity costs 0.1 ms."""
    return getattr(type(variant), method) is not getattr(Variant, method)


def over_examples(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], params: dict[str, Tensor], own: list[str]
) -> Tensor:
    """`function(*inputs, params)` for each example, along the first axis of the inputs and of the leaves called `own`.

    What all examples share goes in by closure: `torch.vmap` takes longer over a pytree than a variant over its kernels.
    """

    def of_one(*tensors: Tensor) -> Tensor:
        return function(*tensors[: len(inputs)], params | dict(zip(own, tensors[len(inputs) :])))

    return vmap(of_one)(*inputs, *(params[name] for name in own))


def call_arguments(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """`(args, kwargs)` for the model. Raises LoraFuncError for what cannot be a batch."""
    if isinstance(batch, Mapping):
        if not all(isinstance(name, str) for name in batch):
            raise LoraFuncError(
                f"a mapping batch becomes keyword arguments, so its keys must be strings, and not {list(batch)!r}"
            )
        return (), batch
    if isinstance(batch, (tuple, list)):
        return batch, {}
    if batch is None or isinstance(batch, (str, bytes, bool, int, float, set, frozenset, Iterator)):
        raise LoraFuncError(
            f"batch is {type(batch).__name__}; expected a mapping of keyword arguments such as {{'input_ids': ids}}, a tuple "
            "or list of positional ones, or the one argument of the model, such as a tensor"
        )
    return (batch,), {}
