"""What modules of an unwrapped model take and return, by torch hooks."""

from torch import nn

from helpers.wrapped import plain, wrapped

VISION_BLOCKS = {
    "qwen3_vl": "model.visual.blocks",
    "llava_onevision": "model.vision_tower.encoder.layers",
    "internvl": "model.vision_tower.encoder.layer",
}


def listen(module: nn.Module, side: str, fn):
    """A torch hook that replaces a module's first input or output with what `fn` returns for it."""

    def pre(_, args, kwargs):
        got = fn(args[0] if args else kwargs["hidden_states"])
        if got is not None:
            return ((got, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": got})

    def post(_, args, output):
        got = fn(output[0] if isinstance(output, tuple) else output)
        if got is not None:
            return (got, *output[1:]) if isinstance(output, tuple) else got

    if side == "in":
        return module.register_forward_pre_hook(pre, with_kwargs=True)
    return module.register_forward_hook(post)


def witness(family, inputs, path, side, fn):
    """Logits of the unwrapped model with one torch hook."""
    model = plain(family)
    handle = listen(model.get_submodule(path), side, fn)
    try:
        return model(**inputs).logits
    finally:
        handle.remove()


def hooked_values(family, inputs, names="*"):
    seen = {}
    wrapped(family).run_with_hooks(inputs, fwd_hooks=[(names, lambda x, hook: seen.__setitem__(hook.name, x.clone()))])
    return seen
