"""Publish to a server that speaks the hub's protocol and to a folder, read back, verify; tampered, killed, refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import bench as library
from bench.data.datasets import load_card
from bench.records.writer import RunFolder
from tests.helpers.commands import Bench
from tests.helpers.publishinghub import TOKEN, PublishingHub
from tests.helpers.records import begun, made_up

ROOT = Path(__file__).parents[2]
RADII = [0.3, 0.1, None, 0.6] * 25
TO = "hub:someone/results"
CARD = "tests/tiny.toml"  # a relative path, which a published record keeps


def metadata(readme: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(readme.decode().split("---\n")[1])
    return found


def test_published_runs_are_reported_compared_and_loaded_as_those_here(
    bench: Bench, hub: PublishingHub, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    names = [made_up(runs, RADII, name=name).name for name in ("one", "two")]
    would = bench("publish", runs, "--to", TO, "--dry-run")
    assert would.code == 0 and f"would publish to {TO}: 5 files" in would.out
    assert not hub.repos and not any(r.startswith(("POST", "PUT")) for r in hub.requests)

    sent = bench("publish", runs, "--to", TO)
    assert sent.code == 0, sent.err
    assert len(hub.repos["someone/results"]) == 2  # creation, and one commit
    commit, files = hub.repos["someone/results"][-1]
    assert f"published {TO}@{commit}: 5 files" in sent.out
    expected = {f"runs/{n}/{file}" for n in names for file in ("run.json", "certificates.jsonl.gz")}
    assert files.keys() == expected | {"README.md", ".gitattributes"}
    for name in names:
        plain = (runs / name / "certificates.jsonl").read_bytes()
        assert gzip.decompress(files[f"runs/{name}/certificates.jsonl.gz"]) == plain

    for format in ("md", "json", "csv"):
        local, remote = bench("report", runs, "--format", format), bench("report", TO, "--format", format)
        assert remote.code == 0 and remote.out == local.out
    assert f"{TO}@{commit}" in remote.err
    a, b = (json.loads(bench("compare", place, "--json").out) for place in (runs, TO))
    assert a["pairs"] == b["pairs"] and a["pairs"][0]["radii"]
    loaded = library.load(f"{TO}@{commit}")
    assert [record.path.name for record in loaded] == names
    frames = [one.to_pandas().drop(columns="path") for one in (loaded, library.load(runs))]
    assert len(frames[0]) == 2 and frames[0].equals(frames[1])
    copies = tmp_path / "copies"
    assert bench("export", TO, "--record", copies).code == 0
    assert bench("report", copies).out == bench("report", runs).out


def test_a_users_data_set_of_the_same_name_is_not_the_hubs(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", RADII, dataset="cifar10", card="c" * 64)
    assert bench("publish", run, "--to", tmp_path / "out").code == 0
    (result,) = metadata((tmp_path / "out" / "README.md").read_bytes())["model-index"][0]["results"]
    assert result["dataset"]["type"] == "cifar10"


def test_the_card_has_the_table_and_the_hubs_metadata(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    packaged = load_card("cifar10").sha256()
    run = made_up(tmp_path / "runs", RADII, wrong=[0, 1], dataset="cifar10", card=packaged)
    assert bench("publish", run, "--to", TO).code == 0
    readme = hub.files("someone/results")["README.md"]
    (index,) = metadata(readme)["model-index"]
    (result,) = index["results"]
    assert index["name"] == "results" and result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"name": "cifar10", "type": "uoft-cs/cifar10", "split": "test"}
    info = json.loads((run / "run.json").read_text())
    wanted = {one["radius"]: one for one in info["metrics"]["certified_accuracy"]}
    assert [m["args"]["radius"] for m in result["metrics"]] == [0.0, 0.25, 0.5]  # 0.75 is out of reach
    for metric in result["metrics"]:
        args, one = metric["args"], wanted[metric["args"]["radius"]]
        assert metric["type"] == "certified_accuracy" and "verified" not in metric
        found = (metric["value"], args["low"], args["high"])
        assert found == tuple(round(one[k], 6) for k in ("value", "low", "high"))
        stated = {k: args[k] for k in ("sigma", "n", "alpha", "images", "base", "run")}
        assert stated == {"sigma": 0.25, "n": 1000, "alpha": 0.001, "images": 100, "base": "vit", "run": run.name}
    text = readme.decode()
    assert "### cifar10, sigma 0.25: 100 test images, n0 100, n 1,000, alpha 0.001, noise grid, base vit" in text
    assert "95% interval" in text and f"runs/{run.name}" in text and "No weights" in text


def test_publishing_again_sends_nothing_and_adds_what_is_new(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    first, second = (made_up(tmp_path / "runs", RADII, name=name) for name in ("one", "two"))
    for to in (TO, tmp_path / "published"):
        assert bench("publish", first, "--to", to).code == 0
        again = bench("publish", first, "--to", to)
        assert again.code == 0 and "nothing to send" in again.out and "has all of it" in again.out
        added = bench("publish", second, "--to", to)
        assert added.code == 0
        said = json.loads(bench("publish", second, "--to", to, "--json").out)
        assert said["place"] == str(to) and said["files"] == [] and (said["revision"] is None) == (to != TO)
        assert {line.split()[1].rstrip(",") for line in added.out.splitlines()[:-1]} == {
            "README.md",
            f"runs/{second.name}/run.json",
            f"runs/{second.name}/certificates.jsonl.gz",
        }
    assert len(hub.repos["someone/results"]) == 3
    folder = {p.relative_to(tmp_path / "published").as_posix(): p for p in (tmp_path / "published").rglob("*")}
    remote = {k: v for k, v in hub.files("someone/results").items() if k != ".gitattributes"}
    local = {k: p.read_bytes() for k, p in folder.items() if p.is_file()}
    assert {k: v for k, v in local.items() if k != "README.md"} == {k: v for k, v in remote.items() if k != "README.md"}
    assert b"| one" in remote["README.md"] and b"| two" in remote["README.md"]
    assert bench("report", tmp_path / "published").out == bench("report", TO).out


def test_what_the_user_writes_into_the_card_stays(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    first, second = (made_up(tmp_path / "runs", RADII, name=name) for name in ("one", "two"))
    assert bench("publish", first, "--to", TO).code == 0
    text = hub.files("someone/results")["README.md"].decode()
    text = text.replace("---\n", "---\nlicense: mit\n", 1).replace("## License", "## Thanks\n\nTo all.\n\n## License")
    hub.add("someone/results", {"README.md": text.encode()})
    assert "nothing to send" in bench("publish", first, "--to", TO).out
    assert bench("publish", second, "--to", TO).code == 0
    readme = hub.files("someone/results")["README.md"]
    assert metadata(readme)["license"] == "mit" and b"To all." in readme and b"| two" in readme
    assert len(metadata(readme)["model-index"][0]["results"][0]["metrics"]) == 6


def test_another_run_of_the_same_name_is_never_replaced(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    mine, other = made_up(tmp_path / "mine", RADII), made_up(tmp_path / "other", RADII, wrong=[0])
    assert mine.name == other.name
    for to in (TO, tmp_path / "published"):
        assert bench("publish", mine, "--to", to).code == 0
        before = dict(hub.files("someone/results"))
        refused = bench("publish", other, "--to", to)
        assert refused.code == 2 and "another run of this name is published there" in refused.err
        assert refused.err.count("\n") == 1
        assert hub.files("someone/results") == before
    published = tmp_path / "published" / "runs" / mine.name / "certificates.jsonl.gz"
    assert gzip.decompress(published.read_bytes()) == (mine / "certificates.jsonl").read_bytes()
    assert not (tmp_path / "published" / ".partial").exists()


def test_a_study_is_published_with_its_text(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    text = 'dataset = "digits"\r\n\r\n[[run]]\ndefense = ["one", "two"]\n'  # as some editors write it
    folder = tmp_path / "study"
    runs = [made_up(folder / "runs", RADII, name=name) for name in ("one", "two")]
    entries = [{"label": run.name, "arguments": {}, "folder": run.name} for run in runs]
    study = {"schema": 1, "name": "mine.toml", "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}
    (folder / "mine.toml").write_bytes(text.encode())
    (folder / "runs" / "mine.study.json").write_text(json.dumps(study | {"runs": entries}))
    for given in (folder / "mine.toml", folder, folder / "runs"):
        assert bench("publish", given, "--to", TO).code == 0
        assert hub.files("someone/results")["mine.toml"].decode() == text
    assert len(hub.repos["someone/results"]) == 2  # the second and third sent nothing
    report = bench("report", TO)
    assert report.code == 0 and "Runs of the study mine.toml" in report.out and "wrote" not in report.err
    loaded = library.load(TO).study
    assert loaded is not None and loaded.text == text

    part = bench("publish", runs[0], "--to", tmp_path / "part")
    assert part.code == 0 and "study mine.toml is left out: 1 of its 2 runs are given" in part.err
    shutil.rmtree(runs[1])
    whole = bench("publish", folder, "--to", tmp_path / "whole")
    assert whole.code == 2 and "1 of 2 runs are not finished" in whole.err


def test_runs_that_are_no_results_are_refused(bench: Bench, tmp_path: Path) -> None:
    unfinished = RunFolder(tmp_path / "a", "digits-lora-s0.25", begun(3))
    unfinished.close()
    changed = made_up(tmp_path / "b", RADII)
    info = json.loads((changed / "run.json").read_text())
    (changed / "run.json").write_text(json.dumps(info | {"metrics": info["metrics"] | {"acr": 9.0}}))
    shard = made_up(tmp_path / "c", RADII)
    (shard / "shard-1-of-2").mkdir()
    (shard / "run.json").rename(shard / "shard-1-of-2" / "run.json")
    attacked = tmp_path / "d" / "attacked"
    attacked.mkdir(parents=True)
    (attacked / "attacks.jsonl").write_text("{}\n")
    log = tmp_path / "log.tsv"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.1\t1\t0:00:01\n")
    options = ("--dataset", "other", "--sigma", ".25", "--alpha", ".001", "--n", "1000", "--out", tmp_path / "e")
    assert bench("import", log, *options).code in (0, 1)
    (imported,) = (tmp_path / "e").iterdir()
    expected = {
        unfinished.path: "0 of 3 images are done",
        changed: "metrics in run.json are not those of the certificates",
        tmp_path / "c": "only shards of a run; bench merge",
        attacked: "is no run folder",
        imported: "an imported log",
        tmp_path / "nothing": "is no run folder",
    }
    for run, message in expected.items():
        result = bench("publish", run, "--to", tmp_path / "out")
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "out").exists()


def test_a_token_and_the_right_to_write_are_needed(
    bench: Bench, hub: PublishingHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up(tmp_path / "runs", RADII)
    monkeypatch.delenv("HF_TOKEN")
    token = tmp_path / "hf" / "token"  # of ``hf auth login``: not from the environment
    token.parent.mkdir()
    token.write_text(TOKEN)
    result = bench("publish", run, "--to", TO)
    assert result.code == 2 and "no token; set HF_TOKEN" in result.err and not hub.repos
    monkeypatch.setenv("HF_TOKEN", "hf_read_only")
    result = bench("publish", run, "--to", TO)
    assert result.code == 2 and "the token may not write there (401)" in result.err and result.err.count("\n") == 1
    hub.add("someone/results", {})
    result = bench("publish", run, "--to", TO)
    assert result.code == 2 and "the token may not write there (403)" in result.err
    assert "hf_read_only" not in result.err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hub:", "no address"),
        ("hub:alone", "no address"),
        ("hub:../../etc", "no address"),
        ("hub:a/b/c", "no address"),
        ("hub:a/b@../../x", "no address"),
        ("https://huggingface.co/a/b", "give an address of the hub as hub:OWNER/NAME"),
        ("hub:no/where", "the hub has no model 'no/where'"),
        ("hub:someone/results@v9", "has no revision 'v9'"),
        ("hub:someone/results", "no runs there"),
    ],
)
def test_nonsense_addresses_are_one_line(bench: Bench, hub: PublishingHub, address: str, message: str) -> None:
    hub.add("someone/results", {"runs/x/notes.txt": b"", "run.json": b"{}"})
    for command in ("report", "verify", "compare"):
        result = bench(command, address)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    with pytest.raises(library.BenchError, match=re.escape(message)):
        library.load(address)


def test_no_network_is_one_line(bench: Bench, hub: PublishingHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = bench("report", TO)
    assert result.code == 2 and "no network (HF_HUB_OFFLINE is set)" in result.err and not hub.requests


def test_downloads_are_untrusted(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", RADII)
    assert bench("publish", run, "--to", TO).code == 0
    strange = {"runs/x/payload.py": b"raise SystemExit", "weights/x/model.bin": b"\x80\x02", "run.sh": b"exit 1"}
    hub.add("someone/results", {**strange, "../../escape.json": b"{}", "runs/../../x/run.json": b"{}"})
    asked = len(hub.requests)
    result = bench("report", TO)
    assert result.code == 0 and "5 files are not of a published folder and are not read" in result.err
    fetched = {r.partition("/resolve/")[2].partition("/")[2] for r in hub.requests[asked:] if "/resolve/" in r}
    assert fetched == {f"runs/{run.name}/run.json", f"runs/{run.name}/certificates.jsonl.gz"}
    hub.add("someone/results", {f"runs/{run.name}/run.json": b" " * (64 * 2**20 + 1)})
    result = bench("report", TO)
    assert result.code == 2 and "run.json has 67,108,865 bytes, and the limit for such a file" in result.err
    assert "/resolve/" not in " ".join(hub.requests[-2:])  # refused by the listing
    hub.add("someone/results", {f"runs/{run.name}/run.json": b"{", "README.md": b"# no marks"})
    assert "unreadable" in bench("report", TO).err
    result = bench("publish", run, "--to", TO)
    assert result.code == 2 and result.err.count("\n") == 1


def test_a_tampered_run_is_refused(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", RADII)
    assert bench("publish", run, "--to", TO).code == 0
    path = f"runs/{run.name}/certificates.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(hub.files("someone/results")[path]).splitlines()]
    lines[1]["radius"] = 2.0
    hub.add("someone/results", {path: gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())})
    report = bench("report", TO)
    assert report.code == 2 and "certificates.jsonl was changed after the run finished" in report.err
    verified = bench("verify", TO, "--json")
    assert verified.code == 1
    (one,) = json.loads(verified.out)
    assert one["verdict"] == "failed" and "radius" in one["why"] and one["images_certified_again"] == 0


def test_a_failed_commit_changes_nothing_and_is_repeated(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", RADII)
    hub.before = lambda request: 500 if "/commit/" in request else None
    failed = bench("publish", run, "--to", TO)
    assert failed.code == 2 and "repeat the command to retry" in failed.err
    assert hub.files("someone/results").keys() == {".gitattributes"}
    hub.before = lambda request: None
    uploads = sum(r.startswith("PUT") for r in hub.requests)
    assert bench("publish", run, "--to", TO).code == 0
    assert sum(r.startswith("PUT") for r in hub.requests) == uploads == 1  # resumed: no file is uploaded twice
    assert f"runs/{run.name}/run.json" in hub.files("someone/results")


def test_files_that_the_repository_ignores_are_noticed(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    hub.add("someone/results", {".gitignore": b"runs\n"})
    result = bench("publish", made_up(tmp_path / "runs", RADII), "--to", TO)
    assert result.code == 2 and "did not arrive as it was sent" in result.err


def test_a_commit_in_between_is_refused(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    hub.add("someone/results", {})

    def meanwhile(request: str) -> None:
        if "/preupload/" in request:
            hub.add("someone/results", {"other.txt": b"x"})

    hub.before = meanwhile
    result = bench("publish", made_up(tmp_path / "runs", RADII), "--to", TO)
    assert result.code == 2 and "changed meanwhile; repeat the command" in result.err
    assert hub.files("someone/results").keys() == {"other.txt"}


def test_a_publish_killed_half_way_is_repeated(bench: Bench, hub: PublishingHub, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", RADII)
    reached, go_on = threading.Event(), threading.Event()

    def hold(request: str) -> int | None:
        if request.startswith("PUT"):
            reached.set()
            go_on.wait(60)
            return 500
        return None

    hub.before = hold
    command = [sys.executable, "-m", "bench", "publish", str(run), "--to", TO]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    go_on.set()
    assert hub.files("someone/results").keys() == {".gitattributes"}
    assert bench("report", TO).code == 2
    hub.before = lambda request: None
    assert bench("publish", run, "--to", TO).code == 0
    assert bench("report", TO).out == bench("report", run).out


def test_a_folder_killed_half_way_holds_whole_runs_and_is_repeated(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.publishing import sending

    for name in ("one", "two"):
        made_up(tmp_path / "runs", RADII, name=name)
    out, move, moved = tmp_path / "published", sending._move, list[str]()

    def killed(staged: Path, to: Path, path: str) -> None:
        if moved:
            raise KeyboardInterrupt
        move(staged, to, path)
        moved.append(path)

    monkeypatch.setattr(sending, "_move", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **more: None)  # as after SIGKILL
    assert bench("publish", tmp_path / "runs", "--to", out).code != 0
    assert (out / ".partial").exists()
    monkeypatch.undo()
    (only,) = (out / "runs").iterdir()
    assert {f.name for f in only.iterdir()} == {"run.json", "certificates.jsonl.gz"}
    assert bench("report", out).code == 0
    assert bench("publish", tmp_path / "runs", "--to", out).code == 0
    assert bench("report", out).out == bench("report", tmp_path / "runs").out
    assert {f.name for f in out.iterdir()} == {"README.md", "runs"}


def test_a_card_of_another_is_not_replaced(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# My project\n")
    result = bench("publish", made_up(tmp_path / "runs", RADII), "--to", tmp_path / "out")
    assert result.code == 2 and "README.md there was not made by bench publish" in result.err
    assert (tmp_path / "out" / "README.md").read_text() == "# My project\n"
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"README.md"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"---\n", b"---\nmodel_name: mine\n"), "metadata that cannot be read: TypeError: "),
        ((b"tags:\n", b"tags:\n- [mine]\n"), "metadata that cannot be read: TypeError: unhashable"),
        ((b"## License", b"## Licen\xe7a"), "README.md there is not UTF-8 text"),
    ],
)
def test_a_card_that_cannot_be_written_again_is_refused_in_one_line(
    bench: Bench, tmp_path: Path, change: tuple[bytes, bytes], message: str
) -> None:
    first, second = (made_up(tmp_path / "runs", RADII, name=name) for name in ("one", "two"))
    assert bench("publish", first, "--to", tmp_path / "out").code == 0
    readme = tmp_path / "out" / "README.md"
    lines = re.sub(rb"model-index:.*?---\n", b"---\n", readme.read_bytes(), count=1, flags=re.DOTALL)
    readme.write_bytes(changed := lines.replace(*change, 1))
    result = bench("publish", second, "--to", tmp_path / "out")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert readme.read_bytes() == changed and len(list((tmp_path / "out" / "runs").iterdir())) == 1
