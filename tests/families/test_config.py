"""HookedConfig: sizes against the shapes of the modules, for every family and for one that a user adds in one file."""

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.hook_points_page import check_axes
from helpers.tiny import ALL_FAMILIES
from helpers.wrapped import fresh, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError
from hooked_mllm.families import BlockParts, Qwen3VL, TowerParts, register
from hooked_mllm.families.registry import FAMILIES

IMAGE, HIDDEN, TOWER = 5, 48, 32


class Qwen2VL(Qwen3VL):
    """A family of one file: Qwen2-VL, whose tower has its own module names and an `embed_dim`."""

    name = "qwen2_vl"
    model_types = ("qwen2_vl",)
    model_classes = ("Qwen2VLForConditionalGeneration",)
    vision = TowerParts(
        root="model.visual",
        blocks="model.visual.blocks",
        block=BlockParts(
            ln1="norm1",
            attn="attn",
            qkv="attn.qkv",
            o="attn.proj",
            ln2="norm2",
            mlp="mlp",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
        ),
        causal=False,
        packed=True,
    )
    deepstack_arguments = None

    def n_deepstack(self, model):
        return 0


@pytest.fixture
def qwen2_vl():
    register(Qwen2VL())
    yield HookedMLLM.from_model(qwen2_vl_model(), check=False)
    del FAMILIES["qwen2_vl"]


def qwen2_vl_model():
    torch.manual_seed(0)
    text = dict(hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=2, vocab_size=64)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]})
    vision = dict(depth=2, embed_dim=TOWER, hidden_size=HIDDEN, num_heads=2, patch_size=4)
    ids = dict(image_token_id=IMAGE, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).eval()


def image_inputs():
    """One image of 4 x 6 patches, joined two by two, in a prompt."""
    ids = torch.tensor([[9, 7, *[IMAGE] * 6, 8, 10]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def test_the_width_of_a_tower_is_that_of_its_modules_under_any_name_in_the_configuration(qwen2_vl):
    cfg, block = qwen2_vl.cfg, qwen2_vl.hf_model.model.visual.blocks[0]
    assert block.norm1.weight.shape == (cfg.vision_d_model,) == (TOWER,)
    assert block.attn.qkv.weight.shape == (3 * cfg.vision_n_heads * cfg.vision_d_head, cfg.vision_d_model)
    assert (cfg.vision_n_layers, cfg.vision_n_heads, cfg.vision_d_head) == (2, 2, 16)
    assert (cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_mlp) == (HIDDEN, 4, 2, 12, 40)
    assert (cfg.d_vocab, cfg.n_deepstack, cfg.family) == (64, 0, "qwen2_vl")


@torch.no_grad()
def test_a_family_of_one_file_has_all_hook_points_in_its_own_sizes(qwen2_vl):
    _, cache = qwen2_vl.run_with_cache(image_inputs())
    assert set(cache) == set(qwen2_vl.hook_dict)
    check_axes(qwen2_vl, {name: tuple(cache[name].shape) for name in qwen2_vl.hook_dict})
    assert cache["vision", "q", 1].shape == (1, 24, 2, 16) and cache["vision", "resid_post", 1].shape == (1, 24, TOWER)
    qkv = qwen2_vl.hf_model.model.visual.blocks[1].attn.qkv(cache["vision", "normalized", 1, "ln1"][0])
    # the norms of a fresh model have no gain
    torch.testing.assert_close(cache["vision", "v", 1][0], qkv.unflatten(1, (3, 2, 16))[:, 2])


@torch.no_grad()
def test_edits_in_its_tower_reach_the_logits(qwen2_vl):
    inputs = image_inputs()
    plain = qwen2_vl(inputs)
    assert torch.equal(plain, qwen2_vl_model()(**inputs).logits)
    for part in ("q", "k", "v", "z", "rot_k"):
        hook = (f"vision.blocks.0.attn.hook_{part}", lambda x, hook: x * 3)
        assert not torch.equal(qwen2_vl.run_with_hooks(inputs, fwd_hooks=[hook]), plain), part


def test_errors_of_a_subclass_name_its_own_family(qwen2_vl):
    inputs = image_inputs()
    del inputs["mm_token_type_ids"]
    with pytest.raises(InputError, match="^qwen2_vl needs `mm_token_type_ids`"):
        qwen2_vl(inputs)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_sizes_are_the_shapes_of_the_modules(name):
    model = wrapped(name)
    cfg, hf, family = model.cfg, model.hf_model, model.family
    text = hf.get_submodule(f"{family.text.blocks}.0")
    assert text.self_attn.o_proj.weight.shape == (cfg.d_model, cfg.n_heads * cfg.d_head)
    assert text.self_attn.k_proj.weight.shape == (cfg.n_key_value_heads * cfg.d_head, cfg.d_model)
    assert hf.lm_head.weight.shape == (cfg.d_vocab, cfg.d_model)
    assert len(hf.get_submodule(family.text.blocks)) == cfg.n_layers
    vision = hf.get_submodule(f"{family.vision.blocks}.0")
    (o,) = (m for n, m in vision.named_modules() if n == family.vision.block.o)
    assert o.weight.shape == (cfg.vision_d_model, cfg.vision_n_heads * cfg.vision_d_head)


def test_a_tower_with_an_adapted_projection_has_the_same_sizes():
    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x):
            return self.base(x)

    hf = fresh("llava_onevision")
    attention = hf.model.vision_tower.encoder.layers[0].self_attn
    attention.out_proj = Adapted(attention.out_proj)
    assert HookedMLLM.from_model(hf, check=False).cfg == wrapped("llava_onevision").cfg
