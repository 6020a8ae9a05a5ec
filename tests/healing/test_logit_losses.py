"""Cross-entropy and distillation in one pass over the rows, against autograd on their formulas."""

import pytest
import torch
import torch.nn.functional as F

from tensorfold.healing import logit_losses as module
from tensorfold.healing.logit_losses import cross_entropy, logit_losses


@pytest.fixture(params=[1, 1000], ids=["a row at a time", "all rows at once"])
def case(request, monkeypatch):
    """Logits of student and teacher, and labels of which some are not to be predicted."""
    monkeypatch.setattr(module, "_ON_CPU", request.param)
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 3, 7, 11, generator=generator).mul(3).unbind()
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[2] = -100
    return student.requires_grad_(True), teacher, labels


def formula(student, teacher, labels, entropy, kl, temperature):
    terms = {}
    flat = student.double()
    if entropy:
        terms["cross_entropy"] = F.cross_entropy(flat[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if kl:
        p, q = ((each.double() / temperature).log_softmax(-1) for each in (student, teacher))
        terms["kl"] = temperature**2 * (q.exp() * (q - p)).sum(-1).mean()
    return entropy * terms.get("cross_entropy", 0) + kl * terms.get("kl", 0), terms


@pytest.mark.parametrize(
    ("entropy", "kl", "temperature"), [(1, 0, 1), (0, 1, 1), (0, 2, 3), (0.5, 2, 1), (0.5, 0.25, 2)]
)
def test_value_and_gradient_are_those_of_the_formulas(case, entropy, kl, temperature):
    student, teacher, labels = case
    expected, parts = formula(student, teacher, labels, entropy, kl, temperature)
    (slope,) = torch.autograd.grad(expected, student)
    total, terms = logit_losses(student, labels, teacher, entropy, kl, temperature)
    (3 * total).backward()
    assert terms.keys() == parts.keys()
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(total, expected.float())
    for name, term in terms.items():
        torch.testing.assert_close(term, parts[name].detach().float())
    torch.testing.assert_close(student.grad, 3 * slope)


def test_cross_entropy_by_itself(case):
    student, teacher, labels = case
    torch.testing.assert_close(cross_entropy(student, labels), formula(student, teacher, labels, 1, 0, 1)[0].float())


def test_logits_of_bfloat16_have_a_gradient_of_bfloat16(case):
    student, teacher, labels = case
    rounded = student.detach().bfloat16().requires_grad_(True)
    expected, _ = formula(rounded, teacher, labels, 1, 1, 1)
    (slope,) = torch.autograd.grad(expected, rounded)
    total, _ = logit_losses(rounded, labels, teacher.bfloat16().float(), 1, 1)
    total.backward()
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad, slope, rtol=0.02, atol=1e-3)


def test_without_anything_to_predict_the_loss_is_not_a_number(case):
    student, _, labels = case
    assert cross_entropy(student, torch.full_like(labels, -100)).isnan()  # as the mean over no tokens


def test_no_gradient_is_made_where_none_is_wanted(case):
    student, teacher, labels = case
    total, _ = logit_losses(student.detach(), labels, teacher, 1, 1)
    assert not total.requires_grad
    with torch.no_grad():
        assert not cross_entropy(student, labels).requires_grad
