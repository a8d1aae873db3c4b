"""The layout of a request id: which gateway minted it, in which of its lives, and a number.

So an answer finds its gateway by the id alone, and no gateway can mint an id of another or of one
that died.
"""

from __future__ import annotations

GATEWAY_SHIFT = 56
INCARNATION_SHIFT = 40
MAX_GATEWAYS = 64


def first_request_id(gateway: int, incarnation: int) -> int:
    """The smallest id of one life of gateway `gateway` (0 is the first)."""
    return (gateway << GATEWAY_SHIFT) + (incarnation << INCARNATION_SHIFT) + 1


def gateway_of(request_id: int) -> int:
    """The gateway that minted an id."""
    return request_id >> GATEWAY_SHIFT
