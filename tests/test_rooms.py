"""The rooms of the package, the arrows between them, and the rules that keep a newcomer's way short.

`python -m tests.test_rooms` prints rooms and arrows.
"""

import ast
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "autoaccum"

DOORSTEP = ["version", "errors", "units", "oom", "doors", "files", "warm_process"]
ROOMS = [
    "data",
    "simulate",
    "devices",
    "distributed",
    "window",
    "trace",
    "plan",
    "probe",
    "command",
    "tuner",
    "loop",
    "virtual",
    "integrations",
    "selfcheck",
    "cli",
]
PROGRAMS = ["__init__", "__main__", "capped_process", "startup_hook", "worker"]  # above all rooms; nothing imports them
NEIGHBOURS = {frozenset(("loop", "virtual"))}  # on one floor: neither imports the other
MOST_FILES = 14

# Who may import a file of a room past its door, and why.
PAST_THE_DOOR = {"__init__": "the public names, each with the file it is in, so that a reader finds it there"}
# Modules that are imported by a name in a string, and why.
BY_NAME = {
    "__init__": "public names are imported when they are first asked for",
    "doors": "what a room hands on is imported when it is first asked for",
    "devices.table": "a device's file imports its driver, so only the one that is asked for is imported",
    "integrations": "a framework's file imports the framework, so only the one that is asked for is imported",
    "plan.plan": "`Plan.apply` takes a framework's object, and the room of frameworks stands above",
    "warm_process": "a child's program names what it needs; the doorstep knows no room",
    "window.source": "a user's module",
}


@cache
def files():
    """Every file of the package by its dotted name, a door by the name of its room."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name if name == "__init__" else name.removesuffix(".__init__"): path for name, path in found.items()}


@cache
def tree(name):
    return ast.parse(files()[name].read_text())


def room_of(name):
    return name.split(".")[0]


@cache
def door(room):
    """What a room hands on: name -> file, or the file itself for a module that is handed on whole."""
    handed = {}
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"autoaccum.{room}"):
            for alias in node.names:
                inside = f"{room}.{alias.name}"
                handed[alias.name] = inside if inside in files() else node.module.removeprefix("autoaccum.")
    return handed


@cache
def imports(name):
    """(imported name, file that defines it, line) of every import of ours in a file, under `TYPE_CHECKING` and in functions too."""
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.startswith("autoaccum.")], f"{name}:{node.lineno}: write `from autoaccum.ROOM import NAME`"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level == 0, f"{name}:{node.lineno} imports relatively: write the whole path"
        if node.module != "autoaccum" and not (node.module or "").startswith("autoaccum."):
            continue
        module = node.module.removeprefix("autoaccum").lstrip(".")
        for alias in node.names:
            inside = f"{module}.{alias.name}".lstrip(".")
            if inside in files():
                found.append((alias.name, inside, node.lineno))
            elif module in ROOMS:
                found.append((alias.name, door(module).get(alias.name, module), node.lineno))
            else:
                found.append((alias.name, module, node.lineno))
    return found


def arrows():
    """(room that imports, room that is imported) -> how many imports."""
    return Counter(
        (room_of(name), room_of(target))
        for name in files()
        for _, target, _ in imports(name)
        if room_of(name) in ROOMS and room_of(target) in ROOMS and room_of(name) != room_of(target)
    )


def test_every_file_is_in_a_room_or_on_the_doorstep():
    assert {room_of(name) for name in files()} == {*DOORSTEP, *ROOMS, *PROGRAMS}
    assert {name for name in files() if "." not in name} == {*DOORSTEP, *ROOMS, *PROGRAMS}


def test_every_arrow_points_down():
    for (above, below), _ in arrows().items():
        assert ROOMS.index(below) < ROOMS.index(above), f"{above} imports {below}, which stands above it"
        assert frozenset((above, below)) not in NEIGHBOURS, f"{above} imports {below}, and they are to know nothing of each other"
    for name in files():
        for what, target, line in imports(name):
            if name in DOORSTEP:
                assert target in DOORSTEP[: DOORSTEP.index(name)], f"{name}:{line} imports {what} of {target}: the doorstep knows no room"
            assert target not in ("__main__", "worker"), f"{name}:{line} imports a program"


def test_there_is_no_circle_of_files():
    below = defaultdict(set)
    for name in files():
        if name not in ROOMS and name not in PROGRAMS:
            below[name] = {target for _, target, _ in imports(name) if target != name and target not in ROOMS}
    done = set()

    def visit(name, path):
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(below[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in list(below):
        visit(name, ())


def test_nothing_is_imported_past_a_door():
    for name in files():
        if name in PAST_THE_DOOR:
            continue
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("autoaccum."):
                continue
            module = node.module.removeprefix("autoaccum.")
            if room_of(module) not in ROOMS or room_of(module) == room_of(name):
                continue
            assert module in ROOMS, f"{name}:{node.lineno} imports past the door of {room_of(module)}: take it from autoaccum.{room_of(module)}"
            for alias in node.names:
                assert alias.name in door(module) or module == "integrations", f"{name}:{node.lineno}: the door of {module} does not hand on {alias.name}"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "integrations"])
def test_a_door_hands_on_what_others_take_and_nothing_else(room):
    taken = {what for name in files() if room_of(name) != room for what, target, _ in imports(name) if room_of(target) == room}
    for name in files():
        if room_of(name) != room and (room, room) in [(what, target) for what, target, _ in imports(name)]:  # the room itself: `devices.get(...)`
            taken |= {node.attr for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == room}
    users = {"list"} if room == "devices" else set()  # `autoaccum.devices.list()` is public
    assert set(door(room)) <= taken | users, f"nobody takes {set(door(room)) - taken} of {room}"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "integrations"])
def test_a_door_says_the_same_to_readers_and_to_python(room):
    (call,) = [node for node in ast.walk(tree(room)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazily"]
    table = {name: f"{room}.{keyword.arg}" for keyword in call.keywords for name in keyword.value.value.split()}
    assert table == {name: file for name, file in door(room).items() if file != f"{room}.{name}"}
    # Importing a file binds its name in the room, over anything that is called the same.
    stems = {name.removeprefix(f"{room}.") for name in files() if room_of(name) == room}
    assert not stems & set(table), "a name that is handed on is also a file's name"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small_and_says_what_it_is(room):
    inside = [name for name in files() if room_of(name) == room]
    assert len(inside) <= MOST_FILES
    text = ast.get_docstring(tree(room))
    assert "It exports" in text and ("It imports" in text or "It may import" in text)


def test_file_names_are_nouns_that_say_something():
    stems = {name.split(".")[-1] for name in files()}
    assert not {stem for stem in stems if stem.endswith("ing")} - {"lightning"}
    assert not stems & {"utils", "common", "helpers", "misc", "base", "core", "tools"}


def test_modules_are_imported_by_name_only_where_that_has_a_reason():
    assert {name for name in files() if "import_module(" in files()[name].read_text()} == set(BY_NAME)


def test_every_public_function_says_what_it_does():
    silent = []
    for name in files():
        for node in tree(name).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{name}.{node.name}")
    assert not silent


def test_2_to_the_30_is_written_in_one_place():
    for name, path in files().items():
        if name != "units":
            assert "2**30" not in path.read_text() and "1024**3" not in path.read_text(), f"{name} writes 2**30: take GIB from units"


if __name__ == "__main__":
    for one in ROOMS:
        members = [name for name in files() if room_of(name) == one]
        print(f"{one}: {len(members)} files")
        for member in members:
            print(f"    {member.removeprefix(one).removeprefix('.') or '__init__'}: {(ast.get_docstring(tree(member)) or '').splitlines()[0]}")
    print()
    for one in ROOMS:
        print(
            f"{one} imports "
            + (
                ", ".join(f"{below} ({count})" for (above, below), count in sorted(arrows().items(), key=lambda row: ROOMS.index(row[0][1])) if above == one)
                or "no other room"
            )
        )
