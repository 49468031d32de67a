"""Inputs and heads of models: what they take, the module that makes their logits, and a new one in its place."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet: of models that do not say what they were trained with."""


@dataclass(frozen=True)
class Preprocessing:
    """Images as a model takes them.

    Attributes:
        size: height and width in pixels.
        mean: of each channel, of values in [0, 1]; one channel is gray.
        std: of each channel.
        crop: share of the shorter side that a crop takes.
    """

    size: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop: float = 0.875

    @property
    def channels(self) -> int:
        """Channels of an image: 1 or 3."""
        return len(self.mean)


def logits(model: nn.Module, preprocessing: Preprocessing) -> Tensor:
    """What a model returns for two black images, shape (2, classes).

    Raises:
        ValueError: it does not take them, or returns something else.
    """
    training, device = model.training, next((p.device for p in model.parameters()), torch.device("cpu"))
    shape = 2, preprocessing.channels, preprocessing.size, preprocessing.size
    try:
        with torch.inference_mode():
            found = model.eval()(torch.zeros(shape, device=device))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the model does not take images of shape {shape}: {error}. Give --size, or a model with `input_size`") from error
    finally:
        model.train(training)
    if not isinstance(found, Tensor) or found.ndim != 2:
        shown = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"the model returns {shown}; it must return logits, of shape (images, classes)")
    return found


def find_head(model: nn.Module, preprocessing: Preprocessing) -> str:
    """Find the module that makes the logits: the one that timm names, or the last linear layer or 1x1 convolution with as many outputs.

    Raises:
        ValueError: there is none.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier) and _outputs(own := classifier()):
        return names[own]
    called = list[nn.Module]()
    layers = [each for each in model.modules() if _outputs(each)]
    handles = [each.register_forward_hook(lambda module, *_: called.append(module)) for each in layers]
    try:
        outputs = logits(model, preprocessing).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    fitting = [module for module in called if _outputs(module) == outputs]
    if not fitting:
        raise ValueError("the model has no linear layer that makes its logits: name the module that does so, with --head")
    return names[fitting[-1]]


def _outputs(module: nn.Module) -> int:
    """Outputs of a linear layer or a 1x1 convolution; 0 of others."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) else 0


def replace_head(model: nn.Module, name: str, classes: int) -> None:
    """Give a model a new head, unless the one that it has is for so many classes.

    Args:
        model: what is changed.
        name: of a linear layer or 1x1 convolution.
        classes: how many.

    Raises:
        ValueError: there is no such module, or it is of another kind.
    """
    modules = dict(model.named_modules())
    if not name or name not in modules:
        last = ", ".join([each for each in modules if each][-3:])
        raise ValueError(f"head={name!r} is no module of the model; its last ones are {last}")
    old = modules[name]
    if not _outputs(old):
        raise ValueError(f"head={name!r} is a {type(old).__name__}; it must be a linear layer or a 1x1 convolution")
    if _outputs(old) == classes:
        return
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d)
        new = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
    weight = old.weight
    assert isinstance(weight, Tensor)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new.to(weight.device, weight.dtype))
    if hasattr(model, "num_classes"):  # as models of timm have it
        setattr(model, "num_classes", classes)  # noqa: B010
