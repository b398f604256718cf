"""How EAGLE-3 is tuned: as EAGLE heads are, with deeper trees."""

from __future__ import annotations

from eagle_jax.drafters.eagle.tuning import EagleTuning


class Eagle3Tuning(EagleTuning):
    """Tuning of EAGLE-3 heads, whose drafts stay good for longer."""

    deepest = 8
