"""Pyright strict on the code of the tutorials and on own metrics, and the types of results that it reveals."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OWN_METRIC = "(HeadMetric):"

#: each expression, and the type that a type checker must infer
REVEALED = {
    'HookedMLLM.from_pretrained("toy-qwen3-vl")': "HookedMLLM",
    'model.prepare("q")': "Sample",
    'model.prepare(["q", "r"])': "SampleBatch",
    "VisualRetrieval().samples(model, 2)": "list[Sample]",
    "MeanRegion()(model, sample)": "Sample",
    "model(sample)": "Tensor",
    'model(sample, return_type="both")': "tuple[Tensor, Tensor]",
    "model([sample, sample])": "Tensor",
    "model.run_with_hooks(sample)": "Tensor",
    'model.run_with_hooks(sample, return_type="both")': "tuple[Tensor, Tensor]",
    "model.run_with_hooks(sample, return_type=None)": "None",
    "model.intervene().__enter__()": "Records",
    "RetrievalAttentionMass().keep_samples()": "RetrievalAttentionMass",
    "model.generate(sample, max_new_tokens=1)": "Tensor",
    "model.run_with_cache(sample)": "tuple[Tensor, ActivationCache]",
    'model.run_with_cache(sample, "*hook_z")': "tuple[Tensor, ActivationCache]",
    "model.run_with_cache(sample, generate={})": "tuple[Tensor, GenerationCache]",
    "model.measure(sample, RetrievalAttentionMass())": "HeadScores",
    "model.measure([sample], [RetrievalAttentionMass(), VisionMass()])": "list[HeadScores]",
    "scores.top(4)": "HeadSet",
    "scores.top(4)[0]": "tuple[int, int]",
    'scores["L2H4"]': "float",
    'cache["z", 3]': "Tensor",
    'cache["blocks.3.attn.hook_z"]': "Tensor",
    "cache.pattern(3)": "Tensor",
    'steps.steps[0]["pattern", 2]': "Tensor",
    'sample.mask("target")': "Tensor",
    "AblationEffect(mode='zero', phase='both').run(model, [sample], objective=AnswerLogProb())": "HeadScores",
}
HEADER = """
from hooked_mllm import ActivationCache, GenerationCache, HeadScores, HookedMLLM, Sample
from hooked_mllm.corruptions import MeanRegion
from hooked_mllm.metrics import AblationEffect, RetrievalAttentionMass, VisionMass
from hooked_mllm.objectives import AnswerLogProb
from hooked_mllm.toys import VisualRetrieval

def f(model: HookedMLLM, sample: Sample, cache: ActivationCache, steps: GenerationCache, scores: HeadScores) -> None:
"""


#: calls with a value that is not among the choices, or of another type
WRONG = (
    "HeadAblation('L2H4', mode='zeros', phase='both')",
    "HeadAblation('L2H4', mode='zero', phase='all')",
    "AttentionScore(reduce='max')",
    "AttentionScore(over_samples='sum')",
    "model.vision_layout(batch)",
)
WRONG_HEADER = """
from hooked_mllm import HeadAblation, HookedMLLM, SampleBatch
from hooked_mllm.metrics import AttentionScore

def f(model: HookedMLLM, batch: SampleBatch) -> None:
"""
WRONG_START = WRONG_HEADER.count("\n") + 1


def code_of(book):
    """The code cells of a notebook as one module."""
    cells = json.loads(book.read_text(encoding="utf-8"))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n\n".join(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE) for source in sources)


def sources():
    """The code to check, by file name."""
    out = {book.stem: code_of(book) for book in BOOKS}
    for page in (ROOT / "README.md", DOCS / "metrics" / "your-own.md"):
        (out[page.stem.replace("-", "_")],) = [b for b in BLOCK.findall(page.read_text("utf-8")) if OWN_METRIC in b]
    return out


CHECKED = sources()


@pytest.fixture(scope="session")
def diagnostics(tmp_path_factory):
    """What pyright reports, by file: pairs of a line and a message."""
    folder = tmp_path_factory.mktemp("strict")
    revealed = HEADER + "".join(f"    reveal_type({expression})\n" for expression in REVEALED)
    wrong = WRONG_HEADER + "".join(f"    {call}\n" for call in WRONG)
    for name, code in {**CHECKED, "revealed": revealed, "wrong": wrong}.items():
        (folder / f"page_{name}.py").write_text(code, encoding="utf-8")
    settings = {
        "include": ["."],
        "typeCheckingMode": "strict",
        "pythonVersion": f"{sys.version_info.major}.{sys.version_info.minor}",
        "reportUnusedExpression": False,  # a notebook displays the last expression of a cell
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    quiet = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # of newer versions, on stdout
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=quiet, check=False)
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: errors in the code
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] == len(CHECKED) + 2
    out = {f"page_{name}.py": [] for name in (*CHECKED, "revealed", "wrong")}
    for entry in report["generalDiagnostics"]:
        out[Path(entry["file"]).name].append((entry["range"]["start"]["line"] + 1, entry["message"]))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_code_of_the_manual_has_no_error_under_strict(name, diagnostics):
    found = diagnostics[f"page_{name}.py"]
    assert not found, "\n".join(f"line {line}: {message}" for line, message in found)


@pytest.mark.slow
def test_results_have_types(diagnostics):
    messages = [message for _, message in sorted(diagnostics["page_revealed.py"])]
    expected = [f'Type of "{expression}" is "{kind}"' for expression, kind in REVEALED.items()]
    assert messages == expected


def test_few_arguments_are_annotated_as_any():
    annotations = []
    for path in (ROOT / "hooked_mllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                a = node.args
                named = [x for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")]
                annotations += [x.annotation for x in (*named, a.vararg, a.kwarg) if x is not None]
    anything = sum(x is not None and ast.unparse(x) == "Any" for x in annotations)
    assert len(annotations) > 4000 and anything < 0.04 * len(annotations), f"{anything} of {len(annotations)}"


@pytest.mark.slow
def test_other_choices_are_errors_of_type(diagnostics):
    lines = {line for line, _ in diagnostics["page_wrong.py"]}
    assert lines == set(range(WRONG_START, WRONG_START + len(WRONG)))


def test_every_tutorial_and_own_metric_is_checked():
    assert {book.stem for book in BOOKS} < CHECKED.keys()
    assert {"README", "your_own"} < CHECKED.keys()
    assert all("hooked_mllm" in code for code in CHECKED.values())
