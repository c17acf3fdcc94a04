"""Where a model comes from: a folder, a GGUF file, or the Hugging Face Hub. Every job works on
folders; what is none becomes one, once, in a cache beside what the job makes. Knows files; knows
nothing of models.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster.progress import note
from linearized.errors import DataError, ModelError

CACHE = "models"
"""Name of the cache, beside what a job makes."""
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched of a model on the Hub."""

_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def folder_of(model: str | Path, cache: Path) -> Path:
    """The Hugging Face folder of a model that is named by its folder, by a GGUF file (or a folder
    that holds one), or by its name on the Hub. The last two are made folders in `cache`, once.

    Raises:
        ModelError: there is no such model, or it cannot be fetched or converted.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not found:
            return path
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ModelError(f"{path} holds several GGUF files; name one of {names}")
        path = found[0]
    if path.is_file():
        return _converted(path, cache)
    if not _HUB.fullmatch(str(model)):
        raise ModelError(
            f"there is no model at {model}; name a Hugging Face folder, a GGUF file, or a model on "
            "the Hub, as owner/name"
        )
    return _fetched(str(model), cache)


def tokenizer_of(name: str, cache: Path) -> str:
    """The name of a tokenizer, or the folder in `cache` with that of a GGUF file."""
    path = Path(name).expanduser()
    return str(folder_of(path, cache)) if path.suffix == ".gguf" and path.is_file() else name


def _converted(file: Path, cache: Path) -> Path:
    if file.suffix != ".gguf":
        raise ModelError(f"{file} is no GGUF file; name one, or a Hugging Face folder")
    status = file.stat()
    known = f"{file.name} {status.st_size} {status.st_mtime_ns}"
    folder = cache / f"{file.stem}-{hashlib.blake2b(known.encode(), digest_size=4).hexdigest()}"

    def write(part: Path) -> None:
        from linearized.gguf import convert

        note(f"model: writing {file.name} as a Hugging Face folder, {folder}")
        convert(file, part)

    return _once(folder, write)


def _fetched(name: str, cache: Path) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    def write(part: Path) -> None:
        note(f"model: fetching {name} from the Hub")
        huggingface_hub.snapshot_download(name, local_dir=part, allow_patterns=list(FILES))
        shutil.rmtree(part / ".cache", ignore_errors=True)

    folder = cache / name.replace("/", "--")
    try:
        return _once(folder, write)
    except (HfHubHTTPError, OSError, ValueError) as error:
        kept = _kept(name)
        if kept is not None:
            return kept
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(
            f"there is no folder {name}, and the Hub gives no model of that name: {reason}"
        ) from error


def _kept(name: str) -> Path | None:
    """A model that an earlier program has fetched on this machine."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=list(FILES), local_files_only=True
        )
    except (HfHubHTTPError, OSError, ValueError):
        return None
    return Path(found) if any(Path(found).glob("*.safetensors")) else None


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """The folder, made unless it is there. It is complete or not there at all."""
    if (folder / "config.json").exists():
        return folder
    if folder.exists():
        raise DataError(f"{folder} exists and holds no model; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(part)
        if not (part / "config.json").exists():
            raise ModelError(f"what was fetched for {folder.name} holds no config.json")
        part.chmod(0o755)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
