"""Inits from weights and data, against PEFT's and against the documented matrices in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from models import largest, text_batch, tiny_llama, trained
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lora_func as lf
from lora_func.linalg import randomized_svd
from lora_func.statistics import Components
from lora_func.testing import stats_for

ALL = lf.Targets(roles=())
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
pytestmark = [  # PEFT itself causes these warnings
    pytest.mark.filterwarnings("ignore:CUDA reports that you have .* devices:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def square_llama() -> Any:
    """A Llama whose layers read 32 features, for which PEFT's SVD of rank 32 is exact."""
    return tiny_llama(head_dim=8, intermediate_size=32)


def ids_batch(rows: int = 8, length: int = 20) -> dict[str, Tensor]:
    """Token ids with a mask, and without labels."""
    batch = text_batch(rows, length)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def angle(A: Tensor, B: Tensor) -> float:
    """The sine of the largest principal angle between the spans of two sets of orthonormal rows."""
    return (A.double() - A.double() @ B.double().mT @ B.double()).norm(2).item()


def eva(
    model: nn.Module, batches: Any, **fields: Any
) -> tuple[lf.Adapter, dict[str, Tensor], dict[str, Tensor]]:
    """The adapter, its parameters, and path -> A."""
    adapter, params = lf.adapt(model, lf.EVA(**fields), targets=ALL, calibration=batches)
    return adapter, params, {path: params[f"{path}.lora_A"] for path in adapter.targets}


# EVA


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("r", "rho"), [(16, 1.0), (8, 2.0)], ids=["rho=1", "rho=2"])
def test_eva_finds_the_ranks_and_subspaces_of_peft(r, rho, seed):
    """Ranks of layers that read one input are compared sorted: PEFT breaks their ties otherwise."""
    torch.manual_seed(seed)
    model, batch = square_llama(), ids_batch()
    _, _, ours = eva(model, [batch], r=r, rho=rho)
    paths = list(ALL.find(model))
    config = peft.LoraConfig(
        r=r, target_modules=paths, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho)
    )
    theirs = get_eva_state_dict(copy.deepcopy(model), [batch], config, show_progress_bar=False)
    ranks = {path: len(ours[path]) if path in ours else 0 for path in paths}
    assert sum(ranks.values()) == r * len(paths) == sum(map(len, theirs.values()))
    groups = (*GROUPS, ("self_attn.o_proj",), ("mlp.down_proj",))
    for i, names in itertools.product(range(2), groups):
        group = [f"model.layers.{i}.{name}" for name in names]
        assert sorted(ranks[path] for path in group) == sorted(len(theirs[path]) for path in group)
        for path in group:
            n = min(ranks[path], len(theirs[path]))
            if n:
                assert angle(ours[path][:n], theirs[path][:n]) < 1e-3


@pytest.mark.parametrize(
    ("r", "rho", "rslora"),
    [(16, 1.0, False), (8, 2.0, False), (16, 1.0, True)],
    ids=["rho=1", "rho=2", "rho=1, rslora"],
)
def test_eva_computes_what_peft_does(r, rho, rslora):
    """The outputs agree for PEFT's A and a trained B, because alpha_l / r_l is one number."""
    model, batch = square_llama(), ids_batch()
    config = peft.LoraConfig(
        r=r,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=list(ALL.find(model)),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, adjust_scaling_factors=True),
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    factors = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): p.detach()
        for name, p in theirs.named_parameters()
        if "lora_A" in name
    }
    nothing = Components(torch.empty(0, 32), torch.empty(0))
    stats = dict.fromkeys(ALL.find(model), nothing)
    stats |= {path: Components(A, torch.ones(len(A))) for path, A in factors.items()}
    variant = lf.EVA(r=r, alpha=5.0, rslora=rslora, rho=rho)
    adapter, params = lf.adapt(model, variant, targets=ALL, stats=stats)
    assert len(adapter.targets) == len(factors)
    params = trained(params)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                key = name.removeprefix("base_model.model.").replace(".default.weight", "")
                p.copy_(params[key])
    ours, expected = adapter(model, params, batch).logits, theirs(**batch).logits
    assert (ours - model(**batch).logits).abs().max() > 1e-2
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_the_scales_of_eva_in_peft(rslora):
    """One scale for all ranks. With rslora PEFT's grows with the root of the layer's rank."""
    model, batch = square_llama(), ids_batch()
    config = peft.LoraConfig(
        r=8,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=list(ALL.find(model)),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0),
    )
    theirs = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    ours = lf.EVA(r=8, alpha=5.0, rslora=rslora).scale
    layers: list[Any] = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    ranks = {layer.r["default"] for layer in layers}
    assert len(ranks) > 1
    for layer in layers:
        grown = (layer.r["default"] / 8) ** 0.5 if rslora else 1.0
        assert layer.scaling["default"] == pytest.approx(grown * ours)


@pytest.mark.parametrize("rho", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("center", [True, False], ids=["center", "no center"])
def test_eva_is_the_svd_of_all_tokens(center, rho):
    """Its directions are the right singular vectors of the stacked tokens.

    They are orthonormal, and the ranks keep to their budget.
    """
    model, batches, r = tiny_llama().double(), [ids_batch() for _ in range(3)], 4
    adapter, _, A = eva(model, batches, r=r, rho=rho, center=center)
    stats = lf.collect(model, ALL, batches, lf.EVA(r=r, rho=rho, center=center).statistic)
    assert sum(map(len, A.values())) == r * len(ALL.find(model))
    assert all(0 < len(own) <= round(rho * r) for own in A.values())
    assert set(adapter.targets) == {path for path, found in stats.items() if len(found.directions)}
    if rho == 1:
        assert {len(own) for own in A.values()} == {r}
    tokens: dict[str, list[Tensor]] = {path: [] for path in A}
    for path, seen in tokens.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0])
        )
    masks = torch.cat([batch["attention_mask"].bool() for batch in batches])
    for batch in batches:
        model(**batch)
    for path, own in A.items():
        x = torch.cat(tokens[path])[masks].detach()
        _, S, Vh = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False)
        n = len(own)
        assert own.dtype == torch.float32
        directions = stats[path].directions
        torch.testing.assert_close(directions @ directions.mT, torch.eye(n, dtype=torch.float64))
        torch.testing.assert_close(own, directions.float())
        cosines = (directions * Vh[:n]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(n, dtype=torch.float64))
        torch.testing.assert_close(stats[path].singular_values, S[:n])


def test_layers_that_share_an_input_share_directions():
    """The layers differ at most in their last direction, where the budget may end."""
    _, _, A = eva(tiny_llama(), [ids_batch()], r=4)
    for i in range(2):
        for group in GROUPS:
            own = [A[path] for path in (f"model.layers.{i}.{name}" for name in group) if path in A]
            assert len({len(part) for part in own}) <= 2
            n = min(map(len, own))
            assert all(torch.equal(part[:n], own[0][:n]) for part in own)


def uneven(directions: int = 1) -> tuple[nn.Module, list[Tensor]]:
    """Four layers. The input of the second and the fourth varies in few directions."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

        def forward(self, x):
            few = torch.cat([x[:, :directions], torch.ones(len(x), 6 - directions)], 1)
            return sum(layer(few if i % 2 else x) for i, layer in enumerate(self.layers))

    return Parallel(), [torch.randn(50, 6)]


def ranks_of(A: dict[str, Tensor]) -> list[int]:
    """The ranks of the four layers."""
    return [len(A.get(f"layers.{i}", ())) for i in range(4)]


def test_ranks_are_no_more_than_the_tokens_have():
    """A direction in which no token moves is rounding, and is not taken.

    Other layers take its share of the budget. If none can, a warning says so.
    """
    model, batches = uneven()
    _, _, A = eva(model, batches, r=2, rho=3.0)
    assert ranks_of(A) == [3, 1, 3, 1]
    few = [batches[0][:3]]  # three tokens span two directions about their mean
    message = "have only 6 components for 4 layers, where r=6 asks for 24"
    with pytest.warns(UserWarning, match=message):
        _, _, A = eva(model, few, r=6, rho=1.0)
    assert ranks_of(A) == [2, 1, 2, 1]
    one = [batches[0][:1]]  # a token alone has no variance
    none = pytest.raises(lf.LoraFuncError, match="returned no parameters for any of the layers")
    with pytest.warns(UserWarning, match="have only 0 components"), none:
        eva(model, one, r=2)


def test_layers_of_rank_zero_drop_out(tmp_path):
    """They are in none of targets, parameters and file. The rest reloads without data."""
    model, batches = uneven(directions=2)
    adapter, params, A = eva(model, batches, r=1, rho=2.0)
    assert ranks_of(A) == [0, 2, 0, 2]  # the few directions explain most, and take all four ranks
    assert params.keys() == {f"layers.{i}.lora_{name}" for i in (1, 3) for name in "AB"}
    params = trained(params)
    lf.save(tmp_path / "eva.safetensors", adapter, params)
    again, reloaded = lf.load(tmp_path / "eva.safetensors", model)
    assert again.targets == adapter.targets == ("layers.1", "layers.3")
    assert largest(params, reloaded) == 0
    assert torch.equal(again(model, reloaded, batches[0]), adapter(model, params, batches[0]))


def test_eva_whitened():
    """As in PEFT, whitening divides directions by the roots of their singular values."""
    model, batches = tiny_llama(), [ids_batch()]
    _, _, plain = eva(model, batches, r=4)
    _, _, white = eva(model, batches, r=4, whiten=True)
    stats = lf.collect(model, ALL, batches, lf.EVA(r=4).statistic)
    for path, own in plain.items():
        torch.testing.assert_close(white[path] * stats[path].singular_values.sqrt()[:, None], own)


def test_fresh_parameters_need_the_data_again():
    """`Adapter.init` takes stats. It refuses those of other data that give other ranks."""
    model, batches = uneven()
    adapter, params, _ = eva(model, batches, r=2, rho=3.0)
    statistic = lf.EVA(r=2, rho=3.0).statistic
    stats = lf.collect(model, adapter, batches, statistic)
    assert largest(adapter.init(model, stats=stats), params) == 0
    with pytest.warns(UserWarning, match="components"):
        few = lf.collect(model, adapter, [batches[0][:3]], statistic)
    message = "components of its inputs: pass calibration=batches to adapt"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter.init(model)
    message = r"has shape \(3, 6\) in this adapter, but these stats give it .*: call lf.adapt"
    with pytest.raises(lf.LoraFuncError, match=message):
        adapter.init(model, stats=few)


# inits that start from a part of the weight: identity, and that part


INITS = {
    "olora": lambda r: lf.OLoRA(r=r, alpha=5.0),
    "milora": lambda r: lf.MiLoRA(r=r, alpha=5.0),
    "corda-ipm": lambda r: lf.CorDA(r=r, alpha=5.0),
    "corda-kpm": lambda r: lf.CorDA(r=r, alpha=5.0, mode="kpm"),
    "loraga": lambda r: lf.LoRAGA(r=r, alpha=5.0, gamma=9.0),
    "loraga-randomized": lambda r: lf.LoRAGA(r=r, alpha=5.0, svd="randomized"),
    "pissa-randomized": lambda r: lf.PiSSA(r=r, alpha=5.0, svd="randomized"),
    "initab": lambda r: lf.InitAB(r=r),
    "initab-orthogonal": lambda r: lf.InitAB(r=r, start="orthogonal"),
    "eva": lambda r: lf.EVA(r=r),
}


def with_data(
    model: nn.Module, variant: lf.Variant, batches: Any, **options: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    """`lf.adapt` of all layers, calibrated if the variant looks at data."""
    calibration = None if variant.statistic is None else batches
    return lf.adapt(model, variant, targets=ALL, calibration=calibration, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", INITS.values(), ids=INITS.keys())
def test_identity_at_init_and_after_a_reload(make, dtype, tmp_path):
    """The output at init is the base's, and a file reloads without data, both to the bit."""
    model, batch = tiny_llama().to(dtype), text_batch()
    adapter, params = with_data(model, make(4), [batch])
    assert torch.equal(adapter(model, params, batch).logits, model(**batch).logits)
    params = trained(params)
    lf.save(tmp_path / "adapter.safetensors", adapter, params)
    again, reloaded = lf.load(tmp_path / "adapter.safetensors", model)
    assert largest({**params, **adapter.frozen}, {**reloaded, **again.frozen}) == 0
    assert torch.equal(adapter(model, params, batch).logits, again(model, reloaded, batch).logits)


def qr_part(variant: Any, W: Tensor, stats: Any) -> Tensor:
    Q, R = torch.linalg.qr(W)
    return variant.scale * Q[:, : variant.r] @ R[: variant.r]


def minor_part(variant: Any, W: Tensor, stats: Any) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, -variant.r :] @ S[-variant.r :].diag() @ Vh[-variant.r :]


def oriented_part(variant: Any, W: Tensor, stats: Any) -> Tensor:
    C = stats.scatter / stats.n + torch.outer(stats.mean, stats.mean)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, variant.r) if variant.mode == "ipm" else slice(-variant.r, None)
    return U[:, part] @ S[part].diag() @ Vh[part] @ C.inverse()


def gradient_part(variant: Any, W: Tensor, stats: Any) -> Tensor:
    r = variant.r
    U, S, Vh = torch.linalg.svd(stats, full_matrices=False)
    B0 = U[:, r : 2 * r] * S[r : 2 * r] * W.shape[0] ** 0.25 / variant.gamma**0.5
    return variant.scale * B0 @ Vh[:r]


def starts(variant: Any, documented: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each layer of a float64 model: A0, s B0 A0, and the documented matrix."""
    model, batches = tiny_llama().double(), [text_batch() for _ in range(4)]
    adapter, params = with_data(model, variant, batches, dtype=torch.float64)
    stats = lf.collect(model, ALL, batches, variant.statistic) if variant.statistic else {}
    for path in adapter.targets:
        A0, B0 = (adapter.frozen[f"{path}.lora_{leaf}"] for leaf in ("A0", "B0"))
        assert torch.equal(A0, params[f"{path}.lora_A"])
        W = model.get_submodule(path).weight.detach()
        yield A0, variant.scale * B0 @ A0, documented(variant, W, stats.get(path))


DOCUMENTED = {
    "olora": qr_part,
    "milora": minor_part,
    "corda-ipm": oriented_part,
    "corda-kpm": oriented_part,
}
"""s B0 A0 by the formula in each variant's file, in float64."""


@pytest.mark.parametrize(("name", "documented"), DOCUMENTED.items(), ids=DOCUMENTED.keys())
def test_the_documented_matrix(name, documented):
    for _, found, expected in starts(INITS[name](3), documented):
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_the_documented_matrix_of_loraga():
    """A0 and B0 take different triplets, so the signs of singular vectors do not cancel."""
    for A0, found, expected in starts(INITS["loraga"](3), gradient_part):
        given, values = torch.linalg.svdvals(found), torch.linalg.svdvals(expected)
        assert (given - values).abs().max() <= 1e-9 * values.max()
        projector = A0.mT @ A0
        torch.testing.assert_close(projector @ projector, projector)


# PEFT's inits of the same names


class Net(nn.Module):
    """One adapted layer between two that are not."""

    def __init__(self):
        super().__init__()
        self.first, self.target, self.last = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.target(torch.tanh(self.first(x)))))


TARGET = lf.Targets(names=("target",), roles=())
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["target"]}


def factors(theirs: Any) -> tuple[Tensor, Tensor]:
    """PEFT's A and B."""
    layer = theirs.base_model.model.target
    A, B = (part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
    return A, B


def same_function(model: Net, variant: lf.Variant, theirs: Any) -> None:
    """The outputs agree if both start from PEFT's factors and take the same step."""
    A0, B0 = factors(theirs)
    stats = stats_for(variant, lf.Weight(model.target.weight.detach()))
    given = None if stats is None else {"target": stats}
    adapter, _ = lf.adapt(model, variant, targets=TARGET, stats=given)
    frozen = {"target.lora_A0": A0, "target.lora_B0": B0}
    adapter = lf.Adapter(adapter.variants, adapter.shapes, frozen, adapter.base, adapter.dtype)
    params, x = trained(adapter.init(model), 0.3), torch.randn(5, 8)
    layer = theirs.base_model.model.target
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(params["target.lora_A"])
        layer.lora_B["default"].weight.copy_(params["target.lora_B"])
        expected = theirs(x)
        assert (expected - model(x)).abs().max() > 1e-2
        assert (adapter(model, params, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_olora_is_that_of_peft(rslora):
    """QR has no free signs: the factors themselves are equal."""
    model, variant = Net(), lf.OLoRA(r=4, alpha=6.0, rslora=rslora)
    config = peft.LoraConfig(**CONFIG, use_rslora=rslora, init_lora_weights="olora")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    _, params = lf.adapt(model, variant, targets=TARGET)
    A, B = factors(theirs)
    torch.testing.assert_close(params["target.lora_A"], A)
    torch.testing.assert_close(params["target.lora_B"], B)
    same_function(model, variant, theirs)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
@pytest.mark.parametrize("r", [3, 12])
def test_olora_decomposes_no_more_than_r_columns(r, shape, monkeypatch):
    """They give the first r columns of Q and rows of R, in the time of r columns."""
    W = torch.randn(shape, dtype=torch.float64)
    Q, R = torch.linalg.qr(W)
    widths, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda M: widths.append(M.shape[1]) or qr(M))
    found = lf.OLoRA(r=r).init(lf.Weight(W), None).frozen
    assert widths == [r]
    torch.testing.assert_close(found["A0"], R[:r])
    torch.testing.assert_close(found["B0"], Q[:, :r])


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_that_of_peft(mode, rslora, tmp_path):
    """Both are given one second moment, because PEFT estimates its own otherwise."""
    model, variant = Net(), lf.CorDA(r=4, alpha=6.0, mode=mode, rslora=rslora)
    batches = [torch.randn(100, 8) for _ in range(4)]
    found = lf.collect(model, ["target"], batches, lf.InputMoments())
    file = tmp_path / "covariance.pt"
    torch.save({"target": found["target"].about(0)}, file)
    corda = CordaConfig(covariance_file=str(file), corda_method=mode)
    config = peft.LoraConfig(
        **CONFIG, use_rslora=rslora, init_lora_weights="corda", corda_config=corda
    )
    base = copy.deepcopy(model)
    preprocess_corda(base, config)
    theirs = peft.get_peft_model(base, config)
    _, params = lf.adapt(model, variant, targets=TARGET, stats=found)
    A, B = factors(theirs)
    expected = B @ A  # the signs of singular vectors cancel
    given = params["target.lora_B"] @ params["target.lora_A"]
    assert (given - expected).abs().max() <= 1e-3 * expected.abs().max()
    same_function(model, variant, theirs)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize(
    ("scale", "rslora"),
    [("stable", False), ("weight_svd", False), ("gd_scale", True), ("unit", False)],
    ids=["stable", "weight_svd", "gd_scale, rslora", "unit"],
)
def test_loraga_is_that_of_peft(direction, scale, rslora, monkeypatch):
    """Over three batches, rows of A and columns of B equal PEFT's up to their signs.

    Both draw the triplets 1, 3, 4 and 6. PEFT scales by the first that is drawn, ours by the
    largest.
    """
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor([1, 3, 4, 6, 7, 0, 2, 5]))
    model, options = Net(), {"direction": direction, "start_scale": scale, "rslora": rslora}
    variant = lf.LoRAGA(r=4, alpha=6.0, gamma=9.0, **options)
    model.target.weight.data = decaying((16, 24), 0, 2.0)  # so that PEFT's approximate SVD is exact
    batches = [torch.randn(50, 8) for _ in range(3)]

    def loss(output, batch):
        return (output.square().sum(-1) * batch[:, 0]).mean()

    name: Any = "lora_ga"  # which PEFT's annotation lacks
    loraga = LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    config = peft.LoraConfig(
        **CONFIG, use_rslora=rslora, init_lora_weights=name, lora_ga_config=loraga
    )
    base = copy.deepcopy(model)

    def backward() -> None:
        for x in batches:
            loss(base(x), x).backward()

    preprocess_loraga(base, config, backward)
    theirs = peft.get_peft_model(base, config)
    stats = lf.collect(model, ["target"], batches, variant.statistic, loss=loss)
    _, params = lf.adapt(model, variant, targets=TARGET, stats=stats)
    A, B = factors(theirs)
    for ours, expected in ((params["target.lora_A"], A), (params["target.lora_B"].mT, B.mT)):
        signs = (ours * expected).sum(1, keepdim=True).sign()
        # The gradient's singular values are 0.28 to 3e-4, and the last ones 8e-5 apart. So float32
        # (6e-8 of the first) turns those vectors by 2e-4, as each CPU rounds.
        assert (ours - signs * expected).abs().max() <= 1e-3 * expected.abs().max()
    same_function(model, variant, theirs)


def test_an_orthogonal_start_is_that_of_peft():
    """The factors have PEFT's size, and their product is zero up to rounding."""
    model, variant = Net(), lf.InitAB(r=4, alpha=6.0, start="orthogonal")
    orthogonal: Any = "orthogonal"  # which PEFT's annotation lacks
    config = peft.LoraConfig(**CONFIG, init_lora_weights=orthogonal)
    same_function(model, variant, peft.get_peft_model(copy.deepcopy(model), config))

    large = nn.Linear(3000, 2000)
    theirs: Any = peft.LoraModel(nn.ModuleDict({"target": copy.deepcopy(large)}), config, "default")
    layer = theirs.model["target"]
    drawn = variant.init(lf.Weight(large.weight.detach()), torch.Generator().manual_seed(0)).frozen
    for ours, part in ((drawn["A0"], layer.lora_A), (drawn["B0"], layer.lora_B)):
        # Of 4000 normal numbers or more: the deviations of both are known to 1 %.
        assert ours.std().item() == pytest.approx(part["default"].weight.std().item(), rel=0.05)
    terms = (drawn["B0"].abs() @ drawn["A0"].abs()).max()
    assert (drawn["B0"] @ drawn["A0"]).abs().max() <= 1e-6 * terms


def test_a_layer_without_gradient_starts_at_zero():
    """There is nothing to scale up to the weight."""
    weight, variant = lf.Weight(torch.randn(12, 8)), lf.LoRAGA(r=4, start_scale="weight_svd")
    drawn = variant.init(weight, None, torch.zeros(12, 8))
    assert torch.equal(drawn.frozen["B0"], torch.zeros(12, 4))
    assert drawn.frozen["A0"].isfinite().all()


# randomized SVD


def decaying(shape: tuple[int, int], seed: int, power: float = 1.0) -> Tensor:
    """A random matrix with the singular values 1, 1/2^power, 1/3^power, .."""
    generator = torch.Generator().manual_seed(seed)
    n = min(shape)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator)).Q for size in shape)
    return U * torch.arange(1, n + 1) ** -power @ V.mT


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (40, 10)], ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_randomized_svd_captures_the_energy(shape, power):
    """It captures 99 % of the energy of the best r directions. U and V are orthonormal."""
    r = 8
    for seed in range(3):
        W = decaying(shape, seed, power)
        U, S, V = randomized_svd(W, r, niter=4, generator=torch.Generator().manual_seed(seed))
        best = torch.linalg.svdvals(W)[:r].square().sum()
        assert (U * S @ V).square().sum() >= 0.99 * best
        assert (U.mT @ W).square().sum() >= 0.99 * best
        torch.testing.assert_close(U.mT @ U, torch.eye(r), atol=1e-5, rtol=0)
        torch.testing.assert_close(V @ V.mT, torch.eye(r), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pissa-randomized", "loraga-randomized"])
def test_randomized_inits_draw_from_the_generator_alone(name):
    """Equal seeds give equal bits, and other seeds others. torch's own generator is not used."""
    model = nn.Sequential(nn.Linear(120, 90))
    model[0].weight.data = decaying((90, 120), 0)
    variant = INITS[name](8)
    stats = None if variant.statistic is None else {"0": decaying((90, 120), 1)}
    before = torch.get_rng_state()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return lf.adapt(model, variant, targets=ALL, stats=stats, generator=generator)[1]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert largest(first, again) == 0
    assert largest(first, other) > 0


def test_randomized_inits_are_near_the_exact_ones():
    """PiSSA's s B0 A0 and LoRA-GA's directions capture the energy that the exact ones capture."""
    model = nn.Sequential(nn.Linear(120, 90))
    model[0].weight.data = W = decaying((90, 120), 0)
    stats = {"0": decaying((90, 120), 1)}
    generator = torch.Generator().manual_seed(0)
    energy: dict[tuple[str, str], Tensor] = {}
    for svd in ("exact", "randomized"):
        adapter, _ = lf.adapt(model, lf.PiSSA(r=8, svd=svd), targets=ALL, generator=generator)
        A0, B0 = adapter.frozen["0.lora_A0"], adapter.frozen["0.lora_B0"]
        energy["pissa", svd] = W.square().sum() - (W - B0 @ A0).square().sum()
        adapter, _ = lf.adapt(
            model, lf.LoRAGA(r=8, svd=svd), targets=ALL, generator=generator, stats=stats
        )
        A0, B0 = adapter.frozen["0.lora_A0"], adapter.frozen["0.lora_B0"]
        energy["loraga A", svd] = (stats["0"] @ A0.mT).square().sum()
        energy["loraga B", svd] = B0.square().sum()
    for name in ("pissa", "loraga A", "loraga B"):
        assert abs(energy[name, "randomized"] / energy[name, "exact"] - 1) <= 0.01


# LoRA+


@pytest.mark.parametrize(
    ("make", "bias"),
    [(lf.LoRA, False), (lambda **fields: lf.LoRA(add_bias=True, **fields), True), (lf.EVA, False)],
    ids=["lora", "lora-bias", "eva"],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # to a layer without a bias
def test_lora_plus_groups_are_those_of_peft(make, bias):
    """PEFT's optimizer has the same rate for the parameter of the same name."""
    model = square_llama()
    adapter, params = with_data(model, make(r=8, lr_ratio=16.0), [ids_batch()])
    config = peft.LoraConfig(r=8, target_modules=list(ALL.find(model)), lora_bias=bias)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    rate: dict[str, Any] = {"lr": 1e-4, "loraplus_lr_ratio": 16.0}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rate)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {
        name.removeprefix("base_model.model."): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    expected = {
        name.replace(".default.weight", "").replace("B.default.bias", "b"): rates[id(p)]
        for name, p in named.items()
    }
    assert adapter.lr_scale.keys() == params.keys()
    for key, scale in adapter.lr_scale.items():
        assert scale * 1e-4 == pytest.approx(expected[key])


def test_other_adapters_learn_at_one_rate(tmp_path):
    """The ratio of the rates is 1 by default. It is a field, so a file keeps it."""
    model = tiny_llama()
    for variant in (lf.LoRA(), lf.OLoRA(), lf.DoRA()):
        adapter, params = lf.adapt(model, variant)
        assert adapter.lr_scale == dict.fromkeys(params, 1.0)
    adapter, params = lf.adapt(model, {"q_proj": lf.LoRA(lr_ratio=4.0), "k_proj": lf.OLoRA()})
    expected = {key: 4.0 if key.endswith("q_proj.lora_B") else 1.0 for key in params}
    assert adapter.lr_scale == expected
    lf.save(tmp_path / "plus.safetensors", adapter, params)
    assert lf.load(tmp_path / "plus.safetensors", model)[0].lr_scale == adapter.lr_scale
    assert set(adapter.replace(lr_ratio=2.0).lr_scale.values()) == {1.0, 2.0}
    for make in (lf.LoRA, lf.EVA):
        with pytest.raises(lf.LoraFuncError, match="lr_ratio must be a finite number above 0"):
            make(lr_ratio=0.0)


def test_a_randomized_corda_is_near_the_exact_one():
    """Of a weight whose spectrum decays. The smallest triplets have no such sketch."""
    generator = torch.Generator().manual_seed(0)
    n, r = 96, 8
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    weight = lf.Weight(Q * torch.arange(1, n + 1) ** -1.0)
    stats = stats_for(lf.CorDA(r=r), weight)
    exact, near = (
        lf.CorDA(r=r, svd=svd).init(weight, torch.Generator().manual_seed(1), stats).trainable
        for svd in ("exact", "randomized")
    )
    product, close = (leaves["B"] @ leaves["A"] for leaves in (exact, near))
    assert (product - close).norm() < 0.02 * product.norm()
    with pytest.raises(lf.LoraFuncError, match="svd"):
        lf.CorDA(r=r, mode="kpm", svd="randomized")
