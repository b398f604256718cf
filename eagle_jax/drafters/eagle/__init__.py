"""EAGLE-1 and EAGLE-2 (arXiv 2401.15077, 2406.16858): one head with static or dynamic trees."""

from eagle_jax.drafters.spec import DrafterSpec

SPEC = DrafterSpec(
    kind="eagle",
    config=f"{__name__}.config:EagleConfig",
    module=f"{__name__}.module:EagleDraft",
    files=f"{__name__}.checkpoint:EagleFiles",
    objectives=(f"{__name__}.config:FeatureRegression",),
    build=f"{__name__}.objective:build",
    methods={"eagle": f"{__name__}.method:eagle", "eagle2": f"{__name__}.method:eagle2"},
    tuning=f"{__name__}.tuning:EagleTuning",
)
