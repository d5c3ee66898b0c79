"""Warnings of the core as notifications of napari."""

from __future__ import annotations

import logging
from collections.abc import Callable

from napari.utils.notifications import show_warning

_log = logging.getLogger("distillfss_core")


class _Notices(logging.Handler):
    """Shows each warning once. napari takes notifications from any thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.docks: set[object] = set()
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.shown:
            self.shown.add(text)
            show_warning(f"DistillFSS: {text}")


_notices = _Notices()


def show_notices() -> Callable[[], None]:
    """Show what the core warns of, until every dock has called the function that it got from here."""
    dock = object()
    _notices.docks.add(dock)
    _log.addHandler(_notices)

    def hide() -> None:
        _notices.docks.discard(dock)
        if not _notices.docks:
            _log.removeHandler(_notices)
            _notices.shown.clear()

    return hide
