"""What a file of weights holds, and the encoder in it as a folder of ours.

  python -m mim_jax.convert dinov2_vits14_pretrain.pth                 says what is in it
  python -m mim_jax.convert dinov2_vits14_pretrain.pth --out=dinov2    writes the encoder to the folder dinov2
  python -m mim_jax.convert dinov2_vits14_pretrain.pth --channels=1 --images=FOLDER --out=grey    for images of one channel

With other channels than those of the file, the patch embedding is changed as timm does it, and the cosine of the features
before and after is printed, on the images of a folder, or on those of CIFAR-10 if they were fetched before.

What no tensor shows is asked for and can be given: --heads=6 --eps=1e-6 --act=gelu or quick_gelu, --positions=dino, size or
antialiased (how they are resized for images of another size), --img_size=192 (of a Swin, or with rotary positions),
--encoder=teacher (the beginning of the names of one of several), --without=cls,norm (parts that the network does not have).

Read are .safetensors, .npz, .pth, .pt, .bin and .ckpt, and folders of Hugging Face's, in the layouts of the official
repositories, timm, transformers, OpenAI's CLIP and open_clip. Nothing in a file is run, and torch is not needed. The same files
can be named directly: --config.init_from=FILE.
"""

import dataclasses
import sys
from typing import Literal

import jax
import numpy as np

from mim_jax import cli, journal, layouts, pretrained


@dataclasses.dataclass(frozen=True)
class Flags:
    out: str = ""
    images: str = ""
    encoder: str = ""
    heads: int = 0
    eps: float = 0.0
    act: Literal["", "gelu", "quick_gelu"] = ""
    positions: Literal["", "dino", "size", "antialiased"] = ""
    img_size: int = 0
    channels: int = 3
    without: str = ""


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
    given, files = cli.begin(Flags, argv, __doc__ or "", "FILE")
    with cli.in_one_line("stopped"):
        if len(files) > 1:
            raise ValueError(f"one file is wanted, not {' '.join(files)}")
        out = cli.of_this_machine("out", given.out, "folder") if given.out else None
        if out:
            journal.fresh_folder(out)
        told = {name: value for name, value in dataclasses.asdict(given).items() if name in layouts.Told._fields}
        before = layouts.read(files[0], layouts.Told(**told | {"channels": 0}))
        weights = layouts.for_channels(before, given.channels)
        print("\n".join(weights.lines))
        if len(before.mean) != len(weights.mean):
            print(change(before, weights, given.images))
        if out:
            weights.save(out)
            print(f"written to {out}")


if __name__ == "__main__":
    main(sys.argv)
