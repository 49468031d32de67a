"""Pre-trained models by name, their checkpoints, and their heads."""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftp.finetuning.files import package
from ftp.finetuning.heads import MEAN, STD, Preprocessing, find_head, logits, replace_head


@dataclass(frozen=True)
class Pretrained:
    """A model with a head for the classes at hand.

    Attributes:
        model: returns logits.
        head: name of the module that makes them.
        preprocessing: of its inputs.
    """

    model: nn.Module
    head: str
    preprocessing: Preprocessing


def load(
    name: str, classes: int, *, checkpoint: Path | None = None, head: str | None = None, size: int | None = None, seed: int = 0
) -> Pretrained:
    """Make a model, load its weights, and give it a head for so many classes.

    Args:
        name: of timm or torchvision, or "module:factory", where the module may be in the present folder and the factory takes no
            arguments. A model of one's own may have the attributes `input_size`, `mean`, `std` and `crop`.
        classes: how many.
        checkpoint: a safetensors file, or one of `torch.save`, with weights to load; None takes those that the model comes with.
        head: name of the module that makes the logits; None finds it: the last linear layer, or convolution of 1 by 1.
        size: height and width of its images; None is the model's own.
        seed: of the new head.

    Raises:
        ValueError: there is no such model, it does not take such images, it has no head of that name or none that is found, or the
            checkpoint is of another model.
        ModuleNotFoundError: the module, timm or torchvision is not installed.
        OSError: the checkpoint cannot be read.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        model, preprocessing = _from_module(name) if ":" in name else _from_library(name, pretrained=checkpoint is None)
        preprocessing = preprocessing if size is None else replace(preprocessing, size=size)
        found = find_head(model, preprocessing) if head is None else head
        if checkpoint is not None:
            load_weights(model, checkpoint, found)
        replace_head(model, found, classes)
        if (count := logits(model, preprocessing).shape[1]) != classes:
            raise ValueError(f"the model has {count} outputs with a head {found!r} for {classes} classes: name another module, with --head")
    return Pretrained(model, found, preprocessing)


def _from_module(name: str) -> tuple[nn.Module, Preprocessing]:
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as missing:
        if missing.name != module:
            raise
        raise ValueError(f"model={name!r}: there is no module {module!r} in this folder, and none is installed") from missing
    if not callable(factory):
        raise ValueError(f"model={name!r}: {module} defines no function {attribute!r}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name!r}: {attribute}() returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model, _own(model)


def _own(model: nn.Module) -> Preprocessing:
    """What a model says of its inputs; of what it does not say, the channels follow from its first convolution."""
    channels = next((each.in_channels for each in model.modules() if isinstance(each, nn.Conv2d)), 3)
    mean, std = ((0.5,), (0.5,)) if channels == 1 else (MEAN, STD)
    size = getattr(model, "input_size", 224)
    return Preprocessing(
        size=int(size[-1] if isinstance(size, (tuple, list)) else size),
        mean=tuple(getattr(model, "mean", mean)),
        std=tuple(getattr(model, "std", std)),
        crop=float(getattr(model, "crop", 0.875)),
    )


def _from_library(name: str, *, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    known: list[str] = []
    if find_spec("timm"):
        timm = package("timm")
        if timm.is_model(name):
            model = _fetched(name, lambda: timm.create_model(name, pretrained=pretrained))
            config = timm.data.resolve_model_data_config(model)
            own = Preprocessing(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]), config["crop_pct"])
            return model, own
        known += timm.list_models()
    if find_spec("torchvision"):
        models = package("torchvision.models")
        if name in (names := models.list_models(models)):
            weights = models.get_model_weights(name).DEFAULT
            transforms = weights.transforms()
            (size,), (resized,) = transforms.crop_size, transforms.resize_size
            model = _fetched(name, lambda: models.get_model(name, weights=weights if pretrained else None))
            return model, Preprocessing(size, tuple(transforms.mean), tuple(transforms.std), size / resized)
        known += names
    if not known:
        raise ModuleNotFoundError(
            f"model={name!r} needs timm or torchvision, and neither is installed: pip install timm, or give module:factory", name="timm"
        )
    close = ", ".join(get_close_matches(name, known, 3))
    raise ValueError(f"model={name!r} is none of timm or torchvision" + (f"; there is {close}" if close else ""))


def _fetched(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    try:
        return create()
    except OSError as error:  # as those are of downloads
        raise OSError(f"model={name!r}: its weights cannot be downloaded ({error}). Give a file of them, with --checkpoint") from error


def load_weights(model: nn.Module, path: Path, head: str) -> None:
    """Load a checkpoint, whose head may differ or be missing.

    Raises:
        ValueError: it is no checkpoint, or of another model. The message names a tensor.
        OSError: it cannot be read.
    """
    weights = _read(path)
    own = model.state_dict()
    for name in [name for name in own if name.startswith(f"{head}.") and (name not in weights or weights[name].shape != own[name].shape)]:
        weights[name] = own[name]
    weights = {name: value for name, value in weights.items() if name in own or not name.startswith(f"{head}.")}
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unknown or other:
        said = [f"has no {missing[0]!r} ({len(missing)} missing)"] if missing else []
        said += [f"has {unknown[0]!r}, which the model has not ({len(unknown)} such)"] if unknown else []
        said += [f"has {other[0]!r} of shape {tuple(weights[other[0]].shape)}, the model {tuple(own[other[0]].shape)}"] if other else []
        raise ValueError(f"checkpoint={str(path)!r} is of another model: it {', '.join(said)}")
    model.load_state_dict(weights)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without the wrappings that trainers put around them."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            content: Any = package("safetensors.torch").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"checkpoint={str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"checkpoint={str(path)!r} holds no weights by name: give the state dict of a model")
    return {str(name).removeprefix("module."): value for name, value in content.items()}
