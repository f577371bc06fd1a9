"""Keys of a cache: `("pattern", 3)`, `("vision", "z", 2)`, `"embed"`, and TransformerLens's aliases, as hook names."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeAlias

from hooked_mllm.display.read_heads import whole_number
from hooked_mllm.errors import HookNameError, nearest
from hooked_mllm.hooks.table import TowerName, specs, split_name

Key: TypeAlias = str | tuple[str | int, ...]

#: TransformerLens's names of the part of a block, as the third entry of a key
LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_SHORT = re.compile(r"^(?P<name>[a-z_]+?)(?P<layer>-?\d+)(?P<type>[a-z]+\d?)?$")
_GRADIENT = "_grad"


def full_name(key: object, n_layers: Mapping[str, int]) -> str:
    """The hook name of a cache key, such as ("z", -1) or ("vision", "scale", 0, "ln1"); `n_layers` is by tower."""
    if isinstance(key, str):
        if "." in key or key.startswith("hook_"):
            return key
        short = _SHORT.match(key)
        if short is None or short["name"] == "ln":
            return _outside_blocks(key, "text")
        part = (short["type"],) if short["type"] else ()
        return full_name((short["name"], int(short["layer"]), *part), n_layers)
    tower, entries = _tower_and_entries(key)
    if len(entries) == 1 or (len(entries) == 2 and entries[1] is None):
        return _outside_blocks(str(entries[0]), tower)
    name, layer, part = (*entries, None)[:3]
    if not isinstance(layer, int):
        raise HookNameError(f"The layer of a cache key is a number; got {layer!r} in {key!r}.")
    count = n_layers[tower]
    if not -count <= layer < count:
        raise HookNameError(f"Layer {layer} is out of range: the {tower} tower has {count} blocks (0 to {count - 1}).")
    name, gradient = _split_gradient(str(name))
    prefix = "" if tower == "text" else f"{tower}."
    return f"{prefix}blocks.{layer % count}.{_suffix_in_block(name, part)}{gradient}"


def _tower_and_entries(key: object) -> tuple[TowerName, tuple[str | int | None, ...]]:
    """The tower of a tuple, and its other entries."""
    tower: TowerName = "text"
    entries: tuple[object, ...] = key if isinstance(key, tuple) else ()
    if entries and isinstance(entries[0], str) and entries[0] in ("vision", "text", "projector"):
        tower, entries = entries[0], entries[1:]
    plain = tuple(x if isinstance(x, str) or x is None else whole_number(x) for x in entries)
    wrong = any(read is None and x is not None for read, x in zip(plain, entries, strict=True))
    if not entries or wrong or (tower == "projector" and len(entries) > 1):
        raise HookNameError(
            "A cache key is a hook name or a tuple such as ('pattern', 3), ('scale', 3, 'ln1'), ('vision', 'z', 2) or "
            f"('projector', 'out'); got {key!r}."
        )
    return tower, plain


def _split_gradient(name: str) -> tuple[str, str]:
    """The name of an activation, and "_grad" if its gradient is meant."""
    return name.removesuffix(_GRADIENT), _GRADIENT if name.endswith(_GRADIENT) else ""


@cache
def _outside_blocks(name: str, tower: TowerName) -> str:
    """The hook name of a short name that belongs to no block."""
    name, gradient = _split_gradient(name)
    names = [spec.name(tower) for spec in specs(tower, in_block=False) if name == spec.short]
    prefix = "" if tower == "text" else f"{tower}."
    return (names[0] if names else f"{prefix}hook_{name}") + gradient


@cache
def _suffix_in_block(name: str, part: str | int | None) -> str:
    """The suffix of a hook name in a block; `part` is needed where several parts have a point of that name."""
    matches = [spec for spec in specs(in_block=True) if name == spec.short or name in spec.aliases]
    short = matches[0].short if matches else name
    if isinstance(part, str):
        part = LAYER_TYPES.get(part, part)
        return f"{part}.hook_{short}" if part else f"hook_{short}"
    if len(matches) > 1:
        forms = " or ".join(f"({name!r}, layer, {spec.group!r})" for spec in matches)
        raise HookNameError(f"{name!r} is ambiguous in a block: write {forms}.")
    return matches[0].suffix if matches else f"hook_{name}"


def missing(name: str, present: Mapping[str, object], key: object) -> HookNameError:
    """The error for a name that the cache does not hold."""
    as_key = "" if key == name else f" (key {key!r})"
    return HookNameError(
        f"The cache does not hold {name!r}{as_key}. {nearest(name, present)} It has {len(present)} activations; "
        "`print(cache)` lists them, and `names_filter=` selects what a run keeps."
    )


def key_completions(names: Iterable[str]) -> list[Key]:
    """The keys that IPython offers after `cache[`: the short key of each activation, then its hook name."""
    names = list(names)
    return [*dict.fromkeys(map(_short_key, names)), *names]


def _short_key(name: str) -> Key:
    tower, layer, suffix = split_name(name)
    group, _, short = suffix.rpartition("hook_")  # ("attn.", "hook_", "z")
    prefix = () if tower == "text" else (tower,)
    if layer is None:
        return (*prefix, short) if prefix else short
    namesakes = [spec for spec in specs(tower, in_block=True) if spec.short == short.removesuffix("_grad")]
    part = (group.rstrip("."),) if len(namesakes) > 1 else ()
    return (*prefix, short, layer, *part)
