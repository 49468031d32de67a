"""Trees of tensors, which the states of rules are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
"""A tree: nested dicts whose leaves are tensors."""


def leaves(tree: State) -> list[Tensor]:
    """The leaves of a tree, in order."""
    found: list[Tensor] = []
    for leaf in tree.values():
        found += leaves(leaf) if isinstance(leaf, dict) else [leaf]
    return found


def same(one: Any, other: Any) -> bool:
    """Whether both are one dict. In a compiled program it is never known: torch's compiler before 2.12 does not take the question."""
    return not torch.compiler.is_compiling() and one is other


def map_tree(function: Callable[..., Any], tree: State, *others: State) -> State:
    """Apply `function` leaf by leaf to trees of one structure."""
    return {
        key: map_tree(function, leaf, *(other[key] for other in others))
        if isinstance(leaf, dict)
        else function(leaf, *(other[key] for other in others))
        for key, leaf in tree.items()
    }


def flatten(tree: State, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree, in order, by path."""
    found: dict[tuple[str, ...], Any] = {}
    for key, leaf in tree.items():
        found |= flatten(leaf, (*path, key)) if isinstance(leaf, dict) else {(*path, key): leaf}
    return found


def filled(tree: State, leaves: Iterable[Any]) -> State:
    """A tree of the same structure, with other leaves, in order."""
    given = iter(leaves)
    return map_tree(lambda _: next(given), tree)


def eval_params(param: Tensor, state: State) -> Tensor:
    """The weights to evaluate a model with, given a rule's state: what the outermost average in it holds, else the parameter."""
    if "eval_params" in state:
        found: Tensor = state["eval_params"]
        return found.to(param.dtype)
    return eval_params(param, state["base"]) if "base" in state else param


def in_dtype(state: State, param: Tensor, dtype: torch.dtype | None) -> State:
    """A rule's state with tensors of the parameter's shape in another dtype, all but anchors; None leaves it as it is.

    Single numbers are only widened: one of them may be a counter.
    """
    if dtype is None:
        return state

    def cast(key: str, leaf: Any) -> Any:
        if isinstance(leaf, dict):
            return in_dtype(leaf, param, dtype)
        if not leaf.is_floating_point() or leaf.shape != param.shape or key == "anchor":
            return leaf
        return leaf.to(dtype if leaf.ndim else torch.promote_types(leaf.dtype, dtype))

    return {key: cast(key, leaf) for key, leaf in state.items()}
