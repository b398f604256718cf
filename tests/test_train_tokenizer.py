import gzip
import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_jax.text import Tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train" / "tokenizer.py"
SPECIALS = ["<|bos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 345?\n"},
    {"role": "assistant", "content": "It's 357, naïve 日本 user.\n\n    return x\n"},
    {"role": "user", "content": " Thanks"},
    {"role": "assistant", "content": "def f(x):\n\tif x:\n        return 10\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 8))) for _ in range(500)]
    code = "def f(x):\n    if x:\n        return 10\n    return x\n"
    lines = []
    for _ in range(200):
        answer = " ".join(rng.choices(words, k=30)) + "\n" + code + " 2026 2026"
        messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (path / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def train(folder: Path, name: str) -> Path:
    command = [SCRIPT, folder / "c.jsonl.gz", "--output", folder / name, "--vocab-size", "600"]
    subprocess.run(
        [sys.executable, *map(str, command)], check=True, cwd=ROOT, env={"PYTHONPATH": "."}
    )
    return folder / name


@pytest.fixture(scope="module")
def trained(folder):
    return train(folder, "one")


def test_training_is_deterministic(folder, trained):
    again = train(folder, "two")
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in again.iterdir()) == names
    assert all((again / n).read_bytes() == (trained / n).read_bytes() for n in names)


def test_format_of_turns(trained):
    t = Tokenizer.load(trained)
    assert t.vocab_size == 600
    assert t.encode(SPECIALS[0]) != [0] and t.bos_id == 0 and t.eos_ids == (5,)
    ids = t.chat(MESSAGES[:2])
    text = "<|bos|><|system|>Be brief.<|end|><|user|>What is 12 + 345?\n<|end|><|assistant|>"
    assert t.decode(ids, skip_special=False) == text
    ids, mask = t.conversation(MESSAGES)
    learned = t.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special=False)
    assert learned == MESSAGES[2]["content"] + "<|end|>" + MESSAGES[4]["content"] + "<|end|>"


def test_every_text_survives(trained):
    t = Tokenizer.load(trained)
    for text in [m["content"] for m in MESSAGES] + ["", " \r\n\t \n", "\x00é👩‍👧 ½ ²"]:
        assert t.decode(t.encode(text)) == text


def test_digits_stand_alone_and_indentation_does_not(trained):
    t = Tokenizer.load(trained)
    pieces = [t.decode([i]) for i in t.encode("x 2026:\n        return 10")]
    assert [p for p in pieces if p.strip().isdigit()] == [" 2", "0", "2", "6", " 1", "0"]
    assert pieces[-3] == " return" and len(pieces) <= 11  # 8 blanks of indentation: not 8 tokens


def test_auto_tokenizer_gives_the_same_ids(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    ours = Tokenizer.load(trained)
    for count, prompt in [(2, True), (4, True), (5, False)]:
        ids = theirs.apply_chat_template(
            MESSAGES[:count], add_generation_prompt=prompt, return_dict=False
        )
        assert ids == ours.chat(MESSAGES[:count], prompt)
    assert theirs.eos_token_id in ours.eos_ids and theirs.bos_token_id == ours.bos_id
    assert theirs.pad_token_id == 1 and theirs.model_max_length == 2048
    text = MESSAGES[2]["content"]
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


def test_help_and_missing_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    help_text = capsys.readouterr().out
    assert "--vocab-size" in help_text and "python train/tokenizer.py" in help_text
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "missing.jsonl", "--output", "unused"])
    with pytest.raises(ValueError, match="missing.jsonl.*no such file"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
