"""The rules that come with the library, one family a module."""

from hyperopt_nested.rules.adam import adam, adamw
from hyperopt_nested.rules.sgd import sgd

__all__ = ["adam", "adamw", "sgd"]
