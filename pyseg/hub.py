"""Pipelines on the Hugging Face Hub: folders of `Pipeline.save` fetched and sent, and their cards.

The habits are those of ``huggingface_hub.ModelHubMixin``; what a repository holds is what
`Pipeline.save` writes, safetensors and JSON, and a card made of measured numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import HubError, PysegError, require
from .files import read_json

CARD = "README.md"
FILES = ("pipeline.json", "*.safetensors", CARD)  # nothing else of a repository is fetched or sent
# What `pyseg evaluate --report` writes, as far as cards read it.
REPORT = {
    "title": str,
    "spec": str,
    "images": int,
    "made": dict,
    "stages": [{"stage": str, "spec": str, "milliseconds": float, "metrics": dict}],
}


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of a repository's pipeline, fetched into the Hub's cache where necessary.

    Args:
        repo_id: ``"owner/name"``.
        revision: branch, tag or commit; None = the main branch.
        token: of the Hub; None = the one that `hf auth login` stored.
        cache_dir: None = the Hub's own.
        force_download: fetch again what is there.
        local_files_only: ask no network; so too where ``PYSEG_OFFLINE`` is set.

    Raises:
        HubError: no such repository or revision, no access, or no network.
        ImportError: huggingface_hub is not installed (extra ``hub``).
    """
    hub: Any = require("huggingface_hub", extra="hub")
    offline = local_files_only or os.environ.get("PYSEG_OFFLINE", "").lower() not in (
        *("", "0", "false", "no"),
    )
    try:
        folder = hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=offline,
            allow_patterns=list(FILES),
            library_name="pyseg",
        )
    except Exception as error:  # of the Hub's client and of what it sends requests by
        raise _explained(error, repo_id, revision, offline) from error
    return Path(folder)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Push model using pyseg.",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    api: Any = None,
) -> str:
    """Sends a folder of `Pipeline.save_pretrained`, as one commit; makes the repository if need be.

    Args:
        folder: files in it that are no part of a pipeline stay.
        repo_id: ``"owner/name"``, or a name alone of your own.
        commit_message: of the commit.
        private: of a repository that is made; None = as your account has it.
        token: of the Hub; None = the one that `hf auth login` stored.
        branch: made if absent; None = the main branch.
        create_pr: open a pull request with the commit.
        api: a ``huggingface_hub.HfApi``; None = one of ``token``.

    Returns:
        The URL of the commit.

    Raises:
        HubError: no access, or no network.
        ImportError: huggingface_hub is not installed (extra ``hub``).
    """
    if api is None:
        hub: Any = require("huggingface_hub", extra="hub")
        api = hub.HfApi(token=token, library_name="pyseg")
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(made.repo_id, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=str(folder),
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            allow_patterns=list(FILES),
            delete_patterns=["*.safetensors"],  # of stages that the pipeline no longer has
        )
    except Exception as error:  # of the Hub's client and of what it sends requests by
        raise _explained(error, repo_id, branch, offline=False) from error
    return str(commit.commit_url)


def _explained(error: Exception, repo_id: str, revision: str | None, offline: bool) -> HubError:
    """A client's error in our words; its own text may hold a signed URL."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    asked = repr(repo_id) + (f" at revision {revision!r}" if revision else "")
    advice = (
        "fetch it where there is a network (`hf download`) and give the folder, or set "
        "HF_HUB_CACHE to a cache that has it"
    )
    if "HFValidationError" in kinds:
        return HubError(
            f"{repo_id[:100]!r} is neither a folder nor the name of a repository, owner/name"
        )
    if "GatedRepoError" in kinds:
        return HubError(f"{asked} is gated: ask for access on its page, then `hf auth login`")
    if "RevisionNotFoundError" in kinds:
        return HubError(f"{asked} does not exist: the repository has no such branch, tag or commit")
    if "RepositoryNotFoundError" in kinds or status in (401, 403):
        return HubError(
            f"{asked} does not exist, or you have no access: check the name, or `hf auth login`"
        )
    if offline or "LocalEntryNotFoundError" in kinds:
        why = "no network was to be asked" if offline else "the Hub cannot be reached"
        return HubError(f"{asked} is not in the Hub's cache and {why}: {advice}")
    if kinds & {"ConnectionError", "ConnectError", "TimeoutException", "TransportError"}:
        return HubError(f"{asked}: the Hub cannot be reached ({type(error).__name__}): {advice}")
    shown = f"status {status}" if status else re.sub(r"https?://\S+", "…", str(error))[:200]
    return HubError(f"{asked}: the Hub refuses ({type(error).__name__}, {shown})")


# --- cards ------------------------------------------------------------------------------------


def read_scores(path: str | Path, spec: str) -> dict[str, Any]:
    """The numbers of a ``report.json`` of `pyseg evaluate --report`.

    Raises:
        PysegError: it is none, or of another pipeline than ``spec``.
    """

    def refuse(reason: str) -> PysegError:
        return PysegError(f"scores: {reason}: give the report.json of `pyseg evaluate --report`")

    found = read_json(path, refuse, REPORT)
    if found["spec"] != spec:
        raise PysegError(
            f"scores: {os.fspath(path)!r} was measured with {found['spec']!r}, and this is "
            f"{spec!r}: a card says what its own pipeline reaches; evaluate it"
        )
    return found


def model_card(
    *,
    name: str,
    load: str,
    spec: str,
    stages: Sequence[tuple[str, str, int]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None,
    facts: Mapping[str, Any],
    licence: str | None,
    scores: Iterable[Mapping[str, Any]] = (),
) -> str:
    """A model card: YAML for the Hub, then what a reader wants to know. Every number is given.

    Args:
        name: heading.
        load: what `pyseg.from_pretrained` takes to get it.
        spec: of the pipeline.
        stages: of each its text, its class, and its number of parameters.
        classes: their names, by index.
        palette: their colours.
        facts: of the model, ``paper`` and ``published_scores``, as `ModelInfo.to_dict` has them.
        licence: of the weights: an identifier of the Hub's, such as ``"cc-by-nc-4.0"``, or a text.
        scores: what `read_scores` gives.
    """
    import yaml

    scores = list(scores)
    head: dict[str, Any] = {
        "library_name": "pyseg",
        "pipeline_tag": "image-segmentation",
        "tags": ["pyseg", "image-segmentation"],
    }
    if licence is not None:
        known = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) is not None
        head |= {"license": licence} if known else {"license": "other", "license_name": "see-card"}
    if results := [_index(found) for found in scores]:
        head["model-index"] = [{"name": name, "results": results}]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"Image segmentation with [pyseg](https://pypi.org/project/pyseg-toolkit/): `{spec}`, "
        f"{len(classes)} classes.\n",
        f"```python\nimport pyseg\n\nsegmenter = pyseg.from_pretrained({load!r})\n"
        'segmenter("photo.jpg").save("labels.png")\n```\n',
        "## Stages\n",
        _table(
            ["stage", "made", "parameters"],
            [[f"`{text}`", kind, f"{count:,}"] for text, kind, count in stages],
        ),
        "## Scores\n",
        *(_scores(found) for found in scores),
    ]
    if not scores:
        parts.append("Nothing was measured of it.\n")
    if published := facts.get("published_scores"):
        parts += [
            "Published by others of the model's architecture, not measured here and not of these "
            "weights:\n",
            _table(
                ["metric", "value", "data set", "source"],
                [[s["metric"], str(s["value"]), s["dataset"], s["source"]] for s in published],
            ),
        ]
    parts += ["## Classes\n", _table(["index", "name", "colour"], _class_rows(classes, palette))]
    if paper := facts.get("paper"):
        parts += ["## Source\n", f"{paper}.\n"]
    parts += ["## Licence\n", f"{licence or 'Not stated: ask who made the weights'}.\n"]
    return "\n".join(parts)


def _class_rows(
    classes: Sequence[str], palette: Sequence[Sequence[int]] | None
) -> Iterable[list[str]]:
    for index, name in enumerate(classes):
        colour = "" if palette is None else "#{:02x}{:02x}{:02x}".format(*palette[index])
        yield [str(index), name, colour]


def _numbers(stage: Mapping[str, Any]) -> dict[str, float]:
    """Every single number of a stage's metrics, by metric and name."""
    return {
        f"{metric} {key}": value
        for metric, values in stage["metrics"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }


def _index(found: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the Hub's model-index: the last stage's numbers."""
    title = found["title"] or "unnamed data"
    return {
        "task": {"type": "image-segmentation"},
        "dataset": {"name": title, "type": re.sub(r"\W+", "-", title.lower()).strip("-") or "data"},
        "metrics": [
            {"type": name.rpartition(" ")[2], "name": name, "value": value}
            for name, value in _numbers(found["stages"][-1]).items()
        ],
    }


def _scores(found: Mapping[str, Any]) -> str:
    numbers = [_numbers(stage) for stage in found["stages"]]
    names = list(numbers[0])
    made = ", ".join(f"{key} {value}" for key, value in found["made"].items() if key != "command")
    command = f"\n\n    {found['made']['command']}" if "command" in found["made"] else ""
    rows = [
        [
            stage["stage"],
            *(_shown(values.get(name)) for name in names),
            f"{stage['milliseconds']:.1f}",
        ]
        for stage, values in zip(found["stages"], numbers, strict=True)
    ]
    parts = [
        f"{found['title'] or 'Unnamed data'}, {found['images']} images; {made}:{command}\n",
        _table(["after", *names, "ms/image"], rows),
    ]
    for metric, values in found["stages"][-1]["metrics"].items():
        if classes := values.get("per_class"):
            columns = [key for key, v in next(iter(classes.values())).items() if _is_number(v)]
            rows = [
                [name, *(_shown(of.get(key)) for key in columns)] for name, of in classes.items()
            ]
            parts.append(_table([f"{metric} after the last stage", *columns], rows))
    return "\n".join(parts)


def _is_number(value: Any) -> bool:
    """Of a fraction; what is undefined is null in JSON."""
    return value is None or isinstance(value, float)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[*head], ["---"] * len(head), *rows]
    escaped = ([re.sub(r"([|\\])", r"\\\1", cell) for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
