"""Sharded training over an 80, a 24 and a 16 GB card: what even shards cost beside uneven ones. A simulation; nothing of it has run on cards.

    python benchmarks/sharded_fleets.py --output benchmarks/results/sharded_fleets.json

Decoders of several sizes, 2,048 tokens, mixed precision with AdamW: 16 bytes of state a parameter, blocks checkpointed. A window of 256 samples. Rules:

- "even": FSDP2 as it is, the same micro-batch everywhere, parameters gathered in each micro-step.
- "lockstep", ours: even shards, micro-batches by each card's room and speed, parameters gathered in each of equally many micro-steps. Poplar's rule
  (arXiv 2408.12596) for ZeRO-3, which searches a time in which every card runs the batch that it can, gives the same shares: both minimise the slowest
  card's micro-step times their number, and ours are exact.
- "gathered", ours: even shards of the optimizer's state, the whole model kept gathered over a window, so that micro-steps may differ in number.
- "cephalo" (arXiv 2411.01075): shards by each card's room, parameters gathered once a window layer by layer, however many micro-steps there are. Its
  communication is taken to hide behind computing where that is longer, as it reports.

Not told by torch: `fully_shard` has no uneven shards, so the last rule is a bound for what they would gain here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from autoaccum.distributed.shares import in_lockstep, solve  # noqa: E402 - the package need not be installed
from autoaccum.distributed.speed_curves import AffineCurve  # noqa: E402
from autoaccum.simulate import profiles  # noqa: E402

CARDS = ("a100-80gb", "rtx-4090", "t4")
MODELS = {"0.4B": (24, 1024), "1.3B": (24, 2048), "2.7B": (32, 2560), "6.7B": (32, 4096)}  # layers, width
TOKENS, WINDOW, LINK = 2048, 256, 12.5e9  # of a sample; samples; bytes a second between cards (100 Gbit Ethernet)
REACHED = 0.4  # of a card's half-precision peak, as large transformers reach


def planned(layers: int, width: int) -> dict[str, object]:
    parameters = 12 * width * width * layers + 50257 * width
    sample_bytes = 2 * TOKENS * width * layers + 34 * TOKENS * width + 6 * TOKENS * 50257  # inputs of blocks, one block again, logits and their gradient
    working = 8 * 12 * width * width  # two layers gathered, and their gradients
    told: dict[str, object] = {"parameters": parameters}
    for used in range(1, len(CARDS) + 1):  # also without the smallest cards
        found = of_cards(CARDS[:used], parameters, sample_bytes, working, overhead=0.002 * layers)
        if used == len(CARDS):
            told |= found
        for rule in ("lockstep", "gathered"):
            if found[rule] and (told.get("best_s") is None or found[rule] < told["best_s"]):
                told |= {"best_s": found[rule], "best": f"{rule} on {used} card{'s' if used > 1 else ''}"}
    return told


def of_cards(names: tuple[str, ...], parameters: int, sample_bytes: int, working: int, *, overhead: float) -> dict[str, float | None]:
    """Seconds of a window by each rule; None where it does not fit."""
    cards = [profiles.load(name) for name in names]
    ranks, room = len(cards), [profiles.load(name).available_bytes * 0.97 for name in names]
    seconds = [8 * parameters * TOKENS / (REACHED * card.flops["fp16"].value) for card in cards]  # forward, backward, and forward again
    crossing = (ranks - 1) / ranks * 2 * parameters / LINK  # one gather, or one scatter of gradients, in half precision

    def curves(left: list[float]) -> list[AffineCurve]:
        return [AffineCurve(max(int(each // sample_bytes), 0), overhead, own) for each, own in zip(left, seconds)]

    def slowest(of: list[AffineCurve]) -> float:
        return max(each.seconds(share) for each, share in zip(of, solve([(each, 1) for each in of], WINDOW)))

    sharded = curves([have - 16 * parameters / ranks - working for have in room])
    whole = curves([have - 12 * parameters / ranks - 4 * parameters for have in room])
    found: dict[str, float | None] = dict.fromkeys(("even", "lockstep", "gathered", "cephalo"))
    if all(each.most for each in sharded):  # each card gathers, so each has to run
        least = min(each.most for each in sharded)
        found["even"] = math.ceil(WINDOW / (least * ranks)) * (max(each.seconds(least) for each in sharded) + 3 * crossing)
        shares, steps = in_lockstep([(each, 1) for each in sharded], WINDOW, 3 * crossing)
        found["lockstep"] = steps * (max(each.seconds(-(-share // steps)) for each, share in zip(sharded, shares)) + 3 * crossing)
    if all(each.most for each in whole):
        found["gathered"] = slowest(whole) + 3 * crossing
    together = sum(room) - ranks * working - 16 * parameters
    if together > 0:
        # What is left beside all shards is dealt out by speed, as far as a card has it.
        speed = sum(1 / each for each in seconds)
        uneven = curves([min(have - working, together / each / speed) for have, each in zip(room, seconds)])
        if any(each.most for each in uneven):
            found["cephalo"] = max(slowest(uneven), 3 * crossing)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = [
        {"model": name, **{key: round(value, 2) if isinstance(value, float) else value for key, value in planned(*shape).items()}}
        for name, shape in MODELS.items()
    ]
    if given.output:
        given.output.write_text(json.dumps({"schema": "autoaccum.sharded_fleets/1", "cards": CARDS, "window": WINDOW, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
