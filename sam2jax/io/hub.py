"""Checkpoints from the Hugging Face hub."""

from __future__ import annotations

import pathlib
import re


def is_hub_id(source: str) -> bool:
    """Whether a string can be `owner/name` or `owner/name@revision`."""
    is_file = source.endswith((".pt", ".pth", ".safetensors"))
    hub_id = r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?"
    return not is_file and re.fullmatch(hub_id, source) is not None


def download(hub_id: str) -> pathlib.Path:
    """Returns a repository's checkpoint in the local cache, downloading it where necessary.

    That is `model.safetensors`, or else the official file, named as the repository is; whichever
    is in the cache already goes first. With `HF_HUB_OFFLINE=1` nothing else is asked.

    Args:
        hub_id: `owner/name`, as in `facebook/sam2.1-hiera-tiny`, of its main branch as it was
            when first downloaded; or `owner/name@revision`, a branch, a tag or a commit.

    Raises:
        ValueError: the repository cannot be reached, or has neither.
    """
    import huggingface_hub  # only who downloads waits for it
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo_id, _, revision = hub_id.partition("@")
    names = ("model.safetensors", f"{repo_id.split('/')[1].replace('-', '_')}.pt")
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision or None)
        if isinstance(cached, str):
            return pathlib.Path(cached)
    for name in names:
        try:
            path = huggingface_hub.hf_hub_download(repo_id, name, revision=revision or None)
            return pathlib.Path(path)
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"{hub_id!r} is no file or folder here, and the Hugging Face hub cannot be "
                "reached; check the path, or download the checkpoint elsewhere and copy it here."
            ) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # no such repository, no access, no connection
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{hub_id!r} is no file or folder here, and cannot be downloaded from the Hugging "
                f"Face hub: {reason}"
            ) from error
    raise ValueError(f"{hub_id!r} on the Hugging Face hub has neither {names[0]} nor {names[1]}.")
