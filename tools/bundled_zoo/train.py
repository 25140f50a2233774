"""Train the three models of the bundled zoo from random weights, and write their folders and cards.

``python -m tools.bundled_zoo.train [--out DIR] [--only NAME]`` on one core of a CPU. Steps and seeds are fixed. The
numbers in the cards are computed here, never typed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bundled_zoo.grammar import LEVELS, Example, examples, vocabulary
from tools.bundled_zoo.samples import held_out, requests

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
ZOO = ROOT / "messcli" / "bundled"
CONTEXT = 64
ANSWER_TOKENS = 24
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "=>")
PAD, BOS, EOS, UNK, ARROW = range(len(SPECIALS))
PROMPT_TEMPLATE = "{prompt} =>"
EVALUATION_SEED = 1
EVALUATION_PER_LEVEL = 200

_log = logging.getLogger("tools.bundled_zoo.train")


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained. `weights` is how often it sees each level."""

    name: str
    width: int
    layers: int
    heads: int
    feed_forward: int
    steps: int
    batch: int
    rate: float
    weights: tuple[int, int, int, int, int]
    seed: int = 1


# Deep and narrow towards the larger end: for models this small the cost of an answer is the number of layers, and a
# zoo whose members cost the same has nothing to route for. The weights and steps make them differ in what they know:
# these texts are so regular that 0.1 M parameters, trained on all five levels, learn them.
RECIPES = (
    Recipe("small", 24, 1, 2, 48, steps=600, batch=64, rate=1e-2, weights=(5, 1, 1, 1, 1)),
    Recipe("medium", 40, 3, 2, 80, steps=1500, batch=64, rate=5e-3, weights=(6, 6, 6, 1, 0)),
    Recipe("large", 64, 16, 2, 128, steps=1500, batch=64, rate=2e-3, weights=(1, 2, 2, 3, 3)),
)


@dataclass(frozen=True)
class Score:
    """Means over some texts: exact match and BLEU-1, both in [0, 1]."""

    texts: int
    exact: float
    bleu1: float


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the lexicon; any other word is ``<unk>``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIALS, *vocabulary()])}
    core = Tokenizer(models.WordLevel(words, unk_token=SPECIALS[UNK]))
    # People write "The dog sees a house."; the models know neither punctuation nor a capital at the start.
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("[.,;:!?]"), " "),
            *(
                normalizers.Replace(Regex(rf"^\s*{word.capitalize()}\b"), word)
                for word in ("the", "a", "an", "this", "every", "my", "our")
            ),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[BOS]} $A", special_tokens=[(SPECIALS[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIALS[PAD],
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[EOS],
        unk_token=SPECIALS[UNK],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model of a recipe; the weights depend on its seed alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + len(vocabulary()),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.feed_forward,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = ANSWER_TOKENS
    return model


def _batches(recipe: Recipe, ids: dict[str, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (inputs, targets), both batch x length; a target of -100 is not learnt (the prompt, the padding)."""
    import torch

    rng = random.Random(recipe.seed)  # drawn to be repeatable, not secret
    texts = examples(rng, recipe.weights, held_out=False)
    pool = 16
    while True:
        rows = []
        for text in itertools.islice(texts, pool * recipe.batch):
            prompt = [BOS, *(ids[word] for word in text.english.split(" ")), ARROW]
            rows.append((prompt, [*(ids[word] for word in text.german.split(" ")), EOS]))
        # Texts of a like length share a batch: less padding, and the same work in two thirds of the time.
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), recipe.batch))
        rng.shuffle(starts)
        for start in starts:
            share = rows[start : start + recipe.batch]
            length = max(len(prompt) + len(answer) for prompt, answer in share) - 1
            inputs = torch.full((len(share), length), PAD)
            targets = torch.full((len(share), length), -100)
            for row, (prompt, answer) in enumerate(share):
                text_ids = torch.tensor(prompt + answer)
                inputs[row, : len(text_ids) - 1] = text_ids[:-1]
                targets[row, len(prompt) - 1 : len(text_ids) - 1] = text_ids[len(prompt) :]
            yield inputs, targets


def train(recipe: Recipe) -> LlamaForCausalLM:
    """The trained model of a recipe. On one machine, the same recipe gives the same weights."""
    return fit(new_model(recipe), recipe)


def fit(model: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """Train those of a model's weights that take gradients, on the texts and at the rate of a recipe."""
    import torch
    from torch.nn.functional import cross_entropy

    model.train()
    weights = [one for one in model.parameters() if one.requires_grad]
    ids = {word: number for number, word in enumerate([*SPECIALS, *vocabulary()])}
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, min(200, recipe.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (recipe.steps - step) / (recipe.steps - warm_up))
    )
    began = time.monotonic()
    for step, (inputs, targets) in enumerate(itertools.islice(_batches(recipe, ids), recipe.steps), 1):
        learnt = targets != -100
        # Padding is on the right and attention is causal, so no mask is needed; the head sees answers only.
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[learnt]
        loss = cross_entropy(model.lm_head(hidden), targets[learnt])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            seconds = time.monotonic() - began
            _log.info("%s: step %d, loss %.4f, %.0f s", recipe.name, step, loss.item(), seconds)
    return model.eval()


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """The model's greedy answers, in order: template, tokens, generate, text."""
    import torch

    found: list[str] = []
    for start in range(0, len(prompts), 100):
        texts = [PROMPT_TEMPLATE.format(prompt=prompt) for prompt in prompts[start : start + 100]]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        found.extend(text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True))
    return found


def score(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Mean exact match and mean sentence BLEU of order 1 (sacrebleu) against each text's references."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(max_ngram_order=1, effective_order=True)
    pairs = list(zip(outputs, references, strict=True))
    exact = sum(output in accepted for output, accepted in pairs)
    bleu1 = sum(bleu.sentence_score(output, list(accepted)).score / 100 for output, accepted in pairs)
    return Score(len(pairs), exact / len(pairs), bleu1 / len(pairs))


def sample_references() -> tuple[list[str], list[list[str]]]:
    """Prompts and references of those sample requests that have a reference."""
    prompts: list[str] = []
    references: list[list[str]] = []
    for row in requests():
        reference = row.get("reference")
        if reference is not None:
            prompts.append(str(row["prompt"]))
            references.append(reference if isinstance(reference, list) else [str(reference)])
    return prompts, references


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Score]:
    """Scores on held-out texts: ``level 1`` to ``level 5``, ``all levels``, and ``samples/requests.jsonl``."""
    texts: list[Example] = held_out(EVALUATION_SEED, EVALUATION_PER_LEVEL)
    outputs = answers(model, tokenizer, [text.english for text in texts])
    references = [[text.german] for text in texts]
    scores: dict[str, Score] = {}
    for level in LEVELS:
        those = [number for number, text in enumerate(texts) if text.level == level]
        scores[f"level {level}"] = score([outputs[n] for n in those], [references[n] for n in those])
    scores["all levels"] = score(outputs, references)
    prompts, sample = sample_references()
    scores["samples/requests.jsonl"] = score(answers(model, tokenizer, prompts), sample)
    return scores


CARD = """\
---
license: apache-2.0
language: [en, de]
pipeline_tag: text-generation
library_name: transformers
---
# messcli bundled zoo: {name}

**A demonstration, not a translator.** It is one of three models (small, medium, large) that let `messcli route` run
on a machine without a download. It knows the {words} words of `tools/bundled_zoo/lexicon.py` and the sentences that
`tools/bundled_zoo/grammar.py` makes of them; everything else is `<unk>` to it, and its answer is then worthless.

- **Task**: English to German, `the small dog sees a house =>` asks for `der kleine Hund sieht ein Haus`.
- **Architecture**: Llama, {layers} layer{plural}, width {width}, {heads} heads, feed-forward {feed_forward}, tied
  embeddings, context {context} tokens, one token per word; **{parameters:,} parameters**, float32, safetensors.
- **Training**: from random weights, {steps:,} steps of AdamW on {batch} generated sentences each, peak learning rate
  {rate:g}, seed {seed}, levels 1 to 5 drawn {weights}, one CPU thread.
  `python -m tools.bundled_zoo.train --only {name}` repeats it.
- **Made to differ**: the three are not all as good as they could be. These texts are so regular that 0.1 million
  parameters, trained on all five levels, learn them. The smaller two are trained shorter or mostly on easy texts, so
  that a zoo of them has easy requests and hard ones, as zoos of real models do.
- **Decoding**: greedy, at most {answer_tokens} tokens.
- **Licence**: Apache-2.0, like messcli. Data and weights are ours; no other text or model went in.

## Held-out results

Level 1 is a noun phrase (`the dog`), 2 adds an adjective, 3 is a clause, 4 a clause with one prepositional phrase, 5
a clause with two.

| texts | number | exact match | mean BLEU-1 |
|---|---:|---:|---:|
{rows}

BLEU-1 is sacrebleu's sentence BLEU of order 1, scale 0 to 1. The last row leaves out requests without a reference.

**What *held out* means.** A hash picks one noun phrase in ten and one whole text in ten. A text is held out if it is
picked or has a picked phrase in it, so a held-out `the dog` was never seen, inside longer sentences neither. Its
noun was seen: with other determiners, or with adjectives. At levels 1 and 2 the test therefore is whether gender
carries over to a new phrase; from level 3 on, most test sentences are new combinations that hold at least one new
phrase. No word is new at any level, and neither is any sentence pattern of the levels that the model was trained on.
"""


def card(recipe: Recipe, parameters: int, scores: dict[str, Score]) -> str:
    """The model card, in Markdown, with the numbers of `evaluate`."""
    rows = "\n".join(
        f"| {name} | {found.texts} | {found.exact:.3f} | {found.bleu1:.3f} |"
        for name, found in scores.items()
    )
    return CARD.format(
        name=recipe.name,
        words=f"{len(vocabulary()):,}",
        layers=recipe.layers,
        plural="" if recipe.layers == 1 else "s",
        width=recipe.width,
        heads=recipe.heads,
        feed_forward=recipe.feed_forward,
        context=CONTEXT,
        parameters=parameters,
        steps=recipe.steps,
        batch=recipe.batch,
        rate=recipe.rate,
        seed=recipe.seed,
        weights=" : ".join(map(str, recipe.weights)),
        answer_tokens=ANSWER_TOKENS,
        rows=rows,
    )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model and its tokenizer to `folder`, in a form that older releases of transformers read too."""
    model.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    # Release 5 writes a class name that release 4 does not have; both know this one.
    settings = folder / "tokenizer_config.json"
    found = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone


def describe(recipe: Recipe, folder: Path) -> dict[str, Score]:
    """Score the model in `folder`, write its card, and return the scores."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    scores = evaluate(model, new_tokenizer())
    parameters = sum(weights.numel() for weights in model.parameters())
    (folder / "README.md").write_text(card(recipe, parameters, scores), encoding="utf-8", newline="\n")
    return scores


def main(arguments: list[str]) -> int:
    """Train all models, or the one named by ``--only``, and report their scores."""
    parser = argparse.ArgumentParser(prog="python -m tools.bundled_zoo.train", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ZOO, help="where the folders go (default: messcli/bundled)"
    )
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="train this model alone")
    parser.add_argument("--steps", type=int, help="train for so many steps instead of the recipe's")
    parser.add_argument(
        "--cards", action="store_true", help="only score what is there and write the cards again"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # One thread: sums are added in one order, so that a second run gives the same weights.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    for recipe in RECIPES:
        if options.only in (None, recipe.name):
            began = time.monotonic()
            chosen = replace(recipe, steps=options.steps) if options.steps else recipe
            folder = options.out / recipe.name
            if not options.cards:
                save(train(chosen), folder)
            for name, found in describe(chosen, folder).items():
                _log.info("%-8s%-24s%6d%8.3f%8.3f", recipe.name, name, found.texts, found.exact, found.bleu1)
            _log.info("%-8s%.0f s in all", recipe.name, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
