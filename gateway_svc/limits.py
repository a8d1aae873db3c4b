"""What one HTTP request may ask for; every limit answers with a 4xx that names the field."""

from __future__ import annotations

MAX_JSON_DEPTH = 64
MAX_PROMPTS = 256
MAX_N = 128
MAX_CHOICES = 1024
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_LOGPROBS = 20
MAX_CACHE_SALT_CHARS = 1024
MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_VALUE_CHARS = 256

MAX_PROMPT_BYTES_PER_TOKEN = 16
"""A text longer than this many bytes for each token of context is refused before tokenizing."""

MAX_BACKLOG_PER_REQUEST = 8192
"""Deltas that may wait for a client that reads too slowly; then its request is aborted."""

BODY_TIMEOUT_S = 60.0
"""A body that takes longer to arrive is refused with 408."""

WRITE_TIMEOUT_S = 60.0
"""A client that takes nothing for this long has left."""

RETRY_AFTER_S = 1
"""What a 503 tells the client in `Retry-After`."""
