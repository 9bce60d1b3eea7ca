"""pyseg.weights against real files and a real HTTP server on this machine."""

import argparse
import base64
import hashlib
import http.server
import os
import pickle
import sys
import threading
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pyseg import weights
from pyseg.errors import WeightsError
from pyseg.weights import Remote


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(network().state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYSEG_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def server():
    """Serves ``state.body`` and logs Range headers; the other fields of ``state`` set its ways.

    ``ranges``, ``cut`` (bytes), ``headers`` (of the answer, None = left out), ``target`` (of a
    redirection of /moved/…); ``logins`` has the Authorization of every request.
    """
    state = SimpleNamespace(
        body=b"", ranges=True, cut=None, log=[], headers={}, target="", logins=[]
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.log.append(wanted)
            state.logins.append(self.headers.get("Authorization"))
            if self.path.startswith("/moved/"):
                self.send_response(302)
                self.send_header("Location", state.target)
                self.end_headers()
                return
            if self.path.endswith("absent.pth"):
                self.send_error(404)
                return
            begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if wanted and state.ranges:
                if begin >= len(state.body):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {begin}-{len(state.body) - 1}/{len(state.body)}"
                )
            else:
                begin = 0
                self.send_response(200)
            rest = state.body[begin:]
            for key, value in {"Content-Length": str(len(rest)), **state.headers}.items():
                if value is not None:
                    self.send_header(key, value)
            self.end_headers()
            if state.cut is not None:
                rest, state.cut = rest[: state.cut], None
            self.wfile.write(rest)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{running.server_port}"
        yield state
        running.shutdown()
        thread.join()


def left_overs(cache):
    return [path.name for path in cache.rglob("*.part")]


# --- finding ----------------------------------------------------------------------------------


def test_a_path_is_itself(checkpoint):
    assert weights.resolve(checkpoint) == checkpoint
    assert weights.resolve(str(checkpoint)) == checkpoint
    assert weights.resolve(checkpoint.as_uri()) == checkpoint


def test_a_name_that_is_unknown_shows_the_nearest_and_all(tmp_path):
    known = {"vit_b": Remote("http://x/b.pth"), "vit_h": Remote("http://x/h.pth")}
    with pytest.raises(WeightsError, match=r"'vit_g' .*did you mean 'vit_.'.*vit_b, vit_h"):
        weights.resolve("vit_g", known=known)
    with pytest.raises(WeightsError, match="is a directory"):
        weights.resolve(tmp_path)
    with pytest.raises(WeightsError, match="cannot fetch ftp://"):
        weights.resolve("ftp://host/net.pth")
    with pytest.raises(WeightsError, match="there is no file"):
        weights.resolve("file:///nowhere/net.pth")
    with pytest.raises(WeightsError, match="names no file"):
        weights.resolve("http://127.0.0.1:9/")


def test_a_known_file_url_is_verified_in_place(checkpoint):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    good = {"net": Remote(checkpoint.as_uri(), digest)}
    assert weights.resolve("net", known=good) == checkpoint
    with pytest.raises(WeightsError, match=f"has sha256 {digest} instead of 00ff00ff"):
        weights.resolve("net", known={"net": Remote(checkpoint.as_uri(), "00ff00ff")})


def test_offline_names_the_url_and_the_target(monkeypatch, cache):
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    known = {"net": Remote("https://host.invalid/a/net.pth", "00" * 32)}
    with pytest.raises(WeightsError, match="PYSEG_OFFLINE") as caught:
        weights.resolve("net", known=known)
    target = cache / "host.invalid" / "a" / "net.pth"
    assert "https://host.invalid/a/net.pth" in str(caught.value)
    assert str(target) in str(caught.value)
    assert not cache.exists()
    target.parent.mkdir(parents=True)  # put there by hand, as the message says
    target.write_bytes(b"halved")
    with pytest.raises(WeightsError, match="delete it"):
        weights.resolve("net", known=known)
    assert weights.resolve("net", known={"net": Remote(known["net"].url)}) == target


def test_urls_of_one_file_name_do_not_meet_in_the_cache():
    urls = [
        "http://a/1/net.pth",
        "http://a/2/net.pth",
        "http://b/1/net.pth",
        "http://a:8/1/net.pth",
    ]
    urls += ["http://a/1/net.pth?v=1", "http://a/1/net.pth?v=2"]
    assert len({weights.cached_path(Remote(url)) for url in urls}) == len(urls)
    with pytest.raises(WeightsError):
        weights.cached_path(Remote("http://a/%2e%2e/%2e%2e/net.pth"))


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("PYSEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.cache_directory() == tmp_path / "pyseg"


# --- downloading ------------------------------------------------------------------------------


def test_download_then_cache(server, checkpoint, cache):
    server.body = checkpoint.read_bytes()
    known = {"net": Remote(f"{server.url}/d/net.pth", hashlib.sha256(server.body).hexdigest())}
    path = weights.resolve("net", known=known)
    assert path.read_bytes() == server.body and cache in path.parents
    assert weights.resolve("net", known=known) == path
    assert weights.resolve(f"{server.url}/d/net.pth") == path  # the URL itself is as good
    assert server.log == [None]
    assert left_overs(cache) == []


def test_a_digest_may_be_a_prefix(server, checkpoint):
    server.body = checkpoint.read_bytes()
    digest = hashlib.sha256(server.body).hexdigest()
    remote = Remote(f"{server.url}/net.pth", digest[:8])
    assert weights.resolve("net", known={"net": remote}).is_file()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, checkpoint, cache, ranges):
    server.body, server.ranges, server.cut = checkpoint.read_bytes(), ranges, 1000
    known = {"net": Remote(f"{server.url}/net.pth", hashlib.sha256(server.body).hexdigest())}
    with pytest.raises(WeightsError, match="after 1000 of"):
        weights.resolve("net", known=known)
    assert not weights.cached_path(known["net"]).exists()
    assert left_overs(cache) == ["net.pth.part"]
    assert weights.resolve("net", known=known).read_bytes() == server.body
    assert server.log == [None, "bytes=1000-"]
    assert left_overs(cache) == []


@pytest.mark.parametrize("stale", [b"from another file", b"x" * 100_000])
def test_a_stale_part_is_replaced(server, checkpoint, cache, stale):
    server.body = checkpoint.read_bytes()
    known = {"net": Remote(f"{server.url}/net.pth", hashlib.sha256(server.body).hexdigest())}
    part = weights.cached_path(known["net"]).with_name("net.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(stale)
    assert weights.resolve("net", known=known).read_bytes() == server.body
    assert server.log == [f"bytes={len(stale)}-", None]


def test_without_a_digest_nothing_is_resumed(server, checkpoint):
    server.body = checkpoint.read_bytes()
    url = f"{server.url}/net.pth"
    part = weights.cached_path(Remote(url)).with_name("net.pth.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(server.body[:500])
    assert weights.resolve(url).read_bytes() == server.body
    assert server.log == [None]


def test_a_wrong_digest_keeps_nothing(server, checkpoint, cache):
    server.body = checkpoint.read_bytes()
    digest = hashlib.sha256(server.body).hexdigest()
    remote = Remote(f"{server.url}/net.pth", "ab" * 32)
    with pytest.raises(WeightsError, match=f"{digest} instead of {'ab' * 32}"):
        weights.resolve("net", known={"net": remote})
    assert left_overs(cache) == [] and not weights.cached_path(remote).exists()


@pytest.mark.parametrize("sha256", [None, "ab" * 32])
def test_an_html_page_is_called_one(server, cache, sha256):
    server.body = b"\n<!DOCTYPE html><html>Sign in</html>"
    remote = Remote(f"{server.url}/net.pth", sha256)
    with pytest.raises(WeightsError, match="HTML"):
        weights.resolve("net", known={"net": remote})
    assert left_overs(cache) == [] and not weights.cached_path(remote).exists()


def test_an_absent_file_and_a_dead_server(server):
    with pytest.raises(WeightsError, match="404") as caught:
        weights.resolve(f"{server.url}/absent.pth")
    assert str(weights.cached_path(Remote(f"{server.url}/absent.pth"))) in str(caught.value)
    with pytest.raises(WeightsError, match="could not be downloaded"):
        weights.resolve("http://127.0.0.1:9/net.pth")


def test_two_at_once_download_once(server, checkpoint):
    server.body = checkpoint.read_bytes()
    known = {"net": Remote(f"{server.url}/net.pth", hashlib.sha256(server.body).hexdigest())}
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(weights.resolve("net", known=known)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and server.log == [None]


@pytest.mark.parametrize("slow", [True, False])
def test_a_progress_bar_for_slow_downloads_only(server, checkpoint, monkeypatch, capsys, slow):
    server.body = checkpoint.read_bytes()
    monkeypatch.setattr(weights, "_PROGRESS_AFTER", -1 if slow else 60)
    weights.resolve(f"{server.url}/net.pth")
    assert ("net.pth" in capsys.readouterr().err) == slow


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_half_a_file_of_unknown_length_is_not_kept(server, checkpoint, cache, tmp_path, kind):
    """A connection that ends early cannot be told from one that ends, but for what came."""
    if kind == "safetensors":
        checkpoint = weights.save_state(tmp_path / "net.safetensors", network().state_dict())
    server.body, server.headers = checkpoint.read_bytes(), {"Content-Length": None}
    url = f"{server.url}/net.bin"
    server.cut = len(server.body) - 30
    with pytest.raises(WeightsError, match=r"truncated.*nothing was kept"):
        weights.resolve(url)
    assert not weights.cached_path(Remote(url)).exists() and left_overs(cache) == []
    assert weights.resolve(url).read_bytes() == server.body
    server.body = b"GIF89a is no checkpoint"
    with pytest.raises(WeightsError, match=r"neither a torch\.save file nor safetensors"):
        weights.resolve(f"{server.url}/picture.gif")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Encoding": "gzip"}, "packed by gzip"),
        ({"Content-Length": "abc"}, "'abc' as the length"),
        ({"Content-Length": "5000"}, "5000 bytes are more than the 1000"),
        ({"Content-Length": None}, "not ended after 1000 bytes"),
    ],
)
def test_odd_answers(server, checkpoint, cache, monkeypatch, headers, words):
    monkeypatch.setattr(weights, "_LARGEST", 1000)
    server.body, server.headers = checkpoint.read_bytes(), headers
    with pytest.raises(WeightsError, match=words):
        weights.resolve(f"{server.url}/net.pth")
    assert not weights.cached_path(Remote(f"{server.url}/net.pth")).exists()
    assert left_overs(cache) == []


def test_a_server_that_drips_is_left(server, checkpoint, monkeypatch):
    monkeypatch.setattr(weights, "_PATIENCE", 0)
    monkeypatch.setattr(weights, "_SLOWEST", 1 << 50)
    server.body = checkpoint.read_bytes()
    with pytest.raises(WeightsError, match="are too slow"):
        weights.resolve(f"{server.url}/net.pth")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/net.pth",
        "http://127.0.0.1:port/net.pth",
        "http://127.0.0.1:9/n\u00e9t.pth",
        "http://127.0.0.1:9/net%00.pth",
        "http://\u00e9\u2100/net.pth",
        "http://127.0.0.1:9/a b.pth",
    ],
)
def test_odd_urls(url):
    with pytest.raises(WeightsError):
        weights.resolve(url)


def test_a_redirection_to_nonsense(server):
    server.target = "http://[::1"
    with pytest.raises(WeightsError, match="could not be downloaded"):
        weights.resolve(f"{server.url}/moved/net.pth")


def test_a_login_is_sent_to_its_server_and_never_shown(server, checkpoint):
    server.body = checkpoint.read_bytes()
    host = server.url.removeprefix("http://")
    assert weights.resolve(f"HTTP://me:se%40cret@{host}/net.pth").is_file()
    server.target = f"{server.url}/other.pth"
    weights.resolve(f"http://me:se%40cret@{host}/moved/net.pth")
    login = "Basic " + base64.b64encode(b"me:se@cret").decode()
    assert server.logins == [login, login, None]
    for name in ("absent.pth", ""):
        with pytest.raises(WeightsError) as caught:
            weights.resolve(f"http://me:se%40cret@{host}/{name}")
        assert "cret" not in str(caught.value) and host in str(caught.value)
    with pytest.raises(WeightsError) as caught:
        weights.resolve("ftp://me:secret@host/net.pth")
    assert "secret" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_network(
    server, checkpoint, tmp_path, monkeypatch
):
    server.body = checkpoint.read_bytes()
    known = {"net": Remote(f"{server.url}/net.pth", hashlib.sha256(server.body).hexdigest())}
    part = weights.cached_path(known["net"]).with_name("net.pth.part")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(WeightsError, match=r"cache .* cannot be written .*No space left") as caught:
        weights.resolve("net", known=known)
    assert "PYSEG_CACHE" in str(caught.value) and not part.is_symlink()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PYSEG_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"cache .*file cannot be written .*Not a directory"):
        weights.resolve("net", known=known)
    assert server.log == [None]  # the network was not even asked


def test_names_that_cannot_be_files(tmp_path):
    for name in ("x" * 300, "~nosuchuser/net.pth", "a\0b"):
        with pytest.raises(WeightsError, match=r"cannot be a file|neither a file"):
            weights.resolve(name)
    with pytest.raises(WeightsError) as caught:
        weights.resolve("y/" * 50_000)
    assert len(str(caught.value)) < 500
    with pytest.raises(WeightsError, match=r"another computer, 'host'.*three slashes"):
        weights.resolve("file://host/net.pth")


# --- loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_load_what_torch_saves(tmp_path, key, zipped):
    state = network().state_dict()
    path = tmp_path / "net.pth"
    torch.save(
        {key: state, "epoch": 3} if key else state, path, _use_new_zipfile_serialization=zipped
    )
    loaded = weights.load_state(path)
    assert loaded.keys() == state.keys()
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    weights.load_into(other, loaded, path)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_load_safetensors_whatever_the_name(tmp_path):
    from safetensors.torch import save_file

    state = network().state_dict()
    path = tmp_path / "net.bin"
    save_file(state, path)
    assert all(torch.equal(value, state[k]) for k, value in weights.load_state(path).items())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match=r"net\.bin is truncated or damaged"):
        weights.load_state(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_truncated_file(tmp_path, zipped, share):
    path = tmp_path / "net.pth"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match=r"net\.pth is truncated.*fetch it again"):
        weights.load_state(path)


@pytest.mark.parametrize("content", [b"PK and then nothing", b"", b"<html>Sign in</html>"])
def test_a_damaged_file_of_the_cache_is_to_be_deleted(cache, content):
    path = cache / "host" / "net.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="delete it, and it is fetched again"):
        weights.load_state(path)


def test_a_file_that_unpacks_to_a_thousand_times_its_size(tmp_path, monkeypatch):
    path, packed = tmp_path / "net.pth", tmp_path / "packed.pth"
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    with (
        zipfile.ZipFile(path) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    assert packed.stat().st_size < path.stat().st_size / 100
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it is not unpacked"))
    with pytest.raises(WeightsError, match=r"packed\.pth has \d+ bytes and would unpack to \d{7}"):
        weights.load_state(packed)


class Explosive:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_with_code_does_not_run(tmp_path, plain):
    bomb = Explosive()
    bomb.path = str(tmp_path / "exploded")
    path = tmp_path / "net.pth"
    if plain:
        path.write_bytes(pickle.dumps({"model": bomb}))
    else:
        torch.save({"model": bomb}, path)
    with pytest.raises(WeightsError, match=r"net\.pth .*would run code") as caught:
        weights.load_state(path)
    assert plain or "(posix.mkdir)" in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice is to run it all the same
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<html><body>404</body></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"GIF89a and so on", "neither a torch.save file nor safetensors"),
    ],
)
def test_files_that_are_not_weights(tmp_path, content, words):
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        weights.load_state(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"epoch": 3}}, {}, torch.zeros(3)])
def test_a_file_without_a_state_dict(tmp_path, content):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="holds no state dict"):
        weights.load_state(path)
    with pytest.raises(WeightsError, match="there is no file"):
        weights.load_state(tmp_path / "absent.pth")


def test_another_architecture_changes_nothing(tmp_path):
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value + 1 for name, value in network(width=9).state_dict().items()}
    state["2.weight"] = state.pop("1.bias")
    with pytest.raises(WeightsError) as caught:
        weights.load_into(module, state, tmp_path / "net.pth")
    text = str(caught.value)
    assert "net.pth is of another architecture than Sequential" in text
    assert "1 missing (1.bias)" in text and "1 unexpected (2.weight)" in text
    assert "0.weight: [9, 4] instead of [8, 4]" in text
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_half_precision_weights_fill_a_float_model():
    module = network()
    state = {name: value.half() for name, value in network().state_dict().items()}
    weights.load_into(module, state, "net.pth")
    assert module[0].weight.dtype == torch.float32
    torch.testing.assert_close(module[0].weight, state["0.weight"].float())


def test_importing_is_light():
    import subprocess

    code = "import sys, pyseg.weights; print('rich' in sys.modules, 'torchvision' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_numbers_of_another_kind_are_refused(dtype):
    module = torch.nn.Linear(2, 3)
    state = {key: value.to(dtype) for key, value in module.state_dict().items()}
    with pytest.raises(
        WeightsError, match=f"of another kind of number .*{dtype}".replace("torch.", "")
    ):
        weights.load_into(module, state, "net.pth")
    weights.load_into(module, {key: value.half() for key, value in module.state_dict().items()}, "")


def test_a_commands_arguments_beside_the_weights_do_no_harm(tmp_path):
    """torchvision's reference scripts save their argparse.Namespace in every checkpoint."""
    path = tmp_path / "model_0.pth"
    state = {"a": torch.arange(3.0)}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, data="here"), "epoch": 1}, path)
    before = set(torch.serialization.get_safe_globals())
    assert torch.equal(weights.load_state(path)["a"], state["a"])
    assert set(torch.serialization.get_safe_globals()) == before  # for others nothing has changed
