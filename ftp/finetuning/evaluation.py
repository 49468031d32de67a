"""Loss and predictions of a model on a set of examples."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ftp.finetuning.batches import Batches
from ftp.finetuning.result import Evaluation

Loss = Callable[[Tensor, Tensor], Tensor]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def casting(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Automatic mixed precision, or none for "float32"."""
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


def evaluate(model: nn.Module, data: Batches, loss: Loss, precision: str = "float32") -> tuple[float, Evaluation]:
    """The mean loss and the predictions of a model, which is in evaluation mode afterwards.

    Args:
        model: returns logits, shape (n, classes, ...).
        data: inputs and labels.
        loss: of logits and labels, a mean over the batch.
        precision: "float32", or that of automatic mixed precision.

    Returns:
        The mean loss, and labels with predictions on the CPU.
    """
    device = device_of(model)
    model.eval()
    losses, labels, predictions = [], [], []
    with torch.inference_mode(), casting(device, precision):
        for inputs, targets in data.in_order():
            on_device = targets.to(device, non_blocking=True)
            logits = model(inputs.to(device, non_blocking=True))
            losses.append(loss(logits, on_device).float() * len(targets))
            labels.append(targets)
            predictions.append(logits.argmax(1))
        total = torch.stack(losses).cpu().double().sum() / sum(map(len, labels))
    with torch.inference_mode(False):
        result = Evaluation(torch.cat(labels).cpu().clone(), torch.cat(predictions).cpu().clone())
    return float(total), result
