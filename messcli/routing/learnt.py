"""What was learnt: of prompts, of models, of what answers tell, and of the loads that joules were read at.

Knows predictors and the prompts that they look at; knows nothing of promises, prices or choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from messcli.errors import StateError
from messcli.predict.answer import AnswerPredictor, Look
from messcli.predict.base import Begins, Fades, InSpace, Predictor
from messcli.predict.joules import JoulesPredictor
from messcli.predict.latent import LatentSpace
from messcli.predict.levels import levels
from messcli.predict.text import TOGETHER
from messcli.routing.event import Event
from messcli.routing.knowledge import Knowledge
from messcli.routing.load import Loads
from messcli.routing.policy import Policy, Recent
from messcli.routing.prompts import Ahead, Latest
from messcli.routing.tuning import Tuning
from messcli.snapshots import Part

Row = tuple[float, ...] | None  # a number for every model


class Learnt:
    """What a job has learnt of prompts, models and answers.

    Prompts lie in one space that all predictors share. The latest prompts, and those that were read ahead, stand for
    the ones to come.

    Args:
        models: the size of the zoo.
        policy: says whether something is expected before anything was learnt, and how many prompts are remembered.
        predictor: Â of every model.
        joules: E_m(t) of every model.
        answers: Â given an answer; None: no answer is looked at.
        explored_only: whether Â is learnt from explorations alone, as the paper does.
        audited: whether audits tell what answers are worth.
    """

    def __init__(
        self,
        models: int,
        policy: Policy,
        predictor: Predictor,
        joules: JoulesPredictor,
        answers: AnswerPredictor | None,
        tuning: Tuning,
        *,
        explored_only: bool,
        audited: bool,
    ) -> None:
        self.predictor = predictor
        self.joules = joules
        self.answers = answers
        self.space = LatentSpace()
        self.loads = Loads(models, tuning.loads)
        self._models = models
        self._tuning = tuning
        self._begins = policy.begins
        self._remembers = policy.remembers
        self._explored_only = explored_only
        self._audited = audited
        self._in_space = [one for one in (predictor, joules) if isinstance(one, InSpace)]
        for one in self._in_space:
            one.join(self.space)
        self._latest = Latest(models, policy.remembers, begun=policy.begins)
        self._ahead: Ahead | None = None
        # t at which it is looked whether prompts still differ along the directions; 0: not yet known
        self._look_at = 0
        self._usual_share = 0.0  # of their variance that lay along these at the first look; 0: there was none

    def begin(self) -> None:
        """Expect of models that aren't known what the zoo's order and its calibration make likely."""
        if isinstance(self.predictor, Begins) and not self.predictor.samples.any():
            self.predictor.begin(self._tuning.levels)
        self.joules.begin(self._tuning.levels)

    def take_over(self, earlier: Knowledge) -> None:
        """Begin with what an earlier job taught. Before `begin`.

        Raises:
            StateError: what was learnt isn't known to this messcli.
        """
        most = self._tuning.knowledge.answers
        space = earlier.part.find("space", like=self.space.state())
        owners: Mapping[str, Predictor | JoulesPredictor | AnswerPredictor | None] = {
            "predictor": self.predictor,
            "joules": self.joules,
            "answers": self.answers,
        }
        if space is not None:
            self.space.load(space)
        for name, owner in owners.items():
            if owner is None or name not in earlier.part.parts:
                continue
            if owner is self.joules and not self._knows_loads_of(earlier.part):
                continue
            kept = earlier.part.find(name, like=owner.state())
            if kept is None or space is None:
                raise StateError(
                    f"{earlier.name}: was learnt under other tuned numbers of messcli. Learn from a table of "
                    "`messcli record`, or begin without it"
                )
            owner.load(kept)
            if isinstance(owner, Fades):
                owner.discount(most)
        self._take_up_loads(earlier.part)
        if earlier.part.parts["recent"].tuning == self._latest.state().tuning:
            self._latest.load(earlier.part.parts["recent"])

    def _knows_loads_of(self, part: Part) -> bool:
        """Whether its joules can be gone on with: an earlier version learnt them as they were read at its loads."""
        return "loads" not in part.parts or part.find("loads", like=self.loads.state()) is not None

    def _take_up_loads(self, part: Part | None) -> None:
        """Those that the joules of `part` were read at; None: these are learnt anew."""
        self.loads = Loads(self._models, self._tuning.loads)
        if part is not None and "loads" in part.parts:
            kept = part.find("loads", like=self.loads.state())
            if kept is not None:
                self.loads.load(kept)
        self.joules.scale = self.loads.scale

    def read_ahead(self, t: int, sample: Sequence[tuple[int, str]]) -> None:
        """Fit the directions on prompts that are to come after t, if they aren't settled yet, and remember them.

        Args:
            sample: prompts with their places among the requests after t, ascending. None: nothing is known of them.
        """
        self._ahead = None
        if not self._begins or not sample:
            return
        seen = self.space.settle([text for _, text in sample])
        if seen is not None:
            for one in self._in_space:
                one.learn_again(seen)
        self._ahead = Ahead(self._models, t, sample)

    # ---- saying --------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> None:
        """Have the features of `texts` at hand when they are asked for: together faster than one by one."""
        for first in range(0, len(texts), TOGETHER):  # both look at the same texts, which are hashed once
            batch = texts[first : first + TOGETHER]
            self.predictor.encode_many(batch)
            self.joules.encode_many(batch)

    def predict(self, texts: Sequence[str]) -> Iterator[tuple[Row, Row]]:
        """Â and E_m(t) of every model, for each text; None while nothing is learnt."""

        def rows(predictor: Predictor | JoulesPredictor) -> Iterable[Row]:
            predicted = predictor.predict_many(predictor.encode_many(texts))
            if predictor is self.predictor and self._begins:
                predicted = self._of_all(
                    np.zeros((len(texts), self._models)) if predicted is None else predicted
                )
            return repeat(None, len(texts)) if predicted is None else map(tuple, predicted.tolist())

        return zip(rows(self.predictor), rows(self.joules), strict=True)

    def _of_all(self, estimates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where a policy begins: of models that aren't seen yet, what the others make likely; (..., models)"""
        samples = self.predictor.samples
        if not self._begins or isinstance(self.predictor, Begins) or samples.all():
            return estimates
        prior = self._tuning.levels
        expected = np.clip(levels(prior, samples, estimates, prior.variance), 0.0, 1.0)
        return np.where(samples > 0, estimates, expected)

    def of_order(self) -> Recent:
        """A request of which nothing is known."""
        nothing = np.zeros(self._models)
        expected = np.clip(levels(self._tuning.levels, nothing, nothing, 1.0), 0.0, 1.0)
        return Recent(expected[None, :], self.joules.typical[None, :], nothing)

    def of_recent(self, t: int) -> Recent | None:
        """What requests after t are like now: those that were read ahead, and the latest ones where these are few; None
        while one of them isn't known."""
        recent = self._latest.seen_by(self.predictor, self.joules)
        if self._ahead is not None and (recent is None or t >= self._tuning.ahead.after):
            recent = self._ahead.before(recent, t, self.predictor, self.joules, self._tuning.ahead.least)
        return None if recent is None else replace(recent, estimates=self._of_all(recent.estimates))

    def joules_of_many(self, m: int, requests: int) -> tuple[float, float] | None:
        """Joules of a request that model m is given with so many others at once, and their relative error: by a line
        through what was read of it at three loads or more."""
        shares = self.loads.shares
        if shares is None or math.isnan(shares[m].error) or not requests:
            return None
        return shares[m].of(requests), shares[m].error

    def looks(self) -> Sequence[Look]:
        """At answers, as far as they are known to tell something."""
        return () if self.answers is None else self.answers.looks()

    # ---- learning ------------------------------------------------------------------------------

    def settle(self, event: Event) -> None:
        """Learn from what came of a request."""
        texts = self.space.see(event.text)
        if texts is not None:
            for one in self._in_space:
                one.learn_again(texts)
        read = _of_asking(event)
        if event.running:
            running, tokens = (
                [(of or {}).get(str(m), math.nan) for m in range(self._models)]
                for of in (event.running, event.tokens)
            )
            read = read * self.loads.settle(event.joules, running, tokens)
        if not np.isnan(read).all():
            self.joules.learn_one(self.joules.encode(event.text), read)
        self._learn_accuracies(event)
        if self._remembers:
            self._latest.add(event.text, event.decision)

    def _learn_accuracies(self, event: Event) -> None:
        accuracies = _of_prompt(event, audited=self._audited)
        if np.isnan(accuracies).all():
            return
        if event.decision.explored or not self._explored_only:
            self.predictor.learn_one(self.predictor.encode(event.text), accuracies)
        if all(map(math.isnan, event.accuracies)):
            return
        if self.answers is not None and event.decision.estimates is not None:
            signals, joules = event.signals or {}, event.check_joules or {}
            for name in dict.fromkeys([*signals, *joules]):
                self.answers.learn_one(
                    int(name),
                    signals.get(name, {}),
                    event.decision.estimates,
                    event.accuracies,
                    joules.get(name, math.nan),
                )

    def _follow(self, t: int) -> None:
        """Fit the directions anew where the latest prompts differ along others, and carry over what was learnt."""
        drift = self._tuning.drift
        if not self._remembers or not self.space.settled or t < self._look_at:
            return
        first = not self._look_at
        self._look_at = t + max(drift.every, int(drift.part * t))
        if first:
            return
        share = self.space.share(self._latest.texts(drift.looked))
        if not self._usual_share:
            self._usual_share = share
        elif share < drift.share * self._usual_share:
            move = self.space.fit_anew(self._latest.texts(drift.fitted))
            for one in self._in_space:
                one.move(move)
            self._usual_share = 0.0

    def close_window(self, t: int) -> None:
        """All requests of a window are folded in, up to t."""
        self._follow(t)
        if not self.loads.is_empty:
            self.loads.close_window()
            self.joules.expect(self.loads.scale)
        if self.answers is not None:
            self.answers.take_in()

    # ---- remembering -----------------------------------------------------------------------------

    def parts(self) -> dict[str, Part]:
        """Everything, as named fields, for a snapshot; `load` of it continues exactly."""
        looked = self.answers is not None and self.answers.knows_something
        return {
            "space": self.space.state(),
            "predictor": self.predictor.state(),
            "joules": self.joules.state(),
            "recent": self._latest.state(),
            **({"answers": self.answers.state()} if self.answers is not None and looked else {}),
            **({} if self.loads.is_empty else {"loads": self.loads.state()}),
            **({} if self._ahead is None else {"ahead": self._ahead.state()}),
            **({} if not self._look_at else {"drift": self._drift()}),
        }

    def _drift(self) -> Part:
        return Part("drift", values={"look_at": self._look_at, "usual_share": self._usual_share})

    def load(self, part: Part) -> list[str]:
        """Go on from the parts of a controller.

        Returns:
            What begins anew: it was learnt under other tuned numbers.
        """
        own = self.parts()
        anew = []
        if self.answers is not None and "answers" in part.parts:
            if (kept := part.find("answers", like=self.answers.state())) is None:
                anew.append("answers")
            else:
                self.answers.load(kept)
        space = part.find("space", like=own["space"])
        if space is not None:
            self.space.load(space)
        for name, owner in (("predictor", self.predictor), ("joules", self.joules)):
            kept = part.find(name, like=own[name])
            if owner is self.joules and not self._knows_loads_of(part):
                kept = None
            if kept is None or (space is None and owner in self._in_space):
                anew.append(name)
            else:
                owner.load(kept)
        self._take_up_loads(part if "joules" not in anew else None)
        recent = part.find("recent", like=own["recent"])
        if recent is None or {"predictor", "joules"} & {*anew}:
            anew.append("recent")
        else:
            self._latest.load(recent)
        if "drift" in part.parts:
            part.parts["drift"].check(self._drift())
            drift = part.parts["drift"].values
            self._look_at, self._usual_share = drift["look_at"], drift["usual_share"]
        if "ahead" in part.parts:
            self._ahead = Ahead.of(self._models, part.parts["ahead"])
        return anew


def _of_asking(event: Event) -> NDArray[np.float64]:
    """Joules that tell what it takes to ask each model. What a model failed to answer took the answer of the larger
    one that it went on to, too; where it went to a smaller one, it tells nothing of an answer's joules."""
    read = np.array(event.joules)
    failed = {int(m): fault for m, fault in (event.faults or {}).items()}
    for m, fault in failed.items():
        larger = [n for n in event.decision.asked if n > m and n not in failed]
        read[m] = read[m] + event.joules[min(larger)] if larger and fault != "away" else math.nan
    return read


def _of_prompt(event: Event, *, audited: bool) -> NDArray[np.float64]:
    """Accuracies that tell what prompts tell. Where a larger model was asked because of an answer, what that
    answer told is taken off: else it would be known from what smaller ones can't do alone.

    What a model fails to answer has accuracy 0: that is what it would have delivered alone. So a model that fails
    on some prompts is expected to be worth less on such prompts, in the unit that decisions are made in, without a
    reference being needed. A model that isn't there at all tells nothing of prompts: it is left out instead.
    """
    accuracies = np.array(event.accuracies)
    for m, fault in (event.faults or {}).items():
        if fault in ("request", "model"):
            accuracies[int(m)] = 0.0
    decision = event.decision
    if decision.given is not None and decision.estimates is not None:
        told = np.array(decision.given) - np.array(decision.estimates)
        because = [] if decision.added is None else [decision.added]
        if audited and not decision.audited:  # the first one's is known as the largest agrees
            because.append(decision.looks_at)
        accuracies[because] -= told[because]
    return accuracies
