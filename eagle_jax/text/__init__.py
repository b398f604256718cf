"""Text to token ids and back: tokenizers, chat templates, files of conversations.

No other package handles text; the rest of the library works on token ids.
"""

from eagle_jax.text.conversations import (
    encode_files,
    read_conversations,
    read_prompts,
    read_requests,
)
from eagle_jax.text.messages import ROLES, Message, check_messages
from eagle_jax.text.streaming import StreamDecoder
from eagle_jax.text.tokenizer import Tokenizer

__all__ = [
    "ROLES",
    "Message",
    "StreamDecoder",
    "Tokenizer",
    "check_messages",
    "encode_files",
    "read_conversations",
    "read_prompts",
    "read_requests",
]
