"""Where a promise stands that rests on audits: what is known, estimated and bound, each by its name."""

from __future__ import annotations

from dataclasses import dataclass

from messcli.metrics import keeps
from messcli.routing.audit import Audits
from messcli.routing.bound import ServedMean


@dataclass(frozen=True, slots=True)
class Standing:
    """One plan in one period. Accuracies are means over all that was served."""

    alpha: float | None  # None: nobody said
    estimate: float  # unbiased, whatever the predictor says
    standard_error: float  # of it, over the coins
    bound: float  # what the mean is at least, at every moment of the period
    confidence: float  # that it is
    sure: bool  # the promise is judged by the bound, not by the estimate
    known: int  # requests whose accuracy was found out, or is 1 by definition
    audited: int  # those of them that a coin chose
    estimated: int  # requests whose accuracy nobody knows

    @classmethod
    def of(cls, mean: ServedMean, audits: Audits, alpha: float | None) -> Standing:
        """What audits tell of a plan that something was served in."""
        return cls(
            alpha=alpha,
            estimate=mean.mean or 0.0,
            standard_error=mean.standard_error or 0.0,
            bound=mean.least(audits.error) or 0.0,
            confidence=1.0 - audits.error,
            sure=audits.sure,
            known=mean.observed,
            audited=mean.audited,
            estimated=mean.estimated,
        )

    @property
    def judged_by(self) -> float:
        """The mean that the promise is judged by."""
        return self.bound if self.sure else self.estimate

    @property
    def verdict(self) -> str:
        """kept | missed | unknown."""
        if self.alpha is None:
            return "unknown"
        return "kept" if keeps(self.judged_by, self.alpha) else "missed"

    def words(self) -> str:
        """For people."""
        by = "bound" if self.sure else "estimate"
        said = {"kept": f"SLA kept by the {by}", "missed": f"SLA MISSED by the {by}", "unknown": "no verdict"}
        promised = "alpha unknown" if self.alpha is None else f"alpha {self.alpha:g}"
        return (
            f"{self.estimate:.4f} ± {self.standard_error:.4f} estimated, at least {self.bound:.4f} at every moment "
            f"({self.confidence:.0%} sure), {promised}: {said[self.verdict]}; accuracy known of {self.known} requests "
            f"({self.audited} chosen by a coin), estimated of {self.estimated}"
        )
