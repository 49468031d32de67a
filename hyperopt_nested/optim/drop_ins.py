"""Drop-in optimizers: a class a rule, with the names, the order and the defaults of the arguments of torch.optim's class, if it has one."""

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperopt_nested import rules
from hyperopt_nested.checks import is_number, packs
from hyperopt_nested.optim.optimizer import HyperOptimizer, Params
from hyperopt_nested.optim.param_groups import Choice
from hyperopt_nested.rule import Learn, Optimizer

Factory = Callable[..., Optimizer]
Parameters = dict[str, inspect.Parameter]

_REMEDIES = {
    "learning_rate": "it is called lr",
    "foreach": "leave it out, or say what runs the steps: backend='foreach'",
    "fused": "leave it out, or say what runs the steps: backend='fused'",
    "capturable": "leave it out: no step waits for the device",
    "differentiable": "leave it out; hn.hypergradient differentiates through steps",
    "amsgrad": "leave it out; hn.optim.Adam and hn.optim.AdamW have it",
    "decoupled_weight_decay": "leave it out; hn.optim.AdamW decouples the decay",
}
"""Arguments of torch.optim's classes that ours do not have, and what to do."""

_SHARED: Parameters = {each.name: each for each in inspect.signature(HyperOptimizer).parameters.values() if each.kind is each.KEYWORD_ONLY}
"""What all classes take besides the arguments of their rules."""

_NUMBER = float | Tensor | Learn


def _parameters(rule: Factory, order: Sequence[str], defaults: Mapping[str, Any]) -> Parameters:
    """What a class takes: arguments of its rule, where several hypers may be one tuple, and those that all classes share."""
    single = {each.name: each for each in inspect.signature(rule).parameters.values()}
    tuples = _tuples(rule)
    whole = {part: name for name, parts in tuples.items() for part in parts}
    parameters: Parameters = {}
    for name in dict.fromkeys(whole.get(name, name) for name in single):
        parts = tuples.get(name, [])
        default = defaults.get(name, tuple(single[part].default for part in parts) if parts else single[name].default)
        parameters[name] = (
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=_tuple_of(default))
            if parts
            else single[name].replace(default=default)
        )
    hypers = [name for name, each in parameters.items() if name in tuples or each.annotation in (_NUMBER, float)]
    first = {name: parameters[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in order or hypers}
    rest = {name: each for name, each in {**parameters, **_SHARED}.items() if name not in first}
    return dict(sorted({**first, **rest}.items(), key=lambda item: item[1].kind))


def _tuples(rule: Factory) -> dict[str, list[str]]:
    """Hypers that a class takes as one tuple, by its name; what may be None is an argument of its own."""
    return packs(name for name, each in inspect.signature(rule).parameters.items() if each.default is not None)


def _tuple_of(values: Sequence[float | None]) -> Any:
    return types.GenericAlias(tuple, tuple(_NUMBER if value is not None else _NUMBER | None for value in values))


def _starting(value: Any, default: Any) -> Any:
    """A value, or a tuple of them, where a `learn` without a start has that of the class's default, if this is a number."""
    if isinstance(value, Sequence) and isinstance(default, Sequence) and len(value) == len(default):
        return tuple(map(_starting, value, default))
    return value.starting(default) if isinstance(value, Learn) and is_number(default) else value


def _documentation(cls: "type[DropIn]") -> str:
    """A docstring: that of the rule, with the class's arguments and an example."""
    text = inspect.getdoc(cls._rule) or ""
    shared, own = _entries(inspect.getdoc(HyperOptimizer) or ""), _entries(text)
    own |= {name: "; ".join(own[part].rstrip(".") for part in parts) + "." for name, parts in _tuples(cls._rule).items()}
    own |= {"maximize": "whether gradients are ascended."}
    said = {**own, **shared}
    lines = [f"    {name}: {said[name]}" for name in ("params", *cls._takes) if name in said]
    example = f"""Example:
    >>> import torch, hyperopt_nested as hn
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> opt = hn.optim.{cls.__name__}(model.parameters(), lr=0.01)
    >>> model(torch.ones(4, 3)).square().mean().backward()
    >>> opt.step()
"""
    return "\n".join([text.partition("\nArgs:")[0].rstrip(), "", "Args:", *lines, "", example])


def _entries(text: str) -> dict[str, str]:
    """What a docstring says of each argument, in one line each."""
    _, _, section = text.partition("\nArgs:\n")
    section = re.split(r"\n\n|\n(?=\S)", section)[0]
    entries = re.findall(r"^    \**(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


class DropIn(HyperOptimizer):
    """A `HyperOptimizer` of one rule, which takes the rule's arguments itself; `hn.optim.AdamW` is one.

    A class of a rule of one's own names it: `class Signed(hn.optim.DropIn, rule=signed)`. Its arguments are those of the rule, with
    beta1, beta2 and so on in one tuple `betas`, and those of `HyperOptimizer`.

    Args:
        params: as of `HyperOptimizer`.
        args: hypers by position, a number, a tensor of one number, or `hn.learn(...)` each, in the order of the class's signature.
        settings: hypers and options by name; and what `HyperOptimizer` takes by name.

    Raises:
        TypeError: an argument is unknown, or given twice. The message says which there are, and what to do about those of torch.optim
            that have no place here.
        ValueError: a value is outside its domain.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> @hn.rule(separable="element")
        ... def signed_step(param, grad, state, *, lr=hn.Positive(1e-4)):
        ...     return param - lr * grad.sign(), state
        >>> class SignedStep(hn.optim.DropIn, rule=signed_step): ...
        >>> lr = hn.learn(1e-3, by=hn.sgd(lr=1e-6))
        >>> opt = SignedStep(torch.nn.Linear(2, 1).parameters(), lr=lr)
        >>> opt.learned()
        {'lr': 0.001}
    """

    _rule: ClassVar[Factory]
    _takes: ClassVar[Parameters]
    _defaults: ClassVar[Mapping[str, Any]]

    def __init__(self, params: Params, *args: Any, **settings: Any) -> None:
        values, shared = self._split(args, settings)
        super().__init__(params, self._chosen(values), **shared)

    def __init_subclass__(cls, *, rule: Factory | None = None, order: str = "", defaults: Mapping[str, Any] | None = None) -> None:
        """Make a class of a rule.

        Args:
            rule: the rule; None for a class that is derived from one with a rule.
            order: the arguments that may be given by position, in order; all hypers by default.
            defaults: defaults where they are not those of the rule.
        """
        super().__init_subclass__()
        if rule is None:
            return
        cls._rule, cls._defaults = staticmethod(rule), defaults or {}
        cls._takes = _parameters(rule, order.split(), cls._defaults)

        def __init__(self: DropIn, params: Params, *args: Any, **settings: Any) -> None:
            DropIn.__init__(self, params, *args, **settings)

        own, params = list(inspect.signature(__init__).parameters.values())[:2]
        __init__.__signature__ = inspect.Signature([own.replace(annotation=own.empty), params, *cls._takes.values()])  # type: ignore[attr-defined]
        __init__.__qualname__ = f"{cls.__qualname__}.__init__"
        setattr(cls, "__init__", __init__)  # noqa: B010 - an assignment would be what editors show
        if cls.__doc__ is None:
            cls.__doc__ = _documentation(cls)

    @classmethod
    def _split(cls, args: Sequence[Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a call gives to the rule, and what to `HyperOptimizer`."""
        takes, label = cls._takes, cls.__name__
        by_position = [each.name for each in takes.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
        if len(args) > len(by_position):
            raise TypeError(
                f"{label} takes {', '.join(['params', *by_position])} by position, and no {args[len(by_position)]!r} after them"
            )
        arguments = dict(zip(by_position, args, strict=False))
        is_open = any(each.kind is each.VAR_KEYWORD for each in takes.values())
        for name, value in settings.items():
            if name in arguments:
                raise TypeError(f"{label}: {name} is given by position and by name: leave one of them out")
            if name not in takes and not (is_open and name not in _REMEDIES):
                close = get_close_matches(name, takes, n=1)
                remedy = _REMEDIES.get(name) or (f"did you mean {close[0]!r}?" if close else f"it has {', '.join(['params', *takes])}")
                raise TypeError(f"{label} has no argument {name!r} (given {value!r}): {remedy}")
        arguments |= settings
        values = {name: _starting(value, cls._defaults.get(name)) for name, value in arguments.items() if name not in _SHARED}
        return {**cls._defaults, **values}, {name: value for name, value in arguments.items() if name in _SHARED}

    @classmethod
    def _chosen(cls, values: dict[str, Any]) -> Choice:
        """The optimizer of the tensors."""
        return cls._rule(**values)


class SGD(DropIn, rule=rules.sgd, order="lr momentum dampening weight_decay nesterov"): ...


class Adam(DropIn, rule=rules.adam, order="lr betas eps weight_decay amsgrad"): ...


class AdamW(DropIn, rule=rules.adamw, order="lr betas eps weight_decay amsgrad"): ...


class NAdam(DropIn, rule=rules.nadam, order="lr betas eps weight_decay momentum_decay decoupled_weight_decay"): ...


class RAdam(DropIn, rule=rules.radam, order="lr betas eps weight_decay decoupled_weight_decay"): ...


class Adamax(DropIn, rule=rules.adamax): ...


class Adagrad(DropIn, rule=rules.adagrad): ...


class Adadelta(DropIn, rule=rules.adadelta): ...


class RMSprop(DropIn, rule=rules.rmsprop, order="lr alpha eps weight_decay momentum centered"): ...


class Rprop(DropIn, rule=rules.rprop): ...


class ASGD(DropIn, rule=rules.asgd, order="lr lambd alpha t0 weight_decay"): ...


@dataclass(frozen=True)
class _ByDtype:
    """The optimizer of a tensor, by its dtype."""

    optimizers: Mapping[torch.dtype, Optimizer]

    def __call__(self, name: str, tensor: Tensor) -> Optimizer:  # noqa: ARG002
        return self.optimizers.get(tensor.dtype) or self.optimizers[torch.float32]


class Adafactor(DropIn, rule=rules.adafactor, defaults={"eps": (None, 1e-3)}):
    @classmethod
    def _chosen(cls, values: dict[str, Any]) -> Choice:
        """As torch.optim has it, None in `eps` is the machine epsilon of each tensor's dtype."""
        eps = values["eps"]
        if not isinstance(eps, Sequence) or not eps or eps[0] is not None:
            return rules.adafactor(**values)
        dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
        return _ByDtype({dtype: rules.adafactor(**{**values, "eps": (torch.finfo(dtype).eps, *eps[1:])}) for dtype in dtypes})


class Muon(
    DropIn,
    rule=rules.muon,
    order="lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
    defaults={"ns_dtype": torch.bfloat16},
): ...


class AdaBelief(DropIn, rule=rules.adabelief): ...


class Adan(DropIn, rule=rules.adan): ...


class LAMB(DropIn, rule=rules.lamb): ...


class LARS(DropIn, rule=rules.lars): ...


class Lion(DropIn, rule=rules.lion): ...


class ScheduleFreeSGD(DropIn, rule=rules.schedule_free_sgd): ...


class ScheduleFreeAdamW(DropIn, rule=rules.schedule_free_adamw): ...


class MADA(DropIn, rule=rules.mada): ...


class DAdaptAdam(DropIn, rule=rules.dadapt_adam, order="lr betas eps weight_decay"): ...


class Prodigy(DropIn, rule=rules.prodigy, order="lr betas beta3 eps weight_decay"): ...


class DoG(DropIn, rule=rules.dog, order="reps_rel lr weight_decay eps init_eta"): ...


class LDoG(DropIn, rule=rules.ldog, order="reps_rel lr weight_decay eps init_eta"): ...


class SGDHD(DropIn, rule=rules.sgd_hd): ...


class AdamHD(DropIn, rule=rules.adam_hd): ...
