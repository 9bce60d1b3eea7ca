"""The studio over HTTP: who is let in, what is taken, and what programs get."""

import io
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import pyseg
from pyseg.cli import app as command
from pyseg.errors import PysegError
from pyseg.studio.desk import plain

from .conftest import CLASSES, TOKEN, Bright, expand, labels_on_disk, picture, pipeline

testclient = pytest.importorskip("fastapi.testclient")
from pyseg.studio.app import Limits, create_app, serve  # noqa: E402

ALLOWED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def make_client(make_desk):
    """``make_client(desk, **options)``: a client with the token."""
    opened = []

    def make(desk=None, **options):
        app = create_app(make_desk() if desk is None else desk, TOKEN, **options)
        client = testclient.TestClient(app, base_url="http://127.0.0.1", headers=ALLOWED)
        opened.append(client.__enter__())
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_importing_pyseg_and_its_command_line_imports_no_fastapi():
    code = "import sys, pyseg, pyseg.cli, pyseg.studio; assert not {'fastapi', 'uvicorn', "
    code += "'starlette', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_page_is_shown_without_the_token(make_client):
    client = make_client()
    schema = client.get("/openapi.json").json()
    routes = [(method, path) for path, found in schema["paths"].items() for method in found]
    assert len(routes) > 12
    for method, path in [*routes, ("get", "/openapi.json"), ("get", "/absent")]:
        address = re.sub(r"\{\w+\}", "0", path)
        for headers in (
            {"Authorization": ""},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "", "Cookie": f"token={TOKEN}"},
        ):
            answer = client.request(method, address, headers=headers, params={"token": TOKEN})
            assert answer.status_code == 401, (method, path)
            assert "token" in answer.json()["error"]
    for address in ("/", "/studio.js", "/studio.css"):
        answer = client.get(address, headers={"Authorization": ""})
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "access-control-allow-origin" not in answer.headers
    # Another site's script would have to ask first, and is told nothing.
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/segment", headers={**asked, "Authorization": ""})
    assert answer.status_code == 401 and "access-control-allow-origin" not in answer.headers


def test_the_page_loads_nothing_from_elsewhere():
    folder = Path(pyseg.__file__).parent / "studio" / "static"
    for path in folder.iterdir():
        text = path.read_text()
        assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    page = (folder / "index.html").read_text()
    assert not re.search(r"\son\w+=|style=|<style|<script>", page)
    script = (folder / "studio.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    named = set(re.findall(r"\$\(\"([\w-]+)\"\)", script))
    assert named <= set(re.findall(r'\bid="([\w-]+)"', page))


def test_a_name_that_leads_here_by_another_is_refused(make_client):
    client = make_client()
    for host in ("evil.example", "127.0.0.1.evil.example", "", "evil.example:8765"):
        assert client.get("/", headers={"Host": host}).status_code == 421
    for host in ("localhost", "localhost:8765", "[::1]:8765", "127.0.0.1"):
        assert client.get("/", headers={"Host": host}).status_code == 200


def test_no_path_leads_out(make_client):
    client = make_client()
    for path in (
        "/../app.py",
        "/static/../app.py",
        "/..%2fapp.py",
        "/%2e%2e/app.py",
        "//etc/passwd",
    ):
        assert client.get(path).status_code == 404
    for index in ("..", "%2e%2e%2f", "a", "0.5", "1e3"):
        assert client.get(f"/api/items/{index}").status_code in (404, 422)
    for index in (-1, 2, 10**30):
        assert client.get(f"/api/items/{index}").status_code == 404
    assert client.get("/api/items").json()["items"][0]["path"] == "a.png"  # without its folder


def test_too_much_is_refused_before_it_is_held(make_client):
    client = make_client(limits=Limits(upload=2000, text=500))
    for path, most in (("/segment", 2000), ("/api/items?name=a.png", 2000)):
        answer = client.post(path, content=b"x" * (most + 1))
        assert answer.status_code == 413 and str(most) in answer.json()["error"]
        taken = []

        def parts(taken=taken):
            for _ in range(1000):
                taken.append(1)
                yield b"x" * 100

        assert client.post(path, content=parts()).status_code == 413  # its length is not known
    answer = client.post("/api/items/0/step", content=b" " * 501)
    assert answer.status_code == 413
    for length in ("-1", "1e3", "9" * 40):
        answer = client.post("/segment", content=b"x", headers={"Content-Length": length})
        assert answer.status_code == 413


HOSTILE = {
    "text": b"hello",
    "nothing": b"",
    "half a PNG": png(picture())[:300],
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "bomb": png(np.zeros((1, 1), np.uint8)).replace(
        b"\0\0\0\1\0\0\0\1", b"\0\1\x86\xa0\0\1\x86\xa0", 1
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(make_client, kind):
    client = make_client()
    for method, path in (
        ("post", "/segment"),
        ("post", "/api/items?name=x.png"),
        ("put", "/api/items/0/map"),
    ):
        answer = client.request(method, path, content=HOSTILE[kind])
        assert answer.status_code == 422, answer.text
        said = answer.json()["error"]
        assert "/tmp" not in said and "Traceback" not in said and len(said) > 20
    assert len(client.get("/api/items").json()["items"]) == 2
    assert client.get("/api/items/0/state").json()["revision"] == 0


def test_a_page_gets_what_it_shows(make_client, make_desk, tmp_path):
    truth = tmp_path / "truth"
    truth.mkdir()
    labels = np.random.default_rng(0).integers(0, 3, (41, 57)).astype(np.uint8)
    labels[3] = 255
    Image.fromarray(labels).save(truth / "a.png")
    client = make_client(make_desk(spec="bright+forgetful", truth=truth))
    found = client.get("/api/studio").json()
    assert found["classes"] == list(CLASSES) and found["palette"][1] == [200, 0, 0]
    assert [item["name"] for item in found["items"]] == ["a", "b"]
    assert "streetnet" in found["models"] and "crf" in found["refiners"]
    view = client.get("/api/items/0").json()
    predicted = pipeline()(picture())
    assert view["size"] == [41, 57] and [s["doubt"] for s in view["stages"]] == [True, False]
    for stage in view["stages"]:
        assert np.array_equal(expand(stage["map"], (41, 57)), plain(predicted))
        assert stage["milliseconds"] > 0
    assert np.array_equal(
        expand(view["truth"], (41, 57)), np.where(labels == 255, -1, labels.astype(int))
    )
    metric = pyseg.metrics.create("semantic", classes=CLASSES)
    sample = pyseg.Sample(
        "a", torch.from_numpy(picture()).permute(2, 0, 1), torch.from_numpy(labels)
    )
    metric.update(predicted, sample)
    assert view["stages"][0]["scores"]["miou"] == pytest.approx(metric.compute()["miou"])
    assert view["scores"] == view["stages"][0]["scores"]
    picture_ = np.array(Image.open(io.BytesIO(client.get("/api/items/0/image").content)))
    assert np.abs(picture_.astype(int) - picture()).mean() < 6
    doubts = client.get("/api/items/0/doubt/0").content
    expected = ((1 - predicted.confidence()) * 255).round().byte().numpy()
    assert np.array_equal(np.frombuffer(doubts, np.uint8).reshape(41, 57), expected)
    assert client.get("/api/items/0/doubt/1").status_code == 422
    assert client.get("/api/items/0/doubt/2").status_code == 404


def test_steps(make_client, make_desk):
    desk = make_desk()
    client = make_client(desk)

    def step(code=200, **body):
        answer = client.post("/api/items/0/step", json=body)
        assert answer.status_code == code, answer.text
        return answer.json()

    start = expand(client.get("/api/items/0/state").json()["map"], (41, 57))
    asked = step(do="click", x=30, y=20, label="sky")
    mask = expand(asked["mask"], (41, 57)).astype(bool)
    assert mask[20, 30] and asked["asked"]["points"] == [[30, 20]] and asked["undo"]
    answer = client.post("/api/items/0/preview", json={"do": "click", "x": 3, "y": 3})
    assert expand(answer.json()["mask"], (41, 57))[3, 3] == 1
    accepted = step(do="accept")
    found = expand(accepted["map"], (41, 57))
    assert (found[mask] == 2).all() and np.array_equal(found[~mask], start[~mask])
    assert accepted["mask"] is None and accepted["saved"]
    assert np.array_equal(labels_on_disk(desk.output, "a"), found)
    painted = step(do="brush", points=[[3, 3], [9, 3]], radius=2, label="void")
    assert expand(painted["map"], (41, 57))[3, 5] == -1
    filled = step(do="fill", x=5, y=3, label=1)
    assert expand(filled["map"], (41, 57))[3, 5] == 1
    step(do="select", x=5, y=3)
    step(do="clear")
    boxed = step(do="box", x0=20, y0=3, x1=35, y1=30, label="road")
    assert boxed["asked"]["box"] == [20, 3, 35, 30]
    while (state := step(do="undo"))["undo"]:
        pass
    assert np.array_equal(expand(state["map"], (41, 57)), start)
    while (state := step(do="redo"))["redo"]:
        pass
    assert expand(state["map"], (41, 57))[3, 5] == 1
    assert (expand(step(do="start")["map"], (41, 57)) == -1).all()
    assert np.array_equal(expand(step(do="start", stage=0)["map"], (41, 57)), start)
    revision = state["revision"]
    answer = client.post(f"/api/items/0/step?revision={revision}", json={"do": "undo"})
    assert answer.status_code == 409
    answer = client.put("/api/items/0/map", content=png(np.full((41, 57), 1, np.uint8)))
    assert (expand(answer.json()["map"], (41, 57)) == 1).all()
    for code, body in (
        (422, {"do": "click", "x": 57, "y": 0}),
        (422, {"do": "click", "x": 1, "y": 1, "label": "cat"}),
        (422, {"do": "brush", "points": [], "radius": 1}),
        (422, {"do": "brush", "points": [[1, 1]] * 5000, "radius": 1}),
        (422, {"do": "brush", "points": [[1, 1]], "radius": -1}),
        (422, {"do": "explode"}),
        (422, {"do": "accept"}),
        (404, {"do": "start", "stage": 7}),
    ):
        assert step(code, **body)["error"]
    answer = client.post(
        "/api/items/0/step",
        content=b'{"do":"click","x":NaN,"y":1}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 422


def test_a_page_gets_the_objects(make_client, make_desk):
    client = make_client(make_desk(spec=pipeline("objects"), edit="instances"))
    assert client.get("/api/studio").json()["edit"] == "instances"
    view = client.get("/api/items/0").json()
    ids = expand(view["ids"], (41, 57))
    assert (ids[:, 19:42] == 0).all() and (ids[:, 42:] == 1).all() and (ids[:, :19] == -1).all()
    assert [one["label"] for one in view["objects"]] == [1, 2]
    assert view["objects"][0]["score"] == pytest.approx(0.9)
    assert [one["area"] for one in view["objects"]] == [41 * 23, 41 * 19]
    for k, one in enumerate(view["objects"]):
        x, y = one["at"]
        assert ids[y, x] == k
        answer = client.post("/api/items/0/step", json={"do": "select", "x": x, "y": y}).json()
        assert answer["asked"]["label"] == CLASSES[one["label"]]
    removed = client.post("/api/items/0/step", json={"do": "accept", "label": "void"}).json()
    assert [one["label"] for one in removed["objects"]] == [1]
    answer = client.post("/api/items/0/step", json={"do": "start"})
    assert answer.status_code == 422 and "edits instances" in answer.json()["error"]


def test_queue_settings_and_files(make_client, make_desk):
    desk = make_desk()
    client = make_client(desk)
    answer = client.post("/api/items?name=new.png", content=png(picture(9, 11)))
    assert answer.status_code == 201 and answer.json() == {"index": 2}
    assert client.post("/api/items/2/done", json={"on": True}).json()["done"]
    assert client.get("/api/items").json()["items"][2]["done"]
    assert labels_on_disk(desk.output, "new").shape == (9, 11)
    for to, kind in (
        ("indexed", "image/png"),
        ("coco", "application/json"),
        ("labelme", "application/json"),
    ):
        answer = client.get("/api/items/2/export", params={"to": to})
        assert answer.headers["content-type"] == kind and len(answer.content) > 50
    assert client.get("/api/items/2/export?to=psd").status_code == 422
    assert "equal" in client.post("/api/export", json={"to": "coco"}).json()["lines"][1]
    assert (desk.output / "coco.json").is_file()
    for spec, said in (
        ("streetnet+krf", "Did you mean 'crf'"),
        ("streetnet+crf(iterations=-1)", "iterations must be"),
        ("streetnet+", ""),
        ("streetnet", "holds maps of the classes"),
    ):
        answer = client.put("/api/studio", json={"spec": spec})
        assert answer.status_code == 422 and said in answer.json()["error"]
    answer = client.put("/api/studio", json={"spec": "bright+forgetful", "clicks": "nano"})
    assert (
        answer.json()["clicks"] == "nano" and len(client.get("/api/items/0").json()["stages"]) == 2
    )
    assert client.post("/api/survey", json={"on": True}).status_code == 200
    while client.get("/api/items").json()["surveying"]:
        time.sleep(0.01)
    items = client.get("/api/items").json()["items"]
    assert [item["unsure"] is not None for item in items] == [True, True, False]


def test_programs_get_what_the_pipeline_says(make_client):
    client = make_client()
    content = png(picture())
    expected = pipeline()(picture())
    answer = client.post("/segment", content=content)
    found = Image.open(io.BytesIO(answer.content))
    assert found.mode == "P" and np.array_equal(np.array(found), expected.labels.numpy())
    assert float(answer.headers["x-milliseconds"]) >= 0
    answer = client.post("/segment?to=json", content=content).json()
    assert answer["classes"] == list(CLASSES)
    assert np.array_equal(expand(answer, answer["size"]), plain(expected))


class Slow(Bright):
    def __init__(self):
        self.go, self.begun, self.sizes = threading.Event(), threading.Event(), []

    def predict(self, images):
        self.begun.set()
        assert self.go.wait(30)
        self.sizes.append(len(images))
        return super().predict(images)


def test_what_cannot_be_taken_is_refused_and_what_takes_too_long_ends(make_client, make_desk):
    model = Slow()
    limits = Limits(waiting=2, seconds=2.0)  # the six come within that, also on a busy machine
    client = make_client(make_desk(spec=pyseg.Pipeline([model])), limits=limits)
    with ThreadPoolExecutor(8) as pool:
        content = png(picture(8, 8))
        first = pool.submit(client.post, "/segment", content=content)
        assert model.begun.wait(10)
        others = [pool.submit(client.post, "/segment", content=content) for _ in range(6)]
        codes = sorted(one.result().status_code for one in others)
        assert codes == [503] * 4 + [504] * 2 and first.result().status_code == 504
        refused = next(one.result() for one in others if one.result().status_code == 503)
        assert refused.headers["retry-after"] == "1" and "wait already" in refused.json()["error"]
        model.go.set()
        assert client.post("/segment", content=content).status_code == 200


def test_fifty_clients_at_a_time(make_client):
    """No error, and each gets the answer to its own question."""
    client = make_client()
    images = [picture(20 + k % 7, 30 + k % 5, seed=k) for k in range(50)]

    def ask(image):
        return client.post("/segment", content=png(image))

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, images))
    for image, answer in zip(images, answers, strict=True):
        assert answer.status_code == 200
        found = np.array(Image.open(io.BytesIO(answer.content)))
        assert np.array_equal(found, pipeline()(image).labels.numpy())


def test_a_host_that_others_reach_needs_a_token(make_desk):
    desk = make_desk()
    with pytest.raises(PysegError, match="lets other machines in: give a token"):
        serve(desk, host="0.0.0.0", port=0, browser=False)
    with pytest.raises(ValueError, match="at least 16 characters, got 5"):
        serve(desk, host="0.0.0.0", port=0, token="short", browser=False)


def test_the_command(photos, tmp_path):
    """As installed, up to the first answer; then again on what the first one has."""
    out = tmp_path / "out"
    call = [sys.executable, "-m", "pyseg", "studio", str(photos), "--spec", "streetnet", "-o"]
    call += [str(out), "--port", "0", "--no-browser", "--clicks", "flood"]
    import httpx

    for points in (0, 1):
        process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
        try:
            address, _, token = process.stdout.readline().strip().partition("/#token=")
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address) and len(token) >= 32
            with httpx.Client(
                base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60
            ) as client:
                answer = client.get("/api/items/0/state")
                asked = answer.json()["asked"]
                assert client.get("/studio.js").headers["content-encoding"] == "gzip"
                assert len([] if asked is None else asked["points"]) == points
                step = {"do": "click", "x": 5, "y": 5, "label": "Car"}
                assert client.post("/api/items/0/step", json=step).status_code == 200
        finally:
            process.kill()
            process.wait()
    result = CliRunner().invoke(
        command, ["studio", str(tmp_path / "absent"), "-o", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 2 and "does not exist" in result.output


def test_a_missing_extra_is_named(monkeypatch, photos):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(command, ["studio", str(photos)])
    assert result.exit_code == 2 and "pip install 'pyseg-toolkit[studio]'" in result.output
