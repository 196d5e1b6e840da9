"""Forms of a linear operation whose weight is not simply a matrix: experts, and views of something else.

:mod:`tests.zoo` makes the forms of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["EXPERTS", "VIEWS"]


class Kernel(nn.Module):
    """A parameter of any shape, and sums of it with what the subclass does."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(*shape) / 4)


class Bmm(Kernel):
    def forward(self, x):
        return torch.bmm(x, self.kernel)


class BmmTransposed(Kernel):
    def forward(self, x):
        return x.bmm(self.kernel.transpose(1, 2))


class BmmOnTheLeft(Kernel):
    def forward(self, x):
        return torch.bmm(self.kernel, x)


class Baddbmm(Kernel):
    def forward(self, x):
        return torch.baddbmm(x[:, :1, :1], x, self.kernel)


class Broadcast(Kernel):
    def forward(self, x):
        return x @ self.kernel.mT


class EachExpert(Kernel):
    """A loop over the experts, each with some of the rows."""

    def forward(self, x):
        parts = x.chunk(self.kernel.shape[0])
        return torch.cat([F.linear(parts[i], self.kernel[i]) for i in range(len(self.kernel))])


class EachExpertInOut(Kernel):
    def forward(self, x):
        out = x @ self.kernel.select(0, -1)
        for i in range(2):
            out = out + torch.tanh(x) @ self.kernel[i]
        return out


class ForEachRow(Kernel):
    """Each row's own expert's matrix, gathered."""

    def forward(self, x):
        expert = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return torch.bmm(self.kernel[expert], x.unsqueeze(-1)).squeeze(-1)


class ForEachRowInOut(Kernel):
    def forward(self, x):
        expert = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return torch.bmm(x.unsqueeze(1), self.kernel.index_select(0, expert)).squeeze(1)


class Grouped(Kernel):
    """Rows sorted by expert; one expert gets none, and the last row belongs to nobody."""

    def forward(self, x):
        import transformers.integrations.moe

        assert transformers.integrations.moe  # registers the operator
        ends = (x[:3, 0] * 0).int() + 1
        ends = torch.cumsum(torch.cat([ends[:1], ends[:1] * 0, ends[:1] * 4]), 0).int()
        weight = self.kernel.transpose(-2, -1)
        return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)


class EinsumOf(Kernel):
    def __init__(self, equation: str, *shape: int, transposed: bool = False) -> None:
        super().__init__(*shape)
        self.equation, self.transposed = equation, transposed

    def forward(self, x):
        kernel = self.kernel.transpose(-1, -2) if self.transposed else self.kernel
        return torch.einsum(self.equation, x, kernel)


class Cast(Kernel):
    def forward(self, x):
        return F.linear(x, self.kernel.to(x.dtype))


class CastUp(Kernel):
    """As layers do that compute in fp32 whatever they are stored in."""

    def forward(self, x):
        return (x.double() @ self.kernel.contiguous().type(torch.float64)).type_as(x)


class Flattened(Kernel):
    def forward(self, x):
        return F.linear(x, self.kernel.flatten(1))


class Squeezed(Kernel):
    def forward(self, x):
        return x @ self.kernel.squeeze(-1).squeeze(-1).t()


class Viewed(Kernel):
    """[heads, width, in] as one matrix."""

    def forward(self, x):
        return F.linear(x, self.kernel.view(-1, self.kernel.shape[-1]))


class ViewedTransposed(Kernel):
    def forward(self, x):
        return x @ self.kernel.reshape(6, 5).T


EXPERTS = (
    # name, build, shape of x, kind, pattern
    ("bmm", lambda: Bmm(3, 5, 7), (3, 4, 5), "experts in_out", "experts"),
    ("bmm transposed", lambda: BmmTransposed(3, 7, 5), (3, 4, 5), "experts", "experts"),
    ("bmm on the left", lambda: BmmOnTheLeft(3, 7, 5), (3, 5, 4), "experts", "experts"),
    ("baddbmm", lambda: Baddbmm(3, 5, 7), (3, 4, 5), "experts in_out", "experts"),
    ("broadcast", lambda: Broadcast(3, 7, 5), (2, 3, 4, 5), "experts", "experts"),
    ("a matrix for all", lambda: Broadcast(3, 7, 5), (4, 5), "experts", "experts"),
    ("each expert", lambda: EachExpert(3, 7, 5), (9, 5), "experts", "experts"),
    ("select", lambda: EachExpertInOut(3, 5, 7), (4, 5), "experts in_out", "experts"),
    ("for each row", lambda: ForEachRow(3, 7, 5), (6, 5), "experts", "experts"),
    ("index_select", lambda: ForEachRowInOut(3, 5, 7), (6, 5), "experts in_out", "experts"),
    ("grouped", lambda: Grouped(3, 7, 5), (6, 5), "experts", "grouped-mm"),
    ("einsum experts", lambda: EinsumOf("ebi,eoi->ebo", 3, 7, 5), (3, 4, 5), "experts", "einsum"),
    (
        "einsum experts in_out",
        lambda: EinsumOf("bei,eoi->beo", 3, 5, 7, transposed=True),
        (4, 3, 5),
        "experts in_out",
        "einsum",
    ),
)

VIEWS = (
    ("cast", lambda: Cast(7, 5), (4, 5), "out_in", "linear"),
    ("cast up", lambda: CastUp(5, 7), (4, 5), "in_out", "matmul"),
    ("flatten", lambda: Flattened(7, 5, 1, 1), (4, 5), "out_in", "linear"),
    ("flatten, a kernel", lambda: Flattened(7, 5, 2), (4, 10), "out_in", "linear"),
    ("squeeze", lambda: Squeezed(7, 5, 1, 1), (4, 5), "out_in", "matmul"),
    ("view", lambda: Viewed(2, 3, 5), (4, 5), "out_in", "linear"),
    ("reshape, transposed", lambda: ViewedTransposed(2, 3, 5), (4, 5), "out_in", "matmul"),
    ("einsum heads", lambda: EinsumOf("bti,hdi->bthd", 2, 3, 5), (2, 4, 5), "out_in", "einsum"),
    (
        "einsum heads first",
        lambda: EinsumOf("bti,ihd->hbtd", 5, 2, 3),
        (2, 4, 5),
        "in_out",
        "einsum",
    ),
    (
        "einsum from heads",
        lambda: EinsumOf("bthd,hdo->bto", 2, 3, 5),
        (2, 4, 2, 3),
        "in_out",
        "einsum",
    ),
    (
        "einsum to and from",
        lambda: EinsumOf("bthd,hdkl->kbtl", 2, 3, 4, 5),
        (2, 4, 2, 3),
        "in_out",
        "einsum",
    ),
)
