"""beartype, which checks values against annotations; None where it cannot be imported, and then nothing is checked."""

import warnings
from typing import Any

try:  # with the package, not on first use
    from beartype import beartype
    from beartype.vale import Is as Is

    typechecker: Any = beartype
except TypeError:  # nnsight gives every object a `save`, after which beartype 0.23 cannot be imported any more
    typechecker = None
    warnings.warn(
        "nnsight was imported before hooked_mllm, and beartype cannot be imported after it: arguments are not checked "
        "against their annotations. Import hooked_mllm first.",
        stacklevel=2,
    )
