"""Judge a classifier's robustness by its worst case, beside that of the model it was made from.

`evaluate` works for any `nn.Module`; see its docstring for the protocol. The files, by idea:

    protocol.py     the public call: which rows are run, in which order, and why
    pool.py         many models made from one base, judged together
    attacks.py      the table of attacks
    transfer.py     attacks made on one model for another; further.py: what the thorough plan adds
    surrogate.py    BPDA with a smooth stand-in for the threshold
    gradients.py    the two backwards an attack may see: the true one and the straight-through one (BPDA)
    blocks.py       the unit of work, and of what is random: done here, recalled, or done by another process
    journal.py      an unfinished run, which the same call continues
    harness.py      runs rows on what still stands, and believes no claim that it has not checked
    compiled.py     compiled models, and what they are eagerly
    threat.py       what an attacker may do: the ball and the box
    copies.py       which inputs are copies of others, which count in no test
    checks.py       what is asked of the caller's input, and the model handed back as it was found
    probes.py       what is measured on a model to find out whether attacks on it can be trusted
    reach.py        whether anything that is run sees through what was made of the base
    past.py         whether a model answers as it did before it was asked anything
    scale.py        whether inputs have the size that calibration saw
    findings.py     the table of checks: a figure, a bound, raised or not
    statistics.py   paired comparison of two accuracies
    verdict.py      from figures to one word
    result.py       what was found: rows, outcomes by example, adversarial examples
    fingerprint.py  SHA-256 of tensors and files: which model and which data a figure belongs to
    answers.py      what a model answered, in a few numbers: whether its code is still what it was
    gallery.py      a few broken inputs as they were, for a page to show
    record.py       the same as a folder
    comparison.py   two results on the same examples, side by side
    terminal.py     the table, and progress on a terminal

Importing this package needs torch only; pyautoattack, rich and safetensors are imported when first used.
"""

from forged_fx.evaluate.comparison import Comparison, compare
from forged_fx.evaluate.protocol import evaluate
from forged_fx.evaluate.result import Result

__all__ = ["Comparison", "Result", "compare", "evaluate"]
