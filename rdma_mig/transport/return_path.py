# SPDX-License-Identifier: Apache-2.0
"""The return path: a second connection, on which the destination talks and the source listens.

Everything is as on the first one with the roles changed: the listener sends READY, the talker
QEMU_FILE messages (docs/protocol.md, return path).
"""

from __future__ import annotations

from rdma_mig.transport.control import ControlChannel
from rdma_mig.verbs.endpoint import Endpoint
from rdma_mig.waits import TransportLimits
from rdma_mig.wire.control import ControlMessage, ControlType
from rdma_mig.wire.return_path import ReturnListener, ReturnMessage

__all__ = ["ReturnPathReader", "ReturnPathWriter"]


class ReturnPathWriter:
    """The destination's end.

    Args:
        endpoint: the second connection; closed with this.
        limits: of the migration.
    """

    def __init__(self, endpoint: Endpoint, limits: TransportLimits) -> None:
        self._endpoint = endpoint
        self._control = ControlChannel(endpoint, limits, "return-path")

    def send(self, message: ReturnMessage) -> None:
        """Send one frame, when the source asks for one.

        QEMU sends its first frame unasked. We do not: a source that has no receive posted yet
        would lose the connection by it.
        """
        self._control.send(ControlMessage(ControlType.QEMU_FILE, message.encode(), repeat=0))

    def try_send(self, message: ReturnMessage) -> None:
        """Send one frame if the source has asked for one already; for an end that fails."""
        self._control.try_send(ControlMessage(ControlType.QEMU_FILE, message.encode(), repeat=0))

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._endpoint.close()


class ReturnPathReader:
    """The source's end.

    Args:
        endpoint: the second connection, established; closed with this.
        limits: of the migration.
        ping: value of the PING that the stream carries.
    """

    def __init__(self, endpoint: Endpoint, limits: TransportLimits, ping: int) -> None:
        self._endpoint = endpoint
        self._control = ControlChannel(endpoint, limits, "return-path")
        self._listener = ReturnListener(ping)
        # At once, since our own destination waits for it. A QEMU posts its receive late, which our
        # queue pair waits for, and sends its first frame without waiting.
        self._control.grant()
        self._granted = True

    def wait_shut(self) -> int:
        """Wait for SHUT, and return its status: 0 when the destination has loaded everything.

        Raises:
            RemoteProtocolError: another frame than the PONG that is due, or none at all before.
        """
        while (status := self._listener.status(self._endpoint.peer)) is None:
            if not self._granted:
                self._control.grant()
            received = self._control.await_message(
                ControlType.QEMU_FILE, "the destination's word on the return path"
            )
            self._granted = False
            self._listener.feed(received.payload)
        return status

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._endpoint.close()
