"""LoRA made of adapters of other methods: equal outputs where the rank suffices, and errors as reported."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_fx
from lora_fx import CheckpointError, ConfigError
from lora_fx.methods import read_foreign
from tests.methods.applied import applied
from tests.methods.test_files import lycoris
from tests.methods.test_peft_folders import (
    CASES,
    IDS,
    IMAGES,
    LINEAR,
    MODELS,
    Words,
    base_of,
    output,
    peft,
    trained,
)
from tests.methods.write_files import LYCORIS
from tests.numerics import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES)
def test_a_full_rank_keeps_the_outputs_of_peft(case: str, tmp_path: Path) -> None:
    name = CASES[case][1]
    theirs = trained(case, tmp_path / "theirs")
    model, inputs = base_of(name), MODELS[name][1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted, report = lora_fx.convert_adapter(
        model, tmp_path / "theirs", energy=1.0, return_report=True
    )
    expected = output(theirs, inputs)
    assert_close(output(adapted.eval(), inputs), expected, 2e-5)
    assert all(site.error < 1e-5 for site in report.sites)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    lora_fx.save_adapter(adapted, tmp_path / "ours")
    again = lora_fx.load_adapter(base_of(name), tmp_path / "ours").eval()
    assert_close(output(again, inputs), expected, 2e-5)


@pytest.mark.parametrize("case", ["loha", "oft", "vera", "boft-conv", "ia3"])
def test_peft_loads_what_was_converted(case: str, tmp_path: Path) -> None:
    name = CASES[case][1]
    theirs = trained(case, tmp_path / "theirs")
    adapted = lora_fx.convert_adapter(base_of(name), tmp_path / "theirs", energy=1.0)
    lora_fx.save_adapter(adapted, tmp_path / "ours")
    lora = peft.PeftModel.from_pretrained(base_of(name), tmp_path / "ours").eval()
    inputs = MODELS[name][1]
    assert_close(output(lora, inputs), output(theirs, inputs), 2e-5)


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("vera", [3, 3, 3]),
        ("adalora", [3, 3, 3]),
        ("hra", [3, 3, 3]),
        ("miss", [3, 3, 3]),
        ("loha", [4, 4, 4]),
        ("vblora", [2, 2, 2]),
    ],
)
def test_the_rank_of_a_method_is_enough(case: str, ranks: list[int], tmp_path: Path) -> None:
    trained(case, tmp_path)
    _, report = lora_fx.convert_adapter(base_of("words"), tmp_path, return_report=True)
    assert [site.rank for site in report.sites] == ranks
    assert all(site.error < 1e-6 for site in report.sites)


def test_a_low_rank_has_the_error_that_the_report_says(tmp_path: Path) -> None:
    trained("oft", tmp_path)
    model = base_of("words")
    adapted, report = lora_fx.convert_adapter(model, tmp_path, rank=2, return_report=True)
    exact = applied(model, read_foreign(tmp_path, model))
    merged = lora_fx.merge(adapted)
    for site in report.sites:
        assert site.rank == 2
        change = exact.get_parameter(site.weight) - model.get_parameter(site.weight)
        missing = exact.get_parameter(site.weight) - merged.get_parameter(site.weight)
        assert_close(missing.norm() / change.norm(), torch.tensor(site.error), 1e-4)
        assert 0.05 < site.error < 1


def test_errors_of_outputs_are_measured_and_reduced(tmp_path: Path) -> None:
    trained("boft", tmp_path)
    plain, weighted = (
        lora_fx.convert_adapter(
            base_of("words"), tmp_path, rank=2, inputs=inputs, return_report=True
        )[1]
        for inputs in (None, [IDS])
    )
    assert weighted.output_error > 0
    assert all(
        first.error <= second.error + 1e-6
        for first, second in zip(plain.sites, weighted.sites, strict=True)
    )


@pytest.mark.parametrize("name", LYCORIS)
def test_files_of_lycoris_are_converted(name: str, tmp_path: Path) -> None:
    case = lycoris(name)
    adapted = lora_fx.convert_adapter(case.model, case.file(tmp_path), energy=1.0).eval()
    with torch.no_grad():
        assert_close(adapted(case.x), case.output, 2e-5)


def test_a_base_in_half_precision_gets_the_change_without_its_rounding(tmp_path: Path) -> None:
    trained("vera-seed", tmp_path)
    model = base_of("words").to(torch.bfloat16)
    _, report = lora_fx.convert_adapter(model, tmp_path, energy=1.0, return_report=True)
    assert [site.rank for site in report.sites] == [3, 3, 3]


def test_the_task_and_the_base_of_the_folder_stay(tmp_path: Path) -> None:
    trained("loha", tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"task_type": "CAUSAL_LM", "base_model_name_or_path": "b"}))
    adapted = lora_fx.convert_adapter(base_of("words"), tmp_path)
    lora_fx.save_adapter(adapted, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["task_type"], written["base_model_name_or_path"]) == ("CAUSAL_LM", "b")
    assert written["peft_type"] == "LORA"


class Shared(nn.Module):
    """A head over the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.emb.weight
        self.config = {"model_type": "shared"}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.emb(ids))
        return output


def test_a_weight_that_is_used_twice_is_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=4, target_modules=["emb"], init_weights=False)
    peft.get_peft_model(Shared(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"emb.weight and head.weight are one parameter"):
        lora_fx.convert_adapter(Shared(), tmp_path)


def adapted_by_peft(base: nn.Module, config: peft.PeftConfig, folder: Path) -> nn.Module:
    """Return what PEFT loads from a folder with a trained adapter of a model."""
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def test_trained_tokens_of_a_tied_model_change_its_head(tmp_path: Path) -> None:
    base = base_of("gpt2")
    config = peft.TrainableTokensConfig(token_indices=[1, 5], target_modules=["wte"])
    expected = output(adapted_by_peft(base, config, tmp_path / "theirs"), IDS)
    adapted = lora_fx.convert_adapter(base, tmp_path / "theirs", energy=1.0)
    assert_close(output(adapted.eval(), IDS), expected, 2e-5)
    lora_fx.save_adapter(adapted, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(output(loaded, IDS), expected, 2e-5)
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[next(key for key in tensors if "lm_head" in key)] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"lm_head.* differs from the same tensor"):
        lora_fx.convert_adapter(base, tmp_path / "theirs")


def test_trained_tokens_of_a_tied_head_alone_are_refused(tmp_path: Path) -> None:
    base = base_of("gpt2")
    adapted_by_peft(
        base, peft.TrainableTokensConfig(token_indices=[1], target_modules=["lm_head"]), tmp_path
    )
    with pytest.raises(ConfigError, match=r"changes lm_head.weight alone"):
        lora_fx.convert_adapter(base, tmp_path)


@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]])
def test_a_tied_weight_in_full_is_refused(saved: list[str], tmp_path: Path) -> None:
    base = base_of("gpt2")
    config = peft.IA3Config(
        target_modules=["c_proj"], feedforward_modules=[], modules_to_save=saved
    )
    adapted_by_peft(base, config, tmp_path)
    problem = "only some of them in full" if len(saved) == 1 else "different values for them"
    with pytest.raises(ConfigError, match=rf"wte.weight and lm_head.weight are .* {problem}"):
        lora_fx.convert_adapter(base, tmp_path)


def test_a_tied_weight_with_one_value_in_full_stays_tied(tmp_path: Path) -> None:
    base = base_of("gpt2")
    config = peft.IA3Config(
        target_modules=["c_proj"], feedforward_modules=[], modules_to_save=["wte", "lm_head"]
    )
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    adapted.save_pretrained(tmp_path)
    ours = lora_fx.convert_adapter(base, tmp_path, energy=1.0).eval()
    assert_close(output(ours, IDS), output(adapted, IDS), 2e-5)


def test_a_module_with_two_names_is_refused(tmp_path: Path) -> None:
    class Twice(nn.Module):
        """A layer with two names, of which PEFT adapts the first alone."""

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.down = self.up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.down(torch.tanh(self.up(x)))
            return output

    config = peft.LoHaConfig(r=2, target_modules=["up", "down"], init_weights=False)
    peft.get_peft_model(Twice(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"up.weight and down.weight are one parameter"):
        lora_fx.convert_adapter(Twice(), tmp_path)


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=2, target_modules=LINEAR)
    peft.get_peft_model(Words(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"LoHa changes nothing: it was not trained"):
        lora_fx.convert_adapter(Words(), tmp_path)
    trained("loha", tmp_path)
    with pytest.raises(ConfigError, match=r"rank and energy are given"):
        lora_fx.convert_adapter(Words(), tmp_path, rank=2, energy=0.5)
    adapted = lora_fx.convert_adapter(Words(), tmp_path)
    with pytest.raises(ConfigError, match=r"has adapters already"):
        lora_fx.convert_adapter(adapted, tmp_path)
    lora_fx.save_adapter(adapted, tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter already"):
        lora_fx.convert_adapter(Words(), tmp_path / "lora")


def test_convolutions_are_converted_in_their_groups(tmp_path: Path) -> None:
    trained("lokr-conv", tmp_path)
    model = base_of("images")
    adapted, report = lora_fx.convert_adapter(model, tmp_path, rank=4, return_report=True)
    assert {site.name for site in report.sites} == {"wide", "grouped", "point", "line", "dot"}
    output(copy.deepcopy(adapted).eval(), IMAGES)
