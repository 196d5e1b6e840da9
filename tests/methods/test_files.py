"""Adapters that LyCORIS and an early PEFT wrote (``write_files.py``), against their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CheckpointError
from lora_fx.methods import read_foreign
from tests.methods.applied import applied
from tests.methods.write_files import FILES, LYCORIS, Linears, Net
from tests.numerics import assert_close


class Case:
    """A case of a file: the base, the tensors of the adapter, an input and the output of the library."""

    def __init__(self, file: str, name: str, model: nn.Module) -> None:
        tensors = safetensors.torch.load_file(FILES / file)
        with safetensors.safe_open(FILES / file, "pt") as opened:
            self.config = json.loads(opened.metadata()[name])
        self.x, self.output = tensors["x"], tensors[f"{name}/output"]
        begin = f"{name}/adapter/"
        self.tensors = {
            key.removeprefix(begin): value
            for key, value in tensors.items()
            if key.startswith(begin)
        }
        model.load_state_dict(
            {k.removeprefix("base/"): v for k, v in tensors.items() if k.startswith("base/")}
        )
        self.model = model.eval()

    def file(self, folder: Path) -> Path:
        """Write the adapter as LyCORIS does."""
        path = folder / "style.safetensors"
        safetensors.torch.save_file(self.tensors, path)
        return path


def lycoris(name: str) -> Case:
    return Case("lycoris.safetensors", name, Net())


@pytest.mark.parametrize("name", LYCORIS)
def test_files_of_lycoris_give_its_outputs(name: str, tmp_path: Path) -> None:
    case = lycoris(name)
    with torch.no_grad():
        assert not torch.allclose(case.model(case.x), case.output, atol=1e-2)
        adapter = read_foreign(case.file(tmp_path), Net().to("meta"))
        assert_close(applied(case.model, adapter)(case.x), case.output, 1e-5)
    for change in adapter.changes:
        value = case.model.get_parameter(change.parameter).detach().double()
        if change.rank is not None:
            difference = (change.adapted(value) - value).flatten(1)
            assert torch.linalg.matrix_rank(difference, rtol=1e-10) <= change.rank


@pytest.mark.parametrize("name", ["bone", "bone-bat", "oft-series"])
def test_folders_of_an_early_peft_give_its_outputs(name: str, tmp_path: Path) -> None:
    case = Case("peft.safetensors", name, Linears())
    safetensors.torch.save_file(case.tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(case.config))
    with torch.no_grad():
        adapted = applied(case.model, read_foreign(tmp_path, case.model))
        assert_close(adapted(case.x), case.output, 1e-5)


@pytest.mark.parametrize("name", ["locon-tucker", "loha", "lokr", "oft", "full", "ia3", "norms"])
def test_loading_names_the_method_and_the_converter(name: str, tmp_path: Path) -> None:
    case = lycoris(name)
    with pytest.raises(CheckpointError, match=r"belongs to .*convert_adapter") as caught:
        lora_fx.load_adapter(case.model, case.file(tmp_path))
    assert "lora-fx convert" in str(caught.value)


def test_magnitudes_of_inputs_are_converted_but_not_loaded(tmp_path: Path) -> None:
    case = lycoris("locon-dora-inputs")
    with pytest.raises(CheckpointError, match=r"one for each input.*convert_adapter"):
        lora_fx.load_adapter(case.model, case.file(tmp_path))


@pytest.mark.parametrize("prefix", ["lora_unet_", "oft_unet_", "lora_te1_", "unet."])
def test_files_of_other_trainers_have_other_prefixes(prefix: str, tmp_path: Path) -> None:
    case = lycoris("oft")
    case.tensors = {
        prefix + key.removeprefix("lycoris_"): value for key, value in case.tensors.items()
    }
    with torch.no_grad():
        adapted = applied(case.model, read_foreign(case.file(tmp_path), case.model))
        assert_close(adapted(case.x), case.output, 1e-5)


def test_a_file_without_any_alpha_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = lycoris("loha")
    path = case.file(tmp_path)
    with caplog.at_level("WARNING", "lora_fx"):
        read_foreign(path, case.model)
        assert not caplog.records
        case.tensors = {key: v for key, v in case.tensors.items() if "alpha" not in key}
        read_foreign(case.file(tmp_path), case.model)
    assert "says nothing of alpha" in caplog.text


def test_layers_of_other_parts_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = lycoris("loha")
    names = dict.fromkeys(key.partition(".")[0] for key in case.tensors)
    assert all(name.startswith("lycoris_") for name in names)
    text = {
        f"lora_te_text_model_layer.{key.partition('.')[2]}": value.clone()
        for key, value in case.tensors.items()
        if key.startswith(f"{next(iter(names))}.")
    }
    unet = {key.replace("lycoris_", "lora_unet_"): v for key, v in case.tensors.items()}
    case.tensors = unet
    with caplog.at_level("WARNING", "lora_fx"):
        read_foreign(case.file(tmp_path), case.model)
        assert not caplog.records
        case.tensors = unet | text
        adapter = read_foreign(case.file(tmp_path), case.model)
    assert "1 layer(s) are left out" in caplog.text
    assert "lora_te_text_model_layer" in caplog.text
    with torch.no_grad():
        assert_close(applied(case.model, adapter)(case.x), case.output, 1e-5)


@pytest.mark.parametrize(
    ("name", "plain"), [("locon", True), ("locon-dora-inputs", False), ("loha", False)]
)
def test_converting_plain_lora_names_the_loader(
    name: str, plain: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = lycoris(name)
    with caplog.at_level("WARNING", "lora_fx"):
        read_foreign(case.file(tmp_path), case.model)
    assert ("lora_fx.load_adapter(model, path) reads it" in caplog.text) is plain


def test_plain_files_are_read_and_loaded_alike(tmp_path: Path) -> None:
    case = lycoris("locon")
    loaded = lora_fx.load_adapter(case.model, case.file(tmp_path)).eval()
    with torch.no_grad():
        assert_close(loaded(case.x), case.output, 1e-5)


def damaged(tensors: dict[str, Tensor], role: str, how: str) -> str:
    """Damage the first tensor of a role, and return its key."""
    key = next(key for key in tensors if key.endswith(role))
    if how == "missing":
        del tensors[key]
    elif how == "shape":
        value = tensors[key]
        tensors[key] = torch.cat([value, value]) if value.dim() else torch.zeros(3)
    elif how == "whole numbers":
        tensors[key] = tensors[key].long()
    else:
        tensors[key] = tensors[key] * float("nan")
    return key


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("locon-tucker", "lora_mid.weight"),
        ("locon", "lora_down.weight"),
        ("locon", "lora_up.weight"),
        ("locon-dora", "dora_scale"),
        ("loha", "hada_w1_a"),
        ("loha", "hada_w2_b"),
        ("loha-tucker", "hada_t2"),
        ("lokr", "lokr_w2_a"),
        ("lokr-full", "lokr_w1"),
        ("lokr-tucker", "lokr_t2"),
        ("oft", "oft_blocks"),
        ("boft", "oft_blocks"),
        ("boft", "rescale"),
        ("ia3", "weight"),
        ("glora", "b2.weight"),
        ("full", "diff"),
        ("norms", "b_norm"),
    ],
)
@pytest.mark.parametrize("how", ["shape", "whole numbers", "not finite"])
def test_damaged_tensors_are_named(name: str, role: str, how: str, tmp_path: Path) -> None:
    case = lycoris(name)
    key = damaged(case.tensors, role, how)
    with pytest.raises(CheckpointError) as caught:
        read_foreign(case.file(tmp_path), case.model)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("locon-tucker", "lora_mid.weight"),
        ("locon", "lora_down.weight"),
        ("locon", "lora_up.weight"),
        ("loha", "hada_w1_b"),
        ("loha-tucker", "hada_t1"),
        ("lokr", "lokr_w1"),
        ("lokr", "lokr_w2_b"),
        ("oft", "oft_blocks"),
        ("ia3", "on_input"),
        ("glora", "a1.weight"),
    ],
)
def test_layers_without_a_tensor_are_named(name: str, role: str, tmp_path: Path) -> None:
    case = lycoris(name)
    key = damaged(case.tensors, role, "missing")
    with pytest.raises(CheckpointError) as caught:
        read_foreign(case.file(tmp_path), case.model)
    layer = key.partition(".")[0]
    assert layer.removeprefix("lycoris_") in str(caught.value)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = lycoris("loha").file(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_foreign(path, Net())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lycoris_lin.q": torch.zeros(2)}, "no method that lora_fx knows: lycoris_lin.q"),
        ({"lycoris_lin.weight": torch.zeros(2)}, "no method that lora_fx knows"),
        ({"lycoris_lin.alpha": torch.zeros(2)}, "no method that lora_fx knows"),
        ({}, "holds no tensor"),
        ({"lycoris_lin.lambda_layer": torch.zeros(2)}, "T-LoRA"),
        ({"lycoris_lin.oft_diag": torch.zeros(2)}, "early form of OFT"),
        ({"lycoris_other.diff": torch.zeros(2)}, "this model has no lycoris_other"),
        ({"lycoris_point.diff_b": torch.zeros(8)}, "point: the file changes its bias"),
        (
            {
                "lycoris_lin.diff": torch.zeros(16, 8),
                "lycoris_lin.oft_blocks": torch.zeros(4, 4, 4),
            },
            "several methods change lin.weight",
        ),
    ],
)
def test_files_that_cannot_be_read_say_why(
    tensors: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=says):
        read_foreign(path, Net())


def test_weights_stored_in_full_and_changes_of_a_bias_are_read(tmp_path: Path) -> None:
    path = tmp_path / "comfy.safetensors"
    tensors = {
        "diffusion_model.lin.lora_A.weight": torch.randn(2, 8),
        "diffusion_model.lin.lora_B.weight": torch.randn(16, 2),
        "diffusion_model.lin.diff_b": torch.randn(16),
        "diffusion_model.norm.diff": torch.randn(8),
        "diffusion_model.point.set_weight": torch.randn(8, 8, 1, 1),
    }
    safetensors.torch.save_file(tensors, path)
    torch.manual_seed(0)
    model = Net()
    adapter = read_foreign(path, model)
    assert adapter.method == "full differences and LoCon"
    result = applied(model, adapter)
    product = (
        tensors["diffusion_model.lin.lora_B.weight"] @ tensors["diffusion_model.lin.lora_A.weight"]
    )
    assert_close(result.lin.weight, model.lin.weight + product)
    assert_close(result.lin.bias, model.lin.bias + tensors["diffusion_model.lin.diff_b"])
    assert_close(result.norm.weight, model.norm.weight + tensors["diffusion_model.norm.diff"])
    assert torch.equal(result.point.weight, tensors["diffusion_model.point.set_weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_rounded_once(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    case = lycoris("boft")
    for change in read_foreign(case.file(tmp_path), case.model).changes:
        value = case.model.get_parameter(change.parameter).detach().to(dtype)
        assert torch.equal(change.adapted(value), change.adapted(value.float()).to(dtype))
