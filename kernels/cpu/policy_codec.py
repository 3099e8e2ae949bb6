"""Policies as the C++ library reads them: a class name, and numbers by the names of the fields.

The library has one class for each (csrc/policies.cpp), which takes every field by its name.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from molehill.kernels.policy import Policy


def encode(policy: Policy, parameters: Tensor | None) -> tuple[str, Mapping[str, list[float]]]:
    """The policy's class name and its fields, and what it learned as the field `parameters`.

    A flag is 0 or 1; a choice is a field `name=chosen` without numbers.
    """
    values: dict[str, list[float]] = {}
    for field in fields(policy):
        value: Any = getattr(policy, field.name)
        if isinstance(value, str):
            values[f"{field.name}={value}"] = []
        else:
            many = value if isinstance(value, tuple) else (value,)
            values[field.name] = [float(number) for number in many]
    if parameters is not None:
        values["parameters"] = [float(number) for number in parameters.tolist()]
    return type(policy).__name__, values
