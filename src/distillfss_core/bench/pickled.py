"""Reader of pickled pandas tables that runs no code of the file.

A pickle names functions and calls them. Here only those that rebuild a DataFrame of numpy arrays may be named;
anything else is refused before it is fetched.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillfss_core.errors import InputFileError
from distillfss_core.io.images import DECODER_ERRORS

_ALLOWED = {
    "builtins": ("slice", "bytearray", "complex", "range"),
    "_codecs": ("encode",),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "pandas": ("DataFrame", "Index", "RangeIndex", "Series", "StringDtype"),
    "pandas.core.frame": ("DataFrame",),
    "pandas.core.series": ("Series",),
    "pandas.core.indexes.base": ("Index", "_new_Index"),
    "pandas.core.indexes.numeric": ("Int64Index",),
    "pandas.core.indexes.range": ("RangeIndex",),
    "pandas.core.internals.managers": ("BlockManager", "SingleBlockManager"),
    "pandas.core.internals.blocks": ("new_block",),
    "pandas._libs.internals": ("_unpickle_block",),
    "pandas.core.arrays.string_": ("StringDtype", "StringArray"),
    "pandas.arrays": ("ArrowStringArray", "StringArray"),
    "pyarrow.lib": ("_restore_array", "type_for_alias", "py_buffer"),
    "pandas._libs.arrays": ("__pyx_unpickle_NDArrayBacked",),
}
_MOVED = {("pandas.core.indexes.numeric", "Int64Index"): ("pandas.core.indexes.base", "Index")}


class _Refused(Exception):
    pass


def read_pickled_table(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a pickled DataFrame.

    Raises
    ------
    InputFileError
        If pandas is not installed, the file is damaged, names anything that a table does not need, or has no such
        column.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise InputFileError(f"{path}: pandas is needed to read it; pip install 'napari-distillfss[bench]'") from error

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name not in _ALLOWED.get(module, ()):
                raise _Refused(f"{module}.{name}")
            return super().find_class(*_MOVED.get((module, name), (module, name)))

    try:
        table = Unpickler(io.BytesIO(path.read_bytes())).load()
    except _Refused as refused:
        raise InputFileError(f"{path}: asks for {refused}, which no table needs; it was not read") from None
    except (pickle.UnpicklingError, *DECODER_ERRORS, AttributeError, ImportError) as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputFileError(f"{path}: cannot be read as a table ({why}); download it anew") from error
    if not isinstance(table, pandas.DataFrame):
        raise InputFileError(f"{path}: holds a {type(table).__name__}, not a table")
    for column in columns:
        if column not in table:
            raise InputFileError(f"{path}: has no column {column!r}, only {', '.join(map(str, table))}")
    return {column: list(table[column]) for column in columns}
