"""Stochastic rounding to bfloat16: up or down at random, with the probabilities that make the expectation the exact value.

The bits are a hash of a count, which the state holds, and of where an element lies in memory. All backends have the same, nothing is drawn
from torch's generators, and a resumed run goes on with the bits of one that was not interrupted.
"""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

import zlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperopt_nested.ops import positions
from hyperopt_nested.trees import State, filled, flatten, map_tree

Rounding = Literal["nearest", "stochastic"]
"""How parameters, and what rules keep of their shape, are rounded to bfloat16: "nearest", where small updates are lost, or "stochastic": up
or down at random, so that the expectation is the exact value. Other dtypes are rounded to nearest."""

Path = tuple[str, ...]
_LARGEST = torch.finfo(torch.bfloat16).max


def check_rounding(rounding: Any) -> None:
    """Refuse an unknown way to round.

    Raises:
        ValueError: it is none.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding={rounding!r} must be one of {', '.join(map(repr, get_args(Rounding)))}")


def counts(rounding: Rounding, name: str, param: Tensor, state: State) -> State:
    """What is counted of a tensor, before its first step; nothing if nothing is rounded at random.

    The lower half of the count is that of its steps, the upper says which bits it has.
    """
    kept = flatten({"param": param, "state": state})
    if rounding == "nearest" or not any(_at_random(path, leaf, param) for path, leaf in kept.items()):
        return {}
    seed = zlib.crc32(name.encode()) & 0x7FFFFFFF  # in all processes
    return {"count": torch.full((), seed << 32, dtype=torch.int64, device=param.device)}


def in_dtypes_of(
    param: Tensor, state: State, new_param: Tensor, new_state: State, counted: State, shard: int = 0
) -> tuple[Tensor, State, State]:
    """A new tensor and its state in the dtypes of the old ones, and what is counted.

    Args:
        param: the tensor before.
        state: its rule's state before.
        new_param: the new tensor, in a dtype that is at least as wide.
        new_state: the new state, of the same structure.
        counted: as `counts`, or the last step, made it; if that is nothing, all is rounded to nearest.
        shard: the index of the part, if it is a part of a larger tensor: other parts have other bits.
    """
    if not counted:
        return new_param.to(param.dtype), map_tree(lambda leaf, old: leaf.to(old.dtype), new_state, state), {}
    old, new = flatten({"param": param, "state": state}), {"param": new_param, "state": new_state}
    bits = _bits(counted["count"], shard, [path for path, leaf in old.items() if _at_random(path, leaf, param)], param)
    stored = {path: (_rounded(leaf, bits[path]) if path in bits else leaf).to(old[path].dtype) for path, leaf in flatten(new).items()}
    result = filled(new, stored.values())
    return result["param"], result["state"], {"count": counted["count"] + 1}


def _at_random(path: Path, leaf: Tensor, param: Tensor) -> bool:
    """Whether a tensor, or a leaf of its state, is rounded at random; anchors are copies."""
    return leaf.dtype == torch.bfloat16 and leaf.shape == param.shape and path[-1] != "anchor"


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    """Numbers that bfloat16 has, with derivative one; what is beyond its largest number, or not finite, as it is.

    Args:
        x: any shape.
        bits: int32, of the same shape, uniform in [0, 2^16).
    """
    wide = x.to(torch.float32)
    near = ((wide.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    off = torch.where(wide.abs() <= _LARGEST, wide - near, 0)  # exact
    return wide - off.detach()


def _bits(count: Tensor, shard: int, paths: Sequence[Path], param: Tensor) -> dict[Path, Tensor]:
    """Random bits of each element of some tensors: int32, uniform in [0, 2^16), by path; two share the halves of one hash."""
    step, seed = (count & 0xFFFFFFFF).to(torch.int32), torch.bitwise_right_shift(count, 32).to(torch.int32)
    part, where = _mixed(seed ^ shard, 0) if shard else seed, positions(param)
    bits: dict[Path, Tensor] = {}
    for i in range(0, len(paths), 2):
        key = _mixed(step ^ _mixed(part ^ i, 0), 0)
        both = _mixed(where ^ key, _mixed(~key, 0))
        for path, half in zip(paths[i : i + 2], (both, torch.bitwise_right_shift(both, 16)), strict=False):
            bits[path] = half & 0xFFFF
    return bits


def _mixed(x: Tensor, key: Tensor | int) -> Tensor:
    """A hash of 32 bits, int32, by xor-shifts and products (C. Wellons, hash-prospector); products keep the lower half."""
    x = (x ^ (torch.bitwise_right_shift(x, 16) & 0xFFFF)) * 0x21F0AAAD ^ key
    x = (x ^ (torch.bitwise_right_shift(x, 15) & 0x1FFFF)) * 0x735A2D97
    return x ^ (torch.bitwise_right_shift(x, 15) & 0x1FFFF)
