"""The adapter cache: what makes two requests the same, bounds in bytes, damaged files, several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import random_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from openwu.editor import cache as cache_module
from openwu.editor.cache import AdapterCache, GeneratorIdentity, PackedAdapter, request_key
from openwu.editor.store import ABANDONED, SUFFIX, AdapterStore, decode, encode
from openwu.errors import CheckpointError, OpenwuError, TargetError
from openwu.files.hashing import PIECE, SHA256, Hash, fastest
from openwu.types import Adapter, Target

TARGETS = (Target("layer.0", 6, 4), Target("mix", 18, 5, kernel=(3, 3)), Target("moe.w1", 4, 3, experts=2))
PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def adapter(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    made = random_adapter(TARGETS, 1, rank=2, scale=0.1, seed=seed, dtype=torch.float32)
    return replace(made.to(dtype), instructions=(("让照片更暖", "blur it\nwith lines"),))


def key(number: int) -> str:
    return f"{number:064x}"


def same(one: Adapter | None, other: Adapter) -> bool:
    if one is None:
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    kernels = [[target.kernel for target in each.targets] for each in (one, other)]
    return (
        (one.targets, one.scale, one.instructions) == (other.targets, other.scale, other.instructions)
        and kernels[0] == kernels[1]
        and list(ours) == list(theirs)
        and all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    )


def file_of(folder: Path, number: int) -> Path:
    return folder / f"{key(number)}{SUFFIX}"


SIZE = len(encode(adapter(), key(0)))
MEMORY = sum(part.nbytes for part in adapter().state_dict().values())


# What comes back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_adapter_comes_back_bit_for_bit_from_memory_and_from_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    kept = adapter(dtype=dtype)
    cache = AdapterCache(tmp_path)
    assert cache.get(key(1)) is None
    cache.put(key(1), kept)
    assert same(cache.get(key(1)), kept)
    later = AdapterCache(tmp_path)
    assert same(later.get(key(1)), kept)
    assert same(later.get(key(1)), kept)
    assert (cache.statistics.memory_hits, cache.statistics.disk_hits, cache.statistics.misses) == (1, 0, 1)
    assert (later.statistics.memory_hits, later.statistics.disk_hits, later.statistics.misses) == (1, 1, 0)
    assert (cache.statistics.hit_rate, later.statistics.hit_rate) == (0.5, 1.0)


def test_what_comes_back_belongs_to_the_caller(tmp_path: Path) -> None:
    for cache in (AdapterCache(), AdapterCache(tmp_path, memory_bytes=0), AdapterCache(tmp_path)):
        given = adapter()
        cache.put(key(1), given)
        given.pairs["mix"][0].zero_()
        for _ in range(2):
            found = cache.get(key(1))
            assert same(found, adapter())
            assert found is not None
            found.pairs["mix"][0].zero_()


def test_a_packed_batch_comes_back_with_all_its_samples() -> None:
    kept = replace(random_adapter(TARGETS, 3, dtype=torch.float32), instructions=(("a",), ("b",), ("c",)))
    found = PackedAdapter.of(kept).adapter()
    assert same(found, kept)
    assert found == replace(found)  # with nothing missing, though it was not made by its constructor
    assert same(found.select([2]), kept.select([2]))


def test_adapters_in_training_are_kept_without_their_gradients() -> None:
    cache = AdapterCache()
    with torch.inference_mode():
        cache.put(key(1), adapter())
    cache.put(key(2), random_adapter(TARGETS, 1, trained=True))
    for number in (1, 2):
        found = cache.get(key(number))
        assert found is not None
        part = found.pairs["mix"][0]
        assert not part.requires_grad
        part.requires_grad_().sum().backward()
        assert part.grad is not None


def test_an_optimiser_may_change_one_tensor_that_came_back_while_others_are_in_use() -> None:
    """They lie in one piece of memory; autograd must not take them for one tensor."""
    cache = AdapterCache()
    mixed = adapter().pairs | {"mix": tuple(part.double() for part in adapter().pairs["mix"])}
    cache.put(key(1), Adapter.from_pairs(TARGETS, mixed, adapter().scale))
    found = cache.get(key(1))
    assert found is not None
    parts = list(found.state_dict().values())
    assert [part.dtype for part in parts] == [torch.bfloat16] * 2 + [torch.float64] * 2 + [torch.bfloat16] * 2
    for part in parts:
        part.requires_grad_()
    used = (parts[1].square().sum() + parts[3].square().sum()).double()
    with torch.no_grad():
        parts[0].add_(1)
        parts[2].add_(1)
    used.backward()
    torch.testing.assert_close(parts[1].grad, 2 * parts[1].detach())
    torch.testing.assert_close(parts[3].grad, 2 * parts[3].detach())
    assert same(cache.get(key(1)), Adapter.from_pairs(TARGETS, mixed, adapter().scale))


def test_what_is_kept_may_come_back_in_inference_mode_and_be_trained_on() -> None:
    cache = AdapterCache()
    cache.put(key(1), adapter())
    with torch.inference_mode():
        found = cache.get(key(1))
    assert found is not None
    assert not any(part.is_inference() for part in found.state_dict().values())


def test_what_is_missing_comes_back_once_and_in_order() -> None:
    cache = AdapterCache()
    cache.put(key(1), adapter(1))
    keys = [key(3), key(1), key(0), key(3)]
    found, missing = cache.lookup(keys)
    assert missing == [key(3), key(0)]
    assert found.keys() == {key(1)}
    for number in (0, 3):
        cache.put(key(number), adapter(number))
    found, missing = cache.lookup(keys)
    assert missing == []
    assert found.keys() == set(keys)
    assert all(same(found[key(number)], adapter(number)) for number in (0, 1, 3))
    assert (cache.statistics.hits, cache.statistics.misses) == (4, 2)


@pytest.mark.parametrize("wrong", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_keys_are_hashes(tmp_path: Path, wrong: str) -> None:
    cache = AdapterCache(tmp_path)
    for use in (lambda: cache.get(wrong), lambda: cache.put(wrong, adapter())):
        with pytest.raises(ValueError, match="key: expected 64 hexadecimal digits"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"expected one sample, got 2; put each adapter\.select"):
        AdapterCache(tmp_path).put(key(1), random_adapter(TARGETS, 2))


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "1"])
def test_bounds_are_whole_numbers(wrong: int) -> None:
    for name in ("memory_bytes", "disk_bytes"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number of bytes"):
            AdapterCache(**{name: wrong})


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/inside"):
        with pytest.raises(OpenwuError, match="cache: expected a folder, or a place to make one"):
            AdapterCache(tmp_path / place)


# Bounds


def test_memory_forgets_what_was_used_longest_ago() -> None:
    cache = AdapterCache(memory_bytes=3 * MEMORY)
    for number in (1, 2, 3):
        cache.put(key(number), adapter(number))
    assert cache.get(key(1)) is not None
    cache.put(key(4), adapter(4))
    assert [cache.get(key(number)) is not None for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.statistics.memory_bytes == 3 * MEMORY
    assert cache.statistics.evictions == 1
    cache.put(key(4), adapter(4))  # the same again takes no more room
    assert cache.statistics.memory_bytes == 3 * MEMORY


@pytest.mark.parametrize("memory_bytes", [0, 10 * MEMORY])
def test_the_folder_forgets_what_was_used_longest_ago(tmp_path: Path, memory_bytes: int) -> None:
    """Whether what is used was found there or in memory."""
    cache = AdapterCache(tmp_path, memory_bytes=memory_bytes, disk_bytes=3 * SIZE)
    for number in (1, 2, 3):
        cache.put(key(number), adapter(number))
        os.utime(file_of(tmp_path, number), (number, number))  # long ago, in this order
    assert cache.get(key(1)) is not None
    cache.put(key(4), adapter(4))
    later = AdapterCache(tmp_path, memory_bytes=0)
    assert [later.get(key(number)) is not None for number in (1, 2, 3, 4)] == [True, False, True, True]
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert cache.statistics.disk_bytes == held <= 3 * SIZE
    assert cache.statistics.evictions == 1


def test_what_is_larger_than_a_bound_is_not_kept_and_displaces_nothing(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path, memory_bytes=MEMORY - 1, disk_bytes=SIZE - 1)
    cache.put(key(1), adapter())
    assert cache.get(key(1)) is None
    found = cache.statistics
    assert (found.memory_bytes, found.disk_bytes, found.evictions, found.unwritten) == (0, 0, 0, 0)
    small = random_adapter(TARGETS[:1], 1, rank=1, dtype=torch.bfloat16)
    cache.put(key(2), small)
    cache.put(key(1), adapter())
    assert same(cache.get(key(2)), small)


def test_files_of_others_stay(tmp_path: Path) -> None:
    others = ["generator.safetensors", "notes.txt", f"{'g' * 64}{SUFFIX}", f".{key(1)}.part"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(10 * SIZE))
    cache = AdapterCache(tmp_path, disk_bytes=SIZE)
    for number in (1, 2):
        cache.put(key(number), adapter(number))
    assert {file.name for file in tmp_path.iterdir()} == {*others, file_of(tmp_path, 2).name}


def test_what_a_dead_process_left_is_removed_but_not_what_is_being_written(tmp_path: Path) -> None:
    old, new = (tmp_path / f".openwu-{token * 16}.part" for token in "ab")
    for part in (old, new):
        part.write_bytes(b"half")
    long_ago = old.stat().st_mtime - 2 * ABANDONED
    os.utime(old, (long_ago, long_ago))
    AdapterCache(tmp_path).put(key(1), adapter())
    assert not old.exists()
    assert new.exists()


# Damage


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "empty":
        data.clear()
    elif how == "truncated":
        del data[-7:]
    elif how == "truncated header":
        del data[40:]
    elif how == "a flipped bit of a weight":
        data[-3] ^= 1
    elif how == "a flipped bit of the scale":
        at = data.index(rb"\"scale\": 0.1")
        data[at + 11] = ord("3")
    elif how == "longer":
        data += b"\0" * 8
    elif how == "a huge header":
        data[:8] = (2**62).to_bytes(8, "little")
    file.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "truncated",
        "truncated header",
        "a flipped bit of a weight",
        "a flipped bit of the scale",
        "longer",
        "a huge header",
    ],
)
def test_a_damaged_file_is_dropped_and_written_again(tmp_path: Path, how: str) -> None:
    AdapterCache(tmp_path).put(key(1), adapter())
    damage(file_of(tmp_path, 1), how)
    cache = AdapterCache(tmp_path)
    assert cache.get(key(1)) is None
    assert (cache.statistics.dropped, cache.statistics.misses) == (1, 1)
    assert not file_of(tmp_path, 1).exists()
    cache.put(key(1), adapter())
    assert same(AdapterCache(tmp_path).get(key(1)), adapter())


def test_a_file_under_another_key_or_of_another_kind_is_dropped(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path, memory_bytes=0)
    cache.put(key(1), adapter())
    file_of(tmp_path, 1).rename(file_of(tmp_path, 2))
    save_file({"weight": torch.ones(2)}, file_of(tmp_path, 3))
    save_file(load_file(file_of(tmp_path, 2)), file_of(tmp_path, 4), metadata={"adapter": "{}", "sha256": "0"})
    assert [cache.get(key(number)) for number in (2, 3, 4)] == [None] * 3
    assert cache.statistics.dropped == 3
    assert not list(tmp_path.iterdir())


def test_every_truncation_is_noticed() -> None:
    data = encode(adapter(), key(1))
    assert same(decode(data, key(1)), adapter())
    for length in range(0, len(data), 13):
        with pytest.raises(CheckpointError):
            decode(data[:length], key(1))


def test_a_disk_that_takes_nothing_fails_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    cache = AdapterCache(tmp_path, memory_bytes=0)
    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put(key(1), adapter())
    assert cache.get(key(1)) is None
    assert cache.statistics.unwritten == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_disappears_is_a_miss(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path / "cache", memory_bytes=0)
    cache.folder is not None and cache.folder.rmdir()
    assert cache.get(key(1)) is None
    cache.put(key(1), adapter())
    assert (cache.statistics.unwritten, cache.statistics.disk_bytes) == (1, 0)


# Many at once

HAMMER = """
import random, sys
sys.path.insert(0, {tests!r})
from test_adapter_cache import SIZE, adapter, key, same
from openwu.editor.cache import AdapterCache
cache = AdapterCache({folder!r}, memory_bytes=0, disk_bytes=4 * SIZE)
draw, found = random.Random(int(sys.argv[1])), 0
for _ in range(300):
    number = draw.randrange(8)
    if (held := cache.get(key(number))) is None:
        cache.put(key(number), adapter(number))
    else:
        assert same(held, adapter(number)), number
        found += 1
state = cache.statistics
assert (state.dropped, state.unwritten, state.hits) == (0, 0, found), state
print(found, state.evictions)
"""


def test_two_processes_hammer_one_folder(tmp_path: Path) -> None:
    """Wrong, damaged or lost writes would show; the folder holds half of what both ask for, so both evict."""
    code = HAMMER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    started = [
        subprocess.Popen([sys.executable, "-c", code, seed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in "12"
    ]
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found, evictions = map(int, output.split())
        assert found > 50
        assert evictions > 20
    assert not list(tmp_path.glob(".*"))
    assert 0 < AdapterStore(tmp_path, 0).bytes <= 4 * SIZE


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache, wrong = AdapterCache(tmp_path, memory_bytes=2 * MEMORY, disk_bytes=4 * SIZE), []

    def work(seed: int) -> None:
        for step in range(60):
            number = (seed * 7 + step) % 6
            found, missing = cache.lookup([key(number)])
            for each in missing:
                cache.put(each, adapter(number))
            if not missing and not same(found[key(number)], adapter(number)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = cache.statistics
    assert not wrong
    assert (state.hits + state.misses, state.dropped) == (180, 0)
    assert state.memory_bytes <= 2 * MEMORY


# What makes a request


def test_a_key_follows_everything_that_the_adapter_depends_on() -> None:
    dark = PICTURE.copy()
    dark[0, 0, 0] ^= 1
    keys = [
        request_key("g", [PICTURE], "blur it"),
        request_key("h", [PICTURE], "blur it"),
        request_key("g", [dark], "blur it"),
        request_key("g", [PICTURE.reshape(2, 8, 3)], "blur it"),
        request_key("g", [PICTURE.astype(np.uint16)], "blur it"),
        request_key("g", [PICTURE, dark], "blur it"),
        request_key("g", [dark, PICTURE], "blur it"),
        request_key("g", [PICTURE], "blur"),
        request_key("g", [PICTURE], "blur it", seed=0),
        request_key("g", [PICTURE], "blur it", seed=1),
        request_key("g", [PICTURE], "blur it", reasoning=""),
        request_key("g", [PICTURE], "blur it", reasoning="0"),
        request_key("g", [PICTURE], "blur it", image_size="0"),
        request_key("g", [PICTURE], "blur it", in_scope=False),
        request_key("g", [PICTURE], "blur it", how="8 bits"),
        request_key("g", [], "blur it"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == request_key("g", [PICTURE.copy()], "blur it")
    wide = np.dstack((PICTURE, PICTURE))
    assert keys[0] == request_key("g", [wide[:, :, :3]], "blur it")  # whatever its layout in memory


def test_a_key_follows_every_piece_of_a_large_picture_and_no_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces are hashed apart, by several threads: no pixel may be left out, none counted in another's place."""
    picture = np.random.default_rng(0).integers(0, 256, (512, 520, 3), dtype=np.uint8)
    known = request_key("g", [picture], "blur it")
    keys = {known}
    places = [0, PIECE - 1, PIECE, 2 * PIECE, picture.size - 1]
    for place in places:
        changed = picture.copy()
        changed.reshape(-1)[place] ^= 1
        keys.add(request_key("g", [changed], "blur it"))
    swapped = picture.copy().reshape(-1)
    swapped[:PIECE], swapped[PIECE : 2 * PIECE] = swapped[PIECE : 2 * PIECE].copy(), swapped[:PIECE].copy()
    keys.add(request_key("g", [swapped.reshape(picture.shape)], "blur it"))
    assert len(keys) == len(places) + 2
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert request_key("g", [picture], "blur it") == known


def test_a_key_follows_the_hash_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for found in (fastest(), SHA256, Hash("another", SHA256.new)):
        monkeypatch.setattr(cache_module, "fastest", lambda found=found: found)
        keys.add(request_key("g", [PICTURE.astype(np.uint16)], "blur it"))
        AdapterCache().put(request_key("g", [PICTURE], "blur it"), adapter())  # it has the form of a key
    assert len(keys) == len({fastest().name, "sha256", "another"})


def identity(module: nn.Module, **config: int) -> GeneratorIdentity:
    return GeneratorIdentity({"generator": module}, config)


def test_an_identity_follows_weights_dtype_config_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    first = identity(module, rank=4).digest
    assert first == identity(module, rank=4).digest
    assert first != identity(module, rank=8).digest
    assert first != GeneratorIdentity({"condition": module}, {"rank": 4}).digest
    assert first != identity(nn.Linear(3, 2), rank=4).digest
    assert first != identity(module.to(torch.bfloat16), rank=4).digest
    again = identity(module, rank=4).digest
    monkeypatch.setattr(cache_module, "code_digest", lambda *_: "newer")
    assert again != identity(module, rank=4).digest


def test_an_identity_notices_weights_that_change() -> None:
    module = nn.Linear(3, 2)
    watched = identity(module)
    before = watched.digest
    with torch.no_grad():
        module.weight.add_(1)
    changed = watched.digest
    module.bias = nn.Parameter(torch.ones(2))
    assert len({before, changed, watched.digest}) == 3


def test_an_identity_notices_modules_and_buffers_that_are_replaced() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    watched = identity(module)
    found = [watched.digest, watched.digest]
    module[0] = nn.Linear(3, 2)
    found.append(watched.digest)
    module[1].running_mean = torch.ones(2)
    found.append(watched.digest)
    module[0].weight.data = torch.ones(2, 3)  # the parameter stays, its memory is another
    found.append(watched.digest)
    module.append(nn.Linear(2, 2))
    found.append(watched.digest)
    del module[2]
    found.append(watched.digest)
    module.double()
    found.append(watched.digest)
    assert found[0] == found[1]
    assert found[6] == found[4]
    assert len(set(found)) == 6


def test_memory_of_known_weights_is_not_given_to_others_before_the_change_was_seen() -> None:
    """Swapped twice between two requests, new weights could lie where the known ones lay, as often changed."""
    module = nn.Linear(3, 2, bias=False)
    memory = np.ones((2, 3), np.float32)
    lives = weakref.ref(memory)
    module.load_state_dict({"weight": torch.from_numpy(memory)}, assign=True)
    del memory
    watched = identity(module)
    first = watched.digest
    module.load_state_dict({"weight": torch.zeros(2, 3)}, assign=True)
    assert lives() is not None
    assert watched.digest != first
    assert lives() is None
