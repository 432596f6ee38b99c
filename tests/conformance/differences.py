"""Where the embedded engine and SGLang 0.5.23 answer otherwise, on purpose. `docs/engines.md` gives the reason of each.

The conformance tests expect exactly this: an answer that becomes equal, or differs in a new way, fails them.
"""

from __future__ import annotations

from dataclasses import dataclass

ENDS = "the server ends"
"""Not sent to a real server: it would not survive the request."""


@dataclass(frozen=True)
class Difference:
    """Example: `Difference("n is 0", sglang=200, embedded=400)`; the values are HTTP statuses, or said in words."""

    what: str
    sglang: int | str
    embedded: int | str

    def of(self, kind: str) -> int | str:
        return self.sglang if kind == "sglang" else self.embedded


DIFFERENCES = {
    d.what: d
    for d in (
        Difference("n is 0", sglang=200, embedded=400),
        Difference("text and input_ids", sglang=200, embedded=400),
        Difference("an unknown field", sglang=200, embedded=400),
        Difference("an empty text", sglang=ENDS, embedded=400),
        Difference("a negative token id", sglang=ENDS, embedded=400),
        Difference("a token id outside the vocabulary", sglang=ENDS, embedded=400),
        Difference("experts of a dense model", sglang=200, embedded=400),
        Difference("abort without rid", sglang=200, embedded=400),
        Difference("GET /get_weight_version", sglang=404, embedded=200),
        Difference("weights_checker compare", sglang="needs a GPU", embedded=200),
        Difference("an update while requests run", sglang="waits for them", embedded="between two of their tokens"),
        Difference("an update before its last part", sglang="loaded at once", embedded="waits aside"),
        Difference("tensors in update_weights_from_tensor", sglang="pickle", embedded="safetensors"),
    )
}
