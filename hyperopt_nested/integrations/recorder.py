"""`Recorder`: what was learned, over time, in bounded memory."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperopt_nested.checks import check_count
from hyperopt_nested.integrations.base import AfterSteps
from hyperopt_nested.ops import number_dtype


@dataclass(frozen=True)
class Record:
    """Learned values over time, as `Recorder` returns them.

    Attributes:
        steps: the step after which each row was read.
        values: by name, as `HyperOptimizer.learned` has them: the value in each row, NaN where there was none.

    Example:
        >>> import hyperopt_nested as hn
        >>> record = hn.integrations.Record([1, 2], {"lr": [0.1, 0.2]})
        >>> record.values["lr"][-1]
        0.2
    """

    steps: list[int]
    values: dict[str, list[float]]

    def save(self, path: str | Path) -> None:
        """Write the record to a file: JSON if its name ends in `.json`, else CSV with a column `step` and one for each value.

        Raises:
            ValueError: the name ends in neither `.json` nor `.csv`.

        Example:
            >>> import pathlib, tempfile, hyperopt_nested as hn
            >>> record = hn.integrations.Record([1, 2], {"lr": [0.1, 0.2]})
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.csv"
            >>> record.save(file)
            >>> print(file.read_text().strip())
            step,lr
            1,0.1
            2,0.2
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps({"steps": self.steps, "values": self.values}), encoding="utf-8")
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(["step", *self.values])
                rows.writerows(zip(self.steps, *self.values.values(), strict=True))
        else:
            raise ValueError(f"path={str(path)!r} must end in .csv or .json")

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a file that `save` wrote.

        Returns:
            The record.

        Raises:
            ValueError: the name ends in neither `.json` nor `.csv`.

        Example:
            >>> import tempfile, hyperopt_nested as hn
            >>> record = hn.integrations.Record([1, 2], {"lr": [0.1, 0.2]})
            >>> file = tempfile.mkdtemp() + "/run.json"
            >>> record.save(file)
            >>> hn.integrations.Record.load(file) == record
            True
        """
        path = Path(path)
        if path.suffix == ".json":
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        if path.suffix != ".csv":
            raise ValueError(f"path={str(path)!r} must end in .csv or .json")
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        columns: list[Any] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in names]
        steps, *values = columns
        return cls([*map(int, steps)], {name: [*map(float, each)] for name, each in zip(names[1:], values, strict=True)})


class Recorder(AfterSteps):
    """Record the learned values of an optimizer while it trains, in bounded memory and without waiting for the device.

    It reads after every `every` steps, by a hook of the optimizer: loops and trainers stay as they are. Rows are kept on the device.
    When there are `rows` of them, every second one is dropped, and from then on half as many steps are read.

    Args:
        optimizer: a `HyperOptimizer`, such as `hn.optim.AdamW`, or `ftp.FTP`.
        every: steps from one row to the next at first, >= 1.
        rows: how many rows are kept at most, >= 2.

    Attributes:
        every: steps from one row to the next now.
        step: how many steps were taken. Set it where a run is resumed, so that the record goes on from there.

    Raises:
        TypeError: `optimizer` learns no hypers, or `every` or `rows` is no integer.
        ValueError: `every` is less than 1, or `rows` less than 2.

    Example:
        >>> import torch, hyperopt_nested as hn
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = hn.optim.SGD(model.parameters(), lr=hn.learn(0.1, by=hn.sgd(lr=1e-3)))
        >>> recorder = hn.integrations.Recorder(opt, rows=4)
        >>> for _ in range(10):
        ...     opt.zero_grad()
        ...     model(torch.ones(4, 3)).square().mean().backward()
        ...     opt.step()
        >>> recorder.record().steps
        [4, 8]
    """

    def __init__(self, optimizer: Any, *, every: int = 1, rows: int = 1000) -> None:
        check_count("rows", rows)
        if rows < 2:
            raise ValueError(f"rows={rows!r} must be at least 2")
        super().__init__(optimizer, every)
        self._rows, self._steps = rows, list[int]()
        self._names: list[str] = []
        self._table: Tensor | None = None

    def read(self) -> None:
        """Add a row, without waiting for the device."""
        while len(self._steps) == self._rows:
            self._halve()
        if self.step % self.every or not (values := self.optimizer.learned_tensors()):
            return
        first = next(iter(values.values()))
        if self._table is None:
            self._table = first.new_full((self._rows, 0), math.nan, dtype=number_dtype(first.device))
        table = self._table
        if new := [name for name in values if name not in self._names]:
            table = self._table = torch.cat([table, table.new_full((self._rows, len(new)), math.nan)], dim=1)
            self._names += new
        none = table.new_full((), math.nan)
        table[len(self._steps)] = torch.stack([values.get(name, none).to(table, non_blocking=True) for name in self._names])
        self._steps.append(self.step)

    def _halve(self) -> None:
        """Drop every second row, and read half as often."""
        self.every *= 2
        kept = [row for row, step in enumerate(self._steps) if step % self.every == 0]
        if self._table is not None:
            self._table[: len(kept)] = self._table[kept]
        self._steps = [self._steps[row] for row in kept]

    def record(self) -> Record:
        """Copy what is recorded to the host, which waits for the device.

        Returns:
            The rows so far.

        Example:
            >>> import torch, hyperopt_nested as hn
            >>> opt = hn.optim.SGD(torch.nn.Linear(3, 1).parameters(), lr=hn.learn(0.1))
            >>> hn.integrations.Recorder(opt).record()
            Record(steps=[], values={})
        """
        columns = [] if self._table is None else self._table[: len(self._steps)].T.tolist()
        return Record([*self._steps], dict(zip(self._names, columns, strict=True)))

    def save(self, path: str | Path) -> None:
        """Write what is recorded to a file; see `Record.save`."""
        self.record().save(path)
