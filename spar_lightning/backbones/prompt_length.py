"""Prompts that are longer than the context of a text encoder: the tokenizer cuts them, and a warning names them."""

import logging
import reprlib
from collections.abc import Sequence
from typing import Any

log = logging.getLogger("spar_lightning")


def token_counts(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each prompt before it is cut, with the start and end tokens.

    Args:
        tokenizer: `SimpleTokenizer` or `HFTokenizer` of open_clip.
        prompts: Prompts.
    """
    if hasattr(tokenizer, "encode"):  # SimpleTokenizer
        return [len(tokenizer.encode(prompt)) + 2 for prompt in prompts]
    texts = [tokenizer.clean_fn(prompt) for prompt in prompts]
    return [len(tokens) for tokens in tokenizer.tokenizer(texts, verbose=False)["input_ids"]]


def warn_if_cut(prompts: Sequence[str], counts: Sequence[int], context: int) -> None:
    """Log one warning for the prompts of a class name if the longest one exceeds the context of the text encoder.

    Args:
        prompts: Prompts.
        counts: Number of tokens of each prompt.
        context: Largest number of tokens that the text encoder reads.
    """
    count, prompt = max(zip(counts, prompts, strict=True))
    if count > context:
        text = reprlib.Repr()
        text.maxstring = 120  # both ends of the name stay visible
        log.warning(
            f"The prompt {text.repr(prompt)} has {count} tokens, but the text encoder reads only {context}. The rest "
            "is ignored. Shorten the class name."
        )
