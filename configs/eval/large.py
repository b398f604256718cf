"""Evaluates the pair of benchmarks/large_pair.py: EAGLE with several trees, and its competitors.

python benchmarks/pair.py --config configs/eval/large.py --model runs/large/model --data DIR
"""

import dataclasses

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Vanilla,
    chain,
)
from eagle_jax.decode.tree import MC_SIM_7B_63
from eagle_jax.evaluate import EvalConfig

# A pass of up to 16 nodes costs less than one of 17, since tensor cores multiply 16 rows at a time.
SHORT = dataclasses.replace(EagleLookup().lookup, length=15)

config = EvalConfig(
    output_dir="runs/large/evaluation",
    model="runs/large/model",
    quantize_drafts="int8",  # faster; does not change the text
    methods=(
        ("vanilla", Vanilla()),
        ("eagle3", Eagle(DynamicTree(depth=6, k=10, drafted=59), head="eagle3")),
        ("eagle3 31 deep", Eagle(DynamicTree(depth=7, k=8, drafted=31), head="eagle3")),
        ("eagle3 31", Eagle(DynamicTree(depth=5, k=8, drafted=31), head="eagle3")),
        ("eagle3 15", Eagle(DynamicTree(depth=5, k=6, drafted=15), head="eagle3")),
        ("eagle3 lookup", EagleLookup(Eagle(DynamicTree(5, 8, 31), head="eagle3"))),
        ("eagle3 15 lookup", EagleLookup(Eagle(DynamicTree(5, 6, 15), head="eagle3"), SHORT)),
        ("eagle2", Eagle(DynamicTree(depth=6, k=10, drafted=59))),
        ("eagle2 31", Eagle(DynamicTree(depth=5, k=8, drafted=31))),
        ("eagle", Eagle(MC_SIM_7B_63)),
        ("eagle chain-5", Eagle(chain(5))),
        ("eagle lookup", EagleLookup(Eagle(DynamicTree(depth=5, k=8, drafted=31)))),
        ("medusa", Medusa()),
        ("lookahead", Lookahead(ngram=5, window=7, guesses=7)),
        ("lookahead paper", Lookahead(5, 7, 7, prompt_pool=False, coupled=False)),
        ("prompt_lookup", PromptLookup()),
        ("recycling", Recycling()),
    ),
    temperatures=(0.0, 1.0),
    new_tokens=128,
    repeats=2,
    step_times=(1, 16, 32, 64),
)
