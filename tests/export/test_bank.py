"""Files with a bank of adapters: what each row of a batch computes, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoraConfig, OnnxSession, save_onnx_adapter
from lora_fx.errors import CheckpointError, ConfigError, ExportError
from lora_fx.export.adapter_file import manifest_of_file
from lora_fx.export.adapter_manifest import MANIFEST_KEY, SLOTS_INPUT, Manifest
from lora_fx.export.inspection import State, examine_file
from lora_fx.export.onnx import export_onnx
from lora_fx.export.report import ExportReport
from tests.export.swapping import Net, ids, trained
from tests.export.tiny import VOCABULARY, example, generator

EXACT = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ("plain", "dora", "biased")
MIXED = ["dora", None, "plain", "biased", "plain", None]


class Folds(nn.Module):
    """Linear layers over rows that are folded: windows of each sample lie one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 4)
        return self.outer(self.inner(windows).tanh()).reshape(x.shape[0], -1, 3)


class Convolves(nn.Module):
    """Convolutions of one and two dimensions, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.third = nn.Conv1d(6, 5, 3, dilation=2, padding="same")
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.third(x.flatten(2)).mean(2))


class Compares(nn.Module):
    """Similarities of each row with each."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x @ x.T


class Swaps(nn.Module):
    """The sequence comes first where the layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(0, 1)).transpose(0, 1)


class Mixes(nn.Module):
    """The result belongs to the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x - x.mean(0, keepdim=True)


def adapted() -> nn.Module:
    """Lookups, a raw product, attention and 2-D layers, with plain, DoRA and biased adapters."""
    torch.manual_seed(0)
    places = ["embed", "attention", "raw", "fc", "pool"]
    everywhere = LoraConfig(r=4, lora_alpha=6, rank_pattern={"fc": 2}, target_modules=places)
    model = lora_fx.rewrite(Net().eval(), everywhere, adapter_name="plain")
    dora = LoraConfig(r=2, use_dora=True, target_modules=["fc", "raw", "attention"])
    lora_fx.add_adapter(model, dora, "dora")
    biased = LoraConfig(r=3, lora_bias=True, target_modules=["pool", "raw", "fc"])
    lora_fx.add_adapter(model, biased, "biased")
    return trained(model)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return adapted()


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, model: nn.Module
) -> tuple[Path, ExportReport]:
    file = tmp_path_factory.mktemp("bank") / "net.onnx"
    return file, export_onnx(model, file, ids(2, 7), adapters="bank")


@pytest.fixture
def session(exported: tuple[Path, ExportReport]) -> OnnxSession:
    return OnnxSession(exported[0], "cpu")


def row_by_row(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    """What PyTorch makes of each row by itself, with its adapter."""
    rows = []
    for row, name in zip(x, names, strict=True):
        with torch.no_grad(), lora_fx.disable_adapter(model):
            if name is not None:
                lora_fx.set_adapter(model, name)
        if name is None:
            with torch.no_grad(), lora_fx.disable_adapter(model):
                rows.append(model(row[None]))
        else:
            with torch.no_grad():
                rows.append(model(row[None]))
    return torch.cat(rows)


def rewritten(base: nn.Module, rank: int = 3, **options: Any) -> nn.Module:
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, **options)
    return lora_fx.rewrite(base.eval(), config)


# --- what the file computes -----------------------------------------------------------------------


def test_each_row_has_its_adapter(session: OnnxSession, model: nn.Module) -> None:
    x = ids(len(MIXED), 4, seed=2)
    want = row_by_row(model, x, MIXED)
    torch.testing.assert_close(session.run(x, adapter=MIXED)["output"], want, **EXACT)
    assert session.adapters == NAMES
    others = [*MIXED[1:], MIXED[0]]
    again = session.run(x, adapter=tuple(others))["output"]
    torch.testing.assert_close(again, row_by_row(model, x, others), **EXACT)
    assert not torch.allclose(want, again, **EXACT)
    peft = [name or "__base__" for name in MIXED]
    torch.testing.assert_close(session.run(x, adapter=peft)["output"], want, **EXACT)
    with pytest.raises(ExportError, match=r"feeds adapter_ids of net\.onnx itself.*adapter='name'"):
        session.run({"ids": x, SLOTS_INPUT: torch.zeros(len(x), dtype=torch.long)})
    with pytest.raises(ConfigError, match="the name of an adapter is '__base__'"):
        session.load_adapter("__base__", model, adapter_name="dora")


@pytest.mark.parametrize("name", [*NAMES, None])
def test_a_single_name_is_that_of_all_rows(
    session: OnnxSession, model: nn.Module, name: str | None
) -> None:
    x = ids(3, 6)
    want = row_by_row(model, x, [name] * 3)
    torch.testing.assert_close(session.run(x, adapter=name)["output"], want, **EXACT)
    torch.testing.assert_close(session.run(x, adapter=[name] * 3)["output"], want, **EXACT)


def test_other_programs_give_ids(exported: tuple[Path, ExportReport], model: nn.Module) -> None:
    stock = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    x = ids(4, 3)
    for given, names in (
        ([-1], [None] * 4),
        ([1], ["dora"] * 4),
        ([0, -1, 2, -7], ["plain", None, "biased", None]),
    ):
        (got,) = stock.run(None, {"ids": x.numpy(), SLOTS_INPUT: np.array(given, np.int64)})
        torch.testing.assert_close(torch.from_numpy(got), row_by_row(model, x, names), **EXACT)
    for wrong in (3, 10**9, 2**62):
        with pytest.raises(Exception, match=r"out of data bounds|idx"):
            stock.run(None, {"ids": x.numpy(), SLOTS_INPUT: np.array([0, 1, 2, wrong])})
    with pytest.raises(ValueError, match=r"Required inputs.*adapter_ids"):
        stock.run(None, {"ids": x.numpy()})


def test_the_report_says_how_much_there_is_room_for(
    exported: tuple[Path, ExportReport],
) -> None:
    path, report = exported
    assert report.bank is not None
    assert (report.bank.adapters, report.bank.capacity, report.bank.rank) == (NAMES, 8, 4)
    assert manifest_of_file(path).bank == report.bank
    rows = [row.name for row in report.parity]
    assert "output with an adapter for each row" in rows
    assert "output with a random adapter for each row" in rows
    assert report.max_rel_error < 1e-5
    assert "3 of at most 8 adapters, filled up to rank 4" in str(report)
    found = {one.name: one for one in examine_file(path)}
    assert found["bank"].detail == "3 of at most 8 adapters, filled up to rank 4"
    assert found["in the file"].detail == "plain, dora, biased"
    assert found["inputs"].state is State.OK


def test_versions_without_banks_do_not_take_the_file_for_another(
    exported: tuple[Path, ExportReport],
) -> None:
    manifest = json.loads(OnnxSession(exported[0], "cpu").metadata[MANIFEST_KEY])
    assert manifest["format"] == 2
    del manifest["bank"]
    with pytest.raises(ExportError, match=r"damaged.*export it again"):
        Manifest.from_metadata({MANIFEST_KEY: json.dumps(manifest)})


def test_checkers_accept_the_file(exported: tuple[Path, ExportReport]) -> None:
    onnx.checker.check_model(str(exported[0]), full_check=True)
    proto = onnx.load(exported[0])
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert {one.domain for one in proto.opset_import} == {""}


def test_ids_that_a_tool_folded_away_are_found(
    tmp_path: Path, exported: tuple[Path, ExportReport]
) -> None:
    proto = onnx.load(exported[0])
    kept = [one for one in proto.graph.input if one.name != SLOTS_INPUT]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    onnx.save(proto, tmp_path / "folded.onnx")
    found = {one.name: one for one in examine_file(tmp_path / "folded.onnx")}
    assert found["inputs"].state is State.PROBLEM
    assert SLOTS_INPUT in found["inputs"].detail


def test_rows_that_are_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = rewritten(Folds())
    lora_fx.add_adapter(
        model,
        LoraConfig(r=2, target_modules="all-linear", use_dora=True, init_lora_weights=False),
        "dora",
    )
    trained(model)
    export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 6, 4), adapters="bank")
    x, names = torch.randn(3, 8, 4), ["dora", None, "default"]
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    got = session.run(x, adapter=names)["output"]
    torch.testing.assert_close(got, row_by_row(model, x, names), **EXACT)
    got = session.run(x, adapter="dora")["output"]
    torch.testing.assert_close(got, row_by_row(model, x, ["dora"] * 3), **EXACT)


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    places = {"target_modules": ["first", "second", "third"], "init_lora_weights": False}
    model = lora_fx.rewrite(Convolves().eval(), LoraConfig(r=4, **places))
    lora_fx.add_adapter(model, LoraConfig(r=2, use_dora=True, **places), "dora")
    biased = LoraConfig(r=3, lora_bias=True, **{**places, "target_modules": ["first", "third"]})
    lora_fx.add_adapter(model, biased, "biased")
    trained(model)
    export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 3, 12, 12), adapters="bank")
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    x, names = torch.randn(4, 3, 10, 14), ["dora", None, "biased", "default"]
    got = session.run(x, adapter=names)["output"]
    torch.testing.assert_close(got, row_by_row(model, x, names), **EXACT)
    for name in names:
        got = session.run(x, adapter=name)["output"]
        torch.testing.assert_close(got, row_by_row(model, x, [name] * 4), **EXACT)


@pytest.mark.parametrize("dtype", ["fp16"])
def test_half_precision(tmp_path: Path, model: nn.Module, dtype: Any) -> None:
    report = export_onnx(model, tmp_path / "m.onnx", ids(2, 7), adapters="bank", dtype=dtype)
    assert report.verified
    x = ids(len(MIXED), 4)
    got = OnnxSession(report.path, "cpu").run(x, adapter=MIXED)["output"]
    torch.testing.assert_close(got.float(), row_by_row(model, x, MIXED), rtol=2e-2, atol=2e-2)


# --- what is added later --------------------------------------------------------------------------


def test_adapters_are_added_and_replaced(
    tmp_path: Path, exported: tuple[Path, ExportReport], session: OnnxSession, model: nn.Module
) -> None:
    other = adapted()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    lora_fx.save_adapter(other, tmp_path / "folder", adapter_name="plain")
    save_onnx_adapter(other, tmp_path / "d.onnx_adapter", adapter_name="dora")
    session.load_adapter("folder", other, adapter_name="plain")
    session.load_adapter("file", tmp_path / "d.onnx_adapter")
    x = ids(4, 5)
    names: list[Any] = ["plain", "folder", "file", "dora"]
    here, there = row_by_row(model, x, ["plain"] * 4), row_by_row(other, x, ["plain"] * 4)
    dora, changed = row_by_row(model, x, ["dora"] * 4), row_by_row(other, x, ["dora"] * 4)
    want = torch.stack([here[0], there[1], changed[2], dora[3]])
    torch.testing.assert_close(session.run(x, adapter=names)["output"], want, **EXACT)
    session.load_adapter("plain", other, adapter_name="plain")
    want[0] = there[0]
    torch.testing.assert_close(session.run(x, adapter=names)["output"], want, **EXACT)
    session.unload_adapter("dora")
    with pytest.raises(ConfigError, match=r"no adapter 'dora'.*load_adapter"):
        session.run(x, adapter=names)
    got = session.run(x, adapter=[*names[:3], None])["output"]
    torch.testing.assert_close(got[:3], want[:3], **EXACT)
    # A slot that is free again is taken.
    session.load_adapter("again", model, adapter_name="dora")
    got = session.run(x, adapter=[*names[:3], "again"])["output"]
    torch.testing.assert_close(got, want, **EXACT)


def test_adapters_are_read_from_files_of_their_own(tmp_path: Path, model: nn.Module) -> None:
    file = tmp_path / "net.onnx"
    report = export_onnx(model, file, ids(2, 7), adapters="bank", external_data_bytes=0)
    assert report.data_files
    session = OnnxSession(file, "cpu", low_memory=True)
    x = ids(len(MIXED), 4)
    want = session.run(x, adapter=MIXED)["output"]
    session.load_adapter("other", model, adapter_name="dora")
    got = session.run(x, adapter=["other", *MIXED[1:]])["output"]
    torch.testing.assert_close(got, want, **EXACT)
    (tmp_path / report.data_files[0]).unlink()
    session.unload_adapter("other")  # what was read once is kept


def test_what_has_begun_ends_with_what_it_had(session: OnnxSession, model: nn.Module) -> None:
    held = session._store.chosen(["plain", "biased"])
    x = ids(2, 4)
    want = session.run(x, adapter=["plain", "biased"])["output"]
    session.unload_adapter("plain")
    session.load_adapter("other", model, adapter_name="dora")
    torch.testing.assert_close(session.run(x, adapter=held)["output"], want, **EXACT)  # type: ignore[arg-type]


def test_the_stacks_are_bound_once_for_all_choices(
    session: OnnxSession, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.load_adapter("other", model, adapter_name="dora")
    made: list[object] = []
    make = session._session.io_binding
    monkeypatch.setattr(session._session, "io_binding", lambda: made.append(1) or make())
    x = ids(2, 4)
    for choice in (["plain", None], ["dora", "plain"], "biased", None):
        named = choice if isinstance(choice, list) else [choice] * 2
        found = session.run(x, adapter=choice)["output"]
        torch.testing.assert_close(found, row_by_row(model, x, named), **EXACT)
    assert len(made) == 1


def test_a_plain_model_has_an_empty_bank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Folds().eval()
    file = tmp_path / "m.onnx"
    report = export_onnx(
        base, file, torch.randn(2, 6, 4), adapters="bank", max_adapters=2, max_rank=4
    )
    assert report.bank is not None
    assert (report.bank.adapters, report.bank.capacity, report.bank.rank) == ((), 2, 4)
    session = OnnxSession(file, "cpu")
    assert session.adapters == ()
    x = torch.randn(2, 4, 4)
    torch.testing.assert_close(session.run(x)["output"], base(x), **EXACT)
    # The head of the plain model has no place.
    fits = lora_fx.rewrite(base, LoraConfig(r=4, init_lora_weights=False))
    session.load_adapter("fits", fits)
    got = session.run(x, adapter=[None, "fits"])["output"]
    torch.testing.assert_close(got, torch.stack([base(x)[0], fits.eval()(x)[1]]), **EXACT)


# --- what is refused ------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(
    session: OnnxSession, model: nn.Module, exported: tuple[Path, ExportReport]
) -> None:
    before = session.run(ids(2, 4), adapter=["plain", "dora"])["output"]
    large = trained(lora_fx.rewrite(Net().eval(), LoraConfig(r=5, target_modules=["fc"])))
    with pytest.raises(CheckpointError, match=r"'large'.*rank 4: fc has rank 5.*max_rank=5"):
        session.load_adapter("large", large)
    stranger = trained(lora_fx.rewrite(Net().eval(), LoraConfig(r=2, target_modules=["head"])))
    with pytest.raises(CheckpointError, match=r"head: the file takes no adapter there"):
        session.load_adapter("stranger", stranger)
    fits = trained(lora_fx.rewrite(Net().eval(), LoraConfig(r=2, target_modules=["fc"])))
    for number in range(5):
        session.load_adapter(f"more{number}", fits)
    with pytest.raises(ConfigError, match=r"full, it has 'plain', 'dora'.*max_adapters above 8"):
        session.load_adapter("one more", fits)
    session.load_adapter("plain", model, adapter_name="plain")  # what replaces one still has room
    after = session.run(ids(2, 4), adapter=["plain", "dora"])["output"]
    torch.testing.assert_close(after, before, **EXACT)
    for adapter, words in (
        (["plain"], "has 1 names, and the batch for net.onnx has 2 rows"),
        (["plain", "gone"], "no adapter 'gone'"),
        ([], "empty list"),
        ([["plain"], "dora"], r"no adapter \['plain'\]"),
        (np.array(["plain", "dora"]), "no adapter array"),
        ({"plain": 1.0, "dora": 0.5}, "'plain' and 'dora'|'plain', 'dora'"),
    ):
        with pytest.raises(ConfigError, match=words):
            session.run(ids(2, 4), adapter=adapter)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"bank of adapters.*cuda_graph"):
        session._static_runner(session._store.takes, 4)


def test_a_file_without_a_bank_takes_no_list(tmp_path: Path) -> None:
    model = rewritten(Folds())
    export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 6, 4), adapters="inputs")
    session = OnnxSession(tmp_path / "m.onnx", "cpu")
    session.load_adapter("a", model)
    with pytest.raises(ConfigError, match="adapters='bank'"):
        session.run(torch.randn(2, 4, 4), adapter=["a", None])


@pytest.mark.parametrize(
    ("make", "x", "words"),
    [
        (Swaps, torch.randn(2, 3, 4), r"Swaps takes no bank.*fc\.weight.*adapters='inputs'"),
        (Compares, torch.randn(2, 4), r"output 'output' of shape \[2, 2\] has no row for each"),
        (Mixes, torch.randn(2, 4), r"Mixes takes no bank.*several samples.*adapters='inputs'"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)),
            torch.randn(2, 4),
            "no row for each",
        ),
    ],
)
def test_models_whose_rows_are_not_seen_are_refused(
    tmp_path: Path, make: Any, x: Tensor, words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        export_onnx(rewritten(make()), tmp_path / "m.onnx", x, adapters="bank")
    assert not list(tmp_path.iterdir())


def test_places_that_take_one_adapter_at_a_time_are_refused(tmp_path: Path) -> None:
    places = ["grouped", "transposed", "fc"]
    model = lora_fx.rewrite(Net().eval(), LoraConfig(r=2, target_modules=places))
    with pytest.raises(
        ExportError, match=r"at grouped, transposed: a convolution with groups"
    ) as e:
        export_onnx(model, tmp_path / "m.onnx", ids(2, 7), adapters="bank")
    assert "adapters='inputs'" in str(e.value)
    assert not list(tmp_path.iterdir())


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, model: nn.Module) -> None:
    file = tmp_path / "m.onnx"
    for options, words in (
        ({"adapters": "inputs", "max_rank": 4}, "are of adapters='bank'"),
        ({"adapters": "bank", "max_rank": 0}, "max_rank=0"),
        ({"adapters": "bank", "max_adapters": 2}, "3 adapters .'plain', 'dora', 'biased'.*2"),
        (
            {"adapters": "bank", "max_rank": 3},
            r"'plain' has rank 4 at embed.*max_rank=3.*max_rank=4",
        ),
        ({"adapters": "bank", "target": "genai", "task": "text-generation"}, "adapters='inputs'"),
        ({"adapters": "bank", "target": "transformers.js"}, "adapters='merge'"),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(model, file, ids(2, 7), **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_input_of_the_same_name_is_refused(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, adapter_ids: Tensor) -> Tensor:
            return self.fc(adapter_ids)

    with pytest.raises(ExportError, match="takes 'adapter_ids' itself"):
        export_onnx(rewritten(Own()), tmp_path / "m.onnx", torch.randn(2, 4), adapters="bank")


# --- text -----------------------------------------------------------------------------------------


def tokens_of(model: Any, ids: Tensor, names: list[str | None], options: Any) -> list[Tensor]:
    found = []
    for row, name in enumerate(names):
        given = {**options, "attention_mask": options["attention_mask"][row : row + 1]}
        if name is None:
            with lora_fx.disable_adapter(model):
                found.append(model.generate(ids[row : row + 1], **given)[0])
        else:
            lora_fx.set_adapter(model, name)
            found.append(model.generate(ids[row : row + 1], **given)[0])
    return found


@pytest.mark.parametrize(
    ("kind", "task", "targets", "optimize"),
    [
        ("llama", "text-generation", ["q_proj", "v_proj", "down_proj"], "runtime"),
        pytest.param(
            "gpt2", "text-generation", ["c_attn", "c_proj"], "standard", marks=pytest.mark.slow
        ),
        pytest.param(
            "t5", "text2text-generation", ["q", "v", "wo"], "standard", marks=pytest.mark.slow
        ),
    ],
)
def test_each_text_is_that_of_its_adapter(
    tmp_path: Path, kind: str, task: Any, targets: list[str], optimize: Any
) -> None:
    options = {"target_modules": targets, "init_lora_weights": False}
    model: Any = lora_fx.rewrite(generator(kind), LoraConfig(r=2, **options), adapter_name="one")
    lora_fx.add_adapter(model, LoraConfig(r=5, seed=3, **options), "two")
    model.eval()
    file = tmp_path / "m.onnx"
    report = export_onnx(model, file, example(kind), task=task, adapters="bank", optimize=optimize)
    assert report.optimize == optimize
    assert "logits with an adapter for each row" in {row.name for row in report.parity}
    session = OnnxSession(file, "cpu")
    ids = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if kind != "t5":
        mask[1, :2] = 0
    names: list[str | None] = ["two", "one", None]
    texts: Any = {"attention_mask": mask, "max_new_tokens": 8}
    got = session.generate(ids, adapter=names, **texts)
    want = tokens_of(model, ids, names, texts)
    assert (
        len({tuple(one.tolist()) for one in tokens_of(model, ids[:1].repeat(3, 1), names, texts)})
        > 1
    )
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[: len(theirs)], theirs)
    single = session.generate(ids[:1], adapter="two", **texts | {"attention_mask": mask[:1]})
    assert torch.equal(single[0], want[0])
    if kind == "llama":
        # Several new tokens after a past go row by row in ONNX Runtime's attention.
        past = {
            port.name: torch.randn(3, port.shape[1], 4, port.shape[3])  # type: ignore[arg-type]
            for port in session.inputs
            if port.name.startswith("past")
        }
        feeds = {"input_ids": ids, "attention_mask": torch.ones(3, 10, dtype=torch.long), **past}
        whole = session.run(feeds, adapter=names)["logits"]
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in feeds.items()}
            alone = session.run(one, adapter=name)["logits"]
            torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_over_a_quantized_base(tmp_path: Path, scheme: Any) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **shape, **heads)
    base = lora_fx.quantize(transformers.LlamaForCausalLM(config).eval(), scheme)
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model: Any = lora_fx.rewrite(base, LoraConfig(r=2, **options), adapter_name="one")
    lora_fx.add_adapter(model, LoraConfig(r=3, use_dora=True, **options), "two")
    file = tmp_path / "m.onnx"
    report = export_onnx(
        model.eval(), file, example("llama"), task="text-generation", adapters="bank"
    )
    assert report.quantized
    ids = torch.randint(3, VOCABULARY, (2, 6))
    texts: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    got = OnnxSession(file, "cpu").generate(ids, adapter=["two", None], **texts)
    for mine, theirs in zip(got, tokens_of(model, ids, ["two", None], texts), strict=True):
        assert torch.equal(mine[: len(theirs)], theirs)


@pytest.mark.cuda
def test_a_gpu_runs_what_the_cpu_runs(
    exported: tuple[Path, ExportReport], session: OnnxSession, model: nn.Module
) -> None:
    on_gpu = OnnxSession(exported[0], "cuda")
    x = ids(len(MIXED), 4)
    want = session.run(x, adapter=MIXED)["output"]
    got = on_gpu.run(x.cuda(), adapter=MIXED)["output"]
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    on_gpu.load_adapter("other", model, adapter_name="dora")
    got = on_gpu.run(x.cuda(), adapter=["other", *MIXED[1:]])["output"]
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
