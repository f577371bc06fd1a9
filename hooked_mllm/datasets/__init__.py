"""Readers of benchmark data in their published files. Nothing is downloaded."""

from hooked_mllm.datasets.plain_pickle import load_plain_pickle as load_plain_pickle
from hooked_mllm.datasets.refcocog import RefCOCOg as RefCOCOg
from hooked_mllm.datasets.refcocog import ReferringExpression as ReferringExpression
