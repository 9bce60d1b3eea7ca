"""Objects found by what they are called: an open-vocabulary detector gives boxes, a promptable
segmenter the masks in them (Grounded SAM, Ren et al., 2024, arXiv:2401.14159).

The detector is Grounding DINO (Liu et al., 2024, arXiv:2303.05499) or MM-Grounding-DINO (Zhao et
al., 2024, arXiv:2401.02361), from transformers; anything with `Detector.detect` takes its place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import SpecError, WeightsError, require
from .image import require_rgb8
from .promptable import (
    Promptable,
    Prompts,
    load_sam,
    load_sam2,
    load_sam3,
    propose,
    stability,
)

DEFAULT_DETECTOR = "IDEA-Research/grounding-dino-tiny"
SEGMENTERS: dict[str, Any] = {"sam": load_sam, "sam2": load_sam2}
SAM3 = "sam3"
_KINDS = ("grounding-dino", "mm-grounding-dino")
_MAX_ASPECT = 16  # longer images are padded: the processor would leave them no height at all
_NO_CLASS = ("background", "void", "unlabeled", "unlabelled", "other", "ignore")

_Span = tuple[int, int, int]  # of a phrase in a text: its index, its first token, its last + 1


class Detections(NamedTuple):
    """Boxes of one image."""

    boxes: Tensor  # [K, 4] float, xyxy in pixels of the image
    scores: Tensor  # [K] float, 0 to 1, the best first
    # over tuple.index, which nobody calls here
    index: Tensor  # type: ignore[assignment]  # [K] int64: which of the phrases it is


class Detector(Protocol):
    """Finds what phrases name; it keeps no state between calls."""

    def detect(self, image: Tensor, phrases: Sequence[str]) -> Detections:
        """Objects in ``image`` [3, H, W] uint8 RGB that ``phrases`` name."""
        ...


class GroundingDino(nn.Module):
    """Grounding DINO and MM-Grounding-DINO of transformers.

    A phrase's score is the mean probability of its own tokens, whose places are known from how the
    text was put together; texts are never compared. Phrases that do not fit into one text are
    asked in several passes.

    Args:
        network: ``GroundingDinoForObjectDetection`` or ``MMGroundingDinoForObjectDetection``.
        processor: its image processor.
        tokenizer: a ``tokenizers.Tokenizer``.
        box_threshold: the least probability of a box's best token.
        text_threshold: the least score of its phrase.
        nms: IoU from which the less certain of two boxes is dropped, whatever their phrases.

    Raises:
        WeightsError: a tokenizer of another network.
    """

    def __init__(
        self,
        network: nn.Module,
        processor: Any,
        tokenizer: Any,
        *,
        box_threshold: float = 0.25,
        text_threshold: float = 0.25,
        nms: float = 0.8,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.processor, self.tokenizer = processor, tokenizer
        self.box_threshold, self.text_threshold, self.nms = box_threshold, text_threshold, nms
        config: Any = network.config
        positions = getattr(config.text_config, "max_position_embeddings", config.max_text_len)
        self.longest = min(config.max_text_len, positions)  # tokens of a text
        self._marks = [tokenizer.token_to_id(text) for text in ("[CLS]", ".", "[SEP]")]
        buffer = getattr(getattr(network, "model", None), "special_tokens", None)
        known = None if buffer is None else buffer.tolist()
        if None in self._marks or (known and not {*self._marks} <= {*known}):
            raise WeightsError(
                "the tokenizer is of another network: its marks [CLS] . [SEP] are "
                f"{self._marks}, the network knows {known}"
            )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def texts(
        self, phrases: Sequence[str]
    ) -> Iterator[tuple[list[int], list[tuple[int, int, int]]]]:
        """The phrases as texts ``[CLS] a . b . [SEP]`` of at most `longest` tokens.

        Yields:
            The tokens of a text, and for each phrase in it its index and the first and last + 1 of
            its tokens.

        Raises:
            ValueError: a phrase without tokens, or with too many.
        """
        begin, dot, end = self._marks
        tokens: list[int] = [begin]
        spans: list[_Span] = []
        for index, phrase in enumerate(phrases):
            # What ends a phrase in the network's text must not stand within one.
            text = re.sub(r"[\s.?]+", " ", phrase.lower()).strip()
            own = self.tokenizer.encode(text, add_special_tokens=False).ids
            if not own or len(own) + 3 > self.longest:
                raise ValueError(
                    f"a phrase must have 1 to {self.longest - 3} tokens, {phrase[:60]!r} has "
                    f"{len(own)}"
                )
            if len(tokens) + len(own) + 2 > self.longest:
                yield [*tokens, end], spans
                tokens, spans = [begin], []
            spans.append((index, len(tokens), len(tokens) + len(own)))
            tokens += [*own, dot]
        if spans:
            yield [*tokens, end], spans

    @torch.no_grad()
    def detect(self, image: Tensor, phrases: Sequence[str]) -> Detections:
        from torchvision.ops import box_convert, clip_boxes_to_image, nms

        require_rgb8(image, "image")
        size = (image.shape[1], image.shape[2])
        least = -(-max(size) // _MAX_ASPECT)
        padded = F.pad(image, (0, max(0, least - size[1]), 0, max(0, least - size[0])))
        values = self.processor(
            images=[padded.cpu()], return_tensors="pt", input_data_format="channels_first"
        )
        pixels = values["pixel_values"].to(next(self.network.parameters()))
        scale = pixels.new_tensor([padded.shape[2], padded.shape[1]] * 2, dtype=torch.float32)
        boxes, scores, index = [torch.zeros(0, 4)], [torch.zeros(0)], [torch.zeros(0).long()]
        for tokens, spans in self.texts(phrases):
            ids = torch.tensor([tokens], device=self.device)
            found = self.network(
                pixel_values=pixels,
                pixel_mask=values["pixel_mask"].to(self.device),
                input_ids=ids,
                token_type_ids=torch.zeros_like(ids),
                attention_mask=torch.ones_like(ids),
            )
            probabilities = found.logits[0].float().sigmoid()  # [queries, tokens]
            means = [probabilities[:, first:stop].mean(1) for _, first, stop in spans]
            score, best = torch.stack(means, 1).max(1)
            own = (probabilities.amax(1) > self.box_threshold) & (score > self.text_threshold)
            corners = box_convert(found.pred_boxes[0][own].float(), "cxcywh", "xyxy") * scale
            boxes.append(clip_boxes_to_image(corners, size).cpu())
            scores.append(score[own].cpu())
            index.append(torch.tensor([k for k, _, _ in spans])[best[own].cpu()])
        every = Detections(torch.cat(boxes), torch.cat(scores), torch.cat(index))
        sides = every.boxes[:, 2:] - every.boxes[:, :2]
        solid = (sides > 0).all(1).nonzero()[:, 0]
        kept = solid[nms(every.boxes[solid], every.scores[solid], self.nms)]
        return Detections(*(values[kept] for values in every))

    def configuration(self) -> dict[str, Any]:
        """What makes the network again, without its weights, as JSON has it."""
        config: Any = self.network.config
        return {
            "config": json.loads(config.to_json_string(use_diff=False)),
            "processor": json.loads(self.processor.to_json_string()),
            "tokenizer": self.tokenizer.to_str(),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # transformers hangs functions on its modules while they run, which do not pickle
        network: Any = self.network
        options = {"nms": self.nms}
        options |= {"box_threshold": self.box_threshold, "text_threshold": self.text_threshold}
        made = (type(network), network.config, network.state_dict(), network.dtype)
        return _restored, (*made, self.processor, self.tokenizer, options)


def _restored(
    kind: Any,
    config: Any,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    processor: Any,
    tokenizer: Any,
    options: Mapping[str, float],
) -> GroundingDino:
    network = kind(config).to(next(iter(state.values())).device, dtype)
    network.load_state_dict(state)
    return GroundingDino(network, processor, tokenizer, **options)


def load_grounding_dino(
    id: str = DEFAULT_DETECTOR,
    *,
    weights: str | None = "default",
    configuration: Mapping[str, Any] | None = None,
    **options: Any,
) -> GroundingDino:
    """Grounding DINO or MM-Grounding-DINO.

    Args:
        id: its name on the Hugging Face hub, with ``@`` and a commit where one is to be pinned; or
            a folder of ``save_pretrained`` with network, image processor and tokenizer. What is
            fetched is kept in the hub's own cache, by commit; with ``PYSEG_OFFLINE=1`` nothing is.
        weights: ``"default"``; None = random ones, of a network like ``id``'s default, which needs
            no file.
        configuration: of `GroundingDino.configuration`, in place of the files of ``id``.
        options: thresholds of `GroundingDino`.

    Raises:
        WeightsError: ``id`` is no folder and cannot be fetched, lacks files, or is another network.
        ImportError: transformers is not installed.
    """
    transformers = require("transformers", extra="hf")
    tokenizers = require("tokenizers", extra="hf")
    if weights not in ("default", None):
        raise WeightsError(
            f"weights={weights!r}: a detector's weights are those of id, or None for random ones; "
            "give the folder that holds them as id"
        )
    if configuration is not None or weights is None:
        given = configuration or {
            "config": {"model_type": _KINDS[0]},
            "processor": {},
            "tokenizer": _letters(tokenizers).to_str(),
        }
        try:
            kind = given["config"]["model_type"]
            config = transformers.CONFIG_MAPPING[kind].from_dict(dict(given["config"]))
            network = _class_of(transformers, kind, "configuration")(config)
            processor = transformers.GroundingDinoImageProcessor.from_dict(dict(given["processor"]))
            tokenizer = tokenizers.Tokenizer.from_str(given["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"configuration is none of a grounding detector ({type(error).__name__}: {error})"
            ) from error
        return GroundingDino(network, processor, tokenizer, **options)
    name, _, revision = (id, "", "") if Path(id).is_dir() else id.partition("@")
    offline = os.environ.get("PYSEG_OFFLINE", "").lower() not in ("", "0", "false", "no")
    where: dict[str, Any] = {"revision": revision or "main", "local_files_only": offline}
    config = _read(id, "config.json", transformers.AutoConfig, name, where)
    network_class = _class_of(transformers, config.model_type, id)
    processor = _read(
        id, "preprocessor_config.json", transformers.GroundingDinoImageProcessor, name, where
    )
    tokenizer = _read(id, "the tokenizer's files", transformers.AutoTokenizer, name, where)
    network = _read(id, "the network's weights", network_class, name, where)
    return GroundingDino(network, processor, tokenizer.backend_tokenizer, **options)


def _class_of(transformers: Any, kind: str, id: str) -> Any:
    if kind not in _KINDS:
        raise WeightsError(
            f"id={id!r} is a {kind!r}, and grounded_sam takes {' and '.join(_KINDS)}: choose such "
            f"as {DEFAULT_DETECTOR}"
        )
    classes = ("GroundingDinoForObjectDetection", "MMGroundingDinoForObjectDetection")
    return getattr(transformers, classes[_KINDS.index(kind)])


def _read(id: str, what: str, kind: Any, name: str, where: Mapping[str, Any]) -> Any:
    """One part of a checkpoint."""
    options: dict[str, Any] = {}
    if what == "the network's weights":
        options["output_loading_info"] = True
    try:
        found = kind.from_pretrained(name, **where, **options)
    except Exception as error:  # whatever a hub without network raises
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if Path(id).is_dir():
            raise WeightsError(
                f"folder id={id!r} has no usable {what} ({reason}); save all parts there by "
                "save_pretrained"
            ) from error
        offline = " and PYSEG_OFFLINE is set" if where["local_files_only"] else ""
        raise WeightsError(
            f"id={id!r} is no folder, and the hub gives no {what}{offline} ({reason}): fetch it "
            f"where there is a network by 'hf download {name}', which fills the hub's cache, or "
            "save it to a folder there by save_pretrained and pass the folder as id"
        ) from error
    if not options:
        return found
    network, told = found
    if missing := sorted(told["missing_keys"]):
        raise WeightsError(
            f"id={id!r} lacks {len(missing)} weights of {kind.__name__}, such as {missing[0]}"
        )
    return network


def _letters(tokenizers: Any) -> Any:
    """A tokenizer that spells, for networks of random weights, with BERT's marks."""
    letters = [chr(code) for code in range(33, 127)]
    names = {101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?", 100: "[UNK]", 0: "[PAD]"}
    rest = [text for text in letters if text not in names.values()]
    rest += [f"##{text}" for text in letters]
    vocabulary = {text: number for number, text in names.items()}
    vocabulary |= {text: number for number, text in enumerate(rest, 2000)}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=1000)
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return made


# --- what to look for -------------------------------------------------------------------------


def phrases_of(name: str) -> tuple[str, ...]:
    """What a detector is to look for, from the name of a class.

    Example:
        >>> phrases_of("SignSymbol"), phrases_of("door; double door"), phrases_of("traffic_light")
        (('sign symbol',), ('door', 'double door'), ('traffic light',))
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"\(.*?\)", "", name))
    parts = [re.sub(r"[\s_.?-]+", " ", part).strip().lower() for part in re.split("[,;/]", apart)]
    return tuple(dict.fromkeys(part for part in parts if part))


def read_prompts(
    prompts: Mapping[str, str | Sequence[str]] | None, classes: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """Phrases of every class, checked.

    Args:
        prompts: class -> phrases, in one text with dots between them or as a list.
        classes: those whose names are the phrases where ``prompts`` has none; None = no others.

    Raises:
        SpecError: a phrase that is empty or of two classes, or a class of prompts that is none.
    """
    given = dict(prompts or {})
    names = list(given) if classes is None else list(classes)
    if stray := [name for name in given if name not in names]:
        raise SpecError(f"prompts name {stray}, but the classes are {names}")
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        value = given.get(name)
        if value is None:
            parts = phrases_of(name) if name.lower() not in _NO_CLASS else ()
        else:
            texts = [value] if isinstance(value, str) else value
            split = [part.strip().lower() for text in texts for part in str(text).split(".")]
            parts = tuple(dict.fromkeys(part for part in split if part))
            if not parts:
                raise SpecError(f"prompts of class {name!r} hold no phrase, got {value!r}")
        found[name] = parts
    owners: dict[str, str] = {}
    for name, parts in found.items():
        for part in parts:
            if owners.setdefault(part, name) != name:
                raise SpecError(
                    f"the phrase {part!r} is of the classes {owners[part]!r} and {name!r}: it can "
                    "find one of them only"
                )
    return found


# --- boxes to masks ---------------------------------------------------------------------------


class GroundedMasks(NamedTuple):
    """Some of the objects found."""

    logits: Tensor  # [K, H, W] float, of the masks
    quality: Tensor  # [K] float, 0 to 1: predicted IoU times stability
    scores: Tensor  # [K] float, of the detector
    index: Tensor  # type: ignore[assignment]  # [K] int64: which of the phrases


class Grounder(nn.Module):
    """A detector and a promptable segmenter.

    Args:
        detector: gives boxes.
        generator: gives the mask in a box.
        predicted_iou: the least IoU that the segmenter predicts for a mask to count.
        batch: boxes that are segmented at a time.
    """

    def __init__(
        self, detector: Detector, generator: Promptable, predicted_iou: float = 0.7, batch: int = 16
    ) -> None:
        super().__init__()
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.detector, self.generator = detector, generator
        self.predicted_iou, self.batch = predicted_iou, batch
        self.eval()

    def config(self) -> dict[str, Any]:
        """What a saved pipeline holds of the detector beside its weights."""
        made = getattr(self.detector, "configuration", None)
        return {} if made is None else {"configuration": made()}

    @torch.no_grad()
    def masks(
        self, image: Tensor, phrases: Sequence[str], embed: Callable[[], Any] | None = None
    ) -> Iterator[GroundedMasks]:
        """Masks of what ``phrases`` name in ``image`` [3, H, W] uint8 RGB, ``batch`` at a time.

        Args:
            embed: gives the segmenter's embedding where somebody may have it; called where
                something was found.
        """
        if not phrases:
            return
        found = self.detector.detect(image, phrases)
        if not len(found.boxes):
            return
        embedding = self.generator.embed(image) if embed is None else embed()
        chunks = (
            Prompts(
                torch.zeros(len(boxes), 1, 2),
                torch.full((len(boxes), 1), -1, dtype=torch.int32),
                boxes,
            )
            for boxes in found.boxes.split(self.batch)
        )
        proposals = propose(self.generator, embedding, chunks, predicted_iou=self.predicted_iou)
        for one in proposals:
            logits = self.generator.upsample(embedding, one.logits)
            quality = (one.predicted_iou.clamp(0, 1) * one.stability).cpu()
            place = one.index.cpu()
            yield GroundedMasks(logits, quality, found.scores[place], found.index[place])


class ConceptMasks(nn.Module):
    """In place of a `Grounder`: a segmenter that finds what a phrase names by itself, as SAM 3.

    Args:
        generator: with ``embed(image)``, ``find(embedding, phrase, threshold=…)``, which gives
            ``logits``, ``scores`` and ``boxes``, and ``upsample``.
        threshold: the least score.
        nms: IoU of boxes from which the less certain of two is dropped, whatever their phrases.
        batch: masks that are scaled to the image at a time.
    """

    def __init__(
        self, generator: Any, threshold: float = 0.3, nms: float = 0.8, batch: int = 16
    ) -> None:
        super().__init__()
        self.generator, self.threshold, self.nms, self.batch = generator, threshold, nms, batch
        self.eval()

    def config(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def masks(
        self, image: Tensor, phrases: Sequence[str], embed: Callable[[], Any] | None = None
    ) -> Iterator[GroundedMasks]:
        """As `Grounder.masks`."""
        from torchvision.ops import nms

        if not phrases:
            return
        embedding = self.generator.embed(image) if embed is None else embed()
        found = [self.generator.find(embedding, text, threshold=self.threshold) for text in phrases]
        boxes, scores, logits = (
            torch.cat([getattr(one, name) for one in found])
            for name in ("boxes", "scores", "logits")
        )
        index = torch.cat([torch.full((len(one.scores),), k) for k, one in enumerate(found)])
        for some in nms(boxes, scores, self.nms).split(self.batch):
            quality = stability(logits[some]).cpu()
            masks = self.generator.upsample(embedding, logits[some])
            place = some.cpu()
            yield GroundedMasks(masks, quality, scores[some].cpu(), index[place])


def load_grounder(
    *,
    id: str,
    sam: str,
    size: str | None,
    weights: str | None,
    sam_weights: str | Path | None,
    box_threshold: float,
    text_threshold: float,
    nms: float,
    predicted_iou: float,
    batch: int,
    configuration: Mapping[str, Any] | None,
) -> tuple[Grounder | ConceptMasks, str | None]:
    """The detector and the segmenter that ``grounded_sam`` names, and the segmenter's size.

    Raises:
        ValueError: an unknown segmenter.
        WeightsError: weights are absent, unreachable, or of another network.
        ImportError: a package is not installed.
    """
    if sam == SAM3:
        if weights is None or configuration is not None:
            raise WeightsError(f"sam={sam!r} has no random weights: give its folder as id")
        given = "hf:facebook/sam3" if id == DEFAULT_DETECTOR else id
        return ConceptMasks(load_sam3(given), box_threshold, nms, batch), None
    if sam not in SEGMENTERS:
        names = ", ".join([*SEGMENTERS, SAM3])
        raise ValueError(f"sam must be one of {names}, got {sam!r}")
    detector = load_grounding_dino(
        id,
        weights=weights,
        configuration=configuration,
        box_threshold=box_threshold,
        text_threshold=text_threshold,
        nms=nms,
    )
    size, generator = SEGMENTERS[sam](None if weights is None else sam_weights, size)
    return Grounder(detector, generator, predicted_iou, batch), size


__all__ = [
    "DEFAULT_DETECTOR",
    "ConceptMasks",
    "Detections",
    "Detector",
    "GroundedMasks",
    "Grounder",
    "GroundingDino",
    "load_grounder",
    "load_grounding_dino",
    "phrases_of",
    "read_prompts",
]
