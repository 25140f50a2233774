"""Metrics: what one output is worth against its references, from 0 to 1. Knows nothing of models or requests.

base        what a metric is: a function, a signature, and the checks around it
words       text as words, by script
overlap     bleu1, rouge1, rougeL, chrf: words or characters in common
answers     exact, normalized, contains, number: one short answer
choice      choice: an option's letter or text
reasoning   the part of an output that is no answer
own         a user's function, written as module:function
"""

from __future__ import annotations

import inspect

from messcli.errors import MetricError
from messcli.metrics.base import ROUNDING, Metric, failure_words, keeps, with_failures
from messcli.metrics.own import own
from messcli.metrics.words import AUTO
from messcli.registry import METRICS

__all__ = [
    "AUTO", "DEFAULT_METRIC", "ROUNDING", "Metric", "failure_words", "keeps", "load_metric", "with_failures",
]  # fmt: skip

DEFAULT_METRIC = "bleu1"


def load_metric(name: str, tokenizer: str = AUTO) -> Metric:
    """A metric of the registry by name, or the user's own as "module:function".

    The user's function takes (output, references) and returns a number from 0 to 1.

    Args:
        tokenizer: how metrics of words split text: a name of `messcli.metrics.words.TOKENIZERS`. Others ignore it.

    Raises:
        MetricError: there is no such metric, module, function or tokenizer.
    """
    if ":" in name:
        return own(name)
    if name not in METRICS:
        raise MetricError(f"{METRICS.unknown(name)}, or your own as module:function")
    create = METRICS.load(name)
    splits = "tokenizer" in inspect.signature(create).parameters
    metric: Metric = create(tokenizer=tokenizer) if splits else create()
    return metric
