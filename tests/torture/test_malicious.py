"""Files made to run code when they are read: none does, seen by an audit hook of the interpreter itself.

Each file is given to everything that reads checkpoints, in a child process whose hook records every event that could be
the payload's doing. A last part of the forty is what a hostile MLflow server answers.
"""

from __future__ import annotations

import builtins
import contextlib
import http.server
import importlib
import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
import torch
from cells import cell
from forked import fork, wait, warm_up
from policies import make_policy
from test_checkpoints import seal

from pmoe_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint
from pmoe_lightning.checkpoints.files import write_checkpoint
from pmoe_lightning.errors import ConfigurationError, RunError
from pmoe_lightning.evaluate import main as evaluate_main
from pmoe_lightning.run.resume import read_newest
from pmoe_lightning.tracking.references import load_policy, resolve_checkpoint, resolve_last_checkpoint
from pmoe_lightning.train import main as train_main

pytestmark = pytest.mark.torture

MARK = "executed_by_a_file"
_CODE = f"open({MARK!r}, 'w').close()"


class Call:
    """Pickled, it is a call of a function; the function is any that a careless reader would find by its name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def payloads() -> dict[str, Any]:
    inner = io.BytesIO()
    pickle.dump(Call(os.mkdir, MARK), inner)
    return {
        "os.system": Call(os.system, f"touch {MARK}"),
        "os.mkdir": Call(os.mkdir, MARK),
        "subprocess": Call(subprocess.Popen, ["touch", MARK]),
        "eval": Call(eval, _CODE),
        "exec": Call(exec, _CODE),
        "import": Call(importlib.import_module, MARK),
        "runpy": Call(runpy.run_path, f"{MARK}.py"),
        "open": Call(builtins.open, MARK, "w"),
        "a pickle in a pickle": Call(pickle.loads, inner.getvalue()),
        "copy": Call(shutil.copyfile, "0.ckpt", MARK),
        "getattr chain": Call(getattr, Call(importlib.import_module, MARK), "x"),
        "numpy object": Call(importlib.import_module("numpy").load, f"{MARK}.npy", None, True),
    }


PLACES = ("policy", "state_dict", "optimizer_states", "hyper_parameters", "callbacks", "loops")


def _raw(path: Path, payload: Any, place: str) -> None:
    path.write_bytes(pickle.dumps({place: payload}))


def _sealed(path: Path, payload: Any, place: str) -> None:
    checkpoint = make_policy()[1]
    checkpoint[place] = [payload] if place != "policy" else {**checkpoint["policy"], "extra": payload}
    torch.save(checkpoint, path)
    seal(path)


def _legacy(path: Path, payload: Any, place: str) -> None:
    torch.save({place: payload}, path, _use_new_zipfile_serialization=False)


def pickles() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Every payload sealed inside a checkpoint; some raw, and in torch's old format."""
    for i, (name, payload) in enumerate(payloads().items()):
        place = PLACES[i % len(PLACES)]
        yield f"{name} in {place}", lambda path, payload=payload, place=place: _sealed(path, payload, place)
    for name in ("os.system", "exec", "subprocess"):
        yield f"raw {name}", lambda path, name=name: _raw(path, payloads()[name], "policy")
        yield f"legacy {name}", lambda path, name=name: _legacy(path, payloads()[name], "policy")


def described(**changes: Any) -> Callable[[Path], Any]:
    """A well-formed checkpoint whose text names code."""

    def write(path: Path) -> None:
        checkpoint = make_policy()[1]
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = checkpoint
            for name in parents:
                place = place.setdefault(name, {})
            place[last] = value
        write_checkpoint(checkpoint, path)

    return write


_TARGET = {"_target_": "os.mkdir", "_args_": [MARK], "path": MARK}
_RUN = {"configuration": {"env": _TARGET}, "mlflow": {"run_id": "0" * 32, "tracking_uri": f"file:///{MARK}"}}
NAMES: dict[str, Callable[[Path], Any]] = {
    "_target_ as actor": described(policy__description__actor=f"{MARK}.actor"),
    "_target_ among arguments": described(policy__description__arguments___target_="os.mkdir"),
    "_target_ as activation": described(policy__description__arguments__activation="os.system"),
    "_target_ in the run": described(run=_RUN, experience={}),
    "_target_ as environment": described(policy__description__env={"id": "Pendulum-v1", "kwargs": _TARGET}),
    "environment in a module": described(policy__description__env={"id": f"{MARK}:Env-v0", "kwargs": {}}),
    "_instantiator": described(hyper_parameters={"_instantiator": f"{MARK}.run"}, _instantiator=f"{MARK}.run"),
    "_class_path": described(hyper_parameters={"_class_path": f"{MARK}.Run", "_instantiator": "os.mkdir"}),
    "_target_ as transform": described(policy__description__action_transform=_TARGET | {"used_in": ["acting"]}),
    "_target_ as critic": described(policy__description__critic=_TARGET),
    "_target_ in callbacks": described(callbacks={f"{MARK}.Callback": _TARGET}),
    "hparams_name": described(hparams_name=f"{MARK}.name", hyper_parameters=_TARGET),
}


def _archive(*names: str, link: bool = False) -> Callable[[Path], Any]:
    """A checkpoint with further entries, whose names lead out of any folder it could be unpacked into."""

    def write(path: Path) -> None:
        torch.save(make_policy()[1], path)
        with zipfile.ZipFile(path, "a") as archive:
            for name in names:
                entry = zipfile.ZipInfo(name)
                entry.external_attr = (0o120777 if link else 0o100755) << 16
                archive.writestr(entry, f"/{MARK}" if link else _CODE)
        seal(path)

    return write


ARCHIVES = {
    "entries that climb out": _archive(f"../../{MARK}", f"archive/../../{MARK}.py", f"/tmp/{MARK}"),
    "entries that are links": _archive(f"archive/{MARK}", f"archive/data/{MARK}", link=True),
    "a module among the entries": _archive(f"{MARK}.py", f"archive/code/{MARK}.py", "archive/constants.pkl"),
    "two of data.pkl": _archive("archive/data.pkl", "other/data.pkl"),
}


class HostileServer(http.server.BaseHTTPRequestHandler):
    """Answers as an MLflow server would, with names that lead out of the folder they are put into."""

    listings: dict[str, list[dict]] = {}

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if address.path.endswith("runs/get"):
            run_id = query["run_id"]
            root = f"mlflow-artifacts:/0/{run_id}/artifacts"
            tags = [{"key": "output_dir", "value": f"../../{MARK}"}]
            info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": "0", "artifact_uri": root}
            return self._answer({"run": {"info": info, "data": {"tags": tags}}})
        if "artifacts" in address.path and (address.path.endswith("/list") or address.path.endswith("/artifacts")):
            where = query.get("path", "")
            (kind,) = self.listings
            files = self.listings[kind] if where.endswith("checkpoints") else self._nested(kind, where)
            return self._answer({"files": files, "root_uri": "mlflow-artifacts:/0"})
        if "artifacts" in address.path:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(_CODE.encode())
            return None
        return self._answer({"experiment": {"experiment_id": "0", "name": "Default"}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer({})

    def _nested(self, kind: str, where: str) -> list[dict]:
        if kind == "folder" and where.endswith(".ckpt"):
            return [{"path": f"../../../{MARK}", "is_dir": False, "file_size": 3}]
        return []

    def _answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def hostile_server(listing: str) -> Iterator[str]:
    best, folders = {"is_dir": False, "file_size": 3}, ("checkpoints/best.ckpt", "checkpoints/last.ckpt")
    listings = {
        "climbs": [{**best, "path": f"checkpoints/../../../{MARK}"}, {**best, "path": "checkpoints/best.ckpt"}],
        "folder": [{"path": path, "is_dir": True} for path in folders],
        "absolute": [{**best, "path": f"/tmp/{MARK}"}, {**best, "path": "best.ckpt"}],
    }
    HostileServer.listings = {listing: listings[listing]}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# What code would have to do, as the interpreter announces it.
ACTS = ("os.", "subprocess.", "shutil.", "open", "exec", "compile", "import", "pty.", "socket.connect")


def read_in_every_way(path: Path) -> int:
    """Give a file to all that reads checkpoints; returns how many refused it."""
    refused = 0
    words = [f"checkpoint={path}", "episodes=1", "video=false"]
    resume = ["env=Pendulum-v1", "logger=none", f"resume={path}", "total_frames=100000"]
    for read in (
        lambda: read_checkpoint(path),
        lambda: load_policy(path),
        lambda: AtomicCheckpointIO().load_checkpoint(path),
        lambda: read_newest(path),
        lambda: _command(evaluate_main, words),
        lambda: _command(train_main, resume),
    ):
        try:
            read()
        except (RunError, ConfigurationError, SystemExit) as error:
            refused += not (isinstance(error, SystemExit) and error.code in (0, None))
    return refused


def _command(main: Callable, words: list[str]) -> None:
    sys.argv = ["command", *words]
    main()


def watch(events: list[str]) -> None:
    """From now on, note what this process does that a payload would do."""

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(ACTS) and MARK in str(arguments)[:2000] and not _is_reading(event, arguments):
            events.append(f"{event} {arguments}"[:200])

    sys.path.insert(0, ".")
    sys.addaudithook(hook)


def _is_reading(event: str, arguments: tuple) -> bool:
    """Opening to read runs nothing; and neither does looking for a file."""
    return event in ("os.listdir", "os.scandir") or (event == "open" and arguments[1] in ("r", "rb", None))


def watch_and_read(folder: Path) -> dict[str, Any]:
    """In a child: under the hook, read every file and ask the hostile server."""
    os.chdir(folder)
    files = {**dict(pickles()), **NAMES, **ARCHIVES}
    paths = {name: Path(f"{i}.ckpt") for i, name in enumerate(files)}
    for name, write in files.items():
        write(paths[name])
    Path(f"{MARK}.py").write_text(_CODE)  # there to be imported, as beside a downloaded checkpoint
    before, events = set(os.listdir(".")), []
    watch(events)
    refused = {name: bool(read_in_every_way(path)) for name, path in paths.items()}
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    answers = {}
    for listing in ("climbs", "folder", "absolute"):
        with hostile_server(listing) as uri:
            mlflow.set_tracking_uri(uri)
            for find in (resolve_checkpoint, resolve_last_checkpoint):
                answers[f"{listing}, {find.__name__}"] = ask(find)
    new = set(os.listdir(".")) - before - {"outputs", "evaluation", "mlflow.db"}
    return {
        "files": len(files),
        "files_that_nothing_refused": [name for name, was in refused.items() if not was],
        "hostile_answers": answers,
        "executions": events,
        "files_that_appeared": [*new, *(str(path) for path in ELSEWHERE if path.exists())],
    }


ELSEWHERE = [Path(folder, MARK) for folder in ("/tmp", "/", "..", "../..", tempfile.gettempdir())]


def ask(find: Callable[[str], Path]) -> str:
    """What came of a checkpoint that a hostile server was asked for."""
    try:
        load_policy(find("f" * 32))
    except (RunError, ConfigurationError) as error:
        return str(error).replace(str(Path.cwd()), ".")[:160]
    return "read"


def read_carelessly(folder: Path) -> dict[str, Any]:
    """In a child: the same hook, and a reader that unpickles what it is given."""
    os.chdir(folder)
    load, events = torch.load, []
    files = [(name, write) for name, write in pickles() if name.startswith(("os.mkdir", "exec", "open"))]
    for i, (_, write) in enumerate(files):
        write(Path(f"{i}.ckpt"))
    torch.load = lambda path, **arguments: load(path, **arguments | {"weights_only": False})
    watch(events)
    for i in range(len(files)):
        with contextlib.suppress(Exception):
            read_checkpoint(f"{i}.ckpt")
        Path(MARK).rmdir() if Path(MARK).is_dir() else Path(MARK).unlink(missing_ok=True)
    return {"files": len(files), "executions": events}


def in_a_child(what: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """In a child, because an audit hook stays until its process ends."""
    warm_up()
    (folder / "below" / "here").mkdir(parents=True)
    report, log = folder / "report.json", folder / "log.txt"
    child = fork(lambda: report.write_text(json.dumps(what(folder / "below" / "here"))), log)
    assert wait(child) == 0, log.read_text()[-3000:]
    return json.loads(report.read_text())


def test_the_hook_sees_what_a_careless_reader_would_run(tmp_path):
    seen = in_a_child(read_carelessly, tmp_path)
    assert seen["files"] == 3 and {event.split()[0] for event in seen["executions"]} >= {"os.mkdir", "compile", "open"}


def test_no_file_runs_code(tmp_path):
    figures = cell("malicious", lambda: in_a_child(watch_and_read, tmp_path))
    assert figures["files"] + len(figures["hostile_answers"]) >= 40
    assert figures["executions"] == [] and figures["files_that_appeared"] == []
    assert figures["files_that_nothing_refused"] == []
