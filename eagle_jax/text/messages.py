"""Checks the messages of a conversation, `{"role": ..., "content": ...}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant")


def check_messages(messages: Any) -> None:
    """Checks the shape of a conversation.

    Raises:
        ValueError: it is not a non-empty list of `{"role", "content"}` with known roles and text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"messages={short(messages)}: must be a non-empty list of "
            '{"role": ..., "content": ...}'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f'messages[{i}]={short(message)}: must be {{"role": ..., "content": ...}}'
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role={short(role)}: must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"messages[{i}].content={short(content)}: must be a string")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"messages[{i}].content={short(content)}: holds a lone surrogate; "
                "write characters outside the basic plane as surrogate pairs"
            ) from error


def short(value: Any) -> str:
    """Returns the value's `repr` for an error message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
