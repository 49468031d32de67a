"""Finished runs, a row each, in a CSV file for each study; rows are added one by one, and a kill at any time leaves whole files."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol


class Settings(Protocol):
    """Settings of a run, of any kind: a dataclass."""

    @property
    def study(self) -> str:
        """What the run is part of, the name of the file."""

    @property
    def key(self) -> tuple[str, ...]:
        """The settings as a CSV file has them."""


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Attributes:
        study: what it is part of, the name of the file.
        stage: "tune", on validation images alone, or "test".
        task: of `tasks.TASKS`.
        network: of `networks.NETWORKS`.
        method: of `ftp.finetuning.METHODS`.
        optimizer: "adamw" or "sgd".
        lr: learning rate of the backbone; the head's is ten times as high.
        strength: of the method; None where it has none.
        per_class: labels of each class; None is all.
        steps: of fine-tuning.
        seed: of the labels, the head, and the order of batches.
    """

    study: str
    stage: str
    task: str
    network: str
    method: str
    optimizer: str
    lr: float
    strength: float | None
    per_class: int | None
    steps: int
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """The settings as a CSV file has them."""
        return tuple("" if value is None else str(value) for value in asdict(self).values())


Row = dict[str, str]


class Rows:
    """The rows of all studies, in a folder.

    Args:
        folder: of the CSV files; it is made when the first row is added.
        kind: the dataclass of a run's settings.
    """

    def __init__(self, folder: Path, kind: type[Settings] = Run) -> None:
        self.folder, self._fields = folder, tuple(kind.__annotations__)
        self._rows = {path.stem: self._read(path) for path in sorted(folder.glob("*.csv"))}
        self._keys = {tuple(row[name] for name in self._fields) for rows in self._rows.values() for row in rows}

    def __contains__(self, run: Settings) -> bool:
        return run.key in self._keys

    def of(self, study: str, **settings: str) -> list[Row]:
        """The rows of a study whose settings are these."""
        return [row for row in self._rows.get(study, []) if all(row[name] == value for name, value in settings.items())]

    def add(self, run: Settings, numbers: Mapping[str, object]) -> None:
        """Add a row, and write the study's file anew: the old one is replaced at once or not at all."""
        row = dict(zip(self._fields, run.key, strict=True)) | {name: str(value) for name, value in numbers.items()}
        rows = self._rows.setdefault(run.study, [])
        rows.append(row)
        self._keys.add(run.key)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{run.study}.csv"
        scratch = path.with_suffix(f".part{os.getpid()}")
        scratch.write_text(_text(rows))
        os.replace(scratch, path)

    def _read(self, path: Path) -> list[Row]:
        with path.open(newline="") as file:
            return [{name: value for name, value in row.items() if value or name in self._fields} for row in csv.DictReader(file)]


def _text(rows: Sequence[Row]) -> str:
    columns = dict.fromkeys(name for row in rows for name in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
