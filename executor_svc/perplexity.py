"""`headrace perplexity`: what rounding a model's weights costs, as perplexity on one text.

Every contender reads the same tokens in the same windows; the first is what the others are
compared with. Lower is better; a text of its own kind says more than any other.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from executor_svc.batch import ForwardBatch, Span
from executor_svc.embedded.corpus import long_chats
from executor_svc.kv_cache import allocate_kv_cache
from executor_svc.model_config import ModelLoadError, load_model_config
from executor_svc.models.cpu import load_cpu_model
from executor_svc.models.model import Model
from executor_svc.quantization.schemes import NO_SCHEME, SCHEMES
from stages.errors import ConfigError
from stages.native_library import AUTO

# Kinds of weights: --dtype and --quantization of a server that has them.
WEIGHTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {name: (name, NO_SCHEME) for name in ("auto", "float32", "bfloat16", "float16")}
    | {name: ("auto", name) for name in SCHEMES}
)
COMPARED = ("float32", "bfloat16", "int8", "w8a8")
WINDOW_TOKENS, CHUNK_TOKENS, BLOCK_SIZE = 512, 128, 16
# A seed that no training has used, and more chats of it than anybody asks for.
TEXT_SEED, TEXT_CHATS = 1_000_003, 500
NOT_SCORED = -100

Piece = tuple[str, bool]  # a text, and whether it is scored
Token = tuple[int, bool]


@dataclass(frozen=True)
class Figure:
    """The perplexity of a text under one kind of weights, and the tokens that were scored."""

    weights: str
    perplexity: float
    num_tokens: int


def print_perplexity(
    folder: Path,
    text_path: str | None,
    weights: str,
    num_tokens: int,
    json_path: str | None,
    kernels: str = AUTO,
) -> int:
    """Print a line for each kind in the comma-separated `weights` ("": what there is to compare).

    `kernels`: see `load_cpu_model`.

    Raises:
        ConfigError: the model or the text cannot be read, or a kind of weights is unknown.
    """
    try:
        return _compare(folder, text_path, weights, num_tokens, json_path, kernels)
    except (ModelLoadError, OSError) as error:
        raise ConfigError(str(error)) from error


def _compare(
    folder: Path,
    text_path: str | None,
    weights: str,
    num_tokens: int,
    json_path: str | None,
    kernels: str,
) -> int:
    config = load_model_config(folder)
    default = COMPARED if config.quantization is None else ("auto",)
    names = weights.split(",") if weights else default
    for name in names:
        if name not in WEIGHTS:
            raise ConfigError(f"--weights {name} is not known; there are {', '.join(WEIGHTS)}")
    pieces = embedded_chats() if text_path is None else [(Path(text_path).read_text(), True)]
    tokens = _encode(folder, pieces, num_tokens)
    print(f"{'weights':<10} {'perplexity':>10} {'ratio':>8}")
    figures: list[Figure] = []
    for name in names:
        dtype, quantization = WEIGHTS[name]
        model = load_cpu_model(folder, config, dtype, quantization, kernels)
        figures.append(Figure(name, *perplexity(model, tokens)))
        found, ratio = figures[-1].perplexity, figures[-1].perplexity / figures[0].perplexity
        print(f"{name:<10} {found:10.4f} {ratio:8.4f}", flush=True)
    if json_path is not None:
        Path(json_path).write_text(json.dumps([asdict(figure) for figure in figures]))
    return 0


def perplexity(model: Model, tokens: Sequence[Token]) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of the scored tokens, and how many they are.

    The first token of each window is context only.
    """
    total, count = 0.0, 0
    for begin in range(0, len(tokens) - 1, WINDOW_TOKENS):
        window = tokens[begin : begin + WINDOW_TOKENS]
        for logits, targets in _predictions(model, window):
            loss = cross_entropy(logits, targets, reduction="sum", ignore_index=NOT_SCORED)
            total += float(loss)
            count += int((targets != NOT_SCORED).sum())
    return math.exp(total / max(count, 1)), count


def embedded_chats() -> Iterator[Piece]:
    """Chats like those that the embedded model learnt to answer; the answers are scored."""
    for chat in itertools.islice(long_chats(TEXT_SEED), TEXT_CHATS):
        for turn in chat:
            yield f"<|im_start|>{turn['role']}\n", False
            yield f"{turn['content']}<|im_end|>", turn["role"] == "assistant"
            yield "\n", False


@torch.inference_mode()
def _predictions(model: Model, window: Sequence[Token]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [n, vocab] and the tokens [n] that came, chunk by chunk through a window."""
    blocks = -(-len(window) // BLOCK_SIZE)
    cache = allocate_kv_cache(model.kv_spec, blocks + 1, BLOCK_SIZE)
    for begin in range(0, len(window) - 1, CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, len(window) - 1)
        ids = [token for token, _ in window[begin:end]]
        span = Span(ids, begin, [*range(1, blocks + 1)])
        batch = ForwardBatch.from_spans([span], BLOCK_SIZE)
        batch = replace(batch, logits_indices=torch.arange(len(ids)))
        coming = window[begin + 1 : end + 1]
        targets = [token if is_scored else NOT_SCORED for token, is_scored in coming]
        yield model.forward(batch, cache), torch.tensor(targets)


def _encode(folder: Path, pieces: Iterable[Piece], num_tokens: int) -> list[Token]:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"{path} is missing: download the model's tokenizer too")
    tokenizer = Tokenizer.from_file(str(path))
    encoded = (
        (token, is_scored)
        for text, is_scored in pieces
        for token in tokenizer.encode(text, add_special_tokens=False).ids
    )
    tokens = [*itertools.islice(encoded, num_tokens)]
    if not any(is_scored for _, is_scored in tokens[1:]):
        raise ConfigError("--text and --tokens must leave two tokens at least")
    return tokens
