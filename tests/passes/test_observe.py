"""What sites read is shown for every call, and nothing of the capture is changed."""

from __future__ import annotations

import torch
from torch import nn

import lora_fx
from lora_fx.ir.plan import PlannedSite
from lora_fx.passes.graph import install
from lora_fx.passes.insert.insert_branches import observed
from tests import zoo
from tests.numerics import assert_same_bits
from tests.zoo import sample


def shown(model: nn.Module, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    plan = lora_fx.plan(model, lora_fx.LoraConfig(target_modules=".*"))
    capture = lora_fx.capture(model)
    before = {name: str(region.graph) for name, region in capture.regions.items()}
    rows = [row for row in plan.sites if row.site.family == "linear"]
    seen: dict[str, list[torch.Tensor]] = {row.name: [] for row in rows}

    def see(row: PlannedSite, vectors: torch.Tensor) -> None:
        seen[row.name].append(vectors)

    install(observed(capture, rows, see))
    assert_same_bits(capture.model(x), model(x))
    assert {name: str(region.graph) for name, region in capture.regions.items()} == before
    return seen


def test_vectors_are_those_that_a_hook_would_see() -> None:
    model, x = zoo.seeded(zoo.Residual)().eval(), torch.arange(10).view(2, 5)
    hooked: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: hooked.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    seen = shown(model, x)
    assert seen.keys() == hooked.keys()
    for name, vectors in hooked.items():
        assert_same_bits(torch.cat(seen[name]), torch.cat(vectors))


def test_every_call_of_a_site_is_shown() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    model, x = zoo.seeded(Twice)(), sample(3, 4)
    first, second = shown(model, x)["layer"]
    assert_same_bits(first, x)
    assert_same_bits(second, model.layer(x))
