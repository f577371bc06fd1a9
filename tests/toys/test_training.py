"""The training script: what it feeds the model is what the processor gives, and what it saves loads."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hooked_mllm.toys.build import PLANTED

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script():
    if not (EXAMPLES / "train_toy.py").is_file():
        pytest.skip("the examples are not beside the tests")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_toy
    finally:
        sys.path.remove(str(EXAMPLES))
    return train_toy


def recipe(script, family="qwen3_vl", **more):
    return script.Recipe(**{"family": family, "steps": 3, "batch": 2, "warmup": 1} | more)


@pytest.fixture(scope="module")
def trained(script):
    """A trainer after three steps on two scenes each."""
    return script.train(recipe(script), torch.device("cpu"), workers=0)[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_fast_forward_equals_the_official_one(script, family, stage):
    """The short cuts of each family against eager attention, all arguments and the model's own positions."""
    trained = script.train(recipe(script, family, steps=1), torch.device("cpu"), workers=0)[0]
    views, ids, _ = script.Batches(recipe(script, family, batch=3), trained.tokenizer, stage, start=4)[0]
    pages = trained.family.pages(views, ids)
    assert (pages > 1) == (stage == 2)
    trained.reach.window, trained.reach.dropout = None, 0.0
    common = {"input_ids": ids, "pixel_values": trained.family.model_pixels(views, pages), "use_cache": False}
    common |= trained.family.official(pages, len(ids))
    if family == "qwen3_vl":
        common["mm_token_type_ids"] = (ids == trained.model.config.image_token_id).int()
    with torch.no_grad():
        fast = trained.family.logits(trained.model, views, ids, pages)
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


def test_each_drawn_cell_is_asked_for_its_shape(script, family):
    """The first stage draws 6 shapes; each cell's own tokens, and no other, carry its name."""
    tokenizer = script.build_processor(family).tokenizer
    _, ids, names = script.Batches(recipe(script, family), tokenizer, 0, start=0)[0]
    tokens = script.FAMILIES[family]().cell_tokens(1)[0]
    image = {"qwen3_vl": "<|image_pad|>", "llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}[family]
    assert (ids[:, tokens.flatten()] == tokenizer.get_vocab()[image]).all()
    assert len(tokens.unique()) == tokens.numel()
    for row in names:
        cells = row[tokens]
        assert (cells == cells[:, :1]).all()
        assert (cells[:, 0] >= 0).sum() == 6
        assert (row >= 0).sum() == 6 * tokens.shape[1]


def test_only_the_planted_heads_see_past_the_window(trained):
    past = torch.ones(40, 40).tril().bool()
    for layer in range(6):
        mask = trained.reach.mask(layer, 40, 16, torch.device("cpu"))[0]
        far = {head for head in range(8) if mask[head, 39, 0]}
        assert {(layer, head) for head in far} == {p for p in PLANTED if p[0] == layer}
        assert not mask[:, ~past].any()
        for head in set(range(8)) - far:
            assert mask[head].sum(-1).max() == 16


def test_the_auxiliary_loss_asks_inside_the_question(script, trained):
    """Four questions a scene, one shape word and one colour word each, in the same order."""
    _, ids, _ = script.Batches(recipe(script, batch=3), trained.tokenizer, 2, start=0)[0]
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
