"""Import diffusers without the lines that its dependencies print about parts nobody asked for."""

from __future__ import annotations

import os


def quiet_imports() -> None:
    """Keep transformers from logging that it falls back to PIL image processors; a verbosity the user set is left
    alone.
    """
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
