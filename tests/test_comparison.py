"""Numbers of a report against their definitions and other implementations."""

from dataclasses import replace

import pytest
import torch

from ftp.finetuning import Epoch, Evaluation, Result
from ftp.finetuning import comparison as c

CLASSES = ["cat", "dog", "owl"]


def evaluation(share: float, count: int = 200, seed: int = 0, labels: torch.Tensor | None = None) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator) if labels is None else labels
    wrong = torch.rand(count, generator=generator) > share
    return Evaluation(labels, (labels + wrong) % 3)


def result(method: str = "ftp", seed: int = 0, settings=None, **evaluations: Evaluation) -> Result:
    return Result(method, seed, settings or {}, CLASSES, [], evaluations)


def test_the_accuracy_of_one_run_is_that_of_its_evaluation():
    own = evaluation(0.8)
    assert c.accuracy([result(test=own)], ["test"]) == pytest.approx((own.accuracy, own.standard_error))


def test_sets_of_the_same_images_add_no_images():
    own = evaluation(0.8)
    run = result(clean=own, same=Evaluation(own.labels.clone(), own.predictions), other=evaluation(0.5, labels=own.labels, seed=1))
    assert c.accuracy([run], ["clean", "same"]) == pytest.approx((own.accuracy, own.standard_error))
    correct = torch.stack([(each.labels == each.predictions).double() for each in run.evaluations.values()]).mean(0)
    expected = (float(correct.mean()), float(correct.std(correction=0)) / len(correct) ** 0.5)
    assert c.accuracy([run], ["clean", "same", "other"]) == pytest.approx(expected)


def test_sets_of_other_images_are_independent():
    first, second = evaluation(0.8), evaluation(0.6, count=50, seed=1)
    expected = ((first.accuracy + second.accuracy) / 2, (first.standard_error**2 + second.standard_error**2) ** 0.5 / 2)
    assert c.accuracy([result(a=first, b=second)], ["a", "b"]) == pytest.approx(expected)


def test_standard_errors_are_those_of_a_simulation():
    torch.manual_seed(0)
    values, errors = [], []
    for _ in range(400):
        labels, hard = torch.randint(3, (80,)), torch.rand(80)
        sets = {f"test/noise/{level}": Evaluation(labels, (labels + (hard > 1 - level / 8)) % 3) for level in (1, 2, 3)}
        found = c.accuracy([result(**sets)], [*sets])
        values.append(found.value)
        errors.append(found.error)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(values).std()), rel=0.1)


def test_several_seeds_give_their_mean_and_its_standard_error():
    evaluations = [evaluation(share, seed=seed) for seed, share in enumerate((0.7, 0.8, 0.9))]
    runs = [result(seed=seed, test=each) for seed, each in enumerate(evaluations)]
    values = torch.tensor([each.accuracy for each in evaluations])
    assert c.accuracy(runs, ["test"]) == pytest.approx((float(values.mean()), float(values.std()) / 3**0.5))
    assert c.accuracy([*runs, result(seed=3)], ["test"]) is None


def test_a_difference_is_paired_by_image():
    first = evaluation(0.8)
    second = Evaluation(first.labels, first.predictions.clone())
    second.predictions[:10] = (second.labels[:10] + 1) % 3
    assert c.difference([result(test=first)], [result(test=first)], ["test"]) == (0, 0)
    signs = (first.labels == first.predictions).double() - (second.labels == second.predictions).double()
    expected = (float(signs.mean()), float(signs.std(correction=0)) / len(signs) ** 0.5)
    found = c.difference([result(test=first)], [result(test=second)], ["test"])
    assert found == pytest.approx(expected)
    assert found.error < 0.5 * (first.standard_error**2 + second.standard_error**2) ** 0.5


def test_a_difference_between_other_images_is_not_paired():
    first, second = evaluation(0.8), evaluation(0.7, seed=1)
    expected = (first.accuracy - second.accuracy, (first.standard_error**2 + second.standard_error**2) ** 0.5)
    assert c.difference([result(test=first)], [result(test=second)], ["test"]) == pytest.approx(expected)


def test_a_difference_is_paired_by_seed():
    own = [result(seed=seed, test=evaluation(0.8, seed=seed)) for seed in (0, 1, 2)]
    other = [result(seed=seed, test=evaluation(0.7, seed=seed)) for seed in (1, 2, 3)]
    gaps = [own[seed].evaluations["test"].accuracy - other[seed - 1].evaluations["test"].accuracy for seed in (1, 2)]
    assert c.difference(own, other, ["test"]) == pytest.approx((sum(gaps) / 2, abs(gaps[0] - gaps[1]) / 2))
    assert c.difference(own[:1], other, ["test"]) is None
    assert c.difference(own, other, ["test", "shift"]) is None


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (3, 3), (2, 9), (30, 12), (400, 350), (7000, 6500)])
def test_mcnemar_is_a_binomial_test(first, second):
    from scipy.stats import binomtest

    labels = torch.zeros(first + second + 5, dtype=torch.int64)
    one, other = labels.clone(), labels.clone()
    other[:first] = 1
    one[first : first + second] = 1
    found = c.agreement(Evaluation(labels, one), Evaluation(labels, other))
    expected = binomtest(first, first + second).pvalue if first + second else 1
    assert found[:4] == (5, first, second, 0)
    assert found.p == pytest.approx(expected)


def test_agreement_counts_every_image():
    first, second = evaluation(0.6), evaluation(0.7, seed=1)
    with pytest.raises(ValueError, match=r"labels differ, or are not of shape \(n,\): both evaluations must be of the same images"):
        c.agreement(first, second)
    second = Evaluation(first.labels, (first.predictions + (torch.rand(200) > 0.8)) % 3)
    found = c.agreement(first, second)
    assert sum(found[:4]) == 200
    assert (found.both + found.first, found.both + found.second) == (200 * first.accuracy, 200 * second.accuracy)


def test_confusion_is_that_of_scikit_learn():
    from sklearn.metrics import confusion_matrix

    own = evaluation(0.6)
    expected = torch.tensor(confusion_matrix(own.labels, own.predictions, labels=range(4)))
    assert torch.equal(c.confusion([own], 4), expected)
    assert torch.equal(c.confusion([own, own], 4), 2 * expected)


def test_runs_are_grouped_by_method_and_settings():
    runs = [
        result("full", 1, {"lr": 0.1, "seed": 1}),
        result("ftp", 0, {"lr": 0.1, "k": 1, "seed": 0, "out": "a"}),
        result("ftp", 1, {"lr": 0.1, "k": 2, "seed": 1, "out": "b"}),
        result("ftp", 0, {"lr": 0.1, "k": 2, "seed": 0}),
        result("full", 0, {"lr": 0.1, "seed": 0}),
    ]
    found = c.by_method(runs)
    assert {label: [run.seed for run in own] for label, own in found.items()} == {"full": [0, 1], "ftp (k=1)": [0], "ftp (k=2)": [0, 1]}
    with pytest.raises(ValueError, match=r"two results of full with equal settings and seeds \[0, 0, 1\]: pass each run once"):
        c.by_method([*runs, runs[-1]])


def test_columns_are_what_was_tested():
    own = evaluation(0.5)
    names = ["sketch", "test/fog/1", "validation", "test", "test/fog/2"]
    assert [column.heading for column in c.columns([result(**dict.fromkeys(names, own))])] == [
        "validation",
        "test (ID)",
        "sketch",
        "mean of corruptions",
    ]
    found = c.columns([result(**dict.fromkeys(names, own)), result(paint=own)])
    assert found[2:] == [
        c.Column("sketch", ("sketch",)),
        c.Column("paint", ("paint",)),
        c.Column("mean of shifts", ("sketch", "paint")),
        c.Column("mean of corruptions", ("test/fog/1", "test/fog/2")),
    ]
    assert c.columns([result()]) == []


@pytest.mark.parametrize("name", ["test", "a/b", "test/fog/x", "fog/3", ""])
def test_other_names_are_no_corruptions(name):
    assert c.corruption_set(name) is None


def test_the_best_epoch_has_the_lowest_loss_of_the_highest_accuracies():
    losses = (1.0, 0.9, 0.7, 0.7, 0.1, torch.nan)
    epochs = [Epoch(i, i, 0.1, 1.0, losses[i], accuracy, 1.0) for i, accuracy in enumerate((0.1, 0.8, 0.8, 0.8, 0.5, 0.9))]
    assert c.best_epoch(replace(result(), epochs=epochs)) is epochs[2]
    assert c.best_epoch(result()) is None
