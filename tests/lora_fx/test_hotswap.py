"""Other values in the place of an adapter's: what the folder computes, and nothing is compiled anew."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import CheckpointError, ConfigError, LoraConfig
from lora_fx.adapters.manage import adapter_record
from tests.numerics import assert_close, assert_same_bits
from tests.zoo import FORMS, Form, Mlp, Residual, tiny_llama

IDS = torch.tensor([[0, 2, 5, 10], [2, 2, 9, 10]])
WIDE = LoraConfig(seed=0, r=4, lora_alpha=2, init_lora_weights=False)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_adapter_that_is_meant(tmp_path: Path) -> None:
    """The only one, or the only active one; nobody has to call it "default"."""
    base = Residual().eval()
    folder = saved(base, tmp_path / "new", r=3)
    model = lora_fx.rewrite(base, LoraConfig(seed=0, r=2), adapter_name="maths")
    lora_fx.prepare_hotswap(model, 4)
    lora_fx.add_adapter(model, LoraConfig(seed=0, r=2), "code")
    lora_fx.hotswap_adapter(model, folder)
    assert_close(model(IDS), lora_fx.load_adapter(base, folder)(IDS))
    with lora_fx.disable_adapter(model):
        assert lora_fx.save_adapter(model, tmp_path / "out").name == "maths"
    found = lora_fx.adapter_state_dict(model)
    lora_fx.set_adapter(model, "code")
    lora_fx.load_adapter_state_dict(model, lora_fx.adapter_state_dict(model))
    assert found.keys() == lora_fx.adapter_state_dict(model, "maths").keys()
    for names in ([], ["maths", "code"]):
        lora_fx.set_adapter(model, names)
        for verb in (lora_fx.save_adapter, lora_fx.hotswap_adapter):
            with pytest.raises(
                ConfigError, match="say which adapter is meant: the model has 'maths', 'c"
            ):
                verb(model, tmp_path)
        with pytest.raises(ConfigError, match="say which"):
            lora_fx.initialize(model, [])
        with pytest.raises(ConfigError, match="say which"):
            lora_fx.prepare_hotswap(model, 4)


def saved(base: nn.Module, folder: Path, **config: object) -> Path:
    settings = {"init_lora_weights": False, "seed": 1, **config}
    return lora_fx.save_adapter(lora_fx.rewrite(base, LoraConfig(**settings)), folder)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_takes_less_rank_and_another_scale(form: Form, tmp_path: Path) -> None:
    base, x, g = form.model(), form.x(), form.groups
    config = {"target_modules": [form.site], "init_lora_weights": False}
    model = lora_fx.rewrite(base, LoraConfig(seed=0, r=g, **config))
    lora_fx.prepare_hotswap(model, 4 * g)
    assert_close(model(x), lora_fx.rewrite(base, LoraConfig(seed=0, r=g, **config))(x))
    saved(base, tmp_path / "new", r=3 * g, lora_alpha=5, **config)
    assert lora_fx.hotswap_adapter(model, tmp_path / "new") is model
    assert_close(model(x), lora_fx.load_adapter(base, tmp_path / "new")(x))
    assert_close(lora_fx.merge(model)(x), model(x))
    assert adapter_record(model, "default").sites[0].rank == 4 * g


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("rslora", [False, True])
def test_variants_and_scales(variant: dict, rslora: bool, tmp_path: Path) -> None:
    base = Residual().eval()
    model = lora_fx.rewrite(base, LoraConfig(seed=0, r=4, use_rslora=rslora, **variant))
    lora_fx.prepare_hotswap(model, 6)
    folder = saved(base, tmp_path / "new", r=5, use_rslora=True, lora_alpha=3, **variant)
    lora_fx.hotswap_adapter(model, folder)
    assert_close(model(IDS), lora_fx.load_adapter(base, folder)(IDS))
    # A padded adapter is saved as one of that rank.
    lora_fx.save_adapter(model, tmp_path / "again")
    assert_close(lora_fx.load_adapter(base, tmp_path / "again")(IDS), model(IDS))


def test_sites_that_the_folder_lacks_add_nothing(tmp_path: Path) -> None:
    base = Residual().eval()
    model = lora_fx.rewrite(base, WIDE)
    folder = saved(base, tmp_path, r=2, target_modules=["up"])
    lora_fx.hotswap_adapter(model, folder)
    assert_close(model(IDS), lora_fx.load_adapter(base, folder)(IDS))


def test_what_is_trained_in_full_is_swapped_too(tmp_path: Path) -> None:
    base = Residual().eval()
    config = {"target_modules": ["up"], "modules_to_save": ["head"], "r": 2}
    other = lora_fx.rewrite(base, LoraConfig(**config))
    with torch.no_grad():
        other.head.weight.add_(1)
    lora_fx.save_adapter(other, tmp_path)
    model = lora_fx.rewrite(base, LoraConfig(**config))
    lora_fx.hotswap_adapter(model, tmp_path)
    assert_same_bits(model(IDS), other(IDS))


def test_rows_of_tokens_are_swapped_too(tmp_path: Path) -> None:
    base = Residual().eval()
    config = LoraConfig(
        seed=0, r=2, target_modules=["up"], trainable_token_indices={"embed": [2, 5]}
    )
    other = lora_fx.rewrite(base, config)
    with torch.no_grad():
        other.embed.token_adapter.trainable_tokens_delta.default.add_(1)
    lora_fx.save_adapter(other, tmp_path)
    model = lora_fx.rewrite(base, config)
    lora_fx.hotswap_adapter(model, tmp_path)
    assert_same_bits(model(IDS), other(IDS))


def test_a_tied_head_has_its_own_magnitude(tmp_path: Path) -> None:
    base, inputs = tiny_llama(tie_word_embeddings=True)
    config = {"r": 2, "target_modules": ["embed_tokens"], "use_dora": True}
    folder = saved(base, tmp_path / "tied", ensure_weight_tying=True, **config)
    model = lora_fx.rewrite(base, LoraConfig(ensure_weight_tying=True, **config))
    lora_fx.hotswap_adapter(model, folder)
    assert_close(model(**inputs).logits, lora_fx.load_adapter(base, folder)(**inputs).logits)


def test_a_folder_that_ties_no_head(tmp_path: Path) -> None:
    base, _ = tiny_llama(tie_word_embeddings=True)
    config = {"r": 2, "target_modules": ["embed_tokens"]}
    model = lora_fx.rewrite(base, LoraConfig(ensure_weight_tying=True, **config))
    with pytest.raises(CheckpointError, match=r"lm_head: .*embed_tokens is not tied to it"):
        lora_fx.hotswap_adapter(model, saved(base, tmp_path, **config))


def test_training_goes_on_in_the_prepared_shape() -> None:
    model = lora_fx.rewrite(Residual(), WIDE)
    model(IDS).sum().backward()
    lora_fx.prepare_hotswap(model, 6)
    optimizer = torch.optim.AdamW(lora_fx.trainable_parameters(model), lr=0.1)
    before = model.blocks[0].up.lora_A.default.detach().clone()
    model(IDS).sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].up.lora_A.default, before)


def test_an_inactive_adapter_is_swapped_without_being_activated(tmp_path: Path) -> None:
    base = Residual().eval()
    model = lora_fx.rewrite(base, WIDE)
    lora_fx.add_adapter(model, WIDE, "other")
    before = model(IDS)
    folder = saved(base, tmp_path, r=2)
    lora_fx.hotswap_adapter(model, folder, "other")
    assert_same_bits(model(IDS), before)
    lora_fx.set_adapter(model, "other")
    assert_close(model(IDS), lora_fx.load_adapter(base, folder)(IDS))


def test_nothing_is_compiled_anew(tmp_path: Path) -> None:
    base = Residual().eval()
    model = lora_fx.rewrite(base, LoraConfig(seed=0, r=2))
    lora_fx.prepare_hotswap(model, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(IDS)
    folders = [
        saved(base, tmp_path / "a", r=4, lora_alpha=7, seed=1),
        saved(base, tmp_path / "b", r=3, seed=2, target_modules=["up"]),
    ]
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for folder in folders:
            lora_fx.hotswap_adapter(model, folder)
            assert_close(compiled(IDS), lora_fx.load_adapter(base, folder)(IDS))


def test_a_folder_of_peft(tmp_path: Path) -> None:
    base = Residual().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=3, target_modules=["up", "down"], init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(tmp_path)
    model = lora_fx.rewrite(base, WIDE)
    lora_fx.hotswap_adapter(model, tmp_path)
    assert_close(model(IDS), theirs(IDS))


# --- errors: the model is as it was ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 5}, r"blocks\.0\.up: rank 5, and there is room for 4.*prepare_hotswap\(model, 5\)"),
        ({"target_modules": ["head"]}, "head: the model's adapter is not there"),
        ({"r": 2, "use_dora": True}, "the variants differ"),
        ({"modules_to_save": ["head"]}, r"head\.weight: only the folder's adapter trains it"),
        (
            {"r": 2, "trainable_token_indices": {"embed": [1, 3]}, "target_modules": ["up"]},
            r"embed: the folder's adapter trains its rows 1, 3, the model's none",
        ),
    ],
)
def test_misfits_are_listed(config: dict, message: str, tmp_path: Path) -> None:
    base = Residual().eval()
    model = lora_fx.rewrite(base, WIDE)
    folder = saved(base, tmp_path, **config)
    before = state(model)
    with pytest.raises(CheckpointError, match="nothing was changed:") as caught:
        lora_fx.hotswap_adapter(model, folder)
    caught.match(message)
    after = state(model)
    assert list(after) == list(before)
    assert_same_bits(after, before)
    assert lora_fx.adapter_names(model) == ("default",)


def test_a_misfit_leaves_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    base = Mlp()
    other = lora_fx.rewrite(base, LoraConfig(seed=0, r=4, target_modules=["first"]))
    other(torch.ones(3, 5))
    lora_fx.save_adapter(other, tmp_path)
    model = lora_fx.rewrite(base, LoraConfig(seed=0, r=2, target_modules=["first"]))
    before = state(model)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        lora_fx.hotswap_adapter(model, tmp_path)
    assert_same_bits(state(model), before)


def test_trained_biases_cannot_be_swapped(tmp_path: Path) -> None:
    base = Residual().eval()
    config = {"r": 2, "target_modules": ["up"], "bias": "all"}
    model = lora_fx.rewrite(base, LoraConfig(**config))
    folder = saved(base, tmp_path, **config)
    with pytest.raises(ConfigError, match=r"'default' trains biases .*lora_fx\.load_adapter"):
        lora_fx.hotswap_adapter(model, folder)
    assert_close(lora_fx.load_adapter(model, folder)(IDS), lora_fx.load_adapter(base, folder)(IDS))


def test_a_magnitude_that_the_folder_lacks(tmp_path: Path) -> None:
    base = Residual().eval()
    model = lora_fx.rewrite(base, LoraConfig(seed=0, r=2, use_dora=True))
    folder = saved(base, tmp_path, r=2, use_dora=True, target_modules=["up"])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.down: the folder has no magnitude"):
        lora_fx.hotswap_adapter(model, folder)


def test_bad_preparations(tmp_path: Path) -> None:
    model = lora_fx.rewrite(Residual(), WIDE)
    for rank, message in ((2, "has rank 4: rank=2"), (0, "rank: found 0"), (True, "found True")):
        with pytest.raises(ConfigError, match=message):
            lora_fx.prepare_hotswap(model, rank)
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        lora_fx.prepare_hotswap(model, 8, "other")
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        lora_fx.hotswap_adapter(model, tmp_path, "other")
    grouped = lora_fx.rewrite(
        nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), LoraConfig(seed=0, r=2, target_modules=["0"])
    )
    with pytest.raises(ConfigError, match="0 has 2 groups, which do not divide 3"):
        lora_fx.prepare_hotswap(grouped, 3)
