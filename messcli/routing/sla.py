"""What was promised and what was delivered: the queue and the account of each plan.

Knows numbers; knows nothing of models, prices or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from messcli.routing.bound import ServedMean
from messcli.snapshots import Part

DEFAULT_PLAN = ""  # of requests that name none


@dataclass(frozen=True, slots=True)
class VirtualQueue:
    """The SLA violations accumulated so far, Q(t) >= 0, in units of accuracy."""

    length: float = 0.0

    def after(self, alpha: float, accuracy: float) -> VirtualQueue:
        """Q(t+1) = max(0, Q(t) + alpha - A(t)): equation 2."""
        return VirtualQueue(max(0.0, self.length + alpha - accuracy))


@dataclass(slots=True)
class Account:
    """The SLA ledger of one plan in one contract period. Counts are requests, sums are of accuracies."""

    queue: VirtualQueue = field(default_factory=VirtualQueue)
    observed: int = 0  # served, and the accuracy was observed
    observed_sum: float = 0.0
    estimated: int = 0  # served, and only Â exists
    estimated_sum: float = 0.0
    unknown: int = 0  # served before anything was learnt, without a reference: neither A nor Â exists
    explored: int = 0
    failed: int = 0  # every model that was asked failed
    surplus: float = (
        0.0  # sum of A - alpha (Â - alpha where estimated), under the alpha in force at each request
    )

    mean: ServedMean | None = None  # what audits tell of the mean accuracy; None where there are none

    @property
    def settled(self) -> int:
        """Requests served."""
        return self.observed + self.estimated + self.unknown

    @property
    def observed_mean(self) -> float | None:
        return self.observed_sum / self.observed if self.observed else None

    def serve(self, alpha: float, accuracy: float | None, estimate: float | None) -> None:
        """Book one served request: Q moves by A where it was observed, else by Â, else not at all.

        Args:
            accuracy: observed; None without a reference.
            estimate: Â of the served model at the decision; None while nothing was learnt.
        """
        if accuracy is not None:
            self.observed += 1
            self.observed_sum += accuracy
        elif estimate is not None:
            accuracy = estimate
            self.estimated += 1
            self.estimated_sum += estimate
        else:
            self.unknown += 1
            return
        self.surplus += accuracy - alpha
        self.queue = self.queue.after(alpha, accuracy)

    def state(self) -> Part:
        """For a snapshot."""
        return Part(
            "account",
            values={
                "queue": float(self.queue.length),
                "observed": self.observed,
                "observed_sum": float(self.observed_sum),
                "estimated": self.estimated,
                "estimated_sum": float(self.estimated_sum),
                "unknown": self.unknown,
                "explored": self.explored,
                "failed": self.failed,
                "surplus": float(self.surplus),
            },
            parts={} if self.mean is None else {"mean": self.mean.state()},
        )

    @classmethod
    def of(cls, part: Part) -> Account:
        """The account that `state` gave `part` of. Raises StateError: there is none."""
        part.check(cls().state(), any_parts=True)
        values = part.values
        return cls(
            queue=VirtualQueue(values["queue"]),
            observed=values["observed"],
            observed_sum=values["observed_sum"],
            estimated=values["estimated"],
            estimated_sum=values["estimated_sum"],
            unknown=values["unknown"],
            explored=values["explored"],
            failed=values["failed"],
            surplus=values["surplus"],
            mean=ServedMean.of(part.parts["mean"]) if "mean" in part.parts else None,
        )
