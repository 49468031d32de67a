"""Messages: what is wrong with an argument, with its name, its value and the remedy; where the user's code is; what to install."""

import functools
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

Kinds = Mapping[str, type | None]
"""By option: the type that its values have (bool, int, float or tuple); None of an option that takes others."""

PAIRS = {"etas": ["etaminus", "etaplus"], "step_sizes": ["step_size_min", "step_size_max"], "eps": ["eps1", "eps2"]}
"""Pairs of hypers that torch.optim has as one argument."""

_NAMED = {"bool": bool, "int": int, "float": float}
_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (__file__, str(torch.__file__)))


def is_number(value: Any) -> bool:
    """Whether that is a real number, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def host_number(name: str, value: Any, unseen: float) -> Any:
    """The number in a tensor; `unseen` if that is not on the CPU, since looking would wait for the device. What is no tensor, as it is.

    Raises:
        ValueError: the tensor holds several numbers.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}; it must be one number")
    return value.item() if value.device.type == "cpu" else unseen


def check_number(name: str, value: Any) -> None:
    """Refuse what is no finite number.

    Raises:
        TypeError: it is no real number.
        ValueError: it is NaN or infinite.
    """
    if not is_number(value):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")


def checked_bounds(value: float | None, bounds: Any) -> tuple[Any, Any]:
    """The bounds of a learned value that starts at `value` (None: not known yet), infinite where there is none.

    Raises:
        TypeError: they are no pair of numbers, functions or None.
        ValueError: they are out of order, NaN, or do not hold the value.
    """
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise TypeError(
            f"bounds={bounds!r} ({type(bounds).__name__}) must be a pair (low, high) of numbers, functions of the state, or None"
        )
    for end in bounds:
        if not (end is None or callable(end) or is_number(end)):
            raise TypeError(
                f"bounds={bounds!r}: {end!r} ({type(end).__name__}) must be a number, a function of the state, or None for no bound"
            )
        if is_number(end) and math.isnan(end):
            raise ValueError(f"bounds={bounds!r}: an end is NaN; give a number, or None for no bound")
    low, high = (none if end is None else end for end, none in zip(bounds, (-math.inf, math.inf), strict=True))
    if not callable(low) and not callable(high) and not low <= high:
        raise ValueError(f"bounds={bounds!r} are out of order: give (low, high) with low <= high")
    if value is not None and ((not callable(low) and value < low) or (not callable(high) and value > high)):
        raise ValueError(f"value={value!r} is outside bounds={bounds!r}: start inside, or widen them")
    return low, high


def with_remedy(remedy: str) -> Callable[[F], F]:
    """Make a function's error for arguments that do not fit its signature end with what to write instead."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Any, **arguments: Any) -> Any:
            try:
                signature.bind(*args, **arguments)
            except TypeError as error:
                raise TypeError(f"{function.__qualname__.removesuffix('.__init__')}: {error}; {remedy}") from None
            return function(*args, **arguments)

        return cast(F, checked)

    return decorate


def not_an_optimizer(name: str, value: Any) -> TypeError:
    """The error for what is given in the place of an optimizer of this library."""
    kind = type(value).__name__
    if kind in ("FunctionRule", "Combinator"):
        inside = "hn.adamw(), ..." if kind == "Combinator" else "..."
        remedy = f"so call it: {value.name}({inside})"
    elif isinstance(value, torch.optim.Optimizer) or (isinstance(value, type) and issubclass(value, torch.optim.Optimizer)):
        found = value if isinstance(value, type) else type(value)
        owner, same = found.__module__.split(".")[0], found.__name__.lower()
        if owner in ("hyperopt_nested", "ftp"):
            return TypeError(
                f"{name} is {found.__name__}, which holds tensors; it must be a rule with its hypers, such as hn.adamw(lr=1e-3)"
            )
        rule = same if owner == "torch" and same not in ("lbfgs", "sparseadam") else "adamw"
        return TypeError(f"{name} is {owner}'s {found.__name__}; it must be an optimizer of this library, such as hn.{rule}(lr=1e-3)")
    else:
        remedy = "such as hn.sgd(lr=1e-3)"
    shown = " ".join(f"{value!r}".split())
    shown = f"{shown[:80]}..." if len(shown) > 80 else shown
    said = f"{name} {shown} ({kind}), which" if name.endswith(" returned") else f"{name}={shown} ({kind})"
    return TypeError(f"{said} must be an optimizer of this library, {remedy}")


def check_dtype(name: str, dtype: Any) -> None:
    """Refuse what is neither None nor a real floating-point dtype.

    Raises:
        TypeError: it is no dtype.
        ValueError: its numbers are not real and floating-point.
    """
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}={dtype!r} ({type(dtype).__name__}) must be a dtype, such as torch.bfloat16, or None")
    if not dtype.is_floating_point:
        raise ValueError(f"{name}={dtype} must be a real floating-point dtype, such as torch.bfloat16, or None")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no integer of at least 1.

    Raises:
        TypeError: it is no integer.
        ValueError: it is smaller.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be an integer")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} ({type(value).__name__}) must be True or False")


def packs(hypers: Iterable[str]) -> dict[str, list[str]]:
    """Hypers that torch.optim has as one argument, a tuple, by its name: `betas` of beta1, beta2 and so on; `etas`; `step_sizes`; `eps`."""
    own = list(hypers)
    betas = sorted(name for name in own if name.startswith("beta") and name[4:].isdigit())
    found = {"betas": betas} if betas else {}
    return found | {name: parts for name, parts in PAIRS.items() if {*parts} <= {*own} and name not in own}


def with_betas(name: str, hypers: Iterable[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with `betas=(...)`, and the like, as torch.optim has them, as beta1, beta2 and so on.

    Raises:
        TypeError: it is no sequence, or is given besides one of these.
        ValueError: it has another length.
    """
    for key, own in packs(hypers).items():
        if key not in settings or len(own) < 2:
            continue
        given = settings[key]
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"{name}: {key}={given!r} ({type(given).__name__}) must be {len(own)} numbers, one each for {', '.join(own)}")
        if len(given) != len(own):
            raise ValueError(f"{name}: {key}={given!r} must be {len(own)} numbers, one each for {', '.join(own)}")
        if twice := [each for each in own if each in settings]:
            raise TypeError(f"{name}: {key}={given!r} and {twice[0]}={settings[twice[0]]!r} are given: leave one of them out")
        settings = {**{other: value for other, value in settings.items() if other != key}, **dict(zip(own, given, strict=True))}
    return settings


def kinds_of(options: Mapping[str, Any], *functions: Callable[..., Any] | None) -> dict[str, type | None]:
    """The type of each option's values: that of its annotation, else that of its default; a whole default may stand for any number."""
    annotated: dict[str, Any] = {}
    for function in functions:
        for each in inspect.signature(function).parameters.values() if function else ():
            annotated.setdefault(each.name, each.annotation)
    found: dict[str, type | None] = {}
    for name, default in options.items():
        annotation = annotated.get(name)
        kind = _NAMED.get(annotation) if isinstance(annotation, str) else annotation
        bare = annotation is None or annotation is inspect.Parameter.empty
        if kind in _NAMED.values():
            found[name] = kind
        elif bare and isinstance(default, (bool, int, float)):
            found[name] = bool if isinstance(default, bool) else float
        else:
            found[name] = tuple if isinstance(default, tuple) else None
    return found


def check_options(name: str, kinds: Kinds, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options whose values have another type than they should.

    Raises:
        TypeError: one has.
        ValueError: a number is not finite, or a tuple has another length than its default.
    """
    for key, kind in kinds.items():
        if key not in given:
            continue
        value = given[key]
        label = f"{name}: {key}"
        if type(value).__name__ == "Learn":
            domain = f", or declare its domain in the rule, such as {key}=hn.Positive({defaults[key]!r})" if kind is float else ""
            raise TypeError(f"{label}={value!r} is learned, but {key} is an option and not a hyper: give it a plain value{domain}")
        if kind is bool:
            check_flag(label, value)
        elif kind is int:
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{label}={value!r} ({type(value).__name__}) must be an integer")
        elif kind is float:
            check_number(label, value)
        elif kind is tuple:
            count = len(defaults[key])
            if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(is_number, value)):
                raise TypeError(f"{label}={value!r} ({type(value).__name__}) must be {count} numbers")
            if len(value) != count:
                raise ValueError(f"{label}={value!r} must be {count} numbers")
        elif key.endswith("dtype"):
            check_dtype(label, value)


def caller_level() -> int:
    """Return the `stacklevel` for a warning of the calling function: the first frame outside of the library and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra to install where a package is missing that imports inside the context need.

    Args:
        name: of the extra, in `pyproject.toml`.

    Raises:
        ModuleNotFoundError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package == "hyperopt_nested":
            raise
        raise ModuleNotFoundError(f'{package} is not installed: pip install "hyperopt-nested[{name}]"', name=package) from missing
