"""Other libraries on the flat dict, and what their users write by hand instead.

Each pair computes the same tensors twice: on lora_func with the library, and on a copy of the model
whose layers are wrapped by hand. tests/functional compares the two; this measures them.
`python bench/functional.py`
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import by_hand
import torch
import torch.nn.functional as F
from by_hand import CLASSES, Logits, Toy, flat, wrapped
from common import interleaved, ratio, write
from torch import Tensor, nn

import lora_func as lf

Result = dict[str, Tensor]
Pair = tuple[Callable[[], Result], Callable[[], Result]]  # with the library, by hand

RATE = 1e-2
STEPS = 3
MEMBERS = 4  # of an ensemble
FEATURES = 64  # of LESS
CLIP, NOISE = 1.0, 0.5
PRIOR = 1.0


def less(own: Toy) -> Pair:
    """Gradient features of LESS: Adam's step for each example, projected, of length one.

    optree. By hand: one backward for each example.
    """
    import optree  # noqa: PLC0415  (each pair needs its own library alone)
    from optree.integrations.torch import tree_ravel  # noqa: PLC0415

    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=generator, dtype=flat(own.params).dtype)
    projection = drawn(FEATURES, flat(own.params).numel())
    mean: Any = {key: 0.01 * drawn(leaf.shape) for key, leaf in own.params.items()}
    square: Any = {key: 1e-4 * drawn(leaf.shape) ** 2 for key, leaf in own.params.items()}

    def step(grad: Any, mean: Tensor, square: Tensor) -> Tensor:
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        return mean / (square + 1e-8).sqrt()

    def ours() -> Result:
        each: Any = own.each_gradient()
        steps: Any = optree.tree_map(step, each, mean, square)
        rows = torch.vmap(lambda params: tree_ravel(params)[0])(steps)
        return {"features": F.normalize(rows @ projection.T)}

    model, leaves = wrapped(own, own.params)

    def hand() -> Result:
        rows = []
        for i in range(len(own.ids)):
            model.zero_grad()
            logits = model(input_ids=own.ids[i : i + 1]).logits
            F.cross_entropy(logits, own.labels[i : i + 1]).backward()
            steps = [step(leaves[key].grad, mean[key], square[key]) for key in sorted(leaves)]
            rows.append(projection @ torch.cat([part.reshape(-1) for part in steps]))
        return {"features": F.normalize(torch.stack(rows))}

    return ours, hand


def adam(own: Toy) -> Pair:
    """Four adapters trained with Adam, by torchopt in one pass. By hand: four models."""
    import torchopt  # noqa: PLC0415

    starts = [own.another(seed) for seed in range(MEMBERS)]
    ids, labels = own.ids.repeat(MEMBERS, 1), own.labels.repeat(MEMBERS)

    def loss(stacked: Result) -> Tensor:
        logits = own.logits(stacked, ids, each=len(own.ids))
        return F.cross_entropy(logits, labels, reduction="sum") / len(own.ids)

    def ours() -> Result:
        optimizer = torchopt.adam(RATE)
        params = lf.stack(starts)
        state = optimizer.init(params)
        for _ in range(STEPS):
            _, grads = lf.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return dict(params)

    models = [wrapped(own, start) for start in starts]

    def hand() -> Result:
        for start, (model, leaves) in zip(starts, models):
            with torch.no_grad():
                for key, leaf in leaves.items():
                    leaf.copy_(start[key])
            optimizer = torch.optim.Adam(leaves.values(), lr=RATE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                F.cross_entropy(model(input_ids=own.ids).logits, own.labels).backward()
                optimizer.step()
        return lf.stack([{key: leaf.detach() for key, leaf in own.items()} for _, own in models])

    return ours, hand


def ensemble(own: Toy) -> Pair:
    """Mean and entropy of an ensemble's prediction, in one pass. By hand: a model for each."""
    members = [own.another(seed) for seed in range(MEMBERS)]
    stacked = lf.stack(members)
    ids = own.ids.repeat(MEMBERS, 1)

    def prediction(logits: Tensor) -> Result:
        """Of logits `[members, examples, classes]`."""
        mean = logits.softmax(-1).mean(0)
        return {"mean": mean, "entropy": torch.special.entr(mean).sum(-1)}

    @torch.no_grad()
    def ours() -> Result:
        logits = own.logits(stacked, ids, each=len(own.ids))
        return prediction(logits.unflatten(0, (MEMBERS, -1)))

    models = [wrapped(own, member)[0] for member in members]

    @torch.no_grad()
    def hand() -> Result:
        return prediction(torch.stack([model(input_ids=own.ids).logits for model in models]))

    return ours, hand


def fisher(own: Toy) -> Pair:
    """The diagonal empirical Fisher, by posteriors. By hand: one backward for each example."""
    import posteriors  # noqa: PLC0415

    def log_posterior(params: Any, batch: Any) -> Any:
        ids, labels = batch
        logits = own.logits(params, ids)
        return -F.cross_entropy(logits, labels, reduction="none"), logits

    transform: Any = posteriors.laplace.diag_fisher.build(
        log_posterior, per_sample=True, init_prec_diag=PRIOR
    )

    def ours() -> Result:
        state, _ = transform.update(transform.init(own.params), (own.ids, own.labels))
        return dict(state.prec_diag)

    model, leaves = wrapped(own, own.params)

    def hand() -> Result:
        total = {key: torch.full_like(leaf, PRIOR).detach() for key, leaf in leaves.items()}
        for i in range(len(own.ids)):
            model.zero_grad()
            logits = model(input_ids=own.ids[i : i + 1]).logits
            F.cross_entropy(logits, own.labels[i : i + 1]).backward()
            total = {key: total[key] + leaf.grad.square() for key, leaf in leaves.items()}
        return total

    return ours, hand


def module_of(own: Toy) -> tuple[Logits, list[nn.Parameter]]:
    """The bound module, and its trainable parameters."""
    module = Logits(lf.bind(own.adapter, own.model, own.params))
    return module, [p for p in module.parameters() if p.requires_grad]


def jacobian(own: Toy) -> Tensor:
    """`[examples, classes, parameters]`, of the model wrapped by hand."""
    return torch.func.jacrev(by_hand.functional(own, own.ids))(flat(own.params))


def ggn_of(own: Toy) -> Tensor:
    """The Gauss-Newton matrix of the summed loss: Jᵀ (diag(p) - p pᵀ) J over the examples."""
    J = jacobian(own)
    p = by_hand.functional(own, own.ids)(flat(own.params)).softmax(-1)
    return torch.einsum("nci,ncd,ndj->ij", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)


def ggn(own: Toy) -> Pair:
    """A product with the Gauss-Newton matrix, by curvlinops. By hand: jvp, the softmax, vjp."""
    import curvlinops  # noqa: PLC0415

    module, parameters = module_of(own)
    data, loss = [(own.ids, own.labels)], nn.CrossEntropyLoss()
    vector = torch.linspace(-1, 1, sum(p.numel() for p in parameters), dtype=parameters[0].dtype)

    def ours() -> Result:
        matrix: Any = curvlinops.GGNLinearOperator(
            module, loss, parameters, data, check_deterministic=False
        )
        return {"product": matrix @ vector}

    logits, start = by_hand.functional(own, own.ids), flat(own.params)

    def hand() -> Result:
        pushed: Any = torch.func.jvp(logits, (start,), (vector,))
        out, along = pushed
        p = out.softmax(-1)
        weighted = p * along - p * (p * along).sum(-1, keepdim=True)
        pulled: Any = torch.func.vjp(logits, start)
        return {"product": pulled[1](weighted / len(own.ids))[0]}

    return ours, hand


def hessian(own: Toy) -> Pair:
    """A product with the Hessian, by curvlinops. By hand: backward through a backward."""
    import curvlinops  # noqa: PLC0415

    module, parameters = module_of(own)
    data, loss = [(own.ids, own.labels)], nn.CrossEntropyLoss()
    vector = torch.linspace(-1, 1, sum(p.numel() for p in parameters), dtype=parameters[0].dtype)

    def ours() -> Result:
        matrix: Any = curvlinops.HessianLinearOperator(
            module, loss, parameters, data, check_deterministic=False
        )
        return {"product": matrix @ vector}

    model, leaves = wrapped(own, own.params)

    def hand() -> Result:
        value = loss(model(input_ids=own.ids).logits, own.labels)
        grads = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        along = torch.cat([grad.reshape(-1) for grad in grads]) @ vector
        seconds = torch.autograd.grad(along, list(leaves.values()))
        return {"product": torch.cat([second.reshape(-1) for second in seconds])}

    return ours, hand


def laplace(own: Toy) -> Pair:
    """The variance of each logit under a full posterior, by Laplace. By hand: the formula."""
    from laplace import Laplace  # noqa: PLC0415
    from laplace.curvature.curvlinops import CurvlinopsGGN  # noqa: PLC0415
    from torch.utils.data import DataLoader, TensorDataset  # noqa: PLC0415

    module, _ = module_of(own)
    loader = DataLoader(TensorDataset(own.ids, own.labels), batch_size=len(own.ids))

    def ours() -> Result:
        posterior: Any = Laplace(
            module,
            "classification",
            subset_of_weights="all",
            hessian_structure="full",
            prior_precision=PRIOR,
            backend=CurvlinopsGGN,
        )
        posterior.fit(loader)
        Js, _ = posterior.backend.jacobians(own.ids)
        return {"variance": posterior.functional_variance(Js).detach()}

    def hand() -> Result:
        J, precision = jacobian(own), ggn_of(own)
        precision = precision + PRIOR * torch.eye(len(precision), dtype=precision.dtype)
        return {"variance": J @ torch.linalg.inv(precision) @ J.mT}

    return ours, hand


def private(own: Toy) -> Pair:
    """A step of DP-SGD by Opacus' optimizer, on our gradients. By hand: Opacus' wrapped model."""
    from opacus import GradSampleModule  # noqa: PLC0415
    from opacus.optimizers import DPOptimizer  # noqa: PLC0415

    def optimizer_of(leaves: dict[str, Any]) -> Any:
        return DPOptimizer(
            torch.optim.SGD(list(leaves.values()), lr=RATE),
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            expected_batch_size=len(own.ids),
            generator=torch.Generator().manual_seed(0),
        )

    def ours() -> Result:
        leaves: dict[str, Any] = {
            key: nn.Parameter(leaf.clone()) for key, leaf in own.params.items()
        }
        optimizer = optimizer_of(leaves)
        for key, each in own.each_gradient().items():
            leaves[key].grad_sample = each
        optimizer.step()
        return {key: leaf.detach() for key, leaf in leaves.items()}

    model, leaves = wrapped(own, own.params)
    module = GradSampleModule(model)

    def hand() -> Result:
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(own.params[key])
        optimizer = optimizer_of(leaves)
        optimizer.zero_grad()
        F.cross_entropy(module(input_ids=own.ids).logits, own.labels).backward()
        optimizer.step()
        return {key: leaf.detach().clone() for key, leaf in leaves.items()}

    return ours, hand


def documents(own: Toy) -> Pair:
    """A LoRA of its own for each example, and the gradient to what wrote them (Doc-to-LoRA).

    By hand: each layer's forward replaced by one that takes the A and B of the batch.
    """
    written = lf.stack([own.another(seed) for seed in range(len(own.ids))])
    written = {key: leaf.requires_grad_() for key, leaf in written.items()}

    def grads(logits: Tensor) -> Result:
        loss = F.cross_entropy(logits, own.labels)
        return dict(zip(written, torch.autograd.grad(loss, list(written.values()))))

    model, _ = wrapped(own, own.params)
    layers = {path: model.get_submodule(path) for path in own.adapter.variants}

    def forward(layer: Any, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        low = torch.einsum("nti,nri->ntr", x, A)
        return layer.base(x) + layer.scale * torch.einsum("ntr,nor->nto", low, B)

    def hand() -> Result:
        for path, layer in layers.items():
            A, B = written[f"{path}.lora_A"], written[f"{path}.lora_B"]
            layer.forward = partial(forward, layer, A, B)
        return grads(model(input_ids=own.ids).logits)

    return lambda: grads(own.logits(written)), hand


PAIRS: dict[str, Callable[[Toy], Pair]] = {
    "LESS features (optree)": less,
    "four adapters with Adam (torchopt)": adam,
    "an ensemble's prediction": ensemble,
    "diagonal Fisher (posteriors)": fisher,
    "a Gauss-Newton product (curvlinops)": ggn,
    "a Hessian product (curvlinops)": hessian,
    "variance of the logits (Laplace)": laplace,
    "a step of DP-SGD (Opacus' optimizer)": private,
    "an adapter for each document": documents,
}


SMALL = {"variance of the logits (Laplace)": {"hidden": 64, "layers": 2}}
"""For what inverts a matrix over all pairs of parameters."""


def main() -> None:
    settings = {"hidden": 256, "layers": 4, "examples": 16, "tokens": 32}
    rows = []
    for name, pair in PAIRS.items():
        sizes = {**settings, **SMALL.get(name, {})}
        ours, hand = pair(by_hand.toy(**sizes, dtype=torch.float32))
        times = interleaved({"ours": ours, "by hand": hand}, rounds=5, warmup=1)
        ms = {way: 1e3 * statistics.median(seconds) for way, seconds in times.items()}
        over = ratio(times, "by hand", "ours")
        rows.append({"what": name, **sizes, "milliseconds": ms, "by hand over ours": over})
        print(rows[-1], flush=True)
    write("functional", rows, settings={**settings, "classes": CLASSES, "r": by_hand.RANK})


if __name__ == "__main__":
    main()
