"""Uploading what was written to the Hugging Face hub, only where it was asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from reflow.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check(repo: str) -> None:
    """Whether an upload to `repo` ("owner/name") can be tried: before the work, since it comes last. Raises UserError."""
    from huggingface_hub import constants, get_token

    if not NAME.fullmatch(repo):
        raise UserError(f"--push {repo} is no name of a repository on the hub; write OWNER/NAME.")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push needs the network, and HF_HUB_OFFLINE is set; unset it, or leave --push out.")
    if not get_token():
        raise UserError("--push needs a token for the hub; log in once with 'hf auth login', or set HF_TOKEN.")


def push(path: Path, repo: str, *, card: Path | None = None, private: bool = True) -> str:
    """Upload a folder, or a file with its card as README.md, into a model repository that is made if it is missing.

    private: of a new repository. Returns the repository's address. Raises UserError where the hub or the network refuses;
    what was written stays whole.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        if path.is_dir():
            api.upload_folder(folder_path=str(path), repo_id=repo, commit_message=f"Upload {path.name}")
        else:
            for file, name in [(path, path.name), *([(card, "README.md")] if card else [])]:
                api.upload_file(path_or_fileobj=str(file), path_in_repo=name, repo_id=repo, commit_message=f"Upload {name}")
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is written, but could not be uploaded to {repo} ({type(error).__name__}: {reason}). Cure that and "
            f"upload it with 'hf upload {repo} {os.fspath(path)}'."
        ) from error
    return address
