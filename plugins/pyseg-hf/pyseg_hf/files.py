"""What a checkpoint consists of: configuration, processor, tokenizer and weights; or one error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from pyseg import weights as weight_files
from pyseg.errors import PysegError, WeightsError

Kind = Literal["semantic", "prompted", "universal"]
UNIVERSAL = ("detr", "eomt", "eomt_dinov3", "mask2former", "maskformer", "oneformer", "rf_detr")
# Networks of segmentation that want more than an image, or whose results are not usable.
REFUSED = {
    "conditional_detr": "the post-processing that transformers has for it takes its last class for "
    "'no object', which the network does not have; choose a DETR or an RF-DETR",
    "seggpt": "it needs an example, an image with its mask, beside every image; choose a CLIPSeg, "
    "which needs a text",
    "videomt": "it segments videos; choose an EoMT, its sibling for images",
}
_SHOWN = 3  # names of weights in a message


class Files:
    """Configuration, processor and, on request, tokenizer and network of a checkpoint.

    Args:
        id: a name on the hub or a folder.
        saved: of `saved`, to be taken instead of files; then there are no weights.

    Raises:
        WeightsError: they cannot be read.
        PysegError: a network that pyseg has no use for.
    """

    def __init__(self, id: str, saved: Mapping[str, Any] | None = None) -> None:
        self.id, self._saved = id, saved
        self.tokenizer_if_read: Any = None
        if saved is not None:
            self.config, self.processor = _from_saved(saved)
            return
        try:
            self.config = transformers.AutoConfig.from_pretrained(id)
        except Exception as error:  # whatever a hub without network raises
            raise _absent(id, error) from error
        kind_of(id, self.config)  # before what a foreign checkpoint may lack
        try:
            # class_info_file: of OneFormer's texts for training; without it nothing is fetched
            extra = {"class_info_file": ""} if self.config.model_type == "oneformer" else {}
            self.processor = transformers.AutoImageProcessor.from_pretrained(id, **extra)
        except Exception as error:
            raise _absent(id, error, "the processor's preprocessor_config.json") from error

    def network(self, kind: Kind, num_classes: int | None, weights: str | Path | None) -> Any:
        """The network, with the checkpoint's weights where ``weights`` is ``"default"``.

        Raises:
            WeightsError: they are absent, damaged, or another task's.
        """
        config, network = self.config, _network_of(kind, self.config)
        if kind != "prompted" and num_classes not in (None, len(config.id2label)):
            config.num_labels = num_classes
        if kind == "semantic" and hasattr(config, "use_auxiliary_head"):
            config.use_auxiliary_head = False  # predictions do not need it, and losses are pyseg's
        if weights not in ("default", "DEFAULT"):
            return network(config)
        if self._saved is not None:
            raise WeightsError(
                "a saved pipeline's configuration has no weights of its own: pyseg.load reads them"
            )
        try:
            model, found = network.from_pretrained(
                self.id, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except Exception as error:
            raise _absent(self.id, error, "the network's weights") from error
        # The library leaves weights where the file is mapped, at any address, by which products
        # round otherwise than with a copy of the model; and the file may be changed under it.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        absent, unfit = found["missing_keys"], {entry[0] for entry in found["mismatched_keys"]}
        if absent or unfit:
            self._lacks(model, sorted(absent), sorted(unfit), num_classes)
        return model

    def _lacks(
        self, model: nn.Module, absent: list[str], unfit: list[str], num_classes: int | None
    ) -> None:
        """What is missing from a checkpoint: a fault, or to be trained."""
        kind, keys = type(model).__name__, absent + unfit
        some = ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
        total = len(model.state_dict())
        made = ", ".join(getattr(self.config, "architectures", None) or ["another network"])
        if num_classes is None or len(keys) == total:
            raise WeightsError(
                f"id={self.id!r} is a checkpoint of {made}: of a {kind}'s {total} weights it lacks "
                f"{len(keys)} or has them in another shape ({some}); choose a checkpoint of a "
                f"{kind}, or pass num_classes=<number> to train those, random at first"
            )
        warnings.warn(
            f"hf: {len(keys)} weights of id={self.id!r} ({some}) are "
            + (f"absent, it is a {made}" if absent else "for another number of classes")
            + f", so those for {num_classes} classes are random: train them",
            stacklevel=4,
        )

    def _tokenizer(self) -> Any:
        what = f"the tokenizer's files, which a {self.config.model_type} needs"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.id)
        except Exception as error:
            raise _absent(self.id, error, what) from error
        # without files transformers makes one that knows nothing
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            raise WeightsError(
                f"id={self.id!r} lacks {what}: save the processor's tokenizer there, by "
                "save_pretrained, or pass the name of a checkpoint that has tokenizer.json, or "
                "vocab.json and merges.txt"
            )
        self.tokenizer_if_read = tokenizer
        return tokenizer

    def task_tokens(self, task: str) -> Tensor:
        """OneFormer's input beside the image."""
        if self._saved is not None:
            return _tokens(self._saved)
        return task_tokens(self._tokenizer(), [f"the task is {task}"], self.config.task_seq_len)

    def prompt_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Ids [P, L] of the prompts, padded to the longest.

        Raises:
            ValueError: a prompt that is too long.
            WeightsError: a tokenizer of another network.
        """
        if self._saved is not None:
            tokens = _tokens(self._saved)
        else:
            tokens = self._tokenizer()(list(prompts), padding=True, return_tensors="pt")[
                "input_ids"
            ]
        text = self.config.text_config
        if tokens.shape[1] > text.max_position_embeddings:
            longest = max(prompts, key=len)
            raise ValueError(
                f"prompts may have {text.max_position_embeddings} tokens, got {tokens.shape[1]}, "
                f"such as {longest[:60]!r}…: shorten it"
            )
        if int(tokens.max()) >= text.vocab_size or len(tokens) != len(prompts):
            raise WeightsError(
                f"id={self.id!r} has a tokenizer of another network: it gives the token "
                f"{int(tokens.max())}, the network knows {text.vocab_size}"
            )
        return tokens


def kind_of(id: str, config: Any) -> Kind:
    """What a configuration's network gives.

    Raises:
        PysegError: what pyseg has no use for.
        ValueError: no network of segmentation.
    """
    if config.model_type in UNIVERSAL:
        return "universal"
    if config.model_type == "clipseg":
        return "prompted"
    if type(config) in transformers.AutoModelForSemanticSegmentation._model_mapping:
        return "semantic"
    if reason := REFUSED.get(config.model_type):
        raise PysegError(f"id={id!r} is a {config.model_type!r}, which hf does not take: {reason}")
    of_masks = type(config) in transformers.AutoModelForMaskGeneration._model_mapping
    raise ValueError(
        f"id={id!r} is a {config.model_type!r}, which transformers has no network of segmentation "
        "into classes of; choose one such as a SegFormer, a Mask2Former or a CLIPSeg"
        + (", or pyseg's refiners sam and sam2 for masks" if of_masks else "")
    )


def _network_of(kind: Kind, config: Any) -> Any:
    if kind == "prompted":
        return transformers.CLIPSegForImageSegmentation
    if kind == "semantic":
        return transformers.AutoModelForSemanticSegmentation._model_mapping[type(config)]
    if config.model_type == "rf_detr":
        return transformers.AutoModelForInstanceSegmentation._model_mapping[type(config)]
    return transformers.AutoModelForUniversalSegmentation._model_mapping[type(config)]


def names(config: Any, num_classes: int | None) -> tuple[str, ...]:
    """Of the classes, each once: data sets such as ADE20K have some twice."""
    count = len(config.id2label)
    if num_classes is not None and num_classes != count:
        return tuple(f"class {k}" for k in range(num_classes))
    found: list[str] = []
    for key in range(count):
        name = config.id2label.get(key, f"class {key}")
        found.append(f"{name} ({key})" if name in found else name)
    return tuple(found)


def prompts(given: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    """Checked prompts.

    Raises:
        ValueError: none, one that is empty, no text or twice there, or another ``num_classes``.
    """
    found = (given,) if isinstance(given, str) else tuple(given or ())
    wrong = [text for text in found if not isinstance(text, str) or not text.strip()]
    if not found or wrong:
        raise ValueError(f"classes must be texts, at least one, got {list(found)}")
    if twice := sorted({text for text in found if found.count(text) > 1}):
        raise ValueError(f"classes must be different prompts, got {', '.join(twice)} twice")
    if num_classes not in (None, len(found)):
        raise ValueError(
            f"num_classes={num_classes}, but classes are {len(found)} prompts: leave it out"
        )
    return found


def task_tokens(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Ids [N, length] as OneFormer takes them: padding is 0."""
    found = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return found["input_ids"] * found["attention_mask"]


def saved(config: Any, processor: Any, tokens: Tensor | None) -> dict[str, Any]:
    """What `Files` needs instead of files, as JSON has it."""
    return {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "processor": json.loads(processor.to_json_string()),
        "tokens": None if tokens is None else tokens.tolist(),
    }


def _from_saved(saved: Mapping[str, Any]) -> tuple[Any, Any]:
    try:
        config = transformers.CONFIG_MAPPING[saved["config"]["model_type"]].from_dict(
            dict(saved["config"])
        )
        kind = getattr(transformers, saved["processor"]["image_processor_type"])
        if not issubclass(kind, transformers.ImageProcessingMixin):
            raise TypeError(f"{kind.__name__} is no image processor")
        processor = dict(saved["processor"])
        if config.model_type == "oneformer":
            processor["class_info_file"] = ""  # which would be fetched
        return config, kind.from_dict(processor)
    except Exception as error:
        raise WeightsError(
            f"configuration is none that a saved pipeline holds ({type(error).__name__}: {error}); "
            "leave it out, and pass id alone"
        ) from error


def _tokens(saved: Mapping[str, Any]) -> Tensor:
    tokens = torch.tensor(saved.get("tokens") or [], dtype=torch.int64)
    if tokens.ndim != 2:
        raise WeightsError("configuration lacks the tokens that a saved pipeline of this kind has")
    return tokens


def load_trained(model: nn.Module, weights: str | Path | None) -> None:
    """Fills a model with ``weights`` where they are a file's.

    Raises:
        WeightsError: absent, damaged, or of another network.
    """
    if weights is not None and weights not in ("default", "DEFAULT"):
        path = weight_files.resolve(weights)
        weight_files.load_into(model, weight_files.load_state(path), path)


def _absent(id: str, error: Exception, what: str | None = None) -> WeightsError:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if what is not None and Path(id).is_dir():
        return WeightsError(
            f"folder id={id!r} has no usable copy of {what} ({reason}); save all parts there by "
            "save_pretrained"
        )
    return WeightsError(
        f"id={id!r} is neither a folder of save_pretrained nor a model that the hub gives "
        f"({reason}); check its name, connect to the hub, or pass a folder"
    )
