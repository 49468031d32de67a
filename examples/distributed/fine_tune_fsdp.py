"""Fine-tune a sharded transformer within learned radii of its pre-trained weights, and go on with another number of processes.

A small vision transformer has learned the digits 0 to 4, and is fine-tuned on 5 to 9. FSDP2 shards its parameters; `ftp.AdamP` takes
them as they are, and shards moments and anchors likewise. At the end, all are saved, with the radii:

    torchrun --nproc-per-node 2 examples/distributed/fine_tune_fsdp.py --checkpoint digits

If the folder has a checkpoint, training continues from it, with any number of processes:

    torchrun --nproc-per-node 1 examples/distributed/fine_tune_fsdp.py --checkpoint digits

On several machines, start torchrun on each. The folder of the checkpoint has to be shared:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/distributed/fine_tune_fsdp.py
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ftp

BATCH = 64  # images, of all processes together
WIDTH = 32


class Transformer(nn.Module):
    """Reads an image of 8 x 8 as 16 patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        how: dict[str, Any] = {"dim_feedforward": 4 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, **how) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Any:
        x = self.embed(nn.functional.unfold(images, 2, stride=2).mT) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: range, rank: int = 0, processes: int = 1
) -> None:
    """Each process takes its part of each batch; FSDP averages the gradients."""
    for step in steps:
        batch = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))[rank::processes].to(x.device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def pretrained(x: Tensor, y: Tensor) -> Transformer:
    """The first process trains it, the others get its weights."""
    torch.manual_seed(0)
    model = Transformer().to(x.device)
    if dist.get_rank() == 0:
        train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), x, y, range(100))
    for param in model.parameters():
        dist.broadcast(param.detach(), 0)
    nn.init.zeros_(model.head.weight)  # new classes
    return model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoint", type=Path, help="folder to continue from, and to save to")
    arguments.add_argument("--steps", type=int, default=40, help="steps of this run")
    chosen = arguments.parse_args()

    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32, device=device).view(-1, 1, 8, 8), torch.tensor(labels, device=device)
    model = pretrained(x[y < 5], y[y < 5])
    x, y = x[y >= 5], y[y >= 5] - 5

    mesh = init_device_mesh(device.type, (processes,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ftp.AdamP(model.named_parameters(), lr=3e-3, exclude="head.*")  # of the sharded model

    begun = max((int(path.name) for path in chosen.checkpoint.glob("*")), default=0) if chosen.checkpoint else 0
    if begun:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=chosen.checkpoint / str(begun))  # into the shards of this run
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    ended = begun + chosen.steps
    train(model, optimizer, x[:700], y[:700], range(begun, ended), rank, processes)
    if chosen.checkpoint:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=chosen.checkpoint / str(ended))

    with torch.no_grad():
        accuracy = (model(x[700:]).argmax(1) == y[700:]).float().mean()
    radii = optimizer.learned().values()  # equal on all processes
    if rank == 0:
        print(f"steps {begun} to {ended} by {processes}: test accuracy {accuracy:.3f}, largest radius {max(radii):.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
