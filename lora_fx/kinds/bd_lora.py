"""BD-LoRA (arXiv:2510.23346): A or B is block-diagonal, so that a server can split it over devices.

A block-diagonal factor [m, n] with k blocks is stored as PEFT stores it: [m, n/k], one block [m/k, n/k] below
the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, fx

from lora_fx.config import LoraConfig, rank_for
from lora_fx.ir import Factors, OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind, Starting
from lora_fx.kinds.lora import Lora

__all__ = ["KINDS", "BlockDiagonal", "block_diagonal"]

_FACTORS: Final = "ab"


def block_diagonal(stacked: Tensor, blocks: int) -> Tensor:
    """Return a block-diagonal matrix [m, n] from its blocks, [m, n/k].

    Args:
        stacked: The blocks, one below the other.
        blocks: k.
    """
    whole: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole


class BlockDiagonal(Lora):
    """LoRA with a block-diagonal factor: A or B by the name of the layer.

    Its options: the block-diagonal factor (``letter``), the number of its blocks (``blocks``), and the
    ``problem`` of a site that cannot have it.
    """

    in_parts = False
    widens = False

    def __init__(self) -> None:
        super().__init__()
        self.deploys = False
        self.name = "bd-lora"
        self.fields = ("use_bdlora",)
        self.trains = "a block-diagonal A or B (use_bdlora)"

    @property
    def letter(self) -> str:
        """The block-diagonal factor, "a" or "b"; empty before a site is known."""
        return "" if self.options is None else str(self.options["letter"])

    @property
    def blocks(self) -> int:
        """The number of blocks of the block-diagonal factor; 1 before a site is known."""
        return 1 if self.options is None else int(self.options["blocks"])

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return the kind of a layer, which the lists of ``use_bdlora`` choose by the layer's name.

        As in PEFT, an entry of a list matches anywhere in the whole name.
        """
        options = config.use_bdlora
        assert options is not None
        matches = _letters(site.name, config)
        if not matches and not options["match_strict"]:
            return Lora()
        rank, blocks = rank_for(site.name, config), options["nblocks"]
        if len(matches) == 1 and rank % blocks:
            return self._refused(
                f"BD-LoRA: {blocks} blocks do not divide rank {rank}: change nblocks or r"
            )
        if len(matches) == 1:
            return self.with_options({"letter": matches[0], "blocks": blocks})
        lists = "both lists" if matches else "neither list"
        return self._refused(
            f"BD-LoRA: {lists} of use_bdlora (target_modules_bd_a, target_modules_bd_b) "
            f"{'match' if matches else 'matches'} its name: change them, or set match_strict=False to give "
            "the layers of neither list plain LoRA"
        )

    def _refused(self, problem: str) -> AdapterKind:
        return self.with_options({"letter": "", "blocks": 1, "problem": problem})

    def objection(self, site: Site, rank: int) -> str | None:
        """Return the reason why a site cannot have BD-LoRA; None if it can.

        As in PEFT, only linear layers whose sizes the blocks divide can have it.
        """
        whole = site.rows is None and site.parameter == "weight" and not site.experts
        if site.family != "linear" or not whole or site.attention:
            return "BD-LoRA is for linear layers alone (as in PEFT): leave it out"
        size = site.in_features if self.letter == "a" else site.out_features
        if problem := (self.options or {}).get("problem"):
            return str(problem)
        if size % self.blocks:
            return (
                f"BD-LoRA: {self.blocks} blocks do not divide its {size} features: change nblocks, or "
                "leave it out"
            )
        return super().objection(site, rank)

    # --- factors ----------------------------------------------------------------------------------

    def factors(self, site: Site, shapes: Factors) -> Factors:
        """Return the stored shapes: the blocks of the block-diagonal factor are one below the other."""
        rows, columns = shapes.a if self.letter == "a" else shapes.b
        blocks = (rows, columns // self.blocks)
        if self.letter == "a":
            return dataclasses.replace(shapes, a=blocks)
        return dataclasses.replace(shapes, b=blocks)

    def start_pair(self, starting: Starting) -> tuple[Tensor, Tensor]:
        """Return PEFT's initial factors: a block-diagonal A is Kaiming-uniform with gain √2.

        A block-diagonal B is zero.
        """
        a, b = super().start_pair(starting)
        if self.letter == "b":
            return a, torch.zeros_like(b)
        bound = math.sqrt(6 / a.shape[1])
        generator = starting.generator(f"{starting.row.name}.block-diagonal")
        return a.uniform_(-bound, bound, generator=generator), b

    def merged_factors(
        self, site: Site, a: Tensor, b: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return both factors as whole matrices."""
        if self.letter == "a":
            return block_diagonal(a, self.blocks), b
        return a, block_diagonal(b, self.blocks)

    # --- graphs -----------------------------------------------------------------------------------

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write the block-diagonal factor as a whole matrix."""
        if letter != self.letter:
            return stored
        return build.call(Role.FACTOR, block_diagonal, stored, self.blocks)


def _letters(name: str, config: LoraConfig) -> list[str]:
    """Return the factors of a layer, "a" or "b", that ``use_bdlora`` makes block-diagonal by its name.

    Both are an error of the configuration.
    """
    return [
        letter
        for letter in _FACTORS
        if any(
            entry in name
            for entry in (config.use_bdlora or {}).get(f"target_modules_bd_{letter}") or ()
        )
    ]


KINDS = (BlockDiagonal(),)
