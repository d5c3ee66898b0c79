"""Functions for a process of its own."""

import os
import sys

from distillfss_core.errors import SettingsError


def in_the_child(record):
    if record["fault"]:
        raise SettingsError("as expected")
    return {"threads": os.environ["OMP_NUM_THREADS"], "torch": "torch" in sys.modules}


def crash(record):
    sys.exit("fell over")
