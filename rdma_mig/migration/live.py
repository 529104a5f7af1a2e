# SPDX-License-Identifier: Apache-2.0
"""The source's engine for a guest that runs: rounds while it writes, then a short stop."""

from __future__ import annotations

import time

from rdma_mig.channel.qemufile import QEMUFile
from rdma_mig.channel.transport import SourceTransport
from rdma_mig.errors import MigrationError, MigrationTimeout
from rdma_mig.memory.blocks import TARGET_PAGE_SIZE
from rdma_mig.memory.page_stream import PageWriter, Stage, XbzrleCache
from rdma_mig.memory.ram import GuestRam
from rdma_mig.migration.backlog import Backlog
from rdma_mig.migration.events import Completed, Progress
from rdma_mig.migration.handover import DestinationRefused, hand_over
from rdma_mig.migration.interfaces import Guest
from rdma_mig.migration.pace import AutoConverge, DirtyRate, Window
from rdma_mig.migration.ram_control import (
    RAM_CONTROL_FINISH,
    RAM_CONTROL_ROUND,
    RAM_CONTROL_SETUP,
    ram_control_after_iterate,
    ram_control_before_iterate,
)
from rdma_mig.migration.ram_save import XbzrleRates, ram_save_pages
from rdma_mig.migration.state import Migration
from rdma_mig.migration.status import MigrationCapability, MigrationStatus, clock_ms
from rdma_mig.migration.tracking import Tracking
from rdma_mig.waits import Deadline
from rdma_mig.wire.device_state import DeviceState
from rdma_mig.wire.return_path import RETURN_PATH_PING
from rdma_mig.wire.stream import (
    CommandType,
    StreamBlock,
    encode_command,
    encode_eos,
    encode_footer,
    encode_head,
    encode_ram_start,
    encode_section_end,
    encode_section_part,
)

__all__ = ["RAM_SECTION_ID", "LiveSource"]

RAM_SECTION_ID = 2
"""Of the RAM section in the streams of a guest that does not come from a QEMU: QEMU's usual one."""

_HERE = "the guest is still here and goes on running"
_NOT_KNOWN = (
    "whether the destination runs the guest is not known, so it rests here: resume it here if "
    "it does not run there"
)
# Where nothing limits it, RAM is sent in pieces of this many bytes, between which the migration
# can be cancelled and the bandwidth is measured.
_PIECE = 256 << 20
_EOS_SIZE = 8


class LiveSource:
    """Sends a guest; ``save`` is its engine function. For one migration.

    The guest is resumed if the migration fails at a point where nobody else can have it. If it is
    not known whether the destination has it, it rests: two must never run.

    Args:
        guest: what is sent; closed by its owner, after this.
        total_seconds: limit on all rounds together; None for none. A guest that writes faster than
            the link carries would go on for ever without one, or auto-converge.
    """

    def __init__(self, guest: Guest, *, total_seconds: float | None = None) -> None:
        self.guest = guest
        self._total_seconds = total_seconds
        self._stopped = False
        self._may_be_there = False

    @property
    def ram(self) -> GuestRam:
        """The guest's memory."""
        return self.guest.ram

    def save(self, migration: Migration, file: QEMUFile, transport: SourceTransport) -> None:
        """Write the whole migration to ``file``.

        Raises:
            MigrationError: it failed; its ``owner`` says where the guest is.
        """
        migration.state.owner = _HERE
        run = _Run(self.guest, migration, file, transport, self._deadline(migration))
        try:
            with run.tracking:
                confirmed = self._through(migration, run, file, transport)
            run.report(confirmed)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            migration.state.xbzrle_cache = None

    def _through(
        self, migration: Migration, run: _Run, file: QEMUFile, transport: SourceTransport
    ) -> str:
        """Go through all phases; return how success is known."""
        try:
            run.setup()
            run.rounds()
        finally:
            if migration.state.throttle_percentage:
                migration.state.throttle_percentage = 0
                self.guest.throttle(0)
        began = clock_ms()
        self._stopped = True
        self.guest.stop()
        run.last_round()
        confirmed = hand_over(
            migration,
            file,
            transport,
            run.device_state(),
            owner=_HERE,
            before_eof=self._point_of_no_return,
        )
        migration.state.downtime = clock_ms() - began
        migration.state.owner = "the guest runs at the destination"
        self._may_be_there = False
        self._stopped = False
        confirmed = transport.finish() or confirmed
        migration.note_commit("source", "EOF", "passed")
        return confirmed

    def _deadline(self, migration: Migration) -> Deadline:
        """From when the migration began, so that a transport's own limit is no sooner."""
        if not self._total_seconds:
            return Deadline.after(None)
        began = migration.state.total_time * 1_000_000
        return Deadline(began + int(self._total_seconds * 1e9), self._total_seconds)

    def _point_of_no_return(self) -> None:
        self._may_be_there = True

    def _fail(self, error: BaseException) -> None:
        """Let the guest go on, unless the destination may have it."""
        if self._may_be_there and not isinstance(error, DestinationRefused):
            if isinstance(error, MigrationError):
                error.owner = _NOT_KNOWN
            return
        if self._stopped:
            self._stopped = False
            self.guest.resume()


class _Run:
    """One pass through the phases of a live migration."""

    def __init__(
        self,
        guest: Guest,
        migration: Migration,
        file: QEMUFile,
        transport: SourceTransport,
        deadline: Deadline,
    ) -> None:
        self._guest = guest
        self._ram = guest.ram
        self.tracking = Tracking(guest)
        self._migration = migration
        self._state = migration.state
        self._file = file
        self._transport = transport
        self._deadline = deadline
        self._footer = encode_footer(RAM_SECTION_ID)
        self._backlog = Backlog(guest.ram)
        cache = None
        if self._state.enabled(MigrationCapability.XBZRLE) and file.hooks is None:
            cache = XbzrleCache(self._state.xbzrle_cache_size)
        self._state.xbzrle_cache = cache
        self._writer = PageWriter(guest.ram, cache)
        self._rates = XbzrleRates(file.counters)
        self._converge = AutoConverge()
        self._window = Window(self._state, self._sent, _clock)
        self._rate = DirtyRate(self._state, self._sent, _clock)
        self._state.ram_total = guest.ram.total
        self._began = time.monotonic()
        self._device_bytes = 0
        self._at_rest = False

    def _sent(self) -> int:
        return self._file.position

    # ---- phases ----

    def setup(self) -> None:
        """Head, block list, and whatever the transport prepares."""
        self._state.step = "agreeing on the RAM blocks"
        file = self._file
        file.put(encode_head(self._guest.machine))
        if self._transport.has_return_path:
            file.put(encode_command(CommandType.OPEN_RETURN_PATH))
            file.put(encode_command(CommandType.PING, RETURN_PATH_PING.to_bytes(4, "big")))
        blocks = [guest.block for guest in self._ram]
        file.put(encode_ram_start(RAM_SECTION_ID, [StreamBlock(b.idstr, b.length) for b in blocks]))
        self._migration.emit(Progress("setup", 0, self._ram.total))
        self._synchronise()
        ram_control_before_iterate(file, RAM_CONTROL_SETUP)
        ram_control_after_iterate(file, RAM_CONTROL_SETUP)
        file.put(encode_eos() + self._footer)
        file.flush()
        self._state.setup_time = clock_ms() - self._state.total_time
        self._migration.advance(MigrationStatus.ACTIVE)

    def rounds(self) -> None:
        """Send what is dirty until so little is left that the guest may be stopped for it."""
        while True:
            self._check()
            if not self._pending or self._pending < self._window.threshold:
                self._synchronise()
            if not self._pending or self._pending < self._window.threshold:
                return
            if self._window.left != 0:
                try:
                    self._round()
                except MigrationTimeout as error:
                    if self._deadline.passed:
                        raise self._did_not_converge() from error
                    raise
            if self._window.left == 0:
                self._migration.cancellation.wait(self._window.seconds_left)
            self._window.turn()

    def last_round(self) -> None:
        """The guest rests: send the rest, however long that takes."""
        self._at_rest = True
        self._state.step = "sending the last RAM"
        self._window.unlimited()
        self._synchronise()
        self._file.put(encode_section_end(RAM_SECTION_ID))
        self._phase(RAM_CONTROL_FINISH, None)
        self._file.flush()
        self._migration.advance(MigrationStatus.DEVICE)

    def device_state(self) -> DeviceState:
        """Ask the guest for everything that is not RAM."""
        state = self._guest.save_device_state()
        self._device_bytes = len(state.raw)
        return state

    # ---- within them ----

    @property
    def _pending(self) -> int:
        return self._backlog.pages * TARGET_PAGE_SIZE

    def _check(self) -> None:
        self._migration.cancellation.check(f"sending RAM, round {self._state.rounds + 1}")
        if self._deadline.passed:
            raise self._did_not_converge()

    def _did_not_converge(self) -> MigrationTimeout:
        state = self._state
        return MigrationTimeout(
            f"the guest did not converge within {self._deadline.seconds:g} s: after "
            f"{state.dirty_sync_count} passes {self._pending >> 10} KiB are left, it dirties "
            f"{state.dirty_bytes_rate >> 20} MiB/s and {self._window.bandwidth / 1048.576:.0f} "
            f"MiB/s are sent; {state.max_downtime // 1_000_000} ms of downtime are allowed",
            owner=_HERE,
            remedy="allow more downtime or bandwidth, or switch auto-converge on",
        )

    def _synchronise(self) -> None:
        """Fetch what the guest has dirtied."""
        found = self._backlog.add_dirty(self.tracking, at_rest=self._at_rest)
        self._state.dirty_sync_count += 1
        self._state.dirty_pages = self._backlog.pages
        if self._state.xbzrle_cache is not None:
            self._state.xbzrle_cache.age = self._state.dirty_sync_count
        period = self._rate.found(found)
        if period:
            self._rates.evaluate()
        if (
            period
            and self._state.enabled(MigrationCapability.AUTO_CONVERGE)
            and self._converge.evaluate(*period)
        ):
            self._state.throttle_percentage = self._converge.percentage
            self._guest.throttle(self._converge.percentage)

    def _round(self) -> None:
        state = self._state
        state.step = f"sending RAM, round {state.rounds + 1}"
        self._file.put(encode_section_part(RAM_SECTION_ID))
        left = self._window.left
        self._phase(RAM_CONTROL_ROUND, _PIECE if left is None else left)
        self._migration.emit(Progress("round", state.rounds, 0))

    def _phase(self, flags: int, size: int | None) -> None:
        file = self._file
        began = file.position
        ram_control_before_iterate(file, flags)
        for index, dirty in self._backlog.take(size):
            self._migration.cancellation.check("sending RAM")
            if self._backlog.passes:
                self._writer.stage = Stage.LAST if self._at_rest else Stage.ROUND
            self._window.charge(ram_save_pages(file, self._ram, index, dirty, self._writer))
        ram_control_after_iterate(file, flags)
        file.put(encode_eos() + self._footer)
        file.counters.transferred += _EOS_SIZE
        file.flush()
        sent = file.position - began
        if self._at_rest:
            self._state.downtime_bytes += sent
        else:
            self._state.precopy_bytes += sent
        self._migration.note_round(last=self._at_rest)
        self._state.dirty_pages = self._backlog.pages

    def report(self, confirmed: str) -> None:
        """Tell what it took."""
        counters = self._file.counters
        seconds = time.monotonic() - self._began
        transfer = max(seconds - self._state.setup_seconds, 1e-9)
        self._state.bytes_transferred = counters.normal_bytes
        self._migration.emit(
            Completed(
                bytes=counters.normal_bytes,
                pages=counters.normal_pages,
                nonzero_bytes=counters.normal_bytes,
                device_state_bytes=self._device_bytes,
                rounds=self._state.rounds,
                writes=self._transport.writes,
                normal_pages=counters.normal_pages,
                duplicate_pages=counters.duplicate_pages,
                setup_seconds=self._state.setup_seconds,
                transfer_seconds=round(transfer, 6),
                writing_seconds=0.0,
                bytes_per_second=round(counters.normal_bytes / transfer, 1),
                path="",
                peer=self._transport.peer,
                confirmed=confirmed,
            )
        )


def _clock() -> float:
    return time.monotonic() * 1000
