"""Loading models: mistakes are told in one line; importing stays cheap."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eagle_jax
from eagle_jax.checkpoint import hf

# Each costs seconds. optax is not among them: flax.nnx imports it.
HEAVY = ("grain", "matplotlib", "orbax", "tensorboardX", "tensorflow_datasets", "torch")
HEAVY += ("transformers",)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(said: str, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        eagle_jax.load(*arguments, **options)
    assert "\n" not in str(info.value)


def test_a_pair_a_bare_target_and_another_draft(model) -> None:
    pair = eagle_jax.load(model)
    assert pair.draft is not None and pair.draft_config is not None and pair.tokenizer is not None
    alone = eagle_jax.load(model / "target")
    assert alone.draft is None and alone.draft_config is None
    again = eagle_jax.load(model / "target", draft=model / "draft", dtype="bfloat16")
    assert again.draft_config == pair.draft_config
    assert again.draft is not None
    arrays = [*again.target.values(), *again.draft.values()]
    assert {str(array.dtype) for array in arrays} == {"bfloat16"}


def test_an_unknown_name_lists_the_shipped_pairs() -> None:
    fails("model 'tinny': neither a directory nor a shipped pair (tiny); give a folder", "tinny")


@pytest.mark.parametrize("part", ["target", "draft"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_weights(model, part, share) -> None:
    file = model / part / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    fails(f"{file}: truncated or corrupt (", model)


@pytest.mark.parametrize("part", ["target", "draft"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "{folder}: has no model.safetensors; export the model again"),
        ("config.json", "{folder}/config.json: no such file; give a Hugging Face model directory"),
    ],
)
def test_missing_files(model, part, name, said) -> None:
    (model / part / name).unlink()
    fails(said.format(folder=model / part), model)


def test_a_missing_draft(model) -> None:
    gone = model / "nowhere"
    fails(f"{gone}/config.json: no such file", model, draft=gone)


def test_weights_and_configuration_that_disagree(model) -> None:
    edit(model / "target" / "config.json", num_hidden_layers=3)
    fails("lacks tensors model.layers.2.input_layernorm.weight, ", model)


@pytest.mark.parametrize(
    ("field", "target", "draft"), [("vocab_size", 260, 300), ("hidden_size", 32, 48)]
)
def test_a_draft_of_another_target(model, field, target, draft) -> None:
    """Both values stand in the message."""
    config = hf.load_draft(model / "draft")[0]
    config = dataclasses.replace(config, **{field: draft})
    zeros = {name: np.zeros(shape) for name, shape in hf.shapes(config).items()}
    hf.save_draft(model / "other", config, zeros)
    said = f"{field}: the target has {target}, the draft {draft}; give a draft that was trained"
    fails(said, model, draft=model / "other")


def test_imports_are_cheap() -> None:
    """Catches a heavy package imported at the top of a module that decoding needs."""
    program = (
        "import sys, eagle_jax; light = 'jax' not in sys.modules; import eagle_jax.decode; "
        f"print(light, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True []\n", done.stderr
