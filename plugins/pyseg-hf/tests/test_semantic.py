"""Semantic networks and CLIPSeg: results are the library's own, on every path, and losses fall."""

import pickle
import shutil

import pytest
import torch
import transformers
from pyseg_hf import hf

import pyseg
from pyseg import testing
from pyseg.errors import PysegError, SpecError, WeightsError
from pyseg.training import train
from pyseg.types import Sample

KINDS = ["beit", "data2vec", "dpt", "mobilenet_v2", "mobilevit", "mobilevitv2", "sapiens2"]
KINDS += ["segformer", "tipsv2_dpt", "upernet"]
PROMPTS = ("a car", "the road", "sky")


def image(*size):
    return torch.randint(256, (3, *size), dtype=torch.uint8)


def peer_of(folder):
    network = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    return network, transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_library(checkpoints, kind):
    folder = checkpoints(kind)
    model = hf(id=folder)
    peer, processor = peer_of(folder)
    images = [image(64, 96), image(37, 53), image(61, 33)]
    for one, result in zip(images, model.predict(images), strict=True):
        # a central crop would leave out pixels, and its result be stretched over them
        whole = {"do_center_crop": False} if kind != "dpt" else {}
        with torch.inference_mode():
            outputs = peer(**processor(images=one.numpy(), return_tensors="pt", **whole))
        (expected,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[tuple(one.shape[1:])]
        )
        torch.testing.assert_close(result.logits, outputs.logits[0])
        assert (result.labels == expected).float().mean() > 0.999  # ties are rounded otherwise


@pytest.mark.parametrize("kind", [*KINDS, "clipseg"])
def test_training_sees_what_predicting_sees(checkpoints, kind):
    """An image of the processor's own size gives the same logits both ways: same mean, order, …"""
    options = {"classes": PROMPTS} if kind == "clipseg" else {}
    model = hf(id=checkpoints(kind), **options)
    size = model.processor.size
    edge = size["shortest_edge"]
    one = image(size["height"] or edge, size["width"] or edge)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(one[None])["out"][0], model.predict([one])[0].logits, atol=1e-4, rtol=1e-4
        )
    model.train()
    other = model(torch.stack([image(40, 56), image(40, 56)]))["out"]
    other.square().mean().backward()
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learnt)


def test_statistics_of_any_range(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("segformer"), tmp_path / "raw")
    transformers.SegformerImageProcessor(
        size={"height": 64, "width": 96},
        do_rescale=False,
        image_mean=[100.0, 110.0, 120.0],
        image_std=[50.0, 60.0, 70.0],
    ).save_pretrained(folder)
    model = hf(id=str(folder))
    one = image(64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(one[None])["out"][0], model.predict([one])[0].logits, atol=1e-4, rtol=1e-4
        )


def test_conformance(checkpoints):
    testing.check_model("hf", id=checkpoints("segformer"))


def test_conformance_of_clipseg(checkpoints):
    def clipseg(*, weights="default", configuration=None):  # no number can change its classes
        options = {"weights": weights, "configuration": configuration}
        return hf(id=checkpoints("clipseg"), classes=PROMPTS, **options)

    testing.check_model(clipseg)


class Scenes:
    """Left dark and of the first class, right bright and of the second, above void."""

    classes, palette = ("left", "right"), ((0, 0, 0), (9, 9, 9))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        labels = torch.zeros(48, 64, dtype=torch.uint8)
        labels[:, 32:], labels[:4] = 1, 255
        picture = image(48, 64) // 8
        picture[:, :, 32:] += 180
        return Sample(str(index), picture, labels)


@pytest.mark.parametrize("kind", ["segformer", "beit", "clipseg"])
def test_trains(checkpoints, kind, tmp_path):
    torch.manual_seed(0)
    clipseg = kind == "clipseg"
    options = {"classes": ("left", "right")} if clipseg else {"num_classes": 2, "weights": None}
    model = hf(id=checkpoints(kind), **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    log = train(
        model,
        Scenes(),
        output_dir=tmp_path / "run",
        epochs=3,
        batch_size=2,
        crop_size=(32, 48),
        photometric=0,
        learning_rate=5e-3,
        progress=False,
    )
    assert log[-1]["loss"] < log[0]["loss"]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and (not clipseg or not any(".clip." in key for key in moved))
    again = hf(id=checkpoints(kind), **options | {"weights": tmp_path / "run/model.safetensors"})
    one = image(33, 47)
    torch.testing.assert_close(again.predict([one])[0].logits, model.predict([one])[0].logits)


def test_clipseg_equals_the_library(checkpoints):
    folder = checkpoints("clipseg")
    peer = transformers.CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    processor = transformers.CLIPSegProcessor.from_pretrained(folder)
    for prompts in (PROMPTS, PROMPTS[:1]):
        model = hf(id=folder, classes=prompts)
        assert model.classes == prompts
        images = [image(50, 70), image(37, 21)]
        for one, result in zip(images, model.predict(images), strict=True):
            same = [one.numpy()] * len(prompts)
            values = processor(text=list(prompts), images=same, padding=True, return_tensors="pt")
            with torch.inference_mode():
                logits = peer(**values).logits
            torch.testing.assert_close(result.logits, logits, atol=1e-5, rtol=1e-4)
            assert result.size == tuple(one.shape[1:])
            # the class of the highest of the independent scores, brought to the image's size
            scores = torch.nn.functional.interpolate(logits[None], result.size, mode="bilinear")
            agree = result.labels == scores[0].sigmoid().argmax(0)
            assert agree.float().mean() > 0.999
            # P(k alone) / sum: k holds, all others do not
            s = scores[0].double().sigmoid()
            alone = torch.stack(
                [
                    torch.stack([s[j] if j == k else 1 - s[j] for j in range(len(s))]).prod(0)
                    for k in range(len(s))
                ]
            )
            torch.testing.assert_close(
                result.probabilities().double(), alone / alone.sum(0), atol=1e-4, rtol=1e-3
            )


def test_clipseg_in_half(checkpoints):
    model = hf(id=checkpoints("clipseg"), classes=PROMPTS)
    one = image(50, 70)
    expected = model.predict([one])[0].logits
    half = model.to(torch.bfloat16)
    found = pickle.loads(pickle.dumps(half)).predict([one])[0].logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_saved_clipseg_needs_no_checkpoint(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("clipseg"), tmp_path / "moved")
    one = image(40, 50)
    model = pyseg.build(f"hf(id={str(folder)!r}, classes={PROMPTS!r})")
    expected = model(one)
    model.save(tmp_path / "saved")
    shutil.rmtree(folder)
    loaded = pyseg.load(tmp_path / "saved")
    assert loaded.classes == PROMPTS
    assert torch.equal(loaded(one).logits, expected.logits)


def test_saved_segformer_needs_no_checkpoint(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("mobilevit"), tmp_path / "moved")
    one = image(40, 50)
    model = pyseg.build(f"hf(id={str(folder)!r})")
    model.save(tmp_path / "saved")
    shutil.rmtree(folder)
    loaded = pyseg.load(tmp_path / "saved")
    assert torch.equal(loaded(one).logits, model(one).logits)
    with pytest.raises(WeightsError, match="configuration is none that a saved pipeline holds"):
        hf(id="x", weights=None, configuration={"config": {"model_type": "segformer"}})
    broken = loaded.model.config()["configuration"]
    broken["processor"]["image_processor_type"] = "SegformerConfig"
    with pytest.raises(WeightsError, match="is no image processor"):
        hf(id="x", weights=None, configuration=broken)


def test_names_of_classes(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("segformer"), tmp_path / "named")
    config = transformers.SegformerConfig.from_pretrained(folder)
    config.id2label = {0: "road", 1: "sky", 2: "road"}
    config.save_pretrained(folder)
    assert hf(id=str(folder)).classes == ("road", "sky", "road (2)")
    config.id2label = {1: "road", 2: "sky", 90: "tree"}  # as detectors number them
    config.save_pretrained(folder)
    assert hf(id=str(folder)).classes == ("class 0", "road", "sky")


def test_another_number_of_classes_is_to_be_trained(checkpoints):
    with pytest.warns(UserWarning, match=r"another number of classes.*for 5 classes are random"):
        model = hf(id=checkpoints("segformer"), num_classes=5)
    assert model.predict([image(8, 9)])[0].logits.shape[0] == len(model.classes) == 5


def test_refuses(checkpoints, tmp_path):
    segformer, clipseg = checkpoints("segformer"), checkpoints("clipseg")

    def refused(error, match, options, **arguments):
        with pytest.raises(error, match=match):
            pyseg.build(f"hf({options})", **arguments)

    absent = r"neither a folder.*nor a model that the hub gives"
    refused(WeightsError, absent, f"id={str(tmp_path)!r}")
    refused(WeightsError, rf"'nobody/nothing'.*{absent}", "id='nobody/nothing'")
    refused(SpecError, "semantic only.*Mask2Former", f"id={segformer!r}, task='panoptic'")
    refused(SpecError, "option task must be|task must be", f"id={segformer!r}, task='depth'")
    refused(SpecError, "leave them out", f"id={segformer!r}, threshold=0.5")
    refused(SpecError, "has classes of its own", f"id={segformer!r}, classes=('a',)")
    refused(WeightsError, "imagenet", f"id={segformer!r}", weights="imagenet")
    refused(SpecError, r"zero-shot.*classes=\('a road'", f"id={clipseg!r}")
    refused(SpecError, "at least one", f"id={clipseg!r}, classes=()")
    refused(SpecError, "must be texts", f"id={clipseg!r}, classes=('sky', ' ')")
    refused(SpecError, "sky twice", f"id={clipseg!r}, classes=('sky', 'sky')")
    refused(SpecError, "are 1 prompts", f"id={clipseg!r}, classes=('sky',)", num_classes=3)
    long = "a very long prompt " * 20
    refused(
        SpecError, r"may have 77 tokens, got \d+.*shorten", f"id={clipseg!r}, classes=({long!r},)"
    )


def test_a_file_of_other_weights(checkpoints, tmp_path):
    other = hf(id=checkpoints("segformer"), num_classes=7, weights=None)
    torch.save(other.state_dict(), tmp_path / "seven.pth")
    with pytest.raises(WeightsError, match=r"seven.pth is of another.*num_classes"):
        hf(id=checkpoints("segformer"), weights=tmp_path / "seven.pth")


def test_incomplete_checkpoints(checkpoints, tmp_path):
    bare = checkpoints.save("clipseg", tmp_path / "bare", tokens=False)
    with pytest.raises(WeightsError, match=r"lacks the tokenizer's files, which a clipseg needs"):
        hf(id=bare, classes=PROMPTS)
    large = transformers.CLIPTokenizer(
        vocab={**checkpoints.tokenizer().get_vocab(), "the</w>": 600}, merges=[]
    )
    large.add_tokens(["the road"])
    large.save_pretrained(bare)
    with pytest.raises(WeightsError, match="tokenizer of another network"):
        hf(id=bare, classes=PROMPTS)
    folder = shutil.copytree(checkpoints("segformer"), tmp_path / "part")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="no usable copy of the network's weights"):
        hf(id=str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"no usable copy of .*preprocessor_config.json"):
        hf(id=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"neither a folder"):
        hf(id=str(folder))


def test_another_tasks_checkpoint(checkpoints, tmp_path):
    """A classifier has no decoder: an error, or the start of a training."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig.from_pretrained(checkpoints("segformer"))
    folder = str(tmp_path / "classifier")
    transformers.SegformerForImageClassification(config).save_pretrained(folder)
    transformers.SegformerImageProcessor().save_pretrained(folder)
    with pytest.raises(
        WeightsError, match=r"of SegformerForImageClassification:.*lacks.*decode_head.*num_classes="
    ):
        hf(id=folder)
    with pytest.warns(UserWarning, match=r"absent, it is a SegformerForImageClassification"):
        assert hf(id=folder, num_classes=4).classes == tuple(f"class {k}" for k in range(4))
    for made, match in (
        (transformers.ResNetConfig(), r"'resnet', which transformers has no network of segm"),
        (transformers.SamConfig(), r"pyseg's refiners sam and sam2"),
    ):
        made.save_pretrained(tmp_path / "other")
        with pytest.raises(SpecError, match=match):
            pyseg.build(f"hf(id={str(tmp_path / 'other')!r})")
    for made, match in (
        (transformers.VideomtConfig(), "segments videos; choose an EoMT"),
        (transformers.SegGptConfig(), "needs an example.*CLIPSeg"),
        (transformers.ConditionalDetrConfig(), "'no object'.*choose a DETR"),
    ):
        made.save_pretrained(tmp_path / "other")
        with pytest.raises(PysegError, match=match):
            pyseg.build(f"hf(id={str(tmp_path / 'other')!r})")


def test_every_network_of_the_auto_classes_is_answered():
    """Whatever transformers maps to segmentation works, or is refused by name."""
    from pyseg_hf import files
    from transformers.models.auto import modeling_auto

    for task in ("SEMANTIC", "INSTANCE", "UNIVERSAL", "IMAGE"):
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_SEGMENTATION_MAPPING_NAMES")
        for name in names:
            config = transformers.CONFIG_MAPPING[name]()
            if name in files.REFUSED:
                with pytest.raises(PysegError):
                    files.kind_of("x", config)
            else:
                wanted = "semantic" if task == "SEMANTIC" else "universal"
                assert files.kind_of("x", config) == wanted, name
