"""What mkdocstrings cannot see by reading the source: how what `@hn.rule` and `@hn.combinator` make is called."""

import inspect
from typing import Any

import griffe

import ftp
import hyperopt_nested as hn


class Rules(griffe.Extension):
    """Shows rules and combinators by the signature they are called with, and doctests under `Example:` as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe knows the plural heading only."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace the signature and the docstring of the update by those of what the decorator makes of it."""
        made = getattr(hn, func.name, getattr(ftp, func.name, None))
        signature = getattr(made, "__signature__", None)
        if signature is None or not func.decorators:
            return
        func.parameters = griffe.Parameters(*map(_shown, signature.parameters.values()))
        func.returns, func.decorators = "Optimizer", []
        if func.docstring is not None:
            func.docstring.value = (inspect.getdoc(made) or "").replace("\nExample:\n", "\nExamples:\n")


def _shown(parameter: inspect.Parameter) -> griffe.Parameter:
    kind = griffe.ParameterKind(parameter.kind.description)
    annotation = inspect.formatannotation(parameter.annotation).replace("hyperopt_nested.rule.", "")
    default = None if parameter.default is parameter.empty else getattr(parameter.default, "name", repr(parameter.default))
    return griffe.Parameter(parameter.name, kind=kind, annotation=annotation, default=default)
