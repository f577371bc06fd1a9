import pytest
import torch
from accelerate import dispatch_model

from helpers.tiny import tiny_model
from hooked_mllm import HookedMLLM
from hooked_mllm.attention.registered import register_hybrid_attention
from hooked_mllm.bench import compile_blocks, random_text_model
from hooked_mllm.bench.compiled import OUTSIDE, text_backbone
from hooked_mllm.errors import InputError, UnsupportedModelError

#: torch's compiler, when it is first imported, warns of itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
HEADS = ["L0H1", "L1H0", "L1H3"]  # another number in every layer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def counting(graph, inputs):
    """A backend that runs graphs as they are and counts them; one for all tests, which share what it compiled."""
    counting.graphs += 1
    return graph.forward


counting.graphs = 0


def tokens(length, vocabulary=448, seed=0):
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


def hidden(text, length, **more):
    return text(input_ids=tokens(length), use_cache=False, **more).last_hidden_state


@pytest.mark.parametrize(
    ("family", "attention", "backend"),
    [
        ("qwen3_vl", "compiled_hybrid", "aot_eager"),
        ("llava_onevision", "compiled_hybrid", counting),
        ("internvl", "sdpa", counting),
    ],
    ids=["qwen3_vl", "llava_onevision", "internvl"],
)
def test_compiled_equals_uncompiled(family, attention, backend):
    register_hybrid_attention("compiled_hybrid", HEADS, sink=2, window=8, implementation="naive")
    text = text_backbone(tiny_model(family))
    text.set_attn_implementation(attention)
    expected = hidden(text, 65)
    with compile_blocks(text, backend=backend):
        got = hidden(text, 65)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert text.config._attn_implementation == attention
    assert not torch.allclose(expected, hidden(text, 65) * 1.01)  # the comparison can fail


def test_what_is_compiled_serves_all_layers_lengths_and_models():
    register_hybrid_attention("compiled_hybrid", HEADS, sink=2, window=8, implementation="naive")
    torch._dynamo.reset()
    before, found = counting.graphs, []
    for layers in (2, 5):
        text = text_backbone(tiny_model("qwen3_vl", layers=layers))
        text.set_attn_implementation("compiled_hybrid")
        with compile_blocks(text, backend=counting):
            for length in (33, 65):
                hidden(text, length)
                found.append(counting.graphs - before)
    assert 0 < found[0] <= 5 and set(found) == {found[0]}


def test_padding_reaches_the_attention_outside():
    text = text_backbone(tiny_model("internvl"))
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, :9] = 0
    expected = hidden(text, 40, attention_mask=mask)
    with compile_blocks(text, backend=counting):
        got = hidden(text, 40, attention_mask=mask)
    torch.testing.assert_close(got[:, 9:], expected[:, 9:])
    assert not torch.allclose(got[:, 9:], hidden(text, 40)[:, 9:], atol=1e-3)


def test_a_whole_model_and_a_wrapped_one():
    model = tiny_model("llava_onevision")
    ids = tokens(30)
    expected = model(input_ids=ids).logits
    with compile_blocks(model, backend=counting) as blocks:
        assert blocks.text is model.model.language_model
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert compile_blocks(HookedMLLM.from_model(model), backend=counting).text is model.model.language_model


def test_everything_is_put_back_even_after_an_error():
    text = text_backbone(tiny_model("qwen3_vl"))
    blocks = compile_blocks(text, backend=counting)
    for _ in range(2):  # it can be entered again
        with pytest.raises(RuntimeError, match="stop"), blocks:
            assert text.config._attn_implementation == OUTSIDE
            assert all("forward" in layer.__dict__ for layer in text.layers)
            raise RuntimeError("stop")
        assert text.config._attn_implementation == "sdpa"
        assert all("forward" not in layer.__dict__ for layer in text.layers)
    torch._dynamo.reset()
    before = counting.graphs
    hidden(text, 20)
    assert counting.graphs == before


def test_a_model_that_accelerate_spread():
    plain, text = (random_text_model("tiny", dtype=torch.float32) for _ in range(2))
    text = dispatch_model(text, {"": "cpu"}, force_hooks=True)
    assert hasattr(text.layers[0], "_hf_hook") and not hasattr(plain.layers[0], "_hf_hook")
    torch.testing.assert_close(hidden(text, 50), hidden(plain, 50))
    torch._dynamo.reset()
    before = counting.graphs
    forwards = [module.forward for module in text.modules()]
    with compile_blocks(text, backend=counting):
        torch.testing.assert_close(hidden(text, 50), hidden(plain, 50))
    assert 0 < counting.graphs - before <= 5
    assert [module.forward for module in text.modules()] == forwards


def test_what_cannot_be_compiled():
    with pytest.raises(UnsupportedModelError, match="Linear has no text decoder"):
        compile_blocks(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        model = tiny_model("qwen3_vl")
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        compile_blocks(model.to("meta"))
    text = text_backbone(tiny_model("qwen3_vl"))
    with compile_blocks(text, backend=counting), pytest.raises(InputError, match="compiled already"):
        compile_blocks(text, backend=counting).__enter__()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # warnings of torch's compiler
def test_inductor_on_the_gpu(family):
    register_hybrid_attention("compiled_hybrid", HEADS, sink=2, window=8)
    text = text_backbone(tiny_model(family)).to("cuda")
    text.set_attn_implementation("compiled_hybrid")
    ids = tokens(65).to("cuda")
    expected = text(input_ids=ids, use_cache=False).last_hidden_state
    with compile_blocks(text):
        got = text(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
