"""The training script: prompts and pixels against the processor, losses and dropout, and checkpoints that load."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.example_script import import_example
from hooked_mllm.toys import path
from hooked_mllm.toys.build import PLANTED


@pytest.fixture(scope="module")
def script():
    return import_example("train_toy")


def recipe(script, family="qwen3_vl", **more):
    return script.Recipe(**{"family": family, "steps": 3, "batch": 2, "warmup": 1} | more)


@pytest.fixture(scope="module")
def trained(script):
    """A trainer after three steps on two scenes each."""
    return script.train(recipe(script), torch.device("cpu"), workers=0)[0]


@pytest.mark.parametrize(("stage", "share", "kind"), [(1, 0, "pages"), (2, 0, "pages"), (3, 1, "video")])
def test_the_fast_forward_equals_the_official_one(script, family, stage, share, kind):
    """The short cuts of each family against eager attention, all arguments and the model's own positions."""
    trained = script.train(recipe(script, family, steps=1), torch.device("cpu"), workers=0)[0]
    batches = script.Batches(recipe(script, family, batch=3, video_share=share), trained.tokenizer, stage, start=4)
    found, views, ids, _ = batches[0]
    medium = trained.media[kind]
    pages = medium.pages(views, ids)
    assert (found, pages > 1) == (kind, stage > 1)
    trained.reach.window, trained.reach.dropout = None, 0.0
    common = {"input_ids": ids, medium.pixels: medium.model_pixels(views, pages), "use_cache": False}
    common |= medium.official(pages, len(ids))
    config = trained.model.config
    if family == "qwen3_vl":
        common["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    with torch.no_grad():
        fast = medium.logits(trained.model, views, ids, pages)
        trained.model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
        official = trained.model(**common).logits
    torch.testing.assert_close(fast, official, atol=1e-4, rtol=0)


def test_a_free_model_has_neither_window_nor_spared_heads(script):
    free = recipe(script, free=True, window=None)
    trainer = script.Trainer(free, torch.device("cpu"))
    trainer.step(0, *script.Batches(free, trainer.tokenizer, 0, 0)[0])
    assert trainer.reach.planted == ()
    assert trainer.reach.window is None
    assert trainer.reach.dropout > 0


def test_each_drawn_cell_has_its_shape_as_target(script, family):
    """The first stage draws 6 shapes; each cell's own tokens, and no other, carry its name."""
    tokenizer = script.build_processor(family).tokenizer
    _, _, ids, names = script.Batches(recipe(script, family), tokenizer, 0, start=0)[0]
    tokens = script.FAMILIES[family]().cell_tokens(1)[0]
    image = {"qwen3_vl": "<|image_pad|>", "llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}[family]
    assert (ids[:, tokens.flatten()] == tokenizer.get_vocab()[image]).all()
    assert len(tokens.unique()) == tokens.numel()
    for row in names:
        cells = row[tokens]
        assert (cells == cells[:, :1]).all()
        assert (cells[:, 0] >= 0).sum() == 6
        assert (row >= 0).sum() == 6 * tokens.shape[1]


def test_each_cell_of_a_video_has_its_shape_as_target(script, family):
    """Four shapes a moment, each named by all tokens of its cell: 2 x 2 where frames merge, else one a frame."""
    tokenizer = script.build_processor(family).tokenizer
    batches = script.Batches(recipe(script, family, video_share=1), tokenizer, 3, start=0)
    kind, views, ids, names = batches[0]
    medium = batches.media[kind]
    moments = medium.pages(views, ids)
    placeholder = {"qwen3_vl": "<|video_pad|>", "llava_onevision": "<video>", "internvl": "<IMG_CONTEXT>"}[family]
    tokens = medium.cell_tokens(moments)
    assert tokens.shape == (moments, 9, 4 if family == "qwen3_vl" else 2)
    assert (ids[:, tokens.flatten()] == tokenizer.get_vocab()[placeholder]).all()
    assert len(tokens.unique()) == tokens.numel()
    for row in names:
        cells = row[tokens]
        assert (cells == cells[..., :1]).all()
        assert ((cells[..., 0] >= 0).sum(1) == 4).all()
        assert (row >= 0).sum() == 4 * moments * tokens.shape[2]


def test_head_dropout_follows_its_settings(script):
    """Whole layers but for the planted heads, and of the planted heads some, never all."""
    reach = script.Reach(8, PLANTED)
    reach.dropout, reach.layer_dropout, reach.planted_dropout = 0.2, 0.5, 0.5
    torch.manual_seed(0)
    reach.draw(400, 6, torch.device("cpu"))
    kept = torch.stack([reach.kept(layer, 400, torch.device("cpu"))[..., 0, 0] for layer in range(6)], 1)
    planted = kept[:, 2, 4:]
    assert planted.unique().tolist() == [0.0, pytest.approx(0.8)]
    assert (planted.sum(-1) > 0).all()
    assert 0.35 < (planted == 0).any(-1).float().mean() < 0.55
    others = kept.clone()
    others[:, 2, 4:] = 0
    bare = others.sum(-1) == 0
    assert (bare.sum(-1) <= 1).float().mean() > 0.95  # a layer may lose all its heads one by one as well
    assert 0.4 < bare.any(-1).float().mean() < 0.6
    assert 0.7 < (others[~bare][:, :4] > 0).float().mean() < 0.85


def test_it_resumes_from_a_checkpoint_with_pages_and_videos(script):
    going_on = recipe(script, steps=2, batch=1, start="toy-qwen3-vl", lr=1e-6)
    trainer, _ = script.train(going_on, torch.device("cpu"), workers=0)
    weights = AutoModelForImageTextToText.from_pretrained(path("toy-qwen3-vl"), dtype=torch.float32).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=0)
    batches = script.Batches(recipe(script, start="toy-qwen3-vl"), trainer.tokenizer, 3, start=0)
    assert {batches.task(np.random.default_rng(i))[0] for i in range(12)} == {"pages", "video"}


def test_only_the_planted_heads_see_past_the_window(trained):
    past = torch.ones(40, 40).tril().bool()
    for layer in range(6):
        mask = trained.reach.mask(layer, 40, 16, torch.device("cpu"))[0]
        far = {head for head in range(8) if mask[head, 39, 0]}
        assert {(layer, head) for head in far} == {p for p in PLANTED if p[0] == layer}
        assert not mask[:, ~past].any()
        for head in set(range(8)) - far:
            assert mask[head].sum(-1).max() == 16


def test_the_auxiliary_loss_has_its_queries_in_the_question(script, trained):
    """Four questions a scene, one shape word and one colour word each, in the same order."""
    _, _, ids, _ = script.Batches(recipe(script, batch=3), trained.tokenizer, 2, start=0)[0]
    (row, shape), (_, color) = (table[ids].nonzero(as_tuple=True) for table in (trained.is_shape, trained.is_color))
    assert row.tolist() == sorted([0, 1, 2] * 4)
    assert ((shape < color) & (color - shape <= 11)).all()


def test_what_it_saves_loads(script, trained, tmp_path):
    before = {name: tensor.detach().clone() for name, tensor in trained.model.state_dict().items()}
    script.save(trained, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].bfloat16())
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == trained.processor.chat_template
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
