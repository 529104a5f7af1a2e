# SPDX-License-Identifier: Apache-2.0
"""The control channel: messages, and the READY that goes before each of them.

Two exchanges (docs/protocol.md, READY rule). A sender waits for the peer's READY, sends, and where
the message asks for a reply takes that before the next READY. A receiver sends READY, then waits
for one message; its reply needs no READY.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from rdma_mig.errors import MigrationError, PeerGone, ProtocolError, RemoteProtocolError
from rdma_mig.verbs.endpoint import Endpoint
from rdma_mig.verbs.loading import load
from rdma_mig.waits import Deadline, TransportLimits
from rdma_mig.wire.control import ControlMessage, ControlType

__all__ = ["ControlChannel"]

# How long the last word of a failing end may take.
_ERROR_SECONDS = 0.5


class ControlChannel:
    """Sends and receives control messages over an endpoint.

    Args:
        endpoint: the connection.
        limits: on its waits.
        name: of the channel in the trace.
    """

    def __init__(self, endpoint: Endpoint, limits: TransportLimits, name: str = "control") -> None:
        self.endpoint = endpoint
        self.limits = limits
        self._verbs = load()
        self._peer_failed = False
        self._name = name
        self._trace = endpoint.trace

    # ---- raw ----

    def _post(self, message: ControlMessage, doing: str) -> None:
        """Send a message and wait until it has arrived; the trace has it afterwards."""
        try:
            self.endpoint.queue.post_send(message.encode())
        except OSError as error:
            raise PeerGone(
                f"{message.type.name} cannot be sent to {self.endpoint.peer}: {error}"
            ) from error
        self.endpoint.wait(self._verbs.WAIT_SEND, doing, self.limits.next_wait())
        if self._trace is not None:
            self._record("out", message, doing)

    def _record(self, kind: str, message: ControlMessage, doing: str = "") -> None:
        """Put a message into the trace, and before it the wait for it: ``doing``, if any."""
        assert self._trace is not None
        now = time.monotonic()
        if doing and (began := self.endpoint.queue.waiting_since):
            self._trace.waited(doing, began, now)
        self._trace.record(
            kind,
            now=now,
            channel=self._name,
            type=message.type.name,
            length=len(message.payload),
            repeat=message.repeat,
        )

    def _next(self, doing: str) -> ControlMessage:
        """Wait for the next message; ERROR in place of any other ends the migration."""
        received = self.endpoint.queue.next_received()
        awaited = "" if received else doing
        while received is None:
            self.endpoint.wait(self._verbs.WAIT_RECEIVE, doing, self.limits.next_wait())
            received = self.endpoint.queue.next_received()
        message = ControlMessage.decode(received)
        if self._trace is not None:
            self._record("in", message, awaited)
        if message.type is ControlType.ERROR:
            self._peer_failed = True
            raise PeerGone(
                f"{self.endpoint.peer} reported a failure (ERROR); awaited was {doing}",
                remedy="its own messages say what failed",
            )
        return message

    def _expect(self, wanted: ControlType, doing: str) -> ControlMessage:
        message = self._next(doing)
        if message.type is not wanted:
            raise RemoteProtocolError(
                f"{self.endpoint.peer} sent {message.type.name} where {wanted.name} was due"
            )
        return message

    # ---- the two exchanges ----

    def send(self, message: ControlMessage) -> None:
        """Wait for READY, then send a message that has no reply."""
        self._expect(ControlType.READY, f"READY for {message.type.name}")
        self._post(message, f"the arrival of {message.type.name}")

    def request(
        self,
        message: ControlMessage,
        reply: ControlType,
        meanwhile: Callable[[], None] | None = None,
    ) -> ControlMessage:
        """Wait for READY, send a request, and return its reply.

        Args:
            message: the request.
            reply: the type that answers it.
            meanwhile: work that is done while the peer works.
        """
        self.send(message)
        if meanwhile is not None:
            meanwhile()
        return self._expect(reply, f"{reply.name}")

    def wait_ready(self, doing: str) -> None:
        """Wait for the peer's READY and use it up; the caller sends the next message by post()."""
        self._expect(ControlType.READY, doing)

    def post(self, message: ControlMessage) -> None:
        """Send a message that needs no READY now: a reply, or after wait_ready()."""
        self._post(message, f"the arrival of {message.type.name}")

    def grant(self) -> None:
        """Let the peer send one message; await_message() or receive() gets it."""
        self._post(ControlMessage(ControlType.READY), "the arrival of READY")

    def receive(self, doing: str) -> ControlMessage:
        """Grant the peer one message, and wait for it."""
        self.grant()
        return self.await_any(doing)

    def await_any(self, doing: str) -> ControlMessage:
        """Wait for the message that grant() let the peer send."""
        return self._next(doing)

    def await_message(self, wanted: ControlType, doing: str) -> ControlMessage:
        """Wait for a message that the peer sends without being granted one."""
        return self._expect(wanted, doing)

    # ---- the end ----

    def send_error(self) -> None:
        """Tell the peer that this end has failed. Best effort, bounded: the connection ends next.

        A QEMU may have no receive posted, or take it for the READY that it is owed.
        """
        self._try_post(ControlMessage(ControlType.ERROR))

    def try_send(self, message: ControlMessage) -> None:
        """Send a message if the peer's READY for it has come already. Best effort, bounded."""
        with contextlib.suppress(OSError, ValueError, MigrationError):
            self.endpoint.queue.poll()
            received = self.endpoint.queue.next_received()
            if received and ControlMessage.decode(received).type is ControlType.READY:
                self._try_post(message)

    def peer_error(self) -> bool:
        """Whether the peer has sent ERROR, as far as messages have arrived; they are used up."""
        with contextlib.suppress(OSError, ValueError, ProtocolError):
            self.endpoint.queue.poll()
            while received := self.endpoint.queue.next_received():
                if ControlMessage.decode(received).type is ControlType.ERROR:
                    self._peer_failed = True
        return self._peer_failed

    def _try_post(self, message: ControlMessage) -> None:
        if self._peer_failed or self.endpoint.disconnected or not self.endpoint.is_connected:
            return
        queue = self.endpoint.queue
        with contextlib.suppress(OSError, ValueError):
            queue.post_send(message.encode())
            # Not wait(): after a cancellation it would return at once, with the message unsent.
            deadline = Deadline.after(_ERROR_SECONDS)
            while queue.outstanding_sends and queue.failure is None and not deadline.passed:
                time.sleep(0.002)
                queue.poll()
            if self._trace is not None:
                self._record("out", message)
