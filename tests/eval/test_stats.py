"""Statistics that benchmarks share, against numbers by hand and by brute force."""

import math

import numpy as np
import pytest

from eval.stats import bootstrap, logistic, mcnemar, paired, sigmoid, standard_error


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_standard_error_by_hand():
    variance = (4 + 1 + 0 + 9) / 3
    error = standard_error([1.0, 2.0, 3.0, 6.0])
    assert error == pytest.approx((variance / 4) ** 0.5)
    assert standard_error([2.0]) == 0
    assert standard_error([2.0, 2.0]) == 0


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(7, 2) == 2 * (1 + 9 + 36) / 512


def test_paired_differences_by_hand():
    found = paired([1, 0, 1, 1], [0, 0, 1, 0])
    # differences 1, 0, 0, 1
    se = math.sqrt(4 * 0.25 / 3 / 4)
    assert found == {
        "difference": 0.5,
        "se": pytest.approx(se),
        "won": 2,
        "lost": 0,
        "p": 0.5,
    }


def test_paired_values_of_a_group_count_together():
    ours, theirs = [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]
    alone = paired(ours, theirs, list("abcdef"))
    assert alone == paired(ours, theirs)
    # each value twice is no more than once
    doubled = paired(ours * 2, theirs * 2, list("abcdef") * 2)
    assert doubled["se"] == pytest.approx(alone["se"])
    assert doubled["won"] == 2 * alone["won"]
    # bootstrap of whole groups
    groups = np.repeat(np.arange(200), 3)
    generator = np.random.default_rng(1)
    whole = generator.normal(size=200)[groups]
    differences = whole + 0.1 * generator.normal(size=600)
    sums = differences.reshape(200, 3)
    means = bootstrap(lambda rows: rows.mean(), sums, rounds=4000)
    se = paired(differences, np.zeros(600), groups)["se"]
    assert se == pytest.approx(means.std(), rel=0.05)
    assert paired(differences, np.zeros(600))["se"] < 0.7 * se


def test_sigmoid_far_out():
    assert sigmoid(0.3) == pytest.approx(sigma(0.3))
    assert sigmoid(-1e4) == 0
    assert sigmoid(1e4) == 1


def loss(b, X, y, w, ridge):
    """Written out for single rows."""
    squares = [v * v for v in b]
    penalty = ridge / 2
    total = penalty * sum(squares)
    for row, target, weight in zip(X, y, w, strict=True):
        z = sum(v * x for v, x in zip(b, row, strict=True))
        p = sigma(z)
        likelihood = target * math.log(p)
        likelihood += (1 - target) * math.log(1 - p)
        total -= weight * likelihood
    return total


def test_logistic_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 3))
    y = rng.random(30)
    w = rng.choice([1.0, 3.0], 30)
    b = logistic(X, y, w, ridge=0.5)
    best = loss(b, X, y, w, 0.5)
    for k in range(3):
        for step in (-1e-3, 1e-3):
            moved = b.copy()
            moved[k] += step
            assert loss(moved, X, y, w, 0.5) > best
    unweighted = logistic(X, y, ridge=0.5)
    assert not np.allclose(b, unweighted, atol=1e-3)


def test_logistic_of_separable_rows_is_finite():
    rows = [[1.0, -1], [1.0, 1]]
    b = logistic(rows, [0.0, 1.0])
    assert np.isfinite(b).all()
    assert b[1] > 3


def test_logistic_of_large_features_converges():
    x = np.linspace(-300, 300, 61)
    ones = np.ones(61)
    X = np.stack([ones, x], 1)
    y = [sigma(0.5 + 0.02 * v) for v in x]
    b = logistic(X, y, ridge=0)
    assert b == pytest.approx([0.5, 0.02], abs=1e-6)


def test_bootstrap_draws_with_replacement_and_has_the_spread_of_the_mean():
    values = np.arange(50.0)
    means = bootstrap(np.mean, values, rounds=2000)
    spread = values.std() / 50**0.5
    assert means.std() == pytest.approx(spread, rel=0.05)
    assert means.mean() == pytest.approx(24.5, abs=0.2)
    first = bootstrap(np.mean, values)
    assert (first == bootstrap(np.mean, values)).all()
