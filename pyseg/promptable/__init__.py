"""Promptable segmenters: an image is embedded once, then any number of prompts get their masks.

`Promptable` is what the refiners ask of one; each module here has some that answer.
"""

from .base import PROMPT_LOGIT, Promptable, Prompts, Proposals, propose, stability
from .sam import SAM2_WEIGHTS, SAM_WEIGHTS, Sam2Backend, SamBackend, load_sam, load_sam2

__all__ = [
    "PROMPT_LOGIT",
    "SAM2_WEIGHTS",
    "SAM_WEIGHTS",
    "Promptable",
    "Prompts",
    "Proposals",
    "Sam2Backend",
    "SamBackend",
    "load_sam",
    "load_sam2",
    "propose",
    "stability",
]
