"""Learn a whole schedule of learning rates, 200 of them, one a step, from the validation loss at the end of training.

Forward-mode hypergradients look through the whole run. The schedule is learned in six of them, from a constant that is too low, and
compared on test digits, initial weights and batches that chose nothing. Run it with `python examples/learn_a_schedule.py [picture.png]`.
"""

import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.func import grad, stack_module_state, vmap
from torch.nn.functional import avg_pool1d, cross_entropy, pad

import hyperopt_nested as hn

STEPS, CHOOSING, FRESH = 200, range(100, 108), range(1000, 1020)  # seeds of the runs that choose, and of those that compare
DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)
TRAIN, VALIDATION, TEST = torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).split(len(X) // 3)
MODEL = hn.functional(torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)))


def loss(params: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return cross_entropy(MODEL(params, X[rows]), Y[rows])


def total_loss(params: dict[str, torch.Tensor], rows: torch.Tensor, *_: object) -> torch.Tensor:
    return vmap(loss)(params, rows).sum()


def runs(seeds: range) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Initial tensors, each (seeds, ...), and the training digits of each batch (steps, seeds, 8)."""
    torch.manual_seed(seeds[0])
    networks = [torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)) for _ in seeds]
    params = {name: p.detach() for name, p in stack_module_state(networks)[0].items()}
    return params, TRAIN[torch.randint(len(TRAIN), (STEPS, len(seeds), 8))]


def evaluate(rates: torch.Tensor, seeds: range, rows: torch.Tensor) -> torch.Tensor:
    """Loss and accuracy on these digits after SGD from each seed with each of the schedules (n, steps): (2, n, seeds)."""

    def run(params: dict[str, torch.Tensor], batches: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        for batch, rate in zip(batches, rates.float(), strict=True):
            grads = grad(loss)(params, batch)
            params = {name: p - rate * grads[name] for name, p in params.items()}
        return torch.stack([loss(params, rows).nan_to_num(torch.inf), (MODEL(params, X[rows]).argmax(1) == Y[rows]).float().mean()])

    return vmap(vmap(run, (0, 1, None)), (None, None, 0))(*runs(seeds), rates).movedim(-1, 0)


def learn() -> torch.Tensor:
    """Every schedule on the way of Adam in the logarithms of its rates, (1 + outer steps, steps)."""
    optimizer = hn.sgd(lr=hn.learn(0.1, by=hn.sgd()))
    log = torch.full((STEPS,), 0.1, dtype=torch.float64).log()
    adam, found = torch.optim.Adam([log], lr=0.4, betas=(0.5, 0.9)), [log.exp()]
    for outer in range(6):  # two runs at once, other ones each time
        how = {"outer_batch": VALIDATION.expand(2, -1), "method": "forward", "hypers": {"lr": {"model": log.exp()}}}
        slope = hn.hypergradient(optimizer, *runs(range(2 * outer, 2 * outer + 2)), total_loss, total_loss, **how)["lr"]["model"]
        log.grad = avg_pool1d(pad((slope * log.exp())[None], (10, 10), mode="replicate"), 21, 1)[0]  # smooth: two runs are few
        adam.step()
        found.append(log.exp())
    return torch.stack(found)


def main() -> None:
    learned, grid = learn(), torch.logspace(-2, 1, 20)[:, None]
    tried = {"constant": grid.expand(-1, STEPS), "linear to zero": grid * torch.linspace(1, 0, STEPS + 1)[:-1], "learned": learned}
    best = {name: rates[evaluate(rates, CHOOSING, VALIDATION)[0].mean(1).argmin()] for name, rates in tried.items()}
    losses, right = evaluate(torch.stack(list(best.values())), FRESH, TEST)
    for name, *pair in zip(best, losses, right, strict=True):
        mean, accuracy = (f"{each.mean():.4f} ± {each.std() / len(each) ** 0.5:.4f}" for each in pair)
        print(f"{name:14s}  rate {best[name][0]:.3f} to {best[name][-1]:.3f}  test loss {mean}  accuracy {accuracy}")
    for name, gains in zip(list(best)[:2], losses[:2] - losses[2], strict=True):
        gain, error = gains.mean(), gains.std() / len(gains) ** 0.5
        print(f"Learned {'beat' if gain > 2 * error else 'did not beat'} {name}: test loss lower by {gain:.4f} ± {error:.4f}.")
    if len(sys.argv) > 1:
        left, right = (figure := Figure(figsize=(10, 3.5), layout="constrained")).subplots(1, 2)
        left.semilogy(learned.T, color="tab:green", alpha=0.25)
        left.semilogy(torch.stack(list(best.values())).T, label=list(best))
        left.set(xlabel="step", ylabel="learning rate", title="schedules (faint: after each hypergradient)", ylim=(0.02, 3))
        right.boxplot(losses.T.numpy(), tick_labels=list(best))
        right.set(ylabel="test loss", title=f"{len(FRESH)} runs each, on test digits")
        left.legend()
        figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
