"""Keys of a cache: each form gives one hook name, and other keys are errors."""

import numpy as np
import pytest
import torch

from helpers.cache_witness import hooked, sample
from hooked_mllm.cache.keys import full_name
from hooked_mllm.errors import HookNameError

LAYERS = {"text": 8, "vision": 3}
MEANINGS = {
    "blocks.3.attn.hook_pattern": "blocks.3.attn.hook_pattern",
    ("pattern", 3): "blocks.3.attn.hook_pattern",
    ("pattern", -1): "blocks.7.attn.hook_pattern",
    ("k", 0, "attn"): "blocks.0.attn.hook_k",
    ("scale", 0, "ln1"): "blocks.0.ln1.hook_scale",
    ("normalized", -2, "ln2"): "blocks.6.ln2.hook_normalized",
    "normalized": "ln_final.hook_normalized",
    "scale": "ln_final.hook_scale",
    ("scale", None): "ln_final.hook_scale",
    "embed": "hook_embed",
    "logits": "hook_logits",
    "hook_embed": "hook_embed",
    "k6": "blocks.6.attn.hook_k",
    "scale4ln1": "blocks.4.ln1.hook_scale",
    "resid_pre5": "blocks.5.hook_resid_pre",
    "pattern-1": "blocks.7.attn.hook_pattern",
    "post3m": "blocks.3.mlp.hook_post",
    ("resid_pre", 0): "blocks.0.hook_resid_pre",
    ("resid_post", -8): "blocks.0.hook_resid_post",
    ("attn_out", 2): "blocks.2.hook_attn_out",
    ("deepstack", 2): "blocks.2.hook_deepstack",
    ("rot_q", 1): "blocks.1.attn.hook_rot_q",
    ("result", 1): "blocks.1.attn.hook_result",
    ("pre_linear", 1): "blocks.1.mlp.hook_pre_linear",
    ("in", 3, "attn"): "blocks.3.attn.hook_in",
    ("in", -1, "m"): "blocks.7.mlp.hook_in",
    "in3mlp": "blocks.3.mlp.hook_in",
    ("vision", "in", 2, "mlp"): "vision.blocks.2.mlp.hook_in",
    # aliases
    ("attn", 3): "blocks.3.attn.hook_pattern",
    ("attn_logits", 3): "blocks.3.attn.hook_attn_scores",
    ("key", 3): "blocks.3.attn.hook_k",
    ("query", 3): "blocks.3.attn.hook_q",
    ("value", 3): "blocks.3.attn.hook_v",
    ("mlp_pre", 3): "blocks.3.mlp.hook_pre",
    ("mlp_post", 3): "blocks.3.mlp.hook_post",
    # layer types
    ("q", 3, "a"): "blocks.3.attn.hook_q",
    ("q", 3, "attention"): "blocks.3.attn.hook_q",
    ("pre", 3, "m"): "blocks.3.mlp.hook_pre",
    ("resid_mid", 3, "b"): "blocks.3.hook_resid_mid",
    ("resid_mid", 3, "block"): "blocks.3.hook_resid_mid",
    ("resid_mid", 3, "blocks"): "blocks.3.hook_resid_mid",
    # towers
    ("vision", "z", 2): "vision.blocks.2.attn.hook_z",
    ("vision", "z", -1): "vision.blocks.2.attn.hook_z",
    ("vision", "scale", 0, "ln1"): "vision.blocks.0.ln1.hook_scale",
    ("vision", "patch_embed"): "vision.hook_patch_embed",
    ("vision", "out"): "vision.hook_out",
    ("text", "z", 4): "blocks.4.attn.hook_z",
    ("projector", "in"): "projector.hook_in",
    ("projector", "out"): "projector.hook_out",
    # gradients
    ("z_grad", 3): "blocks.3.attn.hook_z_grad",
    ("attn_grad", 3): "blocks.3.attn.hook_pattern_grad",
    ("resid_post_grad", -1): "blocks.7.hook_resid_post_grad",
    ("scale_grad", 0, "ln1"): "blocks.0.ln1.hook_scale_grad",
    ("vision", "z_grad", 1): "vision.blocks.1.attn.hook_z_grad",
    ("projector", "out_grad"): "projector.hook_out_grad",
    "embed_grad": "hook_embed_grad",
    "normalized_grad": "ln_final.hook_normalized_grad",
}


@pytest.mark.parametrize(("key", "name"), MEANINGS.items(), ids=str)
def test_key_means_name(key, name):
    assert full_name(key, LAYERS) == name


@pytest.mark.parametrize("key", [("z", 8), ("z", -9), ("vision", "z", 3), ("vision", "z", -4), "z8", "z-9"])
def test_layers_out_of_range_are_errors(key):
    with pytest.raises(HookNameError, match=r"out of range: the (text|vision) tower has \d blocks"):
        full_name(key, LAYERS)


@pytest.mark.parametrize(
    "key",
    [
        3,
        None,
        (),
        [1],
        ("z", "1"),
        ("z", 1.5),
        (("z",), 1),
        ("scale", 3),
        ("in", 3),
        ("vision",),
        ("projector",),
        ("projector", "z", 1),
    ],
)
def test_other_keys_are_errors(key):
    with pytest.raises(HookNameError):
        full_name(key, LAYERS)


def test_every_hook_name_means_itself_and_has_a_short_form(family):
    model = hooked(family)
    _, cache = model.run_with_cache(sample(family))
    layers = {"text": model.cfg.n_layers, "vision": model.cfg.vision_n_layers}
    assert set(cache) == set(model.hook_dict)
    for name, point in model.hook_dict.items():
        assert cache.name_of(name) == name
        tower, *rest = ("text", *name.split(".")) if point.tower == "text" else name.split(".")
        last = rest[-1].removeprefix("hook_")
        if rest[0] == "blocks":
            key = (last, int(rest[1]), *rest[2:-1])
        elif rest[0] == "ln_final":
            key = (last,)
        else:
            key = (last,)
        key = key if tower == "text" else (tower, *key)
        assert full_name(key if len(key) > 1 else key[0], layers) == name


def test_a_name_that_is_not_held_is_an_error_with_the_name_and_the_nearest(family):
    _, cache = hooked(family).run_with_cache(sample(family), "blocks.1.attn.hook_z")
    with pytest.raises(KeyError, match=r"blocks\.0\.attn\.hook_z.*key \('z', 0\).*blocks\.1\.attn\.hook_z"):
        cache["z", 0]


def test_layers_as_integers_of_numpy_and_torch():
    for layer in (np.int64(2), np.uint8(2), torch.tensor(2)):
        assert full_name(("pattern", layer), {"text": 6}) == "blocks.2.attn.hook_pattern"
    assert full_name(("vision", "z", np.int64(-1)), {"vision": 3}) == "vision.blocks.2.attn.hook_z"
    cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), "*hook_pattern")[1]
    assert torch.equal(cache.pattern(np.int64(1)), cache.pattern(1))
    assert torch.equal(cache["pattern", np.int64(1)], cache["pattern", 1])
    for layer in (2.0, True, np.float32(2)):
        with pytest.raises(HookNameError):
            full_name(("pattern", layer), {"text": 6})
