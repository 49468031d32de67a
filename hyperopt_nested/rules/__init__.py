"""The rules that come with the library, one family a module."""

from hyperopt_nested.rules.adabelief import adabelief
from hyperopt_nested.rules.adadelta import adadelta
from hyperopt_nested.rules.adafactor import adafactor
from hyperopt_nested.rules.adagrad import adagrad
from hyperopt_nested.rules.adam import adam, adamw
from hyperopt_nested.rules.adam_variants import adamax, nadam, radam
from hyperopt_nested.rules.adan import adan
from hyperopt_nested.rules.asgd import asgd
from hyperopt_nested.rules.hypergradient import adam_hd, sgd_hd
from hyperopt_nested.rules.layerwise import lamb, lars
from hyperopt_nested.rules.lion import lion
from hyperopt_nested.rules.muon import muon
from hyperopt_nested.rules.rmsprop import rmsprop
from hyperopt_nested.rules.rprop import rprop
from hyperopt_nested.rules.schedule_free import schedule_free_adamw, schedule_free_sgd
from hyperopt_nested.rules.sgd import sgd

__all__ = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adam_hd",
    "adamax",
    "adamw",
    "adan",
    "asgd",
    "lamb",
    "lars",
    "lion",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "sgd_hd",
]
