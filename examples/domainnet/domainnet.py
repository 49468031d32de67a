"""Fine-tune on DomainNet as the paper of Fast Trainable Projection does: on `real`, tested on it and on domains that training never saw.

README.md says where data and weights come from. `python examples/domainnet/domainnet.py --help` lists all settings.
"""

import copy
import itertools
import random
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

import ftp
from ftp.finetuning import Progress, Result, Settings, write_report
from ftp.finetuning.command import table
from ftp.finetuning.heads import Preprocessing
from ftp.finetuning.models import Pretrained, load
from ftp.finetuning.run import Report

SHIFTS = "sketch,painting,infograph,clipart"
VALIDATION = 0.1
"""Share of the training images that choose the epoch."""

MEAN, STD = (0.5964, 0.5712, 0.5336), (0.3228, 0.3165, 0.3374)
"""Of DomainNet's colors, as the published program has them."""

CROP = 224 / 256
"""Share of the shorter side that is tested on."""

MODELS = {"clip-resnet50": "clip_resnet:clip_resnet50", "moco-v3-resnet50": "resnet50"}
"""Networks of the paper, whose weights are converted from the files that their authors publish."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Entry:
    """A line of an image list: a path below the folder of the data, and a label."""

    path: str
    label: int

    @property
    def name(self) -> str:
        """The class: the folder of the image."""
        return Path(self.path).parent.name


def read_list(data: Path, name: str) -> list[Entry]:
    """Read an image list, and look for all of its images.

    Args:
        data: folder of lists and images.
        name: of the list, such as "real_train.txt".

    Raises:
        FileNotFoundError: the list or an image is missing.
        ValueError: a line is none of a list, or there is none.
    """
    if not (data / name).is_file():
        raise FileNotFoundError(f"{data / name}: there is no such image list; README.md says where it comes from")
    entries = []
    for number, line in enumerate((data / name).read_text(encoding="utf-8").splitlines(), start=1):
        path, _, label = line.rpartition(" ")
        if not path or not label.isdecimal():
            raise ValueError(f"{data / name}, line {number}: {line!r} is not a path and a label, as in real/dog/real_092_000016.jpg 91")
        entries.append(Entry(path, int(label)))
    if not entries:
        raise ValueError(f"{data / name} names no images")
    missing = [entry.path for entry in entries if not (data / entry.path).is_file()]
    if missing:
        archive = missing[0].partition("/")[0]
        raise FileNotFoundError(
            f"{data / name} names {missing[0]}, which is not there ({len(missing):,} of {len(entries):,} are missing): "
            f"unpack {archive}.zip in {data}"
        )
    return entries


def class_names(entries: Iterable[Entry]) -> list[str]:
    """Names of the classes 0, 1, ... of the training images.

    Raises:
        ValueError: a label has no image, or the images of two folders.
    """
    names: dict[int, str] = {}
    for entry in entries:
        if names.setdefault(entry.label, entry.name) != entry.name:
            raise ValueError(f"label {entry.label} is {names[entry.label]!r} and {entry.name!r}: one of these lines is wrong")
    if gaps := sorted(set(range(max(names) + 1)) - names.keys()):
        raise ValueError(f"no training image has the label {gaps[0]}, though there is a label {max(names)}")
    return [names[label] for label in range(len(names))]


def split(entries: Sequence[Entry], percent: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Choose a part of the images of each class, at least two, and split it for training and validation, at least one each.

    Raises:
        ValueError: `percent` is not in (0, 100], or a class has one image.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent} must be above 0, and at most 100")
    by_class: dict[str, list[Entry]] = {name: [] for name in class_names(entries)}
    for entry in entries:
        by_class[entry.name].append(entry)
    train, validation = [], []
    for name, own in by_class.items():
        if len(own) < 2:
            raise ValueError(f"the class {name!r} has one training image: two are the least")
        random.Random(f"{seed} {name}").shuffle(own)
        own = own[: max(2, round(percent / 100 * len(own)))]
        held_out = max(1, round(VALIDATION * len(own)))
        validation += own[:held_out]
        train += own[held_out:]
    return train, validation


def training(data: Path, train: str, validation: str | None, percent: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Images for training and validation: of two lists, or split from one.

    Raises:
        ValueError: a list cannot be read, or there are two and `percent` is not 100.
        FileNotFoundError: a list or an image is missing.
    """
    if validation is None:
        return split(read_list(data, train), percent, seed)
    if percent != 100:
        raise ValueError(f"percent={percent:g} with a list for validation: give lists of that part of the images")
    return read_list(data, train), read_list(data, validation)


class ImageList(Dataset[tuple[Tensor, int]]):
    """Images of a list, read when they are needed.

    Args:
        data: folder of the images.
        entries: of the list.
        preprocessing: of the model.
        augment: crop at random, as `torchvision.transforms.RandomResizedCrop` does, and mirror half of the images; else crop the center.

    Attributes:
        identity: what tells these images from others, for a run to go on with the same.
    """

    def __init__(self, data: Path, entries: Sequence[Entry], preprocessing: Preprocessing, *, augment: bool = False) -> None:
        self.data, self.entries, self.preprocessing, self.augment = data, entries, preprocessing, augment
        digest = blake2b(repr((entries, preprocessing, augment)).encode(), digest_size=8).hexdigest()
        self.identity = f"{len(entries):,} images ({digest})"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An input of the model, shape (3, size, size), and its label.

        Raises:
            ValueError: the image cannot be read. The message names it.
        """
        entry, how = self.entries[index], self.preprocessing
        try:
            with Image.open(self.data / entry.path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{self.data / entry.path} cannot be read ({error}): replace it, or remove its line") from error
        box = random_box(*image.size) if self.augment else center_box(*image.size, how.crop)
        image = image.resize((how.size, how.size), Image.Resampling.BILINEAR, box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(how.size, how.size, 3).permute(2, 0, 1) / 255
        if self.augment and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return (pixels - torch.tensor(how.mean).view(-1, 1, 1)) / torch.tensor(how.std).view(-1, 1, 1), entry.label


Box = tuple[float, float, float, float]


def center_box(width: int, height: int, share: float) -> Box:
    """The square in the center whose side is this share of the shorter side."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int) -> Box:
    """A box of 8 to 100 % of the area, and of an aspect ratio between 3/4 and 4/3; if ten do not fit, the square in the center."""
    for area, shape, x, y in torch.rand(10, 4).tolist():
        ratio = (3 / 4) ** (1 - 2 * shape)
        own_width = ((0.08 + 0.92 * area) * width * height * ratio) ** 0.5
        own_height = own_width / ratio
        if own_width <= width and own_height <= height:
            left, top = x * (width - own_width), y * (height - own_height)
            return left, top, left + own_width, top + own_height
    return center_box(width, height, 1.0)


def convert(name: str, checkpoint: Path, out: Path) -> Path:
    """Write the backbone's weights of a published file as the network takes them.

    Args:
        name: a key of `MODELS`.
        checkpoint: `RN50.pt` of CLIP, or `r-50-1000ep.pth.tar` of MoCo-v3.
        out: folder to write to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint={str(checkpoint)!r}: there is no such file")
    clip = name == "clip-resnet50"
    try:
        if clip:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the file is a program of TorchScript
                state = torch.jit.load(checkpoint, map_location="cpu").state_dict()
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"checkpoint={str(checkpoint)!r} is no file of {name}: {str(error).splitlines()[0]}") from error
    prefix = "visual." if clip else "module.base_encoder."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items() if not key.startswith("fc.")}
    if not weights:
        raise ValueError(f"checkpoint={str(checkpoint)!r} is no file of {name}: it has no {prefix}*")
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, out / "pretrained.safetensors")
    return out / "pretrained.safetensors"


def pretrained(name: str, checkpoint: Path | None, classes: int, out: Path, seed: int) -> Pretrained:
    """A network with its weights, and a new head."""
    if name not in MODELS:
        return load(name, classes, checkpoint=checkpoint, seed=seed)
    if checkpoint is None:
        raise ValueError(f"{name} needs --checkpoint, the file of its weights; README.md says where it comes from")
    loaded = load(MODELS[name], classes, checkpoint=convert(name, checkpoint, out), seed=seed)
    return replace(loaded, preprocessing=replace(loaded.preprocessing, mean=MEAN, std=STD, crop=CROP))


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Folder of DomainNet: image lists, and real/, sketch/, ...")],
    model: Annotated[str, typer.Option(help=f"{', '.join(MODELS)}, a name of timm or torchvision, or module:factory.")] = "clip-resnet50",
    checkpoint: Annotated[Path | None, typer.Option(help="Its weights.")] = None,
    methods: Annotated[str, typer.Option(help="full, linear-probe, lp-ft, l2-sp, wise-ft, tpgm, spd, digrap, ftp, ...")] = "ftp",
    optimizer: Annotated[str, typer.Option(help="sgd with Nesterov momentum 0.9, or adamw.")] = "sgd",
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: 1e-2 of sgd, 1e-4 of adamw]")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Learning rate of the head. [default: the same]")] = None,
    strength: Annotated[float | None, typer.Option(help="Number of the method, such as FTP's k. [default: the method's]")] = None,
    weight_decay: Annotated[float, typer.Option(help="The published program has 5e-4 for full fine-tuning.")] = 0.0,
    percent: Annotated[float, typer.Option(help="Percentage of the training images of each class, in (0, 100].")] = 100.0,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 256,
    shifts: Annotated[str, typer.Option(help="Domains that are out of distribution.")] = SHIFTS,
    train_list: Annotated[str, typer.Option(help="Image list for training.")] = "real_train.txt",
    validation_list: Annotated[
        str | None, typer.Option(help="Image list for validation. [default: a tenth of the training images]")
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the split, the new head, batches and augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of results. A run that was stopped goes on there.")] = Path("domainnet"),
    device: Annotated[str, typer.Option(help="cpu, cuda, ... [default: a GPU if there is one]")] = "",
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 8,
) -> None:
    """Fine-tune on one domain of DomainNet, and test on others."""
    console = Console()
    try:
        settings = [
            Settings(
                method=method.strip(), optimizer=optimizer, lr=lr, head_lr=head_lr, strength=strength, weight_decay=weight_decay,
                epochs=epochs, batch_size=batch_size, precision=precision, seed=seed, warmup=0.0, freeze_norm=False,
            ).resolved()
            for method in methods.split(",")
        ]  # fmt: skip
        train, validation = training(data, train_list, validation_list, percent, seed)
        classes, domain = class_names(train), Path(train[0].path).parts[0]
        sets = {
            name: read_list(data, f"{source}_test.txt") for name, source in {"test": domain, **{s: s for s in shifts.split(",")}}.items()
        }
        for entry in [*validation, *itertools.chain(*sets.values())]:
            if entry.label >= len(classes):
                raise ValueError(f"{entry.path} has the label {entry.label}; training has {len(classes)} classes")
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        start = pretrained(model, checkpoint, len(classes), out, seed)
        counts = ", ".join(f"{name} {len(entries):,}" for name, entries in {"train": train, "validation": validation, **sets}.items())
        console.print(f"{len(classes)} classes; images: {counts}")
        tests = {name: ImageList(data, entries, start.preprocessing) for name, entries in sets.items()}
        results = list[Result]()
        for each in settings:
            network = copy.deepcopy(start.model).to(where)
            results.append(
                ftp.finetune(
                    network,
                    ImageList(data, train, start.preprocessing, augment=True),
                    ImageList(data, validation, start.preprocessing),
                    head=network.get_submodule(start.head),
                    tests=tests,
                    classes=classes,
                    workers=workers,
                    out=out / each.method,
                    command=shlex.join(["python", *sys.argv]),
                    progress=shown(console),
                    **{**each.as_dict(), "head_lr": each.lr if head_lr is None else head_lr},
                )
            )
            write_report(results, out / "report.html")
        console.print(table(results))
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        console.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def shown(console: Console) -> Report:
    """What prints a line for each epoch."""
    epochs = set[int]()

    def show(now: Progress) -> None:
        epoch = now.epoch
        if epoch.epoch not in epochs and not now.evaluating:
            epochs.add(epoch.epoch)
            accuracy = f"validation {100 * epoch.validation_accuracy:.1f} %"
            console.print(f"epoch {epoch.epoch}, step {epoch.step:,} of {now.steps:,}: loss {epoch.train_loss:.3f}, {accuracy}")

    return show


if __name__ == "__main__":
    app()
