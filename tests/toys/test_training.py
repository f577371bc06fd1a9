"""The training script: what it feeds the model is what the processor gives, and what it saves loads."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

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


@pytest.fixture(scope="module")
def trained(script):
    """A trainer after three steps on two scenes each."""
    return script.train(script.Recipe(steps=3, batch=2, warmup=1), torch.device("cpu"), workers=0)[0]


def test_the_fast_forward_equals_the_official_one(script, trained):
    """Packed pages and given positions, against eager attention, a grid row a page and transformers' own positions."""
    pixels, ids = script.Batches(script.Recipe(batch=3), trained.tokenizer, hard=True, start=4)[0]
    pages = len(pixels) // len(ids)
    assert pages > 1
    trained.reach.window, trained.reach.dropout = None, 0.0
    common = {"input_ids": ids, "pixel_values": script.patches(pixels), "use_cache": False}
    common["mm_token_type_ids"] = (ids == trained.image_id).int()
    positions = trained.positions(pages, ids.shape[1]).expand(3, len(ids), -1)
    with torch.no_grad():
        fast = trained.model(image_grid_thw=torch.tensor([[len(pixels), 12, 12]]), position_ids=positions, **common)
        trained.model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
        official = trained.model(image_grid_thw=torch.tensor([[1, 12, 12]] * len(pixels)), **common)
        trained.model.set_attn_implementation(
            {"text_config": script.TEXT_ATTENTION, "vision_config": script.VISION_ATTENTION}
        )
    torch.testing.assert_close(fast.logits, official.logits, atol=1e-4, rtol=0)


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
    _, ids = script.Batches(script.Recipe(batch=3), trained.tokenizer, hard=True, start=0)[0]
    (row, shape), (_, color) = (table[ids].nonzero(as_tuple=True) for table in (trained.is_shape, trained.is_color))
    assert row.tolist() == sorted([0, 1, 2] * 4)
    assert ((shape < color) & (color - shape <= 11)).all()


def test_what_it_saves_loads(script, trained, tmp_path):
    before = {name: tensor.detach().clone() for name, tensor in trained.model.state_dict().items()}
    script.save(trained, tmp_path)
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].bfloat16())
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.chat_template == trained.processor.chat_template
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
