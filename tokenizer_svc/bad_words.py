"""`bad_words`: from texts that must not be generated to the token sequences that would say them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from stages.columns import Int32Array, i32_bytes
from stages.errors import RequestError
from stages.messages import SamplingParams
from tokenizer_svc.encode import TextCodec


def with_bad_word_ids(params: SamplingParams, codec: TextCodec) -> SamplingParams:
    """Replace `bad_words` by their token sequences; raises RequestError for one without tokens."""
    if not params.bad_words:
        return params
    sequences = [ids for word in params.bad_words for ids in _sequences(word, codec)]
    return msgspec.structs.replace(
        params,
        bad_words=[],
        bad_word_ids=i32_bytes(np.concatenate(sequences)),
        bad_word_lens=i32_bytes([len(ids) for ids in sequences]),
    )


def _sequences(word: str, codec: TextCodec) -> Iterator[Int32Array]:
    """The word as it begins a text, and as it comes behind a space where that is another token.

    The rule is vLLM's (`SamplingParams.update_from_tokenizer`): white space before a word is not
    part of it; the second sequence counts if it begins otherwise and has as many tokens.
    """
    text = word.lstrip()
    bare = codec.encode(text, add_special_tokens=False)
    if not len(bare):
        raise RequestError(
            f"bad_words has {word!r}, for which this model has no tokens; leave it out.",
            param="bad_words",
        )
    yield bare
    spaced = codec.encode(" " + text, add_special_tokens=False)
    if len(spaced) == len(bare) and spaced[0] != bare[0]:
        yield spaced
