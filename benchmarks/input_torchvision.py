"""The torchvision side of `input.py`, in a process of its own: folder, sizes of the crops, number of the local ones.

Each line of the input names what to do with all files, and is answered by [seconds of the clock, seconds of the CPU].
"""

import json
import platform
import random
import sys
import time
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

folder, global_size, local_size, local_number = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)


def sometimes(probability, operation):
    return T.Lambda(lambda image: operation(image) if random.random() < probability else image)


def view(size, scale, blur, solarize=0.0):
    """DINO's operations in its order, with torchvision's own transforms."""
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            sometimes(blur, lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))),
            sometimes(solarize, ImageOps.solarize),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def read(path):
    with Image.open(path) as image:
        return image.convert("RGB")


paths = sorted(Path(folder).iterdir())
pictures = [read(path) for path in paths]
views = [view(global_size, (0.25, 1.0), 1.0), view(global_size, (0.25, 1.0), 0.1, 0.2)]
views += [view(local_size, (0.05, 0.25), 0.5)] * local_number
programs = {
    "decoding": lambda: [read(path) for path in paths],
    "augmentation": lambda: [[make(picture) for make in views] for picture in pictures],
}
versions = f"torchvision {torchvision.__version__}, torch {torch.__version__}"
print(f"{versions}, Pillow {PIL.__version__}, Python {platform.python_version()}", flush=True)
for line in sys.stdin:
    clock, cpu = time.perf_counter(), time.process_time()
    programs[line.strip()]()
    print(json.dumps([time.perf_counter() - clock, time.process_time() - cpu]), flush=True)
