"""The errors of the world, as opposed to programmer errors (those are asserts).

HeadraceError
├── ConfigError        a setting is wrong; says which and what to do       (exit code 2)
├── StageStartError    a stage did not become ready                        (exit code 1)
├── RestartLimitError  a stage died too often                              (exit code 70)
├── ChannelLate        a peer did not take a message within the deadline
└── RequestError       one request is refused: status, code, param, message
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""

    exit_code = 1


class ConfigError(HeadraceError):
    """A setting cannot work; the text names the flag and the remedy."""

    exit_code = 2


class StageStartError(HeadraceError):
    """A stage ended or stayed silent before it was ready."""


class RestartLimitError(HeadraceError):
    """A stage died more often than `--max-restarts` allows."""

    exit_code = 70


class ChannelLate(HeadraceError):
    """The peer of a channel did not take a message within the deadline."""

    def __init__(self, channel: str, seconds: float) -> None:
        super().__init__(f"{channel} took no message for {seconds:.1f} s")


class RequestError(HeadraceError):
    """One request is refused; nothing else is disturbed.

    `status` is the HTTP status, `code` a short machine-readable word, `param` the name of the
    offending field ('' where no single field is to blame).
    """

    def __init__(self, message: str, *, param: str = "", code: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or ("invalid_value" if status == 400 else "error")
        self.status = status
