"""Files that may not be read, for tests that root runs: the right to read everything is laid down for a while."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# linux/capability.h: version 3, for this thread; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
_VERSION = 0x20080522
_READS_EVERYTHING = 1 << 1 | 1 << 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def permissions_hold() -> Iterator[None]:
    """This thread, and those that it starts, are bound by the permissions of files, also as root."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()

    def call(function: str) -> None:
        if getattr(libc, function)(ctypes.byref(header), sets):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), function)

    call("capget")
    before = sets[0].effective
    sets[0].effective = before & ~_READS_EVERYTHING
    call("capset")
    try:
        yield
    finally:
        sets[0].effective = before
        call("capset")
