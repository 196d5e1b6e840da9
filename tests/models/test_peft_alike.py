"""BD-LoRA, aLoRA, Arrow and grouped convolutions with all options; ``test_peft_table.py`` has PEFT's rows.

For each row: the folder that PEFT saves with random numbers loads here and gives PEFT's output, PEFT's
gradients and PEFT's merged weights, or the merge is refused as PEFT refuses it. The folder that is saved here
loads in PEFT and gives the same output. A few steps of training leave the same output.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
import lora_fx.peft
from lora_fx.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    ExportError,
    MergeError,
    NoMatchError,
)
from tests.models.test_peft_table import in_peft as trained_in_peft
from tests.numerics import assert_close, assert_same_bits, relative_error
from tests.zoo import sample, seeded

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."


class Mlp(nn.Module):
    """PEFT's MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 20)
        self.lin1 = nn.Linear(20, 20)
        self.lin2 = nn.Linear(20, 4)

    def forward(self, x):
        return torch.log_softmax(self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x))))), -1)


class Convolution(nn.Module):
    """PEFT's Conv2dGroups, in any number of dimensions."""

    def __init__(self, dims: int, groups: int, channels: int, out: int, **options: Any) -> None:
        super().__init__()
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = cls(channels, out, 3, padding=1, groups=groups, **options)
        self.lin0 = nn.Linear(out, 2)

    def forward(self, x):
        return self.lin0(torch.relu(self.conv(x)).flatten(2).mean(-1))


def blocks(count: int = 2, **options: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "use_bdlora": BdLoraConfig(nblocks=count, **options)}


Row = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], bool]
A, B = "target_modules_bd_a", "target_modules_bd_b"
LAYERS = ["lin0", "lin1"]
ROWS: dict[str, Row] = {
    "Conv2d Groups LoRA": (lambda: Convolution(2, 2, 16, 32), (2, 16, 5, 5), {}, False),
    "Conv2d Groups2 LoRA": (lambda: Convolution(2, 4, 8, 16), (2, 8, 5, 5), {}, False),
    "Conv2d Groups LoRA with DoRA": (
        lambda: Convolution(2, 2, 16, 32),
        (2, 16, 5, 5),
        {"use_dora": True},
        False,
    ),
    "Conv2d Groups2 LoRA with DoRA": (
        lambda: Convolution(2, 4, 8, 16),
        (2, 8, 5, 5),
        {"use_dora": True},
        False,
    ),
    "Conv1d Groups LoRA": (lambda: Convolution(1, 2, 4, 6), (2, 4, 7), {}, False),
    "Conv3d Groups LoRA, depthwise": (lambda: Convolution(3, 4, 4, 8), (2, 4, 3, 3, 3), {}, False),
    "Conv3d Groups DoRA, no bias": (
        lambda: Convolution(3, 2, 4, 8, bias=False),
        (2, 4, 3, 3, 3),
        {"use_dora": True},
        False,
    ),
    "Conv2d Groups LoRA with lora_b bias": (
        lambda: Convolution(2, 2, 16, 32),
        (2, 16, 5, 5),
        {"lora_bias": True, "lora_alpha": 32},
        False,
    ),
    "Conv2d Groups LoRA with lin0": (
        lambda: Convolution(2, 2, 16, 32),
        (2, 16, 5, 5),
        {"target_modules": ["conv", "lin0"], "use_rslora": True},
        False,
    ),
    "BD-LoRA A": (Mlp, (3, 12), {**blocks(**{A: ["lin0"]}), "target_modules": ["lin0"]}, True),
    "BD-LoRA B": (Mlp, (3, 12), {**blocks(**{B: ["lin0"]}), "target_modules": ["lin0"]}, True),
    "BD-LoRA A and B": (
        Mlp,
        (3, 5, 12),
        {**blocks(4, **{A: ["lin1"], B: ["lin0"]}), "target_modules": LAYERS},
        True,
    ),
    "BD-LoRA with one block": (
        Mlp,
        (3, 12),
        {**blocks(1, **{A: ["lin0"], B: ["lin1"]}), "target_modules": LAYERS},
        True,
    ),
    "BD-LoRA beside LoRA": (
        Mlp,
        (3, 12),
        {**blocks(match_strict=False, **{B: ["lin1"]}), "target_modules": LAYERS},
        True,
    ),
}


def in_peft(base: nn.Module, options: Mapping[str, Any]) -> Any:
    """PEFT's model with random numbers in its factors, in evaluation."""
    return trained_in_peft(base, dict(options)).eval()


def read_by_peft(base: nn.Module, folder: Path) -> Any:
    """PEFT's model from a folder; a key that is missing or unexpected would be a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*adapter keys.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def pair(name: str, folder: Path) -> tuple[nn.Module, Any, nn.Module, torch.Tensor]:
    build, shape, options, _ = ROWS[name]
    base = seeded(build)().eval()
    theirs = in_peft(base, {"target_modules": ["conv"], **options})
    theirs.save_pretrained(folder)
    return base, theirs, lora_fx.load_adapter(base, folder), sample(*shape)


def by_key(model: nn.Module, theirs: bool) -> dict[str, torch.Tensor]:
    """Gradients by the keys of a checkpoint."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for other, parameter in zip(holder.parameters(), model.parameters(), strict=True):
            if parameter.grad is not None:
                other.copy_(parameter.grad)
    if theirs:
        return dict(peft.get_peft_model_state_dict(holder))
    return lora_fx.adapter_state_dict(holder)


@pytest.mark.parametrize("name", ROWS)
def test_peft_row(name: str, tmp_path: Path) -> None:
    base, theirs, ours, x = pair(name, tmp_path / "theirs")
    expected = theirs(x)
    assert relative_error(expected, base(x)) > 1e-2, "the adapter does nothing"
    assert_close(ours(x), expected, 1e-5)

    for model in (theirs, ours):
        model(x).square().mean().backward()
    gradients = by_key(theirs, True)
    assert gradients
    found = by_key(ours, False)
    assert found.keys() == gradients.keys()
    for key, value in gradients.items():
        assert_close(found[key], value, 1e-5)

    folder = lora_fx.save_adapter(ours, tmp_path / "ours")
    assert_close(read_by_peft(base, folder)(x), expected, 1e-5)
    assert_same_bits(lora_fx.load_adapter(base, folder)(x), ours(x))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    config = lora_fx.LoraConfig(**{"target_modules": ["conv"], **ROWS[name][2]}, dense_groups=True)
    if "use_bdlora" in ROWS[name][2]:
        config = lora_fx.LoraConfig(**ROWS[name][2])
    assert lora_fx.plan(base, config).trainable_parameters == trained


@pytest.mark.parametrize("name", ROWS)
def test_merge_of_a_peft_row(name: str, tmp_path: Path) -> None:
    _, theirs, ours, _x = pair(name, tmp_path)
    if ROWS[name][3]:
        merged, reference = lora_fx.merge(ours), theirs.merge_and_unload()
        assert merged.state_dict().keys() == reference.state_dict().keys()
        for key, value in reference.state_dict().items():
            assert_close(merged.state_dict()[key], value, 1e-5)
        assert_close(ours.lin1.weight + 0, merged.lin1.weight, 1e-5)
        return
    with pytest.raises(NotImplementedError, match="groups > 1"):
        theirs.merge_and_unload()
    into = copy.deepcopy(ours)
    target = seeded(ROWS[name][0])()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(MergeError, match=r"conv: adapter 'default': .*A reads channels"):
        lora_fx.merge(into, into=target)
    assert_close(target.state_dict(), before)
    with pytest.raises(
        CaptureError, match=r"conv\.weight is read by code that is no known product"
    ):
        ours.conv.weight.sum()


@pytest.mark.parametrize("name", ROWS)
def test_training_goes_pefts_way(name: str, tmp_path: Path) -> None:
    _, theirs, ours, x = pair(name, tmp_path)
    outputs = []
    for model in (theirs.train(), ours.train()):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        outputs.append(model.eval()(x))
    assert_close(outputs[1], outputs[0], 1e-5)


# --- grouped convolutions -------------------------------------------------------------------------


def test_blocks_of_groups_are_plain_lora(tmp_path: Path) -> None:
    """A dense A that is zero between groups is one that a weight can hold."""
    base = seeded(lambda: Convolution(2, 2, 4, 6))()
    theirs = in_peft(base, {"r": 4, "target_modules": ["conv"]})
    a = theirs.base_model.model.conv.lora_A.default.weight
    with torch.no_grad():
        a[:2, 2:], a[2:, :2] = 0, 0
    theirs.save_pretrained(tmp_path)
    ours, x = lora_fx.load_adapter(base, tmp_path), sample(2, 4, 5, 5)
    assert ours.conv.lora_A.default.shape == (4, 2, 3, 3)
    assert_close(ours(x), theirs(x), 1e-5)
    assert_close(lora_fx.merge(ours)(x), theirs(x), 1e-5)


def test_dense_groups_from_the_start() -> None:
    base, x = seeded(lambda: Convolution(2, 2, 4, 6))(), sample(2, 4, 5, 5)
    config = lora_fx.LoraConfig(r=4, target_modules=["conv", "lin0"], dense_groups=True, seed=0)
    model = lora_fx.rewrite(base, config)
    assert_same_bits(model(x), base(x))
    assert model.conv.lora_A.default.shape == (4, 4, 3, 3)
    assert model.lin0.lora_A.default.shape == (4, 6)
    # Kaiming-uniform over all input channels, as PEFT's convolution A.
    assert 0.8 < float(model.conv.lora_A.default.abs().max()) * 6 <= 1
    assert lora_fx.LoraConfig.from_dict(config.to_dict()) == config
    # B is zero, and A is dense.
    with pytest.raises(MergeError, match="dense_groups"):
        lora_fx.merge(model)
    with torch.no_grad():
        model.conv.lora_A.default.zero_()
    assert_close(lora_fx.merge(model)(x), base(x))


def test_a_merge_of_dense_groups_that_a_weight_can_hold() -> None:
    base, x = seeded(lambda: Convolution(2, 2, 4, 6))(), sample(2, 4, 5, 5)
    config = lora_fx.LoraConfig(
        r=4, target_modules=["conv"], dense_groups=True, init_lora_weights=False, seed=0
    )
    model = lora_fx.rewrite(base, config)
    with torch.no_grad():
        model.conv.lora_A.default[:2, 2:], model.conv.lora_A.default[2:, :2] = 0, 0
    assert relative_error(model(x), base(x)) > 1e-2
    assert_close(lora_fx.merge(model)(x), model(x), 1e-5)
    assert_close(model.conv.weight + 0, lora_fx.merge(model).conv.weight, 1e-5)


# --- BD-LoRA --------------------------------------------------------------------------------------


def bd_config(**options: Any) -> lora_fx.LoraConfig:
    options = {"r": 4, "target_modules": ["lin0"], **options}
    return lora_fx.LoraConfig(**options)


def test_blocks_start_as_pefts() -> None:
    base = seeded(Mlp)()
    config = bd_config(
        target_modules=LAYERS, use_bdlora={A: ["lin0"], B: ["lin1"], "nblocks": 2}, seed=0
    )
    model = lora_fx.rewrite(base, config)
    reference = BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=LAYERS, use_bdlora=reference)
    )
    for name in LAYERS:
        for letter in ("lora_A", "lora_B"):
            own = getattr(getattr(model, name), letter).default
            other = getattr(getattr(theirs.base_model.model, name), letter).default.weight
            assert own.shape == other.shape
            assert bool(own.any()) == bool(other.any())
    # nn.init.kaiming_uniform_ over the 6 inputs of a block.
    assert 0.8 < float(model.lin0.lora_A.default.abs().max()) <= 1
    assert_same_bits(model(sample(3, 12)), base(sample(3, 12)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_bdlora": {A: ["lin1"]}}, ConfigError, "lin0: BD-LoRA: neither list .*match_strict"),
        ({"use_bdlora": {A: ["lin"], B: ["0"]}}, ConfigError, "lin0: BD-LoRA: both lists"),
        ({"use_bdlora": {A: ["lin0"], "nblocks": 3}}, ConfigError, "3 blocks do not divide rank 4"),
        (
            {"use_bdlora": {B: ["lin0"], "nblocks": 8}, "r": 8},
            ConfigError,
            "8 blocks do not divide its 20 features",
        ),
        ({"use_bdlora": {A: ["lin0"], "nblocks": 0}}, ConfigError, "nblocks.*at least 1"),
        ({"use_bdlora": {"blocks": 2}}, ConfigError, "there is no option 'blocks'"),
        ({"use_bdlora": {A: "lin0"}}, ConfigError, "a list of names"),
        ({"use_bdlora": {A: ["lin0"]}, "use_dora": True}, ConfigError, "do not go together"),
        ({"use_bdlora": {A: ["lin0"]}, "lora_bias": True}, ConfigError, "do not go together"),
        (
            {"use_bdlora": {A: ["lin0"], "nblocks": 2}, "init_lora_weights": "pissa"},
            NoMatchError,
            "init_lora_weights='pissa' gives A and B the values of whole matrices",
        ),
    ],
)
def test_refusals_of_blocks(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lora_fx.rewrite(seeded(Mlp)(), bd_config(**options))


def test_the_contents_of_a_folder_with_blocks(tmp_path: Path) -> None:
    base, _, ours, _ = pair("BD-LoRA A and B", tmp_path)
    contents = {site.name: site for site in lora_fx.inspect_adapter(tmp_path).sites}
    assert set(contents) == set(LAYERS)
    for name, site in contents.items():
        delta = lora_fx.merge(ours).get_submodule(name).weight - base.get_submodule(name).weight
        assert abs(site.norm - float(delta.norm())) < 1e-4 * site.norm
    with pytest.raises(CheckpointError, match="use_bdlora: lin0 is more than a product"):
        lora_fx.save_adapter(ours, tmp_path / "vllm", format="vllm")


def test_other_layers_than_linear_ones_have_no_blocks() -> None:
    base = seeded(lambda: Convolution(2, 2, 4, 6))()
    options = {"use_bdlora": {A: ["conv", "lin0"], "nblocks": 2}}
    with pytest.raises(ConfigError, match="conv: BD-LoRA is for linear layers alone"):
        lora_fx.rewrite(base, bd_config(target_modules=["conv"], **options))
    plan = lora_fx.plan(base, bd_config(target_modules=".*", **options))
    assert [row.name for row in plan.sites] == ["lin0"]


@pytest.mark.parametrize(
    "options", [{"optimize": False}, {"memory": "balanced"}, {"memory": "least"}]
)
def test_blocks_run_in_every_form_of_graph(options: dict[str, Any], tmp_path: Path) -> None:
    base, _, ours, x = pair("BD-LoRA A and B", tmp_path)
    config = lora_fx.LoraConfig.from_pretrained(tmp_path)
    model = lora_fx.rewrite(base, config, **options)
    lora_fx.load_adapter_state_dict(model, lora_fx.adapter_state_dict(ours))
    assert_close(model(x), ours(x), 1e-5)
    gradients = []
    for each in (model, ours):
        each(x).square().mean().backward()
        gradients.append(by_key(each, False))
    assert_close(*gradients, 1e-5)


def test_blocks_hotswap_and_choose_samples(tmp_path: Path) -> None:
    _, theirs, ours, x = pair("BD-LoRA A and B", tmp_path / "one")
    other = in_peft(seeded(Mlp)().eval(), ROWS["BD-LoRA A and B"][2])
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(-0.5)
    other.save_pretrained(tmp_path / "two")
    lora_fx.load_adapter(ours, tmp_path / "two", adapter_name="two")
    with lora_fx.adapter_ids(ours, ["two", None, "default"]):
        rows = ours(x)
    expected = [other(x)[0], seeded(Mlp)()(x)[1], theirs(x)[2]]
    assert_close(rows, torch.stack(expected), 1e-5)
    lora_fx.set_adapter(ours, "default")
    lora_fx.hotswap_adapter(ours, tmp_path / "two", "default")
    assert_close(ours(x), other(x), 1e-5)
    with pytest.raises(ConfigError, match="no room for a lower rank"):
        lora_fx.prepare_hotswap(ours, 8, "default")
    with pytest.raises(ExportError, match="which no file takes as inputs"):
        lora_fx.save_onnx_adapter(ours, tmp_path / "inputs.onnx_adapter", adapter_name="default")


# --- aLoRA ----------------------------------------------------------------------------------------


PHRASE = (5, 7)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=39,
    )
    return seeded(lambda: LlamaForCausalLM(config))().eval()


def prompts() -> torch.Tensor:
    """Three prompts: with two occurrences of the phrase, with one at the start, with none."""
    ids = torch.randint(8, 38, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 2:4] = ids[0, 6:8] = ids[1, :2] = torch.tensor(PHRASE)
    return ids


ALORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "alora_invocation_tokens": list(PHRASE),
}
GENERATE = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}


def activated(folder: Path) -> tuple[Any, Any, Any, torch.Tensor]:
    base = llama()
    theirs = in_peft(base, ALORA)
    theirs.save_pretrained(folder)
    return base, theirs, lora_fx.load_adapter(base, folder), prompts()


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(input_ids=ids, **options).logits


def test_activated_lora_is_pefts(tmp_path: Path) -> None:
    base, theirs, ours, ids = activated(tmp_path / "theirs")
    expected = logits(theirs, ids)
    change = (expected - logits(base, ids)).abs().amax((1, 2))
    assert (change > 1e-2).tolist() == [True, True, False]
    assert_close(logits(ours, ids), expected, 1e-5)
    assert_same_bits(ours(ids).logits, logits(ours, ids))
    assert_close(logits(ours, ids[:1]), expected[:1], 1e-5)
    for model in (theirs, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    found = by_key(ours, False)
    for key, value in by_key(theirs, True).items():
        assert_close(found[key], value, 1e-5)
    folder = lora_fx.save_adapter(ours, tmp_path / "ours")
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["alora_invocation_tokens"] == list(PHRASE)
    assert_close(logits(read_by_peft(base, folder), ids), expected, 1e-5)
    assert_same_bits(
        logits(pickle.loads(pickle.dumps(copy.deepcopy(ours))), ids), logits(ours, ids)
    )


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 2, 3], [0, 4, 5, 6]],
        [[1, 2, 1, 2], [0, 4, 1, 2]],
        [[1, 2, 3, 4], [0, 4, 1, 4]],
        [[1, 2, 1, 1], [2, 1, 2, 2]],
    ],
)
def test_the_phrase_is_found_where_peft_finds_it(rows: list[list[int]]) -> None:
    ids = torch.tensor(rows)
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[1, 2])
    offsets = calculate_alora_offsets({"default": config}, "default", ids)
    base = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    options = {"r": 2, "target_modules": ["1"], "init_lora_weights": False, "seed": 0}
    model = lora_fx.rewrite(base, lora_fx.LoraConfig(**options, alora_invocation_tokens=[1, 2]))
    changed = (model(ids) != base(ids)).any(-1)
    expected = [[index >= 4 - (offset or 0) for index in range(4)] for offset in offsets]
    assert changed.tolist() == expected


def test_generation_is_pefts(tmp_path: Path) -> None:
    base, theirs, ours, ids = activated(tmp_path)
    expected = theirs.generate(input_ids=ids, **GENERATE)
    assert not torch.equal(base.generate(input_ids=ids, **GENERATE), expected)
    assert torch.equal(ours.generate(input_ids=ids, **GENERATE), expected)
    assert torch.equal(
        ours.generate(input_ids=ids, cache_implementation="static", **GENERATE), expected
    )
    # PEFT refuses beams. With a cache and without, they are the same.
    beams = [
        ours.generate(input_ids=ids, num_beams=3, use_cache=use, **GENERATE)
        for use in (True, False)
    ]
    assert torch.equal(*beams)


@torch.no_grad()
def test_a_cache_knows_the_phrase(tmp_path: Path) -> None:
    _, theirs, ours, ids = activated(tmp_path)
    ids[0, 2:4] = 9  # no position changes its state later
    whole = logits(theirs, ids)
    for cut in (2, 3, 6, 8):
        first = ours(ids[:, :cut], use_cache=True)
        cache = copy.deepcopy(first.past_key_values)
        assert_close(ours(ids[:, cut:], cache=cache).logits, whole[:, cut:], 1e-4)
    cache = ours(ids, use_cache=True).past_key_values
    cache.crop(-4)
    assert_close(ours(ids[:, 5:], cache=cache).logits, whole[:, 5:], 1e-4)
    with pytest.raises(ConfigError, match="the cache of the call has seen 3 sample"):
        ours(ids[:2, 5:], cache=cache)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activated_lora_with_checkpoints_and_compiled(reentrant: bool, tmp_path: Path) -> None:
    _, theirs, ours, ids = activated(tmp_path)
    theirs(input_ids=ids, labels=ids).loss.backward()
    expected = by_key(theirs, True)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    ours.train()
    for _ in range(2):  # the first call is watched
        ours.zero_grad()
        first, second = (ours(input_ids=x, labels=x).loss for x in (ids, ids.flip(0)))
        first.backward()
        found = by_key(ours, False)
        for key, value in expected.items():
            assert_close(found[key], value, 1e-5)
        second.backward()


def test_activated_lora_compiles(tmp_path: Path) -> None:
    _, theirs, ours, ids = activated(tmp_path)
    model = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        output = model(input_ids=ids)
        assert_close(output.logits, logits(theirs, ids), 1e-5)
        cached = ours(input_ids=ids)
        for _ in range(3):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, cache=output.past_key_values)
            cached = ours(input_ids=token, cache=cached.past_key_values)
            assert_close(output.logits, cached.logits, 1e-5)
    # Greedy generation without the ban of the last token of a text.
    expected = theirs.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(output.logits[1:, -1].argmax(-1), expected[1:, -1])


@pytest.mark.parametrize(
    "options", [{"optimize": False}, {"memory": "balanced"}, {"memory": "least"}]
)
def test_activated_lora_in_every_form_of_graph(options: dict[str, Any], tmp_path: Path) -> None:
    base, theirs, ours, ids = activated(tmp_path)
    model = lora_fx.rewrite(base, lora_fx.LoraConfig.from_pretrained(tmp_path), **options)
    lora_fx.load_adapter_state_dict(model, lora_fx.adapter_state_dict(ours))
    for each in (model.train(), ours.train()):
        each(input_ids=ids, labels=ids).loss.backward()
    assert_close(by_key(model, False), by_key(ours, False), 1e-5)
    assert_close(logits(model.eval(), ids), logits(theirs, ids), 1e-5)


def test_samples_choose_between_kinds(tmp_path: Path) -> None:
    base, theirs, ours, ids = activated(tmp_path / "one")
    plain = in_peft(base, {**ALORA, "alora_invocation_tokens": None, "target_modules": ["q_proj"]})
    plain.save_pretrained(tmp_path / "two")
    lora_fx.load_adapter(ours, tmp_path / "two", adapter_name="plain")
    lora_fx.set_adapter(ours, ["default", "plain"], per_sample=True)
    for _ in range(2):
        rows = logits(ours, ids, adapter_ids=["default", "plain", None])
        expected = [logits(model, ids)[i] for i, model in enumerate((theirs, plain, base))]
        assert_close(rows, torch.stack(expected), 1e-5)
    lora_fx.set_adapter(ours, "plain")
    embedded = base.model.embed_tokens(ids)
    assert_close(ours(inputs_embeds=embedded).logits, logits(plain, ids), 1e-5)


def test_refusals_of_activated_lora(tmp_path: Path) -> None:
    base, theirs, ours, ids = activated(tmp_path)
    embedded = base.model.embed_tokens(ids).detach()
    with pytest.raises(
        ConfigError, match=r"q_proj|weight: .*the call has no tokens: call the model"
    ):
        ours(inputs_embeds=embedded)
    assert_close(
        ours(inputs_embeds=embedded, alora_offsets=[3, 9, None]).logits, logits(theirs, ids), 1e-5
    )
    assert_close(logits(ours, ids), logits(theirs, ids), 1e-5)
    layer = ours.model.layers[0].self_attn.q_proj
    with pytest.raises(ConfigError, match="no call of the model is running"):
        layer(torch.randn(2, 32))
    with pytest.raises(
        MergeError, match=r"q_proj: adapter 'default': .*from the invocation tokens"
    ):
        lora_fx.merge(ours)
    with pytest.raises(CaptureError, match="no known product, and no weight has the effect"):
        layer.weight.sum()
    with pytest.raises(ExportError, match="which no file takes as inputs"):
        lora_fx.save_onnx_adapter(ours, tmp_path / "inputs.onnx_adapter")
    with lora_fx.disable_adapter(ours):
        assert_same_bits(logits(ours, ids), logits(base, ids))
        assert_same_bits(ours(inputs_embeds=embedded).logits, logits(base, ids))


def test_a_phrase_belongs_to_the_adapter(tmp_path: Path) -> None:
    base, _, ours, ids = activated(tmp_path / "one")
    expected = logits(ours, ids)
    other = in_peft(base, {**ALORA, "alora_invocation_tokens": [9]})
    other.save_pretrained(tmp_path / "two")
    plain = in_peft(base, {**ALORA, "alora_invocation_tokens": None})
    plain.save_pretrained(tmp_path / "three")
    for name in ("two", "three"):
        with pytest.raises(
            CheckpointError,
            match=r"kind: .* in the folder and the kind alora tokens=\(5, 7\) in the m",
        ):
            lora_fx.load_adapter(ours, tmp_path / name)
        with pytest.raises(
            CheckpointError, match=r"the variants differ \(alora_invocation_tokens\)"
        ):
            lora_fx.hotswap_adapter(ours, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"kind alora tokens=\(5, 7\) in the folder and the kind lora in the"
    ):
        lora_fx.load_adapter(lora_fx.load_adapter(base, tmp_path / "three"), tmp_path / "one")
    assert_same_bits(logits(ours, ids), expected)
    lora_fx.load_adapter(ours, tmp_path / "two", adapter_name="other")
    lora_fx.set_adapter(ours, "other")
    assert_close(logits(ours, ids), logits(other, ids), 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": "5 7"}, "alora_invocation_tokens: found '5 7'"),
        ({"alora_invocation_tokens": [-1]}, "a token index is a whole number"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "do not go together"),
        (
            {"alora_invocation_tokens": [1], "target_modules": ["embed_tokens"]},
            "embed_tokens: aLoRA is for linear layers over tokens alone",
        ),
    ],
)
def test_configurations_of_activated_lora(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_fx.plan(llama(), lora_fx.LoraConfig(**options))


# --- Arrow ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """A base, and folders of five adapters of the same sites."""
    base, folders = llama(), []
    for index in range(5):
        config = peft.LoraConfig(
            r=4, lora_alpha=4 + index, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp(f"expert{index}")
        model.save_pretrained(folder)
        folders.append(folder)
    return base, folders


def routed_models(
    experts: tuple[Any, list[Path]], **options: Any
) -> tuple[Any, Any, lora_fx.LoraConfig]:
    """PEFT's router, and ours: adapters that are loaded, and a router over them."""
    base, folders = experts
    arrow = ArrowConfig(router_temperature=0.7, rng_seed=5, **options)
    general = folders[3:] if arrow.use_gks else []
    tasks = list(map(str, folders[:3]))
    theirs = create_arrow_model(
        copy.deepcopy(base), tasks, arrow, list(map(str, general)) if general else None
    ).eval()
    theirs(input_ids=prompts())  # PEFT computes the prototypes in the first call
    ours = base
    for prefix, group in (("task", folders[:3]), ("gks", general)):
        for index, folder in enumerate(group):
            ours = lora_fx.load_adapter(ours, folder, adapter_name=f"{prefix}_{index}")
    config = lora_fx.LoraConfig(target_modules=["q_proj", "v_proj"], arrow_config=arrow)
    lora_fx.add_adapter(ours, config, "arrow_router")
    lora_fx.set_adapter(ours, "arrow_router")
    return theirs, ours, config


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_k": 2}, {"top_k": 3}, {"top_k": 2, "use_gks": True}], ids=str
)
def test_routing_is_pefts(
    experts: tuple[Any, list[Path]], options: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours, _ = routed_models(experts, **options)
    base, ids = experts[0], prompts()
    expected = logits(theirs, ids)
    assert relative_error(expected, logits(base, ids)) > 1e-3
    assert_close(logits(ours, ids), expected, 1e-5)
    inputs = [base.model.embed_tokens(ids).detach().requires_grad_() for _ in range(2)]
    for model, x in zip((theirs, ours), inputs, strict=True):
        model(inputs_embeds=x).logits.square().mean().backward()
    assert_close(inputs[1].grad, inputs[0].grad, 1e-4)
    assert torch.equal(
        ours.generate(input_ids=ids, **GENERATE), theirs.generate(input_ids=ids, **GENERATE)
    )
    with torch.inference_mode():
        assert_close(logits(ours, ids), expected, 1e-5)
    # The adapters themselves are unchanged, and PEFT reads them.
    lora_fx.save_adapter(ours, tmp_path, "task_1")
    plain = read_by_peft(base, experts[1][1])
    assert_close(logits(read_by_peft(base, tmp_path / "task_1"), ids), logits(plain, ids), 1e-6)


@pytest.mark.parametrize("use_gks", [False, True])
def test_create_arrow_model(experts: tuple[Any, list[Path]], use_gks: bool) -> None:
    base, folders = experts
    groups = [list(map(str, group)) for group in (folders[:3], folders[3:])]
    models = []
    for create in (create_arrow_model, lora_fx.peft.create_arrow_model):
        arrow = ArrowConfig(top_k=2, rng_seed=1, use_gks=use_gks)
        models.append(create(copy.deepcopy(base), groups[0], arrow, groups[1]).eval())
    assert_close(logits(models[1], prompts()), logits(models[0], prompts()), 1e-5)
    assert isinstance(models[1], peft.PeftModel)
    with pytest.raises(ConfigError, match="at least one adapter folder"):
        lora_fx.peft.create_arrow_model(base, [], ArrowConfig())


def test_prototypes_follow_the_adapters(experts: tuple[Any, list[Path]]) -> None:
    theirs, ours, _ = routed_models(experts, top_k=2)
    ids = prompts()
    before = logits(ours, ids)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_A.task_0" in name:
                parameter.copy_(torch.randn_like(parameter))
        for name, parameter in theirs.named_parameters():
            if "lora_A.task_0" in name:
                parameter.copy_(
                    ours.get_parameter(name.removeprefix(PREFIX).removesuffix(".weight"))
                )
    for module in theirs.modules():
        if hasattr(module, "_protos_ready"):
            module._protos_ready = False
    assert relative_error(logits(ours, ids), before) > 1e-4
    assert_close(logits(ours, ids), logits(theirs, ids), 1e-5)


def test_a_router_compiles_and_copies(experts: tuple[Any, list[Path]]) -> None:
    theirs, ours, _ = routed_models(experts, top_k=2)
    ids = prompts()
    model = torch.compile(ours, fullgraph=True, backend="eager")
    assert_close(logits(model, ids, use_cache=False), logits(theirs, ids), 1e-5)
    clone = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert_close(logits(clone, ids), logits(theirs, ids), 1e-5)


def test_samples_choose_a_router(experts: tuple[Any, list[Path]]) -> None:
    theirs, ours, _ = routed_models(experts, top_k=2)
    ids = prompts()
    plain = read_by_peft(experts[0], experts[1][0])
    lora_fx.set_adapter(ours, ["arrow_router", "task_0"], per_sample=True)
    rows = logits(ours, ids, adapter_ids=["arrow_router", "task_0", None])
    expected = [logits(model, ids)[i] for i, model in enumerate((theirs, plain, experts[0]))]
    assert_close(rows, torch.stack(expected), 1e-5)


def test_the_folder_of_a_router(experts: tuple[Any, list[Path]], tmp_path: Path) -> None:
    theirs, ours, _ = routed_models(experts, top_k=2)
    theirs.save_pretrained(tmp_path / "theirs")
    lora_fx.save_adapter(ours, tmp_path / "ours", "arrow_router")
    expected = logits(ours, prompts())
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        model = experts[0]
        with pytest.raises(CheckpointError, match=r"reads other adapters .*load those first"):
            lora_fx.load_adapter(model, folder / "arrow_router", adapter_name="arrow_router")
        for index, expert in enumerate(experts[1][:3]):
            model = lora_fx.load_adapter(model, expert, adapter_name=f"task_{index}")
        lora_fx.load_adapter(model, folder, adapter_name="arrow_router")
        lora_fx.set_adapter(model, "arrow_router")
        assert_close(logits(model, prompts()), expected, 1e-6)
    with pytest.raises(CheckpointError, match="the model has an adapter 'arrow_router'"):
        lora_fx.load_adapter(model, tmp_path / "ours", adapter_name="arrow_router")


def test_refusals_of_a_router(experts: tuple[Any, list[Path]]) -> None:
    theirs, ours, config = routed_models(experts, top_k=2)
    with pytest.raises(MergeError, match=r"q_proj: adapter 'arrow_router': .*a router chooses"):
        lora_fx.merge(ours)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        theirs.merge_and_unload()
    with pytest.raises(ConfigError, match="'arrow_router' reads 'task_1': delete that one first"):
        lora_fx.delete_adapter(ours, "task_1")
    with pytest.raises(
        ConfigError, match=r"reads adapter 'task_0', and the model has none: load it"
    ):
        lora_fx.rewrite(experts[0], config)
    with pytest.raises(CaptureError, match="no known product, and no weight has the effect"):
        ours.model.layers[0].self_attn.q_proj.weight.sum()

    def add(**options: Any) -> None:
        options = {"target_modules": ["q_proj"], **options}
        lora_fx.add_adapter(ours, lora_fx.LoraConfig(**options), "another")

    with pytest.raises(ConfigError, match=r"task_adapter_names.*found none"):
        add(arrow_config={"top_k": 1})
    with pytest.raises(ConfigError, match=r"gks_adapter_names.*found none"):
        add(arrow_config={"top_k": 1, "use_gks": True, "task_adapter_names": ["task_0"]})
    with pytest.raises(ConfigError, match=r"top_k'\]: found 3; there are 1 adapters"):
        add(arrow_config={"task_adapter_names": ["task_0"]})
    with pytest.raises(ConfigError, match="has no factors there"):
        add(
            target_modules=["k_proj"],
            arrow_config={"top_k": 1, "task_adapter_names": ["task_0"]},
        )
    lora_fx.set_adapter(ours, "task_0")
    lora_fx.delete_adapter(ours, "arrow_router")
    lora_fx.delete_adapter(ours, "task_1")
