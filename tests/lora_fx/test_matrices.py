"""The matrices of a model: each block has the values of its part of a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from lora_fx.checkpoint.matrices import Matrices, Matrix
from lora_fx.converted_files import ConvertedGroup
from tests.mixtures import mixtral

CONVERSIONS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "experts": (
        WeightConverter(
            ["experts.*.w1", "experts.*.w3"],
            "experts.gate_up",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        {"experts.gate_up": (3, 8, 5)},
    ),
    "transposed experts": (
        WeightConverter("experts.*.w2", "experts.down", [MergeModulelist(dim=0), Transpose(1, 2)]),
        {"experts.down": (3, 4, 5)},
    ),
    "transposed": (WeightConverter("old", "new", [Transpose(0, 1)]), {"new": (4, 6)}),
    "a fused projection": (
        WeightConverter("qkv", ["q", "k", "v"], [Chunk(dim=0)]),
        {"q": (4, 6), "k": (4, 6), "v": (4, 6)},
    ),
    "interleaved": (WeightConverter("w13", "gate_up", [Interleave(dim=0)]), {"gate_up": (8, 5)}),
    "turned stack": (WeightConverter("w", "stack", [Transpose(1, 2)]), {"stack": (3, 4, 6)}),
}


def check(matrix: Matrix, exact: torch.Tensor, parameters: dict[str, torch.Tensor]) -> None:
    """Compare the blocks with the tensor of the checkpoint; they have to cover it."""
    built = torch.full(matrix.shape, float("nan"))
    for block in matrix.blocks:
        value = parameters[block.parameter]
        value = value if block.expert is None else value[block.expert]
        part = value[block.first][:, block.last]
        rows = torch.zeros(len(block.rows), matrix.shape[1])
        rows[:, block.columns] = part.T if block.flipped else part
        built[block.rows[:, None], block.columns] = rows[:, block.columns]
    assert torch.equal(built, exact)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_blocks_are_what_a_conversion_moves(name: str) -> None:
    converter, shapes = CONVERSIONS[name]
    values = {key: torch.randn(shape) for key, shape in shapes.items()}
    model = nn.Module()
    for key, value in values.items():
        owner, _, leaf = key.rpartition(".")
        if owner:
            model.add_module(owner, model._modules.get(owner) or nn.Module())
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
    model.config = None
    back = converter.reverse_transform()
    target, pattern = back.rename_source_key(next(iter(shapes)))
    patterns = {key: back.rename_source_key(key)[1] for key in shapes}
    assert pattern is not None
    group = ConvertedGroup(model, target, back, patterns)
    matrices = Matrices(model)
    own = matrices._of_group(group)
    parts = group.parts(values)
    found = 0
    for key, exact in parts.items():
        for index in range(len(exact)) if exact.dim() == 3 else [None]:
            label = key if index is None else f"{key}[{index}]"
            check(own[label], exact if index is None else exact[index], values)
            found += 1
    assert found == len(own) > 0


def test_the_matrices_of_a_mixture() -> None:
    model = mixtral()
    matrices = Matrices(model)
    by_name = {matrix.name: matrix for matrix in matrices.all()}
    values = dict(model.named_parameters())
    gate = by_name["model.layers.1.mlp.experts.2.w1.weight"]
    stack = values["model.layers.1.mlp.experts.gate_up_proj"]
    check(gate, stack[2, : stack.shape[1] // 2], values)
    assert matrices.renamed("model.layers.1.block_sparse_moe.experts.2.w1.weight") == gate.name
    assert matrices.at("lm_head.weight") is not None
    assert matrices.at("lm_tail.weight") is None
