"""Runs every method on every prompt in turn (A B C, A B C) after a warm-up of every shape.

All methods get the same token ids. Later turns of a question follow frozen earlier answers, which
vanilla decodes once at this temperature and seed. `eagle_jax.decode.generate` times compilation,
prefill and rounds separately.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import Any

from tqdm import tqdm

from eagle_jax import interrupts, sharding
from eagle_jax.checks import check_whole
from eagle_jax.decode import Vanilla, generate, tuning_store
from eagle_jax.decode.instrument import wide_pass
from eagle_jax.decode.method import Method
from eagle_jax.decode.program import bucket_prompt
from eagle_jax.decode.registry import AUTO
from eagle_jax.decode.sampling import SamplingParams
from eagle_jax.decode.session import check_method
from eagle_jax.evaluate.config import BASELINE, EvalConfig
from eagle_jax.evaluate.samples import Samples
from eagle_jax.evaluate.tasks import Question
from eagle_jax.params import Params

STEP_TASK = "step time"
_STEP_TOKENS = 32  # approximate number of rounds in a run that times the target's pass


@dataclasses.dataclass(frozen=True)
class Unit:
    """The input of one call: a prompt, or a batch of prompts of one task and turn.

    Attributes:
        task, category: task and category of its questions; a batch has no category.
        ids: ids of its questions.
        turn: number of the message to answer, from 0.
        temperature: 0 is greedy.
        prompts: token ids of each row, frozen answers of earlier turns included.
        seeds: seed of each row.
    """

    task: str
    category: str
    ids: tuple[str, ...]
    turn: int
    temperature: float
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]

    @property
    def bucket(self) -> int:
        """Number of tokens that its prompts are padded to."""
        return bucket_prompt(max(map(len, self.prompts)))

    def key(self, kind: str, *more: Any) -> str:
        """Returns the key under which its samples are stored; it depends on the prompts."""
        prompts = zlib.crc32(json.dumps(self.prompts).encode())
        return json.dumps([kind, self.task, self.ids, self.turn, self.temperature, prompts, *more])


@dataclasses.dataclass(frozen=True)
class Job:
    """A method to run on a unit."""

    name: str
    method: Method
    unit: Unit
    new_tokens: int
    ignore_eos: bool

    def key(self, repeat: int) -> str:
        return self.unit.key("run", self.name, repeat)

    def shape(self) -> str:
        """Key of its compiled programs; jobs with the same key share them."""
        return json.dumps(["compile", self.name, self.unit.bucket, self.unit.temperature > 0])


class Runner:
    """Plans and takes all measurements; each sample is taken once and stored in `samples`."""

    def __init__(self, params: Params, config: EvalConfig, samples: Samples) -> None:
        if params.tokenizer is None:
            raise ValueError(f"model={config.model!r}: has no tokenizer; questions are text")
        self.params, self.config, self.samples = params, config, samples
        self.tokenizer = params.tokenizer
        self.methods = with_baseline(config.methods)
        self.skipped: dict[str, dict[str, int]] = {}
        self._warm: set[str] = set()

    def units(self, tasks: dict[str, list[Question]]) -> list[Unit]:
        """Returns all units in order; decodes the answers that later turns follow.

        Raises:
            ValueError: no prompt of a task fits the context.
        """
        return [
            unit
            for temperature in map(float, self.config.temperatures)
            for task, questions in tasks.items()
            for unit in self._units(task, questions, temperature)
        ]

    def jobs(self, units: Sequence[Unit]) -> list[list[Job]]:
        """Returns groups of jobs to interleave.

        There is a group of all methods for each unit, and then a group of all pass sizes for each
        of the first units.
        """
        new, ignore = self.config.new_tokens, self.config.ignore_eos
        out = [
            [
                Job(name, self._resolved(method, unit.temperature), unit, new, ignore)
                for name, method in self.methods.items()
            ]
            for unit in units
        ]
        new = min(new, _STEP_TOKENS)
        for unit in units[: self.config.step_prompts if self.config.step_times else 0]:
            unit = dataclasses.replace(unit, task=STEP_TASK, temperature=0.0)
            sizes = [(n, Vanilla() if n == 1 else wide_pass(n)) for n in self.config.step_times]
            out.append([Job(f"step {n}", method, unit, new, True) for n, method in sizes])
        return out

    def _resolved(self, method: Any, temperature: float) -> Method:
        """Returns `method`, or for "auto" the method that was tuned for this temperature."""
        if method != AUTO:
            return method
        return tuning_store.method(self.params, self.config.batch_size, temperature)

    def measure(self, groups: Sequence[Sequence[Job]]) -> None:
        """Takes every sample that is not stored yet."""
        repeats = range(self.config.repeats)
        todo = [
            (job, repeat)
            for group in groups
            for repeat in repeats
            for job in group
            if self.samples.get(job.key(repeat)) is None
        ]
        self._warm_up(job for job, _ in todo)
        total = sum(map(len, groups)) * len(repeats)
        with self._bar("measuring", total, total - len(todo)) as bar:
            for job, repeat in todo:
                bar.set_postfix_str(f"{job.unit.task}, {job.name}", refresh=False)
                run = self._run(job)
                self._keep_compile_time(job.shape(), run["compile"])
                self.samples.add(job.key(repeat), run)
                bar.update()

    def _units(self, task: str, questions: list[Question], temperature: float) -> Iterator[Unit]:
        chats = {question.id: [] for question in questions}
        asked = questions
        skipped = 0
        for turn in range(max(len(question.turns) for question in questions)):
            rows: list[tuple[Question, tuple[int, ...]]] = []
            for question in asked:
                chats[question.id].append({"role": "user", "content": question.turns[turn]})
                rows.append((question, self._encode(chats[question.id])))
            fitting = [(question, ids) for question, ids in rows if len(ids) <= self._room()]
            skipped += len(rows) - len(fitting)
            units = list(self._batches(task, fitting, turn, temperature))
            yield from units
            going_on = {q.id for q, _ in fitting if len(q.turns) > turn + 1}
            asked = [question for question in asked if question.id in going_on]
            frozen = self._freeze([unit for unit in units if going_on & set(unit.ids)])
            for question in asked:
                answer = self.tokenizer.decode(frozen[question.id])
                chats[question.id].append({"role": "assistant", "content": answer})
            if turn == 0 and not fitting:
                raise ValueError(f"tasks={task!r}: every prompt is too long; {self._bound()}")
        self.skipped.setdefault(task, {})[f"{temperature:g}"] = skipped

    def _room(self) -> int:
        """Returns the length of the longest prompt that leaves room for a whole answer."""
        room = self.params.target_config.max_position_embeddings - self.config.new_tokens
        return min(room, self.config.longest_prompt or room)

    def _bound(self) -> str:
        """Returns which setting limits prompt length, and how to change it, for errors."""
        context = self.params.target_config.max_position_embeddings
        new, longest = self.config.new_tokens, self.config.longest_prompt
        if longest and longest <= context - new:
            return f"longest_prompt={longest} skips longer ones; raise it"
        return (
            f"new_tokens={new} leaves {max(context - new, 0)} of the context's {context} tokens; "
            "lower it"
        )

    def _encode(self, chat: list[dict[str, str]]) -> tuple[int, ...]:
        if self.tokenizer.chat_template is not None:
            return tuple(self.tokenizer.chat(chat))
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        text = "\n\n".join(message["content"] for message in chat)
        return tuple(bos + self.tokenizer.encode(text))

    def _batches(
        self,
        task: str,
        rows: list[tuple[Question, tuple[int, ...]]],
        turn: int,
        temperature: float,
    ) -> Iterator[Unit]:
        """Yields batches of rows of similar length, to reduce padding."""
        size = self.config.batch_size
        if size > 1:
            rows = sorted(rows, key=lambda row: -len(row[1]))  # longest first; stable
        while rows:
            together, rows = rows[:size], rows[size:]
            ids = tuple(question.id for question, _ in together)
            yield Unit(
                task=task,
                category=together[0][0].category if size == 1 else "",
                ids=ids,
                turn=turn,
                temperature=temperature,
                prompts=tuple(prompt for _, prompt in together),
                seeds=tuple(self._seed(task, name) for name in ids),
            )

    def _seed(self, task: str, question: str) -> int:
        """Returns the seed of a question, which does not depend on the other questions."""
        return (self.config.seed + zlib.crc32(f"{task}/{question}".encode())) % 2**32

    def _freeze(self, units: list[Unit]) -> dict[str, list[int]]:
        """Returns vanilla's answers by question, decoded now unless they are stored."""
        method, new = self.methods[BASELINE], self.config.new_tokens
        jobs = [Job(BASELINE, method, unit, new, self.config.ignore_eos) for unit in units]
        todo = [job for job in jobs if self.samples.get(job.unit.key("frozen")) is None]
        self._warm_up(todo)
        if todo:
            for job in self._bar("earlier turns", len(todo), items=todo):
                tokens = self._run(job)["tokens"]
                self.samples.add(job.unit.key("frozen"), {"tokens": tokens})
        out: dict[str, list[int]] = {}
        for unit in units:
            record = self.samples.get(unit.key("frozen"))
            assert record is not None
            out |= dict(zip(unit.ids, record["tokens"], strict=True))
        return out

    def _warm_up(self, jobs: Iterable[Job]) -> None:
        """Compiles and runs every shape once; stores the seconds of the first compilation."""
        shapes: dict[str, Job] = {}
        for job in jobs:
            if job.shape() not in self._warm:
                shapes.setdefault(job.shape(), job)
        if not shapes or not self.config.warm_up:
            return
        threads = sharding.at_a_time(self.params.target, self.config.compile_threads)
        with interrupts.thread_pool(threads) as pool:
            runs = {pool.submit(self._run, job): shape for shape, job in shapes.items()}
            for run in self._bar("compiling", len(runs), items=as_completed(runs)):
                self._keep_compile_time(runs[run], run.result()["compile"])

    def _keep_compile_time(self, shape: str, seconds: float) -> None:
        """Stores the compile time of a shape's first run, and marks the shape as warm."""
        if self.samples.get(shape) is None:
            self.samples.add(shape, {"seconds": seconds})
        self._warm.add(shape)

    def _run(self, job: Job) -> dict[str, Any]:
        """Returns the sample of one call of `generate`."""
        unit, size = job.unit, self.config.batch_size
        missing = size - len(unit.ids)
        # The last batch repeats its first row, so that it has the shape of the others.
        prompts = [list(p) for p in (*unit.prompts, *unit.prompts[:1] * missing)]
        out = generate(
            self.params,
            prompts,
            method=job.method,
            max_new_tokens=job.new_tokens,
            temperature=unit.temperature,
            top_p=float(self.config.top_p),
            seed=[*unit.seeds, *unit.seeds[:1] * missing],
            ignore_eos=job.ignore_eos,
            exact=self.config.exact,
        )
        statistics = out.statistics
        return {
            "new_tokens": statistics.new_tokens,
            "rounds": statistics.rounds,
            "accepted": statistics.accepted_per_depth,
            "compile": statistics.compile_seconds,
            "prefill": statistics.prefill_seconds,
            "decode": statistics.decode_seconds,
            "tokens": [row.tolist() for row in out.tokens[: len(unit.ids)]],
        }

    @staticmethod
    def _bar(what: str, total: int, done: int = 0, items: Any = None) -> Any:
        return tqdm(items, desc=what, total=total, initial=done, file=sys.stderr)


def with_baseline(methods: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Returns the methods by name, with vanilla decoding added if it is missing.

    Raises:
        ValueError: another method is named "vanilla".
    """
    out = dict(methods)
    if type(out.get(BASELINE, Vanilla())) is not Vanilla:
        raise ValueError(f"methods: {BASELINE!r} is {out[BASELINE]}; that name is the baseline's")
    return out if BASELINE in out else {BASELINE: Vanilla(), **out}


def check_methods(params: Params, config: EvalConfig) -> None:
    """Raises a ValueError of one line for the first invalid method or setting."""
    for name, method in with_baseline(config.methods).items():
        for temperature in config.temperatures:
            try:
                SamplingParams(temperature=temperature, top_p=config.top_p)
                check_whole("max_new_tokens", config.new_tokens)
                check_method(params, method, config.batch_size, temperature, config.exact)
            except ValueError as error:
                raise ValueError(f"methods, {name!r}: {error}") from error
