"""What several processes do together, run by `test_distributed.py`: each cell is done by all of them, and compared with one process."""

import functools
import itertools
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ftp
import hyperopt_nested as hn
from hyperopt_nested import registry
from hyperopt_nested.backends import compiler
from hyperopt_nested.testing.subject import subject

PROCESSES = 2
Named = Iterable[tuple[str, Tensor]]
CELLS: dict[str, Callable[[Path], None]] = {}


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Shards are uneven (5 rows), and empty (1 row)."""
    torch.manual_seed(0)
    linear = functools.partial(nn.Linear, dtype=torch.float32)
    return nn.Sequential(linear(4, 6), nn.Tanh(), linear(6, 5), nn.LayerNorm(5), linear(5, 1)).to(dtype)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], dtype: torch.dtype = torch.float64) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        (network(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Named, str], Any]] = {
    "learned": lambda named, backend: hn.HyperOptimizer(named, hn.adamw(lr=hn.learn(1e-2)), backend=backend),
    "nothing learned": lambda named, backend: hn.HyperOptimizer(named, hn.adamw(lr=1e-2), backend=backend),
    "AdamP": lambda named, backend: ftp.AdamP(named, lr=1e-2, backend=backend),
    "SGDP": lambda named, backend: ftp.SGDP(named, lr=1e-2, momentum=0.9, backend=backend),
    "FTP": lambda named, backend: ftp.FTP(torch.optim.AdamW(named, lr=1e-2), backend=backend),
}


def replicated(network: nn.Module) -> nn.Module:
    return DistributedDataParallel(network)


def fully_sharded(network: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,)) if mesh is None else mesh
    for part in [each for each in network.children() if [*each.parameters()]] + [network]:
        fully_shard(part, mesh=mesh)
    return network


def partly_sharded(network: nn.Module) -> nn.Module:
    """The other tensors are plain ones, with equal gradients, since all processes have the same data."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for part in [*network.children()][:3]:
        if [*part.parameters()]:
            fully_shard(part, mesh=mesh)
    return network


def tensor_parallel(network: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,)) if mesh is None else mesh
    return parallelize_module(network, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def two_dimensional(network: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("data", "tensor"))
    return fully_sharded(tensor_parallel(network, mesh["tensor"]), mesh["data"])


def hybrid(network: nn.Module) -> nn.Module:
    return fully_sharded(network, init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("replicated", "sharded")))


def by_two_dimensions(network: nn.Module) -> nn.Module:
    """Matrices are split along two dimensions of a mesh; vectors are replicated along one."""
    mesh = init_device_mesh("cpu", (1, PROCESSES))
    for layer in network.children():
        for name, param in [*layer.named_parameters()]:
            placements = [Shard(0), Shard(1)] if param.ndim > 1 else [Replicate(), Shard(0)]
            setattr(layer, name, nn.Parameter(distribute_tensor(param.detach(), mesh, placements)))
    return _Gathering(network)


class _Gathering(nn.Module):
    """Computes with whole weights: of this kind of placements, layers know nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        weights = {name: param.full_tensor() for name, param in self.network.named_parameters()}
        return torch.func.functional_call(self.network, weights, x)


class _Rows(nn.Module):
    """Gives a layer a part of the rows on each process, so that gradients of its replicated weights are to be summed."""

    def __init__(self, layer: nn.Module, mesh: Any) -> None:
        super().__init__()
        self.layer, self._mesh = layer, mesh

    def forward(self, x: Tensor) -> Any:
        rows = DTensor.from_local(x, self._mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(0)])
        return self.layer(rows).full_tensor()


def sequence_parallel(network: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    network = tensor_parallel(network, mesh)
    norm = network[3]  # type: ignore[index]
    for name, param in [*norm.named_parameters()]:
        setattr(norm, name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Replicate()])))
    network[3] = _Rows(norm, mesh)  # type: ignore[index, operator]
    return network


STRATEGIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": replicated,
    "FSDP2": fully_sharded,
    "FSDP2, some tensors": partly_sharded,
    "FSDP2, hybrid": hybrid,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "FSDP2 and tensor parallel": two_dimensional,
    "sharded along two dimensions": by_two_dimensions,
}


def combinations() -> Iterator[tuple[str, str, str]]:
    """Strategy, optimizer and backend of cells: those that take time, or are like others, not everywhere."""
    for strategy, kind in itertools.product(STRATEGIES, OPTIMIZERS):
        if strategy == "FSDP2" or kind != "SGDP":
            yield strategy, kind, "foreach"
        if strategy in ("FSDP2", "tensor parallel"):
            yield strategy, kind, "reference"
        if strategy == "FSDP2" and kind in ("learned", "AdamP"):
            yield strategy, kind, "fused"


def full(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return result.detach()


def learned(optimizer: Any) -> dict[str, float]:
    """Learned values, without the names of what modules are wrapped in."""
    return {re.sub(r"module\.|network\.|layer\.", "", name): value for name, value in optimizer.learned().items()}


def compared(network: nn.Module, optimizer: Any, one: nn.Module, alone: Any, tolerance: float = 1e-12) -> None:
    """The parameters and learned values are those of one process; and learned values are equal on all."""
    for (name, param), other in zip(network.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(full(param), other.detach(), rtol=tolerance, atol=tolerance, msg=lambda text, at=name: f"{at}: {text}")
    if isinstance(optimizer, torch.optim.AdamW):
        return
    values, expected = learned(optimizer), learned(alone)
    assert values.keys() == expected.keys(), (values, expected)
    for name, value in expected.items():
        assert abs(values[name] - value) <= tolerance * max(1, abs(value)), (name, values[name], value)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    assert all(each == values for each in everyone), everyone


def cell(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        assert name not in CELLS
        CELLS[name] = function
        return function

    return add


@functools.cache
def by_one_process(kind: str, steps: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """What others are compared with: not to be trained on."""
    one = model(dtype)
    alone = OPTIMIZERS[kind](one.named_parameters(), "reference")
    train(one, alone, range(steps), dtype)
    return one, alone


def matrix(strategy: str, kind: str, backend: str, dtype: torch.dtype = torch.float64) -> None:
    network = STRATEGIES[strategy](model(dtype))
    optimizer = OPTIMIZERS[kind](network.named_parameters(), backend)
    train(network, optimizer, range(4), dtype)
    compared(network, optimizer, *by_one_process(kind, 4, dtype), 1e-12 if dtype == torch.float64 else 1e-5)


for _which in combinations():

    @cell(", ".join(_which))
    def _(_: Path, which: tuple[str, str, str] = _which) -> None:
        matrix(*which)


for _kind in ("learned", "AdamP"):

    @cell(f"FSDP2, {_kind}, float32")
    def _(_: Path, kind: str = _kind) -> None:
        matrix("FSDP2", kind, "foreach", torch.float32)


@cell("FSDP2, AdamP, compile")
@patch("torch._inductor.compile", lambda graph, examples: graph)  # quickly: as it is traced, without inductor's code
def _(_: Path) -> None:
    layers = [nn.Sequential(nn.Linear(3, 2, dtype=torch.float64)) for _ in range(2)]  # each shape has a program of its own
    layers[1].load_state_dict(layers[0].state_dict())
    for name, param in layers[0].named_parameters():
        dist.broadcast(param.detach(), 0)
        layers[1].get_parameter(name).data.copy_(param.detach())
    pair = [(layers[0], OPTIMIZERS["AdamP"](layers[0].named_parameters(), "reference"))]
    network = fully_sharded(layers[1])
    pair.append((network, OPTIMIZERS["AdamP"](network.named_parameters(), "compile")))
    for each, optimizer in pair:
        for _ in range(2):
            optimizer.zero_grad()
            each(torch.ones(2, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    compared(network, pair[1][1], *pair[0])


def tried(make: Callable[[Named], Any], strategies: Iterable[str] = ("FSDP2", "tensor parallel"), tolerance: float = 1e-12) -> None:
    for strategy in strategies:
        one, network = model(), STRATEGIES[strategy](model())
        alone, optimizer = make(one.named_parameters()), make(network.named_parameters())
        train(one, alone, range(3))
        train(network, optimizer, range(3))
        compared(network, optimizer, one, alone, tolerance)


for _rule in [name for name in hn.names() if registry.origin(name).split(".")[0] in ("hyperopt_nested", "ftp")]:  # not of other tests

    @cell(f"rule {_rule}")
    def _(_: Path, rule: str = _rule) -> None:
        optimizer = subject(rule).template
        if optimizer.rule.loss_names:
            return  # is given the loss

        def make(named: Named) -> Any:
            tensors = [(name, p) for name, p in named if p.ndim == 2 or rule != "muon"]  # which takes matrices only
            return hn.HyperOptimizer(tensors, optimizer, backend="reference")

        tried(make, ["FSDP2"])


LEARNED = {
    "per tensor": lambda: hn.adamw(lr=hn.learn(1e-2, hn.sgd(1e-5), per="tensor")),
    "per row": lambda: hn.adamw(lr=hn.learn(1e-2, hn.sgd(1e-5), per="row")),
    "per element": lambda: hn.adamw(lr=hn.learn(1e-2, hn.sgd(1e-5), per="element")),
    "a tower": lambda: hn.sgd(lr=hn.learn(1e-2, hn.sgd(hn.learn(1e-4, hn.sgd(1e-9)), momentum=0.5)), momentum=0.9),
    "under a global norm": lambda: hn.clip_by_global_norm(hn.adamw(lr=hn.learn(1e-2)), 0.5),
    "the global norm": lambda: hn.clip_by_global_norm(hn.sgd(0.1), hn.learn(0.5, hn.sgd(1e-3))),
    "through a projection": lambda: hn.project(hn.adamw(lr=hn.learn(1e-2)), radius=0.05),
    "into another ball": lambda: hn.project(hn.sgd(0.1), onto=hn.frobenius, radius=hn.learn(0.01, hn.adam(1e-3))),
    "into a ball of rows": lambda: hn.project(hn.sgd(0.1), onto=hn.row_l2, radius=hn.learn(0.01, hn.adam(1e-3))),
    "inside of an average": lambda: hn.ema(hn.project(hn.sgd(0.1), radius=hn.learn(0.01, hn.adam(1e-3)))),
    "under a global norm and a projection": lambda: hn.project(
        hn.clip_by_global_norm(hn.sgd(0.1), 0.5), radius=hn.learn(0.01, hn.adam(1e-3))
    ),
    "by rows of the anchor": lambda: ftp.ftp_rule(hn.sgd(0.1), radius=ftp.Radius(relative="row", start=0.01)),
    "radius of the model": lambda: ftp.ftp_rule(hn.sgd(0.1), radius=ftp.Radius(per="model", via="log", start=0.01)),
}
for _name, _make in LEARNED.items():

    @cell(f"learned {_name}")
    def _(_: Path, make: Callable[[], hn.Optimizer] = _make) -> None:
        tried(lambda named: hn.HyperOptimizer(named, make(), backend="reference"), ["FSDP2", "sharded along two dimensions"])


@cell("a discounted horizon")
def _(_: Path) -> None:
    sgd = hn.sgd(lr=hn.learn(1e-2, hn.sgd(1e-5)), momentum=0.9)
    tried(lambda named: hn.HyperOptimizer(named, hn.clip_by_global_norm(sgd, 0.5), horizon=hn.Discounted(0.9)))


@cell("exact curvature")
def _(_: Path) -> None:
    sgd = hn.sgd(lr=hn.learn(1e-2, hn.sgd(1e-5)))
    with pytest.raises(ValueError, match="curvature='none'"):
        hn.HyperOptimizer(fully_sharded(model()).named_parameters(), sgd, horizon=hn.Discounted(0.9, curvature="exact"))


@cell("learning switched off")
def _(_: Path) -> None:
    off = hn.adamw(lr=hn.learn(1e-2, hn.sgd(0.0)))
    for name, strategy in STRATEGIES.items():
        networks = [strategy(model()), strategy(model())]
        for network, optimizer in zip(networks, (off, hn.adamw(lr=1e-2)), strict=True):
            train(network, hn.HyperOptimizer(network.parameters(), optimizer, backend="reference"), range(2))
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            assert torch.equal(full(one), full(other)), name


@cell("exchanges a step")
def _(folder: Path) -> None:
    counts: dict[str, dict[str, int]] = {}
    for depth in (1, 4):
        for name in ("FSDP2", "tensor parallel", "FSDP2 and tensor parallel") if depth == 1 else ("FSDP2",):
            for kind, make in OPTIMIZERS.items():
                network = STRATEGIES[name](model())
                named = [*network.named_parameters()]
                if name == "FSDP2":
                    blocks = [fully_sharded(model()) for _ in range(depth)]
                    network = nn.Sequential()
                    named = [(f"{i}.{key}", p) for i, block in enumerate(blocks) for key, p in block.named_parameters()]
                for _, p in named:
                    p.grad = torch.ones_like(p)
                optimizer = make(named, "reference")
                for _ in range(2):
                    optimizer.step()
                with CommDebugMode() as seen:
                    optimizer.step()
                counts.setdefault(name, {})[f"{kind}, {len(named)} tensors"] = seen.get_total_counts()
    for name, found in counts.items():
        for kind, count in found.items():
            assert count <= (0 if "nothing" in kind else 1 if "learned" in kind else 3), (name, kind, count)
    if dist.get_rank() == 0:
        (folder / "exchanges.json").write_text(json.dumps(counts))


def checkpoint(folder: Path, network: nn.Module, optimizer: Any, *, load: bool, **how: Any) -> None:
    """Save to a folder, or load from it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process, that it is alone
        state = {"model": network.state_dict(), "optimizer": get_optimizer_state_dict(network, optimizer)}
        if not load:
            dcp.save(state, checkpoint_id=folder, **how)
            return
        dcp.load(state, checkpoint_id=folder, **how)
    network.load_state_dict(state["model"])
    set_optimizer_state_dict(network, optimizer, state["optimizer"])


def checkpointed(folder: Path, kind: str) -> None:
    """2 processes go on from what 2, and from what 1 has saved; what they save, 1 goes on from, in `test_distributed`."""
    for source in (f"two {kind}", f"one {kind}"):
        if source.startswith("two"):
            network = fully_sharded(model())
            optimizer = OPTIMIZERS[kind](network.named_parameters(), "foreach")
            train(network, optimizer, range(3))
            checkpoint(folder / source, network, optimizer, load=False)
        network = fully_sharded(model())
        optimizer = OPTIMIZERS[kind](network.named_parameters(), "foreach")
        checkpoint(folder / source, network, optimizer, load=True)
        train(network, optimizer, range(3, 5))
        compared(network, optimizer, *by_one_process(kind, 5))


for _kind in OPTIMIZERS:

    @cell(f"checkpoints, {_kind}")
    def _(folder: Path, kind: str = _kind) -> None:
        checkpointed(folder, kind)


@cell("gradients that are to be summed")
def _(_: Path) -> None:
    """They are summed with the other exchanges, however many they are."""
    for kind, make in OPTIMIZERS.items():
        if kind == "FTP":
            continue  # torch's AdamW redistributes each
        networks = [sequence_parallel(model()) for _ in range(3)]
        optimizer = make([(f"{i}.{name}", p) for i, each in enumerate(networks) for name, p in each.named_parameters()], "reference")
        for step in range(2):
            for each in networks:
                train(each, torch.optim.SGD(each.parameters(), lr=0.0), [step])
            norms = [p.grad for each in networks for name, p in each.named_parameters() if "layer" in name]
            assert all(isinstance(grad, DTensor) and grad.placements[0].is_partial() for grad in norms)
            with CommDebugMode() as seen:
                optimizer.step()
        assert seen.get_total_counts() <= {"nothing learned": 1, "learned": 2}.get(kind, 4), (kind, seen.get_total_counts())


@cell("nothing is gathered for FTP")
def _(_: Path) -> None:
    for strategy in (fully_sharded, tensor_parallel):
        network = strategy(model())
        optimizer = ftp.AdamP(network.named_parameters(), lr=1e-2, backend="foreach")
        train(network, optimizer, range(2))
        for name, param in network.named_parameters():
            if isinstance(param, DTensor):
                assert optimizer.rule_states()[name]["anchor"].to_local().shape == param.to_local().shape, name
        assert "foreach" in optimizer.backend, optimizer.backend


@cell("state_dict on each process")
def _(_: Path) -> None:
    network = fully_sharded(model())
    optimizer = OPTIMIZERS["AdamP"](network.named_parameters(), "foreach")
    train(network, optimizer, range(2))
    saved, weights = optimizer.state_dict(), {name: full(p).clone() for name, p in network.named_parameters()}
    assert any(isinstance(entry, DTensor) for entries in saved["state"].values() for entry in entries.values())
    other = model()
    other.load_state_dict(weights)
    other = fully_sharded(other)
    again = OPTIMIZERS["AdamP"](other.named_parameters(), "foreach")
    again.load_state_dict(saved)
    train(network, optimizer, range(2, 4))
    train(other, again, range(2, 4))
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(one), full(two))
    assert learned(optimizer) == learned(again)


@cell("anchors that are given")
def _(_: Path) -> None:
    torch.manual_seed(1)
    plain = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model().named_parameters()}
    one = model()
    alone = ftp.AdamP(one.named_parameters(), lr=1e-2, anchor=plain, backend="reference")
    train(one, alone, range(3))
    for strategy in (fully_sharded, tensor_parallel):
        shape = dict(strategy(model()).named_parameters())
        sharded = {
            name: distribute_tensor(anchor, shape[name].device_mesh, shape[name].placements) if isinstance(shape[name], DTensor) else anchor
            for name, anchor in plain.items()
        }
        for anchor in (plain, sharded):
            network = strategy(model())
            optimizer = ftp.AdamP(network.named_parameters(), lr=1e-2, anchor=anchor, backend="reference")
            train(network, optimizer, range(3))
            compared(network, optimizer, one, alone)


@cell("what an optimizer is asked for")
def _(_: Path) -> None:
    one, network = model(), fully_sharded(model())
    pair = [(each, ftp.AdamP(each.named_parameters(), lr=1e-2, backend="reference")) for each in (one, network)]
    for each, optimizer in pair:
        train(each, optimizer, range(2))
        optimizer.reset_anchor()
        optimizer.set_hyper("radius", 1e-3)
        assert "AdamP" in repr(optimizer)
        assert optimizer.hypers()["radius"]["0.weight"].shape == ()
        train(each, optimizer, range(2, 4))
        for name, state in optimizer.rule_states().items():
            assert state["anchor"].shape == dict(each.named_parameters())[name].shape
    compared(network, pair[1][1], one, pair[0][1])


@cell("averages")
def _(_: Path) -> None:
    for optimizer in (hn.ema(hn.adamw(1e-2), decay=0.9), hn.ema(hn.lamb(1e-2), decay=0.9)):
        one, network = model(), fully_sharded(model())
        pair = [(each, hn.HyperOptimizer(each.named_parameters(), optimizer)) for each in (one, network)]
        for each, opt in pair:
            train(each, opt, range(3))
            opt.eval()
        compared(network, pair[1][1], one, pair[0][1])
        for each, opt in pair:
            opt.train()
            train(each, opt, range(3, 4))
        compared(network, pair[1][1], one, pair[0][1])


@cell("a validation loss")
def _(_: Path) -> None:
    for strategy in (replicated, fully_sharded, tensor_parallel):
        one, network = model(), strategy(model())
        pair = [(each, ftp.TPGM(each.named_parameters(), updates=2)) for each in (one, network)]
        for each, tpgm in pair:
            train(each, torch.optim.SGD(each.parameters(), lr=0.1), range(3))

            def closure(each: nn.Module = each) -> Tensor:
                loss: Tensor = (each(torch.ones(2, 4, dtype=torch.float64)) - 1).square().mean()
                loss.backward()
                return loss

            tpgm.step(closure)
        compared(network, pair[1][1], one, pair[0][1])


@cell("parameters that are swapped after construction")
def _(_: Path) -> None:
    one, network = model(), model()
    alone, optimizer = (OPTIMIZERS["AdamP"](each.named_parameters(), "foreach") for each in (one, network))
    old = dict(network.named_parameters())
    network = fully_sharded(network)
    new = {old[name]: p for name, p in network.named_parameters()}
    for group in optimizer.param_groups:  # as Accelerate does for FSDP2
        group["params"] = [new[p] for p in group["params"]]
    train(one, alone, range(3))
    train(network, optimizer, range(3))
    compared(network, optimizer, one, alone)


@cell("a graph of weights before a step")
def _(_: Path) -> None:
    network = fully_sharded(model())
    optimizer = OPTIMIZERS["learned"](network.named_parameters(), "foreach")
    train(network, optimizer, range(1))
    before = [p._version for p in network.parameters()]
    train(network, optimizer, range(1, 2))
    assert all(p._version > version for p, version in zip(network.parameters(), before, strict=True))


@cell("stochastic rounding")
def _(_: Path) -> None:
    """Unbiased on each process, with bits of its own."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for size, placements in (((200, 50), [Shard(0)]), ((10_000,), [Replicate()])):
        param = nn.Parameter(distribute_tensor(torch.ones(size, dtype=torch.bfloat16), mesh, placements))
        optimizer = hn.optim.SGD([param], lr=1e-3, rounding="stochastic", backend="foreach")
        for _step in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        whole = full(param)
        assert abs(whole.double().mean().item() - 0.98) < 1e-3
        halves = whole.chunk(PROCESSES)
        assert not torch.equal(halves[0], halves[1])


@cell("what hides its tensors is refused")
def _(_: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns

    for original in (False, True):
        network = FullyShardedDataParallel(model(), use_orig_params=original, device_id=torch.device("cpu"))
        hn.optim.AdamW(network.parameters(), lr=1e-2)
        for make in (lambda params: hn.optim.AdamW(params, lr=hn.learn(1e-2)), ftp.AdamP, lambda params: hn.optim.Adafactor(params)):
            with pytest.raises(ValueError, match="fully_shard"):
                make([*network.parameters()])
    one, network = model(), model()
    alone, optimizer = ftp.AdamP(one.parameters(), lr=1e-2), ZeroRedundancyOptimizer(network.parameters(), ftp.AdamP, lr=1e-2)
    train(one, alone, range(2))
    train(network, optimizer, range(2))
    for own, other in zip(network.parameters(), one.parameters(), strict=True):
        assert torch.equal(own, other)
    with pytest.raises(ValueError, match="per='tensor'"):
        ZeroRedundancyOptimizer(network.parameters(), hn.optim.AdamW, lr=hn.learn(1e-2))


def run(rank: int, folder: str, port: int, only: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    compiler.FLAGS = ("-O0",)  # compiled quickly
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    with (Path(folder) / f"{rank}.jsonl").open("w") as rows:
        for name, function in CELLS.items():
            if only not in name:
                continue
            begun = time.monotonic()
            try:
                function(Path(folder))
                error = ""
            except Exception:
                error = traceback.format_exc()[-6000:]
            print(rank, name, f"{time.monotonic() - begun:.2f} s", flush=True)
            rows.write(json.dumps([name, error]) + "\n")
            rows.flush()
            failed: list[Any] = [None] * PROCESSES
            dist.all_gather_object(failed, bool(error))  # where one has failed, the others wait for it: so end together
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1], int(sys.argv[2]), *(sys.argv[3:] or [""])), nprocs=PROCESSES)
