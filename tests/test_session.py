"""Interactive sessions: whatever was done is undone and done again bit for bit; maps stay whole."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

import pyseg
from pyseg import Instances, Segment, Segmentation, Segments, Session
from pyseg.errors import LabelError, PysegError
from pyseg.formats import decode_rle, read_segment_ids, write_instances, write_segments
from pyseg.promptable import Prompts
from pyseg.session import KINDS

CLASSES = ("road", "car", "tree", "sky")
VOID = 255


class Discs:
    """Answers with discs around positive points and less of negative ones, at half the size.

    Boxes and mask prompts count too, so that an answer tells all that was asked.
    """

    device = torch.device("cpu")

    def __init__(self):
        self.embedded, self.asked = 0, []

    def embed(self, image):
        self.embedded += 1
        return (image.shape[1], image.shape[2])

    def predict(self, size, prompts):
        self.asked.append(prompts)
        y, x = torch.meshgrid(*(torch.arange(0.0, side, 2) for side in size), indexing="ij")
        logits = torch.full((len(prompts.points), *x.shape), -3.0)
        for k, plane in enumerate(logits):
            for point, sign in zip(prompts.points[k], prompts.point_labels[k], strict=True):
                if sign >= 0:
                    near = 8 * torch.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 40)
                    plane += near if sign else -2 * near
            if prompts.boxes is not None:
                x0, y0, x1, y1 = prompts.boxes[k]
                plane += 4.0 * ((x >= x0) & (x < x1) & (y >= y0) & (y < y1))
            if prompts.masks is not None:
                plane += 0.5 * prompts.masks[k, ::2, ::2]
        return logits, torch.full((len(logits),), 0.75)

    def upsample(self, size, logits):
        return torch.nn.functional.interpolate(logits[None], size, mode="bilinear")[0]


def image(height=37, width=53):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def start_of(kind, size, rng):
    """To edit: a map with void, segments with gaps in their ids, overlapping instances."""
    plain = Segmentation(size, CLASSES)
    labels = rng.choice([0, 1, 2, 3, VOID], (-(-size[0] // 6), -(-size[1] // 6)))
    labels = labels.repeat(6, 0).repeat(6, 1)[: size[0], : size[1]].astype(np.uint8)
    if kind == "labels":
        return plain.with_labels(labels)
    if kind == "segments":
        ids, count = ndimage.label(labels == 1)
        ids = ids.astype(np.int32) * 3
        ids[labels == 0] = 2
        items = {3 * k: 1 for k in range(1, count + 1)} | {2: 0}
        return plain.with_segments(Segments.from_map(ids, items))
    masks = torch.from_numpy(np.stack([ndimage.binary_dilation(labels == k) for k in range(3)]))
    boxes = torch.tensor([[0.25, 0.5, size[1] - 0.5, size[0] - 0.25]] * 3)
    scores, found = torch.tensor([0.9, 0.8, 0.4]), torch.tensor([1, 2, 1])
    return replace(plain, instances=Instances(boxes, masks, scores, found))


def state(session):
    """All that a session shows, as bytes."""
    result, pending = session.result, session.pending
    shown = [] if pending is None else [pending.mask.numpy().tobytes(), pending.score]
    if session.edit == "labels":
        return [result.labels.numpy().tobytes(), *shown]
    if session.edit == "segments":
        return [result.segments.map.numpy().tobytes(), result.segments.items, *shown]
    found = result.instances
    fields = (found.boxes, found.masks, found.scores, found.labels)
    return [*(field.numpy().tobytes() for field in fields), *shown]


def act(session, rng):
    """One operation drawn at random; some are refused, and then must change nothing."""
    height, width = session.size
    x, y = rng.uniform(0, width - 0.01), rng.uniform(0, height - 0.01)
    label = rng.choice([*CLASSES, "void", 1, None])
    kind = rng.choice(["click", "click", "box", "brush", "accept", "accept", "select", "clear"])
    if kind == "click":
        session.click(x, y, rng.random() < 0.7, label)
    elif kind == "box":
        session.box(x - 9, y - 7, x + rng.uniform(1, 20), y + rng.uniform(1, 20), label)
    elif kind == "brush":
        mask = np.zeros(session.size, bool)
        mask[int(y) : int(y) + rng.randrange(9), int(x) : int(x) + rng.randrange(9)] = True
        session.brush(mask ^ (np.random.rand(*session.size) < 0.002), label)
    elif kind == "accept":
        session.accept(label)
    elif kind == "select":
        session.select(x, y)
    else:
        session.clear()


def check_whole(session):
    """Every pixel has one class or is void, and tables agree with maps."""
    result = session.result
    labels = result.labels
    planes = torch.stack([labels == value for value in (*range(len(CLASSES)), VOID)])
    assert (planes.sum(0) == 1).all()
    if session.edit == "segments":
        ids, counts = result.segments.map.unique(return_counts=True)
        areas = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        areas.pop(0, None)
        assert {item.id: item.area for item in result.segments.items} == areas
    if session.edit == "instances":
        found = result.instances
        assert found.masks.flatten(1).any(1).all()
        assert len(found.masks) == len(found.labels) == len(found.scores) == len(found.boxes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_all_is_undone_and_done_again_bit_for_bit(kind, seed):
    rng, drawn = random.Random(seed), np.random.default_rng(seed)
    np.random.seed(seed)
    pixels = image()
    start = start_of(kind, (37, 53), drawn)
    things = ("car",) if kind == "segments" and seed % 2 else None
    session = Session(pixels, start=start, promptable=Discs(), things=things)
    assert session.edit == kind
    states = [state(session)]
    for _ in range(40):
        steps = len(session._done)
        try:
            act(session, rng)
        except PysegError:
            assert len(session._done) == steps and state(session) == states[-1]
        if len(session._done) > steps:
            states.append(state(session))
            check_whole(session)
    assert len(states) > 15
    for expected in states[-2::-1]:
        assert session.undo() and state(session) == expected
    assert not session.undo()
    before = start.segments or start.instances
    now = session.result.segments or session.result.instances
    if kind == "labels":
        assert torch.equal(session.result.labels, start.labels)
    elif kind == "segments":
        assert torch.equal(now.map, before.map) and now.items == before.items
    else:
        assert all(torch.equal(vars(now)[n], vars(before)[n]) for n in ("boxes", "masks", "scores"))
    for expected in states[1:]:
        assert session.redo() and state(session) == expected
    assert not session.redo()


@pytest.mark.parametrize("seed", range(3))
def test_undoing_and_doing_anew_in_any_order(seed):
    """Against a list of whole maps, which is what a history stands for."""
    rng = random.Random(seed)
    session = Session(image(), CLASSES)
    maps, place = [session.result.labels], 0
    for _ in range(60):
        choice = rng.random()
        if choice < 0.3:
            assert session.undo() == (place > 0)
            place = max(0, place - 1)
        elif choice < 0.5:
            assert session.redo() == (place < len(maps) - 1)
            place = min(len(maps) - 1, place + 1)
        else:
            mask, label = torch.rand(session.size) < rng.random() / 2, rng.randrange(4)
            session.brush(mask, label)
            painted = torch.where(mask, label, maps[place]).to(torch.uint8)
            if not torch.equal(painted, maps[place]):
                maps[place + 1 :] = [painted]
                place += 1
        assert torch.equal(session.result.labels, maps[place])


def test_a_fresh_map_is_void_until_a_mask_is_accepted():
    segmenter = Discs()
    session = Session(image(), CLASSES, promptable=segmenter)
    assert (session.result.labels == VOID).all() and session.pending is None
    answer = session.click(20, 18, label="Car")  # whatever its case
    assert answer.score == 0.75 and answer.mask[18, 20] and 20 < answer.mask.sum() < 400
    assert (session.result.labels == VOID).all()
    assert torch.equal(session.pending.mask, answer.mask)
    session.accept()
    assert torch.equal(session.result.labels == 1, answer.mask)
    assert torch.equal(session.result.labels == VOID, ~answer.mask)
    assert session.pending is None
    session.click(45, 30)  # the class stays in force
    session.accept()
    assert session.result.labels[30, 45] == 1
    assert segmenter.embedded == 1


def test_prompts_gather_and_the_answer_so_far_is_asked_again():
    segmenter = Discs()
    session = Session(image(), CLASSES, promptable=segmenter)
    first = session.click(20, 18, label="car")
    session.click(26, 18, positive=False)
    asked = segmenter.asked[-1]
    assert asked.points.tolist() == [[[20, 18], [26, 18]]]
    assert asked.point_labels.tolist() == [[1, 0]]
    assert torch.equal(asked.masks[0] > 0, first.mask) and asked.boxes is None
    session.box(10, 10, 30, 31.5)
    asked = segmenter.asked[-1]
    assert asked.boxes.tolist() == [[10, 10, 30, 31.5]] and asked.masks is None
    assert len(asked.points[0]) == 2
    session.clear()
    session.box(-5, 12, 99, 20)
    assert segmenter.asked[-1].boxes.tolist() == [[0, 12, 53, 20]]
    assert segmenter.asked[-1].point_labels.tolist() == [[-1]]


def test_a_preview_is_what_a_click_would_answer_and_changes_nothing():
    session = Session(image(), CLASSES, promptable=Discs())
    session.click(20, 18, label="car")
    before = state(session)
    shown = session.preview(24, 20, positive=False)
    assert state(session) == before and len(session._done) == 1
    assert torch.equal(session.click(24, 20, positive=False).mask, shown.mask)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_answers_are_those_of_the_segmenter(backends, name):
    backend, pixels = backends[name], image(61, 90)
    session = Session(pixels, CLASSES, promptable=backend)
    answer = session.click(33, 21, label="tree")
    embedding = backend.embed(pixels)
    points, signs = torch.tensor([[[33.0, 21.0]]]), torch.ones(1, 1, dtype=torch.int32)
    logits, score = backend.predict(embedding, Prompts(points, signs))
    assert torch.equal(answer.mask, backend.upsample(embedding, logits)[0] > 0)
    assert answer.score == pytest.approx(float(score[0]))
    masks = backend.upsample(embedding, logits)
    points, signs = torch.tensor([[[33.0, 21], [5, 4]]]), torch.tensor([[1, 0]])
    logits, _ = backend.predict(embedding, Prompts(points, signs, None, masks))
    again = session.click(5, 4, positive=False)
    assert torch.equal(again.mask, backend.upsample(embedding, logits)[0] > 0)
    box = torch.tensor([[3.0, 4, 50, 40]])
    logits, _ = backend.predict(embedding, Prompts(torch.zeros(1, 1, 2), -signs[:, :1], box))
    session.clear()
    assert torch.equal(session.box(3, 4, 50, 40).mask, backend.upsample(embedding, logits)[0] > 0)


def test_a_selected_part_is_corrected_and_what_it_gives_up_goes_to_its_neighbours():
    labels = np.zeros((40, 60), np.uint8)
    labels[10:30, 10:30] = 1  # the car, with tree on its right; another car far off
    labels[:, 30:] = 2
    labels[2:5, 50:55] = 1
    segmenter = Discs()
    session = Session(image(40, 60), CLASSES, start=labels, promptable=segmenter)
    answer = session.select(12, 12)
    car = torch.zeros(40, 60, dtype=torch.bool)
    car[10:30, 10:30] = True
    assert torch.equal(answer.mask, car) and answer.score == 1
    corrected = session.click(28, 20, positive=False).mask
    assert torch.equal(segmenter.asked[0].masks[0] > 0, car)
    assert (car & ~corrected).any() and not corrected[20, 28]
    session.accept()
    result = session.result.labels.numpy()
    # By brute force: the nearest pixel that is neither of the car nor of the mask.
    sources = np.argwhere(~(car | corrected).numpy())
    for y, x in np.argwhere((car & ~corrected).numpy()):
        distance = ((sources - (y, x)) ** 2).sum(1)
        nearest = sources[distance == distance.min()]
        assert result[y, x] in {labels[tuple(source)] for source in nearest}
    assert (result[corrected.numpy()] == 1).all() and (result[2:5, 50:55] == 1).all()
    rest = ~(car | corrected).numpy()
    assert (result[rest] == labels[rest]).all()


def test_accepting_a_selection_gives_it_another_class():
    for kind in KINDS:
        start = start_of(kind, (37, 53), np.random.default_rng(1))
        session = Session(image(), start=start)
        y, x = np.argwhere(session.result.labels.numpy() == 1)[0]
        mask = session.select(float(x), float(y)).mask
        session.accept("sky")
        assert (session.result.labels[mask] == 3).all()
        assert (session.result.labels[~mask] == start.labels[~mask]).all() or kind == "instances"
    assert session.result.instances.labels.tolist().count(3) == 1


def test_a_selection_that_fills_the_image_leaves_void():
    session = Session(image(), CLASSES, start=np.ones((37, 53), bool), promptable=Discs())
    session.select(3, 3)
    mask = session.click(20, 20, positive=False).mask
    assert not mask.all()
    session.accept("tree")
    assert torch.equal(session.result.labels == 2, mask)
    assert torch.equal(session.result.labels == VOID, ~mask)


def test_segments_of_uncounted_classes_become_one():
    start = start_of("segments", (37, 53), np.random.default_rng(0))
    count = len(start.segments.items)
    mask = torch.zeros(37, 53, dtype=torch.bool)
    mask[3:9, 4:20] = True
    apart = Session(image(), start=start)
    joined = Session(image(), start=start, things=("car",))
    for session in (apart, joined):
        session.brush(mask, "road")
    assert len({item.id for item in apart.result.segments.items if item.label == 0}) == 2
    assert len({item.id for item in joined.result.segments.items if item.label == 0}) == 1
    joined.brush(mask.flip(1), "tree")
    joined.brush(mask.flip(0), "tree")
    assert sum(item.label == 2 for item in joined.result.segments.items) == 1
    apart.brush(torch.ones_like(mask), "car")
    assert [(s.label, s.area) for s in apart.result.segments.items] == [(1, 37 * 53)]
    while apart.undo():
        pass
    assert len(apart.result.segments.items) == count


def test_instances_gain_and_lose_pixels_and_vanish():
    start = start_of("instances", (37, 53), np.random.default_rng(0))
    session = Session(image(), start=start)
    mask = torch.zeros(37, 53, dtype=torch.bool)
    mask[0:5, 0:7] = True
    session.brush(mask, "sky")
    found = session.result.instances
    assert len(found.labels) == 4 and found.scores[3] == 1 and torch.equal(found.masks[3], mask)
    assert found.boxes[3].tolist() == [0, 0, 7, 5]
    assert session.select(2, 2).mask.equal(mask)
    more = mask.roll(3, 1)
    session.brush(more)
    assert torch.equal(session.result.instances.masks[3], mask | more)
    session.brush(more, "void")  # of the selected one alone
    assert torch.equal(session.result.instances.masks[3], mask & ~more)
    assert torch.equal(session.result.instances.masks[:3], start.instances.masks)
    session.brush(torch.ones_like(mask), "void")
    assert len(session.result.instances.labels) == 3
    session.brush(torch.ones_like(mask), "void")  # nothing is selected any more: of all
    assert len(session.result.instances.labels) == 0
    assert (session.result.labels == VOID).all()
    for _ in range(2):
        session.undo()
    assert torch.equal(session.result.instances.masks[3], mask & ~more)


def test_history_keeps_windows_and_no_more_than_it_may():
    torch.manual_seed(0)
    session = Session(torch.zeros(3, 600, 800, dtype=torch.uint8), CLASSES)
    dot = torch.zeros(600, 800, dtype=torch.bool)
    dot[300:310, 400:410] = torch.rand(10, 10) < 0.5
    session.brush(dot, "car")
    assert session._done[0].nbytes < 200  # of a map of 480,000
    session = Session(image(60, 80), CLASSES, history=20_000)
    for k in range(60):
        session.brush(torch.rand(60, 80) < 0.5, k % 4)
        held = sum(step.nbytes for step in session._done)
        assert held <= 20_000
    end = session.result.labels
    steps = 0
    while session.undo():
        steps += 1
    assert 5 < steps < 60
    while session.redo():
        pass
    assert torch.equal(session.result.labels, end)
    session = Session(image(60, 80), CLASSES, history=0)
    session.brush(torch.rand(60, 80) < 0.5, 1)
    assert session.undo() and not session.undo()  # the last is always kept
    # Answers count too.
    session = Session(image(60, 80), CLASSES, history=20_000, promptable=Discs())
    for k in range(30):
        session.click(k, k, label=1)
    assert sum(step.after.logits.nbytes for step in session._done) <= 20_000


def test_results_are_saved_and_read_again(tmp_path):
    session = Session(image(), CLASSES, promptable=Discs(), palette=[(9, 9, 9)] * 4)
    session.click(20, 18, label="car")
    session.accept()
    path = session.result.save(tmp_path / "a.png")
    again = Session(image(), CLASSES, start=path)
    assert torch.equal(again.result.labels, session.result.labels)
    session = Session(image(), start=start_of("segments", (37, 53), np.random.default_rng(0)))
    session.brush(session.result.labels == 0, "tree")
    write_segments(tmp_path / "s.png", session.result.segments)
    ids = read_segment_ids(tmp_path / "s.png")
    assert torch.equal(ids.int(), session.result.segments.map)
    session = Session(image(), CLASSES, edit="instances", promptable=Discs())
    mask = session.click(20, 18, label="car").mask
    session.accept()
    write_instances(tmp_path / "i.json", session.result.instances)
    (entry,) = pyseg.files.read_json(tmp_path / "i.json")
    assert entry["category_id"] == 1 and torch.equal(decode_rle(entry["segmentation"]).bool(), mask)
    assert session.result.overlay().size[0] == 53  # with a legend below


def test_more_classes_than_a_byte_holds(tmp_path):
    names = tuple(f"class {k}" for k in range(300))
    session = Session(image(), names)
    mask = torch.rand(37, 53) < 0.5
    session.brush(mask, 299)
    assert session.result.labels.dtype == torch.int16
    assert torch.equal(session.result.labels == 299, mask)
    assert torch.equal(session.result.labels == -1, ~mask)
    path = session.result.save(tmp_path / "a.png")
    again = Session(image(), names, start=path).result.labels
    assert torch.equal(again, session.result.labels)


def test_a_pipeline_begins_with_its_prediction_and_its_segmenter():
    class Model:
        classes, palette = CLASSES, ((1, 2, 3),) * 4

        def predict(self, images):
            logits = torch.zeros(4, 4, 4)
            logits[2] = 1
            return [Segmentation(tuple(i.shape[1:]), CLASSES, logits=logits) for i in images]

    class Refiner:
        generator = Discs()

        def refine(self, image, prediction):
            return prediction

    pipeline = pyseg.build(Model(), Refiner())
    session = pipeline.session(image())
    assert (session.result.labels == 2).all() and session.result.palette == Model.palette
    session.click(20, 18, label="car")
    session.accept()
    assert session.result.labels[18, 20] == 1
    other = Discs()
    session = pipeline.session(image(), np.zeros((37, 53), np.uint8), promptable=other)
    assert session.promptable is other and (session.result.labels == 0).all()
    without = pyseg.build(Model()).session(image())
    with pytest.raises(PysegError, match=r"no promptable segmenter.*streetnet\+sam2.*promptable="):
        without.click(3, 3, label="car")
    without.brush(torch.ones(37, 53, dtype=torch.bool), "car")
    assert (without.result.labels == 1).all()


def test_what_is_refused():
    session = Session(image(), CLASSES, promptable=Discs())
    for x, y in ((-1, 3), (53, 3), (3, 37), (float("nan"), 3), (3, float("inf"))):
        with pytest.raises(PysegError, match=r"outside the image of 53 x 37"):
            session.click(x, y)
        with pytest.raises(PysegError, match="outside the image"):
            session.preview(x, y)
    with pytest.raises(PysegError, match="outside the image"):
        session.box(60, 3, 70, 9)
    for box in ((9, 3, 5, 8), (3, 3, 3, 8), (float("nan"), 1, 2, 3)):
        with pytest.raises(PysegError, match="x0 < x1"):
            session.box(*box)
    with pytest.raises(LabelError, match=r"'cat' is no class; did you mean 'car'\?"):
        session.click(3, 3, label="cat")
    with pytest.raises(LabelError, match="label 4 is no class: there are 4"):
        session.click(3, 3, label=4)
    with pytest.raises(PysegError, match="nothing to accept"):
        session.accept("car")
    with pytest.raises(PysegError, match="no region at"):
        session.select(3, 3)
    with pytest.raises(PysegError, match="mask must be bool"):
        session.brush(np.ones((37, 53), np.uint8), "car")
    with pytest.raises(PysegError, match="the size of the image"):
        session.brush(np.ones((36, 53), bool), "car")
    with pytest.raises(PysegError, match="label must name the class"):
        session.brush(np.ones((37, 53), bool))
    assert not session.undo() and not session.redo()
    session.click(20, 18)
    with pytest.raises(PysegError, match="label must name the class, one of road, car"):
        session.accept()
    session.click(20, 18, positive=False)
    session.click(20, 18, positive=False)
    with pytest.raises(PysegError, match="the mask is empty"):
        session.accept("car")
    with pytest.raises(PysegError, match="classes must be the names"):
        Session(image())
    with pytest.raises(PysegError, match=r"start is \[4, 4\]"):
        Session(image(), CLASSES, start=np.zeros((4, 4), np.uint8))
    with pytest.raises(LabelError, match="labels hold 9"):
        Session(image(), CLASSES, start=np.full((37, 53), 9))
    with pytest.raises(PysegError, match="start has no instances, only labels"):
        Session(image(), CLASSES, start=np.zeros((37, 53), np.uint8), edit="instances")
    with pytest.raises(ValueError, match="edit must be one of"):
        Session(image(), CLASSES, edit="pixels")
    with pytest.raises(LabelError, match="region of class 9"):
        ids = torch.ones(37, 53, dtype=torch.int32)
        Session(image(), CLASSES, start=Segments(ids, (Segment(1, 9, 1.0, 37 * 53),)))


def test_fill_paints_what_edges_connect():
    """Against the connected parts by a flood in plain Python."""
    start = torch.tensor(
        [[0, 0, 1, 255], [0, 1, 255, 255], [1, 0, 0, 255], [0, 0, 0, 1]], dtype=torch.uint8
    )
    session = Session(image(4, 4), CLASSES, start=start)
    session.fill(0, 0, "car")
    assert session.result.labels[:2, :2].tolist() == [[1, 1], [1, 1]]
    assert session.result.labels[2:, :3].tolist() == [[1, 0, 0], [0, 0, 0]]
    session.fill(3, 0, "sky")
    assert (session.result.labels == 3).tolist() == (start == VOID).tolist()
    assert session.undo() and session.undo() and torch.equal(session.result.labels, start)
    for _ in range(20):
        labels = torch.randint(0, 3, (13, 17), dtype=torch.uint8)
        session = Session(image(13, 17), CLASSES, start=labels)
        x, y = random.randrange(17), random.randrange(13)
        session.fill(x + 0.7, y + 0.2, 3)
        reached, waiting = set(), [(x, y)]
        while waiting:
            at = waiting.pop()
            inside = 0 <= at[0] < 17 and 0 <= at[1] < 13
            if at not in reached and inside and labels[at[1], at[0]] == labels[y, x]:
                reached.add(at)
                waiting += [
                    (at[0] + dx, at[1] + dy) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))
                ]
        found = {(int(c), int(r)) for r, c in (session.result.labels == 3).nonzero()}
        assert found == reached
    with pytest.raises(PysegError, match="outside"):
        session.fill(17, 0, 1)


def test_put_is_one_step_and_checks_what_it_gets(tmp_path):
    start = torch.randint(0, 4, (9, 11), dtype=torch.uint8)
    other = torch.randint(0, 4, (9, 11), dtype=torch.uint8)
    other[0, 0] = VOID
    session = Session(image(9, 11), CLASSES, start=start)
    session.put(start)
    assert not session.undoable and session.version == 0
    session.put(other.numpy())
    assert torch.equal(session.result.labels, other) and session.version == 1
    assert session.undo() and torch.equal(session.result.labels, start) and session.redoable
    session.redo()
    path = session.result.save(tmp_path / "map.png")
    session.put(None)
    assert (session.result.labels == VOID).all()
    session.put(path)
    assert torch.equal(session.result.labels, other)
    with pytest.raises(PysegError, match="must agree"):
        session.put(torch.zeros(9, 12, dtype=torch.uint8))
    with pytest.raises(LabelError, match="hold 9"):
        session.put(torch.full((9, 11), 9))
    with pytest.raises(PysegError, match="edits instances"):
        Session(image(9, 11), CLASSES, edit="instances").put(start)


def test_what_is_asked_can_be_asked_again():
    start = torch.randint(0, 2, (37, 53), dtype=torch.uint8)
    pixels = image()
    session = Session(pixels, CLASSES, start=start, promptable=Discs())
    assert session.asked is None
    session.select(5, 7)
    x, y = session.asked.selected
    again = Session(pixels, CLASSES, start=start, promptable=Discs())
    again.select(x, y)
    assert torch.equal(again.pending.mask, session.pending.mask)
    session.clear()
    session.box(3, 4, 20, 22, "tree")
    session.click(12.5, 9, label="void")
    session.click(30, 30, positive=False)
    asked = session.asked
    assert asked.points == ((12.5, 9.0), (30.0, 30.0)) and asked.positive == (True, False)
    assert (asked.box, asked.label, asked.selected) == ((3, 4, 20, 22), "void", None)
    version = session.version
    session.accept("tree")
    assert session.asked is None and session.version == version + 1
    session.undo()
    assert session.asked == asked and session.version == version + 2
