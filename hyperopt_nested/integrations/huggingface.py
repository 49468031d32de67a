"""`HuggingFaceCallback`: what is learned, in the logs of the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from hyperopt_nested.integrations.base import framework, learning, with_base


class HuggingFaceCallback:
    """A `TrainerCallback` of transformers that adds the learned values to what the Trainer logs, at its `logging_steps`.

    They are in `trainer.state.log_history`, and in what the callbacks after this one report. `add_to(trainer)` puts it before those that
    report to TensorBoard or Weights & Biases, which `Trainer(callbacks=[...])` does not.

    Args:
        prefix: what names begin with.

    Raises:
        ModuleNotFoundError: transformers is not installed.

    Example:
        >>> import transformers, hyperopt_nested as hn  # doctest: +SKIP
        >>> adamw = hn.optim.AdamW, {"lr": hn.learn(1e-3)}  # doctest: +SKIP
        >>> trainer = transformers.Trainer(  # doctest: +SKIP
        ...     model, optimizer_cls_and_kwargs=adamw
        ... )
        >>> hn.integrations.HuggingFaceCallback().add_to(trainer)  # doctest: +SKIP
    """

    def __new__(cls, *_: Any, **__: Any) -> HuggingFaceCallback:
        return object.__new__(with_base(cls, framework("transformers", package="transformers").TrainerCallback))

    def __init__(self, *, prefix: str = "learned/") -> None:
        self._prefix = prefix

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._public, (), self.__dict__  # type: ignore[attr-defined]

    def add_to(self, trainer: Any) -> None:
        """Add the callback to a Trainer, before its others."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
        """Add the values to the logs of training."""
        if logs is None or "loss" not in logs or (found := learning(given.get("optimizer"))) is None:
            return
        values = {f"{self._prefix}{name}": value for name, value in found.learned().items()}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
