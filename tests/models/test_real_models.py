"""Models that people train: rewritten through every front-end that applies, trained, and used."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError
from lora_fx.tools.zoo import job
from lora_fx.tools.zoo.job import in_fp64
from tests import zoo
from tests.algebra import randomize
from tests.numerics import assert_close, assert_same_bits, relative_error, tensors
from tests.zoo import seeded

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

CONFIG = lora_fx.LoraConfig(r=4, lora_dropout=0.0)

MODELS = {
    **{f"torchvision.{name}": build for name, build in zoo.TORCHVISION.items()},
    **{f"timm.{name}": build for name, build in zoo.TIMM.items()},
    **zoo.TRANSFORMERS,
}
TRANSFORMERS = list(zoo.TRANSFORMERS)
GENERATES = ["llama", "gpt2", "t5", "whisper", "mixtral"]
# torch.export takes minutes over windows of any size: see test_written_out_torchvision.
EXPORTED_SLOWLY = {"torchvision.swin", "torchvision.swin_v2", "torchvision.swin3d"}
BATCH_NORM = ["torchvision.resnet18", "timm.resnet", "timm.efficientnet"]

FRONTENDS = {
    "auto": (None, False),
    "auto, inputs": (None, True),
    "regions": ("regions", False),
    "symbolic": ("symbolic", False),
    "export": ("export", True),
}


@functools.cache
def built(name: str) -> tuple[nn.Module, Any]:
    return MODELS[name]()


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model that all tests share, since nothing may change it, and arguments for it."""
    model, inputs = built(name)
    return model, {"x": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(*inputs.values()) if list(inputs) == ["x"] else model(**inputs)


def loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return sum(t.float().square().mean() for t in tensors(run(model, inputs)))


def rewrite(name: str, frontend: str = "auto", config: Any = CONFIG) -> tuple[nn.Module, ...]:
    """The model, its rewritten form, and inputs."""
    wanted, with_inputs = FRONTENDS[frontend]
    model, inputs = build(name)
    if wanted == "symbolic" and name in zoo.TRANSFORMERS:
        with pytest.raises(CaptureError, match="no required argument"):
            lora_fx.capture(model, frontend="symbolic")
        pytest.skip("takes everything as keywords: has no symbolic trace")
    if wanted == "export" and name in EXPORTED_SLOWLY:
        pytest.skip("takes minutes")
    examples = None
    if with_inputs:
        examples = tuple(inputs.values()) if list(inputs) == ["x"] else inputs
    rewritten = lora_fx.rewrite(model, config, examples, frontend=wanted or "auto")
    return model, rewritten, inputs


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


# --- every site ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", ["auto, inputs", "regions", "export"])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_the_dense_oracle(name, frontend):
    """Outputs and the gradients of every A and B, beside the original with W' = W + s·BA in it."""
    wanted, with_inputs = FRONTENDS[frontend]
    model, inputs = build(name)
    if wanted == "export" and name in EXPORTED_SLOWLY:
        pytest.skip("takes minutes")
    given = tuple(inputs.values()) if list(inputs) == ["x"] else inputs
    exact = in_fp64(model, given)
    original, given, narrowest = exact or (model, given, torch.float32)
    adapted = lora_fx.rewrite(
        original, CONFIG, given if with_inputs else None, frontend=wanted or "auto"
    )

    def call(either):
        output = either(**given) if isinstance(given, dict) else either(*given)
        return output, sum(t.square().mean() for t in tensors(output))

    verdict = job.judge(original, adapted.eval(), call, narrowest)
    assert verdict.right, verdict
    assert not verdict.unreached
    assert len(verdict.judged) == len(lora_fx.plan(model, CONFIG))
    assert exact is not None or name == "mixtral"  # its grouped products are in fp32


def test_shifted_windows_of_timm_without_example_inputs():
    model, x = zoo.timm_model(
        "swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    )
    model, x = model.double(), x.double()
    adapted = lora_fx.rewrite(model, CONFIG).eval()

    def call(either):
        output = either(x)
        return output, output.square().mean()

    assert job.judge(model, adapted, call, torch.float64).right


# --- every model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_rewrite_changes_no_bit(name, frontend):
    model, rewritten, inputs = rewrite(name, frontend)
    wanted, _ = FRONTENDS[frontend]
    if wanted:
        assert rewritten._lora_fx.frontend == wanted
    assert isinstance(rewritten, type(model))
    with torch.no_grad():
        found, expected = run(rewritten.eval(), inputs), run(model, inputs)
    if name == "torchvision.vit_b_16":
        # In eval nn.MultiheadAttention is one fused kernel, which rounds otherwise than its parts.
        assert_close(found, expected, 1e-6)
    else:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_with_gradients_it_rounds_as_without_or_nearly(name):
    """torchvision's attention takes another kernel where its input wants a gradient."""
    model, rewritten, inputs = rewrite(name)
    with torch.no_grad():
        expected = run(model, inputs)
    error = relative_error(run(rewritten.eval(), inputs), expected)
    assert error <= (1e-6 if name == "torchvision.vit_b_16" else 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_the_adapters_and_nothing_else(name):
    model, rewritten, inputs = rewrite(name)
    before, wants = state(model), [p.requires_grad for p in model.parameters()]
    modules = list(model.named_modules())
    randomize(rewritten, 0.02)
    optimizer = torch.optim.SGD(lora_fx.trainable_parameters(rewritten), lr=0.1)
    rewritten.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss(rewritten, inputs).backward()
        for parameter_name, parameter in rewritten.named_parameters():
            adapter = ".lora_" in parameter_name
            assert parameter.requires_grad == adapter, parameter_name
            assert (parameter.grad is not None) == adapter, parameter_name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name
        optimizer.step()
    assert_same_bits(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == wants
    assert list(model.named_modules()) == modules
    assert not model.training
    moved = [k for k, v in rewritten.state_dict().items() if k in before and v.ne(before[k]).any()]
    assert all("running_" in k or "num_batches" in k for k in moved), moved
    assert bool(moved) == (name in BATCH_NORM)


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_adapted(name):
    model, rewritten, inputs = rewrite(name)
    randomize(rewritten, 0.05).eval()
    merged = lora_fx.merge(rewritten)
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    assert merged.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert_close(run(merged, inputs), run(rewritten, inputs), 1e-5)
        assert relative_error(run(merged, inputs), run(model, inputs)) > 1e-4


@pytest.mark.parametrize("frontend", ["auto", "export"])
@pytest.mark.parametrize("name", BATCH_NORM)
def test_statistics_are_learnt_and_merged(name, frontend):
    _, rewritten, inputs = rewrite(name, frontend)
    rewritten.train()
    with torch.no_grad():
        run(rewritten, inputs)
    merged = lora_fx.merge(rewritten.eval()).eval()
    assert_same_bits(list(merged.buffers()), list(rewritten.buffers()))
    with torch.no_grad():
        assert_same_bits(run(merged, inputs), run(rewritten, inputs))


@pytest.mark.parametrize("name", ["torchvision.resnet18", "timm.vit", "llama", "bert", "t5"])
def test_a_copy_of_a_rewritten_model_is_one(name, tmp_path):
    _, rewritten, inputs = rewrite(name)
    randomize(rewritten, 0.05).eval()
    torch.save(rewritten, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(rewritten),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        with torch.no_grad():
            assert_same_bits(run(other, inputs), run(rewritten, inputs))


@pytest.mark.parametrize("name", ["torchvision.resnet18", "timm.convnext", "llama", "bert"])
def test_half_precision(name):
    model, inputs = build(name)
    model = copy.deepcopy(model).to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    rewritten = lora_fx.rewrite(model, CONFIG).eval()
    with torch.no_grad():
        assert_same_bits(run(rewritten, inputs), run(model, inputs))
    loss(rewritten.train(), inputs).backward()
    factors = list(lora_fx.trainable_parameters(rewritten))
    assert {p.dtype for p in factors} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in factors)


def test_the_switch_for_checkpointing_of_timm_still_works():
    _, rewritten, inputs = rewrite("timm.mixer")
    randomize(rewritten, 0.05).train()
    loss(rewritten, inputs).backward()
    expected = [p.grad for p in lora_fx.trainable_parameters(rewritten)]
    other = copy.deepcopy(rewritten)
    other.zero_grad()
    other.set_grad_checkpointing(True)
    calls = []
    other.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss(other, inputs).backward()
    assert len(calls) == 2, "a block under a checkpoint runs twice"
    assert_same_bits([p.grad for p in lora_fx.trainable_parameters(other)], expected)


# --- transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_is_still_a_pretrained_model(name):
    from transformers import PreTrainedModel

    model, rewritten, _ = rewrite(name)
    assert isinstance(rewritten, PreTrainedModel)
    assert rewritten.config.to_dict() == model.config.to_dict()
    assert rewritten.config is not model.config
    assert rewritten.dtype == model.dtype
    assert rewritten.device == model.device
    assert rewritten.main_input_name == model.main_input_name
    assert rewritten.num_parameters() > model.num_parameters()
    if name != "clip":  # it has two of them, and says so
        embeddings = type(model.get_input_embeddings())
        assert isinstance(rewritten.get_input_embeddings(), embeddings)


def generated(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    first = {k: v for k, v in inputs.items() if k in ("input_ids", "input_features")}
    if "input_ids" in first:
        first["attention_mask"] = torch.ones_like(first["input_ids"])
    return model.generate(**first, max_new_tokens=6, do_sample=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GENERATES)
def test_generate(name):
    model, rewritten, inputs = rewrite(name)
    expected = generated(model, inputs)
    assert expected.shape[1] > 4
    assert torch.equal(generated(rewritten.eval(), inputs), expected)
    merged = lora_fx.merge(randomize(rewritten, 0.5))
    assert torch.equal(generated(rewritten, inputs), generated(merged, inputs))


@pytest.mark.filterwarnings("ignore")
def test_generate_of_an_exported_capture():
    """The graph holds for calls without a cache; the others take the model's own forward."""
    model, rewritten, inputs = rewrite("llama", "export")
    assert torch.equal(generated(rewritten.eval(), inputs), generated(model, inputs))
    randomize(rewritten, 0.5)
    assert torch.equal(generated(rewritten, inputs), generated(lora_fx.merge(rewritten), inputs))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradient_checkpointing(name):
    _, rewritten, inputs = rewrite(name)
    randomize(rewritten, 0.05).train()
    torch.manual_seed(0)
    loss(rewritten, inputs).backward()
    expected = [p.grad.clone() for p in lora_fx.trainable_parameters(rewritten)]
    rewritten.zero_grad()
    rewritten.gradient_checkpointing_enable()
    calls = []
    for module in rewritten.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(lambda m, _: calls.append(m))
    torch.manual_seed(0)
    loss(rewritten, inputs).backward()
    assert len(calls) > len(set(calls)), "a layer under a checkpoint runs twice"
    found = [p.grad for p in lora_fx.trainable_parameters(rewritten)]
    assert_close(found, expected, 1e-6)


def compiled_steps(name: str, backend: str) -> None:
    torch._dynamo.reset()
    _, rewritten, inputs = rewrite(name)
    randomize(rewritten, 0.05).eval()
    expected = run(rewritten, inputs)
    loss(rewritten, inputs).backward()
    gradients = [p.grad.clone() for p in lora_fx.trainable_parameters(rewritten)]
    rewritten.zero_grad()
    compiled = torch.compile(rewritten, fullgraph=True, backend=backend)
    assert_close(run(compiled, inputs), expected, 1e-5)
    loss(compiled, inputs).backward()
    assert_close([p.grad for p in lora_fx.trainable_parameters(rewritten)], gradients, 1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "bert", "timm.vit", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_compiles_whole(name):
    compiled_steps(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"llama", "bert", "timm.vit", "t5"}))
def test_all_others_compile_whole(name):
    if name == "mixtral":
        pytest.skip("its experts loop over data: the original does not compile whole either")
    compiled_steps(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "torchvision.resnet18"])
def test_compiles_by_inductor(name):
    compiled_steps(name, "inductor")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_trainer(name, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, rewritten, inputs = rewrite(name)
    before = state(model)
    labels = inputs["input_ids"] if name == "llama" else torch.tensor([0, 1])
    rows = [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(inputs["input_ids"], labels, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=name == "llama",
    )
    frozen = {n: p.clone() for n, p in rewritten.named_parameters() if not p.requires_grad}
    trainer = Trainer(model=rewritten, args=arguments, train_dataset=rows)
    result = trainer.train()
    assert result.global_step == 2
    assert 0 < result.training_loss < 100
    assert all(p.abs().sum() > 0 for n, p in rewritten.named_parameters() if ".lora_B" in n)
    after = dict(rewritten.named_parameters())
    assert_same_bits({n: after[n] for n in frozen}, frozen)
    assert_same_bits(state(model), before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_merged_model_is_saved_and_loaded(name, tmp_path):
    model, rewritten, inputs = rewrite(name)
    merged = lora_fx.merge(randomize(rewritten, 0.05)).eval()
    merged.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_same_bits(run(loaded, inputs), run(merged, inputs))


# --- full sizes --------------------------------------------------------------------------------------


@seeded
def _torchvision(name: str) -> tuple[nn.Module, torch.Tensor]:
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, 224, 224)


@seeded
def _timm(name: str) -> tuple[nn.Module, torch.Tensor]:
    import timm

    model = timm.create_model(name, pretrained=False).eval()
    return model, torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])


FULL = {
    "resnet18": functools.partial(_torchvision, "resnet18"),
    "vit_b_16": functools.partial(_torchvision, "vit_b_16"),
    **{
        name: functools.partial(_timm, name)
        for name in (
            "vit_tiny_patch16_224",
            "resnet18",
            "convnext_atto",
            "mixer_s32_224",
            "efficientnet_b0",
            "swin_tiny_patch4_window7_224",
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_at_full_size_a_rewrite_changes_no_bit(name, frontend):
    wanted, with_inputs = FRONTENDS[frontend]
    model, x = FULL[name]()
    rewritten = lora_fx.rewrite(
        model, CONFIG, x if with_inputs else None, frontend=wanted or "auto"
    )
    with torch.no_grad():
        error = relative_error(rewritten.eval()(x), model(x))
    assert error <= (2e-6 if name == "vit_b_16" else 0.0)
    loss(rewritten.train(), {"x": x}).backward()
    for parameter_name, parameter in rewritten.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in parameter_name)
