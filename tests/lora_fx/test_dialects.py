"""Adapter files of diffusers, kohya, vLLM and llama.cpp, with the libraries that write and read them."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig
from lora_fx.adapter_files import DIFFUSERS_NAME
from tests.algebra import randomize
from tests.numerics import assert_close

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = {
    "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([3]),
    "encoder_hidden_states": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1)),
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    return CLIPTextModel(CLIPTextConfig(num_hidden_layers=2, **sizes)).eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**SAMPLE).sample
    return out


def adapted(**options: Any) -> nn.Module:
    values = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [*ATTENTION, "conv1", "proj_in"],
        **options,
    }
    model = lora_fx.rewrite(unet(), LoraConfig(**values)).eval()
    randomize(model)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 3}},
        {"use_dora": True, "target_modules": ATTENTION},
    ],
)
def test_diffusers_loads_what_is_saved_for_it(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    lora_fx.save_adapter(model, tmp_path, format="diffusers")
    assert [one.name for one in tmp_path.iterdir()] == [DIFFUSERS_NAME]
    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=DIFFUSERS_NAME)
    assert_close(run(theirs.eval()), run(model))
    again = lora_fx.load_adapter(unet(), tmp_path).eval()
    assert_close(run(again), run(model))
    by_file = lora_fx.load_adapter(unet(), tmp_path / DIFFUSERS_NAME, component="unet").eval()
    assert torch.equal(run(by_file), run(again))


@pytest.mark.parametrize("alpha", [4, 7])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_what_diffusers_saves_is_loaded(alpha: int, with_metadata: bool, tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model_state_dict

    theirs = unet()
    alpha = alpha if with_metadata else 4
    theirs.add_adapter(PeftConfig(r=4, lora_alpha=alpha, target_modules=ATTENTION))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    layers = get_peft_model_state_dict(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict()
        if with_metadata
        else None,
    )
    ours = lora_fx.load_adapter(unet(), tmp_path).eval()
    assert_close(run(ours), run(theirs.eval()))


def kohya(model: nn.Module, prefix: str, alpha: float) -> dict[str, Tensor]:
    """An adapter as kohya's ``networks/lora.py`` names it."""
    tensors: dict[str, Tensor] = {}
    for key, value in lora_fx.adapter_state_dict(model).items():
        name = key.removeprefix("base_model.model.").partition(".lora_")[0]
        flat = prefix + name.replace(".", "_")
        way = "lora_down" if "lora_A" in key else "lora_up"
        tensors[f"{flat}.{way}.weight"] = value.clone()
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def test_a_file_of_kohya_is_loaded_and_its_parts_are_told_apart(tmp_path: Path) -> None:
    model = adapted()
    encoder = lora_fx.rewrite(text_encoder(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomize(encoder)
    tensors = kohya(model, "lora_unet_", 6.0) | kohya(encoder, "lora_te1_", 8.0)
    # Some files have kernels of one position where the layer is linear.
    key = next(one for one in tensors if "to_q.lora_down" in one)
    tensors[key] = tensors[key][..., None, None]
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert_close(run(lora_fx.load_adapter(unet(), path).eval()), run(model))
    ids = torch.tensor([[1, 2, 3]])
    loaded = lora_fx.load_adapter(text_encoder(), path).eval()
    assert_close(loaded(ids).last_hidden_state, encoder.eval()(ids).last_hidden_state)
    second = {
        key.replace("lora_te1_", "lora_te2_text_model_"): value.clone()
        for key, value in tensors.items()
    }
    safetensors.torch.save_file(tensors | second, path)
    with pytest.raises(
        CheckpointError, match=r"under text_encoder and text_encoder_2: give compone"
    ):
        lora_fx.load_adapter(text_encoder(), path)
    chosen = lora_fx.load_adapter(text_encoder(), path, component="text_encoder_2").eval()
    assert_close(chosen(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_dora_of_kohya_is_loaded_for_outputs_and_refused_for_inputs(tmp_path: Path) -> None:
    model = adapted(use_dora=True, target_modules=["to_q", "to_k"], lora_alpha=4)
    tensors = {}
    for key, value in lora_fx.adapter_state_dict(model).items():
        name, _, role = key.removeprefix("base_model.model.").partition(".lora_")
        flat = "lora_unet_" + name.replace(".", "_")
        if role.startswith("magnitude"):
            tensors[f"{flat}.dora_scale"] = value.reshape(-1, 1)
        else:
            way = "lora_down" if role.startswith("A") else "lora_up"
            tensors[f"{flat}.{way}.weight"] = value.clone()
    path = tmp_path / "dora.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert_close(run(lora_fx.load_adapter(unet(), path).eval()), run(model))
    turned = {k: v.reshape(1, -1) if "dora" in k else v for k, v in tensors.items()}
    safetensors.torch.save_file(turned, path)
    with pytest.raises(CheckpointError, match="one for each input"):
        lora_fx.load_adapter(unet(), path)


def test_diffusers_and_kohya_agree_by_the_library_that_converts(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    model = adapted(target_modules=ATTENTION)
    lora_fx.save_adapter(model, tmp_path, format="diffusers")
    read = safetensors.torch.load_file(tmp_path / DIFFUSERS_NAME)
    theirs = convert_state_dict_to_kohya(read)
    path = tmp_path / "kohya.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in theirs.items()}, path)
    loaded = lora_fx.load_adapter(unet(), path).eval()
    # The converter writes the rank as alpha, which is what the file says, too.
    assert_close(run(loaded), run(model))


def test_a_reader_that_skips_metadata_has_the_right_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3})
    lora_fx.save_adapter(model, tmp_path, format="diffusers")
    tensors = safetensors.torch.load_file(tmp_path / DIFFUSERS_NAME)
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(tensors, bare)
    whole = pipeline(unet(), text_encoder())
    whole.load_lora_weights(str(bare))
    assert_close(run(whole.unet.eval()), run(model))
    with caplog.at_level("WARNING", "lora_fx"):
        loaded = lora_fx.load_adapter(unet(), bare).eval()
    assert "says nothing of alpha" in caplog.text
    assert_close(run(loaded), run(model))


def test_a_state_dict_has_the_keys_that_pipelines_save(tmp_path: Path) -> None:
    model = adapted(lora_alpha=4)
    layers = lora_fx.adapter_state_dict(model)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    whole = pipeline(unet(), text_encoder())
    whole.load_lora_weights(str(tmp_path))
    assert_close(run(whole.unet.eval()), run(model))


def test_files_of_lycoris_have_a_prefix_of_their_own(tmp_path: Path) -> None:
    model = adapted(target_modules=ATTENTION)
    tensors = {}
    for key, value in lora_fx.adapter_state_dict(model).items():
        name, _, role = key.partition(".lora_")
        name = f"lycoris_{name.replace('.', '_')}"
        tensors[f"{name}.lora_{'down' if role[0] == 'A' else 'up'}.weight"] = value.clone()
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
    path = tmp_path / "lycoris.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert_close(run(lora_fx.load_adapter(unet(), path).eval()), run(model))


def test_the_oldest_names_of_diffusers_are_read(tmp_path: Path) -> None:
    model = adapted(target_modules=ATTENTION, lora_alpha=4)
    tensors = {}
    for key, value in lora_fx.adapter_state_dict(model).items():
        name = key.removeprefix("base_model.model.").partition(".lora_")[0]
        owner, _, leaf = name.removesuffix(".0").rpartition(".")
        way = "down" if "lora_A" in key else "up"
        tensors[f"unet.{owner}.processor.{leaf}_lora.{way}.weight"] = value.clone()
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file(tensors, path)
    assert_close(run(lora_fx.load_adapter(unet(), path).eval()), run(model))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora_unet_mid.hada_w1_a", "LoHa"),
        ("lora_unet_mid.lokr_w1", "LoKr"),
        ("lora_unet_mid.lora_mid.weight", "Tucker"),
        ("lora_unet_mid.diff", "differences of whole weights"),
        ("lora_unet_input_blocks_1.lora_down.weight", "has no lora_unet_input_blocks_1"),
        ("unet.conv_in.lora_A.weight", "unet.conv_in has no B|conv_in has no B"),
        ("something.else", "no part of a LoRA adapter"),
    ],
)
def test_files_that_cannot_be_read_say_why(key: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    safetensors.torch.save_file({key: torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=says):
        lora_fx.load_adapter(unet(), path)


def test_a_damaged_file_and_wrong_words_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        lora_fx.load_adapter(unet(), path)
    model = adapted()
    with pytest.raises(ConfigError, match="format='gguf': it is one of"):
        lora_fx.save_adapter(model, tmp_path, format="gguf")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="component='vae'"):
        lora_fx.save_adapter(model, tmp_path, format="diffusers", component="vae")
    with pytest.raises(ConfigError, match="format='diffusers'"):
        lora_fx.save_adapter(model, tmp_path, component="unet")
    own = lora_fx.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoraConfig(r=2))
    with pytest.raises(ConfigError, match="give component="):
        lora_fx.save_adapter(own, tmp_path / "own", format="diffusers")
    assert not (tmp_path / "own").exists()
    trained = adapted(modules_to_save=["conv_out"])
    with pytest.raises(
        CheckpointError, match=r"diffusers cannot load .*\n  modules_to_save: conv_out"
    ):
        lora_fx.save_adapter(trained, tmp_path / "own", format="diffusers")


def test_a_folder_for_llama_cpp_has_one_alpha_and_no_pattern(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 20}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    config = LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True
    )
    model = lora_fx.rewrite(base, config).eval()
    randomize(model)
    lora_fx.save_adapter(model, tmp_path, format="gguf-ready")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["use_rslora"], values["rank_pattern"], values["alpha_pattern"]) == (
        False,
        {},
        {},
    )
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    # What the converter computes: alpha / rank of A times B A, for each pair.
    ids = torch.tensor([[1, 2, 3]])
    merged = {name: p.detach().clone() for name, p in base.named_parameters()}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            merged[name] += values["lora_alpha"] / a.shape[0] * b @ a
    by_hand = copy.deepcopy(base)
    by_hand.load_state_dict(merged, strict=False)
    assert_close(by_hand(ids).logits, model(ids).logits)
    dora = lora_fx.rewrite(base, LoraConfig(r=2, use_dora=True))
    with pytest.raises(CheckpointError, match=r"llama.cpp cannot convert .*\n  use_dora"):
        lora_fx.save_adapter(dora, tmp_path / "other", format="gguf-ready")


class Named(nn.Module):
    """Layers whose names are one name when they are flattened, one that has two names, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})
        self.a_b = nn.Linear(4, 4)
        self.lin = nn.Linear(4, 4)
        self.twin = nn.ModuleDict({"lin": self.lin})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(self.a_b(self.a["b"](x)))
        return out


def _written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return path


def _kohya(name: str, **others: Tensor) -> dict[str, Tensor]:
    values = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), **others}
    return {f"lora_unet_{name}.{role}": value for role, value in values.items()}


def _dotted(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (_kohya("a_b"), "a_b may be a.b or a_b of this model"),
        (
            {**_dotted("lin"), "lin.lora_A.default.weight": torch.zeros(2, 4)},
            "lin has several tensors for its A",
        ),
        (
            {**_dotted("lin"), **_dotted("text_model.lin")},
            "two adapters for lin of this model: lin and text_model.lin",
        ),
        (
            {**_dotted("lin"), **_dotted("twin.lin")},
            "two adapters for lin of this model: lin and twin.lin",
        ),
        (_kohya("lin", alpha=torch.tensor(0.0)), "alpha of lin is 0"),
        (_kohya("lin", alpha=torch.ones(2)), "alpha of lin is"),
        (_kohya("lin", **{"lora_down.weight": torch.tensor(1.0)}), "a factor is a matrix"),
        (
            _kohya("lin", **{"lora_down.weight": torch.ones(2, 4, dtype=torch.int8)}),
            "A of lin is torch.int8",
        ),
    ],
)
def test_a_file_that_can_be_read_in_two_ways_is_refused(
    tensors: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        lora_fx.load_adapter(Named(), _written(tmp_path / "one.safetensors", tensors))


def test_a_layer_of_two_names_is_one_layer(tmp_path: Path) -> None:
    model = Named()
    path = _written(tmp_path / "one.safetensors", _kohya("twin_lin"))
    assert any(
        name.startswith("lin.lora_A")
        for name, _ in lora_fx.load_adapter(model, path).named_parameters()
    )


def test_patterns_are_about_the_names_in_the_file(tmp_path: Path) -> None:
    """Text encoders of transformers 4 had ``text_model`` around their layers."""
    values = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"text_model.lin": 10}}
    named = {f"text_encoder.{name}": value for name, value in values.items()}
    path = _written(
        tmp_path / "one.safetensors",
        {**_dotted("text_encoder.text_model.lin"), **_dotted("text_encoder.text_model.a.b")},
        lora_adapter_metadata=json.dumps(named),
    )
    base = Named().eval()
    exact = copy.deepcopy(base).double()
    exact.lin.weight.data += 10 / 2 * 2 * torch.ones(4, 4)
    exact.a["b"].weight.data += 4 / 2 * 2 * torch.ones(4, 4)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert_close(lora_fx.load_adapter(base, path)(x).detach(), exact(x.double()).float().detach())


def test_two_formats_do_not_share_a_folder(tmp_path: Path) -> None:
    """load_adapter, and other readers, would take the one for the other."""
    model = adapted()
    lora_fx.save_adapter(model, tmp_path / "peft", receipt=SAMPLE)
    before = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"of another format .adapter_config\.json"):
            lora_fx.save_adapter(model, tmp_path / "peft", format="diffusers", force=force)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    lora_fx.save_adapter(model, tmp_path / "diffusers", format="diffusers")
    with pytest.raises(CheckpointError, match=r"of another format .pytorch_lora_weights"):
        lora_fx.save_adapter(model, tmp_path / "diffusers", force=True)


def test_a_model_of_diffusers_that_is_no_part_is_asked_for_its_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    control = diffusers.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 8),
    )
    model = lora_fx.rewrite(control, LoraConfig(r=2, target_modules=["to_q"]))
    randomize(model)
    with pytest.raises(ConfigError, match="which part of a pipeline this ControlNetModel is"):
        lora_fx.save_adapter(model, tmp_path / "control", format="diffusers")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
)
def test_diffusers_loads_what_is_saved_for_a_text_encoder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """transformers loads it there, and makes new values where it does not find a tensor."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    values = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    model = lora_fx.rewrite(text_encoder(), LoraConfig(**values)).eval()
    randomize(model)
    ids = torch.tensor([[1, 2, 3, 4]])
    lora_fx.save_adapter(model, tmp_path, format="diffusers", component="text_encoder")
    state, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), return_lora_metadata=True
    )[::2]
    theirs = text_encoder()
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
        state, None, theirs, prefix="text_encoder", metadata=metadata
    )
    with torch.no_grad():
        wanted = model(ids)[0]
        assert_close(theirs(ids)[0], wanted)
        assert_close(lora_fx.load_adapter(text_encoder(), tmp_path).eval()(ids)[0], wanted)


def test_another_part_of_a_pipeline_is_not_overwritten(tmp_path: Path) -> None:
    model = lora_fx.rewrite(text_encoder(), LoraConfig(target_modules=["q_proj"]))
    save = functools.partial(lora_fx.save_adapter, model, tmp_path, format="diffusers")
    save(component="text_encoder")
    save(component="text_encoder")  # the same part is replaced
    before = (tmp_path / DIFFUSERS_NAME).read_bytes()
    with pytest.raises(
        CheckpointError, match="has the adapter of text_encoder, which would be lost"
    ):
        save(component="text_encoder_2")
    assert (tmp_path / DIFFUSERS_NAME).read_bytes() == before


def pipeline(unet: nn.Module, encoder: nn.Module) -> Any:
    """A whole pipeline of diffusers over two models; its file of a LoRA is read by it as a user reads one."""
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_one_file_has_the_adapters_of_a_pipeline(tmp_path: Path) -> None:
    """Written by ours and read by diffusers' pipeline, and the other way round."""
    # Scales that are powers of two: folding them into B rounds nothing.
    model = adapted(use_rslora=True, lora_alpha=8)
    values = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    encoder = lora_fx.rewrite(text_encoder(), LoraConfig(**values)).eval()
    randomize(encoder)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        wanted = run(model), encoder(ids)[0]
    lora_fx.save_adapter(
        {"unet": model, "text_encoder": encoder}, tmp_path / "ours", format="diffusers"
    )
    assert [one.name for one in (tmp_path / "ours").iterdir()] == [DIFFUSERS_NAME]
    whole = pipeline(unet(), text_encoder())
    whole.load_lora_weights(str(tmp_path / "ours"))
    from peft import get_peft_model_state_dict

    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(whole.unet, adapter_name="default_0"),
        text_encoder_lora_layers=get_peft_model_state_dict(
            whole.text_encoder, adapter_name="default_0"
        ),
        unet_lora_adapter_metadata=whole.unet.peft_config["default_0"].to_dict(),
        text_encoder_lora_adapter_metadata=whole.text_encoder.peft_config["default_0"].to_dict(),
    )
    with torch.no_grad():
        assert_close(run(whole.unet.eval()), wanted[0])
        assert_close(whole.text_encoder.eval()(ids)[0], wanted[1])
        for folder in ("ours", "theirs"):
            assert_close(run(lora_fx.load_adapter(unet(), tmp_path / folder).eval()), wanted[0])
            again = lora_fx.load_adapter(text_encoder(), tmp_path / folder).eval()
            assert_close(again(ids)[0], wanted[1])


def test_several_models_are_for_diffusers_alone(tmp_path: Path) -> None:
    several = {"unet": adapted(), "vae": adapted()}
    with pytest.raises(ConfigError, match="several models"):
        lora_fx.save_adapter(several, tmp_path / "out")
    with pytest.raises(ConfigError, match="component='vae'"):
        lora_fx.save_adapter(several, tmp_path / "out", format="diffusers")
    with pytest.raises(ConfigError, match="several models"):
        lora_fx.save_adapter(several, tmp_path / "out", format="diffusers", receipt=SAMPLE)
    assert not (tmp_path / "out").exists()
