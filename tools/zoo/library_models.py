"""Reads the models of libraries, which are rows of ``transformers.toml`` and the like.

A table of a file is a group, a row a model: ``make`` is its class, or the name that its library makes it by;
``inputs`` names what it takes, by default that of its group; ``with`` names options of the table ``options``,
which its own options come after. ``"None"`` stands for None, ``"module:name"`` for what is called so there,
and an option with ``make`` for what that gives. An empty row is put together in this module.
"""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.tools.zoo.entries import Built, Entry, Inputs, ids, images

__all__ = ["read"]


Maker = Callable[[str, str, dict[str, Any]], Built]
"""Gets the name, the inputs and the options."""


def read(library: str) -> tuple[Entry, ...]:
    """The entries of a library, in the order of its file."""
    text = Path(__file__).with_name(f"{library}.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    shared, found = tables.pop("options", {}), []
    for group, rows in tables.items():
        inputs = rows.pop("inputs")
        for name, row in rows.items():
            title, targets = f"{library}/{name}", row.pop("targets", None)
            fields = {"note": row.pop("note", ""), "targets": targets and tuple(targets)}
            if row:
                what = (row.pop("make"), row.pop("inputs", inputs))
                make: Callable[[], Built] = functools.partial(_make, library, *what, row, shared)
            else:
                make = ASSEMBLED[title]
            found.append(Entry(title, group, make, **fields))
    return tuple(found)


def _make(library: str, name: str, inputs: str, row: Any, shared: Mapping[str, Any]) -> Built:
    return _MAKERS[library](name, inputs, _options(row, shared, library))


def _named(text: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def _options(row: Any, shared: Mapping[str, Any], library: str) -> Any:
    """The options with those that they name, and in the types of Python."""
    if isinstance(row, dict):
        found: dict[str, Any] = {}
        for name in row.get("with", ()):
            found |= _options(shared[name], shared, library)
        own = {name: one for name, one in row.items() if name != "with"}
        found |= {name: _options(one, shared, library) for name, one in own.items()}
        return found.pop("make")(**found) if "make" in found else found
    if isinstance(row, list):
        # Which of the two it is matters to them.
        kind = tuple if library in ("timm", "diffusers") else list
        return kind(_options(one, shared, library) for one in row)
    if isinstance(row, str) and ":" in row:
        return _named(row)
    return None if row == "None" else row


def _of_transformers(name: str, inputs: str, options: dict[str, Any]) -> Built:
    kind = getattr(importlib.import_module("transformers"), name)
    config = kind.config_class(**options)
    # Drawn before the weights are.
    given = inputs_of(inputs)
    return kind(config), given


def _of_diffusers(name: str, inputs: str, options: dict[str, Any]) -> Built:
    given: Any = inputs_of(inputs)
    made = getattr(importlib.import_module("diffusers"), name)(**options)
    return made, {**given, "return_dict": False}


def _of_timm(name: str, inputs: str, options: dict[str, Any]) -> Built:
    timm = importlib.import_module("timm")
    module, _, class_name = name.partition(".")
    if class_name:
        kind = getattr(importlib.import_module(f"timm.models.{module}"), class_name)
        return kind(num_classes=5, **options), inputs_of(inputs)
    return timm.create_model(name, pretrained=False, num_classes=5, **options), inputs_of(inputs)


def _of_torchvision(name: str, inputs: str, options: dict[str, Any]) -> Built:
    if ":" in name:
        return _named(name)(**options), inputs_of(inputs)
    models = importlib.import_module("torchvision.models")
    options = {"num_classes": 5, **options}
    if name in vars(models) and isinstance(getattr(models, name), type):
        return getattr(models, name)(**options), inputs_of(inputs)
    return models.get_model(name, weights=None, **options), inputs_of(inputs)


_MAKERS: Mapping[str, Maker] = {
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
    "timm": _of_timm,
    "torchvision": _of_torchvision,
}


_PATCH = 5  # the token that stands for a patch


def inputs_of(words: str) -> Inputs:
    """The arguments of one call.

    Args:
        words: A name of ``inputs.toml``, of this module, or of one tensor; and the numbers that it takes.
    """
    name, _, numbers = words.partition(" ")
    if name in _ASSEMBLED_INPUTS:
        return _ASSEMBLED_INPUTS[name](*map(int, numbers.split()))
    table = _inputs()
    return _drawn(table[name], numbers) if name in table else (_drawn(words, ""),)


@functools.cache
def _inputs() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("inputs.toml").read_text(encoding="utf-8"))


def _drawn(value: Any, numbers: str) -> Any:
    if isinstance(value, dict):
        return {name: _drawn(one, numbers) for name, one in value.items()}
    if isinstance(value, list):
        return torch.tensor(value)
    if not isinstance(value, str):
        return value
    name, *shape = value.format(numbers).split()
    return None if name == "None" else _TENSORS[name](*map(int, shape))


_TENSORS: Mapping[str, Callable[..., torch.Tensor]] = {
    "ids": lambda length: ids(length=length),
    "bytes": lambda length: torch.randint(0, 40, (2, length)),
    "images": images,
    "random": lambda *shape: torch.randn(2, *shape),
    "places": lambda *shape: torch.randint(0, 4, shape).float(),
    "zeros": torch.zeros,
}


def _text() -> dict[str, Any]:
    """Tokens, the second row padded."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _image_tokens(patches: int) -> dict[str, Any]:
    tokens = ids(length=8) + 1
    tokens = torch.where(tokens == _PATCH, _PATCH + 4, tokens).clamp(max=39)
    tokens[:, 1 : 1 + patches] = _PATCH
    mask = torch.ones_like(tokens)
    given = {"input_ids": tokens, "attention_mask": mask, "pixel_values": images(16)}
    return {**given, "use_cache": False}


def _prompted_image() -> dict[str, Any]:
    # As its processor gives them: the prompt is 0, what the model is to say 1. Without them, and
    # without padding, its attention under SDPA is another one (docs/internals/export.md, Parity).
    kinds = (torch.arange(8) > 5).long().expand(2, 8).contiguous()
    return {**_image_tokens(4), "token_type_ids": kinds}


def _listed_image() -> dict[str, Any]:
    found = _image_tokens(1)
    return {**found, "pixel_values": found["pixel_values"][:, None]}


def _image_grid() -> dict[str, Any]:
    found = _image_tokens(4)
    del found["pixel_values"]
    found["input_ids"][:, 0] = 6
    found["input_ids"][:, 1:5] = _PATCH
    found["mm_token_type_ids"] = (found["input_ids"] == _PATCH).int()
    # Two images of 4 x 4 patches, each patch 3 colors x 2 frames x 4 x 4 pixels.
    found["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4)
    found["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return found


_ASSEMBLED_INPUTS: Mapping[str, Callable[..., Inputs]] = {
    "text": _text,
    "tokens": lambda: {**_text(), "use_cache": False},
    "image_tokens": _image_tokens,
    "prompted_image": _prompted_image,
    "listed_image": _listed_image,
    "image_grid": _image_grid,
}


def _vgg() -> Built:
    from torchvision.models.vgg import VGG, make_layers

    layers = make_layers([16, "M", 32, "M", 64, 64, "M", 512, "M"], batch_norm=True)
    model = VGG(layers, num_classes=5, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(512, 4096)
    return model, (images(32),)


def _s3d() -> Built:
    from torchvision.models.video import s3d

    model = s3d(num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own one wants 224 pixels
    return model, (torch.randn(2, 3, 16, 32, 32),)


def _mvit() -> Built:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    def block(channels: int, outputs: int, heads: int, stride: int) -> MSBlockConfig:
        q, kv = [1, stride, stride], [1, 2, 2]
        return MSBlockConfig(heads, channels, outputs, [3, 3, 3], [3, 3, 3], q, kv)

    model = MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[block(16, 16, 1, 1), block(16, 32, 2, 2)],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=5,
    )
    return model, (torch.randn(2, 3, 4, 32, 32),)


def _retina_head() -> Built:
    from torchvision.models.detection.retinanet import RetinaNetHead

    class OnFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = RetinaNetHead(16, 3, 4)

        def forward(self, large: torch.Tensor, small: torch.Tensor) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = self.head([large, small])
            return OrderedDict(found)

    return OnFeatures(), (images(8, 16), images(4, 16))


ASSEMBLED: Mapping[str, Callable[[], Built]] = {
    "torchvision/vgg": _vgg,
    "torchvision/s3d": _s3d,
    "torchvision/mvit": _mvit,
    "torchvision/RetinaNet head": _retina_head,
}
"""By the name of the entry."""
