"""No byte that arrives is ever run: neither by our code, nor by the readers of others that we call.

What is read from outside is protobuf, ``.npy`` numbers, safetensors, JSON, TOML, CSV, Parquet and
PEM. ``tests/integration/test_unpickling.py`` runs a whole federation that cannot unpickle.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import os
import pickle
import pkgutil
import re
from fnmatch import fnmatch
from pathlib import Path

import flwr.app.message.array
import flwr.serverapp.strategy
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from google.protobuf.internal import api_implementation

from common.data.tables import read_table
from common.errors import StateError, WireError
from common.link import federation_pb2 as pb
from common.link.codec import Incoming, decode, encode
from common.settings import plan_for
from common.wire import vector_of
from server.checkpoints import Checkpoints, file_name
from tests.tiny import TinyTask
from tests.unpickling import Names, offences, reachable

ROOT = Path(__file__).parents[1]
HOUSES = ("common", "client", "server", "simulations", "sotto")
SOURCES = sorted(
    path for folder in (*HOUSES, "examples", "tools") for path in (ROOT / folder).rglob("*.py")
)

# ------------------------------------------------------------------------------------- our code

EXCEPTIONS = {
    "simulations/processes.py": (
        {"import multiprocessing", "multiprocessing.connection.Connection"},
        "jobs go through a pipe to copies of this process on this machine, and results back; "
        "nobody else can write into it",
    ),
    "simulations/ray.py": (
        {"import ray"},
        "jobs go to a Ray cluster of the user's own, which runs code by its nature; whoever can "
        "reach it owns it already",
    ),
}
"""Simulations only: where our own processes send each other objects."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_of_ours_runs_what_it_reads(path: Path) -> None:
    allowed, _ = EXCEPTIONS.get(str(path.relative_to(ROOT)), (set(), ""))
    found = {what.partition(": ")[2] for what in offences(path.read_text())}
    assert found == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def late():\n    from pickle import loads",
        "import cloudpickle as innocent",
        "import multiprocessing.connection",
        "from torch import load",
        "import torch as t\nt.load('model.pt', weights_only=True)",
        "import torch\nrestore = torch.load",
        "import numpy as np\nnp.load('a.npy')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "import numpy as np\nnp.load('a.npy', allow_pickle=trust)",
        "from numpy import load\nload('a.npy')",
        "import numpy\nnumpy.save('a.npy', objects)",
        "from numpy.lib import format\nformat.read_array(file)",
        "import pandas as pd\npd.read_pickle('a')",
        "table.to_pickle('a')",
        "import yaml\nyaml.load(text)",
        "eval(text)",
        "table.eval(text)",
        "exec(text)",
        "run = exec",
        "__import__(name)",
        "import importlib\nimportlib.import_module('pickle')",
        "from concurrent.futures import ProcessPoolExecutor",
    ],
)
def test_code_that_runs_what_it_reads_is_noticed(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(file, allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile('a')",
        "import yaml\nyaml.safe_load(text)",
        "def load(path): ...\nload(path)",
        "from . import pickle_free",
    ],
)
def test_harmless_code_is_not(source: str) -> None:
    assert offences(source) == []


# --------------------------------------------------------------------------- readers we call

READERS: dict[str, tuple[str, ...]] = {
    "csv.reader": ("csv",),
    "json.loads": ("json", "json.decoder", "json.scanner"),
    "tomllib.loads": ("tomllib", "tomllib._parser", "tomllib._re"),
    "tomlkit.parse": ("tomlkit.api", "tomlkit.parser", "tomlkit.source"),
    "safetensors.*": ("safetensors", "safetensors.numpy", "safetensors.torch"),
    "pandas.read_csv": (
        "pandas.io.common",
        "pandas.io.parsers.base_parser",
        "pandas.io.parsers.c_parser_wrapper",
        "pandas.io.parsers.readers",
    ),
    "pandas.read_excel": ("pandas.io.excel._base", "pandas.io.excel._xlrd"),
    "pandas.read_parquet": (
        "pandas.core.arrays.arrow.extension_types",
        "pandas.io.parquet",
        "pyarrow.pandas_compat",
        "pyarrow.parquet.core",
    ),
    "cryptography.*": (
        "cryptography.hazmat.primitives.serialization.base",
        "cryptography.x509.base",
    ),
    "common.link.federation_pb2.*": ("common.link.federation_pb2", "google.protobuf.message"),
}
"""Third-party function that reads bytes → modules that it is made of, as far as they are Python."""

FUNCTIONS = (np.lib.format.read_magic, np.lib.format.read_array_header_1_0)
"""What `numpy.load` begins with for Flower's arrays, in a module that also unpickles."""

HARMLESS = {
    "numpy.frombuffer": "numbers only: it refuses objects, see below",
    "os.*open": "descriptors",
    "struct.*": "numbers only",
    "sklearn.datasets.load_breast_cancer": "a CSV file that comes with scikit-learn",
}

_READS = re.compile(
    r"(^|_)(de|un)?(load|loads|open|read|reader|parse|decode|deserialize|inflate|pack|loadtxt|"
    r"genfromtxt)(_|$)|from_?(string|buffer|file|bytes)"
)


def readers(source: str) -> set[str]:
    """Functions of others in a source whose name says that they read."""
    tree = ast.parse(source)
    names = Names(tree)
    called = {names.dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        name
        for name in called
        if name
        and (name.partition(".")[0] not in HOUSES or "_pb2." in name)
        and _READS.search(name.rpartition(".")[2].lower())
    }


def test_every_reader_that_we_call_is_known() -> None:
    called = {
        name for path in SOURCES if "_pb2" not in path.name for name in readers(path.read_text())
    }
    known = {*READERS, *HARMLESS}
    strangers = {name for name in called if not any(fnmatch(name, one) for one in known)}
    assert not strangers, "do they unpickle? look, and add them to READERS or HARMLESS"
    assert "safetensors.numpy.load" in called
    assert "common.link.federation_pb2.Layout.FromString" in called


def test_an_unknown_reader_would_be_noticed() -> None:
    assert readers("import h5py as h\nh.Reader.from_bytes(data)") == {"h5py.Reader.from_bytes"}
    assert readers("import avro\navro.read_file(path)") == {"avro.read_file"}
    assert readers("from avro import load\nload(path)") == {"avro.load"}
    assert readers("import threading\nthreading.Thread()") == set()


FLOWER = (flwr.app, flwr.app.message, flwr.serverapp.strategy)
"""Packages that get messages once they are decoded."""

MODULES = sorted(
    {module for modules in READERS.values() for module in modules}
    | {
        f"{package.__name__}.{module.name}"
        for package in FLOWER
        for module in pkgutil.iter_modules(package.__path__)
    }
)


@pytest.mark.parametrize("module", MODULES)
def test_the_readers_of_others_do_not_run_what_they_read(module: str) -> None:
    assert offences(inspect.getsource(importlib.import_module(module))) == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_numpys_header_is_read_as_a_literal(function: object) -> None:
    assert callable(function)
    sources = [inspect.getsource(one) for one in reachable(function)]
    assert len(sources) > 1
    assert [what for source in sources for what in offences(source)] == []
    assert not any("pickle.load" in source for source in sources)


def test_numpys_reader_of_objects_would_be_noticed() -> None:
    sources = [inspect.getsource(one) for one in reachable(np.lib.format.read_array)]
    assert any("pickle.load" in source for source in sources)


def test_flowers_arrays_would_be_noticed_if_they_unpickled() -> None:
    source = inspect.getsource(flwr.app.message.array)
    broken = source.replace("np.load(bytes_io, allow_pickle=False)", "np.load(bytes_io)")
    assert [what.partition(": ")[2] for what in offences(broken)] == [
        "numpy.load without allow_pickle=False"
    ]


def test_protobuf_is_the_compiled_one() -> None:
    """The one in Python is a fallback for platforms without a wheel."""
    assert api_implementation.Type() == "upb"


# ------------------------------------------------------------------------------ hostile bytes


class Payload:
    """Makes a folder wherever it is unpickled.

    Args:
        folder: that is then there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def npy_of_objects(payload: Payload) -> bytes:
    """A ``.npy`` file of version 1.0 whose one element is pickled."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([payload], dtype=object), version=(1, 0))
    return file.getvalue()


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    return tmp_path / "trap"


def test_the_payload_works(trap: Path) -> None:
    np.load(io.BytesIO(npy_of_objects(Payload(trap))), allow_pickle=True)
    assert trap.is_dir()
    trap.rmdir()
    pickle.loads(pickle.dumps(Payload(trap)))  # noqa: S301 - what must not happen elsewhere
    assert trap.is_dir()


@pytest.mark.parametrize("claimed", ["object", "float32", "|O"])
def test_an_array_of_objects_is_refused_on_the_link(trap: Path, claimed: str) -> None:
    data = npy_of_objects(Payload(trap))
    array = Array(dtype=claimed, shape=(1,), stype="numpy.ndarray", data=data)
    payload = encode(RecordDict({"arrays": ArrayRecord({"update": array})}))
    header = pb.Header(
        message_id="1",
        message_type="train",
        created_at=1.0,
        ttl=1.0,
        layout_bytes=payload.layout_bytes,
        payload_bytes=payload.size,
    )
    with pytest.raises(WireError, match=r"element type|described as"):
        decode(Incoming(header, tuple(payload.parts)), src_node_id=1, dst_node_id=2)
    assert not trap.exists()


def test_an_array_of_objects_is_refused_wherever_arrays_are_read(trap: Path) -> None:
    data = npy_of_objects(Payload(trap))
    array = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)
    with pytest.raises(WireError, match=r"^update: "):
        vector_of(array, what="update")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        array.numpy()
    with pytest.raises(ValueError, match="OBJECT array"):
        np.frombuffer(data, dtype=object)
    assert not trap.exists()


def test_a_column_of_a_pickled_type_is_a_plain_column(trap: Path, tmp_path: Path) -> None:
    """CVE-2023-47248: pyarrow before 14.0.1 unpickled the type of such a column."""
    field = pa.field(
        "age",
        pa.int64(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickle.dumps(Payload(trap)),
        },
    )
    path = tmp_path / "patients.parquet"
    pyarrow.parquet.write_table(pa.table([pa.array([61])], schema=pa.schema([field])), path)
    assert pyarrow.parquet.read_schema(path).field("age").metadata == field.metadata, "not read yet"
    assert list(read_table(path)["age"]) == [61]
    assert not trap.exists()


def test_a_pickled_checkpoint_is_no_checkpoint(trap: Path, tmp_path: Path) -> None:
    pickled = pickle.dumps(Payload(trap))
    (tmp_path / file_name(1, hashlib.sha256(pickled).hexdigest())).write_bytes(pickled)
    with pytest.raises(StateError, match="cannot be read"):
        Checkpoints(tmp_path).load(plan_for(TinyTask(), {"no_dp": True}))
    assert not trap.exists()


def test_a_pickled_table_is_no_table(trap: Path, tmp_path: Path) -> None:
    for name in ("patients.parquet", "patients.csv"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(trap)))
        with pytest.raises(ValueError, match=r"cannot be read|is not UTF-8"):
            read_table(tmp_path / name)
    assert not trap.exists()
