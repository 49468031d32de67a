"""`HyperOptimizer`: the engine as a `torch.optim.Optimizer`."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, ClassVar, Literal, cast, overload
from warnings import warn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hyperopt_nested.backends.choice import Backend, Programs, chosen
from hyperopt_nested.backends.program import capturing
from hyperopt_nested.backends.step import ProgramStep
from hyperopt_nested.checks import caller_level, check_count, is_number, not_an_optimizer, with_remedy
from hyperopt_nested.engine.binding import Hessian
from hyperopt_nested.engine.checks import Horizon
from hyperopt_nested.engine.learned import MODEL, number
from hyperopt_nested.engine.nested import Nested
from hyperopt_nested.engine.one_step import OneStep
from hyperopt_nested.engine.rounding import Rounding
from hyperopt_nested.hypergradients.double_backward import loss_with_hessian
from hyperopt_nested.optim import averages
from hyperopt_nested.optim.level import has_level, is_settled
from hyperopt_nested.optim.loading import for_torch, loaded, matched
from hyperopt_nested.optim.named_values import LearnedValue, as_floats, declared_hypers, learned_values, listed, with_value
from hyperopt_nested.optim.outside_dynamo import outside_dynamo
from hyperopt_nested.optim.param_groups import NO_CHOICES, NO_STORE, ByName, Choice, GroupedOptimizer, check_params, pack, unpack
from hyperopt_nested.optim.param_state import ParamState, built, is_declaration, is_own
from hyperopt_nested.optim.pinned import PinnedValues
from hyperopt_nested.optim.roster import Group, Roster
from hyperopt_nested.optim.sharding import check_flat, check_partition
from hyperopt_nested.rule import Optimizer
from hyperopt_nested.trees import State, map_tree

Params = Iterable[Tensor | tuple[str, Tensor] | Group]


class HyperOptimizer(GroupedOptimizer):
    """A drop-in `torch.optim.Optimizer` whose hyper-parameters may be learned.

    `zero_grad`, `backward`, `step`. Learned values and all else that the engine remembers are plain tensors in `state`, made at
    construction, so that `state_dict`, `load_state_dict`, `deepcopy` and `pickle` keep them. What rules copy from the weights, such as
    anchors, is taken at the first step of each tensor. Groups, tensors and entries of the state may be changed between steps, as in
    torch.optim; learned values outlive a reset of the state. Each group holds every hyper as
    a plain number (`beta1` and `beta2` as `betas`, as in torch.optim), which schedulers may change: that replaces the value of a
    hyper that is not learned; the effective value of a learned one is the learned value times the group's number over the declared
    value, so that a schedule and learning compose. `group["effective_lr"]` is the learning rate of the next step, for monitors: the
    effective value, or, where tensors, rows or elements have values of their own, their mean. Reading it waits for the device.

    Args:
        params: tensors, `(name, tensor)` pairs (`model.named_parameters()`), or groups of either: dicts with `params` and other values
            for some hypers. A number given for a learned hyper scales it in that group; a `learn(...)` makes the group learn its own.
        optimizer: what to run, or a function from a tensor's name and the tensor to what to run on it. Unnamed tensors are called
            `<group>.<index>`.
        horizon: the past updates that hypers are learned from: the last one, `OneStep()`, or all, as `Discounted(0.9)`.
        learn_from: "training": each step learns from the gradient that it is given. "validation": steps learn nothing; `hyper_step` does.
        state_dtype: the dtype of what rules keep; see `Nested`.
        rounding: how parameters and moments in bfloat16 are rounded: "nearest", or "stochastic", which keeps small updates; see `Nested`.
        total_steps: how many steps training takes. An `lr` that `hn.learn` learns without `by` is then a level, which is learned in the
            first 20 % of the steps; it is multiplied by a factor that falls linearly from one to zero. Further steps keep the last
            factor. None: there is no such schedule.
        backend: what runs the steps, with the same results up to rounding; see `Backend`.

    Attributes:
        backend: what runs them: "reference", "foreach", "compile" or "fused".
        changed: by tensor, how often its weights had been changed since its last step, so that nothing was learned from that step.
        pinned_at_ends: of the class: learned hypers that may end at an end of their domain without a warning.
        begins_at_first_step: of the class: whether rules copy what they keep of a tensor, as anchors, at its first step, or else at
            construction.

    Raises:
        TypeError: `optimizer` is no optimizer of this library, or a tensor's dtype is not real floating-point.
        ValueError: a value is outside its domain, a learned hyper is not used, a group names a hyper wrongly, or `total_steps` is given
            and no `lr` is learned without `by`.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> model = torch.nn.Linear(3, 1)
        >>> adamw = hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-5)))
        >>> opt = hn.HyperOptimizer(model.named_parameters(), adamw)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     opt.step()
        >>> opt.hypers()["lr"]["group 0"].shape
        torch.Size([])
    """

    pinned_at_ends: ClassVar[frozenset[str]] = frozenset()
    begins_at_first_step: ClassVar[bool] = True
    _plan: tuple[Roster, dict[str, Optimizer], ParamState, dict[str, Tensor]] | None = None  # what a load in progress will install
    _evaluates = False  # whether averages are in the place of parameters

    @with_remedy("hypers are arguments of a rule: HyperOptimizer(params, hn.adamw(lr=1e-3)), or hn.optim.AdamW(params, lr=1e-3)")
    def __init__(
        self,
        params: Params,
        optimizer: Choice,
        *,
        horizon: Horizon = OneStep(),
        learn_from: Literal["training", "validation"] = "training",
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        total_steps: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(optimizer, Optimizer) and (not callable(optimizer) or isinstance(optimizer, NO_CHOICES)):
            raise not_an_optimizer("optimizer", optimizer)
        check_params(params)
        if learn_from not in ("training", "validation"):
            raise ValueError(f"learn_from={learn_from!r} must be 'training' or 'validation'")
        if total_steps is not None:
            check_count("total_steps", total_steps)
        self._choice, self._learn_from, self._total_steps = optimizer, learn_from, total_steps
        self._backend: Backend = backend
        self._programs: Programs | None = None
        self._how: dict[str, Any] = {"horizon": horizon, "state_dtype": state_dtype, "rounding": rounding}
        self._program_step: ProgramStep | None = None
        self._optimizers, self._overrides, self._roster = {}, [], Roster([], [])
        self.changed: dict[str, int] = {}
        self._pinned = PinnedValues(self.pinned_at_ends)
        super().__init__(cast(Any, params), pack(optimizer.declared) if isinstance(optimizer, Optimizer) else {})
        for index, group in enumerate(self.param_groups):
            self._fill(index, group)
        self.defaults = self.defaults or self._numbers_of([])
        if total_steps is not None and self._optimizers and not any(map(has_level, self._optimizers.values())):
            raise ValueError(
                f"total_steps={total_steps!r}, but no lr is learned by the default learner: give lr=hn.learn() or hn.learn(1e-3)"
            )
        self._create_state()
        if self._nested.learned:  # torch.autograd.grad imports it in its first call, for 0.4 s: not in the first step
            importlib.import_module("torch.fx.experimental.symbolic_shapes")

    @property
    def backend(self) -> str:
        """What runs the steps; "fused+reference" where native kernels do not take some tensors, for example."""
        return "reference" if self._program_step is None else self._program_step.backend

    @property
    def maximizes(self) -> bool:
        """Whether gradients are ascended, of any tensor."""
        return any(optimizer.maximize for optimizer in self._optimizers.values())

    def _create_state(
        self, also: Iterable[str] = (), *, roster: Roster | None = None, optimizers: dict[str, Optimizer] | None = None
    ) -> None:
        """Create the state of all tensors that train, or are named in `also`; what is there already stays. If it raises, all stays."""
        roster = self._roster if roster is None else roster
        optimizers = self._optimizers if optimizers is None else optimizers
        before = {name for name, p in self._store.params.items() if roster.tensors.get(name) is p} if self._store else set()
        tracked = {*before, *also, *(name for name, p in roster.tensors.items() if p.requires_grad and not is_lazy(p))}
        check_flat(roster.tensors, optimizers)
        check_partition(optimizers.values())
        nested = Nested(optimizers, **self._how)
        gather = not self.begins_at_first_step
        self._take(roster, optimizers, built(nested, roster, tracked, self.state, self._store, gather=gather))

    def _take(self, roster: Roster, optimizers: dict[str, Optimizer], store: ParamState) -> None:
        """Take a state that was made, and what steps it."""
        backend = chosen(self._backend, store.nested, store.tensors, sharded=bool(store.sharding))
        if self._store is not None:
            was = self._store
            if any(store.declared.get(key, value) != value for key, value in was.declared.items()):
                self._programs = None  # they have the declared value in them
            if was.roster.tensors.get(was.roster.home) is not roster.tensors.get(roster.home) and was.roster.home:
                moved = self.state.get(was.roster.tensors[was.roster.home], {})
                for key in [key for key in moved if key in was.shared() or is_declaration(key)]:
                    del moved[key]
        store.write(self.state)
        self._evaluates = averages.are_in(self.state)
        self._roster, self._optimizers, self._store = roster, optimizers, store
        self._shapes = {name: p.shape for name, p in roster.tensors.items() if not is_lazy(p)}
        self._renumber()
        self._program_step = None
        if backend != "reference":
            self._programs = self._programs or Programs(backend, strict=self._backend != "auto")
            self._program_step = ProgramStep(store.nested, self._programs, store.reduce)

    @overload
    def step(self, closure: None = None, *, loss: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: float | Tensor | None = None) -> float: ...
    @outside_dynamo  # what is kept between steps is not for tracing
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: float | Tensor | None = None) -> float | None:
        """Step the learned hypers, then the parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss. With `curvature="exact"` it must not call backward: the step
                differentiates the loss, twice, and leaves the gradients in `grad`.
            loss: the loss that the gradients are of, for optimizers that read it, such as `null_step`, where there is no closure.

        Raises:
            RuntimeError: a gradient is sparse, or averages are in the place of the parameters; see `eval`.
            TypeError: `loss` is no number and no tensor of one.
            ValueError: an optimizer reads the loss, and there is neither `loss` nor a closure.
            ValueError: `curvature="exact"`, and there is no closure, or it returns no loss that can be differentiated.
            NotImplementedError: `curvature="exact"`, and an operation in the loss has no double backward; the message names it.
                Whatever is raised, nothing has been changed then.
        """
        return self.update(closure, loss)

    def update(self, closure: Callable[[], float] | None = None, given: float | Tensor | None = None) -> float | None:
        """What `step` does, without the hooks of torch: for subclasses whose own step makes several, under `torch.no_grad`."""
        loss = None
        exact: dict[str, Tensor] | None = None
        hessian: Hessian | None = None
        self._check_trains("step()")
        if given is None and closure is None and self._nested.reads_loss:
            name = next(each.rule.name for each in self._optimizers.values() if each.rule.loss_names)
            raise ValueError(f"{name} reads the loss of each step: call step(loss=loss), or step(closure)")
        if self._nested.horizon.curvature == "exact":
            if closure is None:
                raise ValueError("closure=None, but curvature='exact' needs the loss: give step() a function that returns it")
            self._follow()
            value, exact, hessian = loss_with_hessian(closure, {name: p for name, p in self._roster.tensors.items() if p.requires_grad})
            loss = cast(float, value)  # as torch.optim declares what closures return
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self._grads(exact)
        if not grads:
            return loss
        if self._nested.reads_loss:
            self._last_loss = self._loss_number(loss if given is None else given)
        self._prepare(grads)
        self._mind_changes(grads.keys())
        store, total = self._store, self._total_steps
        sharding = store.sharding
        if sharding:
            grads = sharding.gather(grads, grads)
        learn = self._learn_from == "training" and (total is None or not is_settled(self._optimizers.values(), store.taken, total))
        if not self._step_by_programs(store, grads, learn):
            if capturing():
                raise RuntimeError(
                    "backend='reference' cannot be captured in a CUDA graph: it makes a new state in each step, which a replay does not go "
                    "on from. Use backend='foreach' or 'compile'"
                )
            tensors = store.tensors
            now = {name: tensors[name].detach() for name in grads}
            new, st = store.nested.step(now, grads, store.st, self._values(), learn=learn, hessian=hessian, reduce=store.reduce)
            for name, value in new.items():
                tensors[name].copy_(value)
            for name, grad in grads.items() if exact is not None else ():
                store.params[name].grad = grad
            store.take(st, self.state)
        if sharding:
            sharding.scatter(grads)
        store.stepped(grads.keys())
        self._pinned.look(store.nested, store.st)
        return loss

    def _loss_number(self, loss: Any) -> Tensor:
        """The loss, shape (), without its graph.

        Raises:
            TypeError: it is no number.
        """
        if not is_number(loss) and not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise TypeError(f"loss={loss!r} ({type(loss).__name__}) must be a number, or a tensor of one number")
        value = torch.as_tensor(loss).detach().reshape(())
        return number(value, value.device)

    @torch.no_grad()
    def begin(self) -> None:
        """Copy from the weights now what rules keep of them, such as anchors, for tensors that have a gradient and have taken no step.

        `step` does so by itself. This is for what changes weights before that, as another optimizer that steps the same tensors.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        if grads := self._grads():
            self._prepare(grads)
            self._store.fresh.difference_update(grads)

    def _step_by_programs(self, store: ParamState, grads: dict[str, Tensor], learn: bool) -> bool:
        """Step by programs, if there are any; whether that was done."""
        program = self._program_step
        if program is None:
            return False
        arguments = store.tensors, grads, store.st, self._values(as_tensors=True)
        if program.waits(store.taken, *arguments, learn=learn):
            return False
        program.step(program.prepare(*arguments, learn=learn), grads)
        return True

    def _grads(self, exact: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """These gradients, or else those that the tensors have."""
        self._follow()
        tensors, strided = self._roster.tensors, torch.strided
        grads = {name: grad for name, p in tensors.items() if (grad := p.grad) is not None} if exact is None else dict(exact)
        for name, grad in grads.items():
            if grad.layout is not strided:
                raise RuntimeError(f"the gradient of {name!r} is {grad.layout}; only dense gradients are supported: set sparse=False")
        return grads

    def _prepare(self, grads: Mapping[str, Tensor]) -> None:
        """Make all ready for a step of what has a gradient."""
        if self._have_numbers_changed():
            self._lists = {}
            optimizers = self._switched(self.param_groups)
            if any(optimizers[name] is not each for name, each in self._optimizers.items()):
                self._create_state(optimizers=optimizers)
        store = self._store
        unfrozen = [name for name in grads if name not in store.params]
        first = store.fresh.intersection(grads)
        if unfrozen or store.is_converted(grads if store.nested.rounding == "stochastic" else first):
            self._create_state(also=unfrozen)
            first = self._store.fresh.intersection(grads)
        if first and self.begins_at_first_step:
            self._store.begin(first)
            self.began(first)

    def began(self, names: Set[str]) -> None:
        """Do nothing: called before the first step of tensors, when rules have copied what they keep of them; for subclasses."""

    def _mind_changes(self, names: Set[str]) -> None:
        """Learn nothing through last updates that do not explain the weights any more, where their memory needs that."""
        store = self._store
        if not (changed := store.weights.changed(names)):
            return
        store.forget(changed, self.state)
        if new := [name for name in changed if name not in self.changed]:
            more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            warn(
                f"the weights of {new[0]!r}{more} were changed after the last step, so learned hypers learn nothing from that step there: "
                "put the change into the optimizer, as a combinator such as hn.project, or use horizon=hn.OneStep(memory='kept'). This is "
                "said once a tensor; `changed` counts it",
                stacklevel=caller_level(),
            )
        for name in changed:
            self.changed[name] = self.changed.get(name, 0) + 1

    @outside_dynamo
    @torch.no_grad()
    def hyper_step(self) -> None:
        """Step the learned hypers alone, from the gradients that the parameters have now: of a validation loss, after the last step.

        Only with `learn_from="validation"`: `step` on the training gradient, then `zero_grad`, `backward` on a validation loss, and this.

        Raises:
            RuntimeError: the optimizer learns from training gradients, or a gradient is sparse. Nothing has been changed then.
        """
        if self._learn_from != "validation":
            raise RuntimeError("this optimizer learns from training gradients, in step(): make it with learn_from='validation' to use this")
        self._check_trains("hyper_step()")
        grads, store = self._grads(), self._store
        grads = {name: grad for name, grad in grads.items() if name in store.params}
        self._mind_changes(grads.keys())
        if store.sharding:
            grads = store.sharding.gather(grads, grads)
        now = {name: tensor.detach() for name, tensor in store.tensors.items()}
        store.take(store.nested.hyper_step(now, grads, store.st, self._values(), reduce=store.reduce), self.state)
        self._pinned.look(store.nested, store.st)

    def hypers(self) -> dict[str, dict[str, Tensor]]:
        """Effective value of every learned hyper, a copy, on its device: nothing waits for the device until you read one.

        Returns:
            By hyper ("lr"; its learner's is "lr.lr", and so on), then by tensor name; a value that tensors share is listed under each
            parameter group that uses it ("group 0").

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> lr = hn.learn(0.1, by=hn.sgd(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-6))))
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = hn.HyperOptimizer(model.named_parameters(), hn.sgd(lr=lr))
            >>> hypers = opt.hypers()
            >>> {hyper: float(values["group 0"]) for hyper, values in hypers.items()}
            {'lr': 0.1, 'lr.lr': 0.001}
        """
        st, where = self._state(), self._roster.group_of
        result: dict[str, dict[str, Tensor]] = {path: ByName(f"hypers()[{path!r}]") for path in self._nested.hypers(st)}
        groups: dict[str, dict[str, None]] = {}  # of the tensors that use a learned hyper
        for name in st["rule"]:
            for hyper, learned in self._nested.bindings[name].learned.items():
                label, value_key = f"group {where[name]}", learned.key_of(name)
                groups.setdefault(learned.key, {})[label] = None
                number = self._scheduled(self.param_groups[where[name]], self._optimizers[name])[hyper]
                value = learned.value(st["hypers"][learned.key][value_key], number)
                result[learned.key][label if value_key == MODEL else name] = value.detach().clone()
        for path, values in self._nested.hypers(st).items():
            above = path.partition(".")[0]
            for key, value in values.items() if path != above else ():
                result[path] |= dict.fromkeys(groups[above] if key == MODEL else [key], value.detach().clone())
        return result

    def learned(self) -> dict[str, float]:
        """Effective value of every learned hyper, as a float: for logs and progress bars. Reading waits for the device.

        Returns:
            By name: `lr` is a value that the model shares, `lr/group 1` that of a parameter group where groups differ in it,
            `weight_decay/0.weight` that of a tensor; where rows or elements have values of their own, their mean. `lr.lr` is a value of
            what learns `lr`. `hypers` returns the same as tensors, with all rows and elements.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> decay = hn.learn(1e-2, by=hn.adam(lr=1e-3), per="tensor")
            >>> lr = hn.learn(1e-3, by=hn.sgd(lr=1e-5))
            >>> optimizer = hn.adamw(lr=lr, weight_decay=decay)
            >>> opt = hn.HyperOptimizer(torch.nn.Linear(2, 1).named_parameters(), optimizer)
            >>> opt.learned()
            {'lr': 0.001, 'weight_decay/weight': 0.01, 'weight_decay/bias': 0.01}
        """
        return as_floats(self.learned_tensors())

    def learned_tensors(self) -> dict[str, Tensor]:
        """What `learned` returns, as tensors of shape () on their devices: nothing waits for these.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> opt = hn.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=hn.learn(0.1))
            >>> opt.learned_tensors()["lr"].shape
            torch.Size([])
        """
        st = self._state()
        return {name: value.mean(st) for name, value in self._learned_values(st).items()}

    def set_hyper(self, name: str, value: float) -> None:
        """Set the value of a hyper, learned or not. A learned one goes on from there.

        A learned value becomes the one whose effective value, after what schedules have made of it, is `value`; parameter groups that
        share it keep their ratio. A hyper that is not learned is a number of parameter groups, which a scheduler may change again; a tensor
        in the place of the number stays, and holds the value.

        Args:
            name: a hyper (`lr`) for all of its values, or one of them: a name that `learned` returns, or `lr/group 1`.
            value: in the hyper's domain. Rows and elements all get it.

        Raises:
            TypeError: `value` is no number.
            ValueError: there is no such hyper, or the value is outside its domain or bounds. Nothing has been changed then.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> sgd = hn.sgd(lr=hn.learn(0.1, by=hn.sgd(lr=1e-3)))
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = hn.HyperOptimizer(model.named_parameters(), sgd)
            >>> opt.set_hyper("lr", 0.05)
            >>> opt.set_hyper("momentum", 0.9)
            >>> opt.learned()["lr"], opt.param_groups[0]["momentum"]
            (0.05, 0.9)
        """
        st = self._state()
        declared = declared_hypers(self._optimizers, self._roster.group_of)
        new, groups = with_value(name, value, st, self._learned_values(st), declared)
        if new is not st:
            self._store.take(new, self.state)
        for index, hyper in groups.items():
            group = self.param_groups[index]
            numbers = unpack(group)
            if isinstance(numbers[hyper], Tensor):
                numbers[hyper].fill_(value)
            else:
                group.update(pack({**numbers, hyper: value}))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all groups, each once, with the names that they have in results such as `hypers` and in messages."""
        self._follow()
        return iter(self._roster.tensors.items())

    def rule_states(self) -> dict[str, State]:
        """The state that the rule keeps of each tensor: no copies, so that writing into these tensors changes it, from the first step on.

        Returns:
            By name of a tensor: a state as the rule's `init` returns it; `base` is that of the rule inside of a combinator. Tensors that
            were frozen at construction, and not stepped since, have none.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> optimizer = hn.clip_by_norm(hn.sgd(momentum=0.9), max_norm=1.0)
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = hn.HyperOptimizer(model.named_parameters(), optimizer)
            >>> _ = opt.rule_states()["bias"]["base"]["momentum_buffer"].fill_(1.0)
        """
        self._state()
        return self._store.rule_states()

    def _learned_values(self, st: State) -> dict[str, LearnedValue]:
        numbers = {name: self._scheduled(self.param_groups[group], self._optimizers[name]) for name, group in self._roster.group_of.items()}
        return learned_values(self._nested, st, self._roster.group_of, numbers)

    def __repr__(self) -> str:
        name, _, groups = super().__repr__().partition("(")
        if self._store is None:
            return f"{name}({groups}"
        try:
            values = listed(f"{key}={value:.4g}" for key, value in self.learned().items()) or "nothing"
        except ValueError as error:  # of a change that cannot be followed
            values = f"not known: {error}"
        rules = listed(dict.fromkeys(optimizer.rule.name for optimizer in self._optimizers.values()))
        return f"{name}(\nrule: {rules}\nbackend: {self.backend}\nlearned: {values}{groups}"

    def nonfinite_counts(self) -> dict[str, Tensor]:
        """How many entries of each learned hyper's hypergradient were NaN or infinite, and therefore skipped: shape () each."""
        return map_tree(torch.clone, self._nested.nonfinite_counts(self._state()))

    def pinned(self) -> dict[str, Tensor]:
        """How many steps of values of each learned hyper were stopped at an end of what they may be: shape () each.

        Ends are those of the domain, of what the dtype holds, and `bounds` that are numbers; an end where a value starts does not count.
        The first of a hyper is told by a `UserWarning`.
        """
        return map_tree(torch.clone, self._nested.pinned(self._state()))

    def eval_params(self) -> dict[str, Tensor]:
        """The weights to evaluate the model with, detached, by name: averages that the rules keep for it, else the parameters.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> model = torch.nn.Linear(2, 1)
            >>> ema = hn.ema(hn.sgd(), decay=0.9)
            >>> opt = hn.HyperOptimizer(model.named_parameters(), ema)
            >>> x = torch.ones(3, 2)
            >>> prediction = torch.func.functional_call(model, opt.eval_params(), x)
        """
        self._state()
        return {name: p.detach() for name, p in self._store.params.items()} | averages.averages(self._store, self._unaveraged)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the weights to evaluate or save the model with, as `eval_params` returns them, in the place of the parameters.

        For rules that keep averages, such as `schedule_free_adamw` and `ema`; with others it does nothing. `train` puts the parameters
        back, bit by bit, whatever was done to them meanwhile. Until then the state keeps them, one tensor more for each, also in what
        `state_dict` returns; and steps are errors. Trainers that call both, as that of Hugging Face, evaluate and save the averages.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = hn.HyperOptimizer(model.parameters(), hn.ema(hn.sgd(), decay=0.9))
            >>> opt.eval()
            >>> torch.save(model.state_dict(), "model.pt")  # doctest: +SKIP
            >>> opt.train()
        """
        self._state()
        if not self._evaluates and (new := averages.averages(self._store, self._unaveraged)):
            self._mind_changes(new.keys())
            averages.put_in(self._store, self.state, new)
            self._evaluates = True

    @torch.no_grad()
    def train(self) -> None:
        """Put the parameters back that `eval` has replaced; without that, it does nothing."""
        if self._evaluates:
            self._state()
            averages.take_out(self._store, self.state)
            self._evaluates = False

    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """The state dict of a model with the weights of `eval_params`: to be saved, or loaded into another model.

        Args:
            model: whose parameters are stepped. Its buffers, frozen parameters and further names of tied ones are in the result, too.

        Returns:
            The tensors, by the model's names; they are not copies.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> model, shadow = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
            >>> opt = hn.HyperOptimizer(model.parameters(), hn.ema(hn.sgd(), decay=0.9))
            >>> shadow.load_state_dict(opt.averaged_state_dict(model))
            <All keys matched successfully>
        """
        self._state()
        new = averages.averages(self._store, self._unaveraged)
        return averages.with_averages(model, {self._store.params[name]: average for name, average in new.items()})

    @property
    def _unaveraged(self) -> frozenset[str]:
        """Names of tensors whose averages are not begun yet."""
        return frozenset(self._store.fresh) if self.begins_at_first_step else frozenset()

    def _check_trains(self, call: str) -> None:
        """Refuse a call while averages are in the place of the parameters.

        Raises:
            RuntimeError: they are.
        """
        if self._evaluates:
            raise RuntimeError(f"{call}: averages are in the place of the parameters since eval(): call train() first")

    def _state(self) -> State:
        """The engine's state."""
        self._follow()
        return self._store.st

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.optim gives it; entries of tensors that no group holds any more are left out."""
        self._follow()
        held = {id(p) for group in self.param_groups for p in group["params"]}
        gone = {p: self.state.pop(p) for p in [*self.state] if isinstance(p, Tensor) and id(p) not in held}
        try:
            return super().state_dict()
        finally:
            self.state.update(gone)

    def torch_state_dict(self) -> dict[str, Any]:
        """The state as the class of torch.optim with the same rule loads it: learned values become numbers of the groups.

        `load_state_dict` takes what such a class has saved.

        Raises:
            ValueError: a value is learned per tensor, row or element, or a rule is not one of torch.optim, since it is in a combinator.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = hn.optim.AdamW(model.parameters(), lr=hn.learn(0.1, by=hn.sgd(1e-3)))
            >>> other = torch.optim.AdamW(model.parameters())
            >>> other.load_state_dict(opt.torch_state_dict())
            >>> other.param_groups[0]["lr"]
            0.1
        """
        return for_torch(self.state_dict(), self.hypers(), [[self._optimizers[name] for name in names] for names in self._roster.names])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in the dtypes that it has; continuing is bitwise what not stopping would have been.

        A state of the class of torch.optim with the same rule is loaded, too; what that does not have is as before the first step.

        Entries go to the tensors of their names where both sides have names, else by position. What learned hypers were declared as is
        loaded too, so that the learned values, and the factors that schedules have made, are those that were saved.

        Raises:
            ValueError: the state is not one of this optimizer with these parameters. Nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict={state_dict!r} must be what state_dict() of an optimizer returned")
        self._follow()
        handle = self.register_load_state_dict_pre_hook(lambda _, given: self._check_loadable(given))  # after all others
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
            self._plan = None

    def _check_loadable(self, given: dict[str, Any]) -> dict[str, Any]:
        """Make all that is to be loaded, apart from the optimizer; and what is left for torch to load."""
        loadable = matched(given, self.param_groups, [self._numbers_of(names) for names in self._roster.names])
        groups = loadable["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return loadable  # torch says so itself
        indices = [index for group in groups for index in group["params"]]
        names = [name for each in self._roster.names for name in each]
        entries = {name: loadable["state"].get(index, {}) for index, name in zip(indices, names, strict=True)}
        saved, trained = averages.parted(entries)
        optimizers = self._switched(groups)
        nested = Nested(optimizers, **self._how)
        tracked = {*self._store.params, *(name for name, entries in saved.items() if any(map(is_own, entries)))}
        start = built(nested, self._roster, tracked, {}, None)
        store = built(nested, self._roster, tracked, loaded(start, saved), None)
        chosen(self._backend, nested, store.tensors, sharded=bool(store.sharding))
        self._plan = self._roster, optimizers, store, averages.moved(trained, store.params)
        return {**loadable, "state": {key: entry for key, entry in loadable["state"].items() if key not in indices}}

    def __getstate__(self) -> dict[str, Any]:
        self._follow()
        own = ("_choice", "_how", "_learn_from", "_total_steps", "_backend", "_overrides", "_optimizers", "changed")
        tracked = [*self._store.params]
        own_state = {**{name: getattr(self, name) for name in own}, "_names": self._roster.names, "_tracked": tracked}
        return {**super().__getstate__(), **own_state}  # the rest is made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        names, tracked = state.get("_names"), state.get("_tracked")
        super().__setstate__({key: value for key, value in state.items() if key not in ("_names", "_tracked")})
        self.param_groups = [self._live(group) for group in self.param_groups]
        if self._plan is not None:  # torch calls this to load a state_dict
            roster, optimizers, store, trained = self._plan
            for name, param in store.params.items():
                averages.keep(self.state, param, trained.get(name))
            self._take(Roster(self.param_groups, roster.names), optimizers, store)
        elif names is not None and tracked is not None:  # a copy or an unpickled one
            self._programs, self._store, self._pinned = None, NO_STORE, PinnedValues(self.pinned_at_ends)
            roster = Roster(self.param_groups, names)
            nested = Nested(self._optimizers, **self._how)
            self._take(roster, self._optimizers, built(nested, roster, tracked, self.state, None))
