"""The rules that come with the library, one family a module; and what rules are made of, for authors of others."""

from hyperopt_nested.domains import StepLoss
from hyperopt_nested.ops import counter, kink, safe_sqrt, state_dtype, watch_kinks, zeros, zeros_like
from hyperopt_nested.registry import register
from hyperopt_nested.rules._anchor import anchor_of, displacement, keep_anchor, moved_anchor
from hyperopt_nested.rules._blocks import (
    accumulator,
    average,
    copy_of,
    counted,
    decayed,
    direction,
    is_on,
    larger,
    moments,
    smaller,
    trust_ratio,
)
from hyperopt_nested.rules.adam import adabelief, adam, adam_hd, adamax, adamw, adan, coherent_adam, lamb, mada, nadam, radam
from hyperopt_nested.rules.betting import coin_betting, erfi_tuner
from hyperopt_nested.rules.distance import dadapt_adam, dog, ldog, prodigy
from hyperopt_nested.rules.muon import muon
from hyperopt_nested.rules.schedule_free import schedule_free_adamw, schedule_free_sgd
from hyperopt_nested.rules.sgd import asgd, lars, sgd, sgd_hd
from hyperopt_nested.rules.signs import lion, rprop
from hyperopt_nested.rules.squares import adadelta, adafactor, adagrad, rmsprop

__all__ = [
    "StepLoss",
    "accumulator",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adam_hd",
    "adamax",
    "adamw",
    "adan",
    "anchor_of",
    "asgd",
    "average",
    "coherent_adam",
    "coin_betting",
    "copy_of",
    "counted",
    "counter",
    "dadapt_adam",
    "decayed",
    "direction",
    "displacement",
    "dog",
    "erfi_tuner",
    "is_on",
    "keep_anchor",
    "kink",
    "lamb",
    "larger",
    "lars",
    "ldog",
    "lion",
    "mada",
    "moments",
    "moved_anchor",
    "muon",
    "nadam",
    "prodigy",
    "radam",
    "register",
    "rmsprop",
    "rprop",
    "safe_sqrt",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "sgd_hd",
    "smaller",
    "state_dtype",
    "trust_ratio",
    "watch_kinks",
    "zeros",
    "zeros_like",
]
