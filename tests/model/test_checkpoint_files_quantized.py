"""Quantized checkpoints: every weight is a float or of a module that the quantizer converted, and it was applied."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from helpers.checkpoint_folders import KEY, edit_json, rewrite
from hooked_mllm import toys
from hooked_mllm.errors import InputError, UnsupportedModelError
from hooked_mllm.model.checkpoint_files import CheckpointFiles
from hooked_mllm.model.loading import load_model

OUT = "model.language_model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module", params=[8, 4])
def quantized_source(request, tmp_path_factory):
    """The toy as plain transformers saves it in weights of bitsandbytes, and its bits."""
    folder = tmp_path_factory.mktemp("quantized") / "toy"
    shutil.copytree(toys.path("toy-qwen3-vl"), folder)
    settings = BitsAndBytesConfig(load_in_8bit=request.param == 8, load_in_4bit=request.param == 4)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    model.save_pretrained(folder)
    return folder, request.param


@pytest.fixture
def quantized(quantized_source, tmp_path):
    folder, bits = quantized_source
    return Path(shutil.copytree(folder, tmp_path / "quantized")), bits


def test_a_quantized_checkpoint_is_read(quantized):
    model, _ = load_model(quantized[0])
    stored = load_file(quantized[0] / "model.safetensors")[f"{OUT}.weight"]
    assert torch.equal(model.get_parameter(f"{OUT}.weight").data, stored)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("model.language_model.layers.0.input_layernorm.weight", torch.int8),
        ("model.language_model.embed_tokens.weight", torch.int32),
        ("model.visual.blocks.0.attn.qkv.bias", torch.int8),
        ("model.visual.patch_embed.proj.weight", torch.uint8),
        ("lm_head.weight", torch.int8),
        ("model.language_model.norm.weight", torch.float8_e4m3fn),
    ],
)
def test_weights_that_the_quantization_does_not_convert(quantized, key, dtype):
    rewrite(quantized[0], lambda weights: weights.update({key: weights[key].to(dtype)}))
    with pytest.raises(InputError, match=f"The weight '{key}' .* its module is not one that the quantization conv"):
        load_model(quantized[0])


@pytest.mark.parametrize("damage", ["scales", "int32", "float32"])
def test_quantized_weights_that_are_damaged(quantized, damage):
    def change(weights):
        if damage != "scales":
            weights[f"{OUT}.weight"] = weights[f"{OUT}.weight"].to(getattr(torch, damage))
        for key in [k for k in weights if k.startswith((f"{OUT}.weight.", f"{OUT}.SCB")) and damage == "scales"]:
            del weights[key]

    rewrite(quantized[0], change)
    with pytest.raises(InputError, match=r"not of the type of its quantization, or lacks its scales|cannot be loaded"):
        load_model(quantized[0])


def test_a_quantization_that_is_declared_falsely(quantized):
    folder, _ = quantized
    weights = Path(toys.path("toy-qwen3-vl")) / "model.safetensors"
    shutil.copy(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"not of the type of its quantization, or lacks its scales"):
        load_model(folder)


def test_a_quantization_in_the_text_config(quantized):
    """transformers reads one there, too."""
    folder, _ = quantized
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder)[0].hf_quantizer is not None


@pytest.mark.parametrize("method", ["bitsandbytes", "bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_a_quantization_without_bits(folder, method):
    settings = {"quant_method": method, "load_in_8bit": False, "load_in_4bit": False}
    edit_json(folder / "config.json", quantization_config=settings)
    rewrite(folder, lambda weights: weights.update({KEY: weights[KEY].to(torch.int32)}))
    with pytest.raises(UnsupportedModelError, match="neither load_in_8bit nor load_in_4bit is true"):
        load_model(folder)


def test_options_of_a_quantization(folder):
    with pytest.raises(UnsupportedModelError, match="neither load_in_8bit nor load_in_4bit is true"):
        load_model(folder, quantization_config=BitsAndBytesConfig())
    rewrite(folder, lambda weights: weights.update({KEY: weights[KEY].to(torch.int32)}))
    with pytest.raises(InputError, match=f"The weight '{KEY}' .* is of type I32"):  # the checkpoint has no quantization
        load_model(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_quantization_of_a_part(folder, part):
    config = json.loads((folder / "config.json").read_text())[part]
    edit_json(folder / "config.json", **{part: config | {"quantization_config": {"quant_method": "magic"}}})
    with pytest.raises(UnsupportedModelError, match="method 'magic', which transformers does not have"):
        load_model(folder)


def test_a_quantization_of_the_vision_tower_alone(folder):
    config = json.loads((folder / "config.json").read_text())["vision_config"]
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(folder / "config.json", vision_config=config | {"quantization_config": settings})
    with pytest.raises(UnsupportedModelError, match="in vision_config, which transformers ignores"):
        load_model(folder)


def test_a_quantization_that_transformers_does_not_apply(quantized):
    folder, _ = quantized
    files = CheckpointFiles(str(folder), {})
    kinds = files.check_weights({}, None, quantized=True)
    plain, _ = load_model("toy-qwen3-vl")
    plain.config.quantization_config = {"quant_method": "magic"}
    with pytest.raises(UnsupportedModelError, match="quantization that transformers did not apply"):
        files.check_quantized(plain, kinds)


def in_float8(folder: Path, scale: float | None = 0.5) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "dequantize": True}
    edit_json(folder / "config.json", quantization_config=settings)
    scales = {} if scale is None else {f"{KEY}_scale_inv": torch.full((1, 1), scale)}
    rewrite(folder, lambda weights: weights.update({KEY: weights[KEY].to(torch.float8_e4m3fn)} | scales))


def test_weights_that_transformers_dequantizes(folder):
    """Without a GPU it loads float8 weights as floats, and deletes the quantizer."""
    in_float8(folder)
    stored = load_file(folder / "model.safetensors")[KEY]
    model, _ = load_model(folder)
    assert torch.equal(model.get_parameter(KEY), stored.to(torch.float32) * 0.5)


def test_float8_weights_without_scales(folder):
    in_float8(folder, scale=None)
    with pytest.raises((InputError, UnsupportedModelError), match="did not apply|not one that the quant|cannot be loa"):
        load_model(folder)


@pytest.mark.parametrize(
    "key", ["model.language_model.norm.weight", "model.language_model.layers.0.mlp.up_proj.weight"]
)
def test_other_weights_of_a_dequantized_model(folder, key):
    in_float8(folder)
    rewrite(folder, lambda weights: weights.update({key: weights[key].to(torch.int8)}))
    with pytest.raises(InputError, match=f"The weight '{key}' .* not one that the quantization converts|cannot be loa"):
        load_model(folder)
