"""Grounded SAM: boxes as transformers gives them, phrases by the places of their tokens, fusion."""

import json
import pickle
from typing import NamedTuple

import pytest
import torch
import transformers
from torch.nn import functional as F

import pyseg
from pyseg import Segmentation, testing
from pyseg.errors import SpecError, WeightsError
from pyseg.grounding import (
    ConceptMasks,
    Detections,
    Grounder,
    GroundingDino,
    _letters,
    load_grounding_dino,
    phrases_of,
    read_prompts,
)
from pyseg.models.grounded import GroundedModel
from pyseg.promptable import Prompts
from pyseg.refiners.grounded import GroundedSam

CLASSES = ("road", "car", "pole")
KINDS = ("GroundingDino", "MMGroundingDino")


def small_network(kind="GroundingDino", text_length=24, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=transformers.SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=2,
            out_indices=[2, 3, 4],
        ),
        text_config=transformers.BertConfig(
            vocab_size=2400,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=30,
        max_text_len=text_length,
    )
    network = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for parameter in network.parameters():  # so that queries and texts differ
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    return network


def small_processor(shortest=64, longest=96):
    return transformers.GroundingDinoImageProcessor(
        size={"shortest_edge": shortest, "longest_edge": longest}
    )


def words():
    """A tokenizer of words and pieces of words, with BERT's marks."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(_letters(tokenizers).to_str())
    known = json.loads(made.to_str())
    for number, word in enumerate(["car", "pole", "street", "light", "sky", "tree", "##s"], 2300):
        known["model"]["vocab"][word] = number
    return tokenizers.Tokenizer.from_str(json.dumps(known))


def detector(kind="GroundingDino", **options):
    text_length = options.pop("text_length", 24)
    return GroundingDino(small_network(kind, text_length), small_processor(), words(), **options)


def processor_of(made):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    tokenizer.backend_tokenizer.post_processor = __import__("tokenizers").processors.BertProcessing(
        ("[SEP]", 102), ("[CLS]", 101)
    )
    return transformers.GroundingDinoProcessor(made.processor, tokenizer)


def image(height=40, width=72, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_and_scores_are_those_of_the_library(kind):
    """Of single words; of others it tells texts, by whatever tokens are above a threshold."""
    made, phrases = detector(kind, nms=1.0, text_threshold=0.0), ["Car", "sky", "pole", "tree"]
    pixels, processor = image(), None
    processor = processor_of(made)
    inputs = processor(
        images=pixels, text=[phrases], return_tensors="pt", input_data_format="channels_first"
    )
    ((tokens, spans),) = made.texts(phrases)
    assert inputs["input_ids"][0].tolist() == tokens
    assert [tokens[first:stop] for _, first, stop in spans] == [[2300], [2304], [2301], [2305]]
    with torch.no_grad():
        outputs = made.network(**inputs)
    best = outputs.logits[0].sigmoid().amax(1)
    made.box_threshold = threshold = float(best.median())
    found = made.detect(pixels, phrases)
    (expected,) = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold, 0.0, target_sizes=[(40, 72)]
    )
    # The library takes the best of all tokens, dots too; of a phrase only its own can speak.
    own = outputs.logits[0].sigmoid()[best > threshold][:, [s[1] for s in spans]]
    order = own.amax(1).argsort(descending=True, stable=True)
    limit = torch.tensor([72.0, 40, 72, 40])
    assert len(found.boxes) == len(expected["boxes"]) > 5
    assert torch.allclose(
        found.boxes, expected["boxes"][order].clamp(min=torch.zeros(4), max=limit), atol=1e-4
    )
    assert torch.allclose(found.scores, own.amax(1)[order], atol=1e-6)
    assert found.index.tolist() == own.argmax(1)[order].tolist()
    assert len({*found.index.tolist()}) > 1


def test_phrases_of_several_tokens_have_the_mean_of_their_own():
    made = detector(nms=1.0, box_threshold=0.0, text_threshold=0.0)
    phrases = ["street light pole", "cars", "sky"]  # "cars" is two pieces of a word
    ((tokens, spans),) = made.texts(phrases)
    assert spans == [(0, 1, 4), (1, 5, 7), (2, 8, 9)]
    values = made.processor(
        images=[image()], return_tensors="pt", input_data_format="channels_first"
    )
    with torch.no_grad():
        out = made.network(**values, input_ids=torch.tensor([tokens]))
    p = out.logits[0].sigmoid()
    means = torch.stack([p[:, 1:4].mean(1), p[:, 5:7].mean(1), p[:, 8]], 1)
    found = made.detect(image(), phrases)
    assert torch.allclose(found.scores, means.amax(1).sort(descending=True).values, atol=1e-6)
    assert sorted(found.index.tolist()) == sorted(means.argmax(1).tolist())


def test_more_phrases_than_a_text_holds_are_asked_in_passes():
    made = detector(text_length=12, nms=1.0, box_threshold=0.0, text_threshold=0.0)
    phrases = ["car", "street light", "tree", "sky", "pole", "street", "light"]
    texts = list(made.texts(phrases))
    assert len(texts) > 1 and all(len(tokens) <= 12 for tokens, _ in texts)
    assert [k for _, spans in texts for k, _, _ in spans] == list(range(7))
    found = made.detect(image(), phrases)
    apart = []
    for _, spans in texts:
        some = [phrases[k] for k, _, _ in spans]
        one = made.detect(image(), some)
        apart += zip(one.scores.tolist(), (spans[k][0] for k in one.index.tolist()), strict=True)
    assert sorted(apart) == sorted(zip(found.scores.tolist(), found.index.tolist(), strict=True))
    with pytest.raises(ValueError, match="must have 1 to 9 tokens"):
        made.detect(image(), ["street light " * 6])
    with pytest.raises(ValueError, match="must have 1 to 9 tokens, ' ' has 0"):
        made.detect(image(), [" "])


def test_marks_within_a_phrase_do_not_end_it():
    made = detector()
    ((tokens, spans),) = made.texts(["St. Light?", "POLE"])
    ((plain, _),) = made.texts(["st light", "pole"])
    assert tokens == plain and tokens.count(1012) == 2 and len(spans) == 2


def test_overlapping_boxes_of_two_phrases_become_one():
    made = detector(nms=1.0, box_threshold=0.0, text_threshold=0.0)
    every = made.detect(image(), ["car", "sky"])
    made.nms = 0.3
    kept = made.detect(image(), ["car", "sky"])
    # By the definition, one after the other.
    from torchvision.ops import box_iou

    iou, expected = box_iou(every.boxes, every.boxes), []
    for k in range(len(every.boxes)):
        if all(iou[k, other] <= 0.3 for other in expected):
            expected.append(k)
    assert 0 < len(expected) < len(every.boxes)
    assert torch.equal(kept.boxes, every.boxes[expected])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (257, 2), (33, 47)])
def test_images_of_any_size(size):
    made = detector(box_threshold=0.0, text_threshold=0.0)
    # Larger than the other tests': the network chooses its 30 queries among places.
    made.processor = small_processor(128, 512)
    found = made.detect(image(*size), ["car"])
    assert len(found.boxes) or size == (1, 300)  # most of it is padding, and boxes lie in that
    assert (found.boxes[:, 0] >= 0).all() and (found.boxes[:, 2] <= size[1]).all()
    assert (found.boxes[:, 1] >= 0).all() and (found.boxes[:, 3] <= size[0]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_phrases_from_names():
    assert phrases_of("SignSymbol") == ("sign symbol",)
    assert phrases_of("traffic_light") == ("traffic light",)
    assert phrases_of("door, double door; gate") == ("door", "double door", "gate")
    assert phrases_of("crane (machine)") == ("crane",)
    prompts = read_prompts({"pole": "a street light pole . traffic pole."}, ["void", "car", "pole"])
    assert prompts == {
        "void": (),
        "car": ("car",),
        "pole": ("a street light pole", "traffic pole"),
    }
    with pytest.raises(SpecError, match="prompts name \\['cat'\\]"):
        read_prompts({"cat": "a cat"}, ["car"])
    with pytest.raises(SpecError, match="'van' is of the classes 'car' and 'truck'"):
        read_prompts({"car": "car . van", "truck": ["van"]}, None)
    with pytest.raises(SpecError, match="hold no phrase"):
        read_prompts({"car": " . "}, None)


# --- with masks -------------------------------------------------------------------------------


class Boxes:
    """A detector that finds given boxes: (box, score, phrase)."""

    def __init__(self, *found):
        self.found, self.asked = found, []

    def detect(self, image, phrases):
        self.asked.append(list(phrases))
        some = [one for one in self.found if one[2] in phrases]
        return Detections(
            torch.tensor([box for box, _, _ in some]).reshape(-1, 4).float(),
            torch.tensor([score for _, score, _ in some]),
            torch.tensor([phrases.index(text) for _, _, text in some], dtype=torch.int64),
        )


class Insides:
    """A segmenter whose mask is the inside of the box."""

    def __init__(self, quality=0.9):
        self.quality, self.embedded = quality, 0

    def embed(self, image):
        self.embedded += 1
        return (image.shape[1], image.shape[2])

    def predict(self, size, prompts):
        y, x = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
        x0, y0, x1, y1 = prompts.boxes.T[:, :, None, None]
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        return torch.where(inside, 8.0, -8.0), torch.full((len(inside),), self.quality)

    def upsample(self, size, logits):
        return logits


def test_a_refiner_moves_outlines_and_classes_come_from_phrases():
    truth = torch.zeros(48, 64, dtype=torch.long)
    truth[10:30, 20:44] = 1
    pooled = F.avg_pool2d(F.one_hot(truth, 3).permute(2, 0, 1)[None].float(), 8)
    coarse = Segmentation((48, 64), CLASSES, logits=pooled[0].clamp_min(1e-4).log())
    before = int((coarse.labels != truth).sum())
    right = Boxes(((20, 10, 44, 30), 0.6, "an automobile"))
    refiner = GroundedSam(Grounder(right, Insides()), prompts={"Car": "a van . an automobile"})
    refined = refiner.refine(image(48, 64), coarse)
    assert right.asked == [["a van", "an automobile"]]
    assert int((refined.labels != truth).sum()) < before / 4
    # Boxes where nothing is, of low quality, or of none change nothing, bit for bit.
    for wrong, quality in (
        (Boxes(((0, 36, 60, 47), 0.9, "car")), 0.9),
        (Boxes(((20, 10, 44, 30), 0.9, "car")), 0.3),
        (Boxes(), 0.9),
    ):
        other = GroundedSam(Grounder(wrong, Insides(quality)))
        assert other.refine(image(48, 64), coarse) is coarse
        assert wrong.asked == [["car", "pole"]]  # of the class list, without stuff


def test_a_refiner_embeds_only_where_something_was_found():
    segmenter = Insides()
    refiner = GroundedSam(Grounder(Boxes(), segmenter))
    refiner.refine(image(8, 8), Segmentation((8, 8), CLASSES, logits=torch.zeros(3, 2, 2)))
    assert segmenter.embedded == 0


def test_a_refiner_refuses_what_does_not_fit():
    refiner = GroundedSam(Grounder(Boxes(), Insides()))
    given = Segmentation((8, 8), CLASSES, logits=torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match=r"uint8 RGB \[3, H, W\], got torch.float32"):
        refiner.refine(image(8, 8).float(), given)
    with pytest.raises(ValueError, match=r"image is \[8, 9\] but .*\[8, 8\]"):
        refiner.refine(image(8, 9), given)
    with pytest.raises(ValueError, match="grounded_sam needs logits"):
        refiner.refine(image(8, 8), given.with_labels(given.labels))


def test_a_model_paints_small_over_large_and_leaves_void():
    found = Boxes(
        ((0, 0, 40, 20), 0.9, "sky"),
        ((5, 5, 15, 15), 0.4, "a car"),
        ((10, 10, 20, 18), 0.3, "truck"),
    )
    prompts = {"Sky": ("sky",), "car": ("a car", "truck"), "tree": ("tree",)}
    model = GroundedModel(Grounder(found, Insides(), batch=2), prompts)
    (result,) = model.predict([image(30, 50)])
    expected = torch.full((30, 50), 255, dtype=torch.uint8)
    expected[:20, :40] = 0
    expected[5:15, 5:15] = expected[10:18, 10:20] = 1
    assert torch.equal(result.labels, expected)
    assert result.instances.labels.tolist() == [0, 1, 1]
    assert result.instances.scores.tolist() == pytest.approx([0.9, 0.4, 0.3])
    assert result.instances.boxes[1].tolist() == [5, 5, 15, 15]
    sure = 1 - result.full_uncertainty()
    assert float(sure[0, 0]) == pytest.approx(0.9 * torch.tensor(8.0).sigmoid().item())
    assert float(sure[12, 12]) == pytest.approx(0.3 * torch.tensor(8.0).sigmoid().item())
    assert (sure[expected == 255] == 0).all()
    (nothing,) = GroundedModel(Grounder(Boxes(), Insides()), prompts).predict([image(9, 9)])
    assert (nothing.labels == 255).all() and len(nothing.instances.labels) == 0
    session = pyseg.build(model).session(image(30, 50))
    assert session.promptable is model.grounder.generator


class Found(NamedTuple):
    logits: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor


class Concepts(Insides):
    """Finds by itself, as SAM 3: given boxes of each phrase."""

    def __init__(self, **found):
        super().__init__()
        self.found = found

    def find(self, size, phrase, threshold):
        some = [one for one in self.found[phrase] if one[1] > threshold]
        boxes = torch.tensor([box for box, _ in some]).reshape(-1, 4).float()
        logits, _ = self.predict(size, Prompts(boxes, boxes, boxes))
        return Found(logits, torch.tensor([score for _, score in some]), boxes)


def test_a_segmenter_that_finds_by_itself():
    found = Concepts(
        sky=[((0, 0, 40, 20), 0.9), ((1, 1, 3, 3), 0.2)], car=[((0, 0, 39, 20), 0.6)], tree=[]
    )
    masks = list(ConceptMasks(found, batch=1).masks(image(30, 50), ["tree", "car", "sky"]))
    assert [one.index.tolist() for one in masks] == [[2]]  # the car is the same object
    masks = list(ConceptMasks(found, nms=1.0).masks(image(30, 50), ["tree", "car", "sky"]))
    assert masks[0].index.tolist() == [2, 1]
    assert masks[0].scores.tolist() == pytest.approx([0.9, 0.6])
    model = GroundedModel(ConceptMasks(found), {"sky": ("sky",), "tree": ("tree",)})
    (result,) = model.predict([image(30, 50)])
    assert (result.labels[:20, :40] == 0).all() and int((result.labels != 255).sum()) == 800


def test_stages_of_one_segmenter_embed_an_image_once():
    truth = torch.zeros(48, 64, dtype=torch.long)
    truth[10:30, 20:44] = 1
    pooled = F.avg_pool2d(F.one_hot(truth, 3).permute(2, 0, 1)[None].float(), 8)

    class Model:
        classes = CLASSES

        def predict(self, images):
            logits = pooled[0].clamp_min(1e-4).log()
            return [Segmentation((48, 64), CLASSES, logits=logits) for _ in images]

    segmenter, boxes = Insides(), Boxes(((20, 10, 44, 30), 0.6, "car"))
    stages = [GroundedSam(Grounder(boxes, segmenter)) for _ in range(3)]
    result = pyseg.build(Model(), *stages)(image(48, 64))
    assert segmenter.embedded == 1 and result.features is None
    assert len(boxes.asked) == 3


# --- loading ----------------------------------------------------------------------------------


def save_checkpoint(folder, kind="GroundingDino"):
    made = detector(kind)
    made.network.save_pretrained(folder)
    processor_of(made).save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_checkpoint(tmp_path, kind):
    made = save_checkpoint(tmp_path, kind)
    read = load_grounding_dino(str(tmp_path), box_threshold=0.0, text_threshold=0.0)
    made.box_threshold = made.text_threshold = 0.0
    for ours, theirs in zip(
        read.detect(image(), ["car", "light pole"]),
        made.detect(image(), ["car", "light pole"]),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "whole")
    part = tmp_path / "part"
    part.mkdir()
    with pytest.raises(WeightsError, match=r"no usable config.json.*save_pretrained"):
        load_grounding_dino(str(part))
    (part / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    with pytest.raises(WeightsError, match=r"no usable preprocessor_config.json"):
        load_grounding_dino(str(part))
    other = tmp_path / "other"
    transformers.BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(other)
    with pytest.raises(WeightsError, match="'bert', and grounded_sam takes grounding-dino"):
        load_grounding_dino(str(other))
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"PYSEG_OFFLINE is set.*hf download no/such"):
        load_grounding_dino("no/such@0123abc")
    with pytest.raises(WeightsError, match="weights='x'"):
        load_grounding_dino(weights="x")
    with pytest.raises(WeightsError, match="configuration is none"):
        load_grounding_dino(configuration={"config": {}})
    with pytest.raises(SpecError, match=r"grounded_sam\(classes=\('car', 'person'\)\)"):
        pyseg.build("grounded_sam", weights=None)
    with pytest.raises((SpecError, ValueError), match="sam must be one of"):
        pyseg.build("grounded_sam(classes='car', sam='sam9')", weights=None)


@pytest.fixture
def small_parts(monkeypatch, backends):
    """`grounded_sam` with small networks where it asks for random ones."""
    from pyseg import grounding

    small = {
        "config": json.loads(small_network().config.to_json_string(use_diff=False)),
        "processor": json.loads(small_processor().to_json_string()),
        "tokenizer": words().to_str(),
    }

    def segmenter(weights, size):
        torch.manual_seed(0)
        return "tiny", pickle.loads(pickle.dumps(backends["sam2"]))

    monkeypatch.setitem(grounding.SEGMENTERS, "sam2", segmenter)
    loaded = grounding.load_grounding_dino

    def load(id, *, weights, configuration, **options):
        torch.manual_seed(0)
        return loaded(id, weights=weights, configuration=configuration or small, **options)

    monkeypatch.setattr(grounding, "load_grounding_dino", load)


def test_sam3_is_a_detector_too(monkeypatch):
    from pyseg import grounding

    asked = []
    monkeypatch.setattr(grounding, "load_sam3", lambda id: asked.append(id) or Concepts(car=[]))
    model = pyseg.build("grounded_sam(classes='car', sam='sam3', box_threshold=0.5)").model
    assert isinstance(model.grounder, ConceptMasks) and model.grounder.threshold == 0.5
    assert (model.predict([image(9, 9)])[0].labels == 255).all()
    pyseg.build("grounded_sam(classes='car', sam='sam3', id='folder')")
    assert asked == ["hf:facebook/sam3", "folder"]
    with pytest.raises(WeightsError, match="no random weights"):
        pyseg.build("grounded_sam(classes='car', sam='sam3')", weights=None)


LOW = {"box_threshold": 0.0, "text_threshold": 0.0, "nms": 0.3, "predicted_iou": -1.0}


def test_the_model_conforms(small_parts):
    testing.check_model("grounded_sam", classes=("car", "light pole"), **LOW)


def test_the_refiner_conforms(small_parts):
    testing.check_refiner("grounded_sam", prompts={"two": "car"}, **LOW)


def test_pipelines_are_saved_and_come_back(small_parts, tmp_path):
    text = "grounded_sam(prompts={'car': 'cars . light'}, predicted_iou=-1.0, box_threshold=0.0)"
    pipeline = pyseg.build(text, weights=None, text_threshold=0.0)
    pipeline.save(tmp_path / "saved")
    again = pyseg.load(tmp_path / "saved")
    ours, theirs = pipeline(image()), again(image())
    assert len(ours.instances.labels) > 0
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.instances.masks, theirs.instances.masks)
