"""Tables and figures of the rows: `index.md` and its pictures."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.reproduce.plan import LABELS, STRENGTHS, STUDIES, SWEPT, VARIANTS
from benchmarks.reproduce.rows import Row, Rows
from benchmarks.reproduce.statistics import FAILS, HOLDS, NOISY, NOT_RUN, Estimate, answer, estimate
from benchmarks.reproduce.tasks import ID, TASKS
from ftp.finetuning import METHODS

COLORS = dict(
    zip(STRENGTHS, ("#444444", "#999999", "#56b4e9", "#e69f00", "#009e73", "#0072b2", "#f0e442", "#cc79a7", "#d55e00"), strict=True)
)
COLORS |= {method: f"C{index}" for index, method in enumerate(VARIANTS)}

BySeed = dict[str, Row]
"""Rows of one method in tests, by seed."""

Number = Callable[[Row], float]


def inside(row: Row) -> float:
    """Accuracy in distribution, in percent."""
    return float(row[ID])


def outside(row: Row) -> float:
    """Accuracy under shifts or corruptions: the mean over its sets, in percent."""
    names = [name for name in row if "/" in name] or TASKS[row["task"]].shifts
    return mean(float(row[name]) for name in names)


def seconds(row: Row) -> float:
    return float(row["seconds"])


def tested(rows: Rows, study: str, **settings: str) -> dict[str, BySeed]:
    """Rows of tests, by method; only of seeds that all methods of the study have."""
    found: dict[str, BySeed] = {}
    for row in rows.of(study, stage="test", **settings):
        found.setdefault(row["method"], {})[row["seed"]] = row
    common = set.intersection(*(set(found.get(method, ())) for method in STUDIES[study].methods))
    return {method: {seed: each[seed] for seed in sorted(common)} for method, each in found.items() if common}


def over_seeds(rows: BySeed, number: Number) -> Estimate:
    return estimate([number(row) for row in rows.values()])


def paired(rows: BySeed, others: BySeed, number: Number) -> Estimate:
    return estimate([number(rows[seed]) - number(others[seed]) for seed in rows])


def differences(rows: BySeed, others: BySeed) -> list[Estimate]:
    """Paired differences in distribution, and under shifts."""
    return [paired(rows, others, number) for number in (inside, outside)]


def shown(value: Estimate, signed: bool = False) -> str:
    """A mean with its standard error, as "95.2 ± 0.3"."""
    error = "" if value.count < 2 else f" ± {value.error:.1f}"
    return f"{value.mean:{'+' if signed else ''}.1f}{error}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def title(method: str) -> str:
    return METHODS[method].title


def comparison(found: Mapping[str, BySeed]) -> str:
    """A line a method: settings, accuracies, and paired differences from full fine-tuning."""
    lines = []
    for method, rows in found.items():
        row = next(iter(rows.values()))
        pair = differences(rows, found["full"])
        last = ["", "", "reference"] if method == "full" else [*(shown(each, True) for each in pair), answer(*pair)]
        settings = [f"{float(row['lr']):g}", f"{float(row['strength']):g}" if row["strength"] else ""]
        lines.append([title(method), *settings, shown(over_seeds(rows, inside)), shown(over_seeds(rows, outside)), *last])
    return table(["method", "rate", "strength", "ID", "OOD", "ID - full", "OOD - full", "better OOD at equal ID than full?"], lines)


def shifts(found: Mapping[str, BySeed]) -> str:
    """A line a method: accuracy under each shift, and the seconds of training."""
    names = TASKS[next(iter(found["full"].values()))["task"]].shifts
    lines = [
        [
            title(method),
            *(shown(over_seeds(rows, lambda row, name=name: float(row[name]))) for name in names),
            f"{over_seeds(rows, seconds).mean:.1f}",
        ]
        for method, rows in found.items()
    ]
    return table(["method", *names, "seconds"], lines)


def against(found: Mapping[str, BySeed]) -> str:
    """A line a method: paired differences of FTP from it."""
    lines = []
    for method, rows in found.items():
        if method == "ftp":
            continue
        pair = differences(found["ftp"], rows)
        lines.append([title(method), *(shown(each, True) for each in pair), answer(*pair)])
    return table(["FTP against", "ID", "OOD", "better OOD at equal ID?"], lines)


def variants(found: Mapping[str, BySeed]) -> str:
    """A line a variant: paired differences from each method that is none."""
    others = [method for method in found if method not in VARIANTS]
    lines = []
    for variant in (method for method in found if method in VARIANTS):
        cells = []
        for other in others:
            id_, ood = differences(found[variant], found[other])
            cell = f"{shown(ood, True)} ({shown(id_, True)})"
            cells.append(f"**{cell}**" if answer(id_, ood) == HOLDS else cell)
        lines.append([title(variant), *cells])
    return table(["OOD (ID) of a variant, less that of", *map(title, others)], lines)


def seeds_of(found: Mapping[str, BySeed]) -> str:
    count = len(next(iter(found.values())))
    return f"{count} seed{'s' if count > 1 else ''}; means ± standard errors, in percent."


def tuned_section(rows: Rows, study: str, heading: str, folder: Path) -> str:
    found = tested(rows, study)
    if not found:
        tuning = rows.of(study, stage="tune")
        return f"## {heading}\n\n{f'Not finished: {len(tuning)} runs of tuning are.' if tuning else 'Not run.'}"
    name = f"{study}.svg"
    save(scatter(found), folder / name)
    parts = [f"## {heading}", seeds_of(found), comparison(found), f"![Accuracy in distribution and under shifts by method.]({name})"]
    if VARIANTS.keys() & found.keys():
        pairs = ["Paired differences; bold where the variant is better OOD at equal ID:", variants(found)]
    else:
        pairs = ["FTP against each method, paired:", against(found)]
    return "\n\n".join([*parts, *pairs, "Accuracy under each shift:", shifts(found)])


def scatter(found: Mapping[str, BySeed]) -> Figure:
    """Accuracy under shifts over accuracy in distribution, with standard errors."""
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for method, rows in found.items():
        x, y = over_seeds(rows, inside), over_seeds(rows, outside)
        axes.errorbar(x.mean, y.mean, y.error, x.error, "s" if method in VARIANTS else "o", color=COLORS[method], label=title(method))
    axes.set(xlabel="ID: accuracy in distribution, %", ylabel="OOD: accuracy under shifts, %")
    axes.legend(fontsize="small")
    return figure


def save(figure: Figure, path: Path) -> None:
    with rc_context({"svg.hashsalt": "reproduce"}):
        figure.savefig(path, metadata={"Date": None})
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))


def short(rows: Rows) -> str:
    """A line a study with tuned settings: the results under shifts, the best one's name."""
    lines = []
    for study in STUDIES:
        found = tested(rows, study) if rows.of(study, stage="tune") else {}
        if found:
            best = max(found, key=lambda method: over_seeds(found[method], outside).mean)
            some = (found.get(method) for method in (best, "ftp", "full", "linear-probe"))
            first, *others = (shown(over_seeds(each, outside)) if each else "" for each in some)
            lines.append([f"`{study}`", f"{title(best)}, {first}", *others])
    header = ["study", "best under shifts", "FTP", "full fine-tuning", "linear probe"]
    return f"## OOD in short\n\nEach method at its own settings.\n\n{table(header, lines)}" if lines else ""


def rates_section(rows: Rows, folder: Path) -> str:
    heading = "## Learning rates over three decades: `rates`"
    curves: dict[tuple[str, str], dict[float, BySeed]] = {}
    everything = rows.of("rates", stage="test")
    settings = {(row["method"], row["optimizer"], row["lr"]) for row in everything}
    by_seed: dict[str, set[tuple[str, str, str]]] = {}
    for row in everything:
        by_seed.setdefault(row["seed"], set()).add((row["method"], row["optimizer"], row["lr"]))
    complete = {seed for seed, done in by_seed.items() if done == settings}
    if not complete or {(method, optimizer) for method, optimizer, _ in settings} != set(SWEPT):
        return f"{heading}\n\n{f'Not finished: {len(everything)} runs are.' if everything else 'Not run.'}"
    for row in everything:
        if row["seed"] in complete:
            curves.setdefault((row["method"], row["optimizer"]), {}).setdefault(float(row["lr"]), {})[row["seed"]] = row
    lines, spans = [], []
    for (method, optimizer), curve in curves.items():
        for lr, found in sorted(curve.items()):
            plain = curves["full", optimizer][lr]
            pair = [shown(each, True) if method != "full" else "" for each in differences(found, plain)]
            results = [shown(over_seeds(found, number)) for number in (inside, outside)]
            lines.append([named(method, optimizer), f"{lr:g}", *results, *pair])
        best = max(over_seeds(found, inside).mean for found in curve.values())
        usable = {lr: found for lr, found in curve.items() if over_seeds(found, inside).mean >= best - 2}
        accuracies = [over_seeds(found, outside).mean for found in usable.values()]
        widths = [f"{min(usable):g} to {max(usable):g}", f"{max(accuracies):.1f}", f"{min(accuracies):.1f}"]
        spans.append([named(method, optimizer), f"{best:.1f}", *widths, f"{max(accuracies) - min(accuracies):.1f}"])
    save(rate_curves(curves), folder / "rates.svg")
    header = ["method", "best ID", "rates with ID within 2 points of it", "highest OOD there", "lowest OOD there", "fall"]
    details = table(["method", "rate", "ID", "OOD", "ID - full", "OOD - full"], lines)
    count = f"{len(complete)} seed{'s' if len(complete) > 1 else ''}."
    figure = "![Accuracy in distribution and under shifts over the learning rate.](rates.svg)"
    return "\n\n".join([heading, count, table(header, spans), figure, details])


def named(method: str, optimizer: str) -> str:
    return f"{title(method)}, {'AdamW' if optimizer == 'adamw' else 'SGD'}"


def rate_curves(curves: Mapping[tuple[str, str], Mapping[float, BySeed]]) -> Figure:
    figure = Figure((9, 4), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for (method, optimizer), curve in curves.items():
        axes = both[int(optimizer == "sgd")]
        for number, style in ((inside, "--"), (outside, "-")):
            points = [(lr, over_seeds(found, number)) for lr, found in sorted(curve.items())]
            label = f"{title(method)}, {'ID' if number is inside else 'OOD'}"
            x, y, error = [lr for lr, _ in points], [each.mean for _, each in points], [each.error for _, each in points]
            axes.errorbar(x, y, error, linestyle=style, marker=".", color=COLORS[method], label=label)
    for axes, optimizer in zip(both, ("AdamW", "SGD"), strict=True):
        axes.set(xscale="log", xlabel=f"learning rate of {optimizer}", title=optimizer)
        axes.legend(fontsize="small", loc="lower left")
    both[0].set_ylabel("accuracy, %")
    return figure


def corruptions_section(rows: Rows, folder: Path) -> str:
    heading = "## Natural corruptions: `corruptions`"
    found = tested(rows, "corruptions")
    if not found:
        return f"{heading}\n\nNot run."
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    severities = range(1, 6)
    lines = []
    for method, by_seed in found.items():
        means = [
            over_seeds(by_seed, lambda row, end=f"/{each}": mean(float(row[n]) for n in row if n.endswith(end))) for each in severities
        ]
        axes.errorbar(severities, [each.mean for each in means], [each.error for each in means], label=title(method), color=COLORS[method])
        lines.append([title(method), *map(shown, means)])
    axes.set(xlabel="severity", ylabel="accuracy, %", xticks=severities)
    axes.legend(fontsize="small")
    save(figure, folder / "corruptions.svg")
    kinds = dict.fromkeys(name.partition("/")[0] for name in next(iter(found["full"].values())) if "/" in name)
    each = [
        [
            title(method),
            *(
                shown(over_seeds(by_seed, lambda row, start=f"{kind}/": mean(float(row[n]) for n in row if n.startswith(start))))
                for kind in kinds
            ),
        ]
        for method, by_seed in found.items()
    ]
    header = ["method", *(f"severity {severity}" for severity in severities)]
    picture = "![Accuracy by severity of corruption.](corruptions.svg)"
    parts = [heading, f"OOD is the mean over all of them. {seeds_of(found)}", comparison(found), table(header, lines), picture]
    return "\n\n".join([*parts, "By corruption:", table(["method", *kinds], each)])


def frontier_section(rows: Rows, folder: Path) -> str:
    heading = "## Other settings for outlines: `frontier` (exploratory)"
    chosen, settings = tested(rows, "outlines"), dict[tuple[str, str, str], BySeed]()
    for row in rows.of("frontier"):
        settings.setdefault((row["method"], row["lr"], row["strength"]), {})[row["seed"]] = row
    for method in ("full", "l2-sp", "wise-ft", "ftp") if chosen else ():
        row = next(iter(chosen[method].values()))
        settings.setdefault((method, row["lr"], row["strength"]), {}).update(chosen[method])
    seeds = set.intersection(*map(set, settings.values())) if settings else set()
    if not seeds or not rows.of("frontier"):
        return f"{heading}\n\nNot run."
    ours = {seed: row for seed, row in chosen["ftp"].items() if seed in seeds}
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    lines = []
    for method in dict.fromkeys(method for method, _, _ in settings):
        points = {key: {seed: found[seed] for seed in sorted(seeds)} for key, found in settings.items() if key[0] == method}
        points = dict(sorted(points.items(), key=lambda item: over_seeds(item[1], inside).mean))
        x, y = ([over_seeds(found, number) for found in points.values()] for number in (inside, outside))
        values = [each.mean for each in x], [each.mean for each in y], [each.error for each in y], [each.error for each in x]
        axes.errorbar(*values, marker="o", color=COLORS[method], label=title(method))
        for (_, lr, strength), found in points.items():
            pair = [shown(each, True) for each in differences(ours, found)]
            results = [shown(over_seeds(found, number)) for number in (inside, outside)]
            lines.append([title(method), f"{float(lr):g}", f"{float(strength):g}" if strength else "", *results, *pair])
    axes.set(xlabel="ID: intersection over union, %", ylabel="OOD: intersection over union, %")
    axes.legend(fontsize="small")
    save(figure, folder / "frontier.svg")
    about = "Each method at settings that move weights less or more; differences are of FTP at the settings of `outlines`."
    header = ["method", "rate", "strength", "ID", "OOD", "ID of FTP - ID", "OOD of FTP - OOD"]
    picture = "![Intersection over union in distribution and under shifts, by method and setting.](frontier.svg)"
    return "\n\n".join([heading, f"{about} {len(seeds)} seed{'s' if len(seeds) > 1 else ''}.", picture, table(header, lines)])


def labels_section(rows: Rows) -> str:
    heading = "## Few and many labels: `labels`"
    parts = []
    for share, (per_class, _) in LABELS.items():
        found = tested(rows, "labels", per_class="" if per_class is None else str(per_class))
        if found:
            parts += [f"### {share} of the labels", seeds_of(found), comparison(found)]
    return "\n\n".join([heading, *(parts or ["Not run."])])


def continual_section(rows: Rows) -> str:
    heading = "## Class-incremental learning: `continual`"
    found = tested(rows, "continual")
    if not found:
        return f"{heading}\n\nNot run."
    names = ["accuracy", "forgetting", *(f"task {index}" for index in range(1, 6))]
    lines = []
    for method, by_seed in found.items():
        values = [over_seeds(by_seed, lambda row, name=name: float(row[name])) for name in names]
        difference = paired(by_seed, found["full"], lambda row: float(row["accuracy"]))
        lines.append([title(method), *map(shown, values), "" if method == "full" else shown(difference, True)])
    return "\n\n".join([heading, seeds_of(found), table(["method", *names, "accuracy - full"], lines)])


def verdicts(rows: Rows) -> list[list[str]]:
    """A line a claim of the paper: theirs, ours, error, verdict."""
    lines = []
    for study, where in (
        ("near", "CNN, `near`"),
        ("far", "CNN, `far`"),
        ("vit", "ViT, `near`"),
        ("emoji", "EfficientNet-Lite0"),
        ("emoji-lite1", "EfficientNet-Lite1"),
        ("emoji-lite2", "EfficientNet-Lite2"),
    ):
        for other in ("full", "lp-ft", "l2-sp", "wise-ft", "tpgm"):
            if other in STUDIES[study].methods:
                lines.append(_better(f"better OOD at equal ID than {title(other)} ({where})", tested(rows, study), other))
    lines.append(
        _better("natural corruptions: better at equal ID than full fine-tuning (CNN, `near`)", tested(rows, "corruptions"), "full")
    )
    few = tested(rows, "labels", per_class=str(LABELS["1%"][0]))
    lines.append(_better("1 % of the labels: better OOD at equal ID than full fine-tuning (CNN, `near`)", few, "full"))
    lines.append(_continual_claim("continual learning: better accuracy than full fine-tuning (CNN)", tested(rows, "continual")))
    lines.append(_speed_claim("faster than TPGM, which projects 5 times with 10 updates each in 300 steps (CNN)", tested(rows, "near")))
    dense = tested(rows, "outlines")
    lines.append(_better("dense prediction: better OOD at equal ID than full fine-tuning (U-Net, `outlines`)", dense, "full"))
    networks = sum(bool(tested(rows, study)) for study in ("near", "vit", "outlines", "emoji", "emoji-lite1", "emoji-lite2"))
    return [*lines, ["on five pre-trained models", "5", f"{networks}" if networks else "", "", "see above" if networks else NOT_RUN]]


def _better(claim: str, found: Mapping[str, BySeed], other: str) -> list[str]:
    if not {"ftp", other} <= set(found):
        return [claim, "better", "", "", NOT_RUN]
    id_, ood = differences(found["ftp"], found[other])
    error = f"{ood.error:.1f}, {id_.error:.1f}" if ood.count > 1 else ""
    return [claim, "better", f"OOD {ood.mean:+.1f}, ID {id_.mean:+.1f}", error, answer(id_, ood)]


def _continual_claim(claim: str, found: Mapping[str, BySeed]) -> list[str]:
    if not {"ftp", "full"} <= set(found):
        return [claim, "better", "", "", NOT_RUN]
    difference = paired(found["ftp"], found["full"], lambda row: float(row["accuracy"]))
    same = Estimate(0.0, 0.0, difference.count)
    return [claim, "better", f"{difference.mean:+.1f}", f"{difference.error:.1f}", answer(same, difference)]


def _speed_claim(claim: str, found: Mapping[str, BySeed]) -> list[str]:
    if not {"ftp", "tpgm"} <= set(found):
        return [claim, "35 %", "", "", NOT_RUN]
    faster = estimate([100 * (1 - seconds(row) / seconds(found["tpgm"][seed])) for seed, row in found["ftp"].items()])
    low, high = faster.interval
    verdict = HOLDS if low > 0 and high >= 35 else FAILS if high < 35 else NOISY
    return [claim, "35 %", f"{faster.mean:.0f} %", f"{faster.error:.0f} %", verdict]


def runs_section(rows: Rows) -> str:
    """What was run: counts, seconds, versions."""
    lines = []
    for path in sorted(rows.folder.glob("*.csv")):
        study = path.stem
        done = rows.of(study)
        if not done:
            continue
        versions = "; ".join(sorted({f"torch {row['torch']}, Python {row['python']}" for row in done}))
        devices = ", ".join(sorted({row.get("device", "cpu") for row in done})).replace("cpu", "CPU")
        dates = sorted({row["date"] for row in done})
        hours = sum(map(seconds, done)) / 3600
        tests = sum(row["stage"] == "test" for row in done)
        file = f"[{study}.csv]({study}.csv)"
        lines.append(
            [file, str(len(done) - tests), str(tests), f"{hours:.2f}", devices, versions, " to ".join(dict.fromkeys((dates[0], dates[-1])))]
        )
    text = table(["rows", "runs of tuning", "tests", "hours of training", "devices", "versions", "dates"], lines) if lines else "None."
    return f"## Runs\n\n`make reproduce` does the runs that have no row yet, and writes this page.\n\n{text}"


def write(rows: Rows, note: str = "") -> None:
    """Write `index.md` and its figures beside the rows.

    Args:
        rows: finished runs.
        note: a paragraph at the top.
    """
    folder = rows.folder
    folder.mkdir(parents=True, exist_ok=True)
    claims = table(["claim of the paper about FTP", "theirs", "ours", "standard error", "verdict"], verdicts(rows))
    parts = [
        "# Results",
        note,
        "FTP and other ways of robust fine-tuning on real data, by a [protocol](protocol.md) that was fixed before. "
        "This page is generated from the rows; ID is accuracy in distribution, OOD accuracy under shifts, both in percent on test images. "
        "± is a standard error; with five seeds a 95 % interval has 2.8 of them to either side. "
        "Strengths are those of the protocol. FTP's claims are those of its [abstract](https://arxiv.org/abs/2310.19182), "
        "made for larger models and other data.",
        f"## Claims\n\nDifferences are of FTP from the other method, in percentage points, paired over seeds.\n\n{claims}",
        short(rows),
        tuned_section(rows, "near", "Features nearly enough: `near` (primary)", folder),
        rates_section(rows, folder),
        tuned_section(rows, "far", "Features must change: `far`", folder),
        tuned_section(rows, "near-variants", "Variants of FTP, `near`: `near-variants`", folder),
        tuned_section(rows, "far-variants", "Variants of FTP, `far`: `far-variants`", folder),
        corruptions_section(rows, folder),
        labels_section(rows),
        continual_section(rows),
        tuned_section(rows, "vit", "Vision transformer: `vit`", folder),
        tuned_section(rows, "outlines", "Dense prediction, in percent of intersection over union: `outlines`", folder),
        frontier_section(rows, folder),
        *(
            tuned_section(rows, study, f"EfficientNet-Lite{version} on emoji: `{study}`", folder)
            for version, study in enumerate(("emoji", "emoji-lite1", "emoji-lite2"))
        ),
        runs_section(rows),
    ]
    (folder / "index.md").write_text("\n\n".join(filter(None, parts)) + "\n")
