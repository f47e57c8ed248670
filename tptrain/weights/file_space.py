"""Room on the disk for a file whose size is known before its first byte."""

from __future__ import annotations

import ctypes
import errno
import os

# Not `os.posix_fallocate`: where the file system cannot reserve, glibc writes a byte into each block.
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS}


def reserve_space(descriptor: int, num_bytes: int) -> None:
    """Make an empty file `num_bytes` long with all its blocks, where the file system can; elsewhere nothing.

    Writing into blocks that are already the file's takes a sixth of the time on ext4, and a disk without
    room says so before anything is written. Raises OSError when the disk is full, or the size not permitted.
    """
    if _fallocate is None or not num_bytes:
        return
    while _fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(num_bytes)):
        code = ctypes.get_errno()
        if code in _CANNOT_RESERVE:
            return
        if code != errno.EINTR:  # a signal, such as one that ends the run after this
            raise OSError(code, os.strerror(code))
