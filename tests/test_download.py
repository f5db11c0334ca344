"""wan22-download against a stand-in for the hub on this machine."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import huggingface_hub.constants
import pytest

import convert.download
from convert.download import LAYOUTS, Layout, download, main
from wan22_jax.errors import BadInput

COMMIT = "c" * 40
LAYOUT = Layout("Wan-AI/Tiny", ("config.json", "vae/weights.safetensors"))
FILES = {"config.json": b"{}", "vae/weights.safetensors": bytes(range(256)) * 4096}


class Hub:
    """What a hub holds, what it was asked, and what goes wrong with it."""

    def __init__(self):
        self.files = dict(FILES)
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.tokens: set[str | None] = set()
        self.refuses: dict[str, tuple[int, str]] = {}  # start of a path: status, error code
        self.cuts_at: int | None = None  # where an answer with a file ends, the last one

    def sent(self, name):
        return [where for method, path, where in self.asked if method == "GET" and name in path]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        if "Wan-AI" in self.path:
            self.hub.tokens.add(self.headers.get("Authorization"))
            self.hub.asked.append((self.command, self.path, self.headers.get("Range")))
        for start, (status, code) in self.hub.refuses.items():
            if self.path.startswith(start):
                self.reply(b"", status, {"X-Error-Code": code} if code else {})
                return
        if self.path.startswith("/api/models/Wan-AI/Tiny/revision/"):
            self.reply(json.dumps({"id": "Wan-AI/Tiny", "sha": COMMIT}).encode())
        elif self.path == f"/api/models/Wan-AI/Tiny/paths-info/{COMMIT}":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            known = [name for name in form["paths"] if name in self.hub.files]
            self.reply(json.dumps([describe(name) for name in known]).encode())
        elif (name := self.path.removeprefix(f"/Wan-AI/Tiny/resolve/{COMMIT}/")) in FILES:
            self.send_file(self.hub.files[name], name)
        else:
            self.reply(b"", 404)

    def send_file(self, content, name):
        where = self.headers.get("Range")
        start = int(where.removeprefix("bytes=").rstrip("-")) if where else 0
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{describe(name)["oid"]}"'}
        if where:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(content[start:], 206 if where else 200, headers, self.hub.cuts_at)

    def reply(self, content, status=200, headers=None, cut_at=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut_at])
            if cut_at is not None and cut_at < len(content):
                self.hub.refuses["/Wan-AI/Tiny/resolve"] = 500, ""  # and then it is gone
        self.close_connection = True


def describe(name):
    """As the hub lists a file: a large one has a SHA-256, a small one git's hash alone."""
    content = FILES[name]
    entry = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


@pytest.fixture
def hub(monkeypatch):
    """The library's hub, as HF_ENDPOINT would name it."""
    state = Hub()
    handler = type("Bound", (Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the library's own attempts
    monkeypatch.setitem(LAYOUTS, "official", LAYOUT)
    yield state
    server.shutdown()
    server.server_close()


def files_in(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# What comes


def test_the_command_downloads_a_layout(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["--layout", "official", "--out", str(tmp_path / "out")]) == 0
    assert files_in(tmp_path / "out") == FILES
    assert f"{tmp_path / 'out'}: complete, every digest" in capsys.readouterr().out
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.asked[0][1] == "/api/models/Wan-AI/Tiny/revision/main"


def test_the_tables_name_what_a_conversion_opens():
    assert {layout.repo for layout in LAYOUTS.values()} == {
        "Wan-AI/Wan2.2-TI2V-5B",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
    }
    official, diffusers = LAYOUTS["official"].files, LAYOUTS["diffusers"].files
    assert "diffusion_pytorch_model-00003-of-00003.safetensors" in official
    assert "google/umt5-xxl/tokenizer.json" in official
    assert "transformer/diffusion_pytorch_model-00005-of-00005.safetensors" in diffusers
    assert "text_encoder/model.safetensors.index.json" in diffusers
    assert [len(layout.files) for layout in LAYOUTS.values()] == [11, 18, 3]


def test_what_is_there_is_not_sent_again(hub, tmp_path):
    assert download(LAYOUT, tmp_path) == [tmp_path / name for name in FILES]
    num_sent = len(hub.sent("/resolve/"))
    download(LAYOUT, tmp_path)
    assert len(hub.sent("/resolve/")) == num_sent == 2
    (tmp_path / "vae" / "weights.safetensors").write_bytes(b"damaged")
    download(LAYOUT, tmp_path)
    assert files_in(tmp_path) == FILES
    assert len(hub.sent("weights")) == 2


def test_a_file_that_was_cut_off_is_gone_on_with(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    hub.cuts_at = 300_000
    with pytest.raises(BadInput, match=r"could not be read \(.*; run the same command again"):
        download(LAYOUT, tmp_path)
    assert files_in(tmp_path).keys() == {"config.json", "vae/weights.safetensors.partial"}
    hub.cuts_at = None
    hub.refuses.clear()
    download(LAYOUT, tmp_path)
    assert files_in(tmp_path) == FILES
    where = hub.sent("weights")[-1]
    assert where
    assert 0 < int(where.removeprefix("bytes=").rstrip("-")) <= 300_000


# What is refused


def refusal(capsys, out, *flags):
    assert main(["--layout", "official", "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("name", FILES)
def test_another_digest_is_refused_and_deleted(name, hub, capsys, tmp_path):
    hub.files[name] = FILES[name][:-1] + b"?"
    error = refusal(capsys, tmp_path)
    assert f"{tmp_path / name}: came with another digest than the hub states" in error
    assert name not in files_in(tmp_path)
    hub.files[name] = FILES[name]
    download(LAYOUT, tmp_path)
    assert files_in(tmp_path) == FILES


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (401, "RepoNotFound", "is not there, or not for you; set HF_TOKEN"),
        (403, "GatedRepo", "is not there, or not for you; set HF_TOKEN"),
        (404, "RepoNotFound", "is not there, or not for you; set HF_TOKEN"),
        (404, "RevisionNotFound", "has no revision v9; try another --revision"),
        (500, "", "could not be read ("),
        (200, "", "could not be read ("),  # a page of a firewall
    ],
)
def test_refusals_of_the_hub_are_one_line(status, code, why, hub, capsys, tmp_path):
    hub.refuses["/api/models"] = status, code
    error = refusal(capsys, tmp_path / "out", "--revision", "v9")
    assert f"/Wan-AI/Tiny: {why}" in error
    assert "/tree/v9 into" in error or "RevisionNotFound" in code
    assert not (tmp_path / "out").exists()


def test_a_file_that_the_hub_has_not_is_named(hub, capsys, tmp_path):
    del hub.files["vae/weights.safetensors"]
    assert "vae/weights.safetensors not there at main" in refusal(capsys, tmp_path)
    hub.files = dict(FILES)
    hub.refuses["/Wan-AI/Tiny/resolve"] = 404, "EntryNotFound"
    assert "could not be read (404" in refusal(capsys, tmp_path)


def test_without_a_network_the_ways_out_are_named(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    error = refusal(capsys, tmp_path)
    assert "http://127.0.0.1:1/Wan-AI/Tiny: could not be read (" in error
    for part in ("network and proxy", "HF_ENDPOINT to a mirror", "by hand from http://127.0.0.1:1"):
        assert part in error
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it" in refusal(capsys, tmp_path)
    assert hub.asked == []


def test_a_small_disk_is_refused_before_anything_comes(hub, monkeypatch, capsys, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(convert.download.shutil, "disk_usage", lambda _: usage)
    assert "0.1 GB are needed and 0.0 GB free" in refusal(capsys, tmp_path)
    assert hub.sent("/resolve/") == []


@pytest.mark.parametrize("address", ["http://[", "http://hub:65536", "hub", "ftp://hub", ""])
def test_an_endpoint_must_be_an_address(address, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", address)
    error = refusal(capsys, tmp_path / "out")
    assert f"HF_ENDPOINT: is {address!r}, an address like https://huggingface.co was" in error
    assert not (tmp_path / "out").exists()


def test_a_layout_must_be_known(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--layout", "gguf", "--out", str(tmp_path)])
    assert "invalid choice: 'gguf'" in capsys.readouterr().err
