"""A loss in chunks: the same loss and gradients, no tensor of tokens x vocabulary, no wrong numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.runtime.loss import chunked, logits
from lora_fx.tools.bench.counted import measure_memory, saved_bytes
from tests.numerics import TORCH

VOCABULARY = 97


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows at a time, so that sixteen rows are several chunks, and the last one is shorter."""
    monkeypatch.setattr(chunked, "CHUNK", 5 * VOCABULARY)


def tokens(batch: int = 2, length: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=draw)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def llama(name: str = "LlamaForCausalLM", **more: Any) -> nn.Module:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**{**shape, **more})).train().double()


def config(*targets: str, **more: Any) -> lora_fx.LoraConfig:
    return lora_fx.LoraConfig(r=2, target_modules=[*targets], init_lora_weights=False, **more)


HEAD = config("q_proj", "lm_head")


def both(
    model: nn.Module, how: lora_fx.LoraConfig, inputs: Any = None, **more: Any
) -> tuple[Any, Any]:
    found = []
    for loss in ("whole", "chunked"):
        torch.manual_seed(1)
        found.append(lora_fx.rewrite(model, how, inputs, loss=loss, **more))
    return found[0], found[1]


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["loss"]


def check(plain: nn.Module, ours: nn.Module, call: Any, bound: float = 1e-13) -> Any:
    """The same loss and gradients; returns the output."""
    outputs = []
    for model in (plain, ours):
        model.zero_grad()
        torch.manual_seed(2)
        outputs.append(model(**call))
        loss_of(outputs[-1]).backward()
    wanted, found = map(loss_of, outputs)
    torch.testing.assert_close(found, wanted, rtol=max(bound, 1e-6), atol=0)
    for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            scale = float(one.grad.abs().max().clamp_min(1e-30))
            assert float((one.grad - other.grad).abs().max()) <= bound * scale, name
    return outputs[1]


class Wide(TorchDispatchMode):
    """Names every operation that gives a tensor of at least so many bytes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in pytree.tree_leaves(out):
            if isinstance(one, Tensor) and one.untyped_storage().nbytes() >= self.size:
                self.found.append(f"{func} {tuple(one.shape)}")
        return out


# --- models of transformers, as by default: no example inputs, a root without a graph ---------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("Gemma2ForCausalLM", {}),  # a soft cap
        ("CohereForCausalLM", {}),  # a scale
        ("GraniteForCausalLM", {"logits_scaling": 3.0}),
        ("Qwen2ForCausalLM", {}),
    ],
)
def test_a_causal_model_has_the_same_loss_and_gradients(name: str, more: dict[str, Any]) -> None:
    plain, ours = both(llama(name, **more), HEAD)
    output = check(plain, ours, tokens())
    assert isinstance(output.logits, logits.Gone)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_in_batch_and_shifted_labels_are_the_models_own(count: Any) -> None:
    plain, ours = both(llama(), HEAD)
    # The loss of transformers is computed in fp32, whatever the model is in.
    check(plain, ours, {**tokens(), "num_items_in_batch": count}, 1e-6)
    call = tokens()
    check(plain, ours, {**call, "shift_labels": call["labels"]})


@pytest.mark.parametrize(
    ("name", "target", "shape"),
    [
        (
            "BertForMaskedLM",
            "query",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        ),
        (
            "GPT2LMHeadModel",
            "c_attn",
            {
                "n_embd": 16,
                "n_layer": 1,
                "n_head": 2,
                "n_positions": 32,
                "attn_pdrop": 0.0,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
            },
        ),
        (
            "T5ForConditionalGeneration",
            "q",
            {
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 32,
                "num_layers": 1,
                "num_heads": 2,
                "dropout_rate": 0.0,
                "decoder_start_token_id": 0,
            },
        ),
        (
            "BartForConditionalGeneration",  # it adds a bias to its logits
            "q_proj",
            {
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
                "dropout": 0.0,
            },
        ),
    ],
)
def test_other_models_have_it_too(name: str, target: str, shape: dict[str, Any]) -> None:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    made = kind.config_class(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape
    )
    plain, ours = both(kind(made).train().double(), config(target))
    output = check(plain, ours, tokens())
    assert isinstance(output.logits, logits.Gone)


@pytest.mark.parametrize(
    "how",
    [
        config("q_proj"),
        config("q_proj", "lm_head", use_dora=True),
        config("q_proj", "lm_head", use_rslora=True, lora_bias=True),
        config("q_proj", modules_to_save=["lm_head"]),
        config("q_proj", trainable_token_indices=[3, 5]),
    ],
    ids=["frozen", "dora", "bias", "whole", "tokens"],
)
@pytest.mark.parametrize("optimize", [True, False])
def test_every_kind_of_adapter_on_the_head(how: lora_fx.LoraConfig, optimize: bool) -> None:
    if how.lora_bias:
        model = llama("PhiForCausalLM", partial_rotary_factor=0.5)  # its head has a bias
    else:
        model = llama()
    plain, ours = both(model, how, optimize=optimize)
    check(plain, ours, tokens())


def test_a_head_that_is_trained_by_hand_gets_its_gradient() -> None:
    plain, ours = both(llama(), config("q_proj"))
    for model in (plain, ours):
        model.lm_head.weight.requires_grad_()
    check(plain, ours, tokens())


# --- models of plain PyTorch ------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.shift = nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
        self.criterion = nn.CrossEntropyLoss(torch.rand(VOCABULARY) + 0.5, label_smoothing=0.1)
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.loss(self, self.head(self.fc(self.embed(input_ids)).relu()), labels)


def _flat(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.view(-1, VOCABULARY), y.view(-1)


LOSSES: dict[str, Callable[..., Any]] = {
    "view": lambda m, z, y: F.cross_entropy(*_flat(z, y)),
    "reshape": lambda m, z, y: F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1)),
    "module": lambda m, z, y: m.criterion(*_flat(z, y)),
    "sum": lambda m, z, y: F.cross_entropy(*_flat(z, y), reduction="sum") / (y != -100).sum(),
    "none": lambda m, z, y: F.cross_entropy(*_flat(z, y), reduction="none").square().mean(),
    "smooth": lambda m, z, y: F.cross_entropy(*_flat(z, y), label_smoothing=0.2),
    "ignore": lambda m, z, y: F.cross_entropy(*_flat(z, y.clamp_min(0)), ignore_index=0),
    "transpose": lambda m, z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permute": lambda m, z, y: F.cross_entropy(z.permute(0, 2, 1).contiguous(), y),
    "shift": lambda m, z, y: F.cross_entropy(*_flat(z[:, :-1].contiguous(), y[:, 1:].contiguous())),
    "shift all": lambda m, z, y: F.cross_entropy(
        z[..., :-1, :].flatten(0, 1), y[..., 1:].flatten()
    ),
    "mask": lambda m, z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "one row": lambda m, z, y: F.cross_entropy(z[0, 3], y[0, 3]),
    "rows twice": lambda m, z, y: F.cross_entropy(
        z[:, torch.tensor([3, 3, 4])].flatten(0, 1), y[:, torch.tensor([3, 3, 4])].flatten()
    ),
    "nll": lambda m, z, y: F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), y.flatten()),
    "cap": lambda m, z, y: F.cross_entropy(*_flat(30 * torch.tanh(z / 30), y)),
    "scaled": lambda m, z, y: F.cross_entropy(*_flat(z * m.scale.exp() + m.shift, y)),
    "float": lambda m, z, y: F.cross_entropy(*_flat(z.float(), y)).double(),
    "two": lambda m, z, y: F.cross_entropy(*_flat(z, y)) + 0.5 * F.cross_entropy(*_flat(z / 2, y)),
}


@pytest.mark.parametrize("frontend", ["auto", "export"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_plain_model(name: str, frontend: Any) -> None:
    if (name, frontend) == ("mask", "export") and TORCH < (2, 12):
        pytest.skip("torch.export asks whether a mask selects as many rows of both")
    torch.manual_seed(0)
    model = Plain(LOSSES[name]).double()
    call = tokens()
    inputs = None if frontend == "auto" else call
    plain, ours = both(model, config("fc", "head"), inputs, frontend=frontend)
    # What fp32 is in it is rounded in another order.
    check(plain, ours, call, 1e-6 if name == "float" else 1e-13)
    with Wide(16 * VOCABULARY * 4) as wide:
        ours(**call).backward()
    assert not wide.found


def test_a_learned_scale_and_bias_of_the_logits_get_their_gradients() -> None:
    model = Plain(LOSSES["scaled"]).double()
    model.scale.requires_grad_()
    model.shift.requires_grad_()
    plain, ours = both(model, config("fc"))
    for one in (plain, ours):
        one.scale.requires_grad_()
        one.shift.requires_grad_()
    check(plain, ours, tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_and_autocast(dtype: torch.dtype, autocast: bool) -> None:
    model = llama().to(torch.float32 if autocast else dtype)
    plain, ours = both(model, HEAD)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    with torch.autocast("cpu", dtype, enabled=autocast and dtype is not torch.float32):
        output = check(plain, ours, tokens(), bound)
    assert isinstance(output.logits, logits.Gone)


def test_a_gradient_scaler_reaches_half_precision() -> None:
    """A gradient that is scaled afterwards would have become zero before."""
    plain, ours = both(llama().half(), HEAD)
    found = []
    for model in (plain, ours):
        (model(**tokens()).loss * 2.0**12).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=float(one.abs().max()) * 2**-9)


def test_one_chunk_is_the_plain_form_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 10**6)
    plain, ours = both(llama().float(), config("q_proj", "lm_head", lora_dropout=0.5))
    check(plain, ours, tokens(), 0.0)


def test_dropout_of_the_head_is_that_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed again in the backward, rows have the masks that they had."""
    _, ours = both(llama(), config("q_proj", "lm_head", lora_dropout=0.5))
    found = []
    for again in (False, True):
        job = logits.Job
        monkeypatch.setattr(logits, "Job", lambda **one: job(**{**one, "again": again}))  # noqa: B023
        ours.zero_grad()
        torch.manual_seed(3)
        loss = ours(**tokens()).loss
        after = torch.rand(1)
        loss.backward()
        found.append(
            [loss.detach(), after, *[p.grad for p in ours.parameters() if p.requires_grad]]
        )
        monkeypatch.undo()
        monkeypatch.setattr(chunked, "CHUNK", 5 * VOCABULARY)
    assert all(map(torch.equal, *found))


# --- what is kept, and how much there is at once ----------------------------------------------------------


def test_no_tensor_of_tokens_and_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """With vocabulary 32,000 and 512 tokens: no such tensor, and a third of the memory at most."""
    monkeypatch.undo()
    vocabulary, length = 32_000, 512
    torch.manual_seed(0)
    kind = transformers.LlamaForCausalLM
    model = kind(
        kind.config_class(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).train()
    call = dict.fromkeys(("input_ids", "labels"), torch.randint(0, vocabulary, (1, length)))
    plain, ours = both(model, config("q_proj", "lm_head"))
    peaks = []
    for one in (plain, ours):

        def step(one: nn.Module = one) -> None:
            one.zero_grad()
            one(**call).loss.backward()

        step()
        peaks.append(measure_memory(step).peak)
    # In bf16 it would have two bytes.
    with Wide(2 * vocabulary * length) as wide:
        step()
    assert not wide.found
    with Wide(2 * vocabulary * length) as wide:
        plain(**call).loss.backward()
    assert wide.found
    assert 3 * peaks[1] <= peaks[0]
    kept = [saved_bytes(one, lambda one=one: one(**call).loss) for one in (plain, ours)]
    assert kept[0] - kept[1] >= 4 * vocabulary * length * 0.9


# --- calls that are as ever -------------------------------------------------------------------------------


def test_eval_mode_and_calls_without_labels_are_unchanged() -> None:
    plain, ours = both(llama(), HEAD)
    call = tokens()
    ids = {"input_ids": call["input_ids"]}
    wanted, found = plain(**ids).logits, ours(**ids).logits
    assert type(found) is Tensor
    assert torch.equal(wanted, found)
    found.sum().backward()
    with torch.no_grad():
        assert torch.equal(plain(**call).logits, ours(**call).logits)
    plain.eval(), ours.eval()
    assert torch.equal(plain(**call).logits, ours(**call).logits)
    assert torch.equal(plain(**call).loss, ours(**call).loss)


def test_a_loss_outside_of_the_model_sees_tensors() -> None:
    plain, ours = both(llama(), HEAD)
    call = tokens()
    for model in (plain, ours):
        out = model(input_ids=call["input_ids"]).logits
        assert type(out) is Tensor
        F.cross_entropy(out.flatten(0, 1), call["labels"].flatten()).backward()
    assert all(
        torch.equal(one.grad, other.grad)
        for one, other in zip(plain.parameters(), ours.parameters(), strict=True)
        if one.grad is not None
    )


def _with_entropy(model: nn.Module, z: Tensor, y: Tensor) -> Any:
    loss = F.cross_entropy(*_flat(z, y))
    return {"loss": loss + 0.1 * z.logsumexp(-1).square().mean(), "logits": z}


def _written_into(model: nn.Module, z: Tensor, y: Tensor) -> Any:
    z[:, 0] = 0.0
    copied = z.clone()
    copied.mul_(2)
    return {"loss": F.cross_entropy(*_flat(z, y)) + copied.mean(), "logits": z}


@pytest.mark.parametrize("loss", [_with_entropy, _written_into])
def test_what_else_reads_logits_gets_them(loss: Callable[..., Any]) -> None:
    """Without a graph of the root nobody sees it before; the call is right, and saves nothing."""

    plain, ours = hidden(lambda m, h, y: loss(m, m.head(h), y))
    output = check(plain, ours, tokens())
    assert type(output["logits"]) is Tensor
    assert torch.equal(plain(**tokens())["logits"], output["logits"])


def test_hooks_on_the_head_see_logits() -> None:
    plain, ours = both(llama(), HEAD)
    seen: list[Tensor] = []
    for model in (plain, ours):
        model.lm_head.register_forward_hook(lambda m, i, o: seen.append(o.detach().argmax(-1)))
    check(plain, ours, tokens())
    assert torch.equal(*seen)


def test_a_hook_that_scales_logits_scales_the_loss() -> None:
    plain, ours = both(llama(), HEAD)
    for model in (plain, ours):
        model.lm_head.register_forward_hook(lambda m, i, o: o * 2)
    assert isinstance(check(plain, ours, tokens()).logits, logits.Gone)


class Hidden(nn.Module):
    """A model of plain PyTorch without a graph of its root: how it uses its head is seen as it runs."""

    def __init__(self, use: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.use = use

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        hash(tuple(kwargs))
        return self.use(self, self.fc(self.embed(input_ids)).tanh(), labels)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def hidden(use: Callable[..., Any]) -> tuple[Any, Any]:
    return both(Hidden(use).double(), config("fc", "head"))


def _entropy(z: Tensor, y: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten(), **more)


def _measured_in_inference_mode(m: Any, h: Tensor, y: Tensor) -> Tensor:
    z = m.head(h)
    with torch.inference_mode():
        m.accuracy = (z.argmax(-1) == y).sum()
    return _entropy(z, y) + m.fc(h).sum()


def _logits_without_rows(m: Any, h: Tensor, y: Tensor) -> Tensor:
    z, none = m.head(h), torch.zeros_like(y, dtype=torch.bool)
    return sum(  # type: ignore[return-value]
        _entropy(z[none], y[none], reduction=one).sum() for one in ("sum", "none")
    ) + _entropy(z, y)


@pytest.mark.parametrize(
    "use",
    [
        _measured_in_inference_mode,
        _logits_without_rows,
        lambda m, h, y: checkpoint(lambda h: _entropy(m.head(h), y), h, use_reentrant=False),
        lambda m, h, y: checkpoint(lambda h: _entropy(m.head(h), y), h, use_reentrant=True),
        lambda m, h, y: checkpoint(lambda z: _entropy(z, y), m.head(h), use_reentrant=False),
        lambda m, h, y: _entropy(checkpoint(m.head, h, use_reentrant=False), y),
        lambda m, h, y: _entropy(checkpoint(m.head, h, use_reentrant=True), y),
        lambda m, h, y: torch._C._nn.cross_entropy_loss(  # type: ignore[attr-defined]
            m.head(h).flatten(0, 1), y.flatten()
        ).sum(),
    ],
)
def test_uses_of_a_head_within_the_forward(use: Callable[..., Any]) -> None:
    """Modes that are put on for a part of it, checkpoints around it, and no row at all."""
    check(*hidden(use), tokens())


def test_the_mean_of_no_row_is_no_number() -> None:
    for model in hidden(lambda m, h, y: _entropy(m.head(h)[:, :0], y[:, :0])):
        assert model(**tokens()).isnan()


def test_an_output_may_hold_itself() -> None:
    def use(m: Any, h: Tensor, y: Tensor) -> Any:
        z = m.head(h)
        found: dict[str, Any] = {"loss": _entropy(z, y), "logits": [z]}
        found["me"] = found
        return found

    output = hidden(use)[1](**tokens())
    assert isinstance(output["logits"][0], logits.Gone)
    assert isinstance(output["me"]["me"]["logits"][0], logits.Gone)


def test_a_gradient_that_is_asked_for_before_the_loss_is_there() -> None:
    def use(m: Any, h: Tensor, y: Tensor) -> Tensor:
        z = m.head(h)
        z.register_hook(lambda grad: grad * 3)
        z.retain_grad()
        m.kept = [z]
        return _entropy(z, y)

    plain, ours = hidden(use)
    check(plain, ours, tokens())
    torch.testing.assert_close(ours.kept[0].grad, plain.kept[0].grad)
    assert ours.kept[0].grad_fn.name() != "_UnmadeBackward"


@pytest.mark.parametrize(
    "ask",
    [
        lambda z, loss: z.register_hook(lambda grad: grad * 3),
        lambda z, loss: (z.logsumexp(-1), z.register_hook(lambda grad: grad * 3)),
    ],
)
def test_a_gradient_of_logits_after_their_loss_is_refused(ask: Callable[..., Any]) -> None:
    def use(m: Any, h: Tensor, y: Tensor) -> Tensor:
        z = m.head(h)
        loss = _entropy(z, y)
        ask(z, loss)
        return loss

    _, ours = hidden(use)
    with pytest.raises(lora_fx.LogitsError, match=r"head was computed in chunks.*no gradient"):
        ours(**tokens())


@pytest.mark.parametrize(
    "ask",
    [
        lambda z, loss: z.retain_grad(),
        lambda z, loss: torch.autograd.grad(loss, [z], retain_graph=True),
    ],
)
def test_a_gradient_of_logits_that_the_code_asks_for_keeps_them(ask: Callable[..., Any]) -> None:
    def use(m: Any, h: Tensor, y: Tensor) -> Tensor:
        z = m.head(h)
        loss = _entropy(z, y)
        ask(z, loss)
        return loss

    plain, ours = hidden(use)
    check(plain, ours, tokens())


def _operand(m: Any, h: Tensor, y: Tensor) -> Tensor:
    shift = torch.rand(VOCABULARY).double()
    z = m.head(h) + shift
    shift.zero_()
    return _entropy(z, y)


def _index(m: Any, h: Tensor, y: Tensor) -> Tensor:
    mask = y > 50
    z = m.head(h)[mask]
    mask.fill_(True)
    return z.logsumexp(-1).sum()


@pytest.mark.parametrize("use", [_operand, _index])
def test_what_is_done_with_logits_reads_nothing_that_changes(use: Callable[..., Any]) -> None:
    with pytest.raises(lora_fx.LogitsError, match="operation on its logits reads was written into"):
        hidden(use)[1](**tokens())


@pytest.mark.parametrize("which", ["target", "weight", "operand", "base"])
def test_a_backward_that_reads_again_reads_the_same(which: str) -> None:
    """Autograd refuses it in the plain form."""

    def use(m: Any, h: Tensor, y: Tensor) -> Tensor:
        values = {
            "target": y.clone(),
            "weight": torch.rand(VOCABULARY).double(),
            "operand": torch.rand(VOCABULARY).double(),
            "base": m.head.get_parameter("weight"),
        }
        z = m.head(h) * values["operand"]
        more: Any = {"weight": values["weight"], "reduction": "none"}
        loss = _entropy(z, values["target"], **more).sum()
        with torch.no_grad():
            values[which].mul_(0)
        return loss

    plain, ours = hidden(use)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain(**tokens()).backward()
    with pytest.raises(lora_fx.LogitsError, match="written into before its backward"):
        ours(**tokens()).backward()


def test_strides_are_those_of_the_logits() -> None:
    def use(m: Any, h: Tensor, y: Tensor) -> Tensor:
        z = m.head(h).transpose(1, 2)
        assert not z.is_contiguous()
        assert z.stride() == (8 * VOCABULARY, 1, VOCABULARY)
        return F.cross_entropy(z, y)

    check(*hidden(use), tokens())


class Exponential(torch.autograd.Function):
    """Not PyTorch's own: Python code sees what it is given, autograd does not."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        out = z.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * grads[0]


def test_a_function_of_autograd_never_loses_a_gradient() -> None:
    _, ours = both(llama(), HEAD)
    given: list[Tensor] = []
    ours.lm_head.register_forward_hook(lambda m, i, o: given.append(Exponential.apply(o)))
    ours(**tokens())
    with pytest.raises(lora_fx.LogitsError, match="rewrite with loss='whole'"):
        given[0].sum().backward()


def test_a_backward_hook_of_the_head_never_loses_a_gradient() -> None:
    _, ours = both(llama(), HEAD)
    ours.lm_head.register_full_backward_hook(lambda m, i, o: None)
    with pytest.raises(lora_fx.LogitsError, match="full backward hooks"):
        ours(**tokens()).loss.backward()


# --- outputs without logits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda z: z.argmax(-1),
        lambda z: z[0],
        lambda z: z * 2,
        lambda z: 2 + z,
        lambda z: torch.softmax(z, -1),
        lambda z: F.cross_entropy(z.view(-1, VOCABULARY), torch.zeros(16).long()),
        len,
        list,
        bool,
        lambda z: z.numpy(),
        lambda z: z == 1,
        lambda z: z.shape,
    ],
)
def test_logits_that_are_gone_raise_an_error_that_names_the_remedy(
    read: Callable[..., Any],
) -> None:
    _, ours = both(llama(), HEAD)
    output = ours(**tokens())
    with pytest.raises(
        lora_fx.LogitsError, match=r"logits of lm_head .* eval mode or without labels"
    ):
        read(output.logits)
    assert not hasattr(output.logits, "dtype")
    assert "not kept" in repr(output.logits)
    assert "not kept" in repr(copy.deepcopy(output.logits))


def test_logits_that_the_model_has_put_aside_raise_as_well() -> None:
    def put_aside(model: nn.Module, z: Tensor, y: Tensor) -> Any:
        model.last = [z]  # type: ignore[assignment]
        return F.cross_entropy(*_flat(z, y))

    class Keeping(Plain):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            hash(tuple(kwargs))
            return super().forward(input_ids, labels)  # type: ignore[arg-type]

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    _, ours = both(Keeping(put_aside).double(), config("fc", "head"))
    ours(**tokens()).backward()
    with pytest.raises(lora_fx.LogitsError, match="were not kept"):
        ours.last[0].argmax()
    assert ours.last[0].shape == (2, 8, VOCABULARY)


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused() -> None:
    _, ours = both(llama(), HEAD)
    trained = [p for p in ours.parameters() if p.requires_grad]
    with pytest.raises(lora_fx.LoraFxError, match="differentiated twice"):
        torch.autograd.grad(ours(**tokens()).loss, trained, create_graph=True)


def test_torch_func_is_refused() -> None:
    _, ours = both(llama(), HEAD)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(ours, values, (), tokens()).loss

    assert loss(trained).requires_grad
    with pytest.raises(lora_fx.LoraFxError, match=r"torch.func.*rewrite with loss='whole'"):
        torch.func.grad(loss)(trained)


def test_torch_compile_is_refused() -> None:
    _, ours = both(llama(), HEAD)
    torch._dynamo.reset()
    with pytest.raises(lora_fx.LoraFxError, match="rewrite with loss='whole' to compile"):
        torch.compile(ours, backend="eager")(**tokens())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="rewrite with loss='whole' to compile"):
        torch.compile(ours, backend="eager", fullgraph=True)(**tokens())
    torch._dynamo.reset()
    ours.eval()
    found = torch.compile(ours, backend="eager", fullgraph=True)(**tokens())
    torch.testing.assert_close(found.loss, ours(**tokens()).loss)
    torch._dynamo.reset()


def test_dropout_of_the_head_is_drawn_once() -> None:
    """A second reader would see other logits than those of the loss."""
    model = Plain(LOSSES["two"]).double()
    _, ours = both(model, config("fc", "head", lora_dropout=0.5))
    with pytest.raises(lora_fx.LogitsError, match="lora_dropout=0"):
        ours(**tokens())


def test_what_the_head_reads_may_not_change_before_the_loss() -> None:
    class Writing(Plain):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            hash(tuple(kwargs))
            x = self.fc(self.embed(input_ids)) * 1
            z = self.head(x)
            x.mul_(2)
            return F.cross_entropy(*_flat(z, labels))  # type: ignore[arg-type]

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    _, ours = both(Writing(LOSSES["view"]).double(), config("fc"))
    with pytest.raises(lora_fx.LogitsError, match="written into"):
        ours(**tokens())


def test_another_word_is_an_error() -> None:
    for verb in (lora_fx.rewrite, lora_fx.plan):
        with pytest.raises(lora_fx.ConfigError, match="loss='liger' is unknown"):
            verb(llama(), HEAD, loss="liger")  # type: ignore[operator]


# --- plans ------------------------------------------------------------------------------------------------


def _planned(model: nn.Module, how: lora_fx.LoraConfig, **more: Any) -> str:
    return str(lora_fx.plan(model, how, loss="chunked", **more))


def test_a_plan_says_what_becomes_of_the_loss() -> None:
    assert "loss in chunks: lm_head" in _planned(llama(), HEAD)
    assert "loss" not in str(lora_fx.plan(llama(), HEAD))
    plan = lora_fx.plan(llama(), HEAD, loss="chunked")
    assert plan.to_dict()["loss"] == {"lm_head": "chunked"}
    assert "loss in chunks: head" in _planned(Plain(LOSSES["nll"]), config("fc"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Plain(_with_entropy), "they are read by logsumexp, too"),
        (
            lambda: Plain(lambda m, z, y: z),
            "no cross entropy of them is computed",
        ),
        (
            lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)),
            "no larger than what the head reads",
        ),
    ],
)
def test_a_plan_says_why_a_loss_is_left_alone(
    model: Callable[[], nn.Module], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    how = lora_fx.LoraConfig(r=2)
    assert words in _planned(model(), how)
    lora_fx.rewrite(model(), how, loss="chunked")
    assert words in caplog.text


# --- the life of a model ----------------------------------------------------------------------------------


def test_copies_files_and_other_adapters_keep_it() -> None:
    _, ours = both(llama(), HEAD)
    call = tokens()
    wanted = ours(**call).loss
    for one in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        output = one(**call)
        assert isinstance(output.logits, logits.Gone)
        assert torch.equal(output.loss, wanted)
    lora_fx.add_adapter(ours, config("q_proj", "lm_head"), "other")
    for names in ("other", ["default", "other"], "default"):
        lora_fx.set_adapter(ours, names)
        assert isinstance(ours(**call).logits, logits.Gone)
    torch.testing.assert_close(ours(**call).loss, wanted)
    # Samples with adapters of their own have logits: rows of a batch differ.
    with lora_fx.adapter_ids(ours, ["other", None]):
        assert type(ours(**call).logits) is Tensor
    merged = lora_fx.merge(ours)
    assert type(merged) is transformers.LlamaForCausalLM
    assert type(merged(**call).logits) is Tensor


@pytest.mark.parametrize("how", ["call", "layers"])
def test_checkpointing(how: str) -> None:
    _, ours = both(llama(), HEAD)
    call = tokens()
    ours(**call).loss.backward()
    wanted = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
    ours.zero_grad()
    if how == "call":
        loss = checkpoint(lambda: ours(**call).loss, use_reentrant=False)
    else:
        ours.gradient_checkpointing_enable()
        loss = ours(**call).loss
    loss.backward()
    found = [p.grad for p in ours.parameters() if p.grad is not None]
    assert all(map(torch.equal, wanted, found))


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    _, ours = both(llama(), HEAD)
    with pytest.raises(IndexError):
        ours(input_ids=tokens()["input_ids"], labels=torch.full((2, 8), VOCABULARY + 3))
    call = tokens()
    assert type(ours.lm_head(torch.randn(2, 3, 32).double())) is Tensor
    assert isinstance(ours(**call).logits, logits.Gone)


def _batches() -> Iterator[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        ids = torch.randint(0, VOCABULARY, (8,), generator=draw)
        yield {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("how", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}])
def test_the_trainer_of_transformers(how: dict[str, Any], tmp_path: Any) -> None:
    """Steps and an evaluation, with the labels' names that it finds; label smoothing is its own loss."""
    found = []
    for model in both(llama().float(), HEAD):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            report_to=[],
            save_strategy="no",
            eval_strategy="epoch",
            logging_steps=1,
            use_cpu=True,
            seed=0,
            **how,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=list(_batches()), eval_dataset=list(_batches())
        )
        trainer.train()
        predictions = trainer.predict(list(_batches())).predictions
        assert (predictions[0] if isinstance(predictions, tuple) else predictions).shape == (
            6,
            8,
            VOCABULARY,
        )
        logs = trainer.state.log_history
        found.append(
            [one.get("loss", one.get("eval_loss")) for one in logs if "train_loss" not in one]
        )
    assert found[0] == pytest.approx(found[1], rel=2e-2 if how.get("bf16") else 1e-4)
    assert len(found[0]) >= 4


class Summing(transformers.Trainer):
    """A loss of the user's own, of logits: the model is called without labels."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")
        found = model(**inputs).logits
        return F.cross_entropy(found.flatten(0, 1), labels.flatten())


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Any) -> None:
    _, ours = both(llama().float(), HEAD)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Summing(ours, arguments, train_dataset=list(_batches()))
    assert trainer.train().training_loss > 0
