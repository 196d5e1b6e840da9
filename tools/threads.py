"""Measure if PyTorch's threads are slower than one thread, as on a busy or virtual machine."""

from __future__ import annotations

import time

import torch

__all__ = ["slowdown", "thread_advice"]

_ROUNDS = 25
_SHAPE = 256, 384, 1536  # tokens, features, outputs: a layer of a small encoder
_SLOWER = 1.2


def slowdown() -> float:
    """Return how many times longer a training step takes with PyTorch's threads than with one thread.

    The result is 1 if there is only one thread.

    The two settings are measured in turns, for a fraction of a second. The number of threads is restored.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return 1.0
    tokens, features, outputs = _SHAPE
    x = torch.ones(tokens, features)
    weight = torch.ones(outputs, features, requires_grad=True)
    seconds: dict[int, list[float]] = {threads: [], 1: []}
    try:
        for number in [threads, 1] * (_ROUNDS + 1):
            torch.set_num_threads(number)
            began = time.perf_counter()
            torch.autograd.grad(torch.nn.functional.linear(x, weight).relu().sum(), weight)
            seconds[number].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    # The first turn starts the threads, so it does not count. The sums are compared, and not the fastest
    # steps, because a thread that waits for a core delays only some of the steps.
    return sum(seconds[threads][1:]) / sum(seconds[1][1:])


def thread_advice() -> str:
    """Return a warning if PyTorch's threads are slower than one thread; else an empty text."""
    factor = slowdown()
    if factor < _SLOWER:
        return ""
    return (
        f"{torch.get_num_threads()} threads take {factor:.1f} times as long as one, because other programs "
        "use the cores: set OMP_NUM_THREADS=1"
    )
