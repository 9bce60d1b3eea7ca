"""`nano`, the promptable segmenter that ships with its weights."""

import hashlib
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import pyseg
from pyseg.errors import WeightsError
from pyseg.files import read_json
from pyseg.image import read_image
from pyseg.promptable import Prompts, propose
from pyseg.promptable.nano import (
    BUNDLED,
    MASKS,
    SIDE,
    NanoBackend,
    NanoNetwork,
    _Attention,
    frame_of,
    load_nano,
)
from pyseg.weights import save_state


@pytest.fixture(scope="module")
def nano():
    return load_nano(None if not BUNDLED.is_file() else "bundled")


def picture(height, width, seed=None):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def some(count, height, width, *, boxes=True, masks=False):
    far = torch.tensor([width, height]) - 1
    points = (torch.rand(count, 2, 2) * far).round()
    labels = torch.tensor([[1, 0]]).repeat(count, 1)
    corners = torch.rand(count, 2, 2).sort(1).values * far
    return Prompts(
        points,
        labels,
        corners.flatten(1) if boxes else None,
        10 * torch.randn(count, height, width) if masks else None,
    )


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2048), (2048, 1), (3, 5), (97, 131), (360, 480), (512, 512), (640, 427)]
)
def test_protocol_at_any_size(nano, size):
    embedding = nano.embed(picture(*size))
    logits, iou = nano.predict(embedding, some(2, *size, masks=size[0] < 100 and size[1] < 200))
    frame = frame_of(size)
    assert logits.shape == (2, frame[0] // 4, frame[1] // 4) and logits.dtype == torch.float32
    assert iou.shape == (2,) and bool(((iou >= 0) & (iou <= 1)).all())
    full = nano.upsample(embedding, logits)
    assert full.shape == (2, *size) and bool(full.isfinite().all())
    assert max(frame) == SIDE and all(side % 32 == 0 for side in frame)


def test_frames_keep_the_aspect_ratio():
    assert frame_of((360, 480)) == (384, 512) and frame_of((480, 360)) == (512, 384)
    for _ in range(100):
        height, width = (int(2 ** (5 + 6 * x)) for x in torch.rand(2).tolist())
        new_height, new_width = frame_of((height, width))
        short = SIDE * min(height, width) / max(height, width)
        assert max(new_height, new_width) == SIDE
        assert abs(min(new_height, new_width) - max(short, 32)) <= 16


def test_no_prompts_is_no_masks(nano):
    embedding = nano.embed(picture(60, 80))
    logits, iou = nano.predict(embedding, some(0, 60, 80))
    assert logits.shape == (0, 96, 128) and iou.shape == (0,)
    assert nano.upsample(embedding, logits).shape == (0, 60, 80)


@pytest.mark.parametrize("masks", [False, True])
def test_prompts_of_a_batch_do_not_know_each_other(nano, masks):
    size = (75, 110)
    embedding = nano.embed(picture(*size))
    prompts = some(5, *size, masks=masks)
    logits, iou = nano.predict(embedding, prompts)
    for k in range(5):
        alone = Prompts(
            prompts.points[k : k + 1],
            prompts.point_labels[k : k + 1],
            prompts.boxes[k : k + 1],
            prompts.masks[k : k + 1] if masks else None,
        )
        single, quality = nano.predict(embedding, alone)
        torch.testing.assert_close(single[0], logits[k], atol=2e-3, rtol=1e-4)
        torch.testing.assert_close(quality[0], iou[k], atol=1e-4, rtol=1e-4)


def test_points_that_are_none_change_nothing(nano):
    size = (64, 96)
    embedding = nano.embed(picture(*size))
    prompts = some(3, *size)
    logits, iou = nano.predict_all(embedding, prompts)
    more = Prompts(
        torch.cat([prompts.points, 1e4 * torch.randn(3, 4, 2)], 1),
        torch.cat([prompts.point_labels, torch.full((3, 4), -1)], 1),
        prompts.boxes,
    )
    again, quality = nano.predict_all(embedding, more)
    torch.testing.assert_close(again, logits, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(quality, iou, atol=1e-4, rtol=1e-4)


def test_a_mask_alone_is_a_prompt(nano):
    size = (64, 96)
    embedding = nano.embed(picture(*size))
    given = torch.full((2, *size), -10.0)
    given[0, :, :48] = given[1, :, 48:] = 10
    none = Prompts(torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.long), None, given)
    logits, _ = nano.predict(embedding, none)
    assert not torch.equal(logits[0], logits[1])


def test_every_part_of_a_prompt_counts(nano):
    size = (80, 120)
    embedding = nano.embed(picture(*size))
    prompts = some(1, *size)
    first, _ = nano.predict_all(embedding, prompts)
    others = (
        Prompts(prompts.points + 20, prompts.point_labels, prompts.boxes),
        Prompts(prompts.points, 1 - prompts.point_labels, prompts.boxes),
        Prompts(prompts.points, prompts.point_labels, prompts.boxes + 15),
        Prompts(prompts.points, prompts.point_labels),
        Prompts(prompts.points, prompts.point_labels, prompts.boxes, torch.full((1, *size), 10.0)),
    )
    for other in others:
        assert (nano.predict_all(embedding, other)[0] - first).abs().max() > 1e-3


def test_the_best_of_three_masks_is_taken(nano):
    embedding = nano.embed(picture(60, 90))
    prompts = some(4, 60, 90)
    logits, iou = nano.predict(embedding, prompts)
    every, quality = nano.predict_all(embedding, prompts)
    assert every.shape[1] == quality.shape[1] == MASKS
    for k in range(4):
        best = int(quality[k].argmax())
        assert torch.equal(logits[k], every[k, best]) and iou[k] == quality[k, best]


def test_results_are_the_same_again_and_after_copies(nano):
    image, prompts = picture(50, 70), some(3, 50, 70, masks=True)
    first = nano.predict(nano.embed(image), prompts)
    copy = pickle.loads(pickle.dumps(nano))
    for other in (nano, copy):
        again = other.predict(other.embed(image), prompts)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert list(propose(copy, copy.embed(image), [prompts], predicted_iou=1.1)) == []


def test_weights_go_through_a_file(tmp_path):
    nano = load_nano(None)
    path = save_state(tmp_path / "nano.safetensors", nano.network.state_dict())
    again = load_nano(path)
    image, prompts = picture(40, 40), some(2, 40, 40)
    expected = nano.predict(nano.embed(image), prompts)
    found = again.predict(again.embed(image), prompts)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    other = save_state(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(WeightsError, match="another architecture than NanoNetwork"):
        load_nano(other)
    with pytest.raises(WeightsError, match="neither a file nor a known name"):
        load_nano("bundle")


def test_it_learns_nothing_and_predicts_in_evaluation_mode():
    nano = load_nano(None)
    assert not nano.training and not any(p.requires_grad for p in nano.parameters())
    logits, _ = nano.predict(nano.embed(picture(40, 60)), some(1, 40, 60))
    assert not logits.requires_grad


def test_attention_is_that_of_torch():
    torch.manual_seed(torch.seed() % 2**31)
    attention = _Attention(32, 16)
    query, key, value = torch.randn(6, 5, 32), torch.randn(6, 7, 32), torch.randn(6, 7, 32)
    mask = torch.rand(6, 7) < 0.7
    mask[:, 0] = True
    found = attention(query, key, value, mask)
    for k in range(6):
        heads = [
            layer(x).reshape(1, -1, 4, 4).transpose(1, 2)
            for layer, x in (
                (attention.query, query[k]),
                (attention.key, key[k]),
                (attention.value, value[k]),
            )
        ]
        one = F.scaled_dot_product_attention(*heads, attn_mask=mask[k : k + 1])
        expected = attention.out(one.transpose(1, 2).reshape(-1, 16))
        torch.testing.assert_close(found[k], expected, atol=1e-5, rtol=1e-4)


def test_images_of_a_batch_are_those_alone():
    """Prompts of N images at once, as in training, are those of each: nothing is mixed up."""
    torch.manual_seed(torch.seed() % 2**31)
    network = NanoNetwork().eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    origin = torch.rand(3, 2) * 100
    points = torch.rand(6, 2, 2) * 64
    labels = torch.randint(0, 5, (6, 2))
    masks = torch.randn(6, 16, 24)
    with torch.no_grad():
        for given in (None, masks):
            logits, iou = network.decode(network.embed(pixels, origin), points, labels, given)
            assert logits.shape == (6, 3, 16, 24)
            for k in range(3):
                own = slice(2 * k, 2 * k + 2)
                alone, quality = network.decode(
                    network.embed(pixels[k : k + 1], origin[k : k + 1]),
                    points[own],
                    labels[own],
                    None if given is None else given[own],
                )
                torch.testing.assert_close(alone, logits[own], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(quality, iou[own], atol=1e-4, rtol=1e-4)


def test_places_are_relative_to_the_image():
    """A crop at its origin gets the features of places that it has in the whole."""
    network = NanoNetwork()
    whole = network.embed(torch.zeros(1, 3, 128, 128)).position.unflatten(1, (8, 8))
    crop = network.embed(torch.zeros(1, 3, 64, 64), torch.tensor([[32.0, 48.0]])).position
    torch.testing.assert_close(crop.unflatten(1, (4, 4)), whole[:, 3:7, 2:6])


def test_prompts_reach_the_network_in_its_own_frame(monkeypatch):
    nano = load_nano(None)
    embedding = nano.embed(picture(180, 240))
    seen = {}

    def caught(features, points, labels, masks):
        seen.update(points=points, labels=labels, masks=masks)
        return torch.zeros(1, 3, 96, 128), torch.zeros(1, 3)

    monkeypatch.setattr(nano.network, "decode", caught)
    given = torch.full((1, 180, 240), -10.0)
    given[:, 45:90, 60:180] = 10
    nano.predict(
        embedding,
        Prompts(
            torch.tensor([[[0.0, 0.0], [239.0, 179.0]]]),
            torch.tensor([[1, -1]]),
            torch.tensor([[60.0, 45.0, 179.0, 89.0]]),
            given,
        ),
    )
    factor = 512 / 240
    expected = torch.tensor([[0.5, 0.5], [239.5, 179.5], [60.5, 45.5], [179.5, 89.5]])
    torch.testing.assert_close(seen["points"][0], expected * factor)
    assert seen["labels"].tolist() == [[1, 4, 2, 3]]
    inside = (seen["masks"][0] > 0).nonzero()
    assert inside.amin(0).tolist() == [24, 32] and inside.amax(0).tolist() == [47, 95]


def test_an_answer_falls_on_its_place_in_the_image(nano):
    embedding = nano.embed(picture(90, 120))
    logits = torch.full((1, 96, 128), -5.0)
    logits[:, 24:48, 32:96] = 5
    full = nano.upsample(embedding, logits)[0] > 0
    inside = full.nonzero()
    assert abs(int(inside[:, 0].min()) - 22.5) <= 1 and abs(int(inside[:, 0].max()) - 44) <= 1
    assert abs(int(inside[:, 1].min()) - 30) <= 1 and abs(int(inside[:, 1].max()) - 89) <= 1


bundled = pytest.mark.skipif(not BUNDLED.is_file(), reason="no bundled weights")


@bundled
def test_bundled_weights_are_those_of_the_card():
    content = BUNDLED.read_bytes()
    assert len(content) <= 8_000_000
    card = BUNDLED.with_suffix(".md").read_text()
    assert hashlib.sha256(content).hexdigest() in card
    count = sum(p.numel() for p in NanoNetwork().parameters())
    assert f"{count:,} parameters" in card


@bundled
def test_the_cards_numbers_are_those_of_the_benchmark():
    card = BUNDLED.with_suffix(".md").read_text()
    found = read_json(BUNDLED.with_suffix(".json"))
    assert len(found["rows"]) >= 9 and found["sha256"] in card
    for row in found["rows"]:
        cells = " | ".join(
            "-" if row.get(key) is None else f"{row[key]:.3f}"
            for key in ("box", "1 click", "3 clicks", "5 clicks")
        )
        line = f"| {row['data']} | {row['method']} | {cells} |"
        assert line in card, line
    assert len(re.findall(r"^\| .* \| nano \|", card, re.MULTILINE)) == len(
        [row for row in found["rows"] if row["method"] == "nano"]
    )


@bundled
def test_bundled_weights_find_a_plain_object_by_its_box():
    """No proof of quality; by one click they do not (see the card)."""
    rows, columns = torch.meshgrid(torch.arange(240), torch.arange(320), indexing="ij")
    disc = (rows - 110) ** 2 + (columns - 170) ** 2 < 50**2
    image = torch.where(disc, 200, 60).expand(3, -1, -1).to(torch.uint8)
    image = (image + torch.randint(0, 20, image.shape)).to(torch.uint8)
    nano = load_nano()
    embedding = nano.embed(image)
    none = torch.zeros(1, 0, dtype=torch.long)
    box = torch.tensor([[120.0, 60.0, 220.0, 160.0]])
    logits, quality = nano.predict(embedding, Prompts(torch.zeros(1, 0, 2), none, box))
    mask = nano.upsample(embedding, logits)[0] > 0
    iou = float((mask & disc).sum() / (mask | disc).sum())
    assert iou > math.pi / 4  # that of the box itself
    assert 0.3 < float(quality[0]) < 1


def test_the_network_is_small():
    network = NanoNetwork()
    assert isinstance(NanoBackend(network).network, NanoNetwork)
    size = 2 * sum(value.numel() for value in network.state_dict().values())
    assert size < 8_000_000 and math.isclose(SIDE, 512)


def test_it_refines_by_its_name():
    """`sam(size="nano")` behind a network, from weights that are all in the package."""
    image = read_image(Path(pyseg.__file__).parent / "assets/street.jpg")
    pipeline = pyseg.build('streetnet+sam(size="nano")')
    refined = pipeline(image)
    assert pipeline.refiners[0].size == "nano" and pipeline.refiners[0].predicted_iou == 0.9
    own = pyseg.build('streetnet+sam(size="nano", predicted_iou=0.7)')
    assert own.refiners[0].predicted_iou == 0.7
    assert refined.labels.shape == image.shape[1:]
    assert refined.labels.max() < len(pipeline.classes)
    with pytest.raises(ValueError, match="nano has neither image_size nor precision"):
        pyseg.build('streetnet+sam(size="nano", precision="bf16")')
