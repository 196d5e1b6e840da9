"""LoraConfig: normalized, immutable, strict about values, and PEFT's file format."""

from __future__ import annotations

import copy
import dataclasses
import errno
import inspect
import json
import os
import pickle
import re
import stat
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import config as peft_config

from lora_fx.config import fields as _config_fields
from lora_fx.config.lora_config import CONFIG_NAME, TASK_TYPES, FrozenPattern, LoraConfig
from lora_fx.errors import CheckpointError, ConfigError

RICH: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6.5,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["layers.1.q_proj"],
    "layers_to_transform": [1, 0],
    "layers_pattern": ["layers", "h"],
    "rank_pattern": {"v_proj": 2, "layers.0.q_proj": 3},
    "alpha_pattern": {"q_proj": 1.5},
    "use_rslora": True,
    "bias": "lora_only",
    "modules_to_save": ["norm"],
    "task_type": "SEQ_CLS",
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "gaussian",
    "seed": 7,
    "inference_mode": True,
    "base_model_name_or_path": "some/model",
    "revision": "main",
}


def test_fields_and_defaults_are_pefts() -> None:
    theirs = peft.LoraConfig().to_dict()
    ours = LoraConfig().to_dict()
    assert ours.pop("seed") is None
    # PEFT's own default is an empty dict, which means the same.
    assert ours == {
        name: theirs[name] or None if name == "loftq_config" else theirs[name] for name in ours
    }


_OURS = {"seed", "scope", "kind", "dense_groups"}


def test_every_peft_field_is_known() -> None:
    theirs = {one.name for one in dataclasses.fields(peft.LoraConfig)}
    ours = {one.name for one in dataclasses.fields(LoraConfig)} - _OURS
    unsupported = set(_config_fields.FOREIGN)
    assert ours | unsupported | set(_config_fields.METADATA) == theirs
    assert not ours & unsupported
    assert set(_config_fields.NORMALIZERS) == ours | _OURS


def test_defaults_of_unsupported_fields_are_pefts() -> None:
    theirs = peft.LoraConfig().to_dict()
    ours = {k: v.off for k, v in _config_fields.FOREIGN.items() if k != "runtime_config"}
    assert ours == {name: theirs[name] for name in ours}


def test_task_types_are_pefts() -> None:
    assert set(TASK_TYPES) == {one.value for one in peft.TaskType}
    assert LoraConfig(task_type=peft.TaskType.TOKEN_CLS).task_type == "TOKEN_CLS"
    assert type(LoraConfig(task_type=peft.TaskType.TOKEN_CLS).task_type) is str


def test_signature_shows_the_fields() -> None:
    names = list(inspect.signature(LoraConfig).parameters)
    assert names == [one.name for one in dataclasses.fields(LoraConfig)]
    assert LoraConfig(16, 32).r == 16
    assert LoraConfig(16, 32).lora_alpha == 32


def test_values_are_normalized() -> None:
    config = LoraConfig(**RICH)
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.exclude_modules == ("layers.1.q_proj",)
    assert config.layers_to_transform == (0, 1)
    assert config.layers_pattern == ("layers", "h")
    assert config.modules_to_save == ("norm",)
    assert list(config.rank_pattern) == ["v_proj", "layers.0.q_proj"]


@pytest.mark.parametrize(
    ("given_value", "stored"),
    [
        ({"target_modules": {"b", "a"}}, ("a", "b")),
        ({"target_modules": ("b", "a", "b")}, ("a", "b")),
        ({"target_modules": []}, ()),
        ({"target_modules": "All-Linear"}, "all-linear"),
        ({"target_modules": ".*q"}, ".*q"),
        ({"exclude_modules": "All-Linear"}, "All-Linear"),
        ({"layers_to_transform": 3}, (3,)),
        ({"layers_to_transform": range(2)}, (0, 1)),
        ({"layers_to_transform": []}, ()),
        ({"rank_pattern": None}, {}),
        ({"alpha_pattern": {"q": 2}}, {"q": 2}),
        ({"modules_to_save": ["b", "a", "b"]}, ("b", "a")),
        ({"init_lora_weights": "Gaussian"}, "gaussian"),
        ({"init_lora_weights": False}, False),
        ({"lora_dropout": 0}, 0.0),
        ({"base_model_name_or_path": Path("here")}, "here"),
    ],
)
def test_normal_form(given_value: dict[str, Any], stored: object) -> None:
    (name,) = given_value
    assert getattr(LoraConfig(**given_value), name) == stored


def test_layers_pattern_string_becomes_a_tuple() -> None:
    assert LoraConfig(layers_to_transform=0, layers_pattern="h").layers_pattern == ("h",)
    assert LoraConfig(layers_to_transform=0, layers_pattern="").layers_pattern == ()


def test_numpy_numbers_become_python_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    config = LoraConfig(r=numpy.int64(4), lora_alpha=numpy.float32(0.5))
    assert type(config.r) is int
    assert type(config.lora_alpha) is float
    json.dumps(config.to_dict())


def test_cannot_be_changed_in_place() -> None:
    patterns, targets = {"q": 2}, ["q"]
    config = LoraConfig(rank_pattern=patterns, target_modules=targets)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.rank_pattern["q"] = 3  # type: ignore[index]
    patterns["v"] = 5
    targets.append("v")
    assert config.rank_pattern == {"q": 2}
    assert config.target_modules == ("q",)


def test_replace_validates_again() -> None:
    assert dataclasses.replace(LoraConfig(**RICH), r=2).r == 2
    with pytest.raises(ConfigError, match=r"LoraConfig\.r: found 0"):
        dataclasses.replace(LoraConfig(), r=0)


@pytest.mark.parametrize("values", [{}, RICH])
def test_copies_compare_and_hash_equal(values: dict[str, Any]) -> None:
    config = LoraConfig(**values)
    for twin in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert hash(twin) == hash(config)
        assert isinstance(twin.rank_pattern, FrozenPattern)


def test_order_of_patterns_is_part_of_the_meaning() -> None:
    one = LoraConfig(rank_pattern={"a": 1, "b": 2})
    other = LoraConfig(rank_pattern={"b": 2, "a": 1})
    assert one != other
    assert one.rank_pattern == {"b": 2, "a": 1}
    assert one.rank_pattern != 3
    assert repr(one.rank_pattern) == "{'a': 1, 'b': 2}"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: found 0"),
    ({"r": -1}, "r: found -1"),
    ({"r": 2.0}, "r: found 2.0"),
    ({"r": True}, "r: found True"),
    ({"r": "8"}, "r: found '8'"),
    ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha: found inf"),
    ({"lora_alpha": "8"}, "lora_alpha: found '8'"),
    ({"lora_alpha": True}, "lora_alpha: found True"),
    ({"lora_dropout": 1.0}, "lora_dropout: found 1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout: found -0.1"),
    ({"lora_dropout": float("nan")}, "lora_dropout: found nan"),
    ({"target_modules": "q("}, r"target_modules: found 'q\('"),
    ({"target_modules": 3}, "target_modules: found 3"),
    ({"target_modules": [3]}, "target_modules: found 3"),
    ({"target_modules": [""]}, "target_modules: found ''"),
    ({"target_modules": {"q": 1}}, "target_modules: found"),
    ({"exclude_modules": "[z-a]"}, "exclude_modules: found"),
    ({"exclude_modules": [None]}, "exclude_modules: found None"),
    ({"layers_to_transform": "0"}, "layers_to_transform: found '0'"),
    ({"layers_to_transform": [0, True]}, "layers_to_transform: found True"),
    ({"layers_to_transform": 1.0}, "layers_to_transform: found 1.0"),
    ({"target_modules": "q", "layers_to_transform": [0]}, "layers_to_transform: found"),
    ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform: found"),
    ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern: found"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, "give layers_to_transform as well"),
    ({"layers_to_transform": 0, "layers_pattern": ["("]}, r"layers_pattern: found '\('"),
    ({"layers_to_transform": 0, "layers_pattern": "(?P<idx>h)"}, "layers_pattern: found"),
    ({"layers_to_transform": 0, "layers_pattern": 1}, "layers_pattern: found 1"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: found 0"),
    ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\]: found 1.5"),
    ({"rank_pattern": {"(": 1}}, r"rank_pattern: found '\('"),
    ({"rank_pattern": {"(?i)q": 1}}, "rank_pattern: found"),
    ({"rank_pattern": {1: 1}}, "rank_pattern: found 1"),
    ({"rank_pattern": [("q", 1)]}, "rank_pattern: found"),
    ({"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern\['q'\]: found inf"),
    ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\]: found None"),
    ({"use_rslora": 1}, "use_rslora: found 1"),
    ({"bias": "some"}, "bias: found 'some'"),
    ({"bias": ["none"]}, "bias: found"),
    ({"modules_to_save": "head"}, "modules_to_save: found 'head'"),
    ({"modules_to_save": ["("]}, r"modules_to_save: found '\('"),
    ({"task_type": "CLS"}, "task_type: found 'CLS'"),
    ({"task_type": 1}, "task_type: found 1"),
    ({"fan_in_fan_out": None}, "fan_in_fan_out: found None"),
    ({"init_lora_weights": "kaiming"}, "the initializations are"),
    ({"init_lora_weights": 1}, "init_lora_weights: found 1"),
    ({"init_lora_weights": None}, "init_lora_weights: found None"),
    ({"init_lora_weights": "pissa_niter_"}, "the initializations are"),
    ({"seed": -1}, "seed: found -1"),
    ({"seed": 2**63}, "seed: found"),
    ({"seed": True}, "seed: found True"),
    ({"inference_mode": "yes"}, "inference_mode: found 'yes'"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path: found 3"),
    ({"use_dora": 1}, "use_dora: found 1"),
    ({"use_dora": True, "lora_bias": True}, "lora_bias: found True; DoRA has no bias on B"),
    ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias: found True; with init_lora"),
    ({"r": 3, "init_lora_weights": "orthogonal"}, "r: found 3; .* needs an even rank"),
    (
        {"rank_pattern": {"q": 5}, "init_lora_weights": "orthogonal"},
        r"rank_pattern\['q'\]: found 5; .* needs an even rank",
    ),
    ({"target_parameters": "w"}, "target_parameters: found 'w'; give a list"),
    ({"trainable_token_indices": 1}, "trainable_token_indices: found 1"),
    ({"trainable_token_indices": []}, r"trainable_token_indices: found \[\]"),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices: found -1"),
    ({"trainable_token_indices": [2, 2]}, "every token index is there once"),
    ({"trainable_token_indices": {"wte": [True]}}, r"trainable_token_indices\['wte'\]: found True"),
    ({"trainable_token_indices": {"": [1]}}, "trainable_token_indices: found ''"),
    ({"loftq_config": {"loftq_bits": 3}}, r"loftq_config\['loftq_bits'\]: found 3; give 2, 4 or 8"),
    ({"loftq_config": {"bits": 4}}, "loftq_config: there is no option 'bits'"),
    ({"eva_config": 3}, "eva_config: found 3; give a dict"),
    ({"eva_config": {"rho": 0.5}}, r"eva_config\['rho'\]: found 0.5"),
    ({"corda_config": {"cache_file": "x"}}, r"corda_config\['cache_file'\]: found 'x'"),
    ({"lora_ga_config": {"direction": "up"}}, r"lora_ga_config\['direction'\]: found 'up'"),
    ({"qalora_group_size": 32}, "qalora_group_size: found 32"),
    ({"megatron_core": "mine"}, "megatron_core: found 'mine'"),
    ({"dropout": 0.1}, "no field 'dropout'; did you mean 'lora_dropout'"),
    ({"rank": 4}, "no field 'rank'; did you mean 'r'"),
    ({"target_module": ["q"]}, "no field 'target_module'; did you mean 'target_modules'"),
    ({"zzz": 1}, "no field 'zzz'; The fields are r, "),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda one: str(one)[:40])
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


def test_unsupported_fields_at_pefts_default_are_accepted() -> None:
    off = {name: one.off for name, one in _config_fields.FOREIGN.items()}
    assert LoraConfig(**off) == LoraConfig()  # type: ignore[arg-type]
    assert LoraConfig(runtime_config=peft.LoraRuntimeConfig()) == LoraConfig()  # type: ignore[call-arg]
    assert LoraConfig(loftq_config=None, use_qalora=None) == LoraConfig()  # type: ignore[call-arg]


def test_options_of_an_initialization_are_completed() -> None:
    config = LoraConfig(init_lora_weights="eva", eva_config={"rho": 3})
    assert config.eva_config == {**dataclasses.asdict(peft.EvaConfig()), "rho": 3}
    assert LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=3)) == config
    for name, theirs in (
        ("loftq", peft.LoftQConfig()),
        ("eva", peft.EvaConfig()),
        ("corda", peft_config.CordaConfig()),
        ("lora_ga", peft_config.LoraGAConfig()),
    ):
        config = LoraConfig(init_lora_weights=name)
        assert getattr(config, f"{name}_config") == dataclasses.asdict(theirs)
        assert hash(pickle.loads(pickle.dumps(config))) == hash(config)
        assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_options_of_another_initialization_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    LoraConfig(eva_config={})
    assert not caplog.records
    LoraConfig(eva_config={"rho": 3})
    assert "eva_config is ignored" in caplog.text


@pytest.mark.parametrize("name", sorted(_config_fields.FOREIGN))
def test_no_unsupported_field_is_dropped(name: str) -> None:
    feature = re.escape(_config_fields.FOREIGN[name].feature)
    with pytest.raises(
        ConfigError, match=f"{name}: found 'on'; lora_fx does not support it.*{feature}"
    ):
        LoraConfig(**{name: "on"})


def test_dict_round_trip() -> None:
    config = LoraConfig(**RICH)
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_reads_pefts_dict() -> None:
    theirs = peft.LoraConfig(r=3, target_modules=["b", "a"], task_type="CAUSAL_LM")
    assert LoraConfig.from_dict(theirs.to_dict()) == LoraConfig(
        r=3, target_modules=["a", "b"], task_type="CAUSAL_LM"
    )
    with pytest.raises(ConfigError, match="'ADALORA'"):
        LoraConfig.from_dict({"peft_type": "ADALORA"})


def as_peft_sees(config: peft.LoraConfig) -> dict[str, Any]:
    values = config.to_dict()
    values["loftq_config"] = values["loftq_config"] or None
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


@pytest.mark.parametrize("values", [{}, RICH, {"target_modules": "all-linear"}])
def test_peft_reads_what_is_saved_without_a_warning(values: dict[str, Any], tmp_path: Path) -> None:
    LoraConfig(**values).save_pretrained(tmp_path / "new" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = peft.LoraConfig.from_pretrained(str(tmp_path / "new" / "folder"))
        direct = peft.LoraConfig(**{k: v for k, v in values.items() if k != "seed"})
        assert type(peft.PeftConfig.from_pretrained(str(tmp_path / "new" / "folder"))) is type(
            direct
        )
    assert as_peft_sees(loaded) == {
        **as_peft_sees(direct),
        # Written in normal form: sorted, PEFT only asks `in`.
        "layers_to_transform": sorted(values["layers_to_transform"]) if values is RICH else None,
    }
    assert list(loaded.rank_pattern) == list(values.get("rank_pattern", {}))


def test_file_has_type_and_no_seed(tmp_path: Path) -> None:
    LoraConfig(**RICH).save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert written["peft_type"] == "LORA"
    assert "seed" not in written
    assert list(written) == sorted(written)


@pytest.mark.parametrize("values", [{}, RICH])
def test_file_round_trip_but_for_the_seed(values: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(**values)
    config.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path) == dataclasses.replace(config, seed=None)
    assert [one.name for one in tmp_path.iterdir()] == [CONFIG_NAME]


@pytest.mark.parametrize("values", [{}, {k: v for k, v in RICH.items() if k != "seed"}])
def test_reads_what_peft_saves(values: dict[str, Any], tmp_path: Path) -> None:
    peft.LoraConfig(**values).save_pretrained(str(tmp_path))
    loaded = LoraConfig.from_pretrained(str(tmp_path))
    expected = LoraConfig(**values)
    # PEFT's writer sorts the keys of the patterns.
    assert loaded.rank_pattern == dict(expected.rank_pattern)
    assert dataclasses.replace(loaded, rank_pattern=expected.rank_pattern) == expected


def write(folder: Path, **values: Any) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", **values}))


def test_unknown_keys_of_a_newer_peft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, r=2, new_size=3, new_feature=None, new_table={})
    with caplog.at_level("WARNING", logger="lora_fx"):
        assert LoraConfig.from_pretrained(tmp_path) == LoraConfig(r=2)
    for key in ("new_size", "new_feature", "new_table"):
        assert key in caplog.text


@pytest.mark.parametrize("value", [True, "on", {"a": 1}, [1]])
def test_unknown_features_in_a_file_are_refused(value: object, tmp_path: Path) -> None:
    write(tmp_path, new_feature=value)
    with pytest.raises(ConfigError, match=r"adapter_config\.json: .*'new_feature'"):
        LoraConfig.from_pretrained(tmp_path)


def test_unsupported_features_in_a_file_are_refused(tmp_path: Path) -> None:
    peft.LoraConfig(use_qalora=True).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"adapter_config\.json: .*use_qalora"):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"[]", "JSON object"),
        (b"{}", "peft_type is None"),
        (b'{"peft_type": "IA3"}', "peft_type is 'IA3'"),
    ],
)
def test_damaged_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        LoraConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder() -> None:
    with pytest.raises(CheckpointError, match="local folder"):
        LoraConfig.from_pretrained("/nowhere/at/all")


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LoraConfig(r=2).save_pretrained(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        LoraConfig(r=3).save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).r == 2
    assert [one.name for one in tmp_path.iterdir()] == [CONFIG_NAME]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        LoraConfig().save_pretrained(tmp_path / "taken")


def test_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    LoraConfig().save_pretrained(tmp_path)
    (tmp_path / "other").write_text("")
    modes = {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_old_file_is_replaced_not_rewritten(tmp_path: Path) -> None:
    LoraConfig(r=2).save_pretrained(tmp_path)
    (tmp_path / "old").hardlink_to(tmp_path / CONFIG_NAME)
    LoraConfig(r=3).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "old").read_text())["r"] == 2
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["r"] == 3


NAMES = st.text("abc._", min_size=1, max_size=8)


@st.composite
def configs(draw: st.DrawFn) -> LoraConfig:
    values: dict[str, Any] = {
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.integers(-9, 99) | st.floats(-1e6, 1e6)),
        "lora_dropout": draw(st.floats(0, 1, exclude_max=True)),
        "target_modules": draw(st.none() | st.lists(NAMES) | st.sets(NAMES)),
        "exclude_modules": draw(st.none() | NAMES | st.lists(NAMES)),
        "layers_to_transform": draw(st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9))),
        "rank_pattern": draw(st.dictionaries(NAMES, st.integers(1, 9))),
        "alpha_pattern": draw(st.dictionaries(NAMES, st.floats(-9, 9))),
        "modules_to_save": draw(st.none() | st.lists(NAMES)),
        "task_type": draw(st.none() | st.sampled_from(TASK_TYPES)),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    return LoraConfig(**values)


@settings(max_examples=100, deadline=None)
@given(configs())
def test_round_trips_hold_for_every_config(config: LoraConfig) -> None:
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(copy.deepcopy(config)) == hash(config)
    assert LoraConfig(**config.to_dict()) == config


@settings(max_examples=50, deadline=None)
@given(configs())
def test_peft_accepts_every_config(config: LoraConfig) -> None:
    values = config.to_dict()
    del values["seed"]
    back = as_peft_sees(peft.LoraConfig(**values))
    assert {name: back[name] for name in values} == values
