# SPDX-License-Identifier: Apache-2.0
"""The functions of migration.h for XBZRLE, and for zero pages: with its arguments and results.

The work is done by what the engine itself uses, over whole buffers.
"""

from __future__ import annotations

from rdma_mig import _stream
from rdma_mig.errors import LocalProtocolError
from rdma_mig.memory.page_stream import XbzrleCache
from rdma_mig.migration.state import migrate_get_current

__all__ = [
    "free_xbzrle_decoded_buf",
    "ram_handle_compressed",
    "xbzrle_cache_resize",
    "xbzrle_decode_buffer",
    "xbzrle_encode_buffer",
]

_Buffer = bytes | bytearray | memoryview
_Writable = bytearray | memoryview


def ram_handle_compressed(host: _Writable, ch: int, size: int) -> None:
    """Fill memory with a byte; where that is 0 and memory is zero already, it is not touched.

    Args:
        host: the memory.
        ch: the byte.
        size: how many bytes of it, from the start.
    """
    with memoryview(host) as view, view[:size] as part:
        if len(part) != size:
            raise ValueError(f"{size} bytes of a buffer of {len(part)}")
        _stream.ram_handle_compressed(part, ch)


def xbzrle_encode_buffer(
    old_buf: _Buffer, new_buf: _Buffer, slen: int, dst: _Writable, dlen: int
) -> int:
    """Encode what has changed in a page.

    Args:
        old_buf, new_buf: the page as it was, and as it is; ``slen`` bytes of each.
        dst: what it is encoded into, ``dlen`` bytes at most.

    Returns:
        Bytes in ``dst``; 0 if nothing has changed; -1 if it does not fit.
    """
    with (
        memoryview(old_buf) as old,
        memoryview(new_buf) as new,
        memoryview(dst) as out,
        old[:slen] as before,
        new[:slen] as after,
        out[:dlen] as room,
    ):
        return _stream.xbzrle_encode_buffer(before, after, room)


def xbzrle_decode_buffer(src: _Buffer, slen: int, dst: _Writable, dlen: int) -> int:
    """Patch a page with what has changed in it.

    Args:
        src: ``slen`` encoded bytes.
        dst: the page as it was, ``dlen`` bytes.

    Returns:
        Where in the page the last change ends; -1 if the encoding is broken or leaves the page.
    """
    with (
        memoryview(src) as encoded,
        memoryview(dst) as page,
        encoded[:slen] as changes,
        page[:dlen] as room,
    ):
        return _stream.xbzrle_decode_buffer(changes, room)


def xbzrle_cache_resize(new_size: int) -> int:
    """Make the cache of the process's migration larger or smaller, also while it runs.

    Args:
        new_size: bytes; rounded down to a power of two.

    Returns:
        The new size, bytes.

    Raises:
        ValueError: less than a page; the cache stays as it was.
        HostError: there is no memory for it; the cache stays as it was.
    """
    state = migrate_get_current()
    if state.xbzrle_cache is not None:
        state.xbzrle_cache_size = state.xbzrle_cache.resize(new_size)
    else:
        # Made and thrown away, so that what cannot be had is refused now.
        state.xbzrle_cache_size = XbzrleCache(new_size).size
    return state.xbzrle_cache_size


def free_xbzrle_decoded_buf() -> None:
    """Free the page that the process's incoming migration has decoded XBZRLE in, after its end.

    `process_incoming_migration` calls it when it has loaded, or failed.

    Raises:
        LocalProtocolError: another thread is still loading.
    """
    state = migrate_get_current()
    migration = state.migration
    if migration is not None and migration.running and not migration.is_worker:
        raise LocalProtocolError("pages are still being loaded")
    if state.page_reader is not None:
        state.page_reader.free_decoded()
