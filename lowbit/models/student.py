"""Which student: the teacher's shape or some of its layers, or a named size from random weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lowbit import UserError
from lowbit.models.decoder import STUDENT_SIZES, CausalLM, ModelConfig
from lowbit.models.interface import LanguageModel
from lowbit.models.transformers_lm import TransformersLM, clone, from_config


def spaced_layers(count: int, kept: int) -> list[int]:
    """``kept`` of ``count`` layers, evenly spaced, the first and (of several) the last among
    them."""
    return np.linspace(0, count - 1, kept).round().astype(int).tolist()


def settle_student(o: argparse.Namespace, teacher: LanguageModel) -> None:
    """Fill in --student_init; UserError where size, layers and start contradict each other."""
    own_shape = o.student_size == "same" or (
        isinstance(teacher, CausalLM) and sized(teacher, o.student_size) == teacher.config
    )
    if o.student_init is None:
        o.student_init = "teacher" if own_shape else "random"
    if o.student_init == "teacher" and not own_shape:
        raise UserError(
            f"--student_init teacher needs the teacher's shape; --student_size {o.student_size} "
            "differs (use --student_init random)"
        )
    layers = len(teacher.blocks)
    if o.student_layers is not None:
        if o.student_layers > layers:
            raise UserError(f"--student_layers {o.student_layers}: the teacher has {layers}")
        if o.student_init == "random":
            raise UserError(
                "--student_layers takes layers of the teacher; it contradicts --student_init "
                "random and a named --student_size"
            )


def sized(teacher: LanguageModel, size: str) -> ModelConfig:
    """A plain decoder of a named size for the teacher's vocabulary."""
    shape: dict[str, Any] = dict(STUDENT_SIZES[size])
    if isinstance(teacher, CausalLM):
        return replace(teacher.config, **shape)
    positions = min(teacher.max_positions, ModelConfig.max_position_embeddings)
    return ModelConfig(vocab_size=teacher.vocab_size, max_position_embeddings=positions, **shape)


def make_student(o: argparse.Namespace, teacher: LanguageModel) -> LanguageModel:
    """The student in float32, started as asked (`settle_student` went before)."""
    layers = None
    if o.student_layers is not None:
        layers = spaced_layers(len(teacher.blocks), o.student_layers)
    if isinstance(teacher, TransformersLM) and o.student_size == "same":
        if o.student_init == "random":
            torch.manual_seed(o.seed)
            return with_ends_of(teacher, from_config(teacher.describe()["transformers"]))
        return clone(teacher, layers)
    config = (
        teacher.config
        if isinstance(teacher, CausalLM) and o.student_size == "same"
        else sized(teacher, o.student_size)
    )
    if layers is not None:
        config = replace(config, num_hidden_layers=len(layers))
    student = CausalLM(config).initialise(o.seed)
    if o.student_init == "teacher":
        whole = teacher.state_dict()
        state = dict(whole)
        for i, layer in enumerate(layers or []):
            mine, theirs = f"model.layers.{i}.", f"model.layers.{layer}."
            state |= {
                mine + k.removeprefix(theirs): v for k, v in whole.items() if k.startswith(theirs)
            }
        student.load_state_dict({k: state[k] for k in student.state_dict()})
    return student


def with_ends_of(teacher: TransformersLM, student: TransformersLM) -> TransformersLM:
    """The student with the teacher's embedding and head, copied: `quantize_model` freezes them, and
    random ones would stay random."""
    ends = ((student.embedding, teacher.embedding), (student.output, teacher.output))
    for mine, theirs in ends:
        if mine is not None and theirs is not None:
            mine.load_state_dict(theirs.state_dict())
    return student
