"""Files of a repository on the Hugging Face Hub, downloaded once into the cache of huggingface_hub.

The environment variables of huggingface_hub apply: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from spar_lightning.errors import UserError

PREFIX: Final = "hf-hub:"
NAME: Final = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # org/name or org/name@revision


class HubError(UserError):
    """Error for a repository on the Hub that cannot be read or written."""


def is_name(text: str) -> bool:
    """Return whether a text has the form org/name or org/name@revision."""
    return NAME.fullmatch(text) is not None


def download(name: str, files: Sequence[str]) -> Path:
    """Return a local folder with files of a repository; files that the repository does not have are left out.

    Args:
        name: Name of the repository as org/name, or org/name@revision for a branch, tag or commit.
        files: Names of the files, with wildcards.

    Raises:
        HubError: The repository cannot be read, or the name is invalid.
    """
    from huggingface_hub import snapshot_download

    if not is_name(name):
        raise HubError(f"{name!r} is not a repository on the Hugging Face Hub. Allowed: org/name or org/name@revision.")
    repository, _, revision = name.partition("@")
    with translated(name, "read"):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))


def upload(name: str, folder: Path, private: bool) -> str:
    """Upload the files of a folder to a repository in one commit, and return its address.

    Args:
        name: Name of the repository as org/name; it is created if it does not exist.
        folder: Folder with the files.
        private: Whether a new repository is private.

    Raises:
        HubError: The repository cannot be written, or the name is invalid.
    """
    from huggingface_hub import HfApi

    check_new_name(name)
    api = HfApi()
    with translated(name, "written"):
        address = api.create_repo(name, private=private or None, exist_ok=True)  # None: the default of the organization
        if private and not api.repo_info(name).private:
            raise HubError(
                f"{name} on the Hugging Face Hub is public. Make it private on its page, or pass another name."
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with spar_lightning")
    return str(address)


def check_new_name(name: str) -> None:
    """Raise HubError unless a text has the form org/name."""
    if not is_name(name) or "@" in name:
        raise HubError(f"{name!r} is not a repository on the Hugging Face Hub. Allowed: org/name.")


@contextmanager
def translated(name: str, action: str) -> Iterator[None]:
    """Raise HubError for the errors of huggingface_hub and of the network.

    Args:
        name: Name of the repository.
        action: What is done with it: "read" or "written".
    """
    from huggingface_hub import errors

    subject = f"{name} on the Hugging Face Hub cannot be {action}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{subject}: access has to be requested on its page. Then {login}.") from error
    except errors.RepositoryNotFoundError as error:  # also the Hub's answer without a valid login
        raise HubError(
            f"{subject}: it does not exist, or you have no access. Check the name; if it is private, {login}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{subject}: it has no such revision. Pass a branch, tag or commit after @.") from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise HubError(f"{subject}: {_answer(error.__cause__)}") from error
        raise HubError(
            f"{subject}: it is not in the local cache, and {_unreachable()}. Connect to the network once, or copy its "
            "files to this machine and pass the folder."
        ) from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{subject}: {_answer(error)}") from error
    except HubError:
        raise
    except Exception as error:  # HTTP clients, sockets and proxies raise different exceptions
        if isinstance(error, OSError) and error.filename:
            raise  # of a local file
        raise HubError(f"{subject} ({type(error).__name__}: {' '.join(str(error).split())}).") from error


def _answer(error: Any) -> str:
    """Return what the server answered, and what to do."""
    status = error.response.status_code if error.response is not None else 0
    said = " ".join(str(error.server_message or "").split())[:200]
    hints = {401: "Log in with `hf auth login`, or set HF_TOKEN.", 403: "Use a token with write access to it."}
    hint = hints.get(status, "Try again later." if status == 429 or status >= 500 else "")
    return f"the server answered {status}{f' ({said})' if said else ''}. {hint}".strip()


def _unreachable() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{os.environ.get('HF_ENDPOINT', constants.ENDPOINT)} cannot be reached"
