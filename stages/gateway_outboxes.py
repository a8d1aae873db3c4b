"""The way to the gateways: each message goes to the one that holds its request."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import zmq

from stages.channel import Outbox
from stages.columns import i8, i32, i32_bytes, u64, u64_bytes
from stages.config import ServerConfig
from stages.messages import (
    Detokenized,
    Message,
    OutputLogprobs,
    PromptLogprobs,
    RequestRejected,
    RequestStarted,
    TextOutputs,
    Tokenized,
)
from stages.request_ids import GATEWAY_SHIFT, gateway_of
from stages.topology import GATEWAY, gateway_names, inbox_address

OfOneRequest = (
    Detokenized | OutputLogprobs | PromptLogprobs | RequestRejected | RequestStarted | Tokenized
)


class GatewayOutboxes:
    """An `Outbox` to several gateways."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], config: ServerConfig) -> None:
        self._outboxes = [
            Outbox(context, inbox_address(config.run_dir, name))
            for name in gateway_names(config.gateways)
        ]

    def send(self, message: Message) -> None:
        """Send to whom it concerns; see `Outbox.send`."""
        if len(self._outboxes) == 1:
            self._outboxes[0].send(message)
        elif isinstance(message, TextOutputs):
            for gateway, part in split_outputs(message):
                self._outboxes[gateway].send(part)
        else:
            assert isinstance(message, OfOneRequest)
            self._outboxes[gateway_of(message.request_id)].send(message)

    def forget(self) -> None:
        """Drop what the gateways have not taken; see `Outbox.forget`."""
        for outbox in self._outboxes:
            outbox.forget()

    def close(self) -> None:
        """Close without waiting."""
        for outbox in self._outboxes:
            outbox.close()


def open_outbox(
    context: zmq.Context[zmq.Socket[bytes]], config: ServerConfig, stage: str
) -> Outbox | GatewayOutboxes:
    """The sending end of a channel to `stage`; 'gateway' stands for all of them."""
    if stage == GATEWAY:
        return GatewayOutboxes(context, config)
    return Outbox(context, inbox_address(config.run_dir, stage))


def split_outputs(outputs: TextOutputs) -> Iterator[tuple[int, TextOutputs]]:
    """Cut a step's outputs into one for each gateway that has some; order is kept."""
    request_ids = u64(outputs.request_ids)
    owners = request_ids >> np.uint64(GATEWAY_SHIFT)
    for gateway in np.unique(owners).tolist():
        yield gateway, _select(outputs, owners == gateway)


def _select(
    outputs: TextOutputs, is_chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> TextOutputs:
    num_tokens, reasons = i32(outputs.num_tokens), i8(outputs.finish_reasons)
    is_finished = reasons != 0
    stops = zip(outputs.stop_reasons, is_chosen[is_finished].tolist(), strict=True)
    deltas = zip(outputs.deltas, is_chosen.tolist(), strict=True)
    return TextOutputs(
        epoch=outputs.epoch,
        request_ids=u64_bytes(u64(outputs.request_ids)[is_chosen]),
        num_tokens=i32_bytes(num_tokens[is_chosen]),
        token_ids=i32_bytes(i32(outputs.token_ids)[np.repeat(is_chosen, num_tokens)]),
        deltas=[delta for delta, chosen in deltas if chosen],
        finish_reasons=reasons[is_chosen].tobytes(),
        stop_reasons=[stop for stop, chosen in stops if chosen],
    )
