"""Every program of train/ and decode/ runs, at tiny size; the pipeline end to end.

Those of benchmarks/ are in test_benchmarks.py.
"""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pair
import tiny_run

from eagle_jax.decode import generate
from eagle_jax.params import load
from eagle_jax.text import read_conversations

ROOT = tiny_pair.ROOT
FOLDERS = ("train", "decode", "benchmarks")
LINES = {"train": 90, "decode": 90, "benchmarks": 220}
RUN = {
    "train/answers.py",  # by the pipeline
    "train/medusa_tree.py",
    "train/tokenizer.py",  # by test_train_tokenizer.py
    "train/pair.py",
    "train/sample.py",
    "decode/chat.py",
    "decode/compare_trees.py",
    "decode/demo.py",
    "decode/eagle.ipynb",
    "decode/recipes/gpu_node.py",  # by test_recipes.py
    *(
        f"benchmarks/{name}.py"
        for name in (
            "check_kernels",
            "baselines",
            "batch",
            "tile_sweep",
            "large_pair",
            "pair",
            "round",
        )
    ),
    *(f"benchmarks/{name}.py" for name in ("common", "loops", "shapes", "simulated", "step")),
    *(f"benchmarks/{name}.py" for name in ("suite", "torch_worker", "train")),
}


def programs() -> list[Path]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path for path in paths if path.suffix in (".py", ".ipynb")]


@pytest.fixture
def questions(tmp_path) -> str:
    """A directory of one question file."""
    folder = tmp_path / "questions"
    folder.mkdir()
    turns = ["Hi", "0+1"]
    lines = (json.dumps({"turns": [turn]}) + "\n" for turn in turns)
    (folder / "mt_bench.jsonl").write_text("".join(lines))
    return str(folder)


# --- The folders -----------------------------------------------------------------------------


def test_no_program_is_untested() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in programs()} == RUN


def test_programs_are_short_and_in_no_package() -> None:
    for path in programs():
        assert path.name != "__init__.py"
        if path.suffix == ".py":
            most = LINES[path.relative_to(ROOT).parts[0]]
            assert len(path.read_text().splitlines()) <= most, path


def test_the_library_imports_no_program() -> None:
    """The library must work where only the wheel is installed."""
    names = {*FOLDERS, *(path.stem for path in programs() if path.suffix == ".py")}
    for path in (ROOT / "eagle_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            assert not {module.split(".")[0] for module in modules} & names, path


# --- decode/ ---------------------------------------------------------------------------------


def test_demo(tiny_model) -> None:
    options = ["--model", str(tiny_model), "--max-new-tokens", "128"]
    out = tiny_pair.run_program("decode/demo.py", "Hi", *options)
    assert re.search(r"^same text: yes \(128 tokens\)$", out, re.MULTILINE)
    assert re.search(r"^speedup: +[0-9.]+x \(medians of 9 interleaved runs\)$", out, re.MULTILINE)


def test_chat_remembers_until_told_otherwise(tiny_model) -> None:
    """The second answer knows the first; after /new there is no history."""
    options = ["--model", str(tiny_model), "--max-new-tokens", "40", "--temperature", "1"]
    out = tiny_pair.run_program(
        "decode/chat.py", *options, "--seed", "3", stdin="Hi\n0+1\n/new\nabc\n"
    )
    params, chat, expected = load(tiny_model), [], []
    for seed, question in ((3, "Hi"), (4, "0+1"), (5, "abc")):
        chat = [] if question == "abc" else chat
        chat.append({"role": "user", "content": question})
        answer = generate(params, chat, max_new_tokens=40, temperature=1.0, seed=seed).text
        chat.append({"role": "assistant", "content": answer})
        expected.append(answer)
    pieces = re.split(r"\n\[\d+ tokens/s, [0-9.]+ tokens a pass\]\n(?:> )*", out)
    assert pieces == ["> " + expected[0], *expected[1:], "\n"]


def test_chat_forgets_what_does_not_fit(tiny_model) -> None:
    """Catches a chat that dies at the end of the context."""
    options = ["--model", str(tiny_model), "--max-new-tokens", "100"]
    out = tiny_pair.run_program("decode/chat.py", *options, stdin=f"{'a' * 90}\n" * 3)
    assert out.count("tokens a pass") == 3


def test_compare_trees(tiny_model) -> None:
    options = ["--model", str(tiny_model), "--repeats", "1", "--prompt", "Hi"]
    out = tiny_pair.run_program("decode/compare_trees.py", "chain-5", "0 1 2", *options)
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert rows["vanilla"][:3] == ["1", "0", "1.00"]
    assert rows["chain-5"][:2] == ["6", "5"] and rows["0 1 2"][:2] == ["4", "1"]
    assert out.splitlines()[-1].startswith("fastest: ")


def test_notebook(capsys) -> None:
    """Every cell runs, in order; their own assertions compare the texts."""
    notebook = json.loads((ROOT / "decode" / "eagle.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            lines = [line for line in cell["source"] if not line.startswith("%")]
            exec(compile("".join(lines), cell["id"], "exec"), names)
    assert "tau" in capsys.readouterr().out


# --- train/ ----------------------------------------------------------------------------------


def test_the_whole_pipeline(tmp_path, questions) -> None:
    """Target, its answers at both temperatures, draft, measurement."""
    target = tiny_run.target_run(tmp_path, steps=6)
    draft = tiny_run.draft_run(tmp_path, "given by the program", steps=6)
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, config in (("target", target), ("eagle", draft)):
        source = f"from eagle_jax.config import *\n\nconfig = {config!r}\n"
        (configs / f"{name}.py").write_text(source)
    (configs / "eval.py").write_text(
        "from eagle_jax.decode import Eagle, chain\n"
        "from eagle_jax.evaluate import EvalConfig\n\n"
        "config = EvalConfig('', (('eagle', Eagle(chain(2))),), new_tokens=8, repeats=1,\n"
        "    step_times=())\n".replace("''", "'runs'")
    )
    command = [sys.executable, "train/pair.py", "--configs", str(configs), "--drafts", "eagle"]
    command += ["--eval-config", str(configs / "eval.py")]
    command += ["--data", target.data.train[0], "--validation", target.data.validation[0]]
    command += ["--eval", questions, "--output", str(tmp_path / "runs"), "--batch-size", "4"]
    command += ["--new-tokens", "16", "--set", "eval_batches=1", "--together"]
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    done = run([*command, "--prompts", "6"])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {row["answers"] for row in result["rows"]} == {2} and result["lossless"]
    for name in ("answers-0", "answers-1", "answers-2"):
        assert len((tmp_path / "runs" / f"{name}.jsonl").read_bytes().splitlines()) == 6
    assert set(load(tmp_path / "runs" / "model").drafts) == {"eagle"}

    # What fails is told when what runs beside it has ended; without answers nothing is decoded.
    command += ["--target", str(tmp_path / "runs" / "target" / "export"), "--prompts", "0"]
    done = run([*command, "--output", str(tmp_path / "more"), "--drafts", "eagle", "absent"])
    assert done.returncode == 2
    assert done.stderr.strip() == f"{tmp_path}/more/absent.log: status 2; the file says why"
    assert "absent.py" in (tmp_path / "more" / "absent.log").read_text()
    assert (tmp_path / "more" / "eagle" / "export").is_dir()
    assert not list((tmp_path / "more").glob("answers*"))


def test_answers_are_not_mixed(tiny_model, tmp_path) -> None:
    """Catches other prompts, or another model, in a folder that has answers; and one cut short."""
    lines = [{"messages": [{"role": "user", "content": f"{i} ?"}]} for i in range(5)]
    texts = ["".join(json.dumps(line) + "\n" for line in lines[first:]) for first in (0, 1)]
    for name, text in zip(("all", "fewer"), texts, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(text)
    options = ["--output", str(tmp_path / "out"), "--batch-size", "4", "--new-tokens", "4"]

    def run(data: str, model: Path) -> str:
        more = ["--data", str(tmp_path / f"{data}.jsonl"), "--model", str(model)]
        return tiny_pair.run_program("train/answers.py", *options, *more)

    run("all", tiny_model)
    prompts = tmp_path / "out" / "prompts.jsonl"
    whole = prompts.read_text()
    prompts.write_text(whole[:40])  # as a kill leaves it
    found = [json.loads(line) for line in run("all", tiny_model).splitlines()]
    assert [line["already_answered"] for line in found] == [5] * 3
    assert prompts.read_text() == whole
    tiny_pair.write(tmp_path / "other", seed=4)
    for data, model in (("fewer", tiny_model), ("all", tmp_path / "other")):
        with pytest.raises(AssertionError, match="ended with 2"):
            run(data, model)
    assert prompts.read_text() == whole


def test_medusa_tree(tiny_model) -> None:
    """Catches heads compared with the wrong token: of random ones each rank is right as often."""
    options = ["--model", str(tiny_model), "--limit", "2", "--new-tokens", "24", "--nodes", "9"]
    out = tiny_pair.run_program("train/medusa_tree.py", *options, "--ranks", "4")
    result = json.loads(out.splitlines()[-1])
    assert [len(row) for row in result["accuracy"]] == [4] * 3
    assert all(0 <= sum(row) <= 1 for row in result["accuracy"])
    assert sum(result["nodes_by_depth"]) == 9


def test_sample_splits_by_prompt(tiny_model, tmp_path) -> None:
    """Two answers a prompt to train on; a held-out prompt is in validation only."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"{i} ?"}]} for i in range(7)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(tiny_model), "--prompts", str(prompts), "--output", str(tmp_path)]
    options += ["--batch-size", "4", "--max-new-tokens", "8"]
    out = tiny_pair.run_program("train/sample.py", *options)
    assert json.loads(out.splitlines()[-1]) == {"train": 12, "validation": 1}
    (held_out,) = read_conversations(tmp_path / "validation.jsonl")
    assert held_out[0]["content"] == "5 ?"
    trained = list(read_conversations(tmp_path / "conversations.jsonl.gz"))
    assert sorted(turns[0]["content"] for turns in trained) == sorted(
        f"{i} ?" for i in (0, 1, 2, 3, 4, 6) for _ in range(2)
    )
