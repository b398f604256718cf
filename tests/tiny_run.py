"""A training run that takes seconds: byte-level tokenizer, conversations, configurations."""

import json
import os
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eagle_jax.config import DataConfig, FeatureRegression, NextToken, OptimConfig, TrainConfig
from eagle_jax.testing import tiny_draft, tiny_target

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
LENGTH = 48


def write_tokenizer(folder: Path) -> int:
    """Bytes and a few special tokens; returns the number of ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tokenizer.json", tokenizer.to_str())
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    write(folder / "tokenizer_config.json", json.dumps(settings))
    return tokenizer.get_vocab_size()


def write(path: Path, text: str) -> None:
    """At once: processes that start together write the same files and read them."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def write_conversations(path: Path, count: int, first: int = 0) -> str:
    """Sums to learn, of different lengths."""
    lines = []
    for n in range(first, first + count):
        question = f"{n % 7}+{n % 5}" + "?" * (n % 11)
        turns = [("user", question), ("assistant", f"is {n % 7 + n % 5}" + "." * (n % 4))]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}) + "\n")
    write(path, "".join(lines))
    return str(path)


def target_run(folder: Path, *, steps: int = 12, **changes) -> TrainConfig:
    """Next-token training in `folder`, which receives text and tokenizer as well."""
    vocab = write_tokenizer(folder / "tokenizer")
    settings = {
        "output_dir": str(folder / "target"),
        "objective": NextToken(tiny_target(vocab)),
        "data": DataConfig(
            train=(write_conversations(folder / "train.jsonl", 200),),
            validation=(write_conversations(folder / "validation.jsonl", 20, 1000),),
            tokenizer=str(folder / "tokenizer"),
            sequence_length=LENGTH,
            batch_size=8,
            cache_dir=str(folder / "cache"),
        ),
        "optim": OptimConfig(learning_rate=1e-2, steps=steps, warmup_steps=2),
        "compute_dtype": "float32",
        "eval_every": 5,
        "eval_batches": 2,
        "checkpoint_every": 4,
    }
    return TrainConfig(**settings | changes)


def draft_run(folder: Path, target: str, *, steps: int = 12, **changes) -> TrainConfig:
    """Feature regression against `target`, on the text of `target_run`."""
    base = target_run(folder, steps=steps)
    assert isinstance(base.objective, NextToken)
    draft = tiny_draft(base.objective.model)
    settings = {field: getattr(base, field) for field in base.__dataclass_fields__}
    settings["output_dir"] = str(folder / "draft")
    settings["objective"] = FeatureRegression(draft=draft, target=target)
    return TrainConfig(**settings | changes)
