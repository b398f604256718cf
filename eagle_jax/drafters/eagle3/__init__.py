"""EAGLE-3 (arXiv 2503.01840): a draft that fuses features of three layers and has its own head.

The head scores a draft vocabulary. Decoding uses the method of EAGLE-1 and EAGLE-2
(`eagle_jax.drafters.eagle.method`).
"""

from eagle_jax.drafters.spec import DrafterSpec

SPEC = DrafterSpec(
    kind="eagle3",
    config=f"{__name__}.config:Eagle3Config",
    module=f"{__name__}.module:Eagle3Draft",
    files=f"{__name__}.checkpoint:Eagle3Files",
    objectives=(f"{__name__}.config:TrainingTimeTest",),
    build=f"{__name__}.objective:build",
    methods={"eagle3": f"{__name__}.method:eagle3"},
    tuning=f"{__name__}.tuning:Eagle3Tuning",
)
