"""Resolve the model that the user named: a short name, a hub id, or a folder."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from qunlearn.errors import ConfigError, ModelError


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    `params_b` is the number of parameters in billions, tied embeddings counted once. `gated` models ask for a
    licence to be accepted on the hub before the first download. `hub_id` is empty for the embedded sandbox.
    """

    name: str
    hub_id: str
    params_b: float
    gated: bool = False
    note: str = ""


SANDBOX = "sandbox"
_ASSETS = Path(__file__).resolve().parent.parent / "sandbox" / "assets"
SANDBOX_FOLDER = _ASSETS / "model"
GOLD = "sandbox-gold"  # the sandbox that was never shown what it is to forget: a reference, nothing to work on
_EMBEDDED = {SANDBOX: SANDBOX_FOLDER, GOLD: _ASSETS / "gold"}

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w([\w.-]*\w)?", re.ASCII)

# The hub's main branch of these has held pickled weights alone, which are never opened here.
_PICKLED = "may need --revision refs/pr/N, the hub's safetensors conversion"

_MODELS = (
    KnownModel(SANDBOX, "", 0.002, note="the tiny embedded model of the demo and the tests"),
    KnownModel("llama-7b", "huggyllama/llama-7b", 6.74, note="the first Llama"),
    KnownModel("llama-13b", "huggyllama/llama-13b", 13.02, note="the first Llama"),
    KnownModel("llama-70b", "meta-llama/Llama-2-70b-hf", 68.98, gated=True, note="Llama 2; for several GPUs"),
    KnownModel("llama-2-7b", "meta-llama/Llama-2-7b-hf", 6.74, gated=True),
    KnownModel("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 6.74, gated=True, note="chat"),
    KnownModel("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8.03, gated=True),
    KnownModel("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 8.03, gated=True, note="chat"),
    KnownModel("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 1.24, gated=True),
    KnownModel("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1.24, gated=True, note="chat"),
    KnownModel("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 3.21, gated=True),
    KnownModel("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 3.21, gated=True, note="chat"),
    KnownModel("mistral-7b", "mistralai/Mistral-7B-v0.3", 7.25, gated=True),
    KnownModel("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", 7.25, gated=True, note="chat"),
    KnownModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 0.49),
    KnownModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", 1.54),
    KnownModel("qwen2.5-3b", "Qwen/Qwen2.5-3B", 3.09),
    KnownModel("qwen2.5-7b", "Qwen/Qwen2.5-7B", 7.62),
    KnownModel("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 7.62, note="chat"),
    KnownModel("qwen2.5-coder-7b", "Qwen/Qwen2.5-Coder-7B", 7.62, note="code"),
    KnownModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", 0.60, note="chat"),
    KnownModel("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1.72, note="chat"),
    KnownModel("qwen3-4b", "Qwen/Qwen3-4B", 4.02, note="chat"),
    KnownModel("qwen3-8b", "Qwen/Qwen3-8B", 8.19, note="chat"),
    KnownModel("gemma-2b", "google/gemma-2b", 2.51, gated=True),
    KnownModel("gemma-2-2b", "google/gemma-2-2b", 2.61, gated=True),
    KnownModel("gemma-2-9b", "google/gemma-2-9b", 9.24, gated=True),
    KnownModel("phi-2", "microsoft/phi-2", 2.78),
    KnownModel("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", 3.82, note="chat"),
    KnownModel("opt-1.3b", "facebook/opt-1.3b", 1.32, note=_PICKLED),
    KnownModel("opt-2.7b", "facebook/opt-2.7b", 2.65, note=_PICKLED),
    KnownModel("gpt2", "openai-community/gpt2", 0.124),
    KnownModel("pythia-1.4b", "EleutherAI/pythia-1.4b", 1.41),
    KnownModel("pythia-2.8b", "EleutherAI/pythia-2.8b", 2.78),
    KnownModel("pythia-6.9b", "EleutherAI/pythia-6.9b", 6.86),
    KnownModel("codellama-7b", "codellama/CodeLlama-7b-hf", 6.74, note="code"),
    KnownModel("deepseek-coder-6.7b", "deepseek-ai/deepseek-coder-6.7b-base", 6.74, note="code"),
    KnownModel("starcoder2-3b", "bigcode/starcoder2-3b", 3.03, note="code"),
    KnownModel("olmo-7b", "allenai/OLMo-7B-hf", 6.89),
    KnownModel("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1.10, note="chat"),
    KnownModel("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", 1.71),
)

SHORT_NAMES: dict[str, KnownModel] = {model.name: model for model in _MODELS}

_BY_HUB_ID = {model.hub_id.lower(): model for model in _MODELS if model.hub_id}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is. `kind`: folder, hub or sandbox; `location`: an absolute folder path or a hub id."""

    asked: str
    kind: str
    location: str
    revision: str | None = None
    short_name: str | None = None

    @property
    def base_id(self) -> str:
        """Return what an adapter's `base_model_name_or_path` should say: the 16-bit model, or the folder."""
        if self.kind == "hub" and self.location.startswith("unsloth/"):
            # This organisation's 4-bit mirrors are named after their 16-bit repositories.
            return re.sub(r"(-unsloth)?-bnb-4bit$", "", self.location)
        return self.location


def resolve_model(name: str, revision: str | None = None, *, flag: str = "--model", typed: bool = True) -> ModelSource:
    """An existing folder, else a short name, else a hub id ORG/NAME; nothing is downloaded.

    flag: where the name was given, for what is said of it. typed: a person gave the name, so ORG/NAME with a folder ORG
    here is a mistyped path unless a revision says that the hub is meant; records and adapters mean what they say.
    Raises ModelError for a folder that is not there and a name nobody knows, ConfigError for a folder with a revision.
    """
    asked = name.strip()
    path = _expand(asked)
    known = known_model(asked)
    on_disk = _on_disk(path) if asked else "nothing"
    if on_disk == "folder":
        source = ModelSource(asked, "folder", str(path.resolve()))
    elif asked.lower() in _EMBEDDED:
        source = ModelSource(asked, "sandbox", str(_EMBEDDED[asked.lower()]), short_name=known.name if known else None)
    elif known is not None:
        return ModelSource(asked, "hub", known.hub_id, revision, known.name)
    elif on_disk in ("file", "closed") or _looks_like_path(asked):
        raise _no_such_folder(asked, path, on_disk)
    elif _HUB_ID.fullmatch(asked) and len(asked) <= 96:
        if typed and revision is None and _on_disk(path.parent) == "folder":
            raise _no_such_folder(asked, path, on_disk)
        return ModelSource(asked, "hub", asked, revision)
    else:
        what = f"unknown model {asked!r}" if asked else "no model was named"
        raise ModelError(what, where=flag, hint=_beside(path) + suggestion(asked))
    if revision is not None:
        hint = "leave --revision out, or give a hub id"
        raise ConfigError(f"a {source.kind} has no revisions", where="--revision", hint=hint)
    return source


def known_model(name: str) -> KnownModel | None:
    """The model of this short name or hub id, in any case of letters; None when it is in no row."""
    return SHORT_NAMES.get(name.lower()) or _BY_HUB_ID.get(name.lower())


def close_names(name: str) -> list[str]:
    """At most three short names that look like `name`, the closest first."""
    # "org/" and separators are what people vary; only what is left tells the models apart.
    plain = {_plain(short): short for short in SHORT_NAMES}
    return [plain[hit] for hit in difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.6)]


def suggestion(asked: str) -> str:
    """Return what to type instead of a name nobody knows."""
    close = close_names(asked)
    meant = f"did you mean {', '.join(close)}? " if close else ""
    return f"{meant}see `qunlearn models`; or give a folder, or a hub id ORG/NAME"


def _expand(asked: str) -> Path:
    try:
        return Path(asked).expanduser()
    except RuntimeError:  # ~nobody
        return Path(asked)


def _on_disk(path: Path) -> str:
    """folder, file, closed (behind a folder that may not be entered) or nothing, as is a name too long."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else "nothing"
    except PermissionError:
        return "closed"
    except (OSError, ValueError):
        return "nothing"


def _looks_like_path(asked: str) -> bool:
    return asked.startswith((".", "/", "~", "\\")) or asked.count("/") + asked.count("\\") > 1


def _beside(path: Path) -> str:
    """The folders most like a path that leads nowhere, as the beginning of a hint; empty where none is like it."""
    try:
        # A folder of thousands is still listed in milliseconds; a closed one has no names to offer.
        here = sorted(child.name for child in path.parent.iterdir() if child.is_dir())
    except (OSError, ValueError):
        return ""
    lower = {name.lower(): name for name in here if not name.startswith(".")}
    close = [str(path.parent / lower[hit]) for hit in difflib.get_close_matches(path.name.lower(), lower, 3, 0.6)]
    return f"did you mean {', '.join(close)}? " if close else ""


def _no_such_folder(asked: str, path: Path, on_disk: str) -> ModelError:
    like_an_id = bool(_HUB_ID.fullmatch(asked))
    hint = _beside(path) + "check the path; a model on the hub is ORG/NAME"
    if like_an_id:
        hint = f"{_beside(path) or 'check the path; '}if the hub's {asked} is meant, add --revision main"
    on_hub = re.search(r"(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", asked)
    if on_hub:
        return ModelError("an address, not a folder", where=asked, hint=f"give the hub id: {on_hub[1]}")
    if on_disk == "closed":
        return ModelError(
            "cannot be reached: Permission denied",
            where=str(path),
            hint="check the permissions of the folders above it",
        )
    if on_disk == "file":
        hint = "give the folder that holds config.json, the weights and the tokenizer"
        if path.suffix == ".gguf":
            hint = f"GGUF is for inference; {hint} of the original model"
        return ModelError("a file, not a model folder", where=str(path), hint=hint)
    what = f"no such folder in the folder {path.parent}" if like_an_id else "no such folder"
    return ModelError(what, where=str(path), hint=hint)


def _plain(name: str) -> str:
    return name.lower().rsplit("/", 1)[-1].replace("-", "").replace("_", "").replace(" ", "")
