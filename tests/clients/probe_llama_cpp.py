"""Prints the logits of llama.cpp for Hugging Face directories, as JSON; probe_llama_cpp.py requests.json.

requests.json: {"source": DIR, "models": {NAME: {"folder": DIR, "options": {NAME: NUMBER}}}, "tokens": [...]}.
source: the unpacked archive of llama-cpp-python, with llama.cpp built in it. Each directory is converted by
llama.cpp's convert_hf_to_gguf.py. options: those of llama-server, --yarn-beta-fast and -slow by name and
--override-kv by key. For each model: float32 logits of the last tokens, base64.
"""

import base64
import json
import os
import runpy
import sys
from pathlib import Path

LAST = 64
F32 = 0  # GGML_TYPE_F32, for the cache of keys and values


def convert(llama_cpp: Path, folder: Path) -> Path:
    import conversion.base

    # Asked for by a hash of the tokenizer's output, which is known for published tokenizers only.
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
    file = folder / "model.gguf"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(file), "--outtype", "f32"]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")
    return file


def logits(file: Path, tokens: list[int], options: dict[str, float]) -> bytes:
    from llama_cpp import Llama

    model = Llama(
        str(file),
        n_ctx=len(tokens),
        n_batch=len(tokens),
        n_ubatch=len(tokens),
        logits_all=True,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        kv_overrides={key: value for key, value in options.items() if "." in key} or None,
        yarn_beta_fast=options.get("yarn-beta-fast", -1.0),
        yarn_beta_slow=options.get("yarn-beta-slow", -1.0),
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    model.eval(tokens)
    return model.scores[len(tokens) - LAST : len(tokens)].astype("float32").tobytes()


def main() -> None:
    requests = json.loads(Path(sys.argv[1]).read_text())
    source = Path(requests["source"])
    llama_cpp = source / "vendor" / "llama.cpp"
    os.environ["LLAMA_CPP_LIB_PATH"] = str(source / "build" / "bin")
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py"), str(source)]
    import llama_cpp as bindings

    results = {}
    for name, model in requests["models"].items():
        file = Path(model["folder"], "model.gguf")
        if not file.exists():
            convert(llama_cpp, file.parent)
        results[name] = base64.b64encode(logits(file, requests["tokens"], model["options"])).decode()
    print(json.dumps({"version": bindings.__version__, "results": results}))


if __name__ == "__main__":
    main()
