"""Training with ``memory="least"``: gradients, dropout, memory, copies, stacks of features."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.runtime.memory import offload, tiles
from lora_fx.tools.cluster import Ledger

TOKENS = 600  # three tiles
VOCABULARY = 96


def llama(layers: int = 2, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, **sizes}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        use_cache=False,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config).double()


def text(batch: int = 1, tokens: int = TOKENS) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (batch, tokens))
    return {"input_ids": ids, "labels": ids}


def step(
    model: nn.Module, inputs: dict[str, Tensor], config: LoraConfig, **options: Any
) -> tuple[Tensor, dict[str, Tensor], nn.Module]:
    torch.manual_seed(2)
    adapted = lora_fx.rewrite(model, config, **options).train()
    torch.manual_seed(3)
    output = adapted(**inputs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    named = adapted.named_parameters()
    gradients = {name: p.grad for name, p in named if p.requires_grad and p.grad is not None}
    return loss.detach(), gradients, adapted


def assert_equal(
    model: nn.Module, inputs: dict[str, Tensor], config: LoraConfig, **options: Any
) -> nn.Module:
    loss, gradients, _ = step(model, inputs, config)
    least, others, adapted = step(model, inputs, config, memory="least", **options)
    torch.testing.assert_close(least, loss, rtol=1e-12, atol=0)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=1e-12 * max(scale, 1e-3))
    return adapted


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.2},
    "DoRA": {"use_dora": True},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.2},
    "biases": {"lora_bias": True, "bias": "all"},
    "a part in full": {"modules_to_save": ["mlp"]},
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_plain_step(name: str) -> None:
    config = LoraConfig(r=3, init_lora_weights=False, **CONFIGS[name])
    assert_equal(llama(), text(2), config)


@pytest.mark.parametrize("tokens", [8, 256, 257, 300, 1025])
def test_any_number_of_tokens(tokens: int) -> None:
    assert_equal(llama(1), text(1, tokens), LoraConfig(r=3, init_lora_weights=False))


def test_layers_with_random_numbers_of_their_own() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).double()
    assert_equal(model, text(), LoraConfig(r=3, init_lora_weights=False, lora_dropout=0.1))


def test_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).double()
    assert_equal(model, text(), LoraConfig(r=3, init_lora_weights=False))


def test_images() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=72,
        patch_size=4,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.ViTForImageClassification(config).double()
    inputs = {"pixel_values": torch.randn(1, 3, 72, 72).double(), "labels": torch.tensor([1])}
    assert_equal(model, inputs, LoraConfig(r=3, init_lora_weights=False))


def test_experts() -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
    )
    # The grouped product of PyTorch has no fp64.
    model = transformers.GptOssForCausalLM(config)
    adapter = LoraConfig(r=3, init_lora_weights=False)
    loss, gradients, _ = step(model, text(), adapter)
    least, others, adapted = step(model, text(), adapter, memory="least")
    assert (
        "Tiles" in type(adapted.model.layers[0].mlp(torch.randn(1, TOKENS, 32))[0].grad_fn).__name__
    )
    torch.testing.assert_close(least, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=2e-6)


class Normed(nn.Module):
    """Net of layers with batch norms, a cache argument and an ``nn.Sequential`` of blocks."""

    def __init__(self) -> None:
        super().__init__()
        layers = (
            nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
            for _ in range(3)
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.square().mean()


def test_statistics_are_updated_once() -> None:
    torch.manual_seed(0)
    model, inputs = Normed().double(), {"x": torch.randn(700, 8).double()}
    adapted = assert_equal(model, inputs, LoraConfig(r=2, init_lora_weights=False))
    plain = step(model, inputs, LoraConfig(r=2, init_lora_weights=False))[2]
    for (name, buffer), other in zip(adapted.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)
    assert int(adapted.layers[0][1].num_batches_tracked) == 1


class Cached(nn.Module):
    """Block that writes into an object that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        cache.append(1)
        y: Tensor = torch.tanh(self.fc["a"](x))
        return y


class List(list[int]):
    """Cache."""


class CachedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Cached(), Cached()])
        self.calls = List()

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x, cache=self.calls if cache is None else cache)
        return x.square().mean()


def test_a_block_that_gets_a_cache_runs_once() -> None:
    class Cache:
        def __init__(self) -> None:
            self.count = 0

        def append(self, _: int) -> None:
            self.count += 1

    adapted = lora_fx.rewrite(CachedNet(), LoraConfig(r=2), memory="least").train()
    cache = Cache()
    adapted(torch.randn(3, 4), cache=cache).backward()
    assert cache.count == 2


def test_packed_sequences_and_accumulated_gradients() -> None:
    model, config = llama(), LoraConfig(r=3, init_lora_weights=False)
    inputs = text(1, 640)
    inputs["position_ids"] = torch.cat([torch.arange(300), torch.arange(340)])[None]
    assert_equal(model, inputs, config)
    plain, least = (
        lora_fx.rewrite(model, config, **options).train() for options in ({}, {"memory": "least"})
    )
    for adapted in (plain, least):
        adapted.load_state_dict(plain.state_dict())
        for seed in range(2):
            torch.manual_seed(seed)
            ids = torch.randint(0, VOCABULARY, (1, TOKENS))
            adapted(input_ids=ids, labels=ids).loss.backward()
    for one, other in zip(plain.parameters(), least.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-12)


def test_two_backwards_of_one_graph() -> None:
    adapted = lora_fx.rewrite(llama(1), LoraConfig(r=2, init_lora_weights=False), memory="least")
    loss = adapted.train()(**text()).loss
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in first.items():
        torch.testing.assert_close(adapted.get_parameter(name).grad, 2 * gradient)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_as_little(copied: Callable[[nn.Module], nn.Module]) -> None:
    adapted = lora_fx.rewrite(llama(1), LoraConfig(r=2, init_lora_weights=False), memory="least")
    again = copied(adapted).train()
    assert (
        "Tiles"
        in type(
            again.model.norm(torch.randn(1, TOKENS, 32).double().requires_grad_()).grad_fn
        ).__name__
    )
    assert again.model.layers[0].forward.__func__ is adapted.model.layers[0].forward.__func__
    losses = [model.train()(**text()).loss for model in (adapted, again)]
    torch.testing.assert_close(*losses)


def test_nothing_is_left_after_a_merge() -> None:
    model = llama(1)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2), memory="least")
    merged = lora_fx.merge(adapted)
    for (name, module), original in zip(merged.named_modules(), model.modules(), strict=True):
        assert type(module) is type(original), name
        assert vars(module).keys() == vars(original).keys(), name


def test_another_adapter_and_rows_of_a_batch() -> None:
    model = llama(1)
    adapted = lora_fx.rewrite(model, LoraConfig(r=2, init_lora_weights=False), memory="least")
    lora_fx.add_adapter(adapted, LoraConfig(r=3, init_lora_weights=False), "other")
    lora_fx.set_adapter(adapted, ["default", "other"], per_sample=True)
    adapted.train()(**text(2), adapter_ids=["default", "other"]).loss.backward()
    lora_fx.set_adapter(adapted, "other")
    adapted(**text(2)).loss.backward()
    assert hasattr(type(adapted.model.layers[0]).forward, "__wrapped__")


def test_hooks_see_all_tokens() -> None:
    adapted = lora_fx.rewrite(llama(1), LoraConfig(r=2), memory="least").train()
    seen: list[int] = []
    part = adapted.model.layers[0].mlp.gate_proj
    part.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    adapted(**text()).loss.backward()
    assert {*seen} == {TOKENS}


def test_replaced_parameters_are_an_error() -> None:
    adapted = lora_fx.rewrite(llama(1), LoraConfig(r=2), memory="least").train()
    values = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in adapted.named_parameters()
    }
    norm = adapted.model.layers[0].mlp
    inner = {
        name.removeprefix("model.layers.0.mlp."): p for name, p in values.items() if ".mlp." in name
    }
    out = torch.func.functional_call(norm, inner, (torch.randn(1, TOKENS, 32).double(),))
    with pytest.raises(ConfigError, match="were replaced between forward and backward"):
        out.sum().backward()


@pytest.mark.slow
def test_under_a_compiler() -> None:
    """Blocks run again there; the compiler chooses what else it keeps."""
    config, inputs = LoraConfig(r=3, init_lora_weights=False), text(1, 300)
    model = llama()
    loss, gradients, _ = step(model, inputs, config)
    torch.manual_seed(2)
    adapted = lora_fx.rewrite(model, config, memory="least", loss="whole").train()
    compiled = torch.compile(adapted, backend="aot_eager")(**inputs).loss
    compiled.backward()
    torch.testing.assert_close(compiled.detach(), loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            adapted.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12
        )


def live(model: nn.Module, inputs: dict[str, Tensor], *, host: bool = False) -> tuple[int, int]:
    """Return the peak of live bytes of a step beyond the model, and the bytes on the host."""
    model(**inputs).loss.backward()
    model.zero_grad()
    ledger = Ledger()
    ledger.hold([*model.parameters(), *model.buffers()])
    before = ledger.live
    with ledger:
        if host:
            with offload.simulated(ledger.host_copy):
                model(**inputs).loss.backward()
        else:
            model(**inputs).loss.backward()
    model.zero_grad()
    return ledger.peak - before, ledger.host


def test_the_peak_is_far_below_that_of_checkpointing() -> None:
    model = llama(4, hidden_size=64, intermediate_size=172).float()
    config, inputs = LoraConfig(r=8), text(4, 512)
    least = lora_fx.rewrite(model, config, memory="least").train()
    other = lora_fx.rewrite(model, config, loss="chunked").train()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    assert live(least, inputs)[0] <= 0.7 * live(other, inputs)[0]


@pytest.mark.parametrize("layers", [2, 4])
def test_the_peak_grows_with_tokens_and_not_with_layers(layers: int) -> None:
    width = 128
    model = llama(layers, hidden_size=width, intermediate_size=448).float()
    adapted = lora_fx.rewrite(model, LoraConfig(r=4), memory="least").train()
    peaks = [live(adapted, text(1, tokens), host=True) for tokens in (2048, 4096, 8192)]
    for tokens, (_, host) in zip((2048, 4096, 8192), peaks, strict=True):
        assert host == layers * tokens * width * 4
    for (before, _), (after, _), tokens in zip(peaks, peaks[1:], (2048, 4096), strict=False):
        assert after - before <= 12 * tokens * width * 4


def test_tiles_grow_with_the_sequence_up_to_a_limit() -> None:
    layer = nn.Linear(2, 2)
    lengths = [tiles.length_of(count, layer) for count in (10, 4096, 5000, 65536, 10**6)]
    assert lengths == [256, 256, 312, 4096, 4096]


@pytest.mark.cuda
def test_inputs_of_blocks_wait_on_the_host() -> None:
    model = llama(6, hidden_size=256, intermediate_size=512).float().cuda()
    inputs = {name: value.cuda() for name, value in text(1, 4096).items()}
    config = LoraConfig(r=4, init_lora_weights=False)
    loss, gradients, _ = step(model, inputs, config)
    least, others, adapted = step(model, inputs, config, memory="least")
    torch.testing.assert_close(least, loss, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-2, atol=1e-4)
    before = torch.cuda.memory_allocated()
    kept = adapted(**inputs).loss
    assert torch.cuda.memory_allocated() - before <= 3 * 4096 * 256 * 4
    kept.backward()


def test_memory_of_the_host_is_checked_before_the_step(caplog: pytest.LogCaptureFixture) -> None:
    offload.check_room(1 << 10, 100)
    assert not caplog.records
    offload.check_room(1 << 26, 1 << 20)
    (entry,) = caplog.records
    assert "1048576 blocks" in entry.getMessage()
    assert "GB are free" in entry.getMessage()
    with pytest.raises(ConfigError, match=r"takes 1152921504\.6 GB of"):
        offload.check_room(1 << 60, 1)


# --- what happens between a forward and its backward --------------------------------------------------


class Blocks(nn.Module):
    """Blocks that keep statistics, or take their input in another form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.blocks = nn.ModuleList([Stated(form), Stated(form)])

    def forward(self, x: Tensor) -> Tensor:
        xs = [x]
        for block in self.blocks:
            if self.form == "list":
                xs.append(block(xs))
            else:
                xs.append(block(x=xs[-1]))
        return xs[-1].square().mean()


class Stated(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.parts = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Any) -> Tensor:
        x = sum(x) if isinstance(x, list) else x
        y: Tensor = torch.tanh(self.parts["fc"](x) - self.mean)
        if self.training and self.form == "state":
            self.mean.mul_(0.5).add_(x.detach().mean((0, 1)))
        if self.training and self.form == "replaced":
            self.mean = self.mean * 0.5 + x.detach().mean((0, 1))
        return y


@pytest.mark.parametrize("form", ["list", "state", "replaced", "keyword"])
def test_blocks_with_state_and_other_arguments(form: str) -> None:
    torch.manual_seed(0)
    model = Blocks(form).double()
    inputs = {"x": torch.randn(2, 300, 8).double()}
    config = LoraConfig(r=2, init_lora_weights=False)
    models = []
    for options in ({}, {"memory": "least"}):
        _, _, adapted = step(model, inputs, config, **options)
        adapted.zero_grad()
        adapted(**inputs).backward()  # after an update of the statistics
        models.append(adapted)
    for (name, p), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(other.grad, p.grad, rtol=1e-10, atol=1e-14, msg=name)
    for buffer, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(other, buffer)


def test_a_static_input_is_copied_again() -> None:
    torch.manual_seed(0)
    model, buffer = Blocks("keyword").double(), torch.zeros(2, 300, 8).double()
    config = LoraConfig(r=2, init_lora_weights=False)
    pairs = []
    for options in ({}, {"memory": "least"}):
        torch.manual_seed(1)
        adapted = lora_fx.rewrite(model, config, **options).train()
        for seed in range(2):
            torch.manual_seed(seed)
            buffer.copy_(torch.randn_like(buffer))
            adapted.zero_grad()
            with offload.simulated(torch.clone):
                adapted(buffer).backward()
        pairs.append([p.grad for p in adapted.parameters() if p.grad is not None])
    for gradient, other in zip(*pairs, strict=True):
        torch.testing.assert_close(other, gradient)


def test_modes_and_hooks_of_the_forward() -> None:
    config, inputs, model = (
        LoraConfig(r=2, lora_dropout=0.3, init_lora_weights=False),
        text(),
        llama(1),
    )
    gradients: list[dict[str, Tensor]] = []
    for options in ({}, {"memory": "least"}):
        torch.manual_seed(2)
        adapted = lora_fx.rewrite(model, config, **options).train()
        factor = adapted.model.layers[0].mlp.up_proj.lora_A.default
        factor.register_hook(lambda grad: grad.clamp(-1e-4, 1e-4) * 2)
        calls: list[int] = []
        adapted.model.layers[0].mlp.down_proj.register_full_backward_hook(
            lambda module, given, grads, calls=calls: calls.append(1)
        )
        torch.manual_seed(3)
        loss = adapted(**inputs).loss
        adapted.eval()
        loss.backward()
        assert calls == [1]
        assert not adapted.training
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-14)


def test_other_parameters_in_the_backward_of_a_block() -> None:
    adapted = lora_fx.rewrite(llama(1), LoraConfig(r=2), memory="least", loss="whole").train()
    values = {name: p.detach() * 1.1 for name, p in adapted.named_parameters()}
    for name, p in adapted.named_parameters():
        values[name].requires_grad_(p.requires_grad)
    loss = torch.func.functional_call(adapted, values, kwargs=text(1, 64)).loss
    with pytest.raises(ConfigError, match="were replaced between forward and backward"):
        loss.backward()


def test_a_filled_cache_is_used() -> None:
    model = llama(1)
    model.config.use_cache = True
    ids = text(1, 300)["input_ids"]
    losses = []
    for options in ({}, {"memory": "least"}):
        torch.manual_seed(2)
        config = LoraConfig(r=2, init_lora_weights=False)
        adapted = lora_fx.rewrite(model, config, **options).train()
        with torch.no_grad():
            output = adapted(input_ids=ids[:, :200], use_cache=True)
        name = "cache" if "cache" in output else "past_key_values"
        rest = ids[:, 200:]
        output = adapted(input_ids=rest, labels=rest, **{name: output[name]})
        losses.append(output.loss.detach())
    torch.testing.assert_close(*losses)


class Merging(nn.Module):
    """Module that treats tokens on their own for inputs of 16 features only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x.reshape(*x.shape[:-2], -1, 16)))))
        return y


class MergingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.merge = nn.Linear(4, 4), Merging()

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.inner(x)).square().mean()


def test_another_size_than_that_of_the_trial() -> None:
    torch.manual_seed(0)
    model, inputs = MergingNet().double(), {"x": torch.randn(1, 1200, 4).double()}
    assert "merge" in lora_fx.plan(model, LoraConfig(r=2), memory="least").savings.tiles
    assert_equal(model, inputs, LoraConfig(r=2, init_lora_weights=False))
