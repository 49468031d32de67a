"""What the benchmarks of optimizers step: sets of parameters, and optimizers with the bytes that a step has to touch."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import hyperopt_nested as hn
from ftp import SGDP, AdamP

Shapes = list[tuple[int, ...]]
Params = list[nn.Parameter]


def vit_b(blocks: int = 12) -> Shapes:
    """ViT-B/16: 86.6 million numbers in 152 tensors; or a cut of it."""
    wide = 768
    stem = [(1, 1, wide), (1, 197, wide), (wide, 3, 16, 16), (wide,)]
    return [*stem, *_block(wide) * blocks, (wide,), (wide,), (1000, wide), (1000,)]


def resnet50() -> Shapes:
    """25.6 million numbers in 161 tensors."""

    def convolution(channels: int, given: int, size: int) -> Shapes:
        return [(channels, given, size, size), (channels,), (channels,)]  # with a batch norm

    found, given = convolution(64, 3, 7), 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += convolution(inner, given, 1) + convolution(inner, inner, 3) + convolution(4 * inner, inner, 1)
            found += convolution(4 * inner, given, 1) if block == 0 else []
            given = 4 * inner
    return [*found, (1000, given), (1000,)]


def small() -> Shapes:
    """A small transformer: a million numbers in 150 tensors."""
    wide = 80
    return [(500, wide), (1, 64, wide), *_block(wide) * 12, (wide,), (wide,), (100, wide), (100,)]


def _block(wide: int) -> Shapes:
    linears = [(3 * wide, wide), (wide, wide), (4 * wide, wide), (wide, 4 * wide)]
    biased = [shape for linear in linears for shape in (linear, linear[:1])]
    return [(wide,), (wide,), *biased[:4], (wide,), (wide,), *biased[4:]]


SETS: dict[str, Callable[[], Shapes]] = {"vit_b": vit_b, "resnet50": resnet50, "small": small}


def size(shapes: Shapes) -> int:
    return sum(map(prod, shapes))


def drawn(shapes: Shapes, dtype: torch.dtype = torch.float32) -> Params:
    """Parameters, with gradients."""
    params = [nn.Parameter(torch.randn(shape, dtype=dtype).mul_(0.02)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def twins(params: Params) -> Params:
    """Copies, with the same gradients, not copied."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for param, copy in zip(params, copies, strict=True):
        copy.grad = param.grad
    return copies


@dataclass(frozen=True)
class Candidate:
    """An optimizer, and what a step of it has to touch.

    Attributes:
        make: makes it.
        own: how often a tensor of the parameter's dtype is read or written: gradient, parameter, anchor, sensitivity.
        moments: how often one of its rule's state is.
        state: the dtype of that, if not the parameter's.
    """

    make: Callable[[Params], torch.optim.Optimizer]
    own: int
    moments: int
    state: torch.dtype | None = None

    def touched(self, dtype: torch.dtype) -> int:
        """Bytes a parameter that a step reads and writes, if everything is read, or written, once for each pass that needs it."""
        return self.own * dtype.itemsize + self.moments * (self.state or dtype).itemsize


LR, DECAY, MOMENTUM = 1e-3, 0.01, 0.9
BY = hn.sgd(lr=1e-9)  # so that values stay where they are
ADAMW_FUSED, SGD_FUSED, ADAMW_FOREACH = "torch AdamW, fused", "torch SGD, fused", "torch AdamW, foreach"
NOTHING, RATE, DEFAULT = "AdamW, nothing learned", "AdamW, lr learned", "AdamW, lr learned by default"
BOTH, BOTH_BY_TENSOR = "AdamW, lr and decay learned", "AdamW, lr and decay learned per tensor"
PUBLISHED, ALIKE, ROUNDED = "published", "moments in bfloat16", "stochastic rounding"
PLAIN = {"own": 3}  # gradient and parameter are read, the parameter is written; by delayed values too
LEARNED = {"own": 4}  # hypergradients need the parameter too; moments are renewed in that pass, and read again in the other
PROJECTED = {"own": 7}  # gradient and displacement are read; then gradient, parameter and anchor; parameter and displacement are written


def adam_like(backends: Sequence[str], published: ModuleType | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Candidate]:
    """By name; the first is what the others are compared with."""

    def nested(
        backend: str, lr: float | hn.Learn = LR, decay: float | hn.Learn = DECAY, **how: Any
    ) -> Callable[[Params], torch.optim.Optimizer]:
        return lambda params: hn.HyperOptimizer(params, hn.adamw(lr=lr, weight_decay=decay), backend=backend, **how)

    found = {
        ADAMW_FUSED: Candidate(lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True), **PLAIN, moments=4),
        ADAMW_FOREACH: Candidate(lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, foreach=True), **PLAIN, moments=4),
    }
    model, tensor = ([hn.learn(value, by=BY, per=per) for value in (LR, DECAY)] for per in ("model", "tensor"))
    for backend in backends:
        found[f"{NOTHING}, {backend}"] = Candidate(nested(backend), **PLAIN, moments=4, state=torch.float32)
        if dtype == torch.bfloat16:
            alike, rounded = {"state_dtype": dtype}, {"rounding": "stochastic"}
            found[f"{NOTHING}, {ROUNDED}, {backend}"] = Candidate(nested(backend, **rounded), **PLAIN, moments=4, state=torch.float32)
            found[f"{NOTHING}, {ALIKE}, {backend}"] = Candidate(nested(backend, **alike), **PLAIN, moments=4)
            found[f"{NOTHING}, {ALIKE}, {ROUNDED}, {backend}"] = Candidate(nested(backend, **alike, **rounded), **PLAIN, moments=4)
        found[f"{RATE}, {backend}"] = Candidate(nested(backend, model[0]), **LEARNED, moments=6, state=torch.float32)
        found[f"{DEFAULT}, {backend}"] = Candidate(nested(backend, hn.learn(LR)), **PLAIN, moments=4, state=torch.float32)
        found[f"{BOTH}, {backend}"] = Candidate(nested(backend, *model), **LEARNED, moments=6, state=torch.float32)
        found[f"{BOTH_BY_TENSOR}, {backend}"] = Candidate(nested(backend, *tensor), **LEARNED, moments=6, state=torch.float32)
        found |= _projected(partial(AdamP, lr=LR, weight_decay=DECAY), backend, dtype, moments=4, state=torch.float32)
    if published:
        make = lambda params: published.AdamP(_with_anchors(params), lr=LR, weight_decay=DECAY, exclude_set={}, k=1.0)  # noqa: E731
        found[f"AdamP, {PUBLISHED}"] = Candidate(make, **PROJECTED, moments=4)
    return found


def sgd_like(backends: Sequence[str], published: ModuleType | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Candidate]:
    """By name; the first is what the others are compared with."""

    found = {SGD_FUSED: Candidate(lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, fused=True), **PLAIN, moments=2)}
    for backend in backends:
        found |= _projected(partial(SGDP, lr=LR, momentum=MOMENTUM), backend, dtype, moments=2)
    if published:
        make = lambda params: published.SGDP(_with_anchors(params), lr=LR, momentum=MOMENTUM, exclude_set={}, k=1.0)  # noqa: E731
        found[f"SGDP, {PUBLISHED}"] = Candidate(make, **PROJECTED, moments=2)
    return found


def _projected(
    make: "partial[AdamP] | partial[SGDP]", backend: str, dtype: torch.dtype, moments: int, state: torch.dtype | None = None
) -> dict[str, Candidate]:
    """As it is; and in bfloat16, with moments as torch's optimizers keep them, if they have a dtype of their own, `state`."""
    name = make.func.__name__
    found = {f"{name}, {backend}": Candidate(partial(make, backend=backend), **PROJECTED, moments=moments, state=state)}
    if state and dtype == torch.bfloat16:
        alike = partial(make, backend=backend, state_dtype=dtype)
        found[f"{name}, {ALIKE}, {backend}"] = Candidate(alike, **PROJECTED, moments=moments)
    return found


def _with_anchors(params: Params) -> list[Mapping[str, object]]:
    names, anchors = [f"tensor {i}" for i in range(len(params))], [param.detach().clone() for param in params]
    return [{"params": params, "name": names, "pre": anchors}]


def load_published(path: Path | None) -> ModuleType | None:
    """The authors' program; None, loudly, without a path."""
    if path is None:
        print("\n*** THE PUBLISHED PROGRAM IS SKIPPED: give --published path/to/FTP.py to compare with it ***\n")
        return None
    spec = importlib.util.spec_from_file_location("published_ftp", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(candidate: Candidate, params: Params, steps: int = 0) -> torch.optim.Optimizer | None:
    """The optimizer, after some steps; None where its backend does not exist, or does not serve it."""
    try:
        opt = candidate.make(params)
        for _ in range(steps):
            opt.step()
    except ValueError as error:
        if str(error).startswith("backend="):
            print(f"*** {error} ***")
            return None
        raise
    return opt
