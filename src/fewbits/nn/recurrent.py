"""Recurrent layers from codes: a few time steps at a time, as in streams.

Torch computes recurrent layers in one operation of C++, which needs float weights. To decode them takes longer than a
few steps. For few steps, the loops below multiply with codes. The equations are those of `torch.nn.LSTM`, `GRU` and
`RNN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: With more steps, decoding the weights once takes less time.
MOST_STEPS = 8

#: Computes the next states from those before, and from the gates: of the input, and of the hidden state.
_Cell = Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]


def _lstm_cell(of_input: Tensor, of_hidden: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    enter, keep, new, leave = (of_input + of_hidden).chunk(4, 1)
    memory = keep.sigmoid() * states[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * memory.tanh(), memory


def _gru_cell(of_input: Tensor, of_hidden: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (reset, update, new), (own_reset, own_update, own_new) = of_input.chunk(3, 1), of_hidden.chunk(3, 1)
    update = (update + own_update).sigmoid()
    new = torch.tanh(new + (reset + own_reset).sigmoid() * own_new)
    return ((states[0] - new) * update + new,)


def _rnn_cell(
    activation: Callable[[Tensor], Tensor], of_input: Tensor, of_hidden: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return (activation(of_input + of_hidden),)


_CELLS: Mapping[Any, _Cell] = {
    torch.lstm: _lstm_cell,
    torch.gru: _gru_cell,
    torch.rnn_tanh: partial(_rnn_cell, torch.tanh),
    torch.rnn_relu: partial(_rnn_cell, torch.relu),
}

#: Torch's recurrent operations.
OPERATIONS = tuple(_CELLS)


def steps(func: Any, args: Sequence[Any]) -> Any:
    """Compute one of torch's recurrent operations step by step.

    Args:
        func: the operation.
        args: its arguments: input, hidden states, weights, has_biases, num_layers, dropout, train, bidirectional,
            batch_first.

    Returns:
        what the operation returns; NotImplemented for other operations, many steps, packed sequences, dropout, and
        under autocast.
    """
    cell = None if torch.is_autocast_enabled("cpu") else _CELLS.get(func)  # autocast has other dtypes
    if cell is None or len(args) != 9 or not isinstance(args[3], bool):  # a packed sequence has other arguments
        return NotImplemented
    x, hidden, weights, has_biases, layers, dropout, train, bidirectional, batch_first = args
    x = x.transpose(0, 1) if batch_first else x
    if len(x) > MOST_STEPS or (train and dropout):
        return NotImplemented
    states = hidden if isinstance(hidden, (tuple, list)) else (hidden,)
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            own = weights[at * each : (at + 1) * each]
            output, state = _direction(cell, x, [s[at] for s in states], own, has_biases, backwards=direction == 1)
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, 2)
    output = x.transpose(0, 1) if batch_first else x
    return (output, *(torch.stack(each) for each in zip(*last, strict=True)))


def _direction(
    cell: _Cell, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], has_biases: bool, *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer in one direction.

    Returns:
        the hidden states of all steps, and the states after the last.
    """
    of_input, of_hidden, *rest = weights
    biases: Sequence[Tensor | None] = (rest[0], rest[1]) if has_biases else (None, None)
    projection = rest[2 * has_biases] if len(rest) > 2 * has_biases else None
    gates = F.linear(x, of_input, biases[0])
    current, hidden = tuple(states), []
    for step in reversed(range(len(x))) if backwards else range(len(x)):
        current = cell(gates[step], F.linear(current[0], of_hidden, biases[1]), current)
        if projection is not None:
            current = (F.linear(current[0], projection), *current[1:])
        hidden.append(current[0])
    return torch.stack(hidden[::-1] if backwards else hidden), current
