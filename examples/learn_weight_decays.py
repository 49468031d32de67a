"""Learn one weight decay per tensor by implicit differentiation, where training has come to rest, from a validation loss.

A small network is trained on 200 of scikit-learn's digits, to rest. How that point moves with the decays follows from a linear system,
whatever the optimizer did to come there. Run it with `python examples/learn_weight_decays.py`.
"""

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import hyperopt_nested as hn

Tensors = dict[str, torch.Tensor]

torch.manual_seed(0)
DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16), torch.tensor(DIGITS.target)
TRAIN, VALIDATION, TEST = torch.randperm(len(X)).split([200, 600, len(X) - 800])
MODEL = hn.functional(torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)).double())
GRID, START, STEPS = torch.logspace(-1.5, -5, 10).tolist(), 0.01, 14


def loss(params: Tensors, rows: torch.Tensor, hypers: object = None) -> torch.Tensor:  # noqa: ARG001
    return torch.nn.functional.cross_entropy(MODEL(params, X[rows]), Y[rows])


def train(params: Tensors, decays: Tensors) -> Tensors:
    """To the minimum of the training loss and half of each decay times its tensor's squared norm, which SGD with these decays has too."""
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    opt = torch.optim.LBFGS(params.values(), max_iter=300, history_size=30, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        opt.zero_grad()
        total = loss(params, TRAIN) + sum(decays[name] / 2 * p.square().sum() for name, p in params.items())
        total.backward()
        return total

    opt.step(closure)
    return {name: p.detach() for name, p in params.items()}


def learn() -> tuple[Tensors, Tensors]:
    """The tensors at the start, and those with the least validation loss on the way of Adam in the logarithms of the decays."""
    optimizer = hn.sgd(lr=0.5, weight_decay=hn.learn(START, by=hn.sgd(), per="tensor"))
    logs = {name: torch.tensor(START, dtype=torch.float64).log().requires_grad_() for name in MODEL.params}
    adam = torch.optim.Adam(logs.values(), lr=0.3, betas=(0.7, 0.9))
    params, found = MODEL.params, []
    table = Table("step", "validation loss", "residual", *logs)
    for step in range(STEPS):
        decays = {name: log.detach().exp() for name, log in logs.items()}
        params = train(params, decays)  # from where it came to rest before
        at = {"outer_batch": VALIDATION, "method": "implicit", "iterations": 200, "hypers": {"weight_decay": decays}}
        slopes = hn.hypergradient(optimizer, params, [TRAIN], loss, loss, **at)
        found.append((loss(params, VALIDATION).item(), params))
        table.add_row(f"{step}", f"{found[-1][0]:.4f}", f"{slopes.residual:.0e}", *(f"{decay:.5f}" for decay in decays.values()))
        for name, log in logs.items():
            log.grad = slopes["weight_decay"][name] * decays[name]
        adam.step()
    Console().print(table)
    return found[0][1], min(found, key=lambda each: each[0])[1]


def main() -> None:
    shared, params = {}, MODEL.params
    for decay in GRID:
        params = shared[decay] = train(params, dict.fromkeys(params, decay))
    best = min(GRID, key=lambda decay: loss(shared[decay], VALIDATION).item())
    first, learned = learn()
    table = Table("decay", "validation loss", "test loss", "test accuracy")
    rows = {f"start, {START:g}": first, f"best of {len(GRID)}, {best:.1e}": shared[best], "learned per tensor": learned}
    for name, each in rows.items():
        accuracy = (MODEL(each, X[TEST]).argmax(1) == Y[TEST]).double().mean()
        table.add_row(name, f"{loss(each, VALIDATION):.4f}", f"{loss(each, TEST):.4f}", f"{accuracy:.3f}")
    Console().print(table)
    each = torch.nn.functional.cross_entropy
    gain = each(MODEL(shared[best], X[TEST]), Y[TEST], reduction="none") - each(MODEL(learned, X[TEST]), Y[TEST], reduction="none")
    error = gain.std() / len(gain) ** 0.5
    verb = "beat" if gain.mean() > 2 * error else "did not beat"
    print(f"Learned decays {verb} the best shared one: test loss lower by {gain.mean():.4f} ± {error:.4f} (over digits).")


if __name__ == "__main__":
    main()
