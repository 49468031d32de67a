"""Public functions and optimizers: each docstring has an example that runs, and says what is returned and raised."""

import ast
import doctest
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ftp
import hyperopt_nested as hn

MODULES = [hn, ftp, hn.testing, hn.optim, hn.rules, hn.integrations, hn.plot]
WITHOUT = {
    "hyperopt_nested.integrations.LightningCallback",  # need their frameworks
    "hyperopt_nested.integrations.HuggingFaceCallback",
    "hyperopt_nested.testing.cases",  # hypothesis makes it, where doctest does not look
}


def is_made(value: object) -> bool:
    """Whether a decorator of the library made it of a function; calling it returns an `Optimizer`."""
    return isinstance(value, (hn.typing.FunctionRule, hn.typing.Combinator))


def public() -> Iterator[tuple[str, Any]]:
    """Names and values: functions, rules, combinators, optimizers; of integrations and pictures, all classes."""
    seen = set[int]()
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            is_class = inspect.isclass(value) and (issubclass(value, torch.optim.Optimizer) or module in (hn.integrations, hn.plot))
            if id(value) not in seen and (is_class or inspect.isfunction(value) or is_made(value)):
                seen.add(id(value))
                yield f"{module.__name__}.{name}", value


@functools.cache
def examples(module: str) -> dict[str, list[doctest.Example]]:
    """What the doctests of a module run, by name."""
    return {each.name: each.examples for each in doctest.DocTestFinder().find(importlib.import_module(module)) if each.examples}


def raises(value: Any) -> bool:
    """Whether a function, or the constructor of a class, raises something itself."""
    source = inspect.unwrap(value.__init__ if inspect.isclass(value) else value)
    if not inspect.isfunction(source) or not Path(source.__code__.co_filename).exists():
        return False
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(source))).body
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


def problems(name: str, value: Any) -> Iterator[str]:
    text, home = inspect.getdoc(value) or "", value.__module__
    runs = [each for each in examples(home).get(f"{home}.{value.__qualname__}", []) if not each.options.get(doctest.SKIP)]
    if not runs and name not in WITHOUT:
        yield f"{name} has no example that runs"
    if inspect.isfunction(value) and inspect.signature(value).return_annotation not in (None, "None") and "\nReturns:\n" not in text:
        yield f"{name} does not say what it returns"
    if raises(value) and "\nRaises:\n" not in text:
        yield f"{name} does not say what it raises"


def test_docstrings_of_public_names_are_complete() -> None:
    found = list(public())
    assert len(found) > 140
    assert [problem for name, value in found for problem in problems(name, value)] == []


@pytest.mark.parametrize("module", [hn, ftp], ids=lambda module: module.__name__)
def test_the_packages_have_an_example(module: Any) -> None:
    assert examples(module.__name__)[module.__name__]
