"""What a token is shown as."""

from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """The text that a token stands for, never empty.

    A token without text of its own is shown as the vocabulary writes it, and an id that the tokenizer has no token
    for (embeddings are often padded beyond the vocabulary) as "<id 151700>".
    """
    text: str = tokenizer.decode([token])
    if text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    return piece or f"<id {token}>"
