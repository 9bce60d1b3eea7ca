"""`pyseg export`: files of ONNX and torch, and the models that run them."""

import json
import math
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import pyseg
from pyseg import cli, export, models
from pyseg.errors import DeviceError, ExportError, ImageError, PysegError, SpecError, WeightsError
from pyseg.image import read_image, write_image
from pyseg.models.exported import ExportedModel
from pyseg.types import Segmentation

CLASSES = ("sky", "road | lane", "Fußweg")
PALETTE = ((1, 2, 3), (200, 100, 0), (0, 0, 255))


class Small(nn.Module):
    """Strides, padding, pooling to one cell and upsampling: what sizes can go wrong at."""

    def __init__(self, count):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.out = nn.Conv2d(8, count, 1)

    def forward(self, x):
        fine = F.relu(self.norm(self.one(x)))
        coarse = self.two(fine)
        for cells in (1, 3):
            coarse = coarse + F.interpolate(
                F.adaptive_avg_pool2d(coarse, cells), coarse.shape[2:], mode="bilinear"
            )
        up = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return {"out": self.out(fine + up)}


class Sure(Small):
    """Tells an uncertainty, too."""

    def forward(self, x):
        out = super().forward(x)["out"]
        return {"out": out, "uncertainty": 1 - out.softmax(1).amax(1)}


class Deep(Small):
    """Pools maps of few places, by which inductor unrolls the pooling."""

    def __init__(self, count):
        super().__init__(count)
        self.two = nn.Conv2d(8, 8, 3, stride=16, padding=1)


class Rounds(Small):
    """Pads by sides that it rounds up, as timm's padding "same" does."""

    def forward(self, x):
        return super().forward(F.pad(x, [0, 8 * math.ceil(x.shape[-1] / 8) - x.shape[-1], 0, 0]))


class Lies(Small):
    """Computes something else in a file: what a wrong exporter does."""

    gain = 1.5

    def forward(self, x):
        out = super().forward(x)["out"]
        return {"out": out * self.gain if torch.compiler.is_exporting() else out}


class Looks(Small):
    """Its way depends on the values of an image, which no trace holds."""

    def forward(self, x):
        return super().forward(x if bool(x.mean() > 0) else -x)


def made(kind=Small, seed=0):
    torch.manual_seed(seed)
    model = models.SemanticModel(kind(len(CLASSES)), CLASSES, PALETTE)
    model.network.norm.running_mean.normal_()
    with torch.no_grad():
        model.network.out.weight.mul_(10)
    model.temperature = 1.5
    return model


@pytest.fixture
def onnx():
    """The packages of the extra; without them what needs them is skipped."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    return pytest.importorskip("onnx")


@pytest.fixture
def photos(tmp_path):
    """A folder of three images of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for name, size in (("a", (45, 61)), ("b", (64, 48)), ("c", (33, 90))):
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        write_image(folder / f"{name}.png", image)
    return folder


def images(photos):
    return [read_image(path) for path in sorted(photos.iterdir())]


def same(one: Segmentation, other: Segmentation):
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    assert one.classes == other.classes and one.palette == other.palette
    assert one.temperature == other.temperature


# --- the file itself --------------------------------------------------------------------------


def test_onnxruntime_alone_computes_the_same(tmp_path, photos, onnx):
    """By nothing of ours: what another program finds in the file."""
    import onnxruntime

    model = made()
    written = export.export_model(model, photos, tmp_path / "out")
    assert written.file == tmp_path / "out" / "semanticmodel.onnx"
    onnx.checker.check_model(onnx.load(written.file), full_check=True)
    session = onnxruntime.InferenceSession(written.file)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape) == (
        *("images", "tensor(uint8)"),
        ["batch", 3, "height", "width"],
    )
    assert given.name == "logits" and given.shape[:2] == ["batch", 3]
    for count, height, width in ((1, 45, 61), (3, 64, 48), (2, 17, 130)):
        batch = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
        (logits,) = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            expected = model(batch)["out"]
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    told = json.loads(session.get_modelmeta().custom_metadata_map["pyseg"])
    assert told["classes"] == list(CLASSES) and told["temperature"] == 1.5
    assert [tuple(colour) for colour in told["palette"]] == list(PALETTE)
    assert told["batch"] == [1, None] and told["licence"] is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("semanticmodel.onnx", "semanticmodel.onnx.json"),
    ]


def test_the_report_says_what_was_measured(tmp_path, photos, onnx):
    written = export.export_model(made(), photos, tmp_path, licence="mine")
    report = json.loads(written.report_file.read_text())
    assert report == json.loads(json.dumps(written.report))
    assert report["images"] == 6 and report["reasons"] == []  # three, and crops of the first
    sizes = [(44, 60), (42, 59), (37, 56), (45, 61), (64, 48), (33, 90)]
    assert [tuple(each["size"]) for each in report["each"]] == sizes
    assert report["pixels"] == sum(height * width for height, width in sizes)
    assert report["flips"]["beyond_ties"] == 0 and report["miou"] > 0.999
    assert 0 <= report["relative_delta"] < 1e-5
    assert min(report["milliseconds"].values()) > 0
    assert report["bytes"] == written.file.stat().st_size
    assert report["made"]["torch"] == torch.__version__
    text = dict(written.table()[1])
    assert text["images x height x width"].startswith("1 or more x ")
    assert text["checked on"] == f"6 images, {report['pixels']:,} pixels"


def test_torch_export_needs_no_network_of_ours(tmp_path, photos):
    model = made(Sure)
    written = export.export_model(model, photos, tmp_path, format="torch-export")
    code = (
        "import sys, torch\n"
        f"program = torch.export.load({str(written.file)!r})\n"
        "images = torch.arange(3 * 45 * 61).reshape(1, 3, 45, 61).to(torch.uint8)\n"
        f"torch.save(program.module()(images), {str(tmp_path / 'out.pt')!r})\n"
        "assert 'pyseg' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    batch = torch.arange(3 * 45 * 61).reshape(1, 3, 45, 61).to(torch.uint8)
    with torch.no_grad():
        expected = model(batch)
    logits, doubt = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(logits, expected["out"])
    torch.testing.assert_close(doubt, expected["uncertainty"])
    result = pyseg.load(written.file)(images(photos)[0])
    torch.testing.assert_close(result.uncertainty, model.predict(images(photos)[:1])[0].uncertainty)


@pytest.mark.slow
def test_aoti_is_compiled_for_any_size(tmp_path, photos):
    model = made(Deep)
    written = export.export_model(model, photos, tmp_path, format="aoti")
    assert written.file.name == "semanticmodel.aoti.pt2"
    with zipfile.ZipFile(written.file) as archive:
        assert any(name.endswith(".so") for name in archive.namelist())
    loaded = pyseg.load(written.file)
    larger = torch.randint(256, (3, 410, 530), dtype=torch.uint8)  # than what was traced
    for image in (*images(photos), larger):
        same(loaded(image), model.predict([image])[0])
    batch = torch.stack(images(photos)[:1] * 3)
    torch.testing.assert_close(
        loaded.model(batch)["out"], model(batch)["out"], rtol=1e-4, atol=1e-4
    )


def test_a_file_of_one_size(tmp_path, photos, onnx):
    written = export.export_model(made(), photos, tmp_path, size=(40, 56))
    report = written.report
    assert (report["height"], report["width"]) == ([40, 40], [56, 56])
    assert report["images"] == 3 and report["pixels"] == 3 * 40 * 56
    loaded = pyseg.load(written.file)
    image = images(photos)[0][:, :40, :56]
    same(loaded(image), made().predict([image])[0])
    with pytest.raises(ImageError, match="has height 45, and the exported file takes 40: resize"):
        loaded(images(photos)[0])


def test_int8_costs_what_the_report_says(tmp_path, photos, onnx):
    kinds = {}
    for calibration in (None, photos):
        written = export.export_model(
            made(), photos, tmp_path, calibration=calibration, max_flips=0.2
        )
        kinds[written.file.name] = {node.op_type for node in onnx.load(written.file).graph.node}
    assert list(kinds) == ["semanticmodel.onnx", "semanticmodel.int8.onnx"]
    assert "QuantizeLinear" not in kinds["semanticmodel.onnx"]
    assert "QuantizeLinear" in kinds["semanticmodel.int8.onnx"]
    report = written.report
    assert report["int8"] and report["limits"]["relative_delta"] is None
    flips = 0
    loaded = pyseg.load(written.file)
    assert loaded.classes == CLASSES
    first, *others = images(photos)
    crops = [first[:, : 45 - rows, : 61 - columns] for rows, columns in ((1, 1), (3, 2), (8, 5))]
    for image in (first, *crops, *others):
        flips += int((loaded(image).labels != made().predict([image])[0].labels).sum())
    assert report["flips"]["all"] == flips > 0
    with pytest.raises(ExportError, match="another label beyond ties"):
        export.export_model(made(), photos, tmp_path, calibration=photos, max_flips=0)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [1.01, -1.0, float("nan")])
def test_a_file_that_computes_something_else_leaves_its_report_only(
    tmp_path, photos, gain, monkeypatch
):
    (tmp_path / "out").mkdir()
    earlier = tmp_path / "out" / "semanticmodel.pt2"
    earlier.write_bytes(b"of an earlier run")
    monkeypatch.setattr(Lies, "gain", gain)
    reason = {
        1.01: "logits differ by",
        -1.0: "pixels get another label",
    }.get(gain, "not finite")
    with pytest.raises(ExportError, match=f"semanticmodel.pt2 is refused: .*{reason}"):
        export.export_model(made(Lies), photos, tmp_path / "out", format="torch-export")
    (left,) = (tmp_path / "out").iterdir()
    report = json.loads(left.read_text())
    assert any(reason in text for text in report["reasons"])
    if gain == 1.01:  # the same labels, other probabilities
        assert report["flips"]["beyond_ties"] == 0
        assert report["relative_delta"] == pytest.approx(0.01, rel=1e-3)


def test_ties_are_told_from_flips_by_counting():
    """Against a loop over pixels, at a stride and at full size."""
    torch.manual_seed(0)
    original = torch.randn(4, 6, 7).round(decimals=1)
    original[2] = original[1] + torch.rand(6, 7) * 1e-4  # ties of two classes
    exported = original.clone()
    exported[[1, 2]] = original[[2, 1]]
    exported[0] += torch.rand(6, 7) * 2
    for size in ((6, 7), (13, 15)):
        pair = [Segmentation(size, tuple("abcd"), logits=x) for x in (original, exported)]
        found = export.compared(*pair)
        full = F.interpolate(original[None], size, mode="bilinear", align_corners=False)[0]
        flips = ties = 0
        limit = export.TIE * float(original.abs().max())
        for y in range(size[0]):
            for x in range(size[1]):
                one, other = (int(p.labels[y, x]) for p in pair)
                flips += one != other
                ties += one != other and float(full[one, y, x] - full[other, y, x]) <= limit
        assert (found["flips"], found["ties"]) == (flips, ties)
        assert 0 < ties < flips
        assert found["max_delta"] == pytest.approx(float((original - exported).abs().max()))


def test_what_cannot_leave_says_so(tmp_path, photos, onnx):
    def refused(model, match, **options):
        with pytest.raises(ExportError, match=match):
            export.export_model(model, photos, tmp_path / "out", **options)

    street = pyseg.build("streetnet+crf(iterations=3)", weights=None)
    refused(street, r"^crf\(iterations=3\) cannot leave pyseg.*Export 'streetnet' alone.*\+crf")
    refused(pyseg.build("streetnet(tta='flip')"), "predicts by tta or windows")
    detector = pyseg.build("maskrcnn(backbone='resnet18', channels=32)", weights=None)
    refused(detector, "maskrcnn cannot leave pyseg: a .* finds objects")
    refused(made(Looks), "cannot be traced by torch.export .*give size=", format="torch-export")
    refused(made(Rounds), "rounds sides up as it goes .*give size=")
    export.export_model(made(Rounds), photos, tmp_path / "sized", size=(40, 60))
    with pytest.raises(PysegError, match="in training mode"):
        export.export_model(made().train(), photos, tmp_path)
    written = export.export_model(made(), photos, tmp_path, format="torch-export")
    refused(pyseg.load(written.file), "is an exported file already")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"format": "tflite"}, "format must be one of onnx, torch-export, aoti"),
        ({"max_flips": 1.5}, "max_flips must be a share of pixels"),
        ({"size": (0, 5)}, "size must be"),
        ({"format": "aoti", "calibration": "x"}, "calibration is for int8"),
    ],
)
def test_options_out_of_range(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        export.export_model(made(), tmp_path, tmp_path, **options)


def test_images_that_are_not_there(tmp_path):
    with pytest.raises(PysegError, match="holds no image file"):
        export.export_model(made(), tmp_path, tmp_path, format="torch-export")
    with pytest.raises(ImageError):
        export.export_model(made(), tmp_path / "no.png", tmp_path, format="torch-export")


def test_the_extra_is_named_where_it_is_absent(tmp_path, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for task in (
        lambda: export.export_model(made(), photos, tmp_path),
        lambda: models.create("onnx", path="some.onnx"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'pyseg-toolkit\[onnx\]'"):
            task()


def test_no_runtime_is_imported_before_it_is_used():
    code = (
        "import sys, pyseg, pyseg.export, pyseg.models.exported\n"
        "assert not {'onnx', 'onnxruntime', 'onnxscript', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pooling_by_products_is_pooling():
    for size, count in (((7, 12), (3, 3)), ((2, 3), (6, 5)), ((1, 1), (2, 1)), ((9, 9), (9, 4))):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(
            export._pooled_by_products(x, count), F.adaptive_avg_pool2d(x, count)
        )


def test_a_file_that_fails_is_refused(tmp_path, photos, monkeypatch):
    """As one whose operators do not take all sizes."""
    monkeypatch.setattr(ExportedModel, "forward", lambda *_: (_ for _ in ()).throw(KeyError("no")))
    with pytest.raises(ExportError, match=r"it fails on .*a\.png, 44 x 60 of it: 'no'"):
        export.export_model(made(), photos, tmp_path / "out", format="torch-export")
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


# --- as a stage -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_file_is_a_stage_like_any_other(tmp_path, photos, format, request):
    if format == "onnx":
        request.getfixturevalue("onnx")
    original = made()
    file = export.export_model(original, photos, tmp_path, format=format).file
    runner = "onnx" if format == "onnx" else "pt2"
    pipeline = pyseg.build(f"{runner}(path={str(file)!r})+crf(iterations=2)")
    assert pipeline.classes == CLASSES and pipeline.model.temperature == 1.5
    expected = pyseg.build(original, "crf(iterations=2)")
    for image in images(photos):
        same(pipeline.run_stages(image)[0], expected.run_stages(image)[0])
        differs = pipeline(image).labels != expected(image).labels
        assert differs.float().mean() < 1e-3

    pipeline.save(tmp_path / "saved")
    copied = pickle.loads(pickle.dumps(pipeline))
    file.unlink()  # the folder holds it, and so does the copy
    saved = pyseg.load(tmp_path / "saved")
    assert saved.model.palette == PALETTE and saved.model.temperature == 1.5
    image = images(photos)[0]
    for other in (saved, copied):
        assert torch.equal(other(image).logits, pipeline(image).logits)
    with pytest.raises(WeightsError, match="there is no such file"):
        pyseg.build(f"{runner}(path='nowhere')")


def test_prediction_by_variants_and_windows(tmp_path, photos, onnx):
    original = made()
    file = export.export_model(original, photos, tmp_path).file
    image = images(photos)[0]
    for options in ({"tta": "flip"}, {"crop_size": 32, "stride": 32}):
        stage = models.create("onnx", path=file, **options)
        same(stage.predict([image])[0], original.predict([image], **options)[0])
    (resized,) = models.create("onnx", path=file).predict([image], tta="1,0.5")
    (expected,) = original.predict([image], tta="1,0.5")
    # The file takes 8 bits, to which the smaller image is rounded.
    torch.testing.assert_close(resized.probabilities(), expected.probabilities(), atol=0.02, rtol=0)


def test_what_a_file_does_not_do(tmp_path, photos):
    file = export.export_model(made(), photos, tmp_path, format="torch-export").file
    pipeline = pyseg.load(file)
    with pytest.raises(PysegError, match="an exported file cannot be trained"):
        pipeline.model.train()
    with pytest.raises(DeviceError, match="runs on the CPU"):
        pipeline.model.to("meta")
    assert pipeline.to("cpu") is pipeline
    with pytest.raises(TypeError, match="must be uint8"):
        pipeline.model(torch.zeros(1, 3, 20, 20, dtype=torch.int32))
    with pytest.raises(SpecError, match=r"is an exported file: pyseg.load reads it"):
        pyseg.build(str(file))
    assert pipeline([]) == []


def changed(file, target, **changes):
    """The same archive with another description."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("extra/pyseg.json"):
                content = json.dumps(json.loads(content) | changes).encode()
            new.writestr(entry.filename, content)
    return target


def test_hostile_files(tmp_path, photos, onnx):
    file = export.export_model(made(), photos, tmp_path, format="torch-export").file
    other = export.export_model(made(), photos, tmp_path).file
    foreign = onnx.load(other)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for name, content in (
        ("text.onnx", b"hello"),
        ("cut.onnx", other.read_bytes()[:900]),
        ("empty.onnx", b""),
        ("text.pt2", b"hello"),
        ("cut.pt2", file.read_bytes()[:-900]),
        ("empty.pt2", b""),
        ("swapped.pt2", other.read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "plain.pt2", "w") as archive:
        archive.writestr("model/data", "x")
    changed(file, tmp_path / "classes.pt2", classes=["one"])
    changed(file, tmp_path / "kind.pt2", kind="onnx")
    changed(file, tmp_path / "newer.pt2", format=9)
    changed(file, tmp_path / "type.pt2", palette=[["a"]])
    changed(file, tmp_path / "cold.pt2", temperature=0)
    for name in (
        *("text.onnx", "cut.onnx", "empty.onnx", "foreign.onnx", "text.pt2", "cut.pt2"),
        *("empty.pt2", "swapped.pt2", "plain.pt2", "classes.pt2", "kind.pt2", "newer.pt2"),
        *("type.pt2", "cold.pt2"),
    ):
        with pytest.raises(WeightsError, match=f"{name} is no file of `pyseg export`"):
            pyseg.load(tmp_path / name)
    broken = changed(file, tmp_path / "broken.pt2")
    with zipfile.ZipFile(broken) as archive:
        names = archive.namelist()
    with zipfile.ZipFile(tmp_path / "hollow.pt2", "w") as archive:
        for name in names:
            text = zipfile.ZipFile(broken).read(name) if "extra" in name else b"{}"
            archive.writestr(name, text)
    with pytest.raises(WeightsError, match="does not load"):
        pyseg.load(tmp_path / "hollow.pt2")


# --- the command ------------------------------------------------------------------------------


def small(*, num_classes: int | None = None, weights: str | None = "default"):
    return made()


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command(tmp_path, photos, onnx):
    models.register("small_export")(small)
    try:
        result = run("export", "small_export", "--check", photos, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert "0 beyond ties" in result.output
        file = tmp_path / "out" / "small_export.onnx"
        assert f"wrote {file} and {file}.json" in result.output.replace("\n", "")
        result = run("export", "small_export", "--check", photos, "-o", tmp_path, "--json")
        assert json.loads(result.stdout)["model"] == "small_export"
    finally:
        models._registry._registered.pop("small_export")
    result = run("predict", photos, "--spec", file, "-o", tmp_path / "labels")
    assert result.exit_code == 0, result.output
    result = run("export", file, "--check", photos, "-o", tmp_path)
    assert result.exit_code == 2 and "is an exported file already" in result.output
    result = run("export", "streetnet+crf", "--check", photos, "-o", tmp_path)
    assert result.exit_code == 2 and "error: crf cannot leave pyseg" in result.output


@pytest.mark.slow
def test_streetnet_on_real_images(tmp_path, data_folder, onnx):
    folder = data_folder("camvid/val") / "images"
    written = export.export_model(pyseg.build("streetnet"), folder, tmp_path, limit=12)
    assert written.report["flips"]["beyond_ties"] == 0
    assert written.report["relative_delta"] < 1e-5
    pipeline = pyseg.build(f"onnx(path={str(written.file)!r})+crf")
    expected = pyseg.build("streetnet+crf")
    for path in sorted(Path(folder).iterdir())[:3]:
        assert (pipeline(path).labels != expected(path).labels).float().mean() < 1e-3


def test_an_exported_model_conforms_to_the_protocol(tmp_path, photos):
    file = export.export_model(made(), photos, tmp_path, format="torch-export").file
    assert isinstance(models.create("pt2", path=file), ExportedModel)
    assert isinstance(models.create("pt2", path=file), pyseg.types.Model)
