"""Fine-tune a pre-trained network by any of several robust methods, and record what it does on shifted data."""

from ftp.finetuning.batches import Data
from ftp.finetuning.corruptions import CORRUPTIONS
from ftp.finetuning.methods import METHODS, OPTIMIZERS, Method, Strength
from ftp.finetuning.report import write_report
from ftp.finetuning.result import Epoch, Evaluation, Result
from ftp.finetuning.run import Progress
from ftp.finetuning.settings import Settings
from ftp.finetuning.training import finetune

__all__ = [
    "CORRUPTIONS",
    "METHODS",
    "OPTIMIZERS",
    "Data",
    "Epoch",
    "Evaluation",
    "Method",
    "Progress",
    "Result",
    "Settings",
    "Strength",
    "finetune",
    "write_report",
]
