"""Segmenters of transformers behind the protocol: against its own processors and models."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pyseg.errors import WeightsError
from pyseg.promptable import Prompts, Sam3Concepts, TransformersBackend, load_sam, load_sam2
from pyseg.promptable import huggingface as family

transformers = pytest.importorskip("transformers")

SIDE = 128
DECODER = {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 64, "iou_head_hidden_dim": 32}


def parts(vision, prompts, **decoder):
    return {
        "vision_config": vision,
        "prompt_encoder_config": prompts,
        "mask_decoder_config": {**DECODER, **decoder},
    }


def small_sam(kind):
    """A SAM or SAM-HQ of 128 pixels."""
    t = transformers
    vision = {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
        "num_pos_feats": 16,
    }
    prompts = {
        "hidden_size": 32,
        "image_size": SIDE,
        "patch_size": 16,
        "image_embedding_size": SIDE // 16,
        "mask_input_channels": 4,
    }
    if kind == "sam":
        return t.SamModel(t.SamConfig(**parts(vision, prompts)))
    return t.SamHQModel(t.SamHQConfig(**parts(vision, prompts, vit_dim=32)))


def small_sam2():
    t = transformers
    backbone = t.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 8, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[7, 7],
    )
    vision = t.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    prompts = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    return t.Sam2Model(t.Sam2Config(**parts(vision, prompts)))


def small_edgetam():
    t = transformers
    backbone = t.TimmWrapperConfig(
        architecture="resnet18",
        model_args={"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    )
    vision = t.EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[512, 256, 128, 64],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    prompts = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    return t.EdgeTamModel(t.EdgeTamConfig(**parts(vision, prompts)))


def sam3_vision():
    t = transformers
    backbone = t.Sam3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=112,
        pretrain_image_size=56,
        patch_size=14,
        window_size=4,
        global_attn_indexes=[1],
    )
    return t.Sam3VisionConfig(
        backbone_config=backbone,
        fpn_hidden_size=32,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )


def small_sam3_tracker():
    t = transformers
    prompts = {"hidden_size": 32, "image_size": 112, "patch_size": 14, "mask_input_channels": 4}
    config = t.Sam3TrackerConfig(**parts(sam3_vision(), prompts))
    return t.Sam3TrackerModel(config)


def small_sam3():
    t = transformers
    text = t.CLIPTextConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    part = {"hidden_size": 32, "num_attention_heads": 2}
    layers = {**part, "num_layers": 1, "intermediate_size": 64}
    config = t.Sam3Config(
        vision_config=sam3_vision(),
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 12},
        mask_decoder_config=part,
    )
    return t.Sam3Model(config)


MAKERS = {
    "sam": lambda: small_sam("sam"),
    "sam_hq": lambda: small_sam("sam_hq"),
    "sam2": small_sam2,
    "edgetam": small_edgetam,
    "sam3_tracker": small_sam3_tracker,
}


@pytest.fixture(scope="module")
def models():
    """Makes each once, with weights that tell prompts apart."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            model = (small_sam3 if kind == "sam3" else MAKERS[kind])().eval()
            for name, value in model.named_parameters():
                if value.ndim > 1 and "norm" not in name:
                    torch.nn.init.normal_(value.data, std=0.8 / value[0].numel() ** 0.5)
            made[kind] = model
        return made[kind]

    return make


def processor_of(kind):
    t = transformers
    if kind in ("sam", "sam_hq"):
        image = t.SamImageProcessor(
            size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}
        )
        return t.SamProcessor(image) if kind == "sam" else t.SamHQProcessor(image)
    if kind == "sam3_tracker":
        size = {"height": 112, "width": 112}
        return t.Sam3TrackerProcessor(t.Sam3ImageProcessor(size=size), target_size=112)
    return t.Sam2Processor(
        t.Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}), target_size=SIDE
    )


def some_prompts(size, masks=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    points = torch.rand(3, 2, 2, generator=generator) * torch.tensor([width - 1, height - 1])
    boxes = torch.tensor([[5.0, 6, 40, 50], [20, 10, 60, 70], [0, 0, 30, 30]])
    labels = torch.tensor([[1, 0], [1, 0], [1, 1]])
    given = 4 * torch.randn(3, *size, generator=generator) if masks else None
    return Prompts(points, labels, boxes, given)


def some_image(size, seed=2):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (1, 3, 6, 6), generator=generator).float()
    return F.interpolate(coarse, size, mode="bilinear")[0].round().to(torch.uint8)


@pytest.mark.parametrize("size", [(90, 160), (161, 75)])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_masks_are_those_of_the_packages_processor_and_model(models, kind, size):
    model, processor = models(kind), processor_of(kind)
    image, prompts = some_image(size), some_prompts(size)
    backend = TransformersBackend(model)
    embedding = backend.embed(image)
    low, quality = backend.predict(embedding, prompts)
    ours = backend.upsample(embedding, low)
    assert ours.shape == (3, *size)
    inputs = processor(
        images=image.permute(1, 2, 0).numpy(),
        input_points=[prompts.points.tolist()],
        input_labels=[prompts.point_labels.tolist()],
        input_boxes=[prompts.boxes.tolist()],
        return_tensors="pt",
    )
    sizes = {
        key: inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in inputs
    }
    with torch.no_grad():
        output = model(**inputs, multimask_output=True)
    theirs = processor.post_process_masks(output.pred_masks, *sizes.values(), binarize=False)[0]
    for k in range(3):
        best = output.iou_scores[0, k].argmax()
        assert quality[k] == pytest.approx(output.iou_scores[0, k, best].item(), abs=2e-3)
        # Resized pixels may differ by a grey level.
        error = (ours[k] - theirs[k, best]).abs().mean()
        assert error < 2e-2 * theirs[k, best].abs().mean()
    assert (ours[0] - ours[1]).abs().mean() > 0.05 * ours[0].abs().mean()  # prompts do matter


@pytest.mark.parametrize("kind", list(MAKERS))
def test_masks_as_prompts_and_prompts_one_by_one(models, kind):
    """A chunk of prompts with masks is the same prompts one after the other, at the model's own
    door; masks matter, and lie where the image has them."""
    size = (90, 160)
    model, backend = models(kind), TransformersBackend(models(kind))
    embedding = backend.embed(some_image(size))
    prompts = some_prompts(size, masks=True)
    low, quality = backend.predict(embedding, prompts)
    for k in range(3):
        one, score = backend.predict(embedding, prompts.part(slice(k, k + 1)))
        torch.testing.assert_close(one[0], low[k], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(score[0], quality[k], atol=1e-5, rtol=1e-5)
    plain = Prompts(prompts.points, prompts.point_labels, prompts.boxes)
    assert (backend.predict(embedding, plain)[0] - low).abs().mean() > 1e-3 * low.abs().mean()
    square = torch.full((1, *size), -10.0)
    square[:, 30:60, 40:120] = 10
    frame = backend._mask_prompts(square, embedding)
    back = backend.upsample(embedding, frame[:, 0])[0] > 0
    overlap = (back & (square[0] > 0)).sum() / (back | (square[0] > 0)).sum()
    assert overlap > 0.85
    assert frame.shape[-1] == 4 * model.prompt_encoder.image_embedding_size[0]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_no_prompts_have_no_answers(models, kind, masks):
    size = (90, 160)
    backend = TransformersBackend(models(kind))
    embedding = backend.embed(some_image(size))
    some = some_prompts(size, masks)
    logits, quality = backend.predict(embedding, some.part(slice(0, 0)))
    expected = backend.predict(embedding, some)
    assert logits.shape == (0, *expected[0].shape[1:]) and quality.shape == (0,)
    assert backend.upsample(embedding, logits).shape == (0, *size)


@pytest.mark.parametrize("kind", ["sam", "sam_hq", "sam2", "edgetam"])
def test_another_size_of_input(models, kind, tmp_path):
    models(kind).save_pretrained(tmp_path / kind)
    name, backend = load_sam(tmp_path / kind, image_size=192)
    assert name == kind and backend.image_size == 192
    embedding = backend.embed(some_image((90, 160)))
    assert embedding.features[0 if backend.padded else -1].shape[-2:] == (12, 12)
    low, _ = backend.predict(embedding, some_prompts((90, 160), masks=True))
    assert low.shape == (3, 48, 48) and torch.isfinite(low).all()
    with pytest.raises(ValueError, match="image_size must be a multiple of"):
        load_sam(tmp_path / kind, image_size=100)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_weights_from_a_folder_and_bfloat16(models, kind, tmp_path):
    model = models(kind)
    model.save_pretrained(tmp_path)
    name, backend = load_sam2(tmp_path, precision="bf16")
    assert name == kind and backend.precision == "bf16"
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in backend.model.state_dict().items())
    image, prompts = some_image((90, 160)), some_prompts((90, 160))
    narrow = backend.embed(image)
    wide = TransformersBackend(model).embed(image)
    assert all(level.dtype == torch.float32 for level in narrow.features)
    assert not torch.equal(narrow.features[0], wide.features[0])
    ours, theirs = (backend.predict(e, prompts)[0] > 0 for e in (narrow, wide))
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9  # random weights, random masks
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp16'"):
        load_sam2(tmp_path, precision="fp16")
    with pytest.raises(ValueError, match="size is what the weights are of"):
        load_sam2(tmp_path, "large")


def test_sam3_cannot_be_resized(models, tmp_path):
    models("sam3_tracker").save_pretrained(tmp_path)
    assert load_sam(tmp_path)[0] == "sam3_tracker"
    with pytest.raises(ValueError, match="image_size of SAM 3 cannot be changed, got 224"):
        load_sam(tmp_path, image_size=224)


def test_what_answers_no_prompts_is_refused(tmp_path):
    transformers.CLIPTextConfig().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="takes no points and boxes; those that do are sam"):
        load_sam(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no folder of weights that transformers reads"):
        load_sam(tmp_path)


def test_offline_and_gated(monkeypatch):
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    with pytest.raises(WeightsError, match="PYSEG_OFFLINE is set: run 'hf download facebook/none'"):
        load_sam("hf:facebook/none")
    monkeypatch.delenv("PYSEG_OFFLINE")

    class Gated:
        @staticmethod
        def from_pretrained(name, **options):
            raise OSError(f"You are trying to access a gated repo. 401 {name}")

    with pytest.raises(WeightsError, match=r"https://huggingface.co/facebook/sam3, then set HF_TO"):
        family._fetched(Gated, "facebook/sam3")


def tokenize(phrase):
    ids = torch.tensor([[1, *(ord(c) for c in phrase[:20]), 2]])
    padded = F.pad(ids, (0, 32 - ids.shape[1]))
    return padded, (torch.arange(32) < ids.shape[1]).long()[None]


@pytest.mark.parametrize("exemplars", [None, [[5.0, 6, 40, 50], [60, 20, 90, 70]]])
@pytest.mark.parametrize("phrase", ["a red car", None])
def test_sam3_finds_what_its_own_model_finds(models, phrase, exemplars):
    if phrase is None and exemplars is None:
        with pytest.raises(ValueError, match="a phrase or exemplars"):
            Sam3Concepts(models("sam3"), tokenize).find(None)
        return
    model, size = models("sam3"), (90, 160)
    image = some_image(size)
    backend = Sam3Concepts(model, tokenize)
    embedding = backend.embed(image)
    boxes = None if exemplars is None else torch.tensor(exemplars)
    positive = None if boxes is None else torch.tensor([True, False])
    with torch.no_grad():
        processor = transformers.Sam3ImageProcessor(size={"height": 112, "width": 112})
        pixels = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")
        ids, attention = tokenize(phrase or "visual")
        given = {}
        if boxes is not None:
            scaled = np.array(exemplars) / [160, 90, 160, 90]
            centre, extent = (scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]
            both = np.concatenate([centre, extent], 1)
            given["input_boxes"] = torch.tensor(both[None], dtype=torch.float32)
            given["input_boxes_labels"] = torch.tensor([[1, 0]])
        output = model(pixels.pixel_values, input_ids=ids, attention_mask=attention, **given)
        scores = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]
        ordered = scores.sort().values
        gap = 3 + int((ordered[4:-3] - ordered[3:-4]).argmax())  # where rounding decides nothing
        threshold = float(ordered[gap : gap + 2].mean())
        theirs = processor.post_process_instance_segmentation(
            output, threshold, target_sizes=[size]
        )[0]
    found = backend.find(embedding, phrase, boxes, positive=positive, threshold=threshold)
    count = 11 - gap
    assert len(found.scores) == len(theirs["scores"]) == count
    torch.testing.assert_close(found.scores, theirs["scores"], atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(found.boxes, theirs["boxes"], atol=1.0, rtol=2e-2)
    masks = backend.upsample(embedding, found.logits) > 0
    assert masks.shape == (count, *size)
    assert (masks == theirs["masks"].bool()).float().mean() > 0.97
