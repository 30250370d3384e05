"""`Plan`: what one optimizer step consists of, and why."""

from __future__ import annotations

import importlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autoaccum import files
from autoaccum.distributed import launched
from autoaccum.errors import AutoaccumWarning, NoSuchDevice, PlanError, in_brief
from autoaccum.plan import arithmetic, explanation, framework_arguments, search_picture
from autoaccum.plan.micro_batch import MicroBatch
from autoaccum.plan.notation import window_notation
from autoaccum.plan.record import SCHEMA, PlannedDevice, PlanRecord

if TYPE_CHECKING:
    from autoaccum.data import Window, Windows, WindowSampler
    from autoaccum.distributed import Ranks


@dataclass(frozen=True)
class Plan(PlanRecord):
    """A plan and its methods: cut batches, make windows, set up frameworks, explain, save. `PlanRecord` describes the fields."""

    def sizes(self, samples: int, most: int | None = None) -> tuple[int, ...]:
        """Micro-batches for `samples` samples of this rank.

        most: the largest micro-batch; None uses this plan's. Raises `PlanError` for no samples.
        """
        if samples < 1:
            raise PlanError("a window of no samples: give a batch with at least one")
        return arithmetic.micro_batches(samples, math.ceil(samples / (most or self.micro_batch)))

    def shares_of(self, samples: int) -> tuple[int, ...]:
        """Every rank's share of a window of `samples` samples over all ranks. The window may be smaller than the target."""
        return (samples,) if self.fleet is None else self.fleet.of(samples)

    def split(self, batch: Any, count: Callable[[Any], float] | None = None) -> Iterator[MicroBatch]:
        """Cuts a batch of a whole window, or a `Window`, into micro-batches with their weights, which sum to 1.

        Micro-batches move to this plan's device one at a time. A batch smaller than the share (the last of an epoch) is weighted by
        its own samples.
        count: `count(piece)`, for example the number of label tokens. The weights then follow it instead of the number of samples.
        On several ranks, the batch is this rank's part of the window, and every rank calls this at the same time. The weights sum
        to world size x part / window, for an engine that averages over the ranks. A rank without samples gets one micro-batch of
        weight 0, because it must take part in the communication.
        A micro-batch whose count is 0 is left out: its mean is nan, and 0 times nan is nan. A rank on which nothing counts still gets one
        micro-batch of weight 0: write `torch.nan_to_num(loss) * micro.weight` in a loop over ranks.
        Raises `PlanError` for a batch that cannot be cut, and for a batch with more samples than the share.
        """
        import torch

        from autoaccum.data import Window, batches, prefetch, tokens

        window = batch if isinstance(batch, Window) else Window.of([batch])
        if self.target_tokens is not None:
            count = count or tokens.labels
        elif window.samples > max(self.share, 1):
            raise PlanError(
                f"a batch of {window.samples} samples is more than this plan's {self.share} for one step: loop over plan.windows(loader), "
                f"or DataLoader(batch_size={self.share})"
            )
        cut: Iterable[tuple[Any, int]]
        if self.fleet is not None:
            cut, weights = self._cut_over_ranks(window, count)
        else:
            cut = window.cut(self.sizes_of(window), most=self.micro_batch, elsewhere=self.micro_tokens is None)
            counts = [float(samples if count is None else count(piece)) for piece, samples in cut]
            weights = [value / sum(counts) if any(counts) else 0.0 for value in counts]
            if not all(weights):
                cut, weights = _owing(list(cut), weights)
        device = torch.device(self.device.label)
        for index, (piece, samples) in enumerate(prefetch.feed(cut, device)):
            moved = batches.move(piece, device, non_blocking=True)
            yield MicroBatch(moved, weights[index], samples, last=index == len(weights) - 1)

    def _cut_over_ranks(self, window: Window, count: Callable[[Any], float] | None) -> tuple[list[tuple[Any, int]], list[float]]:
        """Micro-batches of this rank, and the weights of their mean losses: A/D times the count of each.

        A is the world size, D is the count of the window over all ranks.
        """
        assert self.fleet is not None
        if not self.share or not window.samples:
            if not self.fleet.curves[self.rank].most:
                raise PlanError(f"rank {self.rank} cannot hold one sample, and a loop by hand must run one on every rank: use autoaccum.Accumulator")
            if not window.parts:
                raise PlanError(f"rank {self.rank} has no samples of this window and none to stand in: loop over plan.windows(loader)")
            part, size = window.parts[0], window.sizes[0]
            self._ranks().table([0.0, 0.0], "announcing a window")
            return [(type(window)([part], [max(size, 1)], window.split, told=window.told).between(0, 1).parts[0], 0)], [0.0]
        pieces = list(window.cut(self.sizes_of(window), most=self.micro_batch, elsewhere=self.micro_tokens is None))
        counts = [float(samples if count is None else count(piece)) for piece, samples in pieces]
        table = self._ranks().table([window.samples, sum(counts)], "announcing a window")
        total = sum(row[1] for row in table)
        owing, weights = _owing(pieces, [self.world_size * value / total if total else 0.0 for value in counts])
        return (owing, weights) if owing else (pieces[-1:], [0.0])  # this rank must take part in the communication

    def _ranks(self) -> Ranks:
        """The ranks of this process group. Raises `PlanError` if they are not those of the plan, or if there is no group."""
        from autoaccum.distributed import ranks

        current = ranks.here()
        if current is None or current.world_size != self.world_size or current.rank != self.rank:
            here = "one process" if current is None else f"rank {current.rank} of {current.world_size}"
            raise PlanError(f"the plan is for rank {self.rank} of {self.world_size}, and this is {here}: tune again, or Plan.load(path) on each rank")
        return current

    def windows(
        self,
        loader: Iterable[Any],
        *,
        samples: Callable[[Any], int] | None = None,
        split: Callable[[Any, Sequence[int]], Any] | None = None,
        count: Callable[[Any], Any] | None = None,
        drop_last: bool = False,
    ) -> Windows:
        """Regroups a loader of any batch size into windows of exactly the target; the last window of an epoch is smaller.

        Loader batches are cut where a window or a micro-batch ends. They are joined where a micro-batch spans several batches,
        unless their shapes differ (for example, if each batch is padded to its own longest sample).
        samples: `samples(batch)`, the number of samples in a batch, for batches that cannot be cut, such as graphs or packed text.
            Such a batch runs as it is, or `split` cuts it; `batch_sampler` makes batches of the right size.
        split: `split(batch, sizes)`, cuts such a batch.
        count: for a target in tokens: `count(batch)`, the number of tokens in a batch; by default its labels other than -100. A window
            ends with the sample that reaches the target.
        drop_last: True leaves out the smaller last window.
        On several ranks, each rank gets its own part of every window. The loader either has a `batch_sampler` of this plan and reads
        only that part, or gives every rank the same samples in the same order.
        Raises `PlanError` for a loader that shuffles by itself or is sharded already, for a batch whose samples cannot be counted,
        and for a batch that would have to be cut and cannot be.
        """
        from autoaccum.data import TokenGauge, Windows

        shares = None if self.fleet is None else self.shares_of
        if self.fleet is None and self.world_size > 1:
            raise PlanError(
                f"the plan is of a command that runs on {self.world_size} ranks by itself: for a loop of your own, call autoaccum.tune on every rank"
            )
        if count is not None and self.target_tokens is None:
            raise PlanError("count= says where a window of tokens ends, and this plan counts samples: give it to Job, to the Accumulator, or to plan.split")
        return Windows(
            loader,
            self.target_batch,
            samples=samples,
            split=split,
            drop_last=drop_last,
            shares=shares,
            rank=self.rank,
            alike=self._check_first_batch if self.fleet else None,
            gauge=None if self.target_tokens is None else TokenGauge(self.target_tokens, count),
        )

    def _check_first_batch(self, checksum: int) -> None:
        """Raises `PlanError` if the ranks read different first batches.

        checksum: of this rank's first batch. Every rank calls this. Without a process group it does nothing.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return
        if len(set(self._ranks().gathered(checksum, "comparing the loaders' first batches"))) > 1:
            raise PlanError(
                "the ranks' loaders give unlike samples, so they are shared out already or shuffle each by itself: every rank must be given all samples in "
                "the same order, or use DataLoader(dataset, batch_sampler=plan.batch_sampler(dataset))"
            )

    def for_length(self, length: float) -> Plan:
        """The plan for samples of up to `length`. Raises `PlanError` if no plan for that length was made, or none for any length."""
        for most, plan in self.per_length:
            if length <= most:
                return cast(Plan, plan)
        if not self.per_length:
            raise PlanError("the plan knows no lengths: tune(..., lengths=[512, 1024, 2048])")
        raise PlanError(f"the longest that was planned is {self.per_length[-1][0]}, not {length:g}: tune(..., lengths=[..., {length:g}])")

    def sizes_of(self, window: Window, most: int | None = None, *, pairs: bool = False) -> tuple[int, ...]:
        """Micro-batches for a window of this rank.

        Parts that were arranged by length stay as they are. With `most`, they are cut in the ratio of `most` to this plan's
        micro-batch. pairs: of a plan in tokens: no micro-batch of one sample, which BatchNorm forbids.
        """
        if not window.arranged and self.micro_tokens is not None and self.micro_batch:
            from autoaccum.data import tokens

            # A part that only the user cuts may be of any layout; its samples are taken for the longest ones.
            if window.told:
                return self.sizes(window.samples, most)
            return tokens.sizes_within(window.parts, window.sizes, self.micro_tokens * (most or self.micro_batch) / self.micro_batch, pairs=pairs)
        if not window.arranged:
            return self.sizes(window.samples, most)
        ratio = (most or self.micro_batch) / self.micro_batch
        if self.micro_tokens is not None and not window.told:  # padding may make a part larger than its samples' tokens say
            from autoaccum.data import tokens

            allowed = self.micro_tokens * ratio
            return tuple(
                each for part, size in zip(window.parts, window.sizes) if size for each in arithmetic.micro_batches(size, tokens.cuts(part, size, allowed))
            )
        return tuple(size for part in window.sizes for size in arithmetic.micro_batches(part, math.ceil(part / max(int(part * ratio), 1))))

    def batch_sampler(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int = 0,
        *,
        drop_last: bool = False,
        length: Callable[[Any], float] | Sequence[float] | None = None,
        tokens: Callable[[Any], float] | Sequence[float] | None = None,
        padded: bool = True,
    ) -> WindowSampler:
        """A sampler for `DataLoader(dataset, batch_sampler=...)` that yields micro-batches in whole windows.

        The loader collates each micro-batch by itself. Give the loader to `windows`. Of a plan that is still learned it yields whole windows, which are
        cut while they run; make another one when it has settled, so that samples are padded within their micro-batch only.
        The order of an epoch depends only on `seed` and the epoch's number, and the windows only on the target: on several ranks,
        each rank takes its slice of the same windows.
        length: `length(sample)`, or a length for every sample, for a plan made with `lengths`. The longest samples of a window then
            come together, and each micro-batch holds as many samples as its longest one allows.
        tokens: for a plan of tokens: `tokens(sample)`, or the number for every sample: what counts in it, such as its labels. A window
            takes samples until it has the target, and its micro-batches are filled with samples of like lengths. length: their lengths, if
            not all of a sample's tokens count (a prompt without labels).
        padded: False if the loader's `collate_fn` puts samples one after the other instead of padding them to the longest.
        Raises `PlanError` for a sample that is longer than was planned.
        """
        from autoaccum.data import WindowSampler

        if (tokens is None) != (self.target_tokens is None):
            raise PlanError(
                "the plan counts samples: tune(..., target_tokens=...), or leave tokens= out"
                if self.target_tokens is None
                else "the plan counts tokens: give tokens=, a function that says how many a sample has, or their numbers"
            )
        if length is not None and not self.per_length and tokens is None:
            raise PlanError("the plan knows no lengths: tune(..., lengths=[512, 1024, 2048]), or leave length= out")

        if not hasattr(dataset, "__len__"):
            raise PlanError(f"a {type(dataset).__name__} has no length to draw from: for an iterable dataset use plan.windows(DataLoader(dataset, ...))")
        if tokens is not None:
            return self._token_sampler(dataset, tokens, length, padded, shuffle=shuffle, seed=seed, drop_last=drop_last)
        if len(dataset) < self.target_batch:
            warnings.warn(
                f"the data has {len(dataset)} samples, fewer than the target batch of {self.target_batch}: no window is whole", AutoaccumWarning, stacklevel=2
            )
        arrange = None
        if length is not None:
            from autoaccum.data import lengths

            sample_lengths = lengths.by_length(dataset, length)[1]
            largest = [(longest, plan.micro_batch) for longest, plan in self.per_length]

            def arrange(indices: Sequence[int]) -> list[list[int]]:
                return list(lengths.arrange(indices, sample_lengths, largest))

        return WindowSampler(len(dataset), self.target_batch, self._cuts, rank=self.rank, shuffle=shuffle, seed=seed, drop_last=drop_last, arrange=arrange)

    def _token_sampler(self, dataset: Sized, tokens: Any, length: Any, padded: bool, **order: Any) -> WindowSampler:
        from autoaccum.data import TokenSampler, lengths

        assert self.target_tokens is not None and self.micro_tokens is not None
        if self.learning:
            raise PlanError(
                "the plan is still learned, so it does not know yet how many tokens share a micro-batch: give loop.windows a loader with a batch_size, and make "
                "the sampler when loop.plan.learning is False, or tune first"
            )
        if len in (tokens, length) and len(dataset) and isinstance(dataset[0], Mapping):  # type: ignore[index] # a map-style dataset
            names = list(dataset[0])  # type: ignore[index]
            raise PlanError(f"a sample has the fields {names}, and len counts those: tokens=lambda sample: len(sample[{names[0]!r}])")
        sample_tokens = lengths.by_length(dataset, tokens)[1]
        if sum(sample_tokens) < self.target_tokens:
            warnings.warn(
                f"the data has {sum(sample_tokens):g} tokens, fewer than the target of {self.target_tokens}: no window is whole", AutoaccumWarning, stacklevel=3
            )
        # A rank without a share of a full window still stands in with one sample, and packs it by itself.
        sample_lengths = sample_tokens if length is None else lengths.by_length(dataset, length)[1]
        budget = float(self.micro_tokens or max(sample_lengths, default=0))
        longest = max(range(len(sample_lengths)), key=sample_lengths.__getitem__, default=None)
        if longest is not None and sample_lengths[longest] > budget:
            raise PlanError(
                f"sample {longest} of {sample_lengths[longest]:g} tokens is longer than a micro-batch of this plan, {budget:g} tokens: "
                "tune with the longest samples, batch=autoaccum.worst_case(loader)"
            )
        return TokenSampler(sample_tokens, self.target_tokens, budget, self.shares, lengths=sample_lengths, padded=padded, rank=self.rank, **order)

    def _cuts(self, samples: int) -> list[tuple[int, ...]]:
        """Every rank's micro-batches of a window of `samples` samples, without the steps that a rank skips."""
        if self.learning:  # how many fit is not known yet, and a rank's part can be cut when it is
            return [(share,) if share else () for share in self.shares_of(samples)]
        return [self.sizes(samples)] if self.fleet is None else self.fleet.cuts(samples)

    def of_rank(self, rank: int) -> Plan:
        """The same plan for another rank. It leaves out what was measured on this rank's device.

        Raises `PlanError` for a rank that the plan does not have.
        """
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

    def apply(self, live: Any, **settings: Any) -> None:
        """Sets the plan in a `transformers.Trainer`, an `accelerate.Accelerator` or a `lightning.Trainer`, in the settings that it reads.

        Raises `PlanError` if the framework cannot run the plan, `UsageError` for anything else.
        """
        if self.target_tokens is not None:
            raise PlanError("frameworks count samples, and this plan counts tokens: train with autoaccum.Accumulator in a loop of your own")
        # Imported by name: plans do not depend on the integrations, which are built on top of them.
        importlib.import_module("autoaccum.integrations").of(live).apply(self, live, **settings)

    def to_huggingface(self) -> dict[str, Any]:
        """Arguments of `transformers.TrainingArguments`. Raises `PlanError` for unequal micro-batches, as the next three methods do."""
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
        """Draws the search: peak and time per sample against micro-batch.

        path: a .png, .svg or .pdf file. Raises `MissingExtra` without matplotlib.
        """
        search_picture.draw_search(self, Path(path))

    def explain(self) -> str:
        """The whole report: the plan, why fewer steps do not fit, how the budget is made up, warnings and hints."""
        return "\n".join(explanation.lines(self))

    def __repr__(self) -> str:
        return f"<Plan {self}>"

    def __str__(self) -> str:
        return explanation.headline(self)

    def _repr_html_(self) -> str:
        return explanation.html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, completely or not at all. Raises `PlanError` if it cannot be written."""
        if why := files.why_not_writable(path):
            raise PlanError(f"the plan cannot be written to {in_brief(path)}: {why}")
        try:
            files.write_text(path, json.dumps(self.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise PlanError(f"the plan cannot be written to {in_brief(path)}: {error.strerror or error}; nothing was left there") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` or `--output` wrote.

        Under torchrun, a plan for several ranks is read as the plan of this rank. Warns if the device of that kind and index is a
        different model here.
        Raises `PlanError` for a file that is not a plan, and for a plan for another number of ranks.
        """
        try:
            document = json.loads(files.read_text(path))
        except files.Unreadable as error:
            raise PlanError(
                f"there is no plan {in_brief(path)} ({error}): write one with `autoaccum tune ... --output FILE.json`, or plan.save(path)"
            ) from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{in_brief(path)} is not a plan: {error}") from None
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise PlanError(f"{str(path)!r} is not a plan: its schema is {document.get('schema') if isinstance(document, dict) else None!r}, not {SCHEMA!r}")
        try:
            plan = cls.from_dict(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{in_brief(path)} is not a whole plan: {error}") from None
        if sum(plan.micro_batches) != plan.share or max(plan.micro_batches, default=0) != plan.micro_batch or sum(plan.shares) != plan.target_batch:
            raise PlanError(f"{str(path)!r} does not agree with itself: {window_notation(plan.micro_batches)} is not a window of {plan.share} samples")
        if plan.fleet is not None:
            if (launch := launched()) is None:
                return plan
            if launch.world_size != plan.world_size:
                raise PlanError(f"{str(path)!r} is a plan for {plan.world_size} ranks, and torchrun started {launch.world_size}: tune or plan again")
            plan = plan.of_rank(launch.rank)._on_this_rank(launch.local_rank)
        here = _name_here(plan.device)
        if here is not None and here != plan.device.name:
            warnings.warn(f"the plan was made on {plan.device.name}, and {plan.device.label} here is {here}: tune again", AutoaccumWarning, stacklevel=2)
        return plan

    def _on_this_rank(self, local_rank: int) -> Plan:
        """The plan with the device that this rank uses by convention: the one whose index is the local rank."""
        from autoaccum import devices

        labels = devices.here()
        label = next((candidate for candidate in labels if candidate == f"cuda:{local_rank}"), labels[0])
        kind, _, index = label.partition(":")
        return replace(self, device=replace(self.device, kind=kind, index=int(index) if index else None))


def _owing(pieces: Sequence[tuple[Any, int]], weights: Sequence[float]) -> tuple[list[tuple[Any, int]], list[float]]:
    """The pieces whose weight is not 0, and their weights."""
    pairs = [(piece, weight) for piece, weight in zip(pieces, weights) if weight]
    return [piece for piece, _ in pairs], [weight for _, weight in pairs]


def _name_here(device: PlannedDevice) -> str | None:
    from autoaccum import devices

    try:
        return devices.get(device.label).facts.name
    except NoSuchDevice:
        return f"none ({', '.join(devices.here())} is)" if device.kind != "cpu" else None
