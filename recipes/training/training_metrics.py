"""Metrics of a training step as totals and counts, which add up over micro-batches, steps and processes."""

import torch

RECALL_AT = (1, 3, 5)


class MetricSums:
    """Totals and counts by name."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, total, count) -> None:
        """Add a total over `count` things; count 0 makes it a plain sum."""
        total = torch.as_tensor(total).detach().double()
        pair = torch.stack([total, torch.as_tensor(count, device=total.device).double()])  # no synchronisation here
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self, accelerator) -> dict[str, float]:
        """name -> total / count over all processes, or the total if nothing was counted; NaN-free."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        table = torch.stack([self.sums[name].to(accelerator.device) for name in names])
        table = accelerator.reduce(table, "sum").cpu()
        return {
            name: float(total / count if count else total) for name, (total, count) in zip(names, table, strict=True)
        }


def exact_matches(
    logits: torch.Tensor, labels: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[torch.Tensor, int]:
    """Prompts whose every target token is the most probable one, which is what greedy decoding would write.

    Args:
        logits: (targets, vocabulary) of the target positions, row after row.
        labels: (rows, length), -100 if there is no target.
        segments: (rows, length), the prompt of every target if a row has several; default: a row is a prompt.

    Returns:
        Number of such prompts, number of prompts with targets.

    >>> logits = torch.eye(3)[[0, 1, 2]]
    >>> exact_matches(logits, torch.tensor([[-100, 0, 1], [-100, -100, 1]]))
    (tensor(1), 2)
    >>> exact_matches(logits, torch.tensor([[-100, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2]]))
    (tensor(1), 2)
    """
    targets = labels[:, 1:]
    is_target = targets != -100
    prompts = torch.zeros_like(labels) if segments is None else segments
    prompts = prompts[:, 1:] + (1 + prompts.max()) * torch.arange(len(labels), device=labels.device)[:, None]
    found, inverse = prompts[is_target].unique(return_inverse=True)
    wrong = (logits.argmax(-1) != targets[is_target]).long()
    return (torch.zeros_like(found).index_add(0, inverse, wrong) == 0).sum(), len(found)


def ranking_metrics(scores: torch.Tensor, positive_mask: torch.Tensor) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Recall@1/3/5, MRR and the margin of the gold documents, over rows that have any among their candidates.

    Recall@k is the share of a row's gold documents among its k best; MRR takes the best gold one; the margin is the
    best gold score minus the best other score. Ties count against the gold document.

    Args:
        scores: (rows, candidates) float, -inf where there is no candidate.
        positive_mask: (rows, candidates) bool.

    Returns:
        (name, total, count) of each metric.
    """
    scores = scores.float()
    has_gold = positive_mask.any(-1)
    scores, positive_mask = scores[has_gold], positive_mask[has_gold]
    count = has_gold.sum()
    other = scores.masked_fill(positive_mask, -torch.inf)
    # rank of a gold document: what scores better, and other documents that tie with it
    better = (scores[:, None, :] > scores[:, :, None]).sum(-1) + (other[:, None, :] == scores[:, :, None]).sum(-1)
    rank = torch.where(positive_mask, better, torch.full_like(better, 1 << 30))
    metrics = [(f"recall@{k}", ((rank < k).sum(-1) / positive_mask.sum(-1)).sum(), count) for k in RECALL_AT]
    metrics.append(("mrr", (1 / (1 + rank.min(-1).values)).sum(), count))
    margin = scores.masked_fill(~positive_mask, -torch.inf).max(-1).values - other.max(-1).values
    finite = margin.isfinite()
    metrics.append(("margin", margin[finite].sum(), finite.sum()))
    return metrics
