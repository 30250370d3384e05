"""The `SelfCheck`: what was measured, as a document that goes with a report, and as one screen of plain words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autoaccum.errors import UsageError

SCHEMA = "autoaccum.selfcheck/1"
_OUTCOMES = ("good", "off", "told", "failed")


@dataclass(frozen=True)
class Measured:
    """One measurement. outcome: "good", "off", "told" (a figure without a judgement) or "failed". seconds: of the whole process."""

    outcome: str
    said: str
    seconds: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class SelfCheck:
    """A run of the self-check. machine: the card, the driver and the versions. tried_out: True if it ran without a card, for tests."""

    machine: dict[str, str]
    tried_out: bool
    measurements: dict[str, Measured]
    missing: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """True if all was measured and nothing was off."""
        return not self.missing and all(each.outcome in ("good", "told") for each in self.measurements.values())

    def explain(self) -> str:
        """One screen: a line for each measurement, and what to do."""
        lines = [f"{self.machine['card']}, driver {self.machine['driver']}, torch {self.machine['torch']}, autoaccum {self.machine['autoaccum']}"]
        if self.tried_out:
            lines.append("tried out without a card: no figure below says anything")
        lines += [f"{each.outcome:<7} {name:<9} {each.said}" for name, each in self.measurements.items()]
        lines += [f"{'-':<7} {name:<9} not measured yet: start again, and it goes on from here" for name in self.missing]
        if self.is_good:
            lines.append("This card does what autoaccum says of it.")
        elif any(each.outcome in ("off", "failed") for each in self.measurements.values()):
            lines.append("Something is off: please attach the JSON to a report.")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The document, schema autoaccum.selfcheck/1."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "tried_out": self.tried_out,
            "is_good": self.is_good,
            "measurements": {name: asdict(each) for name, each in self.measurements.items()},
            "missing": list(self.missing),
        }

    @classmethod
    def from_dict(cls, document: Any, *, where: str) -> SelfCheck:
        """Raises `UsageError` if it is no such document."""
        try:
            if document["schema"] != SCHEMA:
                raise ValueError(f"its schema is {document['schema']!r}")
            measured = {
                str(name): Measured(str(each["outcome"]), str(each["said"]), float(each["seconds"]), dict(each["figures"]))
                for name, each in document["measurements"].items()
            }
            if strange := [each.outcome for each in measured.values() if each.outcome not in _OUTCOMES]:
                raise ValueError(f"an outcome is {strange[0]!r}")
            machine = {str(name): str(value) for name, value in document["machine"].items()}
            return cls(machine, bool(document["tried_out"]), measured, tuple(map(str, document["missing"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{where} is no self-check ({type(error).__name__}: {error}): name another file, or remove it") from None
