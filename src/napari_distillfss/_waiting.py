"""Functions whose result napari waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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
