"""Inits from weights and data: against PEFT's, against the documented matrices in float64, and to the bit at the start."""

from __future__ import annotations

import copy
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
pytestmark = [  # of what PEFT does itself
    pytest.mark.filterwarnings("ignore:CUDA reports that you have .* devices:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def square_llama() -> nn.Module:
    """All layers read 32 features: what PEFT's low-rank SVD of 2 x 16 columns finds is then exact."""
    return tiny_llama(head_dim=8, intermediate_size=32)


def ids_batch(rows: int = 8, length: int = 20, padded: bool = True) -> dict[str, Tensor]:
    batch = text_batch(rows, length)
    return {
        name: batch[name]
        for name in (("input_ids", "attention_mask") if padded else ("input_ids",))
    }


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
    """Where layers read one input, PEFT breaks the tie of the last rank its own way, so their ranks are compared sorted."""
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
    for group in (
        [f"model.layers.{i}.{name}" for name in group] for i in range(2) for group in groups
    ):
        assert sorted(ranks[path] for path in group) == sorted(len(theirs[path]) for path in group)
        for path in group:
            n = min(ranks[path], len(theirs[path]))
            if n:
                assert angle(ours[path][:n], theirs[path][:n]) < 1e-3


@pytest.mark.parametrize("adjusted", ["rho=1", "rho=2"])
def test_eva_computes_what_peft_does(adjusted):
    """The outputs agree for PEFT's A and a trained B: alpha_l / r_l is one number, whatever the ranks."""
    r, rho = (16, 1.0) if adjusted == "rho=1" else (8, 2.0)
    model, batch = square_llama(), ids_batch()
    config = peft.LoraConfig(
        r=r,
        lora_alpha=5,
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
    stats = {path: Components(A, torch.ones(len(A))) for path, A in factors.items()}
    stats |= {
        path: Components(torch.empty(0, 32), torch.empty(0))
        for path in ALL.find(model)
        if path not in stats
    }
    adapter, params = lf.adapt(model, lf.EVA(r=r, alpha=5.0, rho=rho), targets=ALL, stats=stats)
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


@pytest.mark.parametrize("rho", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("center", [True, False], ids=["center", "no center"])
def test_eva_is_the_svd_of_all_tokens(center, rho):
    """Its directions are the right singular vectors of the stacked tokens, orthonormal; the ranks keep to their budget."""
    model, batches, r = tiny_llama().double(), [ids_batch() for _ in range(3)], 4
    adapter, _, A = eva(model, batches, r=r, rho=rho, center=center)
    stats = lf.collect(model, ALL, batches, lf.EVA(r=r, rho=rho, center=center).statistic)
    assert sum(map(len, A.values())) == r * len(ALL.find(model))
    assert all(0 < len(own) <= round(rho * r) for own in A.values())
    assert set(adapter.targets) == {path for path, found in stats.items() if len(found.directions)}
    if rho == 1:
        assert {len(own) for own in A.values()} == {r}
    tokens: dict[str, list[Tensor]] = {path: [] for path in A}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, __, path=path: tokens[path].append(args[0])
        )
        for path in A
    ]
    masks = torch.cat([batch["attention_mask"].bool() for batch in batches])
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for path, own in A.items():
        x = torch.cat(tokens[path])[masks].detach()
        _, S, Vh = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False)
        n = len(own)
        assert own.dtype == torch.float32
        directions = stats[path].directions
        torch.testing.assert_close(directions @ directions.mT, torch.eye(n, dtype=torch.float64))
        torch.testing.assert_close(own, directions.float())
        torch.testing.assert_close(
            (directions * Vh[:n]).sum(1).abs(), torch.ones(n, dtype=torch.float64)
        )
        torch.testing.assert_close(stats[path].singular_values, S[:n])


def test_layers_that_share_an_input_share_directions():
    """They differ in nothing but the last rank, where the budget ends between them."""
    _, _, A = eva(tiny_llama(), [ids_batch()], r=4)
    for i in range(2):
        for group in GROUPS:
            own = [A[path] for path in (f"model.layers.{i}.{name}" for name in group) if path in A]
            assert len({len(part) for part in own}) <= 2
            n = min(map(len, own))
            assert all(torch.equal(part[:n], own[0][:n]) for part in own)


def uneven(directions: int = 1) -> tuple[nn.Module, list[Tensor]]:
    """Four layers, of which the second and the fourth read an input that varies in few directions."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

        def forward(self, x):
            few = torch.cat([x[:, :directions], torch.ones(len(x), 6 - directions)], 1)
            return sum(layer(few if i % 2 else x) for i, layer in enumerate(self.layers))

    return Parallel(), [torch.randn(50, 6)]


def test_ranks_are_no_more_than_the_tokens_have():
    """Directions in which no token moves are rounding, and are not taken.

    The budget goes elsewhere, or is not spent, and then a warning says so.
    """
    model, batches = uneven()
    _, _, A = eva(model, batches, r=2, rho=3.0)
    assert {path: len(own) for path, own in A.items()} == {
        "layers.0": 3,
        "layers.1": 1,
        "layers.2": 3,
        "layers.3": 1,
    }
    few = [batches[0][:3]]  # three tokens span two directions about their mean
    with pytest.warns(
        UserWarning, match="have only 6 components for 4 layers, where r=6 asks for 24"
    ):
        _, _, A = eva(model, few, r=6, rho=1.0)
    assert {path: len(own) for path, own in A.items()} == {
        "layers.0": 2,
        "layers.1": 1,
        "layers.2": 2,
        "layers.3": 1,
    }
    one = [batches[0][:1]]  # a token alone has no variance
    none = pytest.raises(lf.LoraFuncError, match="gave parameters to none of the layers")
    with pytest.warns(UserWarning, match="have only 0 components"), none:
        eva(model, one, r=2)


def test_layers_of_rank_zero_drop_out(tmp_path):
    """Of the targets, the parameters and the file; the rest reloads without data, to the bit."""
    model, batches = uneven(directions=2)
    adapter, params, A = eva(
        model, batches, r=1, rho=2.0
    )  # four components in all, and each of those two layers offers two
    assert {path: len(own) for path, own in A.items()} == {"layers.1": 2, "layers.3": 2}
    assert params.keys() == {f"layers.{i}.lora_{name}" for i in (1, 3) for name in "AB"}
    params = trained(params)
    lf.save(tmp_path / "eva.safetensors", adapter, params)
    again, reloaded = lf.load(tmp_path / "eva.safetensors", model)
    assert again.targets == adapter.targets == ("layers.1", "layers.3")
    assert largest(params, reloaded) == 0
    assert torch.equal(again(model, reloaded, batches[0]), adapter(model, params, batches[0]))


def test_eva_whitened():
    """Directions over the roots of the singular values, as PEFT has it."""
    model, batches = tiny_llama(), [ids_batch()]
    _, _, plain = eva(model, batches, r=4)
    _, _, white = eva(model, batches, r=4, whiten=True)
    stats = lf.collect(model, ALL, batches, lf.EVA(r=4).statistic)
    for path, own in plain.items():
        torch.testing.assert_close(white[path] * stats[path].singular_values.sqrt()[:, None], own)


def test_fresh_parameters_need_the_data_again():
    """Adapter.init takes stats; those of other data may have other ranks, which is an error."""
    model, batches = uneven()
    adapter, params, _ = eva(model, batches, r=2, rho=3.0)
    statistic = lf.EVA(r=2, rho=3.0).statistic
    assert (
        largest(adapter.init(model, stats=lf.collect(model, adapter, batches, statistic)), params)
        == 0
    )
    with pytest.raises(
        lf.LoraFuncError, match=r"components of its inputs: pass calibration=batches to adapt"
    ):
        adapter.init(model)
    with pytest.raises(
        lf.LoraFuncError,
        match=r"has shape \(3, 6\) in this adapter, and .* by these stats; adapt anew",
    ):
        with pytest.warns(UserWarning, match="components"):
            few = lf.collect(model, adapter, [batches[0][:3]], statistic)
        adapter.init(model, stats=few)


# inits that telescope: identity, and the matrix that is taken away


INITS = {
    "olora": lambda r: lf.OLoRA(r=r, alpha=5.0),
    "milora": lambda r: lf.MiLoRA(r=r, alpha=5.0),
    "corda-ipm": lambda r: lf.CorDA(r=r, alpha=5.0),
    "corda-kpm": lambda r: lf.CorDA(r=r, alpha=5.0, mode="kpm"),
    "loraga": lambda r: lf.LoRAGA(r=r, alpha=5.0, gamma=9.0),
    "loraga-randomized": lambda r: lf.LoRAGA(r=r, alpha=5.0, svd="randomized"),
    "pissa-randomized": lambda r: lf.PiSSA(r=r, alpha=5.0, svd="randomized"),
    "eva": lambda r: lf.EVA(r=r),
}


def with_data(
    model: nn.Module, variant: lf.Variant, batches: Any, **options: Any
) -> tuple[lf.Adapter, dict[str, Tensor]]:
    return lf.adapt(
        model,
        variant,
        targets=ALL,
        calibration=None if variant.statistic is None else batches,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", INITS.values(), ids=INITS.keys())
def test_identity_at_init_and_after_a_reload(make, dtype, tmp_path):
    """To the bit; and what was trained reloads to the bit, without data."""
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


DOCUMENTED = {
    "olora": qr_part,
    "milora": minor_part,
    "corda-ipm": oriented_part,
    "corda-kpm": oriented_part,
    "loraga": gradient_part,
}
"""s B0 A0 as each variant's file says it, in float64."""


@pytest.mark.parametrize(("name", "documented"), DOCUMENTED.items(), ids=DOCUMENTED.keys())
def test_the_documented_matrix(name, documented):
    """Up to the signs of singular vectors, if A0 and B0 take different triplets (LoRA-GA)."""
    model, batches, variant = (
        tiny_llama().double(),
        [text_batch() for _ in range(4)],
        INITS[name](3),
    )
    adapter, params = with_data(model, variant, batches, dtype=torch.float64)
    stats = lf.collect(model, ALL, batches, variant.statistic) if variant.statistic else {}
    for path in adapter.targets:
        A0, B0 = (adapter.frozen[f"{path}.lora_{leaf}"] for leaf in ("A0", "B0"))
        W = model.get_submodule(path).weight.detach()
        expected, found = documented(variant, W, stats.get(path)), variant.scale * B0 @ A0
        assert torch.equal(A0, params[f"{path}.lora_A"])
        if name == "loraga":
            expected, found = (torch.linalg.svdvals(M) for M in (expected, found))
            torch.testing.assert_close(A0.mT @ A0, A0.mT @ A0 @ (A0.mT @ A0))  # a projector
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


# PEFT's of the same names


class Net(nn.Module):
    """One adapted layer between two that are not."""

    def __init__(self):
        super().__init__()
        self.first, self.target, self.last = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.target(torch.tanh(self.first(x)))))


TARGET = lf.Targets(names=("target",), roles=())
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["target"]}


def factors(theirs: nn.Module) -> tuple[Tensor, Tensor]:
    layer = theirs.base_model.model.target
    return layer.lora_A["default"].weight.detach().clone(), layer.lora_B[
        "default"
    ].weight.detach().clone()


def same_function(model: nn.Module, variant: lf.Variant, theirs: nn.Module) -> None:
    """The outputs agree when both start from PEFT's factors and take the same step."""
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


def test_olora_is_that_of_peft():
    """QR has no free signs: the factors themselves are equal."""
    model, variant = Net(), lf.OLoRA(r=4, alpha=6.0)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**CONFIG, init_lora_weights="olora")
    )
    _, params = lf.adapt(model, variant, targets=TARGET)
    A, B = factors(theirs)
    torch.testing.assert_close(params["target.lora_A"], A)
    torch.testing.assert_close(params["target.lora_B"], B)
    same_function(model, variant, theirs)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_that_of_peft(mode, tmp_path):
    """For one second moment, which PEFT estimates its own way, and can be given."""
    model, variant = Net(), lf.CorDA(r=4, alpha=6.0, mode=mode)
    found = lf.collect(
        model, ["target"], [torch.randn(100, 8) for _ in range(4)], lf.InputMoments()
    )
    torch.save({"target": found["target"].about(0)}, tmp_path / "covariance.pt")
    config = peft.LoraConfig(
        **CONFIG,
        init_lora_weights="corda",
        corda_config=CordaConfig(
            covariance_file=str(tmp_path / "covariance.pt"), corda_method=mode
        ),
    )
    base = copy.deepcopy(model)
    preprocess_corda(base, config)
    theirs = peft.get_peft_model(base, config)
    _, params = lf.adapt(model, variant, targets=TARGET, stats=found)
    A, B = factors(theirs)
    expected = B @ A  # the signs of singular vectors cancel
    assert (
        params["target.lora_B"] @ params["target.lora_A"] - expected
    ).abs().max() <= 1e-3 * expected.abs().max()
    same_function(model, variant, theirs)


def test_loraga_is_that_of_peft():
    """Over three batches: rows of A and columns of B are PEFT's up to their signs, their lengths included."""
    model, variant = Net(), lf.LoRAGA(r=4, alpha=6.0, gamma=9.0)
    batches = [torch.randn(50, 8) for _ in range(3)]

    def loss(output, batch):
        return (output.square().sum(-1) * batch[:, 0]).mean()

    config = peft.LoraConfig(
        **CONFIG,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=9),
    )
    base = copy.deepcopy(model)
    preprocess_loraga(base, config, lambda: [loss(base(x), x).backward() for x in batches])
    theirs = peft.get_peft_model(base, config)
    stats = lf.collect(model, ["target"], batches, variant.statistic, loss=loss)
    _, params = lf.adapt(model, variant, targets=TARGET, stats=stats)
    A, B = factors(theirs)
    for ours, expected in ((params["target.lora_A"], A), (params["target.lora_B"].mT, B.mT)):
        signs = (ours * expected).sum(1, keepdim=True).sign()
        assert (ours - signs * expected).abs().max() <= 1e-4 * expected.abs().max()
    same_function(model, variant, theirs)


# randomized SVD


def decaying(rows: int, cols: int, seed: int, power: float = 1.0) -> Tensor:
    """Singular values 1, 1/2^power, 1/3^power, .."""
    generator = torch.Generator().manual_seed(seed)
    n = min(rows, cols)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator)).Q for size in (rows, cols))
    return U * torch.arange(1, n + 1) ** -power @ V.mT


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (40, 10)], ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_randomized_svd_captures_the_energy(shape, power):
    """Within 1 % of what the best r directions hold; U and V are orthonormal."""
    r = 8
    for seed in range(3):
        W = decaying(*shape, seed, power)
        U, S, V = randomized_svd(W, r, 4, torch.Generator().manual_seed(seed))
        best = torch.linalg.svdvals(W)[:r].square().sum()
        assert (U * S @ V).square().sum() >= 0.99 * best
        assert (U.mT @ W).square().sum() >= 0.99 * best
        torch.testing.assert_close(U.mT @ U, torch.eye(r), atol=1e-5, rtol=0)
        torch.testing.assert_close(V @ V.mT, torch.eye(r), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pissa-randomized", "loraga-randomized"])
def test_randomized_inits_draw_from_the_generator_alone(name):
    """The same seed gives the same bits, another seed others; torch's own generator is not touched."""
    model = nn.Sequential(nn.Linear(120, 90))
    model[0].weight.data = decaying(90, 120, 0)
    stats = {"0": decaying(90, 120, 1)} if name.startswith("loraga") else None
    before = torch.get_rng_state()
    draws = [
        lf.adapt(
            model,
            INITS[name](8),
            targets=ALL,
            stats=stats,
            generator=torch.Generator().manual_seed(seed),
        )[1]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert largest(draws[0], draws[1]) == 0
    assert largest(draws[0], draws[2]) > 0


def test_randomized_inits_are_near_the_exact_ones():
    """s B0 A0 of PiSSA captures the energy of the exact one; so do the directions of LoRA-GA."""
    model = nn.Sequential(nn.Linear(120, 90))
    model[0].weight.data = W = decaying(90, 120, 0)
    stats = {"0": decaying(90, 120, 1)}
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


@pytest.mark.parametrize("make", [lf.LoRA, lf.EVA], ids=["lora", "eva"])
def test_lora_plus_groups_are_those_of_peft(make):
    """The rate of every leaf is that of PEFT's optimizer for the parameter of the same name."""
    model = square_llama()
    adapter, params = with_data(model, make(r=8, lr_ratio=16.0), [ids_batch()])
    config = peft.LoraConfig(r=8, target_modules=list(ALL.find(model)))
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): rates[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert adapter.lr_scale.keys() == params.keys()
    for key, scale in adapter.lr_scale.items():
        assert scale * 1e-4 == pytest.approx(expected[key])


def test_other_adapters_learn_at_one_rate(tmp_path):
    """The ratio is part of the fields, so of the file; by default it is 1."""
    model = tiny_llama()
    for variant in (lf.LoRA(), lf.OLoRA(), lf.DoRA()):
        adapter, params = lf.adapt(model, variant)
        assert adapter.lr_scale == dict.fromkeys(params, 1.0)
    adapter, params = lf.adapt(model, {"q_proj": lf.LoRA(lr_ratio=4.0), "k_proj": lf.OLoRA()})
    assert {key: scale for key, scale in adapter.lr_scale.items() if scale != 1} == {
        key: 4.0 for key in params if key.endswith("q_proj.lora_B")
    }
    lf.save(tmp_path / "plus.safetensors", adapter, params)
    assert lf.load(tmp_path / "plus.safetensors", model)[0].lr_scale == adapter.lr_scale
    assert set(adapter.replace(lr_ratio=2.0).lr_scale.values()) == {1.0, 2.0}
    for make in (lf.LoRA, lf.EVA):
        with pytest.raises(lf.LoraFuncError, match="lr_ratio must be a finite number above 0"):
            make(lr_ratio=0.0)
