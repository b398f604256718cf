"""`DraftTuning`: calibrates one drafter and predicts the speed of its methods.

A run with one wide tree (the probe) is recorded; the record gives the acceptance of other trees.
The cost of the draft is the time of a round minus the time of the target's pass.
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

    This class serves any drafter with static trees or chains, and considers only its default
    methods. A drafter with more choices overrides these functions.

    Attributes:
        spec: the drafter's spec.
        family: name of the family of its predictions; at least one of each family is measured.
    """

    family: ClassVar[str | None] = None

    def __init__(self, spec: DrafterSpec) -> None:
        self.spec = spec

    def probe(self, config: Any, most: int, rounds: int) -> Method:
        """Returns the probe: the method whose rounds are recorded.

        Args:
            config: configuration of the draft.
            most: nodes of the largest tree that can pay off on this device.
            rounds: number of rounds recorded for each row.
        """
        del config, most
        return Recorder(max(self._defaults(), key=lambda method: method.nodes), rounds)

    def beside(self) -> Method | None:
        """Returns a second method that is only timed, if `steps` needs one."""
        return None

    def learn(self, records: Sequence[Record], probe: Any) -> Any:
        """Returns the acceptance statistics of the probe's records, for `Evidence.learned`."""
        return Ranks.of(records, static(probe.inner))

    def steps(self, probe: Any, whole: float, beside: float | None) -> Steps:
        """Returns the cost of the draft's steps.

        Args:
            probe: the recorded method.
            whole: seconds of the probe's round minus the target's pass.
            beside: the same seconds for the method that `beside` returns, if any.
        """
        del probe, beside
        return Steps({1: whole})

    def passes(self, method: Any) -> list[int]:
        """Returns the number of nodes that each draft step of a round processes."""
        del method
        return [1]

    def candidates(self, evidence: Evidence) -> list[Method]:
        """Returns the methods to choose from: those that the evidence and this device allow."""
        depth = evidence.learned[self.spec.kind].ranks.shape[1]
        return [m for m in self._defaults() if m.depth <= depth]

    def predict(self, method: Any, evidence: Evidence) -> Prediction:
        """Returns the predicted speed of a method with this draft."""
        kind = self.spec.kind
        seconds = evidence.verifying(method) + evidence.steps[kind].of(self.passes(method))
        tau = evidence.learned[kind].tau(static(method))
        return Prediction(self.family or kind, method, tau, seconds)

    def _defaults(self) -> list[Any]:
        return [resolve(method)() for method in self.spec.methods.values()]


def fitted(ranks: Ranks, widest: int, most: int) -> list[StaticTree]:
    """Returns the best static trees of a few sizes for the recorded acceptance.

    Args:
        ranks: ranks of the accepted candidates.
        widest: largest number of children of a node.
        most: upper bound of the tree's nodes.
    """
    accuracy = ranks.accuracy(widest)
    sizes = [n for n in (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63) if n < most]
    return [best_tree(accuracy, n) for n in sizes if n <= widest or len(accuracy) > 1]
