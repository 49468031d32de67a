"""What bad arguments get: an error that names the argument, its value and the remedy, before anything is changed."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ftp
import hyperopt_nested as hn

nan = math.nan
PARAMS = [torch.nn.Parameter(torch.ones(2, 2))]
net = torch.nn.Linear(2, 2)


def learned(value: Any = 0.1, **how: Any) -> hn.Learn:
    return hn.learn(value, by=hn.sgd(), **how)


@hn.rule
def with_option(param: Any, grad: Any, state: Any, *, rate: float = 0.1) -> Any:
    return param - rate * grad, state


def started(optimizer: Any) -> Any:
    return hn.Nested(optimizer).init({"w": torch.ones(2, 2)})


def made(optimizer: Any, **how: Any) -> Any:
    return hn.HyperOptimizer(PARAMS, optimizer, **how)


def group(values: Any, optimizer: Any = None) -> Any:
    return hn.HyperOptimizer([{"params": PARAMS, **values}], optimizer or hn.adamw())


def stepped(optimizer: Any, value: Any = None, key: str = "lr") -> None:
    """A step that must fail, after a schedule made a value of a number: nothing is changed, and once it is mended training goes on."""
    w = torch.nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], optimizer, backend="reference")
    w.grad = torch.ones(2)
    before = opt.param_groups[0][key]
    if value is not None:
        opt.param_groups[0][key] = value if value != "None" else None
    kept = {name: entry.clone() for name, entry in opt.state[w].items()}
    try:
        opt.step()
    finally:
        assert torch.equal(w, torch.ones(2))
        assert all(torch.equal(entry, kept[name]) for name, entry in opt.state[w].items())
        if value is not None:
            opt.param_groups[0][key] = before
            opt.step()
            assert not torch.equal(w, torch.ones(2))


def sched(value: Any, optimizer: Any = None, key: str = "lr") -> None:
    stepped(optimizer or hn.sgd(lr=0.1), "None" if value is None else value, key)


def step(grads: Any = None, learn: Any = True, values: Any = None, params: Any = None, o: Any = None) -> None:
    nested = hn.Nested(o or hn.sgd(lr=learned()))
    first = {"w": torch.ones(2)}
    nested.step(params or first, grads if grads is not None else {"w": torch.ones(2)}, nested.init(first), values, learn=learn)


def badrule(update: Any, init: Any = None) -> None:
    @hn.rule(init)
    def bad_rule(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1)) -> Any:
        return update(param, grad, state, lr)

    step(o=bad_rule(lr=0.1))


def defrule(**how: Any) -> Any:
    return hn.rule(**how)(lambda param, grad, state, *, lr=hn.Positive(0.1): (param, state))


def unrolled(optimizer: Any = "learned", **how: Any) -> Any:
    chosen = hn.sgd(lr=learned()) if optimizer == "learned" else optimizer
    return hn.hypergradient(chosen, {"w": torch.ones(2)}, [0], lambda p, b: p["w"].sum(), lambda p, b: p["w"].sum(), **how)


def o2() -> Any:
    shared = learned()
    other = torch.nn.Parameter(torch.ones(1))
    return hn.HyperOptimizer([{"params": PARAMS, "lr": shared}, {"params": [other], "weight_decay": shared}], hn.adamw())


Case = tuple[Callable[[], Any], type[Exception], str]

HYPERS_ARE = "hypers are arguments of a rule: HyperOptimizer(params, hn.adamw(lr=1e-3)), or hn.optim.AdamW(params, lr=1e-3)"
CASES: list[Case] = [
    (lambda: hn.learn("0.1", by=hn.sgd()), TypeError, "learn: value='0.1' (str) must be a number"),
    (lambda: learned(nan), ValueError, "learn: value=nan must be finite"),
    (lambda: learned(math.inf), ValueError, "learn: value=inf must be finite"),
    (lambda: learned(True), TypeError, "learn: value=True (bool) must be a number"),
    (lambda: learned(torch.tensor(0.1)), TypeError, "learn: value=tensor(0.1000) (Tensor) must be a number"),
    (lambda: learned(bounds=("a", "b")), TypeError, "bounds=('a', 'b'): 'a' (str) must be a number, a function of the"),
    (lambda: learned(bounds="ab"), TypeError, "bounds='ab' (str) must be a pair (low, high) of numbers, functions of"),
    (lambda: learned(bounds=5), TypeError, "bounds=5 (int) must be a pair (low, high) of numbers, functions of"),
    (lambda: learned(bounds=(0, 1, 2)), TypeError, "bounds=(0, 1, 2) (tuple) must be a pair (low, high) of numbers,"),
    (lambda: learned(bounds=(nan, 1)), ValueError, "bounds=(nan, 1): an end is NaN; give a number, or None for no bound"),
    (lambda: learned(bounds=(1, 0)), ValueError, "bounds=(1, 0) are out of order: give (low, high) with low <= high"),
    (lambda: learned(1.0, bounds=(0, 0.5)), ValueError, "value=1.0 is outside bounds=(0, 0.5): start inside, or widen them"),
    (lambda: learned(0.1, bounds=(0.5, None)), ValueError, "value=0.1 is outside bounds=(0.5, None): start inside, or widen them"),
    (lambda: learned(bounds=(torch.tensor(0.0), 1)), TypeError, "bounds=(tensor(0.), 1): tensor(0.) (Tensor) must be a number, a"),
    (lambda: learned(grad=1), TypeError, "grad=1 (int) must be a function from a hypergradient to one of the"),
    (lambda: learned(via="x"), ValueError, "learn: via='x' is no known bijection; choose one of log, softplus,"),
    (lambda: learned(via=5), ValueError, "learn: via=5 is no known bijection; choose one of log, softplus,"),
    (lambda: learned(per=None), ValueError, "per=None must be 'model', 'tensor', 'row' or 'element'"),
    (lambda: hn.learn(0.1, by=1e-3), TypeError, "by=0.001 (float) must be an optimizer of this library, such as"),
    (lambda: hn.learn(0.1, by=hn.sgd), TypeError, "by=<rule sgd> (FunctionRule) must be an optimizer of this library, so"),
    (
        lambda: hn.learn(0.1, by=torch.optim.SGD(PARAMS, lr=0.1)),
        TypeError,
        "by is torch's SGD; it must be an optimizer of this library, such as",
    ),
    (
        lambda: stepped(hn.sgd(lr=learned(grad=lambda g: torch.stack([g, g])))),
        ValueError,
        "learn(grad=...) of lr made shape (2,) of a hypergradient of shape ():",
    ),
    (
        lambda: stepped(hn.sgd(lr=learned(grad=lambda g: None))),
        ValueError,
        "learn(grad=...) of lr made None of a hypergradient of shape (): it",
    ),
    (lambda: hn.sgd(nesterov="yes", momentum=0.9), TypeError, "sgd: nesterov='yes' (str) must be True or False"),
    (lambda: hn.sgd(maximize="no"), TypeError, "sgd: maximize='no' (str) must be True or False"),
    (lambda: hn.adam(amsgrad="false"), TypeError, "adam: amsgrad='false' (str) must be True or False"),
    (lambda: hn.adam(amsgrad=1), TypeError, "adam: amsgrad=1 (int) must be True or False"),
    (lambda: hn.rmsprop(centered="x"), TypeError, "rmsprop: centered='x' (str) must be True or False"),
    (lambda: hn.adan(no_prox=None), TypeError, "adan: no_prox=None (NoneType) must be True or False"),
    (lambda: hn.nadam(decoupled_weight_decay="x"), TypeError, "nadam: decoupled_weight_decay='x' (str) must be True or False"),
    (lambda: hn.muon(nesterov=2), TypeError, "muon: nesterov=2 (int) must be True or False"),
    (lambda: ftp.AdamP(PARAMS, maximize="x"), TypeError, "adamw: maximize='x' (str) must be True or False"),
    (lambda: ftp.SGDP(PARAMS, momentum=0.9, nesterov="x"), TypeError, "sgd: nesterov='x' (str) must be True or False"),
    (lambda: ftp.AdamP(PARAMS, betas=(0.9, 0.99, 0.999)), ValueError, "adamw: betas=(0.9, 0.99, 0.999) must be 2 numbers, one each for"),
    (lambda: ftp.AdamP(PARAMS, betas=0.9), TypeError, "adamw: betas=0.9 (float) must be 2 numbers, one each for beta1, beta2"),
    (lambda: ftp.AdamP(PARAMS, betas=(0.9,)), ValueError, "adamw: betas=(0.9,) must be 2 numbers, one each for beta1, beta2"),
    (lambda: ftp.AdamP(PARAMS, betas=("a", "b")), TypeError, "adamw: beta1='a' (str) must be a number, or learn(<number>,"),
    (lambda: ftp.AdamP(PARAMS, anchor=torch.zeros(2, 2)), TypeError, "anchor has type Tensor; it must be None, 'zero', or a mapping from"),
    (
        lambda: ftp.AdamP([("w", PARAMS[0])], anchor={"w": torch.full((2, 2), nan)}),
        ValueError,
        "anchor['w'] has entries that are not finite: give finite weights, or",
    ),
    (
        lambda: ftp.AdamP([("w", PARAMS[0])], anchor={"w": [[0, 0], [0, 0]]}),
        TypeError,
        "anchor['w'] is a list; it must be a tensor of the parameter's shape",
    ),
    (lambda: ftp.AdamP(PARAMS, anchor=[torch.zeros(2, 2)]), TypeError, "anchor has type list; it must be None, 'zero', or a mapping from"),
    (lambda: ftp.AdamP(PARAMS, anchor=5), TypeError, "anchor has type int; it must be None, 'zero', or a mapping from names"),
    (lambda: ftp.AdamP(net), TypeError, "params is a module (Linear): give its parameters,"),
    (lambda: ftp.AdamP(torch.nn.Sequential(net)), TypeError, "params is a module (Sequential): give its parameters,"),
    (lambda: ftp.AdamP(PARAMS, k="1"), TypeError, "k='1' (str) must be a number in [0, 1]"),
    (lambda: ftp.AdamP(PARAMS, k=True), TypeError, "k=True (bool) must be a number in [0, 1]"),
    (lambda: ftp.AdamP(PARAMS, k=nan), ValueError, "k=nan must be in [0, 1]: 1 projects most strongly, 0 least"),
    (lambda: ftp.AdamP(PARAMS, exclude=5), TypeError, "exclude=5 (int) must be names, glob patterns, modules or tensors; ()"),
    (lambda: ftp.AdamP(PARAMS, exclude=None), TypeError, "exclude=None (NoneType) must be names, glob patterns, modules or"),
    (lambda: ftp.AdamP(PARAMS, exclude=[5]), TypeError, "exclude has 5 (int); give names, glob patterns, modules or tensors"),
    (lambda: ftp.AdamP(PARAMS, lr="x"), TypeError, "adamw: lr='x' (str) must be a number, or learn(<number>,"),
    (lambda: ftp.AdamP(PARAMS, displacement_dtype="bf16"), TypeError, "displacement_dtype='bf16' (str) must be a dtype, such as"),
    (lambda: ftp.AdamP(PARAMS, anchor_dtype="x"), TypeError, "anchor_dtype='x' (str) must be a dtype, such as torch.bfloat16, or"),
    (lambda: ftp.AdamP(PARAMS, anchor_device="x"), ValueError, "anchor_device='x' is no device: Expected one of cpu, cuda, ipu, xpu,"),
    (
        lambda: ftp.FTPOptimizer(PARAMS, torch.optim.SGD(PARAMS, lr=0.1)),
        TypeError,
        "optimizer is torch's SGD; it must be an optimizer of this library,",
    ),
    (lambda: ftp.FTPOptimizer(PARAMS, hn.sgd), TypeError, "optimizer=<rule sgd> (FunctionRule) must be an optimizer of this"),
    (lambda: ftp.TPGM(PARAMS, lr="x"), TypeError, "adam: lr='x' (str) must be a number, or learn(<number>,"),
    (lambda: ftp.TPGM(PARAMS, norm=5), ValueError, "norm=5 must be 'mars' or 'l2'"),
    (lambda: ftp.TPGM(PARAMS, updates=True), ValueError, "updates=True must be a whole number, at least 1: each steps what is learned"),
    (lambda: ftp.ftp_rule(hn.sgd), TypeError, "optimizer=<rule sgd> (FunctionRule) must be an optimizer of this"),
    (lambda: ftp.ftp_rule(hn.sgd(), k="a"), TypeError, "k='a' (str) must be a number in [0, 1]"),
    (lambda: hn.lookahead(hn.sgd(), k=2.5), TypeError, "lookahead: k=2.5 (float) must be an integer"),
    (lambda: hn.lookahead(hn.sgd(), k="a"), TypeError, "lookahead: k='a' (str) must be an integer"),
    (lambda: started(hn.lookahead(hn.sgd(), k=0)), ValueError, "k=0 must be an integer >= 1"),
    (lambda: hn.lookahead(hn.sgd(), k=learned()), TypeError, "lookahead: k=learn(0.1, by=sgd(lr=0.001, momentum=0.0, dampening=0.0,"),
    (lambda: hn.ema(hn.sgd(), decay=learned()), TypeError, "ema: decay=learn(0.1, by=sgd(lr=0.001, momentum=0.0, dampening=0.0,"),
    (lambda: hn.ema(hn.sgd(), decay="a"), TypeError, "ema: decay='a' (str) must be a number"),
    (lambda: hn.ema(hn.sgd(), decay=nan), ValueError, "ema: decay=nan must be finite"),
    (lambda: hn.asgd(t0="a"), TypeError, "asgd: t0='a' (str) must be a number"),
    (lambda: hn.asgd(t0=nan), ValueError, "asgd: t0=nan must be finite"),
    (lambda: started(hn.schedule_free_sgd(warmup_steps=-3)), ValueError, "warmup_steps=-3 must be an integer >= 0"),
    (lambda: hn.schedule_free_adamw(warmup_steps=2.5), TypeError, "schedule_free_adamw: warmup_steps=2.5 (float) must be an integer"),
    (
        lambda: started(hn.rprop(step_size_min=1.0, step_size_max=0.5)),
        ValueError,
        "step_size_min=1.0 is larger than step_size_max=0.5: give",
    ),
    (lambda: group({"step_size_min": 60.0}, hn.rprop()), ValueError, "step_size_min=60.0 is larger than step_size_max=50.0: give"),
    (lambda: started(hn.muon(ns_steps=-1)), ValueError, "ns_steps=-1 must be an integer >= 1"),
    (lambda: hn.muon(ns_coefficients=(1, 2)), ValueError, "muon: ns_coefficients=(1, 2) must be 3 numbers"),
    (lambda: hn.muon(ns_coefficients=5), TypeError, "muon: ns_coefficients=5 (int) must be 3 numbers"),
    (lambda: started(hn.muon(adjust_lr_fn="x")), ValueError, "adjust_lr_fn='x' must be None or one of 'original', 'match_rms_adamw'"),
    (lambda: hn.muon(ns_dtype="bf16"), TypeError, "muon: ns_dtype='bf16' (str) must be a dtype, such as torch.bfloat16,"),
    (lambda: group({"foo": 1}), ValueError, "a group gives foo=1, but its tensors have no hyper 'foo'; they have"),
    (lambda: group({"learning_rate": 0.1}), ValueError, "a group gives learning_rate=0.1, but its tensors have no hyper"),
    (lambda: group({"betas": (0.9,)}), ValueError, "a group gives betas=(0.9,), which must be 2 numbers: beta1, beta2"),
    (lambda: group({"betas": 0.9}), TypeError, "betas=0.9 (float) of a group must be a tuple of numbers"),
    (lambda: group({"betas": (0.9, 0.9, 0.9)}), ValueError, "a group gives betas=(0.9, 0.9, 0.9), which must be 2 numbers: beta1,"),
    (
        lambda: hn.HyperOptimizer([{"lr": 0.1}], hn.sgd()),
        ValueError,
        "a group must be a dict with 'params', such as {'params': [...], 'lr':",
    ),
    (lambda: group({"amsgrad": True}), ValueError, "a group gives amsgrad=True, which is an option and not a hyper; to"),
    (lambda: group({"maximize": True}), ValueError, "a group gives maximize=True, which is an option and not a hyper; to"),
    (lambda: group({"lr": "x"}), TypeError, "adamw: lr='x' (str) must be a number, or learn(<number>,"),
    (lambda: group({"lr": -1.0}), ValueError, "adamw: lr=-1.0 is outside its domain NonNegative [0, inf): choose a"),
    (lambda: group({"onto": 1}, hn.project(hn.sgd())), ValueError, "a group gives onto=1, which is an option and not a hyper; to vary it,"),
    (lambda: sched("x"), TypeError, "group 0: lr='x' (str) must be a number"),
    (lambda: sched(None), TypeError, "group 0: lr=None (NoneType) must be a number"),
    (lambda: sched(-1.0), ValueError, "group 0: lr=-1.0 is outside its domain NonNegative [0, inf): let the"),
    (lambda: sched(nan), ValueError, "group 0: lr=nan is outside its domain NonNegative [0, inf): let the"),
    (lambda: sched(-1.0, hn.sgd(lr=learned())), ValueError, "group 0: lr=-1.0 is outside its domain NonNegative [0, inf): let the"),
    (lambda: sched(nan, hn.sgd(lr=learned())), ValueError, "group 0: lr=nan is outside its domain NonNegative [0, inf): let the"),
    (lambda: sched((1.5, 0.9), hn.adam(), "betas"), ValueError, "group 0: beta1=1.5 is outside its domain UnitInterval [0, 1): let the"),
    (lambda: sched((0.5,), hn.adam(), "betas"), ValueError, "group 0: betas=(0.5,) is too short for beta2; adam needs lr, beta1,"),
    (lambda: sched(torch.ones(2)), ValueError, "group 0: lr is a tensor of shape (2,); it must be one number"),
    (lambda: sched(torch.tensor(-1.0)), ValueError, "group 0: lr=-1.0 is outside its domain NonNegative [0, inf): let the"),
    (lambda: sched(math.inf, hn.sgd(lr=learned())), ValueError, "group 0: lr=inf is outside its domain NonNegative [0, inf): let the"),
    (lambda: hn.project(hn.sgd(), onto="mars"), TypeError, "onto='mars' (str) must be a ball: hn.mars"),
    (lambda: hn.project(hn.sgd(), onto="l2"), TypeError, "onto='l2' (str) must be a ball, such as hn.mars, hn.frobenius,"),
    (lambda: hn.project(hn.sgd(), onto=None), TypeError, "onto=None (NoneType) must be a ball, such as hn.mars, hn.frobenius,"),
    (lambda: started(hn.project(hn.sgd(), saturation="x")), ValueError, "saturation='x' must be one of 'straight-through', 'exact'"),
    (lambda: hn.project(hn.sgd(), anchor_dtype="x"), TypeError, "project: anchor_dtype='x' (str) must be a dtype, such as"),
    (lambda: hn.project(hn.sgd(), anchor_dtype=torch.int32), ValueError, "project: anchor_dtype=torch.int32 must be a real floating-point"),
    (
        lambda: started(hn.project(hn.sgd(), anchor_device="x")),
        ValueError,
        "anchor_device='x' is no device: Expected one of cpu, cuda, ipu, xpu,",
    ),
    (lambda: started(hn.project(hn.sgd(), anchor=[1, 2])), ValueError, "anchor=[1, 2] must be 'start', 'zero' or a tensor"),
    (
        lambda: started(hn.l2_sp(hn.sgd(), anchor=torch.full((2, 2), nan))),
        ValueError,
        "anchor must be finite, of real floating-point numbers; this one",
    ),
    (lambda: started(hn.l2_sp(hn.sgd(), anchor="x")), ValueError, "anchor='x' must be 'start', 'zero' or a tensor"),
    (lambda: hn.OneStep(dtype="bf16"), TypeError, "dtype='bf16' (str) must be a dtype, such as torch.bfloat16, or"),
    (lambda: made(hn.sgd(), state_dtype=5), TypeError, "state_dtype=5 (int) must be a dtype, such as torch.bfloat16, or None"),
    (lambda: hn.Discounted("a"), TypeError, "discount='a' (str) must be a number"),
    (lambda: hn.Discounted(nan), ValueError, "discount=nan must be finite"),
    (lambda: hn.OneStep(memory=[]), ValueError, "memory=[] must be one of 'auto', 'kept', 'forward', 'reverse', 'none'"),
    (lambda: hn.Discounted(1, curvature=1), ValueError, "curvature=1 must be one of 'none', 'exact'"),
    (lambda: made(hn.sgd(), learn_from=1), ValueError, "learn_from=1 must be 'training' or 'validation'"),
    (lambda: made(hn.sgd), TypeError, "optimizer=<rule sgd> (FunctionRule) must be an optimizer of this"),
    (lambda: made(hn.project), TypeError, "optimizer=<combinator project> (Combinator) must be an optimizer of"),
    (lambda: made(torch.optim.SGD), TypeError, "optimizer is torch's SGD; it must be an optimizer of this library,"),
    (lambda: made(torch.optim.SGD(PARAMS, lr=0.1)), TypeError, "optimizer is torch's SGD; it must be an optimizer of this library,"),
    (lambda: made(net), TypeError, "optimizer=Linear(in_features=2, out_features=2, bias=True) (Linear)"),
    (lambda: made(None), TypeError, "optimizer=None (NoneType) must be an optimizer of this library, such"),
    (lambda: made("adam"), TypeError, "optimizer='adam' (str) must be an optimizer of this library, such as"),
    (lambda: hn.HyperOptimizer(net, hn.sgd()), TypeError, "params is a module (Linear): give its parameters,"),
    (lambda: hn.HyperOptimizer(torch.nn.Sequential(net), hn.sgd()), TypeError, "params is a module (Sequential): give its parameters,"),
    (lambda: hn.HyperOptimizer(5, hn.sgd()), TypeError, "params is a int: give model.named_parameters()"),
    (
        lambda: hn.HyperOptimizer(dict(net.named_parameters()), hn.sgd()),
        TypeError,
        "params is a dict: give a list of groups, [{'params': ...}]",
    ),
    (lambda: made(lambda n, t: None), TypeError, "optimizer('0.0', tensor) returned None (NoneType), which must be an"),
    (lambda: made(lambda n, t: hn.sgd), TypeError, "optimizer('0.0', tensor) returned <rule sgd> (FunctionRule), which"),
    (lambda: hn.HyperOptimizer(hn.sgd(), PARAMS), TypeError, "optimizer=[Parameter containing: tensor([[1., 1.], [1., 1.]],"),
    (lambda: hn.Nested(None), TypeError, "optimizer=None (NoneType) must be an optimizer of this library, such"),
    (lambda: hn.Nested(hn.sgd), TypeError, "optimizer=<rule sgd> (FunctionRule) must be an optimizer of this"),
    (lambda: hn.Nested({"w": hn.sgd}), TypeError, "optimizer['w']=<rule sgd> (FunctionRule) must be an optimizer of this"),
    (lambda: hn.Nested([hn.sgd()]), TypeError, "optimizer=[sgd(lr=0.001, momentum=0.0, dampening=0.0,"),
    (lambda: hn.Nested(hn.sgd()).init([torch.ones(2)]), TypeError, "params is a list; it must be a mapping from names to tensors:"),
    (lambda: hn.Nested(hn.sgd()).init(net), TypeError, "params is a Linear; it must be a mapping from names to tensors:"),
    (lambda: hn.Nested(hn.sgd()).init({"w": [1.0]}), TypeError, "params['w']=[1.0] (list) must be a tensor"),
    (
        lambda: hn.Nested({"a": hn.sgd()}).init({"b": torch.ones(1)}),
        ValueError,
        "optimizer has no entry for the tensor 'b'; it has 'a': add one",
    ),
    (
        lambda: hn.Nested(hn.sgd()).init({"w": torch.ones(1)}, 5),
        TypeError,
        "start=5 (int) must be a mapping from learned hypers to start values",
    ),
    (
        lambda: hn.Nested(hn.sgd(lr=learned())).init({"w": torch.ones(1)}, {"lr": "x"}),
        TypeError,
        "start: lr='x' (str) must be a number, or learn(<number>,",
    ),
    (lambda: step({"v": torch.ones(2)}), ValueError, "grads has 'v', which is not in params; there are: 'w'"),
    (lambda: step({"w": torch.ones(1)}), ValueError, "grads['w'] has shape (1,), the tensor (2,): they must be equal"),
    (lambda: step({"w": None}), TypeError, "grads['w']=None (NoneType) must be a tensor; leave out tensors"),
    (lambda: step([torch.ones(2)]), TypeError, "grads is a list; it must be a mapping from the names of tensors"),
    (lambda: step({"w": "a"}), TypeError, "grads['w']='a' (str) must be a tensor; leave out tensors without a"),
    (lambda: step(learn="lr2"), TypeError, "learn='lr2' must be True, False, or a collection of learned hypers,"),
    (lambda: step(learn="lr"), TypeError, "learn='lr' must be True, False, or a collection of learned hypers,"),
    (lambda: step(learn=["lr2"]), ValueError, "learn has 'lr2', which is not learned; learned are: 'lr'"),
    (lambda: step(values={"v": {}}), ValueError, "values has 'v', which is no tensor; there are: 'w'"),
    (lambda: step(values={"w": {"lrr": 0.1}}), ValueError, "values['w'] has 'lrr', which is no hyper of sgd(lr=learn(0.1,"),
    (lambda: step(values={"w": {"lr": -1.0}}), ValueError, "values['w']['lr']=-1.0 is outside its domain NonNegative [0, inf):"),
    (lambda: step(values={"w": {"lr": "x"}}), TypeError, "values['w']['lr']='x' (str) must be a number"),
    (lambda: step(values=[1]), TypeError, "values is a list; it must be a mapping from the names of tensors"),
    (lambda: step(values={"w": 0.1}), TypeError, "values['w']=0.1 (float) must be a mapping from hypers to numbers"),
    (lambda: step(params=[torch.ones(2)]), TypeError, "params is a list; it must be a mapping from the names of tensors"),
    (lambda: step(params={"v": torch.ones(2)}), ValueError, "grads has 'w', which is not in params; there are: 'v'"),
    (lambda: defrule(separable="x"), ValueError, "rule: separable='x' must be one of 'element', 'row', 'tensor'"),
    (lambda: hn.rule("m"), TypeError, "init='m' (str) must be a function from a parameter to a state, such"),
    (lambda: defrule(nondifferentiable=("x",)), TypeError, "nondifferentiable names 'x', which is no hyper; hypers are: lr"),
    (lambda: hn.rule(lambda param, grad, state, *, lr: 0), TypeError, "<lambda>: parameter 'lr' has no default: declare its domain, such"),
    (lambda: hn.combinator(separable="x"), ValueError, "combinator: separable='x' must be one of 'element', 'row', 'tensor'"),
    (lambda: badrule(lambda p, g, s, lr: p), TypeError, "bad_rule returned a Tensor; an update must return (param, state), a"),
    (lambda: badrule(lambda p, g, s, lr: (p, s, 1)), TypeError, "bad_rule returned (Tensor, dict, int); an update must return (param,"),
    (lambda: badrule(lambda p, g, s, lr: None), TypeError, "bad_rule returned a NoneType; an update must return (param, state), a"),
    (lambda: badrule(lambda p, g, s, lr: (p, [1])), TypeError, "bad_rule returned (Tensor, list); an update must return (param,"),
    (
        lambda: badrule(lambda p, g, s, lr: (p, {"m": s["m"], "e": g}), hn.rules.zeros("m")),
        ValueError,
        "the update of 'w' returned a state that has the new key 'e': init and",
    ),
    (
        lambda: badrule(lambda p, g, s, lr: (p, {}), hn.rules.zeros("m")),
        ValueError,
        "the update of 'w' returned a state that lacks the key 'm': init and",
    ),
    (
        lambda: badrule(lambda p, g, s, lr: (p, {"m": g.sum()}), hn.rules.zeros("m")),
        ValueError,
        "the update of 'w' made shape () of its state 'm', which has (2,): it",
    ),
    (lambda: badrule(lambda p, g, s, lr: (p.sum(), s)), ValueError, "the update of 'w' made shape () of (2,): it must keep the tensor's"),
    (
        lambda: badrule(lambda p, g, s, lr: (p, {"m": 1.0}), hn.rules.zeros("m")),
        ValueError,
        "the update of 'w' returned a float as its state 'm', which init made",
    ),
    (
        lambda: badrule(lambda p, g, s, lr: (p, {"m": {}}), hn.rules.zeros("m")),
        ValueError,
        "the update of 'w' returned a dict as its state 'm', which init made a",
    ),
    (
        lambda: badrule(lambda p, g, s, lr: (p, s), lambda p: {"m": 0.0}),
        TypeError,
        "the initial state of bad_rule has 'm' of type float: init must return",
    ),
    (
        lambda: badrule(lambda p, g, s, lr: (p, s), lambda p: None),
        TypeError,
        "the initial state of bad_rule is a NoneType: init must return a dict",
    ),
    (lambda: hn.sgd(0.1, 0.9), TypeError, "sgd: only lr may be given by position: write sgd(lr=0.1, momentum=0.9); parameters go"),
    (lambda: hn.sgd(PARAMS, lr=0.1), TypeError, "sgd: only lr may be given by position: write sgd(lr=...); parameters go"),
    (lambda: hn.sgd("x"), TypeError, "sgd: only lr may be given by position: write sgd(lr=...); parameters go"),
    (lambda: hn.adam(betas=(0.9, 0.99), beta1=0.8), TypeError, "adam: betas=(0.9, 0.99) and beta1=0.8 are given: leave one of them out"),
    (lambda: hn.adam(betas=(0.9,)), ValueError, "adam: betas=(0.9,) must be 2 numbers, one each for beta1, beta2"),
    (lambda: hn.sgd(betas=(0.9, 0.9)), TypeError, "sgd has no argument 'betas'; it has lr, momentum, dampening,"),
    (lambda: hn.adam(betas=(0.9, 1.5)), ValueError, "adam: beta2=1.5 is outside its domain UnitInterval [0, 1): choose a"),
    (lambda: hn.project("sgd"), TypeError, "optimizer='sgd' (str) must be an optimizer of this library, such as"),
    (lambda: hn.project(hn.sgd(), hn.mars), TypeError, "project: only radius may be given by position: write project(optimizer,"),
    (lambda: hn.centralize(hn.sgd(), 1.0), TypeError, "centralize: nothing may be given by position: write centralize(optimizer)"),
    (
        lambda: made(hn.sgd(lr=learned())).hypers()["lr"]["weight"],
        KeyError,
        "hypers()['lr'] has no 'weight'; it has 'group 0'; a value that",
    ),
    (o2, ValueError, "one learn(...) object is given to lr in NonNegative [0, inf) and to"),
    (lambda: hn.sgd().replace(lr="x"), TypeError, "sgd: lr='x' (str) must be a number, or learn(<number>, by=<optimizer>)"),
    (lambda: hn.Optimizer(hn.sgd().rule, {"lr": 0.1}), TypeError, "sgd: settings have no value for the hyper 'momentum'"),
    (lambda: hn.Optimizer("sgd", {}), TypeError, "rule='sgd' (str) must be a rule, such as hn.get('sgd')"),
    (lambda: hn.testing.check_rule("sgd", examples=0), ValueError, "examples=0 must be an integer >= 1"),
    (lambda: hn.testing.check_rule("sgd", examples="a"), TypeError, "examples='a' (str) must be an integer >= 1"),
    (lambda: unrolled(hn.sgd), TypeError, "optimizer=<rule sgd> (FunctionRule) must be an optimizer of this library, so call"),
    (lambda: unrolled(None), TypeError, "optimizer=None (NoneType) must be an optimizer of this library"),
    (lambda: unrolled(hypers={"lr": -1.0}), TypeError, "hypers['lr']=-1.0 (float) must map names to values, such as {'model': ...}"),
    (lambda: unrolled(hypers={"lr": {"model": -1.0}}), ValueError, "hypers['lr']['model']=-1.0 is outside its domain NonNegative"),
    (lambda: unrolled(hypers={"rate": {"model": 0.1}}), ValueError, "hypers has 'rate'/'model', which is not learned; learned are"),
    (lambda: hn.functional(5), TypeError, "module=5 (int) must be a torch.nn.Module"),
    (lambda: hn.Interval(0.5, "a", 1), TypeError, "lower='a' (str) must be a number"),
    (lambda: hn.Positive("a"), TypeError, "default='a' (str) must be a number, or learn(<number>, by=<optimizer>)"),
    (lambda: hn.Positive(None), TypeError, "default=None (NoneType) must be a number, or learn(<number>,"),
    (lambda: hn.sgd_hd(lr="a"), TypeError, "learn: value='a' (str) must be a number"),
    (lambda: hn.adam_hd(hyper_lr=-1.0), ValueError, "sgd: lr=-1.0 is outside its domain NonNegative [0, inf): choose a"),
    (lambda: hn.rules.register(5, hn.sgd), TypeError, "name=5, factory=<rule sgd>: give a name, and a function that makes an"),
    (lambda: hn.rules.register("zzz", 5), TypeError, "name='zzz', factory=5: give a name, and a function that makes an"),
    (lambda: hn.sgd(lr=torch.ones(2)), ValueError, "sgd: lr is a tensor of shape (2,); it must be one number"),
    (lambda: hn.sgd(lr=torch.tensor(-0.1)), ValueError, "sgd: lr=-0.1"),
    (lambda: hn.optim.SGD(PARAMS[0]), TypeError, "params is a tensor (Parameter): give a list, [tensor]"),
    (lambda: hn.sgd(lr=nan), ValueError, "sgd: lr=nan is outside its domain NonNegative [0, inf): choose a"),
    (lambda: hn.sgd(lr=True), TypeError, "sgd: lr=True (bool) must be a number, or learn(<number>,"),
    (
        lambda: made(hn.optim.SGD(PARAMS)),
        TypeError,
        "optimizer is SGD, which holds tensors; it must be a rule with its hypers, such as hn.adamw(",
    ),
    (
        lambda: hn.learn(0.1, by=torch.optim.LBFGS),
        TypeError,
        "by is torch's LBFGS; it must be an optimizer of this library, such as hn.adamw(",
    ),
    (
        lambda: made(net),
        TypeError,
        "optimizer=Linear(in_features=2, out_features=2, bias=True) (Linear) must be an optimizer of this library, such as",
    ),
    (lambda: hn.HyperOptimizer(net, hn.sgd()), TypeError, "params is a module (Linear): give its parameters, model.named_parameters()"),
    (
        lambda: hn.project(hn.sgd),
        TypeError,
        "optimizer=<rule sgd> (FunctionRule) must be an optimizer of this library, so call it: sgd(...)",
    ),
    (
        lambda: hn.Nested(torch.optim.AdamW),
        TypeError,
        "optimizer is torch's AdamW; it must be an optimizer of this library, such as hn.adamw(lr=1e-3)",
    ),
    (
        lambda: ftp.FTP(torch.optim.AdamW),
        TypeError,
        "optimizer is the class AdamW; it must be a torch.optim.Optimizer, such as torch.optim.AdamW(",
    ),
    (
        lambda: with_option(rate=learned()),
        TypeError,
        "with_option: rate=learn(0.1, by=sgd(lr=0.001, momentum=0.0, dampening=0.0, weight_decay=0.0)) is learned, but rate is an option "
        "and not a hyper: give it a plain value, or declare its domain in the rule, such as rate=hn.Positive(0.1)",
    ),
    (
        lambda: hn.sgd(nesterov=learned()),
        TypeError,
        "sgd: nesterov=learn(0.1, by=sgd(lr=0.001, momentum=0.0, dampening=0.0, weight_decay=0.0)) is learned, but nesterov is an option",
    ),
    (
        lambda: hn.sweep(hn.sgd(lr=learned()), {"w": torch.ones(2)}, [0], lambda p, b: p["w"].sum()),
        ValueError,
        "nothing differs between runs: give starts, such as",
    ),
    (lambda: hn.sgd(lr=None), TypeError, "sgd: lr=None (NoneType) must be a number, or learn(<number>,"),
    (lambda: hn.HyperOptimizer(PARAMS), TypeError, f"HyperOptimizer: missing a required argument: 'optimizer'; {HYPERS_ARE}"),
    (
        lambda: hn.HyperOptimizer(PARAMS, hn.sgd(), lr=0.1),
        TypeError,
        f"HyperOptimizer: got an unexpected keyword argument 'lr'; {HYPERS_ARE}",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), CASES, ids=[words for _, _, words in CASES])
def test_bad_arguments_are_refused_by_name(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    found = raised.value.args[0] if isinstance(raised.value, KeyError) else str(raised.value)
    assert " ".join(found.split()).startswith(words)


def test_none_is_no_bound() -> None:
    assert learned(bounds=(None, 1)).bounds == (-math.inf, 1)
    assert learned(bounds=[0, None]).bounds == (0, math.inf)
    assert learned().bounds == learned(bounds=(None, None)).bounds == (-math.inf, math.inf)


def test_betas_are_accepted_as_in_torch() -> None:
    assert hn.adam(betas=(0.8, 0.99)).declared == hn.adam(beta1=0.8, beta2=0.99).declared
    assert hn.adan(betas=(0.8, 0.9, 0.99)).declared["beta3"] == 0.99
    assert hn.adamw(betas=(learned(0.9), 0.99)).learned.keys() == {"beta1"}


def test_other_keys_of_groups_stay() -> None:
    """As those of schedulers, trainers and torch's own optimizers."""
    others = {"initial_lr": 0.1, "lr_scale": 0.5, "name": "head", "foreach": None, "capturable": False, "maximize": False}
    assert group(others).param_groups[0].items() >= others.items()


def test_a_schedule_may_end_at_an_open_end() -> None:
    @hn.rule
    def open_below(param: Any, grad: Any, state: Any, *, lr: Any = hn.Positive(0.1)) -> Any:
        return param - lr * grad, state

    w = torch.nn.Parameter(torch.ones(2))
    opt = hn.HyperOptimizer([w], open_below())
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=2)
    for _ in range(3):
        w.grad = torch.ones(2)
        opt.step()
        scheduler.step()
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.85))


def test_options_of_own_rules_are_checked_by_their_annotations() -> None:
    lr = hn.Positive(0.1)

    @hn.rule
    def with_options(
        param: Any,
        grad: Any,
        state: Any,
        *,
        lr: Any = lr,
        window: int = 3,
        rate: float = 1,
        other: Any = 2,
        bare=4,
        flag=True,
        mode: str = "a",
    ) -> Any:
        return param - lr * grad, state

    with_options(window=5, rate=2, other="x", bare=0.5, flag=False, mode="b")
    for wrong in ({"window": 2.5}, {"window": True}, {"rate": "x"}, {"bare": "x"}, {"flag": 1}):
        with pytest.raises(TypeError, match=f"with_options: {next(iter(wrong))}="):
            with_options(**wrong)


def test_values_by_name_are_dicts_in_every_way() -> None:
    found = made(hn.sgd(lr=learned())).hypers()
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), torch.utils._pytree.tree_map(torch.clone, found)):
        assert other == found
    assert found["lr"].get("weight") is None
