"""The bundled zoo: its German is right, its test texts are held out, its models do what their cards say."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tools.bundled_zoo import grammar, lexicon, samples, train

ROOT = Path(__file__).parent.parent
NAMES = [recipe.name for recipe in train.RECIPES]

# (determiner, adjective or None, noun), case, German: checked by hand
PHRASES = [
    (("the", None, "dog"), "nom", "der Hund"),
    (("the", None, "dog"), "acc", "den Hund"),
    (("the", None, "dog"), "dat", "dem Hund"),
    (("the", None, "cat"), "nom", "die Katze"),
    (("the", None, "cat"), "acc", "die Katze"),
    (("the", None, "cat"), "dat", "der Katze"),
    (("the", None, "child"), "acc", "das Kind"),
    (("the", None, "child"), "dat", "dem Kind"),
    (("a", None, "house"), "nom", "ein Haus"),
    (("a", None, "kitchen"), "dat", "einer Küche"),
    (("the", "small", "dog"), "nom", "der kleine Hund"),
    (("a", "small", "dog"), "nom", "ein kleiner Hund"),
    (("a", "small", "dog"), "acc", "einen kleinen Hund"),
    (("a", "small", "dog"), "dat", "einem kleinen Hund"),
    (("a", "small", "house"), "acc", "ein kleines Haus"),
    (("a", "small", "cat"), "acc", "eine kleine Katze"),
    (("a", "small", "cat"), "dat", "einer kleinen Katze"),
    (("the", "small", "house"), "acc", "das kleine Haus"),
    (("this", "dark", "cellar"), "nom", "dieser dunkle Keller"),
    (("this", "dark", "kitchen"), "dat", "dieser dunklen Küche"),
    (("every", "expensive", "book"), "acc", "jedes teure Buch"),
    (("every", "tired", "boy"), "dat", "jedem müden Jungen"),
    (("my", "old", "neighbour"), "nom", "mein alter Nachbar"),
    (("my", "old", "neighbour"), "acc", "meinen alten Nachbarn"),
    (("our", "quiet", "gentleman"), "dat", "unserem leisen Herrn"),
    (("our", "big", "ship"), "acc", "unser großes Schiff"),
    (("our", "honest", "queen"), "nom", "unsere ehrliche Königin"),
]

# preposition, (determiner, adjective or None, noun), English, German
PREPOSITIONAL = [
    ("in", ("the", None, "garden"), "in the garden", "im Garten"),
    ("in", ("the", "small", "city"), "in the small city", "in der kleinen Stadt"),
    ("into", ("the", None, "garden"), "into the garden", "in den Garten"),
    ("into", ("the", "old", "house"), "into the old house", "ins alte Haus"),
    ("into", ("a", None, "cave"), "into a cave", "in eine Höhle"),
    ("on", ("a", None, "table"), "on a table", "auf einem Tisch"),
    ("onto", ("the", "white", "roof"), "onto the white roof", "auf das weiße Dach"),
    ("near", ("the", None, "church"), "near the church", "bei der Kirche"),
    ("near", ("the", None, "museum"), "near the museum", "beim Museum"),
    ("from", ("the", None, "tree"), "from the tree", "vom Baum"),
    ("to", ("the", None, "school"), "to the school", "zur Schule"),
    ("to", ("the", "sick", "hero"), "to the sick hero", "zum kranken Helden"),
    ("to", ("this", None, "station"), "to this station", "zu diesem Bahnhof"),
    ("in front of", ("an", "ugly", "hotel"), "in front of an ugly hotel", "vor einem hässlichen Hotel"),
    ("out of", ("the", None, "bus"), "out of the bus", "aus dem Bus"),
    ("with", ("a", None, "lion"), "with a lion", "mit einem Löwen"),
    ("without", ("the", None, "lion"), "without the lion", "ohne den Löwen"),
    ("for", ("the", None, "judge"), "for the judge", "für den Richter"),
]

DATIVE_VERBS = {
    "helps",
    "follows",
    "trusts",
    "obeys",
    "resembles",
    "escapes",
    "harms",
    "thanks",
    "answers",
    "believes",
    "forgives",
    "serves",
    "congratulates",
}

ARTICLES = [
    ("apple", None, "an apple"),
    ("university", None, "a university"),
    ("unicorn", None, "a unicorn"),
    ("umbrella", None, "an umbrella"),
    ("heiress", None, "an heiress"),
    ("house", None, "a house"),
    ("man", "honest", "an honest man"),
    ("egg", "small", "a small egg"),
]


def _phrase(words: tuple[str, str | None, str]) -> grammar.NounPhrase:
    determiner, adjective, noun = words
    article = "a" if determiner == "an" else determiner
    return grammar.NounPhrase(
        next(d for d in lexicon.DETERMINERS if d.english == article),
        next((a for a in lexicon.adjectives() if a.english == adjective), None),
        next(n for n in lexicon.nouns() if n.english == noun),
    )


@pytest.mark.parametrize(("words", "case", "german"), PHRASES)
def test_phrases_agree_in_gender_and_case(
    words: tuple[str, str | None, str], case: lexicon.Case, german: str
) -> None:
    assert _phrase(words).german(case) == german


@pytest.mark.parametrize(("preposition", "words", "english", "german"), PREPOSITIONAL)
def test_prepositions_govern_their_case(
    preposition: str, words: tuple[str, str | None, str], english: str, german: str
) -> None:
    word = next(p for p in lexicon.prepositions() if p.english == preposition)
    assert grammar.prepositional(word, _phrase(words)) == (english, german)


@pytest.mark.parametrize(("noun", "adjective", "english"), ARTICLES)
def test_english_article(noun: str, adjective: str | None, english: str) -> None:
    assert _phrase(("a", adjective, noun)).english() == english


def test_contractions_expand() -> None:
    german = "die Frau bringt den Brief vom Schrank zur Schule"
    assert grammar.expanded(german) == "die Frau bringt den Brief von dem Schrank zu der Schule"
    assert grammar.expanded("ein Hund") == "ein Hund"


def test_every_word_has_one_translation() -> None:
    for words in (lexicon.nouns(), lexicon.verbs()):
        for side in ("english", "german"):
            counts = Counter(getattr(word, side) for word in words)
            assert [word for word, times in counts.items() if times > 1] == []
    assert len(lexicon.nouns()) > 300


def test_verbs_take_their_case() -> None:
    verbs = {verb.english: verb for verb in lexicon.verbs()}
    men = {noun.english: noun for noun in lexicon.nouns() if noun.gender == "m"}
    checked: dict[str, str] = {}
    rng = random.Random(0)
    for text in (grammar.example(rng, 3) for _ in range(15_000)):
        *_, verb, article, noun = text.english.split(" ")
        if verb in verbs and article == "the" and noun in men:
            ending = f"{'dem' if verb in DATIVE_VERBS else 'den'} {men[noun].oblique}"
            assert text.german.endswith(f"{verbs[verb].german} {ending}")
            checked[verb] = text.german
    assert checked.keys() == verbs.keys()


def test_the_generator_is_deterministic_and_spells_what_the_tokenizer_knows() -> None:
    known = set(grammar.vocabulary())
    for level in grammar.LEVELS:
        one, two = random.Random(5), random.Random(5)
        for _ in range(300):
            text = grammar.example(one, level)
            assert text == grammar.example(two, level)
            assert text.level == level
            assert known.issuperset(f"{text.english} {text.german}".split(" "))


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level is one of"):
        grammar.example(random.Random(0), 6)


def test_the_sample_file_is_what_the_script_writes() -> None:
    file = ROOT / "samples" / "requests.jsonl"
    assert file.read_bytes() == samples.as_jsonl().encode()


def test_the_sample_has_what_its_readme_says() -> None:
    rows = [json.loads(line) for line in samples.as_jsonl().splitlines()]
    assert [row["id"] for row in rows] == [f"s{number:03d}" for number in range(1, 301)]
    assert Counter(row["level"] for row in rows) == dict.fromkeys(grammar.LEVELS, 60)
    assert sum("reference" not in row for row in rows) == 6
    assert [len(row["reference"]) for row in rows if isinstance(row.get("reference"), list)] == [2]
    assert len({row["prompt"] for row in rows}) == 300


def test_the_sample_is_held_out() -> None:
    prompts = [(str(row["prompt"]), row["level"]) for row in samples.requests()]
    phrases = {prompt for prompt, level in prompts if level in (1, 2)}
    longest = max(len(prompt.split()) for prompt in phrases)
    for recipe in train.RECIPES:
        rng = random.Random(recipe.seed)
        seen = list(itertools.islice(grammar.examples(rng, recipe.weights, held_out=False), 8_000))
        assert {prompt for prompt, _ in prompts}.isdisjoint(text.english for text in seen)
        # A held-out phrase is not inside a longer training text either.
        for text in seen:
            words = text.english.split(" ")
            for start, length in itertools.product(range(len(words)), range(2, longest + 1)):
                # "the small" of "the small dog" is no phrase; these are whole noun phrases.
                assert " ".join(words[start : start + length]) not in phrases


def test_every_noun_is_in_training() -> None:
    texts = grammar.examples(random.Random(1), (1, 1, 1, 1, 1), held_out=False)
    words = {word for text in itertools.islice(texts, 8_000) for word in text.english.split(" ")}
    assert {noun.english for noun in lexicon.nouns()} <= words


def _load(name: str):  # type: ignore[no-untyped-def]  # transformers has no types here
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = train.ZOO / name
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_card_tells_the_truth(name: str) -> None:
    model, tokenizer = _load(name)
    text = (train.ZOO / name / "README.md").read_text(encoding="utf-8")
    row = re.search(r"^\| samples/requests\.jsonl \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert row is not None
    prompts, references = train.sample_references()
    found = train.score(train.answers(model, tokenizer, prompts), references)
    assert found.texts == int(row[1]) == 294
    # Another kind of processor adds in another order, which can tip a tie: two answers of slack.
    assert found.exact == pytest.approx(float(row[2]), abs=0.007)
    assert found.bleu1 == pytest.approx(float(row[3]), abs=0.007)
    parameters = sum(weights.numel() for weights in model.parameters())
    assert f"**{parameters:,} parameters**" in text
    recipe = next(recipe for recipe in train.RECIPES if recipe.name == name)
    assert f"{recipe.steps:,} steps" in text
    assert f"peak learning rate\n  {recipe.rate:g}, seed {recipe.seed}" in text


def test_the_zoo_is_ordered_and_small() -> None:
    exact = []
    for name in NAMES:
        text = (train.ZOO / name / "README.md").read_text(encoding="utf-8")
        exact.append([float(number) for number in re.findall(r"^\| \w+ \w+ \| \d+ \| ([\d.]+)", text, re.M)])
    small, medium, large = (scores[-1] for scores in exact)
    assert small < medium < large
    assert large >= 0.93
    assert min(exact[-1]) >= 0.85
    weights = sum((train.ZOO / name / "model.safetensors").stat().st_size for name in NAMES)
    assert weights < 4_000_000


@pytest.mark.parametrize("name", NAMES)
def test_odd_prompts_do_not_crash(name: str) -> None:
    model, tokenizer = _load(name)
    prompts = ["Quantum flux capacitors?", "", "😀 \t the <s> dog", "der Hund", "the dog " * 25]
    outputs = train.answers(model, tokenizer, prompts)
    assert len(outputs) == len(prompts)
    assert not any("<" in output for output in outputs)


def test_the_tokenizer() -> None:
    _, tokenizer = _load("large")
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer.model_max_length == train.CONTEXT
    plain = tokenizer("the small dog =>")["input_ids"]
    assert plain[0] == tokenizer.bos_token_id
    assert tokenizer("The small dog. =>")["input_ids"] == plain
    assert tokenizer.unk_token_id in tokenizer("the small quark =>")["input_ids"]
    german = "unser hässlicher Hund zerbricht eine Tasse"
    assert tokenizer.decode(tokenizer(german)["input_ids"], skip_special_tokens=True) == german


@pytest.mark.parametrize(
    ("prompt", "german"),
    [
        ("the small dog sees a house", "der kleine Hund sieht ein Haus"),
        ("a tired boy helps the old king in the garden", "ein müder Junge hilft dem alten König im Garten"),
    ],
)
def test_the_largest_translates(prompt: str, german: str) -> None:
    model, tokenizer = _load("large")
    assert train.answers(model, tokenizer, [prompt]) == [german]


@pytest.mark.slow
def test_training_is_repeatable() -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipe = replace(train.RECIPES[0], steps=25)
        one, two = train.train(recipe).state_dict(), train.train(recipe).state_dict()
    finally:
        torch.set_num_threads(threads)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    untrained = train.new_model(recipe).state_dict()
    assert not all(torch.equal(one[key], untrained[key]) for key in one)
