"""`HyperOptimizer`: the engine as a `torch.optim.Optimizer`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from hyperopt_nested.backends.choice import Backend, Programs, chosen
from hyperopt_nested.backends.step import ProgramStep
from hyperopt_nested.group import Numbers, pack, unpack, with_overrides
from hyperopt_nested.horizon import Curvature
from hyperopt_nested.joint_update import Hessian
from hyperopt_nested.kept_state import pairs, refs
from hyperopt_nested.learnable import Memory
from hyperopt_nested.learned import MODEL, number
from hyperopt_nested.nested import Nested
from hyperopt_nested.ops import State, map_tree
from hyperopt_nested.rule import FunctionRule, Learn, Optimizer
from hyperopt_nested.twice import loss_with_hessian

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]
Choice = Optimizer | Callable[[str, Tensor], Optimizer]


class HyperOptimizer(torch.optim.Optimizer):
    """A drop-in `torch.optim.Optimizer` whose hyper-parameters may be learned.

    `zero_grad`, `backward`, `step`, as ever. Learned values and all else that the engine remembers are plain tensors in `state`,
    made at construction, so that `state_dict`, `load_state_dict`, `deepcopy` and `pickle` keep them. Each group holds every hyper as
    a plain number (`beta1` and `beta2` as `betas`, as in torch.optim), which schedulers may change: that replaces the value of a
    hyper that is not learned; the effective value of a learned one is the learned value times the group's number over the declared
    value, so that a schedule and learning compose.

    Args:
        params: tensors, `(name, tensor)` pairs (`model.named_parameters()`), or groups of either: dicts with `params` and other values
            for some hypers. A number given for a learned hyper scales it in that group; a `learn(...)` makes the group learn its own.
        optimizer: what to run, or a function from a tensor's name and the tensor to what to run on it. Unnamed tensors are called
            `<group>.<index>`.
        memory: how the last update is remembered; see `Nested`.
        discount: in [0, 1]: 0 learns from the last update alone, 1 from all; see `Nested`.
        curvature: "none", or "exact", with which `step` takes a closure that returns the loss; see `Nested`.
        learn_from: "training": each step learns from the gradient that it is given. "validation": steps learn nothing; `hyper_step` does.
        memory_dtype: the dtype of what forward memory keeps; see `Nested`.
        state_dtype: the dtype of what rules keep; see `Nested`.
        backend: what runs the steps, with the same results up to rounding; see `Backend`.

    Raises:
        TypeError: `optimizer` is no optimizer of this library, or a tensor's dtype is not real floating-point.
        ValueError: a value is outside its domain, a learned hyper is not used, or a group names a hyper wrongly.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = hn.HyperOptimizer(model.named_parameters(), hn.adamw(lr=hn.learn(1e-3, by=hn.sgd(lr=1e-5))))
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     opt.step()
        >>> opt.hypers()["lr"]["group 0"].shape
        torch.Size([])
    """

    _elsewhere: frozenset[str] = frozenset()  # entries of rules' states that stay on devices of their own

    def __init__(
        self,
        params: Params,
        optimizer: Choice,
        *,
        memory: Memory = "auto",
        discount: float = 0.0,
        curvature: Curvature = "none",
        learn_from: Literal["training", "validation"] = "training",
        memory_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(optimizer, Optimizer) and not callable(optimizer):
            raise TypeError(
                f"optimizer={optimizer!r} ({type(optimizer).__name__}) must be an optimizer of this library, such as hn.adamw()"
            )
        if learn_from not in ("training", "validation"):
            raise ValueError(f"learn_from={learn_from!r} must be 'training' or 'validation'")
        self._choice, self._learn_from = optimizer, learn_from
        self._backend: Backend = backend
        self._programs: Programs | None = None
        self._program_step: ProgramStep | None = None
        dtypes = {"memory_dtype": memory_dtype, "state_dtype": state_dtype}
        self._how: dict[str, Any] = {"memory": memory, "discount": discount, "curvature": curvature, **dtypes}
        self._keys: list[list[str]] = []  # names of the tensors of each group
        self._optimizers: dict[str, Optimizer] = {}
        self._tracked: dict[str, None] = {}  # names of the tensors that have state
        self._refs: State = {}
        super().__init__(params, pack(optimizer.declared) if isinstance(optimizer, Optimizer) else {})
        self.defaults = {key: value for key, value in self.param_groups[0].items() if key not in ("params", "param_names")}
        self._create_state()

    @property
    def backend(self) -> str:
        """What runs the steps; "fused+reference" if native kernels do not take some tensors, for example."""
        return "reference" if self._program_step is None else self._program_step.backend

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch.optim; values that tensors share are the ones learned so far."""
        given = param_group["params"]
        entries = [given] if isinstance(given, Tensor) else list(given)
        index = len(self.param_groups)
        named = [entry if isinstance(entry, tuple) else (f"{index}.{i}", entry) for i, entry in enumerate(entries)]
        taken = [name for i, (name, _) in enumerate(named) if name in self._optimizers or name in [n for n, _ in named[:i]]]
        if taken:
            raise ValueError(f"params has two tensors named {taken[0]!r}; give each its own name")
        overrides = unpack({key: value for key, value in param_group.items() if key not in ("params", "param_names")})
        chosen = self._choose(named, overrides)
        declared: dict[str, float] = {}
        for name, optimizer in chosen.items():
            for hyper, value in optimizer.declared.items():
                if hyper not in overrides and declared.setdefault(hyper, value) != value:
                    raise ValueError(
                        f"group {index} has tensors with {hyper}={declared[hyper]!r} and {hyper}={value!r} (of {name!r}); "
                        "a group holds one number a hyper: put them into groups of their own"
                    )
        numbers = {key: value.value if isinstance(value, Learn) else value for key, value in overrides.items()}
        super().add_param_group({"params": entries, **pack({**declared, **numbers})})
        self._keys.append([name for name, _ in named])
        self._optimizers |= chosen
        if self._refs:
            self._create_state()

    def _choose(self, named: list[tuple[str, Tensor]], overrides: Mapping[str, Any]) -> dict[str, Optimizer]:
        """The optimizer of each tensor of a group, with the group's values."""
        replaced: dict[int, tuple[Optimizer, Optimizer]] = {}  # keeps what was replaced, so that its id stays its own
        chosen: dict[str, Optimizer] = {}
        for name, param in named:
            base = self._choice if isinstance(self._choice, Optimizer) else self._choice(name, param)
            if not isinstance(base, Optimizer):
                raise TypeError(f"optimizer({name!r}, tensor) returned {base!r}; it must return an optimizer of this library")
            if id(base) not in replaced:
                replaced[id(base)] = base, with_overrides(base, overrides)
            chosen[name] = replaced[id(base)][1]
        hypers = {hyper for optimizer in chosen.values() for hyper in optimizer.settings}
        options = {option for o in chosen.values() if isinstance(o.rule, FunctionRule) for option in o.rule.options}
        for key in overrides:
            if key in options:
                raise ValueError(
                    f"a group gives {key}={overrides[key]!r}, which is an option and not a hyper; to vary it, pass a function from "
                    "(name, tensor) to the optimizer as `optimizer`"
                )
            if key not in hypers and get_close_matches(key, hypers, cutoff=0.8):
                raise ValueError(f"a group gives {key!r}; did you mean {get_close_matches(key, hypers)[0]!r}?")
        return chosen

    def _named(self) -> Iterator[tuple[str, Tensor, Group]]:
        for names, group in zip(self._keys, self.param_groups, strict=True):
            for name, param in zip(names, group["params"], strict=True):
                yield name, param, group

    def _owner(self) -> dict[str, Tensor]:
        return {name: p for name, p, _ in self._named()}

    def _create_state(self, also: Iterable[str] = ()) -> None:
        """Create the state of all tensors that train, or are named in `also`; what is there already stays."""
        tracked = {*self._tracked, *also}
        params = {name: p.detach() for name, p, _ in self._named() if p.requires_grad or name in tracked}
        nested = Nested(self._optimizers, **self._how)
        st = nested.init(params)
        home = self._keys[0][0]
        found = refs(nested, st, home)
        owner = self._owner()
        for ref, leaf in pairs(found, st):
            self.state[owner[ref.name]].setdefault(ref.key, leaf)
        self._nested, self._refs, self._tracked = nested, found, dict.fromkeys(params)
        self._numbers, self._program_step, self._devices = Numbers(), None, dict[str, torch.device]()
        backend = chosen(self._backend, nested, params)
        if backend != "reference":
            self._programs = self._programs or Programs(backend, strict=self._backend != "auto")
            self._program_step = ProgramStep(nested, found, self._programs)

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """The state of each tensor, by name; moved, but for what has a place of its own, if the tensor has been."""
        found = {}
        for name, param, _ in self._named():
            state = found[name] = self.state.get(param, {})
            if self._devices.get(name) != param.device:
                state.update({key: leaf.to(self._place(param, key)) for key, leaf in state.items()})
                self._devices[name] = param.device
        return found

    def _place(self, param: Tensor, key: str) -> torch.device:
        """Where an entry of a tensor's state is kept."""
        kept = key.rpartition(".")[2] in self._elsewhere and key in self.state[param]
        found: torch.device = self.state[param][key].device if kept else param.device
        return found

    def _gather(self) -> State:
        states = self._states()
        return map_tree(lambda ref: states[ref.name][ref.key], self._refs)

    def _scatter(self, st: State) -> None:
        owner = self._owner()
        for ref, leaf in pairs(self._refs, st):
            self.state[owner[ref.name]][ref.key] = leaf

    def _values(self, *, as_tensors: bool = False) -> dict[str, Any]:
        """By tensor: the numbers that its group holds now, as tensors where they are not learned; or all of them as tensors that stay."""
        cache: dict[tuple[int, int, torch.device], Any] = {}
        found = {}
        for name, param, group in self._named():
            optimizer = self._optimizers[name]
            key = id(group), id(optimizer), param.device
            if key not in cache:
                numbers, learned = unpack(group), self._nested.learned_of(name)
                if as_tensors:
                    cache[key] = self._numbers.of(key, {hyper: numbers[hyper] for hyper in optimizer.settings}, param.device, learned)
                else:
                    cache[key] = {
                        hyper: numbers[hyper] if hyper in learned else number(numbers[hyper], param.device) for hyper in optimizer.settings
                    }
            found[name] = cache[key]
        return found

    def _switch_on(self, groups: list[Group]) -> None:
        """Where a schedule has made a zero hyper non-zero, create what state the rule then needs (a momentum buffer)."""
        changed = False
        for names, group in zip(self._keys, groups, strict=True):
            numbers, switched = unpack(group), {}
            for name in names:
                old = self._optimizers[name]
                if id(old) not in switched:
                    off = [hyper for hyper, setting in old.settings.items() if not isinstance(setting, Learn) and setting == 0]
                    on = {hyper: float(numbers[hyper]) for hyper in off if not isinstance(numbers[hyper], Tensor) and numbers[hyper] != 0}
                    switched[id(old)] = old, old.replace(**on) if on else old
                    changed = changed or bool(on)
                self._optimizers[name] = switched[id(old)][1]
        if changed:
            self._create_state()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the learned hypers, then the parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss. With `curvature="exact"` it must not call backward: the step
                differentiates the loss, twice, and leaves the gradients in `grad`.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: `curvature="exact"`, and there is no closure, or it returns no loss that can be differentiated.
            NotImplementedError: `curvature="exact"`, and an operation in the loss has no double backward; the message names it.
                Whatever is raised, nothing has been changed then.
        """
        loss = None
        found: dict[str, Tensor] | None = None
        hessian: Hessian | None = None
        if self._how["curvature"] == "exact":
            if closure is None:
                raise ValueError("closure=None, but curvature='exact' needs the loss: give step() a function that returns it")
            value, found, hessian = loss_with_hessian(closure, {name: p for name, p, _ in self._named() if p.requires_grad})
            loss = cast(float, value)  # as torch.optim declares what closures return
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads = self._owner(), self._grads(found)
        self._switch_on(self.param_groups)
        if unfrozen := [name for name in grads if name not in self._tracked]:
            self._create_state(also=unfrozen)
        learn = self._learn_from == "training"
        if self._step_by_programs(params, grads, learn):
            return loss
        now = {name: params[name].detach() for name in grads}
        new, st = self._nested.step(now, grads, self._gather(), self._values(), learn=learn, hessian=hessian)
        for name, value in new.items():
            params[name].copy_(value)
            params[name].grad = grads[name]
        self._scatter(st)
        return loss

    def _step_by_programs(self, params: dict[str, Tensor], grads: dict[str, Tensor], learn: bool) -> bool:
        """Step by programs, if there are any; whether that was done."""
        if self._program_step is not None:
            states, numbers = self._states(), self._values(as_tensors=True)
            if self._program_step.waits(getattr(self, "_taken", 0), params, grads, states, numbers, learn=learn):
                self._taken = getattr(self, "_taken", 0) + 1
                return False
            self._program_step.step(self._program_step.prepare(params, grads, states, numbers, learn=learn), grads, states)
        return self._program_step is not None

    @torch.no_grad()
    def hyper_step(self) -> None:
        """Step the learned hypers alone, from the gradients that the parameters have now: of a validation loss, after the last step.

        Only with `learn_from="validation"`: `step` on the training gradient, then `zero_grad`, `backward` on a validation loss, and this.

        Raises:
            RuntimeError: the optimizer learns from training gradients, or a gradient is sparse. Nothing has been changed then.
        """
        if self._learn_from != "validation":
            raise RuntimeError("this optimizer learns from training gradients, in step(): make it with learn_from='validation' to use this")
        grads = {name: grad for name, grad in self._grads().items() if name in self._tracked}
        self._scatter(self._nested.hyper_step({name: p.detach() for name, p, _ in self._named()}, grads, self._gather()))

    def _grads(self, found: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Those found, or else those that the parameters have."""
        grads = {name: p.grad for name, p, _ in self._named() if p.grad is not None} if found is None else dict(found)
        for name, grad in grads.items():
            if grad.layout != torch.strided:
                raise RuntimeError(f"the gradient of {name!r} is {grad.layout}; only dense gradients are supported: set sparse=False")
        return grads

    def hypers(self) -> dict[str, dict[str, Tensor]]:
        """Effective value of every learned hyper, a copy, on its device: nothing waits for the device until you read one.

        Returns:
            By hyper ("lr"; its learner's is "lr.lr", and so on): a value per model by group ("group 0"), others by tensor name.
            Values of learners go by the key of what they learn ("model" where all tensors share it).
        """
        st = self._gather()
        found = {path: map_tree(torch.clone, values) for path, values in self._nested.hypers(st).items()}
        where = {name: index for index, names in enumerate(self._keys) for name in names}
        for key, learned in self._nested.learned.items():
            found[key] = {}
            for name in self._tracked:
                for hyper, used in self._nested.learned_of(name).items():
                    if used is learned:
                        raw = st["hypers"][key][learned.key_of(name)]
                        label = f"group {where[name]}" if learned.key_of(name) == MODEL else name
                        found[key][label] = learned.value(raw, unpack(self.param_groups[where[name]])[hyper]).detach().clone()
        return found

    def rejected(self) -> dict[str, Tensor]:
        """How many entries of each learned hyper's hypergradient were NaN or infinite, and therefore skipped: shape () each."""
        return map_tree(torch.clone, self._nested.rejected(self._gather()))

    def evaluated(self) -> dict[str, Tensor]:
        """The weights to evaluate the model with, detached, by name: averages that the rules keep for it, else the parameters.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = hn.HyperOptimizer(model.named_parameters(), hn.ema(hn.sgd(), decay=0.9))
            >>> prediction = torch.func.functional_call(model, opt.evaluated(), torch.ones(3, 2))
        """
        st = self._gather()
        return self._nested.evaluated({name: p.detach() for name, p, _ in self._named() if name in st["rule"]}, st)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in the dtypes that it has; continuing is bitwise what not stopping would have been.

        Raises:
            ValueError: the state is not one of this optimizer with these parameters. Nothing has been changed then.
        """
        final: dict[str, Any] = {}

        def capture(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            self._check_loadable(loaded)
            final.update(loaded)

        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for (_, p, _), index in zip(self._named(), _indices(final), strict=True):
            if index in final["state"]:  # torch has rounded these to the parameter's dtype
                self.state[p] = {key: leaf.detach().clone().to(self._place(p, key)) for key, leaf in final["state"][index].items()}

    def _check_loadable(self, loaded: dict[str, Any]) -> None:
        if [len(g["params"]) for g in loaded["param_groups"]] != [len(g["params"]) for g in self.param_groups]:
            return  # torch says so itself
        self._switch_on(loaded["param_groups"])
        saved = [loaded["state"].get(index, {}) for index in _indices(loaded)]
        frozen_here = [
            name for (name, p, _), state in zip(self._named(), saved, strict=True) if state.keys() - self.state.get(p, {}).keys()
        ]
        self._create_state(also=frozen_here)
        for (name, p, _), state in zip(self._named(), saved, strict=True):
            own = self.state.get(p, {})
            if state.keys() != own.keys():
                odd = sorted(state.keys() ^ own.keys())
                raise ValueError(
                    f"state_dict does not fit {name!r}: {odd[0]!r} is only in {'it' if odd[0] in state else 'this optimizer'}; "
                    "build the optimizer with the same arguments as the one that was saved"
                )
            for key, leaf in state.items():
                if leaf.shape != own[key].shape:
                    raise ValueError(f"state_dict does not fit {name!r}: {key} has shape {tuple(leaf.shape)}, not {tuple(own[key].shape)}")

    def __getstate__(self) -> dict[str, Any]:
        own = ("_choice", "_elsewhere", "_how", "_learn_from", "_backend", "_keys", "_optimizers", "_tracked")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}  # programs are made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_optimizers" in state:  # a copy or an unpickled one; torch also calls this to load a state_dict
            self._programs = None
            self._create_state()


def _indices(state_dict: Mapping[str, Any]) -> list[Any]:
    return [index for group in state_dict["param_groups"] for index in group["params"]]
