"""Short names of cached activations: `("pattern", 3)`, `("vision", "z", 2)`, `"embed"`; TransformerLens's aliases."""

import re
from collections.abc import Mapping
from typing import Any

from hooked_mllm.errors import HookNameError, nearest

ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
LAYER_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
ATTENTION = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
MLP = ("pre", "pre_linear", "post")
_SHORT = re.compile(r"^(?P<name>[a-z_]+?)(?P<layer>-?\d+)(?P<type>[a-z]+\d?)?$")


def full_name(key: Any, n_layers: Mapping[str, int]) -> str:
    """The hook name that a cache key means.

    Args:
        key: A hook name, or `(name, layer)`, `(name, layer, part)`, `("vision", name, layer, ...)`, `("projector",
            name)`.
        n_layers: Blocks by tower ("text", "vision"), for layers counted from the end.

    Raises:
        HookNameError: for a key of another form, or a layer that the tower lacks.

    Examples:
        >>> full_name(("z", -1), {"text": 4, "vision": 2})
        'blocks.3.attn.hook_z'
        >>> full_name(("vision", "scale", 0, "ln1"), {"text": 4, "vision": 2})
        'vision.blocks.0.ln1.hook_scale'
    """
    if isinstance(key, str):
        short = _SHORT.match(key)
        if "." in key or key.startswith("hook_"):
            return key
        if short is not None and short["name"] not in ("ln",):
            parts = (short["name"], int(short["layer"]), *([short["type"]] if short["type"] else []))
            return full_name(parts, n_layers)
        return _unlayered(key)
    asked: Any = key
    tower, prefix = "text", ""
    if isinstance(key, tuple) and key and key[0] in ("vision", "text", "projector"):
        tower, prefix = str(key[0]), "" if key[0] == "text" else f"{key[0]}."
        key = key[1:]
    known = isinstance(key, tuple) and len(key) > 0 and all(k is None or isinstance(k, str | int) for k in key)
    if not known or (tower == "projector" and len(key) > 1):
        raise HookNameError(
            "A cache key is a hook name or a tuple such as ('pattern', 3), ('scale', 3, 'ln1'), ('vision', 'z', 2) or "
            f"('projector', 'out'); got {asked!r}."
        )
    if len(key) == 1 or (len(key) == 2 and key[1] is None):
        name = str(key[0])
        return f"{prefix}hook_{name}" if prefix else _unlayered(name)
    whole: list[Any] = [*key, None]
    name, layer, kind = str(whole[0]), whole[1], whole[2]
    if not isinstance(layer, int):
        raise HookNameError(f"The layer of a cache key is a number; got {layer!r} in {key!r}.")
    count = n_layers[tower]
    if not -count <= layer < count:
        raise HookNameError(f"Layer {layer} is out of range: the {tower} tower has {count} blocks (0 to {count - 1}).")
    gradient = "_grad" if name.endswith("_grad") else ""
    name = ALIASES.get(name.removesuffix("_grad"), name.removesuffix("_grad"))
    return f"{prefix}blocks.{layer % count}.{_inside(name, kind)}{gradient}"


def _unlayered(name: str) -> str:
    gradient = "_grad" if name.endswith("_grad") else ""
    name = name.removesuffix("_grad")
    if name in ("scale", "normalized"):
        return f"ln_final.hook_{name}{gradient}"
    return f"hook_{name}{gradient}"


def _inside(name: str, kind: Any) -> str:
    if isinstance(kind, str):
        kind = LAYER_TYPES.get(kind, kind)
        return f"{kind}.hook_{name}" if kind else f"hook_{name}"
    if name in ATTENTION:
        return f"attn.hook_{name}"
    if name in MLP:
        return f"mlp.hook_{name}"
    if name in ("scale", "normalized"):
        raise HookNameError(
            f"{name!r} is ambiguous in a block: say ('{name}', layer, 'ln1') or ('{name}', layer, 'ln2')."
        )
    return f"hook_{name}"


def missing(name: str, present: Mapping[str, Any], key: Any) -> HookNameError:
    """The error for a name that the cache does not hold."""
    asked = "" if key == name else f" (asked as {key!r})"
    return HookNameError(
        f"The cache does not hold {name!r}{asked}. {nearest(name, present)} It holds {len(present)} activations; "
        "`print(cache)` lists them, and `names_filter=` says what a run keeps."
    )
