"""Prompts for the benchmarks: a question file in MT-bench's format, or a few of our own."""

import json
from pathlib import Path

OWN = [
    "Write a Python function that returns the second largest number of a list.",
    "A baker sells 14 rolls in the morning and twice as many after noon. How many in all?",
    "I'd like to book a table for four people on Friday evening.",
    "Explain in two sentences why the sky looks red at sunset.",
    "Give me three ideas for a rainy afternoon with two small children.",
    "What is the difference between a list and a tuple in Python?",
    "Solve 3x + 5 = 26 for x and show the steps.",
    "Write a short thank-you note to a neighbour who watered my plants.",
]


def read_questions(path: str | None) -> list[str]:
    """First turns of a JSONL question file (`{"turns": [...]}` a line), or `OWN` without one.

    Raises:
        ValueError: missing file, or a line without turns; names the line.
    """
    if path is None:
        return OWN
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"questions={path!r}: no such file; give a JSONL file with `turns`")
    prompts = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            prompts.append(str(json.loads(line)["turns"][0]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a question ({error!r}); see README") from error
    return prompts
