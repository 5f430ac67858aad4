"""Find the files of a dataset: one file, the shards of a split in a folder, or a hub download.

Folders follow the layout of Hugging Face: ``train-00000-of-00003.parquet`` belongs to the split
``train``, like files in a folder ``train/``; files without a split are ``train``.
"""

from __future__ import annotations

import re
from pathlib import Path

from moe_replay.errors import RecipeError, shortened
from moe_replay.recipe.sections.locations import HUB, SUFFIXES

# Metadata that Hugging Face writes beside the rows.
_NOT_ROWS = frozenset(
    {"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"}
)
_SHARD = re.compile(r"(?P<split>.+?)[-_.](?P<number>\d{5})-of-(?P<total>\d{5})")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words}


def dataset_files(location: str | Path, *, split: str = "train") -> tuple[Path, ...]:
    """Return the files of a dataset on disk, all of one kind, in the order of their rows.

    Raises:
        RecipeError: the files are missing, ambiguous or incomplete.
    """
    path = Path(location)
    if path.is_dir():
        return _files_of_split(path, split)
    if not path.exists():
        raise RecipeError(_nothing_there(path))
    if path.suffix not in SUFFIXES:
        raise RecipeError(
            f"dataset {path}: got the suffix {path.suffix!r}, expected a file {', '.join(SUFFIXES)}, a folder of such "
            f"files, {HUB}ORG/NAME, or reasoning_gym:<family>"
        )
    return (path,)


def _nothing_there(path: Path) -> str:
    near = sorted(
        file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES or file.is_dir()
    )
    holds = shortened(near) if near else "no dataset file and no folder"
    return (
        f"dataset {path} does not exist; {path.parent} holds {holds}: correct the path (relative paths start at the "
        f"recipe's folder). Write a dataset of the Hugging Face hub as {HUB}ORG/NAME"
    )


def _files_of_split(folder: Path, split: str) -> tuple[Path, ...]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and file.name not in _NOT_ROWS
        and not (file.suffix == ".arrow" and file.name.startswith("cache-"))
        and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        and file.is_file()
    )
    if not files:
        raise RecipeError(
            f"dataset {folder} holds no file {', '.join(SUFFIXES)}: name the folder with the data files"
        )
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    nowhere = splits.pop(None, [])
    if nowhere and splits:
        raise RecipeError(
            f"dataset {folder} has the splits {shortened(sorted(map(str, splits)))}, but "
            f"{shortened([str(file.relative_to(folder)) for file in nowhere])} belong to no split: name one file or folder"
        )
    chosen = splits.get(split, nowhere if split == "train" else None)
    if not chosen:
        known = shortened(sorted(map(str, splits))) or "train (no file names a split)"
        raise RecipeError(
            f"dataset {folder} has no split {split!r}; it has {known}: set data.train_split or data.eval_split"
        )
    _check_one_kind(folder, split, chosen)
    return tuple(chosen)


def _split_of(file: Path) -> str | None:
    """Return the split named by a file or by a folder above it.

    Examples:
        >>> _split_of(Path("data/train-00000-of-00003.parquet"))
        'train'
        >>> _split_of(Path("main/dev.jsonl"))
        'validation'
    """
    shard = _SHARD.fullmatch(file.stem)
    if shard and shard["split"] != "data":
        return _SPLIT_OF_WORD.get(shard["split"], shard["split"])
    for part in (file.stem, *reversed(file.parent.parts)):
        for word in re.split(r"[^A-Za-z]+", part):
            if word.lower() in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word.lower()]
    return None


def _check_one_kind(folder: Path, split: str, files: list[Path]) -> None:
    names = [str(file.relative_to(folder)) for file in files]
    if len({file.suffix for file in files}) > 1:
        raise RecipeError(
            f"dataset {folder} split {split} mixes kinds of files: {shortened(names)}: name one file or folder"
        )
    parents = sorted({str(file.parent.relative_to(folder)) for file in files})
    if len(parents) > 1:
        raise RecipeError(
            f"dataset {folder}: files of the split {split} are in several folders, {shortened(parents)}, which may be "
            f"different datasets: name one of them, such as {folder / parents[0]}"
        )
    shards = [match for file in files if (match := _SHARD.fullmatch(file.stem))]
    if not shards:
        return
    here, expected = {int(match["number"]) for match in shards}, int(shards[0]["total"])
    missing = sorted(set(range(expected)) - here)
    if missing or len(shards) != len(files) or len({match["total"] for match in shards}) > 1:
        raise RecipeError(
            f"dataset {folder} split {split}: expected {expected} shards, found {shortened(names)}; missing are "
            f"{shortened([str(number) for number in missing]) or 'none'}: download the folder again"
        )
