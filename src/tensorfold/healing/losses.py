"""The losses of healing: cross-entropy, and distances between student and teacher in logits and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensorfold.calibration.block_calls import output_of
from tensorfold.errors import InputError, pass_on_memory
from tensorfold.healing.logit_losses import logit_losses
from tensorfold.healing.noise import Noise
from tensorfold.models.anatomy import blocks, matrices
from tensorfold.recipes.settings import HealSettings
from tensorfold.utils.finite import why_not_finite

Forward = Callable[..., Any]


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over queries of ``KL(teacher ‖ student)`` between attention probabilities, in nats.

    Masked keys have probability 0 in both and add nothing.

    Args:
        student: Probabilities, shape (batch, heads, queries, keys).
        teacher: Probabilities, with that shape.
    """
    teacher = teacher.float()
    log_ratio = torch.log(student.float().clamp_min(torch.finfo(torch.float32).tiny))
    per_row = (torch.xlogy(teacher, teacher) - teacher * log_ratio).sum(-1)
    return per_row.mean()


def feed_forward_names(model: PreTrainedModel) -> list[str]:
    """Path of the module in each block whose output is the MLP's.

    That is the module that holds all matrices of the MLP, or the last of them where the block itself holds them.

    Raises:
        InputError: A block has no MLP matrix.
    """
    prefix, chain = blocks(model)
    inside: dict[int, list[list[str]]] = {}
    for name, matrix in matrices(model).items():
        if matrix.group == "mlp":
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            inside.setdefault(int(number), []).append(rest.split("."))
    if len(inside) < len(chain):
        raise InputError(
            f"heal: {type(model).__name__} has {len(chain)} blocks and a plain MLP in {len(inside)} of them; the ffn "
            "term needs one in each block of the teacher. Give a dense teacher, or set ffn=0."
        )
    names = []
    for index, paths in sorted(inside.items()):
        common: list[str] = []
        for parts in zip(*(path[:-1] for path in paths), strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        names.append(".".join([prefix, str(index), *(common or paths[-1])]))
    return names


class _Watch:
    """A recorder of the outputs of some modules.

    Outputs are kept for one forward pass only, so that passes of gradient checkpointing, which compute blocks again, do
    not hold on to them.

    Args:
        ffn: Paths of the modules to record.
        embedding: Whether to record the input embedding too, as ``embedding``.
    """

    def __init__(self, model: PreTrainedModel, ffn: list[str], embedding: bool) -> None:
        modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in ffn}
        if embedding:
            modules["embedding"] = model.get_input_embeddings()
        self.outputs: dict[str, Tensor] = {}
        self._active = False
        self._handles = [module.register_forward_hook(self._keeper(name)) for name, module in modules.items()]

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if self._active:
                self.outputs[name] = output_of(output)

        return keep

    @contextmanager
    def watching(self) -> Iterator[dict[str, Tensor]]:
        """Record while the context is open; yields the outputs by name, as they come."""
        self._active = True
        try:
            yield self.outputs
        finally:
            self._active, self.outputs = False, {}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class HealLoss:
    """The loss of end-to-end healing.

    ``cross_entropy·CE + kl·T²·KL + embedding·MSE(embedding output) + attention·KL(attention) + ffn·MSE(MLP output)``,
    the terms of KnGPT2 (arXiv 2110.08152). MSE is the mean over elements. The terms of attention and MLP are means over
    blocks, so that a weight means the same at every depth.

    Only CE is computed with the student's dropout. Terms that compare with the teacher take a pass without it, since
    two equal models would otherwise differ by what was drawn.

    Args:
        settings: Weights of the terms, temperature and dropout.
        student: The model to train; it has hooks and ``settings.dropout`` until :meth:`close`.
        teacher: The dense model, needed for every term but CE; in evaluation mode and without gradients until
            :meth:`close`.

    Raises:
        InputError: A term cannot be computed for this pair of models; the message says which and why.
    """

    def __init__(self, settings: HealSettings, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self.settings, self.teacher = settings, teacher
        self.weights = {
            name: weight
            for name in ("cross_entropy", "kl", "embedding", "attention", "ffn")
            if (weight := getattr(settings, name))
        }
        if not self.weights:
            raise InputError("heal: every term of the loss has weight 0; needed a positive cross_entropy or kl, say.")
        self._needs_teacher = bool(self.weights.keys() - {"cross_entropy"})
        self._watches: list[_Watch] = []
        self._attention: list[tuple[PreTrainedModel, str]] = []
        self._kept = ExitStack()
        self.noise = Noise(student, settings.dropout)
        self._kept.callback(self.noise.restore)
        try:
            if self._needs_teacher:
                self._watch(student, teacher)
        except BaseException:
            self.close()
            raise

    def _watch(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Check that every term can be computed for this pair of models, and register the hooks.

        Raises:
            InputError: A term cannot be computed.
        """
        if teacher is None:
            terms = ", ".join(sorted(self.weights.keys() - {"cross_entropy"}))
            raise InputError(f"heal: {terms} compare with a teacher, and none was given; name the dense model.")
        _check_pair(self.weights, student, teacher)
        ffn = feed_forward_names(teacher) if "ffn" in self.weights else []
        for name in ffn:
            try:
                student.get_submodule(name)
            except AttributeError:
                raise InputError(f"heal: the student has no module {name}, which the ffn term compares.") from None
        modes = [(module, module.training) for module in teacher.modules()]
        wanted = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
        self._kept.callback(_give_back, modes, wanted)
        teacher.eval().requires_grad_(False)
        if "attention" in self.weights:
            self._give_attention(student, teacher)
        self._watches = [_Watch(model, ffn, "embedding" in self.weights) for model in (student, teacher)]

    def _give_attention(self, *models: PreTrainedModel) -> None:
        """Switch models to eager attention, the only implementation that returns its probabilities.

        :meth:`close` switches them back.

        Raises:
            InputError: A model has no eager attention, or the two differ in the shapes of their attention.
        """
        shapes = []
        for model in models:
            kind = type(model).__name__
            previous = model.config._attn_implementation
            needed = "the attention term needs attention probabilities (attn_implementation='eager'); set attention=0."
            try:
                model.set_attn_implementation("eager")
                self._attention.append((model, previous))
                with torch.no_grad():
                    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
                    given = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
            except (ValueError, TypeError, NotImplementedError) as error:
                pass_on_memory(error)
                raise InputError(f"heal: {kind} has no eager attention ({error}); {needed}") from error
            if not given or any(each is None for each in given):
                raise InputError(f"heal: {kind} does not return attention probabilities; {needed}")
            shapes.append([tuple(each.shape) for each in given])
        if shapes[0] != shapes[1]:
            raise InputError(
                f"heal: student and teacher have attention of shapes {shapes[0][0]} and {shapes[1][0]}; the attention "
                "term needs equal ones. Set attention=0."
            )

    def __call__(
        self, forward: Forward, teach: Forward | None, ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch.

        Args:
            forward: Calls the student, perhaps wrapped for several devices.
            teach: Calls the teacher without gradients, in the precision of the student.
            ids: Token ids, shape (batch, length).
            labels: See :func:`cross_entropy`; the ids if None.

        Returns:
            The loss, a scalar, and its terms by name, without weights and detached.
        """
        labels = ids if labels is None else labels
        options: dict[str, Any] = {"use_cache": False}
        terms: dict[str, Tensor] = {}
        entropy = self.weights.get("cross_entropy", 0.0)
        total: Tensor | float = 0.0
        if entropy and (not self._needs_teacher or self.settings.dropout > 0):
            total, terms = logit_losses(forward(input_ids=ids, **options).logits, labels, cross_entropy=entropy)
            entropy = 0.0
        if self._needs_teacher:
            assert teach is not None
            if "attention" in self.weights:
                options["output_attentions"] = True
            ours, theirs = self._watches
            with ours.watching() as seen, theirs.watching() as wanted, self.noise.off():
                with torch.no_grad():
                    target = teach(input_ids=ids, **options)
                given = forward(input_ids=ids, **options)
                if entropy or "kl" in self.weights:
                    of_logits, found = logit_losses(
                        given.logits,
                        labels,
                        target.logits,
                        cross_entropy=entropy,
                        kl=self.weights.get("kl", 0.0),
                        temperature=self.settings.temperature,
                    )
                    total, terms = total + of_logits, terms | found
                compared = self._compare(given, seen, target, wanted)
                total = total + sum(self.weights[name] * term for name, term in compared.items())
                terms |= {name: term.detach() for name, term in compared.items()}
        assert isinstance(total, Tensor)
        return total, terms

    def _compare(
        self, given: Any, seen: Mapping[str, Tensor], target: Any, wanted: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The terms that compare what is inside the two models, from their outputs and those of watched modules."""
        terms: dict[str, Tensor] = {}
        if "embedding" in self.weights:
            terms["embedding"] = _mse(seen["embedding"], wanted["embedding"])
        if "attention" in self.weights:
            pairs = zip(given.attentions, target.attentions, strict=True)
            terms["attention"] = torch.stack([attention_kl(student, teacher) for student, teacher in pairs]).mean()
        if "ffn" in self.weights:
            errors = [_mse(seen[name], wanted[name]) for name in wanted if name != "embedding"]
            terms["ffn"] = torch.stack(errors).mean()
        return terms

    def remedy(self) -> str:
        """Advice on a loss that is NaN or infinite, as a sentence for the user.

        The student trains in float32, but a teacher runs in its own dtype, so float16 may have overflowed there.
        """
        if self.teacher is not None and any(each.dtype is torch.float16 for each in self.teacher.parameters()):
            return f"If the teacher is the cause: {why_not_finite(self.teacher)}."
        return f"Start again with a lower lr than {self.settings.lr}, or with more warmup."

    def close(self) -> None:
        """Give both models back as they came: without hooks, with their attention, dropout, modes and gradients."""
        for watch in self._watches:
            watch.close()
        for model, implementation in self._attention:
            model.set_attn_implementation(implementation)
        self._watches, self._attention = [], []
        self._kept.close()


def _give_back(modes: list[tuple[nn.Module, bool]], wanted: list[nn.Parameter]) -> None:
    """Set the modes of modules, and make parameters require gradients, as they did before."""
    for module, training in modes:
        module.training = training
    for parameter in wanted:
        parameter.requires_grad_(True)


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student.float(), teacher.float())


def _check_pair(weights: Mapping[str, float], student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise :class:`InputError` where the models differ in vocabulary, width or depth and a term needs them equal."""
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    pairs = []
    if "kl" in weights:
        pairs.append(("kl", "tokens in the vocabulary", ours.vocab_size, theirs.vocab_size))
    if "embedding" in weights or "ffn" in weights:
        term = "embedding" if "embedding" in weights else "ffn"
        pairs.append((term, "as width", ours.hidden_size, theirs.hidden_size))
    if "ffn" in weights or "attention" in weights:
        term = "ffn" if "ffn" in weights else "attention"
        pairs.append((term, "blocks", len(blocks(student)[1]), len(blocks(teacher)[1])))
    for term, what, mine, its in pairs:
        if mine != its:
            raise InputError(
                f"heal: the student has {mine} {what}, the teacher {its}; the {term} term needs equal ones. Give the "
                f"dense model the student was folded from, or set {term}=0."
            )
