"""Functions for a process of its own."""

import os
import sys

from distillfss_core.errors import SettingsError


def in_the_child(record):
    if record["error"]:
        raise SettingsError("as expected")
    return {"threads": os.environ["OMP_NUM_THREADS"], "torch": "torch" in sys.modules}


def crash(record):
    sys.exit("fell over")


def imported_while_learning(record):
    """Packages that peers import only after the clock has started, of those that were not there at all."""
    from distillfss_core.bench.peers import PEERS
    from distillfss_core.settings import DistillSettings
    from distillfss_core.support.support_set import SupportSet
    from pictures import blobs

    support = SupportSet(tuple(blobs(i) for i in range(2)), ("blob",))
    found = {}
    for name in record["peers"]:
        PEERS[name].load()
        before = {module.partition(".")[0] for module in sys.modules}
        PEERS[name].learn(support, DistillSettings.from_json(record["settings"]))
        found[name] = sorted({module.partition(".")[0] for module in sys.modules} - before)
    return found
