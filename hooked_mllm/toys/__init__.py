"""Synthetic visual-retrieval tasks, on pages and on short videos, and the small trained checkpoints that solve it."""

from hooked_mllm.toys.checkpoint import bundled as bundled
from hooked_mllm.toys.checkpoint import path as path
from hooked_mllm.toys.checkpoint import resolve as resolve
from hooked_mllm.toys.task import Example as Example
from hooked_mllm.toys.task import Scene as Scene
from hooked_mllm.toys.task import Turn as Turn
from hooked_mllm.toys.task import VisualRetrieval as VisualRetrieval
from hooked_mllm.toys.video_task import VideoExample as VideoExample
from hooked_mllm.toys.video_task import VideoRetrieval as VideoRetrieval
