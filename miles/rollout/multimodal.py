"""Images, videos and audio in prompts: `<image>` in a text becomes a content part that holds the row's next image.

Loading the media is `tokenizer.process_vision_info`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from miles.errors import DataError, FlagError
from miles.types import MultimodalType, MultimodalTypes

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]


class MediaKeys:
    """`--multimodal-keys`: which row key holds the media of each type, and what was odd about the rows so far.

    Example: `MediaKeys({"image": "images"})`.
    """

    def __init__(self, keys: dict[str, str]) -> None:
        unknown = sorted(name for name in keys if MultimodalTypes.get(name) is None)
        if unknown:
            names = ", ".join(t.name for t in MultimodalTypes.all())
            raise FlagError("--multimodal-keys", given=unknown[0], expected=f"one of {names}")
        types = [t for t in MultimodalTypes.all() if t.name in keys]
        self.key_of: dict[str, str] = {t.name: keys[t.name] for t in types}
        self.type_of: dict[str, MultimodalType] = {t.placeholder: t for t in types}
        self.pattern = re.compile("(" + "|".join(re.escape(t.placeholder) for t in types) + ")")
        self.rows_with_leftovers = 0
        self.rows_already_split = 0

    def warn_about_oddities(self, path: str) -> None:
        if self.rows_with_leftovers:
            logger.warning("%s: %d rows have more media than placeholders", path, self.rows_with_leftovers)
        if self.rows_already_split:
            logger.warning("%s: %d rows have contents that are lists; left alone", path, self.rows_already_split)


def split_placeholders(path: str, line: int, messages: Messages, row: dict[str, Any], keys: MediaKeys) -> Messages:
    """The messages with every string content as a list of parts; media are taken from `row` in order.

    Example: content `"<image>How many?"` becomes
    `[{"type": "image", "image": row["images"][0]}, {"type": "text", "text": "How many?"}]`.
    """
    supply = {name: iter(_items(row.get(key))) for name, key in keys.key_of.items()}
    split: Messages = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            pieces = [piece for piece in keys.pattern.split(content) if piece]
            message = {**message, "content": [_part(path, line, piece, keys, supply) for piece in pieces]}
        elif content is not None:
            keys.rows_already_split += 1
        split.append(message)
    keys.rows_with_leftovers += any(next(items, None) is not None for items in supply.values())
    return split


def _part(path: str, line: int, piece: str, keys: MediaKeys, supply: dict[str, Iterator[Any]]) -> dict[str, Any]:
    kind = keys.type_of.get(piece)
    if kind is None:
        return {"type": "text", "text": piece}
    for item in supply[kind.name]:
        return {"type": kind.name, kind.name: item}
    raise DataError(
        path,
        f"more {kind.placeholder} placeholders in the prompt than entries under {keys.key_of[kind.name]!r} "
        "(--multimodal-keys) in the row.",
        line=line,
    )


def _items(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def has_media(messages: Messages) -> bool:
    """Whether any message holds a part that is not text."""
    return any(
        part.get("type") != "text"
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
