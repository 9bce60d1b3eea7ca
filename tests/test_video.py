"""Tracking: the masks of sam2's own video predictor, from frames that are read one by one."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyseg
from pyseg.errors import LabelError, PysegError
from pyseg.image import read_image
from pyseg.promptable import Sam2Backend
from pyseg.video import VideoPrompt, _Frames, _predictor_of, _Tracker, track

SIZE = (40, 56)


def small_sam2(kind="sam2.modeling.sam2_base.SAM2Base", **options):
    """With its memory, of 64 x 64 pixels; the masks of random weights move and vanish."""
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    torch.manual_seed(3)
    config = OmegaConf.load(Path(sam2.__path__[0]) / "configs/sam2.1/sam2.1_hiera_t.yaml").model
    config._target_ = kind
    config.image_size = 64
    encoder, memory, attention = (
        config.image_encoder,
        config.memory_encoder,
        config.memory_attention,
    )
    encoder.trunk.update(embed_dim=16, stages=[1, 1, 2, 1], global_att_blocks=[3])
    encoder.neck.update(d_model=32, backbone_channel_list=[128, 64, 32, 16])
    encoder.neck.position_encoding.num_pos_feats = 32
    attention.update(d_model=32, num_layers=1)
    attention.layer.update(d_model=32, dim_feedforward=32)
    attention.layer.self_attention.embedding_dim = 32
    attention.layer.cross_attention.update(embedding_dim=32, kv_in_dim=16)
    memory.update(in_dim=32, out_dim=16)
    memory.position_encoding.num_pos_feats = 16
    memory.mask_downsampler.embed_dim = 32
    memory.fuser.layer.dim = 32
    config.update(options)
    model = instantiate(config).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module")
def segmenter():
    return Sam2Backend(small_sam2())


@pytest.fixture(scope="module")
def official(segmenter):
    """sam2's predictor as its own builder sets it, of the same weights."""
    made = small_sam2(
        "sam2.sam2_video_predictor.SAM2VideoPredictor",
        binarize_mask_from_pts_for_mem_enc=True,
        sam_mask_decoder_extra_args={
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    made.load_state_dict(segmenter.model.state_dict())

    def widen(module, args, options):
        # Without autocast sam2 fails where an object is prompted in a later frame only.
        return args, {**options, "memory": options["memory"].float()}

    made.memory_attention.register_forward_pre_hook(widen, with_kwargs=True)
    return made


def clip(folder, count=26):
    """A bright square that moves over noise, as JPEGs, which is all that sam2 takes."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 120, (*SIZE, 3), dtype=np.uint8)
    for k in range(count):
        frame = ground.copy()
        frame[8 + k % 9 : 22 + k % 9, 2 + k : 18 + k] = (250, 200 - 3 * k, 30)
        Image.fromarray(frame).save(folder / f"{k:05d}.jpg", quality=95)
    return folder


def expected(predictor, folder, prompts):
    """Mask logits of every frame, by sam2's public interface."""
    state = predictor.init_state(str(folder))
    for p in prompts:
        if p.mask is not None:
            predictor.add_new_mask(state, p.frame, p.object, p.mask)
        else:
            points = {"points": [*p.points], "labels": [*p.point_labels]} if p.points else {}
            predictor.add_new_points_or_box(state, p.frame, p.object, box=p.box, **points)
    found = {}
    for reverse in (False, True):
        for index, _, masks in predictor.propagate_in_video(state, reverse=reverse):
            found.setdefault(index, masks[:, 0].clone())
    return tuple(state["obj_ids"]), found


@functools.cache
def expected_of(predictor, name):
    """For a prompt of `PROMPTS`, once: on the clip of 26 frames."""
    with tempfile.TemporaryDirectory() as folder:
        return expected(predictor, clip(Path(folder)), PROMPTS[name])


MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[20:34, 25:50] = True
PROMPTS = {
    "points": [VideoPrompt(0, 1, points=[(9, 14), (40, 30)], point_labels=[1, 0])],
    "box later, both ways": [VideoPrompt(20, 7, box=(20, 10, 39, 25))],
    "several objects and frames": [
        VideoPrompt(4, 2, points=[(12, 16)], point_labels=[1]),
        VideoPrompt(9, 5, box=(3, 3, 30, 30), points=[(14, 20)], point_labels=[1]),
        VideoPrompt(21, 2, points=[(30, 18), (2, 2)], point_labels=[1, 0]),
        VideoPrompt(6, 3, mask=MASK),
    ],
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("given", ["sequence", "stream"])
def test_masks_are_those_of_the_official_predictor(tmp_path, segmenter, official, name, given):
    folder, prompts = clip(tmp_path), PROMPTS[name]
    ids, masks = expected_of(official, name)
    files = sorted(folder.iterdir())
    frames = files if given == "sequence" else (read_image(file) for file in files)
    tracker = _Tracker(segmenter, _Frames(frames, 64))
    seen = dict(tracker.run(prompts, True))
    assert tracker.objects == ids and sorted(seen) == sorted(masks) == list(range(26))
    for index, found in seen.items():
        assert torch.equal(found, masks[index]), index
    every = torch.stack([masks[k] for k in sorted(masks)])
    assert (every > 0).any() and (every <= 0).any()
    assert len({bytes((plane > 0).numpy()) for plane in every}) > 13  # they do move


def test_a_video_shorter_than_the_memory(tmp_path, segmenter, official):
    folder, prompts = clip(tmp_path, 5), PROMPTS["points"]
    _, masks = expected(official, folder, prompts)
    frames = (read_image(file) for file in sorted(folder.iterdir()))
    for index, found in _Tracker(segmenter, _Frames(frames, 64)).run(prompts, True):
        assert torch.equal(found, masks[index])
    (only,) = track([read_image(folder / "00000.jpg")], prompts, segmenter=segmenter)
    assert only[0] == 0


def test_label_maps_have_the_surest_object(tmp_path, segmenter, official):
    folder, prompts = clip(tmp_path), PROMPTS["several objects and frames"]
    ids, masks = expected_of(official, "several objects and frames")
    labelled = [
        VideoPrompt(**{**vars(p), "label": {2: "Car", 5: 1, 3: "car"}[p.object]}) for p in prompts
    ]
    results = dict(track(folder, labelled, classes=("car", "sign"), segmenter=segmenter))
    for index, result in results.items():
        best, first = masks[index].max(0)
        table = torch.where(best > 0, torch.tensor(ids)[first], 0)
        assert torch.equal(result.segments.map.long(), table)
        labels = torch.full(SIZE, 255, dtype=torch.uint8)
        for number, label in ((2, 0), (5, 1), (3, 0)):
            labels[table == number] = label
        assert torch.equal(result.labels, labels) and result.size == SIZE
        for item in result.segments.items:
            assert item.area == int((table == item.id).sum()) > 0
    unnamed = dict(track(folder, prompts, segmenter=segmenter))
    assert unnamed[0].classes == ("object 2", "object 3", "object 5")
    forward = dict(track(folder, prompts, segmenter=segmenter, backward=False))
    assert sorted(forward) == list(range(4, 26))
    assert all(torch.equal(forward[k].labels, unnamed[k].labels) for k in forward)
    results[10].save(tmp_path / "labels.png")


def test_memory_does_not_grow_with_the_video(segmenter):
    """Of 300 frames as many are held as of 40; those of a stream are read when needed."""
    read = []

    def frames(count):
        for k in range(count):
            read.append(k)
            yield torch.full((3, *SIZE), k % 250, dtype=torch.uint8)

    held = {}
    for count in (40, 90):
        read.clear()
        tracker = _Tracker(segmenter, _Frames(frames(count), 64))
        most = 0
        for index, _ in tracker.run([VideoPrompt(2, 1, points=[(9, 9)])], True):
            outputs = tracker.state["output_dict_per_obj"][0]
            kept = len(outputs["non_cond_frame_outputs"]) + len(outputs["cond_frame_outputs"])
            most = max(most, kept)
            assert len(tracker.state["cached_features"]) == 1
            assert len(tracker.frames.kept) <= 17 + 2
            assert len(read) <= max(index + 1, 17) or index < 2
        held[count] = most
    assert held[40] == held[90] <= 2 * tracker.reach + 2


def test_the_segmenter_stays_as_it_was(segmenter):
    pixels = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    before = vars(segmenter.model.sam_mask_decoder).copy()
    made = _predictor_of(segmenter.model)
    assert made.sam_mask_decoder.dynamic_multimask_via_stability
    list(track([pixels] * 2, [VideoPrompt(0, 1, points=[(5, 5)])], segmenter=segmenter))
    after = vars(segmenter.model.sam_mask_decoder)
    assert {k: v for k, v in before.items() if isinstance(v, (bool, float))} == {
        k: v for k, v in after.items() if isinstance(v, (bool, float))
    }
    assert not after["dynamic_multimask_via_stability"]


def test_camvid_frames_in_order(data_folder, segmenter):
    dataset = pyseg.datasets.create("camvid", root=data_folder("camvid"), split="val")
    count = 20
    car = dataset.classes.index("Car")
    first = next(k for k in range(3, count) if int((dataset[k].labels == car).sum()) > 200)
    mask = dataset[first].labels == car
    stream = (dataset[k].image for k in range(count))
    prompt = VideoPrompt(first, 1, label="Car", mask=mask)
    found = dict(track(stream, [prompt], classes=dataset.classes, segmenter=segmenter))
    assert sorted(found) == list(range(count))
    shown = found[first].labels == car  # at the quarter size of the network's masks
    assert float((shown & mask).sum() / (shown | mask).sum()) > 0.3
    assert all(set(result.labels.unique().tolist()) <= {car, 255} for result in found.values())


def test_what_is_refused(segmenter, tmp_path):
    frames = [torch.zeros(3, *SIZE, dtype=torch.uint8)] * 3

    def refused(message, *prompts, frames=frames, error=PysegError, **options):
        with pytest.raises(error, match=message):
            list(track(frames, prompts, segmenter=segmenter, **options))

    point = {"points": [(3, 3)]}
    refused("prompts is empty")
    refused("frames is empty", VideoPrompt(0, 1, **point), frames=[])
    refused("no folder", VideoPrompt(0, 1, **point), frames=tmp_path / "none")
    refused("frames is empty", VideoPrompt(0, 1, **point), frames=tmp_path)
    refused("object 1 in frame 3: there is no such frame", VideoPrompt(3, 1, **point))
    refused("no such frame", VideoPrompt(3, 1, **point), frames=iter(frames))
    refused("numbers from 1 on", VideoPrompt(0, 0, **point))
    refused("there are two", VideoPrompt(0, 1, **point), VideoPrompt(0, 1, box=(1, 1, 5, 5)))
    refused("neither points nor box nor mask", VideoPrompt(0, 1))
    refused("outside the frames of 56 x 40", VideoPrompt(0, 1, points=[(56, 3)]))
    refused("as many point_labels", VideoPrompt(0, 1, points=[(1, 1)], point_labels=[1, 0]))
    refused("1 on the object", VideoPrompt(0, 1, points=[(1, 1)], point_labels=[2]))
    refused("x0 < x1", VideoPrompt(0, 1, box=(5, 1, 4, 9)))
    refused("mask must be bool", VideoPrompt(0, 1, mask=np.ones((4, 4), bool)))
    refused("not both", VideoPrompt(0, 1, mask=MASK, **point))
    refused("give classes", VideoPrompt(0, 1, label="car", **point), error=LabelError)
    refused("has no class", VideoPrompt(0, 1, **point), error=LabelError, classes=("car",))
    wrong = VideoPrompt(0, 1, label="cat", **point)
    refused("'cat' of object 1 is no class", wrong, error=LabelError, classes=("car",))
    two = [VideoPrompt(k, 1, label=k, **point) for k in (0, 1)]
    refused("has two classes", *two, error=LabelError, classes=("car", "sign"))
    with pytest.raises(PysegError, match="only a SAM 2 of the package sam2"):
        track(frames, [VideoPrompt(0, 1, **point)], segmenter=object())
    odd = [*frames, torch.zeros(3, 9, 9, dtype=torch.uint8)]
    refused("frame 3 is .* must be of one size", VideoPrompt(0, 1, **point), frames=odd)
