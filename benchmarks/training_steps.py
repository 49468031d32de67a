"""Time and peak memory of whole training steps, of ours and of the published program of the towers, against torch.optim.Adam's.

A step is zero_grad, forward, backward and step of a perceptron (tanh, cross-entropy) on fixed random data. Every round times each
candidate once, in turn; ratios are to Adam's time in the same round. Peaks are of tensors, and exact: those of a step above what was there
before it; those of training above what was there before model and optimizer were made, which has all that is kept too. Before that, in
float64 and on a small perceptron, trajectories of parameters and learned values are compared with those of the published program.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import Allocations, all_met, bars, compared, peak, report, seconds
from torch import Tensor
from torch.nn.functional import cross_entropy

import hyperopt_nested as hn

PUBLISHED = "gradient-descent-the-ultimate-optimizer"
try:
    from gradient_descent_the_ultimate_optimizer import gdtuo
except ImportError as error:
    gdtuo, missing = None, f"{PUBLISHED} cannot be imported ({error})"

WIDTHS, BATCH = (784, 1024, 1024, 10), 256
SMALL, FEW, STEPS, EXACT = (8, 16, 16, 4), 32, 20, 1e-12
WARM, MB = 3, 1e6

A, B, C = "lr by SGD", "lr, beta1, beta2 by Adam", "lr by SGD by SGD"
VARIANTS = (A, B, C)
NOTHING, ADAM, FUSED = "nothing", "torch.optim.Adam", "torch.optim.Adam (fused)"
AUTO, FOREACH = "ours, auto", "ours, foreach"
BACKENDS: dict[str, Any] = {AUTO: "auto", FOREACH: "foreach", "ours, reference": "reference"}
COMPARED: tuple[Any, ...] = ("fused", "compile", "foreach", "reference")  # on the small perceptron
GRAPHS = {"published": True, "published, no create_graph": False}
SLOWEST = {A: 1.1, B: 1.25, C: 1.25}
LARGEST = 1.5

Key = tuple[str, str]  # variant and name
Rows = list[dict[str, Any]]
Rates = tuple[float, float]  # of the learner, and of the learner's learner
RATES: Rates = (1e-7, 1e-13)  # small, so that all train alike
SMALL_RATES: Rates = (1e-5, 1e-9)  # large, so that a difference would show

TANH = hn.Bijection(
    "tanh",
    lambda x: (torch.tanh(x) + 1) / 2,
    lambda value: torch.atanh(2 * value - 1),
    lambda info: (math.log(info.eps) / 2, -math.log(info.eps) / 2),
    interval=True,
)
Step = Callable[[], Any]
Loss = Callable[[Callable[[Tensor], Tensor]], Tensor]


def second_moment_at_eps(param: Tensor) -> hn.typing.State:
    state = hn.rules.counted("exp_avg", "exp_avg_sq")(param)
    return {**state, "exp_avg_sq": state["exp_avg_sq"] + 1e-8}


@hn.rule(second_moment_at_eps, separable="element")
def adam_from_eps(
    param: Tensor,
    grad: Tensor,
    state: hn.typing.State,
    *,
    lr: Tensor = hn.NonNegative(1e-3),
    beta1: Tensor = hn.UnitInterval(0.9, via=TANH),
    beta2: Tensor = hn.UnitInterval(0.999, via=TANH),
    eps: Tensor = hn.Positive(1e-8),
) -> tuple[Tensor, hn.typing.State]:
    """Adam as the published program has it: the second moment starts at eps, betas are learned through tanh."""
    new = hn.rules.moments(grad, state, beta1, beta2)
    return param - lr * hn.rules.direction(new["step"], new["exp_avg"], new["exp_avg_sq"], beta1, beta2, eps), new


def ours(variant: str, rates: Rates = RATES) -> hn.Optimizer:
    lr, lr_of_lr = rates
    if variant == B:
        by = adam_from_eps(lr)
        return adam_from_eps(hn.learn(1e-3, by), beta1=hn.learn(0.9, by), beta2=hn.learn(0.999, by))
    by = hn.sgd(hn.learn(lr, hn.sgd(lr_of_lr)) if variant == C else lr)
    return adam_from_eps(hn.learn(1e-3, by))


def published(variant: str, rates: Rates = RATES) -> Any:
    lr, lr_of_lr = rates
    if variant == B:
        return gdtuo.Adam(optimizer=gdtuo.Adam(lr))
    by = gdtuo.SGD(lr, optimizer=gdtuo.SGD(lr_of_lr)) if variant == C else gdtuo.SGD(lr)
    return gdtuo.AdamBaydin(optimizer=by)


def published_hypers(optimizer: Any) -> dict[str, Tensor]:
    """Learned values at every height of the tower, called as ours are."""
    if isinstance(optimizer.optimizer, gdtuo.NoOpOptimizer):
        return {}
    found = {"lr": optimizer.parameters["alpha"]}
    found |= {name: gdtuo.Adam.clamp(optimizer.parameters[name]) for name in ("beta1", "beta2") if name in optimizer.parameters}
    return found | {f"lr.{name}": value for name, value in published_hypers(optimizer.optimizer).items()}


def perceptron(widths: Sequence[int]) -> torch.nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (torch.nn.Linear(a, b), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers[:-1])


def draw(widths: Sequence[int], batch: int) -> Loss:
    x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
    return lambda model: cross_entropy(model(x), y)


def stepping(opt: torch.optim.Optimizer, model: torch.nn.Module, loss: Loss) -> Step:
    def step() -> None:
        opt.zero_grad()
        loss(model).backward()
        opt.step()

    return step


def stepping_published(wrapper: Any, loss: Loss, create_graph: bool = True) -> Step:
    def step() -> None:
        wrapper.begin()
        value = loss(wrapper.forward)
        wrapper.zero_grad()
        value.backward(create_graph=create_graph)
        wrapper.step()

    return step


def candidates(loss: Loss) -> Iterator[tuple[str, str, Callable[[], tuple[Step, str]]]]:
    """Variant, name, and what makes a model with its optimizer; that returns what steps them, and the backend."""

    def torch_adam(**how: bool) -> tuple[Step, str]:
        model = perceptron(WIDTHS)
        return stepping(torch.optim.Adam(model.parameters(), **how), model, loss), ""

    def our_own(variant: str, backend: Any) -> tuple[Step, str]:
        model = perceptron(WIDTHS)
        opt = hn.HyperOptimizer(model.named_parameters(), ours(variant), backend=backend)
        return stepping(opt, model, loss), opt.backend

    def published_one(variant: str, create_graph: bool) -> tuple[Step, str]:
        wrapper = gdtuo.ModuleWrapper(perceptron(WIDTHS), optimizer=published(variant))
        wrapper.initialize()
        return stepping_published(wrapper, loss, create_graph), ""

    yield NOTHING, ADAM, torch_adam
    yield NOTHING, FUSED, lambda: torch_adam(fused=True)
    for variant in VARIANTS:
        for name, backend in BACKENDS.items():
            yield variant, name, lambda variant=variant, backend=backend: our_own(variant, backend)
        for name, graph in GRAPHS.items() if gdtuo else ():
            yield variant, name, lambda variant=variant, graph=graph: published_one(variant, graph)


def skip(what: str, why: object) -> None:
    print(f"*** SKIPPED: {what}: {why} ***", flush=True)


def steps(rounds: int) -> Rows:
    """A row a candidate."""
    loss, made, backends, training = draw(WIDTHS, BATCH), {}, {}, {}
    for variant, name, make in candidates(loss):
        key = variant, name
        try:
            with Allocations() as allocations:
                made[key], backends[key] = make()
                for _ in range(WARM):
                    made[key]()
            training[key] = allocations.peak
        except Exception as error:  # of one candidate; the others are measured
            made.pop(key, None)
            skip(f"{variant}: {name}", error)
    peaks, times, base = {key: peak(step) for key, step in made.items()}, seconds(made, rounds), (NOTHING, ADAM)
    return [
        {
            "learned": key[0],
            "program": key[1],
            "backend": backends[key],
            **compared(times[key], times[base]),
            "peak of a step (MB)": peaks[key] / MB,
            "step / Adam": peaks[key] / peaks[base],
            "peak of training (MB)": training[key] / MB,
            "training / Adam": training[key] / training[base],
        }
        for key in made
    ]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest one, relative to the largest entry expected."""
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def trajectories() -> Rows:
    loss, start, rows = draw(SMALL, FEW), perceptron(SMALL), []
    for variant in VARIANTS:
        for backend in COMPARED:
            model, theirs = copy.deepcopy(start), copy.deepcopy(start)
            wrapper = gdtuo.ModuleWrapper(theirs, optimizer=published(variant, SMALL_RATES))
            wrapper.initialize()
            largest = {"parameters": 0.0, "hypers": 0.0}
            try:
                opt = hn.HyperOptimizer(model.named_parameters(), ours(variant, SMALL_RATES), backend=backend)
                step, their_step = stepping(opt, model, loss), stepping_published(wrapper, loss)
                for _ in range(STEPS):
                    step()
                    their_step()
                    expected, hypers = dict(theirs.named_parameters()), published_hypers(wrapper.optimizer)
                    assert opt.hypers().keys() == hypers.keys()
                    by_param = [difference(param, expected[name]) for name, param in model.named_parameters()]
                    by_hyper = [difference(value, hypers[name]) for name, values in opt.hypers().items() for value in values.values()]
                    for what, values in (("parameters", by_param), ("hypers", by_hyper)):
                        largest[what] = float(np.max([largest[what], *values]))  # NaN if one is
            except Exception as error:  # of one backend
                skip(f"trajectory, {variant}, backend {backend}", error)
                largest = dict.fromkeys(largest, float("inf"))
            lr = float(published_hypers(wrapper.optimizer)["lr"].detach())
            rows.append({"learned": variant, "backend": backend, **largest, "lr at the end": lr})
    return rows


def requirements(rows: Rows, differences: Rows) -> list[tuple[str, Any, str, Any]]:
    at = {(row["learned"], row["program"]): row for row in rows}

    def at_most(what: str, value: float | None, bound: float, there: bool = True) -> tuple[str, Any, str, Any]:
        """What did not run, although it is there, has not met its bound."""
        if not there:
            return what, "skipped", f"<= {bound:g}", "skipped"
        return what, "did not run" if value is None else float(value), f"<= {bound:g}", value is not None and bool(value <= bound)

    def largest(variant: str) -> float | None:
        values = [row[what] for row in differences if row["learned"] == variant for what in ("parameters", "hypers")]
        return float(np.max(values)) if values else None

    auto = {variant: at.get((variant, AUTO), {}) for variant in VARIANTS}
    return [
        *[at_most(f"{v}: time of {AUTO} / Adam", auto[v].get("ratio"), SLOWEST[v]) for v in VARIANTS],
        *[at_most(f"{v}: peak of a step of {AUTO} / Adam", auto[v].get("step / Adam"), LARGEST) for v in VARIANTS],
        *[at_most(f"{v}: peak of training of {AUTO} / Adam", auto[v].get("training / Adam"), LARGEST) for v in VARIANTS],
        *[at_most(f"{v}: difference of trajectories", largest(v), EXACT, bool(gdtuo)) for v in VARIANTS],
    ]


def main(
    out: Annotated[Path, typer.Option(help="Directory to save the tables, as CSV, and the figure in.")] = Path("benchmarks/results"),
    rounds: Annotated[int, typer.Option(help="How often each candidate is timed.")] = 25,
) -> None:
    """Print, and save, time and peak memory of training steps; fail if a requirement is not met."""
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")  # as the published program wants it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    differences: Rows = []
    if gdtuo:
        torch.set_default_dtype(torch.float64)
        differences = trajectories()
        torch.set_default_dtype(torch.float32)
        title = f"largest difference from {PUBLISHED} in {STEPS} steps, float64, perceptron {'-'.join(map(str, SMALL))}"
        report(title, differences, out / "training_trajectories.csv")
    else:
        skip("the published program, its times, peaks and trajectories", missing)
    rows = steps(rounds)
    report(f"training steps, perceptron {'-'.join(map(str, WIDTHS))}, batches of {BATCH}", rows, out / "training_steps.csv")
    of = {variant: {row["program"]: row["ratio"] for row in rows if row["learned"] == variant} for variant in (NOTHING, *VARIANTS)}
    panels = {f"learned: {variant}": {**of[NOTHING], **of[variant]} for variant in VARIANTS}
    bars(panels, f"time of a training step / {ADAM}'s", out / "training_steps.png")
    raise typer.Exit(0 if all_met(requirements(rows, differences), out / "training_requirements.csv") else 1)


if __name__ == "__main__":
    typer.run(main)
