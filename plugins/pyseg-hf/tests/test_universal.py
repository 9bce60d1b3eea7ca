"""Networks that find masks: results are the library's own, losses fall, pipelines come back."""

import copy
import pickle
import shutil

import pytest
import torch
import transformers
from pyseg_hf import hf, step, targets
from pyseg_hf.universal import _segments

import pyseg
from pyseg import testing
from pyseg.errors import SpecError, WeightsError
from pyseg.training import fit
from pyseg.types import Instances, Sample, Segments

TASKS = [
    (kind, task)
    for kind in ("mask2former", "maskformer", "oneformer", "detr", "eomt", "eomt_dinov3")
    for task in ("semantic", "instance", "panoptic")
    if task != "semantic" or "eomt" not in kind
] + [("eomt_semantic", "semantic"), ("rf_detr", "instance")]
KINDS = sorted({kind for kind, _ in TASKS})
DETECTORS = ("detr", "rf_detr")


def image(*size):
    return torch.randint(256, (3, *size), dtype=torch.uint8)


def in_columns(kind):
    """A hook that gives each query columns and a class: those of random networks are all alike."""
    key = "pred_masks" if kind in DETECTORS else "masks_queries_logits"
    scores = "logits" if kind in DETECTORS else "class_queries_logits"

    def hook(module, arguments, output):
        masks = output[key]
        queries, width = masks.shape[1], masks.shape[3]
        own = torch.arange(width) * queries // width
        own = (own == torch.arange(queries)[:, None]).to(masks)
        output[key] = masks + 50 * (2 * own - 1)[:, None]
        spread = output[scores] / 40
        spread[:, torch.arange(queries), torch.arange(queries) % 3] += 6
        output[scores] = spread
        return output

    return hook


def peer_of(checkpoints, kind, task, dtype=torch.float32):
    """The library's own way from an image to a network's output."""
    folder = checkpoints(kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    if kind == "oneformer":  # flags that are not of the configuration's evaluation
        config.is_training = False
    network = getattr(transformers, config.architectures[0])
    network = network.from_pretrained(folder, config=config).eval().to(dtype)
    network.register_forward_hook(in_columns(kind))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def run(one):
        values = processor(images=one.permute(1, 2, 0).numpy(), return_tensors="pt")
        if kind == "oneformer":
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            whole = transformers.OneFormerProcessor(processor, tokenizer)
            values = whole(one.permute(1, 2, 0).numpy(), [task], return_tensors="pt")
        values["pixel_values"] = values["pixel_values"].to(dtype)
        with torch.inference_mode():
            outputs = network(**values)
        for key in ("logits", "pred_masks", "class_queries_logits", "masks_queries_logits"):
            if key in outputs:
                outputs[key] = outputs[key].float()
        return outputs

    if kind == "oneformer":
        processor.class_info_file = "unknown"  # None is a TypeError in its post-processing
    return run, processor


HALF = [(kind, task) for kind, task in TASKS if task == "panoptic"] + TASKS[-2:]


@pytest.mark.parametrize(
    ("kind", "task", "dtype"),
    [(*one, torch.float32) for one in TASKS] + [(*one, torch.bfloat16) for one in HALF],
)
def test_equals_the_library(checkpoints, kind, task, dtype):
    folder = checkpoints(kind)
    run, processor = peer_of(checkpoints, kind, task, dtype)
    threshold = {} if task == "semantic" else {"threshold": 0.05}
    model = hf(id=folder, task=task, **threshold).to(dtype)
    model.network.model.register_forward_hook(in_columns(kind))
    images = [image(50, 70), image(61, 33)]
    for one, result in zip(images, model.predict(images), strict=True):
        outputs, sizes = run(one), {"target_sizes": [tuple(one.shape[1:])]}
        if task == "semantic":
            (expected,) = processor.post_process_semantic_segmentation(outputs, **sizes)
            assert (result.labels == expected).float().mean() > 0.999  # but for ties
            assert len(expected.unique()) > 1
        elif task == "panoptic":
            fuse = {} if "eomt" in kind else {"label_ids_to_fuse": set()}
            (expected,) = processor.post_process_panoptic_segmentation(
                outputs, **sizes, **threshold, **fuse
            )
            same_segments(result.segments, expected)
        else:
            binary = kind in ("mask2former", "maskformer", "rf_detr")
            (expected,) = processor.post_process_instance_segmentation(
                outputs, **sizes, **threshold, **({"return_binary_maps": True} if binary else {})
            )
            same_instances(result.instances, expected)


def same_segments(segments, expected):
    found = expected["segmentation"]
    kept = [info for info in expected["segments_info"] if (found == info["id"]).any()]
    assert len(kept) == len(segments.items) > 1
    for info, item in zip(kept, segments.items, strict=True):
        inside = found == info["id"]
        assert torch.equal(segments.map == item.id, inside)
        assert (item.label, item.area) == (info["label_id"], int(inside.sum()))
        assert item.score == pytest.approx(info["score"])


def same_instances(instances, expected):
    found, infos = expected["segmentation"], expected["segments_info"]
    masks = found if found.ndim == 3 else torch.stack([found == info["id"] for info in infos])
    seen = [k for k, mask in enumerate(masks) if mask.any()]  # one may be painted over
    assert len(seen) > 1
    assert torch.equal(instances.masks, masks[seen].bool())
    assert instances.labels.tolist() == [infos[k]["label_id"] for k in seen]
    assert instances.scores.tolist() == pytest.approx([infos[k]["score"] for k in seen])
    for (left, top, right, bottom), mask in zip(instances.boxes.long(), masks[seen], strict=True):
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top].any() and mask[bottom - 1].any()
        assert mask[:, left].any() and mask[:, right - 1].any()


@pytest.mark.parametrize("kind", ["mask2former", "detr", "eomt"])
def test_stuff_is_one_segment(checkpoints, kind):
    folder = checkpoints(kind)
    one = image(48, 96)
    apart = hf(id=folder, task="panoptic", threshold=0.05)
    labels = [1, 2, 1, 2, 0, 0, 1]

    def hook(module, arguments, output):
        output = in_columns(kind)(module, arguments, output)
        key = "logits" if kind in DETECTORS else "class_queries_logits"
        output[key] = 9 * torch.eye(4)[labels][None]
        return output

    fused = hf(id=folder, task="panoptic", threshold=0.05, stuff=("road", "sky"))
    assert fused.things == ("car",) and apart.things == apart.classes
    for model in (apart, fused):
        model.network.model.register_forward_hook(hook)
    apart, result = apart.predict([one])[0].segments, fused.predict([one])[0].segments
    assert sorted(item.label for item in apart.items) == sorted(labels)
    assert sorted(item.label for item in result.items) == [0, 0, 1, 2]
    assert torch.equal(result.label_map(3), apart.label_map(3))
    assert sorted((result.map == i.id).sum() for i in result.items) == sorted(
        i.area for i in result.items
    )
    if kind == "eomt":  # the others' own fusing gives the next segment an id that is taken
        (expected,) = fused.processor.post_process_panoptic_segmentation(
            fused.outputs(one), target_sizes=[(48, 96)], threshold=0.05, stuff_classes=[1, 2]
        )
        same_segments(result, expected)


def test_the_thresholds_are_the_librarys(checkpoints):
    for kind, limit in (("mask2former", 0.5), ("eomt", 0.8)):
        model = hf(id=checkpoints(kind), task="panoptic")
        columns = in_columns(kind)

        def hook(module, arguments, output, columns=columns, limit=limit):
            output = columns(module, arguments, output)
            scores = torch.tensor([limit - 0.01, limit + 0.01]).repeat(4)[:7]
            rest = (1 - scores) / 3
            output["class_queries_logits"] = torch.stack([scores, rest, rest, rest], 1)[None].log()
            return output

        model.network.model.register_forward_hook(hook)
        items = model.predict([image(64, 64)])[0].segments.items
        assert [item.score for item in items] == pytest.approx([limit + 0.01] * 3, abs=1e-5)


def samples():
    """Two images of different sizes, with void; one with segments, one with labels."""
    labels = torch.zeros(60, 80, dtype=torch.uint8)
    labels[:, 40:], labels[:8] = 2, 255
    ids = torch.ones(48, 64, dtype=torch.int32)
    ids[:, 20:40], ids[30:] = 2, 300
    segments = Segments.from_map(ids, {1: 0, 2: 0, 300: 1})
    return [Sample("one", image(60, 80), labels), Sample("two", image(48, 64), None, segments)]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_through_fit(checkpoints, kind, tmp_path):
    torch.manual_seed(0)
    model = hf(id=checkpoints(kind))
    batch = samples()
    log = fit(
        model,
        lambda epoch: [batch] * 4,
        step=step,
        optimizer=torch.optim.AdamW(model.parameters(), 2e-3),
        steps=4,
        epochs=2,
        output_dir=tmp_path / "run",
        progress=False,
    )
    assert log[-1]["loss"] < log[0]["loss"] and not model.training
    again = hf(id=checkpoints(kind), weights=tmp_path / "run" / "model.safetensors")
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_go_the_way_of_the_image(checkpoints, kind):
    """A mask painted into the image lies, in the network's frame, where the target's mask is."""
    model = hf(id=checkpoints(kind))
    made = []
    for size in ((60, 80), (90, 50)):
        labels = torch.zeros(size, dtype=torch.uint8)
        labels[: size[0] // 2, size[1] // 4 : size[1] // 2] = 1
        white = torch.where(labels == 1, 255, 0).to(torch.uint8).expand(3, *size)
        made.append(Sample("one", white.contiguous(), labels))
    if kind == "rf_detr":
        made = made[:1]
    found = [targets.masks_of(sample, "semantic", ()) for sample in made]
    values = model._values([sample.image for sample in made])
    rows = list(targets.placed(model.processor, values, made, found))
    assert len(rows) == len(values["pixel_values"])
    for pixels, (masks, labels) in zip(values["pixel_values"], rows, strict=True):
        bright = pixels[0] > pixels[0].max() / 2 + pixels[0].min() / 2
        if (labels == 1).any():
            (mask,) = masks[labels == 1].bool()
            assert (mask & bright).sum() / (mask | bright).sum() > 0.85  # but for smooth edges
        assert masks.sum(0).max() == 1 and set(masks.unique().tolist()) <= {0.0, 1.0}


def test_targets_are_those_of_the_processors(checkpoints):
    one = image(50, 70)
    labels = torch.randint(3, (5, 7), dtype=torch.uint8).repeat_interleave(10, 0)
    labels = labels.repeat_interleave(10, 1)
    sample = Sample("one", one, labels)
    for kind in ("mask2former", "maskformer", "eomt", "eomt_semantic"):
        model = hf(id=checkpoints(kind))
        options = {"ignore_index": 9} if "eomt" in kind else {}
        expected = model.processor(
            images=one,
            segmentation_maps=labels.numpy() + (1 if "eomt" in kind else 0),
            return_tensors="pt",
            input_data_format="channels_first",
            **options,
        )
        found = targets.masks_of(sample, "semantic", ())
        rows = list(targets.placed(model.processor, expected, [sample], [found]))
        for (masks, names), peer, peer_names in zip(
            rows, expected["mask_labels"], expected["class_labels"], strict=True
        ):
            assert torch.equal(names, peer_names)
            assert (masks == peer).float().mean() > 0.98  # NEAREST differs from NEAREST_EXACT
    model = hf(id=checkpoints("detr"))
    masks = torch.zeros(1, 50, 70, dtype=torch.bool)
    masks[0, 10:30, 20:60] = True
    polygon = [20, 10, 59.9, 10, 59.9, 29.9, 20, 29.9]
    annotation = {
        "image_id": 1,
        "annotations": [
            {"bbox": [20, 10, 40, 20], "area": 800, "iscrowd": 0, "category_id": 2, "id": 1}
        ],
    }
    annotation["annotations"][0]["segmentation"] = [polygon]
    expected = model.processor(
        images=one, annotations=annotation, return_tensors="pt", input_data_format="channels_first"
    )
    things = Instances(torch.zeros(1, 4), masks, torch.ones(1), torch.tensor([2]))
    sample = Sample("one", one, instances=things)
    seen = {}
    model.network.model.forward = lambda **inputs: (
        seen.update(inputs) or transformers.utils.ModelOutput(loss=torch.ones(()))
    )
    model([sample])
    (ours,), (peer,) = seen["labels"], expected["labels"]
    assert torch.equal(ours["class_labels"], peer["class_labels"])
    torch.testing.assert_close(ours["boxes"], peer["boxes"].float(), atol=0.01, rtol=0)


def test_what_counts_of_a_sample():
    ids = torch.tensor([[1, 1, 2, 3, 0, 4]], dtype=torch.int32)
    segments = Segments.from_map(ids, {1: 2, 2: 2, 3: 0, 4: 0}, crowds=[4])
    one = image(1, 6)
    labels = torch.tensor([[2, 2, 2, 0, 255, 0]], dtype=torch.uint8)

    def masks(task, stuff=(), **parts):
        found, names = targets.masks_of(Sample("one", one, **parts), task, stuff)
        return sorted(zip(names.tolist(), found[:, 0].int().tolist(), strict=True))

    apart = [(0, [0, 0, 0, 1, 0, 0]), (2, [0, 0, 1, 0, 0, 0]), (2, [1, 1, 0, 0, 0, 0])]
    assert masks("panoptic", segments=segments) == apart
    joined = [apart[0], (2, [1, 1, 1, 0, 0, 0])]
    assert masks("panoptic", (2,), segments=segments) == joined
    assert masks("instance", (2,), segments=segments) == apart[:1]
    semantic = [(0, [0, 0, 0, 1, 0, 1]), (2, [1, 1, 1, 0, 0, 0])]
    assert masks("semantic", labels=labels, segments=segments) == semantic
    assert masks("panoptic", labels=labels) == semantic
    mask = torch.tensor([[[False, False, False, True, False, True]]] * 2)
    mask[1, :, :3] = True
    crowd = torch.tensor([False, True])
    things = Instances(torch.zeros(2, 4), mask, torch.ones(2), torch.tensor([0, 0]), crowd)
    assert masks("panoptic", (2,), labels=labels, instances=things) == semantic
    assert masks("panoptic", instances=things) == semantic[:1]
    void = torch.full((1, 6), 255, dtype=torch.uint8)
    assert targets.masks_of(Sample("one", one, void), "semantic", ())[0].shape == (0, 1, 6)
    wide = torch.tensor([[255, -1, 3, 3, 3, 3]], dtype=torch.int16)  # with 256 classes or more
    assert [label for label, _ in masks("semantic", labels=wide)] == [3, 255]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_void_can_be_learnt_from(checkpoints, kind):
    model = hf(id=checkpoints(kind)).train()
    void = Sample("void", image(60, 80), torch.full((60, 80), 255, dtype=torch.uint8))
    loss = model([void, samples()[0]])["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_oneformer_reads_texts_in_training_only(checkpoints):
    model = hf(id=checkpoints("oneformer"), task="instance")
    config, seen = model.network.model.config, {}
    assert config.is_training
    model.network.register_forward_pre_hook(
        lambda module, a, given: seen.update(given), with_kwargs=True
    )
    one = image(48, 64)
    first, second = model.predict([one, one])  # dropout of its own flag is off
    assert torch.equal(first.instances.masks, second.instances.masks)
    assert "text_inputs" not in seen
    model.train()([samples()[1]])
    tokenizer = checkpoints.tokenizer()
    whole = transformers.OneFormerProcessor(model.processor, tokenizer)
    texts = ["a photo with a car"] * 2 + ["a photo with a road"] + ["an instance photo"] * 4
    assert torch.equal(seen["text_inputs"][0], whole._preprocess_text(texts, 77))
    assert torch.equal(seen["task_inputs"], whole._preprocess_text(["the task is instance"], 77))
    again = pickle.loads(pickle.dumps(model))
    assert again.training and torch.equal(
        again.eval().predict([one])[0].labels, model.eval().predict([one])[0].labels
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_is_to_be_trained(checkpoints, kind):
    with pytest.warns(UserWarning, match=r"another number of classes.*for 5 classes are random"):
        model = hf(id=checkpoints(kind), num_classes=5)
    torch.manual_seed(0)
    fresh = hf(id=checkpoints(kind), num_classes=5, weights=None)
    for (name, ours), other in zip(model.named_buffers(), fresh.buffers(), strict=True):
        if "empty_weight" in name:  # of the loss, by class
            assert torch.equal(ours, other)
    assert model.classes == tuple(f"class {k}" for k in range(5))
    labels = torch.arange(5, dtype=torch.uint8).repeat_interleave(12)[:, None].repeat(1, 80)
    assert model.train()([Sample("all", image(60, 80), labels)])["loss"].isfinite()


@pytest.mark.parametrize("kind", ["eomt_semantic", "oneformer", "rf_detr"])
def test_conformance(checkpoints, kind):
    testing.check_model("hf", id=checkpoints(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_pipelines_need_no_checkpoint(checkpoints, kind, tmp_path):
    folder = shutil.copytree(checkpoints(kind), tmp_path / "moved")
    one = image(48, 64)
    model = pyseg.build(f"hf(id={str(folder)!r})")
    expected = model(one)
    next(model.model.parameters()).requires_grad_(False)
    copied = copy.deepcopy(model.model)
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in model.model.parameters()
    ]
    assert_same(copied.predict([one])[0], expected)
    model.save(tmp_path / "saved")
    other = pyseg.build(f"hf(id={str(folder)!r})", num_classes=5, weights=None)
    other.save(tmp_path / "other")
    shutil.rmtree(folder)
    loaded = pyseg.load(tmp_path / "saved")
    assert loaded.classes == ("car", "road", "sky")
    assert_same(loaded(one), expected)
    assert_same(pyseg.load(tmp_path / "other")(one), other(one))
    loaded.save(tmp_path / "again")
    assert_same(pyseg.load(tmp_path / "again")(one), expected)


def assert_same(found, expected):
    for name in ("logits", "segments", "instances"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
    if expected.logits is not None:
        assert torch.equal(found.logits, expected.logits)
    if expected.segments is not None:
        assert torch.equal(found.segments.map, expected.segments.map)
    if expected.instances is not None:
        assert torch.equal(found.instances.masks, expected.instances.masks)


def test_nothing_found():
    nothing = {"segmentation": torch.zeros(4, 5) - 1, "segments_info": []}
    segments = _segments(nothing, frozenset(), torch.device("cpu"))
    assert segments.items == () and segments.map.shape == (4, 5) and not segments.map.any()


def test_refuses(checkpoints, tmp_path):
    eomt, cut = checkpoints("eomt"), checkpoints("eomt_semantic")
    with pytest.raises(SpecError, match=r"this EoMT is for 'panoptic' or 'instance'"):
        pyseg.build(f"hf(id={eomt!r}, task='semantic')")
    with pytest.raises(SpecError, match=r"this EoMT is for 'semantic'"):
        pyseg.build(f"hf(id={cut!r}, task='panoptic')")
    with pytest.raises(SpecError, match=r"RF-DETR finds instances only.*Mask2Former"):
        pyseg.build(f"hf(id={checkpoints('rf_detr')!r}, task='panoptic')")
    with pytest.raises(SpecError, match=r"stuff names 'rod', which is no class; nearest are road"):
        pyseg.build(f"hf(id={eomt!r}, stuff=('rod',))")
    with pytest.raises(SpecError, match="threshold must be a score"):
        pyseg.build(f"hf(id={eomt!r}, threshold=50.0)")
    model = hf(id=eomt)
    with pytest.raises(ValueError, match="'bare' has neither segments, instances nor labels"):
        model([Sample("bare", image(8, 8))])
    crowded = torch.arange(64, dtype=torch.int32).reshape(8, 8) + 1
    segments = Segments.from_map(crowded, dict.fromkeys(range(1, 65), 0))
    with pytest.raises(ValueError, match=r"'full' has 64 masks, and this eomt finds 7 at most"):
        model([Sample("full", image(8, 8), segments=segments)])
    with pytest.raises(TypeError, match=r"lists of samples.*step=pyseg_hf.step"):
        model(torch.zeros(1, 3, 8, 8))
    bare = checkpoints.save("oneformer", tmp_path / "bare", tokens=False)
    with pytest.raises(WeightsError, match=r"lacks the tokenizer's files, which a oneformer needs"):
        pyseg.build(f"hf(id={bare!r})")


def test_another_tasks_checkpoint(checkpoints, tmp_path):
    torch.manual_seed(0)
    config = checkpoints.detr(backbone_config=checkpoints.resnet(), id2label=checkpoints.NAMES)
    transformers.DetrForObjectDetection(config).save_pretrained(tmp_path)
    checkpoints.UNIVERSAL["detr"][1]().save_pretrained(tmp_path)
    with pytest.raises(
        WeightsError, match=r"of DetrForObjectDetection: of a DetrForSegmentation's .* it lacks"
    ):
        pyseg.build(f"hf(id={str(tmp_path)!r})")
