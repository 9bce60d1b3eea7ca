"""Promptable segmenters: an image is embedded once, then any number of prompts get their masks.

`Promptable` is what the refiners ask of one; each module here has some that answer.
"""

from .base import PROMPT_LOGIT, Fingerprint, Promptable, Prompts, Proposals, propose, stability
from .flood import Flood
from .huggingface import (
    ConceptSegmenter,
    Found,
    Sam3Concepts,
    TransformersBackend,
    load_sam3,
    load_transformers,
)
from .load import load_sam, load_sam2
from .sam import SAM2_WEIGHTS, SAM_WEIGHTS, Sam2Backend, SamBackend

__all__ = [
    "PROMPT_LOGIT",
    "SAM2_WEIGHTS",
    "SAM_WEIGHTS",
    "ConceptSegmenter",
    "Fingerprint",
    "Flood",
    "Found",
    "Promptable",
    "Prompts",
    "Proposals",
    "Sam2Backend",
    "Sam3Concepts",
    "SamBackend",
    "TransformersBackend",
    "load_sam",
    "load_sam2",
    "load_sam3",
    "load_transformers",
    "propose",
    "stability",
]
