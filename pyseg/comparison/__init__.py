"""`compare`: models trained by one recipe, each scored with each refiner, on one table.

``run.py`` trains and scores, ``result.py`` has the table and ``page.py`` the page. What is noise,
`pyseg.metrics.bootstrap` says.
"""

from .result import Comparison, Row, Training
from .run import compare

__all__ = ["Comparison", "Row", "Training", "compare"]
