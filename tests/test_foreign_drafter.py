"""A drafter that the library does not know: defined here, used everywhere, no line edited for it.

It is a small recurrent head (as in ReDrafter, arXiv 2403.09919, with one layer): a state that
begins as the target's feature reads token after token, and the target's head scores it.
"""

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from model_directories import message

from eagle_jax import convert, drafters, settings
from eagle_jax.checkpoint import hf, safetensors
from eagle_jax.config import TrainConfig
from eagle_jax.decode import METHODS, Exact, chain, generate, method_cli
from eagle_jax.decode.method import Context, Models, Prompt, Rule, Verified
from eagle_jax.decode.top_k import argmax
from eagle_jax.decode.tree import Proposal
from eagle_jax.drafters import registry
from eagle_jax.evaluate import EvalConfig
from eagle_jax.evaluate.__main__ import evaluate
from eagle_jax.layout import PLAIN, Layout
from eagle_jax.models import Output, bind, init_params
from eagle_jax.models.linear import Linear
from eagle_jax.params import Params, load
from eagle_jax.train import loop, metrics, objectives
from eagle_jax.train.objectives import means, target
from eagle_jax.train.objectives.base import (
    head_kernel,
    next_weights,
    project,
    rank,
    shift,
    transformer_flops,
    weighted_sums,
)
from eagle_jax.tune import tune

# --- The drafter -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """The architecture: `width` between the state's two matrices."""

    vocab_size: int
    hidden_size: int
    width: int = 24

    kind: ClassVar[str] = "recurrent"

    def __post_init__(self) -> None:
        settings.check(self)


@dataclasses.dataclass(frozen=True)
class RecurrentTraining:
    """Cross-entropy of the token after the next, given the target's feature and the next token."""

    draft: RecurrentConfig
    target: str
    features: str = ""


class Recurrent(nnx.Module):
    """`s + down(silu(up([s ; embedding])))`."""

    def __init__(self, config: RecurrentConfig, layout: Layout = PLAIN, *, rngs: nnx.Rngs) -> None:
        del layout  # small as it is, it stays in floats
        self.up = Linear(2 * config.hidden_size, config.width, rngs=rngs)
        self.down = Linear(config.width, config.hidden_size, zero=True, rngs=rngs)

    def __call__(self, state: jax.Array, embedding: jax.Array) -> jax.Array:
        read = jnp.concatenate([state, embedding], axis=-1)
        return state + self.down(jax.nn.silu(self.up(read)))

    def features(self, output: Output) -> jax.Array:
        """What is read of a target pass."""
        return output.features


@dataclasses.dataclass(frozen=True, eq=False)
class RecurrentObjective:
    """Cross-entropy through the target's frozen head."""

    settings: RecurrentTraining
    target_config: Any
    target: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        return self.target_config.vocab_size

    def init(self, seed, frozen):
        return init_params(Recurrent, self.settings.draft, seed)

    def frozen(self):
        return self.target

    def loss(self, trainable, frozen, batch, key):
        [features] = target.features(self.target_config, (), frozen, batch, "xla")
        embedding = target.embedding(self.target_config, frozen)(shift(batch["tokens"], 1))
        state = bind(Recurrent, self.settings.draft, trainable)(features, embedding)
        logits, labels = project(state, head_kernel(self.target_config, frozen)), batch["tokens"]
        labels = shift(labels, 2)
        own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        rows = {
            "loss": jax.nn.logsumexp(logits, axis=-1) - own,
            "top1": rank(logits, labels) < 1,
        }
        sums = weighted_sums(next_weights(batch, 2), rows)
        return means(sums)["loss"], sums

    def flops_per_token(self, sequence_length: int) -> float:
        return sum(transformer_flops(self.target_config, sequence_length))

    def export(self, directory: Path, params, dtype: str, tokenizer: Path) -> None:
        hf.save_draft(directory, self.settings.draft, params, dtype)


def build(config: TrainConfig, target_config, target_params, vocabulary) -> RecurrentObjective:
    """The objective of a run."""
    hf.check_fit(target_config, config.objective.draft)  # pyright: ignore
    return RecurrentObjective(config.objective, target_config, target_params)  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class RecurrentChain:
    """A chain of `length` tokens."""

    length: int = 3
    rule: Rule = dataclasses.field(default=Exact(), init=False)
    draft: str = dataclasses.field(default="recurrent", init=False)

    @property
    def nodes(self) -> int:
        return self.length + 1

    @property
    def depth(self) -> int:
        return self.length

    def check(self, params: Params) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length}: must be at least 1")

    def init(self, models: Models, prompt: Prompt, slots: int) -> jax.Array:
        assert prompt.features is not None
        before = jnp.maximum(prompt.length - 2, 0)[:, None, None]
        return jnp.take_along_axis(prompt.features, before, axis=1, mode="clip")[:, 0]

    def propose(self, models: Models, context: Context, state: jax.Array):
        tokens, drafted = [context.root()], state
        for _ in range(self.length):
            embedding = models.target.embed_tokens(tokens[-1][:, None])[:, 0]
            drafted = models.draft(drafted, embedding)
            tokens.append(argmax(models.target.logits(drafted[:, None])[:, 0]))
        return Proposal(jnp.stack(tokens, axis=1), chain(self.length).shape(len(state))), state

    def update(self, models: Models, state: jax.Array, verified: Verified) -> jax.Array:
        last = jnp.maximum(verified.committed - 1, 0)[:, None]
        node = jnp.take_along_axis(verified.path, last, axis=1, mode="clip")[:, :, None]
        return jnp.take_along_axis(verified.output.features, node, axis=1, mode="clip")[:, 0]


SPEC = drafters.DrafterSpec(
    kind="recurrent",
    config=RecurrentConfig,
    module=Recurrent,
    objectives=(RecurrentTraining,),
    build=build,
    methods={"recurrent": RecurrentChain},
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The drafter, for the tests of this module alone."""
    before = dict(registry._registered)
    drafters.register(SPEC)
    yield
    registry._registered.clear()
    registry._registered.update(before)


# --- What the library does with it -----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(registered, tmp_path_factory) -> TrainConfig:
    """A finished run of the trainer, against a trained target."""
    folder = tmp_path_factory.mktemp("recurrent")
    base = tiny_run.target_run(folder, steps=40)
    loop.run(base)
    architecture = base.objective.model  # pyright: ignore
    draft = RecurrentConfig(architecture.vocab_size, architecture.hidden_size)
    config = dataclasses.replace(
        base,
        output_dir=str(folder / "draft"),
        objective=RecurrentTraining(draft, str(folder / "target" / "export")),
        optim=dataclasses.replace(base.optim, steps=12),
    )
    result = loop.run(config)
    assert result["steps"] == 12 and np.isfinite(result["loss"])
    return config


@pytest.fixture(scope="module")
def pair(trained) -> Params:
    return load(trained.objective.target, draft=Path(trained.output_dir) / "export")


def test_training_goes_on_from_a_checkpoint(trained, tmp_path):
    """Catches a trainer that knows the objectives by name, and one that forgets a foreign one."""
    shutil.copytree(trained.output_dir, tmp_path / "run")
    again = dataclasses.replace(trained, output_dir=str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "export")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    assert loop.run(again)["steps"] == 12
    for name in (metrics.TRACE, "export/model.safetensors"):
        first, second = (Path(x.output_dir) / name for x in (trained, again))
        assert first.read_bytes() == second.read_bytes(), name


def test_config_files_and_overrides(trained):
    """Catches a TrainConfig that refuses foreign settings, or does not reach into them."""
    changed = settings.override(trained, ["objective.draft.width=7"])
    assert changed.objective.draft.width == 7
    text = message(settings.override, trained, ["objective.draft.widht=7"])
    assert "did you mean 'width'?" in text


def test_sequences_fit_the_target(trained, tmp_path):
    """Catches a check that every drafter has to call for itself."""
    longer = dataclasses.replace(trained.data, sequence_length=10**6)
    config = dataclasses.replace(trained, output_dir=str(tmp_path), data=longer)
    text = message(objectives.build, config)
    assert "longer than objective.target's max_position_embeddings" in text


def test_the_drafts_text_is_vanillas(pair):
    """Catches a draft that is loaded with other weights, or is bound as another module."""
    assert set(pair.drafts) == {"recurrent"}
    prompt = list(range(60, 75))
    expected = generate(pair, prompt, method="vanilla", max_new_tokens=24).tokens
    out = generate(pair, prompt, method="recurrent", max_new_tokens=24)
    np.testing.assert_array_equal(out.tokens, expected)
    assert out.statistics.tau >= 1
    assert "recurrent" in METHODS and method_cli.parse("--method recurrent") == RecurrentChain()
    longer = RecurrentChain(5)
    assert method_cli.parse(method_cli.spell(longer)) == longer


def test_conversion_and_inspection(trained, pair, tmp_path):
    """Catches a converter that drops a foreign draft, and a description that cannot name it."""
    head = Path(trained.output_dir) / "export"
    said = convert.inspect(head, trained.objective.target)["."]
    assert said["kind"] == "recurrent" and "cannot be loaded" not in said
    made = convert.convert(trained.objective.target, tmp_path / "new", "native", draft=[head])
    assert made["kinds"] == ["target", "recurrent"]
    again = load(tmp_path / "new").drafts["recurrent"]
    assert again.config == pair.drafts["recurrent"].config
    for name, array in pair.drafts["recurrent"].params.items():
        np.testing.assert_array_equal(array, again.params[name])
    there = tmp_path / "official"
    convert.convert(head, there, "official", target=trained.objective.target)
    assert hf.load_draft(there)[0] == again.config
    text = message(convert.convert, head, tmp_path / "no", "sglang")
    assert "kind 'recurrent' has no layout in sglang" in text


def test_files_say_what_is_wrong(trained, tmp_path):
    """Catches a traceback where a foreign draft's file is damaged."""
    shutil.copytree(Path(trained.output_dir) / "export", tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"width": "7"}))
    assert message(hf.load_draft, tmp_path / "head") == f"{path}: width='7': must be int"
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "hidden_size"}))
    assert message(hf.load_draft, tmp_path / "head") == f"{path}: has no hidden_size; add it"
    path.write_text(json.dumps(content | {"width": 7}))
    assert "down.weight has shape (32, 24)" in message(hf.load_draft, tmp_path / "head")
    tensors = safetensors.read(tmp_path / "head" / "model.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {
        "up.weight": (24, 64),
        "down.weight": (32, 24),
    }


def test_tuning_considers_it(pair):
    """Catches a grid that has the built-in drafters only."""
    prompts = [list(range(start, start + 9)) for start in range(60, 66)]
    [found] = tune(pair, prompts, temperatures=[0.0], new_tokens=16, quiet=True)
    assert "recurrent" in {m.prediction.family for m in found.heats}


def test_evaluation_compares_it(trained, tmp_path):
    """Catches an evaluation that knows the methods by name."""
    config = EvalConfig(
        output_dir=str(tmp_path),
        methods=(("vanilla", METHODS["vanilla"]()), ("mine", METHODS["recurrent"]())),
        model=trained.objective.target,
        drafts=(str(Path(trained.output_dir) / "export"),),
        limit=2,
        temperatures=(0.0,),
        new_tokens=8,
        repeats=1,
        warm_up=False,
        step_times=(),
    )
    result = evaluate(config, restart=True, strict=True)
    assert result["lossless"] is True
    assert {row["method"] for row in result["rows"]} == {"vanilla", "mine"}


# --- The registry ----------------------------------------------------------------------------


class _Entry:
    """An entry point."""

    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self.found = name, f"somewhere:{name}", found

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def installed(monkeypatch):
    """Pretends that packages with these entry points are installed."""

    def install(**found: Any) -> None:
        entries = [_Entry(name, spec) for name, spec in found.items()]
        real = importlib.metadata.entry_points
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda **q: entries if q == {"group": "eagle_jax.drafters"} else real(**q),
        )
        registry._installed.cache_clear()

    yield install
    monkeypatch.undo()
    registry._installed.cache_clear()


def test_entry_points(installed, trained, monkeypatch):
    """Catches an installed drafter that nobody finds."""
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(ValueError, match="'recurrent': unknown; use one of eagle, eagle3, medusa"):
        drafters.by_kind("recurrent")
    with pytest.raises(ValueError, match="RecurrentTraining belongs to no drafter; use NextToken"):
        drafters.by_objective(trained.objective)
    installed(mine=SPEC)
    assert drafters.by_kind("recurrent") is SPEC and "recurrent" in METHODS
    assert drafters.by_objective(trained.objective) is SPEC
    assert hf.kind(Path(trained.output_dir) / "export") == "recurrent"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (ImportError("no module named x"), "no module named x"),
        (3, "is int, not a DrafterSpec"),
        (dataclasses.replace(SPEC, kind="eagle"), "draft kind 'eagle': another drafter has"),
    ],
)
def test_a_broken_entry_point_is_left_out(installed, found, said):
    """Catches one broken package that keeps all models from being loaded."""
    with pytest.warns(UserWarning, match=f"drafter 'broken' .*{said}"):
        installed(broken=found)
        drafters.specs()
    assert "medusa" in drafters.specs()


def test_names_are_taken_once():
    """Catches a drafter that silently takes the place of another."""
    other = dataclasses.replace(SPEC, kind="other")
    with pytest.raises(ValueError, match="method 'recurrent': drafter 'recurrent' has a method"):
        drafters.register(other)
    with pytest.raises(ValueError, match="draft kind 'recurrent': another drafter has this name"):
        drafters.register(dataclasses.replace(SPEC, methods={}))
    assert drafters.register(SPEC) is SPEC


def test_a_target_is_no_draft(trained):
    """Catches a recognition that is too eager: a whole model has no key of the drafter."""
    assert hf.kind(Path(trained.objective.target)) == "model"
