"""Trains a byte-level BPE on conversations; `transformers.AutoTokenizer` opens the result too.

Usage: python train/tokenizer.py conversations.jsonl.gz --output my_tokenizer
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from eagle_jax.text import read_conversations

BOS, PAD, SYSTEM, USER, ASSISTANT, END = SPECIALS = [
    f"<|{name}|>" for name in ("bos", "pad", "system", "user", "assistant", "end")
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# One alternative per line: a contraction; a word with the blank or sign before it; a single digit
# with the blank before it; signs with the line break and indentation after them; line breaks with
# the next line's indentation except its last blank, which belongs to the word; other blanks.
WORDS = "|".join(
    [
        r"'(?:s|t|d|m|ll|re|ve)\b",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{N}]+(?:\n+[ \t]*(?=[ \t])|\n+)?",
        r"\n+[ \t]*(?=[ \t])|\n+",
        r"\s+(?!\S)|\s+",
    ]
)


def train(files: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on the messages of conversation files, deterministically."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    conversations = (messages for file in files for messages in read_conversations(file))
    texts = (message["content"] for messages in conversations for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(tokenizer: Tokenizer, output: Path) -> None:
    """Writes a tokenizer directory in Hugging Face's layout."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(config[f"{name}_token"])
        for name in ("bos", "pad")
    }
    generation = {**ids, "eos_token_id": [tokenizer.token_to_id(END)]}
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="conversations, JSONL or JSONL.gz")
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="special tokens included")
    args = parser.parse_args()
    write(train(args.files, args.vocab_size), args.output)
    print(f"{args.output}: {args.vocab_size} tokens")


if __name__ == "__main__":
    main()
