"""MoCo v3: an empirical study of training self-supervised vision transformers (Chen et al. 2021, arXiv:2104.02057).

A query of one view must find the key of the other view of its image among the keys of the batch. Keys come from an average of
the encoder, which follows it before they are computed; the patch embedding stays as it is drawn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import losses
from mim_jax.data.augment import Crops, Policy
from mim_jax.methods.base import BackboneMethod, Params, make_views, vit_settings
from mim_jax.models.heads import BatchNormMlp
from mim_jax.models.vit import ViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3(BackboneMethod):
    backbone: ViT
    projector: BatchNormMlp
    predictor: BatchNormMlp
    temperature: float
    teacher_parts: tuple[str, ...] = ("backbone", "projector")
    teacher_first: bool = True
    untrained: str = r"pos_embed$|patch_embed/"

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        keys = jax.random.split(key, 3)
        backbone = self.backbone.init(keys[0], [self.views.zeros()["global"]])["params"]
        qkv = backbone["blocks"]["qkv"]
        # queries, keys and values are three matrices to Xavier's bound: sqrt(6 / (D + D)), not sqrt(6 / (D + 3 * D))
        blocks = backbone["blocks"] | {"qkv": qkv | {"kernel": qkv["kernel"] * 2**0.5}}
        projector = self.projector.init(keys[1], jnp.zeros((1, self.backbone.dim)))
        predictor = self.predictor.init(keys[2], jnp.zeros((1, self.projector.out_dim)))
        params = {
            "backbone": backbone | {"blocks": blocks},
            "projector": projector["params"],
            "predictor": predictor["params"],
        }
        student = {"projector": projector["batch_stats"], "predictor": predictor["batch_stats"]}
        teacher = {"projector": jax.tree.map(jnp.copy, projector["batch_stats"])}
        return params, {"student_stats": student, "teacher_stats": teacher}

    def loss(self, params, teacher, target, extra, views, key, step):
        queries, student = self.outputs(params, extra["student_stats"], views, key)
        keys, averaged = self.outputs(teacher, extra["teacher_stats"], views)
        pairs = [losses.info_nce(queries[i], keys[1 - i], self.temperature) for i in range(2)]
        metrics = {"train/contrastive_accuracy": (pairs[0][1] + pairs[1][1]) / 2}
        return pairs[0][0] + pairs[1][0], ({"student_stats": student, "teacher_stats": averaged}, metrics)

    def outputs(
        self, params: Params, stats: Params, views: Params, key: jax.Array | None = None
    ) -> tuple[list[jax.Array], Params]:
        """([B, out_dim] for each view, new running statistics) of the student (with a `key`) or the teacher, which has no
        predictor. Batch normalisation sees one view at a time; its statistics are always those of the batch."""
        frozen = jax.lax.stop_gradient(params["backbone"]["patch_embed"])
        params = params | {"backbone": params["backbone"] | {"patch_embed": frozen}}
        cls = self.encoded(params, views["global"], key)["cls"]
        out = []
        for view in range(2):
            x = cls[:, view]
            for part in [part for part in ("projector", "predictor") if part in params]:
                variables = {"params": params[part], "batch_stats": stats[part]}
                x, updates = getattr(self, part).apply(variables, x, mutable="batch_stats")
                stats = stats | {part: updates["batch_stats"]}
            out.append(x)
        return out, stats


def make(config: ml_collections.ConfigDict) -> MoCoV3:
    c, m = config.crops, config.model
    if c.global_crops_number != 2:
        raise ValueError(f"MoCo v3 compares two views, but crops.global_crops_number is {c.global_crops_number}")
    policy = functools.partial(Policy, blur_radius=tuple(c.blur_radius))
    policies = policy(blur=1.0), policy(blur=0.1, solarize=0.2)
    crops = Crops("global", m.img_size, tuple(c.global_crops_scale), policies, interpolation="bilinear")
    xavier = jax.nn.initializers.xavier_uniform()
    head = functools.partial(BatchNormMlp, **config.head, dtype=jnp.dtype(m.dtype))
    return MoCoV3(
        views=make_views(config, crops),
        backbone=ViT(
            **vit_settings(m),
            pos="sincos_row_first",
            kernel_init=xavier,
            patch_init=xavier,
            patch_bias_init=jax.nn.initializers.zeros,
            token_init=jax.nn.initializers.normal(1e-6),
        ),
        projector=head(3),
        predictor=head(2),
        temperature=config.loss.temperature,
    )
