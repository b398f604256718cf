"""An independent small draft model (speculative sampling, arXiv 2211.17192, 2302.01318).

It has the same architecture, module and file format as targets.
"""

from eagle_jax.drafters.spec import DrafterSpec

SPEC = DrafterSpec(
    kind="model",
    config="eagle_jax.config:TransformerConfig",
    module="eagle_jax.models.transformer:Transformer",
    files=f"{__name__}.checkpoint:ModelFiles",
    objectives=(f"{__name__}.config:Distillation",),
    build=f"{__name__}.objective:build",
    methods={"speculative": f"{__name__}.method:Speculative"},
    tuning=f"{__name__}.tuning:ModelTuning",
)
