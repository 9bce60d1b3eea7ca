"""pydensecrf's interface on `pyseg.ops.dense_crf`.

A script needs other import lines only:

    import pyseg.compat.pydensecrf.densecrf as dcrf
    from pyseg.compat.pydensecrf.utils import unary_from_labels, create_pairwise_bilateral

Results are those of pydensecrf up to rounding (``quality="compatible"``), on all cores.
"""

from . import densecrf, eigen, utils
from .densecrf import *  # noqa: F403
from .densecrf import __all__ as _classes
from .utils import *  # noqa: F403
from .utils import __all__ as _functions

__all__ = ["densecrf", "eigen", "utils", *_classes, *_functions]
