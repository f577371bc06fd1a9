"""The one way to disk: atomic writes (`writing`), JSON and safetensors by kind (`files`), and checkpoints of runs.

Errors of the operating system and damaged files become a `CacheFileError`.
"""

from hooked_mllm.storage.checkpoint import Checkpoint as Checkpoint
from hooked_mllm.storage.checkpoint import ValueCheckpoint as ValueCheckpoint
from hooked_mllm.storage.files import described as described
from hooked_mllm.storage.files import from_lists as from_lists
from hooked_mllm.storage.files import read_json as read_json
from hooked_mllm.storage.files import read_tensors as read_tensors
from hooked_mllm.storage.files import restoring as restoring
from hooked_mllm.storage.files import to_lists as to_lists
from hooked_mllm.storage.files import write_json as write_json
from hooked_mllm.storage.files import write_tensors as write_tensors
from hooked_mllm.storage.inside import inside as inside
from hooked_mllm.storage.writing import ready as ready
from hooked_mllm.storage.writing import ready_folder as ready_folder
from hooked_mllm.storage.writing import write_atomically as write_atomically
from hooked_mllm.storage.writing import write_figure as write_figure
from hooked_mllm.storage.writing import write_text as write_text
