"""Measures tau at temperature 1 for several weights of the draft's logits against the noise.

eagle-jax evaluate --config configs/eval/confidence.py --data data
"""

from eagle_jax.decode import DynamicTree, Eagle, Vanilla
from eagle_jax.decode.tree import MC_SIM_7B_63
from eagle_jax.evaluate import EvalConfig

HEADS = {
    "eagle2": Eagle(DynamicTree(depth=6, k=10, drafted=59)),
    "eagle3": Eagle(DynamicTree(depth=8, k=10, drafted=59), head="eagle3"),
    "eagle": Eagle(MC_SIM_7B_63),
}

config = EvalConfig(
    output_dir="runs/eval/confidence",
    methods=(
        ("vanilla", Vanilla()),
        *(
            (f"{name} {confidence}", Eagle(head.tree, head.head, confidence=confidence))
            for confidence in (1.0, 1.1, 1.2)
            for name, head in HEADS.items()
        ),
        *((f"{name} plain", Eagle(h.tree, h.head, coupled=False)) for name, h in HEADS.items()),
    ),
    dtype="float32",
    temperatures=(1.0,),
    new_tokens=128,
    limit=10,
    longest_prompt=256,
    batch_size=10,
    repeats=1,
    warm_up=False,
    step_times=(),
)
