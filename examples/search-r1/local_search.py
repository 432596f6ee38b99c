"""A search engine in this process: BM25 over a file of texts (the library bm25s), no service to start.

    engine = SearchEngine.load("examples/search-r1/corpus.jsonl")
    engine.search("capital Japan", k=1)                     ["Tokyo is the capital of Japan."]
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

try:
    import bm25s
except ImportError as error:
    raise ImportError("the search example needs bm25s: pip install 'miles[examples]'") from error

from miles.errors import DataError

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it announces every index


class SearchEngine:
    """Texts and their index. `search` changes nothing, so that threads may share it."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self._index: Any = bm25s.BM25()
        self._index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    @staticmethod
    @cache
    def load(path: str) -> SearchEngine:
        """The engine of a file of lines `{"contents": "..."}`, made once per process. Raises DataError."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(path, f"--search-corpus: {error.strerror}.", remedy="Check the path.") from error
        texts = []
        for number, line in enumerate(lines, start=1):
            try:
                texts.append(json.loads(line)["contents"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(path, 'expected {"contents": "..."} in each line.', line=number) from error
        if not texts:
            raise DataError(path, "--search-corpus: no text in it.")
        return SearchEngine(texts)

    def search(self, query: str, k: int) -> list[str]:
        """At most `k` texts that share a word with `query`, the best first."""
        words = bm25s.tokenize([query], show_progress=False)
        found, scores = self._index.retrieve(
            words, corpus=self.texts, k=min(k, len(self.texts)), show_progress=False
        )
        return [str(text) for text, score in zip(found[0], scores[0], strict=True) if score > 0]
