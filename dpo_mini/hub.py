"""Whether a name is here, in the cache, or on the Hub, decided without waiting for a time-out."""

import os
import threading
from pathlib import Path


class HubError(RuntimeError):
    """A model or data set cannot be had; the message says why and what to try."""


def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face Hub answers, decided within `timeout` seconds, without retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from huggingface_hub import constants, get_session

    answered = threading.Event()

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout)
            answered.set()
        except Exception:  # any failure means the same here: not reachable
            pass

    # In a thread of its own: on a broken network, looking up a name can outlast every time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def dataset_is_cached(name) -> bool:
    """Whether `datasets` has prepared this data set of the Hub before."""
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / str(name).replace("/", "___")).is_dir()


def local_or_hub(name, kind: str = "model") -> dict:
    """Keyword arguments for `from_pretrained`: no network for a folder or a cached model. A cached
    data set needs none: `datasets` finds it by itself.

    Raises HubError at once where the name is no folder, not cached, and the Hub cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return {"local_files_only": True}
    if kind == "model":
        try:
            if isinstance(try_to_load_from_cache(str(name), "config.json"), str):
                return {"local_files_only": True}
        except ValueError as error:  # not a repository's name at all, so a folder that is not there
            raise HubError(
                f"{str(name)!r} is neither a folder nor a model's name on the Hub."
            ) from error
    if not hub_is_reachable() and not (kind == "dataset" and dataset_is_cached(name)):
        raise HubError(
            f"{kind} {str(name)!r} is no local folder, is not in the cache, and the Hub cannot be "
            "reached. Give a folder's path, connect and try again, or use the embedded default."
        )
    return {}
