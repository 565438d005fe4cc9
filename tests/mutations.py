"""Deliberate bugs, each of which a test must notice: `python tests/mutations.py [name ...]`, all of them without a name.

In a copy of the tree it first runs the tests that are named below as they are, and then, for one mutation after the other,
changes the source, runs its tests and prints which failed, or SURVIVED. The exit status is the number of survivors.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    name: str
    file: str  # under mim_jax/
    old: str  # found once in the file
    new: str
    tests: str  # that must notice it, under tests/, by the name that pytest has for them


M = Mutation
MUTATIONS = (
    # The step
    M("one key of augmentation for all steps", "step.py", "jax.random.fold_in(jax.random.key(config.seed), state.step)",
      "jax.random.key(config.seed)", "test_step.py::test_each_use_of_randomness_has_a_key_of_its_own_at_each_step"),
    M("one drop-path key for all steps", "step.py", "jax.random.fold_in(key, LOSS)",
      "jax.random.fold_in(jax.random.key(config.seed), LOSS)",
      "test_step.py::test_each_use_of_randomness_has_a_key_of_its_own_at_each_step"),
    M("mix has the loss's stream", "step.py", "jax.random.fold_in(key, MIX)", "jax.random.fold_in(key, LOSS)",
      "test_step.py::test_each_use_of_randomness_has_a_key_of_its_own_at_each_step"),
    M("masks have the augmentation's stream", "views.py", "jax.random.fold_in(key, MASK)", "jax.random.fold_in(key, AUGMENT)",
      "test_step.py::test_each_use_of_randomness_has_a_key_of_its_own_at_each_step"),
    M("teacher before the student", "step.py", "follow(teacher, params, state.step)",
      "follow(teacher, state.params, state.step)", "test_step.py::test_the_teacher_follows_the_student_after_its_update"),
    M("only the first part has an average", "step.py", "for part in method.teacher_parts}",
      "for part in method.teacher_parts[:1]} | {part: teacher[part] for part in method.teacher_parts[1:]}",
      "test_step.py::test_the_teacher_follows_the_student_after_its_update"),
    M("momentum of the student", "step.py", "(momentum * t + (1 - momentum) * s)", "((1 - momentum) * t + momentum * s)",
      "test_step.py::test_the_teacher_follows_the_student_after_its_update"),
    M("no teacher comes first", "step.py",
      "follow(state.teacher, state.params, state.step) if method.teacher_first else state.teacher", "state.teacher",
      "test_golden_mocov3.py::test_teacher_loss_and_gradients"),
    M("momentum of the next step", "step.py", 'method.schedules["momentum_teacher"](step)',
      'method.schedules["momentum_teacher"](step + 1)',
      "test_step.py::test_the_teacher_follows_the_student_after_its_update"),
    M("optimizer one step ahead", "step.py", "state.params, step=state.step)", "state.params, step=state.step + 1)",
      "test_step.py::test_all_of_a_step_follows_the_step_before_it"),
    M("nothing after the update", "step.py",
      "method.after_update(TrainState(state.step + 1, params, teacher, opt_state, extra))",
      "TrainState(state.step + 1, params, teacher, opt_state, extra)",
      "test_step.py::test_all_of_a_step_follows_the_step_before_it"),
    M("a bad gradient is applied", "step.py", "jnp.isfinite(loss) & jnp.isfinite(grad_norm)", "jnp.isfinite(loss)",
      "test_step.py::test_a_gradient_that_is_not_finite_is_skipped_too"),
    M("only parameters are guarded", "step.py", "& all_finite(new)", "& all_finite(params)",
      "test_step.py::test_a_new_state_that_is_not_finite_is_not_kept"),
    M("a skipped step is no step", "step.py", "dataclasses.replace(state, step=new.step))", "state)",
      "test_step.py::test_a_gradient_that_is_not_finite_is_skipped_too"),
    # Losses and their figures
    M("assignments paired with themselves in the loss", "losses.py",
      "others = 1 - jnp.eye(n_global, n_crops, dtype=cross_entropy.dtype)", "others = jnp.ones((n_global, n_crops))",
      "test_golden_dino.py::test_no_crop_is_compared_with_itself"),
    M("assignments paired with themselves alone", "losses.py", "others = 1 - jnp.eye(", "others = jnp.eye(",
      "test_golden_dino.py::test_no_crop_is_compared_with_itself"),
    M("assignments paired with themselves in the figures", "methods/dino.py",
      "jnp.roll(student_log[:, : teacher.shape[1]], 1, axis=1)", "student_log[:, : teacher.shape[1]]",
      "test_golden_dino.py::test_no_crop_is_compared_with_itself"),
    M("center after the temperature", "losses.py", "jax.nn.softmax((logits - center) / temp)",
      "jax.nn.softmax(logits / temp - center)", "test_golden_dino.py::test_loss_three_steps_with_centers"),
    M("gradient through the targets", "losses.py", "jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temp))",
      "jax.nn.softmax((logits - center) / temp)", "test_golden_dino.py::test_targets_and_center_have_no_gradient"),
    M("gradient through balanced targets", "losses.py", "x = jax.lax.stop_gradient(logits).astype", "x = logits.astype",
      "test_golden_dino.py::test_targets_and_center_have_no_gradient"),
    M("center of the batch alone", "losses.py", "momentum * center + (1 - momentum) * jax",
      "(1 - momentum) * center + momentum * jax", "test_golden_dino.py::test_loss_three_steps_with_centers"),
    M("patch loss of crops with masks alone", "losses.py", "return jnp.sum(cross_entropy * weight) / crops",
      "return jnp.sum(cross_entropy * weight) / jnp.maximum(jnp.sum(weight.sum(-1) > 0), 1)",
      "test_golden_dinov2.py::test_patch_loss"),
    M("filling rows are balanced", "losses.py", "x = jnp.where(weight[:, None] > 0, x, -jnp.inf)",
      "x = jnp.where(weight[:, None] >= 0, x, -jnp.inf)", "test_golden_dinov2.py::test_patch_targets"),
    M("prototypes are balanced once less", "losses.py", "for _ in range(iterations):", "for _ in range(iterations - 1):",
      "test_golden_dinov2.py::test_cls_targets"),
    M("a feature is its own neighbor", "losses.py", "jnp.where(jnp.eye(group_size, dtype=bool), -1.0, products)", "products",
      "test_golden_dinov2.py::test_koleo"),
    M("biased variance of patches", "losses.py", "keepdims=True, ddof=1)", "keepdims=True, ddof=0)",
      "test_golden_mae.py::test_normalized_patches"),
    M("eps beside the std of patches", "losses.py", "std = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + eps)",
      "std = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1)) + eps", "test_golden_mae.py::test_normalized_patches"),
    M("MAE's loss of all patches", "losses.py", "return jnp.sum(error * mask) / jnp.sum(mask)", "return jnp.mean(error)",
      "test_golden_mae.py::test_forward_loss_and_gradients"),
    M("window without its borders", "losses.py", "<= window // 2 for n in", "< window // 2 for n in",
      "test_golden_simmim.py::test_normalized_targets"),
    M("BEiT's loss image by image", "losses.py", "return -jnp.sum(picked * weight) / jnp.sum(weight)",
      "return -jnp.mean(jnp.sum(picked * weight, -1) / jnp.maximum(jnp.sum(weight, -1), 1))",
      "test_golden_beit.py::test_an_image_with_more_masked_patches_weighs_more"),
    M("the mean assignment is the first", "health.py", "teacher.reshape(-1, num_prototypes).mean(axis=0)",
      "teacher.reshape(-1, num_prototypes)[0]", "test_health.py::test_assignment_figures_of_known_votes"),
    M("a view looks for its own key", "methods/mocov3.py", "keys[1 - i]", "keys[i]",
      "test_golden_mocov3.py::test_teacher_loss_and_gradients"),
    M("keys have a gradient", "losses.py", "keys = jax.lax.stop_gradient(keys)", "keys = keys + 0",
      "test_golden_mocov3.py::test_one_sided_loss"),
    M("the patch embedding has a gradient", "methods/mocov3.py",
      'jax.lax.stop_gradient(params["backbone"]["patch_embed"])', 'params["backbone"]["patch_embed"]',
      "test_golden_mocov3.py::test_teacher_loss_and_gradients"),
    M("queries, keys and values are one matrix", "methods/mocov3.py", 'qkv["kernel"] * 2**0.5', 'qkv["kernel"]',
      "test_golden_mocov3.py::test_initial_distributions"),
    M("the last norm has a scale", "models/heads.py", 'BatchNorm(affine=False, name=f"bn_{last}")',
      'BatchNorm(name=f"bn_{last}")', "test_golden_mocov3.py::test_teacher_loss_and_gradients"),
    M("the loss is of mask tokens alone", "methods/masked_patch.py",
      'masked_cross_entropy(logits, colors, views["mask"])', "masked_cross_entropy(logits, colors, hidden)",
      "test_masked_patch.py"),
    M("a patch is replaced by itself", "methods/masked_patch.py", "mask.shape, 1, count)", "mask.shape, 0, count)",
      "test_masked_patch.py"),
    M("red and blue change places", "methods/masked_patch.py", "[LEVELS**2, LEVELS, 1]", "[1, LEVELS, LEVELS**2]",
      "test_masked_patch.py"),
    # Optimizer and schedules
    M("eps of Adam ignored", "optim.py", "optax.scale_by_adam(o.beta1, o.beta2, o.eps)",
      "optax.scale_by_adam(o.beta1, o.beta2)", "test_optim.py"),
    M("betas of Adam swapped", "optim.py", "optax.scale_by_adam(o.beta1, o.beta2, o.eps)",
      "optax.scale_by_adam(o.beta2, o.beta1, o.eps)", "test_optim.py"),
    M("decay not scaled by the rate", "optim.py", "(update + decay * param)", "(update + decay / rate * param)",
      "test_optim.py"),
    M("decay of what is named", "optim.py", "tuple(o.no_decay), o.decay_vectors", "(), o.decay_vectors", "test_optim.py"),
    M("vectors never decay", "optim.py", "tuple(o.no_decay), o.decay_vectors", "tuple(o.no_decay)", "test_optim.py"),
    M("the ratio comes before the decay", "optim.py", "updates = with_decay(grads)",
      "updates = with_decay(trusted(grads, params) if o.name == 'lars' else grads)", "test_golden_mocov3.py::test_lars"),
    M("trust ratio of vectors", "optim.py", "if update.ndim - stacked < 2:", "if False:", "test_golden_mocov3.py::test_lars"),
    M("blocks have one trust ratio", "optim.py", "(jax.vmap(scaled) if stacked else scaled)", "scaled",
      "test_golden_mocov3.py::test_lars"),
    M("decay of stacked vectors", "optim.py", "leaf.ndim - is_stacked(name) > 1", "leaf.ndim > 1",
      "test_golden_dino.py::test_parameter_groups"),
    M("clipping enlarges", "optim.py", "jnp.minimum(limit / (norm + 1e-6), 1.0)", "limit / (norm + 1e-6)", "test_optim.py"),
    M("stacked blocks are clipped together", "optim.py", "tuple(range(1 if is_stacked(path_name(path)) else 0, g.ndim))",
      "tuple(range(g.ndim))", "test_golden_dino.py::test_clipping_is_per_tensor_and_per_block"),
    M("last layer waits a step longer", "optim.py", "jax.lax.cond(step < freeze,", "jax.lax.cond(step <= freeze,",
      "test_optim.py"),
    M("last layer's rate waits a step longer", "optim.py", "jnp.where(step < frozen,", "jnp.where(step <= frozen,",
      "test_optim.py"),
    M("moments of a frozen last layer move", "optim.py",
      'descent(frozen=freeze) if o.freeze_last_layer_by == "lr" else begins_later(descent())', "descent(frozen=freeze)",
      "test_optim.py"),
    M("warm-up ends a step later", "optim.py", "max(warmup - endpoint, 1)", "max(warmup, 1)",
      "test_golden_dino.py::test_schedules"),
    M("cosine from step 0", "optim.py", "(step - warmup) / max(total - warmup, 1)", "step / max(total, 1)",
      "test_golden_dino.py::test_schedules"),
    M("min_lr not scaled", "optim.py", "cosine_schedule(base, o.min_lr * scale, total)",
      "cosine_schedule(base, o.min_lr, total)", "test_golden_simmim.py::test_schedules"),
    M("warmup_lr not scaled", "optim.py", "start=o.warmup_lr * scale", "start=o.warmup_lr",
      "test_golden_simmim.py::test_schedules"),
    M("timm's step not shifted", "optim.py", "step = jnp.maximum(step - 1, 0)", "step = jnp.maximum(step, 0)",
      "test_golden_simmim.py::test_schedules"),
    M("power of the batch ignored", "optim.py", "(config.data.batch_size / o.lr_batch_size) ** o.lr_batch_power",
      "(config.data.batch_size / o.lr_batch_size)", "test_optim.py"),
    M("temperature never at its end", "optim.py", "epoch / max(epochs - 1, 1)", "epoch / max(epochs, 1)",
      "test_golden_dino.py::test_loss_three_steps_with_centers"),
    M("patch temperature does not wait", "optim.py", "jnp.maximum(step - hold, 0)", "jnp.maximum(step, 0)",
      "test_golden_ibot.py::test_the_patch_temperature_waits_for_the_masks"),
    M("wrong layer of the embeddings", "models/vit.py", "decay ** (self.depth + 1 if name in before else 0)",
      "decay ** (self.depth if name in before else 0)", "test_golden_mae.py::test_layer_decay"),
    M("blocks one layer further", "models/vit.py", "decay ** (self.depth - np.arange(self.depth))",
      "decay ** (self.depth - 1 - np.arange(self.depth))", "test_golden_mae.py::test_layer_decay"),
    # Masks
    M("crops of an example share their mask", "masking.py", 'f"{seed}/{position}/{crop}"', 'f"{seed}/{position}"',
      "test_masking.py::test_masks_of_a_stream"),
    M("masks begin one example later", "masking.py", "(positions >= self.start)", "(positions > self.start)",
      "test_masking.py::test_masks_that_begin_later"),
    M("blocks as high as the grid", "masking.py", "if height >= rows or width >= columns:",
      "if height > rows or width > columns:", "test_masking.py::test_masks_are_the_official_ones_after_the_same_seed"),
    M("rows and columns of squares swapped", "masking.py", "return rows // self.square, columns // self.square",
      "return columns // self.square, rows // self.square", "test_masking.py::test_masks_of_an_oblong_grid"),
    M("groups by place in the batch", "masking.py", "groups[at // self.group_size][at % self.group_size]",
      "groups[at // self.group_size][(at - positions[0]) % self.group_size]",
      "test_golden_dinov2.py::test_masks_of_a_stream_are_those_of_its_groups"),
    M("SimMIM masks a square too few", "methods/simmim.py", "math.ceil((size // square) ** 2 * config.mask.ratio)",
      "int((size // square) ** 2 * config.mask.ratio)", "test_golden_simmim.py::test_mask_counts_of_the_papers"),
    M("visible patches are predicted", "models/vit.py", "places = jnp.argsort(~mask, axis=-1, stable=True)",
      "places = jnp.argsort(mask, axis=-1, stable=True)", "test_golden_beit.py::test_beit"),
    M("the teacher sees masks", "methods/dino.py", '"backbone"]}, [views["global"]])\n        else',
      '"backbone"]}, [views["global"]], masks=[views.get("mask")])\n        else',
      "test_golden_ibot.py::test_four_training_steps"),
    # Stochastic depth
    M("survivors are not scaled", "models/vit.py", "jnp.repeat(keep / (1 - rate), repeats", "jnp.repeat(keep * 1.0, repeats",
      "test_step.py::test_drop_path_drops_whole_crops_and_keeps_the_mean"),
    M("all blocks drop the same", "models/vit.py", '"drop_path": True}', '"drop_path": False}',
      "test_step.py::test_each_block_drops_crops_of_its_own"),
    M("all blocks have the last one's rate", "models/vit.py", "jnp.linspace(0, self.drop_path_rate, self.depth)",
      "jnp.full(self.depth, self.drop_path_rate)", "test_step.py::test_the_first_block_is_never_dropped"),
    # Augmentation and views
    M("local crops of the global scale", "methods/dino.py", "tuple(c.local_crops_scale)", "tuple(c.global_crops_scale)",
      "test_views.py"),
    M("solarised first crops", "methods/dino.py", "return policy(blur=1.0), *(policy(blur=0.1, solarize=0.2),) *",
      "return policy(blur=1.0, solarize=0.2), *(policy(blur=0.1),) *", "test_views.py"),
    M("DINOv2 blurs as the paper says", "methods/dinov2.py", "policy(blur=0.0), policy(blur=0.9",
      "policy(blur=1.0), policy(blur=0.1", "test_views.py"),
    M("each group draws the same numbers", "data/augment.py", "draws[first : first + count]", "draws[:count]",
      "test_augment.py::test_more_crops_leave_the_first_ones_as_they_were"),
    M("views follow the place in the batch", "data/augment.py", 'draw(key, index, jnp.arange(sum',
      'draw(key, jnp.arange(index.size).reshape(index.shape), jnp.arange(sum',
      "test_augment.py::test_views_depend_on_key_index_and_crop_number"),
    M("targets are not flipped", "data/augment.py", "cut(out=group.target.size,", "cut(flip=False, out=group.target.size,",
      "test_augment.py::test_a_target_is_the_same_crop_at_another_size_after_the_same_jitter"),
    M("targets are normalized", "data/augment.py", "_normalize(in_order(target), (0.0,) * 3, (1.0,) * 3)",
      "_normalize(in_order(target), mean, std)",
      "test_augment.py::test_a_target_is_the_same_crop_at_another_size_after_the_same_jitter"),
    M("a blur's radius is whether it happens", "data/augment.py",
      "radius = jnp.where(blur < policy.blur, low + (high - low) * radius, 0.0)",
      "radius = jnp.where(blur < policy.blur, low + (high - low) * blur, 0.0)",
      "test_augment.py::test_the_radius_of_a_blur_has_a_draw_of_its_own"),
    M("ratio of a box uniform", "data/augment.py",
      "aspect = jnp.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * aspect)",
      "aspect = ratio[0] + (ratio[1] - ratio[0]) * aspect", "test_augment.py::test_boxes_are_distributed_as_torchvisions"),
    M("boxes never touch the last row", "data/augment.py", "jnp.floor(where * (size - drawn + 1))",
      "jnp.floor(where * (size - drawn))", "test_augment.py::test_boxes_are_distributed_as_torchvisions"),
    M("the mean level counts what is around the picture", "data/augment.py", "mean = _mean_level(gray, size)",
      "mean = _mean_level(gray)", "test_augment.py::test_a_target_is_the_same_crop_at_another_size_after_the_same_jitter"),
    # Evaluation
    M("penalty chosen on test queries", "evaluators/probe.py", "scores = [accuracy(*chosen_on, *trial)",
      "scores = [accuracy(features, labels, *trial)", "test_evaluators.py::test_probe_chooses_its_penalty_on_the_bank"),
    M("penalty chosen on what is fitted", "evaluators/probe.py", "scores = [accuracy(*chosen_on, *trial)",
      "scores = [accuracy(*fitted, *trial)", "test_evaluators.py::test_probe_chooses_its_penalty_on_the_bank"),
    M("standardised on bank and test", "evaluators/probe.py", "for x in location_scale(bank))",
      "for x in location_scale(np.concatenate([bank, test])))", "test_evaluators.py::test_whitening_and_probe_work_in_blocks"),
    M("student in place of the teacher", "state.py", "return self.teacher or self.params",
      "return self.params", "test_evaluators.py::test_the_teacher_is_evaluated_where_there_is_one"),
    M("a view retrieves itself", "evaluators/__init__.py", 'view_retrieval(test["view_1"], test["view_2"])',
      'view_retrieval(test["view_1"], test["view_1"])',
      "test_evaluators.py::test_neither_an_image_nor_a_view_is_compared_with_itself"),
    M("test images in the bank", "evaluators/__init__.py",
      "self.test_rows, self.bank_rows = np.split(pipeline.choose(source, bank + test, self.seed), [test])",
      "self.test_rows, self.bank_rows = (pipeline.choose(source, n, self.seed) for n in (test, bank))",
      "test_evaluators.py::test_one_split_is_divided_and_two_are_not"),
    M("a soft vote of the neighbors", "evaluators/__init__.py", "K, TEMPERATURE = 20, 0.07", "K, TEMPERATURE = 20, 0.7",
      "test_evaluators.py::test_knn_asks_20_neighbors_at_the_temperature_of_dino"),
    M("views follow the row", "evaluators/__init__.py", 'augment(batch | {"index": batch["place"]}, [group]',
      "augment(batch, [group]", "test_evaluators.py::test_pictures_are_cut_from_the_middle_and_views_follow_seed_and_place"),
    M("top 5 of all classes", "evaluators/knn.py", "hit[:, : min(5, k)]", "hit[:, :5]",
      "test_evaluators.py::test_knn_equals_the_official_percentages"),
    M("the head of the student", "evaluators/__init__.py", "self._ranking(params, state.extra",
      "self._ranking(state.params, state.extra",
      "test_evaluators.py::test_the_head_of_the_teacher_is_measured_where_there_is_one"),
    M("the largest class of the bank", "evaluators/__init__.py", 'counts.max() / len(test["label"])',
      'np.bincount(bank["label"]).max() / len(bank["label"])',
      "test_evaluators.py::test_baselines_of_a_head_are_the_largest_class_and_the_untrained_head"),
    M("errors count replaced images", "evaluators/__init__.py", "(1 - share) / self.good)", "(1 - share) / len(labels[1]))",
      "test_evaluators.py::test_errors_count_the_images_that_could_be_read"),
    M("few labels of the features of all", "evaluators/__init__.py", "count = len(bank[\"label\"]) * percent // 100",
      "count = len(bank[\"label\"])", "test_evaluators.py::test_a_probe_with_few_labels"),
    M("confusions by column", "evaluators/mistakes.py", "labels * num_classes + predicted", "predicted * num_classes + labels",
      "test_evaluators.py::test_classes_and_pairs_in_order"),
    M("whitened on the test images", "evaluators/knn.py", "mean = bank.mean(axis=0, dtype=np.float32)",
      "mean = test.mean(axis=0, dtype=np.float32)",
      "test_evaluators.py::test_whitened_features_are_white_on_the_bank_in_the_order_given"),
    # Learned weights
    M("a user gets the student", "learned.py", 'SECTIONS = ("teacher", "params", "extra")',
      'SECTIONS = ("params", "teacher", "extra")',
      "test_target.py::test_the_target_is_the_teacher_of_its_run_and_what_else_the_run_has"),
    M("init_from fills the teacher with the student", "learned.py", '("teacher", part, where(shapes, part))',
      '("teacher", part, "params")', "test_init_from.py::test_all_is_taken_by_the_same_method"),
    M("init_from gives the student", "learned.py", 'pairs.append(("params", part, where(shapes, part)))',
      'pairs.append(("params", part, "params"))',
      "test_init_from.py::test_a_method_without_a_teacher_begins_with_the_teacher"),
    M("a new head keeps the old center", "learned.py", 'if not new and not misfits(',
      "if not misfits(", "test_init_from.py::test_only_the_parts_that_are_named_are_taken"),
    M("init_from leaves the center", "learned.py", 'pairs += [("extra", part, "extra") for part in state.extra]', "pass",
      "test_init_from.py::test_all_is_taken_by_the_same_method"),
    M("a target sees plain pixels", "methods/base.py",
      "images = (images - jnp.array(self.mean)) / jnp.array(self.std)\n        return vit", "return vit",
      "test_target.py::test_a_frozen_encoder_normalizes_images_as_in_its_training"),
    M("fine-tuning begins with the student", "learned.py", 'where(shapes, part) if "encoder" in config else "params"',
      '"params"', "test_supervised.py::test_a_backbone_of_a_run"),
    M("sine-cosine positions as DINO's", "learned.py", 'getattr(encoder, "pos_offset", 0.1)', "0.1",
      "test_supervised.py::test_a_backbone_of_a_run"),
    # Supervised training
    M("two norms before the classifier", "methods/supervised.py", 'final_norm=m.pool == "cls"', "final_norm=True",
      "test_supervised.py::test_scores_of_a_fine_tuned_mae"),
    M("held-out images are learned from", "methods/linear.py", '(views["index"] % self.held_out != 0)',
      '(views["index"] % self.held_out >= 0)', "test_supervised.py::test_held_out_images_are_not_learned_from"),
    M("the worst classifier is used", "methods/linear.py", 'scores[jnp.argmax(extra["held_out_accuracy"])]',
      'scores[jnp.argmin(extra["held_out_accuracy"])]',
      "test_supervised.py::test_heads_learn_at_their_own_rates_and_the_best_on_held_out_images_is_used"),
    M("images are mixed with themselves", "data/mixing.py", "[:, ::-1].reshape(a.shape)", "[:, :].reshape(a.shape)",
      "test_supervised.py::test_mixup"),
    M("a cut's share is that which was drawn", "data/mixing.py", "jnp.where(cut, 1 - pasted.mean(), share)", "share",
      "test_supervised.py::test_cutmix_pastes_one_rectangle_and_mixes_labels_by_its_area"),
    M("a rotation the other way", "data/rand_augment.py", "-math.radians(30) * rotate", "math.radians(30) * rotate",
      "test_rand_augment.py::test_an_operation_is_pillows"),
    # Checkpoints and resuming
    M("another seed is the same run", "checkpoint.py", "(recipe|total|", "(recipe|seed|total|",
      "test_resume.py::test_keys_that_make_it_another_run"),
    M("a finished run is past its end", "checkpoint.py", 'if record["step"] > durations.total_steps(config):',
      'if record["step"] >= durations.total_steps(config):',
      "test_resume.py::test_a_finished_run_started_again_prints_its_end"),
    M("new keys have no default", "checkpoint.py", "old = {key: defaults[key] for key in new if key in defaults} | old", "pass",
      "test_resume.py::test_a_key_that_a_newer_version_added_has_its_default_in_an_older_record"),
    M("the oldest checkpoint is restored", "checkpoint.py", "name)), reverse=True)",
      "name)))", "test_resume.py::test_a_saved_run_is_read_in_parts"),
    M("a resumed stream is one batch ahead", "train.py", "start=step,", "start=step + (step > 0),",
      "test_resume.py::test_a_run_interrupted_anywhere_ends_as_one_left_alone[batch-3-control_c]"),
    M("skipped steps are forgotten", "train.py", 'record.get("skipped", 0)', "0",
      "test_resume.py::test_too_many_skipped_steps_in_a_row_stop_the_run"),
    M("bad images are forgotten", "train.py", 'before=record.get("bad_images", 0)', "before=0",
      "test_resume.py::test_a_run_interrupted_anywhere_ends_as_one_left_alone[batch-3-control_c]"),
    M("no evaluation at the end", "train.py", "(step % evaluate_every == 0 or step == total)", "step % evaluate_every == 0",
      "test_resume.py::test_a_longer_plan_goes_on_with_the_optimizers_state"),
    # EVA and CLIP
    M("CLS is turned", "models/positions.py", "np.zeros((x.shape[1] - len(angles), x.shape[-1]))",
      "np.ones((x.shape[1] - len(angles), x.shape[-1]))", "test_golden_eva.py::test_eva"),
    M("columns before rows", "models/positions.py", "np.concatenate([row, column], axis=1)",
      "np.concatenate([column, row], axis=1)", "test_golden_eva.py::test_rotary_angles"),
    M("rotary positions are not stretched", "models/positions.py", "places.reshape(-1, 1) / n * side * frequencies",
      "places.reshape(-1, 1) * frequencies", "test_golden_eva.py::test_rotary_angles_of_another_grid"),
    M("channels are turned the other way", "models/positions.py", "np.tile([-1, 1]", "np.tile([1, -1]",
      "test_golden_eva.py::test_eva"),
    M("no norm inside the MLP", "models/vit.py", 'y = LayerNorm(self.dtype, self.norm_eps, name="ffn_ln")(y)', "pass",
      "test_golden_eva.py::test_eva"),
    M("the whole gradient of the patch embedding", "models/vit.py", "if self.patch_grad != 1:", "if False:",
      "test_golden_eva.py::test_eva"),
    M("each image weighs the same", "methods/eva.py", "losses.cosine_distance(predictions, features, weight) - 1",
      "losses.cosine_distance(predictions, features) - 1", "test_golden_eva.py::test_eva"),
    M("sub-LN is not rescaled", "methods/eva.py", "math.sqrt(math.log(2 * depth))", "1.0",
      "test_golden_eva.py::test_first_values_of_eva02"),
    M("the exact GELU in CLIP", "models/clip.py", "jax.nn.sigmoid(1.702 * x)", "0.5 * (1 + jax.lax.erf(x * 0.5**0.5))",
      "test_golden_eva.py::test_clip"),
    M("the norm of ViTs in CLIP", "models/clip.py", "EPS = 1e-5", "EPS = 1e-6", "test_golden_eva.py::test_clip"),
    M("CLIP sees plain pixels", "models/clip.py", "images = (images - jnp.array(MEAN)) / jnp.array(STD)", "pass",
      "test_golden_eva.py::test_clip"),
    M("CLIP's text tower is an error", "convert/__init__.py", 'getattr(module, "IGNORED", "(?!)")', '"(?!)"',
      "test_golden_eva.py::test_a_method_learns_from_clip"),
    # Gradients that are written out
    M("a norm's gradient keeps the mean", "models/layers.py", "dx - sums(dx, 1) / width - x", "dx - x",
      "test_layers.py::test_layer_norm_is_flax_s"),
    M("attention's softmax is not normalised in its gradient", "models/layers.py",
      "preferred_element_type=along.dtype) - along)", "preferred_element_type=along.dtype))",
      "test_layers.py::test_attention_has_the_gradient_of_the_plain_one"),
    M("the bias of the opposite pair", "models/positions.py",
      "places[:, None] - places + n - 1", "places - places[:, None] + n - 1",
      "test_golden_simmim.py::test_the_bias_of_each_pair_is_the_table_s_entry"),
    # Kept programs
    M("compiled programs without end", "compiled.py", "if size > KEPT", "if size > 2 * KEPT",
      "test_compiled.py::test_the_oldest_entries_go"),
    M("a damaged program stays", "compiled.py", "for file in entries:", "for file in ():",
      "test_compiled.py::test_a_damaged_entry_is_compiled_anew_and_the_folder_emptied"),
    # Stopping
    M("an evaluation that was stopped is not made up for", "train.py", "and step > evaluated and", "and",
      "test_resume.py::test_a_run_stops_where_it_would_wait_for_ever[scores-1-terminate-steps2]"),
    M("a signal does not end the waiting", "stopping.py", "self._inbox.put(None)", "self._inbox",
      "test_stopping.py::test_while_training_a_signal_ends_the_waiting_and_nothing_else"),
    M("a second Ctrl-C does not count", "stopping.py", "again = self._interrupted and", "again = False and",
      "test_stopping.py::test_a_second_control_c_is_an_interrupt"),
    M("data workers hear Ctrl-C", "data/pipeline.py", "signal.signal(number, signal.SIG_IGN)", "pass",
      "test_stopping.py::test_only_a_kill_ends_a_worker_and_is_told"),
    # Long runs
    M("points of a long curve are dropped", "journal.py", "((a + c) / 2, (b + d) / 2)", "(a, b)",
      "test_journal.py::test_a_curve_is_bounded_and_its_points_have_equal_weights"),
    M("a file takes its place before it is on the disk", "journal.py", "            os.fsync(file.fileno())\n", "",
      "test_journal.py::test_a_file_is_on_the_disk_before_it_takes_its_place"),
    M("TensorStore's leak", "checkpoint.py", "if key not in made:", "if True:",
      "test_long_runs.py::test_saves_do_not_add_up_in_memory"),
    M("bad images of one process", "bad_images.py", 'batch["counts"].sum()', 'batch["counts"].max()',
      "test_long_runs.py::test_the_first_process_names_and_counts_the_bad_images_of_all"),
    M("few held-out images are judged", "health.py", "images < ENOUGH_IMAGES", "images < 0",
      "test_health.py::test_too_few_held_out_images_give_no_verdict"),
    # Configs and durations
    M("intervals include their ends", "config.py", 'if interval[-1] == "]" else number < high',
      "if interval[-1] else number < high", "test_config.py::test_what_cannot_be_is_refused_in_one_line"),
    M("the width of a Swin stays", "config.py", "* 2**stage) % heads", ") % heads",
      "test_config.py::test_the_heads_of_each_stage_of_a_swin_divide_its_width"),
    M("a Swin's patches do not grow", "config.py", "stride = patch * 2 ** (len(values.get",
      "stride = patch * 1 ** (len(values.get", "test_config.py::test_what_cannot_be_is_refused_in_one_line"),
    M("evaluation batches are not divided", "config.py", 'for key in ("data.batch_size", "eval.batch_size"):\n        if mesh',
      'for key in ("data.batch_size",):\n        if mesh', "test_config.py::test_batches_are_divided_by_the_devices"),
    M("part of a step is lost", "durations.py", "return round(number * steps_per_epoch(config))",
      "return int(number * steps_per_epoch(config))", "test_config.py::test_durations_in_steps"),
    M("an epoch has the rest of a batch", "durations.py", "config.data.num_examples // config.data.batch_size",
      "-(-config.data.num_examples // config.data.batch_size)", "test_config.py::test_durations_in_steps"),
    # The pipeline
    M("processes share what is left", "data/pipeline.py", "[process_index::process_count][start:]",
      "[start:][process_index::process_count]", "test_data.py::test_resume_by_slicing"),
    M("each epoch in the same order", "data/pipeline.py", ".seed(seed).shuffle().repeat()",
      ".seed(seed).shuffle().repeat(reseed_each_epoch=False)",
      "test_data.py::test_each_epoch_has_each_example_once_in_another_order"),
    M("masks follow the process's batch", "data/pipeline.py", "masks(block * size + np.arange(size))",
      "masks(block // process_count * size + np.arange(size))", "test_data.py::test_masks_follow_the_place_in_the_stream"),
    M("evaluation drops the last batch", "data/pipeline.py", "np.arange(-(-len(rows) // batch_size) * batch_size",
      "np.arange(len(rows) // batch_size * batch_size",
      "test_data.py::test_eval_batches_hold_each_row_once_in_order_for_any_number_of_hosts"),
    # Folders and files
    M("slices by class", "data/sources.py", "return rows[np.lexsort((drawn[rows], spread))]", "return rows",
      "test_data.py::test_slices_of_a_folder_have_every_class_and_nothing_in_common"),
    M("percent are rounded down", "data/sources.py", "(number * count + 50) // 100", "number * count // 100",
      "test_data.py::test_slices_count_images_or_percent_from_either_end"),
    M("overlapping slices are measured on", "data/sources.py", "and places != others and common > 0", "and False",
      "test_data.py::test_slices_with_images_in_common_are_refused_unless_they_are_the_same"),
    M("a class named train is a split", "data/folder.py",
      '(None not in kinds.values() or ("train" in known and len(known) > 1))', "True",
      "test_folder.py::test_a_class_may_be_named_like_a_split"),
    M("a folder is read behind each link", "data/folder.py", "if inode in seen:", "if False:",
      "test_folder.py::test_each_image_counts_once"),
    M("pictures of a run are trained on", "data/folder.py", 'OF_A_RUN if len(names', '() if len(names',
      "test_folder.py::test_pictures_of_a_run_are_no_images"),
    M("a pipe is read", "data/decode.py", "if not stat.S_ISREG(found.st_mode):", "if False:",
      "test_folder.py::test_only_regular_files_of_a_sane_size_are_read"),
    M("each split has labels of its own", "data/folder.py",
      "labels = set[str]().union(*(own for own in keys.values() if own & training))", "pass",
      "test_folder.py::test_splits_that_share_classes_have_one_list"),
    M("a cache is believed", "data/cifar10.py", "    _check({split: (images, labels)})\n", "",
      "test_data.py::test_images_of_another_data_set_are_no_cache"),
    M("labels of other classes are compared", "evaluators/__init__.py", "len(names - {()}) < 2", "True",
      "test_evaluators.py::test_labels_are_compared_only_where_they_are_the_same"),
    # Decoding
    M("the low byte of a colour is its high one", "data/decode.py", '("LB", "BL", "NB")', '("LL", "BB", "NN")',
      "test_decode.py::test_colors_of_16_bits_keep_the_low_byte"),
    M("a TIFF's other pages are dropped", "data/decode.py", "if len(full) > 1:", "if len(full) > 9:",
      "test_decode.py::test_what_would_come_out_wrong_is_refused_in_one_line"),
    M("white that is zero stays black", "data/decode.py", "levels = levels[::-1]", "levels = levels",
      "test_decode.py::test_white_may_be_zero_and_alpha_a_value"),
    M("memory is counted in pixels", "data/decode.py", "if pixels * each > max_pixels * BYTES_PER_PIXEL:",
      "if pixels > max_pixels * BYTES_PER_PIXEL:", "test_decode.py::test_memory_is_counted_in_bytes"),
    M("a bomb of weights is unpacked", "weight_files.py", "for member in members)) > limit:", "for member in members)) > 1e18:",
      "test_npz.py::test_what_is_no_file_of_arrays_is_refused_in_one_line"),
    # Files of weights
    M("a pickle calls any function", "weight_files.py", "if not (is_class or called in DATA or called in NUMPY_ARRAYS):",
      "if not called:", "test_weight_files.py::test_what_is_hostile_or_broken_is_refused_in_one_line"),
    M("classes of Python that run", "weight_files.py", "is_class = is_class and module in DATA_MODULES", "pass",
      "test_weight_files.py::test_what_is_hostile_or_broken_is_refused_in_one_line"),
    M("a tensor one beyond its storage", "weight_files.py", "(sum(steps) + 1 if all", "(sum(steps) if all",
      "test_weight_files.py::test_what_is_hostile_or_broken_is_refused_in_one_line"),
    M("what stands twice counts once", "weight_files.py", "self.visits -= more_visits", "self.visits -= 1",
      "test_weight_files.py::test_what_is_hostile_or_broken_is_refused_in_one_line"),
    M("copies are free", "weight_files.py", "left -= sum(len(arg)", "0 * sum(len(arg)",
      "test_weight_files.py::test_what_is_hostile_or_broken_is_refused_in_one_line"),
    M("tensors of safetensors may overlap", "weight_files.py", "if begin != place:", "if begin > place:",
      "test_weight_files.py::test_broken_safetensors_are_refused_in_one_line"),
    M("numbers at odd bytes", "weight_files.py", "else bytes(content)", "else content",
      "test_weight_files.py::test_arrays_that_are_not_aligned_in_the_file_are_copied"),
    # Quantisers and tokenizers
    M("no gradient through the codes", "models/quantizers.py", "return z + jax.lax.stop_gradient(codes - z)",
      "return jax.lax.stop_gradient(codes)", "test_golden_tokenizers.py::test_ema"),
    M("codes move by their members alone", "models/quantizers.py", "return decay * old + (1 - decay) * new",
      "return (1 - decay) * old + decay * new", "test_golden_tokenizers.py::test_ema"),
    M("new codes count one member", "models/quantizers.py", "vectors * self.threshold", "vectors",
      "test_golden_tokenizers.py::test_codes_that_begin_anew_count_as_many_members_as_the_threshold"),
    M("codes grow", "models/quantizers.py",
      "codebook = unit(moving_average(codebook, unit_means(counts, sums, codebook), self.decay))",
      "codebook = moving_average(codebook, unit_means(counts, sums, codebook), self.decay)",
      "test_golden_tokenizers.py::test_norm_ema"),
    M("codes without members are lost", "models/quantizers.py", "jnp.where(counts[:, None] > 0, means, empty)", "means",
      "test_golden_tokenizers.py::test_a_code_without_members_stays_where_it_was"),
    M("VQ-VAE's loss of values in 0..1", "methods/vqvae.py", "return 4 * error + quantized.loss",
      "return error + quantized.loss", "test_golden_tokenizers.py::test_vqvae_weighs_the_error_of_values_from_minus_1_to_1"),
    M("dVAE's temperature warms up with the divergence", "methods/dvae.py",
      'o.temperature, durations.steps(config, "loss.temperature_decay")',
      'o.temperature, durations.steps(config, "loss.kl_warmup")',
      "test_golden_tokenizers.py::test_what_follows_the_step_in_the_discrete_vae"),
    M("dVAE's temperature rises", "methods/dvae.py", "optim.cosine_schedule(1.0, o.temperature,",
      "optim.cosine_schedule(o.temperature, 1.0,", "test_golden_tokenizers.py::test_what_follows_the_step_in_the_discrete_vae"),
    M("dVAE has no average", "methods/dvae.py", "lambda step: jnp.asarray(config.optim.momentum_teacher)",
      "lambda step: jnp.asarray(0.0)", "test_golden_tokenizers.py::test_what_follows_the_step_in_the_discrete_vae"),
    M("dVAE averages the encoder alone", "methods/dvae.py", '= ("encoder", "decoder")', '= ("encoder",)',
      "test_golden_tokenizers.py::test_what_follows_the_step_in_the_discrete_vae"),
    M("VQ-KD without k-means", "methods/vqkd.py", "if self.kmeans_init:", "if False:",
      "test_golden_tokenizers.py::test_vqkd_begins_with_the_kmeans_of_its_first_batch"),
    M("VQ-KD clusters every batch", "methods/vqkd.py", "jax.lax.cond(step == 0,", "jax.lax.cond(step >= 0,",
      "test_golden_tokenizers.py::test_vqkd_begins_with_the_kmeans_of_its_first_batch"),
    M("VQ-KD clusters vectors of any length", "methods/vqkd.py",
      "vectors = unit(jax.lax.stop_gradient(z.reshape(-1, z.shape[-1])))",
      "vectors = jax.lax.stop_gradient(z.reshape(-1, z.shape[-1]))",
      "test_golden_tokenizers.py::test_vqkd_begins_with_the_kmeans_of_its_first_batch"),
    M("BEiT v2's CLS layers begin as the first", "methods/beit2.py",
      'rescale_residual(blocks["params"], before=self.early_layers)', 'rescale_residual(blocks["params"])',
      "test_golden_beit.py::test_first_values_of_the_second_prediction"),
    M("BEiT v2's patches are of the last layer", "methods/beit2.py", "for i in (self.early_layers - 1, -1))",
      "for i in (-1, -1))", "test_golden_beit.py::test_beit_v2"),
)  # fmt: skip


def copied(folder: Path) -> None:
    """The tree as it is, without what git ignores."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def failure(folder: Path, *tests: str) -> str | None:
    """The first of these tests that fails in the tree at `folder`, with its error unless that is of an assertion.

    Raises RuntimeError if pytest could not run them.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-m", "", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in dict.fromkeys(tests)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ends with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    found = re.search(r"^(?:FAILED|ERROR) tests/(.*?)(?: - (\w*).*)?$", done.stdout, re.MULTILINE)
    if not found:
        return None
    return found[1] if found[2] in ("AssertionError", "assert", None) else f"{found[1]} ({found[2]})"


def mutated(text: str, mutation: Mutation) -> str:
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def main(names: list[str]) -> int:
    if unknown := set(names) - {mutation.name for mutation in MUTATIONS}:
        raise SystemExit(f"no such mutations: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(folder)
        for mutation in chosen:  # all of them before any test
            mutated((folder / "mim_jax" / mutation.file).read_text(), mutation)
        if failed := failure(folder, *(mutation.tests for mutation in chosen)):
            raise SystemExit(f"{failed} fails without any mutation")
        for mutation in chosen:
            file, begun = folder / "mim_jax" / mutation.file, time.time()
            text = file.read_text()
            file.write_text(mutated(text, mutation))
            failed = failure(folder, mutation.tests)
            file.write_text(text)
            survivors += failed is None
            told = f"caught by {failed}" if failed else "SURVIVED"
            print(f"{mutation.name:<52} {told} ({time.time() - begun:.0f} s)", flush=True)
    print(f"{len(chosen)} mutations, {survivors} survived")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
