"""Write ``files/``: tiny adapters of libraries that the environment of the tests does not have.

For LyCORIS, run it in an environment with lycoris-lora; for folders of an early PEFT, with peft 0.17:

    python tests/methods/write_files.py lycoris
    python tests/methods/write_files.py peft

A file has the weights of the base, an input, and for each case the adapter and the library's output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

FILES = Path(__file__).parent / "files"

# Options of LyCORIS. With alpha other than the rank, a scale that is applied twice shows.
LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {"network_module": "lora"},
    "locon-tucker": {"network_module": "lora", "use_tucker": True},
    "locon-dora": {"network_module": "lora", "weight_decompose": True, "wd_on_out": True},
    "locon-dora-inputs": {"network_module": "lora", "weight_decompose": True, "wd_on_out": False},
    "loha": {"network_module": "loha"},
    "loha-tucker": {"network_module": "loha", "use_tucker": True},
    "loha-dora": {"network_module": "loha", "weight_decompose": True, "wd_on_out": False},
    "lokr": {"network_module": "lokr", "factor": 2, "lora_dim": 1, "conv_lora_dim": 1},
    "lokr-tucker": {
        "network_module": "lokr",
        "factor": 2,
        "lora_dim": 1,
        "conv_lora_dim": 1,
        "use_tucker": True,
    },
    "lokr-both": {
        "network_module": "lokr",
        "factor": 4,
        "lora_dim": 1,
        "conv_lora_dim": 1,
        "decompose_both": True,
    },
    "lokr-full": {"network_module": "lokr", "factor": 4, "full_matrix": True},
    "oft": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4},
    "oft-rescaled": {
        "network_module": "diag-oft",
        "lora_dim": 4,
        "conv_lora_dim": 4,
        "rescaled": True,
        "constraint": 0.05,
    },
    "boft": {"network_module": "boft", "lora_dim": 4, "conv_lora_dim": 4, "rescaled": True},
    "ia3": {"network_module": "ia3"},
    "ia3-inputs": {"network_module": "ia3", "train_on_input": True},
    "glora": {"network_module": "glora"},
    "full": {"network_module": "full", "train_norm": True},
    "norms": {"network_module": "lora", "train_norm": True},
}


class Net(nn.Module):
    """A linear layer, two convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lin = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.tanh(self.wide(x))).flatten(2).transpose(1, 2)
        output: Tensor = self.lin(self.norm(x))
        return output


class Linears(nn.Module):
    """Linear layers for methods of an early PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.tanh(self.up(x)))
        return output


def trained(parameters: Iterable[nn.Parameter]) -> None:
    """Add random numbers to parameters."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter)


def write(path: Path, base: dict[str, Tensor], x: Tensor, cases: dict[str, dict[str, Any]]) -> None:
    """Write adapters of one base with the outputs of the library for one input.

    Args:
        path: The file.
        base: Weights of the base.
        x: The input.
        cases: Tensors of the adapter, "output" and the values of a configuration, by case.
    """
    tensors = {f"base/{key}": value for key, value in base.items()} | {"x": x}
    for name, case in cases.items():
        tensors[f"{name}/output"] = case["output"]
        tensors |= {f"{name}/adapter/{key}": value for key, value in case["tensors"].items()}
    configs = {
        name: json.dumps(case.get("config", {}), default=list) for name, case in cases.items()
    }
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {key: value.detach().clone().contiguous() for key, value in tensors.items()}, path, configs
    )


def write_lycoris() -> None:
    """Write an adapter for each method of LyCORIS."""
    from lycoris.wrapper import LycorisNetwork

    torch.manual_seed(0)
    weights = {key: value.clone() for key, value in Net().state_dict().items()}
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    LycorisNetwork.apply_preset(
        {"enable_conv": True, "target_module": ["Net", "Linear", "Conv2d", "LayerNorm"]}
    )
    cases = {}
    for name, options in LYCORIS.items():
        base = Net().eval()
        base.load_state_dict(weights)
        defaults = {"lora_dim": 2, "conv_lora_dim": 2, "alpha": 3, "conv_alpha": 3}
        network = LycorisNetwork(base, **{**defaults, **options})
        network.apply_to()
        network.eval()
        trained(network.parameters())
        with torch.no_grad():
            cases[name] = {"tensors": network.state_dict(), "output": base(x)}
    write(FILES / "lycoris.safetensors", weights, x, cases)


def write_peft() -> None:
    """Write an adapter for methods that PEFT 0.17 has in another form than today."""
    import peft

    torch.manual_seed(0)
    weights = {key: value.clone() for key, value in Linears().state_dict().items()}
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    cases = {}
    for name, config in {
        "bone": peft.BoneConfig(r=3, target_modules=["up", "down"]),
        "bone-bat": peft.BoneConfig(r=4, init_weights="bat", target_modules=["up", "down"]),
        "oft-series": peft.OFTConfig(oft_block_size=4, target_modules=["up", "down"]),
    }.items():
        base = Linears().eval()
        base.load_state_dict(weights)
        model = peft.get_peft_model(base, config).eval()
        trained(parameter for parameter in model.parameters() if parameter.requires_grad)
        with torch.no_grad():
            cases[name] = {
                "tensors": peft.get_peft_model_state_dict(model),
                "output": model(x),
                "config": config.to_dict(),
            }
    write(FILES / "peft.safetensors", weights, x, cases)


if __name__ == "__main__":
    {"lycoris": write_lycoris, "peft": write_peft}[sys.argv[1]]()
