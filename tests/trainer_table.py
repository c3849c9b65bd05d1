"""The page docs/trainers.md, made of what tests/test_trainers.py found."""

from collections.abc import Mapping

from tests.trainers import CHECKPOINTING, NOT_POSSIBLE, TRAINERS, WAYS

Cell = tuple[str, str, str]  # trainer, way, checkpointing
HEAD = """\
# Trainers

What `tests/test_trainers.py` found with TRL {trl}, transformers {transformers}, peft {peft} and
torch {torch}, and holds this page to. The subnetwork gets in as `peft_config=SubnetConfig(...)`, as
a model wrapped before by `get_peft_model`, or by `callbacks=[SubnetCallback(...)]`; everything else
is the trainer's own.

"yes" says four things of a run of two steps on a tiny Llama, with a mask of 10% of every parameter,
embeddings, norms and biases included: the masked weights moved; every weight outside the mask has
the bits it had; a run resumed after its first step ends with the bits of one that did not stop; if
the algorithm has a reference, that was the base model, bit for bit. It was the *same model* (the
adapter switched off or, wrapped before, TRL's copy of it), a *second model*, or it was run *before
training*.

"""
FOOT = """
The fp32 head is that of an untied bf16 model, and not masked: TRL 1.16 cannot cast a tied one in a
PeftModel, and a masked weight is not cast after the fact. The modules to save of the classification
are its head.

`AsyncGRPOTrainer` wants vLLM and a GPU. tests/test_async_grpo.py goes as far as its transport:
`peft_config=` and wrapped models send whole weights under the base's names; the callback is
refused, as TRL would send compact values. `sync_ref_model=True` is refused: with a PeftModel by
TRL, with the callback by us.
"""


def page(found: Mapping[Cell, str], versions: Mapping[str, str]) -> str:
    """Lay out the page."""
    columns = [(way, kind) for way in WAYS for kind in CHECKPOINTING]
    lines = ["| | " + " | ".join(f"`{way}`, {kind}" for way, kind in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in TRAINERS:
        cells = [
            f"no: {NOT_POSSIBLE[name, way][2]}"
            if (name, way) in NOT_POSSIBLE
            else found[name, way, kind]
            for way, kind in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return HEAD.format(**versions) + "\n".join(lines) + "\n" + FOOT
