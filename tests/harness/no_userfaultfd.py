# SPDX-License-Identifier: Apache-2.0
"""A command that may not call userfaultfd(), as in a container or under libvirt's sandbox.

no_userfaultfd.py COMMAND...
"""

import ctypes
import os
import struct
import sys

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38
_USERFAULTFD = 323  # x86-64
_EPERM = 1
# Of struct sock_filter: load the system call's number; if it is that one, fail; else allow.
_FILTER = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x20, 0, 0, 0),
        (0x15, 0, 1, _USERFAULTFD),
        (0x06, 0, 0, 0x00050000 | _EPERM),
        (0x06, 0, 0, 0x7FFF0000),
    )
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(_FILTER) // 8, _FILTER)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
