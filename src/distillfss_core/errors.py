"""The family of expected errors: each message says what happened, with which value, and what to do."""


def printable(name: object) -> str:
    """A name as text that every UTF-8 file and message can hold; bytes that are no text become ``\\udcNN``."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


class DistillFSSError(Exception):
    """An expected error; its message is one line, fit to be shown to a user as it is."""


class SettingsError(DistillFSSError, ValueError):
    """A setting outside its limits, or settings that contradict one another."""


class ImageError(DistillFSSError, ValueError):
    """An image or label array that cannot be used as it is (shape, dtype, values)."""


class NotFiniteError(ImageError):
    """An image with pixels that are NaN, infinite, or beyond 3e38."""


class InputFileError(DistillFSSError, OSError):
    """A file of the user's that is missing, unreadable or of an unknown kind."""


class SupportSetError(DistillFSSError, ValueError):
    """Annotated slices that do not make a support set."""


class NoStudentYetError(DistillFSSError):
    """A training that was asked for its student before it had begun to teach one."""


class UnfinishedError(DistillFSSError):
    """A run whose result was asked for before it had ended."""


class WeightsUnavailableError(DistillFSSError):
    """Backbone weights that are neither packaged nor on disk, and cannot be downloaded now."""


class ModelFileError(DistillFSSError, OSError):
    """A model file that is damaged, truncated, newer than this program or of another kind."""


class OutputError(DistillFSSError, OSError):
    """A result that could not be written; what was there before is untouched."""


class OutOfMemoryError(DistillFSSError, MemoryError):
    """A device that ran out of memory even with the smallest pieces."""


class IntensityWarning(UserWarning):
    """An input whose intensities are unlike those that the student learned; its labels may be wrong."""


class ConsensusWarning(UserWarning):
    """Planes in three directions that contradict one another; their consensus may be worse than single planes."""
