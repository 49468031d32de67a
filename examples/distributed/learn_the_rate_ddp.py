"""Learn the learning rate of a network that every process trains on its own part of the data (DistributedDataParallel).

    torchrun --nproc-per-node 2 examples/distributed/learn_the_rate_ddp.py

DDP averages gradients before the optimizer sees them: every process learns the same rate, and nothing else is exchanged. The rate starts
far too low.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hyperopt_nested as hn

BATCH, STEPS = 64, 80


def main() -> None:
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
    own = torch.arange(1400, device=device)[rank::processes]  # of the images, the last 397 are for the test

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(device))
    optimizer = hn.optim.AdamW(model.parameters(), lr=hn.learn(3e-4))
    torch.manual_seed(rank)
    for _ in range(STEPS):
        batch = own[torch.randint(len(own), (BATCH // processes,), device=device)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

    with torch.no_grad():
        accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
    learned: list[Any] = [None] * processes
    dist.all_gather_object(learned, optimizer.learned()["lr"])
    if rank == 0:
        same = all(rate == learned[0] for rate in learned)
        print(f"rate 0.0003 learned to {learned[0]:.4f}, {'equal' if same else 'NOT equal'} on {processes} processes")
        print(f"test accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
