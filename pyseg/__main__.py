"""``python -m pyseg``."""

from .cli import main

main()
