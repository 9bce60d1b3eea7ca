"""The errors that pyseg raises for its users' mistakes; each message names the remedy."""


class PysegError(Exception):
    """Root of every error that pyseg defines."""


class SpecError(PysegError, ValueError):
    """A pipeline spec that does not parse, or options that do not fit its stages."""


class UnknownName(PysegError, LookupError):
    """A name that no entry point and no ``register`` call has provided."""


class PluginError(PysegError):
    """A plugin that fails to import, clashes with another, or has the wrong shape."""


class ImageError(PysegError, ValueError):
    """An image file or array that cannot be read as an image, with the reason."""


class LabelError(PysegError, ValueError):
    """Label values that cannot be class ids, with their likely cause."""


class ScoreError(PysegError, ValueError):
    """Predictions or annotations that cannot be scored, with the reason."""


class WeightsError(PysegError, RuntimeError):
    """Weights that are absent, unreachable, damaged, unsafe or of another architecture."""


class DeviceError(PysegError, RuntimeError):
    """A device that was asked for and is not there."""
