"""`eagle-jax COMMAND`: one program, the same options everywhere, help that teaches."""

import json
import re
import subprocess
import sys

import pytest

import eagle_jax
from eagle_jax import cli, commands
from eagle_jax.commands import completion
from eagle_jax.decode import generate

PROGRAMS = tuple(commands.COMMANDS)


def run(*words):
    """Status, output and errors of `python -m eagle_jax WORDS`."""
    done = subprocess.run(
        [sys.executable, "-m", "eagle_jax", *words], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def program(capsys, monkeypatch):
    """The same inside this process."""
    monkeypatch.delenv("EAGLE_JAX_DEBUG", raising=False)

    def call(*words):
        with pytest.raises(SystemExit) as info:
            cli.run(lambda: commands.main(words))
        return info.value.code or 0, *capsys.readouterr()

    return call


def test_version_and_help_from_a_shell() -> None:
    """Without JAX: it takes a tenth of a second."""
    assert run("--version") == (0, f"eagle-jax {eagle_jax.__version__}\n", "")
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    for name, (_, what) in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +{what}$", out, re.MULTILINE)
    heavy = "import sys, eagle_jax.__main__; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help(program, words) -> None:
    assert program(*words) == (0, commands.help_text(), "")


def test_no_command_is_a_mistake(program) -> None:
    assert program() == (2, "", commands.help_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_command_explains_itself(program, name) -> None:
    status, out, err = program(name, "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: eagle-jax {name} ")
    assert "python -m" not in out  # examples have the name that it was called by
    assert program("help", name)[1] == out


@pytest.mark.parametrize("name", ["generate", "answers", "evaluate", "tune"])
def test_the_model_has_one_name(name) -> None:
    options = vars(commands.module(name).parser("x"))["_option_string_actions"]
    assert "--model" in options and "--draft" in options and "--params" not in options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate"], "command 'genrate': unknown; did you mean 'generate'? commands: generate, "),
        (["zzz"], "command 'zzz': unknown; commands: generate, answers, train"),
        (["--model", "x"], "option '--model': give a command first (eagle-jax --help lists them)"),
        (["--completion", "fish"], "completion='fish': give bash or zsh"),
        (["--completion"], "completion='': give bash or zsh"),
        (
            ["generate", "hi", "--tempature", "1"],
            "unknown option --tempature; did you mean --temperature? (eagle-jax generate --help",
        ),
        (["generate", "hi", "--zzz=1"], "unknown option --zzz (eagle-jax generate --help"),
        (["generate", "hi", "--top-k", "x"], "argument --top-k: invalid int value: 'x' (eagle-jax"),
        (["generate"], "the following arguments are required: prompt (eagle-jax generate --help"),
        (["answers", "--input", "a"], "the following arguments are required: --output"),
        (["answers", "--input", "a", "--output", "b"], "conversations='a': no such file"),
        (["train"], "the following arguments are required: --config"),
        (["train", "--config", "zzz.py"], "zzz.py: no such file"),
        (["evaluate", "--config", "zzz.py"], "zzz.py: no such file"),
        (["compile", "--config", "zzz.py"], "zzz.py: no such file"),
        (["tune", "--limit", "-1"], "limit=-1: must be at least 0"),
        (["tune", "--params", "x"], "unknown option --params"),
        (["convert"], "from: give --from, or --inspect PATH (--help explains)"),
        (["generate", "hi", "--model", "zzz"], "model 'zzz': neither a directory nor a shipped"),
    ],
)
def test_errors(program, words, said) -> None:
    """Status 2 and one line, the same in all commands."""
    status, out, err = program(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {said}")


def test_generate_and_answers(program, tiny_model, tmp_path) -> None:
    model = ["--model", str(tiny_model), "--max-new-tokens", "24", "--temperature", "1"]
    status, out, err = program("generate", "Hi", "--json", "--seed", "5", *model)
    params = eagle_jax.load(tiny_model)
    whole = generate(params, "Hi", max_new_tokens=24, temperature=1.0, seed=5)
    assert (status, err, json.loads(out)["text"]) == (0, "", whole.text)

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    files = ["--input", str(source), "--output", str(target)]
    status, out, _ = program("answers", *files, "--seed", "5", *model)
    assert status == 0 and json.loads(out)["answered"] == 1
    assert json.loads(target.read_text())["messages"][1]["content"] == whole.text


def test_color(program, tiny_model) -> None:
    """Colours are all that differs, and none are in JSON."""
    words = ["generate", "Hi", "--model", str(tiny_model), "--max-new-tokens", "24"]
    plain, coloured = program(*words)[1], program(*words, "--color")[1]
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert program(*words, "--color", "--json")[2].startswith("error: color: --json has no colours")


def test_evaluation_takes_model_and_draft() -> None:
    """In place of the file's, as everywhere."""
    from eagle_jax.evaluate.__main__ import configuration, parser

    words = ["--config", "configs/eval/tiny.py", "--model", "a", "--draft", "b", "--draft", "c"]
    config = configuration(parser().parse_args(words))
    assert (config.model, config.drafts) == ("a", ("b", "c"))


def test_evaluation_spells_methods_as_generate_does() -> None:
    from eagle_jax import settings
    from eagle_jax.decode.registry import METHODS
    from eagle_jax.evaluate.config import EvalConfig

    for name in ("tiny", "large"):
        config = settings.load(f"configs/eval/{name}.py", kind=EvalConfig)
        words = {word for word, _ in config.methods}
        assert "prompt_lookup" in words and "prompt lookup" not in words
        assert {"vanilla", "eagle", "medusa"} & words <= set(METHODS)


COMPLETE = """
eval "$({python} -m eagle_jax --completion bash)"
complete_words() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
    _eagle_jax
    echo "${{COMPREPLY[@]}}"
}}
complete_words eagle-jax ge
complete_words eagle-jax generate --max
complete_words eagle-jax generate hi --method ea
complete_words eagle-jax tune --dtype f
complete_words eagle-jax train --config pyproj
"""


def test_completion() -> None:
    """A real bash asks it."""
    script = COMPLETE.format(python=sys.executable)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and done.stdout.splitlines() == [
        "generate",
        "--max-new-tokens",
        "eagle eagle2 eagle3 eagle_lookup",
        "float32",
        "pyproject.toml",
    ]
    assert completion.script("zsh").endswith(completion.script("bash"))


def test_warnings_are_one_line(capsys) -> None:
    """Without the place in our code that Python shows."""
    import warnings

    def main():
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            # catch_warnings puts Python's own hook back only when it ends
            warnings.warn("the draft is of another model", stacklevel=1)

    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "warning: the draft is of another model\n"
