"""Atomic writes: a file or directory is complete or absent. Also hashes, and JSON with its keys."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path


@contextlib.contextmanager
def unfinished_dir(path: Path):
    """A temporary directory in `path`, removed at the end. Rename complete files out of it."""
    new = path / ".saving"
    shutil.rmtree(new, ignore_errors=True)  # left by a killed save
    new.mkdir(parents=True)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def sha256_of(path) -> str:
    """Hash of a directory's weights for the manifest: `cat model*.safetensors | sha256sum`."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("model*.safetensors")):
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()


def write_text_atomic(path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.{platform.node()}.{os.getpid()}.part")  # ranks may write the same file
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)


def write_json_atomic(path, obj) -> None:
    write_text_atomic(path, json.dumps(obj, indent=2) + "\n")


def read_text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def read_json(path) -> dict:
    try:
        obj = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(obj, dict):
        raise ValueError(f"{path} holds a {type(obj).__name__}, expected an object")
    return obj


def present(obj: dict) -> dict:
    """The object without null and empty values: these count as absent keys."""
    return {key: x for key, x in obj.items() if x not in (None, "", [], {})}


def check_types(what: str, given: dict, types: dict) -> None:
    """Raise ValueError for a value of another type than `types` has for its key."""
    for key, want in types.items():
        if key in given and not isinstance(given[key], want):
            raise ValueError(f"{what}: {key} is {given[key]!r:.99}, expected {want.__name__}")


def check_keys(what: str, given: dict, used, without_effect, fixed: dict) -> None:
    """Raise ValueError for a key that is neither used nor known to have no effect, and for a value
    that is none of the `fixed` ones of its key. So nothing that a file says is lost silently."""
    for key, values in fixed.items():
        if given.get(key, values[0]) not in values:
            raise ValueError(f"{what}: {key} {given[key]!r} is not supported, only {values[0]!r}")
    for key in sorted(set(given) - set(used) - set(without_effect) - set(fixed)):
        raise ValueError(
            f"{what}: {key} {given[key]!r:.99} is not supported; delete it if nothing depends on it"
        )
