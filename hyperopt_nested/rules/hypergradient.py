"""Hypergradient descent: optimizers that learn their learning rate, as instances of the engine."""

from typing import Any

from hyperopt_nested.registry import register
from hyperopt_nested.rule import Optimizer, learn
from hyperopt_nested.rules.adam import adam
from hyperopt_nested.rules.sgd import sgd


def sgd_hd(lr: float = 1e-3, hyper_lr: float = 1e-6, **settings: Any) -> Optimizer:
    r"""SGD-HD: SGD that learns its learning rate by gradient descent (Baydin et al. 2018, arXiv 1703.04782, SGD-HD).

    Without momentum, \(\eta_t = \eta_{t-1} + \beta\,g_t \cdot g_{t-1}\), projected to \(\eta \ge 0\), and \(\theta_{t+1} = \theta_t -
    \eta_t g_t\). One learning rate for all tensors.

    Args:
        lr: the learning rate's start, >= 0.
        hyper_lr: learning rate \(\beta \ge 0\) of the learning rate.
        **settings: further arguments of `sgd`; with `momentum` and `nesterov=True` it is SGDN-HD.
    """
    return sgd(lr=learn(lr, by=sgd(lr=hyper_lr)), **settings)


def adam_hd(lr: float = 1e-3, hyper_lr: float = 1e-8, **settings: Any) -> Optimizer:
    r"""Adam-HD: Adam that learns its learning rate by gradient descent (Baydin et al. 2018, arXiv 1703.04782, Adam-HD).

    \(\eta_t = \eta_{t-1} + \beta\,g_t \cdot d_{t-1}\), projected to \(\eta \ge 0\), where \(d\) is Adam's direction. One learning rate
    for all tensors, as in the paper.

    Args:
        lr: the learning rate's start, >= 0.
        hyper_lr: learning rate \(\beta \ge 0\) of the learning rate.
        **settings: further arguments of `adam`.
    """
    return adam(lr=learn(lr, by=sgd(lr=hyper_lr)), **settings)


register("sgd_hd", sgd_hd)
register("adam_hd", adam_hd)
