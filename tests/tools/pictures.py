"""Small models for the tests of pictures, and a reader of the SVG that is drawn of them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any
from xml.etree import ElementTree as ET

import torch
from torch import nn

import lora_fx

SVG = "{http://www.w3.org/2000/svg}"
ROLES = ("base", "A", "B", "scale", "add")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


class Untraceable(nn.Module):
    """Blocks in a list, called from a forward that no symbolic trace survives."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if x.sum() > 0:
                x = layer(x)
        return x


class Bare(nn.Module):
    """Products with parameters that no module holds alone: two that can be adapted, two that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.many = nn.Parameter(torch.randn(2, 4, 8, 8))
        self.both = nn.Parameter(torch.randn(8, 8))
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(x @ self.up) @ self.down
        many = (x.reshape(-1, 1, 1, 1, 8) @ self.many).sum((1, 2, 3))
        return many + torch.einsum("bi,bj,jk->bk", x, x, self.both)


class AroundBare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bare = nn.Linear(8, 8), Bare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.fc(x))


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "seed": 0, **options}
    return lora_fx.rewrite(model, lora_fx.LoraConfig(**settings), optimize=False)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A box as the SVG file has it."""

    id: str
    classes: frozenset[str]
    fqn: str
    count: int
    title: str
    words: tuple[str, ...]
    x: float
    y: float
    width: float
    height: float

    @property
    def leaf(self) -> bool:
        return "open" not in self.classes

    def overlaps(self, other: Drawn) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def drawn(svg: str) -> list[Drawn]:
    found = []
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        classes = frozenset((group.get("class") or "").split())
        if "box" not in classes:
            continue
        frame = next(r for r in group.iter(f"{SVG}rect") if r.get("class") == "frame")
        place = re.fullmatch(r"translate\((\S+) (\S+)\)", group.get("transform") or "")
        assert place is not None
        found.append(
            Drawn(
                id=group.get("id") or "",
                classes=classes,
                fqn=group.get("data-fqn") or "",
                count=int(group.get("data-count") or 0),
                title=group.findtext(f"{SVG}title") or "",
                words=tuple(text.text or "" for text in group.iter(f"{SVG}text")),
                x=float(place[1]),
                y=float(place[2]),
                width=float(frame.get("width") or 0),
                height=float(frame.get("height") or 0),
            )
        )
    return found
