"""The architectures of the toys: shapes of modules, and no weights that are larger or smaller than stated."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hooked_mllm.families import family_of
from hooked_mllm.toys.build import INIT, LLAVA_INIT, MERGE, PATCH, TILE, build_config
from hooked_mllm.toys.render import CELL, PAGE
from hooked_mllm.toys.vocabulary import FAMILIES, PAD_TOKEN, TURN_END, VISUAL_TOKENS, build_tokenizer

#: width of the residual stream, width of a head, vision blocks
SIZES = {"qwen3_vl": (64, 16, 3), "llava_onevision": (128, 32, 2), "internvl": (64, 16, 2)}


@pytest.fixture(scope="module", params=FAMILIES)
def built(request):
    """A family's name, its tokenizer, and a model of its configuration on the meta device."""
    tokenizer = build_tokenizer(request.param)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(tokenizer, request.param))
    return request.param, tokenizer, model


def test_six_layers_of_eight_heads_on_four(built):
    name, tokenizer, model = built
    family, (d_model, d_head, vision_blocks) = family_of(model.config), SIZES[name]
    blocks = family.text.modules(model)
    assert len(blocks) == 6 and len(family.vision.modules(model)) == vision_blocks == family.vision_depth(model)
    attention = blocks[0].self_attn
    assert attention.q_proj.weight.shape == (8 * d_head, d_model)
    assert attention.k_proj.weight.shape == (4 * d_head, d_model)
    assert hasattr(attention, "q_norm") == (name != "llava_onevision")
    assert model.get_output_embeddings().weight.shape == (len(tokenizer), d_model)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_special_tokens_have_the_ids_of_the_tokenizer(built):
    name, tokenizer, model = built
    ids = tokenizer.get_vocab()
    text = model.config.text_config
    assert (text.pad_token_id, text.eos_token_id, text.bos_token_id) == (ids[PAD_TOKEN], ids[TURN_END], None)
    placeholders = [ids[token] for attribute, token in VISUAL_TOKENS[name].items() if "start" not in attribute]
    assert set(family_of(model.config).visual_token_ids(model.config)) <= set(placeholders)


def test_a_cell_is_one_token():
    """Of Qwen3-VL merged from 2 x 2 patches, of LLaVA one patch, of InternVL shuffled from 2 x 2 patches of a tile."""
    qwen, llava, internvl = (build_config(build_tokenizer(name), name) for name in FAMILIES)
    assert qwen.vision_config.patch_size * qwen.vision_config.spatial_merge_size == CELL == PATCH * MERGE
    assert llava.vision_config.patch_size == CELL and llava.vision_config.image_size == PAGE
    assert internvl.vision_config.patch_size == [PATCH, PATCH] and internvl.downsample_ratio == 1 / MERGE
    assert internvl.image_seq_length == (TILE // CELL) ** 2


@pytest.mark.parametrize(("name", "init"), [("qwen3_vl", INIT), ("llava_onevision", LLAVA_INIT), ("internvl", INIT)])
def test_weights_begin_as_large_as_stated(name, init):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(build_config(build_tokenizer(name), name))
    weight = family_of(model.config).text.modules(model)[3].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(init, rel=0.05)
