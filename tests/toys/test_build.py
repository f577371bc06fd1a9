"""Processors, templates and configurations are those of the bundled toys."""

from helpers import toy_witness as witness
from hooked_mllm.toys import VisualRetrieval, path
from hooked_mllm.toys.build import CHAT_TEMPLATE, build_config, build_tokenizer

NAME = "toy-qwen3-vl"


def test_its_files_are_those_the_code_builds():
    assert (path(NAME) / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert witness.processor().tokenizer.get_vocab() == build_tokenizer().get_vocab()
    config, built = witness.model().config, build_config(build_tokenizer())
    for part in ("text_config", "vision_config"):
        expected, actual = getattr(built, part).to_dict(), getattr(config, part).to_dict()
        for volatile in ("dtype", "transformers_version", "_attn_implementation"):
            expected.pop(volatile, None), actual.pop(volatile, None)
        assert actual == expected
    assert config.vision_config.deepstack_visual_indexes


def test_the_prompt_puts_the_filler_between_the_pages_and_the_question():
    example = VisualRetrieval(pages=2, filler=3).example(0)
    batch = witness.inputs([example])
    tokenizer = witness.processor().tokenizer
    page = ["<|vision_start|>"] + ["<|image_pad|>"] * 36 + ["<|vision_end|>"]
    expected = ["<|im_start|>", "user", *page, *page, *example.system.split(), *tokenizer.tokenize(example.question)]
    expected += ["<|im_end|>", "<|im_start|>", "assistant"]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == expected
    assert batch["image_grid_thw"].tolist() == [[1, 12, 12]] * 2  # 96 x 96 px stay 96 x 96
