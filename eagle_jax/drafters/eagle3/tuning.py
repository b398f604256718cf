"""Tuning of EAGLE-3 heads: the same as for EAGLE-1, with deeper trees."""

from __future__ import annotations

from eagle_jax.drafters.eagle.tuning import EagleTuning


class Eagle3Tuning(EagleTuning):
    """Tuning of EAGLE-3 heads, whose drafts stay accurate at greater depths."""

    deepest = 8
