"""Memory traffic and collectives of a program that XLA compiled for TPUs or GPUs, from its text."""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SIZES = {
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "pred": 1,
    "u8": 1,
    "s8": 1,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "token": 0,
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# Operations that move nothing. Two custom calls move nothing either: they allocate a buffer, or
# treat adjacent buffers as one.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_ALLOCATE, _CONCATENATE = '"AllocateBuffer"', '"ConcatBitcast"'
# Operations that run other computations once.
_CALLERS = {"fusion", "conditional", "call", "async-start"}
SPACES = {"": "HBM", "1": "VMEM"}  # by number in S(...); a layout without one is main memory


class Array(NamedTuple):
    """A shape such as f32[8,128]{1,0:T(8,128)S(1)}: edges, bytes per item, layout."""

    edges: list[int]
    itemsize: int
    layout: str

    @property
    def memory(self) -> str:
        """The memory that holds the array, as the compiler states it: HBM, VMEM or S(number)."""
        number = re.search(r"S\((\d+)\)", self.layout)
        return SPACES.get(number[1] if number else "", number[0] if number else "")

    @property
    def in_hbm(self) -> bool:
        """Whether the array is in main memory."""
        return "S(" not in self.layout

    @property
    def padded_bytes(self) -> int:
        """Its size in bytes including the padding of its tiles."""
        edges = list(self.edges)
        order, tile = re.match(r"[\d,]+", self.layout), re.search(r"T\(([\d,]+)\)", self.layout)
        if order and tile and edges:
            minor = [int(axis) for axis in order[0].split(",")]
            tiles = [int(edge) for edge in tile[1].split(",")]
            for axis, edge in zip(minor, reversed(tiles), strict=False):
                edges[axis] = -(-edges[axis] // edge) * edge
        return self.itemsize * math.prod(edges)


class Line(NamedTuple):
    """An operation `name = outputs kind(operands), ...`; `rest` is the text after `kind(`."""

    arrays: list[Array]
    kind: str
    operands: list[str]
    rest: str
    is_root: bool

    @property
    def hbm_bytes(self) -> int:
        """Bytes of its outputs in main memory."""
        return _in_hbm(self.arrays)


Computation = dict[str, Line]  # by name of the operation


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that an operation writes.

    Attributes:
      source: of the operation, see `Operation`.
      edges: its shape.
      size: bytes including the padding of its tiles.
      memory: the memory that holds it, see `Array.memory`.
    """

    source: str
    edges: list[int]
    size: int
    memory: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """What an operation of the entry computation moves, a loop with all its iterations.

    Attributes:
      name: of the operation in the program.
      source: the path of modules and functions that it was compiled from.
      moved: bytes that it reads from and writes to main memory.
      outputs: the arrays that it writes; those of an asynchronous one belong to its end.
    """

    name: str
    source: str
    moved: int
    outputs: list[Buffer]


def collectives(text: str) -> list[int]:
    """[count, bytes of their outputs] of the collectives that a compiled program runs.

    Those in the body of a loop count once per iteration.

    Raises:
      ValueError: see `hbm_bytes`.
    """
    computations = _parse(text)
    return _collectives_of(computations["ENTRY"], computations)


def _collectives_of(computation: Computation, computations: Mapping[str, Computation]) -> list[int]:
    count = moved = 0
    for line in computation.values():
        times, parts = 1, []
        if _is_collective(line.kind):
            sizes = (a.itemsize * math.prod(a.edges) for a in _collective_outputs(line))
            parts = [[1, sum(sizes)]]
        elif line.kind == "while":
            parts = [_collectives_of(computations[_named("body", line.rest)], computations)]
            times = _trips(line.rest, computations) if parts[0][0] else 0
        elif line.kind in _CALLERS:
            called = (computations[name] for name in _called(line.rest))
            parts = [_collectives_of(each, computations) for each in called]
            if line.kind == "conditional":
                parts = [max(parts, default=[0, 0])]
        count += times * sum(part[0] for part in parts)
        moved += times * sum(part[1] for part in parts)
    return [count, moved]


def _is_collective(kind: str) -> bool:
    return bool(re.fullmatch(rf"(?:{COLLECTIVES})(?:-start)?", kind))


def _collective_outputs(line: Line) -> list[Array]:
    """The outputs of a collective; two kinds of starts list their operands first."""
    if line.kind in ("all-gather-start", "collective-permute-start"):
        return line.arrays[len(line.operands) : 2 * len(line.operands)]
    return line.arrays


def hbm_bytes(text: str) -> int:
    """Bytes that one run reads from and writes to the main memory (HBM) of a chip.

    XLA's own "bytes accessed" does not distinguish the chip's fast memory (VMEM, marked with S(1)
    in the text) from main memory, and counts an array once per use within a fused operation. Here
    each operation reads each of its operands in main memory once and writes its outputs once. Of an
    operand that is only sliced, the slices count; of a buffer that is updated in place, the update.
    Sizes include the padding of tiles. Two costs are not in the text and not counted: data that an
    operation reads repeatedly, such as overlapping windows of a convolution, and the scattered
    reads of a gather, which take far longer than reading its operand once.

    Args:
      text: an optimized and scheduled module, `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation, the trip count of a loop is unknown, or an operand
        or a type is unknown.
    """
    return sum(operation.moved for operation in operations(text))


def operations(text: str) -> list[Operation]:
    """The operations of the entry computation that move or allocate something, in their order.

    For the arguments and errors see `hbm_bytes`, which is the sum of what they move.
    """
    computations = _parse(text)
    if "ENTRY" not in computations:
        raise ValueError("no ENTRY computation in the text: pass compiled.as_text()")
    entry, result = computations["ENTRY"], []
    for name, line in entry.items():
        if line.kind in _FREE or _CONCATENATE in line.rest:
            continue
        named = re.search(r'op_name="([^"]*)"', line.rest)
        source = named[1] if named else ""
        written = [] if line.kind.endswith("-start") else line.arrays
        outputs = [Buffer(source, each.edges, each.padded_bytes, each.memory) for each in written]
        moved = _moved(line, entry, computations)
        result.append(Operation(name, source, moved, outputs))
    return result


def _parse(text: str) -> dict[str, Computation]:
    """The computations by name; the entry computation is "ENTRY"."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            if not head:
                current = None
            else:
                current = {}
                computations["ENTRY" if head[1] else head[2]] = current
        elif current is not None and (parsed := _line(line)):
            name, operation = parsed
            current[name] = operation
    return computations


def _line(text: str) -> tuple[str, Line] | None:
    """(name, operation) of a line of text; None if it has no operation."""
    match = _LINE.match(text)
    if not match:
        return None
    root, name, shape, kind, rest = match.groups()
    return name, Line(_arrays(shape), kind, _operands(rest), rest, bool(root))


def _operands(rest: str) -> list[str]:
    """The names before the closing parenthesis; each may follow its type."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return re.findall(r"%([\w.\-]+)", rest[:end])
    return []


def _arrays(shape: str) -> list[Array]:
    """The arrays of a shape, which may be a nested tuple."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype not in SIZES:
            raise ValueError(f"type {dtype!r} is unknown: add its bytes to SIZES")
        arrays.append(Array([int(edge) for edge in dims.split(",") if edge], SIZES[dtype], layout))
    return arrays


def _in_hbm(arrays: Sequence[Array]) -> int:
    """Bytes of the arrays that are in main memory."""
    return sum(array.padded_bytes for array in arrays if array.in_hbm)


def _bytes_of(computation: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes of main memory that a computation reads and writes."""
    return sum(_moved(line, computation, computations) for line in computation.values())


def _moved(line: Line, computation: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes of main memory that an operation of a computation reads and writes."""
    kind, rest = line.kind, line.rest
    if kind in _FREE or kind.endswith("-done") or _ALLOCATE in rest or _CONCATENATE in rest:
        return 0
    missing = [name for name in line.operands if name not in computation]
    if missing or (not line.operands and not rest.startswith(")")):
        raise ValueError(f"the operands of {kind} are unknown: {missing or rest[:60]}")
    read = [computation[name].hbm_bytes for name in line.operands]
    called = [computations[name] for name in _called(rest)] if kind in _CALLERS else []
    if kind == "fusion":
        return _fusion(called[0], read, line.arrays)
    if kind in ("slice", "dynamic-slice", "slice-start", "dynamic-slice-start"):
        # A start returns ((operands), result, ...). It reads as much as it returns.
        result = line.arrays[len(read) if kind.endswith("-start") else 0]
        return _in_hbm([result]) + (result.padded_bytes if read[0] else 0)
    if kind == "copy-start":
        return line.hbm_bytes  # returns (target, source, ...)
    if _is_collective(kind):
        return _in_hbm(_collective_outputs(line)) + sum(read)
    if kind == "while":
        body = computations[_named("body", rest)]
        return _trips(rest, computations) * _bytes_of(body, computations)
    if kind == "conditional":
        return max((_bytes_of(branch, computations) for branch in called), default=0)
    if kind in ("call", "async-start"):
        return sum(_bytes_of(one, computations) for one in called)
    if kind == "dynamic-update-slice":
        update = computation[line.operands[1]].arrays[0]
        return read[1] + (update.padded_bytes if line.hbm_bytes else 0)
    return line.hbm_bytes + sum(read)


def _trips(rest: str, computations: Mapping[str, Computation]) -> int:
    """The trip count of a loop: annotated, or the limit of a counter that starts at 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = computations[_named("condition", rest)]
    limits = [line.rest for line in condition.values() if line.kind == "constant"]
    compared = any("direction=LT" in line.rest for line in condition.values())
    if len(limits) != 1 or not compared:
        raise ValueError(f"the trip count of a loop is not in the text: ...{rest[:100]}")
    return int(limits[0].split(")")[0])


def _named(part: str, rest: str) -> str:
    """The name of a loop's body or condition.

    Raises:
      ValueError: the text has none.
    """
    match = re.search(rf"{part}=%?([\w.\-]+)", rest)
    if match is None:
        raise ValueError(f"a loop has no {part}: ...{rest[:100]}")
    return match[1]


def _called(rest: str) -> list[str]:
    """The names of the computations that an operation calls."""
    one = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    many = re.search(r"branch_computations=\{([^}]*)\}", rest)
    return one + (re.findall(r"[\w.\-]+", many[1]) if many else [])


def _fusion(computation: Computation, operands: Sequence[int], outputs: Sequence[Array]) -> int:
    """Bytes of main memory that a fused operation reads and writes.

    Args:
      computation: its body.
      operands: bytes of each operand in main memory.
      outputs: its outputs.
    """
    moved = 0
    for name, line in computation.items():
        if line.kind == "parameter":
            number = int(line.rest.split(")")[0])
            moved += min(operands[number], _read(computation, name))
    (root,) = (name for name, line in computation.items() if line.is_root)
    written = [root] * len(outputs)  # an operation of several outputs, such as a library call
    if computation[root].kind == "tuple":
        written = computation[root].operands
    for name, output in zip(written, outputs, strict=True):
        moved += min(_in_hbm([output]), _updated(computation, name))
    return moved


def _without_bitcasts(computation: Computation, name: str) -> Line:
    """The operation whose output a chain of bitcasts renames."""
    while computation[name].kind == "bitcast":
        name = computation[name].operands[0]
    return computation[name]


def _updated(computation: Computation, name: str) -> int:
    """Upper bound of the bytes that an operation writes: its update if in place, else no bound."""
    line = _without_bitcasts(computation, name)
    if line.kind == "dynamic-update-slice":
        buffer = _without_bitcasts(computation, line.operands[0])
        if buffer.kind == "parameter" or _ALLOCATE in buffer.rest:
            return computation[line.operands[1]].arrays[0].padded_bytes
    return sys.maxsize


def _read(computation: Computation, name: str) -> int:
    """Upper bound of the bytes read of a parameter: its slices if only sliced, else no bound."""
    moved, names = 0, {name}
    for user, line in computation.items():
        if not names & set(line.operands):
            continue
        if line.kind == "bitcast":
            names.add(user)
        elif line.kind in ("slice", "dynamic-slice") and line.operands[0] in names:
            moved += line.arrays[0].padded_bytes
        elif line.kind != "dynamic-update-slice" or line.operands[0] not in names:
            return sys.maxsize
    return moved
