"""Fine-tune on a folder of images by several methods, and test under a shift: in one command, which this example runs.

Run it with `python examples/finetune_folder.py` for a folder that it generates, or give the arguments of `python -m ftp finetune`:
`python examples/finetune_folder.py photos --model resnet50 --compare full,ftp`.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ftp.cli import app

SIDE = 16
SHAPES = {
    "circle": lambda y, x: (y**2 + x**2).sqrt(),
    "diamond": lambda y, x: y.abs() + x.abs(),
    "square": lambda y, x: torch.maximum(y.abs(), x.abs()),
    "cross": lambda y, x: 1.5 * torch.minimum(y.abs(), x.abs()) + 0.5 * torch.maximum(y.abs(), x.abs()),
}


def draw(shape: str, count: int, generator: torch.Generator) -> Tensor:
    """Images of a shape in random places and sizes, on noise, shape (count, 3, SIDE, SIDE), in [0, 1]."""
    grid = torch.arange(SIDE) - SIDE / 2
    offset = 4 * torch.rand(count, 2, generator=generator) - 2
    y, x = torch.broadcast_tensors(grid[:, None] + offset[:, :1, None], grid + offset[:, 1:, None])
    inside = (SHAPES[shape](y, x) < 3 + 3 * torch.rand(count, 1, 1, generator=generator)).float()[:, None]
    color = 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator)
    return (inside * color + 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)).clamp(0, 1)


def pretrained() -> nn.Module:
    """A network that learned two of the shapes, light on dark and dark on light: the factory that the command is given."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        convolutions = [
            layer for channels in ((3, 16), (16, 32)) for layer in (nn.Conv2d(*channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 2))
        optimizer, generator = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
        for _ in range(60):
            images = torch.cat([draw(shape, 32, generator) for shape in ("circle", "square")])
            inverted = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
            images, labels = torch.where(inverted, 1 - images, images), torch.arange(2).repeat_interleave(32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model((images - 0.5) / 0.5), labels).backward()
            optimizer.step()
    model.input_size, model.mean, model.std = SIDE, (0.5,) * 3, (0.5,) * 3
    return model


def generate(folder: Path) -> None:
    """Images of four shapes, light on dark; those of `test_inverted` are dark on light."""
    generator = torch.Generator().manual_seed(1)
    for part, count in {"train": 20, "val": 40, "test": 40, "test_inverted": 40}.items():
        for shape in SHAPES:
            (folder / part / shape).mkdir(parents=True)
            images = draw(shape, count, generator)
            for i, image in enumerate(1 - images if part == "test_inverted" else images):
                pixels = (255 * image).byte().permute(1, 2, 0).contiguous()
                Image.frombytes("RGB", (SIDE, SIDE), bytes(pixels.flatten().tolist())).save(folder / part / shape / f"{i}.png")


def main() -> None:
    if len(sys.argv) > 1:
        app(["finetune", *sys.argv[1:]])
    folder = Path(tempfile.mkdtemp())
    generate(folder / "shapes")
    sys.path.insert(0, str(Path(__file__).parent))
    settings = ["--model", "finetune_folder:pretrained", "--compare", "linear-probe,full,ftp", "--epochs", "12", "--batch-size", "16"]
    settings += ["--lr", "3e-3", "--corruptions", "none", "--no-flip", "--out", str(folder / "results")]
    app(["finetune", str(folder / "shapes"), *settings])


if __name__ == "__main__":
    main()
