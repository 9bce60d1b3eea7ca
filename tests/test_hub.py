"""Hub habits: folders with a card, repositories, and what is said when one is out of reach."""

import inspect
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pyseg
from pyseg import cli, evaluation, hub, models, report
from pyseg.datasets.synthetic import StreetScenes
from pyseg.errors import HubError, PysegError

SPEC = "hub_small+temperature(value=2.0)"


def hub_small(*, num_classes: int | None = None, weights: str | None = "default"):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, num_classes or 2, 1))
    return models.SemanticModel(network, ("a|b", "straße")[:num_classes], ((1, 2, 3), (255, 0, 16)))


@pytest.fixture(autouse=True)
def registered():
    models.register("hub_small")(hub_small)
    yield
    models._registry._registered.pop("hub_small")


@pytest.fixture
def client():
    return pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A report.json of a real evaluation, and that evaluation."""
    folder = tmp_path_factory.mktemp("report")
    data = StreetScenes(length=2, size=(48, 64))
    pipeline = pyseg.build("streetnet", num_classes=len(data.classes), weights=None)
    result = evaluation.evaluate(pipeline, data, metrics=["semantic", "boundary"])
    return report.write_page(folder, result, title="synthetic, val")[0], result, pipeline


def image():
    return torch.randint(256, (3, 20, 31), dtype=torch.uint8)


# --- cards ------------------------------------------------------------------------------------


def test_the_hub_reads_the_card(measured, client):
    """By the Hub's own parser, against the numbers of the evaluation itself."""
    path, result, pipeline = measured
    card = client.ModelCard(pipeline.card(repo_id="me/streets", scores=path, licence="mit"))
    assert card.data.library_name == "pyseg" and card.data.license == "mit"
    assert card.data.model_name == "streets"
    scores = result.stages[-1].metrics
    found = {entry.metric_name: entry for entry in card.data.eval_results}
    assert found["semantic miou"].metric_value == scores["semantic"]["miou"]
    assert found["semantic miou"].metric_type == "miou"
    assert found["semantic miou"].dataset_name == "synthetic, val"
    assert {name.split()[0] for name in found} == {"semantic", "boundary"}
    assert f"| {scores['semantic']['miou']:.4f} |" in card.text
    name, entry = next(iter(scores["semantic"]["per_class"].items()))
    assert f"| {name} | {entry['iou']:.4f} |" in card.text
    assert 'pyseg.from_pretrained("me/streets")' in card.text.replace("'", '"')
    assert f"torch {torch.__version__}" in card.text


def test_a_card_invents_nothing(client):
    text = pyseg.build(SPEC, weights=None).card()
    card = client.ModelCard(text)
    assert card.data.eval_results is None and card.data.license is None
    assert "Nothing was measured of it." in text and "Not stated" in text
    assert "| 0 | a\\|b | #010203 |" in text and "| 1 | straße | #ff0010 |" in text
    assert text.startswith("---\n") and f"# {SPEC}\n" in text
    own = client.ModelCard(pyseg.build("streetnet").card())
    assert own.data.license == "other" and "research and demonstration only" in own.text
    published = pyseg.build("segnet", weights=None).card()
    assert "60.1" in published and "not measured here" in published


def test_scores_of_another_pipeline_are_refused(measured, tmp_path):
    path, _, pipeline = measured
    with pytest.raises(PysegError, match=r"was measured with .*streetnet"):
        pyseg.build(SPEC, weights=None).card(scores=path)
    content = json.loads(path.read_text())
    (tmp_path / "list.json").write_text(json.dumps(content["stages"]))
    with pytest.raises(PysegError, match=r"give the report.json of `pyseg evaluate --report`"):
        pipeline.card(scores=tmp_path / "list.json")
    with pytest.raises(PysegError, match="does not exist"):
        pipeline.card(scores=tmp_path / "no.json")


def test_the_command_card(tmp_path):
    result = CliRunner().invoke(cli.app, ["card", SPEC, "--name", "mine", "--licence", "a text"])
    assert result.exit_code == 0 and "# mine\n" in result.stdout, result.output
    assert "license: other" in result.stdout and "a text." in result.stdout
    file = tmp_path / "README.md"
    result = CliRunner().invoke(cli.app, ["card", SPEC, "-o", str(file)])
    assert result.exit_code == 0 and f"# {SPEC}\n" in file.read_text()


# --- folders and repositories -----------------------------------------------------------------


def test_a_folder_comes_back_the_same(tmp_path, client):
    pipeline = pyseg.build(SPEC, weights=None)
    with torch.no_grad():
        pipeline.model.network[1].bias.add_(3)
    folder = pipeline.save_pretrained(tmp_path / "mine", licence="apache-2.0")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("0_hub_small.safetensors", "README.md", "pipeline.json"),
    ]
    assert client.ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    picture = image()
    for loaded in (pyseg.from_pretrained(folder), pyseg.load(folder)):
        assert str(loaded) == SPEC
        assert torch.equal(loaded(picture).logits, pipeline(picture).logits)
    pipeline.save_pretrained(folder)  # again, over it
    with pytest.raises(ValueError, match="options of push_to_hub=True"):
        pipeline.save_pretrained(folder, private=True)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


class Api:
    """What a push asks of the Hub's client, recorded."""

    def __init__(self):
        self.calls = []
        self.files = {}

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options.pop("repo_id"), options))
        for name in os.listdir(folder_path):
            with open(os.path.join(folder_path, name), "rb") as file:
                self.files[name] = file.read()
        return SimpleNamespace(commit_url="https://hub/me/mine/commit/1")


def test_pushing_sends_a_folder_that_loads(tmp_path):
    pipeline, api = pyseg.build(SPEC, weights=None), Api()
    url = pipeline.push_to_hub("mine", private=True, commit_message="one", branch="b", api=api)
    assert url == "https://hub/me/mine/commit/1"
    create, branch, sent = api.calls
    assert create == ("create_repo", "mine", {"private": True, "exist_ok": True})
    assert branch == ("create_branch", "me/mine", {"branch": "b", "exist_ok": True})
    assert sent[1] == "me/mine"
    assert sent[2] == {
        "commit_message": "one",
        "revision": "b",
        "create_pr": None,
        "allow_patterns": ["pipeline.json", "*.safetensors", "README.md"],
        "delete_patterns": ["*.safetensors"],
    }
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    assert str(pyseg.from_pretrained(tmp_path)) == SPEC
    assert b"# mine" in api.files["README.md"]

    other = Api()
    pipeline.save_pretrained(tmp_path / "kept", repo_id="me/x", push_to_hub=True, api=other)
    assert [call[0] for call in other.calls] == ["create_repo", "upload_folder"]
    assert (tmp_path / "kept" / "pipeline.json").is_file()


def test_the_hubs_client_takes_what_we_give(client):
    """The fake above would take anything."""
    for name, options in (
        ("create_repo", {"repo_id": "a/b", "private": None, "exist_ok": True}),
        ("create_branch", {"repo_id": "a/b", "branch": "b", "exist_ok": True}),
        (
            "upload_folder",
            {
                **dict.fromkeys(("repo_id", "folder_path", "commit_message"), "x"),
                **dict.fromkeys(("revision", "create_pr", "allow_patterns", "delete_patterns")),
            },
        ),
    ):
        inspect.signature(getattr(client.HfApi, name)).bind(None, **options)


def test_a_repository_in_the_cache_needs_no_network(tmp_path, client, monkeypatch):
    """The Hub's own cache, laid out as its client does it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--me--mine"
    pyseg.build(SPEC, weights=None).save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setenv("PYSEG_OFFLINE", "1")
    assert str(pyseg.from_pretrained("me/mine", cache_dir=tmp_path)) == SPEC
    with pytest.raises(HubError, match="'me/other' is not in the Hub's cache and no network was"):
        pyseg.from_pretrained("me/other", cache_dir=tmp_path)
    with pytest.raises(HubError, match="at revision 'v2' is not in the Hub's cache"):
        pyseg.from_pretrained("me/mine", revision="v2", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "no such folder", "../up", "x" * 300])
def test_what_is_no_repository(name, client):
    with pytest.raises(HubError, match="neither a folder nor the name of a repository"):
        pyseg.from_pretrained(name)


def test_without_a_network_the_remedy_is_said(tmp_path, client):
    """A real connection, refused: to a port that nobody listens at."""
    code = (
        "import pyseg\n"
        "try:\n    pyseg.from_pretrained('me/mine')\n"
        "except pyseg.errors.HubError as error:\n    print(error)\n"
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "'me/mine' is not in the Hub's cache and the Hub cannot be reached" in done.stdout
    assert "give the folder" in done.stdout


def test_the_hubs_answers_in_our_words(client):
    response = SimpleNamespace(status_code=500, headers={}, request=None, url="x", text="")
    for kind, match in (
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "you have no access"),
        ("RevisionNotFoundError", "no such branch"),
        ("HfHubHTTPError", "the Hub refuses .*status 500"),
    ):
        error = getattr(client.errors, kind)("https://secret?token=1", response=response)
        told = hub._explained(error, "me/mine", None, offline=False)
        assert isinstance(told, HubError)
        assert re.search(match, str(told)), str(told)
        assert "secret" not in str(told)


def test_the_extra_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pyseg-toolkit\[hub\]'"):
        pyseg.from_pretrained("me/mine")
    with pytest.raises(ImportError, match=r"pip install 'pyseg-toolkit\[hub\]'"):
        pyseg.build(SPEC, weights=None).push_to_hub("me/mine")
