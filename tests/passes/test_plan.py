from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict
from html import escape

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.passes.pipeline import find_operations
from lora_fx.passes.plan import base_flops
from tests.golden import check_golden
from tests.numerics import assert_same_bits
from tests.zoo import TRANSFORMERS, LlamaShapes, Mlp, Residual, Shared, Tied, seeded


def names(model: nn.Module, **options) -> list[str]:
    return [row.name for row in lora_fx.plan(model, LoraConfig(**options))]


BLOCKS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def test_names_of_saved_modules_that_match_nothing() -> None:
    """PEFT writes both names of a classifier's head into its folder, and a model has one of them."""
    layers = OrderedDict(up=nn.Linear(4, 4), classifier=nn.Linear(4, 2))
    model = nn.Sequential(layers)
    for heads, task, unmatched in (
        (["classifier", "score"], "SEQ_CLS", ()),
        (["score"], None, ("modules_to_save 'score': matches nothing",)),
        (
            ["clasifier"],
            "SEQ_CLS",
            ("modules_to_save 'clasifier': matches nothing; nearest: 'classifier'",),
        ),
    ):
        config = LoraConfig(target_modules=["up"], modules_to_save=heads, task_type=task)
        assert lora_fx.plan(model, config).unmatched == unmatched


def test_none_is_every_linear_operation_but_the_head() -> None:
    plan = lora_fx.plan(Residual(), LoraConfig())
    assert [row.name for row in plan] == BLOCKS
    assert {s.site.name: s.reason for s in plan.skipped} == {
        "embed": "an embedding: name it in target_modules to adapt it",
        "head": "the output head: name it in target_modules to adapt it",
    }


def test_none_takes_convolutions_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert names(model) == ["0"]


def test_all_linear_is_every_matrix_product_but_a_declared_head() -> None:
    model, _ = TRANSFORMERS["llama"]()
    plan = lora_fx.plan(model, LoraConfig(target_modules="all-linear"))
    assert len(plan) == 14
    assert "lm_head" not in [row.name for row in plan]
    # PEFT knows no other head than the one that the model declares.
    assert names(Residual(), target_modules="ALL-linear") == [*BLOCKS, "head"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["up"]}, ["blocks.0.up", "blocks.1.up"]),
        ({"target_modules": ["blocks.1.down", "head"]}, ["blocks.1.down", "head"]),
        ({"target_modules": ["embed"]}, ["embed"]),
        ({"target_modules": r"blocks\.\d+\.(up|down)"}, BLOCKS),
        ({"target_modules": r".*1\.up"}, ["blocks.1.up"]),
        ({"target_modules": ["up", "down"], "exclude_modules": ["down"]}, BLOCKS[::2]),
        ({"exclude_modules": r"blocks\.0\..*"}, BLOCKS[2:]),
        (
            {
                "target_modules": ["up", "down"],
                "layers_to_transform": [1],
                "layers_pattern": "blocks",
            },
            BLOCKS[2:],
        ),
        ({"layers_to_transform": 0, "layers_pattern": ["blocks"]}, BLOCKS[:2]),
    ],
)
def test_targets_are_chosen_by_pefts_rules(options: dict, expected: list[str]) -> None:
    assert names(Residual(), **options) == expected


def test_rank_alpha_and_scale_of_each_row() -> None:
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"blocks.1.up": 2, "down": 4},
        alpha_pattern={r"blocks\.0\..*": 4},
    )
    rows = {row.name: (row.rank, row.alpha, row.scale) for row in lora_fx.plan(Residual(), config)}
    assert rows == {
        "blocks.0.up": (8, 4.0, 0.5),
        "blocks.0.down": (4, 4.0, 1.0),
        "blocks.1.up": (2, 16.0, 8.0),
        "blocks.1.down": (4, 16.0, 4.0),
    }


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    (row, *_) = lora_fx.plan(Residual(), LoraConfig(r=16, lora_alpha=8, use_rslora=True))
    assert row.scale == 2.0


def test_the_formula_of_the_seed_holds() -> None:
    r = 3
    plan = lora_fx.plan(Residual(), LoraConfig(r=r))
    sizes = [reversed(row.site.weight_shape) for row in plan]
    assert plan.trainable_parameters == sum(r * (d + k) for d, k in sizes)
    adapted = lora_fx.rewrite(Residual(), LoraConfig(r=r))
    trainable = sum(p.numel() for p in lora_fx.trainable_parameters(adapted))
    assert trainable == plan.trainable_parameters


def test_llama_7b_at_rank_16_trains_16_777_216_parameters() -> None:
    model = LlamaShapes()
    config = LoraConfig(r=16, target_modules=["q", "k", "v", "o"])
    plan = lora_fx.plan(model, config)
    assert len(plan) == 128
    assert plan.trainable_parameters == 16_777_216
    adapted = lora_fx.rewrite(model, config)
    trainable = list(lora_fx.trainable_parameters(adapted))
    assert sum(p.numel() for p in trainable) == 16_777_216
    assert all(p.is_meta for p in trainable)


def test_the_cost_of_a_row() -> None:
    (row,) = lora_fx.plan(Mlp((5, 8, 3)), LoraConfig(r=2, lora_dropout=0.1))
    assert row.name == "first"
    assert row.parameters == 2 * (5 + 8)
    assert row.flops == 2 * 2 * (5 + 8)
    # x in fp32, x after dropout with its mask of a byte, and the activation of rank 2.
    assert row.saved == 5 * 4 + 5 * (4 + 1) + 2 * 4


def test_a_layer_that_is_called_twice_is_planned_once() -> None:
    plan = lora_fx.plan(Shared(), LoraConfig(r=2))
    assert [row.name for row in plan] == ["layer"]
    assert plan.trainable_parameters == 2 * 10


# --- what does not match --------------------------------------------------------------------------


def test_no_match_names_the_nearest_and_the_reasons() -> None:
    with pytest.raises(lora_fx.NoMatchError) as caught:
        lora_fx.plan(Residual(), LoraConfig(target_modules=["downn"]))
    text = str(caught.value)
    assert "'downn'" in text
    assert "'down'" in text
    assert isinstance(caught.value, ValueError)


def test_a_string_of_a_target_is_said_to_be_a_regular_expression() -> None:
    words = r"regular expression for whole names.*give a list, \['up'\]"
    with pytest.raises(lora_fx.NoMatchError, match=words):
        lora_fx.plan(Residual(), LoraConfig(target_modules="up"))
    with pytest.raises(lora_fx.NoMatchError, match=r"regular expression.*nearest: '.*up'"):
        lora_fx.plan(Residual(), LoraConfig(target_modules=r"blocks\.0\.upp"))


def test_a_scope_that_holds_nothing_names_the_nearest() -> None:
    with pytest.raises(
        lora_fx.NoMatchError, match=r"scope 'block': matches nothing; nearest: 'blocks"
    ):
        lora_fx.plan(Residual(), LoraConfig(scope="block"))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.up = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x @ self.kernel
        return self.head(self.up(x))


def test_a_parameter_that_no_operation_reads_is_said_to_be_one() -> None:
    with pytest.raises(
        lora_fx.NoMatchError, match="kernel is a parameter, and no linear operation"
    ):
        lora_fx.plan(Branching(), LoraConfig(target_modules=["kernel"]))
    assert "(root): no graph: its forward branches" in str(lora_fx.plan(Branching(), LoraConfig()))


def test_the_name_of_a_weight_leads_to_its_layer() -> None:
    for entry in ("up.weight", "blocks.0.up.weight"):
        words = rf"{entry}': .*is the weight of a layer: name the layer, 'blocks.0.up'"
        with pytest.raises(lora_fx.NoMatchError, match=words):
            lora_fx.plan(Residual(), LoraConfig(target_modules=[entry]))
    plan = lora_fx.plan(Branching(), LoraConfig(target_modules=["up"]))
    with pytest.raises(lora_fx.ConfigError, match=r"'head\.weight' is .* name the layer, head$"):
        plan.why("head.weight")
    with pytest.raises(lora_fx.NoMatchError, match=r"up\.bias is a bias.*bias='lora_only' trains"):
        lora_fx.plan(Branching(), LoraConfig(target_modules=["up.bias"]))
    with pytest.raises(lora_fx.ConfigError, match=r"did you mean up\?"):
        plan.why("upp")


def test_a_refusal_gives_a_remedy_only_if_it_helps() -> None:
    remedy = "lists what can be adapted"
    with pytest.raises(lora_fx.NoMatchError, match=remedy):
        lora_fx.plan(Residual(), LoraConfig(target_modules=["lost"]))
    for config in (LoraConfig(r=2), LoraConfig(target_modules=["lost"])):
        with pytest.raises(lora_fx.NoMatchError) as caught:
            lora_fx.plan(nn.Sequential(nn.Embedding(4, 2), nn.ReLU()), config)
        assert remedy not in str(caught.value)


def test_a_long_refusal_counts_what_it_leaves_out() -> None:
    model = nn.Sequential(OrderedDict({f"layer_{name}": nn.Linear(2, 2) for name in "abcdefgh"}))
    targets = ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(lora_fx.NoMatchError) as caught:
        lora_fx.plan(model, LoraConfig(target_modules=targets))
    assert str(caught.value).splitlines()[1:4] == [
        "  target_modules 'k_proj', 'q_proj', 'v_proj': match nothing",
        "  layer_a, layer_b, layer_c, layer_d, layer_e and 3 more: matches no target in target_modules",
        "  lora_fx.plan(model, lora_fx.LoraConfig()) lists what can be adapted",
    ]
    with pytest.raises(lora_fx.PartialMatchError, match="'k_proj', 'q_proj', 'v_proj': match no"):
        lora_fx.plan(model, LoraConfig(target_modules=["layer_a", *targets]), strict=True)


def test_a_plan_begins_with_its_totals_and_names_reasons_once() -> None:
    model = nn.Sequential(OrderedDict({f"layer_{name}": nn.Linear(2, 2) for name in "abcd"}))
    plan = lora_fx.plan(model, LoraConfig(target_modules=["layer_a"]))
    first, *_, last, title, _ = str(plan).splitlines()
    assert title == "advice:"
    assert first.startswith("1 site(s), 32 trainable of ")
    assert last == "  layer_b, layer_c, layer_d: matches no target in target_modules"


def test_a_plan_says_how_it_was_captured_only_if_a_weight_is_lost() -> None:
    plan = lora_fx.plan(Branching(), LoraConfig())
    (title, *notes) = plan.capture_lines()
    assert title == "captured by regions"
    assert str(plan).splitlines()[-1 - len(notes) :] == [title, *notes]
    assert "captured by regions" in plan._repr_html_()
    assert notes[0].startswith("  not symbolic")
    whole = lora_fx.plan(Residual(), LoraConfig())
    assert whole.capture_lines() == []
    assert "captured by" not in f"{whole}{whole._repr_html_()}"
    assert "captured by symbolic" in repr(whole)


def test_costs_of_sites_and_totals_have_one_unit() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)
    )
    x = torch.randn(2, 3, 8, 8)
    plan = lora_fx.plan(model, LoraConfig(r=2, target_modules=["0", "1"]), x)
    assert plan.columns[-2:] == ("FLOPs/sample", "saved B/sample")
    for column, total in ((-2, plan.flops), (-1, plan.saved)):
        assert sum(int(row[column].replace(",", "")) for row in plan.rows()) == total
    assert (
        lora_fx.plan(model, LoraConfig(r=2, target_modules=["0"])).columns[-1] == "saved B/position"
    )
    configs = {name: LoraConfig(r=2, target_modules=[name]) for name in ("1", "3")}
    both = lora_fx.compare(configs, model, x)
    assert both.columns[4] == "FLOPs/sample"
    # 2 x (64 + 5) x 2 for the linear layer, which runs once for a sample.
    assert both.rows()[1][4] == "276"
    assert lora_fx.compare(configs, model).columns[4] == "FLOPs/position"


@pytest.mark.parametrize("add", [False, True])
def test_a_rewrite_warns_of_entries_that_select_nothing(
    add: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(target_modules=["up", "gone"])
    if add:
        model = lora_fx.rewrite(Residual(), LoraConfig())
        lora_fx.add_adapter(model, config, "more")
    else:
        lora_fx.rewrite(Residual(), config)
    [record] = caplog.records
    assert "target_modules 'gone': matches nothing" in record.getMessage()
    assert "strict=True" in record.getMessage()


def test_a_name_in_front_of_the_configuration_is_refused() -> None:
    model = lora_fx.rewrite(Residual(), LoraConfig())
    with pytest.raises(lora_fx.ConfigError, match="the configuration comes before the name"):
        lora_fx.add_adapter(model, "more", LoraConfig())  # type: ignore[arg-type]


def test_a_target_that_is_no_linear_operation_says_why() -> None:
    with pytest.raises(lora_fx.NoMatchError, match="LayerNorm, not a linear operation"):
        lora_fx.plan(Residual(), LoraConfig(target_modules=["norm"]))
    with pytest.raises(lora_fx.NoMatchError, match=r"ModuleList.*name what it holds.*blocks.0.up"):
        lora_fx.plan(Residual(), LoraConfig(target_modules=["blocks"]))


def test_a_target_that_cannot_be_adapted_says_why() -> None:
    model = nn.Sequential(nn.EmbeddingBag(2, 2), nn.Conv2d(2, 2, 3))
    with pytest.raises(lora_fx.NoMatchError, match="'0': 0 cannot be adapted: embedding bags"):
        lora_fx.plan(model, LoraConfig(target_modules=["0", "1"]))


def test_a_target_whose_sites_are_all_filtered_out_is_named() -> None:
    config = LoraConfig(target_modules=["up", "down"], exclude_modules=["down"])
    (entry,) = lora_fx.plan(Residual(), config).unmatched
    assert entry.startswith("target_modules 'down': all that it names is left out")


@pytest.mark.parametrize(
    ("options", "entry"),
    [
        ({"target_modules": ["up", "nothing"]}, "target_modules 'nothing'"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules 'nothing'"),
        ({"rank_pattern": {"nothing": 4}}, "rank_pattern 'nothing'"),
        ({"alpha_pattern": {"nothing": 4}}, "alpha_pattern 'nothing'"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save 'nothing'"),
        ({"layers_to_transform": [0, 7], "layers_pattern": "blocks"}, "layers_to_transform 7"),
        (
            {"layers_to_transform": [0], "layers_pattern": ["blocks", "h"]},
            "layers_pattern 'h'",
        ),
    ],
)
def test_an_entry_that_selects_nothing_is_named_and_strict_refuses_it(options, entry) -> None:
    plan = lora_fx.plan(Residual(), LoraConfig(**options))
    assert plan.sites
    assert [found for found in plan.unmatched if found.startswith(entry)]
    with pytest.raises(lora_fx.PartialMatchError, match=entry):
        lora_fx.plan(Residual(), LoraConfig(**options), strict=True)


def test_strict_has_no_quarrel_with_a_config_that_matches() -> None:
    config = LoraConfig(target_modules=["up", "down"], rank_pattern={"up": 2})
    assert len(lora_fx.plan(Residual(), config, strict=True)) == 4


def test_a_model_without_linear_operations_says_so() -> None:
    with pytest.raises(lora_fx.NoMatchError, match="no linear operation that lora_fx can see"):
        lora_fx.plan(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), LoraConfig())


def test_what_cannot_be_adapted_is_said_where_nothing_is_selected() -> None:
    model = nn.Sequential(nn.EmbeddingBag(2, 8), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(lora_fx.NoMatchError) as caught:
        lora_fx.plan(model, LoraConfig())
    assert "2: the output head" in str(caught.value)
    assert "0: embedding bags" in str(caught.value)


def test_a_peft_model_is_refused_with_the_remedy() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Residual(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(lora_fx.CaptureError, match="merge_and_unload"):
        lora_fx.plan(model, LoraConfig())


# --- beside the adapters --------------------------------------------------------------------------


def test_all_biases_are_those_that_peft_calls_so() -> None:
    config = transformers.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        vocab_size=11,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.encoder.block[0].layer[0].SelfAttention.q.bias = nn.Parameter(torch.zeros(8))
    given = {"target_modules": ["q"], "bias": "all"}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**given))
    wanted = [n for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n]
    names = [n.removeprefix("base_model.model.").replace(".base_layer", "") for n in wanted]
    assert any("relative_attention_bias" in name for name, _ in model.named_parameters())
    assert list(lora_fx.plan(model, LoraConfig(**given)).biases) == names


def test_biases() -> None:
    def planned(bias: str) -> tuple[str, ...]:
        config = LoraConfig(target_modules=["up"], bias=bias)
        return lora_fx.plan(Residual(1), config).biases

    assert planned("none") == ()
    assert planned("lora_only") == ("blocks.0.up.bias",)
    assert planned("all") == (
        "blocks.0.norm.bias",
        "blocks.0.up.bias",
        "blocks.0.down.bias",
        "norm.bias",
        "head.bias",
    )


def test_modules_to_save_are_trained_in_full_and_not_adapted() -> None:
    config = LoraConfig(r=1, modules_to_save=["head", "blocks.1"], bias="all")
    plan = lora_fx.plan(Residual(), config)
    assert plan.saved_modules == ("blocks.1", "head")
    assert [row.name for row in plan] == ["blocks.0.up", "blocks.0.down"]
    assert not any(name.startswith(("head.", "blocks.1.")) for name in plan.biases)
    adapted = lora_fx.rewrite(Residual(), config)
    trainable = sum(p.numel() for p in lora_fx.trainable_parameters(adapted))
    assert trainable == plan.trainable_parameters


def test_a_task_saves_its_head() -> None:
    model, _ = TRANSFORMERS["bert"]()
    plan = lora_fx.plan(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert plan.saved_modules == ("classifier",)


# --- reading a plan -------------------------------------------------------------------------------


def full_plan() -> lora_fx.ir.plan.Plan:
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0.1,
        target_modules=["up", "down", "norm"],
        rank_pattern={"down": 4},
        modules_to_save=["head"],
        bias="lora_only",
    )
    return lora_fx.plan(seeded(Residual)(), config)


def test_json_says_everything_and_reads_back() -> None:
    plan = full_plan()
    found = json.loads(plan.to_json())
    assert found == json.loads(json.dumps(plan.to_dict()))
    assert [row["name"] for row in found["sites"]] == [row.name for row in plan]
    assert LoraConfig.from_dict(found["config"]) == plan.config
    assert found["trainable_parameters"] == plan.trainable_parameters
    assert found["unmatched"] == list(plan.unmatched)
    assert {entry["name"] for entry in found["skipped"]} == {"embed", "head"}


def test_the_table_has_a_line_for_everything() -> None:
    plan = full_plan()
    text = str(plan)
    for row in plan.rows():
        # Equal layers share a row, ``blocks.{0-1}.up``.
        assert any(
            re.sub(r"\d+", "{0-1}", row[0]) in line or row[0] in line for line in text.split("\n")
        )
    for skipped in plan.skipped:
        saved = skipped.site.name in plan.saved_modules
        assert saved != any(
            skipped.site.name in line and skipped.reason in line for line in text.split("\n")
        )
    assert f"{plan.trainable_parameters:,} trainable" in text
    assert "trained in full: head" in text
    assert "biases trained: 4" in text
    assert all(entry in text for entry in plan.unmatched)


def test_golden_table() -> None:
    check_golden("plan_residual", f"{full_plan()}\n")


def test_planning_changes_nothing() -> None:
    model = Residual(dropout=0.5).train()
    model.blocks[0].eval()
    model.head.requires_grad_(False)
    before = copy.deepcopy(model)
    rng = torch.get_rng_state()
    first = lora_fx.plan(model, LoraConfig())
    assert torch.equal(torch.get_rng_state(), rng)
    assert first == lora_fx.plan(model, LoraConfig())
    assert_same_bits(model.state_dict(), before.state_dict())
    for (name, found), (_, reference) in zip(
        model.named_modules(), before.named_modules(), strict=True
    ):
        assert type(found) is type(reference), name
        assert found.training == reference.training, name
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [p.requires_grad for p in before.parameters()]


def test_tied_weights_are_said_in_the_plan() -> None:
    plan = lora_fx.plan(Tied(), LoraConfig(target_modules=["embed"]))
    assert plan.sites[0].site.tied_to == ("head.weight",)


def test_a_rank_beyond_the_weights_is_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 2))
    found = lora_fx.plan(model, LoraConfig(r=4, target_modules=["0", "1"]))
    assert "1: 4, where min(in, out) is 3" in str(found)
    assert found.sections()["rank beyond the weight's"] == [("1", "4, where min(in, out) is 3")]


def test_a_plan_shows_itself_short_and_as_html() -> None:
    plan = full_plan()
    assert repr(plan).startswith(f"<Plan: {len(plan)} site(s), ")
    assert len(repr(plan)) < 200
    html = plan._repr_html_()
    assert html.count("<table>") == html.count("</table>") >= 2
    assert all(escape(entry) in html for entry in plan.unmatched)
    assert "<details open>" in html


def test_names_are_text_in_html() -> None:
    model = nn.ModuleDict({"<img src=x>": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["b"](self.parts["<img src=x>"](x))

    html = lora_fx.plan(Net(), LoraConfig(target_modules="parts.*"))._repr_html_()
    assert "<img" not in html
    assert "&lt;img" in html


def test_sums_are_attributes() -> None:
    plan = lora_fx.plan(Residual(), LoraConfig(r=2))
    assert plan.unit == "token"
    assert plan.flops == sum(row.flops for row in plan)
    assert plan.saved == sum(row.saved for row in plan)
    assert plan.parameters == plan.trainable_parameters
    assert f"each token costs {plan.flops:,} more FLOPs" in str(plan)


class Convolutions(nn.Module):
    """Two resolutions, and a linear operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.mix = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()).flatten(2).mean(2)
        return self.head(self.mix(x).relu())


def test_convolutions_cost_by_the_sample() -> None:
    config = LoraConfig(r=2)
    blind = lora_fx.plan(Convolutions(), config)
    assert blind.unit == "position"
    assert "example_inputs tell the cost of a sample" in str(blind)
    plan = lora_fx.plan(Convolutions(), config, torch.randn(3, 3, 8, 8))
    assert plan.unit == "sample"
    # Of a branch at one position: A reads in · k², B makes out; two operations for each product.
    first, second, mix = 64 * 2 * 2 * (27 + 4), 16 * 2 * 2 * (36 + 6), 2 * 2 * (6 + 5)
    assert plan.flops == first + second + mix
    # The input, and what A makes of it.
    kept = (64 * 3 + 64 * 2) + (64 * 4 + 16 * 2) + (6 + 2)
    assert plan.saved == 4 * kept
    larger = lora_fx.plan(Convolutions(), config, torch.randn(1, 3, 16, 16))
    assert larger.flops == 4 * (first + second) + mix


class Frames(nn.Module):
    """Frames of videos are one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class OneByOne(Frames):
    """Each sample alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.conv(one) for one in x])


class Padded(nn.Conv2d):
    """A layer that does more than its convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(super().forward(nn.functional.pad(x, (1, 1, 1, 1))), 2)


class Words(nn.Module):
    """Convolutions over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 4)
        self.conv = nn.Conv1d(4, 6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.embed(ids).transpose(1, 2)).amax(2)


class Noisy(Frames):
    """It draws numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * torch.rand(1).to(x.device)


@pytest.mark.parametrize("make", [Frames, OneByOne])
def test_samples_that_are_not_the_batch_of_a_convolution_have_no_cost(
    make: type[nn.Module],
) -> None:
    x = torch.randn(2, 5, 3, 8, 8) if make is Frames else torch.randn(5, 3, 8, 8)
    plan = lora_fx.plan(make(), LoraConfig(r=2, target_modules=["conv"]), x)
    assert plan.unit == "position"
    assert plan.sample_cost is None


def test_the_cost_of_a_sample_is_that_of_its_products() -> None:
    def cost(model: nn.Module, x: torch.Tensor, *places: str) -> tuple[int, int] | None:
        return lora_fx.plan(model, LoraConfig(r=2, target_modules=[*places]), x).sample_cost

    # 10 x 10 positions in, 8 x 8 out, whatever the layer does before and after.
    padded = cost(nn.Sequential(Padded(3, 4, 3)), torch.randn(2, 3, 8, 8), "0")
    assert padded == (64 * 2 * 2 * (27 + 4), 4 * (100 * 3 + 64 * 2))
    # An embedding keeps an index for each token, not a row of its table.
    words = cost(Words(), torch.randint(0, 1000, (2, 9)), "embed", "conv")
    assert words is not None
    assert words[1] == 9 * (8 + 4 * 2) + 4 * (9 * 4 + 7 * 2)
    # A transposed convolution multiplies with A where its input is, and with B where its output is.
    up = cost(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2)), torch.randn(2, 4, 8, 8), "0")
    assert up is not None
    assert up[0] == 64 * 2 * 2 * 4 * 9 + 17 * 17 * 2 * 2 * 8


def test_the_flops_of_the_base_count_all_linear_operations_of_a_sample() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(196, 5)
    )
    x = torch.randn(3, 4, 8, 8)
    products = 2 * (36 * 6 * 2 * 9 + 36 * 6 * 4 * 4 + 196 * 5)
    for targets in (["0"], ["1", "3"], None):
        plan = lora_fx.plan(model, LoraConfig(r=2, target_modules=targets), x)
        assert plan.sample_flops == products
    # A lookup costs nothing.
    tokens = torch.randint(0, 1000, (2, 9))
    for targets in (["conv"], ["embed", "conv"]):
        plan = lora_fx.plan(Words(), LoraConfig(r=2, target_modules=targets), tokens)
        assert plan.sample_flops == 2 * 7 * 6 * 4 * 3
    # Tokens have no samples.
    plan = lora_fx.plan(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    assert plan.sample_flops is None


@pytest.mark.parametrize(
    ("model", "flops"),
    [
        (nn.Linear(3, 5), 30),
        (nn.Conv1d(4, 6, 3, groups=2), 2 * 6 * 2 * 3),
        (nn.Embedding(9, 4), 0),
    ],
    ids=["linear", "convolution", "lookup"],
)
def test_flops_of_an_operation(model: nn.Module, flops: int) -> None:
    (site,) = find_operations(lora_fx.capture(nn.Sequential(model))).sites
    assert base_flops(site) == flops


def test_the_cost_of_a_sample_draws_no_random_numbers() -> None:
    model, x = Noisy(), torch.zeros(2, 3, 8, 8)
    before = torch.get_rng_state()
    plan = lora_fx.plan(model, LoraConfig(r=2, target_modules=["conv"]), x)
    assert plan.unit == "sample"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_new_head_comes_first(tmp_path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes = transformers.BertConfig(**small, num_attention_heads=2, vocab_size=32)
    transformers.BertModel(sizes).save_pretrained(tmp_path)
    of = transformers.BertForSequenceClassification
    model = of.from_pretrained(tmp_path, num_labels=3)
    plan = lora_fx.plan(model, LoraConfig())
    assert plan.fresh == ("classifier",)
    assert (
        str(plan).splitlines()[2].startswith("starts at random, and nothing trains it: classifier")
    )
    assert plan.to_dict()["fresh"] == ["classifier"]
    for config in (
        LoraConfig(modules_to_save=["classifier"]),
        LoraConfig(task_type="SEQ_CLS"),
        LoraConfig(target_modules=["query", "classifier"]),
    ):
        assert lora_fx.plan(model, config).fresh == ()
    # One that was never read from a checkpoint has no new part.
    assert lora_fx.plan(of(sizes), LoraConfig()).fresh == ()


def test_a_rewrite_warns_of_a_new_head(tmp_path, caplog) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes = transformers.BertConfig(**small, num_attention_heads=2, vocab_size=32)
    transformers.BertModel(sizes).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="lora_fx"):
        lora_fx.rewrite(model, LoraConfig())
    assert "classifier starts at random and nothing trains it" in caplog.text


def test_why() -> None:
    plan = full_plan()
    (told,) = plan.why("blocks.0.up").values()
    assert told.startswith("adapted: ")
    assert "r " in told
    assert plan.why("head") == {"head": "trained in full: modules_to_save"}
    assert set(plan.why("blocks.1")) == {"blocks.1.up", "blocks.1.down"}
    assert set(plan.why("up")) == {"blocks.0.up", "blocks.1.up"}
    assert plan.why("embed")["embed"].startswith("not selected: ")
    with pytest.raises(
        lora_fx.ConfigError, match="no linear operation is called 'upp'; did you mean"
    ):
        plan.why("upp")
    with pytest.raises(lora_fx.ConfigError, match="'zzz'; print the plan for the names of all"):
        plan.why("zzz")


def test_changes() -> None:
    model = Residual()
    one = lora_fx.plan(model, LoraConfig(r=2, target_modules=["up"]))
    other = lora_fx.plan(model, LoraConfig(r=4, target_modules=["up", "down"], bias="lora_only"))
    changed = one.changes(other)
    assert one.changes(one) == {}
    assert changed["blocks.0.down"][0] == "-"
    assert "r 2" in changed["blocks.0.up"][0]
    assert "r 4" in changed["blocks.0.up"][1]
    assert changed["blocks.0.up.bias"] == ("-", "trained")


def test_compare() -> None:
    configs = {"small": LoraConfig(r=2), "large": LoraConfig(r=8, target_modules=["up"])}
    both = lora_fx.compare(configs, Residual())
    assert list(both) == ["small", "large"]
    for name, config in configs.items():
        assert both[name].to_dict() == lora_fx.plan(Residual(), config).to_dict()
        assert any(line.startswith(name) for line in str(both).splitlines())
    assert [row[1] for row in both.rows()] == ["4", "2"]
    assert "<table>" in both._repr_html_()
    assert repr(both) == "<Comparison of small, large; print it for the table>"
    with pytest.raises(lora_fx.ConfigError, match="at least one"):
        lora_fx.compare({}, Residual())
    with pytest.raises(lora_fx.ConfigError, match="by a name of your own"):
        lora_fx.compare([LoraConfig()], Residual())  # type: ignore[arg-type]
    with pytest.raises(lora_fx.NoMatchError) as error:
        lora_fx.compare({"none": LoraConfig(target_modules=["zzz"])}, Residual())
    assert "in the configuration 'none'" in error.value.__notes__


def test_what_is_trained_is_said_alike_everywhere(capsys) -> None:
    plan = full_plan()
    adapted = lora_fx.rewrite(seeded(Residual)(), plan.config)
    lora_fx.print_trainable_parameters(adapted)
    assert f"trainable params: {plan.parameters:,d} " in capsys.readouterr().out
    (status,) = lora_fx.status(adapted)
    assert status.parameters == plan.parameters
    assert sum(p.numel() for p in lora_fx.trainable_parameters(adapted)) == plan.parameters


def test_other_reports_show_themselves_short_and_as_html() -> None:
    model = Residual()
    captured = lora_fx.capture(model)
    assert repr(captured).startswith("<Capture of Residual by symbolic: ")
    assert "<table>" in captured._repr_html_()
    adapted = lora_fx.rewrite(model, LoraConfig(r=2))
    status = lora_fx.status(adapted)
    assert repr(status) == "<ModelStatus: default (active); print it for more>"
    assert "<table>" in status._repr_html_()
    _, report = lora_fx.merge(adapted, return_report=True)
    assert repr(report).startswith("<MergeReport: 4 weight(s) merged, ")
    assert "<table>" in report._repr_html_()
    assert len(json.loads(report.to_json())["sites"]) == 4
    assert report.left_out == ()
    lora_fx.add_adapter(adapted, LoraConfig(r=2), "other")
    _, report = lora_fx.merge(adapted, return_report=True)
    assert report.left_out == ("other",)
    assert report.summary.endswith("without 'other'")
