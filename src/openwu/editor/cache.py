"""Cache of generated adapters, in memory and on disk.

    key = request_key(identity.digest, [pixels], "make it warmer")
    found, missing = cache.lookup([key])

A key is a hash of everything that an adapter depends on: the pixels and words that the generator reads, the weights and
sizes of what reads them, how they compute, and the code. Strength is applied later and is not part of it. Two levels:
memory, and a folder that several processes may share and that survives them; both are bounded in bytes and forget what
was used longest ago.

Shapes: h, w the sides of a picture as the generator reads it.
"""

from __future__ import annotations

import json
import operator
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openwu.editor.store import AdapterStore
from openwu.errors import TargetError
from openwu.files.fingerprint import code_digest
from openwu.files.hashing import SHA256, add_tensor, fastest, of_json, of_pieces
from openwu.types import Adapter, Target
from openwu.version import __version__


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """Factors that all requests of a generator share, such as a basis; entries of a cache hold the same object."""

    tensors: tuple[Tensor, ...]
    """On the CPU."""

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors)

    def holds(self, parts: Sequence[Tensor]) -> bool:
        """Whether these are the same numbers."""
        return len(parts) == len(self.tensors) and all(
            mine.dtype == part.dtype and torch.equal(mine, part) for mine, part in zip(self.tensors, parts, strict=True)
        )


@dataclass(frozen=True)
class PackedAdapter:
    """What `of` took from an adapter; it shares no memory with it."""

    kinds: tuple[Tensor, ...]
    """One tensor `[m * b, ...]` on the CPU for each dtype and shape `[b, ...]`, of the factors that are generated."""
    places: tuple[tuple[int, ...], ...]
    """For each of `kinds`: which m tensors of the adapter lie in it, counted factor by factor, target by target"""
    shared: SharedFactors | None
    """The other factors; None where all are generated."""
    shared_places: tuple[int, ...]
    names: tuple[tuple[str, tuple[str, ...]], ...]
    """Name of every target, and of its factors"""
    targets: tuple[Target, ...]
    scale: float
    instructions: tuple[tuple[str, ...], ...]
    refined: tuple[int, ...]
    batch: int

    @classmethod
    def of(cls, adapter: Adapter, known: Iterable[SharedFactors] = ()) -> PackedAdapter:
        """Whatever device, layout in memory and gradients the adapter has.

        known: shared factors of other packed adapters; where the adapter's are equal to one of them, it is taken.
        """
        places: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
        rules = {target.name: target.rules.shared for target in adapter.targets}
        common = [part in rules[name] for name, factors in adapter.factors.items() for part in factors]
        shared_places = tuple(place for place, is_shared in enumerate(common) if is_shared)
        # Not as inference tensors, wherever this is called: those who get a copy may train on it.
        with torch.inference_mode(False), torch.no_grad():
            parts = [part for factors in adapter.factors.values() for part in factors.values()]
            for place, part in enumerate(parts):
                if not common[place]:
                    places.setdefault((part.dtype, part.shape), []).append(place)
            kinds = tuple(
                torch.cat([parts[place].detach().cpu() for place in own]).contiguous() for own in places.values()
            )
            shared = _shared([parts[place].detach().cpu() for place in shared_places], known)
        own_places = tuple(tuple(own) for own in places.values())
        names = tuple((name, tuple(factors)) for name, factors in adapter.factors.items())
        return cls(
            kinds,
            own_places,
            shared,
            shared_places,
            names,
            adapter.targets,
            adapter.scale,
            adapter.instructions,
            adapter.refined,
            adapter.batch,
        )

    @property
    def own_nbytes(self) -> int:
        """Without what other entries may hold, too."""
        return sum(each.nbytes for each in self.kinds)

    @property
    def nbytes(self) -> int:
        return self.own_nbytes + (0 if self.shared is None else self.shared.nbytes)

    def adapter(self) -> Adapter:
        """A copy on the CPU, without gradients, that may be changed in place and trained on."""
        found: dict[int, Tensor] = {}
        with torch.inference_mode(False):
            for kind, places in zip(self.kinds, self.places, strict=True):
                # "unsafe": to autograd each part is a tensor of its own, and may change in place without the others.
                found.update(zip(places, torch.unsafe_split(kind.clone(), len(kind) // len(places)), strict=True))
            if self.shared is not None:
                found.update(zip(self.shared_places, (each.clone() for each in self.shared.tensors), strict=True))
        ordered = iter([found[place] for place in range(len(found))])
        factors = {name: {part: next(ordered) for part in parts} for name, parts in self.names}
        # Without its checks: they were made of what was packed, and would take as long as the copy.
        adapter = object.__new__(Adapter)
        vars(adapter).update(targets=self.targets, factors=factors, scale=self.scale)
        vars(adapter).update(instructions=self.instructions, refined=self.refined)
        return adapter


def _shared(parts: Sequence[Tensor], known: Iterable[SharedFactors]) -> SharedFactors | None:
    """Find the parts among the known ones, or copy them; None where there are none."""
    if not parts:
        return None
    found = next((each for each in known if each.holds(parts)), None)
    return SharedFactors(tuple(part.clone().contiguous() for part in parts)) if found is None else found


MEMORY_BYTES = 256 * 2**20
DISK_BYTES = 2 * 2**30
KEY_VERSION = 4
"""Changed when a key would mean something else than before."""
EDITOR = "openwu.editor.editor"
"""The module whose code, with everything that it imports, computes adapters."""
_KEY = re.compile(r"[0-9a-f]{64}")
_COUNTED = ("memory_hits", "disk_hits", "misses", "evictions", "dropped", "unwritten")


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache did since it was made, and what it holds now."""

    memory_hits: int
    disk_hits: int
    misses: int
    evictions: int
    """Entries that made room for others, in memory or in the folder; those of other processes are not counted."""
    dropped: int
    """Damaged files that were found, and removed."""
    unwritten: int
    """Adapters that the folder's file system did not take, for example on a full disk."""
    memory_bytes: int
    disk_bytes: int
    """Of the whole folder, other processes' entries included."""

    @property
    def hits(self) -> int:
        return self.memory_hits + self.disk_hits

    @property
    def hit_rate(self) -> float:
        """Share of look-ups that found something; 0 where there were none."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class AdapterCache:
    """Adapters of single requests by key, in memory and, if a folder is given, on disk. Safe for threads."""

    def __init__(
        self, folder: str | Path | None = None, *, memory_bytes: int = MEMORY_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        """`memory_bytes` 0: nothing is kept in memory. `folder` None: nothing is kept on disk.

        Raises OpenwuError where the folder cannot be made.
        """
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected a whole number of bytes, 0 or more, got {value!r}")
        self._limit = memory_bytes
        self._held: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._shared: Counter[SharedFactors] = Counter()
        """How many entries hold each; its bytes count once."""
        self._bytes = 0
        self._store = None if folder is None else AdapterStore(folder, disk_bytes)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path | None:
        return None if self._store is None else self._store.folder

    def get(self, key: str) -> Adapter | None:
        """A copy of one's own, on the CPU (b = 1); None where the cache has nothing."""
        _check_key(key)
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                self._counts["memory_hits"] += 1
        if held is not None:
            if self._store is not None:
                self._store.touch(key)
            return held.adapter()
        found = None if self._store is None else self._store.get(key)
        with self._lock:
            self._counts["misses" if found is None else "disk_hits"] += 1
        if found is not None:
            self._hold(key, found)
        return found

    def put(self, key: str, adapter: Adapter) -> None:
        """Keep a copy of a single request's adapter (b = 1)."""
        _check_key(key)
        if adapter.batch != 1:
            raise TargetError(f"adapter: expected one sample, got {adapter.batch}; put each adapter.select([i])")
        self._hold(key, adapter)
        if self._store is not None:
            self._store.put(key, adapter)

    def lookup(self, keys: Sequence[str]) -> tuple[dict[str, Adapter], list[str]]:
        """Return the adapters that are there, by key, and the missing keys, each once, in the order in which they came.

        Whoever generates what is missing hands it to `put`.
        """
        found: dict[str, Adapter] = {}
        missing = []
        for key in dict.fromkeys(keys):
            adapter = self.get(key)
            if adapter is None:
                missing.append(key)
            else:
                found[key] = adapter
        return found, missing

    @property
    def statistics(self) -> CacheStatistics:
        with self._lock:
            counts, held = Counter(self._counts), self._bytes
        if self._store is not None:
            counts.update(self._store.counts)
        named = {name: counts[name] for name in _COUNTED}
        return CacheStatistics(**named, memory_bytes=held, disk_bytes=self._store.bytes if self._store else 0)

    def _hold(self, key: str, adapter: Adapter) -> None:
        """Into memory, as a copy: callers may train on what they have."""
        if sum(part.nbytes for part in adapter.state_dict().values()) > self._limit:
            return
        with self._lock:
            known = list(self._shared)
        kept = PackedAdapter.of(adapter, known)
        with self._lock:
            if key in self._held:
                self._forget(self._held.pop(key))
            self._held[key] = kept
            self._bytes += kept.own_nbytes
            if kept.shared is not None:
                self._shared[kept.shared] += 1
                self._bytes += kept.shared.nbytes if self._shared[kept.shared] == 1 else 0
            while self._bytes > self._limit:
                self._forget(self._held.popitem(last=False)[1])
                self._counts["evictions"] += 1

    def _forget(self, entry: PackedAdapter) -> None:
        """Subtract an entry's bytes; those of shared factors with the last entry that holds them."""
        self._bytes -= entry.own_nbytes
        if entry.shared is not None:
            self._shared[entry.shared] -= 1
            if not self._shared[entry.shared]:
                del self._shared[entry.shared]
                self._bytes -= entry.shared.nbytes


class GeneratorIdentity:
    """What makes one generator's adapters differ from another's: weights, sizes and code of all that takes part."""

    def __init__(self, parts: Mapping[str, nn.Module], config: Mapping[str, Any], code: Sequence[str] = ()) -> None:
        """`parts`: name -> module, of everything between a request and its adapter. `config`: plain JSON values.

        `code`: modules of the package that compute adapters beside the editor, such as a base's.
        """
        self._parts = dict(parts)
        self._code = code_digest(EDITOR, *code)
        self._config = json.dumps(config, sort_keys=True)
        self._known: tuple[_Weights, str] | None = None

    @property
    def digest(self) -> str:
        """64 hexadecimal digits; computed on first use, and again after a weight was replaced or changed in place.

        Changes that torch does not count (through `.data` or NumPy, or by its fused optimisers outside of our trainer)
        go unnoticed: make a new identity after those.
        """
        known = self._known
        if known is None or not known[0].unchanged():
            # Looked at before they are hashed: what changes meanwhile is hashed again.
            weights = _Weights(self._parts.values())
            self._known = known = (weights, self._compute())
        return known[1]

    def _compute(self) -> str:
        digest = of_json([__version__, self._code, self._config])
        for name, part in sorted(self._parts.items()):
            for key, tensor in part.state_dict().items():
                add_tensor(digest, f"{name}.{key}", tensor)
        return digest.hexdigest()


class _Weights:
    """All weights of some modules as they were when this was made, and whether they still are.

    `unchanged` is asked for every request, so it walks through flat lists: what the modules hold must be the very
    objects that they held, and every tensor must lie where it lay, as often changed in place.
    """

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        # The dicts themselves: modules keep theirs for life, and coming to them takes longer than looking into them.
        self._groups: list[dict[str, Any]] = [
            group
            for part in parts
            for module in part.modules()
            for group in (module._parameters, module._buffers, module._modules)
        ]
        self._objects = self._held()
        tensors = [each for each in self._objects if isinstance(each, Tensor)]
        # torch does not count what happens to inference tensors, and nothing may change them in place.
        self._counted = [each for each in tensors if not each.is_inference()]
        self._tensors = tensors
        # Held, so that no new weight can take an old one's address.
        self._memory = [each.detach() for each in tensors]
        self._state = self._now()

    def unchanged(self) -> bool:
        held = self._held()
        same = len(held) == len(self._objects) and all(map(operator.is_, held, self._objects))
        return same and self._state == self._now()

    def _held(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self._groups)))

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._tensors)), [each._version for each in self._counted]


def request_key(
    generator: str,
    pictures: Sequence[NDArray[np.generic]],
    instruction: str,
    *,
    how: str = "",
    seed: int | None = None,
    reasoning: str | None = None,
    image_size: str | None = None,
    in_scope: bool = True,
) -> str:
    """Return the cache key of one request, 64 hexadecimal digits.

    `generator`: a GeneratorIdentity's digest. `pictures`: pixels `[h, w, 3]` as the condition encoder reads them, in
    their order. `instruction`: as the encoder reads it, so that spellings that it does not tell apart share a key.
    `how`: what the same weights are computed with, such as `FastOptions.described`. `seed`, `reasoning`, `image_size`:
    only where the condition depends on them. `in_scope`: whether the instruction was found to be one that the model
    serves; an adapter of one that was merely tried must not be found by those who did not ask to try.

    The hash is the fastest that is installed, and its name is part of what is hashed: with another one, nothing that
    was kept is found.
    """
    name, new = fastest()
    shapes = [[picture.dtype.str, *picture.shape] for picture in pictures]
    words = [instruction, seed, reasoning, image_size]
    digest = of_json([KEY_VERSION, name, generator, how, *words, in_scope, shapes], new=new)
    for picture in pictures:
        # As bytes: BLAKE3 takes no wider numbers. It is through before a second thread has begun; SHA-256 is not.
        data = np.ascontiguousarray(picture).reshape(-1).view(np.uint8).data
        digest.update(of_pieces(data, new) if name == SHA256.name else data)
    return digest.hexdigest()


def _check_key(key: str) -> None:
    # It becomes a file's name.
    if not _KEY.fullmatch(key):
        raise ValueError(f"key: expected 64 hexadecimal digits, as request_key gives them, got {key[:80]!r}")
