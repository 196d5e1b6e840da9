"""PEFT's `LoraConfig`, immutable and validated on construction.

Field names, defaults and meaning are those of `peft.LoraConfig` (PEFT 0.21.2), so that a
configuration moves between the two libraries unchanged. A PEFT field of another method is accepted
with PEFT's default value and refused with any other: nothing is dropped silently.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from lora_fx.config.fields import (
    ALL_LINEAR,
    FOREIGN,
    METADATA,
    NORMALIZERS,
    OPTIONS,
    TASK_TYPES,
    VARIANTS,
    Bias,
    FrozenOptions,
    FrozenPattern,
    Start,
    TaskType,
    bad,
    changes_base,
    complete_options,
    is_off,
    only_own,
)
from lora_fx.errors import CheckpointError, ConfigError, some
from lora_fx.files import current, replacing

__all__ = [
    "ALL_LINEAR",
    "CONFIG_NAME",
    "TASK_TYPES",
    "FrozenPattern",
    "LoraConfig",
    "adapters_below",
    "check_together",
    "download_command",
    "missing_adapter",
    "read_json",
]


_log = logging.getLogger("lora_fx")

# The initialization that each field of options belongs to: loftq_config to init_lora_weights="loftq".
_OWNERS: Final = {name: name.removesuffix("_config") for name in OPTIONS}


_VARIANTS: Final = ("use_dora", *VARIANTS)
"""Fields that choose a variant of LoRA. An adapter has at most one."""


def check_together(config: Any) -> None:
    """Raise if fields contradict each other, and warn of options of an initialization that is not used.

    Args:
        config: A `LoraConfig` whose fields are normalized.

    Raises:
        ConfigError: If two fields contradict each other.
    """
    _check_selection(config)
    _check_variant(config)
    for name, owner in _OWNERS.items():
        if getattr(config, name) is not None and config.init_lora_weights != owner:
            _log.warning(
                "LoraConfig.%s is ignored: it belongs to init_lora_weights=%r, found %r",
                name,
                owner,
                config.init_lora_weights,
            )


def _check_selection(config: Any) -> None:
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                remedy = f"leave it out, or list the targets instead of {config.target_modules!r}"
                raise bad(name, getattr(config, name), remedy)
    if config.layers_pattern and config.layers_to_transform is None:
        raise bad("layers_pattern", config.layers_pattern, "give layers_to_transform as well")


def _check_variant(config: Any) -> None:
    if config.kind is not None:
        for name in (*_VARIANTS, "lora_bias", "dense_groups"):
            if value := getattr(config, name):
                remedy = f"kind={config.kind!r} is another adapter: leave out {name} or kind"
                raise bad(name, value, remedy)
    variants = [name for name in _VARIANTS if getattr(config, name)]
    if len(variants) > 1:
        remedy = (
            f"an adapter has one variant, and {variants[0]} chooses another: leave out one of both"
        )
        raise bad(variants[1], getattr(config, variants[1]), remedy)
    if config.lora_bias:
        if config.use_dora:
            raise bad("lora_bias", True, "DoRA has no bias on B: leave out use_dora or lora_bias")
        if config.init_lora_weights not in (True, False):
            remedy = f"with init_lora_weights={config.init_lora_weights!r} B has no bias; use True or False"
            raise bad("lora_bias", True, remedy)
    if config.kasa_config is not None and changes_base(config.init_lora_weights):
        remedy = "kasa_config changes the base weight as well: use True, 'gaussian' or 'orthogonal'"
        raise bad("init_lora_weights", config.init_lora_weights, remedy)
    if config.init_lora_weights == "orthogonal":
        for name, rank in (("r", config.r), *config.rank_pattern.items()):
            if rank % 2:
                where = name if name == "r" else f"rank_pattern[{name!r}]"
                raise bad(where, rank, "init_lora_weights='orthogonal' needs an even rank")


CONFIG_NAME: Final = "adapter_config.json"

_logger = logging.getLogger("lora_fx")
_T = TypeVar("_T")


def _accept_peft_fields(cls: type[_T]) -> type[_T]:
    """Let `__init__` accept PEFT's fields that lora_fx does not have, and drop them.

    Such a field has to be switched off. The signature of `__init__` is unchanged.
    """
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        generated(self, *args, **only_own(kwargs))

    type.__setattr__(cls, "__init__", __init__)
    return cls


@_accept_peft_fields
@dataclass(frozen=True)
class LoraConfig:
    """The selection of operations to adapt, and the settings of their adapters.

    Values are normalized: lists become tuples, sets and lists that PEFT treats as sets become sorted tuples,
    dicts become read-only mappings. A config can be hashed, compared and pickled, but not changed in place.
    `dataclasses.replace` makes a changed copy.

    Attributes:
        r: Rank of the adapters.
        lora_alpha: The branch is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
            `use_rslora`.
        lora_dropout: Probability in [0, 1), on the adapter's input only.
        target_modules: None: every linear operation except the output head and the routers of mixtures of
            experts (PEFT instead has a table of architectures).
            "all-linear": the same as in PEFT: every `nn.Linear`, and Conv1D of transformers, except the
            output head of a transformers model. In mixtures of experts that transformers 5 has fused, also
            their experts and routers. Any other string: a regular expression for the whole name. A list:
            names, or their last components.
        exclude_modules: The same syntax; applied first.
        scope: Full name of a module, or a list of them: only operations inside are adapted, even if the
            targets match others ("model.language_model" of a multimodal model). lora_fx only: a saved adapter
            names its targets in full instead.
        layers_to_transform: Layer indices to adapt. Not with a string as `target_modules`. An empty
            collection of any type, as PEFT's empty list, means no restriction.
        layers_pattern: Names of the containers whose index is compared, "layers" or "h".
        rank_pattern: Ranks by name or regular expression; the first key that matches wins.
        alpha_pattern: The same for `lora_alpha`.
        use_rslora: Rank-stabilized scale (https://arxiv.org/abs/2312.03732).
        use_dora: Weight-decomposed adapters: a trained magnitude for each output feature, in addition to the
            direction (https://arxiv.org/abs/2402.09353).
        lora_bias: True to train a bias of B. Not with `use_dora`.
        target_parameters: Names of parameters, or their ends: matrices, or weights of three dimensions
            with a matrix for each expert. A list only; `exclude_modules` and the layer filters do not
            apply. With it, `target_modules=None` selects nothing.
        use_bdlora: BD-LoRA: A or B is block-diagonal (https://arxiv.org/abs/2510.23346). PEFT's options:
            `target_modules_bd_a` and `target_modules_bd_b`, parts of the names of layers; `nblocks`;
            `match_strict`, False to give other layers plain LoRA.
        arrow_config: Arrow: a router over other adapters of the model (https://arxiv.org/abs/2405.11157).
            PEFT's options: `task_adapter_names`, `top_k`, `router_temperature`, `use_gks` with
            `gks_adapter_names`, `rng_seed`. It trains nothing.
        alora_invocation_tokens: Activated LoRA (https://arxiv.org/abs/2504.12397): the adapter acts from the
            last occurrence of these tokens in a prompt on.
        dense_groups: True to train A of a grouped convolution as PEFT does: every row reads all input
            channels. No weight of a grouped convolution can hold such a sum, so it cannot be merged. lora_fx
            only. It is not saved, because the values of A in a folder show it.
        bias: The biases of the base model to train: "none", "all" or "lora_only".
        modules_to_save: Modules that are copied, trained in full and saved with the adapter.
        ensure_weight_tying: True to keep tied weights tied: a head that shares the weight of an adapted
            embedding gets the transposed factors of the embedding. A module that shares the weight of a
            module in `modules_to_save` is trained with it.
        trainable_token_indices: Rows of the input embedding to train, each as a whole, or a dict of such rows
            by the name of an embedding.
        task_type: One of `TASK_TYPES`; classification and question answering save their heads.
        fan_in_fan_out: PEFT's flag for weights that are stored as (in, out).
        init_lora_weights: True: A Kaiming-uniform, B zero. "gaussian": A normal, B zero. False: both random,
            so that the adapter changes the output immediately. "orthogonal", "pissa", "pissa_niter_N",
            "olora" and "loftq" depend on the weight. "mica" depends on it too, with a frozen B (MiCA). "eva",
            "corda" and "lora_ga" also depend on data: call `lora_fx.initialize`.
        loftq_config: Options of "loftq": `loftq_bits`, `loftq_iter`.
        eva_config: Options of "eva": `rho`, `tau`, `use_label_mask`, `label_mask_value`, `whiten`,
            `adjust_scaling_factors`.
        corda_config: Options of "corda": `corda_method`, `use_float16_for_covariance`.
        lora_ga_config: Options of "lora_ga": `direction`, `scale`, `stable_gamma`.
        kasa_config: Options of KaSA; setting them chooses KaSA: `beta`, `gamma`. The base loses its `r`
            smallest singular values, and a diagonal between A and B is trained
            (https://arxiv.org/abs/2412.06071).
        velora_config: Options of VeLoRA; setting them chooses VeLoRA: `num_groups`, `scale`, `init_type`.
            Training keeps compressed inputs for the gradient of A (https://arxiv.org/abs/2405.17991).
        monteclora_config: Options of MonteCLoRA; setting them chooses MonteCLoRA: `num_samples`,
            `use_entropy`, `dirichlet_prior`, `sample_scaler`, `kl_loss_weight`. Training draws noise on A.
            `buffer_size` is PEFT's, and has no effect: noise is drawn in the call that uses it.
        seed: Seeds the initialization of each site. None: `rewrite` and `add_adapter` draw a seed from
            PyTorch's global generator, so that `torch.manual_seed` has an effect, as in PEFT. lora_fx only:
            PEFT warns about unknown keys, so the seed is not saved.
        inference_mode: Saved for PEFT, which loads such an adapter frozen. lora_fx ignores it.
        base_model_name_or_path: The source of the base model.
        revision: The version of the base model.
        auto_mapping: The class of the base model, as `base_model_class` and `parent_library`. PEFT's
            `AutoPeftModel` needs it if there is no `task_type`; a saved folder then has it.
        kind: Name of your own adapter kind (:func:`lora_fx.register_adapter_kind`), instead of LoRA. lora_fx
            only: a file has it only if it is set, and PEFT then does not read the file as LoRA.

    Raises:
        ConfigError: If a value is not valid, a name is not a field, or a PEFT field asks for a feature that
            lora_fx does not have.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    use_bdlora: Mapping[str, Any] | None = None
    arrow_config: Mapping[str, Any] | None = None
    alora_invocation_tokens: Sequence[int] | None = None
    bias: Bias = "none"
    modules_to_save: Collection[str] | None = None
    target_parameters: Collection[str] | None = None
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    ensure_weight_tying: bool = False
    task_type: TaskType | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool | Start | str = True
    loftq_config: Mapping[str, Any] | None = None
    eva_config: Mapping[str, Any] | None = None
    corda_config: Mapping[str, Any] | None = None
    lora_ga_config: Mapping[str, Any] | None = None
    kasa_config: Mapping[str, Any] | None = None
    velora_config: Mapping[str, Any] | None = None
    monteclora_config: Mapping[str, Any] | None = None
    seed: int | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    scope: str | Collection[str] | None = None
    dense_groups: bool = False
    kind: str | None = None

    def __post_init__(self) -> None:
        for name, normalize in NORMALIZERS.items():
            object.__setattr__(self, name, normalize(name, getattr(self, name)))
        own = f"{self.init_lora_weights}_config"
        if own in OPTIONS and getattr(self, own) is None:
            object.__setattr__(self, own, complete_options(own, {}))
        check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types; `from_dict` restores an equal config.

        `scope`, `dense_groups` and `kind`, which PEFT does not have, are included only if they are set.
        """
        values = {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}
        unset = [name for name in ("scope", "kind", "dense_groups") if not values[name]]
        return {name: value for name, value in values.items() if name not in unset}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Create a config from the values of `to_dict`, of lora_fx or PEFT.

        Raises:
            ConfigError: As the constructor, and if there is a `peft_type` other than LORA.
        """
        kind, wanted = values.get("peft_type", "LORA"), _peft_type(values.get("kind"))
        if kind not in ("LORA", wanted):
            raise ConfigError(f"peft_type is {kind!r}; a LoraConfig holds only {wanted!r}")
        return cls(**{name: value for name, value in values.items() if name not in METADATA})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` for PEFT, and create the folder if it is missing.

        The order of `rank_pattern` and `alpha_pattern` is kept (PEFT's own writer sorts it, although the
        first key wins). `seed` and `dense_groups` are not written.

        Raises:
            CheckpointError: If the file cannot be written. An existing file is then unchanged.
        """
        path = Path(directory, CONFIG_NAME)
        values = {**self.to_dict(), "peft_type": _peft_type(self.kind)}
        del values["seed"]
        values.pop("dense_groups", None)
        text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new, new.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise CheckpointError(
                f"{path} cannot be written ({exc}); give a folder that is writable and has room"
            ) from exc

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> LoraConfig:
        """Read the `adapter_config.json` of a local adapter folder, of PEFT or lora_fx.

        A key that neither library knows comes from a newer PEFT. It is ignored, with a warning in the log, if
        its value is a number or switches a feature off. Otherwise it is refused.

        Raises:
            CheckpointError: If the file is missing, is not JSON, or does not belong to a LoRA adapter.
            ConfigError: If a value is wrong or asks for a feature that lora_fx does not have.
        """
        path = current(Path(directory, CONFIG_NAME))
        values = read_json(path)
        kind = values.get("peft_type")
        if kind != _peft_type(values.get("kind")):
            raise CheckpointError(f"{path}: peft_type is {kind!r}; only LoRA adapters can be read")
        known = {*NORMALIZERS, *FOREIGN, *METADATA}
        for name in sorted(values.keys() - known):
            value = values[name]
            if is_off(value) or (isinstance(value, int | float) and value is not True):
                _logger.warning("%s: the unknown key %r (%r) is ignored", path, name, value)
                del values[name]
        try:
            return cls.from_dict(values)
        except ConfigError as exc:
            raise ConfigError(f"{path}: {exc}") from exc


def _peft_type(kind: object) -> str:
    """Return the `peft_type` to save: LORA, or a type unknown to PEFT for an adapter kind of the user.

    PEFT then refuses the file instead of reading it as LoRA.
    """
    return "LORA" if kind is None else f"LORA_FX_{kind}".upper()


def _plain(value: object) -> object:
    if isinstance(value, FrozenOptions):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def adapters_below(folder: Path) -> list[Path]:
    """Return the subfolders that hold an adapter, in the order of their names."""
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


def download_command(name: str) -> str:
    """Return a command that downloads a repository of the Hub, or "" if a text cannot be the name of one."""
    return f"hf download {name} --local-dir {name}" if _HUB_ID.fullmatch(name) else ""


def missing_adapter(path: Path) -> str:
    """Return the error text for a path that does not exist. It lists adapters in the same parent folder."""
    message = (
        f"{path} is not a folder on this machine, and nothing is downloaded: give the folder of an adapter, "
        "or a file of diffusers or kohya (.safetensors)"
    )
    name = path.as_posix()
    if "/" in name and (command := download_command(name)):
        message += f". For an adapter of the Hub, run `{command}` first"
    siblings = [str(folder) for folder in adapters_below(path.parent)]
    return f"{message}. Adapters that exist: {some(siblings)}" if siblings else message


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of an adapter folder.

    Raises:
        CheckpointError: If the file is missing, or holds anything else.
    """
    if not path.is_file():
        below = [str(folder) for folder in adapters_below(path.parent)]
        named = f"; did you mean {some(below, between=' or ')}?" if below else ""
        raise CheckpointError(
            f"{path} does not exist{named or '; give the local folder of a PEFT adapter'}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{path} is not readable JSON ({exc}); save the adapter again"
        ) from exc
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; save the adapter again")
    return values
