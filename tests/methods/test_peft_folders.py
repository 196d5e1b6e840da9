"""Folders of other methods that PEFT wrote, against PEFT's own outputs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CheckpointError, ConfigError
from lora_fx.methods import methods, read_foreign
from lora_fx.methods.boft import butterfly
from tests.methods.applied import applied
from tests.numerics import assert_close

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(0, 10, (3, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))


class Words(nn.Module):
    """Linear layers of several shapes with and without biases, an embedding, norms and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "words"}
        self.emb = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 12)
        self.mid = nn.Linear(12, 12, bias=False)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x + self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))
        output: Tensor = self.head(self.norm(x))
        return output


class Images(nn.Module):
    """Convolutions: with a kernel, grouped, of one position, and over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "images"}
        self.wide = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=2)
        self.point = nn.Conv2d(8, 12, 1)
        self.line = nn.Conv1d(12, 6, 3, padding=1)
        self.dot = nn.Conv1d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.tanh(self.grouped(torch.tanh(self.wide(x)))))
        output: Tensor = self.dot(torch.tanh(self.line(x.flatten(2))))
        return output


def gpt2() -> nn.Module:
    """A model with Conv1D of transformers, whose weights are [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, n_positions=16))


MODELS = {"words": (Words, IDS), "images": (Images, IMAGES), "gpt2": (gpt2, IDS)}
LINEAR = ["up", "mid", "down"]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loha": ("LoHa", "words", {"r": 2, "alpha": 3, "target_modules": LINEAR}),
    "loha-patterns": (
        "LoHa",
        "words",
        {"r": 2, "target_modules": LINEAR, "rank_pattern": {"up": 3}, "alpha_pattern": {"mid": 7}},
    ),
    "loha-conv": (
        "LoHa",
        "images",
        {"r": 2, "alpha": 3, "target_modules": ["wide", "grouped", "point", "line", "dot"]},
    ),
    "loha-tucker": (
        "LoHa",
        "images",
        {
            "r": 2,
            "alpha": 3,
            "use_effective_conv2d": True,
            "target_modules": ["wide", "grouped", "point", "line"],
        },
    ),
    "lokr": ("LoKr", "words", {"r": 2, "alpha": 3, "target_modules": LINEAR}),
    "lokr-full": (
        "LoKr",
        "words",
        {"r": 9, "alpha": 3, "target_modules": LINEAR, "alpha_pattern": {"down": 5}},
    ),
    "lokr-both": (
        "LoKr",
        "words",
        {"r": 1, "alpha": 3, "decompose_both": True, "target_modules": LINEAR},
    ),
    "lokr-conv": (
        "LoKr",
        "images",
        {"r": 1, "alpha": 3, "target_modules": ["wide", "grouped", "point", "line", "dot"]},
    ),
    "lokr-tucker": (
        "LoKr",
        "images",
        {
            "r": 1,
            "alpha": 3,
            "use_effective_conv2d": True,
            "target_modules": ["wide", "grouped", "point"],
        },
    ),
    "lokr-full-conv": ("LoKr", "images", {"r": 8, "target_modules": ["wide", "grouped", "line"]}),
    "oft": ("OFT", "words", {"oft_block_size": 4, "target_modules": [*LINEAR, "emb"]}),
    "oft-exact": (
        "OFT",
        "words",
        {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": LINEAR},
    ),
    "oft-shared": (
        "OFT",
        "words",
        {"oft_block_size": 2, "block_share": True, "target_modules": [*LINEAR, "emb"]},
    ),
    "oft-constrained": (
        "OFT",
        "words",
        {"r": 2, "oft_block_size": 0, "coft": True, "eps": 0.3, "target_modules": LINEAR},
    ),
    **{
        f"oft-{terms}-terms": (
            "OFT",
            "words",
            {"oft_block_size": 4, "num_cayley_neumann_terms": terms, "target_modules": ["up"]},
        )
        for terms in (2, 3, 4, 7)
    },
    "oft-conv": ("OFT", "images", {"oft_block_size": 4, "target_modules": ["point"]}),
    "boft": ("BOFT", "words", {"boft_block_size": 4, "target_modules": LINEAR}),
    "boft-conv": ("BOFT", "images", {"boft_block_size": 4, "target_modules": ["wide", "point"]}),
    "ia3": ("IA3", "words", {"target_modules": LINEAR, "feedforward_modules": ["down"]}),
    "ia3-pattern": (
        "IA3",
        "words",
        {"target_modules": LINEAR, "feedforward_modules": ".*(up|mid)"},
    ),
    "ia3-conv": (
        "IA3",
        "images",
        {"target_modules": ["wide", "grouped", "point"], "feedforward_modules": ["grouped"]},
    ),
    "ia3-gpt2": (
        "IA3",
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "vera": ("Vera", "words", {"r": 3, "target_modules": LINEAR}),
    "vera-seed": (
        "Vera",
        "words",
        {"r": 3, "save_projection": False, "projection_prng_key": 5, "target_modules": LINEAR},
    ),
    "vera-gpt2": (
        "Vera",
        "gpt2",
        {"r": 3, "save_projection": False, "target_modules": ["c_attn", "c_fc"]},
    ),
    "miss": ("Miss", "words", {"r": 3, "target_modules": LINEAR}),
    "miss-bat": ("Miss", "words", {"r": 4, "init_weights": "bat", "target_modules": LINEAR}),
    "miss-mini": (
        "Miss",
        "words",
        {"r": 4, "mini_r": 2, "init_weights": "mini", "target_modules": LINEAR},
    ),
    "hra": ("HRA", "words", {"r": 3, "target_modules": LINEAR}),
    "hra-orthogonal": ("HRA", "words", {"r": 3, "apply_GS": True, "target_modules": LINEAR}),
    "hra-conv": ("HRA", "images", {"r": 3, "target_modules": ["wide", "point"]}),
    "randlora": ("RandLora", "words", {"r": 3, "randlora_alpha": 7, "target_modules": LINEAR}),
    **{
        f"randlora-seed-{kind}": (
            "RandLora",
            "words",
            {
                "r": 5,
                "save_projection": False,
                "projection_prng_key": 3,
                "target_modules": LINEAR,
                **options,
            },
        )
        for kind, options in {
            "dense": {},
            "sparse": {"sparse": True},
            "very_sparse": {"very_sparse": True},
        }.items()
    },
    "randlora-gpt2": (
        "RandLora",
        "gpt2",
        {"r": 3, "save_projection": False, "target_modules": ["c_attn", "mlp.c_proj"]},
    ),
    "fourierft": (
        "FourierFT",
        "words",
        {
            "n_frequency": 5,
            "n_frequency_pattern": {"mid": 9},
            "random_loc_seed": 7,
            "target_modules": LINEAR,
        },
    ),
    "fourierft-gpt2": ("FourierFT", "gpt2", {"n_frequency": 5, "target_modules": ["c_attn"]}),
    "vblora": (
        "VBLoRA",
        "words",
        {"r": 2, "num_vectors": 6, "vector_length": 4, "target_modules": LINEAR},
    ),
    "vblora-compressed": (
        "VBLoRA",
        "words",
        {
            "r": 2,
            "num_vectors": 6,
            "vector_length": 4,
            "topk": 3,
            "save_only_topk_weights": True,
            "target_modules": LINEAR,
        },
    ),
    "vblora-gpt2": (
        "VBLoRA",
        "gpt2",
        {"r": 2, "num_vectors": 6, "vector_length": 4, "target_modules": ["c_attn", "c_fc"]},
    ),
    "adalora": (
        "AdaLora",
        "words",
        {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10, "target_modules": LINEAR},
    ),
    "adalora-conv": (
        "AdaLora",
        "images",
        {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["wide", "point"]},
    ),
    "adalora-gpt2": (
        "AdaLora",
        "gpt2",
        {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["c_attn"]},
    ),
    "ln-tuning": ("LNTuning", "words", {"target_modules": ["norm"]}),
    "trainable-tokens": (
        "TrainableTokens",
        "words",
        {"token_indices": [1, 4], "target_modules": ["emb"]},
    ),
}


def base_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def trained(case: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of PEFT with random values, which is saved into a folder."""
    method, model, options = CASES[case]
    config = getattr(peft, f"{method}Config")(**options)
    theirs = peft.get_peft_model(base_of(model).to(dtype), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data += noise.to(parameter)
    theirs.save_pretrained(folder)
    return theirs.eval()


def output(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(inputs)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("case", CASES)
def test_adapted_parameters_give_the_outputs_of_peft(case: str, tmp_path: Path) -> None:
    model, inputs = base_of(CASES[case][1]), MODELS[CASES[case][1]][1]
    theirs = trained(case, tmp_path)
    expected = output(theirs, inputs)
    assert not torch.allclose(expected, output(model, inputs), atol=1e-3)
    on_meta = copy.deepcopy(model).to("meta")
    adapter = read_foreign(tmp_path, on_meta)
    assert_close(output(applied(model, adapter), inputs), expected, 1e-5)
    for change in adapter.changes:
        value = model.get_parameter(change.parameter).detach().double()
        difference = change.adapted(value) - value
        if change.rank is not None:
            outputs = 1 if "Conv1D" in str(type(model.get_submodule(change.parameter[:-7]))) else 0
            matrix = difference.transpose(0, outputs).flatten(1)
            assert torch.linalg.matrix_rank(matrix, rtol=1e-10) <= change.rank


def folder_of(case: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a case, as saved."""
    trained(case, folder)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def rewrite_folder(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None
) -> None:
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))


FIRST = ["loha", "lokr", "oft", "boft", "ia3", "vera", "miss", "hra", "randlora", "fourierft"]


@pytest.mark.parametrize("how", ["shape", "whole numbers", "not finite"])
@pytest.mark.parametrize("case", [*FIRST, "vblora", "adalora", "ln-tuning", "trainable-tokens"])
def test_damaged_tensors_are_named(case: str, how: str, tmp_path: Path) -> None:
    whole, _ = folder_of(case, tmp_path)
    model = base_of(CASES[case][1])
    for key, value in whole.items():
        tensors = dict(whole)
        if how == "shape":
            tensors[key] = value[:, None] if value.dim() == 1 else value[:-1]
        elif how == "whole numbers":
            tensors[key] = value.long()
        else:
            tensors[key] = value * float("nan")
        rewrite_folder(tmp_path, tensors)
        if "randlora_" in key and key.endswith(("_A", "_B")):
            name = "differs from the same tensor"
        else:
            name = key if "base_model.model." in key else key.removeprefix("base_model.")
        with pytest.raises(CheckpointError) as caught:
            read_foreign(tmp_path, model)
        assert name in str(caught.value), key


@pytest.mark.parametrize("case", [*FIRST, "vblora", "adalora"])
def test_missing_tensors_are_named(case: str, tmp_path: Path) -> None:
    whole, _ = folder_of(case, tmp_path)
    model = base_of(CASES[case][1])
    by_layer = {}
    for key in whole:
        by_layer.setdefault(key.rpartition(".")[0], []).append(key)
    pairs = [keys for keys in by_layer.values() if len(keys) > 1 and "randlora" not in keys[0]]
    for key in (key for keys in pairs for key in keys):
        rewrite_folder(tmp_path, {k: v for k, v in whole.items() if k != key})
        with pytest.raises(CheckpointError, match=r"the file has no .* cut short"):
            read_foreign(tmp_path, model)
    rewrite_folder(tmp_path, {"base_model.model.head.weight": torch.zeros(4, 8)})
    with pytest.raises(CheckpointError, match="holds no tensor of"):
        read_foreign(tmp_path, model)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_foreign(tmp_path, model)


def test_tensors_of_another_model_are_listed(tmp_path: Path) -> None:
    tensors, config = folder_of("loha", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"this Images has no place .*down.hada_w1_a \[8, 2\]"
    ):
        read_foreign(tmp_path, Images())
    rewrite_folder(tmp_path, tensors | {"base_model.model.up.lora_A.weight": torch.zeros(2, 8)})
    with pytest.raises(CheckpointError, match=r"no place for .*up.lora_A.weight"):
        read_foreign(tmp_path, Words())
    rewrite_folder(tmp_path, tensors | {"base_model.model.head.weight": torch.zeros(5, 8)})
    with pytest.raises(CheckpointError, match=r"head.weight \[5, 8\]"):
        read_foreign(tmp_path, Words())
    rewrite_folder(tmp_path, tensors, {k: v for k, v in config.items() if k != "alpha"})
    with pytest.raises(CheckpointError, match=r"alpha is None in adapter_config.json"):
        read_foreign(tmp_path, Words())


@pytest.mark.parametrize("bias", ["all", "boft_only"])
def test_trained_biases_and_modules_are_read_in_full(bias: str, tmp_path: Path) -> None:
    config = peft.BOFTConfig(
        boft_block_size=4,
        target_modules=["up", "mid"],
        modules_to_save=["head", "norm"],
        bias=bias,
    )
    theirs = peft.get_peft_model(base_of("words"), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.3
    theirs.save_pretrained(tmp_path)
    model = base_of("words")
    adapter = read_foreign(tmp_path, model)
    stored = {"head.weight", "head.bias", "norm.weight", "norm.bias", "up.bias"}
    assert set(adapter.whole) == stored | ({"down.bias"} if bias == "all" else set())
    assert adapter.config["modules_to_save"] == ["head", "norm"]
    assert adapter.config["task_type"] is None
    # PEFT leaves the bias out of the factors.
    assert_close(output(applied(model, adapter), IDS), output(theirs.eval(), IDS), 1e-5)


def test_statistics_of_a_saved_module_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = peft.HRAConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    theirs(torch.randn(8, 4))
    theirs.save_pretrained(tmp_path)
    adapter = read_foreign(tmp_path, model)
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(adapter.whole)
    x = torch.randn(3, 4)
    assert_close(applied(model, adapter).eval()(x), theirs.eval()(x), 1e-5)


def test_pruned_ranks_of_adalora_keep_the_scale_of_the_first_rank(tmp_path: Path) -> None:
    theirs = trained("adalora", tmp_path)
    pattern = {f"{name}.lora_E": [True, False, name == "up"] for name in LINEAR}
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.peft_config["default"].inference_mode = True
    theirs.save_pretrained(tmp_path)
    model = base_of("words")
    again = peft.PeftModel.from_pretrained(base_of("words"), tmp_path).eval()
    adapter = read_foreign(tmp_path, model)
    assert [change.rank for change in adapter.changes] == [2, 1, 1]
    assert_close(output(applied(model, adapter), IDS), output(again, IDS), 1e-5)


@pytest.mark.parametrize("case", ["vera-seed", "randlora-seed-dense"])
def test_seeded_matrices_are_rounded_as_in_the_model(case: str, tmp_path: Path) -> None:
    theirs = trained(case, tmp_path, dtype=torch.bfloat16)
    model = base_of("words").to(torch.bfloat16)
    for change in read_foreign(tmp_path, model).changes:
        layer = theirs.get_submodule(f"base_model.model.{change.parameter[:-7]}")
        weight = torch.zeros(layer.get_base_layer().weight.shape, dtype=torch.float64)
        assert_close(change.adapted(weight), layer.get_delta_weight("default").double(), 1e-5)


@pytest.mark.parametrize(("width", "block", "stages"), [(16, 4, 2), (32, 4, 3), (16, 2, 3)])
def test_butterflies_are_those_of_peft(width: int, block: int, stages: int) -> None:
    from peft.tuners.boft.layer import BOFTLayer

    # PEFT has several stages with a CUDA extension alone, so its permutations are compared.
    for stage in range(stages):
        sections = width // block // 2**stage
        theirs = BOFTLayer.block_butterfly_perm(None, width, sections, block // 2, stages - 1)
        assert torch.equal(butterfly(width, sections, block, stages), theirs)


def test_several_stages_of_boft_are_products_of_dense_matrices(tmp_path: Path) -> None:
    from peft.tuners.boft.layer import BOFTLayer

    tensors, config = folder_of("boft", tmp_path)
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(2, 2, 4, 4, generator=generator)
    rewrite_folder(
        tmp_path,
        {
            "base_model.model.up.boft_R": stored,
            "base_model.model.up.boft_s": tensors["base_model.model.up.boft_s"],
        },
        config | {"boft_n_butterfly_factor": 2},
    )
    model = base_of("words")
    (change,) = read_foreign(tmp_path, model).changes
    rotation = torch.eye(8)
    blocks = BOFTLayer.cayley_batch(None, stored.flatten(0, 1)).unflatten(0, (2, 2))
    for stage in range(2):
        order = BOFTLayer.block_butterfly_perm(None, 8, 2 // 2**stage, 2, 1)
        moves = BOFTLayer.perm2mat(None, order)
        rotation = moves @ torch.block_diag(*blocks[stage]) @ moves.T @ rotation
    expected = (rotation @ model.up.weight.T).T * tensors["base_model.model.up.boft_s"]
    assert_close(change.adapted(model.up.weight.detach()), expected, 1e-5)


def test_rotated_patches_of_a_convolution_are_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=4, target_modules=["wide"])
    base = base_of("images")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    # The start of training should change nothing, and does.
    assert not torch.allclose(output(theirs, IMAGES), output(base, IMAGES), atol=1e-2)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"wide: it is a convolution with a kernel .*patches"):
        read_foreign(tmp_path, base)


@pytest.mark.parametrize("case", ["oft-conv", "boft-conv", "hra-conv", "adalora-conv"])
def test_layers_of_another_kind_are_refused(case: str, tmp_path: Path) -> None:
    trained(case, tmp_path)
    other = Images()
    other.point = nn.Conv2d(8, 12, 1, groups=2)
    with pytest.raises(CheckpointError, match="point"):
        read_foreign(tmp_path, other)


def test_every_method_of_peft_is_read_or_explained(tmp_path: Path) -> None:
    read = {method.peft_type for method in methods() if method.peft_type}
    # Bone has left PEFT.
    assert read - {"BONE"} <= {kind.value for kind in peft.PeftType}
    for kind in peft.PeftType:
        config = {"peft_type": kind.value}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        if kind.value == "LORA":
            with pytest.raises(CheckpointError, match="is a LoRA adapter already"):
                read_foreign(tmp_path, Words())
            continue
        with pytest.raises(CheckpointError, match=rf"peft_type is '{kind.value}'") as caught:
            lora_fx.load_adapter(Words(), tmp_path)
        works = "convert_adapter" if kind.value in read else "with PEFT|merge_and_unload"
        assert re.search(works, str(caught.value))
        if kind.value not in read:
            with pytest.raises(CheckpointError, match=rf"peft_type is '{kind.value}'"):
                read_foreign(tmp_path, Words())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "put before the input",
        ),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "keys and values"),
        (
            peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "no LoRA equals it",
        ),
    ],
    ids=["prompt", "prefix", "p-tuning"],
)
def test_prompts_cannot_become_lora(config: Any, says: str, tmp_path: Path) -> None:
    peft.get_peft_model(gpt2(), config).save_pretrained(tmp_path)
    for read in (
        lambda: lora_fx.load_adapter(gpt2(), tmp_path),
        lambda: read_foreign(tmp_path, gpt2()),
    ):
        with pytest.raises(CheckpointError, match=says):
            read()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder or file on this machine"):
        read_foreign(tmp_path / "none", Words())
    with pytest.raises(CheckpointError, match=r"adapter_config.json does not exist"):
        read_foreign(tmp_path, Words())
    trained("loha", tmp_path)
    with pytest.raises(ConfigError, match="has no parts"):
        read_foreign(tmp_path, Words(), component="unet")
    by_file = read_foreign(tmp_path / "adapter_model.safetensors", Words())
    assert by_file.method == "LoHa"
    assert [change.parameter for change in by_file.changes] == [f"{x}.weight" for x in LINEAR]
