"""Training with ``memory="least"`` of layers that write their MLP out in their own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.runtime.memory import offload
from lora_fx.tools.cluster import Ledger, Mesh, Settings, plan_step
from tests.lora_fx.test_least import assert_equal

TOKENS, WIDTH = 600, 256  # three tiles, and the intermediate size
CONFIG = LoraConfig(r=3, init_lora_weights=False)
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 90,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "dropout": 0.0,
}
ENCODER: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
}
Case = tuple[nn.Module, dict[str, Tensor]]


def text() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (1, TOKENS))
    return {"input_ids": ids, "labels": ids}


def whisper(tokens: int = TOKENS, labels: int = TOKENS, **sizes: Any) -> Case:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": tokens, "max_target_positions": labels}
    config = transformers.WhisperConfig(
        **{**ENCODER_DECODER, **sizes}, **special, **lengths, num_mel_bins=8
    )
    inputs = {
        "input_features": torch.randn(1, 8, 2 * tokens),
        "labels": torch.randint(3, 90, (1, labels)),
    }
    return transformers.WhisperForConditionalGeneration(config), inputs


class Layers(nn.Module):
    """Encoder of PyTorch, with a loss."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.register_buffer("weights", torch.arange(32.0))
        options = {"batch_first": True, "norm_first": norm_first}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, WIDTH, 0.0, **options) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x * self.weights).square().mean()


def encoder(norm_first: bool) -> Case:
    return Layers(norm_first), {"x": torch.randn(1, TOKENS, 32)}


def bert() -> Case:
    # The dropout of attention would keep a matrix of tokens x tokens.
    sizes = {"intermediate_size": WIDTH, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**ENCODER, **sizes)
    return transformers.BertForMaskedLM(config), text()


def opt() -> Case:
    config = transformers.OPTConfig(**ENCODER, ffn_dim=WIDTH, word_embed_proj_dim=32, dropout=0.0)
    return transformers.OPTForCausalLM(config), text()


def bart() -> Case:
    config = transformers.BartConfig(**ENCODER_DECODER, max_position_embeddings=TOKENS)
    return transformers.BartForConditionalGeneration(config), text()


CASES: dict[str, Callable[[], Case]] = {
    "Whisper": whisper,
    "norms first": lambda: encoder(True),
    "norms last": lambda: encoder(False),
    "BERT": bert,
    "OPT": opt,
    "BART": bart,
}


class Longest(TorchDispatchMode):
    """Mode that finds the most tokens of a tensor of the intermediate size.

    Attributes:
        tokens: That number.
    """

    tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        floating = isinstance(result, Tensor) and result.is_floating_point()  # no masks
        if floating and result.shape[-1:] == (WIDTH,):
            self.tokens = max(self.tokens, result.shape[:-1].numel())
        return result


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    loss: Tensor = output if isinstance(output, Tensor) else output.loss
    return loss


def longest(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the most tokens of a tensor of the intermediate size in a step."""
    with Longest() as mode:
        loss_of(model, inputs).backward()
    return mode.tokens


def doubled(case: Case) -> Case:
    model, inputs = case
    return model.double(), {
        name: x.double() if x.is_floating_point() else x for name, x in inputs.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_plain_step(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = doubled(CASES[name]())
    adapted = assert_equal(model, inputs, CONFIG)
    assert longest(adapted, inputs) == 256
    for part in adapted.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_: None)
    assert longest(adapted, inputs) == TOKENS


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.2}, {"use_dora": True}, {"lora_bias": True, "bias": "all"}]
)
def test_adapters_inside(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    names = ["linear1", "linear2"]
    config = LoraConfig(r=3, init_lora_weights=False, target_modules=names, **settings)
    model, inputs = doubled(encoder(True))
    adapted = assert_equal(model, inputs, config).eval()  # masks are drawn for all tokens
    assert longest(adapted, inputs) == 256


def peak(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Return the peak of live bytes of a second step with its optimizer, and the bytes on the host."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ledger = Ledger()
    ledger.hold([*model.parameters(), *model.buffers()])
    for _ in range(2):
        with ledger, offload.simulated(ledger.host_copy):
            ledger.peak = ledger.host = 0
            loss_of(model, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.peak, ledger.host


@pytest.mark.parametrize("name", CASES)
def test_the_peak(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = whisper(1024, 16, d_model=64) if name == "Whisper" else CASES[name]()
    adapted = lora_fx.rewrite(model, CONFIG, memory="least").train()
    least, host = peak(adapted, inputs)
    need = plan_step(model, CONFIG, Mesh(), inputs, Settings(memory="least"))
    assert need.peak == pytest.approx(least, rel=0.03)
    assert need.host == host
    for part_name, part in adapted.named_modules():
        if part_name.endswith(("fc1", "linear1", "intermediate.dense")):
            part.register_forward_hook(lambda *_: None)  # which sees all tokens
    assert least <= 0.85 * peak(adapted, inputs)[0]


# --- readers that the graph does not show ---------------------------------------------------------------


class Layer(nn.Module):
    """Layer with an MLP that is written out.

    Attributes:
        form: What it does as well.
    """

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.mix, self.up = nn.Linear(8, 8), nn.Linear(8, WIDTH)
        self.activation, self.down = activation or nn.GELU(), nn.Linear(WIDTH, 8)
        self.gate, self.form = nn.Linear(8, WIDTH), ""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).cumsum(-2) / 100
        wide = self.up(x)
        y = self.activation(wide)
        if self.form == "gate":
            y = y * self.gate(x)
        if self.form == "write":
            with torch.no_grad():
                x.add_(1)
        if self.form == "write into the result":
            y, old = y * 2, y
            y = y + old.relu_()
        if self.form == "read before":
            x = x + y.mean(-1, keepdim=True) + wide.softmax(-1)[..., :1]
        z: Tensor = self.down(y)
        if self.form == "read after":
            z = z * y.mean(-1, keepdim=True) + wide.softmax(-1)[..., :1]
        if self.form == "return":
            return wide[..., :8] + z
        return x + z


FORMS = ("gate", "write into the result", "read before", "read after", "return")


class Net(nn.Module):
    def __init__(self, activation: nn.Module | None = None, form: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(activation), Layer(activation)])
        self.take(form)

    def take(self, form: str) -> None:
        for layer in self.layers:
            layer.form = form

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def steps(change: Callable[[nn.Module], Any], **settings: Any) -> Iterator[nn.Module]:
    """Yield a model after a step without tiles and after one with, of a model that was changed before."""
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(1, TOKENS, 8).double()
    config = LoraConfig(r=2, init_lora_weights=False, **settings)
    for options in ({}, {"memory": "least"}):
        torch.manual_seed(2)
        adapted = lora_fx.rewrite(model, config, **options).train()
        change(adapted)
        torch.manual_seed(3)
        adapted(x).backward()
        yield adapted


def assert_same(change: Callable[[nn.Module], Any], **settings: Any) -> None:
    plain, least = steps(change, **settings)
    for (name, p), other in zip(plain.named_parameters(), least.parameters(), strict=True):
        if p.requires_grad and p.grad is not None:
            scale = float(p.grad.abs().max())
            torch.testing.assert_close(other.grad, p.grad, rtol=0, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("form", ["", *FORMS])
def test_other_readers_get_all_tokens(form: str) -> None:
    dropout = 0.0 if form in ("read after", "return") else 0.2
    assert_same(lambda model: model.take(form), lora_dropout=dropout, target_modules=["up", "down"])


def test_a_late_reader_with_other_masks() -> None:
    with pytest.raises(ConfigError, match="Linear was computed in tiles, and is read once more"):
        [*steps(lambda model: model.take("read after"), lora_dropout=0.2)]


class OfTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-2)


@pytest.mark.parametrize("activation", [OfTokens(), nn.ReLU(inplace=True), nn.Dropout(0.2)])
def test_an_activation_that_was_replaced(activation: nn.Module) -> None:
    def change(model: nn.Module) -> None:
        for layer in model.layers:
            layer.activation = activation

    assert_same(change)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class OfAutograd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Square.apply(x)
        return result


class OfVmap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.vmap(torch.tanh)(x)
        return result


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (OfAutograd(), "autograd reached a tensor that is computed in tiles"),
        (OfVmap(), "reads a tensor that is computed in tiles"),
    ],
)
def test_activations_past_the_interface_of_pytorch(activation: nn.Module, message: str) -> None:
    assert not lora_fx.plan(Net(activation), LoraConfig(r=2), memory="least").savings.spans

    def change(model: nn.Module) -> None:
        for layer in model.layers:
            layer.activation = activation

    with pytest.raises(ConfigError, match=f"{message}.*rewrite with memory='balanced'"):
        [*steps(change)]


def test_an_input_that_is_written_into() -> None:
    with pytest.raises(ConfigError, match="input of a layer's MLP was written into"):
        [*steps(lambda model: model.take("write"), target_modules=["mix"])]


# --- the plan -------------------------------------------------------------------------------------------

READERS = {
    "gate": (Net(form="gate"), "mul"),
    "in place": (Net(nn.ReLU(inplace=True)), "activation"),
    "parameters": (Net(nn.PReLU()), "activation"),
    "dropout": (Net(nn.Dropout(0.1)), "activation"),
    "mixing": (Net(OfTokens()), "activation"),
}


@pytest.mark.parametrize("name", READERS)
def test_the_plan_names_the_reader(name: str) -> None:
    model, reader = READERS[name]
    savings = lora_fx.plan(model, LoraConfig(r=2), memory="least").savings
    assert savings is not None
    assert savings.spans == ()
    assert dict(savings.left)["layers.0.up"] == (
        f"its result goes to {reader}, which may mix elements, write into them, draw random numbers, or "
        "read more tensors"
    )


def test_the_plan_names_both_readers() -> None:
    net = Net(form="read after")
    savings = lora_fx.plan(net, LoraConfig(r=2), memory="least").savings
    assert savings is not None
    reason = "down and mean and softmax read its result: tiles have one reader"
    assert dict(savings.left)["layers.1.up"] == reason


def test_the_plan_says_it() -> None:
    plan = lora_fx.plan(Net(), LoraConfig(r=2), memory="least")
    assert plan.savings is not None
    assert plan.savings.spans[0].modules == ("up", "activation", "down")
    assert "also in tiles, inside of layers: layers.*.up to down (2)" in str(plan)
    assert "layers.0.up" not in dict(plan.savings.left)
