"""Layers in a form that can be differentiated: torch's change buffers in place, or lack a derivative."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hyperopt_nested.hypergradients.carried import CARRIED

FOLLOWING: ContextVar[bool] = ContextVar("following", default=False)
"""Whether running statistics are followed: whether someone reads the buffers that a call leaves."""


def prepare(module: nn.Module) -> set[str]:
    """Put the layers of a module (a copy of a user's) into that form.

    Returns:
        Names of the buffers that they change.

    Raises:
        NotImplementedError: a layer changes its parameters in place.
    """
    found: set[str] = set()
    for name, each in module.named_modules():
        buffers: list[str] = []
        if isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and each.max_norm is not None:
            raise NotImplementedError(
                f"module {name!r} ({type(each).__name__}) has max_norm={each.max_norm!r}, which changes its weight in place in each call, "
                "outside of the optimizer: set max_norm=None"
            )
        for hook in each._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                hook.compute_weight = functools.partial(_hooked_spectral_norm, hook)  # type: ignore[method-assign]
                buffers += [f"{hook.name}_u", f"{hook.name}_v"]
            elif isinstance(hook, WeightNorm):
                hook.compute_weight = functools.partial(_hooked_weight_norm, hook)  # type: ignore[method-assign]
        if isinstance(each, _SpectralNorm):
            each.forward = functools.partial(_spectral_norm, each)  # type: ignore[method-assign]
            buffers += ["_u", "_v"]
        elif type(each) is nn.Dropout:
            each.forward = functools.partial(_dropout, each)  # type: ignore[method-assign]
        elif isinstance(each, _WeightNorm):
            each.forward = functools.partial(_weight_norm, each)  # type: ignore[method-assign]
        elif isinstance(each, (_BatchNorm, _InstanceNorm)):
            each.forward = functools.partial(_norm, each)  # type: ignore[method-assign]
            buffers += ["running_mean", "running_var"]
            if isinstance(each, _BatchNorm) and each.training:
                each.track_running_stats = False  # it would change them in place; `_norm` follows them
        found |= {f"{name}.{buffer}".removeprefix(".") for buffer in buffers}
    return found


def statistics_read(module: nn.Module) -> list[str]:
    """Names of the running statistics that a module normalizes with, in the modes that its layers have now."""
    return [
        f"{name}.{key}".removeprefix(".")
        for name, each in module.named_modules()
        if isinstance(each, (_BatchNorm, _InstanceNorm)) and not each.training
        for key in ("running_mean", "running_var")
        if getattr(each, key) is not None
    ]


def _norm(layer: _BatchNorm | _InstanceNorm, x: Tensor) -> Tensor:
    """Batch or instance normalization whose running statistics are differentiable functions of inputs, and not changed in place."""
    original: Any = type(layer).forward
    forward: Callable[[Tensor], Tensor] = functools.partial(original, layer)
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return forward(x)
    if not layer.training:
        return _normalized(layer, x, mean, var) if _may_be_differentiated(mean) else forward(x)
    new = _followed(layer, x, mean, var) if FOLLOWING.get() else (mean, var)
    layer.running_mean = layer.running_var = None
    try:
        return forward(x)
    finally:
        layer.running_mean, layer.running_var = new


def _may_be_differentiated(tensor: Tensor) -> bool:
    return tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _normalized(layer: _BatchNorm | _InstanceNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalization by running statistics; torch's own has no derivative with respect to these."""
    channel = _channel(layer, x)
    shape = [-1 if dim == channel else 1 for dim in range(x.ndim)]
    found = (x.to(mean.dtype) - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + layer.eps)
    if layer.affine:
        found = found * layer.weight.reshape(shape) + layer.bias.reshape(shape)
    return found.to(x.dtype)


def _followed(layer: _BatchNorm | _InstanceNorm, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics after an input in training mode."""
    factor: float | Tensor = layer.momentum or 0.0
    channel, x = _channel(layer, x), x.to(mean.dtype)
    if isinstance(layer, _BatchNorm):
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked = layer.num_batches_tracked + 1
            if layer.momentum is None:
                factor = 1 / layer.num_batches_tracked.to(mean.dtype)
        now_var, now_mean = torch.var_mean(x, [dim for dim in range(x.ndim) if dim != channel], correction=1)
    else:
        now_var, now_mean = torch.var_mean(x, list(range(channel + 1, x.ndim)), correction=1)
        if channel:
            now_var, now_mean = now_var.mean(0), now_mean.mean(0)
    return (1 - factor) * mean + factor * now_mean, (1 - factor) * var + factor * now_var


def _channel(layer: _BatchNorm | _InstanceNorm, x: Tensor) -> int:
    """The dimension of channels: without one of examples, the first."""
    return 0 if isinstance(layer, _InstanceNorm) and x.ndim == layer._get_no_batch_dim() else 1  # type: ignore[no-untyped-call]


def _iterated(
    weight: Tensor, matrix_of: Callable[[Tensor], Tensor], u: Tensor, v: Tensor, count: int, eps: float, *, u_first: bool
) -> tuple[Tensor, Tensor]:
    """Power iterations. As in torch, gradients take the result for constant; derivatives of gradients do not."""
    carried = CARRIED.get()
    twin = carried.twin(weight) if carried else None
    with torch.no_grad() if twin is None else torch.enable_grad():
        matrix = matrix_of(weight if twin is None else twin)
        for _ in range(count):
            if u_first:
                u = nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=eps)
            v = nn.functional.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps)
            if not u_first:
                u = nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=eps)
    return u, v


def _spectral_norm(layer: Any, weight: Tensor) -> Tensor:
    """`torch.nn.utils.parametrizations.spectral_norm`."""
    if weight.ndim == 1 or not layer.training:
        found: Tensor = type(layer).forward(layer, weight)
        return found
    matrix_of = layer._reshape_weight_to_matrix
    u, v = _iterated(weight, matrix_of, layer._u, layer._v, layer.n_power_iterations, layer.eps, u_first=True)
    layer._u, layer._v = u, v
    return weight / torch.vdot(u, torch.mv(matrix_of(weight), v))


def _hooked_spectral_norm(hook: SpectralNorm, module: nn.Module, do_power_iteration: bool) -> Tensor:
    """`torch.nn.utils.spectral_norm`."""
    weight, u, v = (getattr(module, f"{hook.name}_{part}") for part in ("orig", "u", "v"))
    if do_power_iteration:
        u, v = _iterated(weight, hook.reshape_weight_to_matrix, u, v, hook.n_power_iterations, hook.eps, u_first=False)
        setattr(module, f"{hook.name}_u", u)
        setattr(module, f"{hook.name}_v", v)
    found: Tensor = weight / torch.dot(u, torch.mv(hook.reshape_weight_to_matrix(weight), v))
    return found


def _weight_norm(layer: Any, g: Tensor, v: Tensor) -> Tensor:
    """`torch.nn.utils.parametrizations.weight_norm`; torch's operation has no forward derivative, and its double backward is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, layer.dim))


def _hooked_weight_norm(hook: WeightNorm, module: nn.Module) -> Tensor:
    """`torch.nn.utils.weight_norm`."""
    return _weight_norm(hook, getattr(module, f"{hook.name}_g"), getattr(module, f"{hook.name}_v"))


def _dropout(layer: nn.Dropout, x: Tensor) -> Tensor:
    """Dropout with the same masks under torch.func as without: torch draws other ones there, if the input is not contiguous."""
    original: Any = nn.Dropout.forward
    plain = x
    while torch._C._functorch.is_functorch_wrapped_tensor(plain) and not torch._C._functorch.is_batchedtensor(plain):
        plain = torch._C._functorch.get_unwrapped(plain)
    if plain is x or torch._C._functorch.is_batchedtensor(plain) or x.device.type != "cpu" or not layer.training or not 0 < layer.p < 1:
        found: Tensor = original(layer, x)
        return found
    return x * torch.empty_like(plain).bernoulli_(1 - layer.p).div_(1 - layer.p)
