"""From a request to token ids: templates, chat templates, and the line between text and control tokens.

Prompts are untrusted text. They reach the model as text: a control token spelled out in a prompt, such as
"<|im_end|>", is encoded as the characters it is made of. Control tokens count where trusted files put
them: the tokenizer's chat template and zoo.toml's prompt_template. Knows tokenizers; knows no model.
"""

from __future__ import annotations

import re
import secrets
from array import array
from typing import Any

from messcli.errors import ModelError
from messcli.models.templates import TemplateRefused, renderer
from messcli.records import Request
from messcli.zoo import ModelSpec

# Tokens of prompts that are kept encoded between `length` and the answer: 4 bytes each. A window's prompts are
# encoded once if they have fewer tokens together.
REMEMBERED_TOKENS = 8_000_000
MOST_STOPPED = 3  # renderings that limits may end before the template is at fault, and not its messages


class PromptEncoder:
    """Renders and encodes requests as one model of the zoo takes them.

    Args:
        spec: the model's templates.
        tokenizer: of transformers.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._controls = _control_tokens(tokenizer)
        self._break = f"\ue000{secrets.token_hex(8)}\ue001"  # no prompt can guess it
        self._ends = _special_ends(tokenizer)
        self._encoded: dict[bytes, tuple[Request, array[int] | str]] = {}
        self._remembered = 0  # tokens
        self._stopped = 0  # renderings that the limits ended
        self._folded = False  # a system prompt became part of a user's turn
        self._warnings: list[str] = []

    def length(self, request: Request) -> int:
        """In tokens, special ones included. A chat that the template refuses counts as plain text."""
        encoded = self.encode(request)
        if isinstance(encoded, str):
            return len(self._ids(self._spec.fill_template(request.prompt), special=True))
        return len(encoded)

    def encode(self, request: Request) -> array[int] | str:
        """The prompt's token ids, or why the model's chat template refuses the request."""
        key = key_of(request)
        known = self._encoded.get(key)
        if known is not None and (known[0].prompt, known[0].messages) == (request.prompt, request.messages):
            return known[1]
        encoded: array[int] | str
        try:
            text, special = self.render(request)
        except TemplateRefused as refused:
            encoded = f'model "{self._spec.name}": its chat template refuses the messages: {refused}'
            self._stopped += refused.limit
            if self._stopped > MOST_STOPPED:
                raise ModelError(
                    f'model "{self._spec.name}": its chat template was stopped {self._stopped} times (it '
                    f"{refused}). Set chat_template = false or a prompt_template in zoo.toml, or mend the template"
                ) from None
        else:
            encoded = self._ids(text, special=special)
        self._forget(key)
        while self._remembered + len(encoded) > REMEMBERED_TOKENS and self._encoded:
            self._forget(next(iter(self._encoded)))  # the oldest
        self._encoded[key] = (request, encoded)
        self._remembered += len(encoded)
        return encoded

    def _forget(self, key: bytes) -> None:
        _, encoded = self._encoded.pop(key, (None, ""))
        self._remembered -= len(encoded)

    def render(self, request: Request) -> tuple[str, bool]:
        """The text for the model, control tokens of the prompt broken, and whether to add special tokens."""
        spec, tokenizer = self._spec, self._tokenizer
        as_chat = spec.chat_template
        if as_chat is None:
            as_chat = bool(tokenizer.chat_template) and (
                request.messages is not None or spec.prompt_template is None
            )
        if not as_chat:
            text = spec.fill_template(self._broken(request.prompt))
            return (f"{spec.system_prompt}\n\n{text}" if spec.system_prompt else text), True
        if request.messages is not None:
            chat = [
                {key: self._broken(value) if isinstance(value, str) else value for key, value in turn.items()}
                for turn in request.messages
            ]
        else:
            chat = [{"role": "user", "content": spec.fill_template(self._broken(request.prompt))}]
        if spec.system_prompt and not any(turn.get("role") == "system" for turn in chat):
            chat.insert(0, {"role": "system", "content": spec.system_prompt})
        options = {**tokenizer.special_tokens_map, **spec.chat_options}
        return self._rendered(chat, options), False  # the template writes its own special tokens

    def _rendered(self, chat: list[dict[str, Any]], options: dict[str, Any]) -> str:
        """A chat by the template; where that refuses system prompts or leaves them out, they begin the user's turn."""
        template = self._tokenizer.get_chat_template()
        system = [turn["content"].strip() for turn in chat if turn.get("role") == "system"]
        refused: TemplateRefused | None = None
        try:
            text = renderer().render(template, chat, options)
            if all(one in text for one in system):
                return text
        except TemplateRefused as error:
            if error.limit or not system:
                raise
            refused = error
        try:
            folded = renderer().render(template, _without_system(chat), options)
        except TemplateRefused:
            if refused is None:
                return text
            raise refused from None
        if not self._folded:
            self._folded = True
            told = "its chat template knows no system prompt: it begins the turn of the user after it"
            self._warnings.append(f'model "{self._spec.name}": {told}')
        return folded

    def take_warnings(self) -> list[str]:
        """What the user should know of, once."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def _broken(self, text: str) -> str:
        """`text` with a mark inside every control token, where `_ids` cuts: none is matched over a cut."""
        if self._controls is None:
            return text
        return self._controls.sub(lambda match: match[0] + self._break, text)

    def _ids(self, text: str, *, special: bool) -> array[int]:
        """Token ids; `special`: with the tokenizer's own at both ends, once even where a template writes them."""
        pieces = [piece for piece in text.split(self._break) if piece]
        ids = [
            index
            for piece in pieces
            for index in self._tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        if special:
            before, after = self._ends
            ids = ids if before and ids[: len(before)] == before else [*before, *ids]
            ids = ids if after and ids[-len(after) :] == after else [*ids, *after]
        return array("i", ids)


def _without_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with each system prompt at the beginning of the user's turn after it, else as one of its own."""
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    for turn in chat:
        if turn.get("role") == "system":
            waiting.append(turn["content"])
        elif turn.get("role") == "user" and waiting:
            turns.append({**turn, "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            turns.append(turn)
    if waiting:
        turns.append({"role": "user", "content": "\n\n".join(waiting)})
    return turns


def key_of(request: Request) -> bytes:
    """What tells a request from others, also where it came from no file."""
    return request.key or str(request.id).encode("utf-8", "surrogatepass")


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Where a control token begins: its first character, if the rest follows.

    Control tokens are the special ones and the added ones that the chat template writes. Those of a single
    character can't be cut, and blank ones are ordinary text.
    """
    template = str(tokenizer.chat_template or "")
    found = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or token.content in template) and len(token.content.strip()) > 1
    }
    if not found:
        return None
    # a lookahead, so that overlapping tokens are all found
    starts = sorted(found, key=len, reverse=True)
    return re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in starts))


def _special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
