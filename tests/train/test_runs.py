"""Whole runs of the draft objectives, and what `build` refuses."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from eagle_jax.checkpoint import hf
from eagle_jax.config import (
    Distillation,
    Eagle3Config,
    FeatureRegression,
    MedusaConfig,
    MedusaTraining,
    TrainConfig,
    TrainingTimeTest,
)
from eagle_jax.drafters.eagle3.objective import TrainingTimeTestObjective
from eagle_jax.settings import load
from eagle_jax.testing import tiny_draft, tiny_target
from eagle_jax.text import Tokenizer, read_conversations
from eagle_jax.train import data, loop, metrics, objectives
from eagle_jax.train.data import prepared

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run's configuration, and a directory with its target."""
    config = tiny_run.target_run(tmp_path_factory.mktemp("runs"), steps=25)
    config = dataclasses.replace(config, eval_every=0, checkpoint_every=100)
    return config, loop.run(config)["export"]


def run_of(base, kind, **changes):
    """The configuration of a run; `changes` are fields of the objective or of its draft."""
    config, target = base
    model = config.objective.model
    eagle3 = Eagle3Config(
        vocab_size=model.vocab_size,
        draft_vocab_size=40,
        hidden_size=model.hidden_size,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        aux_layers=(0, 1, 2),
    )
    objective = {
        "eagle3": TrainingTimeTest(draft=eagle3, target=target, steps=3),
        "medusa": MedusaTraining(
            draft=MedusaConfig(model.vocab_size, model.hidden_size, num_heads=2), target=target
        ),
        "model": Distillation(draft=tiny_target(model.vocab_size, hidden_size=24), target=target),
    }[kind]
    fields = {field.name for field in dataclasses.fields(objective.draft)}
    inner = {name: value for name, value in changes.items() if name in fields}
    outer = {name: value for name, value in changes.items() if name not in fields}
    draft = dataclasses.replace(objective.draft, **inner)
    return dataclasses.replace(
        config,
        output_dir=str(Path(config.output_dir).parent / kind),
        objective=dataclasses.replace(objective, draft=draft, **outer),
        optim=dataclasses.replace(config.optim, steps=15),
        eval_every=15,
    )


RUNS = ("eagle3", "medusa", "model")


@pytest.mark.parametrize("kind", RUNS)
def test_run_learns_and_exports(kind, base):
    """An objective that the loop cannot drive, that does not learn, or whose export is another."""
    config = run_of(base, kind)
    result = loop.run(config)
    trace = metrics.read_trace(Path(config.output_dir) / metrics.TRACE)
    losses = [line["loss"] for line in trace if "loss" in line]
    assert len(losses) == 15 and losses[-1] < 0.9 * losses[0]
    assert result["validation_loss"] < losses[0] and 0 < result["validation_top1"] <= 1
    draft_config, params = hf.load_draft(result["export"], base[0].objective.model)
    assert draft_config == config.objective.draft
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in params.values())


def test_dry_run_counts(base):
    """FLOPs or parameters that cannot be had without training."""
    sizes = loop.run(run_of(base, "eagle3"), dry_run=True)
    assert sizes["flops_per_token"] > 0 and sizes["trained_parameters"] > 0


# --- The draft vocabulary --------------------------------------------------------------------


def counted(config):
    """Every token of assistant turns, counted without the prepared files."""
    tokenizer = Tokenizer.load(config.tokenizer)
    talks = [talk for file in config.train for talk in read_conversations(file)]
    counter = collections.Counter()
    for tokens, mask in tokenizer.conversations(talks):
        counter.update(int(x) for x, marked in zip(tokens, mask, strict=True) if marked)
    return counter


def test_token_counts(base, monkeypatch):
    """User turns or padding counted as answers; or counting again what is known."""
    config = base[0].data
    found = data.token_counts(config)
    want = counted(config)
    assert [want[i] for i in range(len(found))] == list(found) and want.total() == found.sum()
    assert found.dtype == np.int64 and found[-1] > 0
    monkeypatch.setattr(prepared, "open_rows", None)
    assert (data.token_counts(config) == found).all()


def test_vocabulary_of_a_run(base, capsys):
    """Another vocabulary than the most frequent tokens, or another one in the export."""
    config = run_of(base, "eagle3", draft_vocab_size=9)
    task = objectives.build(config)
    assert isinstance(task, TrainingTimeTestObjective)
    counts = counted(config.data)
    ends = Tokenizer.load(config.data.tokenizer).eos_ids
    rest = sorted((x for x in counts if x not in ends), key=lambda x: (-counts[x], x))
    expected = sorted([*ends, *rest[: 9 - len(ends)]])
    assert list(task.d2t + np.arange(9)) == expected
    share = sum(counts[x] for x in expected) / counts.total()
    assert task.coverage == pytest.approx(share) and 0.3 < share < 1
    assert f"draft vocabulary: 9 of 260 tokens cover {share:.2%}" in capsys.readouterr().err
    folder = Path(config.output_dir).parent / "export9"
    task.export(folder, task.init(0, task.frozen()), "float32", Path(config.data.tokenizer))
    _, params = hf.load_draft(folder, base[0].objective.model)
    assert list(np.asarray(params["d2t"]) + np.arange(9)) == expected
    assert str(share)[:8] in (folder / "config.json").read_text()


# --- What build refuses ----------------------------------------------------------------------

WRONG = {
    "vocabulary": ("eagle3", {"vocab_size": 300}, "draft.vocab_size=300: the target has 260; set"),
    "width": ("medusa", {"hidden_size": 16}, "draft.hidden_size=16: the target has 32; set it"),
    "model": ("model", {"vocab_size": 5}, "draft.vocab_size=5: the target has 260; set it to"),
    "layers": ("eagle3", {"aux_layers": (0, 3)}, r"aux_layers=\(0, 3\): the target has 2 layers"),
    "context": ("model", {"max_position_embeddings": 9}, "longer than objective.draft's max_pos"),
    "steps": ("eagle3", {"steps": 0}, "objective.steps=0: must be 1 to 46, two less than data.s"),
    "heads": ("medusa", {"num_heads": 47}, "objective.draft.num_heads=47: must be 1 to 46, two"),
    "decay": ("eagle3", {"decay": 0.0}, "objective.decay=0.0: must be above 0"),
    "target": ("medusa", {"target": "absent"}, "objective.target='absent': no config.json there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_draft_that_does_not_fit_is_refused(case, base):
    """Clipped indices, or an error of many lines from somewhere inside."""
    kind, changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        objectives.build(run_of(base, kind, **changes))
    assert "\n" not in str(error.value)


def test_a_vocabulary_of_eagle_is_refused(base):
    """A head trained on all tokens, though its configuration says otherwise."""
    config, target = base
    draft = tiny_draft(config.objective.model, draft_vocab_size=9)
    objective = FeatureRegression(draft=draft, target=target)
    said = "objective.draft.draft_vocab_size=9: EAGLE-1 is trained on the target's whole vocabulary"
    with pytest.raises(ValueError, match=said) as error:
        objectives.build(dataclasses.replace(config, objective=objective))
    assert "\n" not in str(error.value)


def test_foreign_tokenizer_is_refused(base):
    """Counts of tokens that the target does not have, cut off without a word."""
    config, target = base
    small = run_of(base, "eagle3")
    model, params = hf.load_target(target)
    narrow = dataclasses.replace(model, vocab_size=100)
    cut = {"embed_tokens.embedding": (100, 32), "lm_head.kernel": (32, 100)}
    params = {
        name: np.zeros(cut[name], np.float32) if name in cut else np.asarray(x, np.float32)
        for name, x in params.items()
    }
    folder = Path(config.output_dir).parent / "narrow"
    hf.save_target(folder, narrow, params, "float32")
    draft = dataclasses.replace(small.objective.draft, vocab_size=100)
    objective = dataclasses.replace(small.objective, draft=draft, target=str(folder))
    with pytest.raises(ValueError, match="gave token .*, but the model has vocab_size=100; use"):
        objectives.build(dataclasses.replace(small, objective=objective))


@pytest.mark.parametrize("name", RUNS)
def test_shipped_config_fits_the_shipped_target(name):
    """A configuration that the shipped target refuses."""
    path = CONFIGS / f"{name}.py"
    changes = [
        "data.train=('train/sample/validation.jsonl',)",
        "data.validation=('train/sample/validation.jsonl',)",
    ]
    config = load(path, changes, kind=TrainConfig)
    assert config.output_dir == f"runs/tiny/{name}"
    task = objectives.build(config)
    assert task.vocab_size == 8192 and task.flops_per_token(512) > 0
    json.dumps(dataclasses.asdict(config))
