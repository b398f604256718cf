"""`DraftTuning`: how the methods of one drafter are calibrated and predicted.

A run with one wide tree (the probe) is recorded; from it follows what other trees would get
accepted. What the draft costs is the time of a round less that of the target's pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from eagle_jax.decode.method import Method
from eagle_jax.decode.tree import StaticTree, best_tree
from eagle_jax.drafters.spec import DrafterSpec, resolve
from eagle_jax.tune.acceptance import Ranks, Record, Recorder, static
from eagle_jax.tune.predict import Evidence, Prediction, Steps


class DraftTuning:
    """Tuning of one kind of draft.

    The methods here serve any drafter with static trees or chains: they consider its default
    methods, as they are. A drafter that can say more overrides them.

    Attributes:
        spec: of the drafter.
        family: what the predictions are called; of each family one is measured at least.
    """

    family: ClassVar[str | None] = None

    def __init__(self, spec: DrafterSpec) -> None:
        self.spec = spec

    def probe(self, config: Any, most: int, rounds: int) -> Method:
        """The method whose rounds are recorded.

        Args:
            config: of the draft.
            most: nodes of the largest tree that can be worth its pass on this device.
            rounds: that are recorded of each row.
        """
        del config, most
        return Recorder(max(self._defaults(), key=lambda method: method.nodes), rounds)

    def beside(self) -> Method | None:
        """A second method that is run for its time only, if `steps` needs it."""
        return None

    def learn(self, records: Sequence[Record], probe: Any) -> Any:
        """What the records of the probe tell about acceptance; `Evidence.learned` keeps it."""
        return Ranks.of(records, static(probe.inner))

    def steps(self, probe: Any, whole: float, beside: float | None) -> Steps:
        """What the draft's steps cost.

        Args:
            probe: the recorded method.
            whole: seconds of its round, less the target's pass.
            beside: the same of the method of `beside`, if there is one.
        """
        del probe, beside
        return Steps({1: whole})

    def passes(self, method: Any) -> list[int]:
        """Nodes that each step of the draft reads in a round."""
        del method
        return [1]

    def candidates(self, evidence: Evidence) -> list[Method]:
        """Methods to choose from: what the evidence allows and this device can use."""
        depth = evidence.learned[self.spec.kind].ranks.shape[1]
        return [m for m in self._defaults() if m.depth <= depth]

    def predict(self, method: Any, evidence: Evidence) -> Prediction:
        """What a method with this draft should do."""
        kind = self.spec.kind
        seconds = evidence.verifying(method) + evidence.steps[kind].of(self.passes(method))
        tau = evidence.learned[kind].tau(static(method))
        return Prediction(self.family or kind, method, tau, seconds)

    def _defaults(self) -> list[Any]:
        return [resolve(method)() for method in self.spec.methods.values()]


def fitted(ranks: Ranks, widest: int, most: int) -> list[StaticTree]:
    """The best static trees of a few sizes for what was seen.

    Args:
        ranks: of accepted candidates.
        widest: children of a node.
        most: nodes of the largest tree.
    """
    accuracy = ranks.accuracy(widest)
    sizes = [n for n in (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63) if n < most]
    return [best_tree(accuracy, n) for n in sizes if n <= widest or len(accuracy) > 1]
