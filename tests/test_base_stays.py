"""Whatever a model's forward does, the base stays as it is, and the adapter is alive."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import adapted, state_of
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.func import functional_call

import lora_func as lf
from lora_func.libraries.dynamo import TORCH_2_13

LINEAR = lf.Targets(names=(r"linear$",))
EDGE = lf.Targets(names=(r"^1$",))  # so that nothing below the module in question is adapted
FLOAT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def contents(model: nn.Module) -> Any:
    """`state_of`, and what the containers among the attributes hold."""

    def inside(value: Any) -> Any:
        if isinstance(value, dict):
            return [(repr(key), inside(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple, set, collections.deque)):
            return [inside(item) for item in value]
        return id(value)

    attributes = [
        (path, name, inside(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    ]
    return state_of(model), attributes


def expected(model: nn.Module, adapter: lf.Adapter, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a fresh copy of the model computes with merged weights."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(lf.merge(adapter, model, params), strict=False)
    return twin(x)


def compiled(function: Callable[..., Tensor], fullgraph: bool = False) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=fullgraph)


def runs(model: nn.Module, adapter: lf.Adapter, params: dict[str, Tensor], x: Tensor) -> Any:
    """Ways to run the adapted model."""

    def bound() -> Tensor:
        return lf.bind(adapter, model, params).train(model.training)(x)

    return {
        "call": lambda: adapter(model, params, x),
        "bound": bound,
        "compiled": lambda: compiled(lambda p: adapter(model, p, x))(params),
    }


over_ways = pytest.mark.parametrize("way", ["call", "bound", "compiled"])


# what a forward writes


class Writer(nn.Module):
    """A linear layer, and a forward that keeps something."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept: Any = None
        self.count = 0
        self.cache: dict[str, Any] = {}
        self.log: list[Any] = []
        self.deep: dict[str, list[Any]] = {"log": []}
        self.register_buffer("state", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class SetsAttributes(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.kept, self.count = x, self.count + 1
        return self.linear(x)


class SetsAModule(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear
        return self.last(x)


class FillsADict(Writer):
    """With submodules: kept in the base, they would be adapted from then on."""

    def forward(self, x: Tensor) -> Tensor:
        if "layer" not in self.cache:
            self.cache["layer"] = self.linear
        return self.cache["layer"](x)


class FillsANestedList(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.deep["log"].append(self.linear)
        return self.deep["log"][-1](x)


class AppendsTensors(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        return self.linear(x)


class RegistersABuffer(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("seen", x.detach())
        return self.linear(x)


class ReplacesABuffer(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.state = x.detach()
        return self.linear(x)


class SetsAnAttributeOfAPart(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.last = x  # pyright: ignore
        return self.linear(x)


class RegistersAHook(Writer):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.register_forward_pre_hook(lambda module, args: None)
        return self.linear(x)


WRITERS = [
    *(SetsAttributes, SetsAModule, FillsADict, FillsANestedList),
    *(AppendsTensors, RegistersABuffer, ReplacesABuffer, SetsAnAttributeOfAPart),
]


@over_ways
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("targets", [LINEAR, EDGE], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_forward_writes_to_its_module(kind, targets, training, way):
    """It stays in the view, also where nothing inside of the module is adapted."""
    model = nn.Sequential(kind(), nn.Linear(4, 4)).requires_grad_(False).train(training)
    x = torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=targets)
    before = contents(model)
    out = runs(model, adapter, params, x)[way]()
    assert contents(model) == before
    torch.testing.assert_close(out, expected(model, adapter, params, x), **FLOAT)


@over_ways
@pytest.mark.parametrize("targets", [LINEAR, EDGE], ids=["inside", "outside"])
def test_a_hook_that_a_forward_registers(targets, way):
    model = nn.Sequential(RegistersAHook(), nn.Linear(4, 4)).requires_grad_(False)
    x = torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=targets)
    before = contents(model)
    runs(model, adapter, params, x)[way]()
    assert contents(model) == before


def test_a_cache_lasts_as_long_as_its_view():
    """A call starts from what the base holds; a bound module goes on from its own last call."""
    model, x = nn.Sequential(SetsAttributes()), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=LINEAR)
    module: Any = lf.bind(adapter, model, params)
    for _ in range(3):
        adapter(model, params, x)
        module(x)
    assert (model[0].count, module[0].count) == (0, 3)


@over_ways
@pytest.mark.parametrize("targets", [LINEAR, EDGE], ids=["inside", "outside"])
def test_statistics_of_batch_norm(targets, way):
    """In train mode they are updated in a copy, as the output shows; a bound module keeps it."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    model = nn.Sequential(Normed(), nn.Linear(4, 4)).requires_grad_(False).train()
    x = torch.randn(16, 4)
    _, adapter, params = adapted(model=model, targets=targets)
    before = contents(model)
    out = runs(model, adapter, params, x)[way]()
    assert contents(model) == before
    torch.testing.assert_close(out, expected(model, adapter, params, x), **FLOAT)
    module: Any = lf.bind(adapter, model, params).train()
    module(x)
    assert module[0].norm.num_batches_tracked == 1
    assert not torch.equal(module[0].norm.running_mean, model[0].norm.running_mean)  # pyright: ignore


def test_what_a_hook_of_the_user_writes():
    """A hook gets the copy, also of a layer that a call would share otherwise."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, out: setattr(module, "seen", out))
    _, adapter, params = adapted(model=model, targets=EDGE)
    before = contents(model)
    adapter(model, params, torch.randn(3, 4))
    assert contents(model) == before


# buffers that a forward writes in eval mode


class WritesInPlace(Writer):
    """A model's own cache of keys and values, which a forward fills."""

    def forward(self, x: Tensor) -> Tensor:
        self.state[: len(x)] = x  # pyright: ignore  (a buffer)
        return self.linear(x + self.state.mean(0))  # pyright: ignore


class WritesAParameter(Writer):
    """As nn.Embedding(max_norm=..) does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.5)
        return self.linear(x)


@pytest.mark.parametrize("targets", [LINEAR, EDGE], ids=["inside", "outside"])
def test_a_cache_in_a_buffer(targets):
    """A call refuses it in eval mode, a bound module has its own."""
    model, x = nn.Sequential(WritesInPlace(), nn.Linear(4, 4)), torch.randn(3, 4)
    _, adapter, params = adapted(model=model.eval(), targets=targets)
    message = r"WritesInPlace '0' .* buffer 'state' was written to in place.*lf\.bind"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, params, x)
    model[0].state.zero_()  # pyright: ignore
    out = expected(model, adapter, params, x)
    before = contents(model)
    for way in ("bound", "compiled"):
        torch.testing.assert_close(runs(model, adapter, params, x)[way](), out, **FLOAT)
        assert contents(model) == before
    model.train()
    torch.testing.assert_close(adapter(model, params, x), out, **FLOAT)
    assert state_of(model.eval()) == before[0]


def test_a_forward_that_writes_to_a_weight():
    model = nn.Sequential(WritesAParameter(), nn.Linear(4, 4))
    _, adapter, params = adapted(model=model, targets=EDGE)
    message = r"Linear '0\.linear' .* parameter 'weight' was written to in place.* a copy of the"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter(model, params, torch.randn(3, 4))


def test_a_forward_that_writes_is_refused_in_calibration():
    model = nn.Sequential(WritesInPlace(), nn.Linear(4, 4)).eval()
    with pytest.raises(lf.LoraFuncError, match="buffer 'state' was written to in place"):
        lf.adapt(model, lf.CorDA(r=2), targets=EDGE, calibration=[torch.randn(3, 4)])


def test_packed_buffers_are_shared():
    """A layer that keeps its matrix in buffers shares it: nothing is copied, in train mode too."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.qweight.to(x.dtype)  # pyright: ignore

    model = nn.Sequential(Packed(), nn.Linear(4, 4)).train()
    _, adapter, params = adapted(model=model, targets=EDGE)
    module: Any = lf.bind(adapter, model, params)
    assert module[0].qweight.data_ptr() == model[0].qweight.data_ptr()  # pyright: ignore


# how a model refers to its layers


@dataclasses.dataclass
class Holder:
    layer: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    layer: Any


@dataclasses.dataclass(slots=True)
class Slots:
    layer: Any


@dataclasses.dataclass(slots=True)
class MoreSlots(Slots):
    name: str = ""


class Helper:
    """A part of a model's own code that holds its parent."""

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def run(self, x: Tensor) -> Tensor:
        return self.parent.linear(x)


class Registry(dict):
    pass


class Stack(list):
    pass


class OrderedRegistry(collections.OrderedDict):
    pass


Pair = collections.namedtuple("Pair", ("layer", "name"))
Run = Callable[[Any, Tensor], Tensor]


def closed_over(layer: Any) -> Callable[..., Tensor]:
    def run(x: Tensor) -> Tensor:
        return layer(x)

    return run


def with_default(layer: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, layer: Any = layer) -> Tensor:
        return layer(x)

    return run


def with_keyword(layer: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, *, layer: Any = layer) -> Tensor:
        return layer(x)

    return run


def call(layer: Any, x: Tensor) -> Tensor:
    return layer(x)


# name -> what the model keeps, made of (model, layer); how its forward uses what it keeps
FOLLOWED: dict[str, tuple[Callable[[Any, Any], Any], Run]] = {
    "list": (lambda model, layer: [layer], lambda kept, x: kept[0](x)),
    "dict": (lambda model, layer: {"a": layer}, lambda kept, x: kept["a"](x)),
    "set": (lambda model, layer: {layer}, lambda kept, x: next(iter(kept))(x)),
    "frozenset": (lambda model, layer: frozenset([layer]), lambda kept, x: next(iter(kept))(x)),
    "deque": (lambda model, layer: collections.deque([layer]), lambda kept, x: kept[0](x)),
    "ordered dict": (
        lambda model, layer: collections.OrderedDict(a=layer),
        lambda kept, x: kept["a"](x),
    ),
    "default dict": (
        lambda model, layer: collections.defaultdict(list, {"a": [layer]}),
        lambda kept, x: kept["a"][0](x),
    ),
    "key of a dict": (lambda model, layer: {layer: 1}, lambda kept, x: next(iter(kept))(x)),
    "named tuple": (lambda model, layer: Pair(layer, "a"), lambda kept, x: kept.layer(x)),
    "nested containers": (
        lambda model, layer: {"a": [{"b": (layer, 1)}]},
        lambda kept, x: kept["a"][0]["b"][0](x),
    ),
    "method": (lambda model, layer: layer.forward, lambda kept, x: kept(x)),
    "partial": (lambda model, layer: functools.partial(call, layer), lambda kept, x: kept(x)),
    "closure": (lambda model, layer: lambda x: layer(x), lambda kept, x: kept(x)),  # noqa: PLW0108
}
IN_ONE_GRAPH = set(FOLLOWED) - ({"closure"} if TORCH_2_13 else {"closure", "method"})
HIDDEN: dict[str, tuple[Callable[[Any, Any], Any], Run]] = {
    "keyword default": (lambda model, layer: with_keyword(layer), lambda kept, x: kept(x)),
    "default": (lambda model, layer: with_default(layer), lambda kept, x: kept(x)),
    "dataclass": (lambda model, layer: Holder(layer), lambda kept, x: kept.layer(x)),
    "frozen dataclass": (lambda model, layer: Frozen(layer), lambda kept, x: kept.layer(x)),
    "slots": (lambda model, layer: Slots(layer), lambda kept, x: kept.layer(x)),
    "inherited slots": (lambda model, layer: MoreSlots(layer), lambda kept, x: kept.layer(x)),
    "namespace": (
        lambda model, layer: types.SimpleNamespace(layer=layer),
        lambda kept, x: kept.layer(x),
    ),
    "helper that holds its parent": (
        lambda model, layer: Helper(model),
        lambda kept, x: kept.run(x),
    ),
    "method of a helper": (lambda model, layer: Helper(model).run, lambda kept, x: kept(x)),
    "nested helpers": (
        lambda model, layer: [Holder({"a": Holder(layer)})],
        lambda kept, x: kept[0].layer["a"].layer(x),
    ),
    "weak reference": (lambda model, layer: weakref.ref(layer), lambda kept, x: kept()(x)),
    "weak reference to the parent": (
        lambda model, layer: weakref.ref(model),
        lambda kept, x: kept().linear(x),
    ),
    "weak proxy": (lambda model, layer: weakref.proxy(layer), lambda kept, x: kept(x)),
    "weak proxy of the parent": (
        lambda model, layer: weakref.proxy(model),
        lambda kept, x: kept.linear(x),
    ),
    "subclass of dict": (lambda model, layer: Registry(a=layer), lambda kept, x: kept["a"](x)),
    "subclass of an ordered dict": (
        lambda model, layer: OrderedRegistry(a=layer),
        lambda kept, x: kept["a"](x),
    ),
    "subclass of list": (lambda model, layer: Stack([layer]), lambda kept, x: kept[0](x)),
    "user dict": (
        lambda model, layer: collections.UserDict(a=layer),
        lambda kept, x: kept["a"](x),
    ),
}


class Referring(nn.Module):
    """Reaches its layer by what it keeps."""

    def __init__(self, keep: Callable[[Any, Any], Any], run: Run) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__["kept"] = keep(self, self.linear)  # a weak proxy would become a submodule
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.run(self.kept, x))


class Apart(nn.Module):
    """Keeps a layer of a sibling. Nothing below it is adapted, and it is frozen."""

    def __init__(self, kept: Any, run: Run) -> None:
        super().__init__()
        self.__dict__["kept"] = kept
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.kept, x)


class Siblings(nn.Module):
    """Its layer is called by a sibling alone."""

    def __init__(self, keep: Callable[[Any, Any], Any], run: Run) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.apart = Apart(keep(self, self.linear), run)

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(x)


def swapped(model: nn.Module, adapter: lf.Adapter, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The oracle for references, which a copy of a model may lose: it swaps weights in place."""
    return functional_call(model, lf.merge(adapter, model, params), (x,))


over_shapes = pytest.mark.parametrize("shape", [Referring, Siblings])


@pytest.mark.parametrize("way", ["call", "bound"])
@over_shapes
@pytest.mark.parametrize("reference", [*FOLLOWED, *HIDDEN])
def test_a_reference_is_followed(reference, shape, way):
    """The adapter behind it is alive, and the base keeps its own reference."""
    keep, run = (FOLLOWED | HIDDEN)[reference]
    model, x = shape(keep, run).requires_grad_(False), torch.randn(3, 4)
    _, adapter, params = adapted(
        model=model, targets=lf.Targets(names=("linear$", "after$")[: 1 + (shape is Referring)])
    )
    before = contents(model)
    out = runs(model, adapter, params, x)[way]()
    assert contents(model) == before
    torch.testing.assert_close(out, swapped(model, adapter, params, x), **FLOAT)
    assert not torch.allclose(out, model(x), **FLOAT)


@over_shapes
@pytest.mark.parametrize("reference", FOLLOWED)
@torch.no_grad()
def test_a_reference_is_followed_in_a_trace(reference, shape):
    """In one graph, unless dynamo says that it cannot make a new function in it."""
    model, x = shape(*FOLLOWED[reference]).requires_grad_(False), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=LINEAR)
    function = lambda p: adapter(model, p, x)  # noqa: E731
    try:
        out = compiled(function, fullgraph=True)(params)
    except Unsupported:
        assert reference not in IN_ONE_GRAPH
        out = compiled(function)(params)
    torch.testing.assert_close(out, swapped(model, adapter, params, x), **FLOAT)


@over_shapes
@pytest.mark.parametrize("reference", HIDDEN)
@torch.no_grad()
def test_a_reference_that_a_trace_would_lose_is_refused(reference, shape):
    """The way out that the error names works, unless dynamo itself cannot call a weak proxy."""
    model, x = shape(*HIDDEN[reference]).requires_grad_(False), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=LINEAR)
    with pytest.raises(lf.LoraFuncError, match=r"refers to modules by 'kept', a .*lf\.bind"):
        compiled(lambda p: adapter(model, p, x))(params)
    if "proxy" not in reference:
        module: Any = lf.bind(adapter, model, params)
        right = swapped(model, adapter, params, x)
        torch.testing.assert_close(compiled(module)(x), right, **FLOAT)


def test_a_lost_reference_in_one_graph():
    """With fullgraph the error is dynamo's, and has our words in it."""
    model, x = Referring(*HIDDEN["dataclass"]).requires_grad_(False), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=LINEAR)
    with pytest.raises(Unsupported, match="refers to modules by 'kept'"):
        compiled(lambda p: adapter(model, p, x), fullgraph=True)(params)


def test_a_reference_to_what_is_not_adapted_compiles():
    """A helper may hold modules that a trace shares with the model."""
    model = nn.Sequential(Siblings(lambda model, layer: Holder(layer), lambda h, x: h.layer(x)))
    model.append(nn.Linear(4, 4)).requires_grad_(False)
    x = torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=EDGE)
    out = compiled(lambda p: adapter(model, p, x), fullgraph=True)(params)
    torch.testing.assert_close(out, adapter(model, params, x), **FLOAT)


def test_attributes_that_refer_to_nothing_compile():
    """Partials and functions with defaults, as models of vision keep them."""

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scaled = functools.partial(torch.mul, other=2.0)
            self.nested = [((1, 2), {"a": (3, functools.partial(torch.add, alpha=2))})]
            self.activation = torch.nn.functional.silu
            self.own = with_default(None)

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.scaled(self.linear(x)))

    model, x = Configured().requires_grad_(False), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=LINEAR)
    out = compiled(lambda p: adapter(model, p, x), fullgraph=True)(params)
    torch.testing.assert_close(out, swapped(model, adapter, params, x), **FLOAT)


# what is not followed


class ByClass(nn.Module):
    """Keeps its layer in an attribute of its class, which all views share."""

    registry: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        type(self).registry = [self.linear]

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.registry[0](x))


def test_an_attribute_of_the_class_is_told_at_the_first_call():
    model, x = ByClass(), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=lf.Targets(roles=()))
    before = contents(model)
    with pytest.warns(UserWarning, match="adapted, but not called while its parent ran.*'linear'"):
        adapter(model, params, x)
    assert contents(model) == before
    assert lf.probe(adapter, model, params, x).inert == ("linear",)


class FillsItsClass(ByClass):
    def forward(self, x: Tensor) -> Tensor:
        type(self).registry.append(self.linear)
        return self.after(self.registry[-1](x))


def test_a_cache_of_the_class_is_shared():
    """No view can copy a class: what a forward puts there stays, as design.md says."""
    model, x = FillsItsClass(), torch.randn(3, 4)
    _, adapter, params = adapted(model=model, targets=lf.Targets(roles=()))
    out = adapter(model, params, x)
    torch.testing.assert_close(out, swapped(model, adapter, params, x), **FLOAT)
    assert len(FillsItsClass.registry) == 3
