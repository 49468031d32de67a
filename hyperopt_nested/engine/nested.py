"""The recursion: an optimizer steps the parameters, and the optimizers of its learned hypers step those.

To learn a hyper, the last update is differentiated with respect to it, the new gradient is the cotangent, and the result is the
gradient that the hyper's own optimizer steps with; its hypers may be learned in the same way. Everything here is a pure function of
dicts of tensors, so it works under `torch.func.vmap`, `grad` and `jvp`, and under `torch.compile`.
"""

from __future__ import annotations  # torch.compile does not evaluate annotations of inner functions

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.checks import check_dtype
from hyperopt_nested.engine.binding import Bindings, Hessian, Reduce, Tensors, Values
from hyperopt_nested.engine.checks import (
    Horizon,
    check_horizon,
    check_losses,
    check_shared,
    check_step,
    check_tensors,
    check_used,
    optimizers_of,
)
from hyperopt_nested.engine.learned import COUNTED, LearnedHyper, number
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.engine.rounding import Rounding, check_rounding, counts, in_dtypes_of
from hyperopt_nested.engine.sensitivity import Named
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.signatures import check_form, check_state
from hyperopt_nested.trees import State, eval_params, filled, flatten, in_dtype


class Nested:
    """An optimizer, its learners, their learners, and so on: one pure `step`.

    The state is a dict of nested dicts of tensors, of constant structure: `rule` (each tensor's rule state), `hypers` (unconstrained
    values of learned hypers), `learners` (the state of the optimizers that learn them: the same structure again), `memory` (each tensor's
    last update), `rounding` (what is counted of each tensor that is rounded at random), `nonfinite` (how many hypergradient entries were
    not finite, and not used) and `pinned` (how many steps of values ended at an end of what they may be).

    A learned hyper goes by its name; where several `learn(...)` declarations have one name, the second is `name#2`, and so on.

    Args:
        optimizer: one optimizer for all tensors, or a mapping from each tensor's name to its optimizer.
        horizon: the past updates that hypergradients look through: the last one, `OneStep()`, or all, as `Discounted(0.9)`.
        state_dtype: the dtype of what rules keep of a parameter's shape, such as Adam's moments; with torch.bfloat16, what torch.optim does
            with parameters in bfloat16, small updates of a moment are lost. None is the parameter's dtype, or float32 if that is wider; but
            for SGD's momentum, which is soon forgotten, the parameter's.
        rounding: "stochastic" rounds what is kept in bfloat16 (parameters, and what rules keep of their shape) up or down at random, so
            that small updates count in expectation; "nearest" loses them. The bits depend on the tensor's name and the step alone.

    Raises:
        TypeError: `optimizer`, or what it maps a name to, is no optimizer of this library; or another argument is of a wrong type.
        ValueError: what is asked for would not be exact for a learned hyper, or the hyper's derivative is zero wherever it exists; or
            one `learn(...)` is given to hypers of several names or domains.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> nested = hn.Nested(hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=0.01))))
        >>> params = {"w": torch.ones(2)}
        >>> st = nested.init(params)
        >>> for _ in range(2):  # the loss is w.sum(), so the hypergradient is -(1 + 1)
        ...     params, st = nested.step(params, {"w": torch.ones(2)}, st)
        >>> nested.hypers(st)
        {'lr': {'model': tensor(0.1200, dtype=torch.float64)}}
    """

    def __init__(
        self,
        optimizer: Optimizer | Mapping[str, Optimizer],
        *,
        horizon: Horizon = OneStep(),
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
    ) -> None:
        check_horizon(horizon)
        check_dtype("state_dtype", state_dtype)
        check_rounding(rounding)
        self.horizon, self.state_dtype, self.rounding = horizon, state_dtype, rounding
        self.reads_loss = False
        self.shards: dict[str, int] = {}  # by tensor: the index of the part of a larger one that it is, so that parts are rounded otherwise
        by_learn: dict[int, LearnedHyper] = {}
        for each in optimizers_of(optimizer):
            self.reads_loss |= bool(each.rule.loss_names)
            for name, learn in each.learned.items():
                if learn.key in by_learn:
                    check_shared(by_learn[learn.key], each, name)
                else:
                    horizon.check(each, name, learn)
                    same = sum(learned.key.split("#")[0] == name for learned in by_learn.values())
                    key = f"{name}#{same + 1}" if same else name
                    learner = Nested(learn.by, horizon=horizon.for_learners)
                    by_learn[learn.key] = LearnedHyper(key, learn, each.rule.hypers[name], each.via(name), learner)
        self.learned = {learned.key: learned for learned in by_learn.values()}
        self.bindings = Bindings(optimizer, by_learn, horizon.kind_of)
        self._memory = horizon.remember(self.bindings)

    def init(self, params: Tensors, start: Mapping[str, float | Tensor] | None = None) -> State:
        """State before the first step.

        Args:
            params: the tensors, by name.
            start: start values of learned hypers, by key, in the place of the declared ones; tensors of shape () may be batched
                by `torch.func.vmap`.

        Raises:
            TypeError: `params` maps no names to tensors, or a tensor is not of a real floating-point dtype.
            ValueError: a learned hyper is not used by the update, or enters a total over all tensors in a way that cannot be
                differentiated; `start` names no learned hyper, or a number in it is outside its domain; a tensor has no optimizer.
        """
        rule, hypers = self.begin(params, {} if start is None else start)
        devices = {key: next(iter(raws.values())).device for key, raws in hypers.items() if raws}
        return {
            "rule": rule,
            "hypers": hypers,
            "learners": {key: learned.learner.init(hypers[key]) for key, learned in self.learned.items()},
            "memory": self._memory.init(params, rule, hypers),
            "rounding": {name: counted for name, param in params.items() if (counted := counts(self.rounding, name, param, rule[name]))},
            **{part: {key: number(0.0, device) for key, device in devices.items()} for part in COUNTED},
        }

    def begin(self, params: Tensors, start: Mapping[str, float | Tensor]) -> tuple[State, dict[str, Named]]:
        """The parts `rule` and `hypers` of `init`: what `update` takes. Arguments as of `init`."""
        check_tensors("params", params)
        self.bindings.check_names(params)
        if not isinstance(start, Mapping):
            raise TypeError(f"start={start!r} ({type(start).__name__}) must be a mapping from learned hypers to start values")
        for key, value in start.items():
            if key not in self.learned:
                raise ValueError(f"start names {key!r}, which is not learned; learned are: {', '.join(self.learned) or 'none'}")
            if not isinstance(value, Tensor):
                self.learned[key].hyper.check(f"start: {key}", value, self.learned[key].via)
        hypers: dict[str, Named] = {key: {} for key in self.learned}
        rule: State = {}
        checked: set[tuple[int, int]] = set()
        for name, param in params.items():
            if not param.is_floating_point():
                raise TypeError(f"params[{name!r}] has dtype {param.dtype}; only real floating-point tensors can be optimized")
            binding = self.bindings[name]
            optimizer = binding.optimizer
            if (id(binding), param.ndim) not in checked:
                checked.add((id(binding), param.ndim))
                check_used(binding, name, param)
            start_state = optimizer.rule.init(param, optimizer.settings)
            check_state(optimizer.rule.name, start_state)
            rule[name] = in_dtype(start_state, param, self.state_dtype)
            for learned in binding.learned.values():
                raws = hypers[learned.key]
                if learned.key_of(name) not in raws:
                    raws[learned.key_of(name)] = learned.start(param, start.get(learned.key, learned.learn.value))
        return rule, hypers

    def step(
        self,
        params: Tensors,
        grads: Tensors,
        st: State,
        values: Values | None = None,
        *,
        learn: bool | Collection[str] = True,
        hessian: Hessian | None = None,
        reduce: Reduce | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: first of the learned hypers, with hypergradients; then of the tensors, with the new hypers (`delayed` ones: the old).

        Args:
            params: the tensors, by name.
            grads: their gradients. A tensor without one is left alone, and so are the hypers that only it uses.
            st: as `init` or the last step made it.
            values: by tensor and hyper, what a schedule has made of declared values: it replaces a value that is not learned, and
                scales one that is (by its ratio to the declared value). Numbers, in the hyper's domain, or tensors. A rule that
                reads the loss, such as that of `null_step`, needs it here: `{"w": {"loss": loss}}`.
            learn: whether to step the learned hypers, or which, by key; what is not stepped, `hyper_step` may step.
            hessian: with `curvature="exact"`: product of the Hessian of the loss, at `params`, with tensors, by name; such as
                `lambda v: torch.func.jvp(torch.func.grad(loss), (params,), (v,))[1]`.
            reduce: where tensors are parts of larger ones, which several processes step: `reduce(numbers, "sum")` and
                `reduce(numbers, "max")` return what numbers, by key, are for the whole tensors; the first of a key is a tensor's name.

        Returns:
            The new tensors and the new state; the inputs stay as they are.

        Raises:
            TypeError: `learn` is a string, or a rule returns no tensor and state.
            ValueError: `hessian` is missing, or given in vain; a gradient is of no tensor, or of another shape; `values` or `learn` names
                what there is not, or a number is outside its domain; a rule changes the form of its state.
        """
        values = {} if values is None else values
        check_step(params, grads, st, values, learn, self.bindings, self.learned)
        if self.reads_loss:
            check_losses(grads, values, self.bindings)
        if (hessian is not None) != ((curvature := self.horizon.curvature) == "exact"):
            raise ValueError(f"hessian={hessian!r}, but curvature={curvature!r}: give products with the Hessian if it is 'exact', only")
        if not grads:
            return {**params}, {**st}
        grads = self.descended(grads)
        learned = self._learn(params, grads, st, learn, values, reduce)
        used = {key: raws if self.learned[key].learn.delayed else learned["hypers"][key] for key, raws in st["hypers"].items()}
        product = (lambda tangents: self.descended(_chosen(grads, hessian(tangents)))) if hessian else None
        new, rule, memory = self._memory.step(params, grads, st, used, values, product, reduce)
        new, rule, rounding = _in_dtypes_of(params, st["rule"], new, rule, st["rounding"], self.shards)
        rule = {**st["rule"], **(rule if reduce is None else self.maximized(rule, reduce))}
        hypers = {key: self.bounded(key, raws, rule, grads) for key, raws in learned["hypers"].items()}
        changed = {"rule": rule, "hypers": hypers, "memory": {**st["memory"], **memory}, "rounding": {**st["rounding"], **rounding}}
        return {**params, **new}, {**st, **learned, **changed}

    def hyper_step(
        self, params: Tensors, grads: Tensors, st: State, values: Values | None = None, *, reduce: Reduce | None = None
    ) -> State:
        """Step the learned hypers alone, with the gradients of any loss at the tensors that the last step made: of a validation loss, say.

        Args:
            params: these tensors.
            grads: the gradients, by tensor.
            st: as the last step, or hyper step, made it.
            values: as of `step`.
            reduce: as of `step`.

        Returns:
            The new state.

        Raises:
            ValueError: a gradient is of no tensor, or of another shape.
        """
        values = {} if values is None else values
        check_step(params, grads, st, values, True, self.bindings, self.learned)
        grads = self.descended(grads)
        learned = self._learn(params, grads, st, True, values, reduce)
        hypers = {key: self.bounded(key, raws, st["rule"], grads) for key, raws in learned["hypers"].items()}
        return {**st, **learned, "hypers": hypers}

    def descended(self, grads: Tensors) -> dict[str, Tensor]:
        """Gradients of what is minimized."""
        return {name: -grad if self.bindings[name].optimizer.maximize else grad for name, grad in grads.items()}

    def _learn(
        self, params: Tensors, grads: Tensors, st: State, learn: bool | Collection[str], values: Values, reduce: Reduce | None
    ) -> State:
        """The parts of the state that belong to learned hypers, after one step with the hypergradients that `grads` give."""
        new = {part: dict(st[part]) for part in ("hypers", "learners", *COUNTED)}
        for key, hypergrads in self.hypergradients(params, grads, st, reduce).items() if learn else ():
            learned = self.learned[key]
            if not isinstance(learn, bool) and key not in learn:
                continue
            counts, by = {part: new[part][key] for part in COUNTED}, learned.learn.scheduled_by
            factors = {name: self.bindings[name].factor(by, values.get(name, {})) for name in hypergrads} if by else {}
            now = new["hypers"][key], hypergrads, new["learners"][key], counts, factors
            new["hypers"][key], new["learners"][key], counts = learned.step(*now)
            for part, count in counts.items():
                new[part][key] = count
        return new

    def update(
        self, params: Tensors, grads: Tensors, rule: Mapping[str, State], hypers: Mapping[str, Named], values: Values | None = None
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        """One step of the tensors alone, with given hypers: nothing is learned, nothing remembered, and all rounded to nearest.

        Args:
            params: the tensors, by name.
            grads: the gradient of each.
            rule: the rule states, `st["rule"]`.
            hypers: unconstrained values of the learned hypers, `st["hypers"]`.
            values: as of `step`.

        Returns:
            The new tensors, and the new rule states.
        """
        new, (states, _) = self.bindings(params, self.descended(grads), rule, hypers, values or {})
        new, states, _ = _in_dtypes_of(params, rule, new, states, {}, {})
        return new, states

    def hypergradients(self, params: Tensors, grads: Tensors, st: State, reduce: Reduce | None = None) -> dict[str, Named]:
        """Gradients pulled back through the last update onto unconstrained values of learned hypers; zero before the first update.

        Args:
            params: the tensors that the last update made, by name.
            grads: gradients after the last update, by tensor (of what is minimized).
            st: the state that the last update made.
            reduce: as of `step`.

        Returns:
            By learned hyper, by key of its values; only values that some gradient reaches are there.
        """
        result: dict[str, Named] = {key: {} for key in self.learned}
        parts = dict(self._memory.pull(params, grads, st["rule"], st["memory"], st["hypers"]))
        for (_, key, value), contribution in (reduce(parts, "sum") if reduce else parts).items():
            before = result[key].get(value)
            result[key][value] = contribution if before is None else before + contribution.to(before.device)
        return {key: raws for key, raws in result.items() if raws}

    def hypers(self, st: State) -> dict[str, dict[str, Tensor]]:
        """Learned values at every height of the tower: `{"lr": {"model": ...}, "lr.lr": {"model": ...}}`, schedules apart."""
        result = {}
        for key, learned in self.learned.items():
            result[key] = {name: learned.value(raw) for name, raw in st["hypers"][key].items()}
            inner = learned.learner.hypers(st["learners"][key])
            result |= {f"{key}.{below}": values for below, values in inner.items()}
        return result

    def nonfinite_counts(self, st: State) -> dict[str, Tensor]:
        """How many hypergradient entries were NaN or infinite, and so not used, at every height of the tower: shape () each."""
        return self.counted("nonfinite", st)

    def pinned(self, st: State) -> dict[str, Tensor]:
        """How many steps of learned values were stopped at an end of what these may be, at every height of the tower: shape () each.

        Ends are those of the domain, of what the dtype holds, and bounds that are numbers; an end where the value starts does not count.
        """
        return self.counted("pinned", st)

    def counted(self, part: str, st: State) -> dict[str, Any]:
        """One part of the state that counts, "nonfinite" or "pinned", at every height of the tower."""
        counts = dict(st[part])
        for key, learned in self.learned.items():
            counts |= {f"{key}.{below}": count for below, count in learned.learner.counted(part, st["learners"][key]).items()}
        return counts

    def eval_params(self, params: Tensors, st: State) -> dict[str, Tensor]:
        """The weights to evaluate the model with: those that the rules keep for it (averages of some kind), else the tensors."""
        return {name: eval_params(param, st["rule"][name]) for name, param in params.items()}

    def maximized(self, rule: Mapping[str, State], reduce: Reduce) -> dict[str, State]:
        """New states of rules, in which single numbers that are maxima over a tensor are those of all its parts."""
        leaves = {(name, *path): leaf for name, state in rule.items() for path, leaf in flatten(state).items()}
        paths = [(name, *path) for name in rule for path in self.bindings[name].optimizer.rule.maxima or ()]
        leaves |= reduce({path: leaves[path] for path in paths}, "max")
        return filled(dict(rule), leaves.values())

    def bounded(self, key: str, raws: Named, rule: State, grads: Tensors) -> Named:
        """Unconstrained values inside the bounds that read new states of rules; those of tensors without a gradient as they are."""
        learned = self.learned[key]
        if not any(map(callable, learned.learn.bounds)):
            return raws
        users: dict[str, list[State]] = {}
        for name in grads:
            if any(each.key == key for each in self.bindings[name].learned.values()):
                users.setdefault(learned.key_of(name), []).append(rule[name])
        return {name: learned.bounded(raw, users[name]) if name in users else raw for name, raw in raws.items()}


def _in_dtypes_of(
    params: Tensors,
    rule: Mapping[str, State],
    new: Tensors,
    states: Mapping[str, State],
    rounding: Mapping[str, State],
    shards: Mapping[str, int],
) -> tuple[dict[str, Tensor], dict[str, State], dict[str, State]]:
    """New tensors and states in the dtypes of the old ones, and what rounding counts: updates are computed in wider ones."""
    new_params, new_states, new_rounding = {}, {}, {}
    for name, state in states.items():
        check_form(name, new[name], state, params[name], rule[name])
        counted, shard = rounding.get(name, {}), shards.get(name, 0)
        new_params[name], new_states[name], after = in_dtypes_of(params[name], rule[name], new[name], state, counted, shard)
        if counted:
            new_rounding[name] = after
    return new_params, new_states, new_rounding


def _chosen(names: Iterable[str], tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}
