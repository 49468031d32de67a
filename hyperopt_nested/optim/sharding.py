"""Sharded parameters (DTensors): which part of each this process steps, and what processes exchange in a step.

Each process steps its shards, which are plain tensors. A step exchanges one vector each for all tensors: hypergradients are summed; so are
sums over rows that are split, such as norms; and maxima over shards, such as the largest norm of a row, are compared. What needs more
of other shards than such sums is gathered, with its gradient, and stepped *whole* by every process. Learned values are plain tensors,
equal on all processes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hyperopt_nested.combinators.base import Combined
from hyperopt_nested.engine.binding import Key
from hyperopt_nested.engine.checks import Horizon
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.ops import number_dtype, row_shape
from hyperopt_nested.rule import Optimizer, Rule

_OF_TENSORS = "rule.", "memory."
"""Prefixes of entries that may be of the parameter's shape; learned values are plain tensors."""


def is_sharded(tensor: Any) -> bool:
    """Whether that is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # else there is none, and the import would take time
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True, eq=False)
class Layout:
    """How one parameter lies on the processes of its mesh, and what of it each of them steps.

    Attributes:
        param: the DTensor.
        whole: whether it is gathered, and stepped whole.
        in_parts: whether its shards are stepped, but need sums over the tensor, or over rows, that are split.
    """

    param: Any
    whole: bool
    in_parts: bool = False

    @property
    def splits(self) -> list[int]:
        """The dimensions of the mesh that the tensor is split along."""
        return _splits(self.param)

    @property
    def coordinates(self) -> tuple[int, ...]:
        """Where this process is along these dimensions."""
        return tuple(self.param.device_mesh.get_coordinate()[dim] for dim in self.splits)

    @property
    def placements(self) -> tuple[Any, ...]:
        """Those of what this process steps, as a part of the tensor."""
        return (_replicate(),) * self.param.device_mesh.ndim if self.whole else tuple(self.param.placements)

    def part(self, tensor: Tensor) -> Tensor:
        """What this process steps of a tensor of the parameter's shape, or of one number a row."""
        if is_sharded(tensor):
            return _local(tensor, self.placements)
        full, now = self.param.shape, _local(self.param).shape
        if self.whole or full == now or tensor.shape not in (full, torch.Size(row_shape(self.param))):
            return tensor
        everywhere = _dtensor().from_local(tensor, self.param.device_mesh, (_replicate(),) * self.param.device_mesh.ndim, run_check=False)
        return _local(everywhere, self.placements)

    def joined(self, part: Tensor) -> Tensor:
        """The tensor that such a part belongs to; the part itself where it has another form, such as a single number."""
        own, full = (self.param if self.whole else _local(self.param)), self.param.shape
        if part.shape != own.shape:
            if self.whole or own.ndim < 2 or part.shape != torch.Size(row_shape(own)):
                return part
            full = torch.Size(row_shape(self.param))
        return _joined(part, self.param.device_mesh, self.placements, full)


class Sharding:
    """The sharded parameters of an optimizer.

    Args:
        nested: the engine.
        params: the optimizer's parameters, by name.
        before: the sharding until now.

    Raises:
        ValueError: the engine needs exact curvature, which shards do not have.
    """

    def __init__(self, nested: Nested, params: Mapping[str, Tensor], before: Sharding | None = None) -> None:
        self.layouts = {
            name: _layout(param, nested.bindings[name].optimizer, nested.horizon) for name, param in params.items() if is_sharded(param)
        }
        if self.layouts and nested.horizon.curvature == "exact":
            name = next(iter(self.layouts))
            raise ValueError(f"curvature='exact' cannot be used with sharded parameters, such as {name!r}: use curvature='none'")
        self._buffers = {
            name: torch.zeros(each.param.shape, dtype=each.param.dtype, device=_local(each.param).device)
            for name, each in self.layouts.items()
            if each.whole
        }
        self._same = [(name, id(each.param), each.whole, each.in_parts) for name, each in self.layouts.items()]
        self.in_parts = {name for name, each in self.layouts.items() if each.in_parts}
        self._split = {name for name, each in self.layouts.items() if not each.whole and each.splits}
        if before is not None and before._same == self._same and "_exchange" in vars(before):
            self._exchange = before._exchange

    def indices(self) -> dict[str, int]:
        """Which of its shards this process steps, of each tensor that is split."""
        return {name: _index(self.layouts[name]) for name in self._split}

    def __bool__(self) -> bool:
        return bool(self.layouts)

    @cached_property
    def _exchange(self) -> _Exchange:
        return _Exchange(self.layouts)

    def tensors(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What this process steps, in the place of the parameters; before the first step, whole tensors have no values."""
        if not self.layouts:
            return params
        return {
            name: self._buffers[name] if name in self._buffers else _local(param) if name in self.layouts else param
            for name, param in params.items()
        }

    def gather(self, names: Iterable[str], grads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Get the values of whole tensors from all processes.

        Args:
            names: the tensors.
            grads: their gradients, if they are needed.

        Returns:
            The gradients of what this process steps.
        """
        partial = [name for name, grad in (grads or {}).items() if self._is_partial(name, grad)]
        own = {name: _local(grad, None if name in partial else self._placements_of(name)) for name, grad in (grads or {}).items()}
        whole = sorted(self._buffers.keys() & set(names))
        if not whole and not partial:
            return own
        with_grad = [name for name in whole if name in own]
        parts = [*((name, _local(self.layouts[name].param)) for name in whole), *((name, own[name]) for name in with_grad)]
        full = self._exchange.gathered([*parts, *(("", own[name]) for name in partial)])
        if whole:
            torch._foreach_copy_([self._buffers[name] for name in whole], full[: len(whole)])
        return own | dict(zip([*with_grad, *partial], full[len(whole) :], strict=True))

    def scatter(self, names: Iterable[str]) -> None:
        """Write what was stepped whole back to the shards, and let autograd know of all that was written."""
        touched = []
        for name in names:
            if name in self.layouts:
                touched.append(self.layouts[name].param)
            if name in self._buffers:
                shard = _local(self.layouts[name].param)
                shard.copy_(self._exchange.shard(name, self._buffers[name]).view_as(shard))
        torch.autograd.graph.increment_version(touched)

    def reduce(self, parts: Mapping[Key, Tensor], operation: Literal["sum", "max"]) -> dict[Key, Tensor]:
        """What numbers are for whole tensors, where processes have computed them for their shards: as `Nested.step` takes it."""
        keys = sorted(key for key in parts if key[0] in self._split)
        if not keys:
            return dict(parts)
        device = self._exchange.device
        vector = torch.cat([parts[key].reshape(-1).to(device, number_dtype(device)) for key in keys])
        sizes = [parts[key].numel() for key in keys]
        if operation == "sum":
            vector = torch.where(self._exchange.counts([key[0] for key in keys], sizes), vector, 0)
        pieces = torch.split_with_sizes(self._exchange.reduced(vector, operation), sizes)
        return {**parts, **{key: piece.view(parts[key].shape).to(parts[key]) for key, piece in zip(keys, pieces, strict=True)}}

    def part(self, name: str, key: str, entry: Tensor) -> Tensor:
        """What this process steps of the entry of that key in the state of a tensor."""
        return self.layouts[name].part(entry) if name in self.layouts and key.startswith(_OF_TENSORS) else entry

    def joined(self, name: str, key: str, leaf: Tensor) -> Tensor:
        """The entry that such a part belongs to; it shares the memory of the part."""
        return self.layouts[name].joined(leaf) if name in self.layouts and key.startswith(_OF_TENSORS) else leaf

    def like_param(self, name: str, part: Tensor) -> Tensor:
        """A tensor that is stepped as the parameter is, sharded as it."""
        if name not in self.layouts:
            return part
        layout = self.layouts[name]
        if layout.whole:
            part = self._exchange.shard(name, part).view_as(_local(layout.param))
        return Layout(layout.param, whole=False).joined(part)

    def _is_partial(self, name: str, grad: Tensor) -> bool:
        """Whether the gradient of a replicated tensor is yet to be summed over the processes, which is done with the other exchanges."""
        if name not in self.layouts or not is_sharded(grad):
            return False
        mesh, (placement, *more) = self.layouts[name].param.device_mesh, cast(Any, grad).placements
        is_sum = placement.is_partial() and placement.reduce_op == "sum"
        return is_sum and not more and self.layouts[name].param.placements[0].is_replicate() and self._exchange.covers(mesh)

    def _placements_of(self, name: str) -> tuple[Any, ...] | None:
        return tuple(self.layouts[name].param.placements) if name in self.layouts else None


class _Exchange:
    """What processes tell each other once, and how they exchange tensors afterwards."""

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        self._group = _group(layouts.values())
        self._rank, self._processes = dist.get_rank(self._group), dist.get_world_size(self._group)
        one = next(iter(layouts.values())).param
        kind = one.device_mesh.device_type  # with offloading, shards are elsewhere
        self.device = _local(one).device if _local(one).device.type == kind else torch.device(kind)
        self._packings: dict[Any, list[_Packing]] = {}
        self._joint: dict[tuple[str, ...], Tensor] = {}
        own = {}
        for name, each in layouts.items():
            own[name] = _local(each.param).numel(), each.coordinates
        everyone: list[Any] = [None] * self._processes
        dist.all_gather_object(everyone, own, group=self._group)
        for rank, theirs in enumerate(everyone):
            if odd := sorted(theirs.keys() ^ own.keys()):
                raise RuntimeError(
                    f"the processes have different sharded parameters: {odd[0]!r} is on one of {rank} and {self._rank} only: give the "
                    "optimizer the same parameters, trained or frozen, on each"
                )
        self._largest = {name: max(theirs[name][0] for theirs in everyone) for name in own}
        first = {name: next(rank for rank, theirs in enumerate(everyone) if theirs[name][1] == own[name][1]) for name in own}
        self._counts = {name: rank == self._rank for name, rank in first.items()}  # of equal shards, one is counted
        self._masks: dict[Any, Tensor] = {}
        self._shapes = {name: each.param.shape for name, each in layouts.items()}
        self._positions, self._own = {}, {}
        for name, each in layouts.items():
            if each.whole:
                self._positions[name], self._own[name] = self._places(name, each.param)

    def _places(self, name: str, param: Any) -> tuple[Tensor, Tensor]:
        """Where each element of the tensor is in what is gathered; and where those of this process are in the tensor."""
        local, size = _local(param), self._largest[name]
        ids = self._rank * size + torch.arange(local.numel(), device=self.device).view(local.shape)
        sharded: Any = _joined(ids, param.device_mesh, param.placements, param.shape)
        positions = sharded.full_tensor().reshape(-1)
        where = (positions // max(size, 1) == self._rank).nonzero().reshape(-1)
        own = torch.empty_like(where)
        own[positions[where] - self._rank * size] = where
        small = self._processes * size < 1 << 31
        return positions.to(torch.int32 if small else torch.int64), own.to(local.device)

    def covers(self, mesh: Any) -> bool:
        """Whether these are the processes of a mesh."""
        return sorted(mesh.mesh.flatten().tolist()) == sorted(dist.get_process_group_ranks(self._group))

    def gathered(self, parts: list[tuple[str, Tensor]]) -> list[Tensor]:
        """Whole tensors, of shards that are given with the name of the tensor whose form they have: one exchange for all.

        Of tensors without a name, each process has as many numbers, which are summed.
        """
        key = tuple((name, part.dtype, part.shape) for name, part in parts)
        if key not in self._packings:
            self._packings[key] = self._packed(parts)
        packings, end, result = self._packings[key], 0, dict[int, Tensor]()
        packed = torch.cat([each.bytes_of([part for _, part in parts]) for each in packings])
        rows = torch.empty(self._processes, len(packed), dtype=torch.uint8, device=self.device)
        dist.all_gather([*rows.unbind()], packed, group=self._group)
        for each in packings:
            begin, end = end, end + each.size
            numbers = rows[:, begin:end].reshape(-1).view(each.dtype)
            joined = numbers.view(self._processes, -1).sum(0) if each.positions is None else numbers.index_select(0, each.positions)
            for i, full, shape in zip(each.parts, torch.split_with_sizes(joined, each.numels), each.shapes, strict=True):
                result[i] = full.view(shape).to(parts[i][1].device)
        return [result[i] for i in range(len(parts))]

    def _packed(self, parts: list[tuple[str, Tensor]]) -> list[_Packing]:
        """How parts are packed: those of each dtype together; the wider ones come first, so that all are aligned."""
        by_kind: dict[tuple[torch.dtype, int], list[int]] = {}
        seen: dict[str, int] = {}
        for i, (name, part) in enumerate(parts):
            seen[name] = seen.get(name, 0) + 1  # of a tensor, first its values come, then its gradient
            by_kind.setdefault((part.dtype, seen[name] if name else 0), []).append(i)
        packings = []
        for (dtype, kind), chosen in sorted(by_kind.items(), key=lambda each: -each[0][0].itemsize):
            summed = not kind
            sizes = [parts[i][1].numel() if summed else self._largest[parts[i][0]] for i in chosen]
            pads = [torch.zeros(size - parts[i][1].numel(), dtype=dtype, device=self.device) for i, size in zip(chosen, sizes, strict=True)]
            shapes = [parts[i][1].shape if summed else self._shapes[parts[i][0]] for i in chosen]
            positions = None if summed else self._joint_positions(tuple(parts[i][0] for i in chosen))
            packings.append(_Packing(dtype, chosen, pads, positions, shapes, sum(sizes) * dtype.itemsize))
        return packings

    def _joint_positions(self, names: tuple[str, ...]) -> Tensor:
        """Where the elements of whole tensors are in what is gathered of all of them."""
        if names not in self._joint:
            sizes = [self._largest[name] for name in names]
            starts = [0, *accumulate(sizes)]
            dtype = torch.int32 if self._processes * starts[-1] < 1 << 31 else torch.int64
            found = [
                own.to(dtype) // max(size, 1) * starts[-1] + start + own % max(size, 1)
                for own, size, start in zip(map(self._positions.__getitem__, names), sizes, starts, strict=False)
            ]
            self._joint[names] = torch.cat(found)
        return self._joint[names]

    def shard(self, name: str, full: Tensor) -> Tensor:
        """The elements of this process, in order, of a whole tensor."""
        return full.reshape(-1).index_select(0, self._own[name])

    def counts(self, names: list[str], sizes: list[int]) -> Tensor:
        """Whether this process is the one whose numbers are counted, of those that have equal shards; so many numbers for each name."""
        key = (*names, *sizes)
        if key not in self._masks:
            self._masks[key] = torch.tensor([self._counts[name] for name, size in zip(names, sizes, strict=True) for _ in range(size)])
        mask = self._masks[key] = self._masks[key].to(self.device)
        return mask

    def reduced(self, vector: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        """The sum over processes, or the maximum, element by element."""
        how = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
        if vector.requires_grad:
            from torch.distributed.nn.functional import all_reduce

            total: Tensor = all_reduce(vector, how, self._group)  # type: ignore[no-untyped-call]
            return total
        dist.all_reduce(vector, how, group=self._group)
        return vector


@dataclass(frozen=True, eq=False)
class _Packing:
    """How parts of one dtype lie in what is exchanged.

    Attributes:
        dtype: theirs.
        parts: their indices.
        pads: what follows each, so that it takes as much on all processes.
        positions: where the elements of the whole tensors are in what comes back; None if numbers are summed over processes.
        shapes: of the results.
        size: bytes of what one process gives.
    """

    dtype: torch.dtype
    parts: list[int]
    pads: list[Tensor]
    positions: Tensor | None
    shapes: list[torch.Size]
    size: int

    @cached_property
    def numels(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def bytes_of(self, parts: list[Tensor]) -> Tensor:
        """What a process gives."""
        pairs = zip(self.parts, self.pads, strict=True)
        return torch.cat([each for i, pad in pairs for each in (parts[i].reshape(-1).to(pad.device), pad)]).view(torch.uint8)


def localized(optimizer: Optimizer, param: Tensor, horizon: Horizon) -> Optimizer:
    """The optimizer of a parameter with tensors among its options, such as an anchor, in the form of what a process steps of it."""
    if not is_sharded(param):
        return optimizer
    layout = _layout(param, optimizer, horizon)

    def changed(rule: Rule) -> Rule:
        if not isinstance(rule, Combined):
            return rule
        options = {key: layout.part(each) if isinstance(each, Tensor) else each for key, each in rule.options.items()}
        base = changed(rule.base)
        same = base is rule.base and all(options[key] is each for key, each in rule.options.items())
        return rule if same else Combined(rule.combinator, options, base)

    rule = changed(optimizer.rule)
    return optimizer if rule is optimizer.rule else replace(optimizer, rule=rule)


def check_flat(params: Mapping[str, Tensor], optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse tensors of FSDP version 1, which hides what they are parts of, unless every element is stepped on its own.

    Raises:
        ValueError: there are such.
    """
    for name, param in params.items():
        optimizer = optimizers[name]
        alone = optimizer.rule.separable == "element" and not optimizer.rule.reduction and not optimizer.learned
        if getattr(param, "_fsdp_flattened", False) and not alone:
            why = f"{next(iter(optimizer.learned))} is learned" if optimizer.learned else f"{optimizer.rule.name} needs whole tensors"
            raise ValueError(
                f"{name!r} is a part of a flat parameter of FullyShardedDataParallel, but {why}: shard the model with "
                "torch.distributed.fsdp.fully_shard instead"
            )


def check_partition(optimizers: Iterable[Optimizer]) -> None:
    """Refuse to be made by ZeroRedundancyOptimizer, which gives each process other tensors, where tensors share learned values.

    Raises:
        ValueError: that is so.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    frame = sys._getframe()
    while (outer := frame.f_back) is not None and not isinstance(outer.f_locals.get("self"), module.ZeroRedundancyOptimizer):
        frame = outer
    if outer is None:
        return
    for optimizer in optimizers:
        shared = [name for name, learn in optimizer.learned.items() if learn.per == "model"]
        if shared or optimizer.rule.reduction:
            why = f"{shared[0]} is learned for all tensors" if shared else f"{optimizer.rule.name} needs a total over all tensors"
            raise ValueError(
                f"ZeroRedundancyOptimizer gives each process other tensors, but {why}: learn it per='tensor', or shard the model with "
                "torch.distributed.fsdp.fully_shard"
            )


def _layout(param: Any, optimizer: Optimizer, horizon: Horizon) -> Layout:
    """How a tensor is stepped: whole if an update mixes what lies on different processes, and more than sums of that."""
    splits, rule = _splits(param), optimizer.rule
    if not splits:
        return Layout(param, whole=False)
    if rule.maxima is None or any(learn.per in ("row", "element") for learn in optimizer.learned.values()):
        return Layout(param, whole=True)
    by_row = [param.ndim > 1 and getattr(param.placements[dim], "dim", None) == 0 for dim in splits]
    if rule.separable == "element" or (rule.separable == "row" and all(by_row)):
        return Layout(param, whole=False)
    alone = rule.separable == "tensor" or not any(by_row)  # sums are over all of the tensor, or over rows that all processes have
    kinds = {horizon.kind_of(optimizer, name, learn.per) for name, learn in optimizer.learned.items()}
    kinds = {horizon.kind_of(optimizer, name, learn.per) for name, learn in optimizer.learned.items()}
    constant = not horizon.discount and kinds <= {"forward"}
    in_parts = rule.has_sums and alone and constant and _only_of_the_outermost(optimizer)
    return Layout(param, whole=not in_parts, in_parts=in_parts)


def _only_of_the_outermost(optimizer: Optimizer) -> bool:
    """Whether learned hypers are those of the combinator that needs sums, on which the sums do not depend."""
    rule = optimizer.rule
    while isinstance(rule, Combined) and rule.combinator.sums is None:
        rule = rule.base
    return isinstance(rule, Combined) and optimizer.learned.keys() <= rule.combinator.hypers.keys()


def _index(layout: Layout) -> int:
    index = 0
    for dim, coordinate in zip(layout.splits, layout.coordinates, strict=True):
        index = index * layout.param.device_mesh.size(dim) + coordinate
    return index


def _splits(param: Any) -> list[int]:
    mesh = param.device_mesh
    return [dim for dim, placement in enumerate(param.placements) if mesh.size(dim) > 1 and not placement.is_replicate()]


def _group(layouts: Collection[Layout]) -> Any:
    """The processes that exchange numbers: those of the one dimension along which tensors are split, or else of the largest mesh."""
    meshes = list(dict.fromkeys(each.param.device_mesh for each in layouts))
    dims = {dim for each in layouts for dim in each.splits}
    if len(meshes) == 1 and len(dims) == 1:
        return meshes[0].get_group(dims.pop())
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    largest = max(ranks, key=len)
    if len(largest) == dist.get_world_size() or not all(each <= largest for each in ranks):
        return dist.group.WORLD
    return _new_group(tuple(sorted(largest)))


@cache
def _new_group(ranks: tuple[int, ...]) -> Any:
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _local(tensor: Any, placements: tuple[Any, ...] | None = None) -> Tensor:
    """The plain tensor on this process, of a DTensor with these placements, if they are given; a plain one as it is."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        if placements is not None and tuple(tensor.placements) != placements:
            tensor = tensor.redistribute(placements=placements)
        local = tensor._local_tensor  # `to_local` of a parameter makes another tensor in each call
        return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def _joined(part: Tensor, mesh: Any, placements: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """A DTensor that shares the memory of a part of it, also where that is not on the mesh's kind of device."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, placements, TensorMeta(shape, _stride(shape), part.dtype))
    result: Tensor = _dtensor()(part, spec, requires_grad=False)
    return result


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
