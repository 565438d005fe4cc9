"""What a file of weights holds, and the encoder in it as a folder of ours.

  python -m mim_jax.convert dinov2_vits14_pretrain.pth                 says what is in it
  python -m mim_jax.convert dinov2_vits14_pretrain.pth --out=dinov2    writes the encoder to the folder dinov2
  python -m mim_jax.convert dinov2_vits14_pretrain.pth --channels=1 --images=FOLDER --out=grey    for images of one channel

With other channels than those of the file, the patch embedding is changed as timm does it, and the cosine of the features
before and after is printed, on the images of a folder, or on those of CIFAR-10 if they were fetched before.

Read are .safetensors, .npz, .pth, .pt, .bin and .ckpt, and folders of Hugging Face's, in the layouts of the official
repositories, timm, transformers, OpenAI's CLIP and open_clip. Nothing in a file is run, and torch is not needed. The same files
can be named directly: --config.init_from=FILE.
"""

import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from mim_jax import layouts, pretrained

OUT = flags.DEFINE_string("out", "", "Folder to write the encoder to.")
IMAGES = flags.DEFINE_string("images", "", "Folder of real images, or files joined by commas, to see what --channels changes.")
TOLD = {
    "encoder": flags.DEFINE_string("encoder", "", "What the names of the wanted encoder's tensors begin with."),
    "heads": flags.DEFINE_integer("heads", 0, "Number of attention heads."),
    "eps": flags.DEFINE_float("eps", 0.0, "Epsilon of the norms."),
    "act": flags.DEFINE_enum("act", "", ["", "gelu", "quick_gelu"], "Activation of the MLPs."),
    "positions": flags.DEFINE_enum("positions", "", ["", *layouts.POSITIONS], "How positions are resized."),
    "img_size": flags.DEFINE_integer("img_size", 0, "Side of the images, where positions do not show it."),
    "channels": flags.DEFINE_integer("channels", 3, "Channels of the images; 0: as many as the file is for.", lower_bound=0),
}


def change(before: layouts.Weights, after: layouts.Weights, named: str) -> str:
    """What other channels change: a line with the cosine of CLS (without such a token: the mean of the patches)."""
    try:
        source = pretrained.at_hand(named)
    except FileNotFoundError as error:
        if named:
            raise
        return f"what the other channels change is not measured: {error}"
    model = pretrained.Model(before.network, before.parts, before.settings["img_size"], "")
    images = model.seen(source, count=16)
    grey = np.repeat(np.asarray(pretrained.with_channels(images, 1)), 3, axis=-1)
    said = []
    for what, pictures in (("as they are", images), ("in grey", grey)):
        one, other = (
            np.asarray(jax.jit(w.network.features)(w.parts, pretrained.with_channels(pictures, len(w.mean)))["cls"])
            for w in (before, after)
        )
        cosine = np.sum(one * other, axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
        said.append(f"{cosine.mean():.4f} (least {cosine.min():.4f}) for the images {what}")
    return f"cosine of the features for {len(before.mean)} channels to those for {len(after.mean)}: {', '.join(said)}; " + (
        f"of {len(images)} images: {source.description}"
    )


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit(f"error: one file is wanted.\n\n{__doc__}")
    logging.set_verbosity(logging.WARNING)
    told: dict[str, Any] = {name: flag.value for name, flag in TOLD.items()}
    try:
        given = layouts.read(argv[1], layouts.Told(**told | {"channels": 0}))
        weights = layouts.for_channels(given, told["channels"])
        print("\n".join(weights.lines))
        if len(given.mean) != len(weights.mean):
            print(change(given, weights, IMAGES.value))
        if OUT.value:
            weights.save(OUT.value)
            print(f"written to {OUT.value}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
