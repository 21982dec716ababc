"""One description of an op, from which its schema, its registration with torch.library, its fake and its direct call
follow.

An op's operands are a NamedTuple: names, order and types stand there alone. Its functions take one of these.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", str: "str", bool: "bool"}
_TYPES |= {torch.dtype: "ScalarType", int: "int"}  # type: ignore[dict-item]  # a union's type is none of mypy's


class Op:
    """``reflow_kernels::name``. Calling it takes the dispatcher; ``run`` is the same function without it.

    operands: a NamedTuple class with annotated fields. run, fake: functions of one of these. results: how many tensors
    come back, 0 for an op that writes into the operands that ``mutates`` names.
    """

    def __init__(
        self,
        name: str,
        operands: type[Any],
        run: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        *,
        results: int,
        mutates: tuple[str, ...] = (),
    ):
        self.name, self.run, self.operands, self.mutates = name, run, operands, mutates
        schema = _schema(operands, results, mutates)
        self.definition = torch.library.custom_op(
            f"reflow_kernels::{name}", lambda *given: run(operands(*given)), mutates_args=mutates, schema=schema
        )
        self.definition.register_fake(lambda *given: fake(operands(*given)))
        self._call = getattr(torch.ops.reflow_kernels, name)

    def __call__(self, operands: Any) -> Any:
        return self._call(*operands)


def _schema(operands: type[Any], results: int, mutates: tuple[str, ...]) -> str:
    fields = []
    for number, (name, kind) in enumerate(typing.get_type_hints(operands).items()):
        written = f"Tensor(a{number}!)" if name in mutates else "Tensor"
        fields.append(f"{_TYPES[kind].replace('Tensor', written)} {name}")
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    return f"({', '.join(fields)}) -> {returned}"
