"""The combinators that come with the library, one family a module."""

from hyperopt_nested.combinators.average import ema, lookahead
from hyperopt_nested.combinators.decay import coupled_decay, decoupled_decay, l2_sp, spd
from hyperopt_nested.combinators.gradient import centralize, clip_by_global_norm, clip_by_norm, clip_by_value
from hyperopt_nested.combinators.loss import null_step, polyak
from hyperopt_nested.combinators.project import project
from hyperopt_nested.combinators.rescale import rescale
from hyperopt_nested.combinators.window import window
from hyperopt_nested.rules._anchor import Anchor

__all__ = [
    "Anchor",
    "centralize",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "coupled_decay",
    "decoupled_decay",
    "ema",
    "l2_sp",
    "lookahead",
    "null_step",
    "polyak",
    "project",
    "rescale",
    "spd",
    "window",
]
