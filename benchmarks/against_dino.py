"""Our train step against the official PyTorch one, interleaved in one process: same model, batch, threads and ready views.

    git clone https://github.com/facebookresearch/dino && pip install torch
    python benchmarks/against_dino.py --dino=dino --config=configs/dino.py:demo [--config.data.batch_size=64] [--rounds=20]

The network and the head are the clone's; the loop around them does what main_dino.py does in a step (multi-crop forward,
loss, centre, backward, clipping, AdamW, EMA), in float32 and without its logging. Augmentation is on neither side.
"""

import statistics
import sys
from functools import partial

import jax
import numpy as np
import torch
from absl import app, flags
from step import CONFIG, ROUNDS, Step, interleaved

from mim_jax import make_method

CLONE = flags.DEFINE_string("dino", "dino", "A clone of facebookresearch/dino.")


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
        pairs = [(q, s) for i, q in enumerate(teacher) for v, s in enumerate(student) if v != i]
        loss = sum(torch.sum(-q * torch.log_softmax(s, dim=-1), dim=-1).mean() for q, s in pairs) / len(pairs)
        self.center = 0.9 * self.center + 0.1 * logits.mean(0, keepdim=True)
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = 3.0 / (p.grad.norm() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters()):
                t.mul_(0.98).add_(s, alpha=0.02)
        return float(loss)


def main(_: list[str]) -> None:
    config = CONFIG.value
    config.model.drop_path_rate, config.model.dtype = 0.0, "float32"
    method, rng, images = make_method(config), np.random.default_rng(0), config.data.batch_size
    shapes = method.views.shapes(images)
    views = {group.name: rng.standard_normal(shapes[group.name].shape, np.float32) for group in method.views.crops}
    groups = [[torch.from_numpy(x[:, i].transpose(0, 3, 1, 2).copy()) for i in range(x.shape[1])] for x in views.values()]
    ours, official = Step(method, config, jax.device_put(views)), Official(config)

    times = interleaved({"ours": ours, "official": lambda: official.step(groups)}, ROUNDS.value)
    ratios = [theirs / our for our, theirs in zip(*times.values())]
    print(f"jax {jax.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads, batch {images}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<9} {median * 1e3:8.1f} ms  {images / median:8,.0f} images/s")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"official / ours, round by round: {statistics.median(ratios):.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    app.run(main)
