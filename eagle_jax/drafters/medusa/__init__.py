"""Medusa (arXiv 2401.10774): several heads on one feature, each of which predicts a later token."""

from eagle_jax.drafters.spec import DrafterSpec

SPEC = DrafterSpec(
    kind="medusa",
    config=f"{__name__}.config:MedusaConfig",
    module=f"{__name__}.module:MedusaHeads",
    files=f"{__name__}.checkpoint:MedusaFiles",
    objectives=(f"{__name__}.config:MedusaTraining",),
    build=f"{__name__}.objective:build",
    methods={"medusa": f"{__name__}.method:Medusa"},
    tuning=f"{__name__}.tuning:MedusaTuning",
)
