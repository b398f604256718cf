"""The target that ships with the package, and its drafts."""

from pathlib import Path

import numpy as np
import pytest

import eagle_jax
from eagle_jax.decode import DynamicTree, Eagle, Medusa, Speculative, generate
from eagle_jax.decode.method import Method
from eagle_jax.decode.tree import MC_SIM_7B_63
from eagle_jax.evaluate import tasks
from eagle_jax.params import Params, shipped

ROOT = Path(__file__).parent.parent
PAIR = ROOT / "eagle_jax" / "pretrained" / "tiny"
PROMPTS = [question.turns[0] for question in tasks.read_tasks(())["own"][:3]]
NEW = 48


@pytest.fixture(scope="module")
def params() -> Params:
    return eagle_jax.load("tiny", dtype="float32")


def test_it_is_small_and_described() -> None:
    """Catches a wheel that package indexes refuse, and weights without their card."""
    assert shipped() == ["tiny"]
    assert sum(file.stat().st_size for file in PAIR.rglob("*")) <= 64 * 2**20
    assert (PAIR / "MODEL_CARD.md").is_file()


def test_every_draft_has_its_directory(params) -> None:
    """Catches a draft that was exported over another's directory, or is not found."""
    directories = {path.parent.name for path in PAIR.glob("*/config.json")}
    assert set(params.drafts) == directories - {"target"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eagle_writes_what_the_target_would_and_faster(params, temperature) -> None:
    """Catches a draft of another target (tau near 1) and, by real weights, a lossy round."""
    tokens = rounds = 0
    for seed, prompt in enumerate(PROMPTS):
        options = {"max_new_tokens": NEW, "temperature": temperature, "seed": seed}
        vanilla = generate(params, prompt, method="vanilla", **options)
        eagle = generate(params, prompt, method=Eagle(MC_SIM_7B_63), **options)
        np.testing.assert_array_equal(eagle.tokens, vanilla.tokens)
        assert vanilla.text and eagle.text == vanilla.text
        tokens, rounds = tokens + len(eagle.tokens), rounds + eagle.statistics.rounds[0]
    print(f"temperature {temperature}: tau {tokens / rounds:.2f}")
    assert tokens / rounds > 1.3


# Half of what they reach above 1 on these prompts.
GOOD: dict[str, tuple[Method, float]] = {
    "eagle2": (Eagle(DynamicTree(depth=3, k=3, drafted=8)), 2.0),
    "eagle3": (Eagle(DynamicTree(depth=3, k=3, drafted=8), head="eagle3"), 2.0),
    "medusa": (Medusa(), 1.5),
    "speculative": (Speculative(3), 1.8),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_draft_is_this_targets(params, name) -> None:
    """Catches a draft of another target, and one that was exported wrong."""
    method, least = GOOD[name]
    prompts = [question.turns[0] for question in tasks.read_tasks((), limit=6)["own"]]
    vanilla = generate(params, prompts, method="vanilla", max_new_tokens=NEW)
    out = generate(params, prompts, method=method, max_new_tokens=NEW)
    assert out.text == vanilla.text
    print(f"{name}: tau {out.statistics.tau:.2f}")
    assert out.statistics.tau > least
