"""`pyseg score`: files against the tools that made the protocols, pairing, mistakes."""

import contextlib
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyseg import cli
from pyseg.classes import CITYSCAPES_CLASSES, CITYSCAPES_IDS, CITYSCAPES_TRAIN_IDS
from pyseg.errors import ImageError, LabelError, ScoreError
from pyseg.formats import write_panoptic
from pyseg.metrics import Semantic
from pyseg.scoring import compare_files, score_files
from pyseg.types import Segments

SIZE = (60, 90)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["score", *map(str, arguments)])


def blocks(generator, values, size=SIZE):
    """A map of rectangles with values."""
    coarse = generator.choice(values, (6, 9))
    return coarse.repeat(-(-size[0] // 6), 0).repeat(-(-size[1] // 9), 1)[: size[0], : size[1]]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def city_names(count=5):
    return [f"{('aachen', 'ulm')[k % 2]}_00000{k}_000019" for k in range(count)]


@pytest.fixture
def cityscapes(tmp_path):
    """gtFine as it is, with ids of every kind, and predictions in label ids; and both as arrays."""
    generator = np.random.default_rng()
    pairs = []
    for name in city_names():
        target = blocks(generator, [*range(34), 7, 26, 26, 23]).astype(np.uint8)
        guess = np.roll(target, generator.integers(0, 9), 1)
        noise = generator.random(SIZE) < 0.2
        guess[noise] = generator.choice(CITYSCAPES_IDS, noise.sum())
        codes = np.where(
            (target >= 24) & (generator.random(SIZE) < 0.9), target.astype(np.uint16) * 1000, target
        )
        folder = tmp_path / "gtFine" / name.partition("_")[0]
        save(folder / f"{name}_gtFine_labelIds.png", target)
        save(folder / f"{name}_gtFine_instanceIds.png", codes.astype(np.uint16))
        save(folder / f"{name}_gtFine_color.png", np.zeros((*SIZE, 4), np.uint8))
        (folder / f"{name}_gtFine_polygons.json").write_text("{}")
        save(tmp_path / "out" / f"{name}_leftImg8bit.png", guess)
        train = np.array(CITYSCAPES_TRAIN_IDS, np.uint8)[guess]
        save(tmp_path / "train" / f"{name}.png", train)
        pairs.append((guess, target))
    return tmp_path, pairs


@pytest.fixture
def scripts(monkeypatch):
    """cityscapesScripts, which asks NumPy for a function that it no longer has."""
    helpers = pytest.importorskip("cityscapesscripts.helpers.csHelpers")
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    return helpers


def test_semantic_scores_are_those_of_cityscapesscripts(cityscapes, scripts):
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as theirs

    root, _ = cityscapes
    args = theirs.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    truth = sorted((root / "gtFine").rglob("*_labelIds.png"))
    guesses = [root / "out" / p.name.replace("gtFine_labelIds", "leftImg8bit") for p in truth]
    want = theirs.evaluateImgLists([*map(str, guesses)], [*map(str, truth)], args)
    by_ids = score_files(
        root / "out", root / "gtFine", classes="cityscapes", prediction_values="ids"
    )
    by_train_ids = score_files(root / "train", root / "gtFine", classes="cityscapes")
    for got in (by_ids, by_train_ids):
        semantic = got.metrics["semantic"]
        assert semantic["miou"] == pytest.approx(want["averageScoreClasses"], abs=1e-9)
        for name in CITYSCAPES_CLASSES:
            expected = want["classScores"][name]
            assert semantic["per_class"][name]["iou"] == pytest.approx(
                expected, abs=1e-9, nan_ok=True
            )
    assert by_ids.protocol["prediction_values"] == by_ids.protocol["label_values"] == "ids"
    assert by_train_ids.protocol["prediction_values"] == "indices"
    assert 0.05 < by_ids.metrics["semantic"]["miou"] < 0.95


def test_label_ids_taken_for_train_ids_are_named(cityscapes):
    root, _ = cityscapes
    with pytest.raises(LabelError, match=r"leftImg8bit.*Cityscapes ids.*prediction_values='ids'"):
        score_files(root / "out", root / "gtFine", classes="cityscapes")
    result = run(root / "out", root / "gtFine", "--classes", "cityscapes")
    assert result.exit_code == 2 and "--prediction-values" in result.stderr


def city_objects(root, generator, images=6):
    """A ground truth of instanceIds, and predictions in Cityscapes' format, hostile to rules."""
    for name in city_names(images):
        base = blocks(generator, [4, 7, 11, 23, 26, 29], (80, 120)).astype(np.uint16)
        codes = base.copy()
        masks = []
        for number in range(14):
            label = int(generator.choice([24, 25, 26, 28, 29, 33]))
            y, x = generator.integers(0, 70), generator.integers(0, 100)
            h, w = generator.integers(3, 30, 2)
            codes[y : y + h, x : x + w] = label if number % 6 == 5 else label * 1000 + number
        for value in np.unique(codes):
            label = int(value) // 1000 if value >= 1000 else int(value)
            for _ in range(int(generator.choice([0, 1, 1, 2]))):
                shift = generator.integers(-2, 3, 2)
                mask = np.roll(codes == value, shift, (0, 1))
                if value < 1000:
                    mask &= generator.random(mask.shape) < 0.9
                wrong = generator.random() < 0.15
                masks.append((mask, int(generator.choice([24, 26, 7, 29])) if wrong else label))
        masks.append((np.zeros(codes.shape, bool), 26))
        void = np.zeros(codes.shape, bool)
        void[:20, :30] = True
        masks.append((void, 26))
        save(root / "gt" / name.partition("_")[0] / f"{name}_gtFine_instanceIds.png", codes)
        lines = []
        for number, (mask, label) in enumerate(masks):
            file = f"masks/{name}_{number}.png"
            save(root / "pred" / file, mask.astype(np.uint8) * int(generator.choice([1, 255])))
            lines.append(f"{file} {label} {round(float(generator.random()), 1)}")
        (root / "pred" / f"{name}_leftImg8bit.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("seed", range(3))
def test_objects_are_scored_as_cityscapesscripts_does(seed, tmp_path, scripts, monkeypatch):
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as theirs

    city_objects(tmp_path, np.random.default_rng(seed))
    monkeypatch.setattr(theirs, "writeDict2JSON", lambda *_: None)  # its numbers are NumPy's now
    args = theirs.args
    args.JSONOutput, args.quiet = False, True
    args.gtInstancesFile = str(tmp_path / "gtInstances.json")
    args.predictionPath = str(tmp_path / "pred")
    truth = sorted((tmp_path / "gt").rglob("*.png"))
    lists = [
        tmp_path / "pred" / p.name.replace("gtFine_instanceIds.png", "leftImg8bit.txt")
        for p in truth
    ]
    want = theirs.evaluateImgLists([*map(str, lists)], [*map(str, truth)], args)["averages"]
    got = score_files(
        tmp_path / "pred", tmp_path / "gt", classes="cityscapes", metrics=["cityscapes_ap"]
    ).metrics["cityscapes_ap"]
    assert got["ap"] == pytest.approx(want["allAp"], abs=1e-9) and 0.02 < got["ap"] < 0.9
    assert got["ap50"] == pytest.approx(want["allAp50%"], abs=1e-9)
    for name, entry in want["classes"].items():
        mine = got["per_class"][name]
        assert mine["ap"] == pytest.approx(entry["ap"], abs=1e-9, nan_ok=True), name
        assert mine["ap50"] == pytest.approx(float(entry["ap50%"]), abs=1e-9, nan_ok=True), name


def test_panoptic_scores_of_instance_ids(cityscapes):
    root, _ = cityscapes
    got = score_files(
        root / "gtFine", root / "gtFine", classes="cityscapes", metrics=["panoptic", "semantic"]
    )
    assert got.metrics["panoptic"]["pq"] == got.metrics["semantic"]["miou"] == 1
    assert got.metrics["panoptic"]["things_counted"] > 0


def panopticapi(truth, guesses, folders, categories):
    """Panoptic quality, read off Kirillov et al. 2019 and what panopticapi counts, with sets."""
    counts = {entry["id"]: [0.0, 0, 0, 0] for entry in categories}  # IoU, tp, fp, fn
    for target, guess in zip(truth, guesses, strict=True):
        maps = []
        for folder, entry in zip(folders, (target, guess), strict=True):
            rgb = np.array(Image.open(folder / entry["file_name"])).astype(np.int64)
            maps.append(rgb @ np.array([1, 256, 65536]))
        infos = [{s["id"]: s for s in entry["segments_info"]} for entry in (target, guess)]
        overlap = {
            pair: int(((maps[0] == pair[0]) & (maps[1] == pair[1])).sum())
            for pair in {*zip(maps[0].ravel().tolist(), maps[1].ravel().tolist(), strict=True)}
        }
        matched = set()
        for (t, p), both in overlap.items():
            if t not in infos[0] or p not in infos[1] or infos[0][t]["iscrowd"]:
                continue
            if infos[0][t]["category_id"] != infos[1][p]["category_id"]:
                continue
            union = infos[0][t]["area"] + (maps[1] == p).sum() - both - overlap.get((0, p), 0)
            if both / union > 0.5:
                entry = counts[infos[0][t]["category_id"]]
                entry[0], entry[1] = entry[0] + both / union, entry[1] + 1
                matched |= {("t", t), ("p", p)}
        crowds = {s["category_id"]: s["id"] for s in infos[0].values() if s["iscrowd"]}
        for key, segment in infos[0].items():
            if ("t", key) not in matched and not segment["iscrowd"]:
                counts[segment["category_id"]][3] += 1
        for key, segment in infos[1].items():
            if ("p", key) in matched:
                continue
            excused = overlap.get((0, key), 0)
            if segment["category_id"] in crowds:
                excused += overlap.get((crowds[segment["category_id"]], key), 0)
            if excused / (maps[1] == key).sum() <= 0.5:
                counts[segment["category_id"]][2] += 1
    found = {}
    for key, things in (("pq", None), ("pq_things", 1), ("pq_stuff", 0)):
        values = []
        for entry in categories:
            iou, tp, fp, fn = counts[entry["id"]]
            if (things is None or entry["isthing"] == things) and tp + fp + fn:
                values.append(iou / (tp + fp / 2 + fn / 2))
        found[key] = sum(values) / len(values) if values else math.nan
    return found


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_scores_are_those_of_panopticapi(seed, tmp_path):
    generator = np.random.default_rng(seed)
    names = ("person", "car", "sky", "road")
    results = {"truth": [], "guess": []}
    for k in range(4):
        ids = blocks(generator, range(12))
        guess = np.where(generator.random(ids.shape) < 0.85, ids, np.roll(ids, 2, 0))
        labels = {n: n % 4 for n in range(1, 12)}
        wrong = {n: (n % 4 if generator.random() < 0.9 else 0) for n in range(1, 12)}
        results["truth"].append((f"{k}", Segments.from_map(ids, labels, crowds={4, 5, 8})))
        results["guess"].append((f"{k}", Segments.from_map(guess, wrong)))
    for side, segments in results.items():
        write_panoptic(tmp_path / f"{side}.json", segments, names, things={0, 1})
    files = [tmp_path / f"{side}.json" for side in ("truth", "guess")]
    contents = [json.loads(file.read_text()) for file in files]
    want = panopticapi(
        *(content["annotations"] for content in contents),
        [file.with_suffix("") for file in files],
        contents[0]["categories"],
    )
    scores = score_files(files[1], files[0])
    for key, value in want.items():
        assert scores.metrics["panoptic"][key] == pytest.approx(value, abs=1e-9)
    assert 0.1 < want["pq"] < 0.95
    more = score_files(files[1], files[0], metrics=["panoptic", "semantic", "boundary"])
    assert 0.3 < more.metrics["semantic"]["miou"] < 1 and more.metrics["boundary"]["bf"] > 0
    assert "label_values" not in more.protocol and more.protocol["classes"] == [*names]


# --- folders of any classes -----------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Labels of 4 classes with 255, a prediction and a better one."""
    generator = np.random.default_rng(7)
    arrays = []
    for k in range(8):
        target = blocks(generator, range(4)).astype(np.uint8)
        target[:3] = 255
        guess = np.where(generator.random(SIZE) < 0.6, target, np.roll(target, 20, 1))
        guess[guess == 255] = 0
        better = np.where(target == 2, 2, guess)
        for name, array in (("labels", target), ("guess", guess), ("better", better)):
            save(tmp_path / name / f"{k}.png", array.astype(np.uint8))
        arrays.append((guess.astype(np.uint8), target))
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    return tmp_path, arrays


def test_folders_are_scored_like_arrays(folders):
    root, arrays = folders
    want = Semantic(("sky", "road", "car", "tree"))
    for guess, target in arrays:
        want.update_labels(guess, target)
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = score_files(root / "guess", root / "labels")  # classes.txt beside them
        finally:
            torch.set_num_threads(before)
        assert json.dumps(got.metrics["semantic"]) == json.dumps(want.compute())
    assert got.protocol["classes"] == ["sky", "road", "car", "tree"]
    assert got.protocol["sizes"] == "60 x 90" and got.protocol["images"] == 8
    numbered = score_files(root / "guess", root / "labels", classes=4)
    assert numbered.metrics["semantic"]["miou"] == got.metrics["semantic"]["miou"]
    palette = Image.open(root / "guess/0.png").convert("P")
    palette.putdata(arrays[0][0].ravel().tolist())
    palette.save(root / "guess/0.png")
    (root / "guess/1.png").rename(root / "guess/1.tmp")
    Image.open(root / "guess/1.tmp").save(root / "guess/1.tif")
    (root / "guess/1.tmp").unlink()
    again = score_files(root / "guess", root / "labels")
    assert again.metrics["semantic"] == got.metrics["semantic"]


def test_ade20k_counts_from_1(tmp_path):
    generator = np.random.default_rng(0)
    target = blocks(generator, range(151)).astype(np.uint8)
    save(tmp_path / "labels/a.png", target)
    save(tmp_path / "ids/a.png", target)
    save(tmp_path / "indices/a.png", np.where(target == 0, 7, target - 1).astype(np.uint8))
    by_index = score_files(tmp_path / "indices", tmp_path / "labels", classes="ade20k")
    by_id = score_files(
        tmp_path / "ids", tmp_path / "labels", classes="ade20k", prediction_values="ids"
    )
    assert by_index.metrics["semantic"]["miou"] == by_id.metrics["semantic"]["miou"] == 1
    target[:10] = 150
    save(tmp_path / "ids/a.png", target)
    with pytest.raises(LabelError, match=r"150 .*start at 1.*prediction_values='ids'"):
        score_files(tmp_path / "ids", tmp_path / "labels", classes="ade20k")


def test_void_of_another_value(folders):
    root, arrays = folders
    want = score_files(root / "guess", root / "labels").metrics["semantic"]["miou"]
    for k, (_, target) in enumerate(arrays):
        save(root / "labels" / f"{k}.png", np.where(target == 255, 77, target).astype(np.uint8))
    got = score_files(root / "guess", root / "labels", ignore_index=77)
    assert got.metrics["semantic"]["miou"] == want
    assert got.protocol["void_values"] == [77, 255] and got.protocol["ignore_index"] == 255


def test_labels_of_16_bits(folders):
    root, arrays = folders
    want = score_files(root / "guess", root / "labels").metrics["semantic"]["miou"]
    for k, (guess, _) in enumerate(arrays):
        save(root / "guess" / f"{k}.png", guess.astype(np.uint16))
    assert score_files(root / "guess", root / "labels").metrics["semantic"]["miou"] == want
    save(root / "guess/3.png", arrays[3][0].astype(np.uint16) + 1000)
    with pytest.raises(LabelError, match=r"3\.png.*1000"):
        score_files(root / "guess", root / "labels")


def test_two_systems(folders):
    root, _ = folders
    options = {"metrics": ["semantic", "boundary"], "resamples": 300}
    found = compare_files(root / "better", root / "guess", root / "labels", **options)
    assert found.values["semantic"]["per_class", "car", "iou"].beyond_noise
    assert found.values["semantic"]["miou",].value > 0
    shown = run(root / "better", root / "guess", root / "labels", "--resamples", 300)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"semantic iou car .*first is higher", shown.stdout)
    assert "300 bootstrap resamples of the 8 images" in shown.stdout
    same = run(root / "guess", root / "guess", root / "labels", "--resamples", 50, "--json")
    found = json.loads(same.stdout)["differences"]["semantic"]
    assert found["miou"]["value"] == 0 and not found["miou"]["beyond_noise"]


def test_command(folders):
    root, _ = folders
    want = score_files(root / "guess", root / "labels")
    shown = run(root / "guess", root / "labels").stdout
    assert re.search(rf"semantic miou +{want.metrics['semantic']['miou']:.4f}", shown)
    assert re.search(rf"car +{want.metrics['semantic']['per_class']['car']['iou']:.4f}", shown)
    assert "summed over all images" in shown and "sizes: 60 x 90" in shown
    found = json.loads(run(root / "guess", root / "labels", "--resamples", 20, "--json").stdout)
    assert found["metrics"]["semantic"]["miou"] == want.metrics["semantic"]["miou"]
    assert len(found["intervals"]["semantic"]["miou"]) == 2
    assert found["protocol"]["labels"] == str(root / "labels")
    assert run(root / "guess").exit_code == 2


def test_instances_with_intervals(tmp_path):
    generator = np.random.default_rng(2)
    truth = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cell"}]}
    results = []
    for k in range(12):
        truth["images"].append({"id": k, "height": 40, "width": 50})
        for _ in range(4):
            x, y = generator.integers(0, 40, 2).tolist()
            box = [float(x), float(y), 8.0, 6.0]
            common = {"image_id": k, "category_id": 3, "bbox": box}
            truth["annotations"].append({**common, "area": 48, "iscrowd": 0})
            moved = [box[0] + int(generator.integers(0, 4)), *box[1:]]
            results.append({**common, "bbox": moved, "score": float(generator.random())})
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = tmp_path / "results.json", tmp_path / "truth.json"
    plain = score_files(*files)
    (metric,) = plain.metrics
    got = score_files(*files, resamples=50)
    assert got.metrics[metric] == plain.metrics[metric]
    low, high = got.interval(metric, "box_ap")
    assert low < got.metrics[metric]["box_ap"] < high and high - low < 0.6
    assert not any(map(math.isnan, got.interval(metric, "per_class", "cell", "box_ap")))


# --- mistakes -------------------------------------------------------------------------------------


def test_bad_folders(folders, tmp_path):
    root, arrays = folders
    labels, guess = root / "labels", root / "guess"

    def refused(error, words, predictions=guess, truth=labels, **options):
        with pytest.raises(error, match=words):
            score_files(predictions, truth, **options)

    refused(ScoreError, "nowhere' does not exist", root / "nowhere")
    refused(ScoreError, "neither a folder nor", root / "classes.txt")
    (root / "a.json").write_text("{}")
    refused(ScoreError, "must both be folders", root / "a.json")
    (root / "empty").mkdir()
    refused(ScoreError, "empty' holds no label map.*right folder", root / "empty")
    refused(ScoreError, "known by name are cityscapes", classes="citscapes")
    refused(ScoreError, "1 to 255", classes=256)
    refused(ScoreError, "indices or ids", prediction_values="labels")
    refused(ScoreError, "of Cityscapes' instanceIds", metrics=["panoptic"])
    refused(ScoreError, "scored alone", metrics=["cityscapes_ap"])
    refused(LabelError, r"0\.png.*3.*start at 1, or a class missing", classes=3)
    (guess / "5.png").unlink()
    refused(ScoreError, "no prediction for 1 of 8 images: 5")
    save(guess / "5.png", arrays[5][0][:-1])
    refused(LabelError, r"5\.png is 90 x 59 pixels, its labels .*60")
    (guess / "5.png").write_bytes((labels / "5.png").read_bytes()[:-30])
    refused(ImageError, r"5\.png.*damaged")
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(guess / "5.png")
    refused(ImageError, "colours instead of one class id")
    save(guess / "5.png", arrays[5][0])
    save(guess / "more" / "5.png", arrays[5][0])
    refused(ScoreError, "both of image '5'")
    (guess / "more" / "5.png").rename(guess / "more" / "6x.png")
    with pytest.warns(UserWarning, match="1 predictions are of images"):
        score_files(guess, labels)
    for path in guess.rglob("*.png"):
        path.rename(path.with_name(f"pred_{path.name}"))
    refused(ScoreError, "no file in .* has the name.*right folders")
    (root / "classes.txt").unlink()
    refused(ScoreError, "give the class names or a file")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a.png 26", "mask.png label_id score"),
        ("a.png 26 nan", "mask.png label_id score"),
        ("a.png 99 0.5", "99 is no label id"),
        ("../a.png 26 0.5", "relative path within"),
        ("/tmp/a.png 26 0.5", "relative path within"),
        ("gone.png 26 0.5", "gone.png' does not exist"),
        ("small.png 26 0.5", "3 x 2 pixels"),
    ],
)
def test_bad_lists_of_objects(tmp_path, line, words):
    city_objects(tmp_path, np.random.default_rng(0), images=1)
    save(tmp_path / "pred/small.png", np.ones((2, 3), np.uint8))
    (file,) = (tmp_path / "pred").glob("*.txt")
    file.write_text(line + "\n")
    with pytest.raises((ScoreError, ImageError), match=words):
        score_files(
            tmp_path / "pred", tmp_path / "gt", classes="cityscapes", metrics=["cityscapes_ap"]
        )


def test_nothing_is_printed_by_the_library(folders):
    root, _ = folders
    with contextlib.redirect_stdout(io.StringIO()) as out:
        score_files(root / "guess", root / "labels")
    assert out.getvalue() == ""
