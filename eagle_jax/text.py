"""Text to token ids and back: tokenizers, chat templates, conversation files.

The only module that knows text; everything else in the library sees token ids.
A tokenizer is a directory in Hugging Face's layout: `tokenizer.json`, and beside it
`tokenizer_config.json` (special tokens, chat template) and `generation_config.json` (end tokens).
`transformers` is not needed.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from eagle_jax.inputs import one_line, parse_json, read_lines, read_object

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
# Wraps escaped text in a rendered template. A Unicode noncharacter, so text rarely has it; where
# text does, it is escaped like a special token.
_MARK = "\ufdd0"
_ESCAPED = re.compile(f"{_MARK}(\\d+){_MARK}")
_INCOMPLETE = "\ufffd"
_DOWNLOAD = "download the file again, or correct it"


class Tokenizer:
    """Token ids of texts and conversations.

    Special tokens come from the chat template only: text that spells one, in a message or given
    to `encode`, is encoded as ordinary characters.

    Attributes:
        vocab_size: number of ids, added tokens included.
        eos_ids: ids that end an answer; empty if the files name none.
        bos_id: id that opens a text, or none.
        chat_template: Jinja source, or none.
        digest: sha256 (hex) of `tokenizer.json` and the chat template.
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
        # Two views of one vocabulary, because the switch is a property of the object.
        self._template = _from_json(source)
        self._plain = _from_json(source)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._template, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()

        added = self._template.get_added_tokens_decoder().values()
        specials = [token.content for token in added if token.special]
        # Longest first, so that a token which is a prefix of another does not cut it in two.
        self._escapes = sorted([*specials, _MARK], key=len, reverse=True)
        self._unsafe = re.compile("|".join(map(re.escape, self._escapes)))

        self._strings = {
            name: _token_text(name, config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.vocab_size = self._template.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._token_id(self._strings["bos_token"])
        self.eos_ids = self._find_eos(generation_config or {})
        self.chat_template = _template_text(config.get("chat_template"))
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
        """Reads a directory that holds `tokenizer.json`, or that file and its neighbours.

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
        """Whether both give the same ids, and end answers alike."""
        return isinstance(other, Tokenizer) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        return self.digest, self.eos_ids, tuple(self._strings.values())

    def __getstate__(self) -> dict[str, Any]:
        # A compiled template is code, and a pickled tokenizer forgets `encode_special_tokens`.
        return {**self.__dict__, "_compiled": None, "_plain": self._plain.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain = tokenizers.Tokenizer.from_str(state["_plain"])
        self._plain.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token is added, none is recognised in the text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._template.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's chat format.

        Args:
            messages: turns `{"role": "system" | "user" | "assistant", "content": text}`.
            add_generation_prompt: end where the assistant's next answer begins.

        Raises:
            ValueError: no chat template, or messages it cannot render.
        """
        check_messages(messages)
        text = self._render(self._escape(messages), add_generation_prompt)
        [encoded] = self._encode_rendered([text])
        return [token for token, _, _ in encoded]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation, and which of them the assistant wrote.

        Returns:
            ids and mask of one length; the mask is 1 on the tokens of assistant turns, the
            token that ends each included, and 0 elsewhere.

        Raises:
            ValueError: no assistant turn, or messages that the chat template cannot render.
        """
        return self.conversations([messages])[0]

    def conversations(
        self, batch: Sequence[Sequence[Message]]
    ) -> list[tuple[list[int], list[int]]]:
        """`conversation` of many, encoded on all cores."""
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
                    f"eos_token_id={_short(ids)} in generation_config.json: must be a token id, or "
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
            self._compiled = _compile_template(self.chat_template)
        strings = {name: text for name, text in self._strings.items() if text is not None}
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **strings
            )
        except Exception as error:  # a template may fail in any way that an expression can
            roles = ", ".join(message["role"] for message in messages)
            said = one_line(error)
            if not isinstance(error, jinja2.TemplateError):
                said = f"{type(error).__name__}: {said}"
            raise ValueError(
                f"messages with roles ({roles}): the chat template refuses them: {said}"
            ) from error

    def _render_answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Rendered conversation and the character span of each answer in it."""
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
        """(id, first character, end character) of every token of rendered templates."""
        pieces = [_ESCAPED.split(text) for text in texts]  # template, escape, template, ...
        # A text without escapes is one piece: the ids are those of encoding it as a whole.
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
            # What a template puts behind the end-of-turn token, such as a newline, is not
            # generated by the model.
            ends = [i for i in range(begin, position) if ids[i] in self.eos_ids]
            stop = ends[-1] + 1 if ends else position
            mask[begin:stop] = [1] * (stop - begin)
        return ids, mask


class StreamDecoder:
    """Turns ids that arrive in chunks into text that can be printed at once.

    Characters whose bytes are still incomplete are held back until the rest arrives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Printed ids before the pending ones: some tokenizers drop the first token's space.
        self._context: list[int] = []
        self._pending: list[int] = []
        self._printed = 0

    def feed(self, ids: Iterable[int]) -> str:
        """Adds ids; returns the text that became certain, often empty."""
        self._pending += ids
        text = self._text()
        certain = text.rstrip(_INCOMPLETE)
        new = certain[self._printed :]
        self._printed = len(certain)
        if certain == text:
            self._context = self._pending if text else self._context
            self._pending, self._printed = [], 0
        return new

    def flush(self) -> str:
        """Ends the stream; returns what was held back, incomplete bytes as U+FFFD."""
        new = self._text()[self._printed :]
        self._context, self._pending, self._printed = [], [], 0
        return new

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip_special)
        both = self._tokenizer.decode(self._context + self._pending, self._skip_special)
        return both[len(before) :]


def check_messages(messages: Any) -> None:
    """Checks the shape of a conversation.

    Raises:
        ValueError: not a non-empty list of `{"role", "content"}` with a known role and text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"messages={_short(messages)}: must be a non-empty list of "
            '{"role": ..., "content": ...}'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f'messages[{i}]={_short(message)}: must be {{"role": ..., "content": ...}}'
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f"messages[{i}].role={_short(role)}: must be one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(f"messages[{i}].content={_short(content)}: must be a string")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"messages[{i}].content={_short(content)}: holds a lone surrogate; "
                "write characters outside the basic plane as surrogate pairs"
            ) from error


def read_conversations(path: str | Path) -> Iterator[list[Message]]:
    """Reads conversations from JSONL, plain or gzip (`.gz`); blank lines are skipped.

    Each line is `{"messages": [{"role": ..., "content": ...}, ...]}`; other keys are ignored.

    Raises:
        ValueError: the file is missing or a line is not a conversation with an assistant turn;
            names the file and the line, counted from 1.
    """
    for where, messages, _ in _read_records(path):
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(f"{where}: no assistant turn to learn from; add one or drop the line")
        yield messages


def encode_files(
    files: Iterable[str | Path], tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and mask (`Tokenizer.conversation`) of every conversation of `files`, with a bar.

    Raises:
        ValueError: as `read_conversations` and `Tokenizer.conversation`.
    """
    import tqdm

    conversations = itertools.chain.from_iterable(map(read_conversations, files))
    with tqdm.tqdm(desc="tokenizing", unit=" conversations", disable=None) as bar:
        while chunk := list(itertools.islice(conversations, 512)):
            yield from tokenizer.conversations(chunk)
            bar.update(len(chunk))


def read_prompts(path: str | Path) -> Iterator[list[Message]]:
    """Reads what is to be answered: each conversation up to its last user message.

    Raises:
        ValueError: as `read_conversations`; a conversation without a user message.
    """
    for _, messages, _ in read_requests(path):
        yield messages


def read_requests(path: str | Path) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
    """Reads what is to be answered, with `file:line` and the whole record of every line.

    Raises:
        ValueError: as `read_prompts`.
    """
    for where, messages, record in _read_records(path):
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise ValueError(f"{where}: no user message to answer; add one or drop the line")
        yield where, messages[: users[-1] + 1], record


def _read_records(path: str | Path) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
    """`file:line`, the checked messages and the whole record of every line."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"conversations={str(path)!r}: no such file; give a .jsonl or .jsonl.gz")
    for number, line in read_lines(path):
        record = _parse_record(line, f"{path}:{number}")
        yield f"{path}:{number}", record["messages"], record


def _parse_record(line: bytes, where: str) -> dict[str, Any]:
    record = parse_json(line, where, "write one object a line")
    if not isinstance(record, dict) or "messages" not in record:
        raise ValueError(f'{where}: no "messages"; write {{"messages": [...]}} on every line')
    try:
        check_messages(record["messages"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return record


def _compile_template(template: str | None) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if template is None:
        raise ValueError("chat_template=None: add one to tokenizer_config.json, or use encode()")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, ValueError, RecursionError) as error:
        raise ValueError(f"chat_template: not a Jinja template ({one_line(error)})") from error


def _before(token: tuple[int, int, int], first: int) -> bool:
    _, start, end = token
    return start < first and end <= first


def _from_json(source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"not a tokenizer.json ({one_line(error)})") from error


def _template_text(template: Any) -> str | None:
    found = template
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        # Several, by name.
        found = next((e.get("template") for e in template if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"chat_template={_short(template)} in tokenizer_config.json: must be a string"
        )
    return found


def _token_text(name: str, token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is None and not isinstance(token, dict):
        return None
    if not isinstance(text, str):
        raise ValueError(f"{name}={_short(token)} in tokenizer_config.json: must be a string")
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); {_DOWNLOAD}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
