"""Draw the figures of the tutorials and the thumbnails of the examples: `python tools/figures.py`, three minutes.

Tutorials: the first code blocks of a page are run; a function here continues from what they define, and draws.
Examples: a program is run, and what it prints is drawn.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import hyperopt_nested as hn

DOCS = Path(__file__).parent.parent / "docs"
BLUE, ORANGE, GREEN, GRAY = "#3f8fd2", "#e07b39", "#4caf6e", "#8a8a8a"  # seen on white and on black


def defined_by(page: str, blocks: int) -> dict[str, Any]:
    """What the first code blocks of a tutorial define."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    names: dict[str, Any] = {}
    text = (DOCS / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[:blocks]:
        exec(block, names)
    return names


def axes(*labels: tuple[str, str]) -> list[Axes]:
    """Panels side by side, with labels of x and y."""
    _, panels = plt.subplots(1, len(labels), figsize=(3.7 * len(labels), 2.7), layout="constrained", squeeze=False)
    for panel, (x, y) in zip(panels[0], labels, strict=True):
        panel.set(xlabel=x, ylabel=y)
        panel.spines[["top", "right"]].set_visible(False)
    return list(panels[0])


def quickstart() -> None:
    """A rate that is learned, and the test loss, against a constant."""
    page = defined_by("quickstart", 1)
    rate, loss = axes(("step", "learning rate"), ("step", "test loss"))
    learned: dict[str, Any] = {
        "constant": 0.01,
        "learned by SGD": hn.learn(0.01, by=hn.sgd(lr=0.1)),
        "learned by Adam, log": hn.learn(0.01, by=hn.adam(lr=0.1), via="log"),
    }
    for (name, lr), color in zip(learned.items(), (GRAY, BLUE, ORANGE), strict=True):
        model = page["softmax_regression"]()
        opt = hn.optim.SGD(model.parameters(), lr=lr, backend="reference")
        rates, losses = [], []
        for step in range(100):
            page["fit"](model, opt, 1, seed=step)
            rates.append(opt.learned().get("lr", 0.01))
            losses.append(page["test_loss"](model))
        rate.plot(rates, color=color, label=name)
        loss.plot(losses, color=color)
    rate.set_yscale("log")
    rate.legend(frameon=False)


def online() -> None:
    """A rate that is learned with three horizons."""
    page = defined_by("online", 1)
    (panel,) = axes(("step", "learning rate"))
    horizons: list[Any] = [hn.OneStep(), hn.Discounted(0.9), hn.Discounted(0.99)]
    for horizon, color in zip(horizons, (GRAY, BLUE, ORANGE), strict=True):
        model = page["network"]()
        opt = hn.HyperOptimizer(model.named_parameters(), page["learned"], horizon=horizon, backend="reference")
        rates = []
        for batch in page["draw_batches"](60):
            page["fit"](model, opt, [batch])
            rates.append(opt.learned()["lr"])
        panel.plot(rates, color=color, label=str(horizon))
    panel.legend(frameon=False)


def tangent(panel: Axes, at: float, half: float, value: Any, slope: Any) -> None:
    """The tangent of a loss at a value of a hyper, as long as twice `half`; the first one of a panel has a label."""
    near = torch.tensor([-half, half])
    label = "hypergradient" if len(panel.lines) == 1 else None
    panel.plot(at + near, value + slope * near, color=ORANGE, lw=2.5, label=label)


def reverse() -> None:
    """The outer loss against the learning rate, with the hypergradients as tangents."""
    page = defined_by("reverse", 3)
    (panel,) = axes(("learning rate", "outer loss after 20 steps"))
    rates = torch.linspace(0.005, 0.09, 50)
    panel.plot(rates, [page["end"](lr.item()) for lr in rates], color=BLUE, label="by training")
    for lr in (0.01, 0.03, 0.05, 0.08):
        optimizer = hn.sgd(lr=hn.learn(lr), momentum=0.9, weight_decay=0.01)
        losses = page["train_loss"], page["outer_loss"]
        found: Any = hn.hypergradient(optimizer, page["model"].params, page["batches"], *losses, outer_batch=page["held_out"])
        tangent(panel, lr, 0.007, found.loss, found["lr"]["model"])
    panel.legend(frameon=False)


def implicit() -> None:
    """The validation loss of ridge regression against the decay, with the hypergradients as tangents."""
    page = defined_by("implicit", 1)
    (panel,) = axes(("weight decay", "loss on held-out data"))
    decays = torch.linspace(0.01, 1, 50)
    loss, held_out = page["loss"], page["held_out"]
    panel.plot(decays, [loss({"weight": page["trained"](decay)}, held_out) for decay in decays], color=BLUE, label="closed form")
    for decay in (0.05, 0.2, 0.5, 0.9):
        optimizer = hn.sgd(lr=0.1, weight_decay=hn.learn(decay))
        batch, how = [(page["x"], page["y"])], {"outer_batch": held_out, "method": "implicit"}
        found: Any = hn.hypergradient(optimizer, {"weight": page["trained"](decay)}, batch, loss, loss, **how)
        tangent(panel, decay, 0.08, found.loss, found["weight_decay"]["model"])
    panel.legend(frameon=False)


def validation() -> None:
    """A weight decay that is learned from either loss, and the test loss that results."""
    page = defined_by("validation", 0)
    text = (DOCS / "tutorials" / "validation.md").read_text(encoding="utf-8")
    exec(re.findall(r"^```python\n(.*?)^def fit", text, re.MULTILINE | re.DOTALL)[0], page)
    decay, tested = axes(("step", "weight decay"), ("step", "test loss"))
    images, labels = page["images"], page["labels"]
    sources: tuple[tuple[Literal["training", "validation"], str], ...] = ("training", GRAY), ("validation", BLUE)
    for source, color in sources:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        learned = hn.sgd(lr=0.5, weight_decay=hn.learn(0.001, by=hn.adam(lr=0.02), via="log"))
        opt = hn.HyperOptimizer(model.named_parameters(), learned, learn_from=source, backend="reference")
        values, losses = [], []
        for _ in range(400):
            for rows, step in ((page["train"], opt.step), (page["validation"], opt.hyper_step)):
                if step == opt.step or source == "validation":
                    opt.zero_grad()
                    loss: Any = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
                    loss.backward()
                    step()
            values.append(opt.learned()["weight_decay"])
            with torch.no_grad():
                losses.append(torch.nn.functional.cross_entropy(model(images[page["test"]]), labels[page["test"]]).item())
        decay.plot(values[::4], color=color, label=f"from {source}")
        tested.plot(losses[::4], color=color)
    for panel in (decay, tested):
        panel.set_xticks([0, 50, 100], ["0", "200", "400"])
    decay.set_yscale("log")
    decay.legend(frameon=False)


def printed(example: str) -> str:
    """What a program of `examples` prints."""
    call = [sys.executable, str(DOCS.parent / "examples" / f"{example}.py")]
    return subprocess.run(call, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "140"}).stdout


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of the printed tables with so many columns."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return [row for row in cells if len(row) == columns]


def learn_the_learning_rate() -> None:
    """Accuracy over starts, fixed and learned."""
    (panel,) = axes(("learning rate at the start", "accuracy"))
    found = [[float(cell) for cell in row] for row in rows(printed("learn_the_learning_rate"), 4)]
    for column, name, color in ((1, "fixed", GRAY), (2, "learned", BLUE)):
        panel.plot([row[0] for row in found], [row[column] for row in found], "o-", color=color, label=name)
    panel.set_xscale("log")
    panel.legend(frameon=False)


def learn_weight_decays() -> None:
    """The decay of each tensor over the steps of the outer optimizer."""
    (panel,) = axes(("step", "weight decay"))
    found = [[float(cell) for cell in row] for row in rows(printed("learn_weight_decays"), 7)]
    for column, (name, color) in enumerate(zip(("0.weight", "0.bias", "2.weight", "2.bias"), (BLUE, ORANGE, GREEN, GRAY), strict=True)):
        panel.plot([row[0] for row in found], [row[3 + column] for row in found], color=color, label=name)
    panel.set_yscale("log")
    panel.legend(frameon=False)


def maml() -> None:
    """Test loss over steps of adaptation."""
    (panel,) = axes(("steps of adaptation", "test loss"))
    for (name, _, *cells), color in zip(rows(printed("maml"), 7), (GRAY, ORANGE, BLUE), strict=True):
        panel.plot([0, 1, 2, 5, 10], [float(cell.partition(" ")[0]) for cell in cells], "o-", color=color, label=name)
    panel.set_ylim(0)
    panel.legend(frameon=False)


def lora() -> None:
    """Accuracy on the digits that were learned last and before, for each learning rate."""
    (panel,) = axes(("accuracy on turned digits, %", "accuracy on upright digits, %"))
    found = rows(printed("lora"), 5)
    for name, color in (("AdamW", GRAY), ("FTP", BLUE)):
        mine = [(float(turned), float(upright)) for _, optimizer, turned, upright, _ in found if optimizer == name]
        panel.plot(*zip(*mine, strict=True), "o-", color=color, label=name)
    panel.legend(frameon=False)


def finetune_folder() -> None:
    """Accuracy of each method, in distribution and under the shift."""
    (panel,) = axes(("", "accuracy, %"))
    found = [row for row in rows(printed("finetune_folder"), 4) if "±" in row[1]]
    for column, name, color in ((2, "in distribution", GRAY), (3, "inverted", BLUE)):
        heights = [float(row[column].partition(" ")[0]) for row in found]
        panel.bar([at + 0.2 * (2 * column - 5) for at in range(len(found))], heights, 0.4, color=color, label=name)
    panel.set_xticks(range(len(found)), [row[0] for row in found])
    panel.set_ylim(top=115)
    panel.legend(frameon=False, ncols=2)


def write_a_rule() -> None:
    """Learned hypers of the rule over the steps."""
    (panel,) = axes(("step", "value"))
    numbers = [[float(number) for number in re.findall(r"[\d.]+", line)] for line in printed("write_a_rule").splitlines()]
    for column, (name, color) in enumerate(zip(("loss", "lr", "beta", "delta"), (GRAY, BLUE, ORANGE, GREEN), strict=True)):
        panel.plot([row[0] for row in numbers], [row[1 + column] for row in numbers], color=color, label=name)
    panel.set_yscale("log")
    panel.legend(frameon=False, ncols=2)


FIGURES = {
    "tutorials": (quickstart, online, reverse, implicit, validation),
    "examples": (learn_the_learning_rate, learn_weight_decays, maml, lora, finetune_folder, write_a_rule),
}


def main() -> None:
    """Draw all of them, or those that are named."""
    mpl.use("svg")
    style: Any = {"axes.edgecolor": GRAY, "axes.labelcolor": GRAY, "xtick.color": GRAY, "ytick.color": GRAY, "text.color": GRAY}
    mpl.rcParams.update(
        {**style, "svg.hashsalt": "", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "lines.linewidth": 1.6}
    )
    for folder, figures in FIGURES.items():
        (DOCS / "assets" / folder).mkdir(exist_ok=True)
        for draw in figures:
            if draw.__name__ in (sys.argv[1:] or [draw.__name__]):
                draw()
                plt.savefig(DOCS / "assets" / folder / f"{draw.__name__}.svg", transparent=True, metadata={"Date": None})
                plt.close("all")


if __name__ == "__main__":
    main()
