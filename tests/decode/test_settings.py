"""`SamplingParams`: checks, JSON, command-line options, and what a call makes of it per row."""

import argparse
import dataclasses
import json
import re
from typing import Any

import decoding
import numpy as np
import pytest

from eagle_jax.decode import SamplingParams, generate
from eagle_jax.decode.sampling import Vocabulary, rows_of
from eagle_jax.decode.sampling.options import add_arguments, sampling_of
from eagle_jax.decode.sampling.params import NAMES, Settings

# Every field with a value that is not the default.
EVERY: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 9,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "logit_bias": {5: 1.5, 2: -100.0},
    "allowed_token_ids": [7, 2, 5, 2],
    "bad_words": ["ab", [3, 4]],
    "min_tokens": 3,
    "stop": ["END", "\n\n"],
    "stop_token_ids": [9],
    "ignore_eos": True,
    "seed": 11,
    "logprobs": 2,
}


def test_json_there_and_back() -> None:
    """Catches a field that is lost on the way, and one whose stored form is no JSON."""
    assert set(EVERY) == set(NAMES) == set(Settings.__annotations__)
    params = SamplingParams(**EVERY)
    text = json.dumps(params.to_dict())
    assert SamplingParams.from_dict(json.loads(text)) == params
    assert set(json.loads(text)) == set(NAMES)
    assert SamplingParams().to_dict() == {}
    assert SamplingParams(temperature=1).to_dict() == {"temperature": 1.0}
    changed = SamplingParams(**EVERY).override({"temperature": 0, "stop": []})
    assert (changed.temperature, changed.stop, changed.top_k) == (0.0, (), 9)


def test_settings_are_values() -> None:
    """Catches lists inside, which have no hash, and order or doubles that count."""
    params = SamplingParams(**EVERY)
    pairs = [(2, -100), (np.int64(5), 1.5)]
    same = dataclasses.replace(params, logit_bias=pairs, allowed_token_ids=(2, 5, 7))
    assert params == same and hash(params) == hash(same)
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(bad_words="x").bad_words == ("x",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"temperature": True}, "temperature=True: must be a number"),
        ({"temperature": 1e31}, "temperature=1e+31: must be 0 (greedy) or a positive number"),
        ({"top_k": 1.5}, "top_k=1.5: must be 0 (off) or a positive whole number"),
        ({"top_p": 0}, "top_p=0: must be above 0 and at most 1 (1 is off)"),
        ({"min_p": 1.1}, "min_p=1.1: must be from 0 (off) to 1"),
        ({"min_p": float("nan")}, "min_p=nan: must be from 0 (off) to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be from 0.001 to 1000 (1 is off)"),
        ({"presence_penalty": 1e4}, "presence_penalty=10000.0: must be from -1000 to 1000"),
        ({"frequency_penalty": None}, "frequency_penalty=None: must be a number"),
        (
            {"logit_bias": 3},
            "logit_bias=3: must be a list of pairs, or a mapping from token id to number",
        ),
        ({"logit_bias": [3]}, "logit_bias=3: must be a token id and a number"),
        ({"logit_bias": {"x": 1}}, "logit_bias='x': must be a token id"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias[3]=inf: must be a finite number"),
        ({"logit_bias": [(3, 1), (3, 2)]}, "logit_bias[3]: is given twice"),
        ({"allowed_token_ids": []}, "allowed_token_ids=[]: allows nothing"),
        ({"allowed_token_ids": "12"}, "allowed_token_ids='12': must be a list of token ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids=-1: must be a token id"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids=True: must be a token id"),
        ({"bad_words": [""]}, "bad_words='': must be a string of at least one character"),
        ({"bad_words": [[]]}, "bad_words=[]: an empty word"),
        ({"min_tokens": -1}, "min_tokens=-1: must be 0 or a positive whole number"),
        ({"stop": [3]}, "stop=3: must be a string of at least one character"),
        ({"stop": ["a", ""]}, "stop='': must be a string of at least one character"),
        ({"stop_token_ids": 3}, "stop_token_ids=3: must be a list of token ids"),
        ({"ignore_eos": 1}, "ignore_eos=1: must be True or False"),
        ({"seed": 1.5}, "seed=1.5: give a whole number"),
        ({"seed": 2**32}, "seed=4294967296: must be at least 0 and below 2**32"),
        ({"logprobs": 21}, "logprobs=21: must be None, or a whole number 0..20"),
        ({"best_of": 3}, "sampling: unknown setting 'best_of'; use temperature, top_k"),
        ([], "sampling=[]: must be an object of settings"),
    ],
    ids=str,
)
def test_errors(settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        SamplingParams.from_dict(settings)
    assert "\n" not in str(info.value)


def test_rows_of_a_call() -> None:
    """Catches one seed for all rows, and settings of two kinds of which one is dropped."""
    params = SamplingParams(temperature=1, seed=5)
    assert [row.seed for row in rows_of(3, params)] == [5, 6, 7]
    assert [row.seed for row in rows_of(2, None, {"seed": [9, 3], "top_k": 2})] == [9, 3]
    assert rows_of(2, [params, params]) == [params, params]  # as they are
    assert rows_of(1, None) == [SamplingParams()]
    wrong: list[Any] = [
        ((2, [params]), ValueError, "sampling: 1 settings for 2 rows; give one per row"),
        ((1, params, {"top_k": 2}), ValueError, "sampling and top_k: give SamplingParams or"),
        ((1, None, {"topk": 2}), TypeError, "unexpected keyword argument 'topk'"),
        ((2, None, {"seed": 2**32 - 1}), ValueError, "seed=4294967296: must be"),
    ]
    for arguments, error, said in wrong:
        with pytest.raises(error, match=re.escape(said)):
            rows_of(*arguments)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"logit_bias": {11: 1.0}}, "logit_bias: token id 11 is outside the vocabulary 0..10"),
        ({"allowed_token_ids": [11]}, "allowed_token_ids: token id 11 is outside"),
        ({"bad_words": [[3, 11]]}, "bad_words: token id 11 is outside"),
        ({"stop_token_ids": [11]}, "stop_token_ids: token id 11 is outside"),
        ({"stop": "x"}, "stop='x': text needs a tokenizer, and params has none"),
        ({"bad_words": "x"}, "bad_words='x': text needs a tokenizer, and params has none"),
        (
            {"allowed_token_ids": [3], "bad_words": [[3]]},
            "allowed_token_ids: bad_words or min_tokens exclude all of them",
        ),
        (
            {"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 1},
            "allowed_token_ids: bad_words or min_tokens exclude all of them",
        ),
    ],
    ids=str,
)
def test_settings_that_a_model_cannot_follow(settings: dict, said: str) -> None:
    """Catches an id that is clamped or dropped silently."""
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        generate(decoding.random_pair(), [1], max_new_tokens=2, **settings)
    assert "\n" not in str(info.value)


def test_bad_words_are_spelled_as_the_tokenizer_does() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    vocabulary = Vocabulary(200, (9,), encode)
    found = vocabulary.resolve(SamplingParams(bad_words=["ab", (3,)]))
    assert found.bad_words == ((97, 98), (32, 97, 98), (3,))
    assert vocabulary.ends(SamplingParams(stop_token_ids=[4])) == (9, 4)
    assert vocabulary.ends(SamplingParams(stop_token_ids=[4], ignore_eos=True)) == (4,)


def test_options() -> None:
    """Catches a field without an option, and an option that is parsed and dropped."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, temperature=0.7)
    assert sampling_of(parser.parse_args([])) == SamplingParams(temperature=0.7)
    words = [
        *["--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--min-p", "0.1"],
        *["--repetition-penalty", "1.2", "--presence-penalty", "0.5"],
        *["--frequency-penalty", "-0.25", "--logit-bias", "5=1.5", "--logit-bias", "2=-100"],
        *["--allowed-token-ids", "7,2", "--allowed-token-ids", "5", "--bad-words", "ab"],
        *["--min-tokens", "3", "--stop", "END", "--stop", "\n\n", "--stop-token-ids", "9"],
        *["--ignore-eos", "--seed", "11", "--logprobs", "2"],
    ]
    wanted = SamplingParams(**{**EVERY, "bad_words": ["ab"]})
    assert sampling_of(parser.parse_args(words)) == wanted
    assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} == set(NAMES)
    assert all(field.metadata["help"] for field in dataclasses.fields(SamplingParams))
