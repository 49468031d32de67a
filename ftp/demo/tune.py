"""How the settings in `methods` were chosen: `python -m ftp.demo.tune` prints validation accuracy for every candidate.

Accuracy under shifts is printed too, for the record: the rule does not look at it.
"""

import torch

from ftp.demo import methods
from ftp.demo.data import fine_tuning
from ftp.demo.methods import Method
from ftp.demo.train import IN_DISTRIBUTION, Outcome, Steps, accuracies, fine_tune, pretrain

SEEDS = range(100, 108)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

CANDIDATES: dict[str, dict[str, Method]] = {
    "linear probe": {f"lr {lr:g}": methods.linear_probe(lr) for lr in RATES},
    "AdamW": {f"lr {lr:g}": methods.adamw(lr) for lr in RATES},
    "AdamW, learned lr": {f"learner's lr {lr:g}": methods.adamw_learned(methods.LOW_LR, lr) for lr in (0.03, 0.1, 0.3, 1.0)},
    "L2-SP": {f"lr {lr:g}, alpha {alpha:g}": methods.l2_sp(lr, alpha) for lr in RATES for alpha in (1, 0.1, 0.01, 0.001)},
    "AdamP": {f"lr {lr:g}": methods.adamp(lr) for lr in RATES},
    "TPGM": {
        f"lr {lr:g}, {updates} updates every {every} steps": methods.tpgm(lr, every, updates)
        for lr in RATES
        for every, updates in ((1, 1), (10, 10))
    },
}
"""By method, candidates from the one that moves the weights least on."""


def main() -> None:
    """Print the mean validation accuracy of every candidate, and mark the chosen ones."""
    torch.set_num_threads(1)  # as the demo: the last digits depend on it
    starts = {seed: pretrain(seed, Steps().pretrain) for seed in SEEDS}
    for name, candidates in CANDIDATES.items():
        print(name)
        scores = {}
        for label, method in candidates.items():
            outcomes = [_validate(starts[seed], method, seed) for seed in SEEDS]
            scores[label] = sum(outcome.accuracy[IN_DISTRIBUTION] for outcome in outcomes) / len(SEEDS)
            shifts = sum(outcome.shifts for outcome in outcomes) / len(SEEDS)
            print(f"  {label}: {scores[label]:.2f} in distribution, {shifts:.2f} under shifts", flush=True)
        print(f"  chosen: {max(scores, key=lambda label: scores[label])}")


def _validate(start: methods.Network, method: Method, seed: int) -> Outcome:
    digits = fine_tuning(seed)
    tuned = fine_tune(start, method, digits.train, seed, Steps().fine_tune)
    return Outcome(accuracies(tuned.network, digits.validation, seed), tuned.trace, tuned.times)


if __name__ == "__main__":
    main()
