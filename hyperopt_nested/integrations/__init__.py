"""Learned values where people look: recorders and callbacks. Each imports its framework when it is made."""

from hyperopt_nested.integrations.huggingface import HuggingFaceCallback
from hyperopt_nested.integrations.lightning import LightningCallback
from hyperopt_nested.integrations.recorder import Record, Recorder
from hyperopt_nested.integrations.tensorboard import TensorBoardWriter

__all__ = ["HuggingFaceCallback", "LightningCallback", "Record", "Recorder", "TensorBoardWriter"]
