"""What mkdocstrings can not see by reading the source: how a rule made by `@hn.rule` is called."""

from typing import Any

import griffe

import hyperopt_nested as hn


class Rules(griffe.Extension):
    """Shows rules by the signature they are called with, and doctests under `Example:` as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe knows the plural heading only."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace the update's signature by the rule's."""
        rule = getattr(hn, func.name, None)
        if not isinstance(rule, hn.FunctionRule) or not any("rule(" in str(each.value) for each in func.decorators):
            return
        hypers = {name: ("float | Learn", hyper.default) for name, hyper in rule.hypers.items()}
        options = {name: (type(default).__name__, default) for name, default in rule.options.items()}
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(name, kind=griffe.ParameterKind.keyword_only, annotation=annotation, default=repr(default))
                for name, (annotation, default) in {**hypers, **options, "maximize": ("bool", False)}.items()
            )
        )
        func.returns = "Optimizer"
        func.decorators = []
