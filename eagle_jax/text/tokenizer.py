"""Tokenizers from Hugging Face directories, without `transformers`.

A directory holds `tokenizer.json` and optionally `tokenizer_config.json` (special tokens, chat
template) and `generation_config.json` (end tokens).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from eagle_jax.inputs import one_line, read_object
from eagle_jax.text.chat_template import compile_template, template_text
from eagle_jax.text.messages import Message, check_messages, short

# Delimits escaped text in a rendered template. It is a Unicode noncharacter, so text rarely
# contains it; if it does, it is escaped like a special token.
_MARK = "\ufdd0"
_ESCAPED = re.compile(f"{_MARK}(\\d+){_MARK}")
_DOWNLOAD = "download the file again, or correct it"


class Tokenizer:
    """A tokenizer with a chat template; encodes and decodes texts and conversations.

    Only the chat template produces special tokens: text that spells one, in a message or given to
    `encode`, is encoded as ordinary characters.

    Attributes:
        vocab_size: number of ids, including added tokens.
        eos_ids: ids that end an answer; empty if the files name none.
        bos_id: id that begins a text, or None.
        chat_template: Jinja source, or None.
        digest: SHA-256 (hexadecimal) of `tokenizer.json` and the chat template.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    chat_template: str | None
    digest: str

    def __init__(
        self,
        source: str,
        tokenizer_config: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
    ):
        """Builds a tokenizer from the contents of its files.

        Args:
            source: text of `tokenizer.json`.
            tokenizer_config: content of `tokenizer_config.json`.
            generation_config: content of `generation_config.json`.

        Raises:
            ValueError: `source` is not a tokenizer, or a key of the others has a wrong type.
        """
        config = tokenizer_config or {}
        # Two tokenizers of one vocabulary, since `encode_special_tokens` is set per object.
        self._template = _from_json(source)
        self._plain = _from_json(source)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._template, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()

        added = self._template.get_added_tokens_decoder().values()
        specials = [token.content for token in added if token.special]
        # Longest first, so that a token which is a prefix of another one does not match first.
        self._escapes = sorted([*specials, _MARK], key=len, reverse=True)
        self._unsafe = re.compile("|".join(map(re.escape, self._escapes)))

        self._strings = {
            name: _token_text(name, config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.vocab_size = self._template.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._token_id(self._strings["bos_token"])
        self.eos_ids = self._find_eos(generation_config or {})
        self.chat_template = template_text(config.get("chat_template"))
        self._compiled = None
        try:
            content = source.encode() + b"\0" + (self.chat_template or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"chat_template: holds a lone surrogate ({error})") from error
        self.digest = hashlib.sha256(content).hexdigest()

    def __repr__(self) -> str:
        ends = ", ".join(map(str, self.eos_ids)) or "none"
        chat = "with" if self.chat_template else "without"
        return f"Tokenizer({self.vocab_size} tokens, ends: {ends}, {chat} chat template)"

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Returns the tokenizer of a directory or of a `tokenizer.json` and the files beside it.

        Raises:
            ValueError: the file is missing or is not a tokenizer.
        """
        path = Path(path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(
                f"tokenizer={str(path)!r}: not found; give a directory with tokenizer.json"
            )
        config = read_object(file.parent / "tokenizer_config.json", _DOWNLOAD)
        template = file.parent / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = _read_text(template)
        generation = read_object(file.parent / "generation_config.json", _DOWNLOAD)
        try:
            return cls(_read_text(file), config, generation)
        except ValueError as error:
            raise ValueError(f"tokenizer={str(file)!r}: {error}; {_DOWNLOAD}") from error

    def __eq__(self, other: object) -> bool:
        """Returns whether both tokenizers give the same ids and have the same end tokens."""
        return isinstance(other, Tokenizer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self.digest, self.eos_ids, tuple(self._strings.values())

    def __getstate__(self) -> dict[str, Any]:
        # Compiled templates cannot be pickled, and pickling drops `encode_special_tokens`.
        return {**self.__dict__, "_compiled": None, "_plain": self._plain.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain = tokenizers.Tokenizer.from_str(state["_plain"])
        self._plain.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; adds no special token and recognises none in the text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._template.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation in the model's chat format.

        Args:
            messages: turns `{"role": "system" | "user" | "assistant", "content": text}`.
            add_generation_prompt: append the header of the assistant's next answer.

        Raises:
            ValueError: there is no chat template, or it cannot render the messages.
        """
        check_messages(messages)
        text = self._render(self._escape(messages), add_generation_prompt)
        [encoded] = self._encode_rendered([text])
        return [token for token, _, _ in encoded]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Returns the ids of a whole conversation and a mask of the assistant's tokens.

        Returns:
            Ids and mask of the same length. The mask is 1 on the tokens of assistant turns,
            including the token that ends each turn, and 0 elsewhere.

        Raises:
            ValueError: there is no assistant turn, or the chat template cannot render the messages.
        """
        return self.conversations([messages])[0]

    def conversations(
        self, batch: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[int]]]:
        """Returns `conversation` of many conversations, encoded on all cores."""
        texts, answers = [], []
        for messages in batch:
            check_messages(messages)
            text, spans = self._render_answers(self._escape(messages))
            texts.append(text)
            answers.append(spans)
        encoded = self._encode_rendered(texts)
        return [self._mask(*item) for item in zip(encoded, answers, strict=True)]

    def _token_id(self, text: str | None) -> int | None:
        return None if text is None else self._template.token_to_id(text)

    def _find_eos(self, generation_config: dict[str, Any]) -> tuple[int, ...]:
        ids = generation_config.get("eos_token_id")
        if ids is None:
            ids = self._token_id(self._strings["eos_token"])
        if ids is None:
            return ()
        found = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
        for token in found:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"eos_token_id={short(ids)} in generation_config.json: must be a token id, or "
                    f"a list of them, from 0 to {self.vocab_size - 1}"
                )
        return found

    def _escape(self, messages: Sequence[Message]) -> list[Message]:
        def mark(match: re.Match[str]) -> str:
            return f"{_MARK}{self._escapes.index(match[0])}{_MARK}"

        return [{**m, "content": self._unsafe.sub(mark, m["content"])} for m in messages]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        import jinja2

        if self._compiled is None:
            self._compiled = compile_template(self.chat_template)
        strings = {name: text for name, text in self._strings.items() if text is not None}
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **strings
            )
        except Exception as error:  # a template's expressions can raise anything
            roles = ", ".join(message["role"] for message in messages)
            said = one_line(error)
            if not isinstance(error, jinja2.TemplateError):
                said = f"{type(error).__name__}: {said}"
            raise ValueError(
                f"messages with roles ({roles}): the chat template refuses them: {said}"
            ) from error

    def _render_answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the rendered conversation and the character span of each answer in it."""
        text = self._render(messages, False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True)
            after = self._render(messages[: i + 1], False) if i + 1 < len(messages) else text
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"messages[{i}]: the chat template renders this turn differently once others "
                    "follow; use a template that only appends"
                )
            spans.append((len(before), len(after)))
        if not spans:
            raise ValueError("messages: no assistant turn; add one with role 'assistant'")
        return text, spans

    def _encode_rendered(self, texts: Sequence[str]) -> list[list[tuple[int, int, int]]]:
        """Returns (id, first character, end character) of every token of rendered templates."""
        pieces = [_ESCAPED.split(text) for text in texts]  # template, escape, template, ...
        # A text without escapes is one piece, so it is encoded as a whole.
        flat = [piece for parts in pieces for piece in parts[::2]]
        encodings = iter(self._template.encode_batch(flat, add_special_tokens=False))
        return [self._join(parts, encodings) for parts in pieces]

    def _join(
        self, parts: Sequence[str], encodings: Iterator[tokenizers.Encoding]
    ) -> list[tuple[int, int, int]]:
        tokens, shift = [], 0
        for i, part in enumerate(parts):
            if i % 2:
                spelled = self._escapes[int(part)]
                end = shift + len(part) + 2 * len(_MARK)
                tokens += [(token, shift, end) for token in self.encode(spelled)]
                shift = end
                continue
            encoding = next(encodings)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            tokens += [(token, shift + start, shift + end) for token, (start, end) in spans]
            shift += len(part)
        return tokens

    def _mask(
        self, tokens: Sequence[tuple[int, int, int]], answers: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        ids = [token for token, _, _ in tokens]
        mask = [0] * len(ids)
        position = 0
        for first, end in answers:
            while position < len(ids) and _before(tokens[position], first):
                position += 1
            begin = position
            while position < len(ids) and tokens[position][1] < end:
                position += 1
            # The model does not generate what a template puts after the end-of-turn token, such as
            # a newline.
            ends = [i for i in range(begin, position) if ids[i] in self.eos_ids]
            stop = ends[-1] + 1 if ends else position
            mask[begin:stop] = [1] * (stop - begin)
        return ids, mask


def _before(token: tuple[int, int, int], first: int) -> bool:
    _, start, end = token
    return start < first and end <= first


def _from_json(source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"not a tokenizer.json ({one_line(error)})") from error


def _token_text(name: str, token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is None and not isinstance(token, dict):
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name}={short(token)} in tokenizer_config.json: must be a string")
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); {_DOWNLOAD}") from error
