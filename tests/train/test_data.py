import collections
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from eagle_jax.config import DataConfig
from eagle_jax.text import Tokenizer
from eagle_jax.train import data
from eagle_jax.train.data import prepared

LENGTH = 32
SPECIALS = ["<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_conversations(path: Path, count: int, seed: int) -> list[list[dict[str, str]]]:
    """Conversations of 6 to about 90 bytes, each with its own number in it."""
    rng = random.Random(seed)
    conversations = []
    for i in range(count):
        answer = "".join(rng.choices("abcdef", k=rng.choice([0, 1, 5, 12, 20, 80])))
        turn = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": answer}]
        conversations.append(turn * rng.choice([1, 1, 2]))
    lines = [json.dumps({"messages": messages}) for messages in conversations]
    path.write_text("\n".join(lines))
    return conversations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    (path / "tokenizer").mkdir()
    core.save(str(path / "tokenizer" / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    write_conversations(path / "a.jsonl", 60, 0)
    write_conversations(path / "b.jsonl", 43, 1)
    write_conversations(path / "v.jsonl", 25, 2)
    return path


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(
        train=(str(folder / "a.jsonl"), str(folder / "b.jsonl")),
        validation=(str(folder / "v.jsonl"),),
        tokenizer=str(folder / "tokenizer"),
        sequence_length=LENGTH,
        batch_size=4,
        cache_dir=str(folder / "cache"),
        seed=3,
    )


def conversations(*files: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for file in files for line in file.read_text().split("\n")]


def segments(batches) -> collections.Counter:
    """Every segment of the batches, as (tokens, loss mask)."""
    found = collections.Counter()
    for batch in batches:
        for tokens, ids, mask in zip(
            batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True
        ):
            for segment in range(1, ids.max() + 1):
                where = ids == segment
                found[tuple(tokens[where].tolist()), tuple(mask[where].astype(int).tolist())] += 1
    return found


def expected_segments(config, *files: Path) -> collections.Counter:
    """The same from the text itself, the mask found by the special tokens alone."""
    tokenizer = Tokenizer.load(config.tokenizer)
    user, assistant, end = range(256, 259)
    found = collections.Counter()
    for messages in conversations(*files):
        ids, mask = [], []
        for message in messages:
            body = [*tokenizer.encode(message["content"]), end]
            ids += [user if message["role"] == "user" else assistant, *body]
            mask += [0] + [int(message["role"] == "assistant")] * len(body)
        for i in range(0, len(ids), LENGTH):
            found[tuple(ids[i : i + LENGTH]), tuple(mask[i : i + LENGTH])] += 1
    return found


def rows_of(batches) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def equal(a: data.Batch, b: data.Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def row_count(config) -> int:
    return len(prepared.open_rows(data.prepare(config.train, config)))


def test_validation_holds_every_token_once(config, folder):
    batches = data.validation_batches(config, 1000)
    assert segments(batches) == expected_segments(config, folder / "v.jsonl")
    again = data.validation_batches(config, 1000)
    assert len(again) == len(batches) and all(map(equal, batches, again))
    assert all(map(equal, data.validation_batches(config, 2), batches[:2]))
    for batch in batches:
        assert {name: value.dtype.name for name, value in batch.items()} == {
            "tokens": "int32",
            "positions": "int32",
            "segment_ids": "int32",
            "loss_mask": "float32",
        }
        assert all(value.shape == (4, LENGTH) for value in batch.values())


def test_validation_is_shared_among_processes(config):
    whole = data.validation_batches(config, 1000)
    halves = [data.validation_batches(config, 1000, shard_index=i, shard_count=2) for i in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert equal(batch, {k: np.concatenate([part[k] for part in parts]) for k in batch})


def test_an_epoch_is_every_token_once_and_epochs_differ(config, folder):
    config = dataclasses.replace(config, batch_size=1)
    n = row_count(config)
    iterator = data.train_iterator(config)
    first, second = [[next(iterator) for _ in range(n)] for _ in range(2)]
    expected = expected_segments(config, folder / "a.jsonl", folder / "b.jsonl")
    assert segments(first) == segments(second) == expected
    assert rows_of(first) != rows_of(second)
    other = data.train_iterator(dataclasses.replace(config, seed=4))
    assert rows_of(first) != rows_of([next(other) for _ in range(n)])


def test_positions_and_padding(config):
    for batch in data.validation_batches(config, 1000):
        for row in range(4):
            counts = collections.Counter()
            for t in range(LENGTH):
                segment = batch["segment_ids"][row, t]
                if segment:
                    assert batch["positions"][row, t] == counts[segment]
                    counts[segment] += 1
                else:
                    names = ("tokens", "positions", "loss_mask")
                    assert [batch[name][row, t] for name in names] == [0, 0, 0]
            used = sum(counts.values())
            assert (batch["segment_ids"][row, :used] > 0).all()
            assert sorted(counts) == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(config, workers):
    config = dataclasses.replace(config, workers=workers)
    iterator = data.train_iterator(config)
    plain = data.train_iterator(dataclasses.replace(config, workers=0))
    epoch = row_count(config) // config.batch_size
    for _ in range(epoch - 2):  # rows do not fill whole batches: one spans two epochs
        assert equal(next(iterator), next(plain))  # workers do not change the order
    state = json.loads(json.dumps(iterator.get_state()))
    future = [next(iterator) for _ in range(5)]  # across the end of the epoch
    iterator.close()
    resumed = data.train_iterator(config)
    resumed.set_state(state)
    assert all(equal(next(resumed), batch) for batch in future)
    resumed.close()


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_together_are_the_batch(config, shards):
    """Catches rows that two processes read or none does, also where an epoch ends."""
    n = row_count(config)
    config = dataclasses.replace(config, batch_size=4)
    assert n % 4  # a batch has rows of two epochs
    alone = data.train_iterator(config)
    parts = [data.train_iterator(config, shard_index=i, shard_count=shards) for i in range(shards)]
    for _ in range(3 * n // 4):
        expected, found = next(alone), [next(part) for part in parts]
        for name in expected:
            joined = np.concatenate([part[name] for part in found])
            np.testing.assert_array_equal(joined, expected[name])
    # A run goes on with another number of processes.
    two = data.train_iterator(config, shard_index=1, shard_count=2)
    two.set_state(alone.get_state())
    np.testing.assert_array_equal(next(two)["tokens"], next(alone)["tokens"][2:])


def _epochs(config, rows: int, epochs: int) -> list[list[data.Batch]]:
    iterator = data.train_iterator(dataclasses.replace(config, batch_size=1))
    return [[next(iterator) for _ in range(rows)] for _ in range(epochs)]


def test_best_fit_against_a_search_through_all_bins():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 21, 300).tolist()
    bins = data.best_fit(lengths, 20)
    assert sorted(item for members in bins for item in members) == list(range(300))
    space: list[int] = []
    for length in lengths:
        left = [(free - length, i) for i, free in enumerate(space) if free >= length]
        if left:
            space[min(left)[1]] -= length
        else:
            space.append(20 - length)
    free = [20 - sum(lengths[i] for i in members) for members in bins]
    assert sorted(free) == sorted(space)
    assert sum(lengths) > 0.9 * 20 * len(bins)


def test_prepared_folder_is_found_by_content(config, folder, tmp_path):
    path = data.prepare(config.train, config)
    (copy := tmp_path / "elsewhere").mkdir()
    for file in (*config.train, *config.validation):
        shutil.copy(file, copy)
    shutil.copytree(folder / "tokenizer", copy / "t")
    shutil.copytree(path, tmp_path / "cache" / path.name)
    moved = dataclasses.replace(
        config,
        train=(str(copy / "a.jsonl"), str(copy / "b.jsonl")),
        tokenizer=str(copy / "t"),
        cache_dir=str(tmp_path / "cache"),
    )
    before = _modified(tmp_path / "cache")
    assert equal(next(data.train_iterator(moved)), next(data.train_iterator(config)))
    assert _modified(tmp_path / "cache") == before  # read, not prepared again

    keys = {path.name}
    (copy / "c.jsonl").write_text((copy / "a.jsonl").read_text().replace("ab", "ba"))
    keys.add(data.prepare((str(copy / "c.jsonl"), moved.train[1]), moved).name)
    longer = dataclasses.replace(moved, sequence_length=LENGTH + 1)
    keys.add(data.prepare(moved.train, longer).name)
    template = json.dumps({"eos_token": "<|end|>", "chat_template": " " + TEMPLATE})
    (copy / "t" / "tokenizer_config.json").write_text(template)
    keys.add(data.prepare(moved.train, moved).name)
    assert len(keys) == 4


def _modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_interrupted_preparation_is_not_taken_for_finished(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, cache_dir=str(tmp_path))
    write = prepared.write_rows

    def killed(rows, length, folder):
        write(rows, length, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(config.validation, config)
    assert list(tmp_path.iterdir()) == []
    # What a killed process leaves, since it cannot clean up.
    monkeypatch.setattr(prepared.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(config.validation, config)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    assert len(data.validation_batches(config, 1)) == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"train": ()}, r"train=\(\): name at least one"),
        ({"train": ("missing.jsonl",)}, "train='missing.jsonl': no such file"),
        ({"tokenizer": ""}, "tokenizer='': name a tokenizer"),
        ({"tokenizer": "missing"}, "tokenizer='missing': not found"),
        ({"sequence_length": 1}, "sequence_length=1: must be at least 2"),
        ({"workers": -1}, "workers=-1: must be 0 or more"),
        ({"seed": -1}, r"seed=-1: must lie in 0..2\*\*32-1"),
        ({"batch_size": 0}, "batch_size=0: must be a positive multiple of the 1 processes"),
    ],
)
def test_config_errors(config, change, error):
    with pytest.raises(ValueError, match=error) as caught:
        data.train_iterator(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


def test_other_errors(config, tmp_path):
    with pytest.raises(ValueError, match="batch_size=4: must be a positive multiple of the 3"):
        data.train_iterator(config, shard_count=3)
    with pytest.raises(ValueError, match=r"shard_index=2: must lie in 0..1"):
        data.train_iterator(config, shard_index=2, shard_count=2)
    with pytest.raises(ValueError, match=r"validation=\(\): name at least one"):
        data.validation_batches(dataclasses.replace(config, validation=()), 1)
    path = data.prepare(config.validation, dataclasses.replace(config, cache_dir=str(tmp_path)))
    shutil.rmtree(path / "conversations")
    with pytest.raises(ValueError, match="cache_dir: .* is damaged; delete it"):
        data.validation_batches(dataclasses.replace(config, cache_dir=str(tmp_path)), 1)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="train=.*empty.jsonl.*no conversations"):
        data.prepare((str(tmp_path / "empty.jsonl"),), config)


def test_prints_nothing_and_never_imports_tensorflow(config, tmp_path):
    code = f"""
import sys
from eagle_jax.config import DataConfig
from eagle_jax.train import data
assert not {{"grain", "tensorflow_datasets", "jax", "transformers"}} & set(sys.modules)
config = DataConfig(train={config.train!r}, validation={config.validation!r},
    tokenizer={config.tokenizer!r}, sequence_length=32, batch_size=4, cache_dir={str(tmp_path)!r})
next(data.train_iterator(config)), data.validation_batches(config, 1)
assert "tensorflow" not in sys.modules and "tensorflow_datasets" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
