"""BD-LoRA (arXiv:2510.23346): A or B is block-diagonal, so that a server can split it over devices.

A block-diagonal factor [m, n] with k blocks is stored as PEFT stores it: [m, n/k], one block [m/k, n/k] below
the other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import torch
from torch import Tensor, fx

from lora_fx.config import LoraConfig, rank_for
from lora_fx.ir import Factors, OutputBuilder, Role, Site
from lora_fx.kinds import AdapterKind
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

    Attributes:
        letter: The block-diagonal factor, "a" or "b"; empty before a site is known.
        blocks: The number of its blocks.
        problem: The reason why a site cannot have it.
    """

    in_parts = False
    widens = False

    def __init__(self, letter: str = "", blocks: int = 1, problem: str = "") -> None:
        super().__init__()
        self.deploys = False
        self.letter, self.blocks, self.problem = letter, blocks, problem
        self.name = f"bd-lora:{letter}{blocks}" if letter else "bd-lora"
        self.field = "use_bdlora"
        self.trains = f"a block-diagonal {letter.upper()} of {blocks} blocks (use_bdlora)"

    def at(self, site: Site, config: LoraConfig) -> AdapterKind:
        """Return the kind of a layer by its name: PEFT looks for each entry anywhere in the whole name."""
        options = config.use_bdlora
        assert options is not None
        matches = _letters(site.name, config)
        if not matches and not options["match_strict"]:
            return Lora()
        rank = rank_for(site.name, config)
        if len(matches) == 1 and rank % options["nblocks"]:
            return BlockDiagonal(
                problem=f"BD-LoRA: {options['nblocks']} blocks do not divide rank {rank}: change nblocks or r"
            )
        if len(matches) == 1:
            return BlockDiagonal(matches[0], options["nblocks"])
        lists = "both lists" if matches else "neither list"
        return BlockDiagonal(
            problem=f"BD-LoRA: {lists} of use_bdlora (target_modules_bd_a, target_modules_bd_b) "
            f"{'match' if matches else 'matches'} its name: change them, or set match_strict=False to give "
            "the layers of neither list plain LoRA"
        )

    def with_options(self, options: str) -> AdapterKind:
        """Return the kind with a factor and its number of blocks: "a4"."""
        return BlockDiagonal(options[0], int(options[1:]))

    def objection(self, site: Site) -> str | None:
        """Refuse what PEFT refuses: other layers than linear ones, and sizes that blocks do not divide."""
        whole = site.rows is None and site.parameter == "weight" and not site.experts
        if site.family != "linear" or not whole or site.attention:
            return "BD-LoRA is for linear layers alone (as in PEFT): leave it out"
        size = site.in_features if self.letter == "a" else site.out_features
        if self.problem:
            return self.problem
        if size % self.blocks:
            return (
                f"BD-LoRA: {self.blocks} blocks do not divide its {size} features: change nblocks, or "
                "leave it out"
            )
        return super().objection(site)

    # --- factors ----------------------------------------------------------------------------------

    def factors(self, site: Site, shapes: Factors) -> Factors:
        """Return the shape of the blocks, one below the other."""
        rows, columns = shapes.a if self.letter == "a" else shapes.b
        blocks = (rows, columns // self.blocks)
        if self.letter == "a":
            return dataclasses.replace(shapes, a=blocks)
        return dataclasses.replace(shapes, b=blocks)

    def start_of(self, letter: str, value: Tensor, generator: torch.Generator) -> Tensor:
        """Return PEFT's start: a block-diagonal A is Kaiming-uniform with gain √2, such a B is zero."""
        if letter != self.letter:
            return value
        if letter == "b":
            return torch.zeros_like(value)
        bound = math.sqrt(6 / value.shape[1])
        return value.uniform_(-bound, bound, generator=generator)

    def pair(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as whole matrices."""
        return self._whole(a, b)

    def _whole(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.letter == "a":
            return block_diagonal(a, self.blocks), b
        return a, block_diagonal(b, self.blocks)

    def listed(self, name: str, config: LoraConfig, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as whole matrices."""
        options, letters = config.use_bdlora, _letters(name, config)
        if options is None or len(letters) != 1:
            return a, b
        return BlockDiagonal(letters[0], options["nblocks"])._whole(a, b)

    # --- graphs -----------------------------------------------------------------------------------

    def factor(self, build: OutputBuilder, letter: str, stored: fx.Node) -> fx.Node:
        """Write the block-diagonal factor as a whole matrix."""
        if letter != self.letter:
            return stored
        return build.call(Role.FACTOR, block_diagonal, stored, self.blocks)


def _letters(name: str, config: LoraConfig) -> list[str]:
    """Return the block-diagonal factors of a layer, "a" or "b", or both if the configuration is wrong."""
    return [
        letter
        for letter in _FACTORS
        if any(
            entry in name
            for entry in (config.use_bdlora or {}).get(f"target_modules_bd_{letter}") or ()
        )
    ]


KINDS = (BlockDiagonal(),)
