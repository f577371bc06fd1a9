"""Activations, residual tools and logit attributions mean what they mean in TransformerLens 4.3.

It runs in a process of its own: in this Python, if the extra `conformance` is installed, or in the one that the
environment variable TRANSFORMER_LENS_PYTHON names.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import transformer_lens_peer as peer
from hooked_mllm import HookedMLLM, toys

PYTHON = os.environ.get("TRANSFORMER_LENS_PYTHON", sys.executable)
MISSING = PYTHON == sys.executable and find_spec("transformer_lens") is None
pytestmark = pytest.mark.skipif(
    MISSING, reason="TransformerLens is not installed: pip install '.[conformance]', or set TRANSFORMER_LENS_PYTHON"
)
CHECKPOINT = "toy-llava-onevision"


@pytest.fixture(scope="module")
def ours():
    """The model, a sample of its task, and the cache of a run on it."""
    model = HookedMLLM.from_pretrained(CHECKPOINT, dtype="float32")
    sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
    return model, sample, *model.run_with_cache(sample)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """What TransformerLens computes on the same checkpoint and inputs, and its labels."""
    folder = tmp_path_factory.mktemp("transformer_lens")
    save_file({name: value.contiguous() for name, value in ours[1].inputs.items()}, folder / "inputs.safetensors")
    command = [PYTHON, "-P", peer.__file__, toys.path(CHECKPOINT), folder / "inputs.safetensors", folder / "out"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    with safe_open(folder / "out", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])


def close(a, b, scale=1.0):
    torch.testing.assert_close(a, b, atol=2e-4 * scale, rtol=1e-4)


def gain_of(model: HookedMLLM, layer: int | None) -> torch.Tensor:
    """The gain of the final norm or of a block's first norm, which TransformerLens expects in the next weights."""
    language_model = model.hf_model.model.language_model
    return language_model.norm.weight if layer in (None, -1, 6) else language_model.layers[layer].input_layernorm.weight


def test_it_is_the_version_that_the_manual_names(theirs):
    assert theirs[1]["version"].startswith("4.3.")


def test_every_shared_activation_is_the_same(ours, theirs):
    model, sample, logits, cache = ours
    tensors, _ = theirs
    close(logits, tensors["logits"])
    shared = [name for name in model.hook_dict if f"cache/{name}" in tensors]
    assert len(shared) == 135  # 22 in each of 6 blocks, the embedding, and 2 of the final norm
    text = ~sample.mask("visual")[0]
    for name in shared:
        mine, other = cache[name], tensors[f"cache/{name}"]
        assert mine.shape == other.shape, name
        if name == "hook_embed":  # there, before the picture is merged in
            mine, other = mine[:, text], other[:, text]
        if name.endswith("attn_scores"):  # masked scores: -inf here, the lowest number there
            hidden = mine == -torch.inf
            assert (other[hidden] < -1e30).all()
            mine, other = mine.masked_fill(hidden, 0), other.masked_fill(hidden, 0)
        torch.testing.assert_close(mine, other, atol=3e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_vision_tower_has_the_same_activations_under_its_own_names(ours, theirs):
    model, _, _, cache = ours
    tensors, _ = theirs
    names = {name: name.replace("vision.blocks", "cache/vision_encoder.encoder_layers") for name in model.hook_dict}
    shared = [name for name in names if name.startswith("vision.blocks") and names[name] in tensors]
    assert len(shared) == 36  # 18 in each of 2 blocks
    for name in shared:
        mine, other = cache[name], tensors[names[name]]
        if name.endswith("attn_scores"):  # there, the pattern once more
            mine = mine.softmax(-1)
        torch.testing.assert_close(mine, other, atol=3e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("number", range(len(peer.CALLS)))
def test_a_method_of_the_cache_returns_the_same(ours, theirs, number):
    model, sample, _, cache = ours
    method, options = peer.CALLS[number]
    other, labels = theirs[0][f"tools/{number}"], theirs[1]["labels"][number]
    mine, names = getattr(cache, method)(**options, return_labels=True)
    if "visual" in names:  # there, the picture is in no component, and its positions hold an embedding of no use
        kept = [i for i, name in enumerate(names) if name != "visual"]
        names, text = [names[i] for i in kept], ~sample.mask("visual")[0]
        mine, other = mine[kept][:, :, text], other[:, :, text]
    assert names == labels
    if options.get("apply_ln"):
        other = other * gain_of(model, options["layer"])
    close(mine, other)


def test_one_activation_of_all_blocks_is_stacked_up_to_the_same_block(ours, theirs):
    for name in peer.STACKED:
        for layer in (-1, 2):
            close(ours[3].stack_activation(name, layer), theirs[0][f"stack_activation/{name}/{layer}"])


def test_attributions_and_lens(ours, theirs):
    cache = ours[3]
    components = cache.stack_head_results(-1, incl_remainder=True)
    everywhere = slice(None)
    for name, tokens in (("logit_attrs", peer.TOKENS[:1]), ("logit_attrs/difference", peer.TOKENS)):
        close(cache.logit_attrs(components, *tokens, positions=everywhere), theirs[0][name])
    close(cache.logit_lens()[:, :, 0], theirs[0]["logit_lens"])


@pytest.mark.parametrize("form", peer.SLICES)
def test_pos_slice_selects_the_same_positions(ours, theirs, form):
    model, sample, _, _ = ours
    _, cache = model.run_with_cache(sample, peer.SLICED, pos_slice=peer.SLICES[form])
    for name in peer.SLICED:
        close(cache[name], theirs[0][f"{form}/{name}"])


def test_the_batch_axis_is_removed_in_place_and_by_a_number(ours, theirs):
    model, sample, _, cache = ours
    close(cache.apply_slice_to_batch_dim(0)["z", 1], theirs[0]["sample/z"])
    close(cache.apply_slice_to_batch_dim((0, 1))["z", 1], theirs[0]["range/sample/z"])
    assert cache.has_batch_dim and theirs[1]["in_place"]
    _, other = model.run_with_cache(sample, "blocks.1.attn.hook_z")
    assert other.remove_batch_dim() is other and not other.has_batch_dim
    close(other["z", 1], theirs[0]["unbatched/z"])
