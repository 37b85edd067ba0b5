"""`Chain`: several variants on one layer, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .card import AT_INIT, DATA, READS, Card
from .errors import LoraFuncError
from .variant import Params, Prepared, Variant, Weight

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, init=False)
class Chain(Variant):
    """Several variants on one layer, as in `Chain(LoRA(r=8), IA3())`.

    Each link adapts the layer that the links before it have made: their output is its `base_out`.
    A link that transforms its input transforms that of all links before it. Leaf `A` of the first
    link is called `0_A`.

    RoSA (Nikdan et al. 2024, arXiv 2401.04679) is `Chain(LoRA(), SHiRA(mask="gradient"))`.

    Raises:
        LoraFuncError: no link, or one that is no variant; a link behind the first that reads the
            weight on each call (DoRA, HiRA); links that look at different data.
    """

    positional = True

    links: tuple[Variant, ...]
    """The variants, at least one. The first is next to the base layer."""

    def __init__(self, *given: Variant, links: tuple[Variant, ...] = ()):
        links = given or links
        if not links:
            raise LoraFuncError("Chain takes variants, as in Chain(LoRA(r=8), IA3()), not none")
        for place, link in enumerate(links):
            if not isinstance(link, Variant):
                raise LoraFuncError(
                    f"Chain takes variants, as in Chain(LoRA(r=8), IA3()), not {link!r}"
                )
            if place and link.card.reads in ("rows", "dense"):
                raise LoraFuncError(
                    f"{type(link).__name__} reads the weight on each call (its card says "
                    f"reads={link.card.reads!r}), and behind another link the layer is no longer "
                    f"that weight: put {type(link).__name__} first"
                )
        looking = [link for link in links if link.looks_at_data]
        if any(link.statistic != looking[0].statistic for link in looking):
            names = " and ".join(type(link).__name__ for link in looking)
            raise LoraFuncError(
                f"{names} look at different data, and a layer is given one: chain one of them"
            )
        object.__setattr__(self, "links", links)
        object.__setattr__(self, "card", ChainCard.of(links))

    def parts(self) -> tuple[Variant, ...]:
        return tuple(part for link in self.links for part in link.parts())

    @property
    def statistic(self):
        return next((link.statistic for link in self.links if link.looks_at_data), None)

    @property
    def lr_scale(self):
        scales = {}
        for place, link in enumerate(self.links):
            scales |= under(place, link.lr_scale)
        return scales

    @property
    def exact_gradient(self):
        return all(link.exact_gradient for link in self.links)

    @property
    def broadcasts(self):  # pyright: ignore  (of each chain, not of the class)
        return all(link.broadcasts for link in self.links)

    def init(self, weight, generator, stats=None):
        return together(
            link.init(weight, generator, stats if link.looks_at_data else None)
            for link in self.links
        )

    def drawing(self, names):
        owned = (own(dict.fromkeys(names), place) for place in range(len(self.links)))
        return Chain(*(link.drawing(n) if n else Anchored() for link, n in zip(self.links, owned)))

    def like(self, weight, leaves):
        return together(
            link.like(weight, own(leaves, place)) for place, link in enumerate(self.links)
        )

    def init_shared(self, weights, generator):
        return together(link.init_shared(weights, generator) for link in self.links)

    def rebuild(self, weight, leaves):
        built = {}
        for place, link in enumerate(self.links):
            built |= under(place, link.rebuild(weight, own(leaves, place)))
        return built

    def prepare(self, weight, params, dtype):
        prepared = {}
        for place, link, layer, p in self.steps(weight, params):
            prepared |= under(place, link.prepare(layer, p, dtype))
        return prepared

    def transform_input(self, x, params):
        for _, link, _, p in reversed([*self.steps(None, params)]):
            x = link.transform_input(x, p)
        return x

    def apply(self, x, base_out, weight, params):
        steps = [*self.steps(weight, params)]
        inputs = [x]  # of the last link, of the one before it, ..
        for _, link, _, p in reversed(steps[1:]):
            inputs.append(link.transform_input(inputs[-1], p))
        out = base_out
        for (_, link, layer, p), z in zip(steps, reversed(inputs)):
            out = link.apply(z, out, layer, p)
        return out

    def merged(self, weight, params):
        W, b = weight.dense(), weight.bias
        for _, link, _, p in self.steps(weight, params):
            W, b = link.merged(Weight(W, b), p)
        return W, b

    def factors(self, weight, params):
        pairs = [link.factors(layer, p) for _, link, layer, p in self.steps(weight, params)]
        if None in pairs:
            return None
        A, B = zip(*pairs)
        return torch.cat(A), torch.cat(B, dim=1)

    def steps(self, weight, params):
        """For each link: its place, itself, the layer as it finds it, and its parameters.

        A link that has none on this layer, because it saw no data there, is left out. Prepared
        parameters stay so.
        """
        kind = Prepared if isinstance(params, Prepared) else dict
        for place, link in enumerate(self.links):
            if p := kind(own(params, place)):
                yield place, link, weight, p
                weight = After(link, weight, p)


@dataclass(frozen=True, kw_only=True)
class Anchored(Variant):
    """Stands for a link all of whose leaves start at anchors, so that there is nothing to draw."""

    card = Card(reads="nothing")

    def init(self, weight, generator, stats=None):
        return Params({})


class After(Weight):
    """A layer behind a link. Links read its bias, and `factors` its matrix; both are made then."""

    def __init__(self, link: Variant, before: Weight, params: dict[str, Tensor]):
        self.link, self.before, self.params = link, before, params

    @property
    def shape(self):
        return self.before.shape

    @property
    def device(self):
        return self.before.device

    @property
    def matrix(self):  # pyright: ignore  (an attribute of a plain weight)
        return self.link.merged(self.before, self.params)[0]

    @property
    def bias(self):  # pyright: ignore  (an attribute of a plain weight)
        # What the layer returns for x = 0. A link may add a bias where there was none.
        (d_out, d_in), b = self.shape, self.before.bias
        like = next(t for t in self.params.values() if t.is_floating_point()) if b is None else b
        base_out = like.new_zeros(1, d_out) if b is None else b[None]
        return self.link.apply(like.new_zeros(1, d_in), base_out, self.before, self.params)[0]


def own(params: Mapping[str, T], place: int) -> dict[str, T]:
    """What belongs to the link at `place`, under its own names."""
    prefix = f"{place}_"
    return {n.removeprefix(prefix): t for n, t in params.items() if n.startswith(prefix)}


def under(place: int, values: Mapping[str, T]) -> dict[str, T]:
    """The inverse of `own`."""
    return {f"{place}_{name}": value for name, value in values.items()}


def together(drawn: Iterable[Params]) -> Params:
    """The parameters of all links."""
    trainable, frozen = {}, {}
    for place, params in enumerate(drawn):
        trainable |= under(place, params.trainable)
        frozen |= under(place, params.frozen)
    return Params(trainable, frozen)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainCard(Card):
    """What is known of a chain: no more than what is known of its weakest link."""

    links: tuple[Variant, ...]

    @classmethod
    def of(cls, links: tuple[Variant, ...]) -> ChainCard:
        cards = [link.card for link in links]

        def last(order: tuple[str, ...], values: Iterable[str]) -> str:
            return max(values, key=order.index)

        return cls(
            links=links,
            title=", then ".join(card.title for card in cards),
            trainable={
                k: v for i, card in enumerate(cards) for k, v in under(i, card.trainable).items()
            },
            at_init=last(AT_INIT, (card.at_init for card in cards)),
            reads=last(READS, (card.reads for card in cards)),
            data=last(DATA, (card.data for card in cards)),
            any_shape=all(card.any_shape for card in cards),
            lr=min(card.lr for card in cards),
        )

    def shapes(self, variant, shape, **known):
        shapes = [link.card.shapes(link, shape, **known) for link in self.links]
        return {k: v for i, one in enumerate(shapes) for k, v in under(i, one).items()}
