"""Principal components of vectors that come in batches (Ross et al. 2008, doi:10.1007/s11263-007-0075-7).

What was seen is kept as its leading components, its mean and its variance. A new batch is put below the
components, with a row for the difference of the means, and all of it is decomposed again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lora_fx.passes.insert.start_weight import low_rank_svd, signs

__all__ = ["Components"]

_ITERATIONS = 4


class Components:
    """The leading components of all vectors that were seen.

    Attributes:
        directions: The components [n, in], of length 1, in order; None before the first batch.
        values: Their singular values.
        shares: Which share of the variance each one explains.
        steady: Which of them the last batch has hardly turned.
    """

    def __init__(self, count: int, threshold: float, generator: torch.Generator) -> None:
        self._count = count
        self._threshold = threshold
        self._generator = generator
        self._seen = 0
        self._mean = torch.zeros(0)
        self._spread = torch.zeros(0)  # the variance, times how many were seen
        self.directions: torch.Tensor | None = None
        self.values = torch.zeros(0)
        self.shares = torch.zeros(0)
        self.steady = torch.zeros(count, dtype=torch.bool)

    def add(self, batch: torch.Tensor) -> bool:
        """Takes a batch in, [k, in].

        Returns:
            False if it has fewer vectors than there are components: it is left out then.
        """
        if len(batch) < self._count:
            return False
        batch = batch.to(torch.float32)
        mean, before = batch.mean(0), self.directions
        total = self._seen + len(batch)
        rows = batch - mean
        spread = rows.square().sum(0)
        if before is not None:
            between = (self._seen * len(batch) / total) ** 0.5 * (self._mean - mean)
            rows = torch.cat([self.values[:, None] * before, rows, between[None]])
            spread = spread + self._spread + between.square()
            mean = (self._mean * self._seen + mean * len(batch)) / total
        _, values, directions = low_rank_svd(
            rows[None], 2 * self._count, _ITERATIONS, self._generator
        )
        self._seen, self._mean, self._spread = total, mean, spread
        self.values = values[0, : self._count]
        directions = directions[0, : self._count]
        self.directions = directions * signs(directions)[:, None]
        self.shares = self.values.square() / spread.sum()
        if before is not None:
            turned = F.cosine_similarity(self.directions, before)
            self.steady = (turned >= self._threshold).cpu()
        return True
