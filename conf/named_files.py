"""Files that a document names, such as a manifest, an index or a marker: they lie in the folder that it is about.

Who wrote the document need not be who reads it. A name that leads elsewhere would have a command read, link to or write
what the document has no right to. Imports no package.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

# As Python and Arrow's RE2 understand it alike. No name at all, an absolute path, a step up, no name of any file.
FOREIGN_NAME = r"^$|^/|(?:^|/)\.\.(?:/|$)|\x00"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


def unsafe_file(
    document: object,
    key: str,
    name: object,
    folder: str | os.PathLike[str] | None = None,
    may_link_to: Callable[[str], bool] | None = None,
) -> str:
    """Why the file that `document` names by `name`, the value of its `key`, is not to be touched; empty where it may.

    Absolute names, steps up (`..`) and what no file is called are refused; below `folder` also links that lead out of
    it and what is no regular file: reading a pipe waits for ever, reading a device may do anything. A link out of
    `folder` is let through where `may_link_to` says so of the real path that it leads to. A `folder` that is a link
    itself counts as what it leads to. None: of files elsewhere, such as at a URL, there is no more than the name.

    A file that is missing or cannot be looked at is none of this: who opens it says so.
    """
    problem = _foreign_name(name)
    if not problem and folder is not None:
        problem = _foreign_place(os.fspath(folder), str(name), may_link_to)
    if not problem:
        return ""
    where = "its folder" if folder is None else os.fspath(folder)
    return (
        f"{document}: {key} is {name!r}, {problem}; only regular files within {where} are read or written: restore "
        "what was altered, or do not use what came with it"
    )


def _foreign_name(name: object) -> str:
    if not isinstance(name, str):
        return "which is no text"
    if name.startswith("/"):
        return "an absolute path"
    if re.search(FOREIGN_NAME, name):
        return "a path with '..'" if ".." in name.split("/") else "which no file is called"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "which no file is called"
    return ""


def _foreign_place(folder: str, name: str, may_link_to: Callable[[str], bool] | None) -> str:
    path, has_link = folder, False
    try:
        for part in name.split("/"):
            path = os.path.join(path, part)
            found = os.lstat(path)
            has_link = has_link or stat.S_ISLNK(found.st_mode)
    except OSError:
        if not has_link:
            return ""
    if has_link:
        real, root = os.path.realpath(os.path.join(folder, name)), os.path.realpath(folder)
        if os.path.commonpath((real, root)) != root and not (may_link_to is not None and may_link_to(real)):
            return f"a link out of its folder, to {real}"
        try:
            found = os.stat(real)
        except OSError:
            return ""
    if stat.S_ISREG(found.st_mode):
        return ""
    return f"which is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}"
