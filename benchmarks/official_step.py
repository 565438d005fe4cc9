"""The training step of an official repository. benchmarks/against_official.py starts this file, and asks for each step.

    python official_step.py METHOD REPO FOLDER [--compile]

FOLDER has config.json, a recipe with the values of its schedules under `now`, and views.npz. Networks, losses, optimizers,
parameter groups and clipping are the clone's; a function below puts them together as its loop does, without the logging.
The first weights go to FOLDER/<part>.npz. Then each line on standard input is answered by one with a step's wall seconds, CPU
seconds and loss, and the CPU seconds that were used since the answer before.
"""

import json
import logging
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

# Clones import these, but no step uses them; timm and torch have dropped some.
UNUSED = ("einops", "evaluation.unsupervised.unsup_cls", "requests", "tensorboardX", "timm.optim.novograd", "torch._six")
ALONE = SimpleNamespace(all_reduce=lambda tensor: None, get_world_size=lambda: 1)  # torch.distributed with one process
NORM = partial(torch.nn.LayerNorm, eps=1e-6)


def network_of(c):
    m = c.model
    sizes = {name: getattr(m, name) for name in ("img_size", "patch_size", "depth", "mlp_ratio")}
    return sizes | dict(embed_dim=m.dim, num_heads=m.heads)


def head_of(head):
    return {name: getattr(head, name) for name in ("out_dim", "hidden_dim", "bottleneck_dim", "nlayers")}


def adamw(groups, c):
    """With the rates that the loops set before each step; a group without weight decay has none."""
    optimizer = torch.optim.AdamW(groups, betas=(c.optim.beta1, c.optim.beta2), eps=c.optim.eps)
    for group in optimizer.param_groups:
        group["lr"] = c.now.lr * group.get("lr_multiplier", 1)
        group["weight_decay"] = c.now.weight_decay * group.get("wd_multiplier", 1) if group["weight_decay"] else 0
    return optimizer


def begin_alike(student, teacher):
    """Copies weights. Returns the pairs of a student's parameter and the teacher's."""
    teacher.load_state_dict(student.state_dict(), strict=False)
    twins = dict(teacher.requires_grad_(False).named_parameters())
    return [(p, twins[name]) for name, p in student.named_parameters() if name in twins]


def update_of_dino(utils, c, student, pairs):
    """What DINO and iBOT do with a loss."""
    optimizer, m = adamw(utils.get_params_groups(student), c), c.now.momentum_teacher

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, c.optim.clip_grad)
        optimizer.step()
        with torch.no_grad():
            for q, k in pairs:
                k.mul_(m).add_((1 - m) * q)

    return update


def dino(c, views):
    import main_dino
    import utils
    import vision_transformer as vits

    main_dino.dist = ALONE
    size = network_of(c) | dict(img_size=[c.model.img_size], qkv_bias=True, norm_layer=NORM)

    def network(norm_last_layer):
        head = main_dino.DINOHead(c.model.dim, norm_last_layer=norm_last_layer, **head_of(c.head))
        return utils.MultiCropWrapper(vits.VisionTransformer(**size), head)

    student, teacher = network(c.head.norm_last_layer), network(True)
    pairs, crops, temp = begin_alike(student, teacher), views["global"] + views["local"], c.now.teacher_temp
    criterion = main_dino.DINOLoss(c.head.out_dim, len(crops), temp, temp, 0, 1, c.loss.student_temp, c.loss.center_momentum)

    def loss():
        targets = teacher(crops[:2])
        return criterion(student(crops), targets, 0)

    return {"student": student}, loss, update_of_dino(utils, c, student, pairs)


def ibot(c, views):
    import main_ibot
    import utils
    from models.vision_transformer import VisionTransformer

    main_ibot.dist = ALONE
    size = network_of(c) | dict(img_size=[c.model.img_size], qkv_bias=True, norm_layer=NORM, return_all_tokens=True)
    patches = c.head.patch_out_dim or c.head.out_dim

    def network(shared, masked, norm_last_layer):
        more = dict(patch_out_dim=patches, norm_last_layer=norm_last_layer, shared_head=shared)
        head = main_ibot.iBOTHead(c.model.dim, **head_of(c.head), **more)
        return utils.MultiCropWrapper(VisionTransformer(**size, masked_im_modeling=masked), head)

    student = network(not c.head.patch_out_dim, True, c.head.norm_last_layer)
    teacher = network(c.loss.shared_head_teacher, False, True)
    pairs, crops, small, o = begin_alike(student, teacher), views["global"], views["local"], c.loss
    masks = [mask.reshape(len(mask), *[round(mask.shape[1] ** 0.5)] * 2) for mask in views["mask"]]
    temps = [c.now.teacher_temp] * 2 + [c.now.teacher_patch_temp] * 2
    more = (o.student_temp, o.center_momentum, o.patch_center_momentum, o.cls_weight, o.patch_weight)
    criterion = main_ibot.iBOTLoss(c.head.out_dim, patches, len(crops), len(small), *temps, 0, 1, *more)

    def loss():
        targets = teacher(crops)
        out = student(crops, mask=masks)
        student.backbone.masked_im_modeling = False
        local = student(small)[0]
        student.backbone.masked_im_modeling = True
        return criterion(out, targets, local, masks, 0)["loss"]

    return {"student": student}, loss, update_of_dino(utils, c, student, pairs)


def dinov2(c, views):
    """Without xformers the student sees its two sizes of crops one after the other."""
    from dinov2.layers import DINOHead
    from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
    from dinov2.models.vision_transformer import DinoVisionTransformer
    from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay

    size = network_of(c) | dict(img_size=c.crops.global_crops_size, init_values=c.model.layerscale, block_chunks=0)
    separate = c.loss.separate_head

    def network():
        heads = {"dino_head": DINOHead(c.model.dim, **head_of(c.head))}
        heads |= {"ibot_head": DINOHead(c.model.dim, **head_of(c.ibot_head))} if separate else {}
        return torch.nn.ModuleDict({"backbone": DinoVisionTransformer(**size), **heads})

    student, teacher = network(), network().eval()
    queries, keys = zip(*begin_alike(student, teacher))
    groups = [get_params_groups_with_decay(m, c.optim.layer_decay, c.optim.patch_embed_lr) for m in student.values()]
    fused = [dict(group, foreach=True) for each in groups for group in fuse_params_groups(each)]
    optimizer, temp, momentum = adamw(fused, c), c.now.teacher_temp, c.now.momentum_teacher
    cls_loss = DINOLoss(c.head.out_dim, c.loss.student_temp, c.loss.center_momentum)
    patch_loss = iBOTPatchLoss((c.ibot_head if separate else c.head).out_dim, c.loss.student_temp, c.loss.center_momentum)
    koleo = KoLeoLoss()

    crops, small, masks, local = (
        torch.cat(views["global"]),
        torch.cat(views["local"]),
        torch.cat(views["mask"]),
        len(views["local"]),
    )
    places, terms = masks.flatten().nonzero().flatten(), 2 + 2 * local
    weight, number = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks], len(places)

    def heads(network, cls, patch):
        """Logits of CLS tokens and of the masked patches; the head sees as many rows of these as there can be."""
        rows = patch.new_zeros(c.now.upper, patch.shape[-1])
        rows[:number] = patch.flatten(0, 1).index_select(0, places)
        if separate:
            return network.dino_head(cls), network.ibot_head(rows)[:number]
        out = network.dino_head(torch.cat((cls, rows)))
        return out[: len(cls)], out[len(cls) :][:number]

    def targets():
        out = teacher.backbone(crops, is_training=True)
        cls = torch.cat(out["x_norm_clstoken"].chunk(2)[::-1])  # the other crop's, for the pairs of global crops
        cls, patch = heads(teacher, cls, out["x_norm_patchtokens"])
        balanced = cls_loss.softmax_center_teacher(cls, temp), patch_loss.softmax_center_teacher(patch[None], temp)[0]
        cls_loss.update_center(cls)
        patch_loss.update_center(patch[None])
        return balanced

    def loss():
        with torch.no_grad():
            cls_targets, patch_targets = targets()
        out = student.backbone(crops, masks=masks, is_training=True)
        tokens = student.backbone(small, is_training=True)["x_norm_clstoken"], out["x_norm_clstoken"]
        cls, patch = heads(student, torch.cat(tokens), out["x_norm_patchtokens"])
        first, second = cls.split([len(x) for x in tokens])
        total = cls_loss(first.chunk(local), cls_targets.view(2, -1, cls.shape[-1])) + 2 * cls_loss([second], [cls_targets])
        spread = sum(koleo(x) for x in tokens[1].chunk(2))
        patches = patch_loss.forward_masked(patch, patch_targets, masks, number, weight)
        return c.loss.dino_weight * total / terms + c.loss.koleo_weight * spread + c.loss.ibot_weight * patches

    def update(loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), c.optim.clip_grad)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(keys, momentum)
            torch._foreach_add_(keys, queries, alpha=1 - momentum)

    return {"student": student}, loss, update


def update_of_scaler(scaler, student, optimizer, clip):
    """What MAE and BEiT do with a loss; the scaler is off on a CPU."""

    def update(loss):
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=clip or None, parameters=student.parameters())

    return update


def mae(c, views):
    """The masks are those that `torch.rand` leads to: the clone keeps the patches with the smallest numbers."""
    import timm.optim
    from timm.models import vision_transformer as timm_vit

    np.float, block = float, timm_vit.Block
    timm_vit.Block = lambda *sizes, qk_scale=None, **more: block(*sizes, **more)  # timm has dropped an argument
    from models_mae import MaskedAutoencoderViT
    from util.misc import NativeScalerWithGradNormCount

    d, images, mask = c.decoder, views["global"][0], views["mask"][0]
    decoder = dict(decoder_embed_dim=d.dim, decoder_depth=d.depth, decoder_num_heads=d.heads)
    student = MaskedAutoencoderViT(**network_of(c), **decoder, norm_layer=NORM, norm_pix_loss=c.loss.norm_pix_loss)
    optimizer = adamw(timm.optim.param_groups_weight_decay(student, c.now.weight_decay), c)
    noise = mask + torch.linspace(0, 0.5, mask.shape[1])
    torch.rand = lambda *shape, **more: noise

    def loss():
        return student(images, mask_ratio=c.mask.ratio)[0]

    return {"student": student}, loss, update_of_scaler(NativeScalerWithGradNormCount(), student, optimizer, c.optim.clip_grad)


def simmim(c, views):
    from models.simmim import SimMIM, VisionTransformerForSimMIM
    from optimizer import build_pretrain_optimizer

    relative = c.model.pos == "relative"
    size = network_of(c) | dict(num_classes=0, qkv_bias=True, norm_layer=NORM, init_values=c.model.layerscale or None)
    size |= dict(use_abs_pos_emb=not relative, use_shared_rel_pos_bias=relative, use_mean_pooling=False)
    student = SimMIM(VisionTransformerForSimMIM(**size), c.model.patch_size)
    o = SimpleNamespace(NAME="adamw", EPS=c.optim.eps, BETAS=(c.optim.beta1, c.optim.beta2))
    train = SimpleNamespace(OPTIMIZER=o, BASE_LR=c.now.lr, WEIGHT_DECAY=c.now.weight_decay)
    optimizer = build_pretrain_optimizer(SimpleNamespace(TRAIN=train), student, logging)
    images, mask = views["global"][0], views["mask"][0]
    mask = mask.reshape(len(mask), *[round(mask.shape[1] ** 0.5)] * 2).long()

    def loss():
        return student(images, mask)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), c.optim.clip_grad)
        optimizer.step()

    return {"student": student}, loss, update


def beit(c, views):
    """The labels are those of DALL-E's encoder in each step, or finished ones, `views["ids"]`."""
    import timm.optim

    timm.optim.nadam.Nadam = timm.optim.radam.RAdam = None  # timm has renamed them
    import dall_e
    from modeling_discrete_vae import Dalle_VAE
    from modeling_pretrain import VisionTransformerForMaskedImageModeling
    from optim_factory import create_optimizer
    from utils import NativeScalerWithGradNormCount

    size = network_of(c) | dict(norm_layer=NORM, init_values=c.model.layerscale, vocab_size=c.head.vocab_size)
    student = VisionTransformerForMaskedImageModeling(**size, use_abs_pos_emb=False, use_shared_rel_pos_bias=True)
    args = dict(opt="adamw", lr=c.now.lr, weight_decay=c.now.weight_decay, opt_betas=(c.optim.beta1, c.optim.beta2))
    optimizer = create_optimizer(SimpleNamespace(**args, opt_eps=c.optim.eps), student)
    images, mask, ids = views["global"][0], views["mask"][0], views.get("ids")
    parts = {"student": student}
    if ids is None:
        tokenizer, pixels = Dalle_VAE(c.crops.target_size), dall_e.map_pixels(views["target"][0])
        tokenizer.encoder = parts["tokenizer"] = dall_e.Encoder()

    def loss():
        with torch.no_grad():
            labels = (tokenizer.get_codebook_indices(pixels).flatten(1) if ids is None else ids)[mask]
        return torch.nn.CrossEntropyLoss()(student(images, bool_masked_pos=mask, return_all_tokens=False), labels)

    return parts, loss, update_of_scaler(NativeScalerWithGradNormCount(), student, optimizer, c.optim.clip_grad)


def main():
    method, repo, folder, *compiled = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the clones print
    sys.path[0] = f"{repo}/beit" if method == "beit" else repo
    sys.modules |= {name: mock.MagicMock() for name in UNUSED}
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = json.loads(Path(folder, "config.json").read_text(), object_hook=lambda d: SimpleNamespace(**d))
    views = {name: torch.from_numpy(x) for name, x in np.load(f"{folder}/views.npz").items()}
    for name in {"global", "local", "target"} & views.keys():
        views[name] = [crop.contiguous() for crop in views[name].permute(1, 0, 4, 2, 3)]  # a list of crops, [B, C, H, W]
    if "mask" in views:
        views["mask"] = list(views["mask"].transpose(0, 1))
    parts, loss, update = globals()[method](config, views)
    for part, module in parts.items():
        np.savez(f"{folder}/{part}.npz", **{name: value.numpy() for name, value in module.state_dict().items()})
    for name in UNUSED:
        del sys.modules[name]
    if compiled:
        loss = torch.compile(loss)
    print(json.dumps([torch.__version__, platform.python_version()]), file=answers)

    idle = time.process_time()
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        value = loss()
        update(value)
        value = value.item()
        took = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps([*took, value, cpu - idle]), file=answers)
        idle = time.process_time()


if __name__ == "__main__":
    main()
