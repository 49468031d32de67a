"""The runs of each study, by the protocol: docs/results/protocol.md."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.reproduce import tasks
from benchmarks.reproduce.rows import Rows, Run


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        seeds: of tests.
        tuning_seeds: of the choice of settings; others than those of tests.
        rates: learning rates of the grid.
        strengths: how many of each method's grid.
        skip: of the rates over three decades, each such is run.
        shorten: what numbers of steps are divided by.
        network_seed: of the pre-trained network that settings are chosen with.
        one_network: let tests have that network, too.
        pretraining_steps: None is the network's own number.
        test_images: of each test set, and of the validation images, at most; None is all.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    strengths: int = 4
    skip: int = 1
    shorten: int = 1
    network_seed: int = 100
    one_network: bool = False
    pretraining_steps: int | None = None
    test_images: int | None = None


FULL = Scale()
QUICK = Scale((0, 1), (100,), (1e-3,), 1, skip=6, shorten=15, one_network=True, pretraining_steps=50, test_images=100)

EPOCHS = 5
"""How often a run looks at validation images."""

CORRUPTED_IMAGES = 1000
"""Of each corruption at each severity."""

STRENGTHS: dict[str, tuple[float | None, ...]] = {
    "full": (None,),
    "linear-probe": (None,),
    "lp-ft": (None,),
    "l2-sp": (1.0, 0.1, 0.01, 0.001),
    "wise-ft": (0.25, 0.5, 0.75),
    "tpgm": (1e-3, 1e-2, 1e-1),
    "spd": (3.0, 1.0, 0.3),
    "digrap": (1.0, 0.1, 0.01),
    "ftp": (1.0, 0.5, 0.0),
}
"""The grid of each method's strength, from the one that moves weights least on; learning rates are searched together with it."""

VARIANTS: dict[str, tuple[float | None, ...]] = {
    **dict.fromkeys(("ftp-log", "ftp-relative", "ftp-row", "ftp-scheduled", "ftp-displaced", "ftp-exact"), STRENGTHS["ftp"]),
    "moving-ftp": (0.999, 0.99, 0.9),
    "learned-spd": STRENGTHS["spd"],
}
"""The same of variants of FTP and of SPD."""

RIVALS = ("full", "l2-sp", "wise-ft", "spd", "digrap", "ftp")
"""What variants are compared with, at settings of the study without them."""

SWEEP = {"adamw": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)}
"""Learning rates over three decades."""

SWEPT = (("full", "adamw"), ("l2-sp", "adamw"), ("ftp", "adamw"), ("full", "sgd"), ("ftp", "sgd"))

FEW = ("full", "linear-probe", "l2-sp", "wise-ft", "ftp")
"""Methods of the studies that take over settings of the primary one."""

LABELS = {"1%": (57, 300), "10%": (567, 500), "100%": (None, 800)}
"""By share of the labels: how many of each class, and steps."""


def chosen(rows: Rows, study: str, method: str) -> tuple[float, float | None]:
    """The learning rate and strength with the best mean accuracy on validation images; of equals, what moves weights least.

    Raises:
        ValueError: settings of this method were not searched.
    """
    tuning = rows.of(study, stage="tune", method=method)
    if not tuning:
        raise ValueError(f"settings of {method} are those of the study {study!r}, which has no rows: run it before")
    settings = dict.fromkeys((row["lr"], row["strength"]) for row in tuning)
    score = {pair: mean(float(row["validation"]) for row in tuning if (row["lr"], row["strength"]) == pair) for pair in settings}
    lr, strength = max(score, key=lambda pair: score[pair])
    return float(lr), float(strength) if strength else None


Plan = Callable[[Rows, Scale], list[Run]]


class Study(NamedTuple):
    """Runs with a question in common.

    Attributes:
        tuning: the runs that settings are chosen by.
        tests: the runs of tests, by the rows of tuning.
        methods: that have tests.
    """

    tuning: Plan
    tests: Plan
    methods: tuple[str, ...]


def _tuned(study: str, task: str, network: str, small: bool = False, variants: bool = False) -> Study:
    """Settings of every method are searched on validation images; then each has a test with fresh seeds.

    Args:
        study: its name.
        task: of `tasks.TASKS`.
        network: of `networks.NETWORKS`.
        small: few methods, the three lowest rates, and one seed of tuning: for networks that take long.
        variants: methods are `VARIANTS`; tests are of `RIVALS`, too, at settings of the study that has the task's name.
    """
    per_class, grid = tasks.TASKS[task].per_class, VARIANTS if variants else STRENGTHS
    methods, rivals = FEW if small else tuple(grid), RIVALS if variants else ()

    def run(stage: str, method: str, lr: float, strength: float | None, seed: int, scale: Scale) -> Run:
        steps = tasks.TASKS[task].steps // scale.shorten
        return Run(study, stage, task, network, method, "adamw", lr, strength, per_class, steps, seed)

    def tuning(_: Rows, scale: Scale) -> list[Run]:
        return [
            run("tune", method, lr, strength, seed, scale)
            for method in methods
            for lr in scale.rates[: 3 if small else None]
            for strength in grid[method][: scale.strengths]
            for seed in scale.tuning_seeds[: 1 if small else None]
        ]

    def tests(rows: Rows, scale: Scale) -> list[Run]:
        return [
            run("test", method, *chosen(rows, task if method in rivals else study, method), seed, scale)
            for seed in scale.seeds
            for method in (*rivals, *methods)
        ]

    return Study(tuning, tests, (*rivals, *methods))


def _near(study: str, method: str, optimizer: str, lr: float, strength: float | None, seed: int, scale: Scale, **other: Any) -> Run:
    """A test on the primary task."""
    task = tasks.DIGITS["near"]
    settings = {"per_class": task.per_class, "steps": task.steps} | other
    settings["steps"] //= scale.shorten
    return Run(study, "test", "near", "cnn", method, optimizer, lr, strength, seed=seed, **settings)


def _rates(rows: Rows, scale: Scale) -> list[Run]:
    strength = {"full": None, "l2-sp": chosen(rows, "near", "l2-sp")[1], "ftp": 1.0}
    return [
        _near("rates", method, optimizer, lr, strength[method], seed, scale)
        for seed in scale.seeds
        for method, optimizer in SWEPT
        for lr in SWEEP[optimizer][:: scale.skip]
    ]


def _corruptions(rows: Rows, scale: Scale) -> list[Run]:
    return [_near("corruptions", method, "adamw", *chosen(rows, "near", method), seed, scale) for seed in scale.seeds for method in FEW]


def _labels(rows: Rows, scale: Scale) -> list[Run]:
    return [
        _near("labels", method, "adamw", *chosen(rows, "near", method), seed, scale, per_class=per_class, steps=steps)
        for per_class, steps in LABELS.values()
        for seed in scale.seeds
        for method in FEW
    ]


FRONTIER: tuple[tuple[str, float, float | None], ...] = (
    ("full", 1e-4, None),
    ("full", 3e-4, None),
    ("l2-sp", 1e-3, 1.0),
    ("l2-sp", 1e-3, 0.1),
    ("l2-sp", 1e-3, 0.01),
    ("wise-ft", 1e-3, 0.5),
    ("wise-ft", 1e-3, 0.25),
    ("ftp", 3e-4, 1.0),
)
"""Settings that move weights less than those that `outlines` chooses: method, learning rate, strength."""


def _frontier(_: Rows, scale: Scale) -> list[Run]:
    task = tasks.TASKS["outlines"]
    return [
        Run("frontier", "test", "outlines", "unet", method, "adamw", lr, strength, task.per_class, task.steps // scale.shorten, seed)
        for seed in scale.seeds
        for method, lr, strength in FRONTIER
    ]


def _continual(rows: Rows, scale: Scale) -> list[Run]:
    return [
        Run("continual", "test", "far", "cnn", method, "adamw", *chosen(rows, "far", method), 200, 150 // scale.shorten, seed)
        for seed in scale.seeds
        for method in FEW
    ]


def _untuned(tests: Plan, methods: tuple[str, ...] = FEW) -> Study:
    return Study(lambda *_: [], tests, methods)


STUDIES: dict[str, Study] = {
    "near": _tuned("near", "near", "cnn"),
    "corruptions": _untuned(_corruptions),
    "rates": _untuned(_rates, ("full", "l2-sp", "ftp")),
    "outlines": _tuned("outlines", "outlines", "unet", small=True),
    "frontier": _untuned(_frontier, ("full", "l2-sp", "wise-ft", "ftp")),
    "labels": _untuned(_labels),
    "far": _tuned("far", "far", "cnn"),
    "continual": _untuned(_continual),
    "near-variants": _tuned("near-variants", "near", "cnn", variants=True),
    "far-variants": _tuned("far-variants", "far", "cnn", variants=True),
    "vit": _tuned("vit", "near", "vit"),
    "emoji": _tuned("emoji", "emoji", "lite0", small=True),
    "emoji-lite1": _tuned("emoji-lite1", "emoji", "lite1", small=True),
    "emoji-lite2": _tuned("emoji-lite2", "emoji", "lite2", small=True),
}
"""By name, in the order in which they are run."""

QUICK_STUDIES = ("near", "corruptions", "rates", "outlines", "frontier", "labels", "far", "continual", "near-variants", "emoji")
"""Studies that differ in more than the network or the task."""
