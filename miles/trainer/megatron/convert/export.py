"""From a Megatron-Core model on any number of ranks to whole tensors under Hugging Face names, on rank 0.

    bucket    whole tensors that fit the bucket size, in the order of the layers
      transfer  pieces of local parameters of one pipeline stage that travel together:
                  gather   over the ranks that hold parts (tensor parallel, or experts) to the first of the stage
                  send     from there to rank 0
                then rank 0 copies ranges (`Parameter.segments`) into the whole tensors

Rank 0 holds one bucket and one transfer buffer, which is never larger than a bucket or the largest parameter: larger
ones travel in pieces of rows. What rank 0 has already is not sent, and what is there as one range is not even copied:
such tensors are views of the live parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from miles.trainer.megatron.convert.folder import HfModel
from miles.trainer.megatron.convert.layout import ModelLayout
from miles.trainer.megatron.convert.load import matched
from miles.trainer.megatron.convert.rules import Parameter
from miles.weights.gather import Bucket

Lane = Literal["one", "tensor", "expert"]
"""Who holds parts of a parameter: the first rank of its stage, the tensor-parallel ranks, or the expert-parallel ranks
times those over which each expert is cut."""


@dataclass
class Unit:
    """Whole tensors that are made of the same parameters: queries, keys and values, or all experts of a layer."""

    wholes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(map(prod, self.wholes.values()))


@dataclass(frozen=True)
class Piece:
    """Rows [begin, end) of a parameter as its holder has it, at `offset` (elements) of what the holder sends."""

    parameter: Parameter
    holder: int
    begin: int
    end: int
    offset: int
    columns: int

    @property
    def numel(self) -> int:
        return (self.end - self.begin) * self.columns


@dataclass
class Transfer:
    """Pieces of one stage and lane. `filled`: elements per holder (expert-parallel rank; else there is only 0)."""

    stage: int
    lane: Lane
    filled: list[int]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Of what each rank sends: as much as the fullest."""
        return max(self.filled)


class Exporter:
    """The weights of a model under the names of `folder`'s architecture. Every rank makes one and runs it alike.

    `experts`: `each` names them one by one, as folders on a disk have them, `stacked` as transformers keeps them in
    memory and the embedded engine reads them. `own_head` (a critic): the output layer is left out. Raises
    CheckpointError for a folder whose architecture has no table, ValueError where the model has other parameters than
    its configuration says, or several dtypes.
    """

    def __init__(
        self,
        folder: str | Path,
        chunks: Sequence[nn.Module],
        config: TransformerConfig,
        *,
        flag: str = "--hf-checkpoint",
        experts: Literal["each", "stacked"] = "stacked",
        own_head: bool = False,
    ) -> None:
        self._stacked = experts == "stacked"
        self._model = ModelLayout(HfModel.of(folder, flag), chunks, config, own_head=own_head)
        self._own = {parameter.local: tensor.detach() for parameter, tensor in matched(self._model, chunks).values()}
        dtypes = {tensor.dtype for tensor in self._own.values()}
        if len(dtypes) != 1:
            raise ValueError(f"Parameters of one dtype were expected; these have {sorted(map(str, dtypes))}.")
        self._dtype = dtypes.pop()
        self._device = next(iter(self._own.values())).device
        self._ranks = _Ranks.of(config)
        self._units = self._in_units()

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and dtype of every whole tensor, in the order of `buckets`, on every rank the same."""
        return {name: (shape, self._dtype) for unit in self._units for name, shape in unit.wholes.items()}

    def buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """Whole tensors on rank 0, of at most `bucket_bytes` at a time (a larger one comes alone); others get as many
        empty buckets.

        Every rank must run it to its end. Tensors may be views of the live parameters: what is kept while training
        goes on must be copied. A loop that holds a bucket while it asks for the next has two in memory.
        """
        room = min(bucket_bytes // self._dtype.itemsize, max(unit.numel for unit in self._units))
        buffer = torch.empty(self._longest_transfer(room), dtype=self._dtype, device=self._device)
        for units in self._filled(bucket_bytes // self._dtype.itemsize):
            yield self._bucket(units, room, buffer)

    def _in_units(self) -> list[Unit]:
        units: dict[str, Unit] = {}
        for parameter in self._model.parameters:
            if parameter.exported:
                places = parameter.places(stacked=self._stacked)
                unit = units.setdefault(places[0].tensor, Unit())
                unit.parameters.append(parameter)
                unit.wholes |= {place.tensor: place.shape for place in places}
        return list(units.values())

    def _filled(self, room: int) -> Iterator[list[Unit]]:
        units: list[Unit] = []
        filled = 0
        for unit in self._units:
            if units and filled + unit.numel > room:
                yield units
                units, filled = [], 0
            units.append(unit)
            filled += unit.numel
        yield units

    def _bucket(self, units: list[Unit], room: int, buffer: Tensor) -> Bucket:
        receives = self._ranks.is_zero
        wholes: Bucket = {}
        travelling = []
        for unit in units:
            moved = [p for p in unit.parameters if not self._is_at_zero(p)]
            travelling += moved
            if receives:
                wholes |= self._begun(unit, views=not moved)
        for transfer in self._transfers(travelling, room):
            if self._takes_part(transfer):
                self._run(transfer, buffer, wholes)
        return wholes

    def _is_at_zero(self, parameter: Parameter) -> bool:
        """Whether rank 0 has all of it."""
        return parameter.stage == 0 and self._group_size(self._lane(parameter)) == 1

    def _begun(self, unit: Unit, *, views: bool) -> Bucket:
        """The whole tensors of a unit, with what rank 0 has already; the rest comes with transfers."""
        found: Bucket = {}
        if views and len(unit.parameters) == 1:
            found = self._views(unit.parameters[0])
        missing = [name for name in unit.wholes if name not in found]
        found |= {n: torch.empty(unit.wholes[n], dtype=self._dtype, device=self._device) for n in missing}
        if missing and views:
            for parameter in unit.parameters:
                local = self._own[parameter.local]
                self._place(parameter, 0, 1, 0, local, {name: found[name] for name in missing})
        return {name: found[name] for name in unit.wholes}

    def _views(self, parameter: Parameter) -> Bucket:
        """The tensors that lie in a parameter of rank 0 as one range."""
        segments, local = parameter.segments(0, 1), self._own[parameter.local]
        places = parameter.places(stacked=self._stacked)
        return {
            places[s.part].tensor: local.narrow(parameter.axis, s.local, s.length)
            for s in segments
            if places[s.part].index is None and s.length == parameter.parts[s.part][1][parameter.axis]
        }

    def _place(self, parameter: Parameter, rank: int, size: int, begin: int, rows: Tensor, wholes: Bucket) -> None:
        """Rows `begin`... of a local parameter to where they belong in `wholes`, as far as they are there."""
        places, end = parameter.places(stacked=self._stacked), begin + len(rows)
        for segment in parameter.segments(rank, size):
            place = places[segment.part]
            if place.tensor not in wholes:
                continue
            whole = wholes[place.tensor]
            target = (whole if place.index is None else whole[place.index]).narrow(0, place.row, place.rows)
            if parameter.axis == 0:
                first, last = max(begin, segment.local), min(end, segment.local + segment.length)
                if first < last:
                    at = segment.whole + first - segment.local
                    target[at : at + last - first].copy_(rows[first - begin : last - begin])
            else:
                source = rows.narrow(1, segment.local, segment.length)
                target[begin:end].narrow(1, segment.whole, segment.length).copy_(source)

    def _lane(self, parameter: Parameter) -> Lane:
        if parameter.expert is not None:
            return "expert"
        return "one" if parameter.rule.cut is None else "tensor"

    def _group_size(self, lane: Lane) -> int:
        return {"one": 1, "tensor": self._ranks.tensor_size, "expert": self._ranks.expert_size}[lane]

    def _transfers(self, parameters: list[Parameter], room: int) -> Iterator[Transfer]:
        """`parameters` in pieces of which a gathered transfer takes at most `room` elements (but at least a row)."""
        open_: dict[tuple[int, Lane], Transfer] = {}
        for parameter in parameters:
            lane, holder = self._lane(parameter), self._model.holder(parameter)
            key = parameter.stage, lane
            each = room // self._group_size(lane)
            rows, *columns = parameter.shape(self._model.tensor_size(parameter))
            width, begin = prod(columns), 0
            while begin < rows:
                transfer = open_.get(key) or open_.setdefault(key, self._empty(parameter.stage, lane))
                fitting = (each - transfer.filled[holder]) // width
                if fitting < 1 and transfer.pieces:
                    yield open_.pop(key)
                    continue
                end = min(rows, begin + max(fitting, 1))
                transfer.pieces.append(Piece(parameter, holder, begin, end, transfer.filled[holder], width))
                transfer.filled[holder] += (end - begin) * width
                begin = end
        yield from open_.values()

    def _longest_transfer(self, room: int) -> int:
        """Elements that the first of a stage may have to hold: `room`, or one row of every part; 0 for others."""
        if not self._ranks.is_first:
            return 0
        shapes = [
            (self._group_size(self._lane(p)), p.shape(self._model.tensor_size(p))[1:])
            for unit in self._units
            for p in unit.parameters
            if not self._is_at_zero(p)
        ]
        return max((max(room, size * prod(columns)) for size, columns in shapes), default=0)

    def _empty(self, stage: int, lane: Lane) -> Transfer:
        return Transfer(stage, lane, [0] * (self._model.expert_size if lane == "expert" else 1))

    def _takes_part(self, transfer: Transfer) -> bool:
        ranks = self._ranks
        if ranks.stage != transfer.stage:
            return ranks.is_zero
        return {"one": ranks.is_first, "tensor": ranks.in_first_tensor, "expert": ranks.in_first_expert}[transfer.lane]

    def _run(self, transfer: Transfer, buffer: Tensor, wholes: Bucket) -> None:
        """Bring the pieces to rank 0 and put them in their places. The first of each stage uses `buffer`."""
        ranks, size, num = self._ranks, self._group_size(transfer.lane), transfer.numel
        gathered = buffer[: size * num] if ranks.is_first else None
        if ranks.stage == transfer.stage:
            self._gather(transfer, gathered)
            if transfer.stage != 0 and gathered is not None:
                dist.send(gathered, group=ranks.pipeline, group_dst=0)
        else:
            assert gathered is not None
            dist.recv(gathered, group=ranks.pipeline, group_src=transfer.stage)
        if ranks.is_zero:
            assert gathered is not None
            for piece in transfer.pieces:
                self._received(piece, gathered.view(size, num), wholes)

    def _gather(self, transfer: Transfer, gathered: Tensor | None) -> None:
        """This stage's pieces, as each rank has them, into the buffer of the first."""
        ranks, size = self._ranks, self._group_size(transfer.lane)
        parts = list(gathered.view(size, -1)) if gathered is not None else None
        sent = self._packed(transfer, parts[0] if parts else None)
        if size > 1:
            group = ranks.tensor if transfer.lane == "tensor" else ranks.expert
            dist.gather(sent, parts, group=group, group_dst=0)

    def _packed(self, transfer: Transfer, target: Tensor | None) -> Tensor:
        """What this rank sends, in `target` if there is one; else a single whole piece is sent from where it is."""
        mine = [p for p in transfer.pieces if transfer.lane != "expert" or p.holder == self._ranks.expert_rank]
        if target is None:
            if len(mine) == 1 and mine[0].numel == transfer.numel:
                return self._rows(mine[0])
            target = torch.empty(transfer.numel, dtype=self._dtype, device=self._device)
        for piece in mine:
            target[piece.offset : piece.offset + piece.numel].copy_(self._rows(piece))
        return target

    def _rows(self, piece: Piece) -> Tensor:
        return self._own[piece.parameter.local][piece.begin : piece.end].reshape(-1)

    def _received(self, piece: Piece, parts: Tensor, wholes: Bucket) -> None:
        """`parts` [ranks of the group, elements each sent]."""
        size = self._model.tensor_size(piece.parameter)
        copies = 1 if piece.parameter.rule.cut is None and piece.parameter.expert is None else size
        for rank in range(copies):
            slot = piece.holder * size + rank
            rows = parts[slot, piece.offset : piece.offset + piece.numel].view(-1, *_tail(piece))
            self._place(piece.parameter, rank, size, piece.begin, rows, wholes)


def _tail(piece: Piece) -> tuple[int, ...]:
    """Columns of a matrix; nothing for a vector."""
    return () if len(piece.parameter.parts[0][1]) == 1 else (piece.columns,)


@dataclass(frozen=True)
class _Ranks:
    """Who this process is, and the groups over which weights travel.

    `is_first`: of its stage; `is_zero`: the one of them that gets everything. `in_first_tensor`, `in_first_expert`:
    whether it holds parts that the first of its stage gathers, and is no replica of those that do.
    """

    stage: int
    is_first: bool
    is_zero: bool
    in_first_tensor: bool
    in_first_expert: bool
    tensor: dist.ProcessGroup
    tensor_size: int
    expert: dist.ProcessGroup
    expert_size: int
    expert_rank: int
    pipeline: dist.ProcessGroup

    @classmethod
    def of(cls, config: TransformerConfig) -> _Ranks:
        stage = int(mpu.get_pipeline_model_parallel_rank())
        pipeline = mpu.get_pipeline_model_parallel_group()
        expert = mpu.get_expert_tensor_and_model_parallel_group()
        cut = mpu.get_expert_tensor_parallel_world_size()
        is_first = 0 in dist.get_process_group_ranks(pipeline)
        in_first_tensor = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
        in_first_expert = mpu.get_expert_data_parallel_rank() == 0
        expert_rank = int(mpu.get_expert_model_parallel_rank())
        assert dist.get_rank(expert) == expert_rank * cut + mpu.get_expert_tensor_parallel_rank()
        assert not is_first or (in_first_tensor and in_first_expert and dist.get_rank(expert) == 0)
        return cls(
            stage=stage,
            is_first=is_first,
            is_zero=is_first and stage == 0,
            in_first_tensor=in_first_tensor,
            in_first_expert=in_first_expert,
            tensor=mpu.get_tensor_model_parallel_group(),
            tensor_size=config.tensor_model_parallel_size,
            expert=expert,
            expert_size=dist.get_world_size(expert),
            expert_rank=expert_rank,
            pipeline=pipeline,
        )
