"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is finished is saved, and parts of results are removed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
_received: list[int] = []
"""Signals since the command began."""
_is_held = False


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise `KeyboardInterrupt`; a later SIGTERM or SIGHUP does nothing.

    Signals that are ignored stay so (nohup), and handlers of others stay in place.
    """
    global _is_held
    _received.clear()
    _is_held = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(_SIGNALS, signal.SIG_DFL)}
    replaced = [number for number, handler in defaults.items() if signal.getsignal(number) == handler]
    for number in replaced:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, defaults[number])


def _stop(number: int, frame: Any) -> None:
    _received.append(number)
    if not _is_held and (len(_received) == 1 or number == signal.SIGINT):
        raise KeyboardInterrupt


def hold_signals() -> None:
    """From here on no signal interrupts the command: what it has made is being saved."""
    global _is_held
    _is_held = True


def check_stopped() -> None:
    """Raise `KeyboardInterrupt` if a signal came whose exception was lost, e.g. within a destructor."""
    if _received and not _is_held:
        raise KeyboardInterrupt


def is_stopped() -> bool:
    """Whether a signal came."""
    return bool(_received)


def stop_code() -> int:
    """The exit code of a command that was stopped: 128 and the number of the first signal; 130 after Ctrl-C."""
    return 128 + (_received[0] if _received else signal.SIGINT)
