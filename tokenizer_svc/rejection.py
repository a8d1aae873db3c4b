"""How a request is refused: the one place that turns an error into its terminal message."""

from __future__ import annotations

from stages.errors import RequestError
from stages.messages import ChatPrompt, Detokenize, Generate, Prompt, RequestRejected, Tokenize

# `/tokenize` and `/detokenize` live outside the epochs: nothing of them needs recovery.
NO_EPOCH = 0

# The code of a request that ended because the tokenizer failed on it, not because it was wrong.
TOKENIZER_ERROR = "tokenizer_error"


def reject(message: Generate | Tokenize | Detokenize, error: RequestError) -> RequestRejected:
    """Give the terminal message that ends `message` in `error`."""
    epoch = message.epoch if isinstance(message, Generate) else NO_EPOCH
    return RequestRejected(
        message.request_id, epoch, error.status, error.code, error.message, error.param
    )


def prompt_param(prompt: Prompt) -> str:
    """Name the field of the HTTP request that the prompt came in."""
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"
