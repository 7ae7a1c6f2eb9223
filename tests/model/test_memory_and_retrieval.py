"""The tensor functions against plain arithmetic: memory slots, L_MSE, cosine, straight-through top-k, InfoNCE."""

import doctest

import pytest
import torch

from modeling_clara import memory_clara, retrieval_clara, text_clara
from modeling_clara.memory_clara import (
    check_slots,
    memory_alignment_loss,
    place_memory_tokens,
    read_memory,
    write_memory,
)
from modeling_clara.retrieval_clara import (
    batch_scores,
    contrastive_loss,
    cosine_scores,
    select_memory,
    straight_through_topk,
)


def test_memory_tokens_stand_directly_after_each_text():
    texts = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [0.0], [0.0]]])
    placed = place_memory_tokens(texts, torch.tensor([3, 1]), torch.tensor([[8.0], [9.0]]))
    assert placed.squeeze(-1).tolist() == [[1, 2, 3, 8, 9], [4, 8, 9, 0, 0]]
    assert read_memory(placed, torch.tensor([3, 1]), 2).squeeze(-1).tolist() == [[8, 9], [8, 9]]


def test_memories_are_written_into_slots_in_order_and_a_wrong_number_of_slots_names_the_row():
    mask = torch.tensor([[False, True, True], [True, False, True]])
    written = write_memory(torch.zeros(2, 3, 1), mask, torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert written.squeeze(-1).tolist() == [[0, 1, 2], [3, 0, 4]]
    check_slots(mask, torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"memory_mask\[1\]` must mark 3 slots.*got 2"):
        check_slots(mask, torch.tensor([2, 3]))


def test_alignment_loss_is_the_mean_square_between_mean_states():
    states = torch.tensor([[[1.0, 3.0], [3.0, 5.0], [99.0, 99.0]]])
    memory = torch.tensor([[[0.0, 0.0], [2.0, 2.0]]])
    loss = memory_alignment_loss(states, torch.tensor([[True, True, False]]), memory)
    assert loss.tolist() == [((2 - 1) ** 2 + (4 - 1) ** 2) / 2]


def test_scores_are_cosines_of_the_first_vectors_flattened():
    generator = torch.Generator().manual_seed(0)
    query, memory = torch.randn(2, 4, 3, generator=generator), torch.randn(2, 5, 4, 3, generator=generator)
    for k in (1, 2, 4):
        a, b = query[:, :k].flatten(1).double()[:, None], memory[:, :, :k].flatten(2).double()
        expected = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        torch.testing.assert_close(cosine_scores(query, memory, k).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scores", "ranking"), [([0.5, 0.9, 0.5, 0.9], [1, 3, 0, 2]), ([1.0, 0.0, -1.0], [0, 1, 2])], ids=["ties", "far"]
)
def test_topk_takes_each_candidate_once_and_ties_go_to_the_lower_index(scores, ranking):
    """log(1e-8) as a mask of what is taken is beaten by a gap of 0.37 at temperature 0.02; -inf is not."""
    selection, selected = straight_through_topk(torch.tensor([scores]), len(scores), 0.02)
    assert selected.tolist() == selection.argmax(-1).tolist() == [ranking]
    assert selection.sum(-1).tolist() == [[1] * len(scores)]
    memory = torch.randn(1, len(scores), 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(select_memory(selection, memory)[0], memory[0, ranking])
    with pytest.raises(ValueError, match=rf"`top_k` must be <= number of candidates \({len(scores)}\), got 5"):
        straight_through_topk(torch.tensor([scores]), 5, 0.02)


def test_topk_is_hard_forward_and_soft_backward():
    scores = torch.tensor([[0.30, 0.20, 0.10]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    selection, _ = straight_through_topk(scores, 2, 0.1)
    assert selection.detach().tolist() == [[[1, 0, 0], [0, 1, 0]]]
    (selection @ weights).sum().backward()
    soft = scores.detach().clone().requires_grad_()
    first = torch.softmax(soft[0] / 0.1, -1) @ weights
    second = torch.softmax(soft[0, 1:] / 0.1, -1) @ weights[1:]  # the slot without the candidate already taken
    (first + second).backward()
    torch.testing.assert_close(scores.grad, soft.grad)


def test_topk_with_missing_candidates_gives_zero_rows_and_finite_gradients():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]], requires_grad=True)
    mask = torch.tensor([[False, True, False], [True, True, True]])
    selection, selected = straight_through_topk(scores, 2, 0.02, mask)
    assert selected.tolist() == [[1, -1], [2, 1]]
    assert selection[0, 1].abs().sum() == 0
    (selection * torch.randn(2, 2, 3)).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[0, [0, 2]].tolist() == [0, 0]


def test_contrastive_loss_is_the_negative_log_probability_of_the_positives():
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]])
    positives = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    loss = contrastive_loss(scores, positives, 0.1)
    p = torch.softmax(scores[0] / 0.1, -1)
    torch.testing.assert_close(loss, torch.stack([-p[0].log(), -(p[0] + p[1]).log(), torch.tensor(0.0)]))
    masked = contrastive_loss(scores, positives, 0.1, torch.tensor([[True, True, False]] * 3))
    torch.testing.assert_close(masked[0], -torch.softmax(scores[0, :2] / 0.1, -1)[0].log())
    assert masked[1] == 0


@pytest.mark.parametrize("module", [memory_clara, retrieval_clara, text_clara])
def test_docstring_examples(module):
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_scores_are_float32_under_autocast():
    """In bfloat16 cosines nearer than 0.004 would tie, and the lower index would win."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(8, 1, 4, 32, generator=generator) + 0.1 * torch.randn(8, 20, 4, 32, generator=generator)
    query = memory[:, 0] + 0.5 * torch.randn(8, 4, 32, generator=generator)
    expected = cosine_scores(query, memory, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = cosine_scores(query, memory, 4)
        _, selected = straight_through_topk(scores, 5, 0.02)
        across = batch_scores(query, memory, 4).view(8, 8, 20)
    assert scores.dtype == across.dtype == torch.float32 and torch.equal(scores, expected)
    torch.testing.assert_close(across[range(8), range(8)], expected)
    assert torch.equal(selected, expected.topk(5).indices)
