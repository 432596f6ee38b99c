"""Texts and the tokens they were made of: the longest known prefix of a text, with log-probs and loss mask.

An engine's answer says which tokens a text consists of; tokenizing the text again may give others. So later turns look
their history up here and take the tokens as they were generated. Nothing here knows about HTTP.

Two structures share the nodes. The edges are a radix tree over characters: finding costs the length of the text. The
tokens hang on nodes where a text was inserted; each such node has the tokens since `base`, the nearest shorter text
that it begins with in tokens, too:

    "2+2="           tokens [7, 3, 7, 9]     base None
      "4"            tokens [5]              base "2+2="     loss mask [1]
      "4 or 5"       tokens [5, 31, 6]       base "2+2="

Memory is bounded in tokens: versions that are too old go first, then what was not used for longest. Only texts that no
other is based on are dropped.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_MAX_TOKENS = 10_000

Version = int | str | None


@dataclass
class MatchResult:
    """What is known of a text. The three lists have one entry per token of `matched_prefix`.

    Example: `MatchResult("2+2=4", [7, 3, 7, 9, 5], [0, 0, 0, 0, -0.1], [0, 0, 0, 0, 1], " is", node)`
    """

    matched_prefix: str
    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    remaining_string: str = ""
    last_node: StringTreeNode | None = None


class StringTreeNode:
    """One node: `string_key` is the text of its edge. `token_ids` is empty where no text ends."""

    _numbers = itertools.count()

    def __init__(self, node_id: int | None = None) -> None:
        self.id = next(self._numbers) if node_id is None else node_id
        self.string_key = ""
        self.parent: StringTreeNode | None = None
        self.children: dict[str, StringTreeNode] = {}  # by the first character of their edge
        self.base: StringTreeNode | None = None
        self.token_ids: Sequence[int] = ()
        self.logp: Sequence[float] = ()
        self.loss_mask: Sequence[int] = ()
        self.weight_version: Version = None
        self.dependents: set[StringTreeNode] = set()
        self.last_access_time = 0.0
        self.traverse_cnt = 0

    @property
    def is_leaf(self) -> bool:
        return not self.children

    @property
    def has_value(self) -> bool:
        return len(self.token_ids) > 0

    @property
    def is_evictable(self) -> bool:
        """Whether no other text needs its tokens."""
        return self.has_value and not self.dependents

    def validate_token_logp_consistency(self) -> bool:
        return len(self.token_ids) == len(self.logp) == len(self.loss_mask)

    def touch(self) -> None:
        self.last_access_time = time.monotonic()
        self.traverse_cnt += 1

    def chain(self) -> list[StringTreeNode]:
        """The nodes whose tokens, one after the other, are those of the whole text."""
        nodes: list[StringTreeNode] = []
        node: StringTreeNode | None = self
        while node is not None:
            nodes.append(node)
            node = node.base
        return nodes[::-1]


class StringRadixTrie:
    """Texts -> tokens, bounded in tokens.

    Example::

        tree = StringRadixTrie(tokenizer=tokenizer)
        tree.insert("2+2=4", [7, 3, 7, 9, 5], [0.0, 0.0, 0.0, 0.0, -0.1], [0, 0, 0, 0, 1], weight_version=3)
        tree.retrieve_from_text("2+2=4 is")   # tokens, log-probs, loss mask
    """

    def __init__(
        self,
        max_cache_size: int = DEFAULT_MAX_TOKENS,
        gc_threshold_k: int = 5,
        tokenizer: Any = None,
        verbose: bool = False,
    ) -> None:
        self.max_cache_size, self.gc_threshold_k = max_cache_size, gc_threshold_k
        self.tokenizer, self.verbose = tokenizer, verbose
        self.clear()

    def clear(self) -> None:
        self.root = StringTreeNode()
        self.cur_cache_size = 0  # tokens
        self._by_use: OrderedDict[StringTreeNode, None] = OrderedDict()  # those with tokens, used longest ago first
        self._named: dict[str, int] = {}  # versions that are no numbers, in the order of their first use
        self._newest = -1
        self.total_entries = self.cache_hits = self.cache_misses = self.evicted = 0

    # ---- look up

    def find_longest_prefix(self, text: str) -> MatchResult:
        """The longest inserted text that `text` begins with; an empty match where there is none."""
        node, at = self.root, 0
        best, best_at = None, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None or not text.startswith(child.string_key, at):
                break
            node, at = child, at + len(child.string_key)
            if node.has_value:
                best, best_at = node, at
        if best is None:
            self.cache_misses += 1
            return MatchResult("", remaining_string=text, last_node=self.root)
        self.cache_hits += 1
        found = MatchResult(text[:best_at], remaining_string=text[best_at:], last_node=best)
        for part in best.chain():
            found.token_ids.extend(part.token_ids)
            found.logp.extend(part.logp)
            found.loss_mask.extend(part.loss_mask)
        self._touch(best)
        return found

    def retrieve_from_text(self, text: str, return_logprob: bool = True) -> tuple[list[int], list[float], list[int]]:
        """Tokens, log-probs and loss mask of the whole text: what is known, and the tokenizer for the rest.

        What the tokenizer adds has log-prob 0.0 and loss mask 0. A text of which nothing was known is inserted.
        `return_logprob=False`: log-probs are zeros.
        """
        found = self.find_longest_prefix(text)
        rest: list[int] = []
        if found.remaining_string and self.tokenizer is not None:
            rest = list(self.tokenizer(found.remaining_string, add_special_tokens=False)["input_ids"])
        if not found.matched_prefix:
            self.insert(text, rest)
        logp = found.logp if return_logprob else [0.0] * len(found.logp)
        return found.token_ids + rest, logp + [0.0] * len(rest), found.loss_mask + [0] * len(rest)

    # ---- change

    def insert(
        self,
        text: str,
        token_ids: list[int],
        logp: list[float] | None = None,
        loss_mask: list[int] | None = None,
        weight_version: Version = None,
    ) -> bool:
        """Remember that `text` consists of `token_ids`; one entry per token in each list.

        Defaults: log-probs 0.0, loss mask 0. What is known of the same text is replaced. False where nothing was
        inserted: an empty text or no tokens, lists of different lengths, more tokens than the tree may hold.
        """
        count = len(token_ids)
        logp = [0.0] * count if logp is None else logp
        loss_mask = [0] * count if loss_mask is None else loss_mask
        if not text or not count or not count == len(logp) == len(loss_mask) or count > self.max_cache_size:
            return False
        node = self._node_of(text)
        if node.has_value and _is(node, token_ids, logp, loss_mask):
            node.weight_version = node.weight_version if weight_version is None else weight_version
            self._touch(node)
            return True
        self._drop_value(node)
        base = self._base_of(node, token_ids, logp, loss_mask)
        skip = sum(len(part.token_ids) for part in base.chain()) if base is not None else 0
        node.base = base
        node.token_ids, node.logp = array("q", token_ids[skip:]), array("d", logp[skip:])
        node.loss_mask = array("b", loss_mask[skip:])
        node.weight_version = weight_version
        if base is not None:
            base.dependents.add(node)
        self.cur_cache_size += count - skip
        self.total_entries += 1
        self._touch(node)
        if weight_version is not None and self._age(weight_version) > self._newest:
            self._newest = self._age(weight_version)
            self.gc_by_weight_version()
        self._shrink(keep=node)
        return True

    def remove(self, text: str) -> bool:
        """Forget exactly this text; longer ones keep their tokens. False where it is not known."""
        node = self._exact(text)
        if node is None or not node.has_value:
            return False
        self._drop_value(node)
        self._prune(node)
        return True

    def gc_by_weight_version(self, current_weight_version: Version = None) -> int:
        """Forget what is more than `gc_threshold_k` versions older than the current one; how many texts that were.

        The default is the newest version that was inserted. Texts without a version, and those that a newer one is
        based on, stay.
        """
        newest = self._newest if current_weight_version is None else self._age(current_weight_version)
        oldest_kept = newest - self.gc_threshold_k
        count = 0
        stale = [n for n in self._by_use if n.weight_version is not None and self._age(n.weight_version) < oldest_kept]
        for node in sorted(stale, key=lambda n: len(n.chain()), reverse=True):
            if node.is_evictable:
                self._evict(node)
                count += 1
        return count

    # ---- what is there

    def get_stats(self) -> dict[str, Any]:
        looked_up = self.cache_hits + self.cache_misses
        return {
            "total_entries": self.total_entries,
            "cur_cache_size": self.cur_cache_size,
            "max_cache_size": self.max_cache_size,
            "cache_hits": self.cache_hits,
            "cache_misses": self.cache_misses,
            "hit_rate": self.cache_hits / looked_up if looked_up else 0.0,
            "evicted": self.evicted,
        }

    def pretty_print(self) -> None:
        """Print the tree, one node per line."""
        for depth, node in self._walk(self.root, 0):
            what = f"{len(node.token_ids)} tokens, version {node.weight_version}" if node.has_value else ""
            print(f"{'  ' * depth}{node.string_key!r:.60} {what}".rstrip())

    def _walk(self, node: StringTreeNode, depth: int) -> Iterator[tuple[int, StringTreeNode]]:
        todo = [(depth, node)]
        while todo:
            depth, node = todo.pop()
            yield depth, node
            todo.extend((depth + 1, child) for child in reversed(node.children.values()))

    # ---- nodes

    def _exact(self, text: str) -> StringTreeNode | None:
        node, at = self.root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None or not text.startswith(child.string_key, at):
                return None
            node, at = child, at + len(child.string_key)
        return node

    def _node_of(self, text: str) -> StringTreeNode:
        """The node at which `text` ends; made, and an edge cut in two for it, where there is none."""
        node, at = self.root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                return self._child(node, text[at:])
            shared = _shared(child.string_key, text, at)
            if shared < len(child.string_key):
                child = self._split(child, shared)
            node, at = child, at + shared
        return node

    @staticmethod
    def _child(parent: StringTreeNode, key: str) -> StringTreeNode:
        node = StringTreeNode()
        node.string_key, node.parent = key, parent
        parent.children[key[0]] = node
        return node

    def _split(self, node: StringTreeNode, at: int) -> StringTreeNode:
        """A node without tokens between `node` and its parent, `at` characters down the edge."""
        assert node.parent is not None
        upper = self._child(node.parent, node.string_key[:at])
        node.string_key, node.parent = node.string_key[at:], upper
        upper.children[node.string_key[0]] = node
        return upper

    @staticmethod
    def _base_of(
        node: StringTreeNode, token_ids: list[int], logp: list[float], loss_mask: list[int]
    ) -> StringTreeNode | None:
        """The nearest text above whose tokens, log-probs and mask these lists begin with, and go on."""
        above = node.parent
        while above is not None:
            if above.has_value and 0 <= _after(above, token_ids, logp, loss_mask) < len(token_ids):
                return above
            above = above.parent
        return None

    def _touch(self, node: StringTreeNode) -> None:
        """Mark as used: first the text itself, then what it is based on, so that the latter goes later."""
        for part in reversed(node.chain()):
            part.touch()
            self._by_use[part] = None
            self._by_use.move_to_end(part)

    def _drop_value(self, node: StringTreeNode) -> None:
        """Take the tokens away; texts that are based on them get them."""
        if not node.has_value:
            return
        for dependent in node.dependents:
            dependent.token_ids = array("q", [*node.token_ids, *dependent.token_ids])
            dependent.logp = array("d", [*node.logp, *dependent.logp])
            dependent.loss_mask = array("b", [*node.loss_mask, *dependent.loss_mask])
            dependent.base = node.base
            if node.base is not None:
                node.base.dependents.add(dependent)
        self.cur_cache_size += len(node.token_ids) * (len(node.dependents) - 1)
        self.total_entries -= 1
        if node.base is not None:
            node.base.dependents.discard(node)
        node.base, node.dependents = None, set()
        node.token_ids, node.logp, node.loss_mask = (), (), ()
        del self._by_use[node]

    def _evict(self, node: StringTreeNode) -> None:
        self._drop_value(node)
        self._prune(node)
        self.evicted += 1

    def _prune(self, node: StringTreeNode) -> None:
        """Remove nodes at which nothing ends or branches."""
        while node.parent is not None and not node.has_value and not node.children:
            parent = node.parent
            del parent.children[node.string_key[0]]
            node = parent
        if node.parent is not None and not node.has_value and len(node.children) == 1:
            (child,) = node.children.values()
            child.string_key, child.parent = node.string_key + child.string_key, node.parent
            node.parent.children[child.string_key[0]] = child

    def _shrink(self, keep: StringTreeNode) -> None:
        """Evict until the bound is kept; never `keep`, which was inserted just now, or what it is based on."""
        while self.cur_cache_size > self.max_cache_size:
            oldest = next((n for n in self._by_use if n.is_evictable and n is not keep), None)
            if oldest is None:
                return
            self._evict(oldest)

    def _age(self, version: int | str) -> int:
        """A number that grows with the versions: engines report them as texts."""
        if isinstance(version, int) or version.isdecimal():
            return int(version)
        return self._named.setdefault(version, len(self._named))


def _shared(key: str, text: str, at: int) -> int:
    """How many characters of `key` and of `text` from `at` on are the same."""
    most = min(len(key), len(text) - at)
    if text.startswith(key[:most], at):
        return most
    low, high = 0, most  # the first `low` are the same, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if text.startswith(key[:middle], at):
            low = middle
        else:
            high = middle
    return low


def _is(node: StringTreeNode, token_ids: list[int], logp: list[float], loss_mask: list[int]) -> bool:
    return _after(node, token_ids, logp, loss_mask) == len(token_ids)


def _after(node: StringTreeNode, token_ids: list[int], logp: list[float], loss_mask: list[int]) -> int:
    """How many tokens the text of `node` has, if the three lists begin with its own; else -1."""
    at = 0
    for part in node.chain():
        end = at + len(part.token_ids)
        same = array("q", token_ids[at:end]) == part.token_ids and array("d", logp[at:end]) == part.logp
        if not same or array("b", loss_mask[at:end]) != part.loss_mask:
            return -1
        at = end
    return at
