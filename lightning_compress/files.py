"""Files that are whole or not there: written beside their place, then renamed. Folders, tried before training."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from lightning_compress.checks import first_line

__all__ = ["check_folder", "free_folder", "replacing", "write_whole"]


@contextmanager
def replacing(path: str | Path, *beside: str) -> Iterator[Path]:
    """A path to write to, in the same folder, whose file takes the place of the real one once it is whole.

    Until then, and after an error, the old file stays. The folder is made where it is missing. What a process of this
    machine that was killed left of the same file is removed.

    Args:
        path: The file.
        beside: Endings of other files that the writer puts beside it, such as ``".bin"``.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "below", "words.txt")
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("all of them")
        >>> [file.name for file in path.parent.iterdir()]
        ['words.txt']
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{platform.node()}.{os.getpid()}."
    temporary = path.with_name(f"{mine}{path.name}")
    old = path.with_name(f"{mine}old.{path.name}")
    others = [(temporary.with_suffix(ending), path.with_suffix(ending)) for ending in beside]
    _clear(path.parent, [path.name, *(place.name for _, place in others)])
    try:
        yield temporary
        for written in (temporary, *(written for written, _ in others)):
            _to_disk(written)
        # No file system renames two files at once, and an old file must never be read with a new one beside it: a kill
        # in between leaves none.
        if others and path.exists():
            os.replace(path, old)
        for written, place in others:
            os.replace(written, place)
        os.replace(temporary, path)
    except OSError as error:
        # a full disk does not say for which file; an error without a number would lose its words by a name
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        for left in (temporary, old, *(written for written, _ in others)):
            left.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whose old content stays until the new one is whole.

    Args:
        path: The file; its folder is made where it is missing.
        content: Bytes, or text that is written as UTF-8.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_folder(name: str, folder: str | Path, given: object) -> None:
    """Refuse a folder that cannot be written to, by making it and a file in it; nothing new is left of either.

    Args:
        name: The argument as a user writes it, such as ``"Export.dirpath"``.
        folder: The folder that it stands for.
        given: What was given.

    Raises:
        ValueError: If the folder cannot be made, or no file in it.
    """
    folder = Path(folder).absolute()
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}={given if given is None else str(given)!r}: no file can be written to {str(folder)!r} "
            f"({first_line(error)}). Accepted is a folder that exists or can be made. Give another one, or free this "
            "path, its permissions or its disk."
        ) from error
    finally:
        for place in missing:
            with suppress(OSError, ValueError):  # of what was never made, or is in use by now
                place.rmdir()


def free_folder(folder: str | Path, names: Iterable[str]) -> Path:
    """The folder, or ``version_1``, ``version_2``, ... below it: the first that holds no file of these names.

    Args:
        folder: Where files are to be written.
        names: Their names.
    """
    folder = Path(folder)
    names = list(names)
    places = (folder / f"version_{i}" if i else folder for i in count())
    return next(place for place in places if not any(os.path.exists(place / name) for name in names))


def _clear(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes of this machine left of these files that were killed while they wrote them."""
    written = "|".join(map(re.escape, names))
    left = re.compile(rf"\.{re.escape(platform.node())}\.(\d+)\.(old\.)?({written})")
    for path in folder.iterdir():
        found = left.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    """Whether there is a process of this number; of one that the system does not let us ask about, yes."""
    if os.name != "posix":  # elsewhere signal 0 is one that ends it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk: else a rename may outlive a crash of the machine, and it may not."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
