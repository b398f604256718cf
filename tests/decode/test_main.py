"""`python -m eagle_jax.decode`: one prompt."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import eagle_jax
from eagle_jax import cli
from eagle_jax.decode import Eagle, chain, generate
from eagle_jax.decode.__main__ import main
from eagle_jax.params import Params

NEW = 40
FILTERS = ["--top-k", "9", "--top-p", "0.9"]
PENALISED = ["--temperature", "1", "--min-p", "0.05", "--frequency-penalty", "0.5", "--stop", "q"]
TREE = ["--tree", "chain-2", "--plain"]
UNUSUAL = {"seed": 3, "temperature": 2.0, "top_k": 9, "top_p": 0.9, "raw": True}
# Plain drafting takes a round more under this seed.
UNUSUAL |= {"method": Eagle(chain(2), coupled=False)}


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Params:
    return eagle_jax.load(tiny_model)


@pytest.fixture
def program(tiny_model: Path, capsys, monkeypatch):
    """Runs the command line; returns status, output and errors."""
    monkeypatch.delenv("EAGLE_JAX_DEBUG", raising=False)

    def run(*arguments: str) -> tuple[object, str, str]:
        argv = ["--model", str(tiny_model), "--max-new-tokens", str(NEW), *arguments]
        with pytest.raises(SystemExit) as info:
            cli.run(lambda: main(argv))
        return info.value.code or 0, *capsys.readouterr()

    return run


def test_a_quantised_target(program, tiny_model) -> None:
    """Catches an option that is parsed and dropped."""
    status, out, _ = program("Hi", "--quantize", "int8", "--method", "vanilla", "--json")
    params = eagle_jax.load(tiny_model, quantize="int8")
    whole = generate(params, "Hi", max_new_tokens=NEW, method="vanilla")
    assert (status, json.loads(out)["text"]) == (0, whole.text)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--temperature", "1", "--seed", "3"], {"temperature": 1.0, "seed": 3}),
        (["--seed", "3", "--temperature", "2", *FILTERS, "--raw", *TREE], UNUSUAL),
        (["--method", "vanilla"], {"method": "vanilla"}),
        (PENALISED, {"temperature": 1.0, "min_p": 0.05, "frequency_penalty": 0.5, "stop": "q"}),
    ],
)
def test_the_streamed_answer_is_the_generated_one(program, params, arguments, options) -> None:
    """Catches an option that is parsed and dropped, and text lost between pieces."""
    status, out, err = program("Hi", *arguments)
    whole = generate(params, "Hi", max_new_tokens=NEW, **options)
    assert (status, out) == (0, whole.text + "\n")
    stats = whole.statistics
    assert err.startswith(f"[{stats.new_tokens[0]} tokens, ") and err.count("\n") == 1
    assert f"acceptance length {stats.tau:.2f} (bonus token included)" in err


def test_json_is_one_line(program, params) -> None:
    status, out, err = program("Hi", "--json", "--temperature", "1", "--seed", "3")
    whole = generate(params, "Hi", max_new_tokens=NEW, temperature=1.0, seed=3)
    record = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert (record["text"], record["finish"]) == (whole.text, whole.finish)
    assert record["new_tokens"] == list(whole.statistics.new_tokens)
    assert record["rounds"] == list(whole.statistics.rounds)


def test_a_prompt_from_standard_input(program, params, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi"))
    assert program("-")[1] == generate(params, "Hi", max_new_tokens=NEW).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Hi", "--method", "eagel"], "method='eagel': unknown; use one of vanilla, eagle"),
        (["Hi", "--tree", "mc_sim"], "tree='mc_sim': unknown; use mc_sim_7b_63, chain-N, dynamic-"),
        (["Hi", "--tree", "chain-0"], "chain depth=0: must be from 1 to 1023"),
        (["Hi", "--tree", "00"], "tree path (0, 0): its parent (0,) is missing; add it"),
        (["Hi", "--temperature", "-1"], "temperature=-1.0: must be 0 (greedy) or a positive"),
        (["Hi", "--temperature", "nan"], "temperature=nan: must be 0 (greedy) or a positive"),
        (["Hi", "--top-p", "2"], "top_p=2.0: must be above 0 and at most 1"),
        (["Hi", "--seed", "-1"], "seed=-1: must be at least 0"),
        (["Hi", "--max-new-tokens", "0"], "max_new_tokens=0: must be "),
        (
            ["Hi", "--method", "vanilla", "--tree", "chain-2"],
            "tree: is no setting of method 'vanilla'",
        ),
        (["Hi", "--method", "lookahead", "--set", "ngrams=3"], "ngrams: Lookahead has no field"),
        (["Hi", "--method", "lookahead", "--set", "ngram=1"], "ngram=1: "),
        (
            ["Hi", "--method", "vanilla", "--set", "rule=1"],
            "rule: Vanilla has no field 'rule'; valid:",
        ),
        (["Hi", "--method", "medusa", "--set", "rule=1"], "rule=1: is Exact; it has no settings"),
        (
            ["Hi", "--method", "medusa", "--rule", "typical", "--set", "rule.epsilon=1"],
            "epsilon=1.0: must be a probability, above 0 and below 1",
        ),
        (
            ["Hi", "--method", "medusa", "--rule", "typical", "--set", "rule.delta=0"],
            "delta=0.0: must be a number above 0",
        ),
        (["--exact", "--input", "a", "--output", "b"], "input='a': --exact is not for files"),
        (
            ["Hi", "--method", "eagle2", "--tree", "dynamic-2-3-99"],
            "tree drafted=99: depth 2 and k",
        ),
        (["Hi", "--method", "vanilla", "--plain"], "coupled: is no setting of method"),
        (["Hi", "--model", "tinny"], "model 'tinny': neither a directory nor a shipped pair (tiny"),
        (["Hi" * 200], "prompt: "),
        ([" "], "prompt=' ': empty"),
        ([], "prompt: give one, or --input FILE with --output FILE"),
        (["Hi", "--input", "a", "--output", "b"], "prompt: give one, or --input FILE"),
        (["--input", "a"], "output=None: --input and --output go together"),
        (["Hi", "--output", "b"], "output='b': --input and --output go together"),
    ],
)
def test_errors(program, arguments, said) -> None:
    """Status 2, and one line that names the option, its value and the remedy."""
    status, out, err = program(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {said}")


def test_the_shipped_pair_from_a_shell() -> None:
    """The real command with the default model: an answer, and a mistake without a traceback."""
    command = [sys.executable, "-m", "eagle_jax.decode", "What is a prime number?"]
    command += ["--max-new-tokens", "8"]
    good = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120)
    record = json.loads(good.stdout)
    assert record["new_tokens"] == [8] and record["text"].strip()
    bad = subprocess.run([*command, "--method", "eagel"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: method='eagel': unknown; use one of vanilla, eagle, ")
    assert bad.stderr.count("\n") == 1
