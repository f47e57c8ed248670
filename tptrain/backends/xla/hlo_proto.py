"""Stating in a traced HLO module what only a run with data states: shardings and donors of its parameters.

XLA's own Python bindings cannot edit a module, and its schema is not published as Python code. So the few
fields that are needed are declared here, with the numbers of xla/service/hlo.proto; protobuf carries all
others through as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_KIND = descriptor_pb2.FieldDescriptorProto

# Message -> (field, number, type, whether repeated). A sharding is kept as the bytes that it is written in.
_SCHEMA: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "Module": (
        ("computations", 3, "Computation", True),
        ("entry_computation_id", 6, "int64", False),
        ("buffer_donor", 18, "Donors", False),
    ),
    "Computation": (
        ("name", 1, "string", False),
        ("instructions", 2, "Instruction", True),
        ("id", 5, "int64", False),
        ("root_id", 6, "int64", False),
    ),
    "Instruction": (
        ("opcode", 2, "string", False),
        ("shape", 3, "Shape", False),
        ("parameter_number", 9, "int64", False),
        ("tuple_index", 13, "int64", False),
        ("id", 35, "int64", False),
        ("operand_ids", 36, "int64", True),
        ("called_computation_ids", 38, "int64", True),
        ("sharding", 40, "bytes", False),
    ),
    "Shape": (("element_type", 2, "int64", False),),
    "Donors": (("entries", 1, "Donor", True),),
    "Donor": (("parameter_number", 1, "int64", False),),
}

_TYPES = {"int64": _KIND.TYPE_INT64, "bytes": _KIND.TYPE_BYTES, "string": _KIND.TYPE_STRING}
# How torch_xla names a computation that it has traced by itself, such as the body of a scan.
_TRACED = "FnComputation"

# F16, F32, F64 and BF16 of xla/xla_data.proto.
_FLOATS = (10, 11, 12, 16)

# Where a value comes from: the number of a parameter of the entry, the parts of a tuple, or elsewhere.
Origin = Any


def read_module(proto: bytes) -> Any:
    """The message of a serialized HloModuleProto."""
    module = _module_class()()
    module.ParseFromString(proto)
    return module


def instruction_count(proto: bytes) -> int:
    """Instructions of all computations."""
    return sum(len(computation.instructions) for computation in read_module(proto).computations)


def parameter_shardings(proto: bytes) -> list[bytes]:
    """The shardings of the entry's parameters in order; empty where none is stated, or it is replicated."""
    entry = _entry(read_module(proto))
    parameters = [each for each in entry.instructions if each.opcode == "parameter"]
    return [each.sharding for each in sorted(parameters, key=lambda each: each.parameter_number)]


def custom_shardings(proto: bytes) -> list[bytes]:
    """The shardings of the entry's results in the order of its root tuple; empty as for parameters."""
    entry = _entry(read_module(proto))
    by_id = {instruction.id: instruction for instruction in entry.instructions}
    return [by_id[operand].sharding for operand in by_id[entry.root_id].operand_ids]


def annotate(proto: bytes, shardings: Mapping[int, bytes], donors: Iterable[int]) -> bytes:
    """The module with the shardings of its entry's parameters, and those that it may write its results into.

    shardings: parameter number -> serialized OpSharding. They are also stated where a body that torch_xla has
    traced is handed such a parameter as it is: that is the same data to it, so it states them there, too. And
    where a parameter is cast to another format, whose sharding torch_xla hands on; not where an integer is
    made wider to be compared, which is no tensor to it.
    """
    module = read_module(proto)
    computations = {computation.id: computation for computation in module.computations}
    _Annotator(computations, shardings).visit(module.entry_computation_id, None)
    for number in sorted(donors):
        module.buffer_donor.entries.add(parameter_number=number)
    return module.SerializeToString(deterministic=True)


class _Annotator:
    """Follows parameters of the entry into the computations that it calls."""

    def __init__(self, computations: Mapping[int, Any], shardings: Mapping[int, bytes]):
        self._computations, self._shardings = computations, shardings

    def visit(self, computation_id: int, arguments: Sequence[Origin] | None) -> Origin:
        """State shardings in a computation; returns where its result comes from. None: it is the entry."""
        computation = self._computations[computation_id]
        traced = arguments is None or computation.name.startswith(_TRACED)
        origins: dict[int, Origin] = {}
        for instruction in computation.instructions:
            operands = [origins[operand] for operand in instruction.operand_ids]
            origin = origins[instruction.id] = self._origin(instruction, operands, arguments)
            if traced and instruction.opcode == "parameter":
                self._state(instruction, origin)
            elif traced and _is_cast(instruction):
                self._state(instruction, operands[0])
        return origins[computation.root_id]

    def _state(self, instruction: Any, origin: Origin) -> None:
        if isinstance(origin, int) and origin in self._shardings:
            instruction.sharding = self._shardings[origin]

    def _origin(self, instruction: Any, operands: list[Origin], arguments: Sequence[Origin] | None) -> Origin:
        if instruction.opcode == "parameter":
            number = int(instruction.parameter_number)
            return number if arguments is None else arguments[number]
        if instruction.opcode == "tuple":
            return tuple(operands)
        if instruction.opcode == "get-tuple-element":
            return operands[0][instruction.tuple_index] if isinstance(operands[0], tuple) else None
        if instruction.opcode == "call":
            return self.visit(instruction.called_computation_ids[0], operands)
        if instruction.opcode == "while":
            return self._loop(instruction.called_computation_ids, operands[0])
        return None

    def _loop(self, called: Sequence[int], start: Origin) -> Origin:
        """Of a loop's state only what every pass hands on as it was is still the parameter it began as."""
        bare = _Annotator(self._computations, {})
        while (kept := _common(start, bare.visit_body(called, start))) != start:
            start = kept
        for computation in called:
            self.visit(computation, [start])
        return start

    def visit_body(self, called: Sequence[int], state: Origin) -> Origin:
        """Where the state after one pass comes from: the computation whose result is a tuple is the body."""
        results = [self.visit(computation, [state]) for computation in called]
        return next((result for result in results if isinstance(result, tuple)), None)


def _is_cast(instruction: Any) -> bool:
    return instruction.opcode == "convert" and instruction.shape.element_type in _FLOATS


def _common(one: Origin, other: Origin) -> Origin:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(a if a == b else None for a, b in zip(one, other, strict=True))
    return one if one == other else None


def _entry(module: Any) -> Any:
    return next(c for c in module.computations if c.id == module.entry_computation_id)


@cache
def _module_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="tptrain/hlo.proto", package="tptrain", syntax="proto2")
    for message, fields in _SCHEMA.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = declared.field.add(name=name, number=number)
            field.label = _KIND.LABEL_REPEATED if repeated else _KIND.LABEL_OPTIONAL
            if kind in _SCHEMA:
                field.type, field.type_name = _KIND.TYPE_MESSAGE, f".tptrain.{kind}"
            else:
                field.type = _TYPES[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tptrain.Module"))
