"""`LightningCallback`: what is learned, in the loggers of a Lightning trainer."""

from __future__ import annotations

from typing import Any

from hyperopt_nested.checks import check_count
from hyperopt_nested.integrations.base import framework, learning, with_base


class LightningCallback:
    """A Lightning callback that logs the learned values of the trainer's optimizers, as `LearningRateMonitor` logs `group["lr"]`.

    It is a `Callback` of `lightning.pytorch`, or of `pytorch_lightning` where that is imported.

    Args:
        every: steps from one reading to the next, >= 1; None is the trainer's `log_every_n_steps`. Each waits for the device.
        prefix: what names begin with.

    Raises:
        TypeError: `every` is no integer.
        ValueError: `every` is less than 1.
        ModuleNotFoundError: Lightning is not installed.

    Example:
        >>> import lightning, hyperopt_nested as hn  # doctest: +SKIP
        >>> callback = hn.integrations.LightningCallback()  # doctest: +SKIP
        >>> trainer = lightning.Trainer(callbacks=[callback])  # doctest: +SKIP
    """

    def __new__(cls, *_: Any, **__: Any) -> LightningCallback:
        return object.__new__(with_base(cls, framework("lightning.pytorch", "pytorch_lightning", package="lightning").Callback))

    def __init__(self, every: int | None = None, *, prefix: str = "learned/") -> None:
        super().__init__()
        if every is not None:
            check_count("every", every)
        self._every, self._prefix, self._last = every, prefix, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._public, (self._every,), self.__dict__  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Log, if it is time."""
        step = trainer.global_step
        if step == self._last or step % (self._every or trainer.log_every_n_steps):
            return
        self._last = step
        found = [each for each in map(learning, trainer.optimizers) if each is not None]
        values = {
            f"{self._prefix}{f'{index}/' if len(found) > 1 else ''}{name}": value
            for index, optimizer in enumerate(found)
            for name, value in optimizer.learned().items()
        }
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=step)
