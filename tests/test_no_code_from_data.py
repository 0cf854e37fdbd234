"""Nothing that is read can run code: what the package calls, what its readers do with pickles."""

import ast
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import invdiff_pl
from invdiff_pl.adapters import load_adapter
from invdiff_pl.backbones.pipeline import load_pipeline
from invdiff_pl.data.cache import ShardedTensor
from invdiff_pl.data.custom import TableDataModule
from invdiff_pl.data.images import read_image
from invdiff_pl.data.samples import read_manifest
from invdiff_pl.environments.table import FeatureTable
from invdiff_pl.metrics.classifier import SampleClassifier
from invdiff_pl.metrics.clip import ClipEncoder
from invdiff_pl.metrics.extractors import build_extractor
from invdiff_pl.utils.errors import InvDiffError
from invdiff_pl.utils.files import read_json
from invdiff_pl.utils.tensors import read_tensors
from invdiff_pl.workflow.checkpoints import SafeCheckpointIO
from invdiff_pl.workflow.experiment import Experiment
from invdiff_pl.workflow.records import read_record

PACKAGE = Path(invdiff_pl.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "pd.read_pickle",
    "pandas.read_pickle", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _problems(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # The name of the exception that safe loading raises is harmless.
            harmless = [alias.name for alias in node.names] == ["UnpicklingError"]
            modules = [] if harmless else [node.module or ""]
        else:
            continue
        yield from (f"imports {m}" for m in modules if m.split(".")[0] in FORBIDDEN_MODULES)
    for name, call in _calls(tree):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in FORBIDDEN_NAMES or name in FORBIDDEN_CALLS:
            yield f"calls {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "calls torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and "allow_pickle" not in given:
            yield f"calls {name} without allow_pickle=False"
        if given.get("allow_pickle", "False") != "False":
            yield f"calls {name}, which may unpickle"
        if "trust_remote_code" in given:
            yield "sets trust_remote_code"
        loads_weights = name.endswith(("Pipeline.from_pretrained", "Model.from_pretrained"))
        if loads_weights and given.get("use_safetensors") != "True":
            yield f"calls {name} without use_safetensors=True"
        if given.get("shell") == "True":
            yield f"calls {name} with a shell"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_module_loads_code_from_data(path: Path) -> None:
    assert not list(_problems(path))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('x')",
        "torch.load('x', weights_only=False)",
        "np.load('x')",
        "eval('1')",
        "yaml.load(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "StableDiffusionPipeline.from_pretrained(x)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_the_scan_finds(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert list(_problems(tmp_path / "module.py"))


class _Malicious:
    """Unpickling one makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _yaml(path: Path) -> None:
    Experiment(files=(path,), experiments=path, flags=(), overrides={}, rendered=False).config()


def _table(path: Path) -> None:
    folder = str(path.parent)
    data = TableDataModule(
        root=folder, table=path.name, backbone="", resolution=8, cache_dir=folder
    )
    assert len(data.index)


def _clip_folder(path: Path) -> None:
    shutil.copy(path, path.parent / "pytorch_model.bin")
    (path.parent / "config.json").write_text('{"model_type": "clip"}')
    ClipEncoder(str(path.parent))


READERS: dict[str, Callable[[Path], object]] = {
    "file.ckpt": lambda path: SafeCheckpointIO().load_checkpoint(path, weights_only=False),
    "file.safetensors": lambda path: read_tensors(path, "x"),
    "part-0.safetensors": lambda path: FeatureTable(path.parent).rows(),
    "shards.json": lambda path: ShardedTensor(path.parent),
    "file.json": read_json,
    "stage.json": read_record,
    "manifest.jsonl": lambda path: read_manifest(path.parent),
    "file.yaml": _yaml,
    "file.csv": _table,
    "file.tsv": _table,
    "file.jsonl": _table,
    "file.parquet": _table,
    "file.png": lambda path: read_image(path, 8),
    "adapter.json": lambda path: load_adapter(path.parent, torch.nn.Identity()),
    "classifier.json": lambda path: SampleClassifier.load(path.parent),
    "model_index.json": lambda path: load_pipeline(str(path.parent)),
    "inception.pth": lambda path: build_extractor("inception_v3", path),
    "lite0.pth": lambda path: build_extractor("efficientnet_lite0", path),
    "clip.bin": _clip_folder,
}


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("name", READERS)
def test_a_malicious_pickle_is_refused_and_does_not_run(name: str, form: str, tmp_path) -> None:
    mark = tmp_path / "code ran"
    path = tmp_path / "data" / name
    path.parent.mkdir()
    if form == "pickle":
        path.write_bytes(pickle.dumps(_Malicious(mark)))
    else:
        torch.save({"state_dict": _Malicious(mark)}, path)
    with pytest.raises(InvDiffError):
        READERS[name](path)
    assert not mark.exists()


def test_a_pipeline_with_pickled_weights_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_backbone, folder)
    mark = tmp_path / "code ran"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(_Malicious(mark), weights.with_suffix(".bin"))
    with pytest.raises(InvDiffError, match="safetensors"):
        load_pipeline(str(folder))
    assert not mark.exists()


def test_a_pipeline_that_names_other_libraries_is_refused(tiny_backbone, tmp_path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_backbone, folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers"', '"antigravity"'))
    with pytest.raises(InvDiffError, match="antigravity"):
        load_pipeline(str(folder))


def test_a_backbone_that_lacks_a_weight_is_refused_rather_than_filled_up(
    tiny_backbone, tmp_path
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_backbone, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.bias"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InvDiffError, match=r"lacks 1 weights of its unet, such as 'conv_in.bias'"):
        load_pipeline(str(folder))
