# SPDX-License-Identifier: Apache-2.0
"""Reading a snapshot directory, trusting nothing in it that was not checked."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shlex
import warnings
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import xxhash

from rdma_mig import _pages
from rdma_mig.closing import Closing
from rdma_mig.errors import MigrationCancelled, SnapshotError
from rdma_mig.memory import (
    CHUNK_SIZE,
    TARGET_PAGE_SIZE,
    GuestMemory,
    RamBlock,
    chunk_count,
    chunk_range,
)
from rdma_mig.snapshot import _fs
from rdma_mig.snapshot.manifest import (
    COMMAND,
    CONFIG,
    DESCRIPTION,
    DEVICE_STATE,
    MANIFEST,
    MAX_MANIFEST,
    RAM,
    RESTORED,
    FileRecord,
    Manifest,
    digest_file,
    ram_file,
)
from rdma_mig.snapshot.ram import DIGEST_SIZE, WINDOW, Progress, Stop, digest_size
from rdma_mig.snapshot.recorded import MAX_COMMAND, RecordedCommand
from rdma_mig.words import printable

__all__ = ["Snapshot"]

_ZERO_DIGEST: Final = bytes(DIGEST_SIZE)
_DAMAGED: Final = "restore the file from a copy, or take the snapshot again"


class Snapshot(Closing):
    """A snapshot directory, open for reading; made by `Snapshot.open`. A context manager.

    Files are opened relative to the directory's descriptor by names fixed in this package, and
    links are not followed: no manifest can lead out of the directory.

    Attributes:
        path: the directory.
        manifest: what its manifest says, checked.
    """

    def __init__(self, path: Path, directory: int, manifest: Manifest) -> None:
        self._dir = directory
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Open a snapshot: its manifest is read, and the size of every file compared with it.

        Contents are checked where they are read (`config`, `device_state`, `description`,
        `load_ram`), or all at once by `verify`.

        Raises:
            SnapshotError: there is none, it is incomplete, of a newer format, or damaged.
        """
        where = Path(os.path.abspath(path))
        try:
            directory = _fs.open_directory(where, follow=True)
        except OSError as error:
            raise _cannot_open(error, where) from error
        try:
            snapshot = cls(where, directory, _read_manifest(directory, where))
        except BaseException:
            os.close(directory)
            raise
        try:
            snapshot._check_sizes()
        except BaseException:
            snapshot.close()
            raise
        return snapshot

    # -- what it says ----------------------------------------------------------------------------

    @property
    def machine(self) -> str:
        """The versioned machine type, e.g. ``pc-q35-7.2``."""
        return self.manifest.machine

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        """The RAM blocks that are kept, in stream order."""
        return tuple(record.block for record in self.manifest.blocks)

    @property
    def eof_offset(self) -> int:
        """The offset in the device state right after its EOF byte."""
        return self.manifest.eof_offset

    @property
    def config(self) -> bytes:
        """The stream's head (header and configuration section), checked by its sha256."""
        return self._read_whole(CONFIG, self.manifest.config)

    @property
    def device_state(self) -> bytes:
        """Everything after RAM's END section, description included, checked by its sha256."""
        raw = self._read_whole(DEVICE_STATE, self.manifest.device_state)
        if raw[self.eof_offset - 1] != 0:
            raise SnapshotError(
                f"{printable(self.path / MANIFEST)} is damaged: no EOF byte ends the device "
                f"state before offset {self.eof_offset}",
                remedy=_DAMAGED,
            )
        return raw

    @property
    def description(self) -> bytes | None:
        """The description's JSON text, checked by its sha256; None when the source sent none."""
        record = self.manifest.description
        return None if record is None else self._read_whole(DESCRIPTION, record)

    # -- RAM -------------------------------------------------------------------------------------

    def load_ram(
        self,
        index: int,
        memory: GuestMemory,
        should_stop: Stop = None,
        verify: bool = True,
        progress: Progress = None,
    ) -> int:
        """Read a block's data into guest memory; holes of the file stay holes of the memory.

        Args:
            index: the block's.
            memory: fresh (all zero) memory, at least as long as the block.
            should_stop: asked every MiB; true ends it with `MigrationCancelled`.
            verify: compare every chunk with its digest.
            progress: called with the bytes read since the last call.

        Returns:
            Bytes read.

        Raises:
            SnapshotError: the file cannot be read or, verifying, a chunk is not what was written.
            ValueError: the memory is too short, or not fresh.
        """
        block = self.blocks[index]
        if memory.length < block.length:
            raise ValueError(f"RAM block {block.idstr!r} is longer than the memory given")
        total = 0

        def each(start: int, part: memoryview, size: int) -> None:
            nonlocal total
            if not memory.is_zero(start, len(part)):
                raise ValueError(f"the memory for RAM block {block.idstr!r} is not zero")
            if size:
                memory.fill(start, part)
                total += size
                if progress is not None:
                    progress(size)

        self._walk(index, each, should_stop, verify)
        return total

    def verify(self, should_stop: Stop = None, progress: Progress = None) -> None:
        """Compare every byte of the snapshot with its digest.

        Args:
            should_stop: asked every MiB; true ends it with `MigrationCancelled`.
            progress: called with the bytes of RAM that were read since the last call.

        Raises:
            SnapshotError: the first difference: which file, which block, where.
        """
        # Properties that check what they return.
        _ = self.config, self.device_state, self.description
        for index, record in enumerate(self.manifest.blocks):
            found = 0

            def each(_start: int, part: memoryview, size: int) -> None:
                nonlocal found
                if size:
                    found += _pages.data_bytes(part, TARGET_PAGE_SIZE)
                    if progress is not None:
                        progress(size)

            self._walk(index, each, should_stop, True)
            if found != record.data_bytes:
                raise SnapshotError(
                    f"{printable(self.path / MANIFEST)} is damaged: it gives RAM block "
                    f"{printable(record.block.idstr)} {record.data_bytes} bytes of data, "
                    f"there are {found}",
                    remedy=_DAMAGED,
                )

    def _walk(
        self,
        index: int,
        each: Callable[[int, memoryview, int], None],
        should_stop: Stop,
        verify: bool,
    ) -> None:
        """Read a block chunk by chunk, and compare with the digests.

        ``each`` gets the offset, the chunk's bytes, good until it returns, and how many of them
        were read: the others are zero.
        """
        block = self.blocks[index]
        path = self.path / RAM / ram_file(index)
        with ExitStack() as stack:
            fd = self._open_ram(ram_file(index), stack)
            digests = self._open_ram(digest_file(index), stack)
            if verify:
                self._check_digest_list(index, digests)
            entries = b""
            zeros = bytes(CHUNK_SIZE)
            extent = array("q", [0, 0])
            # Not straight into guest memory: what the processor has in its cache is hashed and
            # copied sooner than a page fault for each page takes. A mapping of its own: where there
            # are holes none of its pages are touched.
            fresh = stack.enter_context(mmap.mmap(-1, CHUNK_SIZE))
            buffer = stack.enter_context(memoryview(fresh))
            for chunk in range(chunk_count(block.length)):
                if should_stop is not None and should_stop():
                    raise MigrationCancelled(
                        f"reading RAM block {printable(block.idstr)} was cancelled"
                    )
                if verify and chunk % WINDOW == 0:
                    with _fs.failing("read", self.path / RAM / digest_file(index)):
                        entries = os.pread(digests, DIGEST_SIZE * WINDOW, chunk * DIGEST_SIZE)
                start, size = chunk_range(chunk, block.length)
                with buffer[:size] as part:
                    with _fs.failing(f"read (at offset {start:#x})", path):
                        done = _fs.checked(_pages.read_data(fd, part, start, extent))
                    if verify:
                        at = chunk % WINDOW * DIGEST_SIZE
                        self._check_chunk(index, start, part, done, entries[at : at + DIGEST_SIZE])
                    each(start, part, done)
                    if done:
                        part[:] = zeros[:size]

    def _check_chunk(
        self, index: int, start: int, part: memoryview, done: int, wanted: bytes
    ) -> None:
        if wanted == _ZERO_DIGEST:
            same = done == 0 or _pages.is_zero(part)
        else:
            same = xxhash.xxh3_128_digest(part) == wanted
        if not same:
            raise SnapshotError(
                f"{printable(self.path / RAM / ram_file(index))} is damaged: RAM block "
                f"{printable(self.blocks[index].idstr)} differs from its digest in the "
                f"{_fs.human(len(part))} at offset {start:#x}",
                remedy=_DAMAGED,
            )

    def _check_digest_list(self, index: int, fd: int) -> None:
        path = self.path / RAM / digest_file(index)
        whole = hashlib.sha256()
        at = 0
        with _fs.failing("read", path):
            while data := os.pread(fd, DIGEST_SIZE * WINDOW, at):
                whole.update(data)
                at += len(data)
        if whole.hexdigest() != self.manifest.blocks[index].digests_sha256:
            raise SnapshotError(
                f"{printable(path)} is damaged: its sha256 is not the manifest's",
                remedy=_DAMAGED,
            )

    # -- files -----------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        manifest = self.manifest
        files = [(CONFIG, manifest.config), (DEVICE_STATE, manifest.device_state)]
        if manifest.description is not None:
            files.append((DESCRIPTION, manifest.description))
        for name, record in files:
            with _fs.failing("open", self.path / name):
                fd = _fs.open_file(name, self._dir)
            self._check_size(fd, Path(name), record.size)
            os.close(fd)
        self._check_unlisted(len(self.blocks))
        for index, block in enumerate(self.blocks):
            for name, size in (
                (ram_file(index), block.length),
                (digest_file(index), digest_size(block)),
            ):
                with ExitStack() as stack:
                    self._check_size(self._open_ram(name, stack), Path(RAM, name), size)

    def _check_unlisted(self, blocks: int) -> None:
        # A manifest that lost an entry would restore a guest that lacks a block.
        listed = {name(index) for index in range(blocks) for name in (ram_file, digest_file)}
        with _fs.failing("open", self.path / RAM):
            with _fs.closing(_fs.open_directory(RAM, self._dir)) as ram:
                more = sorted(Path(RAM, name) for name in set(os.listdir(ram)) - listed)
            if self.manifest.description is None and DESCRIPTION in os.listdir(self._dir):
                more.append(Path(DESCRIPTION))
        if more:
            raise SnapshotError(
                f"{printable(self.path / MANIFEST)} does not list {printable(more[0])}, "
                "which is there",
                remedy=_DAMAGED,
            )

    def _check_size(self, fd: int, name: Path, wanted: int) -> None:
        size = os.fstat(fd).st_size
        if size != wanted:
            how = (
                f"lacks {wanted - size} of its {wanted} bytes"
                if size < wanted
                else f"has {size - wanted} bytes more than its {wanted}"
            )
            raise SnapshotError(f"{printable(self.path / name)} {how}", remedy=_DAMAGED)

    def _open_ram(self, name: str, stack: ExitStack) -> int:
        with _fs.failing("open", self.path / RAM / name):
            ram = _fs.open_directory(RAM, self._dir)
            try:
                fd = _fs.open_file(name, ram)
            finally:
                os.close(ram)
        stack.callback(os.close, fd)
        return fd

    def _read_whole(self, name: str, record: FileRecord) -> bytes:
        path = self.path / name
        with _fs.failing("read", path):
            fd = _fs.open_file(name, self._dir)
            with open(fd, "rb") as file:
                raw = file.read(record.size + 1)
        if len(raw) != record.size or hashlib.sha256(raw).hexdigest() != record.sha256:
            raise SnapshotError(
                f"{printable(path)} is damaged: its sha256 is not the manifest's",
                remedy=_DAMAGED,
            )
        return raw

    def restorations(self) -> list[str]:
        """Return a line for each time that this was sent to a QEMU: when, and where to."""
        try:
            fd = _fs.open_file(RESTORED, self._dir)
        except OSError:
            return []
        with _fs.closing(fd):
            text = os.pread(fd, 65536, 0).decode("utf-8", "replace")
        return [printable(line) for line in text.splitlines()]

    def note_restoration(self, line: str) -> None:
        """Add a line to what restorations() returns: the machine may run elsewhere from now on.

        Raises:
            SnapshotError: it cannot be written; a snapshot may lie on a read-only file system.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with (
            _fs.failing("write", self.path / RESTORED),
            _fs.closing(os.open(RESTORED, flags, 0o600, dir_fd=self._dir)) as fd,
        ):
            os.write(fd, f"{line}\n".encode())
            os.fsync(fd)

    def command(self) -> RecordedCommand | None:
        """Return how the QEMU was started that this is of; None where that is not recorded.

        Raises:
            SnapshotError: the file cannot be read, or is damaged.
        """
        path = self.path / COMMAND
        with _fs.failing("read", path):
            try:
                fd = _fs.open_file(COMMAND, self._dir)
            except FileNotFoundError:
                return None
            with open(fd, "rb") as file:
                raw = file.read(MAX_COMMAND + 1)
        return RecordedCommand.decode(raw, printable(path))

    def close(self) -> None:
        """Close the directory; a second time does nothing."""
        fd, self._dir = self._dir, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_dir", -1) >= 0:
            warnings.warn(
                f"unclosed snapshot {self.path}", ResourceWarning, stacklevel=1, source=self
            )
            self.close()


def _cannot_open(error: OSError, path: Path) -> SnapshotError:
    if error.errno != errno.ENOENT:
        return _fs.failure(error, "open the snapshot", path)
    shown = printable(path)
    try:
        beside = sorted(os.listdir(path.parent))
    except OSError:
        beside = []
    for suffix, meaning in (
        (".incomplete", "a migration that failed after the source had finished"),
        (".partial-", "a run that did not finish, or is still at work"),
    ):
        for name in beside:
            if name.startswith(path.name + suffix):
                return SnapshotError(
                    f"there is no snapshot {shown}, only "
                    f"{printable(path.parent / name)}, left by {meaning}",
                    remedy="whether it is whole, and a snapshot all the same, finds out: "
                    f"rdma-migrate recover {shlex.quote(str(path.parent / name))}",
                )
    return SnapshotError(f"there is no snapshot {shown}", remedy="check the path")


def _read_manifest(directory: int, path: Path) -> Manifest:
    where = path / MANIFEST
    shown = printable(where)
    try:
        fd = _fs.open_file(MANIFEST, directory)
    except FileNotFoundError:
        raise SnapshotError(
            f"{printable(path)} has no {MANIFEST}: it is no snapshot, or an incomplete one",
            remedy="check the path",
        ) from None
    except OSError as error:
        raise _fs.failure(error, "open", where) from error
    with _fs.failing("read", where), open(fd, "rb") as file:
        raw = file.read(MAX_MANIFEST + 1)
    if len(raw) > MAX_MANIFEST:
        raise SnapshotError(f"{shown} is longer than a manifest can be", remedy=_DAMAGED)
    if not raw:
        raise SnapshotError(
            f"{printable(path)} is the work of a run that did not finish, or is still at work",
            remedy="it is not complete and cannot be used: take the snapshot again",
        )
    return Manifest.decode(raw, shown)
