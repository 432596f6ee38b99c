"""Tokenizers, processors and images of a model folder.

What it adds to `AutoTokenizer`: a missing or incomplete folder is answered with the flag to mend, a local folder never
reaches for the network, and a plain `tokenizer.json` folder loads without importing torch.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles.errors import CheckpointError, FlagError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

FLAG = "--hf-checkpoint"
DEFAULT_PATCH_SIZE = 14  # pixels, where an image processor does not say its own

# One of these makes a folder loadable as a tokenizer, or as a processor.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt",
    "tekken.json",
)  # fmt: skip
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

# Classes that say no more than "read tokenizer.json".
PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or of a model on the hub; `kwargs` as for `AutoTokenizer.from_pretrained`.

    Raises FlagError without a name, CheckpointError for a folder that is not there or holds no tokenizer.
    """
    folder = _local_folder(name_or_path)
    if folder is None:
        return _auto_tokenizer(name_or_path, **kwargs)
    if not _has_any(folder, TOKENIZER_FILES):
        raise CheckpointError(
            f"{FLAG} {folder}: no tokenizer in this folder. Expected one of {', '.join(TOKENIZER_FILES)}; "
            f"it holds {_listing(folder)}. Copy the tokenizer files of the base model there."
        )
    if _is_plain(folder):
        from transformers import PreTrainedTokenizerFast

        # Code of the folder's own plays no part in reading tokenizer.json.
        kwargs.pop("trust_remote_code", None)
        return _checked(folder, PreTrainedTokenizerFast.from_pretrained, local_files_only=True, **kwargs)
    from transformers import AutoTokenizer

    return _checked(folder, AutoTokenizer.from_pretrained, local_files_only=True, **kwargs)


def load_processor(name_or_path: str, **kwargs: Any) -> ProcessorMixin | None:
    """The multimodal processor of a model; None where the model has none, as text models do."""
    folder = _local_folder(name_or_path)
    if folder is not None:
        if not _has_any(folder, PROCESSOR_FILES):
            return None
        kwargs["local_files_only"] = True
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError):
        return None
    # For a text model AutoProcessor answers with the tokenizer.
    return processor if isinstance(processor, ProcessorMixin) else None


def process_vision_info(prompt: list[dict[str, Any]], processor: ProcessorMixin) -> dict[str, Any]:
    """Load the media that a message list names: `{"images": [...] | None, "videos": [...] | None}`."""
    try:
        from qwen_vl_utils import process_vision_info as load_media
    except ImportError as error:
        raise UsageError("--multimodal-keys: images and videos need the package qwen-vl-utils; install it.") from error
    image_processor: Any = getattr(processor, "image_processor", None)
    patch_size = getattr(image_processor, "patch_size", DEFAULT_PATCH_SIZE)
    images, videos = load_media(prompt, image_patch_size=patch_size)
    return {"images": images, "videos": videos}


def encode_image_for_rollout_engine(image: Image) -> str:
    """The image as PNG in RGB, in base64: what engines accept as `image_data`."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _local_folder(name_or_path: str) -> Path | None:
    """The folder that `name_or_path` means, or None for the name of a model on the hub."""
    if not name_or_path:
        raise FlagError(FLAG, given=name_or_path, expected="the folder of a model, or its name on the hub")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    hub_like = name_or_path.count("/") <= 1 and not name_or_path.startswith((".", "/", "~")) and name_or_path[-1] != "/"
    if path.exists() or not hub_like:
        what = "this is a file" if path.exists() else "there is no such folder"
        raise CheckpointError(f"{FLAG} {name_or_path}: {what}. Expected the folder of a Hugging Face model.")
    return None


def _auto_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{FLAG} {name}: neither a folder here nor a model that the hub or its local cache could give "
            f"({_first_line(error)}). Check the path; without a network, download the model first."
        ) from error


def _checked(folder: Path, load: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    try:
        return load(str(folder), **kwargs)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise CheckpointError(
            f"{FLAG} {folder}: the tokenizer in this folder cannot be loaded ({type(error).__name__}: "
            f"{_first_line(error)}). Copy the tokenizer files of the base model there again."
        ) from error


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer.json says everything, so that no model-specific class has to be found."""
    config = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not config.is_file():
        return False
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return settings.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in settings


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(p.name for p in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
