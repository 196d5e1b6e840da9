"""Adapters made of a fully tuned model: every form of a linear operation, models of libraries, and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CheckpointError, ConfigError, QuantizationError
from lora_fx.extraction import RankChoice
from lora_fx.passes.lowrank import allocate, decompose, spectrum
from tests.numerics import assert_close, relative_error
from tests.zoo import FORMS, TORCHVISION, TRANSFORMERS, Form, Tied, sample, seeded

FULL = 10**6


@torch.no_grad()
def tuned(base: nn.Module, scale: float = 0.1) -> nn.Module:
    """A copy in which every parameter and every batch-norm statistic has changed."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(7)

    def noise(value: torch.Tensor) -> torch.Tensor:
        return scale * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    for parameter in model.parameters():
        parameter.add_(noise(parameter) * parameter.abs().mean())
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.add_(noise(buffer).abs())
    return model


def called(model: nn.Module, inputs: Any) -> Any:
    model.eval()
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def distance(model: nn.Module, other: nn.Module, base: nn.Module, inputs: Any) -> float:
    """Difference of the outputs of two models, relative to the effect of tuning."""
    first, second, start = (
        getattr(called(one, inputs), "logits", called(one, inputs)) for one in (model, other, base)
    )
    first, second, start = (
        value if isinstance(value, torch.Tensor) else next(iter(value.values()))
        for value in (first, second, start)
    )
    return float((first - second).norm() / (second - start).norm())


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in FORMS])
def test_every_form_of_an_operation(form: Form, tmp_path: Path) -> None:
    base = form.model().double()
    after = tuned(base)
    adapted, report = lora_fx.extract_adapter(base, after, rank=FULL, return_report=True)
    x = form.x(torch.float64)
    assert [site.weight for site in report.sites] == [f"op.{form.weight}"]
    assert relative_error(adapted(x), base(x)) > 1e-4
    assert_close(adapted(x), after(x), 1e-12)
    lora_fx.save_adapter(adapted, tmp_path)
    assert_close(lora_fx.load_adapter(base, tmp_path)(x), after(x), 1e-12)
    merged = lora_fx.merge(adapted)
    for name, value in after.state_dict().items():
        assert_close(merged.state_dict()[name], value, 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "resnet18"])
def test_models_of_libraries(name: str, tmp_path: Path) -> None:
    base, inputs = (TRANSFORMERS.get(name) or TORCHVISION[name])()
    base.eval()
    after = tuned(base)
    adapted = lora_fx.extract_adapter(base, after, rank=FULL)
    assert distance(adapted, after, base, inputs) < 3e-6
    lora_fx.save_adapter(adapted, tmp_path)
    again = lora_fx.load_adapter(base, tmp_path)
    assert distance(again, after, base, inputs) < 3e-6
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert distance(theirs, after, base, inputs) < 3e-6


@pytest.mark.parametrize("form", [pytest.param(form, id=form.name) for form in FORMS[:1]])
def test_the_argument_is_not_changed(form: Form) -> None:
    base = form.model()
    before = copy.deepcopy(base.state_dict())
    lora_fx.extract_adapter(base, tuned(base))
    assert type(base.op) is nn.Linear
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[key])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(160, 200)
        self.second = nn.Linear(200, 150, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def planted(rank: int = 16) -> tuple[nn.Module, nn.Module]:
    """A model, and the same with changes of this rank."""
    base = seeded(Wide)()
    after = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (after.first, after.second):
            out, inner = layer.weight.shape
            left = torch.randn(out, rank, generator=generator)
            layer.weight += 0.01 * left @ torch.randn(rank, inner, generator=generator)
    return base, after


def test_a_planted_rank_is_recovered() -> None:
    base, after = planted()
    adapted, report = lora_fx.extract_adapter(base, after, rank=16, return_report=True)
    x = sample(5, 160)
    assert distance(adapted, after, base, x) < 1e-5
    assert all(site.error < 1e-5 for site in report.sites)
    assert report.saved_modules == report.values == ()
    assert report.unchanged == 1  # the bias


def test_the_rank_that_an_energy_needs() -> None:
    base, after = planted()
    _, report = lora_fx.extract_adapter(base, after, energy=1.0, return_report=True)
    assert [site.rank for site in report.sites] == [16, 16]
    _, report = lora_fx.extract_adapter(base, after, energy=0.5, return_report=True)
    for site, name in zip(report.sites, ("first", "second"), strict=True):
        change = after.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
        squares = torch.linalg.svdvals(change.detach().double()).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[site.rank - 1] >= 0.5 > shares[site.rank - 2]
        assert site.kept == pytest.approx(float(shares[site.rank - 1]), abs=1e-4)


def test_a_budget_goes_where_it_keeps_most() -> None:
    base, after = planted()
    with torch.no_grad():
        after.second.weight.copy_(
            base.second.weight + 0.01 * (after.second.weight - base.second.weight)
        )
    adapted, report = lora_fx.extract_adapter(base, after, budget=3_700, return_report=True)
    ranks = {site.name: site.rank for site in report.sites}
    assert ranks == {"first": 10}
    assert report.left_out == ("second",)
    assert report.parameters == 10 * 360 <= 3_700
    assert sum(p.numel() for p in lora_fx.trainable_parameters(adapted)) == report.parameters
    size = lora_fx.extract_adapter(base, after, budget="14.8 KB", return_report=True)[1]
    assert size.parameters == report.parameters


def test_greedy_shares_are_the_best_ones() -> None:
    """Against every choice of ranks of the same cost."""
    generator = torch.Generator().manual_seed(1)
    squares = {
        name: sorted(torch.rand(4, generator=generator).tolist(), reverse=True) for name in "abc"
    }
    ranks = allocate(squares, dict.fromkeys("abc", 10), 60)
    kept = sum(sum(squares[name][:rank]) for name, rank in ranks.items())
    best = max(
        sum(squares["a"][:i] + squares["b"][:j] + squares["c"][:k])
        for i in range(5)
        for j in range(5)
        for k in range(5)
        if i + j + k <= 6
    )
    assert sum(ranks.values()) == 6
    assert kept == pytest.approx(best)


def test_inputs_weigh_the_decomposition() -> None:
    """Inputs that are large in a few features: the outputs are closer then."""
    base = seeded(Wide)().eval()
    after = tuned(base, 0.5)
    scale = torch.full((160,), 0.05)
    scale[:8] = 5.0
    batches = [sample(64, 160) * scale]
    plain = lora_fx.extract_adapter(base, after, rank=4)
    weighted, report = lora_fx.extract_adapter(
        base, after, rank=4, inputs=batches, return_report=True
    )
    x = batches[0]
    change = x @ (after.first.weight - base.first.weight).T

    def error(model: nn.Module) -> float:
        layer: Any = model.get_submodule("first")
        product = layer.lora_B.default @ layer.lora_A.default
        return float((x @ product.T - change).norm() / change.norm())

    assert error(weighted) < 0.7 * error(plain)
    assert report.sites[0].output_error == pytest.approx(error(weighted), rel=1e-3)
    assert report.sites[0].error > 0.5


def test_a_factor_of_moments_is_optimal() -> None:
    """The singular values say how small the error of the outputs can be."""
    change = sample(1, 20, 30, dtype=torch.float64)
    root = torch.linalg.cholesky(torch.cov(sample(30, 100, dtype=torch.float64)))
    a, b = decompose(change, 3, root)
    least = torch.linalg.svdvals(change[0] @ root)[3:].norm()
    torch.testing.assert_close(torch.linalg.norm((change - b @ a)[0] @ root), least)
    torch.testing.assert_close(
        spectrum(change), torch.linalg.svdvals(change[0]).square(), atol=1e-9, rtol=1e-9
    )


def test_a_tied_head_shares_the_factors() -> None:
    tied = seeded(Tied)()
    after = tuned(tied)
    adapted, report = lora_fx.extract_adapter(tied, after, rank=FULL, return_report=True)
    ids = torch.tensor([[1, 2, 3]])
    assert_close(adapted(ids), after(ids), 1e-5)
    assert len([site for site in report.sites if site.weight.startswith("embed")]) <= 1


class Repeated(nn.Module):
    """A layer under two names, two layers that share a weight, and a bias with two names."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.same = nn.ModuleList([layer, layer])
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.bias = self.first.bias

    def forward(self, x):
        for layer in (*self.same, self.first, self.second):
            x = torch.tanh(layer(x))
        return x + self.bias


def test_parameters_with_several_names(tmp_path: Path) -> None:
    base = seeded(Repeated)()
    after = tuned(base)
    adapted, report = lora_fx.extract_adapter(base, after, rank=FULL, return_report=True)
    x = sample(3, 8)
    assert_close(adapted(x), after(x), 1e-5)
    assert {site.weight for site in report.sites} >= {"same.0.weight", "first.weight"}
    lora_fx.save_adapter(adapted, tmp_path)
    assert_close(lora_fx.load_adapter(base, tmp_path)(x), after(x), 1e-5)
    assert_close(lora_fx.merge(adapted)(x), after(x), 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["base tied", "tuned tied"])
def test_ends_that_tuning_has_tied_or_untied(tied: bool, tmp_path: Path) -> None:
    base, inputs = TRANSFORMERS["llama"](tie_word_embeddings=tied)
    other, _ = TRANSFORMERS["llama"](tie_word_embeddings=not tied)
    after = tuned(other)
    base.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned")
    adapted = lora_fx.extract_adapter(base, after, rank=FULL)
    assert distance(adapted, after, base, inputs) < 1e-5
    lora_fx.extract_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=FULL)
    again = lora_fx.load_adapter(base, tmp_path / "out")
    assert distance(again, after, base, inputs) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_bias_that_the_head_shares(tmp_path: Path) -> None:
    """BERT's language models have the bias of the decoder twice, and its weight is the embedding's."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    base = seeded(lambda: BertForMaskedLM(config).eval())()
    after = tuned(base)
    ids = {"input_ids": torch.tensor([[1, 5, 9, 3]])}
    adapted = lora_fx.extract_adapter(base, after, rank=FULL)
    assert distance(adapted, after, base, ids) < 1e-5
    lora_fx.save_adapter(adapted, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert distance(theirs, after, base, ids) < 1e-5
    _, report = lora_fx.extract_adapter(base, after, budget=3_000, return_report=True)
    assert report.parameters <= 3_000


def test_other_dtypes_and_wrappers() -> None:
    base, inputs = TRANSFORMERS["vit"]()
    half = copy.deepcopy(base).bfloat16()
    adapted = lora_fx.extract_adapter(half, tuned(base), rank=2)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora" not in n} == {torch.bfloat16}
    pixels = {key: value.bfloat16() for key, value in inputs.items()}
    assert torch.isfinite(called(adapted, pixels).logits).all()
    first, second = planted()
    wrapped = nn.DataParallel(second)
    adapted = lora_fx.extract_adapter(first, wrapped)
    assert distance(adapted, second, first, sample(2, 160)) < 1e-5


def test_statistics_alone() -> None:
    base = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))()
    after = copy.deepcopy(base)
    after[1].running_mean += 1
    adapted, report = lora_fx.extract_adapter(base, after, return_report=True)
    assert report.saved_modules == ("1",)
    x = sample(3, 4)
    assert_close(called(adapted, x), called(after, x), 1e-6)
    assert float(base[1].running_mean.abs().sum()) == 0


def test_a_new_head_is_stored_in_full(tmp_path: Path) -> None:
    """The difference to a head that starts at random would be another one the next time."""
    transformers = pytest.importorskip("transformers")
    base, inputs = TRANSFORMERS["llama"]()
    base.config.pad_token_id = 0
    base.save_pretrained(tmp_path / "base")

    def load(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            auto = transformers.AutoModelForSequenceClassification
            return auto.from_pretrained(tmp_path / "base").eval()

    first, second = load(0), load(1)
    after = tuned(first)
    adapted, report = lora_fx.extract_adapter(first, after, rank=FULL, return_report=True)
    assert "score" in report.saved_modules
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    again = lora_fx.load_adapter(second, tmp_path / "adapter")
    assert relative_error(called(second, inputs).logits, called(first, inputs).logits) > 1e-2
    assert_close(called(again, inputs).logits, called(after, inputs).logits, 1e-5)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, nn.Module, nn.Module, Any]:
    base, inputs = TRANSFORMERS["mixtral"]()
    after = tuned(base)
    base.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 3
    return tmp_path / "base", tmp_path / "tuned", base, after, inputs


@pytest.mark.filterwarnings("ignore")
def test_files_give_the_same_adapter(folders, tmp_path: Path) -> None:
    old, new, base, after, inputs = folders
    names: list[str] = []
    report = lora_fx.extract_files(
        old, new, tmp_path / "out", rank=FULL, progress=lambda done, total, name: names.append(name)
    )
    assert names == [site.name for site in report.sites]
    assert distance(lora_fx.load_adapter(base, tmp_path / "out"), after, base, inputs) < 3e-6
    in_memory = lora_fx.extract_adapter(base, new, rank=4)
    lora_fx.extract_files(old, new, tmp_path / "four", rank=4)
    from_files = lora_fx.load_adapter(base, tmp_path / "four")
    assert_close(called(from_files, inputs).logits, called(in_memory, inputs).logits, 1e-5)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert distance(theirs, after, base, inputs) < 3e-6


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, inputs = TRANSFORMERS["llama"]()
    base.config.pad_token_id = 0
    base.save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForSequenceClassification
    after = tuned(auto.from_pretrained(tmp_path / "base", num_labels=3)).eval()
    after.save_pretrained(tmp_path / "tuned")
    report = lora_fx.extract_files(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=FULL
    )
    assert "score" in report.saved_modules
    model = auto.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = lora_fx.load_adapter(model, tmp_path / "out")
    assert_close(called(adapted, inputs).logits, called(after, inputs).logits, 1e-5)


def test_bad_input(folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new, base, after, _ = folders
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="no parameter differs"):
        lora_fx.extract_adapter(base, copy.deepcopy(base))
    with pytest.raises(ConfigError, match="rank and energy are given"):
        lora_fx.extract_adapter(base, after, rank=3, energy=0.5)
    for options, words in (
        ({"rank": 0}, "rank: found 0"),
        ({"energy": 1.5}, "energy: found 1.5"),
        ({"budget": "3 furlongs"}, "budget '3 furlongs' is no size"),
        ({"budget": 5}, "5 parameters are too few"),
    ):
        with pytest.raises(ConfigError, match=words):
            lora_fx.extract_adapter(base, after, **options)
    with pytest.raises(ConfigError, match="has adapters already"):
        lora_fx.extract_adapter(base, lora_fx.extract_adapter(base, after))
    with pytest.raises(CheckpointError, match=r"is no tuned version.*it has no"):
        lora_fx.extract_adapter(base, nn.Linear(3, 3))
    resized = copy.deepcopy(after)
    resized.resize_token_embeddings(50)
    with pytest.raises(CheckpointError, match="resize the base first"):
        lora_fx.extract_adapter(base, resized)
    quantized = lora_fx.quantize(TRANSFORMERS["llama"]()[0], "int8")
    with pytest.raises(QuantizationError, match="extract from dense models"):
        lora_fx.extract_adapter(TRANSFORMERS["llama"]()[0], quantized)
    broken = copy.deepcopy(after)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has values that are not finite"
    ):
        lora_fx.extract_adapter(base, broken)
    with pytest.raises(ConfigError, match=r"no batch|empty"):
        lora_fx.extract_adapter(base, after, inputs=[])
    with pytest.raises(ConfigError, match="is the folder of a model"):
        lora_fx.extract_files(old, new, old)
    shard = sorted(new.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        lora_fx.extract_files(old, new, out)
    with pytest.raises(ConfigError, match="is not a folder"):
        lora_fx.extract_files(old, tmp_path / "nowhere", out)
    assert not out.exists()


def test_an_adapter_is_not_replaced_without_force(folders, tmp_path: Path) -> None:
    old, new, *_ = folders
    lora_fx.extract_files(old, new, tmp_path / "out", rank=2)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds an adapter already"):
        lora_fx.extract_files(old, new, tmp_path / "out", rank=3)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    lora_fx.extract_files(old, new, tmp_path / "out", rank=3, force=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_a_report_is_text_json_and_a_picture(tmp_path: Path) -> None:
    base, after = planted()
    with torch.no_grad():
        after.first.bias += 1
    _, report = lora_fx.extract_adapter(base, after, rank=4, return_report=True)
    lines = str(report).splitlines()
    assert lines[0].startswith("2 site(s), 3,040 parameters, rank 4, ")
    assert any(line.startswith("  second: rank 4 of 150, changed by") for line in lines)
    assert lines[-1] == "in full, by their names: first.bias"
    assert '"rank": 4' in report.to_json()
    assert "output error" in report._repr_html_()
    page = lora_fx.visualize(report, tmp_path / "lost.html").read_text(encoding="utf-8")
    assert "rank 4, " in page
    assert "Extraction" in page
    assert RankChoice.of() == RankChoice(rank=16)


def test_the_command(folders, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lora_fx.tools.cli.app import app

    old, new, base, after, inputs = folders
    out, picture = tmp_path / "out", tmp_path / "lost.svg"

    def run(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["extract", str(old), f"hf:{new}", *options])
        return result.exit_code, " ".join(result.output.split())

    code, text = run("-o", str(out), "--rank", str(FULL), "--picture", str(picture))
    assert code == 0, text
    assert "100 % of ‖ΔW‖² kept" in text
    assert text.endswith(f"wrote {out}")
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert distance(lora_fx.load_adapter(base, out), after, base, inputs) < 3e-6
    code, text = run("-o", str(out))
    assert code == 2
    assert "holds an adapter already" in text
    assert run("--rank", "2")[0] == 2
