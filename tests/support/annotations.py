"""Checks the annotations of our packages at every call while the tests run, shapes included.

In: names of packages. Out: an import hook, which must be there before they are imported.
"""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from typing import Any, get_args

import jaxtyping
from jaxtyping import install_import_hook, jaxtyped

# With the tower an int is accepted where a float is annotated, as type checkers do.
_TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"


def check_annotations(packages: Sequence[str]) -> None:
    """Check every signature of ``packages``, which are not imported yet."""
    # What the hook writes above every function and class.
    jaxtyping.jaxtyped = lambda *, typechecker: partial(_checked, typechecker=typechecker)
    hook = install_import_hook(list(packages), _TYPECHECKER)
    sys.meta_path.insert(0, _TypedCore(hook.hook))


class _TypedCore(MetaPathFinder):
    """Loads the modules of moe_replay.routing as a type checker reads them.

    The core imports jaxtyping for type checkers only, because that takes longer than importing all
    of the core. Where its annotations are to be checked their names are needed in earnest.
    """

    def __init__(self, checked: MetaPathFinder) -> None:
        self.checked = checked

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("moe_replay.routing."):
            return None
        spec = self.checked.find_spec(name, path, target)
        if spec is None:
            return None
        compiled = spec.loader.source_to_code
        spec.loader.source_to_code = lambda source, *place, **options: compiled(
            source.replace(b"\nif TYPE_CHECKING:\n", b"\nif True:\n"), *place, **options
        )
        return spec


def _checked(thing: Any, *, typechecker: Callable[[Any], Any]) -> Any:
    """Check a function: by jaxtyping where an annotation has shapes, else by beartype alone.

    jaxtyping binds the arguments and checks them twice. Most functions have no use for that, and a
    short training run would spend a fifth of its time on it.
    """
    if inspect.isfunction(thing):
        names = vars(builtins) | thing.__globals__
        if any(_may_have_shapes(each, names) for each in thing.__annotations__.values()):
            return jaxtyped(thing, typechecker=typechecker)
        # beartype keeps each function that it was given, with all that a closure holds.
        if "<locals>" in thing.__qualname__:
            return thing
        # beartype refuses a ParamSpec whose annotation is a string.
        if any(str(each).endswith((".args", ".kwargs")) for each in thing.__annotations__.values()):
            return thing
        return typechecker(thing)
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(_checked(thing.__func__, typechecker=typechecker))
    if isinstance(thing, property):
        parts = thing.fget, thing.fset, thing.fdel
        return property(*(p and _checked(p, typechecker=typechecker) for p in parts))
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = _checked(thing.__init__, typechecker=typechecker)
    return thing


def _may_have_shapes(annotation: object, names: Mapping[str, object]) -> bool:
    """Return whether an annotation has array shapes, or cannot be looked through."""
    if isinstance(annotation, str):
        found = [names.get(word, word) for word in re.findall(r"(?<![\w.])[^\W\d]\w*", annotation)]
        # What is imported for type checkers alone, or defined further down, stays a word.
        return any(isinstance(part, str) or _may_have_shapes(part, names) for part in found)
    if isinstance(annotation, list | tuple):
        return any(_may_have_shapes(part, names) for part in annotation)
    if getattr(annotation, "__module__", "").partition(".")[0] == "jaxtyping":
        return True
    return _may_have_shapes(get_args(annotation), names)
