"""`compare`: models trained by one recipe, each scored with each refiner, on one table.

``run.py`` trains and scores, ``bootstrap.py`` says what is noise, ``result.py`` has the table and
``page.py`` the page.
"""

from .result import Comparison, Row, Training
from .run import compare

__all__ = ["Comparison", "Row", "Training", "compare"]
