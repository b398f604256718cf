"""Whole evaluations, on a tiny random model."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from eagle_jax.decode import Eagle, Vanilla, chain, generate, tuning_store
from eagle_jax.evaluate import EvalConfig, metrics, runner
from eagle_jax.evaluate.__main__ import evaluate, main, with_drafts
from eagle_jax.evaluate.samples import SAMPLES, WRITTEN
from eagle_jax.params import load

QUESTIONS = [
    {"question_id": 7, "category": "sums", "turns": ["0+1", "and 2?"]},
    {"question_id": 8, "category": "sums", "turns": ["abc" * 20]},
    {"question_id": "long", "category": "talk", "turns": ["x" * 300, "never asked"]},
    {"question_id": 9, "category": "talk", "turns": ["Hi there", "y" * 300]},
]
CONFIG = """
import dataclasses
from eagle_jax.decode import Eagle, Vanilla, chain
from eagle_jax.decode.acceptance import Exact
from eagle_jax.evaluate import EvalConfig

class Wrong(Exact):
    '''Says that it is vanilla's text, and is not.'''
    def __call__(self, *args):
        accepted = super().__call__(*args)
        return dataclasses.replace(accepted, emitted=(accepted.emitted + 1) % 200)

class Lossy(Vanilla):
    rule = Wrong()

config = EvalConfig(
    output_dir="unused",
    methods=(("eagle", Eagle(chain(2))), ("lossy", Lossy()), ("vanilla", Vanilla())),
    new_tokens=12,
    repeats=2,
    step_times=(1, 3),
    step_prompts=1,
)
"""
TURNS = 4  # that fit the context, of six


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Question files `chat` and `other`."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (folder / "chat.jsonl").write_text("\n".join(lines))
    (folder / "other.jsonl").write_text(lines[1])
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_model, data, tmp_path_factory) -> list[str]:
    """The command line but for the output directory."""
    config = tmp_path_factory.mktemp("config") / "config.py"
    config.write_text(CONFIG)
    out = ["--config", str(config), "--data", str(data), "--tasks", "chat", "other"]
    return [*out, "--set", f"model={tiny_model}", "--methods", "eagle"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """The output of a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([*arguments, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Arguments of every decoding that is done."""
    seen = []

    def counted(params, prompts, **options):
        seen.append({"prompts": prompts, **options})
        return generate(params, prompts, **options)

    monkeypatch.setattr(runner, "generate", counted)
    return seen


def records(folder: Path) -> list[dict]:
    """Samples, with their keys parsed; without the header."""
    lines = (folder / SAMPLES).read_text().splitlines()[1:]
    return [{**json.loads(line), "key": json.loads(json.loads(line)["key"])} for line in lines]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def timeless(rows: list[dict]) -> list[dict]:
    """What must not change when the same is measured again."""
    kept = ("task", "category", "temperature", "method", "tau", "accepted_per_depth", "equal")
    return [{key: row[key] for key in kept} for row in rows]


def test_everything_is_written(finished, arguments, capsys) -> None:
    """Catches a file left out, a last line that is no JSON, and rows lost between the formats."""
    assert {path.name for path in finished.iterdir()} == set(WRITTEN)
    assert all((finished / n).read_bytes()[1:4] == b"PNG" for n in WRITTEN if n.endswith("png"))
    assert main([*arguments, "--output", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    line, result = json.loads(lines[-1]), results(finished)
    assert line["lossless"] is True and line["device"] == "cpu" and line["dtype"] == "float32"
    assert [row["method"] for row in line["rows"]] == ["eagle", "vanilla"] * 2
    assert {row["task"] for row in line["rows"]} == {metrics.ALL}
    with (finished / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["tau"] for row in table] == [str(row["tau"]) for row in result["rows"]]
    # chat, its two categories, other, all; two temperatures, two methods
    assert len(table) == 5 * 2 * 2
    assert result["skipped"] == {"chat": {"0": 2, "1": 2}, "other": {"0": 0, "1": 0}}
    assert [row["nodes"] for row in result["step_times"]] == [1, 3]
    assert {"jax", "jaxlib", "flax", "python", "device"} <= set(result["environment"])
    assert result["config"]["methods"]["vanilla"] == "--method vanilla"


def test_figures_are_consistent(finished) -> None:
    """Catches tokens counted twice or not at all, a baseline other than 1, and mixed-up columns."""
    rows, samples = results(finished)["rows"], records(finished)
    for row in rows:
        reached = sum(row["accepted_per_depth"])
        assert reached <= row["tau"] <= reached + 1
        assert row["equal"] == row["answers"] and row["guarantee"] == "exact"
        low, high = row["speedup_interval"] or (row["speedup"],) * 2
        assert low <= row["speedup"] <= high
        assert row["mbu"] is None and row["compile_seconds"] > 0
        if row["method"] == "vanilla":
            exactly_one = ("tau", "speedup", "speedup_total", "end_to_end", "round_cost")
            assert [row[name] for name in exactly_one] == [1.0] * 5
            assert row["accepted_per_depth"] == [] and row["accepted_per_drafted"] is None
        else:
            assert row["accepted_per_drafted"] == pytest.approx(reached / 2)
    chat = [row for row in rows if row["task"] == "chat" and row["method"] == "eagle"]
    assert [(row["category"], row["answers"]) for row in chat[:3]] == [
        ("", TURNS),
        ("sums", 3),
        ("talk", 1),
    ]
    for row in (row for row in rows if row["task"] == metrics.ALL):
        own = [
            sample
            for sample in samples
            if sample["key"][0] == "run"
            and sample["key"][1] != runner.STEP_TASK
            and sample["key"][4] == row["temperature"]
            and sample["key"][6] == row["method"]
        ]
        assert len(own) == 2 * (TURNS + 1) and row["answers"] == TURNS + 1
        tokens = sum(len(tokens) for sample in own for tokens in sample["tokens"])
        assert tokens == sum(sum(sample["new_tokens"]) for sample in own)
        assert row["tau"] == pytest.approx(tokens / sum(sum(s["rounds"]) for s in own))


def test_methods_take_turns(finished) -> None:
    """Catches a method that is measured in one go, when the machine is warmer or busier."""
    keys = [sample["key"] for sample in records(finished) if sample["key"][0] == "run"]
    turns = [(name, repeat) for *_, name, repeat in keys if not name.startswith("step")]
    once = [("eagle", 0), ("vanilla", 0), ("eagle", 1), ("vanilla", 1)]
    assert turns == once * (2 * (TURNS + 1))


def test_second_turns_follow_frozen_answers(finished, tiny_model) -> None:
    """Catches second turns that follow each method's own answer, or one of another temperature."""
    params = load(tiny_model, dtype="float32")
    assert params.tokenizer is not None
    samples = records(finished)
    for temperature in (0.0, 1.0):
        keys = {
            json.dumps(sample["key"][1:6])
            for sample in samples
            if sample["key"][0] == "run" and sample["key"][1:5] == ["chat", ["7"], 1, temperature]
        }
        seed = runner.zlib.crc32(b"chat/7")
        first = generate(params, "0+1", method=Vanilla(), max_new_tokens=12, seed=seed,
                         temperature=temperature)  # fmt: skip
        answer = {"role": "assistant", "content": first.text}
        asked = [{"role": "user", "content": text} for text in QUESTIONS[0]["turns"]]
        ids = params.tokenizer.chat([asked[0], answer, asked[1]])
        unit = runner.Unit("chat", "", ("7",), 1, temperature, (tuple(ids),), (seed,))
        assert keys == {json.dumps(json.loads(unit.key("run"))[1:])}


@pytest.mark.parametrize("torn", ["", '{"key": "[\\"ru'])
def test_a_stopped_run_goes_on(finished, arguments, tmp_path, calls, torn) -> None:
    """Catches samples taken twice or lost, and a torn line that breaks the file."""
    lines = (finished / SAMPLES).read_text().splitlines(keepends=True)
    kept = len(lines) - 13
    (tmp_path / SAMPLES).write_text("".join(lines[:kept]) + torn)
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    # Each method and each number of nodes is warmed up anew, in the one shape that is left.
    assert len(calls) == 13 + 4
    again = (tmp_path / SAMPLES).read_text().splitlines(keepends=True)
    assert again[:kept] == lines[:kept] and len(again) == len(lines)
    assert sorted(map(str, (r["key"] for r in records(tmp_path)))) == sorted(
        map(str, (r["key"] for r in records(finished)))
    )
    assert timeless(results(tmp_path)["rows"]) == timeless(results(finished)["rows"])
    done = results(tmp_path)["rows"]
    calls.clear()
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert not calls and results(tmp_path)["rows"] == done


def test_a_run_may_grow(finished, arguments, tmp_path) -> None:
    """Catches seeds and keys that depend on how many questions and tasks there are."""
    out = ["--output", str(tmp_path)]
    small = [*arguments, *out, "--set", "limit=1", "--tasks", "chat", "--temperature", "1"]
    assert main(small) == 0
    before = (tmp_path / SAMPLES).read_text()
    assert len(results(tmp_path)["rows"]) == 2
    assert main([*arguments, *out]) == 0
    assert (tmp_path / SAMPLES).read_text().startswith(before)
    assert timeless(results(tmp_path)["rows"]) == timeless(results(finished)["rows"])
    keys = [str(record["key"]) for record in records(tmp_path)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--set", "new_tokens=11"], "samples taken with new_tokens 12, not 11; give another"),
        (["--set", "quantize=int8"], "samples taken with quantize None, not int8; give another"),
        (["--set", "repeats=1"], "samples taken with repeats 2, not 1; give another --output"),
        (["--methods", "vanilla"], r"samples taken with other methods \(eagle\); give anot"),
    ],
)
def test_other_settings_do_not_mix(finished, arguments, tmp_path, changed, said) -> None:
    """Catches figures averaged over two experiments."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / SAMPLES).read_bytes()
    with pytest.raises(ValueError, match=said) as info:
        main([*arguments, "--output", str(tmp_path), *changed])
    assert "\n" not in str(info.value)
    assert (tmp_path / SAMPLES).read_bytes() == before


def test_without_warm_up_every_answer_is_decoded_once(finished, arguments, tmp_path, calls) -> None:
    """Catches a warm-up that goes on, and other answers."""
    once = ["--set", "warm_up=False", "--set", "repeats=1"]
    assert main([*arguments, *once, "--output", str(tmp_path)]) == 0
    decoded = [record for record in records(tmp_path) if record["key"][0] != "compile"]
    assert len(calls) == len(decoded)
    rows = results(tmp_path)["rows"]
    assert timeless(rows) == timeless(results(finished)["rows"])


def test_restart_measures_anew(finished, arguments, tmp_path) -> None:
    """Catches --restart that keeps the old samples or deletes what is not ours."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    changed = ["--set", "repeats=1", "--set", "step_times=()", "--set", "limit=1"]
    changed += ["--temperature", "0", "--methods", "vanilla"]
    assert main([*arguments, "--output", str(tmp_path), "--restart", *changed]) == 0
    runs = [record for record in records(tmp_path) if record["key"][0] == "run"]
    assert len(runs) == 3 and (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "step_time.png").exists()


@pytest.mark.parametrize("foreign", [b"a shopping list", b"[1]\n", b'{"key": "x"}\n{}\n'])
def test_a_foreign_file_is_left_alone(arguments, tmp_path, foreign) -> None:
    """Catches samples appended to a file that this program did not write."""
    (tmp_path / SAMPLES).write_bytes(foreign)
    with pytest.raises(ValueError, match="is damaged or not ours; give another --output"):
        main([*arguments, "--output", str(tmp_path)])
    assert (tmp_path / SAMPLES).read_bytes() == foreign


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_a_lossy_method_is_caught(arguments, tmp_path, capsys, dtype, status) -> None:
    """Catches a method that says vanilla's text and gives another; the output is written first."""
    options = ["--set", f"dtype={dtype}", "--temperature", "0", "--set", "step_times=()"]
    options += ["--tasks", "other", "--methods", "lossy", "--output", str(tmp_path)]
    assert main([*arguments, *options]) == status
    out = capsys.readouterr().out
    assert "1 of 1 answers differ from vanilla's, first at token 0 (median 0)" in out
    assert ("NOT LOSSLESS" in out) == (status == 1)
    assert json.loads(out.splitlines()[-1])["lossless"] is (False if status else None)
    rows = {row["method"]: row for row in results(tmp_path)["rows"]}
    assert (rows["lossy"]["equal"], rows["vanilla"]["equal"]) == (0, 1)
    assert rows["lossy"]["first_difference_min"] == 0


def test_batches_count_their_own_rows_only(finished, tiny_model, data, tmp_path, calls) -> None:
    """Catches padding rows in tau or equality, and a last batch of another shape."""
    config = EvalConfig(
        output_dir=str(tmp_path),
        methods=(("eagle", Eagle(chain(2))),),
        model=str(tiny_model),
        data=str(data),
        tasks=("chat",),
        new_tokens=12,
        repeats=1,
        batch_size=2,
        step_times=(),
        temperatures=(1.0,),
    )
    rows = evaluate(config)["rows"]
    assert {len(call["prompts"]) for call in calls} == {2}
    alone = [
        row
        for row in results(finished)["rows"]
        if (row["task"], row["category"], row["temperature"]) == ("chat", "", 1.0)
    ]
    assert [row["method"] for row in rows] == ["vanilla", "eagle"]  # vanilla goes first if added
    for row, own in zip(rows, reversed(alone), strict=True):
        assert (row["equal"], row["answers"]) == (TURNS, TURNS)
        assert row["tau"] == pytest.approx(own["tau"])


def test_what_was_tuned_is_a_row(tiny_model, data, tmp_path, monkeypatch, capsys) -> None:
    """At every temperature its own method, which the row tells; without a tuning it is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = EvalConfig(
        output_dir=str(tmp_path / "out"),
        methods=(("auto", "auto"),),
        model=str(model),
        data=str(data),
        tasks=("other",),
        new_tokens=12,
        repeats=1,
        step_times=(),
    )
    params = load(model)
    assert with_drafts(config, params).methods == ()
    assert "left out auto: the model was not tuned here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="methods, 'auto': method='auto': no tuning for .*; run "):
        evaluate(config)
    entry = {"tuned": "2026-01-01", "speedup": 1.5}
    found = {0.0: "--method eagle --tree chain-2", 1.0: "--method vanilla"}
    tuning_store.store(
        params,
        [{"key": tuning_store.key(params, 1, t), "method": m, **entry} for t, m in found.items()],
    )
    rows = evaluate(config)["rows"]
    chosen = {row["temperature"]: row["settings"] for row in rows if row["method"] == "auto"}
    assert chosen == found
    assert all(row["equal"] == row["answers"] > 0 for row in rows)
    tuning_store.store(
        params, [{"key": tuning_store.key(params, 1, 0.0), "method": "--method vanilla", **entry}]
    )
    with pytest.raises(ValueError, match=r"samples taken with other methods \(auto\); give"):
        evaluate(config)


def test_bandwidth_share(finished, tiny_model, monkeypatch) -> None:
    """Catches a wrong unit, weights forgotten, and keys and values counted at full length."""
    params = load(tiny_model, dtype="float32")
    config = params.target_config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert metrics.kv_bytes(params) == kv
    table = config.vocab_size * config.hidden_size * 4
    whole = sum(array.size * 4 for array in params.target.values())
    assert metrics.weight_bytes(params.target) == whole - table
    assert metrics.weight_bytes({"embed_tokens.embedding": jnp.zeros((5, 2))}) == 40  # tied

    unit = runner.Unit("t", "", ("1",), 0, 0.0, ((1,) * 10,), (0,))
    run = {"new_tokens": [6], "rounds": [3], "accepted": [1.0], "prefill": 1.0, "decode": 0.5,
           "tokens": [[1] * 6]}  # fmt: skip
    measured = metrics.measured(unit, [run], run["tokens"], kv)
    monkeypatch.setattr(metrics, "peak_bandwidth", lambda kind: 1e6)
    methods = {"vanilla": Vanilla(), "eagle": Eagle(chain(2))}
    rows = metrics.Table(params, "any")
    rows._methods = {(name, 0.0): method for name, method in methods.items()}
    rows._units, rows._runs = [unit], {(name, 0): measured for name in methods}
    rows._shapes = {(name, 0): "shape" for name in methods}
    rows._compile = {"shape": 2.0}
    draft = sum(array.size * 4 for array in params.drafts["eagle"].params.values())
    found = {row["method"]: row["mbu"] for row in rows.rows()}
    read = 3 * (whole - table + kv * 13)
    assert found["vanilla"] == pytest.approx(read / 0.5 / 1e6)
    assert found["eagle"] == pytest.approx((read + 3 * draft) / 0.5 / 1e6)


def test_the_shipped_configuration() -> None:
    """Catches a configuration that the program refuses, or prompts that a bare clone lacks."""
    from eagle_jax import settings
    from eagle_jax.evaluate.tasks import read_tasks

    root = Path(__file__).parents[2]
    config = settings.load(root / "configs/eval/tiny.py", ["limit=3"], kind=EvalConfig)
    params = load("tiny", draft=config.drafts)
    kept = with_drafts(config, params)
    runner.check_methods(params, kept)
    assert len(kept.methods) > 5
    assert "vanilla" in dict(config.methods) and not config.tasks
    assert len(read_tasks(config.tasks, config.data, config.limit)["own"]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "egale"], "methods='egale': unknown; use eagle, lossy, vanilla"),
        (["--tasks", "nope"], "tasks='nope': unknown; use own, chat, other: data="),
        (["--temperature", "-1"], "temperatures=(-1.0,): give numbers of 0 or more"),
        (["--set", "repeats=0"], "repeats=0: must be at least 1"),
        (["--set", "repeat=1"], "did you mean 'repeats'?"),
        (["--set", "longest_prompt=3"], "tasks='chat': every prompt is too long"),
        (["--set", "top_p=0"], "methods, 'eagle': top_p=0.0: must be above 0"),
    ],
)
def test_errors_are_one_line(arguments, tmp_path, options, said) -> None:
    """Catches a traceback, or a long run before a mistake is told."""
    with pytest.raises(ValueError, match=re.escape(said)) as info:
        main([*arguments, "--output", str(tmp_path), *options])
    assert "\n" not in str(info.value)


def test_a_misspelt_field_is_named(tmp_path) -> None:
    """Catches an error of a config file that does not say which fields there are.

    In its own process: the type checker of the tests replaces the message of Python.
    """
    path = tmp_path / "config.py"
    path.write_text("from eagle_jax.evaluate import EvalConfig\nconfig = EvalConfig(repeat=2)\n")
    command = [sys.executable, "-m", "eagle_jax.evaluate", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "line 2: EvalConfig has no field 'repeat'; did you mean 'repeats'?" in done.stderr


def test_a_method_without_its_draft_is_named(tiny_model, tmp_path) -> None:
    """Catches an hour of measuring before the first call that cannot work."""
    config = EvalConfig(
        output_dir=str(tmp_path / "out"),
        methods=(("my eagle", Eagle(chain(2))),),
        model=str(tiny_model / "target"),
    )
    with pytest.raises(ValueError, match="methods, 'my eagle': .*needs a draft"):
        evaluate(config)
    assert not (tmp_path / "out").exists()
    swapped = dataclasses.replace(config, methods=(("vanilla", Eagle(chain(2))),))
    with pytest.raises(ValueError, match="that name is the baseline's"):
        evaluate(swapped)


def test_the_import_is_light() -> None:
    """Catches JAX or matplotlib loaded before anything needs them; --help teaches at once."""
    program = (
        "import sys, eagle_jax.evaluate, eagle_jax.evaluate.__main__ as m\n"
        "assert not {'jax', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy'\n"
        "m.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples\n" in done.stdout and "--restart" in done.stdout
