"""Where a torch optimizer keeps the engine's state: each leaf with its tensor, or, if several share it, with a tensor called home."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hyperopt_nested.engine.learned import COUNTED, Learner
from hyperopt_nested.trees import State

PER_TENSOR = ("rule", "memory", "rounding")
"""Parts of an engine's state that are by tensor."""


@dataclass(frozen=True)
class Ref:
    """Where a leaf of the engine's state is kept: in `optimizer.state[<that parameter>][key]`."""

    name: str
    key: str


def refs(nested: Learner, st: State, home: str) -> State:
    """Tree of `st`'s structure that says where each leaf is kept: with its tensor, or, if several share it, with tensor `home`."""

    def under(name: str, tree: State, key: str) -> State:
        return {k: under(name, v, f"{key}.{k}") if isinstance(v, dict) else Ref(name, f"{key}.{k}") for k, v in tree.items()}

    def walk(nested: Learner, st: State, owner: Callable[[str], str], prefix: str) -> State:
        def owners(key: str) -> Callable[[str], str]:
            return (lambda _: home) if nested.learned[key].learn.per == "model" else owner

        return {
            **{part: {name: under(owner(name), tree, f"{prefix}{part}") for name, tree in st[part].items()} for part in PER_TENSOR},
            "hypers": {k: {name: Ref(owners(k)(name), f"{prefix}hypers.{k}") for name in raws} for k, raws in st["hypers"].items()},
            "learners": {
                k: walk(nested.learned[k].learner, inner, owners(k), f"{prefix}learners.{k}.") for k, inner in st["learners"].items()
            },
            **{part: {k: Ref(home, f"{prefix}{part}.{k}") for k in st[part]} for part in COUNTED},
        }

    return walk(nested, st, lambda name: name, "")


def pairs(refs: State, tree: State) -> Iterator[tuple[Any, Tensor]]:
    """Each leaf of `tree`, with that of another tree of its structure; such as where it is kept."""
    for key, ref in refs.items():
        if isinstance(ref, dict):
            yield from pairs(ref, tree[key])
        else:
            yield ref, tree[key]
