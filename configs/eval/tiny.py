"""Evaluates every method with the shipped pair against vanilla decoding, on our own prompts.

    eagle-jax evaluate --config configs/eval/tiny.py

For public questions, put mt_bench.jsonl, humaneval.jsonl, gsm8k.jsonl and alpaca.jsonl into a
directory (docs/evaluation.md names their sources) and add `--data DIR`.
"""

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
)
from eagle_jax.decode.acceptance import Rejection
from eagle_jax.decode.tree import MC_SIM_7B_63
from eagle_jax.evaluate import EvalConfig

EAGLE2 = DynamicTree(depth=6, k=10, drafted=59)  # the papers' settings for 7B targets
EAGLE3 = DynamicTree(depth=8, k=10, drafted=59)

config = EvalConfig(
    output_dir="runs/eval/tiny",
    model="tiny",
    methods=(
        ("vanilla", Vanilla()),
        ("eagle3", Eagle(EAGLE3, head="eagle3")),
        ("eagle3 plain", Eagle(EAGLE3, head="eagle3", coupled=False)),
        ("eagle3 chain-5", Eagle(chain(5), head="eagle3")),
        ("eagle2", Eagle(EAGLE2)),
        ("eagle2 plain", Eagle(EAGLE2, coupled=False)),
        ("eagle", Eagle(MC_SIM_7B_63)),
        ("eagle plain", Eagle(MC_SIM_7B_63, coupled=False)),
        ("eagle chain-5", Eagle(chain(5))),
        ("eagle lookup", EagleLookup(Eagle(EAGLE2))),
        ("medusa", Medusa()),
        ("medusa plain", Medusa(coupled=False)),
        ("speculative", Speculative(5)),
        ("speculative rejection", Speculative(5, rule=Rejection())),
        ("lookahead", Lookahead(ngram=5, window=7, guesses=7)),
        ("lookahead plain", Lookahead(ngram=5, window=7, guesses=7, coupled=False)),
        ("lookahead paper", Lookahead(5, 7, 7, prompt_pool=False, coupled=False)),
        ("prompt_lookup", PromptLookup()),
        ("recycling", Recycling()),
        ("auto", "auto"),  # what eagle-jax tune found on this machine
    ),
    temperatures=(0.0, 1.0),
    new_tokens=128,
)
