"""`finetune`: fine-tuning of a model by a method, and its evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ftp.anchored import Anchors, Exclude
from ftp.finetuning.batches import Data
from ftp.finetuning.checkpoints import Checkpoints, arguments
from ftp.finetuning.evaluation import Loss
from ftp.finetuning.result import Evaluation, Result, versions
from ftp.finetuning.run import Report, Run, borrowed
from ftp.finetuning.settings import Precision, Settings


def finetune(
    model: nn.Module,
    train: Data,
    validation: Data,
    *,
    head: Exclude,
    exclude: Exclude = (),
    tests: Mapping[str, Data] | None = None,
    method: str = "ftp",
    optimizer: str = "adamw",
    lr: float | None = None,
    head_lr: float | None = None,
    strength: float | None = None,
    epochs: int = 10,
    steps_per_epoch: int | None = None,
    batch_size: int = 64,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    held_out: float = 0.2,
    anchor: Anchors = None,
    freeze_norm: bool = True,
    precision: Precision = "float32",
    patience: int | None = None,
    seed: int = 0,
    loss: Loss = F.cross_entropy,
    classes: Sequence[str] | None = None,
    workers: int = 0,
    out: str | Path | None = None,
    save_every: int = 200,
    command: str = "",
    progress: Report | None = None,
) -> Result:
    """Fine-tune a pre-trained model, and evaluate it.

    The model is left with its best weights: those of the epoch with the highest validation accuracy, of equals the lowest validation
    loss. Batches, augmentation and dropout follow from the seed; torch's global random numbers are neither used nor changed.

    Args:
        model: a pre-trained model with a new head; `model(inputs)` returns logits, shape (n, classes, ...).
        train: training data: a dataset of (input, label) pairs, a loader, or a pair of tensors, which are indexed by batches.
        validation: what chooses the epoch; in distribution.
        head: what has no pre-trained values: names, glob patterns of names, modules or tensors; () if there is no such tensor.
        exclude: what else has no anchor, though it trains as the backbone does; as `head`.
        tests: further data by name, evaluated at the end.
        method: a name in `ftp.finetuning.METHODS`.
        optimizer: "adamw", or "sgd" with Nesterov momentum.
        lr: learning rate of the backbone; None is 1e-4 of "adamw", and 1e-2 of "sgd".
        head_lr: learning rate of the head; None is ten times `lr`.
        strength: the method's number, such as FTP's k; None is its default.
        epochs: how many; validation data are looked at after each.
        steps_per_epoch: optimizer steps of an epoch; None is one pass over the training data.
        batch_size: examples of a step, of datasets and tensors.
        warmup: share of the steps in which learning rates rise; then they fall to 0 as a cosine.
        weight_decay: decoupled in "adamw", coupled in "sgd".
        momentum: of "sgd", or the decay rate of the first moment of "adamw".
        held_out: share of the training data that TPGM and the learned WiSE-FT learn from, instead of training on it.
        anchor: what the weights stay near: None, the values at the start; a mapping from names to tensors; or "zero", as for LoRA.
        freeze_norm: leave running statistics of batch normalization as they are.
        precision: "float32", or "bfloat16" or "float16" for automatic mixed precision.
        patience: epochs without a better one after which training stops; None trains to the end.
        seed: of all that is random.
        loss: of logits and labels, a mean over the batch.
        classes: names of the classes, for reports.
        workers: processes that read datasets which are not tensors.
        out: folder for checkpoints and results. A run that was stopped, at any moment, goes on there when it is called with the same
            arguments, and comes to the same weights bit for bit; one that is finished is read from there. It holds then the best weights
            (`model.safetensors`), a line an epoch (`epochs.csv`), and the result (`result.json`, `predictions.pt`).
        save_every: steps from one checkpoint to the next; there is one after each epoch, too.
        command: what was run, for reports.
        progress: called with a `Progress` after each step, and before each evaluation at the end.

    Returns:
        History, predictions on validation and test data, and settings.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is outside its domain, `head` names no tensor that trains, the loss is not finite before training, or
            `out` holds a run with other arguments. The message names it.
        OSError: `out` cannot be written to.

    Example:
        >>> import torch, ftp
        >>> _ = torch.manual_seed(0)
        >>> body, head = torch.nn.Linear(2, 8), torch.nn.Linear(8, 2)
        >>> model = torch.nn.Sequential(body, torch.nn.Tanh(), head)
        >>> x = torch.randn(64, 2)
        >>> y = (x[:, 0] > 0).long()
        >>> train, validation = (x[:32], y[:32]), (x[32:], y[32:])
        >>> how = {"lr": 1e-2, "epochs": 3, "batch_size": 8}
        >>> result = ftp.finetune(model, train, validation, head=head, **how)
        >>> result.method, len(result.epochs)
        ('ftp', 4)
    """
    settings = Settings(
        method, optimizer, lr, head_lr, strength, epochs, steps_per_epoch, batch_size, warmup, weight_decay, momentum, held_out,
        freeze_norm, precision, patience, seed,
    ).resolved()  # fmt: skip
    with borrowed(model):
        run = Run(model, train, validation, settings, head=head, exclude=exclude, anchor=anchor, loss=loss, workers=workers)
        files = Checkpoints(Path(out), arguments(run, tests or {})) if out is not None else None
        if files and (finished := files.result(model)):
            return finished
        if files:
            files.load(run)
        run.train(progress, files.save if files else None, save_every)
        evaluations = run.finish(tests or {}, progress)
    result = Result(
        method=method,
        seed=seed,
        settings={**settings.as_dict(), "steps_per_epoch": run.steps_per_epoch, "head": run.trainer.head, "exclude": run.trainer.excluded},
        classes=list(classes or map(str, range(_classes(evaluations)))),
        epochs=run.history,
        evaluations=evaluations,
        versions=versions(),
        command=command,
        stopped=run.stopped,
    )
    if files:
        files.finish(result, model)
    return result


def _classes(evaluations: Mapping[str, Evaluation]) -> int:
    """How many classes there are in labels and predictions."""
    return 1 + max(int(torch.maximum(each.labels, each.predictions).max()) for each in evaluations.values())
