"""Keys that IPython offers after `cache[`."""

from collections.abc import Iterable

from hooked_mllm.hooks.table import specs, split_name

Key = str | tuple[str | int, ...]


def key_completions(names: Iterable[str]) -> list[Key]:
    """The short key of each activation, then its hook name.

    Examples:
        >>> key_completions(["hook_embed", "blocks.0.attn.hook_z"])
        ['embed', ('z', 0), 'hook_embed', 'blocks.0.attn.hook_z']
    """
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
