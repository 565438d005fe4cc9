"""Time of our train step and of the official PyTorch step, measured in turn in one process.

    git clone https://github.com/facebookresearch/dino && pip install torch
    python benchmarks/against_dino.py --dino=dino --config=configs/dino.py:demo [--config.data.batch_size=64] [--rounds=20]

Both have the same model, batch and number of threads, and get finished views: augmentation is not measured. Network and head
are those of the clone. The loop around them does what a step of main_dino.py does (multi-crop forward, loss, center, backward,
clipping, AdamW, EMA), in float32 and without logging.
"""

import statistics
import sys
import time
from functools import partial

import jax
import numpy as np
import torch
from absl import app, flags
from ml_collections import config_flags

from mim_jax import init_state, make_method, make_train_step

CONFIG = config_flags.DEFINE_config_file("config", "configs/dino.py:demo", "Config file, with a variant after a colon.")
CLONE = flags.DEFINE_string("dino", "dino", "A clone of facebookresearch/dino.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "How often each step is timed.")


class Official:
    """A step of main_dino.py around the clone's network."""

    def __init__(self, config):
        sys.path.insert(0, CLONE.value)
        import vision_transformer as vits

        m, h = config.model, config.head

        def network():
            norm = partial(torch.nn.LayerNorm, eps=1e-6)
            backbone = vits.VisionTransformer(
                [m.img_size], m.patch_size, embed_dim=m.dim, depth=m.depth, num_heads=m.heads, qkv_bias=True, norm_layer=norm
            )
            head = vits.DINOHead(m.dim, h.out_dim, False, h.norm_last_layer, h.nlayers, h.hidden_dim, h.bottleneck_dim)
            return torch.nn.ModuleList([backbone, head])

        self.student, self.teacher = network(), network()
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=1e-4)
        self.center = torch.zeros(1, h.out_dim)

    @staticmethod
    def forward(network, groups):
        backbone, head = network
        return head(torch.cat([backbone(torch.cat(crops)) for crops in groups]))  # one pass for each resolution

    def step(self, groups):
        n_global, n = len(groups[0]), sum(map(len, groups))
        student = (self.forward(self.student, groups) / 0.1).chunk(n)
        logits = self.forward(self.teacher, groups[:1])
        teacher = torch.softmax((logits - self.center) / 0.04, dim=-1).detach().chunk(n_global)
        loss, terms = 0.0, 0
        for i, q in enumerate(teacher):
            for v, s in enumerate(student):
                if v != i:
                    loss = loss + torch.sum(-q * torch.log_softmax(s, dim=-1), dim=-1).mean()
                    terms += 1
        self.center = 0.9 * self.center + 0.1 * logits.mean(0, keepdim=True)
        self.optimizer.zero_grad()
        (loss / terms).backward()
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = 3.0 / (p.grad.norm() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters()):
                t.mul_(0.98).add_(s, alpha=0.02)
        return float(loss) / terms


def main(_: list[str]) -> None:
    config = CONFIG.value
    config.model.drop_path_rate, config.model.dtype = 0.0, "float32"
    method, rng = make_method(config), np.random.default_rng(0)
    state, frozen = init_state(method, config)
    train_step = make_train_step(method, config)
    shapes = [(config.data.batch_size, len(c.policies), c.size, c.size, 3) for c in method.crops]
    views = {c.name: rng.standard_normal(shape, np.float32) for c, shape in zip(method.crops, shapes)}
    groups = [[torch.from_numpy(x[:, i].transpose(0, 3, 1, 2).copy()) for i in range(x.shape[1])] for x in views.values()]
    views, official = jax.device_put(views), Official(config)

    ours, theirs = [], []
    for number in range(ROUNDS.value + 2):
        start = time.perf_counter()
        state, metrics = train_step(state, frozen, views)
        jax.block_until_ready(state)
        middle = time.perf_counter()
        official.step(groups)
        end = time.perf_counter()
        if number > 1:
            ours.append(middle - start)
            theirs.append(end - middle)
    ratios = [t / o for o, t in zip(ours, theirs)]
    images = config.data.batch_size
    print(f"jax {jax.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads, batch {images}")
    for name, seconds in (("ours", ours), ("official", theirs)):
        median = statistics.median(seconds)
        print(f"{name:<9} {median * 1e3:8.1f} ms  {images / median:8,.0f} images/s")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"official / ours, round by round: {statistics.median(ratios):.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    app.run(main)
