"""Function calls in a separate process, with memory and threads of its own.

The threads of torch, BLAS and OpenMP are set by the environment variable that all of them read.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distillfss_core.errors import DistillFSSError

Message = dict[str, Any]

_CHILD = "import sys; from distillfss_core.bench.apart import answer; answer(sys.argv[1])"


def call_apart(function: Callable[[Message], Message], argument: Message, threads: int) -> Message:
    """Call a function of a module by name, on so many threads and (Linux) no more cores than that.

    Parameters
    ----------
    function : function of a JSON-able record
        Gives another.

    Raises
    ------
    DistillFSSError
        What the function raised, or that its process ended without a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        reply_file = Path(folder) / "answer.json"
        order = {
            "module": function.__module__,
            "function": function.__qualname__,
            "argument": argument,
            "threads": threads,
            "answer": str(reply_file),
        }
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "QT_QPA_PLATFORM": "offscreen",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        command = [sys.executable, "-c", _CHILD, json.dumps(order)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not reply_file.exists():
            said = done.stderr.strip().splitlines()
            raise DistillFSSError(f"its process ended with code {done.returncode}: {said[-1] if said else 'no word'}")
        reply: Message = json.loads(reply_file.read_text())
    if "error" in reply:
        raise DistillFSSError(reply["error"])
    result: Message = reply["found"]
    return result


def answer(text: str) -> None:
    """What the other process does."""
    order = json.loads(text)
    threads = int(order["threads"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    function = getattr(importlib.import_module(order["module"]), order["function"])
    try:
        reply = {"found": function(order["argument"])}
    except DistillFSSError as error:
        reply = {"error": str(error)}
    Path(order["answer"]).write_text(json.dumps(reply))
