"""Where a model comes from: a folder, the shipped facts, the local Hugging Face cache, or the network.

Nothing large is ever downloaded: from the network come `config.json` and `tokenizer.json` only.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from advisor.core.errors import BadQuestion, Unfit
from advisor.core.records import ModelFacts
from advisor.core.vocabulary import build_tokenizer
from advisor.shell.patience import NETWORK_S as NETWORK_LIMIT_S
from advisor.shell.resources import load_yaml, profiles_directory

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

_LARGEST_CONFIG_BYTES = 4 * 1024**2
_REPOSITORY = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?\Z", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model's configuration and what lies beside it.

    `folder` holds complete real weights, None when the model has to be served with dummy ones. `tokenizer` is a
    `tokenizer.json`, None when one has to be generated. `source` says in words where it was found.
    """

    name: str
    config: dict[str, Any]
    folder: Path | None
    tokenizer: Path | None
    source: str


def find_model(name: str, weights: Literal["auto", "dummy"] = "auto") -> Found:
    """Look for `name` in a folder, the shipped facts, the local cache and the network, in this order.

    `weights` "auto" uses real weights where they already are; "dummy" never does. Raises BadQuestion when the model
    is not found, or its config.json cannot be read; the message says what was looked at.
    """
    folder = _as_folder(name)
    if folder is not None:
        return _from_folder(name, folder, weights)
    looked = ["no such folder"]
    shipped = _shipped(name)
    repository = shipped.name if shipped else name
    if not _REPOSITORY.match(repository):
        raise _unknown(name, [*looked, "no Hugging Face id (OWNER/NAME) either"])
    cached = _from_cache(repository, weights)
    if cached is not None and cached.folder is not None:
        return cached
    if shipped is not None:
        tokenizer = cached.tokenizer if cached else None
        return Found(name=shipped.name, config=shipped.config, folder=None, tokenizer=tokenizer, source=shipped.source)
    looked.append("no shipped facts of that name")
    if cached is not None:
        return cached
    looked.append("not in the local Hugging Face cache")
    problem = _download(repository)
    downloaded = _from_cache(repository, weights) if problem is None else None
    if downloaded is None:
        raise _unknown(name, [*looked, f"the network gave none ({problem or 'nothing was stored'})"])
    return Found(
        name=repository,
        config=downloaded.config,
        folder=None,
        tokenizer=downloaded.tokenizer,
        source=f"downloaded from huggingface.co/{repository}",
    )


def shipped_names() -> list[str]:
    """The Hugging Face ids of the models in `profiles/models`."""
    return [str(load_yaml(f"models/{path.name}")["name"]) for path in _profiles()]


def prepare_folder(facts: ModelFacts, tokenizer: Path | None, destination: Path) -> Path:
    """Write what an engine with dummy weights is started from: configuration and tokenizer, no weights.

    Without `tokenizer` one of the right vocabulary is generated. Raises Unfit when that is too small.
    """
    destination.mkdir(parents=True, exist_ok=True)
    _write(destination / CONFIG, served_config(facts))
    if tokenizer is None:
        try:
            generated, tokenizer_config = build_tokenizer(facts.vocab_size)
        except ValueError as error:
            raise Unfit(f"{facts.name}: {error}; give a folder with its {TOKENIZER}") from None
        _write(destination / TOKENIZER, generated)
    else:
        shutil.copyfile(tokenizer, destination / TOKENIZER)
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**9}
    _write(destination / "tokenizer_config.json", tokenizer_config)
    return destination


def served_config(facts: ModelFacts) -> dict[str, Any]:
    """The config.json for dummy weights: the model's own, with what was resolved written out.

    Left out is what needs files that are not there: remote code, and a quantization that is not served.
    """
    config = {key: value for key, value in facts.config.items() if key != "auto_map"}
    if facts.quantization is None:
        config.pop("quantization_config", None)
    config.pop("dtype", None)
    config["torch_dtype"] = facts.dtype
    config["num_key_value_heads"] = facts.kv_heads
    config["tie_word_embeddings"] = facts.tied_embeddings
    if facts.head_dim * facts.heads != facts.hidden_size:
        config["head_dim"] = facts.head_dim
    return config


def _as_folder(name: str) -> Path | None:
    """`name` as an existing folder; None when it is none, cannot be looked at, or is no possible path."""
    try:
        folder = Path(name).expanduser().resolve()
        return folder if name.strip() and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _from_folder(name: str, folder: Path, weights: Literal["auto", "dummy"]) -> Found:
    path = folder / CONFIG
    if not path.is_file():
        raise BadQuestion(f"the folder {name} holds no {CONFIG}; give a model's folder, or one of: {_list_shipped()}")
    real = weights == "auto" and has_weights(folder)
    tokenizer = folder / TOKENIZER
    return Found(
        name=name,
        config=_read_config(path),
        folder=folder if real else None,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        source=f"folder {folder}",
    )


def has_weights(folder: Path) -> bool:
    """Whether all of a model's safetensors files are there; a download that was broken off does not count."""
    files = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        # Shards without their index are the remains of a download: "model-00001-of-00004.safetensors".
        return bool(files) and not any(re.search(r"-\d+-of-\d+\.safetensors\Z", name) for name in files)
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return bool(shards) and shards <= files


@dataclass(frozen=True)
class _Shipped:
    name: str
    config: dict[str, Any]
    source: str


def _profiles() -> list[Path]:
    return sorted((profiles_directory() / "models").glob("*.yaml"))


def _shipped(name: str) -> _Shipped | None:
    """A shipped model by its Hugging Face id or the last part of it, in any case."""
    for path in _profiles():
        document = load_yaml(f"models/{path.name}")
        full = str(document["name"])
        if name.lower() in (full.lower(), full.lower().rsplit("/", 1)[-1]):
            return _Shipped(full, document["config"], f"shipped facts models/{path.name}")
    return None


def _from_cache(repository: str, weights: Literal["auto", "dummy"]) -> Found | None:
    from huggingface_hub import try_to_load_from_cache  # slow to import; a folder does not need it

    try:
        config = try_to_load_from_cache(repository, CONFIG)
    except ValueError:  # the library's own rules for ids are stricter than ours
        return None
    if not isinstance(config, str):
        return None
    found = _from_folder(repository, Path(config).parent, weights)
    return Found(
        name=repository,
        config=found.config,
        folder=found.folder,
        tokenizer=found.tokenizer,
        source=f"local Hugging Face cache {Path(config).parent}",
    )


def _download(repository: str) -> str | None:
    """Fetch the two small files into the cache. Returns why that failed, None when the configuration is there.

    The library retries for far longer than a person waits, so it works in a thread that is left behind in time.
    """
    outcome: list[str | None] = []

    def fetch() -> None:
        from huggingface_hub import hf_hub_download

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news: the result is told
        try:
            hf_hub_download(repository, CONFIG, etag_timeout=NETWORK_LIMIT_S)
        except Exception as error:  # the library raises its own, its HTTP client's and the system's errors
            outcome.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            return
        try:
            hf_hub_download(repository, TOKENIZER, etag_timeout=NETWORK_LIMIT_S)
        except Exception as error:  # no tokenizer is no failure: one is generated
            logging.getLogger(__name__).info("no %s of %s: %s", TOKENIZER, repository, error)
        outcome.append(None)

    thread = threading.Thread(target=fetch, daemon=True, name="hub")
    thread.start()
    thread.join(NETWORK_LIMIT_S)
    return outcome[0] if outcome else f"no answer within {NETWORK_LIMIT_S:.0f} s"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise BadQuestion(f"{path} is larger than {_LARGEST_CONFIG_BYTES} bytes: that is no model configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadQuestion(f"{path} cannot be read as JSON ({str(error)[:160]}); repair or replace it") from None
    if not isinstance(config, dict):
        raise BadQuestion(f"{path} must hold a JSON object, found {type(config).__name__}; repair or replace it")
    return config


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _list_shipped() -> str:
    return ", ".join(shipped_names())


def _unknown(name: str, looked: list[str]) -> BadQuestion:
    return BadQuestion(
        f"unknown model {name[:200]!r}: {'; '.join(looked)}. Give a folder with its {CONFIG}, or one of the shipped "
        f"models: {_list_shipped()}"
    )
