# SPDX-License-Identifier: Apache-2.0
"""Whether a file can be written where it is wanted, asked before the work whose result it holds."""

import os
import pathlib

from vqjax.errors import VqjaxError


def check_file(option: str, path: str | os.PathLike, *, makes_folders: bool = False) -> None:
    """Says before any work that a file could not be written after it.

    Args:
      option: that names the file, such as "--out"; errors begin with it.
      path: of the file. One that exists will be replaced, so its own permissions do not count.
      makes_folders: whether what writes the file makes missing folders.

    Raises:
      VqjaxError: if `path` is a folder, or its folder is none, is missing or takes no new files.
    """
    target = pathlib.Path(path)
    # Not pathlib's own questions: they raise below a folder that may not be entered.
    if os.path.isdir(target):
        raise VqjaxError(f"{option} {target}: is a folder, expected the name of a file")
    folder = target.absolute().parent
    above = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    if not os.path.isdir(above):
        raise VqjaxError(
            f"{option} {target}: {above} is a file, expected a folder; choose another {option}"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise VqjaxError(
            f"{option} {target}: {above} takes no new files (missing permission or a read-only "
            f"disk); choose another {option}"
        )
    if above != folder and not makes_folders:
        raise VqjaxError(f"{option} {target}: no folder {target.parent}; make it first")
