"""pyseg-hf on networks of small configurations, without network: results are the library's own."""

import pytest
import torch
import transformers
from pyseg_hf import hf, step

import pyseg
from pyseg import testing
from pyseg.errors import SpecError, WeightsError
from pyseg.types import Sample


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("segformer"))
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 20, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        sr_ratios=[2, 1, 1, 1],
        decoder_hidden_size=16,
        id2label={0: "road", 1: "sky", 2: "road"},
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    size = {"height": 64, "width": 96}
    transformers.SegformerImageProcessor(size=size).save_pretrained(folder)
    return folder


def make_universal(kind, folder):
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    names = {0: "car", 1: "road", 2: "sky"}
    if kind == "mask2former":
        config = transformers.Mask2FormerConfig(
            backbone_config=swin,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=4,
            num_queries=7,
            train_num_points=64,
            id2label=names,
        )
        network = transformers.Mask2FormerForUniversalSegmentation(config)
        processor = transformers.Mask2FormerImageProcessor
    else:
        detr = transformers.DetrConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=7,
        )
        config = transformers.MaskFormerConfig(
            backbone_config=swin,
            decoder_config=detr,
            fpn_feature_size=32,
            mask_feature_size=32,
            id2label=names,
        )
        network = transformers.MaskFormerForInstanceSegmentation(config)
        processor = transformers.MaskFormerImageProcessor
    with torch.no_grad():  # certain of some classes, so that there is something to find
        network.class_predictor.weight.mul_(40)
        network.class_predictor.bias[-1] = -100  # the class of queries that found nothing
    network.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    processor(size=size, size_divisor=32, num_labels=3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["mask2former", "maskformer"])
def universal(request, tmp_path_factory):
    return make_universal(request.param, tmp_path_factory.mktemp(request.param))


def image(*size):
    return torch.randint(256, (3, *size), dtype=torch.uint8)


def test_semantic_equals_the_library(segformer):
    model = pyseg.models.create("hf", id=segformer)
    assert model.classes == ("road", "sky", "road (2)")
    peer = transformers.SegformerForSemanticSegmentation.from_pretrained(segformer).eval()
    processor = transformers.SegformerImageProcessor.from_pretrained(segformer)
    for size in ((64, 96), (37, 53)):
        one = image(*size)
        with torch.inference_mode():
            outputs = peer(**processor(images=one.numpy(), return_tensors="pt"))
        (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        result = model.predict([one])[0]
        torch.testing.assert_close(result.logits, outputs.logits[0])
        assert (result.labels == expected).float().mean() > 0.999  # ties are rounded otherwise


def test_semantic_conformance(segformer):
    testing.check_model("hf", id=segformer)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_universal_equals_the_library(universal, task, monkeypatch):
    model = pyseg.models.create("hf", id=universal, task=task, threshold=0.05)
    one = image(50, 70)
    with torch.inference_mode():
        outputs = model.outputs(one)
        # masks of random networks cover each other: here each query also has columns of its own
        masks = outputs.masks_queries_logits
        own = torch.arange(masks.shape[3]) * masks.shape[1] // masks.shape[3]
        masks += 50 * (2 * (own == torch.arange(masks.shape[1])[:, None]).float() - 1)[:, None]
    monkeypatch.setattr(model, "outputs", lambda _: outputs)
    result = model.predict([one])[0]
    options = {"target_sizes": [(50, 70)]}
    if task == "semantic":
        (expected,) = model.processor.post_process_semantic_segmentation(outputs, **options)
        assert torch.equal(result.labels.long(), expected)
        return
    options["threshold"] = 0.05
    if task == "panoptic":
        (expected,) = model.processor.post_process_panoptic_segmentation(
            outputs, label_ids_to_fuse=set(), **options
        )
        assert expected["segments_info"]
        kept = [i for i in expected["segments_info"] if (expected["segmentation"] == i["id"]).any()]
        assert len(kept) == len(result.segments.items)
        for info, item in zip(kept, result.segments.items, strict=True):
            inside = expected["segmentation"] == info["id"]
            assert torch.equal(result.segments.map == item.id, inside)
            assert (item.label, item.area) == (info["label_id"], int(inside.sum()))
    else:
        (expected,) = model.processor.post_process_instance_segmentation(
            outputs, return_binary_maps=True, **options
        )
        assert expected["segments_info"]
        assert torch.equal(result.instances.masks, expected["segmentation"].bool())
        found = [info["label_id"] for info in expected["segments_info"]]
        assert result.instances.labels.tolist() == found


def test_universal_trains_through_fit(universal, tmp_path):
    from pyseg.training import fit

    torch.manual_seed(0)
    model = hf(id=universal)
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 32:], labels[:8] = 2, 255
    batch = [Sample("one", image(64, 64), labels), Sample("two", image(64, 64), labels)]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    log = fit(
        model,
        lambda epoch: [batch] * 4,
        step=step,
        optimizer=optimizer,
        steps=4,
        epochs=4,
        output_dir=tmp_path / "run",
        progress=False,
    )
    assert log[-1]["loss"] < log[0]["loss"] and not model.training
    with pytest.raises(ValueError, match="'bare' has neither segments, instances nor labels"):
        model([Sample("bare", image(8, 8))])


def test_refuses(segformer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"neither a folder.*nor a model that the hub gives"):
        pyseg.build(f"hf(id={str(tmp_path)!r})")
    with pytest.raises(SpecError, match=r"semantic only.*Mask2Former"):
        pyseg.build(f"hf(id={segformer!r}, task='panoptic')")
    with pytest.raises(SpecError, match="task must be"):
        pyseg.build(f"hf(id={segformer!r}, task='depth')")
    with pytest.raises(WeightsError, match="takes the weights of its id"):
        pyseg.build(f"hf(id={segformer!r})", weights="imagenet")
