"""Whatever is done with a rewritten model, the user's own is not written: bit for bit, after every verb."""

from __future__ import annotations

import contextlib
import copy
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraConfig
from lora_fx.errors import ConfigError, LoraFxError
from tests.numerics import assert_close
from tests.zoo import Residual, Tied

IDS = torch.tensor([[1, 2, 3], [4, 5, 10]])
CONFIGS = [
    {"target_modules": ["up", "down", "body"]},
    {"target_modules": ["up", "body", "head"], "use_dora": True},
    {"target_modules": ["down", "body"], "modules_to_save": ["head"]},
    {"target_modules": ["up", "body"], "modules_to_save": ["norm"], "lora_bias": True},
    {"target_modules": ["embed", "body", "head"], "ensure_weight_tying": True},
    {"target_modules": ["up", "body"], "init_lora_weights": "pissa"},
    {"target_modules": ["up", "body"], "trainable_token_indices": {"embed": [1, 4]}},
    {"target_modules": ["up", "body"], "bias": "lora_only"},
]


class Users:
    """The user's model, what it was, a rewritten one, and whatever was made of that."""

    def __init__(self, model: nn.Module, config: LoraConfig, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.saved: list[Path] = []
        self.adapted = lora_fx.rewrite(model, config)
        self.names = 0
        self.remember()

    def remember(self) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        named |= dict(self.model.named_buffers())
        self.tensors = {
            name: (one, one.data_ptr(), one.requires_grad) for name, one in named.items()
        }
        self.values = {name: one.detach().clone() for name, one in named.items()}

    def check(self, verb: str) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        named |= dict(self.model.named_buffers())
        assert named.keys() == self.tensors.keys(), verb
        for name, (tensor, address, wants) in self.tensors.items():
            found = named[name]
            assert found is tensor, (verb, name)
            assert (found.data_ptr(), found.requires_grad) == (address, wants), (verb, name)
            assert found.grad is None, (verb, name)
            bits, old = (one.detach().view(torch.uint8) for one in (found, self.values[name]))
            assert torch.equal(bits, old), (verb, name)

    @property
    def adapters(self) -> tuple[str, ...]:
        return lora_fx.adapter_names(self.adapted)

    def name(self) -> str:
        self.names += 1
        return f"adapter_{self.names}"


def train(model: nn.Module, optimizer: type = torch.optim.AdamW) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    steps = optimizer(trained, lr=0.05)
    for _ in range(2):
        steps.zero_grad()
        loss = model.train()(IDS).square().mean()
        if loss.requires_grad:  # nothing of an adapter that is not active is run
            loss.backward()
        steps.step()
    steps.zero_grad()


def by_hand(model: nn.Module) -> None:
    """A plain loop over gradients, without an optimizer of torch."""
    trained, loss = [p for p in model.parameters() if p.requires_grad], model(IDS).square().mean()
    if not loss.requires_grad:
        return
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter -= 0.1 * gradient


def base_names(model: nn.Module) -> list[str]:
    return [
        name for name, _ in model.named_parameters() if "lora_" not in name and "token" not in name
    ]


def an_adapter(users: Users, draw: Callable) -> str:
    if not users.adapters:
        raise ConfigError("there is none left")
    return draw(st.sampled_from(users.adapters))


def unfreeze(users: Users, draw: Callable) -> None:
    names = base_names(users.adapted)
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        users.adapted.get_parameter(name).requires_grad = True


def unfreeze_module(users: Users, draw: Callable) -> None:
    users.adapted.get_submodule(draw(st.sampled_from(["head", "embed", "norm"]))).requires_grad_()


def freeze(users: Users, draw: Callable) -> None:
    users.adapted.requires_grad_(False)


def replace_head(users: Users, draw: Callable) -> None:
    old = users.adapted.head
    users.adapted.head = nn.Linear(old.in_features, old.out_features, old.bias is not None)


def train_adapted(users: Users, draw: Callable) -> None:
    train(users.adapted, draw(st.sampled_from([torch.optim.AdamW, torch.optim.SGD])))


def train_by_hand(users: Users, draw: Callable) -> None:
    by_hand(users.adapted)


def train_listed(users: Users, draw: Callable) -> None:
    """What writes without any gradient, over the parameters that lora_fx lists."""
    with torch.no_grad():
        for parameter in lora_fx.trainable_parameters(users.adapted):
            parameter.add_(0.01 * torch.randn_like(parameter))


def add(users: Users, draw: Callable) -> None:
    config = LoraConfig(r=2, **draw(st.sampled_from(CONFIGS)))
    lora_fx.add_adapter(users.adapted, config, users.name())


def choose(users: Users, draw: Callable) -> None:
    names = draw(st.lists(st.sampled_from([*users.adapters, "none"]), unique=True, max_size=2))
    lora_fx.set_adapter(users.adapted, names)


def disable(users: Users, draw: Callable) -> None:
    with lora_fx.disable_adapter(users.adapted):
        users.adapted(IDS)
        train(users.adapted)


def delete(users: Users, draw: Callable) -> None:
    lora_fx.delete_adapter(users.adapted, an_adapter(users, draw))


def combine(users: Users, draw: Callable) -> None:
    names = list(dict.fromkeys(an_adapter(users, draw) for _ in range(2)))
    lora_fx.add_weighted_adapter(
        users.adapted, names, [0.5] * len(names), users.name(), combination_type="cat"
    )


def save(users: Users, draw: Callable) -> None:
    folder = users.folder / f"saved_{len(users.saved)}"
    lora_fx.save_adapter(users.adapted, folder, an_adapter(users, draw))
    users.saved.append(next(folder.rglob("adapter_config.json")).parent)


def load(users: Users, draw: Callable) -> None:
    if users.saved:
        train(lora_fx.load_adapter(users.model, draw(st.sampled_from(users.saved))))


def load_beside(users: Users, draw: Callable) -> None:
    if users.saved:
        name = draw(st.sampled_from([*users.adapters, users.name()]))
        lora_fx.load_adapter(users.adapted, draw(st.sampled_from(users.saved)), adapter_name=name)


def swap(users: Users, draw: Callable) -> None:
    if users.saved:
        name = an_adapter(users, draw)
        lora_fx.hotswap_adapter(users.adapted, draw(st.sampled_from(users.saved)), name)


def load_state(users: Users, draw: Callable) -> None:
    state = {key: value.clone() for key, value in users.adapted.state_dict().items()}
    for key in draw(st.lists(st.sampled_from(sorted(state)), max_size=3)):
        if state[key].is_floating_point():
            state[key] += 0.1
    users.adapted.load_state_dict(state)


def merge_and_train(users: Users, draw: Callable) -> None:
    options = draw(st.sampled_from([{}, {"own": True}, {"dtype": torch.float32}]))
    train(lora_fx.merge(users.adapted, **options))


def merge_into_a_copy(users: Users, draw: Callable) -> None:
    target = copy.deepcopy(users.model)
    train(lora_fx.merge(users.adapted, into=target))


def merge_into_it(users: Users, draw: Callable) -> None:
    """The one verb that is told to change it; the rewritten model goes on as it was."""
    running = users.adapted.eval()(IDS)
    before = {name: values.clone() for name, values in users.values.items()}
    try:
        lora_fx.merge(users.adapted, into=users.model)
    finally:
        users.remember()
        assert torch.equal(users.adapted(IDS), running)
        assert before.keys() == users.values.keys()


def copied(users: Users, draw: Callable) -> None:
    if draw(st.booleans()):
        twin = copy.deepcopy(users.adapted)
    else:
        twin = pickle.loads(pickle.dumps(users.adapted))
    twin.requires_grad_(True)
    train(twin)


def look(users: Users, draw: Callable) -> None:
    lora_fx.status(users.adapted)
    lora_fx.parameter_groups(users.adapted, 1e-3)


VERBS = [
    add,
    train_by_hand,
    choose,
    combine,
    copied,
    delete,
    disable,
    freeze,
    load,
    load_beside,
    load_state,
    look,
    merge_and_train,
    merge_into_a_copy,
    merge_into_it,
    replace_head,
    save,
    swap,
    train_adapted,
    train_listed,
    unfreeze,
    unfreeze_module,
]


class TiedIds(Tied):
    """With a norm, as the other model has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(self.head.in_features)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embed(ids))))


@pytest.mark.parametrize("build", [Residual, TiedIds])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_verb_writes_into_the_users_model(build: type[nn.Module], data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    folder = Path(tempfile.mkdtemp())
    try:
        config = LoraConfig(r=2, **data.draw(st.sampled_from(CONFIGS)))
        users = Users(build(), config, folder)
        for verb in data.draw(st.lists(st.sampled_from(VERBS), min_size=1, max_size=10)):
            # An adapter that is active, two with the same module: the verb says so.
            with contextlib.suppress(LoraFxError):
                verb(users, data.draw)
            users.check(verb.__name__)
        try:
            merged = lora_fx.merge(users.adapted.eval())
        except LoraFxError:
            return
        assert_close(merged.eval()(IDS), users.adapted(IDS))
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_each_verb_does_something_here(verb: Callable, tmp_path: Path) -> None:
    """Otherwise nothing would be shown by the test above: no verb is refused whatever is drawn."""

    @settings(max_examples=30, deadline=None, database=None)
    @given(data=st.data())
    def attempt(data) -> None:
        users = Users(Residual(), LoraConfig(r=2, target_modules=["up", "down"]), tmp_path)
        lora_fx.add_adapter(users.adapted, LoraConfig(r=2, target_modules=["up"]), "other")
        lora_fx.save_adapter(users.adapted, tmp_path / "one", "other", force=True)
        users.saved = [tmp_path / "one" / "other"]
        for path in tmp_path.glob("saved_*"):
            shutil.rmtree(path)
        try:
            verb(users, data.draw)
        except LoraFxError:
            return
        done.append(verb)

    done: list[Callable] = []
    attempt()
    assert done
