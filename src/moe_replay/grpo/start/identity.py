"""What a run is, by content: the keys that decide its results, with digests instead of paths.

A run resumes only where this is unchanged, so a file that was edited under the same name is
noticed, and a folder that was moved is not. Covered is every byte of datasets, of reward files and
the modules beside them that they import, and of every file of the checkpoint up to 64 MiB. Of
larger files of weights: the header with all names, shapes and dtypes, the size, and the first 4 KiB
of every tensor. That always shows another model or another training of it, and does not show an
edit of single numbers in the middle of a tensor. Not covered: what a reward loads by a path of its
own or over a network.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_replay.errors import RecipeError
from moe_replay.grpo.inputs import recipe_dataset_files
from moe_replay.grpo.start.digest_cache import DigestCache
from moe_replay.recipe.recipe import Recipe
from moe_replay.recipe.sections.locations import GENERATED, HUB

LARGE = 64 << 20
"""Files above this many bytes are not read at every start: weights are sampled, and the digests
of others are remembered."""
_SAMPLE = 4096
# Of a checkpoint's folder, what a run reads: config, weights, tokenizer, chat template.
_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
_NOT_READ = ("license", "notice", "readme")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key that is not what it was."""

    key: str
    """Dotted key; for a file in a folder, followed by a slash and its name."""
    old: Any
    """Value or digest that the checkpoint was trained with; None where there was none."""
    new: Any
    """Value or digest of now; None where there is none any more."""

    def __str__(self) -> str:
        return f"{self.key}: was {_shown(self.old)}, is {_shown(self.new)}"


def run_identity(recipe: Recipe, cache: DigestCache) -> dict[str, Any]:
    """Return what decides the results of a recipe's run; reads what it points to.

    Raises:
        RecipeError: when a file that the recipe names cannot be read.
    """
    items = dict(recipe.fingerprint_items())
    try:
        every = (*recipe.training_sets, *recipe.held_out_sets)
        for key, location in {each.key: each.dataset for each in every}.items():
            # Held-out prompts of files decide nothing that is trained.
            if key not in items:
                continue
            if location.startswith(GENERATED):
                items[key] = location
                items[f"{key} (reasoning-gym)"] = importlib.metadata.version("reasoning-gym")
            elif location.startswith(HUB) or Path(location).exists():
                items[key] = _dataset_digest(recipe_dataset_files(recipe, key), cache)
        del items["model.path"]
        for name, digest in model_digests(recipe.model.path, cache).items():
            items[f"model.path/{name}"] = digest
        if recipe.lora.is_on and recipe.lora.adapter is not None:
            del items["lora.adapter"]
            for name, digest in model_digests(recipe.lora.adapter, cache).items():
                items[f"lora.adapter/{name}"] = digest
        for index, reward in enumerate(recipe.rewards):
            items |= _reward_items(f"rewards.{index}.function", reward.function, cache)
        if recipe.environment is not None:
            if recipe.environment.factory is not None:
                items |= _reward_items("environment.factory", recipe.environment.factory, cache)
            if recipe.environment.tools:
                del items["environment.tools"]
            for index, tool in enumerate(recipe.environment.tools):
                items |= _reward_items(f"environment.tools.{index}", tool, cache)
    except OSError as error:
        raise RecipeError(
            f"{error.filename} cannot be read, to see whether it has changed: {error.strerror}"
        ) from error
    return items


def model_digests(folder: Path, cache: DigestCache) -> dict[str, str]:
    """Return file -> digest of what a run reads of a checkpoint; see `_MODEL_SUFFIXES`."""
    return {
        path.name: cache.digest(path, _weights_digest)
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix in _MODEL_SUFFIXES
        and not path.name.lower().startswith(_NOT_READ)
    }


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[Difference]:
    """Return what differs between two runs, by key.

    A key that the old run does not name had its default (``defaults``, by key): a revision that
    did not know it yet wrote the record, or it had no effect.
    """
    # As a checkpoint keeps them: tuples are lists there.
    old, new, defaults = (json.loads(json.dumps(dict(each or {}))) for each in (old, new, defaults))
    return [
        Difference(key=key, old=old.get(key), new=new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, defaults.get(key)) != new.get(key)
    ]


def is_allowed(key: str, allowed: Iterable[str]) -> bool:
    """Return whether a key is one of ``allowed``, or below one.

    Example: ``model.path`` allows ``model.path/config.json``.
    """
    return any(
        key == name or key.startswith((f"{name}.", f"{name}/", f"{name} ")) for name in allowed
    )


def _shown(value: Any) -> str:
    return "not there" if value is None else json.dumps(value)


def _dataset_digest(files: Sequence[Path], cache: DigestCache) -> str:
    if len(files) == 1:
        return cache.digest(files[0])
    lines = "\n".join(f"{file.name} {cache.digest(file)}" for file in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()[:32]


def _weights_digest(path: Path, size: int) -> str | None:
    """Digest a large safetensors file by its header and the first bytes of each tensor.

    None for any other file, of which every byte is read.
    """
    if size <= LARGE or path.suffix != ".safetensors":
        return None
    digest = hashlib.sha256(struct.pack("<Q", size))
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(min(length, size))
        digest.update(header)
        for start, end in _extents(header):
            file.seek(8 + length + start)
            digest.update(file.read(min(_SAMPLE, end - start)))
    return f"sampled-sha256:{digest.hexdigest()[:32]}"


def _extents(header: bytes) -> list[tuple[int, int]]:
    try:
        entries = json.loads(header)
        return sorted(
            tuple(entry["data_offsets"])
            for name, entry in entries.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        # Loading says what is wrong with it.
        return []


def _reward_items(key: str, function: str, cache: DigestCache) -> dict[str, str]:
    """Return a reward function's name, and digests of its file and the modules it imports there."""
    module, _, name = function.rpartition(":")
    file = Path(module) if module.endswith(".py") else _module_file(module)
    if file is None or not file.is_file():
        return {key: function}
    items = {key: f"{name} in {cache.digest(file)}"}
    root = file.parent
    for path in _imported(file):
        items[f"{key}/{path.relative_to(root)}"] = cache.digest(path)
    return items


def _module_file(name: str) -> Path | None:
    """Return the file of a module without importing it; None for one without a source file."""
    first, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(first) if first else None
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:
        return None
    path = Path(found.origin)
    return path if not rest else _source(path.parent, rest)


def _imported(file: Path) -> Sequence[Path]:
    """Return the files below a file's folder that it imports, directly or through others."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        for parts, level in _imports(path):
            base = file.parent if level == 0 else path.parents[level - 1]
            # The last part may be a name in a module, and not one itself.
            for names in (parts, parts[:-1]):
                source = _source(base, names) if names else None
                below = source is not None and source.is_relative_to(file.parent)
                if source is not None and below and source not in found | {file}:
                    found.add(source)
                    waiting.append(source)
    return sorted(found)


def _imports(path: Path) -> Iterator[tuple[list[str], int]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), 0
        elif isinstance(node, ast.ImportFrom):
            parents = node.module.split(".") if node.module else []
            for alias in node.names:
                yield [*parents, alias.name], node.level


def _source(base: Path, names: Sequence[str]) -> Path | None:
    folder = base.joinpath(*names)
    for path in (folder / "__init__.py", folder.with_suffix(".py")):
        if path.is_file():
            return path
    return None
