"""What is asked of everything that is chosen by name: a suite per kind, which messcli's own tests and those of packages
run alike.

    @pytest.mark.parametrize("claim", conformance.METRIC)
    def test_my_metric(claim):
        claim(load_metric("length"))

A suite is a tuple of claims, functions that raise AssertionError and say what does not hold. `check` runs all of one.
Needs nothing but messcli; no test framework.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from messcli.energy import Counter
from messcli.errors import StateError
from messcli.files.dialects import Dialect
from messcli.metrics import Metric
from messcli.models.backend import Backend, SharesWeights, share_weights
from messcli.predict.base import Accuracies, Predictor, create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.records import Decision, Request
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings
from messcli.routing.event import Event
from messcli.routing.policy import Policy
from messcli.routing.setup import Setup
from messcli.routing.sla import DEFAULT_PLAN
from messcli.snapshots import Part

MODELS = 3
TEXTS = (
    "", " ", "\n", "one", "the cat sat on the mat", "B", "The answer is 42.", "ü" * 2000, "a\x00b", "日本語 テキスト",
    "x " * 5000, '{"json": [1, 2]}', "\u202eabc", "4,000.5",
)  # fmt: skip


def check(suite: Sequence[Callable[..., None]], *subject: Any) -> None:
    """Run every claim of a suite. Raises AssertionError, from the first that does not hold."""
    for claim in suite:
        claim(*subject)


def _hold(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)


# ---- metrics --------------------------------------------------------------------------------------


def _signed(metric: Metric) -> None:
    _hold(
        metric.name and metric.signature.split("|")[0] == metric.name,
        "a signature begins with the metric's name",
    )
    _hold("\n" not in metric.signature, "a signature is one line: states compare it")


def _scores_any_text_alike(metric: Metric) -> None:
    for output in TEXTS:
        for reference in TEXTS:
            score = metric(output, [reference])
            _hold(type(score) is float, f"a score is a float, not {type(score).__name__}")
            _hold(0.0 <= score <= 1.0, f"{score} for {output[:20]!r} isn't from 0 to 1")
            _hold(score == metric(output, [reference]), f"{output[:20]!r} scores differently the second time")


def _rewards_the_reference(metric: Metric) -> None:
    scores = [metric(text, [text]) for text in ("the cat sat on the mat", "B", "4")]
    _hold(max(scores) == 1.0, "no text scores 1 against itself")
    _hold(
        metric("zebra", ["the cat sat on the mat"]) < 1.0,
        "an answer that has nothing of the reference scores 1",
    )


def _takes_several_references(metric: Metric) -> None:
    one = metric("the cat sat on the mat", ["the cat sat on the mat"])
    two = metric("the cat sat on the mat", ["a dog", "the cat sat on the mat"])
    _hold(two == one, "the second reference isn't looked at")


METRIC: tuple[Callable[[Metric], None], ...] = (
    _signed,
    _scores_any_text_alike,
    _rewards_the_reference,
    _takes_several_references,
)


# ---- predictors -----------------------------------------------------------------------------------


def lessons(count: int, seed: int = 0) -> list[tuple[str, Accuracies]]:
    """Texts whose words tell how hard they are, and the accuracies of three models."""
    draw = random.Random(seed)  # noqa: S311  # samples, not secrets
    words = [f"word{n}" for n in range(40)]
    rows = []
    for _ in range(count):
        text = " ".join(draw.choices(words, k=draw.randint(3, 15)))
        hard = sum(int(word[4:]) for word in text.split()) / (40 * len(text.split()))
        levels = [0.9 - hard, 1.1 - hard, 1.2 - 0.5 * hard]
        rows.append((text, np.clip(np.array(levels) + draw.gauss(0, 0.05), 0.0, 1.0)))
    return rows


Make = Callable[[int], Predictor]


def _taught(make: Make, rows: Sequence[tuple[str, Accuracies]]) -> Predictor:
    predictor = make(MODELS)
    for text, accuracies in rows:
        predictor.learn_one(predictor.encode(text), accuracies)
    return predictor


def _estimates(predictor: Predictor, text: str) -> Accuracies:
    estimates = predictor.predict_one(predictor.encode(text))
    if estimates is None:
        raise AssertionError("no estimate comes, and something was learnt")
    return estimates


def _knows_nothing_at_first(make: Make) -> None:
    predictor = make(MODELS)
    _hold(
        predictor.predict_one(predictor.encode("a text")) is None,
        "an estimate comes before anything was learnt",
    )
    _hold(not predictor.samples.any(), "samples are counted before there are any")
    _hold(predictor.samples.shape == (MODELS,), "samples has one number per model")


def _predicts_purely_and_in_range(make: Make) -> None:
    predictor = _taught(make, lessons(150))
    before = predictor.state().dumps()
    for text in (*(text for text, _ in lessons(50, seed=1)), *TEXTS):
        estimates, again = _estimates(predictor, text), _estimates(predictor, text)
        _hold(estimates.shape == (MODELS,), "an estimate is one number per model")
        _hold(((estimates >= 0) & (estimates <= 1)).all(), f"estimates of {text[:20]!r} aren't from 0 to 1")
        _hold(np.array_equal(estimates, again), "the same text is estimated differently the second time")
    _hold(predictor.state().dumps() == before, "predicting changes what is learnt")


def _learns_levels(make: Make) -> None:
    rows = lessons(300)
    predictor = _taught(make, rows)
    estimates = np.array([_estimates(predictor, text) for text, _ in rows])
    truth = np.array([accuracies for _, accuracies in rows])
    off = float(np.abs(estimates.mean(axis=0) - truth.mean(axis=0)).max())
    _hold(off <= 0.06, f"mean estimates are off by {off:.3f} after 300 samples; at most 0.06")


def _learns_from_what_was_observed_only(make: Make) -> None:
    predictor = _taught(make, lessons(100))
    counts = predictor.samples.copy()
    predictor.learn_one(predictor.encode("some words"), np.array([0.5, math.nan, math.nan]))
    _hold((predictor.samples - counts).tolist() == [1, 0, 0], "NaN means: this model was not observed")
    _hold(not np.isnan(_estimates(predictor, "other words")).any(), "NaN is learnt from")


def _takes_any_text(make: Make) -> None:
    predictor = _taught(make, lessons(60))
    for text in TEXTS:
        predictor.learn_one(predictor.encode(text), np.array([0.1, 0.2, 0.3]))
    estimates = predictor.predict_one(predictor.encode("a text"))
    _hold(
        estimates is not None and np.isfinite(estimates).all(),
        "odd texts leave estimates that are no numbers",
    )


def _many_is_one_by_one(make: Make) -> None:
    predictor = _taught(make, lessons(120))
    texts = [text for text, _ in lessons(20, seed=2)]
    together = predictor.predict_many(predictor.encode_many(texts))
    alone = np.array([_estimates(predictor, text) for text in texts])
    _hold(
        together is not None and np.allclose(together, alone, rtol=0, atol=1e-12), "together isn't one by one"
    )


def _a_snapshot_continues_exactly(make: Make) -> None:
    rows = lessons(110)
    straight = _taught(make, rows)
    for cut in (0, 60):
        first, second = _taught(make, rows[:cut]), make(MODELS)
        second.load(Part.loads(first.state().dumps()))
        for text, accuracies in rows[cut:]:
            second.learn_one(second.encode(text), accuracies)
        for text, _ in lessons(10, seed=3):
            same = np.array_equal(_estimates(straight, text), _estimates(second, text))
            _hold(same, f"loaded after {cut} samples, it goes on differently")


def _refuses_what_it_does_not_know(make: Make) -> None:
    predictor = _taught(make, lessons(20))
    part = predictor.state()
    for strange in (
        replace(part, version=part.version + 1),
        replace(part, values={**part.values, "unknown": 1}),
    ):
        try:
            make(MODELS).load(strange)
        except StateError:  # each is tried on its own
            continue
        raise AssertionError("it goes on from a state that it can't know: `Part.check` refuses that")


PREDICTOR: tuple[Callable[[Make], None], ...] = (
    _knows_nothing_at_first,
    _predicts_purely_and_in_range,
    _learns_levels,
    _learns_from_what_was_observed_only,
    _takes_any_text,
    _many_is_one_by_one,
    _a_snapshot_continues_exactly,
    _refuses_what_it_does_not_know,
)


# ---- policies -------------------------------------------------------------------------------------

MakePolicy = Callable[[Setup], Policy]


def _controller(make: MakePolicy, window: int) -> Controller:
    setup = Setup(seed=3, horizon=200, window=window)
    settings = Settings(alphas={DEFAULT_PLAN: 0.7}, seed=3, window=window)
    return Controller(
        MODELS, make(setup), create_predictor("mean", MODELS), JoulesPredictor(MODELS), settings
    )


def _run(controller: Controller, rows: Sequence[tuple[str, Accuracies]]) -> list[Decision]:
    """Decide, settle and close windows over `rows`, as the loop does."""
    decisions: list[Decision] = []
    while len(decisions) < len(rows):
        part = rows[len(decisions) : len(decisions) + max(1, controller.window())]
        allowed = [tuple(range(MODELS)) if index % 5 else (1, 2) for index in range(len(part))]
        decided = controller.decide(
            [Request(str(index), text) for index, (text, _) in enumerate(part)], allowed
        )
        again = controller.decide(
            [Request(str(index), text) for index, (text, _) in enumerate(part)], allowed
        )
        _hold(
            decided == again,
            "deciding changes something: the same window is decided differently the second time",
        )
        for decision, can in zip(decided, allowed, strict=True):
            _hold(decision.model in can, f"model {decision.model} was chosen and only {can} may be")
            _hold(set(decision.asked) <= set(can), "a model is asked that can't take the prompt")
        controller.settle([_event(decision, row) for decision, row in zip(decided, part, strict=True)])
        controller.close_window()
        decisions += decided
    return decisions


def _event(decision: Decision, row: tuple[str, Accuracies]) -> Event:
    text, accuracies = row
    seen = tuple(float(accuracies[m]) if m in decision.asked else math.nan for m in range(MODELS))
    joules = tuple((m + 1.0) * len(text) if m in decision.asked else math.nan for m in range(MODELS))
    return Event(text, DEFAULT_PLAN, decision, seen, joules, decision.model)


def _chooses_what_may_be_chosen(make: MakePolicy) -> None:
    for window in (1, 16):
        _run(_controller(make, window), lessons(120))


def _decides_alike_every_time(make: MakePolicy) -> None:
    one, other = (_run(_controller(make, 8), lessons(120)) for _ in range(2))
    _hold(one == other, "the same requests are decided differently in a second run")


def _explores_with_a_probability(make: MakePolicy) -> None:
    policy = make(Setup(seed=3))
    _hold(isinstance(policy.name, str) and policy.name, "a policy has a name")
    for t in (1, 10, 1000, 10**6):
        for explored in {0, 1, t - 1}:
            probability = policy.exploration_probability(t, explored, {})
            _hold(0.0 <= probability <= 1.0, f"an exploration's probability is {probability} at t = {t}")
        _hold(policy.window(t, None) >= 1 and policy.window(t, 5) >= 1, "a window has at least one request")


def _a_saved_policy_continues_exactly(make: MakePolicy) -> None:
    rows = lessons(160)
    straight = _controller(make, 8)
    whole = _run(straight, rows)
    first, second = _controller(make, 8), _controller(make, 8)
    begun = _run(first, rows[:80])
    second.load(Part.loads(first.state().dumps()))
    _hold(begun + _run(second, rows[80:]) == whole, "loaded halfway, it goes on differently")


POLICY: tuple[Callable[[MakePolicy], None], ...] = (
    _explores_with_a_probability,
    _chooses_what_may_be_chosen,
    _decides_alike_every_time,
    _a_saved_policy_continues_exactly,
)


# ---- meters ---------------------------------------------------------------------------------------

Work = Callable[[], object]  # uses some energy of the device


def burn() -> None:
    """2 ms of this process's CPU."""
    until = time.process_time() + 0.002
    while time.process_time() < until:
        pass


def _says_what_it_is(counter: Counter, work: Work) -> None:
    _hold(
        counter.kind and counter.kind == counter.kind.strip(), "a counter's kind is the name that rows show"
    )
    _hold(counter.provenance and "\n" not in counter.provenance, "provenance is one line")
    _hold(0 < counter.period < 60, "period is seconds between two updates, above 0")
    _hold(isinstance(counter.partitioned, bool), "partitioned is True or False")
    _hold(all(isinstance(line, str) for line in counter.warnings()), "warnings are lines")


def _counts_joules_that_never_fall(counter: Counter, work: Work) -> None:
    readings = [counter.read()]
    for _ in range(5):
        work()
        readings.append(counter.read())
    _hold(all(math.isfinite(reading) for reading in readings), f"readings aren't finite: {readings}")
    _hold(readings[0] >= 0 and readings == sorted(readings), f"readings fall: {readings}")
    _hold(readings[-1] > readings[0], f"work took no energy: {readings}")


def _closes_twice(counter: Counter, work: Work) -> None:
    counter.close()
    counter.close()


METER: tuple[Callable[[Counter, Work], None], ...] = (
    _says_what_it_is,
    _counts_joules_that_never_fall,
    _closes_twice,  # last: nothing can be read after it
)


# ---- backends -------------------------------------------------------------------------------------

_PROMPTS = ("one two three", "a", "the cat sat on the mat", "one two three", "B or C, and why")


def _asked() -> list[Request]:
    return [Request(f"r{index}", prompt, key=b"%d" % index) for index, prompt in enumerate(_PROMPTS)]


def _loads_on_demand_and_unloads(backend: Backend) -> None:
    backend.unload()
    _hold(not backend.loaded, "unloaded, it says that it is loaded")
    backend.load()
    backend.load()  # again is no work and no error
    _hold(backend.loaded, "loaded, it says that it is not")
    backend.suspend()
    _hold(not backend.loaded, "suspended, it says that it is loaded")
    backend.resume()
    _hold(backend.loaded, "resumed, it says that it is not loaded")
    backend.unload()
    _hold(len(backend.generate(_asked()[:1])) == 1, "it doesn't load by itself")
    _hold(all(isinstance(device, str) for device in backend.devices), "devices are torch's names")


def _plans_each_request_once(backend: Backend) -> None:
    for count in (0, 1, 5):
        planned = backend.plan(_asked()[:count])
        _hold(
            sorted(index for batch in planned for index in batch) == list(range(count)),
            "not every request once",
        )
        _hold(all(planned), "an empty batch is planned")


def _answers_in_order_and_counts_tokens(backend: Backend) -> None:
    requests = _asked()
    answers = backend.generate(requests)
    _hold(len(answers) == len(requests), "not one answer per request")
    _hold(backend.generate([]) == [], "an empty batch has answers")
    for request, answer in zip(requests, answers, strict=True):
        if answer.error is None:
            _hold(isinstance(answer.output, str), "an answer without error has an output")
            _hold(answer.prompt_tokens == backend.prompt_tokens(request), "prompt_tokens isn't what was read")
            _hold(answer.output_tokens >= 0, "output_tokens is below 0")
    limit = backend.context_length
    _hold(limit is None or limit > 0, "context_length leaves no room")


def _streams_what_it_generates(backend: Backend) -> None:
    requests = _asked()
    finished: dict[int, Any] = {}
    work: dict[int, list[int]] = {}
    for group in backend.stream(requests):
        for index, answer in group.finished:
            _hold(index not in finished, f"request {index} finishes twice")
            finished[index] = answer
        for index, (read, written) in group.work.items():
            done = work.setdefault(index, [0, 0])
            done[0], done[1] = done[0] + read, done[1] + written
    _hold(sorted(finished) == list(range(len(requests))), "not every request finishes")
    for index, answer in finished.items():
        if answer.error is None:
            _hold(
                tuple(work.get(index, ())) == (answer.prompt_tokens, answer.output_tokens),
                f"the work of request {index} doesn't add up to its tokens: {work.get(index)}",
            )
    stream = backend.stream(requests)
    next(iter(stream))
    close = getattr(stream, "close", None)
    _hold(close is not None, "a stream can be closed: it is a generator")
    close()  # type: ignore[misc]  # it isn't None


def _shares_its_weights(backend: Backend) -> None:
    """Of a backend that can: another model on the same weights answers the same, and stays when the first one goes."""
    if not isinstance(backend, SharesWeights):
        return
    other = type(backend)(replace(backend.spec, name="another"), batch_size=None)  # type: ignore[call-arg]  # as `create`
    _hold(backend.weights == other.weights, "another name is other weights")
    share_weights([backend, other])
    requests = _asked()
    first, second = backend.generate(requests), other.generate(requests)
    _hold(
        [one.output for one in first] == [one.output for one in second], "the same weights answer differently"
    )
    backend.unload()
    _hold(not backend.loaded, "unloaded, it says that it is loaded")
    _hold(other.loaded, "unloading one model takes the other's weights away")
    _hold(
        [one.output for one in other.generate(requests)] == [one.output for one in second],
        "answers have changed",
    )
    other.unload()


def _weighs_options_or_tells_none(backend: Backend) -> None:
    """Of a request with `options`: a probability for each, or none at all. It changes nothing of others beside it."""
    plain = _asked()[:2]
    options = ("a", "b")
    *weighed, beside = backend.generate([*(replace(one, options=options) for one in plain), plain[0]])
    _hold(
        beside.output == backend.generate(plain[:1])[0].output,
        "a request answers otherwise beside one with options",
    )
    _hold(beside.weights is None, "a request without options has weights")
    for answer in weighed:
        if answer.weights is not None:
            _hold(len(answer.weights) == len(options), "not one weight for each option")
            _hold(all(0.0 <= weight <= 1.0 + 1e-6 for weight in answer.weights), "a weight is no probability")
            _hold(answer.output_tokens <= 1, "more than a token was written to weigh options")


BACKEND: tuple[Callable[[Backend], None], ...] = (
    _loads_on_demand_and_unloads,
    _plans_each_request_once,
    _answers_in_order_and_counts_tokens,
    _streams_what_it_generates,
    _weighs_options_or_tells_none,
    _shares_its_weights,
)


# ---- dialects -------------------------------------------------------------------------------------

Line = Mapping[str, Any]
_OURS = (
    {"prompt": "a"},
    {"messages": [{"role": "user", "content": "a"}]},
    {"id": 1, "prompt": "a", "reference": "b"},
)


def _knows_its_own(dialect: Dialect, example: Line) -> None:
    _hold(dialect.title and dialect.title == dialect.title.strip(), "a dialect has a title")
    _hold(dialect.looks_like(example), "it doesn't know its own line")
    _hold(dialect.looks_like({}) in (True, False), "looks_like says True or False")


def _reads_a_request(dialect: Dialect, example: Line) -> None:
    before = json.dumps(example)
    ours = dialect.read(example)
    _hold(json.dumps(example) == before, "reading changes the line")
    _hold(("prompt" in ours) != (ours.get("messages") is not None), "a request has either prompt or messages")
    _hold(
        json.dumps(ours) == json.dumps(dialect.read(example)),
        "the same line is read differently the second time",
    )


def _refuses_with_a_cure(dialect: Dialect, example: Line) -> None:
    odd: tuple[Any, ...] = (
        None,
        3,
        "text",
        [],
        [[]],
        {},
        {"a": None},
        True,
        1.5,
        [{"from": 3}],
        [{"role": "user"}],
    )
    for name in example:
        for value in odd:
            try:
                dialect.read({**example, name: value})
            except ValueError as error:  # noqa: PERF203  # each line is tried on its own
                _hold(str(error) and "\n" not in str(error), "what is refused is told in one line")


def _writes_json(dialect: Dialect, example: Line) -> None:
    if dialect.write is None:
        return
    for row in (
        {"id": 1, "model": "m", "output": "text", "prompt_tokens": 3, "output_tokens": 2, "accuracy": None},
        {"id": None, "model": None, "output": None, "error": "why"},
    ):
        line = dialect.write(row)
        _hold(isinstance(line, dict) and json.dumps(line, allow_nan=False), "a written line is a JSON object")


DIALECT: tuple[Callable[[Dialect, Line], None], ...] = (
    _knows_its_own,
    _reads_a_request,
    _refuses_with_a_cure,
    _writes_json,
)
