"""Texts that a model reads and must not obey: they stand between marks that depend on the texts themselves.

Knows text alone. Whoever wrote an answer can't have known its digest, and so can't have closed its marks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b


def marks(texts: Sequence[str]) -> dict[str, str]:
    """The fields {open} and {close} of a template that is to hold `texts`."""
    digest = blake2b("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return {"open": f"<<<{digest}", "close": f"{digest}>>>"}


def filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with its fields, in one pass: what stands in a text isn't looked at for further fields."""
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda found: fields[found[1]], template)


def template_of(text: str | None, default: str) -> str:
    """A template, checked. Raises ValueError: it lacks {request} or {answer}."""
    template = default if text is None else text
    for field in ("{request}", "{answer}"):
        if field not in template:
            raise ValueError(f"lacks {field}")
    return template
