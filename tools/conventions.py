"""The tables of docs/reference/conventions.md, from those of tests/test_conventions.py. `make conventions` writes them."""

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "conventions.md"
MARK = "<!-- table -->\n"


def page(before: str, rows: Sequence[Any], kinds: Sequence[str]) -> str:
    """The page.

    Args:
        before: what it is now. All up to the mark stays.
        rows: the conventions.
        kinds: the headings of the columns; the last one is of learning that is switched off.
    """
    head = before.partition(MARK)[0]
    tables = (f"## {section}\n\n{table([row for row in rows if row.section == section], kinds)}" for section in _sections(rows))
    return head + MARK + "\n" + "\n".join(tables)


def table(rows: Iterable[Any], kinds: Sequence[str]) -> str:
    """A table with its notes."""
    notes: list[str] = []

    def mark(word: str, note: str) -> str:
        if note not in notes:
            notes.append(note)
        return f"{word} ({notes.index(note) + 1})"

    def cells(row: Any) -> Iterator[str]:
        yield mark(row.text, row.note) if row.note else row.text
        for kind in kinds:
            if kind in row.without:
                yield mark("n/a", row.without[kind])
            elif kind in row.refused:
                yield mark("refused", row.refused[kind][2])
            else:
                yield "yes"

    lines = ["convention", *kinds], ["---"] * (1 + len(kinds)), *(list(cells(row)) for row in rows)
    text = "".join(f"| {' | '.join(each)} |\n" for each in lines)
    return text + "".join(f"\n({number}) {note}.\n" for number, note in enumerate(notes, start=1))


def _sections(rows: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(row.section for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    checked = importlib.import_module("test_conventions")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), checked.TABLE, checked.COLUMNS), encoding="utf-8")
