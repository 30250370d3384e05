"""Numbers that a command reads from a configuration file, of which each trial gets a copy."""

import json
import sys

import pytest

import autoaccum
from autoaccum.command.config_copies import copies_of
from tests.command_line import autoaccum as run

READS = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
text = path.read_text()
if path.suffix == ".json":
    found = json.loads(text)
elif path.suffix == ".toml":
    import tomlkit
    found = tomlkit.parse(text)
else:
    import yaml
    found = yaml.safe_load(text)
print("READ", path.name, found["train"]["stages"][1]["batch"], found["train"]["accum"], found["name"], flush=True)
"""

FILES = {
    "config.yaml": "name: run\ntrain:\n  accum: 1\n  stages:\n  - {batch: 1}\n  - {batch: 8}\n",
    "config.json": json.dumps({"name": "run", "train": {"accum": 1, "stages": [{"batch": 1}, {"batch": 8}]}}),
    "config.toml": 'name = "run"\n[train]\naccum = 1\n[[train.stages]]\nbatch = 1\n[[train.stages]]\nbatch = 8\n',
}


@pytest.mark.parametrize("name", list(FILES))
def test_each_trial_gets_a_copy_and_the_file_stays_as_it_is(tmp_path, name):
    (tmp_path / "reads.py").write_text(READS)
    (tmp_path / name).write_text(FILES[name])
    values = ("--set-file", f"{name}:train.stages.1.batch={{micro_batch}}", "--set-file", f"{name}:train.accum={{accumulation_steps}}")
    finished = run("tune", "-b", 12, "--max-micro-batch", 4, "-d", "cpu", *values, "--", sys.executable, "reads.py", name, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("12 = 4 x 3") and f"READ {name} 4 3 run" in finished.stderr
    assert (tmp_path / name).read_text() == FILES[name]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("config.yaml", "FILE:key=value"),
        ("config.ini:a=1", "reads .yaml"),
        ("nowhere.yaml:a=1", "cannot be read: No such file"),
        ("config.yaml:train.batch={micro_batch}", "has no key 'train.batch'; there it has accum, stages"),
        ("config.yaml:train.stages.7.batch={micro_batch}", "there it has 2 entries"),
        ("broken.json:a=1", "cannot be read"),
    ],
)
def test_what_cannot_be_set_is_one_sentence(tmp_path, monkeypatch, setting, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(FILES["config.yaml"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(autoaccum.UsageError, match="set-file") as raised:
        copies_of((setting,))
    assert says in str(raised.value)


def test_a_file_that_the_command_does_not_name_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text(FILES["config.yaml"])
    finished = run("tune", "-b", 12, "--set-file", "config.yaml:train.accum={micro_batch}", "--", sys.executable, "reads.py", cwd=tmp_path)
    assert finished.returncode == 2 and "--set-file names 'config.yaml', and the command does not" in finished.stderr


HYDRA = """
import hydra, torch
@hydra.main(config_path=".", config_name="config", version_base=None)
def main(config):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.sum().backward(); optimizer.step()
    print("HYDRA", config.train.batch, config.train.accum, flush=True)
main()
"""


def test_hydras_overrides_work_as_they_are(tmp_path):
    pytest.importorskip("hydra")
    (tmp_path / "train.py").write_text(HYDRA)
    (tmp_path / "config.yaml").write_text("train:\n  batch: 1\n  accum: 1\n")
    words = ("train.batch={micro_batch}", "train.accum={accumulation_steps}", "hydra.run.dir={scratch}")
    finished = run("tune", "-b", 12, "--max-micro-batch", 6, "-d", "cpu", "--", sys.executable, "train.py", *words, cwd=tmp_path)
    assert finished.returncode == 0 and "HYDRA 6 2" in finished.stderr, finished.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"train.py", "config.yaml", "__pycache__"} and "wrote" not in finished.stdout
