import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from tokenizers import Tokenizer

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.model import facts, parameters
from advisor.shell import resources
from advisor.shell.hub import CONFIG, TOKENIZER, find_model, has_weights, prepare_folder, shipped_names

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}

LOOK = textwrap.dedent(
    """
    import json, sys
    from advisor.core.errors import AdvisorError
    from advisor.shell import hub

    name, weights, limit_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    hub.NETWORK_LIMIT_S = limit_s
    try:
        found = hub.find_model(name, weights)
    except AdvisorError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
    else:
        folder = found.folder and str(found.folder)
        tokenizer = found.tokenizer and str(found.tokenizer)
        print(json.dumps({"name": found.name, "config": found.config, "folder": folder, "tokenizer": tokenizer,
                          "source": found.source}))
    """
)


def look(name, home, *, weights="auto", limit_s=10.0, **environment):
    """`find_model` in a process of its own: the Hugging Face library reads its environment once, when imported."""
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(home), "HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, name, weights, str(limit_s)],
        env=environment,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def write_model(folder, config=TINY, *, weights=(), tokenizer=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    for name in weights:
        (folder / name).write_bytes(b"weights")
    if tokenizer:
        (folder / TOKENIZER).write_text("{}")
    return folder


def cache(home, repository, **contents):
    """A repository as the Hugging Face cache stores it; returns its snapshot."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abcd")
    return write_model(root / "snapshots" / "0123abcd", **contents)


# ---------------------------------------------------------------- folders


def test_a_folder_without_weights_is_served_with_dummies(tmp_path):
    found = find_model(str(write_model(tmp_path / "m", tokenizer=True)))
    assert (found.config, found.folder) == (TINY, None)
    assert found.tokenizer == tmp_path / "m" / TOKENIZER


def test_a_folder_with_weights_is_served_from_there_unless_dummies_are_asked_for(tmp_path):
    folder = write_model(tmp_path / "m", weights=["model.safetensors"])
    assert find_model(str(folder)).folder == folder
    assert find_model(str(folder), weights="dummy").folder is None


@pytest.mark.parametrize(
    ("files", "index", "complete"),
    [
        ([], None, False),
        (["model.safetensors"], None, True),
        (["model-00001-of-00002.safetensors"], None, False),
        (["a-00001-of-00002.safetensors"], ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"], False),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"], True),
    ],
)
def test_weights_count_only_when_all_of_them_are_there(tmp_path, files, index, complete):
    folder = write_model(tmp_path, weights=files)
    if index is not None:
        weight_map = {f"layer.{number}": name for number, name in enumerate(index)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert has_weights(folder) is complete


def test_a_damaged_index_means_no_weights(tmp_path):
    folder = write_model(tmp_path, weights=["model.safetensors"])
    (folder / "model.safetensors.index.json").write_text("[")
    assert not has_weights(folder)


def test_a_folder_without_a_configuration_is_a_bad_question(tmp_path):
    with pytest.raises(BadQuestion, match=r"holds no config\.json"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"3", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_an_unreadable_configuration_is_a_bad_question_that_names_the_file(tmp_path, content):
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(BadQuestion) as caught:
        find_model(str(tmp_path))
    assert str(tmp_path / CONFIG) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", " ", "./nowhere", "/nowhere/at/all", "a/b/c", "~nobody/x", "a\0b", "x" * 5000, "-q"]
)
def test_what_is_neither_folder_nor_id_is_a_bad_question_without_asking_anyone(name):
    with pytest.raises(BadQuestion, match="no such folder") as caught:
        find_model(name)
    assert "Qwen/Qwen2.5-0.5B" in str(caught.value)
    assert "network" not in str(caught.value)


# ---------------------------------------------------------------- shipped facts and the cache


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", "QWEN/qwen2.5-0.5B"])
def test_a_shipped_model_is_found_offline_by_its_id_or_its_last_part(tmp_path, name):
    found, _ = look(name, tmp_path, HF_HUB_OFFLINE="1")
    assert found["name"] == "Qwen/Qwen2.5-0.5B"
    assert (found["folder"], found["tokenizer"]) == (None, None)
    assert parameters(facts(found["name"], found["config"])) == 494_032_768


def test_cached_weights_of_a_shipped_model_are_used(tmp_path):
    snapshot = cache(tmp_path, "Qwen/Qwen2.5-0.5B", weights=["model.safetensors"])
    found, _ = look("qwen2.5-0.5b", tmp_path, HF_HUB_OFFLINE="1")
    assert (found["folder"], found["config"]) == (str(snapshot), TINY)


def test_a_cached_tokenizer_of_a_shipped_model_is_used_without_its_weights(tmp_path):
    snapshot = cache(tmp_path, "Qwen/Qwen2.5-0.5B", weights=["model.safetensors"], tokenizer=True)
    found, _ = look("qwen2.5-0.5b", tmp_path, weights="dummy", HF_HUB_OFFLINE="1")
    assert found["folder"] is None
    assert found["tokenizer"] == str(snapshot / TOKENIZER)
    assert found["config"]["hidden_size"] == 896


def test_a_model_that_is_only_in_the_cache_is_found_offline(tmp_path):
    cache(tmp_path, "some/model")
    found, _ = look("some/model", tmp_path, HF_HUB_OFFLINE="1")
    assert found["config"] == TINY
    assert "cache" in found["source"]


@pytest.mark.parametrize("name", ["nobody/knows-this", "double--dash", "x.git"])
def test_an_unknown_name_offline_is_a_bad_question_that_says_what_was_looked_at(tmp_path, name):
    answer, stderr = look(name, tmp_path, HF_HUB_OFFLINE="1")
    assert answer["exit_code"] == 2
    for words in (name, "no such folder", "shipped", "cache", "network", "Qwen/Qwen2.5-0.5B", "config.json"):
        assert words in answer["error"]
    assert "\n" not in answer["error"]
    assert "Retrying" not in stderr


# ---------------------------------------------------------------- the network


class Hub(BaseHTTPRequestHandler):
    """The two requests of a download, for one repository; every other name is unknown."""

    asked: ClassVar[list[str]]
    silent: threading.Event | None = None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.silent is not None:
            self.silent.wait(60)
            return
        self.asked.append(self.path)
        known = self.path == f"/some/model/resolve/main/{CONFIG}"
        known = known or self.path == f"/some/model/resolve/0123abcd0123abcd0123abcd0123abcd0123abcd/{CONFIG}"
        body = json.dumps(TINY).encode() if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        if known:
            self.send_header("ETag", '"1234"')
            self.send_header("X-Repo-Commit", "0123abcd" * 5)
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if "/some/model/" in self.path else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    class Handler(Hub):
        asked: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, Handler
    if Handler.silent is not None:
        Handler.silent.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def endpoint(server):
    return {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_model_on_the_network_gives_its_configuration_and_nothing_large(tmp_path, hub):
    server, handler = hub
    found, _ = look("some/model", tmp_path, **endpoint(server))
    assert found["config"] == TINY
    assert (found["folder"], found["tokenizer"]) == (None, None)
    assert "downloaded" in found["source"]
    assert {path.rsplit("/", 1)[-1] for path in handler.asked} <= {CONFIG, TOKENIZER}


def test_a_model_that_the_network_does_not_know_is_a_bad_question(tmp_path, hub):
    answer, _ = look("some/other", tmp_path, **endpoint(hub[0]))
    assert answer["exit_code"] == 2
    assert "the network gave none" in answer["error"]


def test_a_network_that_never_answers_is_given_up(tmp_path, hub):
    server, handler = hub
    handler.silent = threading.Event()
    answer, _ = look("some/model", tmp_path, limit_s=1.0, **endpoint(server))
    assert "no answer within 1 s" in answer["error"]


# ---------------------------------------------------------------- the folder that engines are started from


def test_the_folder_for_dummy_weights_holds_configuration_and_a_tokenizer_of_the_right_size(tmp_path):
    config = {
        **TINY,
        "auto_map": {"AutoModel": "code.Model"},
        "quantization_config": None,
        "head_dim": 32,
        "rope_theta": 1e6,
    }
    model = facts("m", config)
    folder = prepare_folder(model, None, tmp_path / "deep" / "folder")
    written = json.loads((folder / CONFIG).read_text())
    assert "auto_map" not in written
    assert "quantization_config" not in written
    assert written["rope_theta"] == 1e6
    again = facts("m", written)
    assert again.dtype == "bfloat16"
    assert again.head_dim == 32
    assert parameters(again) == parameters(model)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    assert tokenizer.get_vocab_size() == 1000
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]


def test_what_was_resolved_by_default_is_written_out(tmp_path):
    gemma = {**TINY, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    written = json.loads((prepare_folder(facts("m", gemma), None, tmp_path) / CONFIG).read_text())
    assert (written["tie_word_embeddings"], written["head_dim"], written["num_key_value_heads"]) == (True, 256, 4)


def test_an_fp8_configuration_is_kept_when_fp8_is_served(tmp_path):
    method = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    model = facts("m", {**TINY, "quantization_config": method})
    written = json.loads((prepare_folder(model, None, tmp_path) / CONFIG).read_text())
    assert written["quantization_config"] == method


def test_a_real_tokenizer_is_copied(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text('{"model": {"vocab": {}}}')
    folder = prepare_folder(facts("m", TINY), mine, tmp_path / "folder")
    assert (folder / TOKENIZER).read_text() == mine.read_text()


def test_a_vocabulary_too_small_for_a_tokenizer_is_unfit(tmp_path):
    with pytest.raises(Unfit, match="too small"):
        prepare_folder(facts("m", {**TINY, "vocab_size": 300}), None, tmp_path)


# ---------------------------------------------------------------- shipped files


def test_the_shipped_folders_are_found_from_the_code_alone():
    assert (resources.profiles_directory() / "vllm.yaml").is_file()
    assert resources.data_directory().name in ("data", "_data")
    assert "Qwen/Qwen2.5-3B" in shipped_names()


def test_a_missing_or_damaged_shipped_file_is_unfit(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "profiles_directory", lambda: tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("bad.yaml", "missing.yaml"):
        with pytest.raises(Unfit, match=name) as caught:
            resources.load_yaml(name)
        assert "\n" not in str(caught.value)
