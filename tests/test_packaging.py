"""Imports from a bare checkout, an editable install and a wheel, and next to PyPI's `kernels` package."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import torch
from acceleron import ops
from acceleron.kernels import torch_ops
from acceleron.training import train
assert abs(ops.swiglu(torch.ones(1, 2)).item() - 1 / (1 + 2.718281828**-1)) < 1e-6
print(torch_ops.__file__)
"""
OTHER_KERNELS = "def get_kernel(): return 'theirs'\n"
PROBE_OTHER = """
{first}
{second}
assert kernels.get_kernel() == "theirs"
assert not hasattr(kernels, "torch_ops")
assert triton_ops.__name__ == "acceleron.kernels.triton_ops"
"""


def python(code: str, *paths, cwd) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = {[str(p) for p in paths]!r}\n{code}"]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source, so builds do not write to the checkout."""
    copy = tmp_path_factory.mktemp("source") / "acceleron-checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("acceleron", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def pip_install(source: Path, target: Path, *flags):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    process = subprocess.run([*pip, *flags, str(source)], capture_output=True, text=True, check=False, cwd=target)
    assert process.returncode == 0, process.stderr[-2000:]


def test_bare_checkout_imports(source):
    assert python(PROBE, cwd=source) == str(source / "acceleron" / "kernels" / "torch_ops.py")
    help_text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=source, capture_output=True, text=True, check=False
    )
    assert "--model_size" in help_text.stdout


def test_wheel_imports(source, tmp_path):
    site = tmp_path / "site"
    pip_install(source, tmp_path, "--target", str(site))
    assert python(PROBE, site, cwd=tmp_path) == str(site / "acceleron" / "kernels" / "torch_ops.py")
    assert not (site / "kernels").exists()
    assert (site / "acceleron" / "py.typed").exists()


@pytest.mark.slow
def test_editable_install_imports(source, tmp_path):
    """Uses a new environment that can also import this environment's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    interpreter = tmp_path / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    # This name sorts after the editable install's .pth.
    (site / "zz.pth").write_text(str(Path(pytest.__file__).parents[1]))
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--editable", str(source)]
    process = subprocess.run(pip + flags, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]
    process = subprocess.run([interpreter, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip() == str(source / "acceleron" / "kernels" / "torch_ops.py")


@pytest.mark.parametrize("ours_first", [True, False])
def test_pypis_kernels_package_is_not_shadowed(source, tmp_path, ours_first):
    """At the root of a checkout, a regular package must take precedence over our kernels/ folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(OTHER_KERNELS)
    first, second = ("from acceleron.kernels import triton_ops", "import kernels")[:: 1 if ours_first else -1]
    python(PROBE_OTHER.format(first=first, second=second), tmp_path, cwd=source)


def test_sdist_contains_the_kernels(source, tmp_path):
    python(f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})", cwd=source)
    (archive,) = tmp_path.glob("acceleron-*.tar.gz")
    with tarfile.open(archive) as contents:
        files = {member.name.split("/", 1)[-1] for member in contents if member.isfile()}
    assert {"acceleron/ops.py", "acceleron/kernels/moe.py", "acceleron/training/loop.py"} <= files


def test_import_needs_only_torch_and_numpy(source):
    code = """
import sys
for name in ("tokenizers", "huggingface_hub", "tqdm", "tensorboard", "triton"):
    sys.modules[name] = None  # as if it were not installed
import torch
from acceleron import Acceleron, ModelConfig
model = Acceleron(ModelConfig(vocab_size=128, d_model=32, num_heads=2, num_kv_heads=1, d_ff=8, d_ff_shared=8))
ids = torch.arange(6)[None]
logits = model(ids).logits[0]
assert logits.std() > 0
torch.testing.assert_close(model(ids, ids).cross_entropy, torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))
"""
    python(code, cwd=source)


def test_reading_a_config_imports_no_triton(source):
    code = (
        "import sys; from acceleron import ModelConfig; ModelConfig.preset('tiny'); assert 'triton' not in sys.modules"
    )
    python(code, cwd=source)


def test_missing_symlink_is_reported(source, tmp_path):
    """Some unpackers write a symbolic link as a text file."""
    shutil.copytree(source, tmp_path / "unpacked", symlinks=True)
    (tmp_path / "unpacked" / "acceleron" / "kernels").unlink()
    (tmp_path / "unpacked" / "acceleron" / "kernels").write_text("../kernels")
    code = """
try:
    import acceleron
except ImportError as error:
    assert "must be a symbolic link to ../kernels" in str(error)
else:
    raise AssertionError("imported")
"""
    python(code, cwd=tmp_path / "unpacked")
