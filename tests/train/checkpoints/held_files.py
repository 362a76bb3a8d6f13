"""A file system of this machine, `held:///path`, whose reader or writer can be made to wait."""

from __future__ import annotations

import re
import threading
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class HeldFileSystem(LocalFileSystem):
    """Opening a file whose path matches `HeldFileSystem.pattern`, to write to it or to read it, waits for `go_on`."""

    protocol = "held"
    pattern, mode = "\0", "wb"
    waits = threading.Event()
    go_on = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("held://"))

    @classmethod
    def hold(cls, pattern: str, mode: str = "wb") -> None:
        cls.pattern, cls.mode = pattern, mode
        cls.waits.clear()
        cls.go_on.clear()

    @classmethod
    def release(cls) -> None:
        cls.pattern = "\0"
        cls.go_on.set()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if re.search(self.pattern, path) and mode == self.mode:
            self.waits.set()
            self.go_on.wait()
        return super()._open(path, mode, **options)


fsspec.register_implementation("held", HeldFileSystem, clobber=True)
