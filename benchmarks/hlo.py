"""Reads what XLA compiled for a GPU: how often each kernel is launched, and how many bytes it reads and writes."""

import math
import re
from typing import NamedTuple

# pred is one byte, every other type has its bits in its name.
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "fusion-done", "copy-done"}
_SLICES = {"dynamic-slice", "slice", "gather"}


class Instruction(NamedTuple):
    """name, shape, opcode and operands as XLA prints them; rest: attributes and metadata."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str

    def attribute(self, pattern: str) -> str:
        """The first group of pattern in what follows the operands; empty if it is not there."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""


class Launch(NamedTuple):
    """A kernel that a program launches count times; operation: what of the Python program it computes."""

    name: str
    operation: str
    count: int
    bytes_each: int


Program = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Program, str]:
    """Computations of an optimised HLO module, and the name of its entry."""
    program: Program = {}
    entry, current = "", []
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = program.setdefault(begins.group(2), [])
            entry = begins.group(2) if begins.group(1) else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, opcode, tail = found.groups()
            operands, rest = _split(tail)
            current.append(Instruction(name, shape, opcode, re.findall(r"%([\w.\-]+)", operands), rest))
    return program, entry


def _split(tail: str) -> tuple[str, str]:
    """Operands and what follows the parenthesis that ends them."""
    depth = 1
    for i, character in enumerate(tail):
        depth += (character == "(") - (character == ")")
        if not depth:
            return tail[:i], tail[i + 1 :]
    return tail, ""


def num_bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    total = 0
    for bits, dimensions in _ARRAY.findall(shape):
        total += math.prod(int(x) for x in dimensions.split(",") if x) * int(bits or 8) // 8
    return total


def launches(text: str) -> list[Launch]:
    """Every kernel of an optimised HLO module, those in loops as often as the loop goes round (once where that is
    unknown), of branches all.
    """
    program, entry = parse(text)
    found: list[Launch] = []
    _walk(program, entry, 1, found)
    return found


def _walk(program: Program, computation: str, times: int, found: list[Launch]) -> None:
    shapes = {instruction.name: instruction.shape for instruction in program[computation]}
    for instruction in program[computation]:
        if instruction.opcode in _NO_KERNEL:
            continue
        if instruction.opcode == "while":
            trips = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"') or "1"
            _walk(program, instruction.attribute(r"body=%?([\w.\-]+)"), times * int(trips), found)
        elif instruction.opcode == "conditional":
            listed = instruction.attribute(r"branch_computations=\{(.*?)\}")
            named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
            for branch in re.findall(r"%([\w.\-]+)", listed) + named:
                _walk(program, branch, times, found)
        elif instruction.opcode == "call":
            _walk(program, instruction.attribute(r"to_apply=%?([\w.\-]+)"), times, found)
        else:
            found.append(_launch(program, instruction, shapes, times))


def _launch(program: Program, instruction: Instruction, shapes: dict[str, str], times: int) -> Launch:
    called = instruction.attribute(r"calls=%?([\w.\-]+)")
    name = instruction.attribute(r'custom_call_target="([^"]*)"') or instruction.name
    if instruction.opcode in ("fusion", "fusion-start"):
        size = _fusion_bytes(program[called])
        # A kernel that is not XLA's own, fused with the slices it reads and writes.
        kernel = next((inner for inner in program[called] if inner.opcode == "custom-call"), None)
        name = kernel.attribute(r'custom_call_target="([^"]*)"') if kernel else name
    elif instruction.opcode in _SLICES:
        size = 2 * num_bytes(instruction.shape)
    else:
        size = num_bytes(instruction.shape) + sum(
            num_bytes(shapes.get(operand, "")) for operand in instruction.operands
        )
    return Launch(name, instruction.attribute(r'op_name="([^"]*)"'), times, size)


def _fusion_bytes(body: list[Instruction]) -> int:
    """Of each array that goes in what is read at most once, of what comes out what is written."""
    shapes = {instruction.name: instruction.shape for instruction in body}
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    updates = [x for x in body if x.opcode == "dynamic-update-slice"]
    total = num_bytes(body[-1].shape) - sum(num_bytes(x.shape) - num_bytes(shapes[x.operands[1]]) for x in updates)
    for parameter in (x for x in body if x.opcode == "parameter"):
        whole, uses = num_bytes(parameter.shape), users.get(parameter.name, [])
        if all(use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name for use in uses):
            continue
        sliced = all(use.opcode in _SLICES and use.operands[0] == parameter.name for use in uses)
        total += min(whole, sum(num_bytes(use.shape) for use in uses)) if sliced else whole
    return max(total, 0)


def sums(found: list[Launch]) -> tuple[int, int]:
    """Launches and bytes of them all."""
    return sum(x.count for x in found), sum(x.count * x.bytes_each for x in found)
