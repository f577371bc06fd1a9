"""Hybrid attention by name where code is compiled or differentiated, and on a GPU."""

from contextlib import contextmanager

import pytest
import torch

from helpers.registered_witness import (
    CLASSES,
    LAYERS,
    NAME,
    close,
    decoder,
    prompts,
    register,
)
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads, Total
from hooked_mllm.errors import HeadError, UnsupportedModelError


@contextmanager
def layers_as_inputs():
    before = torch._dynamo.config.allow_unspec_int_on_nn_module
    torch._dynamo.reset()
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    try:
        yield
    finally:
        torch._dynamo.config.allow_unspec_int_on_nn_module = before
        torch._dynamo.reset()


@pytest.mark.filterwarnings("default")  # warnings of torch's compiler about itself
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_blocks_share_their_graphs_and_have_the_gradients_of_plain_ones(padded):
    register()
    model, n, graphs = decoder("qwen3", NAME, num_hidden_layers=4), 23, []
    x = torch.randn(2, n, 32, generator=torch.Generator().manual_seed(0))
    mask = prompts()[0]["attention_mask"].bool() if padded else None
    where = {"position_embeddings": model.model.rotary_emb(x, torch.arange(n)[None]), "attention_mask": mask}

    def count(graph, _):
        graphs.append(graph)
        return graph

    with layers_as_inputs(), torch.no_grad():
        for layer in model.model.layers:
            assert torch.equal(torch.compile(layer, backend=count, fullgraph=True)(x, **where), layer(x, **where))
    assert len(graphs) == 2  # of a number, and of numbers that change
    gradients = []
    with layers_as_inputs():
        layer = model.model.layers[2]
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            leaf = x.clone().requires_grad_(True)
            run(leaf, **where).square().sum().backward()
            gradients.append(leaf.grad)
    close(gradients[0], gradients[1])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_whole_model_compiled(padded):
    register()
    inputs, _ = prompts(2 if padded else 1)
    model = decoder("llama", NAME)
    expected = model(**inputs).logits
    with layers_as_inputs():
        compiled = torch.compile(model, backend="eager")
        close(compiled(**inputs, use_cache=False).logits, expected)
        if not padded:
            close(compiled(inputs["input_ids"], use_cache=False).logits, expected)


def losses(model, *prompts):
    model.zero_grad()
    sum(model(x, labels=x, use_cache=False).loss for x in prompts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", CLASSES)
def test_training_under_autocast(kind):
    """Rotary encoding leaves q and k in float32 there, and v is not."""
    register({layer: range(4) for layer in range(LAYERS)})  # all heads dense: the model's own attention
    inputs = prompts(1)[0]["input_ids"]
    found = []
    for attention in ("sdpa", NAME):
        model = decoder(kind, attention).requires_grad_(True).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(losses(model, inputs))
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
def test_a_policy_in_a_block_that_a_backward_pass_runs_again():
    """Two prompts, one backward pass: what a policy noted of the first is dropped when it runs again."""
    first, second = (torch.randint(1, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in (30, 45))
    policy = QueryAwareHeads(PerLayer(2), queries=4)
    register(policy)
    model = decoder("qwen3", NAME).requires_grad_(True).train()
    plain = losses(model, first, second)
    chosen = policy.chosen
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert len(chosen) == LAYERS and torch.equal(losses(model, first, second), plain) and policy.chosen == chosen
    register(QueryAwareHeads(Total(5), queries=4))
    with pytest.raises(UnsupportedModelError, match=r"backward pass runs attention again.*Total.*PerLayer"):
        losses(model, first, second)
    register(QueryAwareHeads(Total(5), queries=4))
    model.gradient_checkpointing_disable()
    assert losses(model, first).isfinite().all()


@pytest.mark.filterwarnings("default")  # warnings of torch's compiler about itself
@torch.no_grad()
def test_heads_of_another_model_are_rejected_in_compiled_code_too():
    inputs, _ = prompts(1)
    model = decoder("qwen3", NAME)
    run = torch.compile(lambda: model(**inputs, use_cache=False).logits, backend="eager", fullgraph=True)
    register()
    run()
    register(["L3H0"])
    with pytest.raises(HeadError, match="Layer 3 of head L3H0 is not there"):
        run()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


WIDE = {"head_dim": 64, "hidden_size": 64}


def model_on_gpu(dtype, implementation):
    register(implementation=implementation)
    return decoder("qwen3", NAME, **WIDE).to("cuda", dtype)


def on_gpu(dtype, implementation, inputs):
    model = model_on_gpu(dtype, implementation)
    return model(**{name: value.cuda() for name, value in inputs.items()}).logits.float().cpu()


def block_on_gpu(dtype, implementation, compiled=False):
    model = model_on_gpu(dtype, implementation).model
    block = torch.compile(model.layers[1], fullgraph=True) if compiled else model.layers[1]
    x = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    where = model.rotary_emb(x, torch.arange(300, device="cuda")[None])
    return block(x, position_embeddings=where, attention_mask=None).float()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@needs_gpu
@torch.inference_mode()
def test_on_a_gpu_the_kernel_is_as_close_to_float32_as_the_definition(dtype, side):
    inputs, _ = prompts(3, 777, side)
    real = inputs["attention_mask"].bool()
    exact = on_gpu(torch.float32, "naive", inputs)[real]
    kernel, definition = ((on_gpu(dtype, how, inputs)[real] - exact).norm() for how in ("auto", "naive"))
    assert 0 < kernel < 1.2 * definition < 0.2 * exact.norm()


@needs_gpu
@pytest.mark.filterwarnings("default")
@torch.inference_mode()
def test_on_a_gpu_a_compiled_block_is_the_block():
    exact = block_on_gpu(torch.float32, "naive")
    compiled, plain = ((block_on_gpu(torch.bfloat16, "auto", way) - exact).norm() for way in (True, False))
    assert 0 < compiled < 1.2 * plain < 0.05 * exact.norm()


@needs_gpu
@torch.inference_mode()
def test_on_a_gpu_a_padded_batch_has_no_mask_of_n_by_n():
    n = 8192
    inputs, _ = prompts(2, n)
    register(implementation="triton")
    model = decoder("qwen3", NAME, **WIDE, max_position_embeddings=n).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in inputs.items()}
    for _ in range(2):  # the first run compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.model(**inputs, use_cache=False)
    assert torch.cuda.max_memory_allocated() - before < n * n  # a boolean mask would be twice that
