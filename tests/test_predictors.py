"""One conformance suite over every predictor, then what is particular to each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from marks import slow

from messcli.errors import UsageError
from messcli.predict.base import create_predictor
from messcli.predict.joules import JoulesPredictor
from messcli.predict.latent import SIZE, LatentSpace, Move
from messcli.predict.linear import LinearPredictor
from messcli.predict.mean import MeanPredictor
from messcli.predict.regression import Evidence
from messcli.predict.ridge import candidate_weights
from messcli.predict.text import KIND, SHAPE, Encoder, encode_sparse, hash_texts, shape_of, sparse_features
from messcli.predict.tuning import LATENT, RIDGE, Linear
from messcli.registry import PREDICTORS
from messcli.snapshots import Part

NAN = float("nan")
MODELS = 3


def samples(count, seed=0):
    """Texts whose words tell how hard they are, and the accuracies of three models."""
    draw = random.Random(seed)
    words = [f"word{n}" for n in range(40)]
    rows = []
    for _ in range(count):
        text = " ".join(draw.choices(words, k=draw.randint(3, 15)))
        hard = np.mean([int(word[4:]) for word in text.split()]) / 40
        levels = np.array([0.9 - hard, 1.1 - hard, 1.2 - 0.5 * hard]) + draw.gauss(0, 0.05)
        rows.append((text, np.clip(levels, 0, 1)))
    return rows


def taught(predictor, rows):
    for text, accuracies in rows:
        predictor.learn_one(predictor.encode(text), accuracies)
    return predictor


@pytest.fixture(params=sorted(PREDICTORS))
def name(request):
    return request.param


@pytest.mark.parametrize("name", [slow("fasttext"), *sorted(set(PREDICTORS) - {"fasttext", "mean"})])
def test_beats_the_mean_where_there_is_a_signal(name):
    rows, mean = samples(900), MeanPredictor(MODELS)
    predictor = create_predictor(name, MODELS)
    losses = []
    for text, accuracies in rows:
        guess, dull = predictor.predict_one(predictor.encode(text)), mean.predict_one(None)
        if guess is not None and dull is not None:
            losses.append([((guess - accuracies) ** 2).mean(), ((dull - accuracies) ** 2).mean()])
        taught(predictor, [(text, accuracies)])
        mean.learn_one(None, accuracies)
    own, others = np.mean(losses[500:], axis=0)
    assert own < 0.9 * others


@pytest.mark.slow
@given(cut=st.integers(0, 140), seed=st.integers(0, 3))
@hypothesis_settings(max_examples=8)
def test_a_snapshot_continues_exactly(cut, seed):
    for name in sorted(PREDICTORS):
        rows = samples(150, seed)
        straight = taught(create_predictor(name, MODELS), rows)
        first = taught(create_predictor(name, MODELS), rows[:cut])
        second = create_predictor(name, MODELS)
        second.load(Part.loads(first.state().dumps()))
        taught(second, rows[cut:])
        for text, _ in samples(10, seed + 10):
            assert np.array_equal(
                straight.predict_one(straight.encode(text)), second.predict_one(second.encode(text))
            ), name


def test_unknown_name():
    with pytest.raises(UsageError, match=r'unknown predictor "ridg".*ridge'):
        create_predictor("ridg", MODELS)


# ---- features -------------------------------------------------------------------------------------


def hashes_of(text):
    hashed = hash_texts((text,))
    return np.split(hashed.hashes, np.cumsum(hashed.counts.sum(axis=1))[:-1])


def test_hashes_are_the_same_everywhere():
    # Pinned: a state that was written on one machine must mean the same on another.
    words, pairs, runs = hashes_of("The small dog.")
    assert [hex(int(h)) for h in words[:2]] == PINNED_WORDS
    assert len(words) == 3
    assert len(pairs) == 2
    assert len(runs) == len("The small dog.") - 3


PINNED_WORDS = ["0xf5ce9dda07d43867", "0x3013feb8442d799b"]


@given(st.text(max_size=300))
def test_features_are_finite_and_of_unit_length(text):
    indices, values = sparse_features(1 << 10)(text)
    assert (np.diff(indices) > 0).all()
    assert indices[-1] == 1 << 10
    assert values[-1] == 1.0
    assert values[:-1] @ values[:-1] == pytest.approx(1.0) or len(values) == 1
    assert np.isfinite(shape_of(text)).all()


@given(st.lists(st.sampled_from(["alpha", "beta", "Gamma", "d3lta"]), min_size=1, max_size=30))
def test_a_word_has_the_same_hash_wherever_it_stands(words):
    hashes, _, _ = hashes_of(", ".join(words))
    assert len(hashes) == len(words)
    for word, value in zip(words, hashes, strict=True):
        assert value == hashes_of(word.upper())[0][0]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12), st.integers(1, 5))
def test_features_do_not_depend_on_the_texts_they_are_made_with(texts, together):
    def encode(many):
        return encode_sparse(many, 1 << 10)

    made = Encoder(encode)
    for first in range(0, len(texts), together):
        for text, features in zip(
            texts[first : first + together], made.many(texts[first : first + together]), strict=True
        ):
            alone = Encoder(encode)(text)
            assert all(map(np.array_equal, features, alone))


def test_only_the_latest_texts_are_remembered(monkeypatch):
    asked = []
    monkeypatch.setattr(Encoder, "at_least", 0)
    length = Encoder(lambda texts: (asked.append(text) or len(text) for text in texts), remembers=3)
    assert length.many(["a", "bb", "a", "ccc", "dddd"]) == [1, 2, 1, 3, 4]
    assert [length(text) for text in ("dddd", "bb", "a")] == [4, 2, 1]
    assert asked == ["a", "bb", "ccc", "dddd", "a"]


# ---- the latent space -----------------------------------------------------------------------------

TOPICS = (
    ["protein", "cell", "enzyme", "membrane", "gene", "neuron"],
    ["verdict", "court", "contract", "statute", "appeal", "tort"],
)


def on_topic(topic, count, seed):
    draw = random.Random(f"{topic} {seed}")
    return [" ".join(draw.choices(TOPICS[topic], k=8)) for _ in range(count)]


def fitted(texts):
    space = LatentSpace()
    space.fit(texts)
    return space


def latent(space, texts):
    return np.array([placed.at[SHAPE:] for placed in space.encode.many(texts)])


def test_a_latent_space_tells_topics_apart_that_nobody_named():
    texts = on_topic(0, 40, 0) + on_topic(1, 40, 0)
    space = fitted(texts)
    one, other = (latent(space, on_topic(topic, 20, 1))[:, 0] for topic in (0, 1))
    assert max(one) < min(other) or max(other) < min(one)


def test_the_fitted_texts_have_a_variance_of_1_together():
    texts = on_topic(0, 30, 0) + on_topic(1, 30, 0)
    places = latent(fitted(texts), texts)
    assert places.var(axis=0).sum() == pytest.approx(1.0, abs=1e-4)
    assert abs(places.mean(axis=0)).max() < 1e-5


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
@hypothesis_settings(max_examples=50)
def test_where_a_text_lies_does_not_depend_on_the_texts_it_is_placed_with(texts, together, fit):
    space, other = LatentSpace(), LatentSpace()
    if fit:
        space.fit(texts)
        other.load(space.state())
    for first in range(0, len(texts), together):
        batch = texts[first : first + together]
        for text, placed in zip(batch, space.encode.many(batch), strict=True):
            assert placed.at.shape == (SIZE,)
            assert np.array_equal(placed.at, other.encode(text).at)
            assert np.linalg.norm(placed.at[SHAPE:]) <= LATENT.far + 1e-6


@pytest.mark.parametrize("texts", [[""], ["same"] * 40, ["", " ", "\n"], ["a b", "c d"]])
def test_texts_that_hardly_differ_make_a_space_too(texts):
    space = fitted(texts)
    assert np.isfinite(latent(space, [*texts, "something else entirely", "ü" * 500])).all()


def test_a_space_that_is_fitted_later_is_as_one_that_was_known_before():
    """What was learnt before the fits is learnt anew in the space of the last one."""
    rows = samples(300)
    learnt = create_predictor("ridge", MODELS)
    learnt.space = LatentSpace(fits=(32, 128))
    taught(learnt, rows)
    known = create_predictor("ridge", MODELS)
    known.space = LatentSpace(fits=())
    known.space.fit([text for text, _ in rows[:128]])
    taught(known, rows)
    for one in (learnt, known):
        one.solve()  # the one has solved at other times: after its fits
    estimates = [[one.predict_one(one.encode(text)) for text, _ in samples(20, 1)] for one in (learnt, known)]
    np.testing.assert_allclose(*estimates, atol=0.02)
    np.testing.assert_allclose(learnt.samples, known.samples)
    assert learnt.space.settled
    assert not learnt.space.seen  # the texts are let go with the last fit


# ---- linear: equation 4 ---------------------------------------------------------------------------


def test_a_step_of_sgd_moves_against_the_gradient():
    predictor = taught(LinearPredictor(1, Linear(learning_rate=0.05)), [("a b c", np.array([0.2]))])
    features = predictor.encode("a b d")
    before = predictor.predict_one(features)[0]
    length = float(features[1] @ features[1])
    predictor.learn_one(features, np.array([0.9]))
    # w <- w - eta * d/dw (x w - A)^2, hence the estimate moves by 2 eta |x|^2 (A - x w)
    assert predictor.predict_one(features)[0] - before == pytest.approx(2 * 0.05 * length * (0.9 - before))


# ---- joules ---------------------------------------------------------------------------------------


def test_joules_follow_the_length_of_the_prompt():
    predictor, draw = JoulesPredictor(2), random.Random(0)
    assert predictor.predict_one(predictor.encode("x")) is None
    for _ in range(400):
        words = draw.randint(1, 60)
        text = " ".join(draw.choices(["some", "other", "words"], k=words))
        predictor.learn_one(predictor.encode(text), np.array([1.0 + 0.1 * words, 8.0 + 2.0 * words]))
    short, long = (predictor.predict_one(predictor.encode("some words " * n)) for n in (3, 25))
    assert short == pytest.approx([1.6, 20.0], rel=0.25)
    assert long == pytest.approx([6.0, 108.0], rel=0.15)
    assert predictor.unit < 10


def test_a_model_that_is_seldom_read_is_known_by_what_the_others_cost():
    """What makes one model write much makes the others write much: pooled in units of each model's mean."""
    predictor, draw = JoulesPredictor(2), random.Random(0)
    for n in range(300):
        topic = n % 2
        text = " ".join(draw.choices(TOPICS[topic], k=8))
        joules = (1.0 + 2.0 * topic) * draw.uniform(0.8, 1.2)
        predictor.learn_one(predictor.encode(text), np.array([joules, 50.0 * joules if n < 8 else NAN]))
    brief, wordy = (
        np.mean([predictor.predict_one(predictor.encode(text)) for text in on_topic(topic, 20, 1)], axis=0)
        for topic in (0, 1)
    )
    assert wordy[0] / brief[0] > 2.0
    assert wordy[1] / brief[1] > 1.5


def test_the_unit_settles():
    predictor = JoulesPredictor(2)
    for n in range(60):
        predictor.learn_one(predictor.encode(f"text {n}"), np.array([2.0, 9.0]))
    unit = predictor.unit
    assert unit == pytest.approx(2.0)
    for n in range(300):
        predictor.learn_one(predictor.encode(f"text {n}"), np.array([20.0, 90.0]))
    assert predictor.unit == unit


def test_unread_joules_are_not_learnt_from():
    predictor = JoulesPredictor(2)
    for n in range(30):
        predictor.learn_one(predictor.encode(f"text {n}"), np.array([2.0, NAN if n % 2 else 9.0]))
    assert predictor.predict_one(predictor.encode("text")) == pytest.approx([2.0, 9.0], rel=0.01)


def test_pooled_ridge_is_the_solution_of_the_whole_system():
    draw = np.random.default_rng(0)
    models, size = 3, SIZE
    rows = [draw.normal(size=(40 + 30 * m, size)) for m in range(models)]
    gram = np.array([x.T @ x for x in rows])
    cross = np.array([x.T @ draw.normal(size=len(x)) for x in rows])
    weights = candidate_weights(gram, cross)
    for k, (shared, own, lengths, _) in enumerate(RIDGE.candidates):
        if np.isinf(shared):
            assert not weights[k].any()
            continue
        # normal equations of |y - X (w + v_m)|^2 + shared |w|^2 + v_m P v_m, in w and every v_m at once
        penalty = np.full(size, own)
        penalty[:KIND], penalty[KIND:SHAPE] = lengths, own * RIDGE.own_kind
        penalty[np.isinf(penalty)] = 1e18
        left = np.zeros(((models + 1) * size,) * 2)
        right = np.concatenate((cross.sum(axis=0), *cross))
        left[:size, :size] = gram.sum(axis=0) + shared * np.eye(size)
        for m in range(models):
            block = slice((m + 1) * size, (m + 2) * size)
            left[:size, block] = left[block, :size] = gram[m]
            left[block, block] = gram[m] + np.diag(penalty)
        solution = np.linalg.solve(left, right).reshape(models + 1, size)
        np.testing.assert_allclose(weights[k], solution[0] + solution[1:], rtol=1e-6, atol=1e-9)


def test_lengths_may_tell_which_model_is_needed_and_soon():
    predictor, draw = create_predictor("ridge", 2), random.Random(0)
    for _ in range(60):
        words = draw.randint(1, 60)
        text = " ".join(draw.choices(["some", "other", "words"], k=words))
        predictor.learn_one(predictor.encode(text), np.array([float(words < 30), 1.0]))
    short, long = (predictor.predict_one(predictor.encode("some other words " * n)) for n in (3, 18))
    assert short[1] - short[0] < 0.1
    assert long[1] - long[0] > 0.8


def test_a_model_that_was_unlucky_at_first_is_not_written_off():
    predictor = create_predictor("ridge", 2)
    for n in range(8):
        predictor.learn_one(predictor.encode("the same text"), np.array([0.0, float(n % 4 > 0)]))
    unlucky, other = predictor.predict_one(predictor.encode("the same text"))
    assert 0.1 < unlucky < other < 0.75
    for _ in range(2000):
        predictor.learn_one(predictor.encode("the same text"), np.array([0.0, 0.75]))
    assert predictor.predict_one(predictor.encode("the same text")) == pytest.approx([0.0, 0.75], abs=0.01)


# ---- other traffic -------------------------------------------------------------------------------


@given(seed=st.integers(0, 50), rows=st.integers(1, 300))
@hypothesis_settings(max_examples=20)
def test_evidence_that_is_carried_over_is_that_of_the_carried_places(seed, rows):
    draw = np.random.default_rng(seed)
    move = Move(draw.normal(0, 0.3, (LATENT.directions,) * 2), draw.normal(0, 0.3, LATENT.directions))
    carried, anew = Evidence(MODELS), Evidence(MODELS)
    for _ in range(rows):
        x, y = draw.normal(0, 1, SIZE), draw.random(MODELS)
        y[draw.random(MODELS) < 0.3] = np.nan
        carried.add(x, y)
        anew.add(np.concatenate([x[:SHAPE], x[SHAPE:] @ move.turn + move.shift]), y)
    carried.move(move)
    anew.move(Move(np.eye(LATENT.directions), np.zeros(LATENT.directions)))  # takes in what waits
    for name, array in anew.state().arrays.items():
        np.testing.assert_allclose(carried.state().arrays[name], array, atol=1e-8 * rows * SIZE)


def test_texts_lie_about_where_they_are_carried_to():
    texts = [text for text, _ in samples(600)]
    space = fitted(texts[:300])
    before = latent(space, texts[500:])
    move = space.fit_anew(texts[200:500])
    after = latent(space, texts[500:])
    carried = before @ move.turn + move.shift
    assert np.corrcoef(carried.ravel(), after.ravel())[0, 1] > 0.9
    same = fitted(texts[:300])
    again = same.fit_anew(texts[:300])
    places = latent(same, texts[500:])
    np.testing.assert_allclose(places @ again.turn + again.shift, places, atol=1e-3)


def test_directions_hold_less_of_other_topics():
    space = fitted(on_topic(0, 60, 0))
    own, other = (space.share(on_topic(topic, 60, 1)) for topic in (0, 1))
    assert 0.0 <= other < 0.6 * own <= 0.6


def test_estimates_are_carried_over():
    rows = samples(900)
    predictor = taught(create_predictor("ridge", MODELS), rows)
    texts = [text for text, _ in samples(60, 1)]
    before = predictor.predict_many(predictor.encode_many(texts))
    predictor.move(predictor.space.fit_anew([text for text, _ in rows[400:]]))
    after = predictor.predict_many(predictor.encode_many(texts))
    for m in range(MODELS):
        assert np.corrcoef(before[:, m], after[:, m])[0, 1] > 0.9
