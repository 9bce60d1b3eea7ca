"""The software bill of materials of a release, as CycloneDX JSON: `python tests/sbom.py dist`.

Beside pyseg itself it lists what `pyproject.toml` asks for and what that needs in turn, in the
versions that are installed here, `required` or, if only an extra for users brings it, `optional`;
the weights that pyseg ships; and the files of the release that lie in the folder, with digests.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import uuid
from datetime import datetime, timezone
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOR_DEVELOPERS = {"test", "bench", "dev", "docs"}  # extras that no user asks for
SHIPPED = {".safetensors": "machine-learning-model", ".jpg": "data", ".png": "data"}
# Of what they were trained on, or cut from; the weights' cards beside them say more.
SHIPPED_LICENCE = {
    ".safetensors": {"license": {"name": "non-commercial research; see the card beside it"}},
    ".jpg": {"license": {"id": "CC-BY-NC-4.0"}},
    ".png": {"license": {"id": "CC-BY-NC-4.0"}},
}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def asked(requirements, extras=("",)):
    """Those that hold here: (name, extras) of each."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            yield canonicalize_name(requirement.name), requirement.extras


def closure(requirements):
    """{name: names that it needs} of all that the requirements need, as installed here."""
    found, open_ = {}, list(asked(requirements))
    seen = set()
    while open_:
        name, extras = open_.pop()
        if (name, extras_ := frozenset(extras)) in seen:
            continue
        seen.add((name, extras_))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(
                f"sbom: {name} is not installed here, so its version is unknown: "
                "python -m pip install '.[test]'"
            ) from None
        needed = list(asked(requires, ("", *extras)))
        found.setdefault(name, set()).update(one for one, _ in needed)
        open_ += needed
    return found


def licences(metadata):
    """CycloneDX's list, of what a distribution says of itself."""
    if expression := metadata.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = [
        text.rpartition(" :: ")[2]
        for text in metadata.get_all("Classifier") or []
        if text.startswith("License :: ") and text != "License :: OSI Approved"
    ]
    text = (metadata.get("License") or "").strip()
    names = classifiers or ([text] if text and "\n" not in text and len(text) < 80 else [])
    return [{"license": {"name": name}} for name in names]


def package(name, scope):
    metadata = importlib.metadata.metadata(name)
    found = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{metadata['Version']}",
        "name": metadata["Name"],
        "version": metadata["Version"],
        "scope": scope,
        "purl": f"pkg:pypi/{name}@{metadata['Version'].replace('+', '%2B')}",
    }
    if summary := metadata.get("Summary"):
        found["description"] = summary
    if known := licences(metadata):
        found["licenses"] = known
    return found


def file(path, kind, name, **more):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "type": kind,
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        **more,
    }


def bill(release):
    """The bill as a dictionary; ``release`` are files that belong to it."""
    about = project()
    required = closure(about["dependencies"])
    extras = [
        text
        for name, texts in about["optional-dependencies"].items()
        if name not in FOR_DEVELOPERS
        for text in texts
    ]
    optional = closure(extras)
    needs = {
        name: required.get(name, set()) | optional.get(name, set())
        for name in {*required, *optional}
    }
    packages = {
        name: package(name, "required" if name in required else "optional")
        for name in sorted(needs)
    }
    assets = sorted((ROOT / "pyseg" / "assets").iterdir())
    shipped = [
        file(
            path,
            SHIPPED[path.suffix],
            f"pyseg/assets/{path.name}",
            licenses=[SHIPPED_LICENCE[path.suffix]],
        )
        for path in assets
        if path.suffix in SHIPPED
    ]
    root = f"pkg:pypi/{about['name']}@{about['version']}"
    itself = {
        "type": "library",
        "bom-ref": root,
        "name": about["name"],
        "version": about["version"],
        "description": about["description"],
        "licenses": [{"expression": about["license"]}],
        "purl": root,
        "components": [file(path, "file", path.name) for path in sorted(release)],
    }
    direct = {name for name, _ in asked([*about["dependencies"], *extras])}
    refs = {name: one["bom-ref"] for name, one in packages.items()}
    depends = [{"ref": root, "dependsOn": sorted(refs[name] for name in direct)}]
    depends += [
        {"ref": refs[name], "dependsOn": sorted(refs[need] for need in needs[name])}
        for name in packages
    ]
    made = os.environ.get("SOURCE_DATE_EPOCH")
    when = (
        datetime.now(timezone.utc)
        if made is None
        else datetime.fromtimestamp(int(made), timezone.utc)
    )
    content = {
        "metadata": {
            "timestamp": when.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": itself,
        },
        "components": [*packages.values(), *shipped],
        "dependencies": depends,
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        **content,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the release; the bill is written there, too")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    release = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    found = bill(release)
    about = found["metadata"]["component"]
    target = folder / f"{about['name'].replace('-', '_')}-{about['version']}.cdx.json"
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(target)
    scopes = [one.get("scope") for one in found["components"]]
    print(
        f"{target}: {scopes.count('required')} packages required, {scopes.count('optional')} of "
        f"extras, {scopes.count(None)} files shipped, {len(release)} files of the release"
    )


if __name__ == "__main__":
    main()
