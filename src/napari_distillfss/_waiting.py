"""Functions whose result napari waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import distillfss_core as core

Result = TypeVar("Result")


def wait_for(function: Callable[[], Result], name: str) -> Result:
    """Call a function; in another thread where there is a window, which would stand still for some seconds.

    Parameters
    ----------
    function : function
    name : str
        A noun for it in the activity dock, with a capital letter.
    """
    try:
        from napari_distillfss import _threads
    except ImportError:  # without napari or Qt there is no window
        return function()
    result: Result = _threads.wait_for(function, name)
    return result


def wait_for_run(run: core.Run[Any, Result], name: str) -> Result:
    """Iterate a run to its result; in another thread where there is a window, which shows its progress.

    Parameters
    ----------
    run : Run
        Its steps have ``index`` and ``total``.
    name : str
        A noun for it, with a capital letter.

    Raises
    ------
    core.DistillFSSError
        If it was cancelled or has failed.
    """
    try:
        from napari_distillfss import _threads
    except ImportError:
        return core.finish(run)
    result: Result = _threads.wait_for_run(run, name)
    return result
