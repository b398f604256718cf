"""Tuning: predictions by hand-made tables, the choice, what is stored, and the whole command."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import decoding
import jax
import numpy as np
import pytest

import eagle_jax.tune as tuning
from eagle_jax import cli
from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Speculative,
    Vanilla,
    chain,
    generate,
    method_cli,
    static_tree,
    stream,
    tuning_store,
)
from eagle_jax.decode.__main__ import main as decode_main
from eagle_jax.decode.batching.batcher import Batcher
from eagle_jax.decode.prompts import encode
from eagle_jax.decode.sampling import SamplingParams
from eagle_jax.drafters.eagle.tuning import Probe
from eagle_jax.params import Params, load
from eagle_jax.tune import Tuning, measure, tune
from eagle_jax.tune.__main__ import main
from eagle_jax.tune.acceptance import NOTHING, Copies, Pools, Ranks, Recorder, pooled
from eagle_jax.tune.predict import (
    Evidence,
    Prediction,
    Steps,
    Times,
    candidates,
    copier,
    finalists,
    predict,
)

ENTRY = {"method": "--method eagle --tree chain-2", "tuned": "2026-01-01", "speedup": 1.5}


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of its own, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def params(model: Path) -> Params:
    return load(model)


def entry(params: Params, rows: int = 1, temperature: float = 0.0, **changes: str) -> dict:
    return {"key": tuning_store.key(params, rows, temperature), **ENTRY, **changes}


# --- Predictions -------------------------------------------------------------------------------


def chains(accepted: list[int], depth: int) -> Ranks:
    """Rounds that accept so many tokens of a chain."""
    steps = np.arange(depth)[None]
    return Ranks(np.where(steps < np.array(accepted)[:, None], 0, NOTHING))


def evidence(passes: dict[int, float], step: float, acceptance: float) -> Evidence:
    """A small model with geometric acceptance beside recycling that is never right."""
    rng = np.random.default_rng(0)
    accepted = np.minimum(rng.geometric(1 - acceptance, 20000) - 1, 6).tolist()
    return Evidence(
        Times(passes),
        {"model": Steps({1: step}), "recycling": Steps({1: 0.0})},
        {"model": chains(accepted, 6), "recycling": chains([0], 2)},
        [((1, 2), (3, 4, 5))],
        [Copies(np.zeros(3, int), np.zeros(3, int))],
    )


@pytest.mark.parametrize(
    ("slope", "step", "acceptance"),
    [(0.0, 0.02, 0.8), (0.0, 0.3, 0.8), (0.3, 0.1, 0.8), (0.05, 0.05, 0.4)],
)
def test_the_predicted_chain_is_the_best_by_analysis(slope, step, acceptance) -> None:
    """tau(n) = (1 - a^(n+1)) / (1 - a), a round costs 1 + slope n + step n."""

    def rate(n: int) -> float:
        tau = (1 - acceptance ** (n + 1)) / (1 - acceptance)
        return tau / (1 + slope * n + step * n)

    found = evidence({1: 1.0, 64: 1 + 63 * slope}, step, acceptance)
    methods = [Speculative(n) for n in range(1, 7)]
    predictions = [predict(method, found) for method in methods]
    for prediction in predictions:
        length = prediction.method.depth
        np.testing.assert_allclose(prediction.tokens_per_second, rate(length), rtol=0.02)
    best = max(predictions, key=lambda p: p.tokens_per_second)
    assert rate(best.method.depth) >= 0.99 * max(map(rate, range(1, 7)))


def test_times_between_and_beyond_those_measured() -> None:
    times = Times({1: 1.0, 2: 1.0, 4: 2.0, 8: 6.0})
    assert [times.of(n) for n in (1, 3, 6, 10)] == [1.0, 1.5, 4.0, 8.0]
    assert times.most() == 4  # eight tokens take six passes: no tree of that size
    assert Times({1: 1.0}).of(9) == 1.0


def test_candidates_fit_the_device() -> None:
    """Where wide passes are slow, no wide tree is tried; every spelling is read back."""
    found = evidence({1: 1.0, 4: 3.0, 8: 9.0}, 0.1, 0.5)
    few = candidates(found)
    # Speculative decoding tries all lengths that were recorded.
    assert all(m.nodes <= 4 for m in few if not isinstance(m, Speculative))
    many = candidates(dataclasses.replace(found, times=Times({1: 1.0, 64: 1.0})))
    assert max(m.nodes for m in many) > 32 and len(many) > len(few)
    assert all(method_cli.parse(method_cli.spell(m)) == m for m in (*few, *many))


def test_finalists_have_every_family() -> None:
    def of(family: str, length: int, speed: float) -> Prediction:
        return Prediction(family, Speculative(length), speed, 1.0)

    given = [of("a", 1, 3.0), of("a", 2, 2.0), of("b", 3, 0.1), of("a", 4, 1.0)]
    chosen = finalists([*given, of("vanilla", 5, 9.0)], more=1)
    assert chosen == [given[0], given[1], given[2]]


def test_ranks_and_a_tree_within_them() -> None:
    ranks = Ranks(np.array([[0, 1], [2, NOTHING], [NOTHING, NOTHING], [0, 0]]))
    assert ranks.tau(chain(2)) == 1 + (1 + 0 + 0 + 2) / 4
    assert ranks.tau(static_tree([[0], [2], [0, 1]])) == 1 + (2 + 1 + 0 + 1) / 4
    accuracy = np.array(ranks.accuracy(3))
    np.testing.assert_allclose(accuracy[0], [2 / 5, 0.25 / 5, 1 / 5])


def test_copies_count_what_the_text_repeats() -> None:
    """An answer that says its prompt again is copied whole, in as few rounds as its length asks."""
    prompt, answer = [9, 1, 2, 3, 4, 5, 6, 9], [1, 2, 3, 4, 5, 6, 7]
    copies = Copies.of(prompt, answer, positions=10)
    assert copies.right.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert copies.walk(10) == (1, 0)  # six copied ones and the bonus token
    assert copies.walk(2) == (3, 0)  # 3 + 3 + 1
    assert copies.walk(10, at_least=99, otherwise=3.5) == (0, 2)
    assert pooled(prompt, answer, ngram=3, guesses=1) == 3
    assert pooled([1], [2, 3, 4], ngram=2, guesses=1) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_record_says_what_the_method_itself_gets_accepted(temperature) -> None:
    """Recorded acceptance, counted for the very trees that ran, is the acceptance they had."""
    pair = decoding.trained_pair()
    units = [measure.Unit(((7, 1, 2), (3, 9)), (5, 6)), measure.Unit(((1, 2), (4,)), (7, 8))]
    bench = measure.Bench(pair, units, decoding.NEW, quiet=True)
    tree = DynamicTree(depth=3, k=3, drafted=9)
    wide = [bench.run(Probe(tree, rounds=decoding.NEW), u, temperature) for u in units]
    pools = Pools.of([run.state for run in wide], tree)
    tau = sum(run.tokens for run in wide) / sum(run.rounds for run in wide)
    # Rounds that the limit cut short committed no bonus token.
    assert pools.tau(tree) == pytest.approx(tau, abs=0.01) and tau > 1.5
    assert pools.ranks().tau(chain(1)) <= pools.ranks().tau(chain(3)) <= tau
    for smaller in (DynamicTree(2, 3, 9), DynamicTree(3, 2, 4), DynamicTree(3, 3, 3)):
        runs = [bench.run(Eagle(smaller), unit, temperature) for unit in units]
        real = sum(run.tokens for run in runs) / sum(run.rounds for run in runs)
        assert pools.tau(smaller) == pytest.approx(real, rel=0.2)
    # Recording changes no token.
    assert [r.answers for r in wide] == [
        bench.run(Vanilla(), u, temperature).answers for u in units
    ]
    static = static_tree([[0], [1], [0, 0]])
    recorded = [bench.run(Recorder(Recycling(static), decoding.NEW), u, temperature) for u in units]
    ranks = Ranks.of([run.state for run in recorded], static)
    tau = sum(run.tokens for run in recorded) / sum(run.rounds for run in recorded)
    assert ranks.tau(static) == pytest.approx(tau, abs=0.01)


# --- The choice --------------------------------------------------------------------------------


def run_of(seconds: float, tokens: int = 10) -> measure.Run:
    return measure.Run(seconds, 5, 5, (tuple(range(tokens)),), None)


def measured(seconds: list[float], base: list[float]) -> measure.Measured:
    prediction = Prediction("eagle", Eagle(chain(1)), 2.0, 1.0)
    return measure.summarise(prediction, list(map(run_of, seconds)), list(map(run_of, base)))


def test_what_is_not_surely_faster_is_not_chosen() -> None:
    """Slower, equal, or faster by chance: vanilla. Of two that are surely faster, the faster."""
    base = [1.0] * 12
    slower, equal = measured([1.1] * 12, base), measured(base, base)
    lucky = measured([0.2, 0.9, 0.8, 1.5, 1.2, 0.7, 1.1, 1.3, 0.9, 1.4, 0.6, 1.0], base)
    one_long = measured([0.9] * 11 + [9.0], base)  # half of the prompts gain, the total loses
    assert lucky.total > 1 and lucky.interval is not None and lucky.interval[0] <= 1
    assert measure.choose([slower, equal, lucky, one_long]) is None
    assert measure.choose([measured([0.5], [1.0])]) is None  # one prompt has no interval
    good, better = measured([0.8] * 12, base), measured([0.5] * 12, base)
    assert measure.choose([slower, good, better]) is better


def test_speed_counts_tokens() -> None:
    """Answers that bfloat16 made longer or shorter compare by seconds a token."""
    runs, base = [run_of(1.0, 20)] * 3, [run_of(1.0, 10)] * 3
    prediction = Prediction("eagle", Eagle(chain(1)), 2.0, 1.0)
    assert measure.summarise(prediction, runs, base).speedup == 2.0


def test_units_are_of_one_padded_size(params) -> None:
    prompts = [[1] * 5, [1] * 150, [1] * 6, [1] * 7, [1] * 250]
    found = measure.units(params, prompts, 1, 40)
    assert [len(unit.prompts[0]) for unit in found] == [5, 6, 7]
    assert [unit.seeds for unit in measure.units(params, prompts[:4], 1, 40)] == [(0,), (1,), (2,)]
    with pytest.raises(ValueError, match=r"prompts: 3 of one padded size \(128 tokens\)"):
        measure.units(params, prompts, 2, 40)
    with pytest.raises(ValueError, match="new_tokens=255: none of 5 prompts"):
        measure.units(params, prompts, 1, 255)


# --- What is stored ----------------------------------------------------------------------------


def test_round_trip(params, model, monkeypatch) -> None:
    """LazyTensor beside the model, replaced by key, and used for what it was measured for only."""
    with pytest.raises(ValueError, match="no tuning for float32, batch size 1, greedy") as error:
        generate(params, "Hi", method="auto")
    command = f"run eagle-jax tune --model {model} --temperature 0"
    assert str(error.value).endswith(command) and "\n" not in str(error.value)
    assert tuning_store.store(params, [entry(params, tuned="2025")]) == model / tuning_store.FILE
    tuning_store.store(params, [entry(params), entry(params, 4, 1.0, method="--method medusa")])
    assert len(tuning_store.entries(model / tuning_store.FILE)) == 2
    assert tuning_store.method(params, 1, 0.0) == Eagle(chain(2))
    assert tuning_store.method(params, 3, 0.7) == Medusa()  # a batch size up to 4, any temperature
    for rows, temperature in ((1, 1.0), (2, 0.0), (5, 1.0)):
        assert tuning_store.find(params, rows, temperature) is None
    monkeypatch.setattr(tuning_store, "_processor", lambda: "another")
    with pytest.raises(ValueError, match="no tuning for .* another, "):
        tuning_store.method(params, 1, 0.0)


def test_other_weights_are_not_those_that_were_tuned(params, model) -> None:
    """In the same place: one matrix of the target, a retrained draft, a draft less."""
    tuning_store.store(params, [entry(params)])
    name = next(name for name, array in params.target.items() if array.ndim == 2)
    target = {**params.target, name: params.target[name].at[0, 0].add(1)}
    draft = dataclasses.replace(
        params.drafts["eagle"],
        params={k: x * 2 for k, x in params.drafts["eagle"].params.items()},
    )
    changes = (
        {"target": target},
        {"drafts": {**params.drafts, "eagle": draft}},
        {"drafts": {}},
    )
    for change in changes:
        other = dataclasses.replace(params, **change)
        with pytest.raises(
            ValueError, match="the tuning is of other weights or drafts; run eagle-jax"
        ):
            tuning_store.method(other, 1, 0.0)
    # A copy elsewhere is the same model.
    copy = load(shutil.copytree(model, model.parent / "copy"))
    assert tuning_store.method(copy, 1, 0.0) == Eagle(chain(2))


def test_where_the_model_cannot_be_written(params, model, monkeypatch) -> None:
    """An installed package: the user's cache, which is found as well; the newest entry counts."""
    tuning_store.store(params, [entry(params)])
    write = tuning_store.files.write_json

    def refuse(path: Path, content: object) -> None:
        if model in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning_store.files, "write_json", refuse)
    newer = entry(params, tuned="2027-01-01", method="--method speculative --set length=2")
    path = tuning_store.store(params, [newer])
    assert path.parent == model.parent / "cache" / "eagle_jax" / "tuning"
    assert tuning_store.method(params, 1, 0.0) == Speculative(2)
    # Parameters that were not loaded from anywhere have the cache alone.
    assert tuning_store.places(dataclasses.replace(params, directory=None)) == [path]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "holds no JSON object"),
        (b"{}", "is no tuning of this version of eagle_jax"),
        (b'{"format": "eagle_jax tuning", "version": 2, "entries": []}', "is no tuning of this"),
        (b'{"format": "eagle_jax tuning", "version": 1, "entries": [3]}', "is no tuning of this"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(params, model, content, said, capsys) -> None:
    (model / tuning_store.FILE).write_bytes(content)
    with pytest.raises(ValueError) as error:
        generate(params, "Hi", method="auto")
    text = str(error.value)
    assert text.startswith(f"{model / tuning_store.FILE}: ") and said in text and "\n" not in text
    assert text.endswith("; delete it and run eagle-jax tune again")
    # The tuner says so before it measures anything.
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: main(["--model", str(model)]))
    assert capsys.readouterr().err == f"error: {text}\n"


def test_an_unreadable_file_and_an_unknown_method(params, model) -> None:
    (model / tuning_store.FILE).mkdir()
    with pytest.raises(ValueError, match="tuning.json: Is a directory; make it readable, or del"):
        tuning_store.method(params, 1, 0.0)
    (model / tuning_store.FILE).rmdir()
    tuning_store.store(params, [entry(params, method="--method warp --tree chain-2")])
    with pytest.raises(ValueError, match="tuning.json: method '--method warp .*: unknown; use"):
        tuning_store.method(params, 1, 0.0)


@pytest.mark.parametrize(
    "method",
    [
        Vanilla(),
        Eagle(),
        Eagle(chain(3), coupled=False, sharpness=2.0),
        Eagle(static_tree([[0], [1], [0, 2]]), head="eagle3"),
        Eagle(DynamicTree(4, 2, 5)),
        EagleLookup(Eagle(DynamicTree(2, 2, 3), head="eagle3"), copier(3, 6)),
        Medusa(static_tree([[0], [1]]), coupled=False),
        Speculative(2),
        Lookahead(3, 2, 2, prompt_pool=False),
        PromptLookup(length=3, latest=True),
        Recycling(static_tree([[0], [0, 0], [1]]), width=4),
    ],
)
def test_what_is_spelled_is_read_back(method) -> None:
    assert method_cli.parse(method_cli.spell(method)) == method
    assert "\n" not in method_cli.label(method)


def test_spelling_what_has_no_words() -> None:
    method = decoding.Clairvoyant((True,))
    assert method_cli.spell(method) == method_cli.label(method) == repr(method)
    for text in ("--method", "--tree", "eagle", "--method eagle --rule best", "--method auto -x"):
        with pytest.raises(ValueError):
            method_cli.parse(text)


# --- method="auto" -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_auto_writes_what_vanilla_does(params, temperature) -> None:
    tuning_store.store(params, [entry(params, rows, temperature) for rows in (1, 2)])
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    for prompt in ("Hi", ["Hi", "0+1"]):
        vanilla = generate(params, prompt, method="vanilla", **options)
        auto = generate(params, prompt, method="auto", **options)
        assert auto.text == vanilla.text
        assert decoding.lists(auto.tokens) == decoding.lists(vanilla.tokens)
        assert auto.statistics.method == ENTRY["method"]
        assert vanilla.statistics.method == "--method vanilla"
    tuned, pieces = Eagle(chain(2)), list(stream(params, "Hi", method="auto", **options))
    assert "".join(p.text for p in pieces) == generate(params, "Hi", **options).text
    assert (
        Batcher(params, method="auto", rows=2, sampling=SamplingParams(temperature)).method == tuned
    )


def test_auto_is_a_table_for_a_batcher(params, model) -> None:
    """Catches sizes that are not looked for, one above `rows`, and another's or an old entry."""
    words = "--method speculative --set length="
    stored = [
        entry(params, 1, method=f"{words}1", tuned="2027-01-01"),
        entry(params, 2, 1.0, method=f"{words}2"),
        entry(params, 4, method=f"{words}4"),
        entry(params, 8, method="--method vanilla"),
    ]
    cache = tuning_store.places(params)[-1]
    cache.parent.mkdir(parents=True)
    tuning_store._write(cache, [entry(params, 1, method=f"{words}3")])
    tuning_store.store(params, stored)
    sizes = {1: Speculative(1), 4: Speculative(4)}
    assert tuning_store.table(params, 4, 0.0) == sizes
    assert tuning_store.table(params, 3, 0.0) == {1: Speculative(1), 3: Speculative(4)}
    assert tuning_store.table(params, 8, 0.0) == {**sizes, 8: Vanilla()}
    batcher = Batcher(params, method="auto", rows=4)
    assert batcher.method == Speculative(4)
    batcher.submit("Hi", max_new_tokens=2)
    assert list(batcher.run()) and batcher.method == Speculative(1)
    with pytest.raises(ValueError, match="batch size 16, greedy, .* --batch-size 9$") as error:
        Batcher(params, method="auto", rows=9)
    assert "\n" not in str(error.value)


def test_auto_from_the_shell(params, model, capsys) -> None:
    argv = ["Hi", "--model", str(model), "--method", "auto", "--max-new-tokens", "8"]
    tuning_store.store(params, [entry(params)])
    decode_main(argv)
    assert capsys.readouterr().err.endswith(", auto: --method eagle --tree chain-2]\n")
    decode_main([*argv, "--json"])
    assert json.loads(capsys.readouterr().out)["method"] == ENTRY["method"]
    with pytest.raises(ValueError, match="method='auto': has its settings from the tuning"):
        decode_main([*argv, "--tree", "chain-1"])
    decode_main([*argv[1:3], "--tree", "chain-2", "--method", "eagle_lookup", "Hi"])


# --- The whole ---------------------------------------------------------------------------------


def test_tuning_of_a_random_model(model, monkeypatch, capsys) -> None:
    """Drafts that are never right cannot win; the command stores, tells, and auto obeys."""
    # A few programs will do.
    monkeypatch.setattr(measure, "SIZES", (1, 4, 8))
    real = measure.Bench.run

    def slow_drafts(self, method, unit, temperature):
        found = real(self, method, unit, temperature)
        return dataclasses.replace(found, seconds=found.passes * float(method.nodes))

    monkeypatch.setattr(measure.Bench, "run", slow_drafts)
    for kind in ("eagle3", "medusa"):
        shutil.rmtree(model / kind)
    argv = ["--model", str(model), "--temperature", "0", "--limit", "3", "--new-tokens", "12"]
    main(argv)
    out = capsys.readouterr().out.splitlines()
    told = json.loads(out[-1])
    assert told["stored"] == str(model / tuning_store.FILE)
    assert told["chosen"][0]["method"] == "--method vanilla"
    assert any(line.startswith("speculative length=") for line in out)
    params = load(model)
    found = tuning_store.find(params, 1, 0.0)
    assert found is not None and found["jax"] == jax.__version__ and found["interval"] is None
    families = {row["method"].split()[1] for row in found["heats"]}
    assert families >= {"eagle", "eagle_lookup", "speculative", "recycling", "prompt_lookup"}
    assert all(math.isfinite(row["predicted_tau"]) for row in found["heats"])
    assert generate(params, "Hi", method="auto").statistics.method == "--method vanilla"


def test_several_batch_sizes(params, model, monkeypatch, capsys) -> None:
    """An entry each; a size that cannot be is told before anything is measured."""

    def found(params, prompts, *, temperatures, batch_size, new_tokens):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        chosen = {**entry(params, batch_size), "temperature": 0.0, "interval": None}
        return iter([Tuning(0.0, {1: 1.0}, [], [], 2.0, None, chosen)])

    monkeypatch.setattr(tuning, "tune", found)
    argv = ["--model", str(model), "--temperature", "0", "--batch-size"]
    with pytest.raises(ValueError, match="batch_size=0: must be"):
        main([*argv, "2", "0"])
    assert capsys.readouterr().out == "" and not (model / tuning_store.FILE).exists()
    main([*argv, "1", "4", "1"])
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert [one["batch_size"] for one in told["chosen"]] == [1, 4]
    assert "\nbatch size 4, temperature 0: vanilla 2.0 tokens/s\n" in out
    assert all(tuning_store.find(params, rows, 0.0) for rows in (1, 3, 4))
    assert tuning_store.find(params, 2, 0.0) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperatures": (0.5, 1.0)}, "one entry serves every temperature above 0"),
        ({"temperatures": ()}, "give numbers of 0 or more"),
        ({"temperatures": (float("nan"),)}, "give numbers of 0 or more"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"new_tokens": 0}, "new_tokens=0: must be at least 1"),
        ({"new_tokens": 256}, "new_tokens=256: the context is 256; use less"),
    ],
)
def test_errors(params, options, said) -> None:
    with pytest.raises(ValueError) as error:
        tune(params, [encode(params, "Hi", raw=False).tolist()] * 3, quiet=True, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
