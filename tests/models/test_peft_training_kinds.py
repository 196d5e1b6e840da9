"""KaSA, VeLoRA and MonteCLoRA with all options, and MiCA; ``test_peft_table.py`` has PEFT's own rows.

For each row: the start, outputs, gradients, several steps of training, penalties, merged weights, and folders
both ways. PEFT draws the noise of MonteCLoRA ahead of time, so it gets the numbers that lora-fx draws.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import ConfigError, LoraConfig
from tests.lora_fx.test_checkpoint import read_by_peft
from tests.models.test_peft_table import (
    assert_alike,
    by_key,
    draw_alike,
    gradients,
    penalty_of,
)
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import sample, seeded

pytestmark = pytest.mark.filterwarnings("ignore")


class MLP(nn.Module):
    """PEFT's, without its dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, x):
        return self.sm(self.lin1(self.relu(self.lin0(x))))


KASA = {"target_modules": ["lin0"], "kasa_config": peft.KasaConfig(), "r": 4}
AVERAGE = peft.VeloraConfig(num_groups=2, init_type="batch_average")
ONCE = peft.VeloraConfig(num_groups=2, init_type="batch_average_once")
UNEVEN = peft.VeloraConfig(num_groups=3, scale=1.5)
# Noise and penalties that no rounding hides.
LOUD = peft.MontecloraConfig(
    num_samples=3, sample_scaler=0.3, kl_loss_weight=0.1, use_entropy=True, buffer_size=1
)
ROWS: dict[str, dict[str, Any]] = {
    "KaSA": KASA,
    "VeLoRA, once": {"target_modules": ["lin0"], "velora_config": ONCE},
    "KaSA, options": {
        "target_modules": ["lin0", "lin1"],
        "kasa_config": peft.KasaConfig(beta=0.3, gamma=0.2),
        "r": 1,
        "rank_pattern": {"lin0": 7},
        "use_rslora": True,
    },
    "KaSA, bias": {**KASA, "lora_bias": True, "lora_alpha": 32},
    "VeLoRA, bias": {"target_modules": ["lin0"], "velora_config": ONCE, "lora_bias": True},
    "MonteCLoRA, bias": {"target_modules": ["lin1"], "monteclora_config": LOUD, "lora_bias": True},
    "VeLoRA, groups that do not divide": {
        "target_modules": ["lin0", "lin1"],
        "velora_config": UNEVEN,
        "lora_alpha": 5,
    },
    "MonteCLoRA, options": {
        "target_modules": ["lin0", "lin1"],
        "monteclora_config": LOUD,
        "r": 3,
    },
}
rows = pytest.mark.parametrize("row", ROWS)


def started(row: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """A base, and PEFT's model over it with factors that have an effect."""
    base = seeded(MLP)().to(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**ROWS[row]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return base, theirs


def pair(row: str, folder: Path) -> tuple[nn.Module, Any, nn.Module]:
    """A base, PEFT's model, and ours from its folder."""
    base, theirs = started(row)
    theirs.save_pretrained(folder)
    return base, theirs, lora_fx.load_adapter(base, folder)


def numbered(number: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Another sample for each number."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=dtype)


def loss_of(output: torch.Tensor, number: int) -> torch.Tensor:
    return (output * numbered(100 + number, *output.shape)).sum()


# PEFT takes roots of variances in fp32, and its SVD.
TOLERANCE = 1e-6


@rows
def test_what_peft_has_trained(row: str, tmp_path: Path) -> None:
    base, theirs, ours = pair(row, tmp_path)
    x = sample(6, 10, dtype=torch.float64)
    expected = theirs.eval()(x)
    assert float((expected - base(x)).detach().abs().max()) > 1e-3
    assert_close(ours.eval()(x), expected, TOLERANCE)
    merged, reference = lora_fx.merge(ours), theirs.merge_and_unload()
    assert type(merged) is MLP
    assert merged.state_dict().keys() == reference.state_dict().keys()
    for name, value in merged.state_dict().items():
        assert_close(value, reference.state_dict()[name], TOLERANCE)


@rows
def test_training_follows_peft(row: str, tmp_path: Path) -> None:
    """Gradients of each step with the penalty, and everything that a folder has after the steps."""
    _, theirs, ours = pair(row, tmp_path)
    theirs.train()
    ours.train()
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for model in (theirs, ours)
    ]
    for number in range(3):
        x = numbered(number, 2, 5, 10) + number / 2
        draw_alike(theirs, number)
        outputs = theirs(x), ours(x)
        assert_close(outputs[1], outputs[0], TOLERANCE)
        penalties = penalty_of(theirs), lora_fx.adapter_penalty(ours)
        assert_close(penalties[1], torch.as_tensor(penalties[0]).double(), TOLERANCE)
        for optimizer, output, penalty in zip(optimizers, outputs, penalties, strict=True):
            optimizer.zero_grad()
            (loss_of(output, number) + penalty).backward()
        assert_alike(gradients(ours), gradients(theirs))
        for optimizer in optimizers:
            optimizer.step()
    assert_alike(by_key(ours), by_key(theirs))


@rows
def test_what_is_saved_loads_in_peft(row: str, tmp_path: Path) -> None:
    base, _, ours = pair(row, tmp_path / "theirs")
    x = sample(6, 10, dtype=torch.float64)
    ours.train()(x).sum().backward()
    lora_fx.save_adapter(ours, tmp_path / "ours")
    theirs = read_by_peft(base, tmp_path / "ours")
    assert_close(theirs(x), ours.eval()(x), TOLERANCE)
    assert_alike(by_key(theirs), by_key(ours))
    keys = [
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors").keys()
        for name in ("theirs", "ours")
    ]
    assert keys[0] == keys[1]
    field = next(name for name in ROWS[row] if name.endswith("_config"))
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written[field] == vars(ROWS[row][field])
    again = lora_fx.load_adapter(base, tmp_path / "ours").eval()
    assert_close(again(x), ours(x))


@rows
def test_the_start_has_no_effect_of_the_branch(row: str) -> None:
    base = seeded(MLP)()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**ROWS[row]))
    ours = lora_fx.rewrite(base, LoraConfig(**ROWS[row]), (sample(6, 10),))
    shapes = [{key: value.shape for key, value in by_key(m).items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    x = sample(6, 10)
    assert_close(ours.eval()(x), theirs.eval()(x))
    # The weights of the base, which KaSA changes, to the last bit.
    for name in ("lin0", "lin1"):
        own, module = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert_same_bits(own._parameters["weight"], getattr(module, "base_layer", module).weight)
    assert_same_bits(base.lin0.weight, seeded(MLP)().lin0.weight)


@rows
def test_a_checkpoint_goes_on(row: str, tmp_path: Path) -> None:
    """A state dict has the state as well, so that a resumed run computes the same steps."""
    base, _, ours = pair(row, tmp_path)
    x = sample(6, 10, dtype=torch.float64)
    ours.train()(x).sum().backward()
    again = lora_fx.rewrite(base, ours._lora_fx.adapters["default"].config).train()
    again.load_state_dict(ours.state_dict())
    results = []
    for model in (ours, again):
        model.zero_grad()
        torch.manual_seed(4)
        (model(2 * x).square().sum() + lora_fx.adapter_penalty(model)).backward()
        results.append([p.grad for p in lora_fx.trainable_parameters(model)])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


# --- what each of them is for ---------------------------------------------------------------------


def saved_elements(model: nn.Module, x: torch.Tensor) -> int:
    """Elements that a call saves for its backward, without parameters and buffers."""
    own = {
        t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())
    }
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own:
            kept[storage] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("row", "fused"), [(row, "VeLoRA" not in row) for row in ROWS if "bias" not in row]
)
def test_branches_are_fused_if_they_save_what_lora_saves(row: str, fused: bool) -> None:
    model = lora_fx.rewrite(seeded(MLP)(), LoraConfig(**ROWS[row]))
    targets = [getattr(node.target, "__name__", "") for node in lora_fx.graphs(model)["lin0"].nodes]
    assert ("lora_linear" in targets) == fused


def test_velora_saves_the_compressed_input() -> None:
    base = nn.Sequential(nn.Linear(64, 64))
    x = sample(1000, 64)
    plain, compressed = (
        lora_fx.rewrite(base, LoraConfig(r=2, target_modules=["0"], **options)).train()
        for options in ({}, {"velora_config": {"num_groups": 4}})
    )
    # The input itself; or a number for each group. Both save the rank-r activation, and the latter its group.
    assert saved_elements(plain, x) >= 64 * 1000
    assert saved_elements(compressed, x) <= (4 + 2) * 1000 + 1000
    assert saved_elements(compressed.eval(), x) >= 64 * 1000


def test_dropout_comes_before_the_projection(tmp_path: Path) -> None:
    """With PyTorch's dropout and one seed, the gradients are PEFT's."""
    base = seeded(MLP)().double()
    options = {"target_modules": ["lin0"], "velora_config": AVERAGE, "lora_dropout": 0.5}
    config = peft.LoraConfig(**options, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).train()
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.rewrite(base, LoraConfig(**options), optimize=False).train()
    lora_fx.load_adapter(ours, tmp_path)
    x = sample(6, 10, dtype=torch.float64)
    for model in (theirs, ours):
        torch.manual_seed(3)
        model(x).square().sum().backward()
    assert_alike(gradients(ours), gradients(theirs))
    assert_alike(by_key(ours), by_key(theirs))


def test_a_call_does_not_change_what_an_earlier_one_saved() -> None:
    """Two forwards, then both backwards, as with gradient accumulation over a list of losses."""
    base = nn.Sequential(nn.Linear(6, 5))
    config = LoraConfig(
        r=2, target_modules=["0"], velora_config={"num_groups": 2}, init_lora_weights=False, seed=0
    )
    first, second = sample(7, 6), numbered(2, 7, 6, dtype=torch.float32) + 1
    results = []
    for together in (True, False):
        model = lora_fx.rewrite(base, config).train()
        if together:
            losses = [model(x).square().sum() for x in (first, second)]
            for loss in losses:
                loss.backward()
        else:
            for x in (first, second):
                model(x).square().sum().backward()
        results.append([p.grad for p in lora_fx.trainable_parameters(model)])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_monteclora_is_lora_in_evaluation() -> None:
    base = seeded(MLP)()
    config = LoraConfig(target_modules=["lin0"], monteclora_config=LOUD, init_lora_weights=False)
    model = lora_fx.rewrite(base, config)
    x = sample(6, 10)
    assert not torch.equal(model.train()(x), model(x))
    assert float(lora_fx.adapter_penalty(model)) > 0
    assert torch.equal(model.eval()(x), model(x))
    assert float(lora_fx.adapter_penalty(model)) == 0
    assert_close(lora_fx.merge(model)(x), model(x))


def test_the_base_of_kasa_belongs_to_its_adapter(tmp_path: Path) -> None:
    """Other adapters, and none, have the weights of the user's model. PEFT refuses other adapters."""
    base = seeded(MLP)()
    kasa = LoraConfig(target_modules=["lin0"], r=4, kasa_config={}, init_lora_weights=False)
    model = lora_fx.rewrite(base, kasa).eval()
    lora_fx.add_adapter(
        model, LoraConfig(target_modules=["lin0"], init_lora_weights=False), "plain"
    )
    x = sample(6, 10)
    own = model(x)
    assert torch.linalg.matrix_rank(model.lin0._parameters["weight"]) == 6
    with lora_fx.disable_adapter(model):
        assert_close(model(x), base(x))
    lora_fx.set_adapter(model, "plain")
    alone = lora_fx.merge(model)
    lora_fx.set_adapter(model, "default")
    assert_same_bits(model(x), own)
    assert_close(lora_fx.merge(model)(x), own)
    change = alone.lin0.weight - base.lin0.weight
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 8
    lora_fx.save_adapter(model, tmp_path, "default")
    assert_close(read_by_peft(base, tmp_path)(x), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kasa_truncates_as_peft_does(dtype: torch.dtype, tmp_path: Path) -> None:
    base, theirs = started("KaSA", dtype)
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(base, tmp_path)
    truncated = theirs.base_model.model.lin0.base_layer.weight
    assert_same_bits(ours.lin0._parameters["weight"], truncated)
    x = sample(6, 10, dtype=dtype)
    assert_close(ours.eval()(x), theirs.eval()(x))


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return seeded(lambda: LlamaForCausalLM(config))()


@pytest.mark.parametrize("field", ["kasa_config", "velora_config", "monteclora_config"])
@pytest.mark.parametrize("memory", ["balanced", "least"])
def test_a_step_that_saves_memory_has_the_same_gradients(field: str, memory: str) -> None:
    """A call has one state, whatever runs again or in tiles: 600 tokens are more than a tile."""
    base, ids = tiny_llama(), torch.arange(1200).view(2, 600) % 47
    options = {"num_groups": 3, "init_type": "batch_average_once"} if "velora" in field else {}
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights=False,
        seed=1,
        **{field: options or {"sample_scaler": 0.1} if field == "monteclora_config" else options},
    )
    results, states = [], []
    for how in ("fast", memory):
        model = lora_fx.rewrite(base, config, {"input_ids": ids[:, :8]}, memory=how).train()
        torch.manual_seed(5)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append([p.grad for p in lora_fx.trainable_parameters(model)])
        states.append([value for name, value in model.named_buffers() if "lora_" in name])
    assert_close(results[1], results[0], 1e-4)
    for one, other in zip(*states, strict=True):
        assert_close(one, other)
    plan = lora_fx.plan(base, config, {"input_ids": ids[:, :8]}, memory="least")
    assert ("model.layers.0.mlp" in plan.savings.tiles) == (field == "kasa_config")
    assert ("depends on all tokens of a call" in str(plan)) == (field != "kasa_config")


# --- refusals -------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize(
    ("field", "layer", "words"),
    [
        ("kasa_config", lambda: nn.Conv1d(8, 8, 3), "KaSA is for linear layers"),
        ("velora_config", lambda: nn.Conv2d(8, 8, 3), "VeLoRA is for linear layers"),
        ("monteclora_config", lambda: nn.Embedding(9, 8), "MonteCLoRA is for linear layers"),
        ("kasa_config", lambda: Conv1D(8, 8), "KaSA is for weights stored as"),
        ("kasa_config", lambda: nn.Linear(8, 2), "the 2 smallest singular values"),
    ],
)
def test_layers_that_it_is_not_for(field: str, layer: Any, words: str) -> None:
    model = nn.Sequential(layer())
    config = LoraConfig(r=2, target_modules=["0"], **{field: {}})
    with pytest.raises(ConfigError, match=words):
        lora_fx.rewrite(model, config)


def test_a_shared_weight_is_not_truncated() -> None:
    config = LoraConfig(r=2, target_modules=["head"], kasa_config={})
    with pytest.raises(ConfigError, match=r"which table\.weight shares"):
        lora_fx.rewrite(Tied(), config)


def test_a_quantized_weight_is_not_truncated() -> None:
    model = lora_fx.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), "int8")
    with pytest.raises(ConfigError, match="kasa_config changes the base weight"):
        lora_fx.rewrite(model, LoraConfig(r=2, target_modules=["0"], kasa_config={}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kasa_config": {}, "use_dora": True}, "kasa_config: found .* an adapter has one variant"),
        ({"kasa_config": {}, "velora_config": {}}, "velora_config: found .* one variant"),
        ({"kasa_config": {}, "init_lora_weights": "pissa"}, "kasa_config changes the base"),
        ({"kasa_config": {"beta": -1}}, r"kasa_config\['beta'\]: found -1"),
        ({"velora_config": {"num_groups": 0}}, r"velora_config\['num_groups'\]"),
        ({"velora_config": {"init_type": "pca"}}, r"velora_config\['init_type'\]"),
        ({"monteclora_config": {"dirichlet_prior": 0}}, r"monteclora_config\['dirichlet_prior'\]"),
        ({"monteclora_config": {"samples": 3}}, "there is no option 'samples'"),
    ],
)
def test_configurations_that_mean_nothing(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**fields)


def test_what_needs_plain_factors_says_so(tmp_path: Path) -> None:
    base = seeded(MLP)()
    model = lora_fx.rewrite(base, LoraConfig(target_modules=["lin0"], r=4, kasa_config={}))
    with pytest.raises(lora_fx.CheckpointError, match="kasa_config: lin0 has a diagonal"):
        lora_fx.save_adapter(model, tmp_path / "vllm", format="vllm")
    lora_fx.save_adapter(model, tmp_path / "peft")
    with pytest.raises(lora_fx.CheckpointError, match=r"its base is another \(kasa_config\)"):
        lora_fx.hotswap_adapter(model, tmp_path / "peft")
    with pytest.raises(ConfigError, match="have the size of its rank"):
        lora_fx.prepare_hotswap(model, 8)
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        lora_fx.adapter_penalty(model, "other")


# --- several processes ----------------------------------------------------------------------------


RANKS = 2
SHARDED = ("KaSA, options", "VeLoRA, groups that do not divide", "MonteCLoRA, options")


def step_with_penalty(row: str, sharded: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The penalty and the gradients after a step, the same in all processes."""
    config = LoraConfig(**ROWS[row], init_lora_weights=False, seed=1)
    model = lora_fx.rewrite(seeded(MLP)(), config).train()
    if sharded:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
        fully_shard(model.lin0, mesh=mesh)
        fully_shard(model, mesh=mesh)
    torch.manual_seed(2)
    output = model(sample(6, 10))
    penalty = lora_fx.adapter_penalty(model)
    (output.square().sum() + penalty).backward()
    grads = [p.grad for p in lora_fx.trainable_parameters(model)]
    return penalty.detach(), [getattr(g, "full_tensor", lambda g=g: g)() for g in grads]


def run_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    torch.save({row: step_with_penalty(row, True) for row in SHARDED}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_sharded_model_has_the_penalty_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=RANKS)
    for row in SHARDED:
        exact = step_with_penalty(row, False)
        for rank in range(RANKS):
            assert_close(torch.load(tmp_path / f"{rank}.pt")[row], exact)


@pytest.mark.parametrize("row", ["VeLoRA, bias", "MonteCLoRA, bias", "MonteCLoRA, options"])
@pytest.mark.parametrize("optimize", [True, False])
def test_samples_choose_an_adapter(row: str, optimize: bool) -> None:
    """Rows are those of a model with the one adapter, and get the gradients of these rows."""
    base, x = seeded(MLP)().double(), sample(3, 10, dtype=torch.float64)
    config = LoraConfig(**ROWS[row], init_lora_weights=row.endswith("bias"), seed=1)
    model = lora_fx.rewrite(base, config, optimize=optimize)
    lora_fx.add_adapter(model, LoraConfig(**ROWS[row], seed=2), "other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * numbered(4, *parameter.shape))
    expected = [base(x)]
    for name in ("default", "other"):
        lora_fx.set_adapter(model, name)
        expected.append(model.eval()(x))
    with lora_fx.adapter_ids(model, [None, "default", "other"]):
        rows = model(x)
        assert_close(rows, torch.stack([output[i] for i, output in enumerate(expected)]))
        model.train()(x).square().sum().backward()
    # The adapter that was chosen last is trained.
    grads = [p.grad for p in lora_fx.trainable_parameters(model)]
    assert grads
    assert all(grad is not None and float(grad.abs().sum()) > 0 for grad in grads)


# --- MiCA -----------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 12)
        self.lin0 = nn.Linear(12, 20)
        self.conv1d = Conv1D(16, 20)
        self.head = nn.Linear(16, 12)
        self.last = nn.Linear(12, 30, bias=False)

    def forward(self, ids):
        x = torch.relu(self.lin0(self.emb(ids)))
        return self.last(self.head(torch.relu(self.conv1d(x))))


WORDS = torch.arange(12).reshape(3, 4)
MICA: dict[str, Any] = {
    "r": 4,
    "target_modules": ["emb", "lin0", "conv1d", "head"],
    "init_lora_weights": "mica",
}


def mica(**options: Any) -> nn.Module:
    return lora_fx.rewrite(seeded(Words)(), LoraConfig(**{**MICA, **options}))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_mica_starts_as_in_peft(tmp_path: Path) -> None:
    base = seeded(Words)()
    theirs, ours = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**MICA)), mica()
    assert_alike(by_key(ours), by_key(theirs), 1e-5)
    assert_same_bits(ours(WORDS), base(WORDS))
    plan = lora_fx.plan(base, LoraConfig(**MICA))
    assert plan.total_parameters == sum(p.numel() for p in ours.parameters())
    names = trained(ours)
    assert len(names) == 4
    assert not any("lora_B" in name or "embedding_B" in name for name in names)
    assert all(p.requires_grad for p in lora_fx.trainable_parameters(ours))
    (group,) = lora_fx.parameter_groups(mica(target_modules=["lin0"]), 1e-3)
    assert group["name"] == "lora_A"

    lora_fx.set_adapter(ours, [])
    assert not trained(ours)
    lora_fx.set_adapter(ours, "default")
    assert trained(ours) == names
    assert lora_fx.status(ours).adapters[0].trainable is True

    lora_fx.save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == "mica"
    again = lora_fx.load_adapter(base, tmp_path)
    assert trained(again) == names
    assert_alike(by_key(again), by_key(ours), 0)


def test_mica_is_lora_everywhere_else(tmp_path: Path) -> None:
    """In batches of several adapters, in swaps, and with a start that is written again."""
    base, model = seeded(Words)(), mica()
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(model):
            parameter.add_(0.3 * numbered(1, *parameter.shape, dtype=torch.float32))
    expected = model(WORDS)
    lora_fx.add_adapter(model, LoraConfig(r=2, target_modules=["lin0"]), "plain")
    with lora_fx.adapter_ids(model, ["default", None, "plain"]):
        rows = model(WORDS)
        rows.square().sum().backward()
    assert_close(rows, torch.stack([expected[0], *base(WORDS)[1:]]), 1e-5)
    assert model.lin0.lora_A.default.grad.abs().sum() > 0
    assert model.lin0.lora_B.default.grad is None

    lora_fx.set_adapter(model, "default")
    lora_fx.save_adapter(model, tmp_path, adapter_name="default")
    other = mica()
    lora_fx.hotswap_adapter(other, tmp_path)
    assert_close(other(WORDS), expected, 1e-5)
    lora_fx.initialize(other)
    assert_same_bits(other.lin0.lora_B.default, mica().lin0.lora_B.default)
    assert_close(other(WORDS), base(WORDS), 1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora and init_lora_weights='mica' do not go together"),
        ({"kasa_config": {}}, "kasa_config and init_lora_weights='mica' do not go together"),
        ({"lora_bias": True}, "B has no bias"),
        ({"r": 13}, "emb: MiCA takes 13 singular vectors of the weight, and it has 12"),
    ],
)
def test_what_mica_does_not_go_with(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mica(**options)
    with pytest.raises(Exception, match=r"combination|lora_bias|requires"):
        peft.get_peft_model(seeded(Words)(), peft.LoraConfig(**{**MICA, **options}))


def test_layers_without_mica() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica")
    with pytest.raises(ConfigError, match=r"0: MiCA is for linear layers .*init_lora_weights=True"):
        lora_fx.rewrite(model, config)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    quantized = lora_fx.quantize(nn.Sequential(*layers), "int8")
    with pytest.raises(ConfigError, match=r"0: MiCA takes singular vectors .* int8"):
        lora_fx.rewrite(quantized, config)


@pytest.mark.filterwarnings("ignore")
def test_a_random_start_is_that_of_the_same_base(tmp_path: Path) -> None:
    """KaSA changes the base; whether B starts at zero or at random does not."""
    base = nn.Sequential(nn.Linear(12, 10))
    config = peft.LoraConfig(
        r=2, target_modules=["0"], kasa_config=peft.KasaConfig(), init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    ours = lora_fx.load_adapter(base, tmp_path).eval()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert not torch.allclose(ours(x), base(x), atol=1e-3)


def test_saving_tells_that_peft_needs_the_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.up(self.embed(input_ids))
            return output

    config = lora_fx.LoraConfig(r=2, target_modules=["up"], alora_invocation_tokens=[3])
    model = lora_fx.rewrite(Net(), config)
    with caplog.at_level(logging.WARNING, logger="lora_fx"):
        lora_fx.save_adapter(model, tmp_path)
    assert "only with task_type='CAUSAL_LM'" in caplog.text
