"""Selection by PEFT's rules, compared with PEFT itself."""

from __future__ import annotations

import math
import re
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from lora_fx.config.lora_config import LoraConfig
from lora_fx.config.selection import (
    Unmatched,
    Verdict,
    alpha_for,
    judge,
    layer_index,
    name_matches,
    nearest_names,
    rank_for,
    saved_entries,
    saved_module,
    scale_for,
    unmatched,
    unmatched_saved,
    unmatched_targets,
    uses_default_targets,
)


class Box(nn.Module):
    """Children by name: PEFT copies no ModuleDict as one of `modules_to_save`."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def block() -> nn.Module:
    attention = Box(**{f"{one}_proj": nn.Linear(4, 4) for one in "qkvo"})
    experts = nn.ModuleList(Box(up=nn.Linear(4, 4)) for _ in range(2))
    return Box(self_attn=attention, mlp=Box(experts=experts, gate=nn.Linear(4, 4)))


class Tiny(nn.Module):
    """Layers below `model`, at the root, nested experts, and heads of all usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Box(layers=nn.ModuleList(block() for _ in range(3)))
        self.h = nn.ModuleList(Box(q_proj=nn.Linear(4, 4)) for _ in range(2))
        self.classifier = nn.Linear(4, 2)
        self.score = nn.Linear(4, 2)
        self.qa_outputs = nn.Linear(4, 2)
        self.lm_head = nn.Linear(4, 8)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT's causal LM wrapper looks this up."""


MODULES = [name for name, _ in Tiny().named_modules() if name]
LINEARS = [name for name, module in Tiny().named_modules() if isinstance(module, nn.Linear)]
Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"

TARGETS: list[Any] = [
    ["q_proj"],
    ["q_proj", "v_proj"],
    ["proj"],
    ["self_attn.q_proj", "gate"],
    ["layers.1.self_attn.q_proj"],
    [Q1, "up"],
    LINEARS[:9],
    LINEARS,
    ["q_proj", "nothing"],
    ["lm_head", "q_proj"],
    ["classifier", "score", "qa_outputs", "o_proj"],
    r".*\.q_proj",
    r".*\.layers\.[02]\..*(q|v)_proj",
    "q_proj",
    "lm_head",
    r".*_proj|lm_head",
    "all-linear",
    "ALL-LINEAR",
]
RESTRICTIONS: list[dict[str, Any]] = [
    {},
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": ["layers.0.self_attn.q_proj", "lm_head"]},
    {"exclude_modules": r".*\.(0|2)\..*"},
    {"exclude_modules": "proj"},
    {"exclude_modules": []},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["mlp", "layers.1.self_attn"]},
    {"task_type": "SEQ_CLS"},
    {"task_type": "CAUSAL_LM"},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 2]},
    {"layers_to_transform": []},
    {"layers_to_transform": [7]},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": 0, "layers_pattern": "h"},
    {"layers_to_transform": 1, "layers_pattern": "experts"},
    {"layers_to_transform": [1], "layers_pattern": "layer"},
    {"layers_to_transform": [0], "layers_pattern": []},
]
CASES = [
    pytest.param(
        {"target_modules": targets, **more}, id=f"{len(targets)}:{str(targets)[:30]}-{more}"
    )
    for targets in TARGETS
    for more in RESTRICTIONS
    if not ("layers_to_transform" in more and (isinstance(targets, str) or targets is LINEARS))
]


def targeted_by_peft(values: dict[str, Any]) -> set[str]:
    model = Tiny()
    try:
        peft.get_peft_model(model, peft.LoraConfig(**values))
    except ValueError as exc:
        if not re.search(
            "All modules were excluded|No modules were targeted|not found in", str(exc)
        ):
            raise
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def test_the_table_is_large() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("values", CASES)
def test_selects_what_peft_selects(values: dict[str, Any]) -> None:
    config = LoraConfig(**values)
    candidates = LINEARS if uses_default_targets(config) else MODULES
    ours = {name for name in candidates if name_matches(name, config)}
    # A fresh list: PEFT extends and empties those that it is given.
    assert ours == targeted_by_peft(
        {k: list(v) if isinstance(v, list) else v for k, v in values.items()}
    )


def test_a_long_list_means_what_a_short_one_means() -> None:
    """PEFT shortens lists of 20 and more, after which full names no longer skip the filter."""
    values = {"target_modules": LINEARS, "layers_to_transform": 7}
    assert len(LINEARS) >= 20
    assert targeted_by_peft(values) < set(LINEARS)
    assert all(name_matches(name, LoraConfig(**values)) for name in LINEARS)
    short = {**values, "target_modules": LINEARS[:19]}
    assert targeted_by_peft(short) == set(LINEARS[:19])


def test_task_heads_that_peft_fails_on_are_not_adapted() -> None:
    values = {"target_modules": ["classifier", "q_proj"], "task_type": "TOKEN_CLS"}
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        peft.get_peft_model(Tiny(), peft.LoraConfig(**values))
    assert not name_matches("classifier", LoraConfig(**values))
    assert name_matches(Q0, LoraConfig(**values))


def test_saved_without_a_dot_is_saved_as_in_peft() -> None:
    values = {"target_modules": ["q_proj"], "modules_to_save": ["head", "up"]}
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(**values))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    }
    config = LoraConfig(**values)
    assert {name for name in MODULES if saved_module(name, config)} == wrapped
    assert "lm_head" in wrapped
    assert judge("lm_head", LoraConfig(target_modules=["lm_head"], modules_to_save=["head"])) == (
        Verdict(False, "trained in full: modules_to_save 'head'")
    )
    assert not name_matches(
        "lm_head.dense", LoraConfig(target_modules=["dense"], modules_to_save=["head"])
    )


@pytest.mark.parametrize(
    ("task", "entries"),
    [
        (None, ("x",)),
        ("CAUSAL_LM", ("x",)),
        ("SEQ_CLS", ("x", "classifier", "score")),
        ("TOKEN_CLS", ("x", "classifier", "score")),
        ("QUESTION_ANS", ("x", "qa_outputs")),
    ],
)
def test_task_type_saves_its_heads(task: str | None, entries: tuple[str, ...]) -> None:
    config = LoraConfig(task_type=task, modules_to_save=["x"])
    assert saved_entries(config) == entries
    theirs = peft.LoraConfig(task_type=task, modules_to_save=["x"], target_modules=["q_proj"])
    peft.get_peft_model(Tiny(), theirs)
    assert tuple(theirs.modules_to_save) == entries
    assert not saved_module("anything", LoraConfig())


RANKS: list[dict[str, Any]] = [
    {},
    {"r": 3, "lora_alpha": 5},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 2, "q_proj": 5}},
    {"rank_pattern": {"q_proj": 5, "^model.layers.1.self_attn.q_proj": 2}},
    {"rank_pattern": {"proj": 5}},
    {"rank_pattern": {r".*\.1\..*": 5}},
    {"rank_pattern": {"layers.1": 5, "q_proj|v_proj": 3}},
    {"alpha_pattern": {"q_proj": 3, ".*": 4.5}},
    {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True},
    {"rank_pattern": {"[qv]_proj": 16}, "alpha_pattern": {r"layers\.\d\..*": 2}},
]


@pytest.mark.parametrize("values", RANKS, ids=str)
def test_rank_alpha_and_scale_are_pefts(values: dict[str, Any]) -> None:
    values = {"target_modules": ["q_proj", "v_proj"], **values}
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(**values)).base_model
    config = LoraConfig(**values)
    assert model.targeted_module_names
    for name in model.targeted_module_names:
        layer = model.model.get_submodule(name)
        assert rank_for(name, config) == layer.r["default"]
        assert alpha_for(name, config) == layer.lora_alpha["default"]
        assert scale_for(name, config) == pytest.approx(layer.scaling["default"], rel=1e-15)


def test_scale_by_hand() -> None:
    assert scale_for("q", LoraConfig(r=16, lora_alpha=32)) == 2.0
    assert scale_for("q", LoraConfig(r=16, lora_alpha=32, use_rslora=True)) == 8.0
    assert scale_for("a.q", LoraConfig(rank_pattern={"q": 2}, use_rslora=True)) == 8 / math.sqrt(2)


def test_a_key_that_is_no_expression_for_itself_still_names_its_module() -> None:
    assert rank_for("w[0]", LoraConfig(rank_pattern={"w[0]": 3})) == 3
    assert unmatched(["w[0]"], LoraConfig(rank_pattern={"w[0]": 3})).rank_keys == ()


@pytest.mark.parametrize(
    ("name", "values", "selected", "reason"),
    [
        (Q0, {"target_modules": ["q_proj"]}, True, "matches target 'q_proj'"),
        (Q0, {"target_modules": [Q0]}, True, "named in target_modules"),
        (Q0, {"target_modules": ".*q_proj"}, True, "matches the regular expression '.*q_proj'"),
        (Q0, {"target_modules": ["v"]}, False, "matches no target in target_modules"),
        (Q0, {"target_modules": []}, False, "matches no target in target_modules"),
        (Q0, {}, True, "part of the default, since target_modules is not set"),
        (Q0, {"target_modules": "all-linear"}, True, "part of target_modules='all-linear'"),
        (
            "lm_head",
            {"exclude_modules": ["lm_head"]},
            False,
            "excluded by exclude_modules 'lm_head'",
        ),
        ("lm_head", {"exclude_modules": ".*head"}, False, "excluded by exclude_modules '.*head'"),
        (
            "a.norm.x",
            {"modules_to_save": ["norm"]},
            False,
            "trained in full: modules_to_save 'norm'",
        ),
        (Q1, {"layers_to_transform": 0}, False, "layer 1 is not in layers_to_transform"),
        (
            Q1,
            {"layers_to_transform": 1},
            True,
            "part of the default, since target_modules is not set",
        ),
        (
            Q1,
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            False,
            "layer 1 is not in layers_to_transform",
        ),
        (
            "lm_head",
            {"layers_to_transform": [0]},
            False,
            "its name shows no layer index, and layers_to_transform is set",
        ),
        (
            Q1,
            {"layers_to_transform": [0], "layers_pattern": "h"},
            False,
            "layers_pattern finds no layer index, and layers_to_transform is set",
        ),
    ],
)
def test_reasons(name: str, values: dict[str, Any], selected: bool, reason: str) -> None:
    assert judge(name, LoraConfig(**values)) == Verdict(selected, reason)


def test_the_caller_decides_what_the_default_is() -> None:
    for targets in (None, "all-linear"):
        config = LoraConfig(target_modules=targets)
        assert judge("lm_head", config, in_default=False) == Verdict(
            False, f"not what target_modules={targets!r} stands for"
        )
    assert name_matches("lm_head", LoraConfig(target_modules=["lm_head"]), in_default=False)


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        (Q1, None, 1),
        ("model.layers.2.mlp.experts.1.up", None, 2),
        ("model.layers.2.mlp.experts.1.up", "experts", 1),
        ("model.layers.2.mlp.experts.1.up", ["nope", "layers"], 2),
        ("model.layers.2.mlp.layers.1.up", "layers", 2),
        ("h.1.q_proj", None, None),
        ("h.1.q_proj", "h", 1),
        ("oh.1.q_proj", "h", None),
        ("lm_head", None, None),
        ("model.layers.1", "layers", None),
    ],
)
def test_layer_index(name: str, pattern: Any, index: int | None) -> None:
    assert layer_index(name, LoraConfig(layers_to_transform=0, layers_pattern=pattern)) == index


def test_everything_unmatched_is_named_apart() -> None:
    config = LoraConfig(
        target_modules=["q_proj", "k_porj", "lm_head", "up"],
        exclude_modules=["lm_head", "lm_haed"],
        modules_to_save=["experts"],
        layers_to_transform=[1, 9],
        layers_pattern=["layers", "blocks"],
        rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 3, "v_proj": 4},
        alpha_pattern={"qq": 1},
    )
    found = unmatched(LINEARS, config)
    assert found == Unmatched(
        targets=("k_porj",),
        filtered=("lm_head", "up"),
        excludes=("lm_haed",),
        rank_keys=("layers.1.self_attn.q_proj", "v_proj"),
        alpha_keys=("qq",),
        layers=(9,),
        layers_patterns=("blocks",),
    )
    assert found
    assert unmatched_targets(LINEARS, config) == ("k_porj",)


def test_nothing_unmatched() -> None:
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=[Q0], rank_pattern={"q_proj": 2})
    assert not unmatched(LINEARS, config)
    assert unmatched_targets(LINEARS, LoraConfig()) == ()
    assert unmatched_targets(LINEARS, LoraConfig(target_modules="all-linear")) == ()


def test_a_regular_expression_is_one_target() -> None:
    assert unmatched_targets(LINEARS, LoraConfig(target_modules="q_proj")) == ("q_proj",)
    assert unmatched_targets(LINEARS, LoraConfig(target_modules=".*q_proj")) == ()
    config = LoraConfig(target_modules=".*q_proj", exclude_modules=".*")
    assert unmatched(LINEARS, config) == Unmatched(filtered=(".*q_proj",))
    assert unmatched(LINEARS, LoraConfig(exclude_modules="x")).excludes == ("x",)


def test_the_callers_selection_counts_for_patterns() -> None:
    config = LoraConfig(rank_pattern={"lm_head": 2})
    assert unmatched(LINEARS, config).rank_keys == ()
    without_head = [name for name in LINEARS if name != "lm_head"]
    assert unmatched(LINEARS, config, selected=without_head).rank_keys == ("lm_head",)


def test_unmatched_saved() -> None:
    config = LoraConfig(modules_to_save=["norm", "head"], task_type="QUESTION_ANS")
    assert unmatched_saved(["lm_head"], config) == ("norm",)


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("q_porj", "q_proj"),
        (r".*\.q_porj$", "q_proj"),
        ("self_atn.q_proj", "self_attn.q_proj"),
        ("model.layer.0.self_attn.q_proj", Q0),
        ("lm_haed", "lm_head"),
    ],
)
def test_nearest_names(target: str, nearest: str) -> None:
    found = nearest_names(target, LINEARS)
    assert found[0] == nearest
    assert len(found) <= 3


def test_nearest_names_of_nothing() -> None:
    assert nearest_names("zzzzzz", LINEARS) == ()
    assert nearest_names(".*", LINEARS) == ()
    assert nearest_names("q_proj", []) == ()
    assert nearest_names("q_proj", LINEARS, n=0) == ()
    assert len(nearest_names("q_proj", LINEARS, n=2)) == 2


# Few parts, so that names and entries meet often.
PARTS = st.sampled_from(["a", "b", "layers", "h", "0", "1", "2", "q", "ab"])
DOTTED = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
ENTRIES = st.lists(st.lists(PARTS, min_size=1, max_size=2).map(".".join), max_size=4)
REGEXES = st.sampled_from([r".*\.q", "a.*", r".*\.(0|1)\..*", "q", ".*", r"(layers|h)\..*"])


@st.composite
def keyed(draw: st.DrawFn) -> dict[str, Any]:
    targets = draw(ENTRIES | REGEXES)
    values: dict[str, Any] = {
        "target_modules": targets,
        "exclude_modules": draw(st.none() | ENTRIES | REGEXES),
        "modules_to_save": draw(st.none() | ENTRIES),
    }
    if not isinstance(targets, str):
        values["layers_to_transform"] = draw(
            st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2))
        )
        if values["layers_to_transform"] is not None:
            patterns = st.sampled_from(["layers", "h", "a|b", "(layers|h)", "", ["h", "a"], []])
            values["layers_pattern"] = draw(st.none() | patterns)
    return values


@settings(max_examples=600, deadline=None)
@given(DOTTED, keyed())
def test_any_name_and_config_as_peft(name: str, values: dict[str, Any]) -> None:
    config = LoraConfig(**values)
    inside_saved = any(f"{one}." in f"{name}." for one in values["modules_to_save"] or ())
    theirs = bool(check_target_module_exists(peft.LoraConfig(**values), name))
    # What `saved_module` takes without a dot is the one difference, and never adapted.
    assert name_matches(name, config) == (theirs and not inside_saved)


@settings(max_examples=300, deadline=None)
@given(DOTTED, st.dictionaries(DOTTED | REGEXES, st.integers(1, 9), max_size=4))
def test_any_pattern_as_peft(name: str, pattern: dict[str, int]) -> None:
    theirs = pattern.get(get_pattern_key(pattern.keys(), name), 77)
    assert rank_for(name, LoraConfig(r=77, rank_pattern=pattern)) == theirs
    assert alpha_for(name, LoraConfig(lora_alpha=77, alpha_pattern=pattern)) == theirs


@settings(max_examples=200, deadline=None)
@given(st.lists(DOTTED, max_size=6), keyed())
def test_verdicts_and_unmatched_agree(names: list[str], values: dict[str, Any]) -> None:
    config = LoraConfig(**values)
    found = unmatched(names, config)
    entries = values["target_modules"]
    entries = {entries} if isinstance(entries, str) else set(entries)
    assert set(found.targets) | set(found.filtered) <= entries
    assert not set(found.targets) & set(found.filtered)
    if any(name_matches(name, config) for name in names):
        assert set(found.targets) | set(found.filtered) != entries
    else:
        assert set(found.targets) | set(found.filtered) == entries


@settings(max_examples=100, deadline=None)
@given(DOTTED, keyed(), ENTRIES, st.integers(0, 5))
def test_an_excluded_name_is_never_selected(
    name: str, values: dict[str, Any], more: list[str], start: int
) -> None:
    ending = ".".join(name.split(".")[start:]) or name
    for targets in (values["target_modules"], None):
        restricted = {**values, "target_modules": targets, "exclude_modules": [*more, ending]}
        verdict = judge(name, LoraConfig(**restricted))
        assert not verdict.selected
        assert verdict.reason.startswith("excluded by exclude_modules")
