"""The statistics that benchmarks share: standard errors, bootstraps, a logistic regression, a plane, in numpy."""

import numpy as np


def mean(values) -> float:
    return sum(values) / len(values)


def standard_error(values) -> float:
    """Of the mean of independent values; 0 for fewer than two."""
    values = np.asarray(values, float)
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))  # which cannot overflow


def logistic(X, y, weight=None, ridge: float = 1e-2) -> np.ndarray:
    """Coefficients (K,) that maximise the weighted log-likelihood of y (N,) in [0, 1] under sigmoid(X @ b), X (N, K).

    Newton's method. The ridge is far below the noise of some hundred rows; it keeps a few separable ones finite.
    """
    X, y = np.asarray(X, float), np.asarray(y, float)
    weight, b = (
        np.ones(len(y)) if weight is None else np.asarray(weight, float),
        np.zeros(X.shape[1]),
    )

    def loss(b):
        z = X @ b
        return weight @ (np.logaddexp(0, z) - y * z) + ridge * b @ b / 2

    for _ in range(100):
        p = sigmoid(X @ b)
        gradient = X.T @ (weight * (p - y)) + ridge * b
        step = np.linalg.solve(
            (X * (weight * p * (1 - p))[:, None]).T @ X + ridge * np.eye(len(b)), gradient
        )
        size = 1.0
        while size > 1e-8 and loss(b - size * step) > loss(
            b
        ):  # far from the optimum a full step may go too far
            size /= 2
        b = b - size * step
        if np.abs(step).max() < 1e-9:
            break
    return b


def bootstrap(statistic, n: int, rounds: int = 100, seed: int = 0) -> np.ndarray:
    """statistic(indices) of `rounds` draws of n out of n with replacement."""
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, n, n)) for _ in range(rounds)])


def plane(X) -> tuple[np.ndarray, float]:
    """Points (N, 2) of X (N, C) in the plane of its two directions of greatest variance, and the share of it that they hold.

    By the eigenvectors of the covariance: an SVD of X gives the same, in four times the time where N is some thousands.
    """
    X = np.asarray(X, float)
    X = X - X.mean(0)
    values, vectors = np.linalg.eigh(X.T @ X)  # ascending
    points = X @ vectors[:, :-3:-1]
    points *= np.sign(
        points[np.abs(points).argmax(0), [0, 1]]
    )  # signs are arbitrary: the largest coordinate shall be positive
    return points, float(values[-2:].sum() / max(1e-12, values.sum()))
