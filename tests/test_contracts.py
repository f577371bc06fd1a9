"""The classes satisfy the contracts that engines are typed against, and other objects do not."""

import inspect
import json

import pytest

from helpers.wrapped import wrapped
from hooked_mllm import HookedMLLM, contracts, metrics
from hooked_mllm.contracts import Metric, Model, ModelInfo


def test_a_wrapped_model_is_a_model(family):
    model = wrapped(family)
    assert isinstance(model, Model) and not isinstance(model.hf_model, Model)
    missing = [name for name in Model.__annotations__ if not hasattr(model, name)]
    assert not missing


def test_methods_take_the_arguments_that_the_contract_states():
    methods = {n: f for n, f in vars(Model).items() if inspect.isfunction(f) and not n.startswith("_")}
    assert len(methods) > 5
    for name, method in methods.items():
        stated = list(inspect.signature(method).parameters.values())
        own = inspect.signature(getattr(HookedMLLM, name)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
        for parameter in stated:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            assert parameter.name in own or takes_any, f"{name} lacks {parameter.name}"


@pytest.mark.parametrize("make", [metrics.VisionMass, metrics.KeyTokenRatio])
def test_metrics_are_metrics(make):
    assert isinstance(make(), Metric) and not isinstance(make, dict)
    assert not isinstance(object(), Metric)


def test_facts_of_a_model_are_json_without_those_that_are_unknown():
    bare = ModelInfo(n_layers=3, n_heads=4, n_kv_heads=2)
    assert bare.provenance() == {}
    known = ModelInfo(
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        model="toy",
        dtype="float32",
        attention_settings={"sink": 4},
        versions={"torch": "2"},
    )
    facts = known.provenance()
    assert facts == {"model": "toy", "dtype": "float32", "attention_settings": {"sink": 4}, "versions": {"torch": "2"}}
    assert json.loads(json.dumps(facts)) == facts
    facts["versions"]["torch"] = "3"
    assert known.versions == {"torch": "2"}, "a copy"


def test_every_contract_is_listed():
    assert set(contracts.__all__) <= set(vars(contracts))
