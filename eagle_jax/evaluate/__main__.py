"""Command line of evaluation: `python -m eagle_jax.evaluate --config configs/eval/tiny.py`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from eagle_jax import cli, compilation_cache, distributed, fingerprint, outputs, settings
from eagle_jax.evaluate.config import EvalConfig

# Fields of the environment that all samples of an output directory share.
_AROUND = ("device", "devices", "dtype", "quantize", "quantize_drafts", "jax", "eagle_jax")

_EPILOG = """\
what is measured
  Every method decodes every prompt in turn, A B C, A B C, after a warm-up of each shape. The
  baseline is vanilla decoding through the same engine. Every answer is compared with vanilla's,
  token for token. Speedups are medians over prompts of medians over repeats, with 95 % bootstrap
  intervals; compilation and the pass over the prompt are timed apart.

questions
  "own" are prompts of this package, the default. --data DIR has NAME.jsonl files, one question a
  line: {{"turns": ["first message", "second message"]}}, with question_id, category if you like.
  Without --tasks, those of mt_bench, humaneval, gsm8k, alpaca that are in DIR are asked.

results
  The output directory gets results.json, results.csv, plots, and samples.jsonl, from which a run
  that was stopped goes on when the same command is given again. The last line of standard output
  is one JSON object. Exit status 1: an answer differs that must not, in float32 or with exact=True.

examples
  {prog} --config configs/eval/tiny.py --set limit=4 --set repeats=1
  {prog} --config configs/eval/tiny.py --methods eagle --temperature 0
  {prog} --config configs/eval/tiny.py --data DIR --tasks mt_bench gsm8k
"""


def parser(prog: str = "python -m eagle_jax.evaluate") -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = cli.Parser(
        prog=prog,
        description="Compare decoding methods: acceptance, speed, equality with vanilla decoding.",
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add_arguments(out, "an EvalConfig file", "limit=10, batch_size=8, quantize=int8")
    out.add_argument("--model", metavar="MODEL", help="in place of the file's model")
    out.add_argument(
        "--draft",
        action="append",
        metavar="DIR",
        help="a draft for the model, in place of the file's drafts; repeatable",
    )
    out.add_argument(
        "--methods",
        metavar="A,B",
        help="only these of the file, and vanilla; by default all that the model has drafts for",
    )
    out.add_argument("--tasks", nargs="+", metavar="TASK", help="own, or NAME for DIR/NAME.jsonl")
    out.add_argument("--temperature", nargs="+", type=float, metavar="T", help="0 is greedy")
    out.add_argument("--data", metavar="DIR", help="directory of question files")
    out.add_argument("--output", metavar="DIR", help="in place of the file's output_dir")
    out.add_argument("--restart", action="store_true", help="delete the samples of an earlier run")
    distributed.add_arguments(out)
    return out


def configuration(args: argparse.Namespace) -> EvalConfig:
    """Returns the configuration file's settings with the command line's options applied."""
    config = settings.load(args.config, args.overrides, kind=EvalConfig)
    changes: dict[str, Any] = {}
    if args.model is not None:
        changes["model"] = args.model
    if args.draft is not None:
        changes["drafts"] = tuple(args.draft)
    if args.tasks:
        changes["tasks"] = tuple(name for word in args.tasks for name in word.split(",") if name)
    if args.temperature:
        changes["temperatures"] = tuple(args.temperature)
    if args.data is not None:
        changes["data"] = args.data
    if args.output is not None:
        changes["output_dir"] = args.output
    if args.methods is not None:
        changes["methods"] = config.chosen([name.strip() for name in args.methods.split(",")])
    return dataclasses.replace(config, **changes)


def evaluate(config: EvalConfig, restart: bool = False, strict: bool = True) -> dict[str, Any]:
    """Takes the samples missing in `config.output_dir`, writes the results there, returns them.

    Args:
        config: the evaluation's configuration.
        restart: delete the samples of an earlier run.
        strict: raise if the model lacks a method's draft; otherwise skip such methods and print
            their names.

    Raises:
        ValueError: a setting, a file or a method is invalid; the message is one line.
    """
    from eagle_jax.evaluate import report, runner, tasks
    from eagle_jax.evaluate.samples import Samples
    from eagle_jax.params import load
    from eagle_jax.sharding import decoding_mesh

    questions = tasks.read_tasks(config.tasks, config.data, config.limit)
    mesh = decoding_mesh(config.tensor, config.expert)
    params = load(
        config.model,
        draft=config.drafts,
        dtype=config.dtype,
        sharding=mesh,
        quantize=config.quantize,
        quantize_drafts=config.quantize_drafts,
    )
    if not strict:
        config = with_drafts(config, params)
    runner.check_methods(params, config)
    around = environment(params)
    folder = Path(config.output_dir).expanduser()
    with outputs.claimed("output_dir", folder):
        samples = Samples(folder, _fixed(config, params, around), restart)
        try:
            run = runner.Runner(params, config, samples)
            units = run.units(questions)
            groups = run.jobs(units)
            run.measure(groups)
        finally:
            samples.close()
        result = _result(config, params, around, run, units, groups)
        if distributed.first():
            report.write(folder, result)
            _plot(folder, result)
    return result


def _result(
    config: EvalConfig,
    params: Any,
    around: dict[str, Any],
    run: Any,
    units: list[Any],
    groups: list[Any],
) -> dict[str, Any]:
    """Returns the result of `evaluate` from the samples of a finished run."""
    from eagle_jax.decode.method_cli import spell
    from eagle_jax.evaluate import metrics

    samples = run.samples
    table = metrics.Table(params, around["device"])
    table.read(groups[: len(units)], samples, config.repeats)
    rows = table.rows()
    judged = config.exact or around["dtype"] == "float32"
    failed = judged and any(
        row["guarantee"] == "exact" and row["equal"] < row["answers"] for row in rows
    )
    return {
        "lossless": not failed if judged else None,
        "environment": around,
        "config": {
            **dataclasses.asdict(dataclasses.replace(config, methods=())),
            "methods": {
                name: method if isinstance(method, str) else spell(method)
                for name, method in run.methods.items()
            },
        },
        "skipped": run.skipped,
        "rows": rows,
        "step_times": metrics.step_times(groups[len(units) :], samples, config.repeats),
        "notes": {
            "tau": "committed tokens per round, the bonus token included",
            "mbu": "bytes of target and draft weights, once each a round, and of the target's used "
            "keys and values, over the round's time and the device's peak bandwidth",
            "batch": "acceptance per depth of a padded batch counts its padding rows",
        },
    }


def with_drafts(config: EvalConfig, params: Any) -> EvalConfig:
    """Returns `config` without the methods whose draft or stored tuning is missing."""
    from eagle_jax.decode import tuning_store
    from eagle_jax.decode.registry import AUTO

    kept = []
    for name, method in config.methods:
        lacking = ""
        if method == AUTO:
            if not all(
                tuning_store.find(params, config.batch_size, t) for t in config.temperatures
            ):
                lacking = "was not tuned here (eagle-jax tune)"
        elif method.draft is not None and method.draft not in params.drafts:
            lacking = f"has no {method.draft} draft"
        if lacking:
            print(f"left out {name}: the model {lacking}", file=sys.stderr)
        else:
            kept.append((name, method))
    return dataclasses.replace(config, methods=tuple(kept))


def environment(params: Any) -> dict[str, Any]:
    """Returns what the figures depend on besides the settings: device, dtype and versions."""
    import platform
    from importlib.metadata import version

    import jax

    import eagle_jax

    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "backend": jax.default_backend(),
        "processor": platform.processor() or platform.machine(),
        "dtype": str(params.dtype),
        "quantize": params.quantize,
        "quantize_drafts": params.quantize_drafts,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "eagle_jax": eagle_jax.__version__,
    }


def _fixed(config: EvalConfig, params: Any, around: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that all samples share; tasks, temperatures and limits may differ."""
    from eagle_jax.evaluate.runner import with_baseline

    names = ("model", "drafts", "top_p", "new_tokens", "ignore_eos", "exact", "seed", "repeats")
    more = ("warm_up", "batch_size", "tensor", "expert")
    return {
        **{name: getattr(config, name) for name in (*names, *more)},
        "methods": {
            name: _settings(method, params, config.batch_size)
            for name, method in with_baseline(config.methods).items()
        },
        **{name: around[name] for name in _AROUND},
        "weights": fingerprint.of_params(params),
    }


def _settings(method: Any, params: Any, rows: int) -> str:
    """Returns a method's command-line options; "auto" is resolved to the tuned method."""
    from eagle_jax.decode import tuning_store
    from eagle_jax.decode.method_cli import spell
    from eagle_jax.decode.registry import AUTO

    if method != AUTO:
        return spell(method)
    found = [tuning_store.find(params, rows, temperature) for temperature in (0.0, 1.0)]
    return f"auto: {[entry and entry['method'] for entry in found]}"


def _plot(folder: Path, result: dict[str, Any]) -> None:
    from eagle_jax.evaluate import plots

    around = result["environment"]
    weights = f"{around['quantize']}, " if around["quantize"] else ""
    title = f"{result['config']['model']}, {weights}{around['dtype']}, {around['device']}"
    try:
        plots.plot(folder, result["rows"], result["step_times"], title)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no plots: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


def summary(result: dict[str, Any], output: str) -> dict[str, Any]:
    """Returns the figures over all tasks, for the last line of output."""
    rows = [row for row in result["rows"] if not row["category"]]
    kept = ("task", "temperature", "method", "tau", "round_ms", "tokens_per_second", "speedup")
    kept += ("speedup_interval", "end_to_end", "equal", "answers")
    return {
        "lossless": result["lossless"],
        "output": output,
        "device": result["environment"]["device"],
        "dtype": result["environment"]["dtype"],
        "quantize": result["environment"]["quantize"],
        "quantize_drafts": result["environment"]["quantize_drafts"],
        "rows": [
            {name: _short(row[name]) for name in kept}
            for row in rows
            if row["task"] == rows[-1]["task"]
        ],
    }


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(argv: list[str] | None = None, prog: str = "python -m eagle_jax.evaluate") -> int:
    """Runs the command line; returns 1 if a method promised vanilla's text but differed."""
    args = parser(prog).parse_args(argv)
    config = configuration(args)
    distributed.join(args)
    compilation_cache.enable()
    from eagle_jax.evaluate import report

    try:
        result = evaluate(config, args.restart, strict=args.methods is not None)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    for line in report.tables(result):
        print(line)
    print(json.dumps(summary(result, config.output_dir)), flush=True)
    return 1 if result["lossless"] is False else 0


if __name__ == "__main__":
    cli.run(main)
