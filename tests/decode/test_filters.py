"""Filters against transformers' processors, and along the paths of trees against a naive loop."""

import functools
from typing import Any

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.decode import SamplingParams
from eagle_jax.decode.sampling import Path, Sampling, Vocabulary
from eagle_jax.decode.tree import Shape, StaticTree

VOCAB, EOS = 23, (4, 9)
VOCABULARY = Vocabulary(VOCAB, EOS)


@functools.partial(jax.jit, static_argnums=4)
def processed(sampling: Sampling, logits, path_arrays, shape: Shape, longest: int):
    tokens, length, drafted = path_arrays
    path = Path(tokens, length, sampling.prompt, drafted, shape, longest)
    return sampling.process(logits, path)


def on_texts(rows: list[SamplingParams], texts: list[list[int]], prompts: list[int], logits):
    """What is left of one distribution [v] after each text."""
    sampling = Sampling.of([VOCABULARY.resolve(row) for row in rows], VOCABULARY, prompts)
    size = 40
    tokens = np.array([text + [0] * (size - len(text)) for text in texts], np.int32)
    length = np.array([len(text) for text in texts], np.int32)
    root = np.array([[text[-1]] for text in texts], np.int32)
    shape = StaticTree(()).shape(len(texts))
    return np.asarray(processed(sampling, logits[:, None], (tokens, length, root), shape, 1)[:, 0])


def theirs(row: SamplingParams, text: list[int], prompt: int, logits: np.ndarray) -> np.ndarray:
    """The same by transformers' processors, in our order."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    ids, scores = torch.tensor([text]), torch.tensor(logits[None])
    made: list = []
    words: Any = [list(word) for word in row.bad_words]
    biases: Any = {(token,): bias for token, bias in dict(row.logit_bias).items()}
    if row.logit_bias:
        made.append(hf.SequenceBiasLogitsProcessor(biases))
    if row.bad_words:
        made.append(hf.NoBadWordsLogitsProcessor(words, eos_token_id=None))
    if row.min_tokens:
        made.append(hf.MinNewTokensLengthLogitsProcessor(prompt, row.min_tokens, list(EOS)))
    if row.repetition_penalty != 1:
        made.append(hf.RepetitionPenaltyLogitsProcessor(row.repetition_penalty))
    if row.temperature:
        made.append(hf.TemperatureLogitsWarper(row.temperature))
        if row.top_k:
            made.append(hf.TopKLogitsWarper(row.top_k))
        if row.top_p < 1:
            made.append(hf.TopPLogitsWarper(row.top_p))
        if row.min_p:
            made.append(hf.MinPLogitsWarper(row.min_p))
    for one in made:
        scores = one(ids, scores)
    return scores[0].numpy()


WORDS = [[5], [1, 2], [3, 1, 7], [2, 2]]
THEIRS = [
    SamplingParams(logit_bias={3: 4.0, 22: -50.0}),
    SamplingParams(bad_words=WORDS),
    SamplingParams(min_tokens=4),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(temperature=0.9, top_p=0.6),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.8, top_k=9, top_p=0.8, min_p=0.1),
    SamplingParams(
        logit_bias={3: 4.0, 22: -50.0},
        bad_words=WORDS,
        min_tokens=4,
        repetition_penalty=1.4,
        temperature=0.8,
        top_k=12,
        top_p=0.9,
        min_p=0.02,
    ),
    SamplingParams(),
]


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_transformers(seed: int) -> None:
    """Rows with all these settings at once, in one program, on random texts and logits."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 8, rng.integers(8, 20)).tolist() for _ in THEIRS]
    texts[1][-2:] = [3, 1]  # a bad word is about to be completed
    prompts = [int(rng.integers(1, len(text) + 1)) for text in texts]
    logits = (3 * rng.normal(size=(len(THEIRS), VOCAB))).astype(np.float32)
    got = on_texts(THEIRS, texts, prompts, jnp.asarray(logits))
    for row, settings in enumerate(THEIRS):
        wanted = theirs(settings, texts[row], prompts[row], logits[row])
        np.testing.assert_allclose(got[row], wanted, rtol=2e-5, err_msg=str(settings))


ROWS = [
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(presence_penalty=0.8, temperature=1.0),
    SamplingParams(frequency_penalty=0.4),
    SamplingParams(frequency_penalty=-0.3, presence_penalty=2.0, repetition_penalty=0.8),
    SamplingParams(bad_words=[[1, 2, 0], [0, 0], [2], [1, 1, 1, 1, 0]], temperature=0.5),
    SamplingParams(min_tokens=6, stop_token_ids=[0]),
    SamplingParams(min_tokens=5, stop_token_ids=[2], ignore_eos=True, temperature=2.0),
    SamplingParams(allowed_token_ids=[0, 1, 2, 22], logit_bias={1: 3.0}),
    SamplingParams(temperature=0.9, min_p=0.3, frequency_penalty=1.0, top_k=7),
    SamplingParams(),
]
TREES = {
    "root": ([0], 0),
    "chain": ([0, 0, 1, 2, 3], 4),
    "tree": ([0, 0, 0, 1, 1, 3, 3, 5], 4),
    "long": ([0, *range(19)], 19),
    "ragged": ([0, 0, 1, 0, 3, 4, 5, 2], 5),
}


@pytest.mark.parametrize("tree", TREES)
def test_along_the_paths_of_trees(tree: str) -> None:
    """Catches a sibling that counts, the root counted twice, a token counted once that stands twice
    on the path, the prompt in the answer's counts, and positions off by one."""
    rng = np.random.default_rng(3)
    parents, deep = TREES[tree]
    b, t = len(ROWS), len(parents)
    above = [[node] for node in range(t)]
    for node in range(1, t):
        above[node] = [*above[parents[node]], node]
    shape = Shape(
        jnp.broadcast_to(jnp.array(parents, jnp.int32)[None], (b, t)),
        jnp.broadcast_to(jnp.array([len(x) - 1 for x in above], jnp.int32)[None], (b, t)),
        jnp.broadcast_to(jnp.array([[u in x for u in range(t)] for x in above])[None], (b, t, t)),
    )
    length = rng.integers(2, 12, b)
    prompts = [int(rng.integers(1, n + 1)) for n in length]
    tokens = rng.integers(0, 3, (b, 30)).astype(np.int32)  # few tokens: much repeats
    drafted = rng.integers(0, 3, (b, t)).astype(np.int32)
    drafted[:, 0] = [tokens[row, n - 1] for row, n in enumerate(length)]
    logits = (2 * rng.normal(size=(b, t, VOCAB))).astype(np.float32)
    sampling = Sampling.of([VOCABULARY.resolve(row) for row in ROWS], VOCABULARY, prompts)
    arrays = (jnp.asarray(tokens), jnp.asarray(length, jnp.int32), jnp.asarray(drafted))
    got = processed(sampling, jnp.asarray(logits), arrays, shape, deep + 1)
    for row, settings in enumerate(ROWS):
        for node in range(t):
            path = [int(drafted[row, u]) for u in above[node][1:]]
            text = [*tokens[row, : length[row]].tolist(), *path]
            wanted = reference.filtered(settings, text, prompts[row], logits[row, node], EOS)
            np.testing.assert_allclose(got[row, node], wanted, rtol=2e-5, atol=2e-6)


def test_programs_by_what_rows_need() -> None:
    """Catches filters in a program that needs none, and arrays whose size follows the settings."""
    plain = decoding.sampling(1.0)
    assert plain.filters == () and not plain.greedy
    assert decoding.sampling(0.0, 3, 0.5).filters == ()  # they change no argmax
    shapes = []
    for row in (
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, logit_bias={1: 1.0}, bad_words=[[1, 2], [3]]),
        SamplingParams(temperature=1.0, allowed_token_ids=[1], stop_token_ids=[3]),
    ):
        made = decoding.arrays([row, SamplingParams()])
        shapes.append((jax.tree.structure(made), [x.shape for x in jax.tree.leaves(made)]))
    assert shapes[0] == shapes[1] == shapes[2]


def test_large_values_of_variable_size() -> None:
    """Catches a capacity that cuts what a request asks for."""
    many = {i: float(i) for i in range(VOCAB - 3)}
    row = SamplingParams(logit_bias=many, bad_words=[[i] for i in range(10)] + [[1] * 9])
    logits = jnp.zeros((1, VOCAB))
    got = on_texts([row], [[1] * 12], [1], logits)
    np.testing.assert_allclose(got[0], reference.filtered(row, [1] * 12, 1, np.zeros(VOCAB), EOS))
