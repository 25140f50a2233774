"""The algorithm: properties of its parts, and the whole against a transcription of Algorithm 1."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import slow

from messcli.predict.base import create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.predict.latent import LatentSpace
from messcli.predict.text import SHAPE, sparse_features
from messcli.predict.tuning import LINEAR
from messcli.records import Decision, Outcome, Request
from messcli.routing.auto import Auto
from messcli.routing.controller import Controller
from messcli.routing.deciding import Settings
from messcli.routing.event import Event
from messcli.routing.exploration import coin, companions, exploration_probability
from messcli.routing.line import Settled
from messcli.routing.loop import chunks
from messcli.routing.policy import (
    Largest,
    MessPlus,
    RandomConstrained,
    Recent,
    Smallest,
    View,
    cheapest_mix,
    drift_plus_penalty,
)
from messcli.routing.setup import Setup, create_controller
from messcli.routing.sla import DEFAULT_PLAN, Account, VirtualQueue
from messcli.routing.source import Recorded
from messcli.routing.tuning import TUNING

UNIT = st.floats(0, 1)
NAMES = ("small", "medium", "large")


def table(rows: int, seed: int = 0, reference_share: float = 1.0):
    """Requests whose accuracies depend on their words, and what three models did with them."""
    draw = random.Random(seed)
    words = [f"word{n}" for n in range(60)]
    requests, outcomes = [], {}
    for n in range(rows):
        chosen = draw.choices(words, k=draw.randint(1, 12))
        hardness = sum(int(word[4:]) for word in chosen) / (60 * len(chosen))
        references = ("yes",) if draw.random() < reference_share else ()
        requests.append(Request(n, " ".join(chosen), references=references, key=b"%d" % n))
        outcomes[n] = {
            name: Outcome(
                output="yes",
                accuracy=min(1.0, max(0.0, skill - hardness * draw.random())) if references else None,
                joules=cost * (1.0 + 0.1 * len(chosen)),
                meter="recorded",
            )
            for name, skill, cost in zip(NAMES, (0.6, 0.8, 1.0), (1.0, 3.0, 8.0), strict=True)
        }
    return requests, Table(NAMES, outcomes)


class Table(Recorded):
    """Recorded outcomes that a test can look at and change."""

    def __init__(self, names, outcomes):
        super().__init__(names, outcomes)
        self.outcomes = outcomes


def controller(policy=None, predictor="linear", c=3.0, **settings) -> Controller:
    settings = {"alphas": {DEFAULT_PLAN: 0.6}, **settings}
    return Controller(
        3,
        policy or MessPlus(0.1, c),
        create_predictor(predictor, 3),
        JoulesPredictor(3),
        Settings(**settings),
    )


def run(requests, source, control) -> list[Settled]:
    return [line for chunk in chunks(requests, control, source) for line in chunk.lines]


def windows(requests, source, control) -> list[int]:
    """How many lines each window has."""
    return [len(chunk.lines) for chunk in chunks(requests, control, source) if chunk.ends_window]


# ---- the queue, equation 2 ------------------------------------------------------------------------


@given(st.floats(0, 1e6), UNIT, st.lists(UNIT, max_size=50))
def test_queue_is_never_negative_and_bounds_the_violation(start, alpha, accuracies):
    queue = VirtualQueue(start)
    for accuracy in accuracies:
        after = queue.after(alpha, accuracy)
        assert after.length >= 0
        assert abs(after.length - queue.length) <= 1 + 1e-9 * (1 + queue.length)
        assert after.length >= queue.length + alpha - accuracy
        queue = after
    # Summed up: what was missed so far never exceeds the queue. That is why a bounded queue keeps the SLA.
    missed = math.fsum(alpha - accuracy for accuracy in accuracies)
    assert queue.length >= start + missed - 1e-6 * (1 + start)


# ---- exploration ----------------------------------------------------------------------------------


@given(st.integers(1, 10**9), st.floats(0, 100))
def test_exploration_fades(t, c):
    assert 0 <= exploration_probability(t + 1, c) <= exploration_probability(t, c) <= 1


@pytest.mark.parametrize(
    ("t", "c", "expected"), [(1, 3, 1.0), (27, 3, 1.0), (64, 3, 0.75), (1000, 3, 0.3), (8, 0.5, 0.25)]
)
def test_exploration_probability(t, c, expected):
    assert exploration_probability(t, c) == pytest.approx(expected)


def test_coin_is_a_pure_function_that_is_uniform():
    tosses = [coin(7, t) for t in range(20_000)]
    assert tosses == [coin(7, t) for t in range(20_000)]
    assert all(0 <= toss < 1 for toss in tosses)
    assert np.mean(tosses) == pytest.approx(0.5, abs=0.01)
    assert np.histogram(tosses, 10, (0, 1))[0] == pytest.approx([2000] * 10, rel=0.1)
    assert np.corrcoef(tosses, [coin(8, t) for t in range(20_000)])[0, 1] == pytest.approx(0, abs=0.03)


# ---- the choice, equation 3 -----------------------------------------------------------------------


def seen(queue, alpha, estimates, joules, allowed=None):
    return View(
        t=1,
        plan="",
        queue=queue,
        alpha=alpha,
        allowed=range(len(estimates)) if allowed is None else allowed,
        estimates=estimates,
        joules=joules,
        joules_unit=min(joules) if joules else 1.0,
        samples=np.ones(len(estimates or allowed)),
    )


numbers = st.lists(st.tuples(UNIT, st.floats(0.1, 1e4)), min_size=1, max_size=6)


@given(numbers, st.floats(0, 1e3), UNIT, st.floats(1e-3, 1e3))
def test_choice_minimises_the_objective(models, queue, alpha, v):
    estimates, joules = zip(*models, strict=True)
    view = seen(queue, alpha, estimates, joules)
    chosen = drift_plus_penalty(view, v)
    values = [v * e / min(joules) + queue * (alpha - a) for a, e in models]
    assert values[chosen] == min(values)
    assert joules[chosen] == min(e for e, value in zip(joules, values, strict=True) if value == min(values))


@given(numbers, st.floats(1e-3, 1e3))
def test_without_a_debt_the_cheapest_serves(models, v):
    estimates, joules = zip(*models, strict=True)
    view = seen(0.0, 0.5, estimates, joules)
    assert joules[drift_plus_penalty(view, v)] == min(joules)


@given(numbers, st.lists(st.floats(0, 1e3), min_size=2, max_size=2), st.floats(1e-3, 1e3))
def test_a_longer_queue_never_chooses_a_worse_model(models, queues, v):
    estimates, joules = zip(*models, strict=True)
    low, high = (drift_plus_penalty(seen(q, 0.5, estimates, joules), v) for q in sorted(queues))
    assert estimates[high] >= estimates[low] - 1e-9


def test_nothing_learnt_serves_the_largest_that_fits():
    view = seen(0.0, 0.5, None, None, allowed=(0, 1))
    assert drift_plus_penalty(view, 0.1) == 1


@given(numbers, UNIT)
def test_the_cheapest_mix_is_what_a_linear_programme_finds(models, target):
    from scipy.optimize import linprog

    # the programme takes a constraint for met within 1e-7
    accuracies, joules = [round(a, 3) for a, _ in models], [j for _, j in models]
    target = round(target, 3)
    low, high, share = cheapest_mix(accuracies, joules, target)
    cost = (1 - share) * joules[low] + share * joules[high]
    answer = linprog(
        joules, A_ub=[[-a for a in accuracies]], b_ub=[-target], A_eq=[[1.0] * len(models)], b_eq=[1.0]
    )
    if max(accuracies) < target:
        assert accuracies[high] == max(accuracies)
    elif answer.success:
        assert cost == pytest.approx(answer.fun, rel=1e-5)


# ---- Algorithm 1, line by line --------------------------------------------------------------------


def algorithm_1(requests, outcomes, energies, unit, v, alpha, c, eta, seed):
    """Algorithm 1 as printed (restored), on recorded outcomes: its own queue, argmin and SGD."""
    buckets = LINEAR.buckets
    x = [
        np.random.default_rng(0).normal(0, 1e-3, buckets + 1) for _ in NAMES
    ]  # line 1: a common random vector
    q, learnt, trace = 0.0, False, []
    for t, request in enumerate(requests, start=1):  # line 2
        p = min(1.0, c / t ** (1 / 3))  # line 3
        a = np.zeros(buckets + 1)
        indices, values = sparse_features(buckets)(request.prompt)
        a[indices] = values
        estimates = [min(1.0, max(0.0, float(x_m @ a))) for x_m in x] if learnt else None
        truth = [outcomes[request.id][name].accuracy for name in NAMES]
        if coin(seed, t) < p:  # line 4 and 5
            for m, _ in enumerate(NAMES):  # lines 6 to 8: every model answers and its predictor takes a step
                if not learnt:
                    x[m][buckets] = truth[m]
                x[m] = x[m] - eta * 2 * (float(x[m] @ a) - truth[m]) * a
            chosen, learnt = len(NAMES) - 1, True  # line 9: the largest model's output is served
        else:  # line 10: the minimum of equation 3
            cost = [
                v * energies[t - 1][m] / unit[t - 1] + q * (alpha - estimates[m]) for m in range(len(NAMES))
            ]
            chosen = int(np.argmin(cost))
        trace.append((coin(seed, t) < p, chosen, estimates, q))
        q = max(0.0, q + alpha - truth[chosen])  # equation 2
    return trace


@pytest.mark.parametrize("seed", [0, slow(1)])
def test_window_1_is_algorithm_1(seed):
    requests, source = table(3000, seed)
    control = controller(seed=seed, learn_from="explored")
    energies, units, queues, settled = [], [], [], []
    feed = iter(requests)

    def watched():
        for request in feed:  # E_m(t) is an input of Algorithm 1: take what the loop is about to use
            joules = control.learnt.joules.predict_one(control.learnt.joules.encode(request.prompt))
            energies.append([1.0] * 3 if joules is None else joules.tolist())
            units.append(control.learnt.joules.unit)
            queues.append(control.accounts[DEFAULT_PLAN].queue.length)
            yield request

    settled = run(watched(), source, control)
    trace = algorithm_1(requests, source.outcomes, energies, units, 0.1, 0.6, 3.0, 0.05, seed)
    assert len(trace) == len(settled) == 3000
    for line, queue, (explored, chosen, estimates, q) in zip(settled, queues, trace, strict=True):
        decision = line.decision
        assert (decision.explored, decision.model) == (explored, chosen)
        assert queue == pytest.approx(q, abs=1e-9)
        if estimates is None:
            assert decision.estimates is None
        else:
            assert decision.estimates == pytest.approx(estimates, abs=1e-9)
    chosen = {line.decision.model for line in settled if not line.decision.explored}
    assert chosen == {0, 1, 2}, "a trace that never chooses proves little"


# ---- the loop -------------------------------------------------------------------------------------


def test_the_promise_is_kept_and_cheaper_than_the_largest():
    requests, source = table(3000)
    settled = run(requests, source, controller())
    accuracy = np.mean([line.outcomes[line.served].accuracy for line in settled])
    largest = sum(source.outcomes[r.id]["large"].joules for r in requests)
    assert accuracy >= 0.6
    assert sum(line.billed_joules for line in settled) < largest


def test_a_meter_that_counts_nothing_holds_nobody_up():
    requests, source = table(120)
    for models in source.outcomes.values():
        models.update({name: replace(outcome, joules=0.0) for name, outcome in models.items()})
    settled = run(requests, source, controller(Auto(horizon=120)))
    assert sum(line.billed_joules for line in settled) == 0
    assert np.mean([line.outcomes[line.served].accuracy for line in settled]) >= 0.6


@pytest.mark.slow
def test_dear_models_are_left_alone_where_cheap_ones_do():
    def asked(factor, policy):
        requests, source = table(2500)
        for models in source.outcomes.values():
            models["large"] = replace(models["large"], joules=models["large"].joules * factor)
        settled = run(requests, source, controller(policy, "ridge", alphas={DEFAULT_PLAN: 0.3}))
        billed = sum(line.billed_joules for line in settled)
        beside = billed - sum(line.outcomes[line.served].joules for line in settled)
        return sum(2 in line.outcomes for line in settled), beside / billed

    few, beside = asked(100, Auto(2500))
    assert few <= 3, "300 times the joules of the smallest, which reaches alpha"
    assert beside <= TUNING.exploration.share
    most, _ = asked(100, Auto(2500, c=0.5))
    assert most > few, "a constant that was asked for is used"


def test_models_asked_beside_the_served_one_take_the_share_that_is_said():
    joules, share = (1.0, 5.0, 40.0), 0.05
    asked = [companions(3, t, 2, (0, 1, 2), joules, share) for t in range(20_000)]
    assert asked == [companions(3, t, 2, (0, 1, 2), joules, share) for t in range(20_000)]
    taken = np.mean([sum(joules[m] for m in models) for models in asked])
    assert taken == pytest.approx(share * joules[2], rel=0.05)
    assert np.mean([1 in models for models in asked]) == pytest.approx(0.5 * share * 40.0 / 5.0, rel=0.05)
    assert all(companions(3, t, 0, (0, 1, 2), joules, share) == () for t in range(50))
    assert all(0 not in companions(3, t, 2, (1, 2), joules, share) for t in range(200)), "it can't take it"


@pytest.mark.parametrize("rows", [60, 300, slow(3000)])
@pytest.mark.parametrize("window", [1, None])
@pytest.mark.slow
def test_alpha_is_kept_on_a_made_zoo(rows, window):
    requests, source = table(rows)
    best = np.mean([source.outcomes[r.id]["large"].accuracy for r in requests])
    cheapest = np.mean([source.outcomes[r.id]["small"].accuracy for r in requests])
    for part in (0.2, 0.8):
        alpha = cheapest + part * (best - cheapest)
        control = controller(Auto(rows), "ridge", alphas={DEFAULT_PLAN: alpha}, window=window, horizon=rows)
        settled = run(requests, source, control)
        assert np.mean([line.outcomes[line.served].accuracy for line in settled]) >= alpha


def test_windows_grow_with_what_is_settled_and_end_where_the_input_does():
    for horizon in (1, 7, 300, 5000, 200_000):
        policy, sizes, t = Auto(horizon), [], 0
        while t < horizon:
            sizes.append(int(policy.window(t, horizon - t)))
            assert sizes[-1] == int(Auto(horizon).window(t, horizon - t)), "a function of t, T and settings"
            t += sizes[-1]
        assert t == horizon
        assert min(sizes) >= 1
        assert sizes[0] <= max(1, TUNING.windows.start * horizon)
        assert max(sizes) <= TUNING.windows.most
        assert sizes[-1] <= max(2, TUNING.windows.end * horizon)
    assert max(sizes) > 10_000
    unknown = [int(Auto().window(t, None)) for t in (0, 100, 1000, 10**6)]
    assert unknown == sorted(unknown)
    assert unknown[-1] == TUNING.windows.most


def test_a_later_period_has_windows_of_its_own_length():
    requests, source = table(600)
    control = controller(Auto(300), "ridge", window=None, horizon=300)
    first = windows(requests[:300], source, control)
    control.open_period({})
    assert sum(windows(requests[300:], source, control)) == 300
    assert len(first) > 2
    control.open_period({})
    assert 150 <= control.window() <= 299, (
        "what earlier periods taught is known, and this one's end is its own"
    )
    control.accounts[DEFAULT_PLAN].failed = 299
    assert control.window() == 1


def test_a_window_is_priced_on_its_own_prompts_once_all_models_are_known():
    policy, account = Auto(4000), Account()
    joules, easy = np.tile([1.0, 10.0], (200, 1)), np.tile([0.8, 0.95], (200, 1))
    known, hardly = np.array([500.0, 500.0]), np.array([10.0, 0.0])

    def aim(estimates, samples, window=200):
        upcoming = Recent(estimates[:window], joules[:window], samples)
        return policy.aim(DEFAULT_PLAN, 0.75, account, upcoming, window)

    assert aim(easy, known).price < aim(easy - 0.2, known).price
    assert aim(easy, hardly) is None
    assert aim(easy, known, TUNING.windows.own - 1) is None


def test_a_second_look_pays_what_its_window_does():
    """... also where a run is taken up in the window, and the price it was decided at isn't known any more."""
    decision = Decision(
        9, 0, (0,), False, (0.5, 0.8), (1.0, 10.0), False, larger=(1,), given=(0.5, 0.8), price=100.0
    )
    policy = Auto(4000)
    assert policy.second(DEFAULT_PLAN, decision) == 1
    assert policy.second(DEFAULT_PLAN, replace(decision, price=20.0)) is None


@pytest.mark.parametrize("policy", [Smallest(), Largest()])
def test_fixed_policies_never_explore(policy):
    requests, source = table(200)
    settled = run(requests, source, controller(policy))
    assert {line.served for line in settled} == {0 if policy.name == "smallest" else 2}
    assert all(len(line.outcomes) == 1 for line in settled)


@pytest.mark.slow
def test_random_just_meets_alpha():
    requests, source = table(4000)
    settled = run(requests, source, controller(RandomConstrained(0), "mean"))
    accuracy = np.mean([line.outcomes[line.served].accuracy for line in settled])
    assert 0.597 <= accuracy <= 0.62


def test_exploration_serves_and_bills_all():
    requests, source = table(20)
    for line in run(requests, source, controller(c=3.0)):
        assert line.decision.explored
        assert line.served == 2
        assert line.billed_joules == pytest.approx(sum(o.joules for o in line.outcomes.values()))


def test_an_exploration_due_on_a_request_without_reference_goes_to_the_next_with_one():
    requests, source = table(400, reference_share=0.3)
    settled = run(requests, source, controller(c=0.5, seed=3))
    due = False
    for line in settled:
        due = due or coin(3, line.decision.t) < exploration_probability(line.decision.t, 0.5)
        assert line.decision.explored == (due and bool(line.request.references))
        due = due and not line.request.references
    assert any(line.decision.explored for line in settled)


def test_without_references_the_queue_moves_by_the_estimate_and_nothing_is_learnt():
    requests, source = table(60)
    control = controller()
    run(requests, source, control)
    before = list(control.learnt.predictor.state().flat())
    blind, blind_source = table(50, seed=1, reference_share=0.0)
    queue = control.accounts[DEFAULT_PLAN].queue
    for line in run(blind, blind_source, control):
        queue = queue.after(0.6, line.decision.estimates[line.served])
        assert line.queue == queue.length
        assert not line.decision.explored
    for (_, value), (_, same) in zip(control.learnt.predictor.state().flat(), before, strict=True):
        np.testing.assert_array_equal(value, same)
    assert control.accounts[DEFAULT_PLAN].estimated == 50


def test_nothing_learnt_and_no_reference_serves_the_largest():
    requests, source = table(10, reference_share=0.0)
    assert {line.served for line in run(requests, source, controller())} == {2}


def test_alpha_above_the_zoo_is_said_and_the_largest_serves():
    requests, source = table(800)
    control = controller(alphas={DEFAULT_PLAN: 0.99}, c=3.0)
    settled = run(requests, source, control)
    assert control.unreachable(DEFAULT_PLAN)
    assert {line.served for line in settled[200:]} == {2}


@pytest.mark.parametrize("window", [1, 7, 32])
def test_inside_a_window_q_moves_by_the_estimates(window):
    requests, source = table(300)
    control = controller(c=0.5, window=window)
    twin = controller(c=0.5, window=window)
    feed = iter(requests)
    while batch := [request for _, request in zip(range(window), feed, strict=False)]:
        decisions = control.decide(batch, [(0, 1, 2)] * len(batch))
        again = control.decide(batch, [(0, 1, 2)] * len(batch))
        assert decisions == again, "deciding changed the controller"
        assert [line.decision for line in run(batch, source, control)] == decisions
        run(batch, source, twin)
    assert control.accounts == twin.accounts


def test_the_first_windows_are_small_where_the_price_is_found():
    requests, source = table(200)
    found = windows(requests, source, controller(Auto(200), window=64))
    assert found == [8, 8, 16, 32, 64, 64, 8]
    given = windows(requests, source, controller(MessPlus(0.1, 3.0), window=64))
    assert given == [64, 64, 64, 8]
    # one that goes on has the windows that it would have had
    control = controller(Auto(200), window=64)
    for count in (16, 48):
        run(requests[:count], source, control)
        del requests[:count]
    assert windows(requests, source, control) == [64, 64, 8]


@pytest.mark.slow
@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 9), st.booleans())
def test_events_replayed_give_the_same_controller_whatever_pieces_they_come_in(window, seed, piece, found):
    requests, source = table(80, seed)

    def fresh():
        return controller(Auto(80) if found else None, seed=seed, window=window)

    first, second = fresh(), fresh()
    for chunk in chunks(requests, first, source):
        if not chunk.ends_window:
            continue
        events = [Event.loads(event.dumps()) for event in chunk.events]
        for begin in range(0, len(events), piece):
            second.settle(events[begin : begin + piece])
            kept, second = second.state(), fresh()  # as if a run had ended here
            second.load(kept)
        second.close_window()
    third = fresh()
    third.load(first.state())
    for kept, other, same in zip(
        first.state().flat(), second.state().flat(), third.state().flat(), strict=True
    ):
        assert kept[0] == other[0] == same[0]
        np.testing.assert_array_equal(kept[1], other[1])
        np.testing.assert_array_equal(kept[1], same[1])


def test_plans_have_queues_of_their_own_and_share_predictors():
    requests, source = table(1500)
    plans = {"silver": 0.5, "platinum": 0.75}
    requests = [
        Request(r.id, r.prompt, references=r.references, plan=("silver", "platinum")[r.id % 2], key=r.key)
        for r in requests
    ]
    control = controller(alphas=plans, c=0.5)
    settled = run(requests, source, control)
    for plan, alpha in plans.items():
        own = [line for line in settled if line.request.plan == plan]
        assert np.mean([line.outcomes[line.served].accuracy for line in own[200:]]) >= alpha - 0.02
        queue = VirtualQueue()
        for line in own:
            queue = queue.after(alpha, line.outcomes[line.served].accuracy)
        assert control.accounts[plan].queue.length == pytest.approx(queue.length)


# ---- one space ------------------------------------------------------------------------------------


def test_directions_are_fitted_once_for_accuracies_and_joules_also_without_references(monkeypatch):
    fits = []
    monkeypatch.setattr(
        LatentSpace, "fit", lambda self, texts, fit=LatentSpace.fit: fits.append(fit(self, texts))
    )
    requests, source = table(200)
    bare = [replace(request, references=()) for request in requests]
    outcomes = {
        identity: {name: replace(outcome, accuracy=None) for name, outcome in known.items()}
        for identity, known in source.outcomes.items()
    }
    controller = create_controller(Setup(window=8), 3, {DEFAULT_PLAN: 0.6})
    for _ in chunks(bare[:150], controller, Recorded(source.names, outcomes)):
        pass
    assert len(fits) == 2  # after 32 and 128 prompts
    assert not controller.learnt.predictor.samples.any()
    for _ in chunks(requests[150:], controller, source):
        pass
    assert len(fits) == 2
    assert controller.learnt.predictor.samples.any()
    text = requests[0].prompt
    assert controller.learnt.predictor.encode(text) is controller.learnt.joules.encode(text)
    assert controller.learnt.space.encode(text).at[SHAPE:].any()


def test_what_was_learnt_in_two_spaces_is_learnt_anew_in_one():
    """A snapshot of 0.2's first days, when accuracies and joules had a space each."""
    requests, source = table(100)
    controller = create_controller(Setup(window=8), 3, {DEFAULT_PLAN: 0.6})
    for _ in chunks(requests, controller, source):
        pass
    kept = controller.state()
    parts = {name: part for name, part in kept.parts.items() if name != "space"}
    again = create_controller(Setup(window=8), 3, {DEFAULT_PLAN: 0.6})
    assert again.load(replace(kept, version=1, parts=parts)) == ["predictor", "joules", "recent"]
    assert again.t == 100
    assert again.accounts == controller.accounts


def other_words(requests):
    """The same requests in words that nobody has seen."""
    return [replace(one, prompt=one.prompt.replace("word", "qxz")[::-1]) for one in requests]


@pytest.mark.parametrize("changes", [slow(False), True])
@pytest.mark.slow
def test_directions_follow_traffic_that_changes_and_no_other(monkeypatch, changes):
    fits = []
    anew = LatentSpace.fit_anew
    monkeypatch.setattr(
        LatentSpace, "fit_anew", lambda self, texts: (fits.append(len(texts)), anew(self, texts))[1]
    )
    requests, source = table(3000)
    if changes:
        requests = [*requests[:1500], *other_words(requests[1500:])]
    controller = create_controller(Setup(window=64, no_look=True), 3, {DEFAULT_PLAN: 0.6})
    done = 0
    for chunk in chunks(requests, controller, source):
        done += len(chunk.lines)
        if chunk.ends_window and 1000 <= done < 1100:
            half = controller.state()
    assert fits == [512] * changes
    assert np.isfinite(
        controller.learnt.predictor.predict_one(controller.learnt.predictor.encode(requests[-1].prompt))
    ).all()
    again = create_controller(Setup(window=64, no_look=True), 3, {DEFAULT_PLAN: 0.6})
    again.load(half)
    fits.clear()
    for _ in chunks(requests[half.values["t"] :], again, source):
        pass
    for (path, value), (same, other) in zip(controller.state().flat(), again.state().flat(), strict=True):
        assert path == same
        assert (
            np.array_equal(value, other, equal_nan=True) if isinstance(value, np.ndarray) else value == other
        )
