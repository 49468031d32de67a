"""Settings of a run: every number that its outcome follows from, checked."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ftp.finetuning.methods import METHODS, OPTIMIZERS

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """What `ftp.finetune` takes besides model and data; see there. Where it says None, `resolved` has the number.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a setting is outside its domain. The message names it.
    """

    method: str = "ftp"
    optimizer: str = "adamw"
    lr: float | None = None
    head_lr: float | None = None
    strength: float | None = None
    epochs: int = 10
    steps_per_epoch: int | None = None
    batch_size: int = 64
    warmup: float = 0.05
    weight_decay: float = 0.0
    momentum: float = 0.9
    held_out: float = 0.2
    freeze_norm: bool = True
    precision: Precision = "float32"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("precision", self.precision, ("float32", "bfloat16", "float16"))
        strength = METHODS[self.method].strength
        if strength is None and self.strength is not None:
            raise ValueError(f"strength={self.strength!r}: the method {self.method!r} has none; leave it out")
        for name, high in (("lr", math.inf), ("head_lr", math.inf), ("strength", strength.high if strength else math.inf)):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0, high)
        for name in ("epochs", "steps_per_epoch", "batch_size", "patience"):
            if getattr(self, name) is not None or name in ("epochs", "batch_size"):
                _check_whole(name, getattr(self, name), 1)
        _check_whole("seed", self.seed, 0)
        _check_number("weight_decay", self.weight_decay, 0, math.inf)
        _check_number("warmup", self.warmup, 0, 1)
        _check_number("held_out", self.held_out, 0, 1)
        _check_number("momentum", self.momentum, 0, 1)
        if self.momentum == 1 or self.held_out in (0, 1):
            name = "momentum" if self.momentum == 1 else "held_out"
            raise ValueError(f"{name}={getattr(self, name)!r} must be {'less than 1' if name == 'momentum' else 'between 0 and 1'}")
        if not isinstance(self.freeze_norm, bool):
            raise TypeError(f"freeze_norm={self.freeze_norm!r} must be True or False")

    def resolved(self) -> "Settings":
        """The same, with learning rates and the strength as numbers: the optimizer's rate, ten times that for the head, the method's."""
        strength = METHODS[self.method].strength
        lr = OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr
        return replace(
            self,
            lr=lr,
            head_lr=10 * lr if self.head_lr is None else self.head_lr,
            strength=strength.default if strength and self.strength is None else self.strength,
        )

    def as_dict(self) -> dict[str, Any]:
        """By name, as JSON has them."""
        return asdict(self)


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in list(choices):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be a number")
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} must be {f'at least {low}' if high == math.inf else f'in [{low}, {high:g}]'}")


def _check_whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be a whole number")
    if value < low:
        raise ValueError(f"{name}={value!r} must be at least {low}")
