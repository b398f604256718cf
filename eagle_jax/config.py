"""Configuration: frozen dataclasses, Python config files, dotted overrides.

A config file is a Python file that defines `config = ...`, an instance of one of the dataclasses
below; `load(path, ["optim.learning_rate=1e-3"])` reads it and applies overrides. Every field is
checked by name and by type: a misspelt key is an error that lists the valid ones.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer; field names and meanings are Hugging Face's.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width `d` of the residual stream.
        intermediate_size: width `f` of the SwiGLU block.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads `h`.
        num_key_value_heads: key/value heads `k`; `h` is a multiple of it.
        head_dim: width `e` of one head.
        rope_theta: base of the rotary embedding.
        rms_norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: longest sequence (prompt and answer together), in tokens.
        tie_word_embeddings: the output head is the embedding matrix.
        attention_bias: biases on the q, k and v projections (Qwen2).
        fused_mlp: gate and up projections are one matrix; in memory only, `eagle_jax.load` sets it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    fused_mlp: bool = False

    def __post_init__(self) -> None:
        check(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding needs an even number")


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The EAGLE-1 draft: `fc` and one decoder layer over the target's features (paper section 4.1).

    Attributes:
        hidden_size: width of the features, equal to the target's.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rope_theta,
            rms_norm_eps, attention_bias, fused_mlp: of its decoder layer, as in
            `TransformerConfig`.
        vocab_size: the target's; the embedding and the head are the target's own, frozen.
        bias: `fc` has a bias (the published default; Llama-3 heads have none).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    fused_mlp: bool = False
    bias: bool = True

    def layer(self) -> TransformerConfig:
        """The draft's single decoder layer, as a one-layer transformer configuration."""
        shared = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "bias"
        }
        return TransformerConfig(num_hidden_layers=1, **shared)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training text comes from and how it is cut into sequences.

    Attributes:
        train: conversations, JSONL (plain or gzip), one file or several.
        validation: the same for held-out conversations.
        tokenizer: a `tokenizer.json`, or a directory that holds one.
        sequence_length: tokens of one packed sequence.
        batch_size: sequences of one optimizer step.
        cache_dir: where the prepared ArrayRecord files live.
        workers: processes that decode and pack; 0 does it in the training process.
        seed: of the shuffle.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    tokenizer: str = ""
    sequence_length: int = 512
    batch_size: int = 64
    cache_dir: str = "~/.cache/eagle_jax/data"
    workers: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up.

    Attributes:
        learning_rate: the peak.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of linear rise from zero.
        schedule: after warm-up, "constant", "cosine" or "linear" decay to `final_fraction`.
        final_fraction: last learning rate over the peak.
        b1, b2, eps, weight_decay: AdamW's; decay acts on matrices only.
        clip_value: clip each gradient element to ±this (EAGLE-1's code), or none.
        clip_norm: clip the global norm, or none.
    """

    learning_rate: float
    steps: int
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Objective: next-token cross-entropy on assistant tokens; trains the target.

    Attributes:
        model: the architecture to train from random weights.
    """

    model: TransformerConfig


@dataclasses.dataclass(frozen=True)
class FeatureRegression:
    """Objective of EAGLE-1 (paper section 4.2): features by smooth L1, tokens by distillation.

    Attributes:
        draft: the architecture to train from random weights.
        target: a directory that `eagle_jax.load` reads, or the name of a shipped pair.
        feature_weight: weight of smooth L1 between predicted and real features.
        token_weight: weight of the soft cross-entropy through the target's head.
        noise: half-width of the uniform noise added to input features, as the paper has it.
    """

    draft: EagleConfig
    target: str
    feature_weight: float = 1.0
    token_weight: float = 0.1
    noise: float = 0.1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output_dir: receives checkpoints, events, the loss curve and the final export.
        objective: what is trained, against what.
        data: the text.
        optim: the optimizer.
        seed: of initial weights and of noise.
        compute_dtype: dtype of activations; weights and optimizer state are float32.
        eval_every, eval_batches: validation interval in steps, and its length (0: no validation).
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay.
        export_dtype: dtype of the exported safetensors.
        fsdp: devices that share one copy of weights and optimizer state; all share the batch.
        peak_flops: of one device, for MFU; 0 looks the device up.
        attention: "xla", or cuDNN's fused kernel: bfloat16 on a GPU, where it takes half the time
            and never holds scores of all pairs of tokens.
        remat: recompute activations in the backward pass, which saves memory for time.
    """

    output_dir: str
    objective: NextToken | FeatureRegression
    data: DataConfig
    optim: OptimConfig
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    eval_every: int = 500
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fsdp: int = 1
    peak_flops: float = 0.0
    attention: Literal["xla", "cudnn"] = "xla"
    remat: bool = False


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: type[T] = TrainConfig,  # pyright: ignore[reportArgumentType]
) -> T:
    """Runs a Python config file and returns its `config`, overridden and checked.

    The file may import `eagle_jax.config` and the config files beside it.

    Args:
        path: a Python file that defines `config`.
        overrides: as in `override`.
        kind: the dataclass that `config` must be an instance of.

    Raises:
        ValueError: the file is missing or fails, or a key or a value is wrong; one line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a Python file that defines `config = ...`")
    names = _run(path)
    if "config" not in names:
        raise ValueError(f"{path}: defines no `config`; add `config = {kind.__name__}(...)`")
    config = names["config"]
    if not isinstance(config, kind):
        raise ValueError(
            f"{path}: `config` is of type {type(config).__name__}; "
            f"make it an instance of {kind.__name__}"
        )
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return override(config, overrides)


def override(config: T, overrides: Sequence[str]) -> T:
    """A copy of `config` with fields replaced.

    All replacements take effect together, so fields that constrain each other can change at once.

    Args:
        config: a configuration dataclass, possibly nested.
        overrides: `"key=value"` each, with a dotted key such as `optim.learning_rate`. The value is
            a Python literal, or else a plain string.

    Raises:
        ValueError: no `=`, an unknown key, or a value that does not fit the field; one line.
    """
    changes: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"override {item!r}: write key=value, e.g. optim.learning_rate=1e-3")
        _place(changes, config, key.strip(), text.strip())
    return _rebuild(config, changes)


def check(config: Any) -> None:
    """Checks the type of every field, recursively.

    Raises:
        ValueError: names the first field whose value does not fit its type.
    """
    _check(config, prefix="")


def _check(config: Any, prefix: str) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        _fit(value, hint, prefix + name)
        if dataclasses.is_dataclass(value):
            _check(value, prefix=f"{prefix}{name}.")


def _place(changes: dict[str, Any], config: Any, key: str, text: str) -> None:
    """Parses one override and stores its value at the dotted `key` of nested `changes`."""
    *parents, leaf = key.split(".")
    for depth, name in enumerate(parents):
        _known(config, name, key)
        config = getattr(config, name)
        if not dataclasses.is_dataclass(config):
            field = ".".join(parents[: depth + 1])
            raise ValueError(f"{key}: {field} is {config!r} and has no fields; set {field} itself")
        changes = changes.setdefault(name, {})
    _known(config, leaf, key)
    if dataclasses.is_dataclass(getattr(config, leaf)):
        raise ValueError(f"{key}={text}: set one of its fields: {_fields(config, leaf)}")
    changes[leaf] = _parse(text, typing.get_type_hints(type(config))[leaf], key)


def _known(config: Any, name: str, key: str) -> None:
    names = [field.name for field in dataclasses.fields(config)]
    if name not in names:
        raise ValueError(f"{key}: {_unknown(type(config).__name__, name, names)}")


def _unknown(owner: str, name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"{owner} has no field {name!r};{hint} valid: {', '.join(names)}"


def _fields(config: Any, name: str) -> str:
    nested = dataclasses.fields(getattr(config, name))
    return ", ".join(f"{name}.{field.name}" for field in nested)


def _parse(text: str, hint: Any, key: str) -> Any:
    """`text` as a literal if that fits the field, else as it stands: 007 can name a directory."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return _fit(text, hint, key)
    with contextlib.suppress(ValueError):
        return _fit(value, hint, key)
    try:
        return _fit(text, hint, key)
    except ValueError:
        return _fit(value, hint, key)  # its message shows the value as it was read


def _rebuild(config: T, changes: Mapping[str, Any]) -> T:
    nested = {
        name: _rebuild(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **nested)  # pyright: ignore[reportArgumentType]


def _fit(value: Any, hint: Any, key: str) -> Any:
    """`value` as a `hint` (int widens to float, list to tuple), or an error that names `key`."""
    try:
        return _convert(value, hint)
    except TypeError:
        raise ValueError(f"{key}={value!r}: must be {_describe(hint)}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            with contextlib.suppress(TypeError):
                return _convert(value, argument)
    elif origin is tuple:
        if isinstance(value, tuple | list):
            return _convert_tuple(tuple(value), arguments)
    elif hint is float and type(value) is int:
        return float(value)
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise TypeError


def _convert_tuple(value: tuple, arguments: tuple) -> tuple:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise TypeError
    return tuple(_convert(item, hint) for item, hint in zip(value, arguments, strict=True))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if hint is types.NoneType:
        return "None"
    if origin is tuple:
        return f"a tuple such as ({_describe(arguments[0])}, ...)"
    return hint.__name__


def _run(path: Path) -> dict[str, Any]:
    """The names that the file defines; whatever goes wrong in it becomes one line."""
    try:
        with _importing_from(path.parent.resolve()):
            return runpy.run_path(str(path))
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise ValueError(f"{_where(error, path)}: {_explain(error)}") from error


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Makes the files of `folder` importable, and forgets them afterwards.

    Two folders may both have a `base.py`: without forgetting, the second would get the first's.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                del sys.modules[name]


def _where(error: Exception, path: Path) -> str:
    """File and line of the innermost frame in the config's folder, where the user can act."""
    folder = path.parent.resolve()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve().parent == folder:
            return f"{frame.filename}, line {frame.lineno}"
    return str(path)


def _explain(error: Exception) -> str:
    """The message; a misspelt keyword of a dataclass gets the valid names."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword.*?'(\w+)'", str(error))
    owner = globals().get(found[1]) if found else None
    if isinstance(error, TypeError) and found and dataclasses.is_dataclass(owner):
        names = [field.name for field in dataclasses.fields(owner)]
        return _unknown(found[1], found[2], names)
    message = " ".join(str(error).split())
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"
