"""The files that say how dspark-lab is installed agree with each other and keep their promises.

Knows pyproject.toml, requirements.lock, environment.yml, the Makefile and install.py; makes no
full environment and asks no network.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dspark_lab

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [
    line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] not in "# "
]
MACHINES = [
    {"python_full_version": f"3.{minor}.7", "python_version": f"3.{minor}", "sys_platform": system}
    for minor in (10, 11, 12, 13, 14)
    for system in ("linux", "darwin")
]


def project_ranges() -> list[Requirement]:
    """Every dependency of the package and of its extras but Ray, which not every Python has."""
    project = PROJECT["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "ray"}
    groups = [project["dependencies"], *extras.values()]
    return [Requirement(line) for group in groups for line in group]


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: "-".join(m.values()))
def test_the_lock_pins_each_dependency_once_and_inside_its_range(machine):
    pins = [Requirement(line) for line in LOCK]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(machine)]
    versions = {pin.name: version_of(pin) for pin in pins}
    assert len(versions) == len(pins)
    for wanted in project_ranges():
        assert wanted.specifier.contains(versions[wanted.name]), wanted


def test_the_long_tests_pin_ray_inside_its_range():
    (wanted,) = map(Requirement, PROJECT["project"]["optional-dependencies"]["ray"])
    [pins] = re.findall("^RAY := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    versions = {pin.name: version_of(pin) for pin in map(Requirement, pins.split())}
    assert wanted.specifier.contains(versions["ray"])
    assert not set(versions) & {Requirement(line).name for line in LOCK}


def test_only_the_lock_pins_torch_and_it_names_no_registry_and_no_cuda_package():
    assert [line for line in LOCK if line.startswith("torch=")] == ["torch==2.13.0"]
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == ["torch==2.13.0", "jsonschema<4.25"]
    assert all("==" not in str(wanted.specifier) for wanted in project_ranges())
    assert not [line for line in LOCK if "/" in line or line.startswith("-")]
    assert not [line for line in LOCK if line.startswith(("nvidia", "cuda", "triton"))]


def test_conda_gets_the_ranges_of_the_package():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    torch_range = next(str(w.specifier) for w in project_ranges() if w.name == "torch")
    python_range = PROJECT["project"]["requires-python"]
    expected = [f"python{python_range}", f"pytorch{torch_range}", "pip"]
    assert conda["dependencies"] == [*expected, {"pip": ["-e .[test,data]"]}]
    assert conda["name"] == PROJECT["project"]["name"]


def test_the_version_has_one_source():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert importlib.metadata.version("dspark-lab") == dspark_lab.__version__
    assert f"## [{dspark_lab.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_never_unpickles_but_tensors():
    # With weights_only torch makes tensors and plain containers, and refuses all other objects.
    any_object = r"\btorch\.load\((?![^()]*\bweights_only=True\))"
    unpickles = rf"(?m)^\s*(import|from) (pickle|cloudpickle|joblib|dill)\b|{any_object}"
    for load in ("torch.load(path)", "torch.load(path, weights_only=False)"):
        assert re.search(unpickles, load)
    for file in (ROOT / "dspark_lab").rglob("*.py"):
        assert not re.search(unpickles, file.read_text()), file


def lab_command(**environment: str) -> str:
    command = ["make", "--dry-run", "--no-print-directory", "lab"]
    hidden = {"DISPLAY", "WAYLAND_DISPLAY", "MAKEFLAGS", "PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    lines = subprocess.check_output(command, cwd=ROOT, env=kept | environment, text=True)
    return lines.splitlines()[-1]


def test_lab_keeps_its_token_and_listens_on_this_machine_only():
    command = lab_command(PORT="9001")
    assert "--ServerApp.ip=127.0.0.1 --ServerApp.port=9001" in command
    assert not any(word in command.lower() for word in ("token", "password", "0.0.0.0", "origin"))


@pytest.mark.slow
def test_lab_opens_on_the_start_notebook_and_says_its_address_last(tmp_path):
    words = shlex.split(lab_command(PORT="0"))
    folders = {f"JUPYTER_{k}_DIR": str(tmp_path / k) for k in ("RUNTIME", "CONFIG", "DATA")}
    command = [sys.executable, *words[1:], "--no-browser"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | folders, **both) as server:
        said = []
        try:
            while not said or "/lab/tree/00_start.ipynb?token=" not in said[-1]:
                said.append(server.stdout.readline())
                assert said[-1], said
        finally:
            server.terminate()
        rest = server.stdout.read().splitlines()
    assert said[-1].strip().startswith("http://127.0.0.1:")
    assert not [line for line in rest if "received signal" not in line and line.strip()], rest


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS always has a display")
def test_lab_opens_a_browser_only_where_there_is_a_display():
    assert "--no-browser" in lab_command()
    assert "--no-browser" not in lab_command(DISPLAY=":0")


@pytest.fixture
def installer(tmp_path):
    """install.py with its files in an empty folder, as a module."""
    for name in ("install.py", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    spec = importlib.util.spec_from_file_location("installer", tmp_path / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_environment = lambda: venv.create(module.VENV, clear=True, symlinks=True)
    module.commands = []
    module.run = lambda *command: module.commands.append([str(word) for word in command])
    return module


def test_a_second_install_does_nothing_until_the_lock_changes(installer):
    installer.main()
    installed = len(installer.commands)
    assert installed > 0
    installer.main()
    assert len(installer.commands) == installed
    installer.LOCK.write_text("numpy==2.0.0\n")
    installer.main()
    assert len(installer.commands) > installed


def test_an_interrupted_install_is_made_again(installer):
    install, installer.install = installer.install, lambda torch_folder: {}["interrupted"]
    with pytest.raises(KeyError):
        installer.main()
    assert installer.PYTHON.exists() and not installer.is_installed()
    installer.install = install
    installer.main()
    assert installer.is_installed()


def test_an_existing_torch_is_used_and_not_installed(installer, tmp_path, monkeypatch):
    package = tmp_path / "the machine's packages" / "torch" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("__version__ = '2.9.0+cu130'")
    torch = types.SimpleNamespace(__version__="2.9.0+cu130", __file__=str(package))
    monkeypatch.setitem(sys.modules, "torch", torch)
    installer.main()
    words = [word for command in installer.commands for word in command]
    assert not [word for word in words if word == "torch" or word.startswith("torch=")]
    program = "import torch; print(torch.__version__)"
    output = subprocess.check_output([installer.PYTHON, "-c", program], cwd=tmp_path, text=True)
    assert output == "2.9.0+cu130\n"


def test_a_torch_below_the_range_or_in_the_environment_itself_is_not_used(installer, monkeypatch):
    inside = str(installer.VENV / "lib" / "torch" / "__init__.py")
    for version, file in (("2.5.1", "/opt/packages/torch/__init__.py"), ("2.13.0", inside)):
        torch = types.SimpleNamespace(__version__=version, __file__=file)
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert installer.usable_torch() is None


def test_a_python_that_is_too_old_is_told_so(installer, monkeypatch):
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10 or newer"):
        installer.main()
