"""Packages that only evaluation needs (requirements-eval.txt), imported when asked for and kept from leaving traces."""

import importlib
import random
from contextlib import contextmanager

import numpy
import torch

from data import InputError


def optional(name: str):
    """A module of a package that only evaluation needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{error.name or name} is not installed; pip install -r requirements-eval.txt"
        ) from None


@contextmanager
def own_luck():
    """Seeds as lm_eval sets them inside; afterwards all random numbers go on as if nothing had been drawn."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        numpy.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
