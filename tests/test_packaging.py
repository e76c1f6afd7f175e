"""`acceleron.kernels` from a bare checkout, an editable install and a wheel; beside a package named `kernels`."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import acceleron, acceleron.kernels, torch
from acceleron.training import train
assert acceleron.kernels.swiglu(torch.ones(1, 2)).item() > 0.7
print(acceleron.kernels.__file__)
"""
OTHER_KERNELS = "__version__ = '0.11.0'\ndef get_kernel(): return 'theirs'\n"
PROBE_OTHER = """
import sys
{first}
{second}
assert kernels.get_kernel() == "theirs"
assert not hasattr(kernels, "swiglu")
assert acceleron.kernels.swiglu and acceleron.kernels.__name__ == "acceleron.kernels"
import torch
assert torch.ops.acceleron.top2_experts.default in acceleron.ops.ROUTING_OPS  # not registered a second time
"""


def python(code: str, *paths, cwd) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = {[str(p) for p in paths]!r}\n{code}"]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tracked source, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "acceleron-checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("acceleron", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def pip_install(source: Path, target: Path, *flags):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    process = subprocess.run([*pip, *flags, str(source)], capture_output=True, text=True, check=False, cwd=target)
    assert process.returncode == 0, process.stderr[-2000:]


def test_bare_checkout(source):
    assert python(PROBE, cwd=source) == str(source / "kernels" / "__init__.py")
    help_text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=source, capture_output=True, text=True, check=False
    )
    assert "--model_size" in help_text.stdout


def test_wheel(source, tmp_path):
    site = tmp_path / "site"
    pip_install(source, tmp_path, "--target", str(site))
    assert python(PROBE, site, cwd=tmp_path) == str(site / "acceleron" / "kernels" / "__init__.py")
    assert not (site / "kernels").exists()


def test_editable_install(source, tmp_path):
    """In an environment of its own, which sees this one's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    interpreter = tmp_path / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    # A name that sorts last: the editable install's own .pth comes first.
    (site / "zz.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--editable", str(source)]
    process = subprocess.run(pip + flags, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    process = subprocess.run([interpreter, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip() == str(source / "kernels" / "__init__.py")


@pytest.mark.parametrize("ours_first", [True, False])
def test_pypis_kernels_package_and_ours_leave_each_other_alone(source, tmp_path, ours_first):
    """From a checkout's root, where `import kernels` would find our folder first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(OTHER_KERNELS)
    first, second = ("import acceleron.kernels", "import kernels")[:: 1 if ours_first else -1]
    python(PROBE_OTHER.format(first=first, second=second), tmp_path, cwd=source)


def test_without_pypis_kernels_the_name_is_an_empty_package(source):
    """transformers probes for it: that must neither fail nor load a second copy of our ops."""
    python("import acceleron.kernels, kernels; assert not hasattr(kernels, 'swiglu')", cwd=source)
