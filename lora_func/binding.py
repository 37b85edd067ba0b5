"""`bind`: the adapted model as a module, for code that wants one: trainers, `generate`, DDP."""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .engine.adapter import Adapter, check_order
from .engine.ahead import prepare_ahead
from .engine.batch import check_no_mask
from .engine.holder import Holder, is_parameter
from .engine.keys import key_mismatch
from .engine.reach import View
from .engine.view import twin
from .errors import LoraFuncError
from .files.save import save
from .libraries import transformers
from .libraries.functorch import in_transform
from .precision import no_inference_mode
from .variant import Weight

Model = TypeVar("Model", bound=nn.Module)


def bind(adapter: Adapter, model: Model, params: Mapping[str, Tensor], *, each: int = 1) -> Model:
    """The adapted model as a module, to train, generate from, evaluate or serve.

    The result is a view of `model` that holds `params`, of the model's own class. Its trainable
    parameters are the leaves: the very tensors of `params`, under the same names. `bind` marks
    them for training (`requires_grad_()`), unless gradients are switched off around it; that is
    the one thing that it changes of its arguments. A leaf that is computed from other tensors is
    a buffer. The base is frozen in it.

    It shares the memory of the model's weights, but its modules, parameters, buffers and configs
    are objects of its own. So `eval()`, `half()` and `to()` on it leave the model as it is; leaves
    stay the tensors of `params`. Later changes to the model's modules do not reach it.

    With an example axis, a transformers model generates from as many prompts as there are examples:
    each is continued by its own adapter, on all of its beams. With `each`, an adapter has so many
    prompts, one after the other.

    In eval mode and without gradients it prepares the leaves once, until one of them changes. A
    write through `.data` is not noticed then: call `eval()` after it, or write in place.

    Its state is the adapter's: `state_dict()` has the leaves and the frozen constants under their
    flat keys, and no weight of the base. `save_pretrained(folder)`, of a transformers model,
    writes a file that `lf.load(folder, model)` reads. `copy.deepcopy` copies the adapter, and
    shares the weights of the base.

    Args:
        adapter: as `adapt` or `load` returned it.
        model: the model that the adapter was made for, or one with the same layers.
        params: flat key -> tensor, as for a call.
        each: as for a call.

    Raises:
        LoraFuncError: what calling the adapter raises for bad params or another model.
    """
    check_order("bind(adapter, model, params)", adapter=adapter, model=model)
    adapter.check(params)
    adapter.remember(model)
    if torch.is_grad_enabled():
        for leaf in params.values():
            if is_parameter(leaf) and not leaf.is_inference():
                leaf.requires_grad_()
                leaf._is_param = True  # so nn.Parameter knows a tensor that it did not make
    with torch.inference_mode(False):  # its tensors could not be part of a backward pass
        view = adapter.view(model, params, call=False, each=each)
    adapter._drift.check(model, view.weights(), adapter.base)
    Face(adapter, view, each).attach(model)
    return cast(Model, view.module)


class Face:
    """What a bound view does differently from the model: its state, moves and copies."""

    def __init__(self, adapter: Adapter, view: View, each: int):
        self.adapter = adapter
        self.each = each
        self.parts = view
        self.view = view.module
        self.layers = view.layers
        self.tensors = view.tensors
        self.repeats: dict[int, int] = {}  # thread -> rows for each prompt while it generates
        self.running: set[int] = set()  # threads in which a forward runs
        for layer in self.layers:
            layer.__dict__["_repeats"] = self.repeats
            layer.__dict__["_running"] = self.running

    def attach(self, model: nn.Module) -> None:
        """Replaces the view's own methods by these."""
        for module in self.view.modules():
            module.__dict__["_load_from_state_dict"] = leave_alone
        self.drift = self.adapter._drift
        self.view.register_forward_pre_hook(self.starting, with_kwargs=True)
        self.view.register_forward_hook(self.forwarded)
        self.view.register_forward_hook(self.ended, always_call=True)
        own: dict[str, Callable[..., Any]] = {
            "state_dict": self.state_dict,
            "_load_from_state_dict": self.load,
            "_apply": self.apply,
            "__deepcopy__": self.deepcopy,
        }
        if hasattr(type(self.view), "save_pretrained"):
            own["save_pretrained"] = self.save_pretrained
        if hasattr(type(self.view), transformers.EXPAND) and self.examples() is not None:
            own |= {"generate": self.generate, transformers.EXPAND: self.expand}
        self.view.__dict__.update(own)
        transformers.allow_training(self.view)
        transformers.own_configs(self.view)
        self.watch = self.adapter._reach.watch(model, self.parts, kept=True)

    @property
    def holders(self) -> list[Holder]:
        """The modules that hold the leaves."""
        return [*self.layers, *self.tensors]

    def leaves(self) -> dict[str, Tensor]:
        """The flat dict, as the layers hold it now."""
        held = {}
        for holder in self.holders:
            leaves = holder.leaves()
            for name, (key, _) in holder._site.leaves.items():
                held[key] = leaves[name]
        return {key: held[key] for key in self.adapter.shapes}

    def examples(self) -> int | None:
        """How many examples the parameters are for; None if no leaf has an example axis."""
        plain = [holder.plain() for holder in self.holders]
        return next((self.each * len(p.params[name]) for p in plain for name in p.own), None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with an adapter for each prompt.

        Beams and `num_return_sequences` repeat a prompt; all its rows run through its adapter.
        Raises LoraFuncError unless there are as many prompts as adapters.
        """
        try:
            own: Any = type(self.view)
            return own.generate(self.view, *args, **kwargs)
        finally:
            self.repeats.pop(threading.get_ident(), None)

    def expand(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Called by `generate` to repeat each prompt `expand_size` times."""
        prompts, n = kwargs.get("input_ids"), self.examples()
        rows = prompts.shape[0] if isinstance(prompts, Tensor) else n
        if rows != n:
            raise LoraFuncError(
                f"generate got {rows} prompts, but the module has adapters for {n}. Bind an "
                "adapter for each prompt, as lf.select(population, ids) gives"
            )
        self.repeats[threading.get_ident()] = expand_size
        kind = type(self.view)
        own = inspect.getattr_static(kind, transformers.EXPAND)  # a method, or a static one
        return own.__get__(self.view, kind)(expand_size, *args, **kwargs)

    def starting(self, view: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Before a forward. Raises LoraFuncError for arguments that it would ignore."""
        check_no_mask(view, kwargs)
        if not torch.compiler.is_compiling():
            self.watch.begin(self.view.training)
        for tensor in self.tensors:
            tensor.begin()
        if not (torch.compiler.is_compiling() or in_transform()):
            with no_inference_mode():
                prepare_ahead(view, [layer for layer in self.layers if layer.begin()])
            self.running.add(threading.get_ident())

    def ended(self, *_: Any) -> None:
        """After a forward, whether or not it raised."""
        for tensor in self.tensors:
            tensor.end()
        if not torch.compiler.is_compiling():
            self.running.discard(threading.get_ident())

    def weights(self) -> dict[str, tuple[Tensor | None, Weight]]:
        """Path of a target -> the base's tensor, and its `Weight`."""
        return {holder._site.path: (holder.stored, holder._weight) for holder in self.holders}

    def forwarded(self, *_: Any) -> None:
        """After a forward: looks for layers that did not run."""
        if not torch.compiler.is_compiling():
            self.watch.check()
            self.drift.check(self.view, self.weights(), self.adapter.base)

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The leaves and the constants, under their flat keys.

        With `keep_vars`, all tensors of the view, the base's too: torch.export asks so for what a
        program may read.
        """
        if keep_vars:
            asked = {"destination": destination, "prefix": prefix, "keep_vars": True}
            return type(self.view).state_dict(self.view, **asked)
        destination = OrderedDict() if destination is None else destination
        for key, leaf in {**self.leaves(), **self.adapter.frozen}.items():
            destination[f"{prefix}{key}"] = leaf.detach()
        return destination

    def load(  # noqa: PLR0917  (the arguments of nn.Module._load_from_state_dict)
        self,
        state: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Copies the adapter's tensors out of a state dict into the leaves."""
        given = {k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)}
        leaves, frozen = self.leaves(), self.adapter.frozen
        missing += [prefix + key for key in leaves if key not in given]
        unexpected += [prefix + key for key in given if key not in {**leaves, **frozen}]
        if given and not given.keys() & leaves.keys():  # strict or not, it is of something else
            errors.append(key_mismatch(given, leaves))
        for key in given.keys() & {**leaves, **frozen}.keys():
            own, other = {**leaves, **frozen}[key], given[key]
            if own.shape != other.shape:
                errors.append(f"{key!r} has shape {tuple(other.shape)}, not {tuple(own.shape)}")
            elif key in frozen and not torch.equal(own, other.to(own)):
                errors.append(
                    f"the constant {key!r} is that of another adapter: lf.load reads such a file, "
                    "and lf.bind makes a module of what it returns"
                )
        if not errors:
            with torch.no_grad():
                for key in given.keys() & leaves.keys():
                    leaves[key].copy_(given[key])

    def apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """`to`, `half` and the like: constants move with the leaves, and keep their dtype."""
        type(self.view)._apply(self.view, fn, *args, **kwargs)
        self.adapter = self.adapter.placed(lambda t: t.to(fn(t).device))
        for holder in self.holders:
            holder.__dict__["_site"] = self.adapter.site(holder._site.path)
        return self.view

    def deepcopy(self, memo: dict[int, Any]) -> nn.Module:
        """A copy with leaves of its own, on the same base.

        Raises LoraFuncError if the base is packed: torch's AveragedModel, which makes such copies,
        averages the bytes of packed weights too, and rounds them down at each step.
        """
        memo.update({id(t): t for t in self.adapter.frozen.values()})
        memo[id(self.adapter)] = self.adapter
        trained = {id(leaf) for leaf in self.leaves().values()}
        for path, parameter in self.view.named_parameters():
            if not parameter.is_floating_point():
                raise LoraFuncError(
                    f"the base is packed ({path!r} holds {parameter.dtype}), and a copy would "
                    "share it: averaging the copy, as AveragedModel does, would change its bytes. "
                    "Average the params instead, or bind a copy of them: lf.bind(adapter, model, "
                    "{key: leaf.detach().clone() for key, leaf in params.items()})"
                )
            if id(parameter) not in trained:
                alone = type(parameter) in (Tensor, nn.Parameter)
                memo[id(parameter)] = twin(parameter) if alone else parameter
        view = memo[id(self.view)] = object.__new__(type(self.view))
        view.__dict__.update(copy.deepcopy(self.view.__dict__, memo))
        return view

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Writes the adapter, and not the base, where trainers look for a model's weights.

        `lf.load(folder, model)` reads it; `from_pretrained` refuses the folder. Raises
        LoraFuncError in a folder that holds a model: transformers would read the adapter as its
        weights.
        """
        folder = Path(save_directory)
        if push_to_hub:
            raise LoraFuncError(
                "push_to_hub would publish an adapter as a model. Save it, and upload the folder "
                "with huggingface_hub.upload_folder"
            )
        if transformers.holds_model(folder):
            raise LoraFuncError(
                f"{str(folder)!r} holds a model (config.json), whose weights the adapter would "
                "replace: give another folder. For a merged model, load lf.merge(..) into the "
                "model and save that"
            )
        if not is_main_process:
            return
        params = self.leaves()
        if state_dict is not None:
            if lacking := [key for key in params if key not in state_dict]:
                raise LoraFuncError(f"state_dict: {key_mismatch(state_dict, lacking)}")
            params = {key: state_dict[key] for key in params}
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / transformers.WEIGHTS, self.adapter, params)
        transformers.mark_adapter(folder, self.view)


def leave_alone(*_: Any) -> None:
    """Loads nothing: a bound view has the state of its adapter, which its root loads."""
