"""Accumulation arithmetic: what one optimizer step is made of, and why."""

from __future__ import annotations

import importlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autoaccum.distributed import launched
from autoaccum.errors import NoSuchDevice, PlanError
from autoaccum.plan import arithmetic, explanation, framework_arguments, picture
from autoaccum.plan.micro_batch import MicroBatch
from autoaccum.plan.notation import window_notation
from autoaccum.plan.record import SCHEMA, PlannedDevice, PlanRecord

if TYPE_CHECKING:
    from autoaccum.data import Window, Windows, WindowSampler
    from autoaccum.distributed import Ranks


@dataclass(frozen=True)
class Plan(PlanRecord):
    """A plan and what can be done with it: cut batches, make windows, set up frameworks, explain, save. The figures are `PlanRecord`'s."""

    def sizes(self, samples: int, most: int | None = None) -> tuple[int, ...]:
        """Micro-batches for `samples` of this rank, none larger than this plan's, or than `most`. Raises `PlanError` for no samples."""
        if samples < 1:
            raise PlanError("a window of no samples: give a batch with at least one")
        return arithmetic.micro_batches(samples, math.ceil(samples / (most or self.micro_batch)))

    def shares_of(self, samples: int) -> tuple[int, ...]:
        """Every rank's samples of a window of `samples` over all ranks, which may be less than the target."""
        return (samples,) if self.fleet is None else self.fleet.of(samples)

    def split(self, batch: Any, count: Callable[[Any], float] | None = None) -> Iterator[MicroBatch]:
        """Cuts a batch of a whole window, or a `Window`, into micro-batches with their weights, which sum to 1.

        Only the piece in hand is moved to this plan's device. count: weights by `count(piece)`, e.g. label
        tokens, instead of samples. A batch smaller than the share (the last of an epoch) is weighted by its
        own samples. Over ranks it is this rank's part of the window, every rank calls this at the same moment, and the weights
        sum to ranks x part / window, for an engine that averages over the ranks; a rank without a sample gets one of
        weight 0, so that it takes part. Raises `PlanError` for a batch that cannot be cut, and for one of more samples than the share.
        """
        import torch

        from autoaccum.data import Window, batches, prefetch

        whole = batch if isinstance(batch, Window) else Window.of([batch])
        if whole.samples > max(self.share, 1):
            raise PlanError(
                f"a batch of {whole.samples} samples is more than this plan's {self.share} for one step: loop over plan.windows(loader), "
                f"or DataLoader(batch_size={self.share})"
            )
        cut: Iterable[tuple[Any, int]]
        if self.fleet is not None:
            cut, owed = self._owed_over_ranks(whole, count)
        else:
            cut = whole.cut(self.sizes_of(whole), most=self.micro_batch)
            counts = [float(samples if count is None else count(piece)) for piece, samples in cut]
            owed = [each / sum(counts) if any(counts) else 0.0 for each in counts]
        device = torch.device(self.device.label)
        for index, (piece, samples) in enumerate(prefetch.feed(cut, device)):
            moved = batches.move(piece, device, non_blocking=True)
            yield MicroBatch(moved, owed[index], samples, last=index == len(owed) - 1)

    def _owed_over_ranks(self, whole: Window, count: Callable[[Any], float] | None) -> tuple[list[tuple[Any, int]], list[float]]:
        """Micro-batches, and what their mean losses owe: A/D times what each counts."""
        assert self.fleet is not None
        if not self.share or not whole.samples:
            if not self.fleet.curves[self.rank].most:
                raise PlanError(f"rank {self.rank} cannot hold one sample, and a loop by hand must run one on every rank: use autoaccum.Accumulator")
            if not whole.parts:
                raise PlanError(f"rank {self.rank} has no samples of this window and none to stand in: loop over plan.windows(loader)")
            part, size = whole.parts[0], whole.sizes[0]
            self._ranks().table([0.0, 0.0], "announcing a window")
            return [(type(whole)([part], [max(size, 1)], whole.split, told=whole.told).between(0, 1).parts[0], 0)], [0.0]
        held = list(whole.cut(self.sizes(whole.samples), most=self.micro_batch))
        counts = [float(samples if count is None else count(piece)) for piece, samples in held]
        table = self._ranks().table([whole.samples, sum(counts)], "announcing a window")
        total = sum(row[1] for row in table)
        return held, [self.world_size * each / total if total else 0.0 for each in counts]

    def _ranks(self) -> Ranks:
        """The ranks that this plan is for. Raises `PlanError` where others, or none, are here."""
        from autoaccum.distributed import ranks

        found = ranks.here()
        if found is None or found.world_size != self.world_size or found.rank != self.rank:
            here = "one process" if found is None else f"rank {found.rank} of {found.world_size}"
            raise PlanError(f"the plan is for rank {self.rank} of {self.world_size}, and this is {here}: tune again, or Plan.load(path) on each rank")
        return found

    def windows(
        self,
        loader: Iterable[Any],
        *,
        samples: Callable[[Any], int] | None = None,
        split: Callable[[Any, Sequence[int]], Any] | None = None,
        drop_last: bool = False,
    ) -> Windows:
        """A loader of any batch size, regrouped into windows of exactly the target; the last one of an epoch is smaller.

        Loader batches are cut where a window or a micro-batch ends, and joined where a micro-batch spans several
        (unless their shapes differ, as when each is padded to its own longest sample). For batches that cannot be cut, such as
        graphs or packed text: samples says how many one holds; it runs as it came, or is cut by `split`; `batch_sampler` makes them fit.
        drop_last: leaves the smaller last window out.
        Over ranks each rank gets its own part of every window: from a loader with `batch_sampler`, which reads no more than that, or
        from a loader that gives every rank the same samples in the same order. Raises `PlanError` for one that shuffles by
        itself or is shared out already, and where a batch's samples cannot be counted, or it would have to be cut and cannot be.
        """
        from autoaccum.data import Windows

        shares = None if self.fleet is None else self.shares_of
        return Windows(
            loader,
            self.target_batch,
            samples=samples,
            split=split,
            drop_last=drop_last,
            shares=shares,
            rank=self.rank,
            alike=self._alike if self.fleet else None,
        )

    def _alike(self, checksum: int) -> None:
        """Raises `PlanError` where other ranks read another first batch. Every rank calls it; without ranks here there is nobody to ask."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return
        if len(set(self._ranks().gathered(checksum, "comparing the loaders' first batches"))) > 1:
            raise PlanError(
                "the ranks' loaders give unlike samples, so they are shared out already or shuffle each by itself: every rank must be given all samples in "
                "the same order, or use DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))"
            )

    def for_length(self, length: float) -> Plan:
        """The plan for samples of up to `length`. Raises `PlanError` where none that long was asked for, or none at all."""
        for most, plan in self.per_length:
            if length <= most:
                return cast(Plan, plan)
        if not self.per_length:
            raise PlanError("the plan knows no lengths: tune(..., lengths=[512, 1024, 2048])")
        raise PlanError(f"the longest that was planned is {self.per_length[-1][0]}, not {length:g}: tune(..., lengths=[..., {length:g}])")

    def sizes_of(self, window: Window, most: int | None = None) -> tuple[int, ...]:
        """Micro-batches for a window of this rank: of parts that were arranged by length as they are, or as much smaller as `most` is than this plan's."""
        if not window.arranged:
            return self.sizes(window.samples, most)
        share = (most or self.micro_batch) / self.micro_batch
        return tuple(size for held in window.sizes for size in arithmetic.micro_batches(held, math.ceil(held / max(int(held * share), 1))))

    def batch_sampler(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int = 0,
        *,
        drop_last: bool = False,
        length: Callable[[Any], float] | Sequence[float] | None = None,
    ) -> WindowSampler:
        """For `DataLoader(dataset, batch_sampler=...)`: one micro-batch after another, collated one by one, in whole windows.

        The order of an epoch depends on `seed` and the epoch's number alone, and a window on the target: over ranks
        each takes its slice of the same windows. Give the loader to `windows`.
        length: of a plan made with `lengths`, `length(sample)` or a length for every sample: then a window's longest samples come together, and each
        micro-batch holds as many as its longest allows. Raises `PlanError` for a sample that is longer than was planned.
        """
        from autoaccum.data import WindowSampler

        if length is not None and not self.per_length:
            raise PlanError("the plan knows no lengths: tune(..., lengths=[512, 1024, 2048]), or leave length= out")

        if not hasattr(dataset, "__len__"):
            raise PlanError(f"a {type(dataset).__name__} has no length to draw from: for an iterable dataset use plan.windows(DataLoader(dataset, ...))")
        if len(dataset) < self.target_batch:
            warnings.warn(f"the data has {len(dataset)} samples, fewer than the target batch of {self.target_batch}: no window is whole", stacklevel=2)
        arrange = None
        if length is not None:
            from autoaccum.data import lengths

            of = lengths.by_length(dataset, length)[1]
            most = [(each, plan.micro_batch) for each, plan in self.per_length]

            def arrange(indices: Sequence[int]) -> list[list[int]]:
                return list(lengths.arrange(indices, of, most))

        return WindowSampler(len(dataset), self.target_batch, self._cuts, rank=self.rank, shuffle=shuffle, seed=seed, drop_last=drop_last, arrange=arrange)

    def _cuts(self, samples: int) -> list[tuple[int, ...]]:
        """Every rank's micro-batches of a window of `samples`, without those that it sits out."""
        return [self.sizes(samples)] if self.fleet is None else self.fleet.cuts(samples)

    def of_rank(self, rank: int) -> Plan:
        """The same plan as that rank sees it; what was measured on this rank's device is left out for another. Raises `PlanError` for a rank it has not."""
        if not 0 <= rank < self.world_size:
            raise PlanError(f"the plan is for {self.world_size} ranks, and there is no rank {rank} among them")
        if rank == self.rank or self.fleet is None:
            return self
        sizes = tuple(size for size in self.fleet.sizes(rank, self.target_batch) if size)
        return replace(
            self,
            rank=rank,
            share=self.shares[rank],
            micro_batches=sizes,
            micro_batch=max(sizes, default=0),
            accumulation_steps=len(sizes),
            largest_fit=self.fleet.curves[rank].most,
            smallest_refused=None,
            device=replace(self.device, name=self.fleet.curves[rank].gpu or self.device.name, uuid=None),
            trials=(),
            peak_bytes=None,
        )

    def apply(self, live: Any) -> None:
        """Sets the plan in a `transformers.Trainer`, an `accelerate.Accelerator` or a `lightning.Trainer`, where it will be read.

        Raises `PlanError` where the framework cannot run it, `UsageError` for anything else.
        """
        # By name: plans know nothing of frameworks, whose files stand far above this one.
        importlib.import_module("autoaccum.integrations").of(live).apply(self, live)

    def to_huggingface(self) -> dict[str, Any]:
        """Arguments of `transformers.TrainingArguments`. Raises `PlanError` for unequal micro-batches, as the next three do."""
        return framework_arguments.huggingface(self)

    def to_accelerate(self) -> dict[str, Any]:
        """Arguments of `accelerate.Accelerator`; the DataLoader's batch size is `micro_batch`."""
        return framework_arguments.accelerate(self)

    def to_lightning(self) -> dict[str, Any]:
        """Arguments of `lightning.Trainer`; the DataLoader's batch size is `micro_batch`."""
        return framework_arguments.lightning(self)

    def to_deepspeed(self) -> dict[str, Any]:
        """The three entries of a DeepSpeed configuration that must agree with each other."""
        return framework_arguments.deepspeed(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A picture of the search: peak, and time per sample, against micro-batch. .png, .svg or .pdf. Raises `MissingExtra` without matplotlib."""
        picture.draw_search(self, Path(path))

    def explain(self) -> str:
        """The whole report: the plan, why not fewer steps, where the budget comes from, what to know."""
        return "\n".join(explanation.lines(self))

    def __str__(self) -> str:
        return explanation.headline(self)

    def _repr_html_(self) -> str:
        return explanation.html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all. Raises `PlanError` where there is no such folder."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        if not target.absolute().parent.is_dir():
            raise PlanError(f"the plan cannot be written to {str(path)!r}: there is no folder {str(target.parent)!r}")
        beside.write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        beside.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` or `--output` wrote.

        Under torchrun a plan for several ranks is read as this rank's. Warns if the device of that kind and index is another model here.
        Raises `PlanError` for a file that is not a plan, and for one that is for another number of ranks.
        """
        try:
            document = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise PlanError(f"there is no plan {str(path)!r}: write one with `autoaccum tune ... --output FILE.json`, or plan.save(path)") from None
        except ValueError as error:
            raise PlanError(f"{str(path)!r} is not a plan: {error}") from None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise PlanError(f"{str(path)!r} is not a plan: its schema is {document.get('schema') if isinstance(document, dict) else None!r}, not {SCHEMA!r}")
        try:
            plan = cls.from_dict(document)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{str(path)!r} is not a whole plan: {error}") from None
        if sum(plan.micro_batches) != plan.share or max(plan.micro_batches, default=0) != plan.micro_batch or sum(plan.shares) != plan.target_batch:
            raise PlanError(f"{str(path)!r} does not agree with itself: {window_notation(plan.micro_batches)} is not a window of {plan.share} samples")
        if plan.fleet is not None:
            if (told := launched()) is None:
                return plan
            if told.world_size != plan.world_size:
                raise PlanError(f"{str(path)!r} is a plan for {plan.world_size} ranks, and torchrun started {told.world_size}: tune or plan again")
            plan = plan.of_rank(told.rank)._on_this_rank(told.local_rank)
        here = _name_here(plan.device)
        if here is not None and here != plan.device.name:
            warnings.warn(f"the plan was made on {plan.device.name}, and {plan.device.label} here is {here}: tune again", stacklevel=2)
        return plan

    def _on_this_rank(self, local_rank: int) -> Plan:
        """The plan with the device that this rank uses by custom: the one of its local rank."""
        from autoaccum import devices

        labels = devices.here()
        label = next((each for each in labels if each == f"cuda:{local_rank}"), labels[0])
        kind, _, index = label.partition(":")
        return replace(self, device=replace(self.device, kind=kind, index=int(index) if index else None))


def _name_here(device: PlannedDevice) -> str | None:
    from autoaccum import devices

    try:
        return devices.get(device.label).facts.name
    except NoSuchDevice:
        return f"none ({', '.join(devices.here())} is)" if device.kind != "cpu" else None
