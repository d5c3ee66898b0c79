"""The fastest engine and precision for a network on this processor: timed once, then looked up in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.io.writing import atomic_path
from distillfss_core.models.engines import Engine, StudentNetwork, describe_engine

log: logging.Logger = logging.getLogger(__name__)

Form = tuple[str, str]
"""An engine and a precision."""

_FORMAT, _VERSION = "distillfss-engines", 2
_SECONDS = 0.5  # that each form is timed at least
_GAIN = 0.95  # a form is taken before an exacter one if it takes less than this part of its time


def iter_fastest_form(
    forms: Sequence[Form],
    network: StudentNetwork,
    make: Callable[[str, str], Engine],
    window: tuple[int, int],
    *,
    measure: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[None, None, Form | None]:
    """Find the fastest of some engines and precisions, for windows of one size; it pauses after each window.

    Closed before its end, nothing is kept.

    Parameters
    ----------
    forms : sequence of (engine, precision)
        The exacter ones first: a later one has to be five percent faster than it.
    network : StudentNetwork
        Its form is part of the key of the cache; its weights are not.
    make : function of engine and precision
        Gives what runs the network.
    window : (int, int)
        Height and width in zoomed pixels, multiples of those of the backbone.
    measure : bool
        Whether to time them where the cache has no times: half a second for each, and its preparation.
    clock : function
        Seconds.

    Returns
    -------
    (str, str) or None
        None where nothing is known of them.
    """
    key = _key(forms, network)
    known = _cached(key, forms)
    times = known.get(window)
    if times is None and measure:
        times = yield from _iter_times(forms, make, window, clock)
        _keep(key, known | {window: times})
    if not times:
        return None
    timed = Timed(window, _best(forms, times), times)
    log.info("%s; %s is taken", timed, _name(timed.best))
    return timed.best


@dataclass(frozen=True)
class Timed:
    """Engines and precisions that were timed here.

    Parameters
    ----------
    window : (int, int)
        Height and width in zoomed pixels.
    best : (str, str)
        Engine and precision that are taken.
    times : mapping of str to float
        Seconds of a window, by engine and precision.
    """

    window: tuple[int, int]
    best: Form
    times: Mapping[str, float]

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in self.times.items())
        return f"a window of {self.window[0]} x {self.window[1]} takes: {listed}"


def timed_forms(forms: Sequence[Form], network: StudentNetwork) -> list[Timed]:
    """What the cache knows of some engines and precisions, by windows, the smallest first; nothing is timed."""
    known = _cached(_key(forms, network), forms)
    return [Timed(window, _best(forms, known[window]), known[window]) for window in sorted(known)]


def _best(forms: Sequence[Form], times: Mapping[str, float]) -> Form:
    known = [form for form in forms if _name(form) in times]
    best = known[0]
    for form in known[1:]:
        if times[_name(form)] < _GAIN * times[_name(best)]:
            best = form
    return best


def cache_file() -> Path | None:
    """Where times are kept: a file in the user's cache; None where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "napari-distillfss", "engines.json")
    except RuntimeError:
        return None


def _iter_times(
    forms: Sequence[Form], make: Callable[[str, str], Engine], window: tuple[int, int], clock: Callable[[], float]
) -> Generator[None, None, dict[str, float]]:
    """Seconds that a window takes at least; without the forms that fail."""
    image: Float[Tensor, "1 3 h w"] = torch.rand(1, 3, *window, generator=torch.Generator().manual_seed(0))
    times = {}
    for form in forms:
        try:
            times[_name(form)] = yield from _iter_time(make(*form), image, clock)
        except (SettingsError, RuntimeError) as error:
            log.info("%s is not timed: %s", _name(form), str(error).partition("\n")[0])
    return times


def _iter_time(
    engine: Engine, image: Float[Tensor, "1 3 h w"], clock: Callable[[], float]
) -> Generator[None, None, float]:
    _run(engine, image)  # prepares the engine, and its memory for this size
    yield
    total, least = 0.0, float("inf")
    while total < _SECONDS:
        start = clock()
        _run(engine, image)
        seconds = clock() - start
        total, least = total + seconds, min(least, seconds)
        yield
    return least


@torch.inference_mode()
def _run(engine: Engine, image: Float[Tensor, "1 3 h w"]) -> None:
    engine(image)


def _name(form: Form) -> str:
    return " ".join(form)


def _key(forms: Sequence[Form], network: StudentNetwork) -> str:
    """A hash of all that times depend on, but for the window: processor, threads, libraries, form of the network."""
    probe = network.probe
    facts = {
        "processor": [_processor(), platform.machine(), os.cpu_count()],
        "threads": torch.get_num_threads(),
        "libraries": sorted({describe_engine(engine) for engine, _ in forms}),
        "forms": [_name(form) for form in forms],
        "backbone": network.backbone.spec.name,
        "head": [network.head.form.to_json(), network.head.classes],
        "probe": None if probe is None else [probe.inputs, probe.alone],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _cached(key: str, forms: Sequence[Form]) -> dict[tuple[int, int], dict[str, float]]:
    """Times in the cache by window, where they are of these forms."""
    windows = _read().get(key)
    if not isinstance(windows, Mapping):
        return {}
    names = {_name(form) for form in forms}
    known = {}
    for window, times in windows.items():
        size = re.fullmatch(r"(\d+) x (\d+)", window)
        is_known = isinstance(times, Mapping) and times and names.issuperset(times)
        if size and is_known and all(isinstance(seconds, float) and seconds > 0 for seconds in times.values()):
            known[int(size[1]), int(size[2])] = dict(times)
    return known


def _read() -> dict[str, Any]:
    """All times in the cache; none of a file that is damaged, or of another program."""
    file = cache_file()
    with suppress(OSError, ValueError):
        content = json.loads(file.read_bytes()) if file else None
        if isinstance(content, dict) and (content.get("format"), content.get("version")) == (_FORMAT, _VERSION):
            times = content.get("times")
            return times if isinstance(times, dict) else {}
    return {}


def _keep(key: str, times: Mapping[tuple[int, int], Mapping[str, float]]) -> None:
    """Put times into the cache; where it cannot be written, they are measured again the next time."""
    file = cache_file()
    if file is None or not times:
        return
    windows = {f"{height} x {width}": dict(part) for (height, width), part in times.items() if part}
    content = {"format": _FORMAT, "version": _VERSION, "times": _read() | {key: windows}}
    with suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
