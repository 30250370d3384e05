"""What is installed is what is here."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.command_line import ROOT


def test_the_distributions_have_the_whole_package_and_what_an_index_asks_for(tmp_path):
    # A copy: building must not leave anything in the checkout.
    source = tmp_path / "source"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (*(ROOT / "autoaccum").rglob("*"), *(ROOT / "profiles").iterdir()):
        if path.suffix in (".py", ".toml") or path.name == "py.typed":
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (source_archive,) = (tmp_path / "dist").glob("*.tar.gz")
    for words in (("-m", "twine", "check", "--strict", wheel, source_archive), ("-m", "check_wheel_contents", wheel)):
        checked = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "autoaccum").rglob("*.py")} <= names
    assert "autoaccum/py.typed" in names
    assert {f"autoaccum/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.toml")} <= names
    # Unpacked somewhere else, the data files are found beside the package.
    zipfile.ZipFile(wheel).extractall(tmp_path / "elsewhere")
    found = subprocess.run(
        [sys.executable, "-c", "import autoaccum; from autoaccum.simulate import profiles; print(autoaccum.__file__, profiles.load('t4').name)"],
        capture_output=True,
        text=True,
        cwd=tmp_path / "elsewhere",
        check=True,
    ).stdout
    assert str(tmp_path / "elsewhere") in found and "Tesla T4" in found
    metadata = {Path(name).name: zipfile.ZipFile(wheel).read(name).decode() for name in names if ".dist-info/" in name}
    assert "autoaccum = autoaccum.cli:main" in metadata["entry_points.txt"]
    assert "Requires-Dist: torch>=2.6" in metadata["METADATA"] and "Requires-Dist: pynvml" not in metadata["METADATA"]
