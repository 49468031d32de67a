"""Fast Trainable Projection (arXiv 2310.19182): robust fine-tuning that learns how far each layer may move.

Example:
    >>> import torch
    >>> from ftp import AdamP
    >>> model = torch.nn.Linear(3, 2)  # pre-trained
    >>> opt = AdamP(model.named_parameters(), lr=1e-4)  # instead of AdamW
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     opt.step()
    >>> sorted(opt.learned())
    ['radius/bias', 'radius/weight']
"""

from ftp.directional import digrap, directional_projection
from ftp.finetuning.training import finetune
from ftp.optimizers import SGDP, AdamP, FTPOptimizer
from ftp.rule import FLOOR, Anneal, Radius, ftp_rule, identity, largest_norm
from ftp.selective import learned_spd
from ftp.tpgm import TPGM
from ftp.wise_ft import WiSEFT, interpolate
from ftp.wrapper import FTP

__all__ = [
    "FLOOR",
    "FTP",
    "SGDP",
    "TPGM",
    "AdamP",
    "Anneal",
    "FTPOptimizer",
    "Radius",
    "WiSEFT",
    "digrap",
    "directional_projection",
    "finetune",
    "ftp_rule",
    "identity",
    "interpolate",
    "largest_norm",
    "learned_spd",
]
