"""Config files, overrides and their errors: every user error is one line that helps."""

import dataclasses
import functools

import pytest

from eagle_jax import config as c
from eagle_jax import settings

load = functools.partial(settings.load, kind=c.TrainConfig)
MODEL = """TransformerConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4)"""
FILE = f"""
from eagle_jax.config import *
config = TrainConfig(
    output_dir="out", objective=NextToken(model={MODEL}),
    data=DataConfig(train=("a.jsonl",)), optim=OptimConfig(learning_rate=1e-3, steps=10))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "base.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def config(file):
    return load(file)


def message(function, *args) -> str:
    with pytest.raises(ValueError) as info:
        function(*args)
    text = str(info.value)
    assert "\n" not in text
    return text


def test_load(config):
    assert config.optim == c.OptimConfig(learning_rate=1e-3, steps=10)
    assert config.objective.model.head_dim == 4


def test_load_applies_overrides(file):
    assert load(file, ["seed=3"]).seed == 3


def test_imports_the_file_beside_it_and_no_stale_one(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base.py").write_text(FILE)
        (folder / "child.py").write_text(
            "import dataclasses, base\n"
            f"config = dataclasses.replace(base.config, seed={seed}, output_dir=base.__file__)"
        )
        config = load(folder / "child.py")
        assert (config.seed, config.output_dir) == (seed, str(folder / "base.py"))


@pytest.mark.parametrize(
    ("item", "path", "expected"),
    [
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("optim.learning_rate=3e-4", "optim.learning_rate", 3e-4),
        ("optim.clip_norm=1", "optim.clip_norm", 1.0),
        ("optim.clip_norm=None", "optim.clip_norm", None),
        ("optim.schedule=cosine", "optim.schedule", "cosine"),
        ("optim.schedule='linear'", "optim.schedule", "linear"),
        ("data.train=('b.jsonl', 'c.jsonl')", "data.train", ("b.jsonl", "c.jsonl")),
        ("data.train=['b.jsonl']", "data.train", ("b.jsonl",)),
        ("data.tokenizer=007", "data.tokenizer", "007"),
        ("data.tokenizer=a=b", "data.tokenizer", "a=b"),
        ("output_dir=1e3", "output_dir", "1e3"),
        ("objective.model.tie_word_embeddings=True", "objective.model.tie_word_embeddings", True),
    ],
)
def test_override(config, item, path, expected):
    value = settings.override(config, [item])
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_overrides_that_constrain_each_other_apply_together(config):
    heads = ["objective.model.num_attention_heads=3", "objective.model.num_key_value_heads=3"]
    assert settings.override(config, heads).objective.model.num_key_value_heads == 3
    assert "multiple of" in message(settings.override, config, heads[:1])


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("optim.learning_rte=1", ["optim.learning_rte", "'learning_rate'?", "warmup_steps"]),
        ("optimizer.steps=1", ["TrainConfig", "'optim'?", "valid: output_dir"]),
        ("seed.a=1", ["seed is 0", "no fields"]),
        ("optim=1", ["is OptimConfig", "optim.learning_rate"]),
        ("seed", ["key=value"]),
        ("seed=x", ["seed='x'", "int"]),
        ("seed=True", ["seed=True", "int"]),
        ("seed=1.5", ["seed=1.5", "int"]),
        ("data.train=a.jsonl", ["data.train='a.jsonl'", "tuple such as (str, ...)"]),
        ("data.train=(1,)", ["data.train=(1,)"]),
        ("optim.schedule=cos", ["'cos'", "'constant', 'cosine', 'linear'"]),
        ("optim.clip_norm=a", ["a finite number or None"]),
        ("optim.learning_rate=nan", ["optim.learning_rate='nan': must be a finite number"]),
        ("optim.learning_rate=1e999", ["optim.learning_rate=inf: must be a finite number"]),
        ("objective.model.head_dim=3", ["head_dim=3", "even"]),
    ],
)
def test_override_errors(config, item, parts):
    text = message(settings.override, config, [item])
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("learning_rate", "learning_rte", ["line 7", ": OptimConfig", "'learning_rate'?", "steps"]),
        ("learning_rate=1e-3, ", "", ["OptimConfig", "'learning_rate'"]),
        ("hidden_size=16", "hidden_size='16'", ["hidden_size='16': must be int"]),
        ("steps=10", "steps='10'", ["optim.steps='10': must be int"]),
        ("config = ", "cfg = ", ["no `config`", "TrainConfig"]),
        ("config = ", "config = 3 #", ["base.py, line 4"]),
        ("\nconfig", "\nconfig = 3\ncfg", ["type int", "TrainConfig"]),
        ("= TrainConfig(", "= TrainConfg(", ["line 3", "NameError", "TrainConfg"]),
    ],
)
def test_file_errors(file, old, new, parts):
    file.write_text(FILE.replace(old, new))
    text = message(load, file)
    assert all(part in text for part in [str(file), *parts]), text


def test_missing_file(tmp_path):
    assert "no such file" in message(load, tmp_path / "none.py")


def test_kind(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(f"from eagle_jax.config import *\nconfig = {MODEL}")
    assert settings.load(path, kind=c.TransformerConfig).vocab_size == 64
    assert "TransformerConfig" in message(load, path)


def test_check_names_the_nested_field(config):
    wrong = dataclasses.replace(config, data=c.DataConfig(train="a.jsonl"))  # type: ignore
    assert "data.train='a.jsonl'" in message(settings.check, wrong)
