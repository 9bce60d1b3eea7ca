"""Mask R-CNN, panoptic FPN and UPSNet: small random networks on small images."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyseg
from pyseg.datasets.synthetic import STUFF, StreetScenes
from pyseg.errors import PysegError, WeightsError
from pyseg.models import maskrcnn
from pyseg.models.fcn import FCN
from pyseg.models.maskrcnn import Detections, InstanceModel, state_from_torchvision
from pyseg.models.panoptic_fpn import FPNSemanticHead
from pyseg.models.upsnet import DeformableSemanticHead, _nearest_crops
from pyseg.ops.roi_align import MultiScaleRoIAlign
from pyseg.types import Instances, Sample

PANOPTIC = ["panoptic_fpn_resnet50", "upsnet_resnet50", "maskrcnn_fcn_resnet50"]
SMALL = {"min_size": 64, "max_size": 128, "weights": None}


def make(name, **options):
    torch.manual_seed(0)
    small = {"num_classes": 8, "num_stuff": 5, "backbone": "resnet18", "channels": 32, **SMALL}
    options = {**small, **options}
    return pyseg.models.get(name)(**options)


def check_segments(prediction):
    segments = prediction.segments
    assert segments.map.shape == prediction.size and segments.map.dtype == torch.int32
    areas = torch.bincount(segments.map.flatten(), minlength=len(segments.items) + 1).tolist()
    assert [item.id for item in segments.items] == list(range(1, len(segments.items) + 1))
    assert [item.area for item in segments.items] == areas[1:]
    stuff = [item.label for item in segments.items if item.label < 5]
    assert len(stuff) == len(set(stuff))


@pytest.mark.parametrize(
    "name, count",  # normalisation is learnt in random models, frozen in the first one's weights
    [("maskrcnn_resnet50_fpn", 44_401_393 + 53_120), ("maskrcnn_resnet50_fpn_v2", 46_359_409)],
)
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        model = pyseg.models.get(name)(weights=None)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.classes) == 90 and model.classes[0] == "person"
    assert len(set(model.classes)) == 90


def torchvision_mask_rcnn(norm, variance):
    """Random, for 3 things; four channels of its first layer have a ``variance`` of their own."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.mask_rcnn import MaskRCNN

    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5
    )
    body = backbone.body
    with torch.no_grad():
        body.bn1.running_var[:4] = variance
        body.conv1.weight[:4] *= variance**0.5
    return MaskRCNN(backbone, num_classes=4, min_size=64, max_size=128).eval()


@pytest.mark.parametrize("kind", ["learnt", "frozen", "dead", "coco_v1"])
def test_maskrcnn_equals_torchvision(tmp_path, monkeypatch, kind):
    """Normalisation that is learnt, frozen with an epsilon, and without: COCO_V1's alone."""
    from torchvision.models import detection
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.ops import FrozenBatchNorm2d

    norm = torch.nn.BatchNorm2d if kind == "learnt" else FrozenBatchNorm2d
    # An epsilon of 1e-5 matters to small ones; ResNets of ImageNet have dead channels.
    peer = torchvision_mask_rcnn(norm, 0.0 if kind == "dead" else 1e-5)
    state = peer.state_dict()
    assert any(key.endswith("num_batches_tracked") for key in state) == (kind == "learnt")
    torch.save(state, tmp_path / "peer.pth")
    published = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url
    assert Path(published).stem.endswith(f"-{maskrcnn.COCO_V1}")
    if kind == "coco_v1":
        overwrite_eps(peer, 0.0)
        digest = hashlib.sha256((tmp_path / "peer.pth").read_bytes()).hexdigest()
        monkeypatch.setattr(maskrcnn, "COCO_V1", digest[:8])
    built = pyseg.build(
        "maskrcnn(backbone='resnet18', min_size=64, max_size=128)",
        num_classes=3,
        weights=tmp_path / "peer.pth",
    )
    built.save(tmp_path / "saved")
    image = StreetScenes(length=1, size=(64, 100))[0].image
    with torch.inference_mode():
        expected = peer([image.float() / 255])[0]
    found = pyseg.load(tmp_path / "saved")(image).instances
    assert len(found.labels) > 20
    assert torch.equal(found.labels, expected["labels"] - 1)
    # Our RoIAlign rounds otherwise than torchvision's, and x - 1e-5 + 1e-5 is not quite x.
    tolerance = 0.15 if kind == "coco_v1" else 1e-3
    torch.testing.assert_close(found.boxes, expected["boxes"], atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(found.scores, expected["scores"], atol=tolerance / 100, rtol=1e-5)
    # torchvision stretches masks over whole pixels, we over the box itself.
    differ = (found.masks != (expected["masks"][:, 0] >= 0.5)).float().mean()
    assert differ < 0.1


def test_other_things_than_the_weights_have_get_new_last_layers(tmp_path):
    state = torchvision_mask_rcnn(torch.nn.BatchNorm2d, 1.0).state_dict()
    torch.save(state, tmp_path / "three.pth")
    build = pyseg.models.get("maskrcnn")
    with pytest.warns(
        UserWarning, match=r"three\.pth is for 3 classes, so the last layers for 5 are"
    ):
        model = build(num_classes=5, backbone="resnet18", weights=tmp_path / "three.pth")
    own = model.detector.state_dict()
    other = {key for key in own if key in state and not torch.equal(own[key], state[key])}
    assert other and all("box_predictor." in k or "mask_fcn_logits." in k for k in other)
    assert len(own["roi_heads.box_predictor.cls_score.bias"]) == 6


@pytest.mark.parametrize("name", PANOPTIC)
def test_predict(name):
    model = make(name, stuff_area=20)
    images = [sample.image for sample in StreetScenes(length=1, size=(48, 90))]
    images.append(StreetScenes(length=1, size=(131, 77))[0].image)
    for image, prediction in zip(images, model.predict(images), strict=True):
        assert prediction.size == tuple(image.shape[1:])
        assert prediction.logits.shape[0] == 8
        assert prediction.labels.shape == prediction.size
        check_segments(prediction)
        count = len(prediction.instances.labels)
        assert prediction.instances.masks.shape == (count, *prediction.size)
        assert all(5 <= label < 8 for label in prediction.instances.labels.tolist())
        prediction.overlay()
    with pytest.raises(PysegError, match="in training mode"):
        model.train().predict(images)


def test_deformable_backbone():
    with torch.device("meta"):
        plain = pyseg.models.get("upsnet_resnet50")(
            num_classes=8, num_stuff=5, backbone="resnet101", depth=3, weights=None
        )
        model = pyseg.models.get("upsnet_resnet101_dcn")(num_classes=8, num_stuff=5, weights=None)
    offsets = [key for key in model.state_dict() if key.endswith("offset.weight")]
    assert len(offsets) == 4 + 23 + 3  # every 3x3 of res3, res4 and res5
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    widths = [128] * 4 + [256] * 23 + [512] * 3
    assert extra == sum(18 * (9 * width + 1) for width in widths)


def test_zero_offsets_leave_a_plain_convolution():
    torch.manual_seed(0)
    head = DeformableSemanticHead(16, 8, 5, depth=3)
    features = [torch.randn(2, 16, 32 >> k, 48 >> k) for k in range(4)]
    logits, together = head(features)
    assert logits.shape == (2, 5, 32, 48) and together.shape == (2, 32, 32, 48)
    x = features[0]
    for layer in head.layers:
        x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1).relu()
    torch.testing.assert_close(together[:, :8], x)


@pytest.mark.parametrize("head", [FPNSemanticHead(16, 32, 5), DeformableSemanticHead(16, 8, 5)])
def test_heads_take_odd_sizes(head):
    sizes = [(25, 37), (13, 19), (7, 10), (4, 5)]
    logits, _ = head([torch.randn(1, 16, *size) for size in sizes])
    assert logits.shape == (1, 5, 25, 37)


@pytest.mark.parametrize("name", PANOPTIC)
def test_losses_reach_every_parameter(name):
    model = make(name).train()
    losses = model([StreetScenes(length=2, size=(64, 96))[k] for k in range(2)])
    expected = {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_semantic",
    }
    if name.startswith("upsnet"):
        expected |= {"loss_roi", "loss_panoptic"}
    assert set(losses) == expected
    assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    assert not unused
    if name.startswith("upsnet"):  # offsets begin at 0 but learn
        assert all(layer.weight.grad.abs().max() > 0 for layer in model.semantic.offsets)


def test_two_networks_share_nothing():
    model = make("maskrcnn_fcn_resnet50").train()
    losses = model([StreetScenes(length=1, size=(64, 96))[0]])
    losses.pop("loss_semantic").backward()
    assert all(p.grad is None for p in model.detector.parameters())
    assert all(p.grad is not None for p in model.semantic.parameters())
    model.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.semantic.parameters())


def test_fcn_has_stride_8_and_takes_odd_sizes():
    logits = FCN("resnet18", 5)(torch.randn(1, 3, 70, 101))
    assert logits.shape == (1, 5, 9, 13)


@pytest.mark.parametrize("name", [*PANOPTIC, "maskrcnn_resnet50_fpn", "maskrcnn_resnet101_fpn"])
def test_regions_are_pooled_by_our_operator(name):
    with torch.device("meta"):
        options = {"num_stuff": 5} if name in PANOPTIC else {}
        model = pyseg.models.get(name)(num_classes=8, weights=None, **options)
    heads = model.detector.roi_heads
    pools = heads.box_roi_pool, heads.mask_roi_pool
    assert all(type(pool) is MultiScaleRoIAlign for pool in pools)
    assert [pool.output_size for pool in pools] == [(7, 7), (14, 14)]


def test_crowds_are_not_learnt_as_objects():
    model = make("upsnet_resnet50")
    sample = StreetScenes(length=1, size=(64, 96))[0]
    crowd = torch.arange(len(sample.instances.labels)) == 1
    target = model._target(replace(sample, instances=replace(sample.instances, crowd=crowd)))
    assert len(crowd) > 2 and torch.equal(target["boxes"], sample.instances.boxes[~crowd])
    assert len(target["masks"]) == len(target["labels"]) == len(crowd) - 1


def test_images_without_objects_can_be_learnt_from():
    for name in PANOPTIC:
        losses = make(name).train()([StreetScenes(length=1, size=(64, 96), objects=(0, 0))[0]])
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_training_starts_from_a_classifier(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(1)
    classifier = resnet18(num_classes=10)
    with torch.no_grad():
        classifier.bn1.running_mean.fill_(0.5)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    model = make("maskrcnn_fcn_resnet50", weights=tmp_path / "classifier.pth").train()
    bodies = model.detector.backbone.body, model.semantic.body
    expected = {k: v for k, v in classifier.state_dict().items() if not k.startswith("fc.")}
    sample = StreetScenes(length=1, size=(64, 96))[0]
    sum(model([sample]).values()).backward()  # leaves the normalisation alone
    for body in bodies:
        assert body.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in body.state_dict().items())
        assert body.bn1.weight.grad is None and body.conv1.weight.grad is not None
    assert model.semantic.training and not model.semantic.body.bn1.training
    torch.save({**expected, "conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match="1 of another shape"):
        make("upsnet_resnet50", weights=tmp_path / "wrong.pth")


def test_training_starts_from_mask_rcnn():
    from torchvision.models import resnet101
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    with torch.device("meta"):
        state = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        model = pyseg.models.get("upsnet_resnet50")(num_classes=8, num_stuff=5, weights=None)
        fitted = state_from_torchvision(model, state)
        deformable = pyseg.models.get("upsnet_resnet101_dcn")(
            num_classes=8, num_stuff=5, weights=None
        )
        classifier = {**resnet101().state_dict(), "surplus": torch.zeros(1)}
        body = state_from_torchvision(deformable, classifier)
    assert fitted.keys() == model.state_dict().keys()
    taken = {key for key, value in fitted.items() if any(value is v for v in state.values())}
    left = {key for key in fitted if key not in taken and not key.startswith("semantic.")}
    heads = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
    assert left == {f"detector.roi_heads.{h}.{p}" for h in heads for p in ("weight", "bias")}
    assert body.keys() == deformable.state_dict().keys() | {"surplus"}  # which is then refused
    key = "detector.backbone.body.layer3.5.conv2.conv.weight"
    assert body[key] is classifier["layer3.5.conv2.weight"]


def test_crops_of_labels():
    labels = torch.arange(12).reshape(3, 4).repeat_interleave(28, 0).repeat_interleave(28, 1)
    crops = _nearest_crops(labels, torch.tensor([[28.0, 28, 56, 56], [0, 0, 112, 84]]))
    assert (crops[0] == 5).all()
    assert crops[1, 0].unique().tolist() == [0, 1, 2, 3]


def test_pruning():
    """Score, boxes of any class, then masks of the same class."""
    model = make("upsnet_resnet50")
    boxes = torch.tensor(
        [
            [0.0, 0, 20, 20],
            [1, 1, 20, 20],
            [10, 0, 30, 20],
            [40, 0, 60, 20],
            [40, 11, 60, 31],
            [0, 30, 9, 39],
        ]
    )
    masks = torch.ones(6, 28, 28)
    masks[2, :, :14] = 0  # what it shares with the first one
    scores = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.75, 0.5])
    labels = torch.tensor([5, 6, 5, 7, 7, 5])
    kept = model._select_instances(Detections(boxes, scores, labels, masks), (64, 64))
    # 1 has the box of 0; 4 shares 45 % of its mask with 3; 5 scores too low.
    assert kept.scores.tolist() == pytest.approx([0.95, 0.85, 0.8])
    none = model._select_instances(
        Detections(boxes[:0], scores[:0], labels[:0], masks[:0]), (64, 64)
    )
    assert len(none.scores) == 0


def test_unified_map():
    """Stuff of the semantic map, an instance, one that the semantic map outvotes, small stuff."""
    model = make("upsnet_resnet50", stuff_area=100)
    logits = torch.zeros(8, 16, 16)
    logits[0] = 4.0
    logits[1, :, 14:] = 6.0  # 8 columns of 64: 512 pixels, less what is below
    logits[2, 15, 14:] = 9.0  # 4 x 8 pixels: too small
    logits[5, 2:6, 2:6] = 9.0
    logits[6, 8:12, 2:6] = 3.5
    boxes = torch.tensor([[8.0, 8, 23, 23], [8, 32, 23, 47]])
    found = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([5, 6]), torch.ones(2, 28, 28))
    segments = model._panoptic_segments(found, logits, (64, 64), (64, 64))
    kinds = [(item.label, item.score) for item in segments.items]
    assert kinds == [(5, pytest.approx(0.9)), (0, 1.0), (1, 1.0)]
    areas = torch.bincount(segments.map.flatten()).tolist()
    assert areas[1:] == [item.area for item in segments.items]
    assert segments.map[15, 15] == 1
    assert segments.map[40, 15] == 2  # class 6 in the box, but sky in the semantic map
    assert segments.map[63, 63] == 0


def test_save_and_load(tmp_path):
    pipeline = pyseg.build(
        "upsnet_resnet50(num_stuff=5,backbone='resnet18',min_size=64,max_size=128)",
        num_classes=8,
        weights=None,
    )
    image = StreetScenes(length=1, size=(64, 96))[0].image
    pipeline.save(tmp_path / "saved")
    again = pyseg.load(tmp_path / "saved")
    one, two = pipeline(image), again(image)
    assert torch.equal(one.segments.map, two.segments.map)
    assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 8, "num_stuff": None}, "give num_classes .* and num_stuff, or neither"),
        ({"num_stuff": 8}, "num_stuff must be 1 to num_classes - 1, got 8 of 8"),
        ({"channels": 12}, "channels must be a multiple of 8, got 12"),
        ({"backbone": "vgg16"}, "backbone must be one of torchvision's resnets.*'vgg16'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make("upsnet_resnet50", **options)


def test_bad_samples():
    model = make("upsnet_resnet50").train()
    sample = StreetScenes(length=1, size=(64, 96))[0]
    with pytest.raises(ValueError, match="has no instances to learn from"):
        model([Sample("a", sample.image, sample.labels)])
    with pytest.raises(ValueError, match="has no labels for the semantic branch"):
        model([Sample("a", sample.image, instances=sample.instances)])
    wrong = Instances(
        torch.tensor([[0.0, 0, 9, 9]]),
        torch.ones(1, 64, 96, dtype=torch.bool),
        torch.ones(1),
        torch.tensor([STUFF.index("sky")]),
    )
    with pytest.raises(ValueError, match=r"instances of classes \[0\]; things are 5 to 7"):
        model([Sample("a", sample.image, sample.labels, instances=wrong)])
    with pytest.raises(TypeError, match=r"images\[0\] must be uint8, got torch.float32"):
        model.eval().predict([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="num_stuff must leave at least one thing"):
        InstanceModel(None, ("a", "b"), 2)
