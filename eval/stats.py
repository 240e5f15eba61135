"""Statistics that benchmarks share: standard errors, bootstraps, logistic regression."""

from math import comb

import numpy as np


def mean(values) -> float:
    return sum(values) / len(values)


def standard_error(values) -> float:
    """Standard error of the mean of independent values; 0 for fewer than two."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def wins(ours: list[float], theirs: list[float]) -> list[float]:
    """1 where our score is higher, 0.5 for a draw, else 0."""
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def paired(ours: list[float], theirs: list[float], groups: list | None = None) -> dict:
    """Two models on the same questions: difference of their means, its standard error, won, lost
    and McNemar's p.

    groups: one name a value; values of one group need not be independent for the standard error.
    For p, all values are taken as independent.
    """
    differences = np.subtract(ours, theirs, dtype=float)
    n = len(differences)
    groups = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(groups, differences - differences.mean())
    clusters = len(sums)
    variance = clusters / max(1, clusters - 1) * (sums**2).sum() / n**2
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "difference": float(differences.mean()),
        "se": float(variance**0.5),
        "won": won,
        "lost": lost,
        "p": mcnemar(won, lost),
    }


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p: how probable is a split at least as uneven if each side is as likely?"""
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def rounded(numbers: dict) -> dict:
    """Numbers, and lists of them, as they are shown: with four decimals."""
    shown = {}
    for name, value in numbers.items():
        several = isinstance(value, list)
        shown[name] = [round(v, 4) for v in value] if several else round(value, 4)
    return shown


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))  # cannot overflow


def logistic(X, y, weight=None, ridge: float = 1e-2) -> np.ndarray:
    """Logistic regression by Newton's method: coefficients (K,) for X (N, K) and y (N,) in [0, 1].

    They maximise the weighted log-likelihood of y under sigmoid(X @ b). The ridge is far below the
    noise of a few hundred rows; it keeps the coefficients of separable rows finite.
    """
    X = np.asarray(X, float)
    y = np.asarray(y, float)
    weight = np.ones(len(y)) if weight is None else np.asarray(weight, float)
    b = np.zeros(X.shape[1])

    def loss(b) -> float:
        z = X @ b
        losses = np.logaddexp(0, z) - y * z
        return weight @ losses + ridge * b @ b / 2

    for _ in range(100):
        # the Newton step
        p = sigmoid(X @ b)
        gradient = X.T @ (weight * (p - y)) + ridge * b
        curvature = weight * p * (1 - p)
        hessian = (X * curvature[:, None]).T @ X
        step = np.linalg.solve(hessian + ridge * np.eye(len(b)), gradient)

        # far from the optimum a full step may overshoot: halve it until the loss falls
        size = 1.0
        while size > 1e-8 and loss(b - size * step) > loss(b):
            size /= 2
        b = b - size * step
        if np.abs(step).max() < 1e-9:
            break
    return b


def bootstrap(statistic, *columns: np.ndarray, rounds: int = 100) -> np.ndarray:
    """statistic(*columns) of `rounds` resamples of their rows, with replacement."""
    generator = np.random.default_rng(0)
    n = len(columns[0])
    values = []
    for _ in range(rounds):
        rows = generator.integers(0, n, n)
        values.append(statistic(*(column[rows] for column in columns)))
    return np.array(values)
