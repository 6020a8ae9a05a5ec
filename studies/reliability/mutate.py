"""Damage to files: JSON and YAML trees, safetensors headers, texts and plain bytes. All of it follows from a seed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

# What no field of anything should crash on.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 33, 10**6, 10**12, 10**30, -(10**12), 2**63, 2**64 + 1, 0.5, -0.5, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "x", "mlp", "0", "1e3", "nan", "../../etc/passwd", "/etc/passwd",
    "\x00", "\ud800", "é" * 40, "a" * 5000, "%s%n{}", [], [[]], [0], [1, 1], [-1], [2, "x"], [None], {}, {"": None},
    {"x": {"y": []}}, [1] * 300, {"__class__": "os.system"},
)  # fmt: skip
JSON_BYTES = (b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b"[" * 20000, b'{"a":' * 5000, b"\x00" * 64)


def odd(random: Random) -> Any:
    return copy.deepcopy(random.choice(ODD))


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:400]:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate_tree(random: Random, tree: Any, below: tuple[Any, ...] = ()) -> str:
    """Change one place in place, at or below a path; says what was done."""
    found = [path for path in places(tree) if path[: len(below)] == below]
    if not found:
        return "nothing to change"
    # Shallow places first: a vocabulary has thousands of deep ones.
    depth = random.choice(sorted({len(path) for path in found}))
    path = random.choice([path for path in found if len(path) == depth])
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], random.choice(("replace", "replace", "replace", "delete", "rename", "scale", "wrap"))
    old = parent[key]
    if how == "delete":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[random.choice((f"{key}_", str(key).upper(), "", "x", str(key)[:-1]))] = parent.pop(key)
    elif how == "scale" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = old * random.choice((-1, 0, 2, 1000, 10**9)) + random.choice((0, 1, -1))
    elif how == "wrap":
        parent[key] = random.choice(([old], {"x": old}, str(old)[:200], [old, old]))
    else:
        parent[key] = odd(random)
    return (
        f"{how} {'.'.join(map(str, path))[:80]} -> {str(parent.get(key) if isinstance(parent, dict) else '…')[:40]!r}"
    )


def mutate_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Cut, flip, insert, repeat or overwrite bytes."""
    how = random.choice(("cut", "flip", "insert", "repeat", "zero", "random"))
    at = random.randrange(len(data)) if data else 0
    if how == "cut":
        return data[:at], f"cut at {at}"
    if how == "flip" and data:
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :], f"flip at {at}"
    if how == "insert":
        return data[:at] + random.randbytes(random.randrange(1, 40)) + data[at:], f"insert at {at}"
    if how == "repeat":
        return data[:at] + data, f"repeat the first {at}"
    if how == "zero":
        return data[:at] + b"\x00" * min(64, len(data) - at) + data[at + 64 :], f"zero at {at}"
    return random.randbytes(random.choice((0, 1, 7, 8, 9, 100))), "random bytes"


def mutate_json(random: Random, data: bytes, below: tuple[Any, ...] = ()) -> tuple[bytes, str]:
    """One to three changes of the tree, or of the bytes."""
    kind = random.random()
    if kind < 0.06:
        return random.choice(JSON_BYTES), "another content"
    if kind < 0.14:
        return mutate_bytes(random, data)
    tree = json.loads(data)
    what = "; ".join(mutate_tree(random, tree, below) for _ in range(random.choice((1, 1, 1, 2, 3))))
    return json.dumps(tree).encode("utf-8", "surrogatepass"), what


DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "Q7", "", None, 3)


def _header(random: Random, header: dict[str, Any]) -> str:
    name = random.choice([key for key in header if key != "__metadata__"])
    entry = header[name]

    def dtype() -> None:
        entry["dtype"] = random.choice(DTYPES)

    def shape() -> None:
        entry["shape"] = random.choice(
            ([], [0], [-1, 4], [10**12], [10**6, 10**6], [2**63, 2], [2**32, 2**32], entry["shape"][::-1], "x", [1.5],
             [1, *entry["shape"]], entry["shape"][:1], [entry["shape"][0] * 2, *entry["shape"][1:]])
        )  # fmt: skip

    def offsets() -> None:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            ([end, start], [start, end + 4], [start + 4, end], [0, 2**63], [-4, end], [start, 10**15], [], [start], "x",
             [2**64, 2**64], [0, 0], [start, end, end])
        )  # fmt: skip

    def absurd() -> None:
        entry["shape"], entry["data_offsets"] = [10**6, 10**6], [0, 4 * 10**12]

    def delete() -> None:
        del header[name]

    def rename() -> None:
        header[random.choice(("x", "", "../x", name + ".weight", name[:-1], "é" * 300))] = header.pop(name)

    def double() -> None:
        header[name + "2"] = dict(entry)

    def metadata() -> None:
        header["__metadata__"] = random.choice((None, 3, {"format": "tf"}, {}, {"format": 3}, [], {"x": "y" * 9999}))

    change: Callable[[], None] = random.choice((dtype, shape, offsets, absurd, delete, rename, double, metadata))
    change()
    return f"header: {change.__name__} of {name}"


def mutate_safetensors(random: Random, data: bytes) -> tuple[bytes, str]:
    """Lengths, dtypes, shapes, offsets, names, and the file's own length."""
    size = int.from_bytes(data[:8], "little")
    raw, rest = data[8 : 8 + size], data[8 + size :]
    kind = random.random()
    if kind < 0.12:
        lies = (0, 1, size - 1, size + 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1)
        lie = random.choice(lies)
        return lie.to_bytes(8, "little") + raw + rest, f"header length {lie}"
    if kind < 0.2:
        at = random.choice((0, 4, 8, 8 + size // 2, 8 + size, len(data) - 1, len(data) - 1000))
        return data[:at], f"file cut at {at}"
    if kind < 0.28:
        return mutate_bytes(random, data)
    if kind < 0.34:
        return data + random.randbytes(random.choice((1, 4, 4096))), "bytes after the end"
    if kind < 0.4:
        name = json.dumps(random.choice([key for key in json.loads(raw) if key != "__metadata__"]))
        twice = raw.rstrip()[:-1] + b"," + name.encode() + b':{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        return len(twice).to_bytes(8, "little") + twice + rest, "a name twice"
    if kind < 0.46:
        bad = random.choice((b"{" * 3000, b"[]", b"null", b"{}", b'{"a": 3}', b"\xff" * 16, b'{"a":' * 3000))
        return len(bad).to_bytes(8, "little") + bad + rest, "another header"
    header = json.loads(raw)
    what = _header(random, header)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + rest, what


def mutate_text(random: Random, data: bytes) -> tuple[bytes, str]:
    """Encodings, lengths and JSON lines that are none."""
    choices: tuple[tuple[bytes, str], ...] = (
        (b"", "empty"), (b"\n \t\n", "white space"), (b"a", "one letter"), (b"\xff\xfe" + data, "UTF-16 mark"),
        (data[:200] + b"\xe9" + data, "Latin-1"), (data.decode().encode("utf-16"), "UTF-16"), (b"\x00" * 3000, "NULs"),
        (data[:-1] + b"\xe2\x82", "cut inside a character"), (b"\xef\xbb\xbf" + data, "byte-order mark"),
        (b"a" * 100_000, "no white space"), ("𝔘💥".encode() * 500, "outside the vocabulary's words"),
        (b"{\n" + data, "broken JSON"), (b"[]\n" * 9, "lists"), (b'{"text": 3}\n', "a number"),
        (b'{"txt": "x"}\n', "another field"), (b'{"text": null}\n', "null"), (b'{"text": ""}\n' * 5, "empty texts"),
        (b'{"text": "\\ud800"}\n' * 300, "half a surrogate"), (b'{"text": "a"}\n' * 3, "short"),
        (b"[" * 50_000, "deep"), (b'{"text": NaN}\n', "NaN"), (b"<s></s>" * 200, "special tokens alone"),
    )  # fmt: skip
    if random.random() < 0.15:
        return mutate_bytes(random, data)
    return random.choice(choices)
