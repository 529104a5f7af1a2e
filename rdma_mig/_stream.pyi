# SPDX-License-Identifier: Apache-2.0
from array import array
from mmap import mmap

_Buffer = bytes | bytearray | memoryview | mmap
_Words = memoryview | array[int]

INCOMPLETE: int
OTHER_WORD: int
OTHER_BLOCK: int
NO_BLOCK: int
COMPRESSED: int
BAD_FLAGS: int
OUTSIDE: int
BAD_ENCODING: int
TOO_LONG: int
BAD_XBZRLE: int
NO_DECODED: int

NORMAL: int
DUPLICATE: int
XBZRLE_PAGES: int
XBZRLE_BYTES: int
UNCHANGED: int
OVERFLOW: int
CACHE_MISS: int
COUNTERS: int

class PageCache:
    def __init__(self, pages: int, page: int) -> None: ...
    def take_over(self, other: PageCache) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...

def ram_handle_compressed(host: _Buffer, ch: int) -> None: ...
def xbzrle_encode_buffer(old: _Buffer, new: _Buffer, dst: _Buffer) -> int: ...
def xbzrle_decode_buffer(src: _Buffer, dst: _Buffer) -> int: ...
def load_pages(
    data: _Buffer,
    at: int,
    name: bytes | None,
    ram: _Buffer | None,
    fd: int,
    page: int,
    counters: _Words,
    decoded: _Buffer | None = None,
) -> tuple[int, int]: ...
def encode_pages(
    ram: _Buffer,
    first: int,
    dirty: _Words | None,
    name: bytes,
    fd: int,
    extent: _Words,
    page: int,
    out: _Buffer,
    counters: _Words,
    cache: PageCache | None = None,
    address: int = 0,
    age: int = 0,
    last: bool = False,
) -> tuple[int, int]: ...
