"""One ``nn.Linear`` on its way through the compiler: the result of each pass.

``python docs/follow.py`` prints the results. With ``--write`` it puts them into ``docs/architecture.md``.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import torch
from torch import fx, nn

import lora_fx
from lora_fx.ir import META_KEY, Capture
from lora_fx.passes.capture import capture
from lora_fx.passes.graph import install
from lora_fx.passes.insert import AddFactors, Insert
from lora_fx.passes.match import MARKS, FindOperations
from lora_fx.passes.optimize import Fuse
from lora_fx.passes.plan import MakePlan

PAGE = Path(__file__).with_name("architecture.md")


class Net(nn.Module):
    """A linear layer, with an argument that changes the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer for ``x`` [batch, 4]."""
        y: torch.Tensor = self.fc(x)
        return y.relu() if scale is None else y.relu() * scale


def code(graph: fx.Graph) -> str:
    """Return the code of a graph, without the statements that free values."""
    lines = graph.python_code("self").src.splitlines()
    return "\n".join(re.sub(r";  .* = None$", "", line.rstrip()) for line in lines if line.strip())


def graphs(captured: Capture) -> str:
    """Return the code of every region."""
    return "\n\n".join(
        f"# {key or '(root)'}\n{code(region.graph)}" for key, region in captured.regions.items()
    )


def branch(captured: Capture) -> str:
    """Return the code of the region with the branch. Comments show the tags of its nodes."""
    graph = captured.regions["fc"].graph
    tags = {node.name: node.meta.get(META_KEY) for node in graph.nodes}
    lines = code(graph).splitlines()
    for index, line in enumerate(lines):
        if tag := tags.get(line.partition("=")[0].strip()):
            lines[index] = f"{line}  # {tag.role.value} of {tag.weight}"
    return "\n".join(lines)


def steps() -> dict[str, str]:
    """Return the text of each step, by name."""
    torch.manual_seed(0)
    model = Net()
    config = lora_fx.LoraConfig(r=2, lora_alpha=4, target_modules=["fc"])
    texts: dict[str, str] = {}

    captured = capture(model)
    texts["capture"] = graphs(captured)

    for pass_ in (FindOperations(), *MARKS, MakePlan(config)):
        captured = pass_(captured).capture
    plan, matches = captured.plan, captured.matches
    assert plan is not None
    assert matches is not None
    site = matches.sites[0]
    fields = ("name", "pattern", "weight", "bias")
    texts["match"] = "\n".join(f"{name} = {getattr(site, name)!r}" for name in fields)

    texts["plan"] = str(plan)

    captured = AddFactors()(dataclasses.replace(captured, plan=plan)).capture
    factors = dict(captured.model.named_parameters())
    texts["add-factors"] = "\n".join(
        f"{name}: {list(value.shape)}, requires_grad={value.requires_grad}"
        for name, value in factors.items()
    )

    captured = Insert(plan.sites, "default")(captured).capture
    texts["insert"] = branch(captured)

    captured = Fuse()(captured).capture
    texts["fuse"] = branch(captured)

    install(region for region in captured.regions.values() if region.edited)
    layer = captured.model.get_submodule("fc")
    texts["build"] = "\n".join(
        [
            f"isinstance(model, Net): {isinstance(captured.model, Net)}",
            f"isinstance(model.fc, nn.Linear): {isinstance(layer, nn.Linear)}",
            f"forward is nn.Linear.forward: {type(layer).forward is nn.Linear.forward}",
        ]
    )

    adapted = lora_fx.rewrite(model, config)
    with torch.no_grad():
        adapted.fc.lora_B.default.normal_()
        a, b = adapted.fc.lora_A.default, adapted.fc.lora_B.default
        expected = (model.fc.weight.double() + 2 * b.double() @ a.double()).float()
    merged = lora_fx.merge(adapted)
    texts["merge"] = "\n".join(
        [
            f"type(merged) is Net: {type(merged) is Net}",
            f"parameters: {[name for name, _ in merged.named_parameters()]}",
            f"fc.weight is W + 2 * B @ A, rounded once: {torch.equal(merged.fc.weight, expected)}",
            f"forward is Net.forward: {type(merged).forward is Net.forward}",
        ]
    )
    return texts


def written(page: str) -> str:
    """Return the page with the texts of the steps between its marks."""
    for name, text in steps().items():
        pattern = re.compile(
            rf"(<!-- follow: {name} -->\n```\w+\n).*?(^```$)", re.DOTALL | re.MULTILINE
        )
        page, count = pattern.subn(
            lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, count=1
        )
        if count != 1:
            raise SystemExit(f"{PAGE.name} has no place for {name!r}")
    return page


def main() -> None:
    """Print the steps, or write them into the page."""
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    sys.stdout.writelines(f"## {name}\n\n{text}\n\n" for name, text in steps().items())


if __name__ == "__main__":
    main()
