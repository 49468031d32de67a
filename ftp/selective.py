"""SPD (arXiv 2411.01713): selective projection decay, with a strength that is learned for each tensor."""

import hyperopt_nested as hn


def learned_spd(
    base: hn.Optimizer,
    lr: float | hn.Learn = 1e-2,
    *,
    strength: float = 1.0,
    anchor: hn.typing.Anchor = "start",
    anchor_decay: float = 1.0,
) -> hn.Optimizer:
    """Selective projection decay whose strength each tensor learns: registered as "learned_spd".

    `hyperopt_nested.spd` is the published rule (Tian et al. 2024, arXiv 2411.01713, algorithm 1), in which one strength is chosen for all
    tensors. Here it starts there, and Adam learns it from the gradient of each next step.

    Args:
        base: the optimizer; around `hn.adam` this is AdamSPD.
        lr: learning rate of the strengths, >= 0, or `hn.learn(...)`.
        strength: where they start, >= 0; 1 undoes the growth of the distance from the anchor.
        anchor: "start", the values before the first step, "zero", or a tensor.
        anchor_decay: as `hyperopt_nested.spd`.

    Returns:
        The `Optimizer`.

    Raises:
        TypeError: `base` is no optimizer of the engine.
        ValueError: an argument is outside its domain.

    Example:
        >>> import torch, hyperopt_nested as hn, ftp
        >>> model = torch.nn.Linear(2, 1)
        >>> spd = ftp.learned_spd(hn.adam(lr=1e-3))
        >>> opt = hn.HyperOptimizer(model.named_parameters(), spd)
        >>> opt.learned()
        {'decay/weight': 1.0, 'decay/bias': 1.0}
    """
    decay = hn.learn(strength, by=hn.adam(lr=1e-2).replace(lr=lr), per="tensor")
    return hn.spd(base, decay=decay, anchor=anchor, anchor_decay=anchor_decay)


hn.rules.register("learned_spd", learned_spd)
