"""Train layers that are split between processes (tensor parallelism), each tensor within a learned radius of where it started.

    torchrun --nproc-per-node 2 examples/distributed/tensor_parallel.py

`ColwiseParallel` splits the rows of a weight, which FTP projects one by one: each process steps its own. `RowwiseParallel` splits the
columns: rows lie on several processes, which gather the weight in each step, and step all of it.
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ftp


def main() -> None:
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32, device=device), torch.tensor(labels, device=device)

    torch.manual_seed(0)  # all processes have the same weights and, at all times, the same data
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = ftp.AdamP(model.named_parameters(), lr=1e-2, radius_lr=0.1)  # radii grow by about 0.1 a step: weights start at random
    for _ in range(40):
        batch = torch.randint(1400, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        with CommDebugMode() as exchanged:
            optimizer.step()

    with torch.no_grad():
        accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
    if dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.3f}, {exchanged.get_total_counts()} exchanges in a step of the optimizer")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
