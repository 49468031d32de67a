"""Hypergradients of modules are derivatives of the loops that users write: the right values are finite differences of HyperOptimizer's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import hyperopt_nested as hn

AGREE = 1e-6  # of central differences in float64
RULES: dict[str, Callable[[Any], hn.Optimizer]] = {
    "sgd": lambda lr: hn.sgd(lr=lr, momentum=0.9),
    "adamw": lambda lr: hn.adamw(lr=lr, weight_decay=0.1, eps=1e-3),
    "ema": lambda lr: hn.ema(hn.sgd(lr=lr, momentum=0.5), decay=0.7),
    "lookahead": lambda lr: hn.lookahead(hn.adam(lr=lr, eps=1e-3), k=2),
    "clipped": lambda lr: hn.clip_by_global_norm(hn.sgd(lr=lr, momentum=0.9), max_norm=0.5),
    "prodigy": lambda lr: hn.prodigy(lr=lr, d0=0.1, eps=1e-3),
    "schedule-free": lambda lr: hn.schedule_free_sgd(lr=lr),
}
METHODS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "sqrt": {"memory": "sqrt"},
    "one": {"memory": 1},
    "forward": {"method": "forward"},
}


class Loop:
    """Training of a module, as users write it, and as a hypergradient takes it.

    Args:
        make: makes the module.
        batches: what each step sees.
        evaluation: whether the outer loss is taken in evaluation mode.
        forward: from a callable, the module or what `hn.functional` made of it, and a batch, to a prediction.
    """

    def __init__(self, make: Any, batches: Any, *, evaluation: bool = False, forward: Any = None, lr: float = 0.1, **how: Any) -> None:
        self.make, self.batches, self.lr, self.evaluation = make, list(batches), lr, evaluation
        self.forward = forward or (lambda call, batch: call(batch))
        self.training, self.evaluating = hn.functional(self.net(), **how), hn.functional(self.net().train(not evaluation), **how)

    def net(self) -> nn.Module:
        """The module as it is at first."""
        torch.manual_seed(0)
        net: nn.Module = self.make()
        if any(isinstance(each, nn.LazyLinear) for each in net.modules()):
            net.eval()(self.batches[0])
        return net.train()

    def train_loss(self, params: Any, batch: Any) -> Tensor:
        return self.forward(lambda *inputs: self.training(params, *inputs), batch).square().mean()

    def outer_loss(self, params: Any, batch: Any, hypers: Any) -> Tensor:
        outputs = [self.forward(lambda *inputs: self.evaluating(params, *inputs), each) for each in self.batches[:2]]
        return sum((out - 0.3).square().mean() for out in outputs)  # type: ignore[return-value]

    def end(self, rule: Any, lr: float) -> float:
        """The outer loss after training, by hand."""
        net = self.net()
        torch.manual_seed(5)
        opt = hn.HyperOptimizer(net.named_parameters(), rule(lr), backend="reference")
        for batch in self.batches:
            opt.zero_grad()
            self.forward(net, batch).square().mean().backward()
            opt.step()
        if self.evaluation:
            net.eval()
        return sum((self.forward(net, each) - 0.3).square().mean() for each in self.batches[:2]).item()  # type: ignore[union-attr]

    def difference(self, rule: Any) -> float:
        h = 1e-4 * self.lr
        wide, narrow = ((self.end(rule, self.lr + step) - self.end(rule, self.lr - step)) / (2 * step) for step in (2 * h, h))
        return (4 * narrow - wide) / 3

    def found(self, rule: Any, **how: Any) -> float:
        torch.manual_seed(5)
        optimizer = rule(hn.learn(self.lr, by=hn.sgd()))
        result = hn.hypergradient(optimizer, self.training.params, self.batches, self.train_loss, self.outer_loss, **how)
        return result["lr"]["model"].item()

    def check(self, rule: Any, methods: Any = METHODS) -> None:
        right = self.difference(rule)
        assert abs(right) > 1e-5
        for name in methods:
            assert self.found(rule, **METHODS[name]) == pytest.approx(right, rel=AGREE, abs=1e-9), name


def batches(*shape: int, steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator) * 2 + 1 for _ in range(steps)]


class Heads(nn.Module):
    """Two heads, used by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return getattr(self, head)(torch.tanh(self.body(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", RULES)
def test_layers_without_a_gradient_are_left_alone(rule: str) -> None:
    order = zip(batches(6, 3, steps=6), ["a", "b", "b", "a", "b", "b"], strict=True)
    Loop(Heads, order, forward=lambda call, batch: call(*batch)).check(RULES[rule])


class Block(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.net, self.use_reentrant = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3)), use_reentrant
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.net, self.first(x), use_reentrant=self.use_reentrant))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(x)))  # type: ignore[no-any-return]


class Own(nn.Module):
    """A running scale in a buffer, as authors write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(3, 1), how
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.training:
            self.count += 1
            with torch.no_grad():
                if self.how == "in place":
                    self.scale.mul_(0.9).add_(h.square().mean(), alpha=0.1)
                elif self.how == "assigned":
                    self.scale = 0.9 * self.scale + 0.1 * h.square().mean()
                else:  # of the inputs alone
                    self.scale.mul_(0.9).add_(x.square().mean(), alpha=0.1)
        return h / self.scale.sqrt()  # type: ignore[no-any-return]


def norm(layer: nn.Module, *, first: nn.Module | None = None, last: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(first or nn.Linear(3, 4), layer, nn.Tanh(), last or nn.Linear(4, 1))


def frozen(net: nn.Module) -> nn.Module:
    """With its second layer in evaluation mode for ever."""
    net[1].training, net[1].train = False, lambda mode=True: net[1]  # type: ignore[method-assign, index, misc]
    net[1].running_mean.add_(0.2)  # type: ignore[index]
    return net


def untracked(net: nn.Module) -> nn.Module:
    net[0].weight.requires_grad_(False)  # type: ignore[index]
    return net


def convolution(layer: nn.Module, dims: int) -> nn.Module:
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(conv(2, 3, 2), layer, nn.Softplus(), nn.Flatten(), nn.LazyLinear(1))


VECTORS, TOKENS = (6, 3), torch.tensor([[1, 0, 2, 5], [3, 3, 0, 1]])
MODULES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "checkpoint": (lambda: Block(use_reentrant=False), VECTORS),
    "checkpoint, reentrant": (lambda: Block(use_reentrant=True), VECTORS),
    "spectral norm": (lambda: norm(nn.Tanh(), first=parametrizations.spectral_norm(nn.Linear(3, 4))), VECTORS),
    "spectral norm, hook": (lambda: norm(nn.Tanh(), first=nn.utils.spectral_norm(nn.Linear(3, 4), n_power_iterations=2)), VECTORS),
    "spectral norm, dim": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.ConvTranspose1d(2, 3, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(15, 1)),
        (6, 2, 4),
    ),
    "weight norm": (lambda: norm(nn.Tanh(), first=parametrizations.weight_norm(nn.Linear(3, 4))), VECTORS),
    "weight norm, hook": (lambda: norm(nn.Tanh(), first=nn.utils.weight_norm(nn.Linear(3, 4))), VECTORS),
    "tied, padded": (Tied, TOKENS),
    "batch norm": (lambda: norm(nn.BatchNorm1d(4)), VECTORS),
    "batch norm, cumulative": (lambda: norm(nn.BatchNorm1d(4, momentum=None)), VECTORS),
    "batch norm, momentum": (lambda: norm(nn.BatchNorm1d(4, momentum=0.4, affine=False)), VECTORS),
    "batch norm, no statistics": (lambda: norm(nn.BatchNorm1d(4, track_running_stats=False)), VECTORS),
    "batch norm, frozen": (lambda: frozen(norm(nn.BatchNorm1d(4))), VECTORS),
    "batch norm of inputs": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), VECTORS),
    "batch norm, sequences": (lambda: convolution(nn.BatchNorm1d(3), 1), (4, 2, 4)),
    "batch norm 2d": (lambda: convolution(nn.BatchNorm2d(3), 2), (4, 2, 3, 3)),
    "batch norm 3d": (lambda: convolution(nn.BatchNorm3d(3), 3), (3, 2, 3, 3, 2)),
    "instance norm": (lambda: convolution(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), 2), (4, 2, 4, 4)),
    "transformer": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.3, nn.functional.gelu, batch_first=True), nn.Linear(4, 1)
        ),
        (3, 5, 3),
    ),
    "dropout": (lambda: norm(nn.Dropout(0.4)), VECTORS),
    "frozen weight": (lambda: untracked(norm(nn.BatchNorm1d(4))), VECTORS),
    "buffer of inputs": (lambda: Own("inputs"), VECTORS),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_modules(module: str, evaluation: bool) -> None:
    make, shape = MODULES[module]
    seen = [shape] * 5 if isinstance(shape, Tensor) else batches(*shape)
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivatives
        Loop(make, seen, evaluation=evaluation).check(RULES["sgd"])


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_buffers_that_autograd_does_not_see_are_right_forward_and_refused_in_reverse(how: str) -> None:
    loop = Loop(lambda: Own(how), batches(*VECTORS))
    loop.check(RULES["sgd"], ["forward"])
    for method in ("reverse", "sqrt"):
        with pytest.raises(
            NotImplementedError, match=r"module '' \(Own\) changes its buffer 'scale' outside of autograd.*method='forward'"
        ):
            loop.found(RULES["sgd"], **METHODS[method])


def statistics(evaluation: bool = True, **how: Any) -> Loop:
    return Loop(lambda: norm(nn.BatchNorm1d(4)), batches(*VECTORS), evaluation=evaluation, **how)


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_reach_functions_by_the_tensors_that_they_are_called_with(method: str) -> None:
    """Copies of the mapping, other prefixes and computed tensors are recognized."""
    loop = statistics()
    right = loop.difference(RULES["sgd"])
    training, evaluating = loop.training, loop.evaluating
    prefixed = {f"net.{name}": p for name, p in training.params.items()}
    views: dict[str, tuple[Any, Any]] = {
        "copies": (training.params, lambda params: dict(params)),
        "prefix": (prefixed, lambda params: {name.removeprefix("net."): p for name, p in params.items()}),
        "computed": (training.params, lambda params: {name: 1.0 * p for name, p in params.items()}),
    }
    for how, (params, view) in views.items():

        def train(params: Any, batch: Any, view: Any = view) -> Tensor:
            return training(view(params), batch).square().mean()

        def outer(params: Any, batch: Any, hypers: Any, view: Any = view) -> Tensor:
            return sum((evaluating(view(params), each) - 0.3).square().mean() for each in loop.batches[:2])  # type: ignore[return-value]

        optimizer = RULES["sgd"](hn.learn(0.1, by=hn.sgd()))
        found = hn.hypergradient(optimizer, params, loop.batches, train, outer, **METHODS[method])["lr"]["model"]
        assert found.item() == pytest.approx(right, rel=AGREE), how


def test_statistics_that_cannot_be_told_are_refused() -> None:
    loop = statistics()
    params = {f"net.{name}": p for name, p in loop.training.params.items()}

    def view(params: Any) -> Any:
        return {name.removeprefix("net."): p * 1.0 for name, p in params.items()}

    def train(params: Any, batch: Any) -> Tensor:
        return loop.training({name.removeprefix("net."): p for name, p in params.items()}, batch).square().mean()  # type: ignore[no-any-return]

    def outer(params: Any, batch: Any, hypers: Any) -> Tensor:
        return loop.evaluating(view(params), loop.batches[0]).square().mean()  # type: ignore[no-any-return]

    for method in ("reverse", "forward"):
        with pytest.raises(ValueError, match=r"were computed from params.*buffers='fixed'"):
            hn.hypergradient(RULES["sgd"](hn.learn(0.1, by=hn.sgd())), params, loop.batches, train, outer, method=method)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_another_model_of_the_same_names_keeps_its_own_statistics(method: str) -> None:
    student, teacher = statistics(), norm(nn.BatchNorm1d(4)).train()
    teacher(torch.randn(9, 3))
    target = hn.functional(teacher.eval())

    def end(lr: float) -> float:
        net = student.net()
        opt = torch.optim.SGD(net.parameters(), lr=lr)
        for batch in student.batches:
            opt.zero_grad()
            (net(batch) - teacher(batch).detach()).square().mean().backward()
            opt.step()
        net.eval()
        return sum((net(each) - 0.3).square().mean() for each in student.batches[:2]).item()  # type: ignore[union-attr]

    def train(params: Any, batch: Any) -> Tensor:
        return (student.training(params, batch) - target(target.params, batch)).square().mean()  # type: ignore[no-any-return]

    optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))
    found = hn.hypergradient(optimizer, student.training.params, student.batches, train, student.outer_loss, **METHODS[method])
    assert found["lr"]["model"].item() == pytest.approx((end(0.1 + 1e-6) - end(0.1 - 1e-6)) / 2e-6, rel=AGREE)


def test_several_calls_in_a_step_follow_each_other() -> None:
    def twice(call: Any, batch: Tensor) -> Tensor:
        return torch.cat([call(batch[:3]), call(batch[3:])])

    for make in (MODULES["batch norm, cumulative"][0], MODULES["spectral norm"][0]):
        Loop(make, batches(*VECTORS), evaluation=True, forward=twice).check(RULES["adamw"])


def test_a_horizon_and_a_start_from_statistics_of_the_module() -> None:
    """With a horizon, the steps before it change the statistics too; a hypergradient does not change the function's."""
    loop = statistics()
    whole = loop.found(RULES["sgd"])
    assert loop.found(RULES["sgd"]) == whole
    assert loop.found(RULES["sgd"], horizon=5) == pytest.approx(whole, rel=1e-12)
    parts = [loop.found(RULES["sgd"], horizon=2, **how) for how in METHODS.values()]
    assert parts == pytest.approx([parts[0]] * len(parts), rel=1e-9)
    assert abs(parts[0] - whole) > 1e-3 * abs(whole)


def test_fixed_buffers_stay() -> None:
    loop = statistics(buffers="fixed")
    values = [loop.found(RULES["sgd"], **how) for how in METHODS.values()]
    assert values == pytest.approx([values[0]] * len(values), rel=1e-9)
    assert values[0] != pytest.approx(statistics().found(RULES["sgd"]), rel=1e-2)
    with pytest.raises(ValueError, match="buffers='kept' must be one of 'carried', 'fixed'"):
        hn.functional(nn.Linear(1, 1), buffers="kept")  # type: ignore[arg-type]


def test_a_function_of_a_module_is_pure() -> None:
    for name in ("spectral norm", "spectral norm, hook", "batch norm", "instance norm", "buffer of inputs"):
        make, shape = MODULES[name]
        net = make()
        x = batches(*shape)[0]
        if any(isinstance(each, nn.LazyLinear) for each in net.modules()):
            net.eval()(x)
        net.train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        f = hn.functional(net)
        first = f(f.params, x)
        assert torch.equal(f(f.params, x), first), name
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()), name
        torch.testing.assert_close(first, net(x))


def test_modules_that_left_a_graph_in_an_attribute_can_be_made_functions() -> None:
    net = nn.utils.spectral_norm(nn.Linear(3, 4))
    x = torch.ones(1, 3)
    net(x)
    f = hn.functional(net)
    torch.testing.assert_close(f(f.params, x), net(x))


def test_implicit_says_what_it_does_not_carry() -> None:
    optimizer = hn.sgd(lr=0.01, weight_decay=hn.learn(0.1, by=hn.sgd()))
    for loop, words in (
        (statistics(), r"outer_loss normalizes by '1.running_mean', which method='implicit' does not carry"),
        (Loop(MODULES["spectral norm"][0], batches(*VECTORS)), r"train_loss changes the buffer .*_u', which method='implicit'"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            hn.hypergradient(optimizer, loop.training.params, loop.batches[:1], loop.train_loss, loop.outer_loss, method="implicit")


@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_statistics_that_the_same_step_has_changed_are_refused(method: Any) -> None:
    loop = statistics()

    def train(params: Any, batch: Any) -> Tensor:
        return (loop.training(params, batch) - loop.evaluating(params, batch)).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(NotImplementedError, match=r"train_loss changes '1.running_mean' in training mode, and then uses it"):
        hn.hypergradient(
            RULES["sgd"](hn.learn(0.1, by=hn.sgd())), loop.training.params, loop.batches, train, loop.outer_loss, method=method
        )


def test_statistics_of_earlier_steps_may_enter_a_training_loss() -> None:
    loop = statistics()

    def train(params: Any, batch: Any) -> Tensor:
        return (loop.evaluating(params, batch) + loop.training(params, batch)).square().mean()  # type: ignore[no-any-return]

    def end(lr: float) -> float:
        net = loop.net()
        opt = torch.optim.SGD(net.parameters(), lr=lr)
        for batch in loop.batches:
            opt.zero_grad()
            before = {name: value.clone() for name, value in net.named_buffers()}
            evaluated = torch.func.functional_call(net.eval(), before, batch)
            (evaluated + net.train()(batch)).square().mean().backward()
            opt.step()
        net.eval()
        return sum((net(each) - 0.3).square().mean() for each in loop.batches[:2]).item()  # type: ignore[union-attr]

    right = (end(0.01 + 1e-6) - end(0.01 - 1e-6)) / 2e-6
    for how in METHODS.values():
        found = hn.hypergradient(hn.sgd(lr=hn.learn(0.01, by=hn.sgd())), loop.training.params, loop.batches, train, loop.outer_loss, **how)[
            "lr"
        ]["model"]
        assert found.item() == pytest.approx(right, rel=AGREE)


def test_a_power_iteration_on_computed_weights_is_refused_in_reverse() -> None:
    loop = Loop(MODULES["spectral norm"][0], batches(*VECTORS))

    def train(params: Any, batch: Any) -> Tensor:
        return loop.training({name: 2 * p for name, p in params.items()}, batch).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(NotImplementedError, match="spectral_norm of a weight that is computed from params"):
        hn.hypergradient(RULES["sgd"](hn.learn(0.1, by=hn.sgd())), loop.training.params, loop.batches, train, loop.outer_loss)


class Follower(nn.Module):
    """A frozen copy that follows the layer, as momentum encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.copy = nn.Linear(3, 1), nn.Linear(3, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.copy.parameters(), self.layer.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return self.layer(x) - self.copy(x)  # type: ignore[no-any-return]


class Clipped(nn.Module):
    """Weights that the module clips itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layer.weight.clamp_(-0.1, 0.1)
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_clips_its_weights_is_refused(method: str) -> None:
    loop = Loop(Clipped, batches(*VECTORS))
    before = {name: p.clone() for name, p in loop.training.params.items()}
    with pytest.raises((NotImplementedError, RuntimeError), match=r"changes its parameter 'layer.weight' in place|mutate|in-place"):
        loop.found(RULES["sgd"], **METHODS[method])
    assert all(torch.equal(p, before[name]) for name, p in loop.training.params.items())


def test_a_module_that_moves_frozen_parameters_is_refused() -> None:
    loop = Loop(Follower, batches(*VECTORS))
    with pytest.raises(NotImplementedError, match=r"changes its parameter 'copy.weight' in place"):
        loop.found(RULES["sgd"])


def test_a_function_may_be_called_without_gradients() -> None:
    f = hn.functional(norm(nn.BatchNorm1d(4)))
    x, expected = torch.randn(5, 3), f(f.params, torch.ones(5, 3))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(f(f.params, torch.ones(5, 3)), expected.detach())
            assert not f(f.params, x).requires_grad


def test_what_changes_parameters_in_place_is_refused() -> None:
    for layer in (nn.Embedding(4, 2, max_norm=1.0), nn.EmbeddingBag(4, 2, max_norm=1.0)):
        with pytest.raises(NotImplementedError, match=rf"module '0' \({type(layer).__name__}\) has max_norm=1.0.*set max_norm=None"):
            hn.functional(nn.Sequential(layer, nn.Linear(2, 1)))
    with pytest.raises(TypeError, match=r"module=5 \(int\) must be a torch.nn.Module"):
        hn.functional(5)  # type: ignore[arg-type]


def test_sparse_gradients_are_refused() -> None:
    f = hn.functional(nn.Sequential(nn.Embedding(6, 2, sparse=True), nn.Linear(2, 1)))

    def loss(params: Any, batch: Any, hypers: Any = None) -> Tensor:
        return f(params, TOKENS).square().mean()  # type: ignore[no-any-return]

    with pytest.raises((RuntimeError, NotImplementedError), match=r"the gradient of '0.weight' is torch.sparse_coo"):
        hn.hypergradient(RULES["sgd"](hn.learn(0.1, by=hn.sgd())), f.params, range(2), loss, loss)


def test_checkpointing_is_as_before_afterwards() -> None:
    calls = []
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    loop = Loop(lambda: Block(use_reentrant=False), batches(*VECTORS))
    loop.found(RULES["sgd"])
    with pytest.raises(ZeroDivisionError):
        hn.hypergradient(RULES["sgd"](hn.learn(0.1, by=hn.sgd())), {"w": torch.ones(1)}, [0], lambda p, b: 1 // 0, loop.outer_loss)
    checkpoint(layer, torch.ones(1, 3), use_reentrant=False).sum().backward()
    assert len(calls) == 2


def test_many_rates_at_once_with_statistics() -> None:
    loop = statistics()
    optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))

    def slope(rate: Tensor, **how: Any) -> Tensor:
        given = {"lr": {"model": rate}}
        found = hn.hypergradient(optimizer, loop.training.params, loop.batches, loop.train_loss, loop.outer_loss, hypers=given, **how)
        return found["lr"]["model"]

    rates = torch.tensor([0.05, 0.1])
    together = torch.func.vmap(lambda rate: slope(rate, method="forward"))(rates)
    assert together[1].item() == pytest.approx(slope(rates[1]).item(), rel=1e-9)


def test_an_audit_of_a_model_with_statistics() -> None:
    loop = statistics(evaluation=False)
    optimizer = RULES["sgd"](hn.learn(0.1, by=hn.sgd()))
    rows = hn.audit(
        optimizer, loop.training.params, loop.batches, loop.train_loss, loop.outer_loss, horizons=[hn.Discounted(1.0, curvature="exact")]
    ).rows
    assert all((row.cosine, row.magnitude) == pytest.approx((1, 1), rel=1e-9) for row in rows)


@pytest.mark.parametrize("layer", ["group", "batch", "layer"])
def test_derivatives_of_hypergradients_are_right_or_refused(layer: str) -> None:
    """Torch's third derivatives of batch and layer normalization are wrong."""
    make = {"group": lambda: nn.GroupNorm(2, 4), "batch": lambda: nn.BatchNorm1d(4), "layer": lambda: nn.LayerNorm(4)}[layer]
    loop = Loop(lambda: norm(make()), batches(*VECTORS))
    optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))

    def slope(rate: Tensor, **how: Any) -> Tensor:
        given = {"lr": {"model": rate}}
        found = hn.hypergradient(optimizer, loop.training.params, loop.batches, loop.train_loss, loop.outer_loss, hypers=given, **how)
        return found["lr"]["model"]

    rate = torch.tensor(0.02, requires_grad=True)
    if layer != "group":
        with pytest.raises(NotImplementedError, match="NormBackward, whose derivative of order 3 is wrong in torch"):
            slope(rate, create_graph=True)
        return
    (second,) = torch.autograd.grad(slope(rate, create_graph=True), rate)
    difference = (slope(torch.tensor(0.02 + 1e-5)) - slope(torch.tensor(0.02 - 1e-5))) / 2e-5
    assert second.item() == pytest.approx(difference.item(), rel=1e-6)


def test_derivatives_of_hypergradients_need_all_steps_in_memory() -> None:
    loop = statistics()
    for how in ({"memory": "sqrt"}, {"memory": 2}, {"method": "forward"}, {"method": "implicit"}):
        with pytest.raises(ValueError, match=r"create_graph=True needs method='reverse' and memory='full'"):
            loop.found(RULES["sgd"], create_graph=True, **how)


@hn.rule(lambda param: {"count": torch.zeros((), dtype=torch.long), "m": torch.zeros_like(param)})
def counting(param: Tensor, grad: Tensor, state: Any, *, lr: Tensor = hn.Positive(0.1)) -> Any:
    count, m = state["count"] + 1, 0.9 * state["m"] + grad
    return param - lr * m / count, {"count": count, "m": m}


def test_a_rule_may_count_in_integers() -> None:
    Loop(lambda: norm(nn.Tanh()), batches(*VECTORS)).check(lambda lr: counting(lr=lr))


def test_what_a_loss_computes_without_gradients_is_a_constant_in_reverse_only() -> None:
    """The documented difference: forward agrees with the loop."""
    x, start = torch.randn(5, 3), {"w": torch.tensor([0.3, -0.2, 0.5])}

    def train(params: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            scale = params["w"].square().sum()
        return (scale * (x @ params["w"]) - 1).square().mean()

    def outer(params: Any, batch: Any, hypers: Any) -> Tensor:
        return (x @ params["w"]).square().mean()

    def end(lr: float) -> float:
        w = start["w"].clone().requires_grad_()
        opt = torch.optim.SGD([w], lr=lr)
        for _ in range(4):
            opt.zero_grad()
            train({"w": w}, None).backward()
            opt.step()
        return outer({"w": w}, None, None).item()

    right = (end(0.1 + 1e-6) - end(0.1 - 1e-6)) / 2e-6
    optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))
    reverse, forward = (hn.hypergradient(optimizer, start, range(4), train, outer, method=m)["lr"]["model"] for m in ("reverse", "forward"))  # type: ignore[arg-type]
    assert forward.item() == pytest.approx(right, rel=AGREE)
    assert reverse.item() != pytest.approx(right, rel=1e-3)


def test_weight_norm_outside_of_a_function_is_refused_where_it_would_be_wrong() -> None:
    net = norm(nn.Tanh(), first=parametrizations.weight_norm(nn.Linear(3, 4)))
    params, (x, *_) = dict(net.named_parameters()), batches(*VECTORS)

    def loss(params: Any, batch: Any, hypers: Any = None) -> Tensor:
        return torch.func.functional_call(net, params, x).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(NotImplementedError, match="uses WeightNormInterfaceBackward, whose derivative of order 2 is wrong"):
        hn.hypergradient(RULES["sgd"](hn.learn(0.1, by=hn.sgd())), params, range(3), loss, loss)
    opt = hn.HyperOptimizer(params.items(), RULES["sgd"](hn.learn(0.1, by=hn.sgd())), horizon=hn.Discounted(1.0, curvature="exact"))
    with pytest.raises(NotImplementedError, match="uses WeightNormInterfaceBackward"):
        opt.step(lambda: loss(params, None))
