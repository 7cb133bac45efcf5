"""Files that are whole or as they were: what is measured for hours is not lost to a crash while it is written."""

from __future__ import annotations

import os
from pathlib import Path

from msd.errors import ConfigError


def write_whole(file: Path, content: bytes, what: str, remedy: str = "name another file") -> None:
    """Put `content` in place of the file, and onto the disk. Raises ConfigError, which calls the file `what`."""
    draft = file.with_name(f"{file.name}.new")
    try:
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ConfigError(f"{what} {file}: {error.strerror}", remedy=remedy) from error
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Have a new or renamed file's name on the disk, where the file system can."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        pass  # some network and FUSE file systems cannot; the content is safe all the same
    finally:
        os.close(number)
