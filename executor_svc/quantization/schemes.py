"""What `--quantization` may say: how float weights become int8 while they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

NO_SCHEME = "none"


class Scheme(NamedTuple):
    """Weights are rounded to int8 with a scale for each output; activations too, or not."""

    name: str
    int8_activations: bool


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {scheme.name: scheme for scheme in (Scheme("int8", False), Scheme("w8a8", True))}
)
