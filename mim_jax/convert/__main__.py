"""What a file of weights holds, and the encoder in it as a folder of ours.

  python -m mim_jax.convert dinov2_vits14_pretrain.pth                 says what is in it
  python -m mim_jax.convert dinov2_vits14_pretrain.pth --out=dinov2    writes the encoder to the folder dinov2

Read are .safetensors, .npz, .pth, .pt, .bin and .ckpt, and folders of Hugging Face's, in the layouts of the official
repositories, timm, transformers, OpenAI's CLIP and open_clip. Nothing in a file is run, and torch is not needed. The same files
can be named directly: --config.init_from=FILE.
"""

import sys
from typing import Any

from absl import app, flags

from mim_jax import layouts

OUT = flags.DEFINE_string("out", "", "Folder to write the encoder to.")
TOLD = {
    "encoder": flags.DEFINE_string("encoder", "", "What the names of the wanted encoder's tensors begin with."),
    "heads": flags.DEFINE_integer("heads", 0, "Number of attention heads."),
    "eps": flags.DEFINE_float("eps", 0.0, "Epsilon of the norms."),
    "act": flags.DEFINE_enum("act", "", ["", "gelu", "quick_gelu"], "Activation of the MLPs."),
    "positions": flags.DEFINE_enum("positions", "", ["", *layouts.POSITIONS], "How positions are resized."),
    "img_size": flags.DEFINE_integer("img_size", 0, "Side of the images, where positions do not show it."),
}


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit(f"error: one file is wanted.\n\n{__doc__}")
    told: dict[str, Any] = {name: flag.value for name, flag in TOLD.items()}
    try:
        weights = layouts.read(argv[1], layouts.Told(**told))
        print("\n".join(weights.lines))
        if OUT.value:
            weights.save(OUT.value)
            print(f"written to {OUT.value}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
