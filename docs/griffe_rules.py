"""What mkdocstrings can not see by reading the source: how what `@hn.rule` and `@hn.combinator` make is called."""

from typing import Any

import griffe

import hyperopt_nested as hn


class Rules(griffe.Extension):
    """Shows rules and combinators by the signature they are called with, and doctests under `Example:` as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe knows the plural heading only."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace the update's signature by that of what the decorator makes of it."""
        made = getattr(hn, func.name, None)
        if not isinstance(made, (hn.FunctionRule, hn.Combinator)) or not func.decorators:
            return
        initial = func.module.members.get(getattr(made.initial, "__name__", ""))
        written = {each.name: each for each in (*(initial.parameters if isinstance(initial, griffe.Function) else ()), *func.parameters)}
        keywords = [_keyword(name, "float | Learn", repr(hyper.default)) for name, hyper in made.hypers.items()]
        keywords += [_keyword(name, written[name].annotation, written[name].default) for name in made.options]
        if isinstance(made, hn.Combinator):
            optimizer = griffe.Parameter("optimizer", kind=griffe.ParameterKind.positional_only, annotation="Optimizer")
            func.parameters = griffe.Parameters(optimizer, *keywords)
        else:
            func.parameters = griffe.Parameters(*keywords, _keyword("maximize", "bool", "False"))
        func.returns = "Optimizer"
        func.decorators = []


def _keyword(name: str, annotation: Any, default: Any) -> griffe.Parameter:
    return griffe.Parameter(name, kind=griffe.ParameterKind.keyword_only, annotation=annotation, default=default)
