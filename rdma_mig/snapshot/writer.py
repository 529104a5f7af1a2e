# SPDX-License-Identifier: Apache-2.0
"""Writing a snapshot directory: beside its place first, whole and on disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rdma_mig.errors import SnapshotError
from rdma_mig.memory import GuestMemory, RamBlock
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.entrusted import Entrusted
from rdma_mig.snapshot.leftovers import abandoned, name_incomplete, parent_lock
from rdma_mig.snapshot.manifest import (
    COMMAND,
    CONFIG,
    DESCRIPTION,
    DEVICE_STATE,
    MANIFEST,
    MAX_BLOCKS,
    MAX_DEVICE_STATE,
    MAX_HEAD,
    RAM,
    WRITTEN,
    BlockRecord,
    FileRecord,
    Manifest,
    StreamFacts,
    ram_file,
)
from rdma_mig.snapshot.ram import Progress, Room, Stop, write_block
from rdma_mig.snapshot.recorded import RecordedCommand
from rdma_mig.snapshot.recovery import note_written
from rdma_mig.snapshot.room import make_room
from rdma_mig.words import printable

__all__ = ["DEVICE_STATE_RESERVE", "SnapshotWriter"]

DEVICE_STATE_RESERVE: Final = 64 << 20
"""Bytes set aside for device state by default; that of a usual machine is below 1 MiB."""

_DESCRIPTION_RESERVE: Final = 4 << 20
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# What stands in a manifest for what is not known yet.
_NOTHING: Final = FileRecord(1, hashlib.sha256(b"\0").hexdigest())


class SnapshotWriter:
    """Writes one snapshot directory.

    Everything goes to ``DIR.partial-PID``, next to DIR, whose manifest file is locked while this
    process works on it; the lock is what tells a partial at work from one that was left behind.
    `commit` makes all of it durable and renames it, replacing nothing: at every moment DIR is
    whole or absent (where the file system knows no RENAME_NOREPLACE, a crash within two calls can
    leave DIR empty).

    A context manager: an end without `commit` removes the partial, except that a failure is kept
    as ``DIR.incomplete`` once `keep_on_failure` is set. Calls must come from one thread.

    Args:
        path: DIR; must not exist, while its parent must.

    Attributes:
        path: DIR, absolute.
        partial: where it is written.
        stale: partial directories of earlier runs that did not finish. They are left alone.
        keep_on_failure: set it once the copy at hand may be the only whole one; `commit` does.
        kept_at: where `keep_incomplete` put the directory.

    Raises:
        SnapshotError: DIR exists, or its parent is missing or cannot be written to. Every method
            raises it for every failure of the file system, naming the file and the remedy.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._parent = self._dir = self._manifest = self._state = -1
        self._blocks: list[tuple[RamBlock, GuestMemory]] = []
        self._records: dict[int, BlockRecord] = {}
        self._config: FileRecord | None = None
        self._description: FileRecord | None = None
        self._room = Room(0, exact=True)
        self._state_size = 0
        self._state_hash = hashlib.sha256()
        self.keep_on_failure = False
        self.kept_at: Path | None = None
        self.path = Path(os.path.abspath(path))
        self.partial = self.path
        if not self.path.name:
            raise SnapshotError(
                f"{printable(self.path)} cannot be a snapshot directory",
                remedy="name a directory that does not exist yet",
            )
        if os.path.lexists(self.path):
            raise self._taken("already exists")
        try:
            self._create()
        except BaseException:
            self.abandon()
            raise

    def _taken(self, how: str) -> SnapshotError:
        return SnapshotError(
            f"{printable(self.path)} {how}",
            remedy=f"choose another directory, or remove it: rm -r {printable(self.path)}",
        )

    def _create(self) -> None:
        parent = self.path.parent
        with _fs.failing("create", self.path):
            self._parent = _fs.open_directory(parent, follow=True)
        with parent_lock(self._parent):
            self.stale = self._find_stale()
            base = f"{self.path.name}.partial-{os.getpid()}"
            with _fs.failing("create", parent / base):
                self.partial = parent / self._make_directory(base)
            with _fs.failing("create", self.partial / MANIFEST):
                self._dir = _fs.open_directory(self.partial.name, self._parent)
                self._manifest = os.open(MANIFEST, _CREATE, 0o600, dir_fd=self._dir)
                fcntl.flock(self._manifest, fcntl.LOCK_EX)
        with _fs.failing("create", self.partial / DEVICE_STATE):
            self._state = os.open(DEVICE_STATE, _CREATE, 0o600, dir_fd=self._dir)
        with _fs.failing("create", self.partial / RAM):
            os.mkdir(RAM, 0o700, dir_fd=self._dir)

    def _make_directory(self, base: str) -> str:
        # The PID may have served an earlier run, or another PID namespace.
        for attempt in range(1000):
            name = f"{base}.{attempt}" if attempt else base
            try:
                os.mkdir(name, 0o700, dir_fd=self._parent)
            except FileExistsError:
                continue
            return name
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _find_stale(self) -> list[Path]:
        with _fs.failing("list", self.path.parent):
            names = sorted(os.listdir(self._parent))
        prefix = f"{self.path.name}.partial-"
        return [
            self.path.parent / name
            for name in names
            if name.startswith(prefix) and abandoned(self._parent, name)
        ]

    # -- room ------------------------------------------------------------------------------------

    def reserve(
        self,
        blocks: Sequence[tuple[RamBlock, GuestMemory]],
        device_state: int = DEVICE_STATE_RESERVE,
        should_stop: Stop = None,
    ) -> int:
        """Make sure that the disk will hold this RAM as it is now, and the device state to come.

        Blocks of the file system are set aside for every page of 4 KiB that is not zero, for the
        digests, the manifest, and ``device_state`` bytes; writing them cannot run out of space
        afterwards. Until they are written it may be more, all of RAM at most, where as much
        again is left. A file system that cannot reserve (NFS before 4.2, ramfs) is only asked how
        much is free now.

        Args:
            blocks: RAM blocks in stream order with their memory, which must not change any more.
                It is read, and used again by `write_ram`.
            device_state: bytes to keep free for `append_device_state`.
            should_stop: asked every MiB of data; true ends it with `MigrationCancelled`.

        Returns:
            Bytes of RAM that space was set aside for.
        """
        if self._blocks:
            raise RuntimeError("space was set aside already")
        if not 1 <= len(blocks) <= MAX_BLOCKS:
            raise SnapshotError(
                f"a snapshot holds 1 to {MAX_BLOCKS} RAM blocks, not {len(blocks)}",
                remedy="this machine cannot be kept as a snapshot",
            )
        self._blocks = list(blocks)
        manifest = 65536 + 4096 * len(blocks)
        with contextlib.ExitStack() as stack:
            with _fs.failing("create", self.partial / RAM):
                ram = _fs.open_directory(RAM, self._dir)
                stack.callback(os.close, ram)
                description = os.open(DESCRIPTION, _CREATE, 0o600, dir_fd=self._dir)
                stack.callback(os.close, description)
            others = (
                (self._state, device_state),
                (self._manifest, manifest),
                (description, _DESCRIPTION_RESERVE),
            )
            self._room = make_room(self.path, ram, self._blocks, others, should_stop)
        return self._room.size

    # -- contents --------------------------------------------------------------------------------

    def write_config(self, raw: bytes) -> None:
        """Keep the stream's head, verbatim: header and configuration section."""
        if len(raw) > MAX_HEAD:
            raise SnapshotError(
                f"the head of the stream has {len(raw)} bytes, a snapshot takes {MAX_HEAD}",
                remedy="this stream cannot be kept as a snapshot",
            )
        self._config = self._write_file(CONFIG, raw)

    def set_description(self, raw: bytes) -> None:
        """Keep the JSON text of the stream's description, verbatim."""
        self._description = self._write_file(DESCRIPTION, raw)

    def write_command(self, command: RecordedCommand) -> None:
        """Keep how the QEMU was started."""
        self._write_file(COMMAND, command.encode())

    def _write_file(self, name: str, raw: bytes) -> FileRecord:
        with _fs.failing("write", self.partial / name):
            fd = os.open(name, _CREATE & ~os.O_EXCL, 0o600, dir_fd=self._dir)
            with _fs.closing(fd):
                _fs.write_all(fd, raw, 0)
                os.ftruncate(fd, len(raw))
                os.fsync(fd)
        return FileRecord(len(raw), hashlib.sha256(raw).hexdigest())

    def append_device_state(self, data: bytes | bytearray | memoryview) -> None:
        """Add what came after the RAM section's end; at most 1 GiB in all."""
        if self._state_size + len(data) > MAX_DEVICE_STATE:
            raise SnapshotError(
                f"the source sent more than {_fs.human(MAX_DEVICE_STATE)} of device state",
                remedy="this machine cannot be kept as a snapshot",
            )
        with _fs.failing("write", self.partial / DEVICE_STATE):
            _fs.write_all(self._state, data, self._state_size)
        self._state_hash.update(data)
        self._state_size += len(data)

    def write_ram(self, index: int, should_stop: Stop = None, progress: Progress = None) -> int:
        """Write a reserved block's pages that are not zero, with their digests, and fsync it.

        Straight from guest memory to the file; a chunk is read for its digest while it is in the
        processor's cache.

        Args:
            index: the block's, in the order of `reserve`.
            should_stop: asked every MiB of data; true ends it with `MigrationCancelled`.
            progress: called every MiB of data with the bytes written since the last call.

        Returns:
            Bytes written.
        """
        block, memory = self._blocks[index]
        with (
            _fs.failing("write", self.partial / RAM / ram_file(index)),
            _fs.closing(_fs.open_directory(RAM, self._dir)) as ram,
        ):
            record = write_block(
                ram,
                index,
                block,
                memory,
                stop=should_stop,
                progress=progress,
                room=self._room,
            )
        self._records[index] = record
        return record.data_bytes

    def note_written(self, facts: StreamFacts) -> None:
        """Say in the partial that all RAM is on disk, so that recovery.recover() can use it."""
        with _fs.failing("write", self.partial / WRITTEN):
            note_written(self._dir, self._make_manifest(facts))

    def entrust(self, facts: StreamFacts) -> Entrusted:
        """Return what another process needs to finish this, should this one be killed.

        Space must have been set aside.
        """
        unwritten = [BlockRecord(block, 0, _NOTHING.sha256) for block, _ in self._blocks]
        return Entrusted(
            self._make_manifest(facts, records=unwritten),
            self._parent,
            self._dir,
            self._manifest,
            tuple(memory.fd for _, memory in self._blocks),
        )

    def _make_manifest(
        self,
        facts: StreamFacts,
        *,
        records: Sequence[BlockRecord] | None = None,
        device_state: FileRecord = _NOTHING,
        eof_offset: int = 1,
        description: FileRecord | None = None,
    ) -> Manifest:
        """Make one; where nothing else is said, device state is not known yet."""
        if records is None:
            records = [self._records[index] for index in sorted(self._records)]
        if self._config is None or not self._blocks or len(records) != len(self._blocks):
            raise RuntimeError("before the config and all RAM blocks were written")
        return Manifest(
            machine=facts.machine,
            ram_section_id=facts.ram_section_id,
            footers=facts.footers,
            page_bits=facts.page_bits,
            blocks=tuple(records),
            config=self._config,
            device_state=device_state,
            eof_offset=eof_offset,
            description=description,
            shared=facts.shared,
        )

    # -- the end ---------------------------------------------------------------------------------

    def commit(
        self,
        facts: StreamFacts,
        *,
        eof_offset: int,
        keep_on_failure: bool = True,
        named: bool = True,
    ) -> Path:
        """Make the snapshot durable and give it its name.

        Args:
            facts: of the stream.
            eof_offset: offset in the device state right after its EOF byte.
            keep_on_failure: keep what there is should this fail; False where the source still has
                the machine.
            named: False to call it ``DIR.incomplete`` for the time being, whole as it is: whether
                it may be used is not decided yet, and `publish` gives it its name.

        Returns:
            Where it is: DIR, or ``DIR.incomplete`` (``.N`` added when that is taken).

        Raises:
            SnapshotError: the snapshot could not be completed or named. With ``keep_on_failure``
                nothing is deleted: it is kept as ``DIR.incomplete``, which the message says.
        """
        self.keep_on_failure = keep_on_failure
        manifest = self._make_manifest(
            facts,
            device_state=FileRecord(self._state_size, self._state_hash.hexdigest()),
            eof_offset=eof_offset,
            description=self._description,
        )
        try:
            self._finish(manifest, named=named)
        except SnapshotError as error:
            if not keep_on_failure:
                if self.kept_at == self.path:
                    self.withdraw()
                raise
            kept = self.keep_incomplete()
            error.message += f"; everything received is kept in {printable(kept)}"
            error.args = (error.message,)
            raise
        # Its name is final, whatever becomes of the next call.
        self._close()
        return self.kept_at or self.path

    def publish(self) -> Path:
        """Give what was committed without its name that name, and return it: DIR.

        Raises:
            SnapshotError: it could not be; it stays where it is, which the message says.
        """
        assert self.kept_at is not None
        present = self.kept_at
        whole = f"; the snapshot is whole in {printable(present)}"
        try:
            parent = _fs.open_directory(self.path.parent, follow=True)
            try:
                _fs.rename_noreplace(parent, present.name, self.path.name)
                self.kept_at = None
                whole = f"; the snapshot is whole in {printable(self.path)}"
                os.fsync(parent)
            finally:
                os.close(parent)
        except FileExistsError:
            raise self._taken(
                f"came into existence while the snapshot was written{whole}"
            ) from None
        except SnapshotError as error:
            error.message += whole
            error.args = (error.message,)
            raise
        except OSError as error:
            failure = _fs.failure(error, f"rename {present.name} to", self.path)
            failure.message += whole
            failure.args = (failure.message,)
            raise failure from error
        return self.path

    def _finish(self, manifest: Manifest, *, named: bool) -> None:
        raw = manifest.encode()
        # What this version cannot read again must not be named a snapshot.
        Manifest.decode(raw, printable(self.partial / MANIFEST))
        with _fs.failing("write", self.partial):
            os.ftruncate(self._state, self._state_size)
            os.fsync(self._state)
            if self._description is None:
                self._forget_description()
            _fs.write_all(self._manifest, raw, 0)
            os.ftruncate(self._manifest, len(raw))
            os.fsync(self._manifest)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(WRITTEN, dir_fd=self._dir)
            _fs.fsync_dir(RAM, self._dir)
            os.fsync(self._dir)
        if not named:
            if os.path.lexists(self.path):  # later, the machine would be nobody's for a while
                raise self._taken("came into existence while the snapshot was written")
            self.kept_at = self.partial
            self._rename_incomplete(self.partial.name)
            return
        try:
            _fs.rename_noreplace(self._parent, self.partial.name, self.path.name)
        except FileExistsError:
            raise self._taken("came into existence while the snapshot was written") from None
        except OSError as error:
            raise _fs.failure(error, f"rename {self.partial.name} to", self.path) from error
        try:
            os.fsync(self._parent)
        except OSError as error:
            self._close()
            self.kept_at = self.path
            raise _fs.failure(error, "make durable the new name", self.path) from error

    def _forget_description(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(DESCRIPTION, dir_fd=self._dir)

    def keep_incomplete(self) -> Path:
        """Keep what there is as ``DIR.incomplete`` (``.N`` added when that is taken).

        For a failure after which the copy at hand matters. It raises nothing: where even the
        rename fails, the directory stays under the name it has.

        Returns:
            Where it is.
        """
        if self._dir < 0:
            return self.kept_at or self.partial
        self.kept_at = self.partial
        with contextlib.suppress(OSError):
            os.ftruncate(self._state, self._state_size)
            if self._description is None:
                self._forget_description()
            if os.fstat(self._manifest).st_size:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(WRITTEN, dir_fd=self._dir)
            if not os.fstat(self._manifest).st_size:
                os.unlink(MANIFEST, dir_fd=self._dir)
            os.fsync(self._state)
            os.fsync(self._dir)
        self._rename_incomplete(self.partial.name)
        self._close()
        return self.kept_at

    def _rename_incomplete(self, present: str) -> None:
        name = name_incomplete(self._parent, present, self.path.name)
        if name is not None:
            self.kept_at = self.path.parent / name

    def withdraw(self) -> Path:
        """Take DIR's name away again, after `commit`: whether it is the only copy is not known.

        It raises nothing: where the rename fails, DIR keeps its name.

        Returns:
            Where it is: ``DIR.incomplete`` (``.N`` added when that is taken), whole.
        """
        self.kept_at = self.path
        with contextlib.suppress(OSError, SnapshotError):
            self._parent = _fs.open_directory(self.path.parent, follow=True)
            self._rename_incomplete(self.path.name)
        self._close()
        return self.kept_at

    def abandon(self) -> None:
        """Remove what was written so far; after `commit` or `keep_incomplete` it does nothing."""
        if self.partial != self.path and self._parent >= 0 and self.kept_at is None:
            # The lock is held until all is gone: nobody takes it for a partial that was left.
            with contextlib.suppress(OSError):
                shutil.rmtree(self.partial.name, dir_fd=self._parent)
        self._close()

    def _close(self) -> None:
        for name in ("_state", "_manifest", "_dir", "_parent"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and self.keep_on_failure:
            self.keep_incomplete()
        else:
            self.abandon()

    def __del__(self) -> None:
        if getattr(self, "_parent", -1) >= 0:
            warnings.warn(
                f"unclosed snapshot writer for {self.path}",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )
            self._close()
