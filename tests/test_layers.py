"""Imports run one way."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "autoaccum"

# A file may import from rows above its own, and from nothing else of ours.
ROWS = """
version errors under_limit
units oom launched engines fleets sampler modules
batches devices.base profiles simulate.settings simulate.margins ranks speeds
simulate simulate.allocator simulate.convolutions simulate.fake simulate.attention
simulate.tape
simulate.kernels
simulate.trace simulate.timeline
devices.cgroup devices.nvml
devices.cpu devices.cuda devices.mps devices.xpu devices.virtual
devices
reading weighting explaining losses rates
job search throughput progress regrouping lengths feeding running_stats generators
sync dividing
formats
snapshot plan window refusing recording conditions
rewinding hints comparing phantom
trial command simulation
child cache
line rescue
together
tuning
estimating
loop report plot forecasting integrations
integrations.huggingface integrations.accelerate integrations.lightning
training demo drawing
asked
cli
__init__ __main__
"""
ROW_OF = {name: row for row, names in enumerate(ROWS.split("\n")) for name in names.split()}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield (name.removesuffix(".__init__"), path)


def imported(path):
    """Our modules that a file imports, and the lines: anywhere in it, but for `if TYPE_CHECKING:`."""
    tree = ast.parse(path.read_text())
    ignored = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively; write the whole path"
            if node.module == "autoaccum":
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif node.module and node.module.startswith("autoaccum."):
                inner = [f"{node.module.removeprefix('autoaccum.')}.{alias.name}" for alias in node.names]
                yield from ((name if name in ROW_OF else node.module.removeprefix("autoaccum."), node.lineno) for name in inner)
        elif isinstance(node, ast.Import):
            yield from ((alias.name.removeprefix("autoaccum."), node.lineno) for alias in node.names if alias.name.startswith("autoaccum."))


def test_every_file_has_a_row():
    assert {name for name, _ in modules()} == set(ROW_OF)


def test_imports_run_one_way():
    for name, path in modules():
        if name == "__init__":
            continue
        for other, line in imported(path):
            assert ROW_OF[other] < ROW_OF[name], (
                f"autoaccum/{path.relative_to(PACKAGE)}:{line} imports {other}, which is not above {name} in the rows: hand the value on instead"
            )


def test_no_file_is_called_by_a_word_that_says_nothing():
    assert not {name.split(".")[-1] for name, _ in modules()} & {"utils", "common", "helpers", "misc"}


def test_2_to_the_30_is_written_in_one_place():
    for name, path in modules():
        if name != "units":
            assert "2**30" not in path.read_text() and "1024**3" not in path.read_text(), f"{path.name} writes 2**30: take GIB from units"
