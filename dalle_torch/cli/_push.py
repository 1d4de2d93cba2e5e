"""The upload of a folder to the hub, of every command that offers it."""

from pathlib import Path


def push(folder: Path, name: str, message: str, *, private: bool | None = None, token: str | None = None) -> None:
    """Make the repository `name` if need be, upload `folder` to it, and say where it is.

    Args:
        message: of the commit.
        private: of a new repository; `None` leaves it to the account's settings.
        token: `None` is that of `hf auth login` or `HF_TOKEN`.

    Raises:
        ConnectionError: it cannot be uploaded; the message says how to try again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=token)
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet, which uploads, fails with the last
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"{folder} is written, but not uploaded to {name}: {reason} (hf upload {name} {folder} tries again)"
        ) from error
    print(f"uploaded to {address}")
