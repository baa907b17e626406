"""Make the environment .venv and install dspark-lab in it, with the standard library only.

`make` calls this file before everything else. It knows that requirements.lock names every
package, and that .venv/installed says what the environment was made from, so that a second call
does nothing and a half-made environment is made again. It does not know which build of torch
suits the machine: where the Python that runs it has a torch in the package's range, .venv
uses that one, and otherwise pip chooses the build of the locked version.
"""

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
LOCK = ROOT / "requirements.lock"
PROJECT = ROOT / "pyproject.toml"

# matplotlib is here because its first import says that it builds a font cache: once, and not in
# the output of a notebook.
REPORT = """
import torch, dspark_lab, matplotlib.font_manager
torch.ones(1).numpy()
cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
print(f"dspark-lab {dspark_lab.__version__} uses torch {torch.__version__} ({cuda})")
print(f"  from {torch.__file__}")
"""


def main():
    if sys.version_info < (3, 10):  # noqa: UP036, this is where an older Python learns it
        found = f"{sys.executable} is {sys.version.split()[0]}"
        sys.exit(f"dspark-lab needs Python 3.10 or newer, {found}: name one, `make lab PYTHON=...`")
    if is_installed():
        return
    print("making the environment .venv: a few minutes, once", flush=True)
    torch_folder = usable_torch()
    STAMP.unlink(missing_ok=True)
    try:
        make_environment()
        install(torch_folder)
    except (subprocess.CalledProcessError, KeyboardInterrupt):
        sys.exit("the environment .venv is not complete, for the reason above: call make again")
    STAMP.write_text(fingerprint())


def is_installed():
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def fingerprint():
    """What the environment is made from, and where: an editable install holds its folder's path."""
    digest = hashlib.sha256(str(ROOT).encode())
    for source in (LOCK, PROJECT, Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def usable_torch():
    """The folder that holds this Python's own torch, or None if there is none in the range."""
    try:
        import torch
    except Exception:
        return None
    folder = Path(torch.__file__).resolve().parents[1]
    lowest = re.search(r'"torch>=([\d.]+)"', PROJECT.read_text())[1]
    in_range = numbers(torch.__version__) >= numbers(lowest)
    return folder if in_range and VENV not in folder.parents else None


def numbers(version):
    """`2.10.1+cu130` as (2, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def make_environment():
    has_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(VENV, clear=True, symlinks=True, with_pip=has_pip)
    if has_pip:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = pip_of_debian(Path(folder))
            run(PYTHON, wheel / "pip", "install", "--no-index", wheel)
    except (OSError, StopIteration, subprocess.CalledProcessError):
        sys.exit("this Python has no pip: `apt install python3-venv`, then the same command again")


def pip_of_debian(folder):
    """Debian keeps Python's pip in a package of its own, which apt fetches for any user."""
    (folder / "lists" / "partial").mkdir(parents=True)
    options = f"Dir::State::Lists={folder}/lists Dir::Cache={folder} APT::Sandbox::User=root"
    apt = ["apt-get", "--quiet=2", *(f"-o{option}" for option in options.split())]
    run(*apt, "update")
    run(*apt, "download", "python3-pip-whl", cwd=folder)
    run("dpkg-deb", "--extract", next(folder.glob("*.deb")), folder)
    return next(folder.glob("usr/share/python-wheels/pip-*.whl"))


def install(torch_folder):
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install"]
    if not torch_folder:
        run(*pip, "--constraint", LOCK, "torch")
    print("now JupyterLab and the other packages", flush=True)
    lines = LOCK.read_text().splitlines()
    others = [line for line in lines if not line.startswith(("#", "torch="))]
    run(*pip, "--quiet", "--no-deps", *others)
    run(*pip, "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    # Else JupyterLab asks each user whether it may fetch news.
    news = "@jupyterlab/apputils-extension:announcements"
    run(PYTHON, "-m", "jupyter", "labextension", "disable", "--level=sys_prefix", news)
    if torch_folder:
        # A .pth file adds its folder behind .venv's own packages, so the locked ones win.
        site_packages = next(VENV.glob("lib/python*/site-packages"))
        (site_packages / "torch_of_this_machine.pth").write_text(f"{torch_folder}\n")
    run(PYTHON, "-c", REPORT)


def run(*command, cwd=ROOT):
    subprocess.run(command, cwd=cwd, check=True)


if __name__ == "__main__":
    main()
