"""The public names are those that were promised, and none is a module's name."""

import importlib
import subprocess
import sys
from pathlib import Path

import autoaccum


def test_every_public_name_is_there_and_documented():
    for name in autoaccum.__all__:
        value = getattr(autoaccum, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"


def test_no_public_name_but_devices_is_a_module():
    """After `import autoaccum.cli`, a name that is also a module's would be the module."""
    modules = {path.stem for path in Path(autoaccum.__file__).parent.glob("*.py")}
    assert not set(autoaccum.__all__) & modules
    importlib.import_module("autoaccum.cli")
    assert callable(autoaccum.tune) and isinstance(autoaccum.Plan, type) and isinstance(autoaccum.devices.list(), list)


def test_names_that_are_not_there_are_told():
    import pytest

    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        _ = autoaccum.tuna


def test_importing_it_imports_no_torch_and_no_device():
    code = "import sys, autoaccum; print('torch' in sys.modules, 'pynvml' in sys.modules, 'psutil' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "False", "False"]


FRAMEWORKS = {"transformers": "huggingface", "accelerate": "accelerate", "lightning": "lightning", "matplotlib": "plot"}


def test_no_framework_is_imported_before_it_is_asked_for():
    names = [*FRAMEWORKS, "pytorch_lightning", "deepspeed", "peft", "platformdirs"]
    everything = "import autoaccum; [getattr(autoaccum, name) for name in autoaccum.__all__]; import autoaccum.cli, autoaccum.integrations"
    code = f"import sys; {everything}; print([name for name in {names} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_what_is_not_installed_is_told_with_the_line_that_installs_it():
    use = {
        "transformers": "from autoaccum.integrations import huggingface; huggingface.tune(None, target_batch=1)",
        "accelerate": "from autoaccum.integrations import accelerate; accelerate.tune(None, None, None, None, None, target_batch=1)",
        "lightning": "from autoaccum.integrations import lightning",
        "matplotlib": "from autoaccum.plan import search_picture; search_picture.pyplot()",
    }
    for package, extra in FRAMEWORKS.items():
        finished = subprocess.run([sys.executable, "-c", _program(package, use[package])], capture_output=True, text=True, check=False)
        assert f"pip install 'autoaccum[{extra}]'" in finished.stdout, (package, finished.stdout, finished.stderr[-500:])


def _program(package, use):
    lines = use.replace("; ", "\n    ")
    return f"import sys\nsys.modules[{package!r}] = None\nimport autoaccum\ntry:\n    {lines}\nexcept autoaccum.MissingExtra as error:\n    print(error)"


def test_each_heavy_library_is_imported_in_its_own_file_alone():
    """pynvml, rich: in a fresh interpreter the rest of the package does without."""
    package = Path(autoaccum.__file__).parent
    for library, file in (("pynvml", "nvml.py"), ("rich", "progress.py"), ("click", "commands.py")):
        users = {path.name for path in package.rglob("*.py") if f"import {library}" in path.read_text() or f"from {library}" in path.read_text()}
        assert users == {file}
