"""Evaluates SmolLM2-135M-Instruct with the drafts of `configs/smollm2` against vanilla decoding.

eagle-jax evaluate --config configs/eval/smollm2.py --data data
"""

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Lookahead,
    Medusa,
    PromptLookup,
    Vanilla,
)
from eagle_jax.decode.tree import MC_SIM_7B_63
from eagle_jax.evaluate import EvalConfig

EAGLE3 = DynamicTree(depth=8, k=10, drafted=59)

config = EvalConfig(
    output_dir="runs/smollm2/evaluation",
    model="runs/smollm2/model",
    methods=(
        ("vanilla", Vanilla()),
        ("eagle3", Eagle(EAGLE3, head="eagle3")),
        ("eagle3 plain", Eagle(EAGLE3, head="eagle3", coupled=False)),
        ("eagle3 lookup", EagleLookup(Eagle(EAGLE3, head="eagle3"))),
        ("eagle2", Eagle(DynamicTree(depth=6, k=10, drafted=59))),
        ("eagle", Eagle(MC_SIM_7B_63)),
        ("medusa", Medusa()),
        ("lookahead", Lookahead(ngram=5, window=7, guesses=7)),
        ("prompt_lookup", PromptLookup()),
    ),
    temperatures=(0.0, 1.0),
    new_tokens=128,
    longest_prompt=512,
    limit=10,
    repeats=2,
    step_times=(),
)
