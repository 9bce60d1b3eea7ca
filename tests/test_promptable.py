"""SAM and SAM 2 behind the protocol: against the packages' own predictors, their weights, Hydra."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from pyseg.errors import WeightsError
from pyseg.promptable import (
    Fingerprint,
    Prompts,
    SamBackend,
    load_sam,
    load_sam2,
    propose,
    stability,
)
from pyseg.promptable import sam as promptable
from pyseg.refiners.sam_prompts import prompt_components, stack_prompts


class Captured(Exception):
    pass


@pytest.mark.parametrize("name", ["sam", "sam2"])
@pytest.mark.parametrize("size", [(90, 160), (160, 90), (121, 121)])
def test_prompts_reach_the_model_in_its_own_frame(backends, monkeypatch, name, size):
    """Coordinates and mask prompts as captured at the prompt encoder's door, model input 128."""
    height, width = size
    labels = torch.zeros(size, dtype=torch.long)
    labels[height // 4 : height // 2, width // 2 : 7 * width // 8] = 1
    prompts = stack_prompts(prompt_components(labels.numpy(), [1], 64)[0], size)
    backend = backends[name]
    embedding = backend.embed(torch.zeros(3, *size, dtype=torch.uint8))
    caught = {}

    def capture(points, boxes, masks):
        caught.update(points=points, boxes=boxes, masks=masks)
        raise Captured

    encoder = backend.model.prompt_encoder if name == "sam" else backend.model.sam_prompt_encoder
    monkeypatch.setattr(encoder, "forward", capture)
    with pytest.raises(Captured):
        backend.predict(embedding, prompts)
    # SAM keeps the aspect ratio (both axes scaled alike), SAM 2 squashes (each to 128).
    longest = max(size)
    fx, fy = (128 / longest, 128 / longest) if name == "sam" else (128 / width, 128 / height)
    factor = torch.tensor([fx, fy])
    coordinates, point_labels = caught["points"]
    corners = prompts.boxes.reshape(-1, 2, 2)
    if name == "sam":
        torch.testing.assert_close(caught["boxes"].reshape(-1, 2, 2), corners * factor)
        assert point_labels.tolist() == [[1, 0]]
    else:
        torch.testing.assert_close(coordinates[:, :2], corners * factor)
        assert point_labels.tolist() == [[2, 3, 1, 0]] and caught["boxes"] is None
        coordinates = coordinates[:, 2:]
    torch.testing.assert_close(coordinates, prompts.points * factor)
    low = caught["masks"]
    assert low.shape == (1, 1, 32, 32)
    # Its pixels are where that frame puts them ...
    centre = (3 * height / 8 * fy / 4, 11 * width / 16 * fx / 4)
    where = (low[0, 0] > 0).nonzero().float() + 0.5
    torch.testing.assert_close(where.mean(0), torch.tensor(centre), atol=0.6, rtol=0)
    if name == "sam" and height != width:
        border = round(min(size) * 32 / longest)
        padding = low[0, 0, border + 1 :] if height < width else low[0, 0, :, border + 1 :]
        assert (padding == -10).all()
    # ... and as an output of the model they fall back on the same pixels of the image.
    back = backend.upsample(embedding, low[:, 0])[0] > 0
    overlap = (back & (labels == 1)).sum() / (back | (labels == 1)).sum()
    assert back.shape == size and overlap > 0.85


@pytest.mark.parametrize("size", [(90, 160), (161, 75)])
@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_backends_agree_with_the_packages_predictors(backends, name, size):
    """Same masks and predicted IoU as SamPredictor and SAM2ImagePredictor, prompt by prompt."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    height, width = size
    points = torch.rand(3, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.tensor([[5.0, 6, 40, 50], [20, 10, 70, 70], [0, 0, 30, 30]])
    labels = torch.tensor([[1, 0], [1, 0], [1, 1]])
    backend = backends[name]
    embedding = backend.embed(image)
    low, quality = backend.predict(embedding, Prompts(points, labels, boxes))
    ours = backend.upsample(embedding, low)
    array = image.permute(1, 2, 0).numpy()
    if name == "sam":
        from segment_anything import SamPredictor

        predictor = SamPredictor(backend.model)
    else:
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        predictor = SAM2ImagePredictor(backend.model)
        predictor._bb_feat_sizes = [(32, 32), (16, 16), (8, 8)]  # of image size 128
    predictor.set_image(array)
    for k in range(3):
        masks, iou, _ = predictor.predict(
            points[k].numpy(), labels[k].numpy(), boxes[k].numpy(), return_logits=True
        )
        best = iou.argmax()
        assert quality[k] == pytest.approx(iou[best], abs=1e-3)
        # Resizing with 8-bit rounding, as Pillow does, may differ by a grey level.
        off = np.abs(ours[k].numpy() - masks[best]).mean()
        assert off < (2e-2 if name == "sam" else 1e-5) * np.abs(masks[best]).mean()
    assert (ours[0] - ours[1]).abs().mean() > 0.1 * ours[0].abs().mean()  # prompts do matter


@pytest.mark.parametrize("name", ["sam", "sam2"])
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_no_prompts_have_no_answers(backends, name, boxes, masks):
    backend, size = backends[name], (60, 80)
    embedding = backend.embed(torch.zeros(3, *size, dtype=torch.uint8))
    given = torch.zeros(0, 4) if boxes else None, torch.zeros(0, *size) if masks else None
    none = Prompts(torch.zeros(0, 2, 2), torch.zeros(0, 2, dtype=torch.int32), *given)
    one = Prompts(torch.ones(1, 2, 2), torch.ones(1, 2, dtype=torch.int32))
    logits, quality = backend.predict(embedding, none)
    expected = backend.predict(embedding, one)
    assert logits.shape == (0, *expected[0].shape[1:]) and logits.dtype == expected[0].dtype
    assert quality.shape == (0,) and quality.dtype == expected[1].dtype
    assert backend.upsample(embedding, logits).shape == (0, *size)


def test_published_weights_are_pinned():
    for known, count in ((promptable.SAM_WEIGHTS, 3), (promptable.SAM2_WEIGHTS, 8)):
        assert len(known) == count
        assert len({remote.url for remote in known.values()}) == count
        digests = [remote.sha256 for name, remote in known.items() if not name.startswith("2.0")]
        assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_local_weights(small_models, name, tmp_path, monkeypatch):
    for key, make in small_models.items():
        monkeypatch.setattr(promptable, f"_build_{key}", lambda size, make=make: make())
    state = {k: v + 0.5 for k, v in small_models[name]().state_dict().items()}
    bare, wrapped = tmp_path / "bare.pth", tmp_path / "wrapped.pt"
    torch.save(state, bare)
    torch.save({"model": state}, wrapped)
    load, other = (load_sam, load_sam2) if name == "sam" else (load_sam2, load_sam)
    for path in (bare, str(wrapped)):
        model = load(path)[1].model
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(WeightsError, match="another architecture"):
        other(bare)


def test_sizes_are_recognised_by_their_state():
    with torch.device("meta"):
        for size in promptable.SAM_WEIGHTS:
            assert promptable._sam_size(promptable._build_sam(size).state_dict()) == size
    assert promptable._sam_size({}) is None and promptable._sam2_size({}) is None
    for size in ("tiny", "small", "2.0-tiny"):
        assert promptable._sam2_size(promptable._build_sam2(size).state_dict()) == size


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


USER = """
    import pathlib, tempfile
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "mine.yaml").write_text("answer: 42")
"""


def test_hydra_of_the_user_works_after_ours():
    out = python(
        USER
        + """
    from pyseg.promptable import load_sam2
    load_sam2(None)
    print(GlobalHydra.instance().is_initialized())
    with initialize_config_dir(str(folder), version_base=None):
        print(compose("mine").answer)
        load_sam2(None)
        print(compose("mine").answer)
    print(GlobalHydra.instance().is_initialized())
    """
    )
    assert out == ["False", "42", "42", "False"]


def test_hydra_of_the_user_works_before_ours():
    out = python(
        USER
        + """
    initialize_config_dir(str(folder), version_base=None)
    before = GlobalHydra.instance().hydra
    from pyseg.promptable import load_sam2
    model = load_sam2(None)[1].model
    print(GlobalHydra.instance().hydra is before, compose("mine").answer)
    """
    )
    assert out == ["True", "42"]


def test_sam2_of_the_user_works_before_and_after_ours():
    out = python("""
    from sam2.build_sam import build_sam2
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    build_sam2(config, device="cpu")
    from pyseg.promptable import load_sam2
    ours = load_sam2(None)[1].model
    theirs = build_sam2(config, device="cpu")
    theirs.load_state_dict(ours.state_dict())
    print(len(theirs.state_dict()))
    """)
    assert out == ["471"]


def test_importing_the_family_imports_no_package():
    out = python("""
        import sys, pyseg.refiners.sam
        heavy = ("sam2", "segment_anything", "torchvision", "hydra", "scipy", "rich")
        print(*[name for name in heavy if name in sys.modules])
    """)
    assert out == []


@pytest.mark.parametrize(
    ("absent", "load", "remedy"),
    [
        ("segment_anything", load_sam, "pip install segment-anything"),
        ("sam2", load_sam2, "pip install --no-build-isolation sam2"),
        ("hydra", load_sam2, "pip install --no-build-isolation sam2"),
        ("omegaconf", load_sam2, "pip install --no-build-isolation sam2"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, absent, load, remedy):
    for module in [m for m in sys.modules if m.split(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, absent, None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"{absent}.*{remedy}"):
        load(None)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_another_size_of_input(small_models, name, monkeypatch, tmp_path):
    """The model of 192 pixels made of one of 128: masks of its size, saved and loaded again."""
    monkeypatch.setattr(promptable, f"_build_{name}", lambda size: small_models[name]())
    load = {"sam": load_sam, "sam2": load_sam2}[name]
    wide = load(None, image_size=192)[1]
    same = load(None, image_size=128)[1]
    plain = load(None)[1]
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    prompts = Prompts(torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1, dtype=torch.int32))
    low = wide.predict(wide.embed(image), prompts)[0]
    assert low.shape == (1, 48, 48) and torch.isfinite(low).all()
    for one, other in zip(
        same.predict(same.embed(image), prompts),
        plain.predict(plain.embed(image), prompts),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for wrong in (100, 16):
        with pytest.raises(ValueError, match=f"image_size must be a multiple of .*got {wrong}"):
            load(None, image_size=wrong)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_bfloat16_is_of_the_embedding(backends, small_models, name):
    narrow = type(backends[name])(small_models[name](), "bf16")
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    ours, theirs = narrow.embed(image), backends[name].embed(image)
    for one, other in zip(ours.features, theirs.features, strict=True):
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - other).abs().mean() < 0.05 * other.abs().mean()
    prompts = Prompts(torch.tensor([[[20.0, 30.0]]]), torch.ones(1, 1, dtype=torch.int32))
    one, other = narrow.predict(ours, prompts)[0], backends[name].predict(theirs, prompts)[0]
    assert one.dtype == torch.float32
    masks = one > 0, other > 0
    assert (masks[0] & masks[1]).sum() >= 0.99 * (masks[0] | masks[1]).sum() > 0
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp8'"):
        type(backends[name])(small_models[name](), "fp8")


def test_a_fingerprint_is_of_weights(backends, small_models):
    name = Fingerprint()
    one = name(backends["sam"])
    assert one == Fingerprint()(SamBackend(small_models["sam"]()))
    assert one != name(backends["sam2"])
    other = SamBackend(small_models["sam"]())
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert Fingerprint()(other) != one
    assert Fingerprint()(SamBackend(small_models["sam"](), "bf16")) != one
    first, second = Counting(), Counting()
    assert name(first) == name(first) != name(second)


class Scarce:
    """Has memory for ``most`` prompts at a time."""

    def __init__(self, most, error):
        self.most, self.error, self.chunks = most, error, []

    def predict(self, embedding, prompts):
        count = len(prompts.points)
        if count > self.most:
            raise self.error
        self.chunks.append(count)
        return prompts.points[:, :, 0][:, :, None], torch.ones(count)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: x")],
)
def test_out_of_memory_halves_the_chunks_and_says_so(error):
    points = torch.arange(23.0)[:, None, None].expand(-1, 1, 2)
    chunks = [
        Prompts(part, torch.ones(len(part), 1, dtype=torch.int32), part.reshape(-1, 2).repeat(1, 2))
        for part in points.split(9)
    ]
    segmenter = Scarce(3, error)
    with pytest.warns(UserWarning, match="memory does not suffice for 9 prompts at a time: 4"):
        found = list(propose(segmenter, None, chunks, predicted_iou=0.5))
    assert torch.cat([part.index for part in found]).tolist() == list(range(23))
    assert torch.cat([part.logits.flatten() for part in found]).tolist() == list(range(23))
    assert max(segmenter.chunks) <= 3
    with pytest.raises(RuntimeError), pytest.warns(UserWarning):
        list(propose(Scarce(0, error), None, chunks, predicted_iou=0.5))
    with pytest.raises(RuntimeError, match="size of tensor"):  # no such matter
        list(propose(Scarce(3, RuntimeError("size of tensor")), None, chunks, predicted_iou=0.5))


class Counting:
    """Answers prompt number k, by its point, with predicted IoU k / 10 and a mask of logit k."""

    def __init__(self):
        self.chunks = []

    def embed(self, image):
        return "embedding"

    def predict(self, embedding, prompts):
        assert embedding == "embedding"
        number = prompts.points[:, 0, 0]
        self.chunks.append(len(number))
        return number[:, None, None].expand(-1, 2, 3), number / 10

    def upsample(self, embedding, logits):
        raise AssertionError("proposals stay at the size of the segmenter")


def test_proposals_are_predicted_in_chunks_and_numbered_over_all():
    points = torch.arange(10.0)[:, None, None].expand(-1, 1, 2)
    made = []

    def chunks():
        for part in points.split(4):
            made.append(len(part))
            yield Prompts(part, torch.ones(len(part), 1, dtype=torch.int32))

    segmenter = Counting()
    answers = propose(segmenter, segmenter.embed(None), chunks(), predicted_iou=0.45)
    first = next(answers)
    assert made == [4, 4] and segmenter.chunks == [4, 4]  # of the first chunk nothing passes
    assert first.index.tolist() == [5, 6, 7]
    second = next(answers)
    assert second.index.tolist() == [8, 9] and next(answers, None) is None
    assert second.logits.shape == (2, 2, 3) and second.logits[:, 0, 0].tolist() == [8, 9]
    torch.testing.assert_close(second.predicted_iou, torch.tensor([0.8, 0.9]))
    assert second.stability.tolist() == [1, 1]


def test_stability_is_the_iou_of_two_cuts():
    logits = torch.tensor([[[-2.0, -0.5, 0.5, 3.0]], [[-9.0, -9.0, -9.0, -9.0]]])
    assert stability(logits).tolist() == [pytest.approx(1 / 3), 0]
