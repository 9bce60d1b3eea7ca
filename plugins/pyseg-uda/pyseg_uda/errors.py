"""What the caller can mend."""

from pyseg.errors import PysegError


class AdaptationError(PysegError, ValueError):
    """Domains or settings that adaptation cannot work with; the message says what to give."""
