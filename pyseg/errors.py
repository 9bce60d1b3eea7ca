"""The errors that pyseg raises for its users' mistakes; each message names the remedy."""

import importlib
from types import ModuleType


class PysegError(Exception):
    """Root of every error that pyseg defines."""


class SpecError(PysegError, ValueError):
    """A pipeline spec that does not parse, or options that do not fit its stages."""


class UnknownName(PysegError, LookupError):
    """A name that no entry point and no ``register`` call has provided."""


class PluginError(PysegError):
    """A plugin that fails to import, clashes with another, or has the wrong shape."""


class PluginFailure(PluginError):
    """A stage, metric or data set that raised something unexpected, which is the cause."""


class ImageError(PysegError, ValueError):
    """An image file or array that cannot be read as an image, with the reason."""


class LabelError(PysegError, ValueError):
    """Label values that cannot be class ids, with their likely cause."""


class LayoutError(PysegError, FileNotFoundError):
    """A data set that is not where or as it should be, with what was expected and what is there."""

    absent = False  # whether all of the split is, rather than a part of it


class ScoreError(PysegError, ValueError):
    """Predictions or annotations that cannot be scored, with the reason."""


class WeightsError(PysegError, RuntimeError):
    """Weights that are absent, unreachable, damaged, unsafe or of another architecture."""


class ExportError(PysegError, RuntimeError):
    """A model that cannot leave as a file, or whose file computes something else."""


class HubError(PysegError, RuntimeError):
    """A repository of the Hugging Face Hub that is absent, out of reach, or refuses."""


class DeviceError(PysegError, RuntimeError):
    """A device that was asked for and is not there."""


class DeprecatedApi(FutureWarning):
    """A name of the interface for plugins that the next minor API version no longer has."""


def require(module: str, *, extra: str | None = None, remedy: str | None = None) -> ModuleType:
    """Imports a package that an installation may lack.

    Args:
        module: what to import, such as ``"accelerate"`` or ``"torchvision.ops"``.
        extra: the extra of pyseg-toolkit that brings it; None = every installation should have it.
        remedy: the command that installs it where that is not ``pip install`` of pyseg-toolkit.

    Raises:
        ImportError: it is absent or broken; the message names the remedy.
    """
    package = module.partition(".")[0]
    if remedy is None:
        remedy = f"pip install '{'pyseg-toolkit' if extra is None else f'pyseg-toolkit[{extra}]'}'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            cause = f"package {package!r} is there, but what it needs is not ({error})"
        else:
            cause = f"package {package!r} is not installed"
        raise ImportError(f"{cause}: {remedy}") from error
    except (Exception, SystemExit) as error:  # a package that is broken raises what it likes
        reason = str(error).partition("\n")[0]
        raise ImportError(
            f"package {package!r} is installed, but cannot be imported "
            f"({type(error).__name__}: {reason}): install a version that fits the others, "
            f"such as by pip install --force-reinstall {package.replace('_', '-')}"
        ) from error
