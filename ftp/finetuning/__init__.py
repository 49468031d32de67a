"""Fine-tune a pre-trained network by any of several robust methods, and record what it does on shifted data."""

from ftp.finetuning.result import Epoch, Evaluation, Result

__all__ = ["Epoch", "Evaluation", "Result"]
